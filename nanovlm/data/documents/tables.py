"""Tables, with questions for a cell, for the row of a value, and for what follows from a column."""

from nanovlm.data.documents.page import MARGIN, Page
from nanovlm.data.documents.papers import Asked
from nanovlm.data.documents.words import Words, money

# What rows are: the list of their names, what one is called, and the columns to choose from.
ROWS = {
    "goods": ("item", ("Price", "Weight", "Orders", "Color", "Code")),
    "last": ("person", ("Age", "Score", "City", "Hours")),
    "city": ("city", ("Visitors", "Hotels", "Area", "Schools")),
}
COUNTED = ("Orders", "Hours", "Visitors", "Hotels", "Schools")
RANGES = {
    "Weight": (1, 99),
    "Orders": (100, 999),
    "Age": (18, 80),
    "Score": (10, 100),
    "Hours": (1, 48),
    "Visitors": (1000, 9999),
    "Hotels": (2, 60),
    "Area": (200, 990),
    "Schools": (3, 90),
}


def _column(words: Words, name: str, number: int) -> tuple[list[str], list[int]]:
    """Return the cells of a column, all different, and the numbers in them, if they are numbers."""
    if name in RANGES:
        values = words.numbers(number, *RANGES[name])
        return [str(value) for value in values], values
    if name == "Price":
        values = words.numbers(number, 500, 9900, 5)
        return [money(value) for value in values], values
    if name == "Code":
        return [
            f"{letter}{value}" for letter, value in zip("ABCDEFGH", words.numbers(number, 10, 99), strict=False)
        ], []
    return words.some(name.lower(), number), []


def _table(words: Words, most_rows: int) -> tuple[str, list[list[str]], Asked]:
    """Return a title, the rows with the header first, and the questions."""
    rng = words.rng
    things = rng.choice(list(ROWS))
    what, columns = ROWS[things]
    number = rng.randint(3, most_rows)
    chosen = rng.sample(columns, 3)
    if "Color" in chosen and number > 3:  # of which the test split has three
        chosen[chosen.index("Color")] = next(name for name in columns if name not in chosen)
    names = words.some(things, number)
    cells, values = zip(*(_column(words, name, number) for name in chosen), strict=True)
    asked = []
    for column, row in zip(rng.sample(range(3), 2), rng.sample(range(number), 2), strict=True):
        name, cell = chosen[column], cells[column][row]
        many = f"how many {name.lower()} does {names[row]} have?"
        asked.append(("table", many if name in COUNTED else f"what is the {name.lower()} of {names[row]}?", cell))
    column, row = rng.randrange(3), rng.randrange(number)
    name, cell = chosen[column].lower(), cells[column][row]
    value = f"{cell} {name}" if chosen[column] in COUNTED else f"the {name} {cell}"
    asked.append(("table", f"which {what} has {value}?", names[row]))
    numeric = rng.choice([i for i in range(3) if values[i]])
    for words_of_rank, pick in ((("most", "highest"), max), (("fewest", "lowest"), min)):
        word = words_of_rank[chosen[numeric] not in COUNTED]
        best = names[values[numeric].index(pick(values[numeric]))]
        asked.append(("table_reason", f"which {what} has the {word} {chosen[numeric].lower()}?", best))
    plural = {"person": "persons", "city": "cities"}.get(what, f"{what}s")
    asked.append(("table_reason", f"how many {plural} are listed?", str(number)))
    title = f"{rng.choice(('Overview', 'Report', 'List', 'Summary'))} {rng.randint(2010, 2029)}"
    asked.append(("table", "what is the title of the table?", title))
    rows = [
        [what.capitalize(), *chosen],
        *([name, *row] for name, row in zip(names, zip(*cells, strict=True), strict=True)),
    ]
    return title, rows, asked


