"""The evaluation counts what it says it counts: scores, controls, majority, dropped records."""

import dataclasses
import io
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import train
from nanovlm.config import EvalConfig, MoEConfig
from nanovlm.data.scenes import Scenes
from nanovlm.data.sources import open_source
from nanovlm.data.types import Sample
from nanovlm.eval import run
from nanovlm.eval.controls import TrainingScan, shuffled_images
from nanovlm.eval.metrics import exact_match
from nanovlm.eval.questions import Question, ask
from nanovlm.eval.routing import draw_routing, measure_routing
from nanovlm.eval.run import AskConfig, evaluate, format_table
from nanovlm.eval.scores import average
from nanovlm.eval.sheet import choose, describe, draw_sheet
from nanovlm.eval.tasks import open_task, read_questions
from nanovlm.hub.model_folder import save_model
from nanovlm.infer.answers import generate
from nanovlm.infer.asking import Answer
from nanovlm.infer.engine import Engine
from nanovlm.infer.request import End
from nanovlm.model.cache_codes import Codes
from nanovlm.model.vlm import VLM
from tests.conftest import TINY, make_raw
from tests.test_train import SMALL


@pytest.mark.parametrize(
    ("said", "truth", "expected"),
    [("red", "red", True), (" red\n", "red", True), ("Red", "red", False), ("red.", "red", False), ("", "red", False)],
)
def test_exact_match(said, truth, expected):
    assert exact_match(said, ("other", truth)) is expected


def question(record, kind="a", truth="1", images=(), text="?"):
    return Question(record, kind, list(images), [{"role": "user", "content": text}], (truth,))


def test_figures_are_averaged_by_kind():
    questions = [question(0, truth="1"), question(0, truth="2"), question(1, "b", "3")]
    assert average(open_task("scenes", 1), questions, ["1", "1", "3"]) == {"accuracy": {"a": 0.5, "b": 1.0}}
    captions = [question(0, "caption", "1"), question(1, "caption", "2")]
    assert average(open_task("scenes", 1), captions, ["1", "1"]) == {"caption_exact": {"caption": 0.5}}


def ask_an_oracle(task):
    """Return what stands for `answer`: it knows the answer when it is shown the question's own image."""
    truth = {(q.images[0].tobytes(), q.text): q.truth for q in task.questions()}

    def answer(model, processor, questions, images=None, title=None, cache_format="float"):
        images = images or [q.images for q in questions]
        pairs = zip(questions, images, strict=True)
        return [truth.get((shown[0].tobytes(), q.text), "?") if shown else "?" for q, shown in pairs]

    return answer


@pytest.mark.parametrize("name", ["scenes", "scenes:compositional"])  # test_places.py asks the others
def test_scores_and_controls(monkeypatch, name):
    task = open_task(name, 40)
    monkeypatch.setattr(run, "answer", ask_an_oracle(task))
    result = evaluate(
        None, None, task, list(task.questions()), TrainingScan(Scenes("train"), range(300)), controls=True
    )
    assert result["mean"] == result["caption_exact"] == 1.0
    assert result["blank_mean"] == result["alone_mean"] == 0.0
    assert result["intervals"]["mean"] == result["intervals"]["overall"] == [1.0, 1.0] and result["overall"] == 1.0
    assert result["shuffled_mean"] < 0.1  # another scene may be asked the very same question
    assert result["majority_mean"] < 0.5
    assert result["dropped"] == 0 and sum(kind["n"] for kind in result["kinds"].values()) > 150
    (line,) = [line for line in format_table({name: result}).splitlines() if line.startswith("  MEAN")]
    assert line.split()[:3] == ["MEAN", "100.0", "0.0"]
    alone = evaluate(None, None, task, list(task.questions()))
    assert alone["kinds"]["color"] == {"accuracy": 1.0, "n": result["kinds"]["color"]["n"]}


