"""Question, answer -> reward. To add one, write a function and an entry of REWARDS."""

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from nanovlm.config import GroupConfig, pick, read_weights
from nanovlm.data.chat import Processor
from nanovlm.data.loader import collate
from nanovlm.data.packing import make_row
from nanovlm.errors import UserError
from nanovlm.hub.read import load
from nanovlm.infer.chat_client import ask_server
from nanovlm.model.vlm import VLM, Extras
from nanovlm.objectives.own import OwnAnswer, Question, make_document
from nanovlm.objectives.reference import check_fits, fingerprint
from nanovlm.objectives.reward import score_branches

Reward = Callable[[Question, str], float]
Groups = Sequence[tuple[Question, list[OwnAnswer]]]
ScoreGroups = Callable[[Groups], list[float]]
NUMBER = r"[-+]?\d*\.?\d+"
PROMPT = """A student answered a question about a picture. How good is the answer, compared with the correct answer?

Question: {question}
Correct: {reference}
Answer: {answer}

Reply with one number from 0 (wrong) to 10 (as good as the correct answer)."""


def exact_match(question: Question, answer: str) -> float:
    """1 where the answer is the record's; only white space around it is ignored."""
    return float(answer.strip() == question.reference.strip())


def contains(question: Question, answer: str) -> float:
    """1 where the record's answer is somewhere in the answer, in any case."""
    return float(question.reference.strip().lower() in answer.lower())


def length(question: Question, answer: str) -> float:
    """Characters of the shorter one of the answer and the record's over those of the longer one: 1 if equally long."""
    shorter, longer = sorted((len(answer.strip()), len(question.reference.strip())))
    return shorter / longer if longer else 1.0


def number(question: Question, answer: str) -> float:
    """1 where the last number of the answer equals the last one of the record's answer."""
    said, true = (re.findall(NUMBER, text.replace(",", "")) for text in (answer, question.reference))
    return float(bool(said and true) and float(said[-1]) == float(true[-1]))


def iou(question: Question, answer: str) -> float:
    """Intersection over union of two boxes x1 y1 x2 y2, the first four numbers of the answer and of the record's."""
    boxes = [[float(x) for x in re.findall(NUMBER, text)[:4]] for text in (answer, question.reference)]
    if any(len(box) < 4 for box in boxes):
        return 0.0
    (a_left, a_top, a_right, a_bottom), (b_left, b_top, b_right, b_bottom) = boxes
    width = min(a_right, b_right) - max(a_left, b_left)
    height = min(a_bottom, b_bottom) - max(a_top, b_top)
    areas = [max(0.0, right - left) * max(0.0, bottom - top) for left, top, right, bottom in boxes]
    common = max(0.0, width) * max(0.0, height)
    return common / (sum(areas) - common) if common else 0.0


def match_format(pattern: re.Pattern, question: Question, answer: str) -> float:
    """1 where all of the answer matches; a dot is any character, the end of a line too."""
    return float(pattern.fullmatch(answer.strip()) is not None)


def ask_judge(address: str, model: str, question: Question, answer: str) -> float:
    """A tenth of the first number in the judge's reply, at most 1; 0 where there is none."""
    prompt = PROMPT.format(question=question.text, reference=question.reference, answer=answer)
    found = re.search(r"\d*\.?\d+", ask_server(address, model, prompt))
    return min(1.0, float(found[0]) / 10) if found else 0.0


REWARDS: dict[str, Reward] = {
    "exact_match": exact_match,
    "contains": contains,
    "length": length,
    "number": number,
    "iou": iou,
}
# Rewards that have a field of group of their own, and what it holds.
OWN_FIELDS = {
    "format": "a regular expression",
    "judge": "the address of a server, http://host:port/v1",
    "reward_model": "a model with a score head",
}


