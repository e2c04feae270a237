"""PPO against TRL's formulas and finite differences; answers that share a prompt against copies written out."""

import dataclasses

import numpy as np
import pytest
import torch

from nanovlm.config import GroupConfig, OptimConfig, PPOConfig, TrainConfig
from nanovlm.hub.model_folder import save_model
from nanovlm.model.vlm import VLM, Extras
from nanovlm.objectives.group import group_losses
from nanovlm.objectives.logprobs import Branches, batch_logprobs, find_branches
from nanovlm.objectives.next_token import NextToken
from nanovlm.objectives.own import OwnAnswer, make_document
from nanovlm.objectives.ppo import PPO, estimate_advantages, value_losses, whiten
from nanovlm.train.step import fill_up
from tests.conftest import TINY, make_batch
from tests.conftest import make_document as make_sample
from tests.objectives.test_group import ANSWERS, make_answers, make_questions

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = [3, 5, 1, 4]
ENDS = torch.tensor(LENGTHS).cumsum(0) - 1
REWARDS = [1.0, 0.0, 0.5, 0.25]  # of ANSWERS


def make_objective(processor=None, ppo=None, **group):
    config = TrainConfig(model=TINY, objective="ppo", group=GroupConfig(**group), ppo=PPOConfig(**ppo or {}))
    objective = PPO(config, processor, torch.device("cpu"))
    torch.manual_seed(1)
    torch.nn.init.normal_(objective.value_head, std=0.1)
    return objective


# --- published formulas, in fp64 ----------------------------------------------------------------------------------


def their_advantages(rewards, values, gamma, lam):
    """The backward loop of TRL over answers of equal length, arrays [G, T]."""
    advantages, last = np.zeros_like(rewards), 0.0
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        last = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * last
        advantages[:, t] = last
    return advantages


def their_losses(logprobs, old, advantages, values, old_values, returns, epsilon, cliprange_value):
    """TRL's losses of tokens: policy, and half the value's; arrays [N]."""
    ratio = np.exp(logprobs - old)
    policy = np.maximum(-advantages * ratio, -advantages * np.clip(ratio, 1 - epsilon, 1 + epsilon))
    bounded = np.clip(values, old_values - cliprange_value, old_values + cliprange_value)
    return policy, 0.5 * np.maximum((values - returns) ** 2, (bounded - returns) ** 2)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.5, 0.0)])
def test_advantages_are_those_of_trl(gamma, lam):
    """Answer by answer; no answer sees another's tokens."""
    torch.manual_seed(0)
    rewards, values = torch.randn(2, sum(LENGTHS), dtype=torch.float64)
    found = estimate_advantages(rewards, values, ENDS, gamma, lam)
    parts = [x.split(LENGTHS) for x in (rewards, values)]
    expected = [their_advantages(r[None].numpy(), v[None].numpy(), gamma, lam)[0] for r, v in zip(*parts, strict=True)]
    np.testing.assert_allclose(found.numpy(), np.concatenate(expected), rtol=1e-12)
    if gamma == lam == 1:  # all that is earned from a token on, less what was expected
        sums = torch.cat([r.flip(0).cumsum(0).flip(0) for r in parts[0]])
        torch.testing.assert_close(found, sums - values)


