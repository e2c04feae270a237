"""Runs whose decoder looks at pictures by cross-attention: they survive a kill, and two ranks compute what one does."""

import dataclasses
import subprocess
import sys

import pytest
from safetensors.torch import load_file

import train
from nanovlm.config import FusionConfig, ParallelConfig
from nanovlm.data.chat import Processor
from nanovlm.model.vlm import VLM
from tests.conftest import make_batch, make_document
from tests.model.test_fusion import CROSS, open_gates
from tests.test_distributed import ROOT, assert_close, finish, take_step, torchrun
from tests.test_train import KILL_AT_STEP, SMALL, comparable, metrics

LAYOUTS = {
    "ddp": ParallelConfig(),
    "fsdp": ParallelConfig(strategy="fsdp"),
    "fsdp, computed again": ParallelConfig(strategy="fsdp", checkpointing="full"),
}
WORKER = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from nanovlm import cli, distributed
from nanovlm.data.chat import Processor
from tests.model.test_fusion import CROSS
from tests.train.test_fusion_runs import LAYOUTS, make_batches, step
folder = Path(sys.argv[1])
torch.set_num_threads(1)
with distributed.ranks(torch.device("cpu")):
    batches = make_batches(Processor.load(folder, CROSS))[distributed.rank()::distributed.num_ranks()]
    for name, layout in LAYOUTS.items():
        found = step(layout, batches)
        if distributed.rank() == 0:
            save_file(found, folder / f"{name}.safetensors")
cli.end(0)
"""
RUN = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
from tests.train.test_fusion_runs import CONFIG
import dataclasses
def die(): os.kill(os.getpid(), signal.SIGKILL)
{hook}
train.main(dataclasses.replace(CONFIG, run_dir={run_dir!r}))
"""
CONFIG = dataclasses.replace(
    SMALL,
    model=dataclasses.replace(SMALL.model, fusion=FusionConfig("cross_attention")),
    optim=dataclasses.replace(SMALL.optim, steps=4),
    checkpoint_every=2,
    eval=dataclasses.replace(SMALL.eval, show="", show_every=0),
)
pytestmark = pytest.mark.usefixtures("one_thread")


def make_batches(processor):
    """Four micro-batches, of which the third and the second rank's second have no picture."""
    answers = ["red", "a red circle at the top left, a blue star at the bottom and the number 42.", "no", "left"]
    return [
        make_batch([make_document(processor, i, ("what?", answer), images=i < 2)]) for i, answer in enumerate(answers)
    ]


def step(layout, batches):
    """Return the gradients of a step of a model with open gates."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.test_distributed.VLM", lambda config: open_gates(VLM(config)))
        return take_step(CROSS, layout, batches)


def test_two_ranks_have_the_gradients_of_one(tmp_path, processor):
    """Also where a rank has a micro-batch without pictures."""
    processor.save(tmp_path)
    (tmp_path / "worker.py").write_text(WORKER)
    finish(torchrun(tmp_path / "worker.py", tmp_path))
    ours = step(ParallelConfig(), make_batches(Processor.load(tmp_path, CROSS)))
    assert all(x.abs().max() > 0 for x in ours.values())
    for name in LAYOUTS:
        theirs = load_file(tmp_path / f"{name}.safetensors")
        assert theirs.keys() == ours.keys()
        assert_close(theirs, ours, 1e-6)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    script = RUN.format(root=str(ROOT), hook=KILL_AT_STEP.format(3), run_dir=str(tmp_path / "killed"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    for name in ("killed", "unbroken"):
        train.main(dataclasses.replace(CONFIG, run_dir=str(tmp_path / name)))
    assert len(metrics(tmp_path / "killed")) == 4
    assert comparable(metrics(tmp_path / "killed")) == comparable(metrics(tmp_path / "unbroken"))
    theirs, ours = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("killed", "unbroken"))
    assert all(theirs[name].equal(x) for name, x in ours.items())
    assert any(name.startswith("fusion.") for name in ours)