def test_answers_are_greedy_each_within_its_own_limit(monkeypatch, processor):
    """Each is that of its question alone, and prompts are made as rows become free: their pixels take memory."""
    torch.manual_seed(0)
    model, waiting = VLM(TINY).eval(), []
    questions = [
        dataclasses.replace(q, max_new_tokens=1 + i % 5) for i, q in enumerate(open_task("scenes", 3).questions())
    ]
    monkeypatch.setattr(run, "NUM_ROWS", 4)
    num_open, prompt = 0, processor.prompt

    def count(*args):
        nonlocal num_open
        num_open += 1
        waiting.append(num_open)
        return prompt(*args)

    def decode(ids):
        nonlocal num_open
        num_open -= 1
        return processor.tokenizer.decode(ids, skip_special_tokens=True)

    counting = SimpleNamespace(prompt=count, decode=decode)
    got = run.answer(model, counting, questions)
    assert max(waiting) == 4 and len(waiting) == len(questions) > 20
    for question, said in zip(questions, got, strict=True):
        (ids,) = generate(model, processor(question.messages, question.images), max_new_tokens=question.max_new_tokens)
        assert said == processor.decode(ids)
    assert len({*got}) > 3


def test_a_picture_is_encoded_once_for_a_task_and_its_controls(monkeypatch, processor):
    engines = []
    monkeypatch.setattr(run, "Engine", lambda *args, **options: engines.append(Engine(*args, **options)) or engines[0])
    questions = read_questions(open_task("scenes", 3))
    run.collect(VLM(TINY), processor, questions, controls=True)
    (engine,) = engines
    pictures = {image.tobytes() for q in questions for image in q.images}
    assert engine.features.num_encoded == len(pictures) + 1 == 4  # and one grey one


def test_answers_with_a_cache_in_few_bits(monkeypatch, processor, tmp_path):
    """The option reaches the engine, controls included, whose answers are those of such an engine."""
    engines, answers = [], {}
    monkeypatch.setattr(run, "Engine", lambda *args, **options: engines.append(Engine(*args, **options)) or engines[-1])
    monkeypatch.setattr(run, "scan_training", lambda *_: {})
    torch.manual_seed(0)
    save_model(tmp_path / "model", VLM(TINY), processor)
    for cache_format in ("float", "int4"):
        out = tmp_path / cache_format
        run.main(AskConfig(str(tmp_path / "model"), ("scenes",), limit=3, cache_format=cache_format, out=out))
        answers[cache_format] = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
        assert {type(layer) is Codes for layer in engines[-1].cache.keys} == {cache_format == "int4"}
    assert len(engines) == 2 and answers["float"] != answers["int4"]


def test_what_cannot_be_answered_is_named_and_no_other_answer_is_lost(monkeypatch, processor, capsys):
    asked = question(7, text="what is\nthis?")
    config = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, max_position_embeddings=52))
    model, short = VLM(config), question(8, text="what?")
    (alone,) = run.answer(model, processor, [short])
    assert alone and run.answer(model, processor, [short, asked, short]) == [alone, "", alone]
    note = capsys.readouterr().err
    assert note.count("\n") == 1 and note.startswith("note: the question 'what is\\nthis?' of record 7 is left without")
    assert f"it takes {len(processor.prompt(asked.messages, asked.images))} tokens and its answer up to 48" in note
    ends = [End(0, 0, "error", "there is not enough memory"), End(1, 0, "stop")]

    def answer_all(_engine, requests):
        return (Answer(i, 0, [7], ends[i]) for i, _ in enumerate(requests))

    monkeypatch.setattr(run, "answer_all", answer_all)
    assert run.answer(VLM(TINY), processor, [asked, short]) == ["", processor.decode([7])]
    assert "of record 7 is left without an answer: there is not enough memory" in capsys.readouterr().err


def test_records_of_the_training_set_are_dropped(monkeypatch):
    task = open_task("scenes", 10)
    monkeypatch.setattr(run, "answer", ask_an_oracle(task))
    training = TrainingScan(Scenes("train"), range(5))
    training.digests |= TrainingScan(Scenes("test"), range(3)).digests
    questions = read_questions(task)
    result = evaluate(None, None, task, questions, training)
    assert result["dropped"] == 3
    assert result["n"] == sum(q.record >= 3 for q in task.questions())
    training.digests |= TrainingScan(Scenes("test"), range(10)).digests
    nothing = evaluate(None, None, task, questions, training, controls=True)
    assert nothing == {"n": 0, "dropped": 10, "kinds": {}}
    assert "10 records left out because their images occur in training" in format_table({"scenes": nothing})


