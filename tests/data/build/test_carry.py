"""What is carried into JSON lines is all of a record, and reading it runs nothing."""

import io
import json
import os

import pytest
from PIL import Image

from nanovlm.data.build.balance import BalanceConfig
from nanovlm.data.build.balance import main as balance
from nanovlm.data.build.carry import as_line, carry
from nanovlm.data.build.records import Unusable, read
from nanovlm.data.records import check, is_pair, references, to_sample
from nanovlm.data.source import Ref
from nanovlm.data.sources import open_source

QUESTIONS = [{"user": "a?", "assistant": "b"}, {"user": "c?", "assistant": "d"}, {"user": "e?", "assistant": "f"}]
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def encoded(kind):
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(file, kind)
    return file.getvalue()


def carried(raw, kept=None):
    """Return a record as JSON lines have it after a way through a file."""
    line = json.loads(json.dumps(as_line(carry(0, raw), kept)))
    assert len(to_sample(line).images) == len(to_sample(raw).images)
    return line


@pytest.mark.parametrize("name", ["images", "image"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_of_independent_questions_those_that_are_kept_keep_their_picture_and_ratings(name, kind):
    picture = encoded(kind)
    raw = {name: [picture] if name == "images" else picture, "texts": QUESTIONS, "independent": True, "id": "x"}
    ratings = {"formatting_ratings": [1, 4, 5], "relevance_ratings": [5, 3, 2]}
    line = carried(raw | ratings, [0, 2])
    assert [line["formatting_ratings"], line["relevance_ratings"], line["id"]] == [[1, 5], [5, 2], "x"]
    wanted = [m for i in (0, 2) for m in check(raw)[1][2 * i : 2 * i + 2]]
    assert check(line)[1] == wanted and line["independent"]
    answers = [m["content"] for m in check(line, min_ratings={"formatting_ratings": 2})[1] if m["role"] == "assistant"]
    assert answers == ["f"]
    messages = [
        message
        for turn in QUESTIONS
        for message in ({"role": role, "content": turn[role]} for role in ("user", "assistant"))
    ]
    line = carried({name: raw[name], "messages": messages, "independent": True, "id": "x"}, [0, 2])
    assert check(line)[1:] == (wanted, True) and line["id"] == "x"


def test_pairs_and_references_are_carried_whatever_is_beside_them():
    part = {"type": "image", "image": encoded("PNG")}
    question = [{"role": "user", "content": [part, {"type": "text", "text": "what?"}]}]
    good, bad = ([{"role": "assistant", "content": text}] for text in ("good", "bad"))
    line = carried({"prompt": question, "chosen": good, "rejected": bad})
    assert is_pair(line) and to_sample(line).rejected == bad[0]
    line = carried({"images": [part["image"]], "question": "q?", "answers": ["x", "y"], "made": object()})
    assert references(line) == [("x", "y")]


def test_no_program_runs_for_a_picture_and_what_is_lost_is_named_and_counted(tmp_path, monkeypatch, capsys):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\nexit 1\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    (tmp_path / "evil.png").write_bytes(EPS)
    Image.new("RGB", (9, 9)).save(tmp_path / "good.png")
    lines = [
        {"images": [f"{name}.png"], "caption": "x", "category": "a"} for name in ("good", "evil", "missing", "good")
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    balance(BalanceConfig(str(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"))
    shown = capsys.readouterr().out
    assert "2 of 2 records" in shown and not (tmp_path / "ran").exists()
    assert "2 records of" in shown and "missing.png" in shown
    assert len(open_source(str(tmp_path / "out.jsonl"))) == 2  # pyright: ignore[reportArgumentType]


def test_a_video_is_refused_before_a_model_is_asked():
    class Clips:
        def read(self, _key):
            return {"video": b"\0\0\0\x18ftypmp42" + bytes(99), "question": "q?", "answer": "a"}

    found = read(Clips(), Ref(0, 0, 0, 0, "clips", "sample 0", None), {})
    assert isinstance(found, Unusable) and "has a video, which JSON lines do not hold" in str(found)
