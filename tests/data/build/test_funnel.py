"""A recipe makes the same shards with any number of workers and after any kill, and every record is counted."""

import dataclasses
import functools
import io
import json
import os
import random
import shutil
import signal
import tarfile
import tracemalloc

import pytest
from PIL import Image, ImageEnhance

from nanovlm.data.build import funnel, items, report
from nanovlm.data.build.__main__ import main as command
from nanovlm.data.build.funnel import plan, run
from nanovlm.data.build.items import Stage, each
from nanovlm.data.build.recipe import Recipe, ShardOptions, read_recipe
from nanovlm.data.build.report import wrap
from nanovlm.data.build.stages import STAGES
from nanovlm.data.records import to_sample
from nanovlm.data.shard_writer import TarShard
from nanovlm.data.source import IN_ORDER, deal
from nanovlm.data.sources import open_source
from nanovlm.errors import UserError
from tests.data.build.killing import kill_before, run_until_killed
from tests.data.build.test_hashes import picture

pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")
TEXT = "The dog is on the grass and looks at the ball."


@pytest.fixture
def undrawn(monkeypatch):
    """Draw nothing, as it takes longer than the rest."""
    monkeypatch.setattr(report, "draw_funnel", lambda *_args: b"")
    monkeypatch.setattr(report.Report, "draw_sheet", lambda *_args: b"")


