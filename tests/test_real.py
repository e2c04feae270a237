"""The recipe of real pictures, on packages that are made here: its records, its first run, its table."""

import dataclasses
import gzip
import io
import json
import random
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
from benchmarks import real, real_data
from benchmarks.real_data import (
    CHECK,
    CHOICE,
    CLOTHES,
    GROUPS,
    HELD_OUT,
    KIND,
    KINDS,
    NAME,
    STYLES,
    RealDataConfig,
    Thing,
    fetch,
    names_of,
    read_emoji,
    show,
    vary,
    write,
)
from nanovlm.data.records import to_sample
from nanovlm.data.source import first_pass
from nanovlm.data.sources import open_source
from nanovlm.errors import UserError

NAMES = {
    "Animals & Nature": ["cat", "dog", "polar-bear"],
    "Food & Drink": ["bread", "pear"],
    "Travel & Places": ["bus", "ship"],
    "Activities": ["kite", "skis"],
}


def icons(style: str) -> bytes:
    """A style in Iconify's JSON; what is held out is empty, so that its pictures are known when they are seen."""
    body = "" if style == HELD_OUT else '<path d="M2 2h20v12h-20z"/>'
    found = {name: {"body": body} for names in NAMES.values() for name in names}
    if style == "openmoji":
        del found["kite"]
    return json.dumps({"icons": found, "width": 24, "height": 24}).encode()


def ubyte(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes())


def clothes(folder: Path):
    for split, num in (("train", 40), ("t10k", 20)):
        labels = np.arange(num) % 10
        pixels = np.zeros((num, 28, 28)) + 20 * labels[:, None, None] + 30
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(ubyte(pixels))
        (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(ubyte(labels))


def package_manager(place: str, what: str, *command: str):
    """npm, apt-get and dpkg-deb, of packages in the layout of the real ones."""
    if command[0] == "npm":
        members = {
            "package/icons.json": icons(command[-1].removeprefix("@iconify-json/")),
            "package/metadata.json": json.dumps({"categories": NAMES}).encode(),
        }
        with tarfile.open(Path(place, "x.tgz"), "w:gz") as tar:
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    elif command[0] == "apt-get":
        Path(place, "x.deb").touch()
    else:
        folder = Path(place, "usr/share/datasets/fashion-mnist")
        folder.mkdir(parents=True)
        clothes(folder)


def draw_svg(svg: str) -> Image.Image:
    image = Image.new("RGBA", (96, 96))
    if "path" in svg:
        image.paste((200, 30, 30, 255), (8, 8, 88, 50))
    return image


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_data, "call", package_manager)
        patch.setattr(real_data, "draw_svg", draw_svg)
        folder = tmp_path_factory.mktemp("real")
        write(RealDataConfig(folder, num_variants=2, num_photographs=20, num_questions=120, num_tests=7))
    return folder


def read(path: Path) -> list[dict]:
    source = open_source(str(path))
    return [source.read(ref.key) for ref in first_pass(source)]


def pictures(path: Path) -> list[np.ndarray]:
    return [np.asarray(to_sample(record).images[0]) for record in read(path)]


def test_packages_are_fetched_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(real_data, "call", lambda *args: (asked.append(args[2:]), package_manager(*args)))
    fetch(tmp_path)
    assert [command[-1] for command in asked[:-2]] == [f"@iconify-json/{style}" for style in STYLES]
    assert [command[0] for command in asked[-2:]] == ["apt-get", "dpkg-deb"]
    fetch(tmp_path)
    assert len(asked) == len(STYLES) + 2
    (tmp_path / "noto.json").unlink()
    fetch(tmp_path)
    assert asked[-1][-1] == "@iconify-json/noto" and len(asked) == len(STYLES) + 3


def test_what_cannot_be_fetched_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(real_data.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="npm package @iconify-json/noto is fetched by npm, which is not installed"):
        fetch(tmp_path)
    monkeypatch.undo()
    with pytest.raises(UserError, match="the thing could not be fetched: false failed: it says nothing"):
        real_data.call(str(tmp_path), "thing", "false")


