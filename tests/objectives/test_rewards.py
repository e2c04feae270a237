"""Rewards of answers, their sum, and what a user can get wrong about them."""

import dataclasses
import http.server
import json
import threading
from functools import partial

import pytest
import torch

from nanovlm.config import GroupConfig
from nanovlm.data.types import IGNORE, Document
from nanovlm.hub.model_folder import save_model
from nanovlm.model.vlm import VLM, Extras
from nanovlm.objectives.own import OwnAnswer, Question, find_questions
from nanovlm.objectives.reference import fingerprint
from nanovlm.objectives.reward import score_branches
from nanovlm.objectives.rewards import REWARDS, open_rewards, reward_all, score_each
from tests.conftest import TINY, make_batch, make_document

NOTHING = torch.zeros(0)
# Reward, reference, answer, value.
CASES = [
    ("exact_match", "red", " red\n", 1),
    ("exact_match", "red", "Red", 0),
    ("exact_match", "red", "red.", 0),
    ("contains", "Red", "it is red.", 1),
    ("contains", "red", "blue", 0),
    ("length", "abcd", "ab", 0.5),
    ("length", "ab", "wxyz", 0.5),
    ("length", "", "", 1),
    ("length", "ab", "", 0),
    ("number", "so 1,200", "it is 12 or 1200.0", 1),
    ("number", "-3", "3", 0),
    ("number", "3", "three", 0),
    ("iou", "[0, 0, 2, 2]", "0 0 2 2", 1),
    ("iou", "[0, 0, 2, 2]", "the box [1, 0, 3, 2]", 1 / 3),
    ("iou", "0.5 0.5 1 1", "0 0 .5 .5", 0),
    ("iou", "0 0 2 2", "3 3 1 1", 0),  # right of its left
    ("iou", "0 0 2 2", "0 0 2", 0),
]


def ask(reference="red"):
    return Question(Document(NOTHING, NOTHING, NOTHING, NOTHING), "what is it?", reference)


def open_named(config):
    """The rewards of a config that need no model."""
    return open_rewards(config, None, torch.device("cpu"), {})


@pytest.mark.parametrize(("name", "reference", "answer", "value"), CASES)
def test_a_reward_is_what_it_says(name, reference, answer, value):
    assert REWARDS[name](ask(reference), answer) == pytest.approx(value)


def test_every_reward_has_a_case_and_is_at_most_1():
    assert {name for name, *_ in CASES} == set(REWARDS)
    for function in REWARDS.values():
        for text in ("", "1 2 3 4", "red", "nan inf 1e400 -1e400", "9" * 400):
            assert 0 <= function(ask("1 2 3 4"), text) <= 1


def test_a_format_must_match_all_of_an_answer():
    [(_name, weight, function)] = open_named(GroupConfig(rewards=("format=2",), format=r"<think>.*</think>\w+"))
    texts = ["<think>red\nor blue</think>red", "<think></think>red!"]
    assert weight == 2 and function([(ask(), [OwnAnswer(text=text) for text in texts])]) == [1, 0]


def test_rewards_are_summed_with_their_weights_and_told():
    config, extras = GroupConfig(rewards=("exact_match=2", "length=-1")), Extras()
    texts = [["red", "blue"], ["ab", "ab"]]
    groups = [(ask(), [OwnAnswer(text=text) for text in own]) for own in texts]
    found = reward_all(open_named(config), groups, extras)
    torch.testing.assert_close(found, torch.tensor([[2 - 1, -0.75], [-2 / 3, -2 / 3]]))
    means = {name: float(total / number) for name, (total, number) in extras.means.items()}
    assert means["reward_exact_match"] == 0.25 and means["equal_groups"] == 0.5
    assert means["reward"] == pytest.approx(found.mean()) and means["reward_std"] == pytest.approx(found[0].std() / 2)


