"""Losses of groups against TRL's and finite differences; answers that share a prompt against copies written out."""

import collections
import dataclasses
import types

import pytest
import torch

from nanovlm.config import GroupConfig, TrainConfig
from nanovlm.data.types import IGNORE
from nanovlm.hub.model_folder import save_model
from nanovlm.model.vlm import VLM, Extras
from nanovlm.objectives.group import ADVANTAGES, LEVELS, LOSS_TYPES, Group, group_losses
from nanovlm.objectives.logprobs import Branches, batch_logprobs, find_branches
from nanovlm.objectives.next_token import NextToken
from nanovlm.objectives.own import OwnAnswer, find_questions, make_document
from tests.conftest import TINY, make_batch
from tests.conftest import make_document as make_sample

LENGTHS = [3, 5, 1, 4]  # of the answers to two questions
MOST = 8  # tokens of an answer


def make_numbers(dtype=torch.float64):
    """Log-probabilities, those of the sampling and of the reference, [N] each, and advantages of answers."""
    torch.manual_seed(0)
    new = -2 * torch.rand(sum(LENGTHS), dtype=dtype)
    old, reference = (new + 0.5 * torch.randn_like(new) for _ in range(2))
    return new, old, reference, torch.tensor([1.0, -1.0, 0.3, -0.6], dtype=dtype)


def make_branches():
    lengths = torch.tensor(LENGTHS)
    return Branches(torch.arange(4).repeat_interleave(lengths), torch.tensor([0, 0, 1, 1]), lengths)


def our_loss(new, config):
    """The mean over units, as a step computes it."""
    _, old, reference, advantages = make_numbers()
    branches, units = make_branches(), {"dapo": sum(LENGTHS)}.get(config.loss_type, len(LENGTHS))
    losses, clipped = group_losses(new, old, advantages[branches.index], branches, config, reference)
    return LOSS_TYPES[config.loss_type].sum(branches, losses, config) / units, clipped


def spread(x):
    """[N] -> [4, longest], as TRL has it, zeros after the end of an answer."""
    return torch.nn.utils.rnn.pad_sequence(x.split(LENGTHS), batch_first=True)


def stand_in(logprobs, **settings):
    """What a trainer of TRL is, for its loss: settings, and log-probabilities for those that its model would give."""
    reduce = types.SimpleNamespace(reduce=lambda x, **_: x, gather=lambda x: x, num_processes=1)
    return types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **options: (logprobs, torch.zeros_like(logprobs), None),
        accelerator=reduce,
        _metrics={"train": collections.defaultdict(list)},
        model=types.SimpleNamespace(training=True),
        aux_loss_enabled=False,
        **settings,
    )


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("epsilon_high", [0.2, 0.5])
@pytest.mark.parametrize(
    ("theirs", "ours", "level"),
    [
        ("grpo", "grpo", "token"),
        ("dapo", "dapo", "token"),
        ("bnpo", "dapo", "token"),
        ("dr_grpo", "dr_grpo", "token"),
        ("grpo", "grpo", "sequence"),
    ],
)
def test_losses_and_gradients_are_those_of_trl(theirs, ours, level, epsilon_high, beta):
    trl = pytest.importorskip("trl.trainer.grpo_trainer")
    config = GroupConfig(
        loss_type=ours,
        importance_sampling_level=level,
        epsilon_high=epsilon_high,
        beta=beta,
        max_completion_length=MOST,
    )
    new, old, reference, advantages = make_numbers()
    new.requires_grad_()
    mask = spread(torch.ones_like(new))
    settings = dict(
        loss_type=theirs,
        importance_sampling_level=level,
        epsilon_low=0.2,
        epsilon_high=epsilon_high,
        beta=beta,
        max_completion_length=MOST,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        args=types.SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
    )
    inputs = {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(4, 1, dtype=torch.int64),
        "completion_ids": torch.zeros(mask.shape, dtype=torch.int64),
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": spread(old),
        "ref_per_token_logps": spread(reference),
        "num_items_in_batch": mask.sum(),
    }
    trainer = stand_in(spread(new), **settings)
    expected = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    [expected_grad] = torch.autograd.grad(expected, new)
    found, clipped = our_loss(new, config)
    [grad] = torch.autograd.grad(found, new)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-9)
    assert 0 < clipped.sum() < len(clipped)
    [share] = trainer._metrics["train"]["clip_ratio/region_mean"]
    per_sequence = make_branches().mean(clipped.double()).mean()
    assert float(per_sequence if level == "sequence" else clipped.double().mean()) == pytest.approx(share)


