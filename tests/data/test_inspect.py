"""What is shown of a sample is what is trained, and what is summed up is what was read."""

import dataclasses
import io
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from nanovlm.command_line import parse_train
from nanovlm.config import TilingConfig
from nanovlm.data import inspect
from nanovlm.data.chat import Processor
from nanovlm.data.drawing import WIDTH, describe, draw_histogram, draw_rows, draw_tiles, histogram, render
from nanovlm.data.images import marker_tokens
from nanovlm.data.inspect import InspectConfig, main
from nanovlm.data.records import to_sample
from nanovlm.data.scenes import Scenes
from nanovlm.data.source import Ref
from nanovlm.data.sources import open_sources, sample_texts
from nanovlm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from nanovlm.data.types import IGNORE
from nanovlm.errors import UserError
from nanovlm.train import init
from tests.conftest import TINY, make_document, noise

TURNS = (("what color is it?\nsay", "red ünï 日本"), ("<|pad|> and?", "two\n\nlines"))
DOCUMENTS = [dict(), dict(independent=True), dict(images=0), dict(images=3)]


@pytest.fixture(scope="module")
def tiling_processor():
    config = dataclasses.replace(TINY, tiling=TilingConfig(max_tiles=6))
    tokenizer = train_tokenizer(sample_texts(Scenes("train"), 50), 512, marker_tokens(config))
    return Processor(tokenizer, CHAT_TEMPLATE, config)


@pytest.fixture
def folder(tmp_path):
    """Eight good records of several kinds, then one that is too long and three that are corrupt."""
    noise(0, 40).save(tmp_path / "a.png")
    lines = [{"texts": [{"user": f"{i}?", "assistant": "yes " * (i + 1)}]} for i in range(4)]
    lines += [{"images": ["a.png"] * i, "texts": [{"user": "what?", "assistant": "noise"}]} for i in (1, 1, 2, 3)]
    lines += [{"texts": [{"user": "?", "assistant": "abcd " * 1000}]}, [1], {"image": "b.png", "texts": []}, {}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


@pytest.fixture
def show(folder, capsys):
    """Run the command on a file of the folder; return what it printed and the picture."""

    def run(source="data.jsonl", **options):
        path = source if source == "scenes" else str(folder / source)
        main(InspectConfig(path, out=folder / "out.png", **{"row_length": 2048} | options))
        return capsys.readouterr().out, Image.open(folder / "out.png")

    return run


@pytest.mark.parametrize("options", DOCUMENTS)
@pytest.mark.parametrize("with_tokens", [False, True])
@pytest.mark.parametrize("in_color", [False, True])
def test_the_marked_text_is_what_is_trained(tiling_processor, options, with_tokens, in_color):
    document = make_document(tiling_processor, 0, *TURNS, **options)
    text = render(document, tiling_processor, with_tokens, in_color)
    if with_tokens:
        text = text.replace("│", "")
    marked = re.findall("\33\\[30;42m(.*?)\33\\[0m(\n?)" if in_color else "⟦(.*?)⟧()", text, re.DOTALL)
    shown = "".join(part + newline if part.endswith("↵") else part for part, newline in marked).replace("↵\n", "\n")
    labels = document.labels[document.labels != IGNORE].tolist()
    truth = tiling_processor.tokenizer.decode(labels, skip_special_tokens=False)
    assert truth == "red ünï 日本<end_of_utterance>two\n\nlines<end_of_utterance>"
    assert shown == truth


def test_the_whole_text_is_shown_and_images_are_short(tiling_processor):
    document = make_document(tiling_processor, 0, *TURNS, images=2)
    text = render(document, tiling_processor)
    per_tile = TINY.num_image_tokens
    assert f"<image>x{2 * per_tile}what color is it?↵\nsay<|assistant|>⟦red" in text
    bare = re.sub(r"<image>x(\d+)", lambda found: "<image>" * int(found[1]), text)
    bare = re.sub("[⟦⟧\n]", "", bare).replace("↵", "\n").replace(r"\<|pad|>", "<|pad|>")
    assert bare == tiling_processor.tokenizer.decode(document.input_ids.tolist(), skip_special_tokens=False)
    assert (
        describe(document)
        == f"{len(document)} tokens, {int((document.labels != IGNORE).sum())} trained tokens, 2 tiles"
    )


def test_branches_are_numbered_and_counted(processor):
    document = make_document(processor, 0, *TURNS, independent=True)
    text = render(document, processor)
    titles = re.findall(r"^--- (prefix|branch \d+): (\d+) tokens, (\d+) trained$", text, re.MULTILINE)
    assert [title[0] for title in titles] == ["prefix", "branch 1", "branch 2"]
    for number, (_name, tokens, trained) in enumerate(titles):
        here = document.branch_ids == number
        assert int(tokens) == here.sum() and int(trained) == (document.labels[here] != IGNORE).sum()
    assert describe(document).endswith("1 tile, 2 branches")
    assert "---" not in render(make_document(processor, 0, *TURNS), processor)


def test_every_token_has_its_boundary(processor):
    document = make_document(processor, 0, ("is it?", "no"), images=0)
    pieces = re.sub("[⟦⟧\n]", "", render(document, processor, with_tokens=True)).split("│")
    assert pieces == [processor.tokenizer.decode([i], skip_special_tokens=False) for i in document.input_ids.tolist()]
    halves = render(make_document(processor, 0, ("日本?", "\ufffd\ufffd"), images=0), processor, with_tokens=True)
    assert "日│本│?" in halves and "⟦\ufffd│\ufffd│<end_of_utterance>⟧" in halves


def test_text_cannot_steer_the_terminal(processor):
    text = render(make_document(processor, 0, ("\33[2J\r", "a\tb\x9b"), images=0), processor)
    assert "\\x1b[2J\\x0d" in text and "a\\x09b\\x9b" in text and not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)