def test_a_rank_without_questions_tells_the_same_metrics():
    some, none = Extras(), Extras()
    reward_all(open_named(GroupConfig()), [(ask(), [OwnAnswer(text="red")] * 2)], some)
    assert not len(reward_all(open_named(GroupConfig()), [], none))
    assert list(some.means) == list(none.means) and not any(number for _, number in none.means.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rewards": ("exact=1",)},
            r"group.rewards = 'exact' is unknown; there are exact_match, .*, reward_model$",
        ),
        (
            {"rewards": ("exact_match=one",)},
            r"group.rewards has 'exact_match=one', which must be name or name=weight",
        ),
        ({"rewards": ("exact_match=nan",)}, r"'exact_match=nan', which must be name or name=weight"),
        ({"rewards": ("exact_match=1", "length", "exact_match")}, r"group\.rewards names exact_match twice"),
        ({"rewards": ()}, "group.rewards is empty"),
        ({"rewards": ("format=1",)}, "group.rewards has format, which needs a regular expression: set group.format"),
        (
            {"rewards": ("reward_model",)},
            "group.rewards has reward_model, which needs a model with a score head: set group.reward_model",
        ),
        ({"format": "a"}, "group.format = 'a' rewards nothing: add format to group.rewards"),
        ({"rewards": ("format=1",), "format": "("}, r"group.format = '\(' is no regular expression"),
        ({"rewards": ("judge=1",), "judge": "http://x/v1"}, "group.judge needs group.judge_model"),
    ],
)
def test_what_a_config_cannot_mean_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        open_named(GroupConfig(**changes))


def test_a_reward_that_is_no_number_is_named():
    groups = [(ask(), [OwnAnswer(text="red")] * 2)]
    with pytest.raises(ValueError, match="the reward odd of an answer is not a finite number"):
        reward_all([("odd", 1.0, partial(score_each, lambda question, answer: float("nan")))], groups, Extras())


def test_a_judge_on_a_server_gives_a_reward():
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
            seen.append(prompt)
            said = "I say 7 of 10" if "Answer: red" in prompt else "nothing"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": said}}]}).encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/v1"
        rewards = open_named(GroupConfig(rewards=("judge=1",), judge=address, judge_model="big"))
        groups = [(ask("crimson"), [OwnAnswer(text="red"), OwnAnswer(text="blue")])]
        found = reward_all(rewards, groups, Extras())
        server.shutdown()
    torch.testing.assert_close(found, torch.tensor([[0.7, 0.0]]))
    assert all("what is it?" in prompt and "Correct: crimson" in prompt for prompt in seen) and len(seen) == 2


def test_a_reward_model_scores_answers_that_share_their_prompt(processor, tmp_path):
    """As it scores each conversation alone, at the token that ends it, or at the last one where it was cut short."""
    torch.manual_seed(0)
    scorer = VLM(dataclasses.replace(TINY, has_score_head=True)).eval()
    torch.nn.init.normal_(scorer.score.weight)
    save_model(tmp_path / "scorer", scorer, processor)
    samples = [make_document(processor, 3, ("what is it?", answer)) for answer in ("red", "a blue star", "no")]
    [question] = find_questions(make_batch(samples[:1]), processor)
    answers = [OwnAnswer(sample.labels[sample.labels != IGNORE].tolist()) for sample in samples]
    for answer in answers:
        answer.logprobs = [0.0] * len(answer.ids)
    config = GroupConfig(rewards=("reward_model=2",), reward_model=str(tmp_path / "scorer"))
    rewards = open_rewards(config, processor, torch.device("cpu"), state := {})
    assert torch.equal(state["frozen.reward_model"], fingerprint(scorer.state_dict()))
    found = reward_all(rewards, [(question, answers)], Extras())
    with torch.no_grad():
        expected = torch.cat([score_branches(scorer, make_batch([sample])) for sample in samples])
    torch.testing.assert_close(found, 2 * expected[None], rtol=1e-4, atol=1e-5)
    assert found.std() > 0.1


def test_a_model_without_a_score_head_is_no_reward_model(processor, tmp_path):
    save_model(tmp_path / "plain", VLM(TINY), processor)
    config = GroupConfig(rewards=("reward_model",), reward_model=str(tmp_path / "plain"))
    with pytest.raises(ValueError, match="has no score head: objective = reward trains one"):
        open_rewards(config, processor, torch.device("cpu"), {})
