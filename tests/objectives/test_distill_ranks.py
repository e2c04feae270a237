"""A student learns on two ranks as on one, the map beside it too, which no wrapper of the model knows."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

import train
from nanovlm.config import ParallelConfig
from nanovlm.objectives.distill import LOSSES
from tests.objectives.test_distill import ROOT, distilled, large  # noqa: F401
from tests.test_distributed import finish, torchrun
from tests.test_train import metrics

RANKS = """
import sys
sys.path.insert(0, {root!r})
import train
from nanovlm import cli
from tests.objectives.test_distill_ranks import configure
cli.run(lambda: train.main(configure{settings!r}))
cli.end(0)
"""


def configure(teacher, run_dir, strategy, freeze, losses):
    config = distilled(teacher, run_dir=run_dir)
    optim = dataclasses.replace(config.optim, steps=4, micro_batches=2, freeze=freeze)
    distill = dataclasses.replace(config.distill, losses=losses or config.distill.losses)
    parallel = ParallelConfig(strategy=strategy)
    decoder = dataclasses.replace(config.model.decoder, tie_word_embeddings=False)
    model = dataclasses.replace(config.model, decoder=decoder)
    return dataclasses.replace(config, precision="fp32", parallel=parallel, optim=optim, distill=distill, model=model)


def read(run_dir):
    maps = load_file(sorted((run_dir / "checkpoints").iterdir())[-1] / "rng.safetensors")
    learned = load_file(run_dir / "model" / "model.safetensors")
    return metrics(run_dir), learned | {name: x for name, x in maps.items() if name.startswith("objective.")}


@pytest.mark.parametrize(
    ("strategy", "freeze", "losses"),
    [
        *(("ddp", (), ()), ("fsdp", (), ())),
        *(("ddp", (r"^decoder",), ("features=1",)), ("ddp", (), ("features=1",)), ("fsdp", (), ("features=1",))),
    ],
)
def test_two_ranks_learn_as_one(tmp_path, large, strategy, freeze, losses):  # noqa: F811
    one, two = tmp_path / "one", tmp_path / "two"
    train.main(configure(large, str(one), strategy, freeze, losses))
    script = RANKS.format(root=ROOT, settings=(str(large), str(two), strategy, freeze, losses))
    (tmp_path / "run.py").write_text(script)
    finish(torchrun(tmp_path / "run.py"))
    (ours, our_tensors), (theirs, their_tensors) = read(one), read(two)
    for expected, seen in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm", *(x for x in expected if x in LOSSES)):
            assert seen[name] == pytest.approx(expected[name], rel=1e-3), name
    assert "objective.features" in our_tensors
    for name, x in our_tensors.items():
        if name.endswith("k_proj.bias"):  # moves no softmax, so that its gradient is rounding
            continue
        torch.testing.assert_close(their_tensors[name], x, rtol=1e-3, atol=1e-4, msg=name)