def test_training_records_are_scanned_as_they_are_trained(tmp_path):
    """By the same layout and columns; a text asks nothing and shows its pictures."""
    image = Scenes("train").read(0)["images"][0]
    (tmp_path / "a.png").write_bytes(image if isinstance(image, bytes) else b"")
    if not isinstance(image, bytes):
        image.save(tmp_path / "a.png")
    records = [{"img": "a.png", "q": "what?", "a": "a box"}, {"text": "see <image> here", "image": "a.png"}]
    for number, record in enumerate(records):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(record))
    sources = [open_source(str(tmp_path / f"{number}.jsonl")) for number in range(2)]
    scan = TrainingScan(sources[0], [0], fields={"image": ["img"], "question": ["q"], "answer": ["a"]})
    assert (scan.num_read, len(scan.digests), dict(scan.by_text)) == (1, 1, {"what?": {"a box": 1}})
    assert TrainingScan(sources[0], [0]).num_read == 0
    text = TrainingScan(sources[1], [0])
    assert (text.num_read, text.digests, dict(text.by_text)) == (1, scan.digests, {})


def test_kinds_are_those_of_the_turns_of_texts_alone():
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    record = {"messages": messages, "texts": [{"kind": "x"}] * 3, "kind": "y"}
    assert [q.kind for q in ask(record, 0, layout="messages")] == ["y"]
    turns = [{"user": "1?", "assistant": "1", "kind": "x"}, {"user": "2?", "assistant": "2", "formatting_ratings": 1}]
    assert [q.kind for q in ask({"conv": turns}, 0, fields={"texts": ["conv"]})] == ["x", "answer"]
    asked = ask({"texts": turns}, 0, min_ratings={"formatting_ratings": 3})
    assert [(q.kind, q.truth) for q in asked] == [("x", "1")]


def test_majority_is_of_the_question_else_of_its_kind():
    training = TrainingScan(Scenes("train"), range(200))
    asked = question(0, "existence", text="is there a red circle?")
    counts = training.by_text[asked.text]
    assert training.guess(asked) == max(counts, key=counts.get)
    assert training.guess(question(0, "existence", text="is there a red star?")) in ("yes", "no")


def test_shuffled_images_are_of_another_record_with_as_many():
    red, blue, green = (Image.new("RGB", (4, 4), color) for color in ("red", "blue", "green"))
    questions = [question(0, images=[red]), question(0, images=[red]), question(1, images=[blue, blue]), question(2),
                 question(3, images=[green])]  # fmt: skip
    assert shuffled_images(questions) == [[green], [green], [blue, blue], [], [red]]


def test_a_conversation_is_asked_turn_by_turn_and_independent_questions_alone():
    turns = [{"user": "where?", "assistant": " here "}, {"user": "why?", "assistant": "so", "kind": "reason"}]
    asked = ask({"texts": turns}, 7)
    assert [(q.record, q.kind, q.text, q.references) for q in asked] == [
        (7, "answer", "where?", ("here",)),
        (7, "reason", "why?", ("so",)),
    ]
    assert [len(q.messages) for q in asked] == [1, 3]
    asked = ask({"texts": turns, "independent": True, "image": Image.new("RGB", (4, 4))}, 7)
    assert [len(q.messages) for q in asked] == [1, 1] and all(len(q.images) == 1 for q in asked)


