"""The benchmark of few bits: what is measured once, what a cache in few bits does to text, and the tables."""

import json
import shutil

import pytest
import torch

from benchmarks import pages, quantized, quantized_report
from benchmarks.quantized import WAYS, QuantizedBenchmarkConfig, Seen, measure, read_text, round_cache
from nanovlm.errors import UserError
from nanovlm.model.vlm import VLM
from tests.conftest import TINY, make_batch, make_document
from tests.infer.test_cache_format import rounding

pytestmark = pytest.mark.usefixtures("one_thread")
MODELS = ("fp32", "int4 nearest", "int4 round", "KV int4")


def load():
    torch.manual_seed(3)
    return VLM(TINY).eval()


def measure_some(config, processor, looked, batch):
    def look(model, cache, expected):
        looked.append((cache, expected is not None))
        figures, logprobs = read_text(model, [batch], cache, expected)
        return Seen(figures | {"right answers": 50.0}, [f"{figures['perplexity']:.3f}"], logprobs)

    prompt = processor.prompt([{"role": "user", "content": "why?"}])
    measure(config, config.about("SmolLM2-135M", rows=1), load, lambda: [], look, prompt)


def test_each_way_is_measured_once_and_compared_with_fp32(processor, tmp_path):
    results, looked = tmp_path / "lines.jsonl", []
    batch = make_batch([make_document(processor, i, ("what?", f"a cat {i}")) for i in range(3)])
    config = QuantizedBenchmarkConfig("smollm2", ways=MODELS, results=results, group_size=32)
    measure_some(config, processor, looked, batch)
    assert looked == [("float", False), ("float", True), ("float", True), ("int4", True)]
    lines = {line["way"]: line for line in pages.read_lines(results)}
    assert tuple(lines) == MODELS
    assert lines["fp32"]["next token as in fp32"] == 100 and lines["fp32"]["divergence"] == 0
    assert len({line["divergence"] for line in lines.values()}) == 4
    assert all(lines[way]["divergence"] > 1e-4 for way in MODELS[1:])
    weights = [lines[way]["bytes a weight"] for way in MODELS]
    assert weights[0] == weights[3] == 4 and 0.5 < weights[1] == weights[2] < 0.7
    assert lines["KV int4"]["cache bytes a token"] < 0.3 * lines["fp32"]["cache bytes a token"]
    measure_some(config, processor, looked, batch)
    assert len(looked) == 4
    kept = [line for way, line in lines.items() if way != "int4 round"]
    results.write_text("".join(json.dumps(line) + "\n" for line in kept))
    measure_some(config, processor, looked, batch)
    assert looked[4:] == [("float", False), ("float", True)]  # fp32, to be compared with, and what was missing
    again = pages.read_lines(results)[-1]
    assert [again[key] for key in ("way", "divergence")] == ["int4 round", lines["int4 round"]["divergence"]]
    with pytest.raises(UserError, match="--ways 'int3' is not known; there are fp32, bf16, "):
        QuantizedBenchmarkConfig("smollm2", ways=("int3",)).validate()


@pytest.mark.parametrize("num_bits", [8, 4])
@torch.no_grad()
def test_text_is_read_as_through_the_cache(processor, num_bits):
    """As in the model that test_cache_format compares an engine with."""
    batch = make_batch([make_document(processor, i, ("what?", f"a cat {i}")) for i in range(3)])
    model, plain = load(), load().logits(batch)
    round_cache(model, num_bits)
    found = model.logits(batch)
    assert torch.equal(found, rounding(load(), num_bits).logits(batch)) and not torch.equal(found, plain)


def test_tables_have_the_last_lines_of_one_measurement(tmp_path, monkeypatch):
    page, results = tmp_path / "page.md", tmp_path / "lines.jsonl"
    shutil.copy(quantized_report.PAGE, page)
    monkeypatch.setattr(quantized_report, "PAGE", page)
    environment = {"device": "a CPU", "threads": 1, "commit": "0" * 40, "date": "2026-11-30"}
    figures = {"bytes a weight": 4, "megabytes": 1, "cache bytes a token": 2048, "tokens a second": 9, "seconds": 1}
    figures |= {"answers as in fp32": 100.0}
    settings = {"num_samples": 2, "seq_len": 64, "group_size": 64, "threads": 1}

    def smollm2(way, perplexity, **more):
        own = {"subject": "smollm2", "model": "SmolLM2-135M", "way": way, "perplexity": perplexity, "tokens": 99.0}
        own |= {"divergence": 0, "next token as in fp32": 90, "right answers": 50, "settings": settings | more}
        return figures | environment | own

    def scenes(model, width, way, mean):
        own = {"subject": "scenes", "model": model, "width": width, "way": way, "questions": 70, "mean": mean}
        return figures | environment | own | {"settings": settings | {"scenes": 10}, "test: color": mean}

    lines = [smollm2("int8", 99, num_samples=1), smollm2("int4 awq", 21), smollm2("int4 round", 30)]
    lines += [smollm2("fp32", 20), smollm2("int4 round", 22), scenes("wide", 192, "fp32", 98.5)]
    lines += [scenes("narrow", 48, "int8", 71.25), scenes("narrow", 48, "fp32", 72.5)]
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    quantized.main(QuantizedBenchmarkConfig("tables", results=results))
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in page.read_text().splitlines() if row[:2] == "| "]
    first = next(i for i, row in enumerate(rows) if row[0] == "SmolLM2-135M")
    assert [row[:3] for row in rows[first + 2 : first + 5]] == [
        ["fp32", "20.000", "0 %"],
        ["int4 round", "22.000", "100 %"],
        ["int4 awq", "21.000", "50 %"],
    ]
    assert [row[:3] for row in rows[first + 5 :]] == [
        *(["width 48", "color", "mean"], ["---"] * 3, ["fp32", "72.5", "72.5"], ["int8", "71.2", "71.2"]),
        *(["width 192", "color", "mean"], ["---"] * 3, ["fp32", "98.5", "98.5"]),
    ]
    assert "narrow; percent; 70 questions about 10 scenes; a CPU, 1 thread" in page.read_text()
    assert set(quantized.USUAL) < set(WAYS)