def open_rewards(
    config: GroupConfig, processor: Processor, device: torch.device, state: dict[str, Tensor]
) -> list[tuple[str, float, ScoreGroups]]:
    """Return the name, the weight and the function of each reward; `state` receives a reward model's fingerprint.

    Raises UserError for what the config cannot mean.
    """
    weights = read_weights(config.rewards, "group.rewards", "length=0.1")
    if not weights:
        raise UserError("group.rewards is empty: name at least one, such as exact_match")
    for name, what in OWN_FIELDS.items():
        value = getattr(config, name)
        if name in weights and not value:
            raise UserError(f"group.rewards has {name}, which needs {what}: set group.{name}")
        if value and name not in weights:
            raise UserError(f"group.{name} = {value!r} rewards nothing: add {name} to group.rewards")
    for name in weights:
        pick(REWARDS | OWN_FIELDS, name, "group.rewards")
    table = {name: partial(score_each, function) for name, function in (REWARDS | open_own_fields(config)).items()}
    if config.reward_model:
        scorer = open_scorer(config.reward_model, processor, device)
        table["reward_model"], state["frozen.reward_model"] = (
            partial(score_with, scorer),
            fingerprint(scorer.state_dict()),
        )
    return [(name, weight, table[name]) for name, weight in weights.items()]


def open_own_fields(config: GroupConfig) -> dict[str, Reward]:
    """Return the rewards that have fields of their own."""
    try:
        pattern = re.compile(config.format, re.DOTALL)
    except re.error as error:
        raise UserError(f"group.format = {config.format!r} is no regular expression: {error}") from error
    if config.judge and not config.judge_model:
        raise UserError("group.judge needs group.judge_model, the name by which the server calls the model")
    return {"format": partial(match_format, pattern), "judge": partial(ask_judge, config.judge, config.judge_model)}


def open_scorer(name: str, processor: Processor, device: torch.device) -> VLM:
    """Read a reward model. Raises UserError if it has no score head, or reads other tokens or tiles."""
    model, theirs = load(name, device)
    check_fits(name, theirs, processor)
    if not model.config.has_score_head:
        raise UserError(f"group.reward_model = {name!r} has no score head: objective = reward trains one")
    return model.requires_grad_(False)


def score_each(function: Reward, groups: Groups) -> list[float]:
    """Return the reward of every answer by a plain function."""
    questions = [question for question, answers in groups for _ in answers]
    texts = [answer.text for _, answers in groups for answer in answers]
    with ThreadPoolExecutor(16) as threads:  # a judge is asked many things at once
        return list(threads.map(function, questions, texts))


def score_with(scorer: VLM, groups: Groups) -> list[float]:
    """Return the reward of every answer by a reward model, a group of answers at a time, as they share their prompt."""
    scores, device = [], scorer.decoder.embed_tokens.weight.device
    for question, answers in groups:
        # The last token of an answer is read too, as the score is what is made of it: so there is one more to predict.
        document = make_document(question, [OwnAnswer([*x.ids, 0], [0.0] * (len(x.ids) + 1)) for x in answers])
        batch = collate([make_row([document], len(document), scorer.config.pad_token_id)])
        scores += score_branches(scorer, batch.to(device)).tolist()
    return scores


def reward_all(rewards: Sequence[tuple[str, float, ScoreGroups]], groups: Groups, extras: Extras) -> Tensor:
    """Return the weighted sum of the rewards of G answers to Q questions, fp32[Q, G].

    `extras` receives the mean of each reward and of their sum, its standard deviation within groups, and the share of
    groups in which all are equal, which teach nothing.
    """
    num = sum(len(answers) for _, answers in groups)
    total = torch.zeros(num)
    for name, weight, score in rewards:
        values = torch.tensor(score(groups), dtype=torch.float32)
        if not values.isfinite().all():
            raise UserError(f"the reward {name} of an answer is not a finite number")
        extras.add(f"reward_{name}", values.sum(), num)
        total += weight * values
    total = total.view(len(groups), -1) if groups else torch.zeros(0, 2)
    extras.add("reward", total.sum(), num)
    extras.add("reward_std", deviations(total).sum(), len(groups))
    extras.add("equal_groups", (total == total[:, :1]).all(dim=1).sum(), len(groups))
    return total


def deviations(rewards: Tensor) -> Tensor:
    """Return the standard deviation of each group, [Q, G] -> [Q]; 0 where a group is one answer."""
    return rewards.std(1) if len(rewards) and rewards.shape[1] > 1 else torch.zeros(len(rewards))
