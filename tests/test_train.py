"""A run learns, stops, resumes and survives being killed, and its losses say so bit for bit."""

import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import nanovlm
import train
from nanovlm import cli
from nanovlm.command_line import parse_train
from nanovlm.config import EvalConfig, MoEConfig, OptimConfig, ParallelConfig, ParamRule, TrainConfig
from nanovlm.files import lock
from nanovlm.model.attention import ATTENTION, attend_sdpa
from nanovlm.model.vlm import VLM
from nanovlm.presets import PRESETS
from nanovlm.train import checkpoint
from nanovlm.train.optim import make_optimizers
from tests.conftest import TINY, make_batch, make_document

PRESET = PRESETS["scenes"]()
# The default recipe with fewer and smaller layers.
SMALL = dataclasses.replace(
    PRESET,
    model=dataclasses.replace(
        PRESET.model,
        vision=dataclasses.replace(PRESET.model.vision, hidden_size=32, intermediate_size=64, num_hidden_layers=1),
        decoder=dataclasses.replace(PRESET.model.decoder, hidden_size=32, intermediate_size=64, num_hidden_layers=1),
    ),
    data=dataclasses.replace(PRESET.data, row_length=256, batch_rows=2, pack_buffer=8),
    optim=dataclasses.replace(PRESET.optim, steps=12, warmup_steps=2),
    checkpoint_every=3,
    eval=EvalConfig(show="scenes", show_every=1),
    threads=1,
    precision="bf16",
    device="cpu",
)


def run(run_dir, **changes):
    return train.main(dataclasses.replace(SMALL, run_dir=str(run_dir), **changes))


def metrics(run_dir):
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) for line in lines]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run(folder)
    return metrics(folder)


def run_and_kill(run_dir, hook):
    """Run SMALL in a process of its own with a hook that kills it (signal 9) somewhere."""
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from pathlib import Path
import train
from tests.test_train import run
folder = Path({str(run_dir)!r})
def die(): os.kill(os.getpid(), signal.SIGKILL)
{hook}
run(folder)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr


KILL_AT_STEP = """
step = train.train_step
def train_step(state, *args):
    if state.step == {}: die()
    return step(state, *args)
train.train_step = train_step
"""
# A checkpoint is written beside the steps, and may take longer than two of them.
KILL_BEHIND_SAVE_OF_STEP_3 = """
import time
step = train.train_step
def train_step(state, *args):
    if state.step == 5:
        end = time.monotonic() + 60
        while not (folder / "checkpoints" / "step_00000003").exists() and time.monotonic() < end: time.sleep(0.01)
        die()
    return step(state, *args)
train.train_step = train_step
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Runs that were killed at steps 5 and 8, after their checkpoints of 3 and 6: each is run once, and only read."""
    folders = {5: tmp_path_factory.mktemp("killed"), 8: tmp_path_factory.mktemp("killed")}
    run_and_kill(folders[5], KILL_BEHIND_SAVE_OF_STEP_3)
    while not (folders[8] / "checkpoints" / "step_00000006").exists():  # maybe not written yet when it is killed
        run_and_kill(folders[8], KILL_AT_STEP.format(8))
    return folders


@pytest.fixture
def copy_killed(killed, tmp_path):
    return lambda step: shutil.copytree(killed[step], tmp_path, dirs_exist_ok=True)


KILL_IN_SAVE = """
import io, time
from nanovlm.train import checkpoint
start, calls = checkpoint.dcp.async_save, []
def async_save(*args, **kwargs):
    calls.append(start(*args, **kwargs))
    if len(calls) == {}:
        time.sleep({} / 1000)
        die()
    return calls[-1]
checkpoint.dcp.async_save = async_save
"""
KILL_AT_RENAME = """
rename, calls = Path.rename, []
def counted(self, target):
    calls.append(target)
    if len(calls) == {number} and {before}: die()
    result = rename(self, target)
    if len(calls) == {number}: die()
    return result
Path.rename = counted
"""


def comparable(lines):
    """What must repeat bit for bit: everything but the clock."""
    return [{key: x for key, x in line.items() if not key.endswith(("_per_second", "_s"))} for line in lines]


