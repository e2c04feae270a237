"""Answers are sampled as they are trained, of the questions of records, the same again after a kill."""

import contextlib
import copy
import dataclasses

import pytest
import torch

from nanovlm.config import AdapterConfig, GroupConfig, OptimConfig, ParallelConfig, TrainConfig
from nanovlm.data.types import IGNORE
from nanovlm.infer.request import End
from nanovlm.infer.sampling import find_never
from nanovlm.model.adapters import adapt
from nanovlm.model.vlm import VLM, Extras
from nanovlm.objectives.group import Group
from nanovlm.objectives.logprobs import batch_logprobs, find_branches
from nanovlm.train.rollouts import Rollouts
from nanovlm.train.state import TrainState, find_batches, name_batches
from tests.conftest import TINY, make_batch, make_document
from tests.test_train import SMALL

QUESTIONS = [("what is it?", "red"), ("and where?", "at the top left"), ("how many?", "two")]


def make_batches(processor):
    """Two micro-batches, the second of two rows; one document has branches, one no image."""
    documents = [
        make_document(processor, 0, QUESTIONS[0]),
        make_document(processor, 10, *QUESTIONS, independent=True),
        make_document(processor, 20, *QUESTIONS[:2], images=2),
        make_document(processor, 30, QUESTIONS[2], images=0),
    ]
    return [make_batch(documents[:1]), make_batch(documents[1:], rows=2)]


def make_rollouts(processor, precision="fp32", model=None, step=0, micro_batches=2, **settings):
    """Rollouts of a random model over endless copies of the same two micro-batches."""
    group = GroupConfig(**{"num_generations": 3, "max_completion_length": 12, "rewards": ("length=1",)} | settings)
    config = TrainConfig(
        model=TINY,
        objective="group",
        group=group,
        optim=OptimConfig(micro_batches=micro_batches),
        data=dataclasses.replace(SMALL.data, row_length=64),
    )
    if model is None:
        torch.manual_seed(0)
        model = VLM(TINY).train()
    objective = Group(config, processor, torch.device("cpu"))
    loader = iter([make_batches(processor)[:micro_batches] for _ in range(9)])
    state = TrainState(model, model, {}, loader, 1, precision, objective, step=step)
    return Rollouts(state, processor, config)


def answers_of(batches):
    """The tokens of every answer, in order."""
    return [
        part.tolist()
        for batch in batches
        for part in batch.labels.flatten()[batch.trained].split(find_branches(batch).lengths.tolist())
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_trainer_has_the_log_probabilities_of_the_sampler(processor, temperature):
    """To rounding in fp32, for pictures, branches and answers that end; the tokens are what was sampled."""
    torch.manual_seed(0)
    model = VLM(TINY).train()
    with torch.no_grad():  # ends more often
        model.decoder.head_weight[TINY.eos_token_id] *= 6
    rollouts = make_rollouts(processor, model=model, temperature=temperature)
    batches = next(rollouts)
    assert [len(find_branches(batch).lengths) for batch in batches] == [3, 15] and model.training
    for batch in batches:
        extras = Extras()
        rollouts.objective.loss(model, batch, extras)
        gap, num = extras.means["sampler_gap"]
        assert num > 0 and float(gap) / num < 2e-6
    means = {name: float(total / number) for name, (total, number) in rollouts.state.sampled.means.items()}
    answers = answers_of(batches)
    ended = [answer[-1] == TINY.eos_token_id for answer in answers]
    assert 0 < sum(ended) < len(ended) and means["cut_short"] == pytest.approx(1 - sum(ended) / len(ended))
    assert means["answer_length"] == pytest.approx(sum(map(len, answers)) / len(answers))
    assert all(len(answer) == 12 or end for answer, end in zip(answers, ended, strict=True))


def test_adapters_answer_and_learn(processor):
    torch.manual_seed(0)
    model = adapt(VLM(TINY), AdapterConfig(rank=2)).train()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    rollouts, extras = make_rollouts(processor, model=model), Extras()
    rollouts.objective.loss(model, next(rollouts)[1], extras)
    gap, num = extras.means["sampler_gap"]
    assert float(gap) / num < 2e-6


def test_tokens_that_are_never_sampled_are_left_out_on_both_sides(processor):
    """Where the model would like best to say an image."""
    torch.manual_seed(0)
    model = VLM(TINY).train()
    rollouts = make_rollouts(processor, model=model)
    with torch.no_grad():
        for token in find_never(TINY):
            model.decoder.head_weight[token] *= 20
    [batch, _] = next(rollouts)
    with torch.no_grad():
        whole = batch_logprobs(model, batch)
        without = batch_logprobs(model, batch, never=tuple(find_never(TINY)))
    old = batch.value("old_logprobs")
    assert (without - old).abs().max() < 1e-5 and (whole - old).abs().max() > 0.1


def test_both_sides_compute_in_bf16_alike(processor):
    """A trainer that computes in another precision than the sampler is further away from it, and is told."""
    rollouts, gaps, divergences = make_rollouts(processor, precision="bf16"), [], []
    batches = next(rollouts)
    for is_same in (True, False):
        extras = Extras()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_same):
            for batch in batches:
                rollouts.objective.loss(rollouts.state.model, batch, extras)
        for found, name in ((gaps, "sampler_gap"), (divergences, "sampler_kl")):
            found.append(float(extras.means[name][0]) / extras.means[name][1])
    assert gaps[0] < gaps[1] / 5 and divergences[0] < divergences[1] / 5 and divergences[1] < 1e-2