def test_the_loss_of_rloo_is_that_of_trl():
    trl = pytest.importorskip("trl.trainer.rloo_trainer")
    config = GroupConfig(loss_type="grpo", importance_sampling_level="product", epsilon=0.3)
    new, old, _, advantages = make_numbers()
    new.requires_grad_()
    mask = spread(torch.ones_like(new))
    inputs = {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(4, 1, dtype=torch.int64),
        "completion_ids": torch.zeros(mask.shape, dtype=torch.int64),
        "completion_mask": mask,
        "advantages": advantages,
        "old_logps": spread(old).sum(1),
    }
    expected = trl.RLOOTrainer._compute_loss(stand_in(spread(new), epsilon_low=0.3, epsilon_high=0.2), None, inputs)
    found, clipped = our_loss(new, config)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(x, new)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    assert 0 < clipped.sum() < len(clipped)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradients_are_those_of_finite_differences(level, loss_type):
    config = GroupConfig(loss_type=loss_type, importance_sampling_level=level, beta=0.2)
    new = make_numbers()[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: our_loss(x, config)[0], (new,))


def test_advantages():
    """By the formulas; each question's sum to 0, and equal rewards teach nothing."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    first = rewards[0]
    expected = {
        "mean": first - 1,
        "group": (first - 1) / (first.var().sqrt() + 1e-4),
        "batch": (first - 1) / (rewards.var().sqrt() + 1e-4),
        "leave_one_out": torch.stack([first[i] - (first.sum() - first[i]) / 3 for i in range(4)]),
    }
    assert expected.keys() == ADVANTAGES.keys()
    for name, compare in ADVANTAGES.items():
        found = compare(rewards)
        torch.testing.assert_close(found[0], expected[name])
        assert not found[1].any() and found[0].any()


# --- answers that share a prompt -----------------------------------------------------------------------------------

ANSWERS = [[30, 31, 32, 2], [40, 41], [50, 2], [60, 61, 62]]


def make_objective(**settings):
    return Group(TrainConfig(model=TINY, objective="group", group=GroupConfig(**settings)), None, torch.device("cpu"))


def make_questions(processor):
    sample = make_sample(processor, 3, ("what is it?", "red"), ("how many?", "two"), independent=True)
    return list(find_questions(make_batch([sample]), processor))


def make_answers(number=0):
    torch.manual_seed(number)
    return [OwnAnswer(ids, (-6 + torch.rand(len(ids))).tolist()) for ids in ANSWERS]


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "dapo"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "temperature": 0.7},
        {"loss_type": "dr_grpo"},
    ],
    ids=str,
)
def test_a_group_equals_its_answers_written_out(processor, settings):
    """In the loss, every gradient and the count, to rounding in fp64, images included."""
    objective, advantages = make_objective(epsilon=0.9, epsilon_high=100.0, **settings), [1.0, -0.5, 0.25, -0.75]
    torch.manual_seed(0)
    model = VLM(TINY).double().train()
    shared, apart = [], []
    for number, question in enumerate(make_questions(processor)):
        answers = make_answers(number)
        shared.append(make_document(question, answers, weights=advantages))
        apart += [
            make_document(question, [answer], weights=[weight])
            for answer, weight in zip(answers, advantages, strict=True)
        ]
    found = []
    for documents, rows in ((shared, 1), (apart, 3)):
        batch, extras = make_batch(documents, row_length=200, rows=rows), Extras()
        model.zero_grad()
        objective.loss(model, batch, extras).backward()
        loss = objective.loss(model, batch, Extras())
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found.append((loss.detach(), gradients, objective.count(batch), extras.means))
    (loss, gradients, count, means), (loss_apart, gradients_apart, count_apart, means_apart) = found
    assert count == count_apart and loss.abs() > 1e-2
    torch.testing.assert_close(loss, loss_apart, rtol=1e-6, atol=1e-7)  # values are fp32
    rounding = 1e-8 * sum(gradient.square().sum() for gradient in gradients.values()).sqrt()
    for name, gradient in gradients.items():
        scale = gradients_apart[name].norm()
        assert (gradient - gradients_apart[name]).norm() <= 1e-6 * scale + rounding, name
    assert gradients["vision.patch_embedding.weight"].any()
    for name, (total, number) in means.items():
        torch.testing.assert_close(total / number, means_apart[name][0] / means_apart[name][1], msg=name)


def test_an_answer_changes_no_other_by_a_bit(model, processor):
    """On every attention backend; the one before and those after it."""
    question, answers = make_questions(processor)[0], make_answers()
    before = make_batch([make_document(question, answers)])
    answers[1] = OwnAnswer([44, 45], [-1.0, -1.0])
    after = make_batch([make_document(question, answers)])
    with torch.no_grad():
        pairs = zip(*(batch_logprobs(model, batch).split([4, 2, 2, 3]) for batch in (before, after)), strict=True)
    assert [torch.equal(x, y) for x, y in pairs] == [True, False, True, True]


def test_the_loss_falls_along_its_gradient_and_rewarded_answers_become_likelier(processor):
    """Of the first step, whose ratios are all 1: more of the answers with positive advantage, less of the others."""
    objective, question = make_objective(), make_questions(processor)[0]
    torch.manual_seed(0)
    model = VLM(TINY).train()
    batch = make_batch([make_document(question, make_answers(), weights=[1.0, -1.0, 1.0, -1.0])])
    with torch.no_grad():
        old = batch_logprobs(model, batch, never=objective.never)
    batch.values["old_logprobs"].flatten()[batch.trained] = old
    extras = Extras()
    loss = objective.loss(model, batch, extras)
    branches = find_branches(batch)
    weights = torch.tensor([1.0, -1.0, 1.0, -1.0])
    torch.testing.assert_close(loss.detach(), -(weights * branches.lengths).sum(), rtol=1e-5, atol=1e-5)
    assert float(extras.means["sampler_gap"][0]) < 1e-5 and not extras.means["clip_fraction"][0]
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-3 * parameter.grad
        change = branches.sum(batch_logprobs(model, batch, never=objective.never) - old)
    assert ((change > 0) == (weights > 0)).all()


def test_answers_cut_short_can_be_left_out(processor):
    question, answers = make_questions(processor)[0], make_answers()
    for answer, text in zip(answers, ("red", "red", "blue", "green"), strict=True):
        answer.text, answer.has_ended = text, answer.ids[-1] == 2
    groups = [(question, answers), (question, [dataclasses.replace(answer, has_ended=False) for answer in answers])]
    whole = make_objective().documents(groups, Extras())
    kept = make_objective(mask_truncated_completions=True).documents(groups, Extras())
    assert [document.branch_ids.max() for document in whole] == [4, 4]
    assert kept[0].branch_ids.max() == 2 and kept[1] is None
    # Advantages are those among all answers.
    is_trained = kept[0].labels != IGNORE
    expected = whole[0].values["weights"][torch.isin(whole[0].branch_ids, torch.tensor([1, 3]))]
    assert torch.equal(kept[0].values["weights"][is_trained], expected)


def test_the_reference_is_a_frozen_model(processor, tmp_path):
    """Its log-probabilities, without what is never sampled, are those of the loss; the divergence is told."""
    torch.manual_seed(0)
    reference, model = VLM(TINY).eval(), VLM(TINY).train()
    save_model(tmp_path / "model", reference, processor)
    group = GroupConfig(beta=0.5, reference=str(tmp_path / "model"))
    objective = Group(TrainConfig(model=TINY, objective="group", group=group), processor, torch.device("cpu"))
    batch = make_batch([make_document(make_questions(processor)[0], make_answers(), weights=[1.0, -1.0, 1.0, -1.0])])
    extras, branches = Extras(), find_branches(batch)
    with torch.no_grad():
        objective.prepare(model, [batch], extras)
    objective.reference = pytest.fail  # it is asked once for all the steps on a set of answers
    found = objective.loss(model, batch, extras)
    new, theirs = (batch_logprobs(m, batch, never=objective.never).detach() for m in (model, reference))
    without, _ = group_losses(new, batch.value("old_logprobs"), batch.value("weights"), branches, group)
    divergence = ((theirs - new).exp() - (theirs - new) - 1).sum()
    torch.testing.assert_close(found.detach(), without.sum() + 0.5 * divergence, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(extras.means["kl"][0], divergence, rtol=1e-5, atol=1e-5)
    assert divergence > 1 and model.training


def test_the_held_out_loss_is_that_of_the_records_answers(processor):
    objective, model = make_objective(loss_type="grpo"), VLM(TINY).eval()
    batch = make_batch([make_sample(processor, 0, ("what?", "red"))])
    assert objective.count(batch) == len(batch.trained)
    assert torch.equal(objective.loss(model, batch, Extras()), NextToken().loss(model, batch, Extras()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "ppo"}, "group.loss_type = 'ppo' is unknown; there are dapo, grpo, dr_grpo"),
        ({"advantages": "best"}, "group.advantages = 'best' is unknown"),
        ({"importance_sampling_level": "word"}, "group.importance_sampling_level = 'word' is unknown"),
        ({"num_generations": 0}, "group.num_generations = 0 must be at least 1"),
        ({"temperature": 0.0}, "group.temperature = 0.0 must be positive"),
        ({"beta": 0.1, "temperature": 0.5}, "group.beta = 0.1 compares with a reference at temperature 1"),
        ({"epsilon": 1.5}, "group.epsilon = 1.5 must be below 1"),
    ],
)
def test_what_a_config_cannot_mean_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        GroupConfig(**settings).validate()
        make_objective(**settings)