def test_a_name_is_one_word_that_all_styles_have(folder):
    styles, kinds = read_emoji(folder / "packages")
    assert kinds == {
        "cat": "nature", "dog": "nature", "bread": "food", "pear": "food", "bus": "travel", "ship": "travel",
        "skis": "activity",
    }  # fmt: skip
    assert set(styles) == set(STYLES) and styles["noto"]["cat"].startswith("<svg ")
    assert names_of(folder) == kinds | dict.fromkeys(CLOTHES, "clothing")


def test_training_never_sees_the_style_of_the_test(folder):
    assert all(shown.min() == 255 for shown in pictures(folder / "emoji_test.tar"))  # empty, on white
    for name in ("contrast", "naming", "answers"):
        shown = pictures(folder / f"{name}.tar")
        kinds = [record["texts"][-1]["assistant"] for record in read(folder / f"{name}.tar")]
        of_emoji = [x for x, kind in zip(shown, kinds, strict=True) if not any(c in kind for c in CLOTHES)]
        assert len(of_emoji) > 50 and all(x.std() > 3 for x in of_emoji)
        assert all(x.shape == (48, 48, 3) for x in shown)


@pytest.mark.parametrize("name", ["answers", "emoji_test", "clothes_test"])
def test_answers_are_true_and_tests_have_words_of_their_own(folder, name):
    kinds, is_test = names_of(folder), name != "answers"
    checks = set()
    for record in read(folder / f"{name}.tar"):
        assert record["independent"] is True
        by_kind = {turn["kind"]: (turn["user"], turn["assistant"]) for turn in record["texts"]}
        truth = by_kind["name"][1]
        assert by_kind["kind"][1] == kinds[truth] and all(kind in by_kind["kind"][0] for kind in KINDS)
        asked, said = by_kind["check"]
        assert said == ("yes" if truth in re.findall(r"[a-z-]+", asked) else "no")
        checks.add(said)
        asked, said = by_kind["choice"]
        assert said == truth and sum(other in re.findall(r"[a-z-]+", asked) for other in kinds) == 2
        for kind, wordings in (("name", NAME), ("kind", KIND), ("check", CHECK), ("choice", CHOICE)):
            form = re.escape(wordings[-1]).replace(r"\{options\}", ".+").replace(r"\{name\}", ".+")
            assert bool(re.fullmatch(form, by_kind[kind][0])) == is_test
    assert checks == {"yes", "no"}


def test_names_alone_tell_nothing(folder):
    """Of two names, one of clothes and one of emoji, each is right as often; so is a name that is to be checked."""
    kinds, rng, right, yes = names_of(folder), random.Random(0), [], []
    names = [[name for name in kinds if (kinds[name] == "clothing") == is_clothes] for is_clothes in (False, True)]
    for _ in range(9000):
        name = rng.choice(names[rng.random() < real_data.PHOTOGRAPHS])
        turns = real_data.ask(Thing(Image.new("L", (1, 1)), name, kinds[name]), kinds, rng, is_test=True)
        checked = turns[2]["user"].removeprefix("would you call this ").removesuffix("?")
        if kinds[checked] == "clothing":
            yes.append(turns[2]["assistant"] == "yes")
        pair = turns[3]["user"].removeprefix("do you see ").removesuffix("?").split(" or ")
        if len({kinds[x] == "clothing" for x in pair}) == 2:
            right.append(kinds[name] == "clothing")
    assert len(right) > 700 and len(yes) > 700
    assert abs(np.mean(right) - 0.5) < 0.05 and abs(np.mean(yes) - 0.5) < 0.05, (np.mean(right), np.mean(yes))


def test_answers_have_many_wordings(folder):
    asked = {turn["user"] for record in read(folder / "answers.tar") for turn in record["texts"][:1]}
    assert asked == set(NAME[:-1])


def test_the_first_lesson_asks_for_names_alone(folder):
    kinds, records = names_of(folder), read(folder / "naming.tar")
    assert len(records) == len(read(folder / "answers.tar")) == 120
    for record in records:
        [turn] = record["texts"]
        assert turn["kind"] == "name" and turn["user"] in NAME[:-1] and turn["assistant"] in kinds
    run = real.make_answers(
        real.RealConfig(folder), {name: folder / f"{name}.tar" for name in ("naming", "answers", *real.TASKS)}
    )
    assert run.data.sources == (str(folder / "naming.tar"), str(folder / "answers.tar"))
    assert run.data.lessons == (RealDataConfig(folder).num_questions,)