@pytest.mark.parametrize(
    "hook",
    [
        pytest.param(KILL_AT_STEP.format(random.Random(os.getpid()).randint(1, 11)), id="at a random step"),
        pytest.param(
            KILL_IN_SAVE.format(random.Random(os.getpid()).randint(1, 4), random.Random(os.getpid()).uniform(0, 10)),
            id="in the middle of a save",
        ),
        # Renames: config.json, tokenizer.json, chat_template.jinja, metrics.jsonl, checkpoints 0, 3 and 6, 0 goes, ...
        pytest.param(KILL_AT_RENAME.format(number=6, before=True), id="before a rename"),
        pytest.param(KILL_AT_RENAME.format(number=6, before=False), id="after a rename"),
        pytest.param(KILL_AT_RENAME.format(number=8, before=False), id="while an old checkpoint is removed"),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, unbroken, hook):
    print(hook)
    run_and_kill(tmp_path, hook)
    run(tmp_path)
    assert comparable(metrics(tmp_path)) == comparable(unbroken)
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 13))
    nanovlm.load(tmp_path / "model")


def test_a_killed_run_of_two_threads_goes_on_bit_for_bit(tmp_path):
    unbroken = tmp_path / "unbroken"
    run(unbroken, threads=2, precision="fp32")
    hook = KILL_AT_STEP.format(8) + "run_one = run\ndef run(d): run_one(d, threads=2, precision='fp32')"
    run_and_kill(tmp_path / "killed", hook)
    run(tmp_path / "killed", threads=2, precision="fp32")
    assert comparable(metrics(tmp_path / "killed")) == comparable(metrics(unbroken))


def test_a_run_goes_on_with_its_tokenizer(tmp_path, copy_killed, unbroken, monkeypatch):
    """Even when the code that makes tokenizers changed in between."""
    copy_killed(5)
    monkeypatch.setattr(train.init, "train_tokenizer", lambda *args: 1 / 0)
    run(tmp_path)
    assert comparable(metrics(tmp_path)) == comparable(unbroken)


def test_the_same_command_gives_the_same_bits(tmp_path):
    """With all that is left open, threads and precision too: two runs of one command, in processes of their own."""
    for name in ("first", "second"):
        script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from tests.test_train import run