def test_numbers_are_whitened_over_all_ranks():
    torch.manual_seed(0)
    here, there = torch.randn(5, dtype=torch.float64), 3 + torch.randn(4, dtype=torch.float64)
    both = np.concatenate((here.numpy(), there.numpy()))
    expected = (here.numpy() - both.mean()) / np.sqrt(both.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(whiten(here, torch.cat((here, there))).numpy(), expected, rtol=1e-12)
    assert torch.equal(whiten(here[:1], here[:1]), here[:1]) and not len(whiten(here[:0], here[:0]))


def test_gradients_of_both_losses_are_those_of_finite_differences():
    torch.manual_seed(0)
    new, old, weights, values, old_values, returns = torch.randn(6, sum(LENGTHS), dtype=torch.float64) / 2
    branches = Branches(torch.arange(4).repeat_interleave(torch.tensor(LENGTHS)), None, torch.tensor(LENGTHS))
    losses, clipped = group_losses(new, old, weights, branches, GroupConfig())
    errors, unfollowed = value_losses(values, old_values, returns, 0.2)
    assert 0 < clipped.sum() < len(new) and 0 < unfollowed.sum() < len(new)
    numbers = [x.numpy() for x in (new, old, weights, values, old_values, returns)]
    for ours, theirs in zip((losses, errors), their_losses(*numbers, 0.2, 0.2), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-12)

    def total(new, values):
        losses, _ = group_losses(new, old, weights, branches, GroupConfig())
        return (losses + 0.3 * value_losses(values, old_values, returns, 0.2)[0]).sum()

    assert torch.autograd.gradcheck(total, (new.requires_grad_(), values.requires_grad_()))


# --- whole steps --------------------------------------------------------------------------------------------------


def make_documents(processor, apart=False):
    """Answers to two questions with their rewards, each question's in one document, or one answer in each."""
    documents = []
    for number, question in enumerate(make_questions(processor)):
        answers = make_answers(number)
        groups = [[k] for k in range(len(answers))] if apart else [range(len(answers))]
        documents += [
            make_document(question, [answers[k] for k in group], weights=[REWARDS[k] for k in group])
            for group in groups
        ]
    return documents


def make_model(seed=0):
    torch.manual_seed(seed)
    return VLM(TINY).double().train()


def appraise(objective, model, batches):
    """As rollouts do."""
    extras = Extras()
    model.eval()
    with torch.no_grad():
        objective.prepare(model, batches, extras)
    model.train()
    return extras


@pytest.mark.parametrize(("beta", "temperature"), [(0.3, 1.0), (0.0, 0.7)])
def test_a_step_is_that_of_the_formulas(processor, tmp_path, beta, temperature):
    """From logits of answers written out: rewards beside a reference, advantages, returns, losses and metrics.

    The step has two micro-batches, one for each question.
    """
    torch.manual_seed(5)
    reference = VLM(TINY)
    save_model(tmp_path / "model", reference, processor)
    settings = dict(reference=str(tmp_path / "model"), epsilon=0.3, epsilon_high=0.3)
    settings |= {"beta": beta, "temperature": temperature}
    objective = make_objective(
        processor, {"gamma": 0.9, "lam": 0.8, "vf_coef": 0.5, "cliprange_value": 0.05}, **settings
    )
    batches, old_model, model = [make_batch([d]) for d in make_documents(processor)], make_model(), make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * parameter.std().nan_to_num() * torch.randn_like(parameter)
    extras, steps = appraise(objective, old_model, batches), Extras()
    loss = sum(objective.loss(model, batch, steps) for batch in batches)

    def read(model, document):
        alone = make_batch([document])
        model.eval()
        logits = model.logits(alone)[0].double() / temperature
        logits[:, list(objective.group.never)] = -torch.inf
        logprobs = logits.log_softmax(-1)[alone.trained, alone.labels[0, alone.trained]]
        values = model(alone)[0, alone.trained].double() @ objective.value_head.double()
        return logprobs.detach().numpy(), values.detach().numpy()

    rows, gaps = [], []
    for document, reward in zip(make_documents(processor, apart=True), REWARDS * 2, strict=True):
        old = document.values["old_logprobs"][document.labels >= 0].double().numpy()
        new, values = read(model, document)
        _, old_values = read(old_model, document)
        gap = read(reference, document)[0] - old
        rewards = beta * gap
        rewards[-1] += reward
        advantages = their_advantages(rewards[None], old_values[None], 0.9, 0.8)[0]
        rows.append((new, old, advantages, values, old_values, advantages + old_values))
        gaps.append(gap)
    new, old, advantages, values, old_values, returns = map(np.concatenate, zip(*rows, strict=True))
    variance = 1 - (returns - old_values).var() / returns.var()
    advantages = (advantages - advantages.mean()) / np.sqrt(advantages.var(ddof=1) + 1e-8)
    policy, errors = their_losses(new, old, advantages, values, old_values, returns, 0.3, 0.05)
    for name, expected in (("returns", returns), ("weights", advantages)):
        found = torch.cat([batch.value(name) for batch in batches]).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert loss.item() == pytest.approx((policy + 0.5 * errors).sum(), rel=1e-4)
    gaps = np.concatenate(gaps)
    ratio = np.exp(new - old)
    bounded = np.clip(values, old_values - 0.05, old_values + 0.05)
    told = {name: float(total / number) for name, (total, number) in (extras.means | steps.means).items()}
    assert told.get("kl", 0.0) == pytest.approx((np.exp(gaps) - 1 - gaps).mean() if beta else 0.0, rel=1e-4)
    assert told["explained_variance"] == pytest.approx(variance, abs=1e-4)
    assert told["value_loss"] == pytest.approx(errors.mean(), rel=1e-4)
    assert told["clip_fraction"] == pytest.approx(
        (np.maximum(ratio * -advantages, policy) > ratio * -advantages).mean()
    )
    unfollowed = ((bounded - returns) ** 2 > (values - returns) ** 2).mean()
    assert told["value_clip_fraction"] == pytest.approx(unfollowed) and 0 < unfollowed < 1


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_answers_that_share_a_prompt_equal_answers_written_out(processor, loss_type):
    """In the loss, every gradient, the value head's too, the count and metrics, to rounding, images included."""
    objective, model = make_objective(loss_type=loss_type, epsilon=0.9, epsilon_high=100.0), make_model()
    found = []
    for apart, rows in ((False, 1), (True, 3)):
        batch = make_batch(make_documents(processor, apart), row_length=200, rows=rows)
        told, extras = appraise(objective, model, [batch]), Extras()
        model.zero_grad()
        objective.value_head.grad = None
        loss = objective.loss(model, batch, extras)
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()} | {"value": objective.value_head.grad}
        found.append((loss.detach(), gradients, objective.count(batch), told.means | extras.means))
    (loss, gradients, count, means), (loss_apart, gradients_apart, count_apart, means_apart) = found
    assert count == count_apart and loss.abs() > 1e-2
    torch.testing.assert_close(loss, loss_apart, rtol=1e-5, atol=1e-6)  # values are fp32
    rounding = 1e-6 * sum(gradient.square().sum() for gradient in gradients.values()).sqrt()
    for name, gradient in gradients.items():
        assert (gradient - gradients_apart[name]).norm() <= 1e-5 * gradients_apart[name].norm() + rounding, name
    assert gradients["vision.patch_embedding.weight"].any() and gradients["value"].any()
    for name, (total, number) in means.items():
        torch.testing.assert_close(
            float(total / number), float(means_apart[name][0] / means_apart[name][1]), rtol=1e-4, atol=1e-6, msg=name
        )


