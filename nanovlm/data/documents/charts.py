"""Charts, with the questions that ChartQA asks (arXiv 2203.10244): values, and what follows from comparing them.

matplotlib draws them at 72 dots an inch, so a font of 12 points is 12 pixels high. Values are printed, or stand on or
between the lines of a grid.
"""

from collections.abc import Callable
from random import Random

import numpy as np
from PIL import Image

from nanovlm.data.documents.fonts import Family
from nanovlm.data.documents.page import Drawing
from nanovlm.data.documents.papers import Asked
from nanovlm.data.documents.words import Words

SIZE = (500, 372)  # pixels
TITLE = 15  # size of its font, no other text's
PALETTES = (
    ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#edc948"),
    ("#1b6ca8", "#d1495b", "#edae49", "#66a182", "#8d6a9f", "#3b3b58"),
    ("#2f4b7c", "#a05195", "#f95d6a", "#ffa600", "#488f31", "#6f6f6f"),
)


def draw_chart(rng: Random, words: Words, family: Family, template: str, plot: Callable) -> Drawing:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.text import Text

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever a user's matplotlibrc says
        figure = Figure(figsize=(SIZE[0] / 72, SIZE[1] / 72), dpi=72)
        canvas = FigureCanvasAgg(figure)
        asked = plot(figure.subplots(), words)
        figure.canvas.draw()  # makes the texts of the ticks
        size = rng.choice((12, 13))
        for text in figure.findobj(Text):
            is_title = text.get_fontsize() == TITLE
            text.set_fontproperties(FontProperties(fname=str(family.path), size=TITLE if is_title else size))
        figure.tight_layout(pad=1.2)
        canvas.draw()
        image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        texts = []
        for text in figure.findobj(Text):
            if text.get_visible() and text.get_text().strip() and (inside := _is_shown(text)):
                box = inside.get_window_extent()
                texts.append(((box.x0, SIZE[1] - box.y1, box.x1, SIZE[1] - box.y0), text.get_text()))
    return Drawing(image, asked, template, family.name, texts)


