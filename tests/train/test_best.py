"""What a run says of held-out records is what anyone finds who asks its model, and the best model is kept whole."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import nanovlm
import train
from nanovlm.config import EvalConfig
from nanovlm.data.records import to_sample
from nanovlm.train.best import FOLDER, choose_metric
from tests.test_train import SMALL, comparable, load_weights, metrics, run

FRACTION = 0.3
COLORS = ("red", "green", "blue", "black", "white")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Records of two questions about a picture, with few answers; a picture is damaged, some questions are empty."""
    folder, lines = tmp_path_factory.mktemp("data"), []
    for i in range(60):
        picture = Image.new("RGB", (48, 48), COLORS[i % 5])
        picture.putpixel((0, 0), (i, i, i))
        picture.save(folder / f"{i}.png")
        turns = [("" if i in (7, 8, 9) else "is it a color?", "yes"), ("is it new?", "no" if i % 7 < 4 else "yes")]
        turns = [{"user": question, "assistant": answer} for question, answer in turns]
        lines.append(json.dumps({"image": f"{i}.png", "texts": turns}))
    whole = (folder / "0.png").read_bytes()
    for size in range(60, len(whole)):
        (folder / "cut.png").write_bytes(whole[:size])
        if is_held_out(folder / "cut.png"):
            break
    lines.append(json.dumps({"image": "cut.png", "texts": [{"user": "?", "assistant": "yes"}]}))
    (folder / "own.jsonl").write_text("\n".join(lines))
    return folder / "own.jsonl"


def is_held_out(picture: Path) -> bool:
    digest = hashlib.blake2b(picture.read_bytes(), digest_size=8).hexdigest()
    return int(digest, 16) < FRACTION * 2**64


def changes(file, **of_eval):
    """What a run on the file has in place of SMALL's settings; it learns to say "yes" at least."""
    data = dataclasses.replace(
        SMALL.data, sources=(str(file),), lessons=(), val_fraction=FRACTION, shuffle=True, max_bad_fraction=0.2
    )
    optim = dataclasses.replace(SMALL.optim, steps=12, warmup_steps=1, lr=1e-2, max_grad_norm=10.0)
    evaluated = EvalConfig(every=2, limit=512, val_batches=64, show_every=0, controls=False)
    evaluated = dataclasses.replace(evaluated, **of_eval)
    return {"data": data, "optim": optim, "eval": evaluated, "precision": "fp32", "keep_checkpoints": 99}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, file):
    folder = tmp_path_factory.mktemp("unbroken")
    run(folder, **changes(file), checkpoint_every=2)
    return folder


def recompute(folder: Path, file: Path) -> tuple[float, float]:
    """Loss and exact match of a model folder on the held-out records, by the file, torch and what nanovlm exports."""
    model, processor = nanovlm.load(folder, "cpu")
    loss, units, right = 0.0, 0, []
    for line in file.read_text().splitlines():
        record = json.loads(line)
        picture = file.parent / record["image"]
        if not is_held_out(picture):
            continue
        try:
            image = Image.open(picture).convert("RGB")
        except OSError:
            continue
        batch = processor.batch([processor.document(to_sample({"images": [image], "texts": record["texts"]}))])
        with torch.no_grad():
            logits = model.logits(batch).float().flatten(0, 1)
        loss += float(F.cross_entropy(logits, batch.labels.flatten(), ignore_index=-100, reduction="sum"))
        units += int((batch.labels != -100).sum())
        messages = []
        for turn in record["texts"]:
            messages.append({"role": "user", "content": turn["user"]})
            if turn["user"]:
                [ids] = nanovlm.generate(model, processor(messages, [image]), max_new_tokens=48)
                right.append(processor.decode(ids).strip() == turn["assistant"])
            messages.append({"role": "assistant", "content": turn["assistant"]})
    return loss / units, sum(right) / len(right)


