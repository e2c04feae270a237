"""The evaluation counts what it says it counts: scores, controls, majority, dropped scenes."""

import dataclasses
import io

import pytest
import torch
from PIL import Image

import eval.run
from eval.metrics import accuracy_by_kind, exact_match
from eval.routing import draw_routing, measure_routing
from eval.run import draw_contact_sheet, evaluate, format_table
from eval.tasks import Question, SceneTask, TrainingScan
from nanovlm.config import MoEConfig
from nanovlm.data.scenes import Scenes
from nanovlm.data.types import Sample
from nanovlm.model.vlm import VLM
from tests.conftest import TINY


@pytest.mark.parametrize(
    ("said", "truth", "expected"),
    [("red", "red", True), (" red\n", "red", True), ("Red", "red", False), ("red.", "red", False), ("", "red", False)],
)
def test_exact_match(said, truth, expected):
    assert exact_match(said, truth) is expected


def test_accuracy_by_kind():
    questions = [Question(0, "a", "?", "1"), Question(0, "a", "?", "2"), Question(1, "b", "?", "3")]
    assert accuracy_by_kind(questions, ["1", "1", "3"]) == {"a": 0.5, "b": 1.0}


class Oracle:
    """Stands for a model: knows the answer when it is shown the question's own image."""

    def __init__(self, task):
        self.truth = {(task.images[q.scene].tobytes(), q.text): q.truth for q in task.questions}

    def answer(self, model, processor, images, texts, title=None):
        return [self.truth.get((image.tobytes(), text), "?") for image, text in zip(images, texts, strict=True)]


def test_scores_and_controls(monkeypatch):
    task = SceneTask("test", 40)
    monkeypatch.setattr(eval.run, "answer", Oracle(task).answer)
    result = evaluate(None, None, {"test": task}, TrainingScan(Scenes("train"), range(300)))["test"]
    assert result["mean"] == result["caption_exact"] == 1.0
    assert result["blank_mean"] == 0.0
    assert result["shuffled_mean"] < 0.1  # another scene may be asked the very same question
    assert 0.05 < result["majority_mean"] < 0.5
    assert result["dropped"] == 0 and sum(kind["n"] for kind in result["kinds"].values()) > 150
    assert "MEAN            100.0     0.0" in format_table({"test": result})


def test_scenes_of_the_training_set_are_dropped(monkeypatch):
    task = SceneTask("test", 10)
    monkeypatch.setattr(eval.run, "answer", Oracle(task).answer)
    training = TrainingScan(Scenes("train"), range(5))
    training.digests |= TrainingScan(Scenes("test"), range(3)).digests
    result = evaluate(None, None, {"test": task}, training)["test"]
    assert result["dropped"] == 3
    assert {question.scene for question in task.questions} == set(range(3, 10))


def test_majority_is_of_the_question_else_of_its_kind():
    training = TrainingScan(Scenes("train"), range(200))
    asked = Question(0, "existence", "is there a red circle?", "")
    counts = training.by_text[asked.text]
    assert training.guess(asked) == max(counts, key=counts.get)
    assert training.guess(Question(0, "existence", "is there a red star?", "")) in ("yes", "no")


def test_contact_sheet_shows_question_answer_and_truth(monkeypatch):
    task = SceneTask("test", 12)
    monkeypatch.setattr(eval.run, "answer", lambda m, p, images, texts, title=None: ["green"] * len(texts))
    png, lines = draw_contact_sheet(None, None, task)
    assert Image.open(io.BytesIO(png)).width == 4 * 268 + 12
    assert len(lines) == 12 and all(" green (truth: " in line for line in lines)
    assert any(line.startswith("WRONG") for line in lines)


@pytest.fixture
def moe_model():
    torch.manual_seed(0)
    moe = MoEConfig(num_experts=4, num_experts_per_tok=2, intermediate_size=16)
    return VLM(dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, moe=moe))).eval()


def test_the_picture_of_routing_shows_shares_of_a_row(monkeypatch):
    import matplotlib.pyplot as plt

    figures, close = [], plt.close
    monkeypatch.setattr(plt, "close", figures.append)
    loads = {"image tokens": torch.tensor([[3.0, 1.0], [1.0, 1.0]]), "color": torch.tensor([[1.0, 3.0], [2.0, 0.0]])}
    draw_routing(loads)
    shown = [[text.get_text() for text in axis.texts] for axis in figures[0].axes]
    close(figures[0])
    assert shown == [["50", "50", "75", "25"], ["75", "25", "25", "75"], ["50", "50", "100", "0"]]


def test_routing_counts_every_token_of_every_question_once(moe_model, processor):
    task = SceneTask("test", 4)
    loads = measure_routing(moe_model, processor, task, batch_rows=3)
    assert set(loads) == {"image tokens", *(question.kind for question in task.questions)}
    assert loads["image tokens"].sum(1).tolist() == [2 * len(task.questions) * TINY.num_image_tokens] * 2
    documents = [
        processor.document(
            Sample(
                [task.images[question.scene]],
                [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]},
                    {"role": "assistant", "content": question.truth},
                ],
            )
        )
        for question in task.questions
    ]
    assert sum(loads.values()).sum(1).tolist() == [2 * sum(map(len, documents))] * 2
    image = Image.open(io.BytesIO(draw_routing(loads)))
    assert image.width > 300 and image.height > 300
    with pytest.raises(ValueError, match="the model has no mixture of experts"):
        measure_routing(VLM(TINY), processor, task)