@pytest.mark.parametrize("is_tied", [True, False])
def test_weights_are_rounded_once_for_all_tokens_of_bf16(processor, monkeypatch, is_tied):
    """To what autocast makes of them: nothing of the answers changes by a bit, and the run's own weights come back."""
    config = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, tie_word_embeddings=is_tied))
    torch.manual_seed(0)
    model = VLM(config).train()
    own, linear, cast = dict(model.named_parameters()), torch.nn.functional.linear, []

    def see(x, weight, bias=None):
        cast.append(weight.dtype)
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", see)
    found = next(make_rollouts(processor, "bf16", model))
    patches, num_others = 2, len(cast)  # the patch embedding's weight is a view of a convolution's
    assert cast.count(torch.float32) <= patches * 2 < num_others / 10
    after = dict(model.named_parameters())
    assert after.keys() == own.keys() and all(after[name] is x for name, x in own.items())
    assert model.decoder.joined_head is None
    monkeypatch.setattr("nanovlm.train.validate.round_weights", lambda model: contextlib.nullcontext())
    cast.clear()
    for ours, theirs in zip(found, next(make_rollouts(processor, "bf16", model)), strict=True):
        assert torch.equal(ours.labels, theirs.labels) and cast.count(torch.bfloat16) == 0
        assert torch.equal(ours.values["old_logprobs"], theirs.values["old_logprobs"])


def test_answers_follow_from_seed_step_and_place(processor):
    first, again = (answers_of(next(make_rollouts(processor))) for _ in range(2))
    later = answers_of(next(make_rollouts(processor, step=1)))
    assert first == again and len(set(map(str, first))) == len(first)
    assert not {str(answer) for answer in first} & {str(answer) for answer in later}
    # The same question in another micro-batch.
    twice = make_rollouts(processor)
    twice.state.loader = iter([make_batches(processor)[:1] * 2])
    one, other = (answers_of([batch]) for batch in next(twice))
    assert one == first[:3] and other != one
    # Beside others, one at a time, and where the loader has but the first micro-batch.
    for settings in ({"num_rows": 1}, {"micro_batches": 1}):
        alone = answers_of(next(make_rollouts(processor, **settings)))
        assert alone == first[: len(alone)]


def test_some_of_the_questions_can_be_asked(processor):
    rollouts = make_rollouts(processor, num_questions=2)
    chosen = [answers_of(next(rollouts)) for _ in range(4)]
    assert [len(answers) for answers in chosen] == [9] * 4  # of one question, and of two of five


def test_a_prompt_leaves_answers_as_much_room_as_the_model_has(processor):
    rollouts = make_rollouts(processor, max_completion_length=100)
    longest = max(len(batch.input_ids[0]) for batch in make_batches(processor)[:1])
    decoder = dataclasses.replace(TINY.decoder, max_position_embeddings=longest)
    model = dataclasses.replace(TINY, decoder=decoder)
    rollouts.config = dataclasses.replace(rollouts.config, model=model)
    rollouts.state.model.config = model
    [first, second] = next(rollouts)
    assert max(map(len, answers_of([first]))) == longest - int(first.position_ids[first.branch_ids > 0].min()) - 1
    assert first.position_ids.max() < longest and second is not None