run({str(tmp_path / name)!r}, threads=0, precision="auto")
"""
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
    assert comparable(metrics(tmp_path / "first")) == comparable(metrics(tmp_path / "second"))
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_weights_and_biases_gets_every_step_of_one_run(tmp_path, monkeypatch):
    calls, logged = [], []
    monkeypatch.setenv("WANDB_MODE", "online")

    def init(**options):
        calls.append(options)
        return types.SimpleNamespace(log=lambda metrics, step: logged.append((step, metrics["loss"])))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    step = train.train_step
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train, "train_step", lambda state, *args: 1 / 0 if state.step == 5 else step(state, *args))
        run(tmp_path, wandb=True)
    # On a busy machine the checkpoint of step 3 is not whole yet.
    saved = int(checkpoint.list_checkpoints(tmp_path)[-1].name.removeprefix("step_"))
    run(tmp_path, wandb=True)
    lines = [(line["step"], line["loss"]) for line in metrics(tmp_path)]
    assert saved in (0, 3) and logged == lines[:5] + lines[saved:]
    assert len(calls) == 2 and calls[0]["id"] == calls[1]["id"] and calls[0]["mode"] == "online"
    monkeypatch.delenv("WANDB_MODE")
    run(tmp_path / "offline", wandb=True)
    assert calls[2]["mode"] == "offline" and "id" not in calls[2]


def test_a_half_written_line_is_dropped(tmp_path, copy_killed, unbroken):
    copy_killed(5)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    run(tmp_path)
    assert comparable(metrics(tmp_path)) == comparable(unbroken)


def test_a_run_goes_on_in_its_precision(tmp_path, monkeypatch):
    """A resumed run computes as it began, also on a processor that would choose another precision."""
    monkeypatch.setattr(train, "choose_precision", lambda device: "fp32")
    stop_after(monkeypatch, 3)
    with pytest.raises(SystemExit):
        run(tmp_path, precision="auto")
    monkeypatch.undo()
    monkeypatch.setattr(train, "choose_precision", lambda device: "bf16")
    run(tmp_path, precision="auto")
    run(tmp_path / "fp32", precision="fp32")
    assert comparable(metrics(tmp_path)) == comparable(metrics(tmp_path / "fp32"))


def test_a_full_disk_stops_with_one_sentence_and_loses_nothing(tmp_path, unbroken):
    """From the second checkpoint on the system refuses to write files as large as the weights."""
    script = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
import train
from nanovlm import cli
from tests.test_train import run
save = train.TrainState.save
def save_and_limit(state, *args):
    if state.step == 6: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    return save(state, *args)
train.TrainState.save = save_and_limit
cli.run(lambda: run({str(tmp_path)!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert f"error: could not write {tmp_path / 'checkpoints' / 'step_00000006'}" in done.stderr
    assert "Traceback" not in done.stderr
    run(tmp_path)
    assert comparable(metrics(tmp_path)) == comparable(unbroken)


def test_lost_metrics_are_noticed(tmp_path, copy_killed, unbroken, capsys):
    copy_killed(5)
    (tmp_path / "metrics.jsonl").write_text("")
    run(tmp_path)
    assert "metrics.jsonl has lines of 0 of the 3 steps before; the others are lost" in capsys.readouterr().out
    assert comparable(metrics(tmp_path)) == comparable(unbroken[3:])


def flip_a_bit(checkpoint):
    file = next((checkpoint / "tensors").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


def forget_a_checksum(checkpoint):
    sums = json.loads((checkpoint / "checksums.json").read_text())
    del sums[next(name for name in sums if name.startswith("tensors"))]
    (checkpoint / "checksums.json").write_text(json.dumps(sums))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (flip_a_bit, "is not as it was written"),
        (lambda folder: next((folder / "tensors").glob("*")).write_bytes(b""), "is not as it was written"),
        (lambda folder: (folder / "state.json").unlink(), "it has no state.json"),
        (lambda folder: (folder / "state.json").write_text('{"step": "six"}'), "state.json is not as it was written"),
        (lambda folder: (folder / "checksums.json").write_text("[]"), "checksums.json must hold a JSON object"),
        (lambda folder: (folder / "checksums.json").unlink(), "it has no checksums.json"),
        (forget_a_checksum, "checksums.json has no tensors"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(
    tmp_path, copy_killed, unbroken, capsys, change, named
):
    copy_killed(8)
    change(tmp_path / "checkpoints" / "step_00000006")
    run(tmp_path)
    shown = capsys.readouterr().out
    assert re.search(rf"the checkpoint .*step_00000006 is damaged: .*{named}", shown) and "at step 3" in shown
    assert comparable(metrics(tmp_path)) == comparable(unbroken)


def test_a_run_whose_checkpoints_but_the_first_are_damaged_goes_on_from_that_and_is_not_begun_anew(
    tmp_path, copy_killed, unbroken
):
    copy_killed(5)
    flip_a_bit(tmp_path / "checkpoints" / "step_00000003")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"seed: .* against 7"):
        run(tmp_path, seed=7)
    run(tmp_path)
    assert comparable(metrics(tmp_path)) == comparable(unbroken)


def test_a_disk_that_fails_to_read_costs_no_checkpoint(tmp_path, copy_killed, monkeypatch, unbroken):
    copy_killed(5)

    def fail(_file):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output error"):
        patch.setattr(train.checkpoint, "checksum", fail)
        run(tmp_path)
    run(tmp_path)
    assert comparable(metrics(tmp_path)) == comparable(unbroken)


def test_what_else_lies_among_the_checkpoints_is_left_alone(tmp_path, copy_killed, unbroken):
    copy_killed(5)
    (tmp_path / "checkpoints" / "step_notes").mkdir()
    (tmp_path / "checkpoints" / "step_00000099").write_text("a file")
    run(tmp_path)
    assert comparable(metrics(tmp_path)) == comparable(unbroken)
    assert (tmp_path / "checkpoints" / "step_notes").is_dir()


def test_a_run_that_lost_its_checkpoints_or_its_config_is_not_begun_anew(tmp_path, copy_killed):
    copy_killed(5)
    kept = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"took \d steps and has lost its config.json: use another --run-dir"):
        run(tmp_path)
    (tmp_path / "config.json").write_text(kept)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match=r"took \d steps and has no whole checkpoint to go on from: use another"):
        run(tmp_path)


def test_half_a_line_in_the_metrics_is_not_glued_to_the_next(tmp_path, copy_killed, unbroken):
    copy_killed(5)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)[:3]
    (tmp_path / "metrics.jsonl").write_text("".join(lines)[:-20])
    run(tmp_path)
    assert comparable(metrics(tmp_path)) == comparable(unbroken[:2] + unbroken[3:])


def test_what_a_failed_attempt_asked_for_does_not_bind_the_next(tmp_path, monkeypatch, unbroken):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train, "train_step", lambda *args: 1 / 0)
        run(tmp_path, optim=dataclasses.replace(SMALL.optim, lr=1.0), seed=7)
    assert (tmp_path / "config.json").exists()
    run(tmp_path)
    assert comparable(metrics(tmp_path)) == comparable(unbroken)


def test_the_folder_alone_continues_a_run(tmp_path, copy_killed, unbroken):
    copy_killed(5)
    for option in (["--run-dir", str(tmp_path)], [f"--run-dir={tmp_path}"]):
        config = parse_train(option)
        assert config.optim.steps == SMALL.optim.steps and config.model == SMALL.model
    train.main(config)
    assert comparable(metrics(tmp_path)) == comparable(unbroken)
    with pytest.raises(ValueError, match=r"no run in .*new to go on with; to begin one, name a preset first: "):
        parse_train(["--run-dir", str(tmp_path / "new")])
    for name in ("metrics.jsonl", "checkpoints"):  # as a first attempt leaves it that takes no step
        shutil.move(tmp_path / name, tmp_path / f"moved_{name}")
    with pytest.raises(ValueError, match="took no step: name its preset again, one of scenes, "):
        parse_train(["--run_dir", str(tmp_path)])


@pytest.fixture
def ctrl_c():
    """Let SIGINT be heard, where a shell that started the tests in the background had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_saves_and_a_second_one_ends_at_once(tmp_path, monkeypatch, unbroken, ctrl_c):
    step, taken = train.train_step, []

    def interrupted(*args):
        taken.append(1)
        if len(taken) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(train, "train_step", interrupted)
        run(tmp_path)
    assert stopped.value.code == 130
    run(tmp_path)
    assert comparable(metrics(tmp_path)) == comparable(unbroken)
    with pytest.raises(KeyboardInterrupt), cli.watch_signals() as seen:
        os.kill(os.getpid(), signal.SIGINT)
        assert seen == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_is_no_error_of_a_library_that_makes_another_of_it(ctrl_c, capsys):
    """Safetensors does, in the milliseconds in which it makes a tensor."""

    def main():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except KeyboardInterrupt:
            pass  # as code that is no Python drops it
        raise ValueError("could not determine the shape")

    with pytest.raises(SystemExit) as stopped:
        cli.run(main)
    assert (stopped.value.code, capsys.readouterr().err) == (130, "\nstopped\n")
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    with pytest.raises(ValueError, match="another time"):
        cli.run(lambda: exec("raise ValueError('another time')"))


