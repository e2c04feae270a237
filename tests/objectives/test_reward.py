"""Reward models: TRL's loss on transformers' rewards of the same weights; they learn, and start from any model."""

import collections
import dataclasses
import types

import pytest
import torch
import transformers
from trl.trainer.reward_trainer import RewardTrainer

import nanovlm
import train
from nanovlm.config import AdapterConfig, InitConfig, MoEConfig, OptimConfig, PreferenceConfig, TrainConfig
from nanovlm.data.types import IGNORE
from nanovlm.errors import UserError
from nanovlm.hub import export
from nanovlm.hub.model_folder import save_model
from nanovlm.model.vlm import VLM, Extras
from nanovlm.objectives.reward import Reward, score_branches
from nanovlm.train import init
from tests.conftest import TINY, make_batch
from tests.hub.test_export import TEXT_ONLY, randomize, write_own
from tests.objectives.test_pair_runs import folder, make_config  # noqa: F401
from tests.objectives.test_preference import documents_of, their_inputs, write_out
from tests.test_distributed import finish, torchrun
from tests.test_train import metrics

pytestmark = pytest.mark.usefixtures("one_thread")
SCORING = dataclasses.replace(TINY, has_score_head=True)


@pytest.fixture
def scorer():
    torch.manual_seed(0)
    return randomize(VLM(SCORING))


def test_rewards_and_loss_are_those_of_trl_and_transformers(tmp_path):
    write_own(tmp_path / "model", TEXT_ONLY)
    export.export(tmp_path / "model", tmp_path / "hub")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hub", num_labels=1).eval()
    theirs.config.pad_token_id = 0
    lm, processor = nanovlm.load(tmp_path / "model")
    model = VLM(dataclasses.replace(TEXT_ONLY, has_score_head=True)).eval()
    model.load_state_dict(lm.state_dict() | {"score.weight": theirs.score.weight.detach()})
    documents, extras = documents_of(processor, sees=False), Extras()
    batch = make_batch(documents, rows=2)
    loss = Reward().loss(model, batch, extras) / Reward().count(batch)
    loss.backward()
    trainer = types.SimpleNamespace(
        model=theirs,
        accelerator=types.SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        args=types.SimpleNamespace(center_rewards_coefficient=None),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0,
    )
    losses = []
    for document in documents:
        inputs = {name: x for name, x in their_inputs(document).items() if name != "completion_mask"}
        losses.append(RewardTrainer.compute_loss(trainer, theirs, inputs))
    expected = torch.stack(losses).mean()
    expected.backward()
    assert abs(loss - expected) < 1e-5
    assert (model.score.weight.grad - theirs.score.weight.grad).abs().max() < 1e-5
    gradients = model.decoder.embed_tokens.weight.grad, theirs.get_input_embeddings().weight.grad
    assert (gradients[0] - gradients[1]).abs().max() < 1e-5 and gradients[0].abs().max() > 1e-3
    for ours, name in (("preference_accuracy", "accuracy"), ("margin", "margin")):
        total, number = extras.means[ours]
        assert float(total / number) == pytest.approx(sum(trainer._metrics["eval"][name]) / 3, abs=1e-5)


def test_rewards_of_branches_are_those_of_answers_written_out(scorer, processor):
    documents = documents_of(processor)
    found = score_branches(scorer, make_batch(documents, rows=2))
    copies = make_batch([copy for document in documents[::2] + documents[1::2] for copy in write_out(document)])
    torch.testing.assert_close(found, score_branches(scorer, copies), rtol=1e-5, atol=1e-5)
    assert found.dtype == torch.float32 and len(set(found.tolist())) == 6


def test_the_reward_is_read_at_the_end_token(scorer, processor):
    """Or at the last token of a branch that does not hold its end."""
    (document,) = documents_of(processor)[:1]
    batch = make_batch([document], row_length=len(document) + 3)
    hidden, before = scorer(batch)[0], score_branches(scorer, batch)
    ends = (document.input_ids == TINY.eos_token_id).nonzero()[-2:, 0]
    assert torch.allclose(before, hidden[ends] @ scorer.score.weight[0], atol=1e-6)
    document.labels[ends[0] - 1] = IGNORE  # the first answer is trained up to its last word alone
    document.labels[ends[1]] = 7  # the second beyond its end
    batch = make_batch([document], row_length=len(document) + 3)
    found = score_branches(scorer, batch)
    assert torch.allclose(found, hidden[ends - torch.tensor([1, 0])] @ scorer.score.weight[0], atol=1e-6)


