"""The validation loss is the loss on held-out documents, and a look changes nothing of a run."""

import dataclasses
import io
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import train
from nanovlm.config import EvalConfig, MoEConfig
from nanovlm.data.sources import open_source, open_sources
from nanovlm.data.split import _hash, is_below
from nanovlm.data.types import IGNORE
from nanovlm.model.vlm import Extras
from nanovlm.train.curves import draw_curves
from nanovlm.train.validate import read_held_out, validate
from tests.test_train import SMALL, metrics, run


@pytest.fixture
def own(tmp_path):
    """Two files of records; every answer of the second is the same."""
    for name, answers in (("many", range(60)), ("one", [7] * 60)):
        records = [{"texts": [{"user": f"what is {i} of {name}?", "assistant": str(x)}]} for i, x in enumerate(answers)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    sources = tuple(str(tmp_path / f"{name}.jsonl") for name in ("many", "one"))
    return dataclasses.replace(SMALL.data, sources=sources, lessons=(), weights=(1, 1), val_fraction=0.2)


def test_a_look_says_losses_and_accuracy_and_changes_nothing(tmp_path, own):
    optim = dataclasses.replace(SMALL.optim, steps=8)
    run(tmp_path / "plain", data=own, optim=optim, eval=EvalConfig())
    look = EvalConfig(("scenes",), limit=2, every=3, controls=False)
    results = run(tmp_path / "looked", data=own, optim=optim, eval=look)
    plain, looked = metrics(tmp_path / "plain"), metrics(tmp_path / "looked")
    assert [line["loss"] for line in plain] == [line["loss"] for line in looked]
    names = {"val_loss", "accuracy_scenes", *(f"val_loss_{source}" for source in own.sources)}
    assert [line["step"] for line in looked if names <= line.keys()] == [3, 6]
    assert not any(names & line.keys() for line in looked if line["step"] % 3)
    kinds = looked[2]["accuracies_scenes"]
    shares = [share for kind, share in kinds.items() if kind != "caption"]
    assert {"color", "position"} <= kinds.keys() and all(0 <= share <= 1 for share in kinds.values())
    assert looked[2]["accuracy_scenes"] == pytest.approx(sum(shares) / len(shares))
    many, one = (looked[5][f"val_loss_{source}"] for source in own.sources)
    assert one < looked[2][f"val_loss_{own.sources[1]}"] and one < many
    assert min(one, many) < looked[5]["val_loss"] < max(one, many)
    assert "val_loss" in results and "blank_mean" not in results["tasks"]["scenes"]
    of_sources = {name for name in looked[2] if name.startswith("accuracy_held_out_")}
    assert of_sources and of_sources <= {f"accuracy_held_out_{source}" for source in own.sources}
    assert looked[2]["alerts"] == 0
    of_each = [[line[f"loss_of_{source}"] for source in own.sources] for line in plain]
    assert all(min(losses) < line["loss"] < max(losses) for losses, line in zip(of_each, plain, strict=True))


def test_looks_are_no_part_of_the_seconds_of_a_run(tmp_path, own, monkeypatch):
    """By a clock that only the pretended work moves: 2 s a step, 100 s a look."""
    clock = SimpleNamespace(now=1000.0)
    step, look = train.train_step, train.look

    def work(seconds, function, *args):
        clock.now += seconds
        return function(*args)

    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    monkeypatch.setattr(train, "train_step", lambda *args: work(2, step, *args))
    monkeypatch.setattr(train, "look", lambda *args: work(100, look, *args))
    optim = dataclasses.replace(SMALL.optim, steps=4)
    results = run(tmp_path, data=own, optim=optim, eval=EvalConfig(every=2))
    assert results["train_seconds"] == 8
    assert [line["elapsed_s"] for line in metrics(tmp_path)] == [2, 4, 6, 8]


def test_a_source_without_held_out_records_is_named(tmp_path, own, capsys):
    data = dataclasses.replace(own, val_fraction=1e-9)
    results = run(tmp_path, data=data, optim=dataclasses.replace(SMALL.optim, steps=2), eval=EvalConfig())
    assert "val_loss" not in results
    shown = capsys.readouterr().out
    assert all(f"holds out no record of {source}, so there is no validation loss" in shown for source in own.sources)


def test_the_validation_loss_is_the_mean_over_the_held_out_units(tmp_path, own):
    config = dataclasses.replace(SMALL, data=own, run_dir=str(tmp_path / "run"), precision="fp32")
    config = train.share_micro_batches(config)
    source = open_sources(own.sources, own.weights)
    model, processor = train.init.start(config, ["what is 1 of many?"])
    held_out = read_held_out({"many": train.make_loader(source.sources[0], processor, config, "val")}, config)
    state = train.TrainState(model, model, {}, None, threads=1, precision="fp32")
    batches = [batch for step in held_out["many"] for batch in step]
    documents = sum(int(batch.doc_ids.max()) + 1 for batch in batches)
    assert 4 < documents < 25  # about a fifth of 60
    with torch.no_grad():
        sums = [float(state.objective.loss(model, batch, Extras())) for batch in batches]
    expected = sum(sums) / sum(len(batch.trained) for batch in batches)
    assert validate(state, held_out) == pytest.approx({"val_loss": expected})
    assert model.training


@pytest.mark.parametrize("layout", ["columns that are named", "conversations"])
def test_held_out_records_are_a_source_to_ask_about_in_any_layout(tmp_path, layout):
    records, pictures = [], {}
    for i in range(40):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(tmp_path / f"{i}.png")
        pictures[i] = (tmp_path / f"{i}.png").read_bytes()
        if layout == "conversations":
            said = [("human", f"<image>what is {i}?"), ("gpt", f"it is {i}")]
            records.append({"image": f"{i}.png", "conversations": [{"from": who, "value": what} for who, what in said]})
        else:
            records.append({"photo": f"{i}.png", "asked": f"what is {i}?", "said": f"it is {i}"})
    records[3] = {"odd": 1}
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, records)))
    fields = () if layout == "conversations" else ("image=photo", "question=asked", "answer=said")
    data = dataclasses.replace(
        SMALL.data, sources=(str(tmp_path / "own.jsonl"),), lessons=(), val_fraction=0.4, fields=fields
    )
    config = train.share_micro_batches(dataclasses.replace(SMALL, data=data))
    _model, processor = train.init.start(config, ["what is it?"])
    loaders = {"own": train.make_loader(open_sources(data.sources), processor, config, "val")}
    [(task, questions)] = train.ask_held_out(loaders, processor, config)
    expected = [i for i in range(40) if i != 3 and is_below(_hash(pictures[i]), 0.4)]
    assert sorted(question.truth for question in questions) == sorted(f"it is {i}" for i in expected)
    assert sorted(question.text.removeprefix("<image>") for question in questions) == sorted(
        f"what is {i}?" for i in expected
    )
    assert all(len(question.images) == 1 for question in questions) and 5 < len(expected) < 30
    assert task.score(questions[0], questions[0].truth) == {"accuracy": 1.0}