@pytest.mark.parametrize("command", [["train.py"], ["generate.py", "--model", "m"], ["-m", "eval.run", "m"]])
def test_ctrl_c_during_the_imports_is_one_line(tmp_path, ctrl_c, command):
    """A module in place of torch is imported until the signal comes."""
    marker, stub = tmp_path / "began", tmp_path / "torch.py"
    stub.write_text(f"import pathlib, time\npathlib.Path({str(marker)!r}).touch()\ntime.sleep(60)")
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=cli.PROJECT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not marker.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=30)
    assert (process.returncode, out, error) == (130, "", "\nstopped\n")


def test_a_closed_pipe_is_no_success(tmp_path):
    """As in `train.py | head -1`."""
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})\n" + textwrap.dedent("""
        from nanovlm import cli
        def main():
            while True: print("x" * 1000)
        cli.run(main)
    """)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_failed_start_leaves_nothing(tmp_path, monkeypatch):
    for changes in ({"device": "cuda:99"}, {"data": dataclasses.replace(SMALL.data, row_length=9)}):
        with pytest.raises(ValueError, match=r"cuda:99|row_length = 9 leaves no room"):
            run(tmp_path / "new", **changes)
        assert not (tmp_path / "new").exists()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="--wandb needs the package wandb"):
        run(tmp_path / "new", wandb=True)
    assert not (tmp_path / "new").exists()
    with lock(tmp_path / "taken"), pytest.raises(ValueError, match="another process is writing to"):
        run(tmp_path / "taken")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be made a folder"):
        run(tmp_path / "file")


def test_metrics_and_files(tmp_path, unbroken):
    fields = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "elapsed_s"}
    assert all(fields <= set(line) for line in unbroken)
    assert unbroken[-1]["loss"] < 0.97 * unbroken[0]["loss"]
    for before, after in itertools.pairwise(unbroken):
        assert before["tokens"] < after["tokens"] and before["elapsed_s"] < after["elapsed_s"]
    assert max(line["lr"] for line in unbroken) <= SMALL.optim.lr
    assert all(0 <= line["padding"] < 0.5 for line in unbroken)


def test_rates_are_those_of_the_step(tmp_path, monkeypatch):
    """Also just before a checkpoint: the fifth step, which is slow, has the lowest."""
    step = train.train_step

    def train_step(state, *args):
        time.sleep(0.5 * (state.step == 4) + 0.1)
        return step(state, *args)

    monkeypatch.setattr(train, "train_step", train_step)
    run(tmp_path, optim=dataclasses.replace(SMALL.optim, steps=6), checkpoint_every=5, eval=EvalConfig())
    lines = metrics(tmp_path)
    tokens = [after["tokens"] - before["tokens"] for before, after in itertools.pairwise([{"tokens": 0}, *lines])]
    seconds = [n / line["tokens_per_second"] for n, line in zip(tokens, lines, strict=True)]
    assert min(seconds) > 0.1 and seconds[4] > 0.6 and sorted(seconds)[2] < 0.6  # others may be slow on a busy machine


def test_a_finished_run_says_so(tmp_path, capsys):
    first = run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert run(tmp_path) == first
    assert "is a finished run" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step_00000009", "step_00000012"]
    assert json.loads((tmp_path / "config.json").read_text())["optim"]["steps"] == 12


def test_another_config_is_named(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match=rf"seed: {SMALL.seed} against 5"):
        run(tmp_path, seed=5)
    with pytest.raises(ValueError, match=r"optim.lr: .* against 0.5"):
        run(tmp_path, optim=dataclasses.replace(SMALL.optim, lr=0.5))


def load_weights(folder):
    """The model's tensors of a checkpoint."""
    files = sorted((folder / "tensors").glob("*.safetensors"))
    return {name: x for file in files for name, x in load_file(file).items() if name.startswith("model.")}


