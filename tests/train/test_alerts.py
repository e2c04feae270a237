"""A source that gets worse is named, also after a run was resumed; the others are not."""

import json

from nanovlm.train.alerts import Alerts

SEEN = [
    {"val_loss_a": 2.0, "val_loss_b": 1.0, "accuracy_held_out_b": 0.5, "val_loss": 1.5},
    {"val_loss_a": 1.5, "val_loss_b": 1.09, "accuracy_held_out_b": 0.46, "val_loss": 1.3},
    {"val_loss_a": 1.6, "val_loss_b": 1.2, "accuracy_held_out_b": 0.44, "val_loss": 9.0, "accuracy_held_out": 0.1},
    {"val_loss_a": None, "val_loss_b": 0.9, "accuracy_held_out_b": 0.6, "accuracies_held_out": {"answer": 0.1}},
    {"val_loss_a": 1.7, "val_loss_b": float("nan"), "accuracy_held_out_b": 0.1},
]
EXPECTED = [
    [],
    [],
    ["val_loss_b", "accuracy_held_out_b"],
    [],
    ["val_loss_a", "val_loss_b", "accuracy_held_out_b"],
]


def named(sentences):
    return [sentence.split(": ")[1].split()[0] for sentence in sentences]


def test_a_source_that_gets_worse_is_named(tmp_path):
    alerts = Alerts(tmp_path / "metrics.jsonl", 0.1)
    found = [alerts.find(10 * i, seen) for i, seen in enumerate(SEEN, start=1)]
    assert [named(sentences) for sentences in found] == EXPECTED
    assert found[2][0] == (
        "alert at step 30: val_loss_b is 1.2, 20% above its best, 1 at step 10: this source gets worse (eval.alert)"
    )
    assert "val_loss_b is nan, 0.9 at its best at step 40: the model's numbers overflow, so go back" in found[4][1]
    assert "accuracy_held_out_b is 0.1, 83% below its best, 0.6 at step 40" in found[4][2]


def test_a_resumed_run_knows_what_was_best(tmp_path):
    for at in range(len(SEEN)):
        lines = [{"step": 10 * i} | seen for i, seen in enumerate(SEEN[:at], start=1)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert named(Alerts(tmp_path / "metrics.jsonl", 0.1).find(10 * at + 10, SEEN[at])) == EXPECTED[at]


def test_a_loss_that_is_not_finite_is_named_at_once(tmp_path):
    bad = float("inf")
    for seen in ({"val_loss": bad}, {"val_loss_a": bad, "val_loss_b": 1.0, "val_loss": bad}):
        alerts = Alerts(tmp_path / "metrics.jsonl", 0.1)
        assert [named(alerts.find(step, seen)) for step in (10, 20)] == [[next(iter(seen))]] * 2
        assert not named(alerts.find(30, dict.fromkeys(seen, 1.0)))


def test_none_are_asked_for(tmp_path):
    alerts = Alerts(tmp_path / "metrics.jsonl", 0.0)
    assert not any(alerts.find(i, seen) for i, seen in enumerate(SEEN)) and not alerts.best
