"""Lines of benchmarks/fusion.py -> the tables of docs/architectures.md and two pictures, docs/fusion.png among them."""

import io
import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import pages
from nanovlm import cli
from nanovlm.environment import short_commit
from nanovlm.files import write_file

DOCS = cli.PROJECT / "docs" / "architectures.md"
PARTS = ("projector", "fusion", "decoder", "encoder")
TUNED = ("frozen", "lora", "full")
FUSIONS = {"sequence": "sequence", "cross_attention": "cross-attention"}
BARS = (50, 80, 90)  # percent of right answers


def newest(lines: Sequence[dict], subject: str) -> list[dict]:
    """Return the last line of each cell, or way, and seed."""
    key = {"fusion": lambda x: (cell_of(x), x["seed"]), "encoder": lambda x: (x["encoder"], x["seed"])}[subject]
    return list({key(line): line for line in lines if line["subject"] == subject}.values())


def cell_of(line: dict) -> tuple[str, ...]:
    return tuple(line["cell"][part] for part in PARTS)


# --- curves -----------------------------------------------------------------------------------------------------------


def accuracy_at(curve: list[dict], seconds: float) -> float:
    """Return the accuracy after so many seconds, on the straight line between the points around it."""
    for before, after in itertools.pairwise(curve):
        if before["seconds"] <= seconds <= after["seconds"]:
            share = (seconds - before["seconds"]) / (after["seconds"] - before["seconds"])
            return before["accuracy"] + share * (after["accuracy"] - before["accuracy"])
    return curve[-1]["accuracy"]


def at_equal_seconds(lines: list[dict]) -> list[dict]:
    """Add to each line its accuracy at the end of the quickest cell of its seed."""
    ends = defaultdict(list)
    for line in lines:
        ends[line["seed"]].append(line["curve"][-1]["seconds"])
    return [line | {"at_seconds": accuracy_at(line["curve"], min(ends[line["seed"]]))} for line in lines]


def first_reaches(curve: list[dict], bar: float) -> float | None:
    """Return the seconds at the first point of a curve with this accuracy, None where it has none."""
    return next((point["seconds"] for point in curve if point["accuracy"] >= bar), None)


# --- tables -----------------------------------------------------------------------------------------------------------


def write_tables(lines: list[dict]):
    """Put each table between its marks in docs/architectures.md."""
    for name, (subject, make, picture) in TABLES.items():
        of_subject = newest(lines, subject)
        table = "\n".join([*make(of_subject), "", describe(of_subject)]) if of_subject else "not measured yet"
        if picture and (DOCS.parent / picture).exists():
            table += f"\n\n![{PICTURES[picture]}]({picture})"
        pages.put(DOCS, name, "fusion.py", table)


def describe(lines: list[dict]) -> str:
    """Return what lines were measured on."""
    line, seeds = lines[-1], len({line["seed"] for line in lines})
    commits = ", ".join(dict.fromkeys(short_commit(x["commit"]) for x in lines if x["commit"]))
    where = f"{line['device']}, {line['threads']} thread{'s' if line['threads'] > 1 else ''}, {line['precision']}"
    return (
        f"({seeds} seed{'s' if seeds > 1 else ''}: mean, lowest to highest; {where}; commits {commits}; {line['date']})"
    )


def group(lines: list[dict]) -> dict[tuple[str, ...], list[dict]]:
    groups = defaultdict(list)
    for line in lines:
        groups[cell_of(line)].append(line)
    return groups


def spread(values: Sequence[float], form: str = ".1f") -> str:
    if not values:
        return ""
    ends = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{ends}"


def accuracy_table(figure: str) -> Callable[[list[dict]], list[str]]:
    """Return a function that lays out a figure by projector and fusion, a column for each way to tune."""

    def make(lines: list[dict]) -> list[str]:
        groups = group(at_equal_seconds(lines))
        text = ["| projector | fusion | frozen | LoRA | full |", "|---|---|---|---|---|"]
        for projector, fusion, encoder in dict.fromkeys((x[0], x[1], x[3]) for x in groups):
            cells = [[x[figure] for x in groups.get((projector, fusion, how, encoder), ())] for how in TUNED]
            note = "" if encoder == "contrast" else ", encoder from nothing"
            text.append(f"| {projector}{note} | {FUSIONS[fusion]} | {' | '.join(map(spread, cells))} |")
        return text

    return make