def stop_after(monkeypatch, steps):
    """Let a run be stopped by a signal so many steps after it went on."""
    step, taken = train.train_step, []

    def train_step(*args):
        taken.append(1)
        if len(taken) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(train, "train_step", train_step)


def test_what_changes_no_loss_may_change(tmp_path, monkeypatch, unbroken):
    stop_after(monkeypatch, 5)
    with pytest.raises(SystemExit):
        run(tmp_path)
    monkeypatch.undo()
    data = dataclasses.replace(SMALL.data, num_workers=2)
    run(tmp_path, data=data, threads=0, checkpoint_every=4, keep_checkpoints=1, eval=EvalConfig(), device="auto")
    assert comparable(metrics(tmp_path)) == comparable(unbroken)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["data"]["num_workers"] == 2 and config["checkpoint_every"] == 4


def test_steps_may_grow_until_the_rate_falls(tmp_path, monkeypatch):
    longer = dataclasses.replace(SMALL.optim, steps=16)
    run(tmp_path / "whole", optim=longer)
    stop_after(monkeypatch, 4)
    with pytest.raises(SystemExit):
        run(tmp_path / "grown")
    monkeypatch.undo()
    run(tmp_path / "grown", optim=longer)
    assert comparable(metrics(tmp_path / "grown")) == comparable(metrics(tmp_path / "whole"))
    stop_after(monkeypatch, 8)
    with pytest.raises(SystemExit):
        run(tmp_path / "late")
    monkeypatch.undo()
    go_on = "To train on, begin another run from its model: --init\\.model {0}/model --run-dir ANOTHER".format
    late, whole = tmp_path / "late", tmp_path / "whole"
    with pytest.raises(ValueError, match=rf"= 16: {late} is at step 9, its rate falls after step 6 .*{go_on(late)}"):
        run(late, optim=longer)
    with pytest.raises(ValueError, match=rf"= 17: {whole} has ended, after step 16 of 16\. {go_on(whole)}"):
        run(whole, optim=dataclasses.replace(longer, steps=17))
    cosine, curved = tmp_path / "cosine", dataclasses.replace(SMALL.optim, schedule="cosine")
    stop_after(monkeypatch, 3)
    with pytest.raises(SystemExit):
        run(cosine, optim=curved)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=rf"{cosine} is at step 4, its rate falls from its .* 12, .*{go_on(cosine)}"):
        run(cosine, optim=dataclasses.replace(curved, steps=13))
    with pytest.raises(ValueError, match=r"optim.steps: 12 against 11"):
        run(tmp_path / "late", optim=dataclasses.replace(SMALL.optim, steps=11))


def test_rows_longer_than_the_positions_are_refused(tmp_path):
    decoder = dataclasses.replace(SMALL.model.decoder, max_position_embeddings=255)
    with pytest.raises(ValueError, match=r"data.row_length = 256 is above model.decoder.max_position_embeddings = 255"):
        run(tmp_path, model=dataclasses.replace(SMALL.model, decoder=decoder))


