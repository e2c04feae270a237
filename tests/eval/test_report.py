"""The command on files of one's own: what it asks, refuses, prints and writes."""

import base64
import dataclasses
import html.parser
import io
import json
import re

import pytest
import torch
from PIL import Image

from nanovlm import load
from nanovlm.eval import run
from nanovlm.eval.metrics import METRICS
from nanovlm.eval.questions import Question
from nanovlm.eval.report import Answers, choose_samples, draw_page, thumbnail
from nanovlm.eval.run import AskConfig, answer, collect
from nanovlm.eval.tasks import open_records, read_questions
from nanovlm.hub.model_folder import save_model
from nanovlm.model.vlm import VLM
from tests.conftest import TINY, noise


@pytest.fixture
def folder(tmp_path, processor):
    """Two models, and records of one's own: questions with several answers, options and pictures."""
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_model(tmp_path / f"model{seed}", VLM(TINY), processor)
    lines = []
    for i in range(6):
        noise(i).save(tmp_path / f"{i}.png")
        lines.append({"image": f"{i}.png", "question": f"what <b>is</b> {i}?", "answers": [f"thing {i}", str(i)]})
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def config(folder, *metric, **options):
    return AskConfig(str(folder / "model0"), data=(str(folder / "own.jsonl"),), metric=metric, **options)


def test_a_file_of_ones_own_is_scored_by_metrics_against_all_references(folder, capsys, monkeypatch):
    said = [f"thing {i}" if i < 2 else "3" if i == 3 else "tning 4" if i == 4 else "?" for i in range(6)]
    monkeypatch.setattr(run, "answer", lambda model, processor, asked, *_, **__: [said[q.record] for q in asked])
    run.main(config(folder, "anls", "exact_match", "bleu", json=True))
    result = json.loads(capsys.readouterr().out)[str(folder / "own.jsonl")]
    assert result["figure"] == "anls" and result["mean"] == pytest.approx((3 + 6 / 7) / 6)
    assert result["exact_match"] == 0.5 and 0 < result["bleu_1"] < 1 and "majority_mean" not in result
    low, high = result["intervals"]["mean"]
    assert low < result["mean"] < high
    run.main(config(folder, "anls"))
    out = capsys.readouterr().out
    assert "anls %" in out and "no majority column, as --training does not say what the model was trained on" in out
    run.main(config(folder, "anls", training=(str(folder / "own.jsonl"),)))
    out = capsys.readouterr().out  # all pictures occur in training
    assert "6 records left out because their images occur in training" in out and "no majority" not in out


