"""Lines of benchmarks/quantized.py -> the tables of docs/quantization.md."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from benchmarks import pages
from benchmarks.pages import lay_out, where
from nanovlm import cli

PAGE = cli.PROJECT / "docs" / "quantization.md"


def write(results: Path, ways: Sequence[str]):
    """Put the table of each subject into the page, the ways in this order."""
    lines = sorted(choose(pages.read_lines(results)), key=lambda line: ways.index(line["way"]))
    for subject, format_table in TABLES.items():
        found = [line for line in lines if line["subject"] == subject]
        pages.put(PAGE, subject, "quantized.py", format_table(found) if found else "not measured yet")


def choose(lines: Sequence[dict]) -> list[dict]:
    """Return the last line of each way, of those that were measured as the last line of the model was."""
    settings = {(line["subject"], line["model"]): line["settings"] for line in lines}
    kept = [line for line in lines if settings[line["subject"], line["model"]] == line["settings"]]
    return list({(line["subject"], line["model"], line["way"]): line for line in kept}.values())


def format_smollm2(lines: Sequence[dict]) -> str:
    """Lay out one row a way; what is lost is in per cent of what `int4 round` loses."""
    lost = {line["way"]: line["perplexity"] - lines[0]["perplexity"] for line in lines}
    header = ["SmolLM2-135M", "perplexity", "lost, of int4 round's", "divergence, nats", "next token as fp32, %"]
    header += ["right answers, %", "answers as fp32, %", "bytes a weight", "MB", "cache, bytes a token", "tokens/s"]
    header += ["made in, s"]
    rows = [
        [
            line["way"],
            f"{line['perplexity']:.3f}",
            f"{100 * lost[line['way']] / lost['int4 round']:.0f} %" if lost.get("int4 round") else "",
            f"{line['divergence']:.4f}",
            *(f"{line[key]:.1f}" for key in ("next token as in fp32", "right answers", "answers as in fp32")),
            f"{line['bytes a weight']:.2f}",
            f"{line['megabytes']:.0f}",
            f"{line['cache bytes a token']:,}",
            f"{line['tokens a second']:.1f}",
            f"{line['seconds']:.0f}",
        ]
        for line in lines
    ]
    settings = lines[0]["settings"]
    asked = f"{int(lines[0]['tokens']):,} held-out tokens; int4 in groups of {settings['group_size']}"
    calibrated = f"calibrated on {settings['num_samples']} rows of {settings['seq_len']} tokens"
    return f"{lay_out(header, rows)}\n\n({asked}; {calibrated}; {where(lines[-1])})"


def format_scenes(lines: Sequence[dict]) -> str:
    """Lay out a table for each model, by width, with a column for each kind of question."""

    def model(line: dict) -> tuple:
        return line["width"], line["model"]

    tables = []
    for (width, name), of_model in itertools.groupby(sorted(lines, key=model), model):
        of_model = list(of_model)
        kinds = [key for key in of_model[0] if key.startswith("test: ")]
        header = [f"width {width}", *(kind.removeprefix("test: ") for kind in kinds), "mean", "as fp32"]
        header += ["bytes a weight", "MB", "cache, bytes a token", "tokens/s"]
        rows = [
            [
                line["way"],
                *(f"{line[key]:.1f}" for key in (*kinds, "mean", "answers as in fp32")),
                f"{line['bytes a weight']:.2f}",
                f"{line['megabytes']:.2f}",
                f"{line['cache bytes a token']:,}",
                f"{line['tokens a second']:.0f}",
            ]
            for line in of_model
        ]
        first = of_model[0]
        asked = f"{name}; percent; {first['questions']:,} questions about {first['settings']['scenes']} scenes"
        tables.append(f"{lay_out(header, rows)}\n\n({asked}; {where(of_model[-1])})")
    return "\n\n".join(tables)


TABLES = {"smollm2": format_smollm2, "scenes": format_scenes}