def _draw(page: Page, rows: list[list[str]], high: int, bold_column: bool = False, lead: float = 1.5) -> list[float]:
    """Write cells below the current height, names left and the rest right in their columns; return the columns' ends.

    The first column is `lead` times as wide as the others.
    """
    wide = (page.right - MARGIN) / (len(rows[0]) - 1 + lead)
    ends = [MARGIN, MARGIN + lead * wide]
    ends += [ends[1] + (i + 1) * wide for i in range(len(rows[0]) - 1)]
    for number, row in enumerate(rows):
        top = page.y + number * high + (high - page.step) / 2
        page.write(ends[0] + 7, top, row[0], lead * wide - 14, bold=number == 0 or bold_column)
        for end, cell in zip(ends[2:], row[1:], strict=True):
            page.write(end - 7, top, cell, wide - 14, align="r", bold=number == 0)
    return ends


def grid(page: Page, words: Words) -> Asked:
    title, rows, asked = _table(words, 6)
    high = round(1.5 * page.step)
    page.put(title, bold=True, scale=1.2, skip=1.4)
    ends = _draw(page, rows, high)
    for number in range(len(rows) + 1):
        page.rule(page.y + number * high)
    for end in ends:
        page.canvas.line((end, page.y, end, page.y + len(rows) * high), fill=page.ink)
    page.y += len(rows) * high
    return asked


def striped(page: Page, words: Words) -> Asked:
    title, rows, asked = _table(words, 7)
    high = round(1.35 * page.step)
    page.put(title, x=page.width / 2, align="m", scale=1.2, skip=1.5, ink=page.accent)
    for number in range(len(rows)):
        fill = page.tint(0.4) if number == 0 else page.tint(0.12 if number % 2 else 0.0)
        page.box(MARGIN, page.y + number * high, page.right, page.y + (number + 1) * high, fill=fill)
    _draw(page, rows, high)
    page.y += len(rows) * high
    return asked


def ruled(page: Page, words: Words) -> Asked:
    title, rows, asked = _table(words, 7)
    high = round(1.25 * page.step)
    page.put(title, skip=1.3)
    for top, width in ((0, 2), (high, 1), (len(rows) * high, 2)):
        page.rule(page.y + top, width=width)
    _draw(page, rows, high)
    page.y += len(rows) * high
    return asked


def sideways(page: Page, words: Words) -> Asked:
    """A column for each thing, and a row for what is said of it."""
    title, rows, asked = _table(words, 4)
    turned = [list(column) for column in zip(*rows, strict=True)]
    high = round(1.6 * page.step)
    page.box(MARGIN, page.y, page.right, page.y + high, fill=page.accent)
    page.write(MARGIN + 8, page.y + page.step * 0.25, title, page.right - MARGIN - 16, bold=True, ink=(255, 255, 255))
    page.y += high
    page.box(MARGIN, page.y, MARGIN + (page.right - MARGIN) / len(turned[0]), page.y + len(turned) * high,
             fill=page.tint(0.25))  # fmt: skip
    _draw(page, turned, high, bold_column=True, lead=1)
    page.box(MARGIN, page.y, page.right, page.y + len(turned) * high, outline=page.accent, width=2)
    page.y += len(turned) * high
    return asked


def cards(page: Page, words: Words) -> Asked:
    """A frame for each thing, with its name and below it what is said of it."""
    title, rows, asked = _table(words, 4)
    (_what, *columns), *things = rows
    page.put(title, scale=1.2, bold=True, skip=1.3)
    wide, high = (page.right - MARGIN - 12) / 2, round(4.6 * page.step)
    for number, (name, *cells) in enumerate(things):
        left, top = MARGIN + number % 2 * (wide + 12), page.y + number // 2 * (high + 10)
        page.box(left, top, left + wide, top + high, outline=page.accent)
        page.write(left + 10, top + 4, name, wide - 20, bold=True, ink=page.accent)
        for line, (column, cell) in enumerate(zip(columns, cells, strict=True), start=1):
            page.write(left + 10, top + 6 + line * page.step, column, wide / 2 - 12)
            page.write(left + wide - 10, top + 6 + line * page.step, cell, wide / 2 - 12, align="r")
    page.y += (len(things) + 1) // 2 * (high + 10)
    return asked


TABLES = {
    "table": {
        "train": {"grid": (grid, 480), "striped": (striped, 460), "ruled": (ruled, 440)},
        "test": {"sideways": (sideways, 500), "cards": (cards, 460)},
    }
}