def test_accumulation_gives_the_loss_and_gradient_of_one_large_batch(processor):
    """Documents of very different lengths: a mean of means would be far off."""
    answers = ["red"] * 3 + ["a red circle at the top left, a blue star at the bottom and the number 42."]
    documents = [make_document(processor, i, ("what?", answer)) for i, answer in enumerate(answers)]
    results = []
    for batches in ([make_batch(documents, rows=4)], [make_batch([document]) for document in documents]):
        torch.manual_seed(0)
        model = VLM(TINY)
        optim = OptimConfig(rules=(ParamRule(""),), warmup_steps=0)
        state = train.TrainState(model, model, make_optimizers(model, optim), [], threads=1, precision="fp32")
        num_trained = sum(len(batch.trained) for batch in batches)
        results.append(train.train_step(state, batches, num_trained, TrainConfig(optim=optim)))
    one, four = results
    torch.testing.assert_close(four["loss"], one["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(four["grad_norm"], one["grad_norm"], rtol=1e-5, atol=0)


class Asked(TorchDispatchMode):
    """Counts the operations that must wait for the device: their result, or its shape, is needed on the host."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "bincount")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.overloadpacket.__name__ in self.NAMES:
            self.names.append(op.overloadpacket.__name__)
        return op(*args, **kwargs or {})


@pytest.mark.parametrize("moe", [None, MoEConfig(num_experts=4, intermediate_size=16, balance="bias")])
def test_a_step_asks_the_device_nothing(processor, moe, monkeypatch):
    """But for the number of placeholders and the order of the tiles, which are compared on the CPU alone.

    And where documents are, which attention asks for on the CPU alone.
    """
    monkeypatch.setattr("nanovlm.model.attention.find_documents", lambda *ids: [])
    model = VLM(dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, moe=moe)))
    optim = OptimConfig(rules=(ParamRule("norm|embed|bias"), ParamRule("", optimizer="muon")))
    state = train.TrainState(model, model, make_optimizers(model, optim), [], threads=1, precision="fp32")
    batches = [make_batch([make_document(processor, i, ("what?", "red"))]) for i in range(2)]
    config = TrainConfig(model=model.config, optim=optim)
    with Asked() as asked:
        train.train_step(state, batches, 8, config)
    assert asked.names == ["_local_scalar_dense", "equal"] * len(batches)
    with asked:
        model.embed(batches[0]).sum().item()
    assert len(asked.names) == 2 * len(batches) + 3


def test_the_steps_that_are_named_are_profiled_also_after_a_resumption(tmp_path, copy_killed):
    """Steps 5 and 6 of the run, of which the second start takes 4, 5, 6, ..."""
    copy_killed(5)
    run(tmp_path, profile=(5, 6))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if event["name"].startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#1", "ProfilerStep#2"}  # counted from the start, whose first is step 4 and 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"profile": (3, 13)}, "profile = 3 13 must name a first step and a last one, up to optim.steps = 12"),
        ({"profile": (3, 2)}, "profile = 3 2 must name a first step"),
        (
            {"parallel": ParallelConfig(shard_ranks=2)},
            "parallel.shard_ranks = 2 needs parallel.strategy = fsdp, not ddp",
        ),
        (
            {"optim": dataclasses.replace(SMALL.optim, rules=(ParamRule("", lr_scale=None),))},
            "optim.rules freeze every parameter, with optim.freeze",
        ),
        ({"optim": dataclasses.replace(SMALL.optim, freeze=(".",))}, "freeze every parameter, with optim.freeze"),
        ({"eval": EvalConfig(every=5)}, "eval.every = 5 has nothing to look at: name eval.tasks or set data.val_frac"),
        ({"data": dataclasses.replace(SMALL.data, val_fraction=1.0)}, "data.val_fraction = 1.0 must be at least 0 and"),
    ],
)
def test_switches_that_do_nothing_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", **changes)


def test_the_examples_suit_their_machines(monkeypatch):
    """A node count times GPUs of which every rank has a micro-batch; and one to eight GPUs of one machine."""
    monkeypatch.setattr("nanovlm.train.init.take_model", lambda recipe, _theirs: recipe)  # that of an earlier stage
    slurm, one_node = ((cli.PROJECT / "examples" / name).read_text() for name in ("slurm.sh", "one_node.sh"))
    nodes, gpus = (int(re.search(rf"#SBATCH --{name}=(\d+)", slurm)[1]) for name in ("nodes", "gpus-per-node"))
    config = parse_train(re.search('recipe="(.*)"', slurm)[1].split())
    assert config.optim.micro_batches % (nodes * gpus) == 0 and config.parallel.shard_ranks == gpus
    config = parse_train(re.search(r'train.py (.*) "\$@"', one_node)[1].replace('"', "").split())
    assert all(config.optim.micro_batches % ranks == 0 for ranks in (1, 2, 4, 8))


@pytest.mark.parametrize(
    ("does", "expected"),
    [
        ("exit 0", 0),
        ("exit 1", 1),
        ("mkdir -p mine/checkpoints/step_00000009; exit 1", 75),
        ("mkdir -p mine/checkpoints/step_00000000; exit 1", 1),
        ("mkdir -p mine/checkpoints/step_00000009; touch mine/eval.json; exit 1", 1),
        ("trap 'mkdir -p mine/checkpoints/step_00000009; exit 1' TERM; kill -TERM $PPID; sleep 20 & wait", 75),
    ],
)
def test_the_restart_status_passes_through_torchrun(tmp_path, does, expected):
    """torchrun ends with 1 whatever its ranks end with."""
    (tmp_path / "torchrun").write_text("#!/bin/sh\n" + does)
    (tmp_path / "torchrun").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["sh", cli.PROJECT / "examples" / "one_node.sh", "mine", "--seed", "1"]
    assert subprocess.run(command, cwd=tmp_path, env=environment, timeout=30).returncode == expected


def test_the_evaluation_and_its_files(tmp_path, capsys):
    judged = EvalConfig(("scenes", "scenes:compositional"), limit=6, show_every=1)
    results = run(tmp_path, eval=judged, optim=dataclasses.replace(SMALL.optim, steps=2))
    assert results == json.loads((tmp_path / "eval.json").read_text())
    assert set(results) == {"train_seconds", "environment", "tasks"}
    for task in ("scenes", "scenes:compositional"):
        assert {"mean", "kinds", "blank_mean", "caption_exact"} <= set(results["tasks"][task])
        kinds = results["tasks"][task]["kinds"]
        assert set(kinds) <= {"color", "shape", "count", "position", "relation", "existence", "digits"}
        assert len(kinds) >= 5
        assert all(set(row) == {"accuracy", "blank", "shuffled", "alone", "majority", "n"} for row in kinds.values())
    assert (tmp_path / "samples.png").stat().st_size > 1000
    shown = capsys.readouterr()
    assert "caption exact" in shown.out and "(truth: " in shown.err + shown.out
    assert Image.open(tmp_path / "curves.png").width == 800


def test_own_data_beside_the_scenes(tmp_path, capsys):
    """Text-only records and a damaged line go through training and evaluation; everything is counted."""
    record = {"messages": [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "me"}]}
    (tmp_path / "own.jsonl").write_text("\n".join([*[json.dumps(record)] * 4, "{damaged"]))
    sources = ("scenes", str(tmp_path / "own.jsonl"))
    data = dataclasses.replace(
        SMALL.data, sources=sources, lessons=(), weights=(1, 1), max_bad_fraction=1.0, num_workers=1
    )
    results = run(
        tmp_path / "run",
        data=data,
        eval=EvalConfig(("scenes",), limit=6),
        optim=dataclasses.replace(SMALL.optim, steps=4),
    )
    assert results["tasks"]["scenes"]["kinds"]
    last = metrics(tmp_path / "run")[-1]
    assert last["documents_of_scenes"] > 5 and last["corrupt"] >= 2 and last["packed"] > 10
    assert last["samples"] == last["documents"] + last["corrupt"]
    assert abs(last["documents_of_scenes"] - last["samples"] / 2) <= 1
    output = capsys.readouterr().out
    assert output.count("skipped as corrupt") == 1 and "own.jsonl, sample 4: " in output
    read, *others = map(int, re.findall(r"\d+", re.search(r"(\d+ reads of records: .*)\n", output)[1]))
    assert [read, others[0], others[-1]] == [last["samples"], last["packed"], last["corrupt"]] and read == sum(others)
    assert ", 0 too long, " in output


def test_images_of_too_many_pixels_are_corrupt(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # which the run sets
    lines = []
    for side in (8, 8, 8, 40):
        Image.new("RGB", (side, side)).save(tmp_path / f"{side}.png")
        lines.append(json.dumps({"image": f"{side}.png", "texts": [{"user": "what?", "assistant": "black"}]}))
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    data = dataclasses.replace(SMALL.data, sources=(str(tmp_path / "own.jsonl"),), lessons=(), max_bad_fraction=0.5)
    data = dataclasses.replace(data, max_pixels=1000, batch_rows=1)
    run(tmp_path / "run", data=data, eval=EvalConfig(), optim=dataclasses.replace(SMALL.optim, steps=2))
    sentence = r"sample 3: .*40.png, line 4 of .* has 1600 pixels, more than data.max_pixels = 1000"
    assert re.search(sentence, capsys.readouterr().out)


def test_text_alone(tmp_path):
    """No image in a whole batch."""
    lines = (json.dumps({"texts": [{"user": f"what is {i}?", "assistant": str(i)}]}) for i in range(50))
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    data = dataclasses.replace(SMALL.data, sources=(str(tmp_path / "own.jsonl"),), lessons=(), shuffle=True)
    run(tmp_path / "run", data=data)
    first, *_, last = metrics(tmp_path / "run")
    assert last["loss"] < 0.97 * first["loss"] and last["packed"] > 100 and last["corrupt"] == 0


def test_a_run_whose_data_end_says_so_and_lets_the_rate_fall_by_then(tmp_path, capsys):
    lines = (json.dumps({"texts": [{"user": f"what is {i}?", "assistant": str(i)}]}) for i in range(90))
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    data = dataclasses.replace(
        SMALL.data, sources=(str(tmp_path / "own.jsonl"),), lessons=(), num_epochs=2, row_length=64, pack_buffer=32
    )
    optim = dataclasses.replace(SMALL.optim, steps=1000, schedule="cosine", min_lr_ratio=0.0)
    run(tmp_path / "run", data=data, optim=optim, eval=EvalConfig())
    shown = capsys.readouterr()
    planned = int(re.search(r"num_epochs = 2 gives about (\d+) steps, fewer than optim.steps = 1000", shown.out)[1])
    seen = metrics(tmp_path / "run")
    assert f"all was read after {len(seen)} steps: 180 reads in 2 passes" in shown.out
    assert "180 reads of 90 records: 180 trained, 0 too long, 0 corrupt\n" in shown.out
    assert abs(len(seen) - planned) <= 0.25 * planned and seen[-1]["packed"] == 180
    assert seen[-1]["lr"] < 0.2 * optim.lr < seen[len(seen) // 2]["lr"]


def test_text_alone_where_the_projector_alone_learns(tmp_path):
    """Nothing to learn from, and no error: data with images may have batches without."""
    (tmp_path / "own.jsonl").write_text(json.dumps({"texts": [{"user": "what?", "assistant": "that"}]}))
    data = dataclasses.replace(SMALL.data, sources=(str(tmp_path / "own.jsonl"),), lessons=())
    rules = (ParamRule(r"^(vision|decoder)\.", lr_scale=None), ParamRule("", weight_decay=0.1))
    run(tmp_path / "run", data=data, optim=dataclasses.replace(SMALL.optim, steps=2, rules=rules))
    assert [line["grad_norm"] for line in metrics(tmp_path / "run")] == [0, 0]
    first, last = (load_weights(tmp_path / "run" / "checkpoints" / f"step_0000000{step}") for step in (0, 2))
    assert first and all(torch.equal(first[name], x) for name, x in last.items())


def test_a_user_mistake_is_one_sentence(tmp_path):
    command = [sys.executable, "train.py", "scenes", "--run-dir", str(tmp_path), "--model.projector.scale-factor", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 2
    assert done.stderr == "error: projector.scale_factor = 2 must divide vision.image_size // vision.patch_size = 3\n"
    assert not list(tmp_path.iterdir())


def test_a_bug_keeps_its_traceback(capsys):
    """Also one whose ValueError comes from a line of ours that raises nothing by itself."""

    def bug():
        [_only] = [1, 2]

    with pytest.raises(ValueError, match="too many values"):
        cli.run(bug)
    with pytest.raises(SystemExit):
        cli.run(lambda: PRESET.__class__(seed=-1).validate())
    assert capsys.readouterr().err == "error: seed = -1 must be at least 0\n"


def test_what_is_registered_can_be_named_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setitem(ATTENTION, "mine", attend_sdpa)
    config = parse_train(["scenes", "--model.decoder.attention", "mine", "--data.sources", "mine"])
    assert VLM(config.model).decoder.layers[0].self_attn.attend is attend_sdpa
    with pytest.raises(ValueError, match="the source 'mine' does not exist: give scenes, scenes:KIND,KIND, documents,"):
        train.main(dataclasses.replace(config, run_dir=str(tmp_path), threads=1))
