"""The benchmark of projectors and fusions: its whole road in a few steps, and its tables from made-up lines."""

import dataclasses
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro")  # a machine that is lent for minutes may lack it
import train
from benchmarks import arguments as arguments_of_benchmarks
from benchmarks import fusion, fusion_cells, fusion_report
from benchmarks.fusion_cells import (
    CELLS,
    KINDS,
    Cell,
    FusionBenchConfig,
    digest,
    make_batches,
    make_cell,
    put_in_words,
    score,
)
from benchmarks.fusion_report import accuracy_at, first_reaches, write_tables
from benchmarks.pages import read_lines
from nanovlm.command_line import parse_train
from nanovlm.data.scenes import draw
from nanovlm.errors import UserError

TINY = FusionBenchConfig(
    "measure",
    seeds=(7,),
    steps=2,
    batch_scenes=3,
    points=2,
    num_test=4,
    encoder_steps=1,
    language_steps=1,
    scenes_steps=19,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the backbones of seed 7, one step each, made in this process."""
    folder, patch, run = tmp_path_factory.mktemp("fusion"), pytest.MonkeyPatch(), fusion.run
    patch.setattr(fusion_cells, "NUM_TEXTS", 12)
    patch.setattr(fusion, "run", run_here)
    config = replace(TINY, folder=folder)
    fusion.train_encoder(config, 7)
    fusion.start(config, 7, "language")
    patch.setattr(fusion, "run", run)
    yield folder
    patch.undo()


def run_here(script, *arguments):
    """Do in this process what `run` does in another one."""
    if str(script).endswith("fusion.py"):
        fusion.main(arguments_of_benchmarks.read(FusionBenchConfig, "", arguments))
    else:
        quick = ["--data.batch-rows", "2", "--data.row-length", "128"]
        train.main(parse_train([*map(str, arguments), *quick], "").validate())


def test_descriptions_in_words():
    records = [record["messages"] for i in range(8) for record in put_in_words(i)]
    scene = draw("train", 0, (*KINDS, "caption"))["texts"]
    asked = {user["content"].removeprefix(f"{scene[-1]['assistant']} "): said for user, said in records[: len(scene)]}
    assert {turn["user"]: turn["assistant"] for turn in scene} == {q: a["content"] for q, a in asked.items()}
    is_described = ["the digit" in user["content"] for user, _ in records if user["content"] != "describe the image."]
    assert 0.6 < sum(is_described) / len(is_described) < 0.9


def test_cells_differ_and_what_learns_is_what_they_say(folder):
    assert len(CELLS) == len(set(CELLS)) == 32 and {cell.encoder for cell in CELLS} == {"contrast", "nothing"}
    config = replace(TINY, folder=folder)
    names = {digest(config, cell, 7) for cell in CELLS}
    assert len(names) == 32 and digest(config, CELLS[0], 8) not in names
    assert digest(replace(config, folder=Path("elsewhere")), CELLS[0], 7) in names
    assert digest(replace(config, steps=3), CELLS[0], 7) not in names


def test_every_cell_of_a_step_sees_the_same_questions(folder):
    """The rows of the fusions differ, as a picture is 9 tokens in one and 1 in the other."""
    seen = []
    for cell in (Cell("linear", "sequence", "full"), Cell("linear", "cross_attention", "full")):
        settings = make_cell(replace(TINY, folder=folder), cell, 7)
        processor, _ = fusion_cells.init.prepare(settings, [])
        process = fusion_cells.make_process(processor, settings.data)
        asked = make_batches(process, "test", 0, 5, 0, rows=1)
        answers = [one.batch.labels.flatten()[one.batch.trained].tolist() for one in asked]
        seen.append((sum(len(one.kinds) for one in asked), sorted(x for row in answers for x in row)))
        for one in asked:  # a branch of a document is a question of its kind
            for number, kinds in enumerate(one.kinds):
                assert int(one.batch.branch_ids[one.batch.doc_ids == number].max()) == len(kinds)
    assert seen[0] == seen[1] and seen[0][0] == 5


def test_right_answers_are_those_of_which_every_token_is(folder):
    """A model that says the labels is right; one that says only ends and digits right, of digits alone."""
    settings = make_cell(replace(TINY, folder=folder), CELLS[0], 7)
    model, processor = fusion_cells.init.start(settings, [])
    asked = make_batches(fusion_cells.make_process(processor, settings.data), "test", 0, 3, 0)
    state = fusion_cells.TrainState(model, model, {}, None, 1, "fp32")
    labels = asked[0].batch.labels.flatten()[asked[0].batch.trained]
    is_end = labels == settings.model.eos_token_id
    is_digit = torch.tensor([processor.decode([i]).isdigit() for i in labels.tolist()])
    everything, nothing = (dict.fromkeys((*KINDS, "mean"), x) for x in (100, 0))
    for known, expected in (
        (labels >= 0, everything),
        (~is_end, nothing),
        (is_end, nothing),
        (is_end | is_digit, nothing | {"digits": 100, "mean": 25}),
    ):
        said = torch.where(known, labels, 5)
        model.head = lambda hidden, said=said: torch.nn.functional.one_hot(said, 512)
        assert score(state, asked) == expected


def test_cells_are_trained_and_not_run_again(folder, tmp_path, monkeypatch):
    runs, results = [], tmp_path / "fusion.jsonl"

    def run(*command):
        runs.append(command)
        run_here(*command)

    monkeypatch.setattr(fusion, "run", run)
    monkeypatch.setattr(fusion, "RESULTS", results)
    config = replace(TINY, folder=folder, cells="^(merge sequence lora|resampler cross_attention (frozen|full))")
    fusion.main(config)
    lines = read_lines(results)
    assert len(runs) == len(lines) == 3
    for line in lines:
        assert [point["step"] for point in line["curve"]] == [0, 1, 2]
        assert 0 < line["curve"][1]["seconds"] < line["curve"][2]["seconds"]
        assert line["image_tokens"] == (5 if line["cell"]["fusion"] == "sequence" else 1)
    # What learns: adapters and the projector; cross-attention and the projector; everything.
    lora, frozen, full = ({tuple(x["cell"].values())[2]: x for x in lines}[how] for how in ("lora", "frozen", "full"))
    assert lora["trained"] < frozen["trained"] < full["trained"] == full["parameters"]
    fusion.main(config)
    assert len(runs) == 3
    fusion.main(replace(config, rate=1e-3, cells="^merge sequence lora"))
    assert len(read_lines(results)) == 3 and len(read_lines(folder / "tried.jsonl")) == 1
    with pytest.raises(UserError, match="found in no name"):
        fusion.main(replace(config, cells="qwen"))


def test_both_ways_of_the_encoder(folder, tmp_path, monkeypatch):
    commands, results = [], tmp_path / "fusion.jsonl"

    def run(*command):
        commands.append([*map(str, command)])
        run_dir = Path(commands[-1][commands[-1].index("--run-dir") + 1])
        run_dir.mkdir()
        lines = [{"step": 1, "elapsed_s": 1.0}, {"step": 2, "elapsed_s": 2.0, "accuracy_scenes": 0.5}]
        (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (run_dir / "eval.json").write_text(json.dumps({"environment": {"device": "here"}}))

    monkeypatch.setattr(fusion, "run", run)
    monkeypatch.setattr(fusion, "RESULTS", results)
    config = replace(TINY, subject="encoder", folder=folder)
    for _ in range(2):
        fusion.main(config)
    assert ["--init.vision" in command for command in commands] == [False, True]
    for command in commands:
        parse_train(command[1:], "").validate()
    nothing, contrast = read_lines(results)
    assert nothing["curve"] == contrast["curve"] == [{"step": 2, "seconds": 2.0, "accuracy": 50.0}]
    assert nothing["encoder_seconds"] == 0 < contrast["encoder_seconds"]


# --- tables -----------------------------------------------------------------------------------------------------------


def line(cell, seed, *points, **more):
    curve = [{"step": i, "seconds": seconds, "accuracy": accuracy} for i, (seconds, accuracy) in enumerate(points)]
    about = {"subject": "fusion", "cell": dataclasses.asdict(cell), "seed": seed, "curve": curve}
    figures = {"image_tokens": 9, "image_features": 9, "trained": 1_500_000, "step_ms": 100.0, "memory_gb": 0.5}
    where = {"device": "here", "threads": 1, "precision": "bf16", "commit": "0123456789", "date": "2026-01-01"}
    return about | {"accuracy": points[-1][1], "blank": 20.0} | figures | where | more


def test_points_of_a_curve():
    curve = line(CELLS[0], 0, (0, 10), (2, 30), (4, 40))["curve"]
    assert [accuracy_at(curve, x) for x in (0, 1, 2, 3, 4, 9)] == [10, 20, 30, 35, 40, 40]
    assert [first_reaches(curve, bar) for bar in (10, 25, 40, 41)] == [0, 2, 4, None]


def test_the_tables(tmp_path, monkeypatch):
    page = tmp_path / "architectures.md"
    names = fusion_report.TABLES
    page.write_text("".join(f"<!-- {x}: written by benchmarks/fusion.py -->\nold\n<!-- {x} end -->\n" for x in names))
    monkeypatch.setattr(fusion_report, "DOCS", page)
    write_tables([])
    assert page.read_text().count("not measured yet") == len(names) == 5
    sequence, cross = (Cell("mlp", x, "frozen") for x in ("sequence", "cross_attention"))
    lines = [
        line(sequence, 0, (0, 0), (1, 99)),  # an older line of the same cell and seed
        line(sequence, 0, (0, 0), (1, 40)),
        line(cross, 0, (0, 0), (2, 60)),
        line(sequence, 1, (0, 0), (2, 50)),
        line(cross, 1, (0, 0), (4, 40)),
        line(Cell("linear", "sequence", "full", "nothing"), 0, (0, 0), (5, 70)),
    ]
    encoder = {"subject": "encoder", "encoder": "contrast", "encoder_seconds": 80.0}
    lines += [line(sequence, seed, (5, 55), (9, last)) | encoder for seed, last in ((0, 85), (1, 95))]
    write_tables(lines)
    text = page.read_text()
    assert "| mlp | sequence | 45.0 (40.0 to 50.0) |  |  |" in text
    assert "| mlp | cross-attention | 50.0 (40.0 to 60.0) |  |  |" in text
    # At the seconds of the quickest cell of each seed, 1 and 2, cross-attention is half way to its end.
    assert "| mlp | cross-attention | 25.0 (20.0 to 30.0) |  |  |" in text
    assert "| linear, encoder from nothing | sequence |  |  | 14.0 |" in text
    assert "| equal steps | +5.0 (-10.0 to +20.0), above in 1 of 2 |  |  |" in text
    assert "| equal seconds | -20.0 (-30.0 to -10.0), above in 0 of 2 |  |  |" in text
    assert "| mlp | sequence | frozen | 9 | 9 | 1.50 | 100 (100 to 100) | 0.50 (0.50 to 0.50) |" in text
    assert "| from contrast | 5 (5 to 5) | 9 (9 to 9) | 9, 1 never | 90.0 (85.0 to 95.0) | 9 (9 to 9) |" in text
    assert "2 seeds: mean, lowest to highest; here, 1 thread, bf16; commits 0123456; 2026-01-01" in text
    assert "![" not in text
    fusion_report.draw(lines, tmp_path)
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("fusion.png", "from_siglip.png"))
    write_tables(lines)
    assert re.findall(r"!\[.+\]\((.+)\)", page.read_text()) == ["fusion.png", "from_siglip.png"]
    page.write_text("no marks")
    with pytest.raises(UserError, match="has no <!-- verdict"):
        write_tables(lines)