def test_records_of_ones_own_are_a_task(tmp_path, processor, capsys):
    lines = [{"texts": [{"user": f"what is {i}?", "assistant": str(i)}]} for i in range(5)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    name = str(tmp_path / "own.jsonl")
    assert [q.truth for q in open_task(name, 3).questions()] == ["0", "1", "2"]
    save_model(tmp_path / "model", VLM(TINY), processor)
    run.main(AskConfig(str(tmp_path / "model"), (name,), json=True))
    result = json.loads(capsys.readouterr().out)[name]
    assert (
        result["n"] == 5 and result["kinds"]["answer"]["n"] == 5 and not {"majority_mean", "blank_mean"} & result.keys()
    )
    with pytest.raises(ValueError, match=r"'scene' is no task; there are scenes, .* does not exist"):
        open_task("scene", 3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{damaged", r"the task \S+bad.jsonl cannot be asked: \S+bad.jsonl, sample 2: .*line 3"),
        ('{"image": "none.png", "texts": [{"user": "?", "assistant": "1"}]}', r"\S+bad.jsonl, sample 2: .*none.png"),
        ('{"images": []}', r"\S+bad.jsonl, sample 2: no layout has the keys of this record: images"),
    ],
)
def test_a_task_that_cannot_be_asked_is_refused_before_the_first_step(tmp_path, line, message):
    good = json.dumps({"texts": [{"user": "?", "assistant": "1"}]})
    (tmp_path / "bad.jsonl").write_text("\n".join([good, good, line]))
    judged = EvalConfig((str(tmp_path / "bad.jsonl"),))
    with pytest.raises(ValueError, match=message):
        train.main(dataclasses.replace(SMALL, run_dir=str(tmp_path / "run"), eval=judged))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_sheet_shows_question_answer_and_truth():
    task = open_task("scenes", 30)
    questions = choose(read_questions(task), num=12)
    assert [q.record for q in questions] == list(range(12)) and len({q.kind for q in questions}) > 5
    answers = ["green"] * len(questions)
    assert Image.open(io.BytesIO(draw_sheet(task, questions, answers))).width == 4 * 268 + 12
    lines = [describe(task, *each) for each in zip(questions, answers, strict=True)]
    assert len(lines) == 12 and all(" green (truth: " in line for line in lines)
    assert any(line.startswith("WRONG") for line in lines)
    escaped = describe(task, question(0, text="a\nb"), "\x1b[2J")
    assert escaped == r"WRONG  'a\nb' '\x1b[2J' (truth: 1)"
    wide = question(0, images=[Image.new("RGB", (600, 200), "red")])
    sheet = Image.open(io.BytesIO(draw_sheet(task, [wide], ["1"])))
    assert sheet.getpixel((20, 20)) == (255, 255, 255) and sheet.getpixel((140, 140)) == (255, 0, 0)  # not stretched


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
    draw_routing(loads, (1, 4))
    titles = [[axis.get_title().partition(":")[0] for axis in figure.axes] for figure in figures]
    assert titles == [["all tokens", "layer 0", "layer 1"], ["all tokens", "layer 1", "layer 4"]]
    for figure in figures:
        close(figure)
    assert shown == [["50", "50", "75", "25"], ["75", "25", "25", "75"], ["50", "50", "100", "0"]]


def test_routing_counts_every_token_of_every_question_once(moe_model, processor):
    task = open_task("scenes", 4)
    questions = list(task.questions())
    loads = measure_routing(moe_model, processor, questions, batch_rows=3)
    assert set(loads) == {"image tokens", *(q.kind for q in questions)}
    assert loads["image tokens"].sum(1).tolist() == [2 * len(questions) * TINY.num_image_tokens] * 2
    documents = [
        processor.document(Sample(q.images, [*q.messages, {"role": "assistant", "content": q.truth}]))
        for q in questions
    ]
    assert sum(loads.values()).sum(1).tolist() == [2 * sum(map(len, documents))] * 2
    image = Image.open(io.BytesIO(draw_routing(loads)))
    assert image.width > 300 and image.height > 300
    with pytest.raises(ValueError, match="the model has no mixture of experts"):
        measure_routing(VLM(TINY), processor, questions)


def test_kinds_are_kept_apart_and_are_escaped():
    kinds = [f"color of the {size} object on the left of the picture" for size in ("large", "small")]
    record = make_raw(0, ("a?", "1"), ("b?", "2"), ("c?", "3"))
    for turn, kind in zip(record["texts"], [*kinds, ["\x1b[2J"]], strict=True):
        turn["kind"] = kind
    assert [question.kind for question in ask(record, 0)] == [*kinds, "['\\x1b[2J']"]
    rows = {kind: {"accuracy": 1.0, "n": 1} for kind in kinds}
    table = format_table({"mine": {"kinds": rows, "n": 2, "dropped": 0}}).splitlines()
    assert len(table) == 3 and max(map(len, table)) < 70


def test_a_record_of_any_form_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"texts": [{"user": "a?", "assistant": "b", "kind": "k"}], "images": 3})
    )
    with pytest.raises(ValueError, match=r"cannot be asked: .*a\.jsonl"):
        read_questions(open_task(str(tmp_path / "a.jsonl"), 4))