@pytest.mark.parametrize("most_bins", [1, 5, 14])
@pytest.mark.parametrize("high", [1, 9, 10, 130, 4097])
def test_histogram_counts(high, most_bins):
    lengths = (torch.rand(300, generator=torch.Generator().manual_seed(high)) * high).int().tolist()
    lengths += [high, min(lengths)]
    bins = histogram(lengths, max(most_bins, 2))
    assert len(bins) <= max(most_bins, 2)
    assert all(after[0] == before[1] + 1 for before, after in itertools.pairwise(bins))
    assert [sum(first <= length <= last for length in lengths) for first, last, _n in bins] == [n for _f, _l, n in bins]
    assert sum(n for _first, _last, n in bins) == len(lengths)
    assert draw_histogram(lengths).width == WIDTH


def test_the_tiles_lie_as_in_the_image(tiling_processor):
    image = Image.new("RGB", (32, 48), "red")
    image.paste((0, 0, 255), (0, 16, 16, 32))  # row 2, column 1 of 3 x 2
    raw = {"images": [image], "texts": [{"user": "?", "assistant": "no"}]}
    picture = draw_tiles(tiling_processor.document(to_sample(raw)), tiling_processor)
    side, top, left = 160, 40 + 15, 20
    centre = [
        (left + c * (side + 8) + side // 2, top + r * (side + 22) + side // 2) for r in range(3) for c in range(2)
    ]
    assert [picture.getpixel(at) == (0, 0, 255) for at in centre] == [False, False, True, False, False, False]
    assert picture.getpixel((left + 2 * (side + 8) + side // 2, top + 2 * (side + 22) + 4)) == (255, 0, 0)  # whole
    many = tiling_processor.document(to_sample(raw | {"images": [noise(i) for i in range(70)]}))
    assert draw_tiles(many, tiling_processor).width == WIDTH


def test_rows_are_drawn_to_scale():
    picture = draw_rows([[0, 1], [2]], [480, 240, 960], 960)
    colors = [[picture.getpixel((x, 40 + 16 * row + 6)) for x in (21, 498, 502, 700, 742, 978)] for row in (0, 1)]
    assert colors[0][0] == colors[0][1] != colors[0][2] == colors[0][3] != colors[0][4] == colors[0][5] == (204,) * 3
    assert len(set(colors[1])) == 1 and colors[1][0] != (204,) * 3


def test_the_summary_counts_everything(show):
    text, picture = show(row_length=300)
    assert "12 samples of" in text and "8 documents, 4 skipped" in text
    assert "  3 corrupt\n    sample 9: " in text and "  1 too long\n    sample 8: " in text
    assert "b.png" in text
    bars = re.findall(r"^ +\d+(?: to \d+)? +█+ (\d+)$", text, re.MULTILINE)
    assert sum(map(int, bars)) == 8
    for strategy in inspect.STRATEGIES:
        assert re.search(rf"^    {strategy} +\d+ +[\d.]+ +\d+ +\d+$", text, re.MULTILINE)
    assert picture.format == "PNG" and picture.width == WIDTH


def test_options(show, folder):
    assert "data.jsonl, sample 6: " in show(index=6)[0]
    assert "3 tiles\n" in show(index=7)[0]
    assert "│" in show(tokens=True)[0] and "│" not in show()[0]
    assert "3 samples of" in show(num=3)[0]
    assert show(num=4, seed=1)[0] == show(num=4, seed=1)[0] != show(num=4, seed=2)[0]
    assert "rows of 400 tokens and at most 3 tiles" in show(row_length=400, max_tiles=3)[0]
    assert "3 tiles, more than data.max_tiles = 2" in show(max_tiles=2)[0]
    noise(0, 90).save(folder / "a.png")
    assert "1 tile\n" in show(index=4, preset="small")[0]
    assert "1 tile\n" in show(index=4)[0]
    text, _picture = show("scenes", num=5)
    assert "scenes, sample 0: " in text and "branch 1" in text and "5 samples of scenes: 5 documents" in text


def test_a_model_folder_is_read_without_its_weights(show, folder, tiling_processor):
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(dataclasses.asdict(tiling_processor.config)))
    tiling_processor.save(folder / "model")
    text, _picture = show(index=4, model=folder / "model", row_length=0)
    assert "rows of 2048 tokens" in text
    data = {"sources": ["data.jsonl"], "row_length": 300, "max_tiles": 7}
    (folder / "config.json").write_text(json.dumps({"data": data}))
    assert "rows of 300 tokens and at most 7 tiles" in show(model=folder / "model", row_length=0)[0]
    (folder / "config.json").unlink()
    text, _picture = show(index=4, model=folder / "model")
    assert "5 tiles\n" in text  # of at most 6 there are 2 x 2 and the whole
    assert "<row_1_col_1><image>x4<row_1_col_2>" in text
    with pytest.raises(ValueError, match="is the folder of a run; its model is"):
        show(model=folder)
    for name, problem in (("tokenizer.json", "has no tokenizer.json"), ("config.json", "is no model folder")):
        (folder / "model" / name).unlink()
        with pytest.raises(ValueError, match=problem):
            show(model=folder / "model")
    (folder / "model" / "config.json").write_text('{"vission": {}}')
    with pytest.raises(ValueError, match=r"config\.json: unknown field 'vission'"):
        show(model=folder / "model")


@pytest.mark.parametrize("preset", ["scenes", "small"])
def test_samples_are_shown_as_a_run_of_the_preset_gets_them(show, folder, monkeypatch, preset):
    noise(0, 900).save(folder / "a.png")
    monkeypatch.chdir(folder)
    config = parse_train([preset, "--data.sources", "data.jsonl"])
    source = open_sources(config.data.sources, shuffle=False)
    processor = init.prepare(config, sample_texts(source, 1000))[0]
    document = processor.document(to_sample(source.read(6)))
    text, _picture = show(index=6, preset=preset, row_length=0)
    assert describe(document) in text and render(document, processor) in text
    assert f"rows of {config.data.row_length} tokens" in text


def test_a_written_special_token_is_told_from_a_control_token(show, folder):
    record = {"images": ["a.png"], "texts": [{"user": "a <|pad|>?", "assistant": "<|user|> no <|pad|>"}]}
    record["texts"].append({"user": "C:\\", "assistant": "\\<|pad|> \\ d"})
    (folder / "data.jsonl").write_text(json.dumps(record))
    text = show()[0]
    assert r"a \<|pad|>?" in text and r"⟦\<|user|> no \<|pad|><end_of_utterance>⟧" in text
    assert r"C:\\<|assistant|>" in text and r"⟦\\\<|pad|> \ d<end_of_utterance>⟧" in text
    assert "<image>x9" in text and "\\<image>x" not in text


def test_columns_are_named_and_a_layout_decides(show, folder):
    record = {"img": "a.png", "q": "what color?", "answers": ["a red", "crimson"], "messages": []}
    (folder / "data.jsonl").write_text("\n".join(json.dumps(record | {"id": i}) for i in range(3)))
    text = show(layout="question", fields=("image=img", "question=q"))[0]
    assert "<image>x" in text and "what color?<|assistant|>⟦a red<end_of_utterance>⟧" in text
    assert "3 documents, 0 skipped" in text
    with pytest.raises(UserError, match="can be read as messages and as question"):
        show(fields=("image=img", "question=q"))


def test_streams(show, monkeypatch):
    class Stream:
        name, damaged = "stream", ["a shard is lost"]

        def refs(self, slots, num_slots, start=None):
            for i in itertools.count():
                record = {"texts": [{"user": f"{i % 6}?", "assistant": str(i % 6)}]}
                yield Ref(0, i, i // 6, record, self.name, f"record {i}", i + 1)

        def read(self, key):
            return key

    monkeypatch.setattr(inspect, "open_source", lambda spec, allow_urls: Stream())
    text, _picture = show(index=5, num=4)
    assert "stream, sample 5: " in text and "<|user|>5?" in text and "4 samples of stream" in text
    assert "lost: a shard is lost" in text and "6 samples" in show()[0]
    with pytest.raises(ValueError, match="stream ends before sample 6"):
        show(index=6)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (dict(index=12), "--index 12: .* has only 12 samples"),
        (dict(index=-1), "--index -1 must be at least 0"),
        (dict(num=0), "--num 0 must be at least 1"),
        (dict(row_length=-1), "--row-length -1 must be at least 0"),
        (dict(preset="big"), "--preset = 'big' is unknown; there are scenes, "),
        (dict(preset="smolvlm_256m_stage1"), "--preset smolvlm_256m_stage1 starts from a model of others"),
        (dict(max_tiles=-1), "--max-tiles -1 must be at least 0"),
        (dict(seed=-1), "--seed -1 must be at least 0"),
        (dict(index=9), "data.jsonl, sample 9: line 10 of .* must be a JSON object"),
        (dict(index=10), "sample 10: .*b.png"),
        (dict(row_length=2), "no sample of .* could be used"),
        (dict(model=Path("nowhere")), "nowhere is no model folder"),
        (dict(source="other.jsonl"), "does not exist"),
    ],
)
def test_errors_are_one_sentence(show, options, problem):
    with pytest.raises(ValueError, match=problem):
        show(**options)


def test_the_command(folder):
    command = [sys.executable, "-m", "nanovlm.data.inspect", str(folder / "data.jsonl"), "--out"]
    root = Path(__file__).parent.parent.parent
    for encoding, bracket in (("utf-8", "⟦"), ("ascii", "\\u27e6")):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        options = dict(capture_output=True, encoding=encoding, cwd=root, env=environment)
        done = subprocess.run([*command, str(folder / "x.png")], **options)
        assert done.returncode == 0 and not done.stderr and "\33" not in done.stdout and bracket in done.stdout
    assert Image.open(io.BytesIO((folder / "x.png").read_bytes())).width == WIDTH
    done = subprocess.run([*command, str(folder / "no" / "x.png")], capture_output=True, text=True, cwd=root)
    assert done.returncode == 2 and done.stderr.startswith("error: the picture cannot be written: ")
    assert done.stderr.count("\n") == 1