def test_a_score_head_starts_at_zero_from_any_model(processor, tmp_path):
    """From one without a head, and a dense one that becomes a mixture; from a reward model with its own head."""
    torch.manual_seed(0)
    plain = randomize(VLM(TINY))
    save_model(tmp_path / "plain", plain, processor)
    moe = MoEConfig(num_experts=2, intermediate_size=64, num_experts_per_tok=1)
    mixture = dataclasses.replace(SCORING, decoder=dataclasses.replace(TINY.decoder, moe=moe))
    for config in (SCORING, mixture):
        model, _ = init.start(TrainConfig(model=config, init=InitConfig(model=str(tmp_path / "plain"))), [])
        assert not model.score.weight.any()
        assert torch.equal(model.decoder.embed_tokens.weight, plain.decoder.embed_tokens.weight)
    assert not VLM(SCORING).score.weight.any()
    reward = randomize(VLM(SCORING))
    save_model(tmp_path / "reward", reward, processor)
    model, _ = init.start(TrainConfig(model=SCORING, init=InitConfig(model=str(tmp_path / "reward"))), [])
    assert torch.equal(model.score.weight, reward.score.weight) and model.score.weight.any()


@pytest.mark.parametrize(("objective", "has_head"), [("reward", False), ("preference", True)])
def test_a_score_head_is_learned_by_reward_alone(objective, has_head):
    config = TrainConfig(objective=objective, model=dataclasses.replace(TINY, has_score_head=has_head))
    with pytest.raises(UserError, match=f"has_score_head = {has_head} does not fit objective = {objective}"):
        config.validate()


UNTIED = dataclasses.replace(SCORING, decoder=dataclasses.replace(TINY.decoder, tie_word_embeddings=False))


def learn(folder, name):  # noqa: F811
    """Train a reward model from one that has no score head and a head of its own for tokens."""
    config = make_config(folder / name, model=UNTIED, objective="reward", preference=PreferenceConfig())
    config = dataclasses.replace(config, init=InitConfig(model=str(folder / "untied")))
    train.main(dataclasses.replace(config, optim=OptimConfig(lr=5e-3, steps=16, warmup_steps=1, micro_batches=2)))


RANKS = """
from pathlib import Path
from nanovlm import cli
from tests.objectives.test_reward import learn
cli.run(lambda: learn(Path({folder!r}), "two"))
cli.end(0)
"""


def test_a_reward_model_learns_and_its_other_head_stays(folder, processor):  # noqa: F811
    """On one rank and on two, whose gradients are of all parameters."""
    save_model(folder / "untied", before := VLM(dataclasses.replace(UNTIED, has_score_head=False)), processor)
    (folder / "ranks.py").write_text(RANKS.format(folder=str(folder)))
    learn(folder, "one")
    finish(torchrun(folder / "ranks.py"))
    one, two = (metrics(folder / name / "run") for name in ("one", "two"))
    assert one[0]["loss"] == pytest.approx(0.693147) and one[0]["margin"] == 0
    assert one[-1]["loss"] < 0.4 and one[-1]["preference_accuracy"] > 0.9 and "val_loss" in one[2]
    assert [line["margin"] for line in two] == pytest.approx([line["margin"] for line in one], rel=1e-3, abs=1e-5)
    for name in ("one", "two"):
        after, _ = nanovlm.load(folder / name / "run" / "model")
        assert after.score.weight.any() and torch.equal(after.decoder.lm_head.weight, before.decoder.lm_head.weight)


def test_a_score_head_learns_beside_adapters(folder, processor):  # noqa: F811
    save_model(folder / "start_of_adapters", before := VLM(TINY), processor)
    config = make_config(folder / "adapted", model=SCORING, objective="reward", preference=PreferenceConfig())
    start = InitConfig(model=str(folder / "start_of_adapters"))
    config = dataclasses.replace(config, adapter=AdapterConfig(rank=4), init=start)
    train.main(dataclasses.replace(config, optim=OptimConfig(lr=1e-2, steps=12, warmup_steps=1, micro_batches=2)))
    lines = metrics(folder / "adapted" / "run")
    assert lines[0]["loss"] == pytest.approx(0.693147) and lines[-1]["loss"] < 0.6
    after, _ = nanovlm.load(folder / "adapted" / "run" / "model")
    assert after.score.weight.any()
    assert torch.equal(after.decoder.embed_tokens.weight, before.decoder.embed_tokens.weight)
