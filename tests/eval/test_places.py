"""Metrics of boxes and points, and the tasks of boxes and of clips with their controls."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

from nanovlm.data.boxes import write_box
from nanovlm.eval import run
from nanovlm.eval.controls import still_images
from nanovlm.eval.metrics import METRICS, box_f1, box_hit, box_iou, point_hit
from nanovlm.eval.questions import ask
from nanovlm.eval.scores import format_table, summarise
from nanovlm.eval.sheet import describe
from nanovlm.eval.tasks import TRAINED_ON, open_records, open_task, read_questions

WHOLE, LEFT, TOP = "[0, 0, 1, 1]", "[0.00, 0.00, 0.50, 1.00]", "[0, 0, 1, 0.5]"


@pytest.mark.parametrize(
    ("answer", "references", "iou", "hit", "f1"),
    [
        (LEFT, [LEFT], 1.0, 1, 1),
        ("It is at <loc0000><loc0000><loc1023><loc0512>.", [LEFT], 1.0, 1, 1),
        (WHOLE, [LEFT], 0.5, 1, 1),  # 0.5 itself counts
        (TOP, [LEFT], 1 / 3, 0, 0),
        (f"{LEFT} {TOP}", [LEFT], 0.5, 1, 2 / 3),  # one too many
        (f"{TOP} {LEFT}", [LEFT], 0.5, 0, 2 / 3),  # the first counts
        (TOP, [f"{LEFT}, {TOP}"], 0.5, 0, 2 / 3),
        (TOP, [LEFT, TOP], 1.0, 1, 1),  # the best reference
        ("at the left", [LEFT], 0.0, 0, 0),
        ("[0.3, 0.2]", [LEFT], 0.0, 0, 0),
        (LEFT, ["at the left"], 0.0, 0, 0),
    ],
)
def test_scores_of_boxes(answer, references, iou, hit, f1):
    figures = [metric(answer, references) for metric in (box_iou, box_hit, box_f1)]
    assert figures == pytest.approx([iou, hit, f1], abs=0.001)


def test_scores_of_points():
    assert point_hit("[0.3, 0.9]", ["[0.25, 0.5]", LEFT]) == 1
    assert point_hit("[0.6, 0.9]", ["[0.6, 0.9]", LEFT]) == 0
    assert point_hit(f"{LEFT} (0.1, 0.1)", [LEFT]) == 1 and point_hit(LEFT, [LEFT]) == 0


def test_records_are_scored_by_boxes(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    line = '{{"image": "a.png", "question": "where?", "answer": "{}"}}\n'
    (tmp_path / "a.jsonl").write_text(line.format(LEFT) * 2)
    task = open_records(str(tmp_path / "a.jsonl"), 9, metrics=("box_iou", "box_hit"))
    questions = read_questions(task)
    result, _ = summarise(task, questions, {"accuracy": [LEFT, TOP]})
    assert result["mean"] == pytest.approx(2 / 3) and result["figure"] == "box_iou"
    (tmp_path / "b.jsonl").write_text(line.format("left"))
    with pytest.raises(ValueError, match="box_hit needs a reference with a box: 'where\\?' has"):
        read_questions(open_records(str(tmp_path / "b.jsonl"), 9, metrics=("box_hit",)))
    assert {"box_iou", "box_hit", "box_f1", "point_hit"} <= set(METRICS)


def test_the_task_of_boxes_takes_every_form_of_the_right_answer():
    task = open_task("scenes_boxes", 20)
    questions = read_questions(task)
    assert {question.kind for question in questions} == {"box", "point"}
    right = [question.truth for question in questions]
    result, _ = summarise(task, questions, {"accuracy": right})
    assert result["mean"] == 1 and result["box_iou"] == 1 and "box iou 100.0" in format_table({"scenes_boxes": result})
    nothing, _ = summarise(task, questions, {"accuracy": ["red"] * len(questions)})
    assert nothing["mean"] == nothing["box_iou"] == 0
    assert format_table({"scenes_boxes": nothing}).split()[1:3] == ["hit", "%"]
    from nanovlm.data.boxes import read_boxes

    boxes = [question for question in questions if question.kind == "box"]
    in_tokens = [write_box(read_boxes(question.truth)[0], "tokens") for question in boxes]
    assert summarise(task, boxes, {"accuracy": in_tokens})[0]["mean"] == 1


def test_clips_have_a_control_of_one_frame(monkeypatch, processor):
    """The middle frame in place of all, of the same question; other questions keep their pictures."""
    task = open_task("scenes_video", 6)
    questions = read_questions(task)
    assert all(len(question.images) == 7 for question in questions)
    for question, shown in zip(questions, still_images(questions), strict=True):
        assert shown == [question.images[3]] * 7
    plain = ask({"images": questions[0].images[:2], "question": "a", "answer": "b"}, 0)
    assert still_images(plain) == [plain[0].images]

    asked = []
    monkeypatch.setattr(run, "answer", lambda _m, _p, qs, images, *_: asked.extend(images) or ["left"] * len(qs))
    columns = run.collect(None, processor, questions, controls=True)
    assert list(columns) == ["accuracy", "blank", "shuffled", "still", "alone"]
    assert asked[3 * len(questions) : 4 * len(questions)] == still_images(questions)
    assert "still" not in run.collect(None, processor, plain, controls=True)
    result, _ = summarise(task, questions, columns)
    assert "still_mean" in result and "  still" in format_table({"scenes_video": result}).splitlines()[0]


def test_tasks_are_compared_with_what_they_are_trained_on(monkeypatch):
    monkeypatch.setattr("nanovlm.eval.controls.MOST_RECORDS", 3)
    config = run.AskConfig("none", tasks=tuple(TRAINED_ON))
    scans = run.scan_training(config, run.open_tasks(config))
    assert set(scans) == set(TRAINED_ON)
    kinds = {name: set(scan.by_kind) for name, scan in scans.items()}
    assert kinds["scenes_boxes"] == {"box", "point"} and "box" not in kinds["scenes"]
    assert kinds["scenes_video"] <= {"moves", "first", "times"}


def test_what_is_shown_is_judged_as_it_is_scored():
    """A box that hits is right though its words differ; an answer that is right in part shows how much."""
    task = open_task("scenes_boxes", 3)
    box = replace(read_questions(task)[0], kind="box", references=("[0.10, 0.10, 0.30, 0.30]",))
    assert describe(task, box, "[0.11, 0.10, 0.30, 0.30]").startswith("right  ")
    assert describe(task, box, "[0.31, 0.10, 0.50, 0.30]").startswith("WRONG  ")
    by_overlap = SimpleNamespace(main="box_iou", score=task.score)
    assert describe(by_overlap, box, "[0.10, 0.10, 0.30, 0.20]").startswith("  50%  ")
