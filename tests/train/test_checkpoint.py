"""Run state on disk: what is saved comes back, and nothing half-written is taken for whole."""

import pytest
import torch

from nanovlm.config import OptimConfig, from_dict
from nanovlm.model.vlm import VLM
from nanovlm.train import checkpoint
from nanovlm.train.optim import make_optimizers
from tests.conftest import TINY, make_batch, make_document


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_run_state_comes_back(tmp_path, processor, moments):
    """Weights, both optimizers' states and torch's random state; the newest checkpoints are kept."""
    model = VLM(TINY)
    rules = [{"pattern": "norm|embed|bias|vision"}, {"pattern": "", "optimizer": "muon", "weight_decay": 0.1}]
    config = from_dict(OptimConfig, {"rules": rules, "moments": moments, "betas": [0.9, 0.95]})
    optimizers = make_optimizers(model, config)
    batch = make_batch([make_document(processor, 0, ("what?", "red"))])

    def step(model, optimizers):
        model.logits(batch).square().mean().backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        return torch.rand(1)

    for i in (1, 2, 3):
        step(model, optimizers)
        state = {"step": i, "loader": {"next_index": 5}}
        checkpoint.Saving(tmp_path, model, optimizers, state, checkpoint.rng_state(), keep=2).finish()
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["step_00000002", "step_00000003"]
    drawn = step(model, optimizers)
    again = VLM(TINY)
    optimizers_again = make_optimizers(again, config)
    state, rng = checkpoint.load_checkpoint(checkpoint.list_checkpoints(tmp_path)[-1], again, optimizers_again)
    checkpoint.set_rng_state(rng)
    assert state == {"step": 3, "loader": {"next_index": 5}}
    assert torch.equal(step(again, optimizers_again), drawn)
    ours, theirs = (checkpoint.name_tensors(*pair) for pair in ((model, optimizers), (again, optimizers_again)))
    assert ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())
    for (name, left), right in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(left, right), name


def saved(tmp_path):
    model = VLM(TINY)
    checkpoint.Saving(tmp_path, model, {}, {"step": 7}, checkpoint.rng_state(), keep=2).finish()
    return model, checkpoint.list_checkpoints(tmp_path)[-1]


def test_what_training_changes_meanwhile_is_not_saved(tmp_path):
    model = VLM(TINY)
    before = model.decoder.norm.weight.clone()
    saving = checkpoint.Saving(tmp_path, model, {}, {"step": 7}, checkpoint.rng_state(), keep=2)
    with torch.no_grad():
        model.decoder.norm.weight.fill_(5)
    assert not checkpoint.list_checkpoints(tmp_path)
    saving.finish()
    checkpoint.load_checkpoint(checkpoint.list_checkpoints(tmp_path)[-1], model, {})
    assert torch.equal(model.decoder.norm.weight, before)


def test_damage_is_named(tmp_path):
    model, folder = saved(tmp_path)
    [shard] = (folder / "tensors").iterdir()
    whole = shard.read_bytes()
    for data in (whole[:-5], whole[:4], b""):
        shard.write_bytes(data)
        with pytest.raises(ValueError, match=r"step_00000007 is damaged or does not fit the config"):
            checkpoint.load_checkpoint(folder, model, {})
    shard.unlink()
    with pytest.raises(ValueError, match=r"step_00000007 is damaged or does not fit the config"):
        checkpoint.load_checkpoint(folder, model, {})