def test_the_figures_are_those_of_the_metric_on_the_models_own_answers(folder, capsys, processor):
    run.main(config(folder, "anls", "rouge_l", controls=False, out=folder / "out", json=True))
    result = json.loads(capsys.readouterr().out)[str(folder / "own.jsonl")]
    lines = [json.loads(line) for line in (folder / "out" / "answers.jsonl").read_text().splitlines()]
    assert [line["references"] for line in lines] == [[f"thing {i}", str(i)] for i in range(6)]
    for name in ("anls", "rouge_l"):
        expected = [METRICS[name](line["answer"].strip(), line["references"]) for line in lines]
        assert [line["scores"][name] for line in lines] == expected
        assert result["overall" if name == "anls" else name] == pytest.approx(sum(expected) / 6)
    stored = json.loads((folder / "out" / "scores.json").read_text())
    assert stored["tasks"][str(folder / "own.jsonl")] == result and stored["model"].endswith("model0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"nothing to ask: give --data FILE .* or --tasks with one or more of scenes, .*docvqa"),
        (
            {"tasks": ("docvqa",), "metric": ("anls",)},
            "--metric is for records of --data; docvqa have metrics of",
        ),
        (
            {"data": ("own.jsonl",), "metric": ("anl",)},
            r"'anl' is no metric; do you mean anls.*\? There are exact_mat",
        ),
        ({"data": ("own.jsonl",), "metric": ("letter",)}, r"letter needs letters as references: 'what <b>is</b> 0\?'"),
        ({"data": ("own.jsonl",), "metric": ("vqa_soft",)}, "vqa_soft needs at least four references"),
        ({"data": ("own.jsonl",), "metric": ("pope",)}, "pope needs yes or no as references"),
        ({"data": ("own.jsonl", "own.jsonl")}, "each task can be asked once"),
        ({"data": ("none.jsonl",)}, r"the source 'none.jsonl' does not exist"),
        ({"data": ("own.jsonl",), "likelihood": True}, "--likelihood needs questions with options, and there is none"),
        ({"data": ("own.jsonl",), "limit": 0}, "--limit 0 must be at least 1"),
        ({"data": ("own.jsonl",), "max_new_tokens": -1}, "--max-new-tokens -1 must be 0 or more"),
        ({"data": ("own.jsonl",), "fields": ("caption=text",)}, "'text', which data.fields names for caption"),
        ({"data": ("own.jsonl",), "compare": "none/such"}, "none/such"),
        (
            {"data": ("own.jsonl",), "max_new_tokens": 10**6},
            "answers of up to 1000000 tokens do not fit 8192 positions: lower --max-new-tokens",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_sentence(folder, monkeypatch, options, message):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=message):
        run.main(AskConfig("model0", **options))


def test_options_of_ones_own_are_read_by_letter_and_by_likelihood(folder, capsys, monkeypatch):
    lines = [{"question": "which?", "options": [f"x{j}" for j in range(10)], "answer": "J"}]
    (folder / "choice.jsonl").write_text(json.dumps(lines[0]))
    monkeypatch.setattr(run, "answer", lambda model, processor, questions, *_, **__: ["It is (J)."])
    own = AskConfig(str(folder / "model0"), data=(str(folder / "choice.jsonl"),), metric=("letter",))
    run.main(dataclasses.replace(own, likelihood=True, json=True))
    result = json.loads(capsys.readouterr().out)[str(folder / "choice.jsonl")]
    assert result["overall"] == 1  # the tenth letter is one of ten options
    assert {"likelihood_of_letter", "likelihood_of_text", "likelihood_of_text_per_token"} <= result.keys()
    model, processor = run.load(own.model)
    decoder = dataclasses.replace(model.config.decoder, prefix_attention="whole_prompt")
    model.config = dataclasses.replace(model.config, decoder=decoder)
    monkeypatch.setattr(run, "load", lambda *_: (model, processor))
    monkeypatch.setattr(run, "answer", None)  # nothing is asked
    with pytest.raises(ValueError, match=r"has no branches, which --likelihood and .* leave --likelihood out"):
        run.main(dataclasses.replace(own, likelihood=True))


class Page(html.parser.HTMLParser):
    """Collects tags and text of a page; fails on a script or a tag that text has brought."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.words, self.open = [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words += data


def test_the_page_shows_answers_and_their_pictures_and_no_text_becomes_a_tag(folder, monkeypatch, capsys):
    said = {0: "thing 0", 1: "<script>alert(1)</script>\x1b[2J\n\ud800"}
    monkeypatch.setattr(
        run, "answer", lambda model, processor, questions, *_, **__: [said.get(q.record, "?") for q in questions]
    )
    run.main(config(folder, "anls", out=folder / "out"))
    assert "look at" in capsys.readouterr().out
    page = Page(text := (folder / "out" / "report.html").read_text())
    assert {tag for tag, _ in page.tags} <= {
        "html", "meta", "title", "style", "body", "h1", "h2", "h3", "pre", "div", "figure", "img", "p", "b", "i",
    }  # fmt: skip
    assert len([1 for tag, _ in page.tags if tag == "b"]) == len([1 for tag, _ in page.tags if tag == "figure"]) == 6
    assert "<script>alert(1)</script>" in page.words and "what <b>is</b> 0?" in page.words and "\x1b" not in text
    pictures = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 6 and all(src.startswith("data:image/png;base64,") for src in pictures)
    assert "http" not in re.sub(r"base64,\S+", "", text)
    assert "Right" in page.words and "Wrong" in page.words and "anls %" in page.words
    assert json.loads((folder / "out" / "answers.jsonl").read_text().splitlines()[1])["answer"].startswith("<script>")


def question(number, **options):
    return Question(number, "a", [], [{"role": "user", "content": f"q{number}"}], ("x",), **options)


def test_samples_are_right_wrong_and_in_dispute():
    scores = [{"anls": float(i % 2), "other": float(i % 2) if i != 7 else 0.0} for i in range(40)]
    own = Answers("t", [question(i) for i in range(40)], {"accuracy": ["x"] * 40}, scores, {"figure": "anls"})
    (_, right), (_, wrong), (title, disputed) = choose_samples(own, {})
    assert len(right) == len(wrong) == 12 and all(n % 2 for n in right) and not any(n % 2 for n in wrong)
    assert right[-1] - right[0] > 30  # from all over
    assert (title, disputed) == ("The metrics differ", [7])
    theirs = {i: {"scores": {"anls": 1.0 if i in (2, 4) else scores[i]["anls"]}, "answer": "theirs"} for i in range(40)}
    assert choose_samples(own, theirs)[2] == ("The two models differ", [2, 4])
    own.result.update(n=40, dropped=0, kinds={})
    page = draw_page("m", [own], {"t": [{"number": i, "record": i, **x} for i, x in theirs.items()]}, "the other")
    assert page.count("the other: theirs") >= 2


def test_a_thumbnail_is_small():
    small = thumbnail(Image.new("RGB", (3000, 1000), "red"))
    assert small.startswith("data:image/jpeg;base64,") and len(small) < 10_000
    tiny = base64.b64decode(thumbnail(Image.new("RGB", (48, 24), "red")).partition(",")[2])
    assert Image.open(io.BytesIO(tiny)).size == (240, 120)  # large enough to see


def test_two_models_are_compared_on_the_same_questions(folder, capsys, monkeypatch):
    def answers(model, processor, questions, *_, **__):
        assert model.decoder.norm.is_fused  # prepared
        weight = model.decoder.embed_tokens.weight[5, 0].item()
        return [f"thing {q.record}" if weight == first or q.record == 0 else "?" for q in questions]

    first = load(folder / "model0", "cpu")[0].decoder.embed_tokens.weight[5, 0].item()
    monkeypatch.setattr(run, "answer", answers)
    run.main(config(folder, "anls", compare=str(folder / "model1"), out=folder / "out"))
    out = capsys.readouterr().out
    assert "only the first is right in 5, only the second in 0; McNemar's exact p = 0.0625" in out
    assert "The two models differ" in (folder / "out" / "report.html").read_text()
    stored = config(folder, "anls", compare=str(folder / "out"), json=True, controls=False)
    run.main(dataclasses.replace(stored, model=str(folder / "model1")))
    compared = json.loads(capsys.readouterr().out)[str(folder / "own.jsonl")]["compared"]
    assert (compared["only_this_right"], compared["only_other_right"], compared["n"]) == (0, 5, 6)


def test_answers_are_cut_at_the_limit_of_their_question(processor):
    torch.manual_seed(0)
    model = VLM(TINY).eval()
    asked = [question(i, max_new_tokens=limit) for i, limit in enumerate((9, 2, 5))]
    got = answer(model, processor, asked)
    for one, said in zip(asked, got, strict=True):
        assert said == answer(model, processor, [one])[0]
    assert len(processor.tokenizer.encode(got[0]).ids) > 2


def test_controls_ask_the_same_questions_about_other_images_and_without_any(folder, monkeypatch):
    seen = []

    def spy(model, processor, questions, images=None, title=None, cache_format="float"):
        for question, shown in zip(questions, images or [q.images for q in questions], strict=True):
            kinds = [part["type"] for part in question.messages[-1]["content"]]
            seen.append(([x.tobytes() for x in shown], kinds))
        return [str(i) for i in range(len(questions))]

    monkeypatch.setattr(run, "answer", spy)
    questions = read_questions(open_records(str(folder / "own.jsonl"), 3))
    columns = collect(None, None, questions, controls=True)
    names = ("accuracy", "blank", "shuffled", "alone")
    assert columns == {name: [str(3 * i + j) for j in range(3)] for i, name in enumerate(names)}
    own, blank, shuffled, alone = ([shown for shown, _ in seen[3 * i : 3 * i + 3]] for i in range(4))
    assert shuffled == [own[1], own[2], own[0]] and len({x for (x,) in blank}) == 1 and alone == [[], [], []]
    assert [kinds for _, kinds in seen] == [["image", "text"]] * 9 + [["text"]] * 3