def test_things_vary_and_stay_to_be_seen():
    rng = random.Random(0)
    emoji, photograph = (
        Thing(draw_svg("path"), "cat", "nature"),
        Thing(Image.new("L", (28, 28), 200), "bag", "clothing"),
    )
    for thing in (emoji, photograph):
        varied = [np.asarray(vary(thing, rng), dtype=float) for _ in range(20)]
        assert len({x.tobytes() for x in varied}) == 20 and min(x.std() for x in varied) > 3
    assert np.asarray(show(emoji))[0, 0].tolist() == [255] * 3 and np.asarray(show(photograph)).min() >= 199


def test_records_that_are_there_stay(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    write(RealDataConfig(folder))
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*.tar")} and len(before) == 5


def test_the_encoder_is_trained_and_measured(folder):
    config = real.RealConfig(folder, quick=True, threads=1)
    run = real.make_contrast(config, folder / "contrast.tar")
    tiny = dataclasses.replace(run.optim, steps=2, warmup_steps=1)
    train.main(dataclasses.replace(run, optim=tiny, precision="fp32"))
    records = {name: folder / f"{name}.tar" for name in ("naming", "answers", *real.TASKS)}
    found = real.measure_encoder(config, records)
    assert found["clothes_test"]["n"] == 7 and found["clothes_test"]["names"] == 10
    assert found["emoji_test"]["names"] == 7 and 0 <= found["emoji_test"]["top_1"] <= found["emoji_test"]["top_5"] <= 1
    answers = real.make_answers(config, records).validate()
    assert answers.model.vision == run.dual.vision and answers.model.num_image_tokens == 9


LINE = {
    "names": 163, "contrast_seconds": 100.4, "answers_seconds": None, "minutes": 21.5, "device": "a CPU", "threads": 2,
    "precision": "bf16", "commit": "0123456789", "date": "2026-11-30",
    "zero_shot": {name: {"top_1": 0.5, "top_5": 0.75, "n": 4, "names": 10} for name in real.TASKS},
    "tasks": {
        name: {
            "mean": 0.5, "blank_mean": 0.25, "n": 4,
            "kinds": {"name": {"accuracy": 0.5, "blank": 0.25, "shuffled": 0.0, "alone": 0.125, "n": 4}},
        }
        for name in real.TASKS
    },
}  # fmt: skip


def test_the_table_stands_between_its_marks(tmp_path, monkeypatch):
    page, results = tmp_path / "page.md", tmp_path / "real.jsonl"
    page.write_text("before\n<!-- real: written by benchmarks/real.py -->\nold\n<!-- real end -->\nafter\n")
    results.write_text("{}\n" + json.dumps(LINE) + "\n")
    monkeypatch.setattr(real, "DOCS", page)
    monkeypatch.setattr(real, "RESULTS", results)
    real.write_tables()
    text = page.read_text()
    assert "| name | 4 | 50.0 | 25.0 | 0.0 | 12.5 |  |" in text and "| 10 | 50.0 | 75.0 |" in text
    assert (
        text.startswith("before\n")
        and text.endswith("after\n")
        and "old" not in text
        and "100 + ? processor seconds of training; 21.5 minutes in all" in text
    )
    page.write_text("no marks")
    with pytest.raises(UserError, match="has no <!-- real"):
        real.write_tables()


def test_an_svg_is_drawn():
    pytest.importorskip("resvg_py", reason="emoji are drawn by resvg-py")
    svg = real_data.svg_of(
        {"icons": {"x": {"body": '<path fill="#f00" d="M0 0h12v24h-12z"/>'}}, "width": 24, "height": 24}, "x"
    )
    drawn = np.asarray(real_data.draw_svg(svg))
    assert drawn.shape == (96, 96, 4) and drawn[50, 10].tolist() == [255, 0, 0, 255] and drawn[50, 80, 3] == 0


def test_groups_are_those_of_the_package():
    assert set(GROUPS) == set(NAMES)