def test_several_steps_learn_from_one_set_of_answers(processor):
    rollouts = make_rollouts(processor, num_iterations=3)
    seen = []
    for step in range(4):
        rollouts.state.step = step
        seen.append(next(rollouts))
        assert bool(rollouts.state.sampled.means) == (step % 3 == 0)
        assert len(rollouts.state.pending) == (0 if step == 2 else 2)  # what a checkpoint after the step keeps
    assert seen[0] is seen[1] is seen[2] and answers_of(seen[3]) != answers_of(seen[2])


def test_the_end_of_the_data_is_the_end_of_the_rollouts(processor):
    rollouts = make_rollouts(processor)
    rollouts.state.loader = iter([])
    assert next(rollouts) == [] and rollouts.state.sampled.means["reward"][1] == 0


def test_a_micro_batch_without_a_question_is_padding(processor):
    """As another rank may have some: then the step is taken, and nothing is learned from it here."""
    rollouts = make_rollouts(processor)
    batch = make_batches(processor)[0]
    nothing = dataclasses.replace(batch, labels=torch.full_like(batch.labels, IGNORE), trained=None)
    rollouts.state.loader = iter([[nothing]])
    [made] = next(rollouts)
    assert not len(made.trained) and rollouts.objective.count(made) == 0
    rollouts.objective.loss(rollouts.state.model, made, Extras()).backward()


def test_batches_are_named_by_micro_batch_and_found_again(processor, monkeypatch):
    """Whatever number of ranks wrote them."""
    batches = next(make_rollouts(processor)) + next(make_rollouts(processor, step=1))
    batches[1].grids = [(2, 3), (1, 4)]  # as of native pictures
    stored = {}
    for rank in (0, 1):
        monkeypatch.setattr("nanovlm.distributed.rank", lambda rank=rank: rank)
        monkeypatch.setattr("nanovlm.distributed.num_ranks", lambda: 2)
        stored |= name_batches(batches[rank::2])
        of_rank = copy.deepcopy(batches[rank::2])
    assert all(torch.equal(x.labels, y.labels) for x, y in zip(find_batches(stored), of_rank, strict=True))
    # Where the first rank has fewer, as its data ended, the other keeps its own.
    fewer = {name: x for name, x in stored.items() if not name.startswith("pending.2.")}
    assert all(torch.equal(x.labels, y.labels) for x, y in zip(find_batches(fewer), of_rank, strict=True))
    monkeypatch.undo()
    found = find_batches(stored)
    for theirs, ours in zip(found, batches, strict=True):
        assert theirs.values.keys() == ours.values.keys() == {"weights", "old_logprobs"}
        tensors = [{**vars(batch), **batch.values} for batch in (theirs, ours)]
        assert theirs.grids == ours.grids
        for name in tensors[0].keys() - {"values", "grids"}:
            first, second = tensors[0][name], tensors[1][name]
            assert torch.equal(first, second) if name != "span_ids" else first is second is None, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": dataclasses.replace(SMALL.data, train_on="all")}, "data.train_on = all must be answers"),
        ({"parallel": ParallelConfig(expert_ranks=2)}, "parallel.expert_ranks = 2 must be 1"),
        ({"parallel": ParallelConfig(strategy="fsdp")}, "parallel.strategy = fsdp must be ddp"),
    ],
)
def test_what_cannot_be_sampled_is_named(processor, monkeypatch, changes, message):
    config = dataclasses.replace(TrainConfig(model=TINY), **changes)
    monkeypatch.setattr("nanovlm.distributed.num_ranks", lambda: 2)
    with pytest.raises(ValueError, match=message):
        Rollouts(TrainState(VLM(TINY), None, {}, None, 1, "fp32"), processor, config)


def test_what_an_engine_says_is_told(processor, monkeypatch):
    ends = [(0, End(0, 0, "error", "logits are not finite"))]
    monkeypatch.setattr("nanovlm.train.rollouts.ask", lambda engine, requests: iter([ends]))
    with pytest.raises(ValueError, match="an answer could not be sampled: logits are not finite"):
        next(make_rollouts(processor))