def test_the_figures_are_those_of_an_independent_script(unbroken, file):
    lines = [line for line in metrics(unbroken) if "val_loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    best = min(lines, key=lambda line: line["val_loss"])
    assert json.loads((unbroken / "eval.json").read_text())["best"] == {
        "step": best["step"],
        "metric": "val_loss",
        "value": best["val_loss"],
    }
    for folder, line in ((unbroken / FOLDER, best), (unbroken / "model", lines[-1])):
        loss, exact = recompute(folder, file)
        assert loss == pytest.approx(line["val_loss"], rel=1e-4)
        assert exact == pytest.approx(line["accuracy_held_out"], abs=1e-9)
    assert 0.2 < best["accuracy_held_out"] < 1 and best["val_loss"] < 0.8 * lines[0]["val_loss"]
    weights = load_weights(unbroken / "checkpoints" / f"step_{best['step']:08d}")
    kept = load_file(unbroken / FOLDER / "model.safetensors")
    assert {f"model.{name}" for name in kept} <= weights.keys()
    assert all(torch.equal(x, weights[f"model.{name}"]) for name, x in kept.items())


def test_the_split_and_each_evaluation_are_said(tmp_path, file, capsys):
    results = run(tmp_path, **changes(file, every=5, limit=7), checkpoint_every=99)
    shown = capsys.readouterr()
    num = sum(is_held_out(file.parent / f"{i}.png") for i in range(60))
    sides = f"{num + 1} with {num + 1} pictures are held out, {60 - num} with {60 - num} pictures are"
    assert f"own.jsonl, 61 records: {sides} trained on" in shown.out
    assert re.search(r"\d+ questions about 7 held-out records are asked at every evaluation", shown.out)
    said = re.findall(r"step (\d+): val_loss \d\S*, accuracy_held_out \S+ \((the best val_loss [^)]*)\)", shown.out)
    assert [step for step, _ in said] == ["5", "10", "12"]  # the last model has its chance too
    assert said[0][1] == f"the best val_loss so far: {tmp_path / FOLDER}"
    assert results["best"]["step"] in (5, 10, 12) and f"the best by val_loss, is in {tmp_path / FOLDER}" in shown.out
    assert results["tasks"]["held_out"]["n"] > 7 and results["tasks"]["held_out"]["dropped"] == 0


def test_a_task_leaves_out_what_was_trained_on_and_not_what_was_held_out(tmp_path, file):
    """The scan of the training records, which the controls need, takes the held-out ones for no training."""
    results = run(tmp_path, **changes(file, every=12, controls=True))["tasks"]["held_out"]
    assert results["dropped"] == 0 and results["n"] > 10 and results["majority_mean"] > 0


def start(folder, file, hook, **of_eval):
    """Run in a process of its own, which a hook ends by signal 9 in some places."""
    script = f"""
import os, signal, sys
from pathlib import Path
import train
from tests.test_train import run
from tests.train.test_best import changes
def die(): os.kill(os.getpid(), signal.SIGKILL)
{hook}
run({str(folder)!r}, checkpoint_every=3, **changes({str(file)!r}, **{of_eval!r}))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(train.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == -9, done.stderr


KILL_AT_RENAME = """
rename, seen = Path.rename, []
def counted(self, target):
    result = rename(self, target)
    if Path(target).name == {target!r}:
        seen.append(target)
        if len(seen) == {number}: die()
    return result
Path.rename = counted
"""
KILL_AT_STEP = """
step = train.train_step
def train_step(state, *args):
    if state.step == 7: die()
    return step(state, *args)
train.train_step = train_step
"""


@pytest.mark.parametrize(
    "hook",
    [
        pytest.param(KILL_AT_RENAME.format(target=FOLDER, number=2), id="after the best was replaced"),
        pytest.param(KILL_AT_RENAME.format(target=f".{FOLDER}.old", number=2), id="while the best is replaced"),
        pytest.param(KILL_AT_STEP, id="between evaluations"),
    ],
)
def test_a_killed_run_has_a_whole_best_and_goes_on_bit_for_bit(tmp_path, unbroken, file, hook):
    start(tmp_path, file, hook)
    nanovlm.load(tmp_path / FOLDER)
    run(tmp_path, **changes(file), checkpoint_every=3)
    assert comparable(metrics(tmp_path)) == comparable(metrics(unbroken))
    results, expected = (json.loads((folder / "eval.json").read_text()) for folder in (tmp_path, unbroken))
    assert results["best"] == expected["best"]
    kept, whole = ((folder / FOLDER / "model.safetensors").read_bytes() for folder in (tmp_path, unbroken))
    assert kept == whole


def scripted(monkeypatch, losses, scores):
    """Let evaluations find what the test says, by the number of evaluations before."""
    looks = []

    def look(state, *_):
        looks.append(state.step)
        i = state.step // 2 - 1
        return {"val_loss": losses[i], "accuracy_held_out": scores[i]}

    monkeypatch.setattr(train, "look", look)
    return looks


WORSE = [3.0, 2.0, 2.5, float("nan"), 2.0, 1.0]
BETTER = [0.1, 0.2, 0.9, 0.3, 0.9, 0.95]


@pytest.mark.parametrize(
    ("of_eval", "last", "best"),
    [
        ({"patience": 3}, 10, 4),
        ({"patience": 2}, 8, 4),
        ({"patience": 4}, 12, 12),
        ({}, 12, 12),
        ({"patience": 2, "best": "accuracy_held_out"}, 10, 6),
        ({"patience": 3, "best": "accuracy_held_out"}, 12, 12),
    ],
)
def test_patience_ends_a_run_and_the_best_is_kept(tmp_path, file, monkeypatch, capsys, of_eval, last, best):
    looks = scripted(monkeypatch, WORSE, BETTER)
    results = run(tmp_path, **changes(file, **of_eval), checkpoint_every=2)
    assert looks == list(range(2, last + 1, 2)) and len(metrics(tmp_path)) == last
    metric = of_eval.get("best", "val_loss")
    value = (BETTER if metric != "val_loss" else WORSE)[best // 2 - 1]
    assert results["best"] == {"step": best, "metric": metric, "value": value}
    kept = load_file(tmp_path / FOLDER / "model.safetensors")
    then = load_weights(tmp_path / "checkpoints" / f"step_{best:08d}")
    assert all(torch.equal(x, then[f"model.{name}"]) for name, x in kept.items())
    if last < 12:
        said = (
            f"ended at step {last}: {of_eval['patience']} evaluations in a row were no better than that of step {best}"
        )
        assert said in capsys.readouterr().out
    run(tmp_path, **changes(file, **of_eval), checkpoint_every=2)
    assert "is a finished run" in capsys.readouterr().out and len(metrics(tmp_path)) == last


def test_a_run_that_patience_ended_is_over_when_it_is_killed_before_its_end(tmp_path, file, monkeypatch, capsys):
    looks = scripted(monkeypatch, WORSE, BETTER)
    with monkeypatch.context() as patch:
        patch.setattr(train.adapt, "load", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path, **changes(file, patience=2), checkpoint_every=3)
    run(tmp_path, **changes(file, patience=2), checkpoint_every=3)
    assert looks == [2, 4, 6, 8] and "ended at step 8" in capsys.readouterr().out
    assert json.loads((tmp_path / "eval.json").read_text())["best"]["step"] == 4


@pytest.mark.parametrize("is_lost", [False, True])
def test_another_measure_or_a_lost_best_begins_anew(tmp_path, file, monkeypatch, capsys, is_lost):
    scripted(monkeypatch, [3.0, 0.1, 2.5, 2.4, 2.3, 2.2], BETTER)
    with monkeypatch.context() as patch:
        patch.setattr(train.adapt, "load", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path, **changes(file, patience=2), checkpoint_every=3)
    assert len(metrics(tmp_path)) == 8
    if is_lost:
        shutil.rmtree(tmp_path / FOLDER)
    metric, value = ("val_loss", 2.2) if is_lost else ("accuracy_held_out", 0.95)
    results = run(tmp_path, **changes(file, patience=2, best=metric), checkpoint_every=3)
    assert results["best"] == {"step": 12, "metric": metric, "value": value}
    assert (f"{tmp_path / FOLDER} is gone" in capsys.readouterr().out) == is_lost
    nanovlm.load(tmp_path / FOLDER)


def test_what_decides_is_a_number_that_is_measured(tmp_path, file):
    names = ["val_loss"], ["accuracy_held_out"]
    assert choose_metric(EvalConfig(every=1), *names) == "val_loss"
    assert choose_metric(EvalConfig(every=1), [], names[1]) == "accuracy_held_out"
    assert choose_metric(EvalConfig(every=1), *names, "own") == "accuracy_held_out"
    assert choose_metric(EvalConfig(every=1), names[0], [], "own") == ""
    assert choose_metric(EvalConfig(every=1, best="val_loss"), *names, "own") == "val_loss"
    assert choose_metric(EvalConfig(), *names) == choose_metric(EvalConfig(every=1, best="none"), *names) == ""
    assert choose_metric(EvalConfig(every=1), [], []) == ""
    with pytest.raises(ValueError, match=r"eval.best = 'anls' is not measured; there are val_loss, accuracy_held_out"):
        run(tmp_path, **changes(file, best="anls"))
    with pytest.raises(ValueError, match=r"eval.patience = 3 has nothing to go by: no record is held out"):
        choose_metric(EvalConfig(every=1, patience=3), [], [])
    with pytest.raises(ValueError, match=r"to go by: val_loss need not fall with rewards, so name it by eval.best"):
        choose_metric(EvalConfig(every=1, patience=3), names[0], [], "own")
    for of_eval, named in (
        ({"every": 0, "patience": 3}, "eval.patience = 3 go by the evaluations of eval.every = 0"),
        ({"every": 0, "best": "val_loss"}, "eval.best = 'val_loss' and eval.patience = 0 go by"),
        ({"patience": 3, "best": "none"}, "eval.patience = 3 needs an eval.best"),
        ({"patience": -1}, "eval.patience = -1 must be at least 0"),
    ):
        with pytest.raises(ValueError, match=named):
            run(tmp_path / "other", **changes(file, **of_eval))
    assert not (tmp_path / "other").exists()


def test_no_best_is_kept_where_none_is_wanted(tmp_path, file):
    results = run(tmp_path, **changes(file, best="none", every=6))
    assert "best" not in results and not (tmp_path / FOLDER).exists() and "val_loss" in results