def jpeg(image, quality=60):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def record(name, answer=TEXT, question="What is it?"):
    return {"images": [name] if name else [], "texts": [{"user": question, "assistant": answer}]}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A folder with records.jsonl, benchmark.jsonl, and the stage that has to drop each record, "" for none."""
    folder = tmp_path_factory.mktemp("source")
    records, expected = [], []

    def add(stage, image=None, file=None, **changes):
        name = "" if image is None and file is None else f"{len(records)}.bin"
        if name:
            (folder / name).write_bytes(png(image) if file is None else file)
        records.append(record(name, **changes))
        expected.append(stage)

    for i in range(12):
        add("", picture(i), answer=f"{TEXT} {i}")
    add("corrupt", file=png(picture(40))[:-900])
    add("corrupt", file=b"no picture at all")
    add("size", picture(41, (20, 60)))
    add("size", picture(42, (400, 40)))
    add("text", picture(43), answer="x" * 60)
    add("text", picture(44), answer="Click here! All rights reserved.")
    add("text", picture(45), answer="Der Hund ist auf der Wiese und schaut zu dem Ball.")
    add("exact", picture(3), answer=f"{TEXT.upper()}  3")
    add("", picture(60), answer=TEXT)
    add("exact", file=png(picture(60).convert("RGBA")), answer=TEXT)
    add("near", file=jpeg(picture(5), 40), answer="It is another text.")
    add("near", picture(5).resize((180, 150)))
    add("near", ImageEnhance.Brightness(picture(6)).enhance(1.15))
    add("leakage", picture(30))
    add("leakage", file=jpeg(picture(31), 50))
    add("leakage", picture(32).resize((64, 50)))
    add("leakage", question="How far is the moon?", answer="It is far, and that is what the book says.")
    add("", question="How far is the sun?", answer="It is far, and that is what the book says.")
    add("exact", question="how far  is the sun?", answer="It is far, and that is what the book says.")
    add("", Image.new("RGB", (60, 60), "white"), answer="It is white, and there is nothing on it.")
    add("", Image.new("RGB", (60, 60), "black"), answer="It is black, and there is nothing on it.")
    for i in range(13, 18):
        add("", picture(i), answer=f"{TEXT} {i} <b>bold</b> <script>alert(1)</script> ignore the above")
    records.append({"images": ["0.bin"], "texts": "no list"})
    expected.append("corrupt")
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    asked = [record(f"asked{i}.png", "yes") for i in (30, 31, 32)]
    for i in (30, 31, 32):
        (folder / f"asked{i}.png").write_bytes(png(picture(i)))
    asked.append(record("", "It is far, and that is what the book says.", "How far is the moon?"))
    (folder / "benchmark.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    return folder, expected


def make(folder, out, **changes):
    stages = {
        "text": {"languages": ["en"]},
        "corrupt": None,
        "size": {"min_side": 32},
        "leakage": {"sources": [str(folder / "benchmark.jsonl")]},
        "exact": None,
        "near": None,
    }
    options = {"stages": stages, "chunk": 7, "shards": ShardOptions("tar", most_records=5)} | changes
    return Recipe(sources=(str(folder / "records.jsonl"),), out=str(out), **options)


def files(out):
    """What is written, but for seconds and what is not drawn."""
    found = {file.name: file.read_bytes() for file in out.iterdir() if file.suffix in (".tar", ".idx", ".jsonl")}
    counts = json.loads((out / "report.json").read_text())
    del counts["seconds"]
    return found | {"counts": counts, "index": (out / "index.json").read_text()}


@pytest.fixture(scope="module")
def made(planted, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "out"
    run(make(planted[0], out))
    return out


def read_dropped(out):
    return [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]


def test_each_record_is_dropped_by_its_stage_or_kept(planted, made):
    dropped = {line["number"]: line["stage"] for line in read_dropped(made)}
    assert [dropped.get(number, "") for number in range(len(planted[1]))] == planted[1]
    like = {line["number"]: line["like"] for line in read_dropped(made) if "like" in line}
    assert sorted(like.values()) == [3, 5, 5, 6, 20, 29]


def test_no_record_is_lost_without_a_count(planted, made):
    expected, counts = planted[1], json.loads((made / "report.json").read_text())
    kept = []
    for shard in json.loads((made / "index.json").read_text())["shardlist"]:
        with tarfile.open(made / shard["url"]) as tar:
            names = [name for name in tar.getnames() if name.endswith("provenance.json")]
            kept += [json.loads(tar.extractfile(name).read())["number"] for name in names]
        assert len(names) == shard["nsamples"] <= 5
    assert sorted(kept + [line["number"] for line in read_dropped(made)]) == list(range(len(expected)))
    assert counts["kept"] == len(kept) == expected.count("")
    assert counts["dropped"] == {name: expected.count(name) for name in counts["dropped"]}
    assert counts["read"] == counts["kept"] + sum(counts["dropped"].values()) == len(expected)


def test_what_is_kept_is_read_back_as_it_was(planted, made):
    before, after = (open_source(str(path)) for path in (planted[0] / "records.jsonl", made / "*.tar"))
    numbers = [number for number, stage in enumerate(planted[1]) if not stage]
    assert len(after) == len(numbers)
    for place, number in enumerate(numbers):
        was, now = to_sample(before.read(number)), to_sample(after.read(place))
        assert now == was and now.images == was.images


def test_the_number_of_workers_changes_no_byte(planted, made, tmp_path):
    run(make(planted[0], tmp_path / "out", num_workers=2))
    assert files(tmp_path / "out") == files(made)


def dies(recipe, number):
    """Run a recipe in a process that kills itself before its file of this number is written; tell whether it did."""

    def job():
        write = kill_before(lambda function, *args: function(*args), number)
        for name in ("write_lines", "write_shard"):
            setattr(funnel, name, functools.partial(write, getattr(funnel, name)))
        run(recipe)

    return run_until_killed(job)


def test_kills_change_no_byte(planted, made, tmp_path):
    """Each attempt dies after some more files of the ledger, or shards."""
    recipe, rng, kills = make(planted[0], tmp_path / "out"), random.Random(0), 0
    while dies(recipe, rng.randint(1, 8)):
        kills += 1
    assert kills > 2
    assert files(tmp_path / "out") == files(made) and not (tmp_path / "out" / ".work").exists()


def test_a_killed_worker_is_named_and_the_run_goes_on(planted, made, tmp_path):
    def kill(item):
        if item.number == 20 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return STAGES["text"].open(STAGES["text"].options(languages=("en",)))([item])[0]

    def judge(group):
        return [kill(item) for item in group]

    stages = STAGES | {"text": Stage(STAGES["text"].options, lambda _options: judge)}
    recipe = make(planted[0], tmp_path / "out", num_workers=2)
    with pytest.raises(UserError, match="a process that judges records was ended from outside"):
        run(recipe, stages)
    run(dataclasses.replace(recipe, num_workers=0), stages)
    assert files(tmp_path / "out") == files(made)


def test_steps_begin_where_marks_have_to_be_compared():
    names = ("text", "corrupt", "exact", "near", "agreement", "alike", "caps")
    assert plan(names, STAGES) == [
        funnel.Step(("text", "corrupt", "exact", "near")),
        funnel.Step(compared="exact"),
        funnel.Step(compared="near"),
        funnel.Step(("agreement", "alike", "caps")),
        funnel.Step(compared="alike"),
        funnel.Step(compared="caps"),
    ]
    assert plan(("exact", "alike"), STAGES)[2] == funnel.Step(("alike",)), "it is costly: what is the same goes first"


def test_later_steps_see_the_scores_of_earlier_ones_and_only_what_is_left(planted, tmp_path):
    seen = []

    def look(item):
        seen.append((item.number, item.scores["characters"]))
        return "odd" if item.number % 2 else None

    stages = STAGES | {"look": Stage(STAGES["corrupt"].options, lambda _options: each(look))}
    recipe = make(planted[0], tmp_path / "out")
    run(dataclasses.replace(recipe, stages=recipe.stages | {"look": None}), stages)
    numbers = [number for number, stage in enumerate(planted[1]) if not stage]
    assert [number for number, _ in seen] == numbers
    dropped = {line["number"]: line for line in read_dropped(tmp_path / "out")}
    assert [number for number in numbers if number in dropped] == [number for number in numbers if number % 2]
    assert dropped[1]["stage"] == "look" and dropped[1]["reason"] == "odd" and "repetition" in dropped[1]["scores"]


def test_what_captions_say_is_counted_and_never_believed(made):
    counts = json.loads((made / "report.json").read_text())
    assert counts["signs"] == {"html": 5, "injection": 5, "control": 0}


def test_a_report_shows_what_a_record_says_and_obeys_nothing(planted, tmp_path, monkeypatch):
    monkeypatch.undo()
    evil = "</td><script>alert(1)</script> ![x](http://a.b/c.png) | `ls` \x1b[31m"
    stages = {"text": {"refuse": ["html"]}, "caps": {"field": "kind", "most": 1}}
    lines = [record("0.bin", f"{TEXT} {i}") | {"kind": evil} for i in range(3)] + [record("0.bin", evil)]
    cells = []
    monkeypatch.setattr(report, "wrap", lambda text, num_lines: cells.append(text) or wrap(text, num_lines))
    shutil.copy(planted[0] / "0.bin", tmp_path / "0.bin")
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(make(tmp_path, tmp_path / "out", stages=stages))
    text = (tmp_path / "out" / "report.md").read_text()
    assert [line["stage"] for line in read_dropped(tmp_path / "out")] == ["caps", "caps", "text"]
    assert "script" in text and not any(sign in text for sign in ("<", "![x]", "\x1b", "`ls`", "](http"))
    assert {"dropped-caps.png", "dropped-text.png", "funnel.png"} <= {x.name for x in (tmp_path / "out").iterdir()}
    # what a stage about words drops is seen with its words, shown on the sheet and in the text
    assert cells.count(evil) == 1
    assert [line for line in text.splitlines() if "has html" in line and "alert" in line]
    for name in ("dropped-caps.png", "dropped-text.png", "funnel.png"):
        Image.open(tmp_path / "out" / name).load()


def test_parquet_holds_the_same(planted, made, tmp_path):
    run(make(planted[0], tmp_path / "out", shards=ShardOptions("parquet", most_records=8)))
    tar, parquet = open_source(str(made / "*.tar")), open_source(str(tmp_path / "out" / "*.parquet"))
    assert len(tar) == len(parquet)
    for i in range(len(tar)):
        a, b = to_sample(tar.read(i)), to_sample(parquet.read(i))
        assert a.images == b.images and [m["role"] for m in a.messages] == [m["role"] for m in b.messages]
        assert a.messages[-1]["content"] == b.messages[-1]["content"]
        assert json.loads(parquet.read(i)["provenance"])["stages"] == [
            "text",
            "corrupt",
            "size",
            "leakage",
            "exact",
            "near",
        ]


def test_shards_end_at_their_bytes(planted, made, tmp_path):
    run(make(planted[0], tmp_path / "out", shards=ShardOptions("tar", most_bytes=40_000)))
    shards = json.loads((tmp_path / "out" / "index.json").read_text())["shardlist"]
    assert len(shards) > 3 and all(shard["filesize"] < 40_000 + 10240 + 2048 * shard["nsamples"] for shard in shards)
    assert sum(shard["nsamples"] for shard in shards) == json.loads((made / "report.json").read_text())["kept"]


def test_a_shard_is_written_as_it_is_read_and_none_of_another_recipe_is_taken(planted, tmp_path, monkeypatch):
    recipe, events = make(planted[0], tmp_path / "out", stages={}, num=6), []
    for owner, name in ((funnel.Writer, "read"), (TarShard, "write")):
        call = getattr(owner, name)
        noted = lambda self, *rest, name=name, call=call: events.append(name) or call(self, *rest)  # noqa: E731
        monkeypatch.setattr(owner, name, noted)
    run(recipe)
    assert len(events) > 4 and events == ["read", "write"] * (len(events) // 2)
    (tmp_path / "out" / "index.json").unlink()
    with pytest.raises(UserError, match=r"out.[\w.-]+ is there, and nothing tells of which recipe"):
        run(recipe)
    with pytest.raises(UserError, match=r"mine.0.bin is there, and nothing tells of which recipe"):
        run(dataclasses.replace(recipe, out=str(shutil.copytree(planted[0], tmp_path / "mine"))))
    assert {*os.listdir(tmp_path / "mine")} == {*os.listdir(planted[0])}, (
        "an index would hide the records of the folder"
    )


def test_a_source_that_has_changed_is_noticed(planted, tmp_path):
    folder = shutil.copytree(planted[0], tmp_path / "source")
    recipe = make(folder, tmp_path / "out")
    assert dies(recipe, 18), "all is judged, and no shard is written"
    (folder / "0.bin").write_bytes(png(picture(99)))
    with pytest.raises(UserError, match=r"records.jsonl, sample 0, is not what it was when the run began"):
        run(recipe)
    with pytest.raises(UserError, match=r"was begun with another recipe or source \(chunk: 7 against 8\)"):
        run(dataclasses.replace(recipe, chunk=8))
    stages = recipe.stages | {"size": {"min_side": 33}}
    with pytest.raises(UserError, match=r"source \(stages.size.min_side: \d+ against 33[;)]"):
        run(dataclasses.replace(recipe, stages=stages))
    with pytest.raises(UserError, match=r"was begun with another recipe or source \(order of stages: "):
        run(dataclasses.replace(recipe, stages=dict(reversed(recipe.stages.items()))))
    (folder / "asked30.png").write_bytes(png(picture(98)))
    with pytest.raises(UserError, match=r"another recipe or source \(what stages.leakage names: '\w+' against '\w+'\)"):
        run(recipe)


def test_the_command_reads_a_file(planted, made, tmp_path, capsys):
    stages = json.dumps(make(planted[0], "").stages)
    text = f"sources: [{planted[0]}/records.jsonl]\nout: {tmp_path}/other\nchunk: 7\nstages: {stages}\n"
    (tmp_path / "a.yaml").write_text(text + "shards: {most_records: 5}\n")
    command([str(tmp_path / "a.yaml"), "--out", str(tmp_path / "out")])
    assert files(tmp_path / "out") == files(made)
    assert "near  3 left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="is written already: name another folder"):
        command([str(tmp_path / "a.yaml"), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: [a\n", "a.yaml is not readable YAML: .* line"),
        ("- a\n", "a.yaml must hold the fields of a recipe"),
        ("sources: [a]\nstages: [near]\n", "a.yaml must hold the fields of a recipe, and stages: the options of each"),
        ("sources: [a]\nstages:\n  near:\n  near: {most_bits: 3}\n", "the key 'near' is there again in line 4"),
        ("sources: [a]\nstages: {size: {1: 2}}\n", "the key 1 in line 2 is no text: put it in quotes"),
        ("sauces: [a]\n", "a.yaml: unknown field 'sauces'; the nearest known field is 'sources'"),
        ("sources: [a.jsonl]\n", "out is empty"),
        ("out: b\n", "sources is empty"),
        ("sources: [a]\nout: b\nstages: {nera: }\n", "there is no stage 'nera'; the nearest is 'near'"),
        ("sources: [a]\nout: b\nstages: {near: {bits: 3}}\n", "unknown field 'stages.near.bits'; .*near.most_bits"),
        ("sources: [a]\nout: b\nstages: {near: {most_bits: 99}}\n", "most_bits = 99 must be from 0 to 47"),
        ("sources: [a]\nout: b\nstages: {size: {min_side: wide}}\n", "stages.size.min_side must be int, got 'wide'"),
        ("sources: [a]\nout: b\nstages: {text: {languages: [english]}}\n", "'english' is unknown; there are en, de"),
        ("sources: [a]\nout: b\nstages: {leakage: }\n", "stages.leakage.sources is empty"),
        (
            "sources: [a]\nout: b\nstages: {leakage: {sources: [a], layout: quiz}}\n",
            "stages.leakage.layout = 'quiz' is unknown; there are texts",
        ),
        ("sources: [a]\nout: b\nstages: {agreement: }\n", "stages.agreement.model is empty: name a dual model"),
        ("sources: [a]\nout: b\nstages: {caps: {each: [x]}}\n", "stages.caps.each has 'x', which must be name=number"),
        ("sources: [a]\nout: b\nchunk: 0\n", "chunk = 0 must be at least 1"),
        ("sources: [!!python/object/apply:os.system [ls]]\nout: b\n", "a.yaml is not readable YAML: could not"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_explained(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_recipe(tmp_path / "a.yaml").validate()


def test_nothing_that_passes_is_said(planted, tmp_path):
    with pytest.raises(UserError, match=r"none of 39 records passed all stages: .*report.md says"):
        run(make(planted[0], tmp_path / "out", stages={"text": {"min_characters": 500}}))
    assert (tmp_path / "out" / "report.md").exists() and not (tmp_path / "out" / "index.json").exists()


def test_a_stage_that_fails_costs_one_record(planted, tmp_path):
    def fail(item):
        return [][item.number] if item.number == 4 else None

    stages = STAGES | {"fail": Stage(STAGES["corrupt"].options, lambda _options: items.each(fail))}
    counts = run(make(planted[0], tmp_path / "out", stages={"fail": None}), stages)
    [reason] = [line["reason"] for line in read_dropped(tmp_path / "out") if line["number"] == 4]
    assert reason.startswith("IndexError: list index out of range (test_funnel.py, line ")
    assert counts["dropped"]["corrupt"] == planted[1].count("corrupt") + 1


def test_memory_does_not_grow_with_the_records(tmp_path):
    """Eight times as many records, and hardly more memory at the highest point."""

    class Metadata:
        """Records without pictures, made as they are read."""

        name, damaged = "metadata", ()

        def __init__(self, num):
            self.num = num

        def __len__(self):
            return self.num

        def refs(self, slots, num_slots, start=None):
            return deal(self, slots, num_slots, start)

        order = IN_ORDER

        def read(self, key):
            kind, text = f"kind {key // 3 % 7}", f"The number {key - key % 3} has no name that is on a list."
            return {"question": "Which?", "answer": text, "kind": kind}

    def peak(num):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(funnel, "open_sources", lambda *_args, **_options: Metadata(num))
            stages = {"text": None, "exact": {"of": "text"}, "caps": {"field": "kind", "most": num // 30}}
            recipe = make(tmp_path, tmp_path / str(num), stages=stages, chunk=10)
            tracemalloc.start()
            found = run(dataclasses.replace(recipe, shards=ShardOptions("tar", most_records=10)))
        assert found["dropped"]["exact"] == num - (num + 2) // 3 and 0 < found["dropped"]["caps"] < num // 3
        _now, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(30)  # what is imported, and cached
    assert peak(480) < peak(60) + 300_000