def test_an_answer_changes_nothing_of_another(processor):
    """Neither values nor returns nor, before they are whitened, advantages."""
    objective, model, question = make_objective(), make_model(), make_questions(processor)[0]
    answers, found = make_answers(), []
    for ids in ([40, 41], [44, 45]):
        answers[1] = OwnAnswer(ids, [-1.0, -1.0])
        batch = make_batch([make_document(question, answers, weights=REWARDS)])
        appraise(objective, model, [batch])
        found.append([batch.value(name).split([4, 2, 2, 3]) for name in ("values", "returns")])
    for one, other in zip(*found, strict=True):
        assert [torch.equal(x, y) for x, y in zip(one, other, strict=True)] == [True, False, True, True]


def test_rewards_become_advantages_of_the_answers_that_are_kept(processor):
    """One answer to a question will do; all numbers are of the trained positions alone."""
    objective = make_objective(num_generations=1, mask_truncated_completions=True)
    questions = make_questions(processor)
    answers = [OwnAnswer(ANSWERS[0], [-1.0] * 4, text, has_ended=text == "red") for text in ("red", "two")]
    groups, extras = [(q, [answer]) for q, answer in zip(questions, answers, strict=True)], Extras()
    kept, nothing = objective.documents(groups, extras)
    assert nothing is None and kept.values["weights"][kept.labels >= 0].tolist() == [1.0] * 4
    means = {name: float(total / number) for name, (total, number) in extras.means.items()}
    assert means["reward"] == 1.0 and means["reward_std"] == 0.0
    batch = make_batch([kept], row_length=len(kept) + 5)
    appraise(objective, make_model(), [batch])
    for name in ("values", "returns", "weights"):
        assert batch.values[name].shape == batch.labels.shape and not batch.values[name][batch.labels < 0].any()
    assert abs(batch.value("weights").mean()) < 1e-6 and batch.value("weights").var() == pytest.approx(1, abs=1e-5)