def _is_shown(text):
    """Return a text unless it is the label of a tick beyond the ends of its axis, which matplotlib does not draw."""
    if text.axes is None:
        return text
    for axis in (text.axes.xaxis, text.axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if text in (tick.label1, tick.label2):
                return text if low <= tick.get_loc() <= high and text.axes.axison else None
    return text


def _title(axes, words: Words, about: str = "") -> Asked:
    """Give a chart its title, and return the question for it."""
    title = f"{words.one('measure').capitalize()} {about or f'in {words.rng.randint(2001, 2029)}'}"
    axes.set_title(title, fontsize=TITLE)
    return [("chart", "what is the title of the chart?", title)]


def _values(words: Words, number: int) -> tuple[list[int], int]:
    """Return different values and the step of the grid on which, or half between which, they stand."""
    step = words.rng.choice((10, 20, 100, 1000))
    return words.numbers(number, step, 8 * step, step // 2), step


def _ask_values(words: Words, names: list[str], values: list[int], unit: str = "") -> Asked:
    first, second = words.rng.sample(range(len(names)), 2)
    high, low = values.index(max(values)), values.index(min(values))
    most = sorted(values)[words.rng.randrange(len(values) - 1)]
    above = sum(value > most for value in values)
    difference = abs(values[first] - values[second])
    return [
        ("chart", f"what is the value of {names[first]}?", f"{values[first]}{unit}"),
        ("chart", f"what is the value of {names[second]}?", f"{values[second]}{unit}"),
        ("chart", f"which has the value {values[first]}{unit}?", names[first]),
        ("chart_reason", "which has the highest value?", names[high]),
        ("chart_reason", "which has the lowest value?", names[low]),
        (
            "chart_reason",
            f"what is the difference between {names[first]} and {names[second]}?",
            f"{difference}{unit}",
        ),
        ("chart_reason", f"how many values are above {most}{unit}?", str(above)),
    ]


def _style(axes, words: Words, along: str, step: int, values: list[int], printed: bool = False):
    """Set the ticks of the values from 0 on, and a grid, which is always there when values are not printed."""
    top = (max(values) // step + 2) * step
    getattr(axes, f"set_{along}lim")(0, top)
    getattr(axes, f"set_{along}ticks")(range(0, top + 1, step * (2 if printed else 1)))
    axes.set_axisbelow(True)
    if not printed or words.rng.random() < 0.4:
        axes.grid(axis=along, color="#d0d0d0", linewidth=0.8)
    if words.rng.random() < 0.5:
        axes.spines[["top", "right"]].set_visible(False)


def columns(axes, words: Words) -> Asked:
    asked = _title(axes, words)
    names = words.some("city", words.rng.randint(3, 5))
    values, step = _values(words, len(names))
    printed = words.rng.random() < 0.5
    colors = words.rng.choice(PALETTES)
    drawn = axes.bar(names, values, width=0.6, color=colors[0] if words.rng.random() < 0.5 else colors[: len(names)])
    if printed:
        axes.bar_label(drawn, padding=2)
    _style(axes, words, "y", step, values, printed)
    return asked + _ask_values(words, names, values)


def bars(axes, words: Words) -> Asked:
    asked = _title(axes, words)
    names = words.some(words.rng.choice(("goods", "product", "last")), words.rng.randint(3, 6))
    values, step = _values(words, len(names))
    printed = words.rng.random() < 0.5
    drawn = axes.barh(names, values, height=0.6, color=words.rng.choice(words.rng.choice(PALETTES)))
    axes.invert_yaxis()
    if printed:
        axes.bar_label(drawn, padding=3)
    _style(axes, words, "x", step, values, printed)
    return asked + _ask_values(words, names, values)


def _series(words: Words, names: list[str], years: list[str]) -> tuple[list[list[int]], int, Asked]:
    """Return the values of each name by year, the step of the grid, and the questions."""
    rng = words.rng
    values, step = _values(words, len(names) * len(years))
    rows = [values[i * len(years) : (i + 1) * len(years)] for i in range(len(names))]
    asked = []
    for place in rng.sample(range(len(values)), 2):
        name, year = divmod(place, len(years))
        asked.append(("chart", f"what is the value of {names[name]} in {years[year]}?", str(rows[name][year])))
    name, year = rng.randrange(len(names)), rng.randrange(len(years))
    asked.append(
        ("chart_reason", f"when is {names[name]} highest?", years[rows[name].index(max(rows[name]))]),
    )
    in_year = [row[year] for row in rows]
    asked.append(("chart_reason", f"which is highest in {years[year]}?", names[in_year.index(max(in_year))]))
    return rows, step, asked


def lines(axes, words: Words) -> Asked:
    asked = _title(axes, words, "by year")
    names = words.some("city", 2)
    start = words.rng.randint(1990, 2020)
    years = [str(start + i) for i in range(words.rng.randint(4, 6))]
    rows, step, more = _series(words, names, years)
    colors = words.rng.choice(PALETTES)
    for name, row, color, marker in zip(names, rows, colors, "os", strict=False):
        axes.plot(years, row, color=color, marker=marker, label=name, linewidth=2)
    _style(axes, words, "y", step, [x for row in rows for x in row])
    axes.set_ylim(0, axes.get_ylim()[1] + 2 * step)  # room for the legend
    axes.legend(loc="upper center", ncols=2, frameon=False)
    return asked + more


def grouped(axes, words: Words) -> Asked:
    """Two columns for each city, one a year."""
    asked = _title(axes, words, "by year")
    names = words.some("city", words.rng.randint(2, 4))
    start = words.rng.randint(1990, 2020)
    years = [str(start), str(start + words.rng.randint(1, 9))]
    rows, step, more = _series(words, names, years)
    colors = words.rng.choice(PALETTES)
    for number, year in enumerate(years):
        places = [i + (number - 0.5) * 0.38 for i in range(len(names))]
        axes.bar(places, [row[number] for row in rows], width=0.36, label=year, color=colors[number])
    axes.set_xticks(range(len(names)), names)
    _style(axes, words, "y", step, [x for row in rows for x in row])
    axes.set_ylim(0, axes.get_ylim()[1] + 2 * step)
    axes.legend(loc="upper center", ncols=2, frameon=False)
    return asked + more


def dots(axes, words: Words) -> Asked:
    """A dot for each value, at the end of a thin line from the name."""
    asked = _title(axes, words)
    names = words.some(words.rng.choice(("goods", "product", "last")), words.rng.randint(3, 5))
    values, step = _values(words, len(names))
    color = words.rng.choice(words.rng.choice(PALETTES))
    axes.hlines(names, 0, values, color=color, linewidth=1.5)
    axes.plot(values, names, "o", color=color, markersize=11)
    axes.set_ylim(len(names) - 0.5, -0.5)
    _style(axes, words, "x", step, values)
    return asked + _ask_values(words, names, values)


def _shares(words: Words) -> tuple[list[str], list[int]]:
    """Return names and shares of 100 %, all different and none too small to be seen."""
    names = words.some(words.rng.choice(("city", "product")), words.rng.randint(3, 5))
    while True:
        cuts = sorted(words.rng.sample(range(1, 100), len(names) - 1))
        shares = [b - a for a, b in zip([0, *cuts], [*cuts, 100], strict=True)]
        if min(shares) >= 9 and len({*shares}) == len(shares):
            return names, shares


def pie(axes, words: Words, **how) -> Asked:
    asked = _title(axes, words)
    names, shares = _shares(words)
    colors = [f"{color}b0" for color in words.rng.choice(PALETTES)]  # light, so that numbers are seen on them
    axes.pie(shares, labels=names, autopct="%d%%", pctdistance=0.66, startangle=90, colors=colors, radius=0.95, **how)
    return asked + _ask_values(words, names, shares, "%")


def donut(axes, words: Words) -> Asked:
    """A ring, whose parts are named beside it."""
    asked = _title(axes, words)
    names, shares = _shares(words)
    colors = [f"{color}b0" for color in words.rng.choice(PALETTES)]
    wedges, *_ = axes.pie(shares, autopct="%d%%", pctdistance=0.75, startangle=words.rng.randrange(360), colors=colors,
                          radius=1.1, wedgeprops={"width": 0.55, "edgecolor": "white"})  # fmt: skip
    axes.legend(wedges, names, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    return asked + _ask_values(words, names, shares, "%")


CHARTS = {
    "chart": {
        "train": {"columns": columns, "bars": bars, "lines": lines, "pie": pie},
        "test": {"grouped": grouped, "dots": dots, "donut": donut},
    }
}
