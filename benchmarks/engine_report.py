"""The lines of benchmarks/results/engine.jsonl -> the tables of docs/inference.md.

python benchmarks/engine_report.py       write them into the page
"""

import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import pages
from benchmarks.pages import where

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "engine.jsonl", ROOT / "docs" / "inference.md"
BEFORE, TRANSFORMERS = "`generate` before the engine, batches of 16", "`transformers.generate`, batches of 16"
QUESTIONS = "answers a second, 64 questions about 16 pictures, answers of 1 to 64 tokens, {}"
DECODE = "tokens a second of one answer, {}"
MISSING = "not measured yet"


def both(what: str) -> list[tuple[str, dict]]:
    """Return how a subject is measured, and the fields of the lines: as it is written, and with --compile."""
    return [("", {"what": what, "compiled": None}), (", `--compile`", {"what": what, "compiled": True})]


# What is measured, against whom, fields of its line, and what the ratio should be.
SPEED = [
    *(
        (QUESTIONS.format(title), peer, {"what": "questions", "shape": shape, "peer": name}, aim)
        for title, shape in (("`scenes`", "scenes"), ("256M", "256m"))
        for peer, name, aim in ((BEFORE, "before", "≥ 3"), (TRANSFORMERS, "transformers", "≥ 1.5"))
    ),
    *(
        (DECODE.format(f"222M, {name}{how}"), "`generate` before the engine", fields | {"weights": name}, aim)
        for name, aim in (("fp32", ""), ("bf16", "≥ 1.3"), ("int8", ""), ("int4", ""), ("nf4", ""))
        for how, fields in both("decode")
    ),
    *(
        (DECODE.format(f"SmolLM2-135M, {ours}{how}"), f"llama.cpp, {theirs}", fields | {"weights": ours}, "≥ 0.6")
        for ours, theirs in (("int8", "Q8_0"), ("int4", "Q4_0"))
        for how, fields in both("llama.cpp")
    ),
    ("answers a second, 32 requests at once, 222M", "vLLM on the CPU", {"what": "vllm"}, "≥ 0.5"),
]
# What is measured, fields of its line, which of them has the ratio, and what it should be.
RATIOS = [
    *(
        (f"222M, one answer, tokens a second: {name} over bf16{how}", fields | {"weights": name}, "times_bf16", aim)
        for name, aim in (("int8", "≥ 1.6"), ("int4", "≥ 2.2"))
        for how, fields in both("decode")
    ),
    ("256M, a picture of 17 tiles, seconds to the first token: turn 2 over 1", {"what": "chat"}, "ratio", "≤ 0.15"),
    ("256M, the same picture, seconds until 8 answers begin over 1", {"what": "answers"}, "ratio", "≤ 1.6"),
    ("256M, the same, the most of the cache that they use", {"what": "answers"}, "cache_ratio", "≤ 1.6"),
]
SPECULATION = [
    (prompt, weights, guesses)
    for prompt in ("repeat", "answer")
    for weights in ("fp32", "bf16")
    for guesses in ("look-up", "draft")
]
MODELS = {"scenes": "`scenes`", "222m": "222M: 224 px, SmolLM2-135M", "256m": "256M: 512 px, SmolLM2-135M"}
MODELS |= {"460m": "460M: 512 px, SmolLM2-360M"}


def main():
    """Write the tables into the page."""
    lines = pages.read_lines(RESULTS)
    for name, table in TABLES.items():
        pages.put(PAGE, name, "engine.py", "\n".join(table(lines)))


def find(lines: Iterable[dict], **fields) -> dict | None:
    """Return the last line with these fields."""
    found = None
    for line in lines:
        if all(line.get(name) == value for name, value in fields.items()):
            found = line
    return found


def speed(lines: list[dict]) -> list[str]:
    """Lay out who does how much a second; ratios are medians of turns, with the least and the most."""
    text = ["| measured | the engine | against | does | ratio | aim | where |", "|---|---|---|---|---|---|---|"]
    for title, peer, fields, aim in SPEED:
        line = find(lines, **fields)
        cells = [MISSING, peer, "", "", aim, ""]
        if line:
            cells[0], cells[2] = f"{line['per_second']:g} ({line['weights']})", f"{line['peer_per_second']:g}"
            cells[3], cells[5] = f"**{line['ratio']:.2f}** ({line['least']:.2f} to {line['most']:.2f})", where(line)
        text.append(f"| {title} | {' | '.join(cells)} |")
    return text


def ratios(lines: list[dict]) -> list[str]:
    text = ["| measured | ratio | aim | where |", "|---|---|---|---|"]
    for title, fields, name, aim in RATIOS:
        line, value = find(lines, **fields), MISSING
        if line:
            value = line[name] if name != "ratio" else [line[n] for n in ("ratio", "least", "most")]
            value = (
                f"**{value[0]:.2f}** ({value[1]:.2f} to {value[2]:.2f})"
                if isinstance(value, list)
                else f"**{value:.2f}**"
            )
        text.append(f"| {title} | {value} | {aim} | {where(line) if line else ''} |")
    return text


def speculation(lines: list[dict]) -> list[str]:
    text = ["| SmolLM2-135M | weights | guesses | accepted of guessed | tokens a second | without | ratio | where |"]
    text.append("|---" * 8 + "|")
    for prompt, weights, guesses in SPECULATION:
        line = find(lines, what="speculate", prompt=prompt, weights=weights, guesses=guesses)
        cells = [MISSING, "", "", "", ""]
        if line:
            cells = [
                f"{line['accepted']} of {line['drafted']}",
                f"{line['per_second']:g}",
                f"{line['peer_per_second']:g}",
            ]
            cells += [f"**{line['ratio']:.2f}** ({line['least']:.2f} to {line['most']:.2f})", where(line)]
        text.append(f"| {prompt} | {weights} | {guesses} | {' | '.join(cells)} |")
    return text


def memory(lines: list[dict]) -> list[str]:
    text = [
        "| model | weights | MB of weights | KB a token in the cache | KB of features a tile | tokens a tile | where |"
    ]
    text.append("|---" * 7 + "|")
    for shape, title in MODELS.items():
        for weights in ("fp32", "bf16", "int4"):
            line = find(lines, what="memory", shape=shape, weights=weights)
            cells = [MISSING, "", "", "", ""]
            if line:
                cells = [f"{line['weight_bytes'] / 1e6:.1f}", f"{line['cache_bytes_a_token'] / 1e3:.1f}"]
                cells += [f"{line['feature_bytes_a_tile'] / 1e3:.1f}", str(line["tokens_a_tile"]), where(line)]
            text.append(f"| {title} | {weights} | {' | '.join(cells)} |")
    return text


TABLES = {"speed": speed, "ratios": ratios, "speculation": speculation, "memory": memory}

if __name__ == "__main__":
    sys.exit(main())