def test_metrics_are_the_same_whatever_a_rank_has(processor):
    """Ranks sum them up by place: without a batch, of padding alone, and with answers."""
    objective, model = make_objective(), make_model()
    batch = make_batch(make_documents(processor))
    config = TrainConfig(model=TINY, optim=OptimConfig(micro_batches=1))
    [padding] = fill_up([], config)
    told = [list(appraise(objective, model, batches).means) for batches in ([], [padding], [batch, padding])]
    assert told[0] == told[1] == told[2] == ["explained_variance"]
    assert not len(padding.value("weights")) and objective.count(padding) == 0
    losses = [Extras(), Extras()]
    for extras, of in zip(losses, (batch, padding), strict=True):
        objective.value_head.grad = None
        objective.loss(model, of, extras).backward()
        assert objective.value_head.grad is not None  # ranks exchange it
    assert list(losses[0].means) == list(losses[1].means)


def test_the_value_head_learns_what_to_expect(processor):
    """Values come near the returns, and answers that earn more than expected become likelier than the others."""
    objective, model = make_objective(ppo={"vf_coef": 1.0, "cliprange_value": 100.0}), make_model()
    torch.nn.init.zeros_(objective.value_head)
    batch = make_batch(make_documents(processor)[:1])
    with torch.no_grad():
        old = batch_logprobs(model, batch, never=objective.group.never)
    batch.values["old_logprobs"].flatten()[batch.trained] = old.float()
    appraise(objective, model, [batch])
    optimizer = torch.optim.Adam([*model.parameters(), objective.value_head], lr=3e-3)
    lost = []
    for _ in range(12):
        extras = Extras()
        optimizer.zero_grad()
        objective.loss(model, batch, extras).backward()
        optimizer.step()
        lost.append(float(extras.means["value_loss"][0]))
    assert lost[-1] < 0.5 * lost[0]
    change = find_branches(batch).mean(batch_logprobs(model, batch, never=objective.group.never).detach() - old)
    assert change[0] > change[1]  # of the rewards 1 and 0


def test_values_shape_hidden_states_too(processor):
    """Policy and values share the model: where no advantage is left, what is expected still changes it."""
    objective, model = make_objective(), make_model()
    batch = make_batch(make_documents(processor))
    appraise(objective, model, [batch])
    batch.values["weights"].zero_()
    objective.loss(model, batch, Extras()).backward()
    assert model.vision.patch_embedding.weight.grad.any() and objective.value_head.grad.any()


def test_the_held_out_loss_is_that_of_the_records_answers(processor):
    objective, model = make_objective(loss_type="grpo"), VLM(TINY).eval()
    batch = make_batch([make_sample(processor, 0, ("what?", "red"))])
    assert objective.count(batch) == len(batch.trained)
    assert torch.equal(objective.loss(model, batch, Extras()), NextToken().loss(model, batch, Extras()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 1.5}, "ppo.gamma = 1.5 must be between 0 and 1"),
        ({"lam": -0.1}, "ppo.lam = -0.1 must be between 0 and 1"),
        ({"vf_coef": -1.0}, "ppo.vf_coef = -1.0 must be at least 0"),
        ({"cliprange_value": 0.0}, "ppo.cliprange_value = 0.0 must be positive"),
    ],
)
def test_what_a_config_cannot_mean_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(model=TINY, ppo=PPOConfig(**settings)).validate()


@pytest.mark.parametrize("objective", ["group", "ppo", "online_preference"])
def test_one_answer_to_a_question_is_enough_for_ppo_alone(objective):
    config = dataclasses.replace(TrainConfig(), objective=objective, group=GroupConfig(num_generations=1))
    if objective == "ppo":
        assert config.validate()
        return
    with pytest.raises(ValueError, match="group.num_generations = 1 must be at least 2: objective = " + objective):
        config.validate()
