"""benchmarks/engine.py: its sides answer alike, wrong answers are not timed, and the page has what was measured."""

import copy
import json
import sys

import pytest
import torch

pytest.importorskip("tyro")  # a machine that is lent for minutes may lack it
from benchmarks import engine, engine_report, pages, turns
from benchmarks.engine import measure_memory
from benchmarks.engine_bench import Bench, compare, decoding_rate, is_alike
from benchmarks.engine_report import PAGE, RESULTS, TABLES, speed
from benchmarks.pages import read_lines


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A tiny model, four requests about a picture, and a turn of three sides."""
    bench = Bench(tmp_path_factory.mktemp("bench"), "", "tiny", "fp32", rows=3)
    requests = bench.prepare_questions(1, exports=True)
    return bench, requests, bench.take_turns(("engine", "look-up", "transformers"), [{"requests": requests}])[0]


def test_the_sides_answer_alike(asked):
    bench, requests, turn = asked
    bench.check(requests, turn)
    assert {side: result["equal"] for side, result in turn.items()} == {"engine": 1, "look-up": 1, "transformers": 1}
    assert sorted(map(len, turn["engine"]["answers"])) == [1, 2, 3, 4]
    assert len({answer[0] for answer in turn["engine"]["answers"]}) > 1  # the question matters
    line = compare([turn], "transformers", "answers", lambda x: 4 / x["seconds"])
    assert line["ratio"] == pytest.approx(turn["transformers"]["seconds"] / turn["engine"]["seconds"], abs=2e-3)
    assert line["turns"] == 1 and line["equal"] == 1


def test_a_wrong_answer_is_not_timed(asked):
    bench, requests, turn = asked
    longest = max(requests, key=lambda request: request[1])[0]
    wrong = copy.deepcopy(turn)
    token = wrong["transformers"]["answers"][longest][2]
    wrong["transformers"]["answers"][longest][2] = (token + 1) % 500
    with pytest.raises(SystemExit, match=f"transformers answers prompt {longest} otherwise at token 2"):
        bench.check(requests, wrong)
    bench.find_bound = lambda: 2.0  # of the largest logit: any token passes for as likely as any other
    bench.check(requests, wrong)
    assert wrong["transformers"]["equal"] == 0.75
    del bench.find_bound
    for count in (2, 5):  # too few, too many
        wrong["transformers"]["answers"][longest] = (turn["transformers"]["answers"][longest] * 2)[:count]
        with pytest.raises(SystemExit, match="transformers"):
            bench.check(requests, wrong)


def test_answers_of_other_weights_must_be_as_likely(asked):
    bench, _, turn = asked
    bench = copy.copy(bench)
    bench.prompts = bench.prompts[:1]
    good = {side: {"answers": turn[side]["answers"][:1]} for side in ("engine", "transformers")}
    num = len(good["engine"]["answers"][0])
    is_alike(bench, [[0, num]], good)
    bad = {"engine": good["engine"], "llama.cpp": {"answers": [[token ^ 1 for token in good["engine"]["answers"][0]]]}}
    with pytest.raises(SystemExit, match="mean log-probabilities"):
        is_alike(bench, [[0, num]], bad)
    with pytest.raises(SystemExit, match=f"{num} were asked for"):
        is_alike(bench, [[0, num]], good | {"llama.cpp": {"answers": [[]]}})


def test_formats_and_memory(tmp_path, monkeypatch):
    """A quantised model is held to the same codes in fp32, so that the bound is a few per cent for every format."""
    lines = {}
    others = [torch.zeros(250_000)]  # a tensor of somebody else, who drops it while a model is measured
    make_model = engine.make_model
    monkeypatch.setattr(engine, "make_model", lambda *args: others.clear() or make_model(*args))
    for format in ("fp32", "bf16", "int4"):
        (tmp_path / format).mkdir()
        bench = Bench(tmp_path / format, "", "tiny", format)
        (lines[format],) = measure_memory(bench)
        bench.prepare_questions(1)
        assert 1e-4 <= bench.find_bound() < 0.2
    assert lines["fp32"]["weight_bytes"] == 4 * lines["fp32"]["parameters"] == 2 * lines["bf16"]["weight_bytes"]
    assert lines["fp32"]["feature_bytes_a_tile"] == 4 * 4 * 64  # fp32, 4 tokens, 64 wide
    assert lines["fp32"]["cache_bytes_a_token"] == 4 * 2 * 2 * 32  # fp32, keys and values, 2 layers, a head of 32


def test_rates_leave_out_the_first_token():
    assert decoding_rate({"answers": [[1, 2, 3]], "seconds": 3.0, "firsts": [2.0]}) == 2


def test_turns_alternate():
    code = (
        "import itertools, sys\nfor i, line in enumerate(sys.stdin): print('[%d, %s]' % (i, line.strip()), flush=True)"
    )
    commands = {name: [sys.executable, "-c", code] for name in "ab"}
    assert turns.alternate(commands, ["7", "8"]) == [{"a": [0, 7], "b": [0, 7]}, {"a": [1, 8], "b": [1, 8]}]
    with pytest.raises(SystemExit, match="ended"):
        turns.alternate({"a": [sys.executable, "-c", ""]}, [""])


# --- the page ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_the_page_is_that_of_the_results(name):
    table = pages.find(PAGE, name, "engine.py")[1]
    assert table.splitlines() == TABLES[name](read_lines(RESULTS)), "run python benchmarks/engine_report.py"


def test_the_last_line_counts_and_what_is_missing_says_so(tmp_path, monkeypatch):
    environment = {"device": "A processor", "threads": 2, "commit": "0123456789+", "date": "2026-01-01"}
    ours = {"what": "questions", "shape": "scenes", "peer": "before", "weights": "fp32", "peer_per_second": 2.5}
    lines = [
        environment | ours | {"per_second": value, "ratio": value / 2.5, "least": 1, "most": 9} for value in (5, 10)
    ]
    first, second, *_ = speed(lines)[2:]
    assert (
        "| 10 (fp32) |" in first
        and "| **4.00** (1.00 to 9.00) | ≥ 3 | A processor, 2 threads, 0123456+, 2026-01-01 |" in first
    )
    assert "not measured yet" in second
    page, results = tmp_path / "page.md", tmp_path / "results.jsonl"
    page.write_text(
        "".join(
            f"<!-- {name}: written by benchmarks/engine.py -->\nold\n<!-- {name} end -->\nkept\n" for name in TABLES
        ),
        "utf-8",
    )
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(engine_report, "PAGE", page)
    monkeypatch.setattr(engine_report, "RESULTS", results)
    engine_report.main()
    written = page.read_text("utf-8")
    assert "old" not in written and written.count("kept\n") == len(TABLES) and first in written