def test_held_out_records_of_two_sources_are_read_from_their_own(tmp_path):
    paths = [tmp_path / f"{name}.jsonl" for name in ("birds", "fish")]
    for path in paths:
        records = []
        for i in range(12):
            Image.new("RGB", (20, 20), (i, len(path.stem), 0)).save(tmp_path / f"{path.stem}{i}.png")
            records.append(
                {"images": [f"{path.stem}{i}.png"], "texts": [{"user": "which?", "assistant": f"{path.stem} {i}"}]}
            )
        path.write_text("\n".join(map(json.dumps, records)))
    data = dataclasses.replace(SMALL.data, sources=tuple(map(str, paths)), lessons=(), val_fraction=0.5)
    config = train.share_micro_batches(dataclasses.replace(SMALL, data=data))
    _model, processor = train.init.start(config, ["which?"])
    loaders = {path.stem: train.make_loader(open_source(str(path)), processor, config, "val") for path in paths}
    [(_task, questions)] = train.ask_held_out(loaders, processor, config)
    expected = {
        f"{path.stem} {i}"
        for path in paths
        for i in range(12)
        if is_below(_hash((tmp_path / f"{path.stem}{i}.png").read_bytes()), 0.5)
    }
    assert {question.truth for question in questions} == expected and len(questions) == len(expected)
    assert len({truth.split()[0] for truth in expected}) == 2


