"""Of the model's own answers the best and the worst become a pair, and preferences learn from it."""

import pytest
import torch

from nanovlm.config import GroupConfig, PreferenceConfig, TrainConfig
from nanovlm.hub.model_folder import save_model
from nanovlm.model.vlm import VLM, Extras
from nanovlm.objectives.next_token import NextToken
from nanovlm.objectives.online import OnlinePreference
from nanovlm.objectives.own import OwnAnswer, find_questions
from nanovlm.objectives.preference import Preference
from tests.conftest import TINY, make_batch, make_document


def make_objective(processor=None, **preference):
    """With exact match as the judge, and unless another is named a loss that needs no reference."""
    preference = PreferenceConfig(**{"losses": ("simpo",), "beta": 2.0} | preference)
    config = TrainConfig(model=TINY, objective="online_preference", preference=preference, group=GroupConfig())
    return tuple(make(config, processor, torch.device("cpu")) for make in (OnlinePreference, Preference))


def make_groups(processor):
    """Answers of which the third is the best, then answers that are equally bad."""
    [question] = find_questions(make_batch([make_document(processor, 0, ("what?", "red"))]), processor)
    ids = [[30, 31], [40, 41, 42], [50, 2]]
    answers = [OwnAnswer(own, [-1.0] * len(own), text) for own, text in zip(ids, ("a", "b", "red"), strict=True)]
    return [(question, answers), (question, answers[:2] * 2)]


def test_the_best_answer_is_the_first_branch_and_equal_ones_are_dropped(processor):
    groups = make_groups(processor)
    [pair], [nothing] = (make_objective()[0].documents([group], Extras()) for group in groups)
    assert nothing is None
    assert [pair.labels[pair.branch_ids == number].tolist() for number in (1, 2)] == [[50, 2], [30, 31]]


def test_pairs_are_learned_as_those_of_records(processor):
    online, offline = make_objective()
    [pair] = online.documents(make_groups(processor)[:1], Extras())
    torch.manual_seed(0)
    batch, model = make_batch([pair, pair]), VLM(TINY).train()
    assert online.count(batch) == offline.count(batch) == 2
    assert torch.equal(online.loss(model, batch, Extras()), offline.loss(model, batch, Extras()))


def test_the_reference_is_asked_once_for_all_steps_on_the_same_pairs(processor, tmp_path, monkeypatch):
    """And the loss is that of pairs of records, whose reference is asked in each step."""
    torch.manual_seed(0)
    save_model(tmp_path / "model", VLM(TINY), processor)
    settings = dict(losses=("dpo", "ipo"), beta=0.5, reference=str(tmp_path / "model"))
    online, offline = make_objective(processor, **settings)
    [pair] = online.documents(make_groups(processor)[:1], Extras())
    batch, model, (once, always) = make_batch([pair, pair]), VLM(TINY).train(), (Extras(), Extras())
    with torch.no_grad():
        online.prepare(model, [batch], Extras())
    expected = offline.loss(model, batch, always)
    monkeypatch.setattr("nanovlm.objectives.reference.batch_logprobs", lambda *args, **options: pytest.fail("asked"))
    for _step in range(2):
        assert torch.equal(online.loss(model, batch, once), expected)
    assert float(always.means["kl"][0]) > 0 and float(once.means["kl"][0]) == 2 * float(always.means["kl"][0])


def test_the_held_out_loss_is_that_of_the_records_answers(processor):
    online, model = make_objective()[0], VLM(TINY).eval()
    batch = make_batch([make_document(processor, 0, ("what?", "red"))])
    assert online.count(batch) == len(batch.trained)
    assert torch.equal(online.loss(model, batch, Extras()), NextToken().loss(model, batch, Extras()))


def test_records_know_no_reference_for_own_answers():
    with pytest.raises(ValueError, match=r"preference.reference = records must be a model"):
        make_objective(reference="records", losses=("dpo",))
