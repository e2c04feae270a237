"""Adapters on two ranks: the values, gradients and end of one rank, and runs that survive a killed rank."""

import dataclasses
import pickle

import pytest
import torch
from safetensors.torch import load_file

from nanovlm import distributed
from nanovlm.config import AdapterConfig, ParallelConfig
from nanovlm.train import parallel
from nanovlm.train.state import TrainState
from nanovlm.train.step import train_step
from tests.conftest import make_batch, make_document
from tests.test_distributed import ROOT, assert_close, finish, torchrun
from tests.test_train import comparable, metrics
from tests.train.test_adapt import ADAPTERS, OPTIM, begin, folder, run_config, start  # noqa: F401

STILL = {name: dataclasses.replace(config, dropout=0.0) for name, config in ADAPTERS.items()}
CASES = {
    f"{name}, {kind}, {layout}": (kind, adapter, ParallelConfig(*options), "fp32")
    for name, kind, adapter in (
        ("DoRA", "plain", STILL["DoRA"]),
        ("QLoRA", "plain", STILL["QLoRA"]),
        ("LoRA", "mixture", AdapterConfig(rank=4, use_dora=True, init="gaussian")),
        ("PiSSA", "plain", AdapterConfig(rank=4, init="pissa")),
    )
    for layout, options in {
        "ddp": ("ddp",),
        "fsdp": ("fsdp",),
        "fsdp, computed again": ("fsdp", 0, True, 1, "full"),
    }.items()
}
for layout in ("ddp", "fsdp"):  # of which the second rounds embeddings and gradients to bf16, but no magnitude
    CASES[f"DoRA, plain, {layout}, bf16"] = ("plain", STILL["DoRA"], ParallelConfig(layout), "bf16")
WORKER = """
import pickle, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from nanovlm import cli, distributed
from tests.train.test_adapt_ranks import CASES, step_of
folder = Path(sys.argv[1])
torch.set_num_threads(1)
with distributed.ranks(torch.device("cpu")):
    batches = pickle.loads((folder / "batches").read_bytes())[distributed.rank()::distributed.num_ranks()]
    for name in CASES:
        found = step_of(folder, name, batches)
        if distributed.rank() == 0:
            save_file(found, folder / f"{name}.safetensors")
cli.end(0)
"""
RUN = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import train
from nanovlm import cli
from tests.train.test_adapt_ranks import config_of
first_start = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
step = train.train_step
def train_step(state, *args):
    if first_start and int(os.environ["RANK"]) == {rank} and state.step == 5: os.kill(os.getpid(), signal.SIGKILL)
    return step(state, *args)
train.train_step = train_step
cli.run(lambda: train.main(config_of(Path({start!r}), {run_dir!r}, {name!r}, {strategy!r})))
cli.end(0)
"""
pytestmark = pytest.mark.usefixtures("one_thread")


def config_of(start, run_dir, name, strategy):  # noqa: F811
    optim = dataclasses.replace(OPTIM, micro_batches=2)
    changes = dict(optim=optim, parallel=ParallelConfig(strategy=strategy), checkpoint_every=2)
    return run_config(start, run_dir, ADAPTERS[name], **changes)


def step_of(folder, name, batches):  # noqa: F811
    """Return the whole tensors that a run starts with, and the gradients of a step over this rank's batches."""
    kind, adapter, layout, precision = CASES[name]
    model, replica, config = begin(folder, adapter, kind, precision, parallel=layout)
    tensors = {f"start {key}": x.clone() for key, x in parallel.whole_tensors(model).items()}
    state = TrainState(model, replica, {}, [], threads=1, precision=precision)
    num_trained = int(distributed.add_up({"n": sum(len(batch.trained) for batch in batches)})["n"])
    model.train()
    layer = model.decoder.layers[0].self_attn.q_proj

    def keep_used(*_):
        for key, x in layer.adapters["default"].named_parameters():
            tensors[f"used {key}"] = x.detach().clone()

    layer.register_forward_pre_hook(keep_used)
    train_step(state, batches, num_trained, config)
    for key, p in model.named_parameters():
        if p.grad is not None:
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            tensors[f"gradient {key}"] = grad.detach().contiguous()
    return tensors


@pytest.fixture(scope="module")
def results(folder, processor):  # noqa: F811
    answers = ["red", "a red circle at the top left, a blue star at the bottom and the number 42.", "no", "left"]
    batches = [
        make_batch([make_document(processor, i, ("what?", answer), images=i != 2)]) for i, answer in enumerate(answers)
    ]
    (folder / "batches").write_bytes(pickle.dumps(batches))
    (folder / "worker.py").write_text(WORKER)
    finish(torchrun(folder / "worker.py", folder))
    return folder, batches


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_start_with_the_values_and_have_the_gradients_of_one(results, name):
    folder, batches = results  # noqa: F811
    theirs, ours = load_file(folder / f"{name}.safetensors"), step_of(folder, name, batches)
    assert theirs.keys() == ours.keys()
    for key, x in ours.items():
        if key.startswith("start "):
            assert torch.equal(theirs[key], x), key
    gradients = [{k: x for k, x in found.items() if k.startswith("gradient ")} for found in (theirs, ours)]
    assert len(gradients[1]) >= 28
    assert_close(*gradients, 1e-5 if CASES[name][3] == "fp32" else 4e-2)
    if CASES[name][1].use_dora:
        first = theirs["start decoder.layers.0.self_attn.q_proj.adapters.default.magnitude"]
        assert torch.equal(theirs["used magnitude"], first) and not torch.equal(first, first.bfloat16().float())


def test_a_killed_rank_changes_nothing(start, tmp_path):  # noqa: F811
    runs = []
    for rank in (-1, 1):  # of none, of the second
        run_dir, script = tmp_path / f"{rank}", tmp_path / f"{rank}.py"
        options = dict(rank=rank, start=str(start), run_dir=str(run_dir), name="QLoRA", strategy="fsdp")
        script.write_text(RUN.format(root=str(ROOT), **options))
        finish(torchrun(script, restarts=1))
        runs.append(run_dir)
    unbroken, killed = runs
    assert len(metrics(unbroken)) == 8 and comparable(metrics(killed)) == comparable(metrics(unbroken))
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        theirs, ours = load_file(unbroken / file), load_file(killed / file)
        assert theirs.keys() == ours.keys() and all(torch.equal(x, ours[key]) for key, x in theirs.items())