def test_accuracy_is_told_for_each_source(own):
    config = train.share_micro_batches(dataclasses.replace(SMALL, data=own))
    source = open_sources(own.sources, own.weights)
    _model, processor = train.init.start(config, ["what is 1 of many?"])
    loaders = {part.name: train.make_loader(part, processor, config, "val") for part in source.sources}
    [(task, questions)] = train.ask_held_out(loaders, processor, config)
    answers = [question.truth if "of one" in question.text else "none" for question in questions]
    expected = {f"accuracy_held_out_{name}": share for name, share in zip(own.sources, (0.0, 1.0), strict=True)}
    assert train.score_sources(task, questions, answers) == expected
    assert not train.score_sources(train.open_task("scenes", 2), questions, answers)


def test_the_loss_of_a_source_is_that_of_its_documents(own):
    """Found again by the words of each document; against torch's cross-entropy of the logits."""
    config = train.share_micro_batches(dataclasses.replace(SMALL, data=own, precision="fp32"))
    model, processor = train.init.start(config, ["what is 1 of many or one?"])
    loader = train.make_loader(open_sources(own.sources, own.weights), processor, config)
    batches, sums, counts = next(loader), {}, Counter()
    for batch in batches:
        with torch.no_grad():
            logits = model.logits(batch).flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(logits, batch.labels.flatten(), reduction="none")
        for number in range(int(batch.doc_ids.max()) + 1):
            is_own = (batch.doc_ids == number).flatten()
            text = processor.tokenizer.decode(batch.input_ids.flatten()[is_own].tolist())
            [source] = [source for source in own.sources if f"of {Path(source).stem}?" in text]
            sums[source] = sums.get(source, 0) + losses[is_own].sum()
            counts[source] += int((batch.labels.flatten()[is_own] != IGNORE).sum())
    loader.close()
    state = train.TrainState(model, model, {}, loader, threads=1, precision="fp32", sources=loader.sources)
    found = train.train_step(state, batches, sum(counts.values()), config)
    assert len(sums) == 2
    for source, total in sums.items():
        torch.testing.assert_close(found[f"loss_of_{source}"], total / counts[source], rtol=1e-5, atol=1e-6)


def test_what_balances_experts_is_no_part_of_the_validation_loss(own):
    """It is added in training alone, and is more than the router can make of it."""
    decoder = dataclasses.replace(SMALL.model.decoder, moe=MoEConfig(num_experts=4, balance_weight=1.0))
    config = train.share_micro_batches(
        dataclasses.replace(SMALL, data=own, model=dataclasses.replace(SMALL.model, decoder=decoder))
    )
    source = open_sources(own.sources, own.weights)
    model, processor = train.init.start(config, ["what is 1 of many?"])
    held_out = read_held_out({"many": train.make_loader(source.sources[0], processor, config, "val")}, config)
    state = train.TrainState(model, model, {}, None, threads=1, precision="fp32")
    batch, loss = held_out["many"][0][0], validate(state, held_out)["val_loss"]
    in_training = float(state.objective.loss(model.train(), batch, Extras())) / len(batch.trained)
    assert in_training > loss + 1


def test_the_picture_of_the_curves_has_a_panel_for_what_there_is(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    figures, close = [], plt.close
    monkeypatch.setattr(plt, "close", figures.append)
    lines = [{"step": i, "loss": 1 / i, "lr": 1e-3, "tokens": 5, "documents_of_a": i} for i in range(1, 7)]
    lines[2] |= {"val_loss": 0.5, "val_loss_scenes": 0.4, "accuracy_scenes": 0.1}
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert Image.open(io.BytesIO(draw_curves(tmp_path / "metrics.jsonl"))).width == 800
    axes = figures[0].axes
    assert [axis.get_ylabel() for axis in axes] == ["loss", "accuracy", "learning rate"]
    assert [line.get_label() for line in axes[0].lines] == ["loss", "val_loss", "val_loss_scenes"]
    lines = [line | {"documents_of_b": 2} for line in lines]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    draw_curves(tmp_path / "metrics.jsonl")
    axes = figures[1].axes
    assert [axis.get_ylabel() for axis in axes] == ["loss", "accuracy", "samples", "learning rate"]
    assert [list(line.get_ydata()) for line in axes[2].lines] == [[1, 2, 3, 4, 5, 6], [2] * 6]
    assert axes[0].lines[1].get_xydata().tolist() == [[3, 0.5]]
    close(figures[0])