def make_costs(lines: list[dict]) -> list[str]:
    text = [
        "| projector | fusion | tuned | tokens a picture | features | learns, M | ms a step | GB | grey picture, % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (projector, fusion, how, encoder), of_cell in group(lines).items():
        one, note = of_cell[-1], "" if encoder == "contrast" else ", encoder from nothing"
        cells = [f"{one['image_tokens']}", f"{one['image_features']}", f"{one['trained'] / 1e6:.2f}"]
        cells += [spread([x[name] for x in of_cell], form) for name, form in COSTS.items()]
        text.append(f"| {projector}{note} | {FUSIONS[fusion]} | {how} | {' | '.join(cells)} |")
    return text


COSTS = {"step_ms": ".0f", "memory_gb": ".2f", "blank": ".1f"}


def make_verdict(lines: list[dict]) -> list[str]:
    """Lay out by how much cross-attention is above the sequence, projector by projector of the same seed."""
    text = [
        "| cross-attention above the sequence, points | frozen | LoRA | full |",
        "|---|---|---|---|",
    ]
    lines = [line for line in at_equal_seconds(lines) if line["cell"]["encoder"] == "contrast"]
    for name, figure in (("equal steps", "accuracy"), ("equal seconds", "at_seconds")):
        cells = []
        for how in TUNED:
            found = defaultdict(dict)
            for line in lines:
                if line["cell"]["decoder"] == how:
                    found[line["cell"]["projector"], line["seed"]][line["cell"]["fusion"]] = line[figure]
            pairs = [x["cross_attention"] - x["sequence"] for x in found.values() if len(x) == 2]
            wins = f", above in {sum(x > 0 for x in pairs)} of {len(pairs)}" if pairs else ""
            cells.append(spread(pairs, "+.1f") + wins)
        text.append(f"| {name} | {' | '.join(cells)} |")
    return text


def make_encoder(lines: list[dict]) -> list[str]:
    bars = " | ".join(f"s to {bar} %" for bar in BARS)
    text = [
        f"| encoder | {bars} | at the end, % | s in all | s of the contrast before |",
        "|---" * (4 + len(BARS)) + "|",
    ]
    for way in dict.fromkeys(line["encoder"] for line in lines):
        of_way = [line for line in lines if line["encoder"] == way]
        cells = []
        for bar in BARS:
            times = [first_reaches(line["curve"], bar) for line in of_way]
            reached = [time for time in times if time is not None]
            missed = f", {len(times) - len(reached)} never" if len(reached) < len(times) else ""
            cells.append((spread(reached, ".0f") + missed).removeprefix(", "))
        cells.append(spread([line["curve"][-1]["accuracy"] for line in of_way]))
        cells.append(spread([line["curve"][-1]["seconds"] for line in of_way], ".0f"))
        cells.append(spread([line["encoder_seconds"] for line in of_way], ".0f") if way == "contrast" else "")
        text.append(f"| {'from contrast' if way == 'contrast' else 'from nothing'} | {' | '.join(cells)} |")
    return text


PICTURES = {
    "fusion.png": "right answers over processor seconds, a panel for each way to tune",
    "from_siglip.png": "right answers over seconds, from both encoders",
}
# A table of the page: what its lines are about, what lays them out, and the picture under it, if any.
TABLES = {
    "verdict": ("fusion", make_verdict, "fusion.png"),
    "equal steps": ("fusion", accuracy_table("accuracy"), ""),
    "equal seconds": ("fusion", accuracy_table("at_seconds"), ""),
    "costs": ("fusion", make_costs, ""),
    "encoder": ("encoder", make_encoder, "from_siglip.png"),
}

# --- pictures ---------------------------------------------------------------------------------------------------------

COLORS = {"linear": "C0", "mlp": "C1", "resampler": "C2", "qformer": "C3", "merge": "C4"}
STYLES = {"sequence": "-", "cross_attention": "--"}


def draw(lines: list[dict], folder: Path = DOCS.parent):
    """Draw the curves of each subject that has lines."""
    for subject, name, make in (("fusion", "fusion.png", draw_fusion), ("encoder", "from_siglip.png", draw_encoder)):
        if of_subject := newest(lines, subject):
            write_file(folder / name, make(of_subject))


def mean_curve(curves: list[list[dict]]) -> tuple[list[float], list[float]]:
    """Return the mean seconds and the mean accuracy at each point of curves with equal steps."""
    points = list(zip(*curves, strict=False))
    return [[statistics.mean(x[name] for x in point) for point in points] for name in ("seconds", "accuracy")]


def draw_fusion(lines: list[dict]) -> bytes:
    """A panel for each way to tune: the mean of the seeds, a colour a projector, dashes for cross-attention."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(TUNED), figsize=(11, 3.4), sharey=True, layout="constrained")
    for how, axes in zip(TUNED, panels, strict=True):
        for (projector, fusion, decoder, encoder), of_cell in group(lines).items():
            if decoder == how:
                note, color = ("", COLORS[projector]) if encoder == "contrast" else (", from nothing", "0.6")
                xs, ys = mean_curve([line["curve"] for line in of_cell])
                axes.plot(xs, ys, STYLES[fusion], color=color, linewidth=1.4)
                axes.plot([], [], STYLES[fusion], color=color, label=f"{projector}, {FUSIONS[fusion]}{note}")
        axes.set(title={"lora": "LoRA"}.get(how, how), xlabel="processor seconds of training", ylim=(0, 100))
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("right answers, %")
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside right center", fontsize=7, frameon=False)
    return to_png(figure)


def draw_encoder(lines: list[dict]) -> bytes:
    """Each run as a line, from the encoder of a contrastive run or from nothing."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    names = {"nothing": ("from nothing", "0.5"), "contrast": ("from the encoder of scenes_siglip", "C0")}
    for line in lines:
        name, color = names[line["encoder"]]
        axes.plot(*zip(*((x["seconds"], x["accuracy"]) for x in line["curve"]), strict=True), color=color, label=name)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), fontsize=8, frameon=False)
    axes.set(xlabel="seconds", ylabel="right answers, %", ylim=(0, 102))
    axes.spines[["top", "right"]].set_visible(False)
    return to_png(figure)


def to_png(figure) -> bytes:
    import matplotlib.pyplot as plt

    image = io.BytesIO()
    figure.savefig(image, dpi=100)
    plt.close(figure)
    return image.getvalue()
