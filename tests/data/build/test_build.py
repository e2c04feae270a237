"""A model's answers and its likeliest tokens become records, which a run reads; a kill changes no byte of them."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

import train
from nanovlm.config import DataConfig, DistillConfig, EvalConfig, SamplingConfig
from nanovlm.data.build import answer
from nanovlm.data.build import records as build
from nanovlm.data.build.__main__ import main as command
from nanovlm.data.build.answer import AnswerConfig
from nanovlm.data.build.answer import main as write_answers
from nanovlm.data.build.reference import ReferenceConfig
from nanovlm.data.build.reference import main as write_pairs
from nanovlm.data.build.top_k import TopKConfig
from nanovlm.data.build.top_k import main as write_top_k
from nanovlm.data.process import make_process
from nanovlm.data.records import to_sample
from nanovlm.data.sources import open_source
from nanovlm.data.types import IGNORE
from nanovlm.errors import UserError
from nanovlm.hub.model_folder import save_model
from nanovlm.hub.read import load
from nanovlm.model.vlm import VLM, Extras
from nanovlm.objectives import NextToken
from tests.conftest import TINY, make_batch, make_document, noise
from tests.data.build.killing import kill_before, run_until_killed
from tests.objectives.test_distill import make
from tests.test_train import SMALL, metrics

pytestmark = pytest.mark.usefixtures("one_thread")
TURNS = (("what?", "a red circle"), ("how many?", "two"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, processor):
    """The folder of a model that knows two answers by heart, with and without pictures, in turns too."""
    torch.manual_seed(0)
    model, objective = VLM(TINY), NextToken()
    kinds = [dict(images=0), dict(images=1), dict(images=2), dict(images=1, independent=True)]
    documents = [make_document(processor, 9, *TURNS, **kind) for kind in kinds]
    documents += [make_document(processor, 9, turn, images=i) for turn in TURNS for i in (0, 1)]
    batch = make_batch(documents, rows=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        (objective.loss(model, batch) / objective.count(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("teacher") / "model"
    save_model(folder, model, processor)
    return folder


@pytest.fixture
def source(tmp_path):
    """Ten records of all forms, whose own answers are wrong."""
    lines, wrong = [], [{"user": question, "assistant": "wrong"} for question, _answer in TURNS]
    for i in range(5):
        noise(9 + i).save(tmp_path / f"{i}.png")
        lines += [{"images": [f"{i}.png"], "texts": wrong}, {"texts": wrong}]
    lines[2]["independent"] = True
    lines[4] = {"image": "2.png", "question": TURNS[0][0], "answer": "wrong"}
    (tmp_path / "source.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "source.jsonl"


def answers(path):
    source = open_source(str(path))
    found = [to_sample(source.read(i)) for i in range(len(source))]
    return found, [[m["content"] for m in sample.messages if m["role"] == "assistant"] for sample in found]


def ask(teacher, source, out, **changes):
    options = {"sampling": SamplingConfig(max_new_tokens=16), "device": "cpu", "max_bad_fraction": 0.0}
    write_answers(AnswerConfig(str(teacher), str(source), out, **options | changes))


def test_answers_take_the_place_of_those_of_the_records(tmp_path, teacher, source):
    ask(teacher, source, tmp_path / "out.jsonl")
    asked, _wrong = answers(source)
    found, written = answers(tmp_path / "out.jsonl")
    both = [answer for _question, answer in TURNS]
    assert written == [both[:1] if i == 4 else both for i in range(10)]
    for before, after in zip(asked, found, strict=True):
        assert before.independent == after.independent and len(before.images) == len(after.images)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(before.images, after.images, strict=True))
        assert [m["content"] for m in before.messages if m["role"] == "user"] == [
            m["content"] for m in after.messages if m["role"] == "user"
        ]
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == set()
    with pytest.raises(ValueError, match=r"out.jsonl is there already"):
        ask(teacher, source, tmp_path / "out.jsonl")


def test_the_seed_decides_and_no_neighbour(tmp_path, teacher, source, monkeypatch):
    def draw(name, seed=3, **changes):
        sampling = SamplingConfig(max_new_tokens=40, temperature=1.5, seed=seed)
        ask(teacher, source, tmp_path / name, sampling=sampling, max_bad_fraction=1.0, **changes)
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

    first = draw("a.jsonl")
    monkeypatch.setattr(build, "CHUNK", 3)
    assert draw("b.jsonl", num_rows=2) == first and draw("c.jsonl", seed=4) != first
    assert draw("d.jsonl", num=4) == [line for line in first if line["record"] < 4]


def test_a_killed_command_goes_on_and_changes_no_byte(tmp_path, teacher, source, monkeypatch, capsys):
    monkeypatch.setattr(build, "CHUNK", 3)
    folder = shutil.copytree(teacher, tmp_path / "model")
    ask(folder, source, tmp_path / "whole.jsonl")
    out, part = tmp_path / "out.jsonl", tmp_path / ".out.jsonl.part" / "records.jsonl"

    def job(number):
        answer.answer = kill_before(answer.answer, number)
        ask(folder, source, out)

    for number in (2, 1):
        assert run_until_killed(lambda: job(number)) and not out.exists()  # noqa: B023
    written = part.read_bytes()
    assert 3 <= written.count(b"\n") < 10
    part.write_bytes(written + written[:50])  # half a line
    with pytest.raises(ValueError, match=r"was begun with other settings \(num_rows: 16 against 2\)"):
        ask(folder, source, out, num_rows=2)
    model, processor = load(folder)
    with torch.no_grad():
        model.decoder.norm.weight[0] += 1e-3
    save_model(folder, model, processor)  # as a run that is trained on
    with pytest.raises(
        UserError, match=r"was begun with other settings \(weights: '\w+' against '\w+'\): use the same"
    ):
        ask(folder, source, out)
    shutil.rmtree(folder)
    shutil.copytree(teacher, folder)
    ask(folder, source, out)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_what_is_cut_off_or_cannot_be_asked_is_left_out_and_counted(tmp_path, teacher, source, capsys, monkeypatch):
    with open(source, "a") as lines:
        lines.write(
            json.dumps({"text": "no question"}) + "\n" + json.dumps({"image": "none.png", "caption": "x"}) + "\n"
        )
    ask(teacher, source, tmp_path / "out.jsonl", max_bad_fraction=0.2)
    shown = capsys.readouterr().out
    assert "out.jsonl: 10 of 12 records" in shown and "it asks no question" in shown
    assert "none.png" in shown and len(answers(tmp_path / "out.jsonl")[1]) == 10
    monkeypatch.setattr(build, "CHUNK", 5)
    source.write_text((json.dumps({"text": "no question"}) + "\n") * 10 + source.read_text())
    for _ in range(2):  # and what is begun again is no more lenient
        with pytest.raises(ValueError, match=r"12 of 22 records are unusable, more than --max-bad-fraction"):
            ask(teacher, source, tmp_path / "half.jsonl", max_bad_fraction=0.5)
    monkeypatch.setattr(build, "JUDGED_AFTER", 5)
    with pytest.raises(ValueError, match=r"5 of 5 records are unusable, more than --max-bad-fraction"):
        ask(teacher, source, tmp_path / "none.jsonl", sampling=SamplingConfig(max_new_tokens=1))
    assert "it asks no question" in capsys.readouterr().out
    monkeypatch.setattr(build, "JUDGED_AFTER", 100)
    source.write_text("".join(source.read_text().splitlines(keepends=True)[10:12]))
    with pytest.raises(ValueError, match=r"2 of 2 records are unusable"):
        ask(teacher, source, tmp_path / "long.jsonl", sampling=SamplingConfig(max_new_tokens=1))
    assert "the answer to question 1 is left out: it is longer than sampling.max_new_tokens" in capsys.readouterr().out


# --- the likeliest tokens ------------------------------------------------------------------------------------


def test_the_likeliest_tokens_of_every_trained_place(tmp_path, teacher, source, processor):
    out = tmp_path / "top.jsonl"
    write_top_k(TopKConfig(str(teacher), str(source), out, k=TINY.decoder.vocab_size, device="cpu"))
    records = open_source(str(out))
    process = make_process(processor, DataConfig(), learns_from="teacher")
    documents = [process(records.read(i)) for i in range(len(records))]
    batch = make_batch(documents, rows=2)
    model, student = make(teacher, processor, "forward_kl=1").teacher, VLM(TINY)
    theirs = model.logits(batch)[batch.labels != IGNORE].log_softmax(-1)
    assert (batch.value("top_logprobs").diff() <= 0).all()
    stored = torch.zeros_like(theirs).scatter(-1, batch.value("top_ids").long(), batch.value("top_logprobs"))
    torch.testing.assert_close(stored, theirs, rtol=0, atol=1e-3)
    extras = Extras(), Extras()
    for objective, extra in zip(
        (make(teacher, processor, "forward_kl=1", model=TINY), make("", processor, "forward_kl=1", model=TINY)),
        extras,
        strict=True,
    ):
        objective.loss(student, batch, extra).backward()
    for name, (total, number) in extras[0].means.items():
        assert float(extras[1].means[name][0]) == pytest.approx(float(total), rel=1e-3), name
        assert extras[1].means[name][1] == number
    with pytest.raises(ValueError, match="the records do not have the likeliest tokens of a teacher"):
        make("", processor, "forward_kl=1").loss(student, dataclasses.replace(batch, values={}), Extras())
    with pytest.raises(ValueError, match="features needs the teacher itself"):
        make("", processor, "features=1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: None, "the record has no teacher with tokens, ids and logprobs"),
        (lambda t: {**t, "tokens": t["tokens"][1:]}, "is about 11 other tokens than the 12 that are trained"),
        (lambda t: {**t, "tokens": [*t["tokens"][1:], 7]}, "is about 12 other tokens than the 12 that are trained"),
        (lambda t: {**t, "ids": [[1], *t["ids"][1:]]}, "lists of unequal lengths"),
        (lambda t: {**t, "ids": t["ids"][1:]}, "must be as many for each token"),
        (lambda t: {**t, "ids": [[]] * 12, "logprobs": [[]] * 12}, "must be as many for each token, and at least one"),
        (lambda t: {**t, "logprobs": [[0.5] * 4] * 12}, "are not those of a distribution"),
        (lambda t: {**t, "logprobs": [[-0.1] * 4] * 12}, "are not those of a distribution"),
        (lambda t: {**t, "logprobs": [[float("nan")] * 4] * 12}, "are not those of a distribution"),
        (lambda t: {**t, "logprobs": [[float("-inf")] * 4] * 12}, "are not those of a distribution"),
        (lambda t: {**t, "ids": [[1, 2, 3, TINY.decoder.vocab_size]] * 12}, "is no token of the model, which has "),
        (lambda t: {**t, "ids": [[1, 2, 3, -1]] * 12}, "is no token of the model"),
        (lambda t: {**t, "ids": [[1, 2, 3, 1]] * 12}, "gives a token twice in one place"),
        (
            lambda t: {**t, "ids": [x[:2] for x in t["ids"]], "logprobs": [x[:2] for x in t["logprobs"]]},
            "gives 2 tokens a place, and that of others 4",
        ),
        (lambda t: {**t, "ids": "many"}, "or no numbers"),
    ],
)
def test_a_teacher_that_does_not_fit_is_one_sentence(tmp_path, teacher, source, processor, change, message):
    out = tmp_path / "top.jsonl"
    write_top_k(TopKConfig(str(teacher), str(source), out, k=4, num=1, device="cpu"))
    raw = json.loads(out.read_text())
    process = make_process(processor, DataConfig(), learns_from="teacher")
    assert process(raw).values["top_ids"].shape[1] == 4
    raw["teacher"] = change(raw["teacher"])
    with pytest.raises(ValueError, match=message):
        process(raw)


def test_a_run_learns_from_records_alone(tmp_path, teacher, source):
    out = tmp_path / "top.jsonl"
    command(["top-k", str(teacher), str(source), str(out), "--k", "8"])
    data = dataclasses.replace(SMALL.data, sources=(str(out),), lessons=(), num_workers=0)
    changes = dict(data=data, objective="distill", distill=DistillConfig(losses=("forward_kl=1", "next_token=0.1")))
    changes |= dict(eval=EvalConfig(), model=TINY, init=dataclasses.replace(SMALL.init, model=str(teacher)))
    changes["optim"] = dataclasses.replace(SMALL.optim, steps=3, warmup_steps=1)
    train.main(dataclasses.replace(SMALL, run_dir=str(tmp_path / "run"), **changes))
    seen = metrics(tmp_path / "run")
    assert seen[-1]["corrupt"] == 0 and 0 <= seen[0]["forward_kl"] < 1e-4 and seen[0]["agreement"] > 0.99


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": Path("out.txt")}, "out.txt must end in .jsonl: a line is a record"),
        ({"num": -1}, "--num -1 must be at least 0"),
        ({"max_bad_fraction": 1.5}, "--max-bad-fraction 1.5 must be between 0 and 1"),
    ],
)
def test_what_is_no_option_is_named_before_a_model_is_read(options, message):
    config = {"model": "nowhere", "source": "scenes", "out": Path("out.jsonl")} | options
    for write, kind in ((write_answers, AnswerConfig), (write_top_k, TopKConfig), (write_pairs, ReferenceConfig)):
        with pytest.raises(UserError, match=message):
            write(kind(**config))


def test_no_more_tokens_are_written_than_the_model_has(tmp_path, teacher, source):
    for k in (0, TINY.decoder.vocab_size + 1):
        with pytest.raises(UserError, match=f"--k {k} must be from 1 to the model's {TINY.decoder.vocab_size} tokens"):
            write_top_k(TopKConfig(str(teacher), str(source), tmp_path / "out.jsonl", k=k, device="cpu"))


def test_a_command_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="there is no command 'make'; there are recipe, answer, top-k, reference"):
        command(["make"])
