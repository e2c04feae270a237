"""Drawn documents: readable, truthful, the same each time, and without leaks between splits."""

import hashlib
import itertools
import json
import re
from random import Random

import numpy as np
import pytest
from matplotlib.figure import Figure

from nanovlm.data.documents import charts, texts
from nanovlm.data.documents.draw import KINDS, ON_PAPER, SPLITS, TEMPLATES, Documents, compose, draw
from nanovlm.data.documents.fonts import CHARACTERS, load_font, own_families
from nanovlm.data.documents.page import LEAST, SIDE, Page
from nanovlm.data.documents.words import LISTS, Words, words_of
from nanovlm.data.records import to_sample
from nanovlm.data.sources import open_source
from nanovlm.errors import UserError
from nanovlm.eval.tasks import DOCUMENT_METRICS, open_task

HAS_PHOTOGRAPHS = texts.photographs() is not None
DRAWABLE = tuple(kind for kind in TEMPLATES if kind != "sign" or HAS_PHOTOGRAPHS)
NUM = 6  # pictures of a kind and split


@pytest.fixture(scope="module")
def drawn():
    """Some pictures of every kind, by kind and split."""
    return {
        (kind, split): [compose(split, i, (kind,)) for i in range(NUM)]
        for kind, split in itertools.product(DRAWABLE, SPLITS)
    }


@pytest.fixture(scope="module")
def records():
    """Records of each split, in which every kind is twice."""
    return {split: [draw(split, i) for i in range(2 * len(KINDS))] for split in SPLITS}


@pytest.mark.parametrize(("split", "expected"), [("train", "89b0f29bcbca8bd2"), ("test", "ccbd9404ea8c9087")])
def test_a_document_says_the_same_on_any_machine(records, split, expected):
    """Kinds, templates, fonts and texts follow from the index alone; pixels from the versions of packages, too."""
    said = [{key: value for key, value in record.items() if key != "images"} for record in records[split]]
    assert hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16] == expected
    for i in (0, KINDS.index("chart"), KINDS.index("formula")):
        assert draw(split, i)["images"][0].tobytes() == records[split][i]["images"][0].tobytes()


def find_faults(drawing):
    """Yield what a reader would trip over: texts that are cut off, cover each other, or are hardly to be seen."""
    image = np.asarray(drawing.image.convert("L"), dtype=int)
    high, wide = image.shape
    if max(high, wide) > SIDE:
        yield f"{wide} x {high} pixels"
    for (left, top, right, bottom), text in drawing.texts:
        if left < 1 or top < 1 or right > wide - 1 or bottom > high - 1:
            yield f"{text!r} is cut off at {left:.0f} {top:.0f} {right:.0f} {bottom:.0f} of {wide} x {high}"
        inside = image[max(int(top), 0) : int(bottom) + 1, max(int(left), 0) : int(right) + 1]
        if inside.size and np.ptp(inside) < 75:
            yield f"{text!r} has a contrast of {np.ptp(inside)}"
    for (a, one), (b, other) in itertools.combinations(drawing.texts, 2):
        if min(a[2], b[2]) - max(a[0], b[0]) > 1 and min(a[3], b[3]) - max(a[1], b[1]) > 1:
            yield f"{one!r} and {other!r} overlap"


def test_texts_are_whole_and_apart(drawn):
    for place, drawings in drawn.items():
        for number, drawing in enumerate(drawings):
            assert drawing.texts and not list(find_faults(drawing)), (place, number, drawing.template, drawing.font)


def test_what_is_looked_for_above_is_found():
    """A text that leaves the page, one over another and one in the colour of the paper are faults."""
    drawing = compose("train", 0, ("letter",))
    (box, text), *rest = drawing.texts
    drawing.texts = [((box[0], box[1], 700, box[3]), text), *rest]
    assert "is cut off" in next(find_faults(drawing))
    drawing.texts = [(box, text), ((box[0] + 3, box[1] + 3, box[2], box[3]), "twice")]
    assert "overlap" in next(find_faults(drawing))
    drawing.texts = [((2, 2, 12, 12), "paper")]
    assert "contrast" in next(find_faults(drawing))


def test_letters_keep_their_least_size():
    """The longest text that a page takes is set in 12 pixels; one that is longer is a mistake in a template."""
    page = Page(Random(0), own_families()["train"][0], size=16)
    font = load_font(page.family.regular, LEAST)
    box = page.write(20, 20, "a long line of text", font.getlength("a long line of text"))
    assert box[2] - box[0] == pytest.approx(font.getlength("a long line of text"), abs=2)
    with pytest.raises(UserError, match=r"needs .* pixels in .*, and has 60"):
        page.write(20, 60, "a long line of text", 60)


# --- splits -----------------------------------------------------------------------------------------------------------


def test_no_template_of_the_tests_is_in_training(drawn):
    for kind in TEMPLATES:
        train, test = (TEMPLATES[kind][split] for split in SPLITS)
        assert train and test and not train.keys() & test.keys()
        assert not {*train.values()} & {*test.values()}
    for kind in DRAWABLE:
        seen = {split: {drawing.template for drawing in drawn[kind, split]} for split in SPLITS}
        assert all(seen[split] <= TEMPLATES[kind][split].keys() for split in SPLITS)


def test_no_font_of_the_tests_is_in_training(drawn):
    def files(split):
        fonts = [font for family in own_families()[split] for font in (family.regular, family.bold)]
        return {font if isinstance(font, bytes) else font.read_bytes() for font in fonts}

    assert files("train") and files("test") and not files("train") & files("test")
    assert not {f.math for f in own_families()["train"] if f.math} & {f.math for f in own_families()["test"]}
    seen = {split: {d.font for kind in DRAWABLE for d in drawn[kind, split]} for split in SPLITS}
    assert len(seen["train"]) > 3 and len(seen["test"]) > 1 and not seen["train"] & seen["test"]
    for kind in DRAWABLE:
        assert len({d.font for d in drawn[kind, "test"]}) == 2, kind


def test_no_question_has_two_answers():
    """What is asked of a document is asked of all of it, whatever part a reader looks at first."""
    for (kind, _), split, seed in itertools.product(ON_PAPER.items(), SPLITS, range(3)):
        for template, (write, width) in ON_PAPER[kind][split].items() if kind != "sign" else ():
            rng = Random(seed)
            asked = write(Page(rng, own_families()[split][0], width), Words(rng, split))
            answers = {}
            for _kind, question, answer in asked:
                assert answers.setdefault(question, answer) == answer, (kind, template, question)


def test_no_word_and_no_photograph_of_the_tests_is_in_training(drawn):
    for name in LISTS:
        train, test = words_of(name, "train"), words_of(name, "test")
        assert len({*train, *test}) == len(LISTS[name].split()), name
    assert not {*texts.PHOTOGRAPHS["train"]} & {*texts.PHOTOGRAPHS["test"]}
    # Names that are in one list alone, so that no other list may show them.
    everything = [word for name in LISTS for word in LISTS[name].split()]
    held_out = {w for name in ("last", "city", "first") for w in words_of(name, "test") if everything.count(w) == 1}
    shown = {
        split: {
            word for kind in DRAWABLE for d in drawn[kind, split] for _box, text in d.texts for word in text.split()
        }
        for split in SPLITS
    }
    assert len(held_out & shown["test"]) > 5 and not held_out & shown["train"]


def test_every_font_has_the_letters(records):
    from matplotlib.ft2font import FT2Font

    for family in itertools.chain(*own_families().values()):
        for font in (family.regular, family.bold):
            if not isinstance(font, bytes):
                assert not [c for c in CHARACTERS if ord(c) not in FT2Font(str(font)).get_charmap()], family.name
    turns = [turn for split in SPLITS for record in records[split] for turn in record["texts"]]
    written = {letter for turn in turns if turn["kind"] != "formula" for letter in turn["assistant"]}
    assert written - {" "} <= {*CHARACTERS}


# --- answers ----------------------------------------------------------------------------------------------------------


def read_rows(drawing):
    """Put the texts of a picture into rows by their places, each from left to right."""
    rows = []
    for box, text in sorted(drawing.texts, key=lambda item: item[0][3]):
        if rows and box[1] < rows[-1][0][0][3] - 2:
            rows[-1].append((box, text))
        else:
            rows.append([(box, text)])
    return [[text for _box, text in sorted(row)] for row in rows]


def to_number(text):
    return float(re.sub(r"[^0-9.]", "", text))


def answers_of(drawing):
    return {question: answer for _kind, question, answer in drawing.asked}


@pytest.mark.parametrize("kind", ["letter", "form", "receipt", "text", "table"])
def test_answers_are_in_the_picture(drawn, kind):
    """All but numbers of things can be read word for word, perhaps across the lines of a paragraph."""
    for split in SPLITS:
        for drawing in drawn[kind, split]:
            everything = " ".join(text for _box, text in drawing.texts)
            for question, answer in answers_of(drawing).items():
                if re.match("how many (lines|items|persons|cities)", question) is None:
                    assert answer in everything, (question, answer, everything)


def test_lines_of_text_are_counted_and_read(drawn):
    for drawing in drawn["text", "train"] + drawn["text", "test"]:
        lines = [row[0] for row in read_rows(drawing)]
        expected = {
            "what is written in the picture?": " ".join(lines),
            "what is the first word?": lines[0].split()[0],
            "what is the last word of the text?": lines[-1].split()[-1],
            "how many lines are there?": str(len(lines)),
            "which number is written?": re.search(r"\b\d+\b", " ".join(lines))[0],
        }
        for line, number in zip(lines, texts.ORDINALS, strict=False):
            expected[f"what is the {number} line?"] = line
            expected[f"what is the last word of the {number} line?"] = line.split()[-1]
        answers = answers_of(drawing)
        assert not any(answer.isdigit() for question, answer in answers.items() if " word" in question)
        assert answers == {question: expected[question] for question in answers}


def test_values_of_forms_belong_to_their_labels(drawn):
    """A value stands to the right of its label, or below it in a frame of the same left edge."""
    for drawing in drawn["form", "train"] + drawn["form", "test"]:
        for question, answer in answers_of(drawing).items():
            if match := re.match("what is written in the field (.*)[?]", question):
                label = match[1].capitalize()
                ((_left, top, right, bottom),) = (box for box, text in drawing.texts if text.rstrip(":") == label)
                ((x, above, _right, below),) = (box for box, text in drawing.texts if text == answer)
                is_beside = x > right and below > top and above < bottom
                assert is_beside or (drawing.template == "boxes" and above > bottom and above < bottom + 25)


def test_letters_say_what_is_answered(drawn):
    seen = set()
    for drawing in drawn["letter", "train"] + drawn["letter", "test"]:
        everything = " ".join(text for _box, text in drawing.texts)
        body = r"amount of (\S+) is due on (.+?)\. Please .* contact in (\w+) is (.+?), who .* day from (\S+) on\."
        amount, due, place, contact, hour = re.search(body, everything).groups()
        name = r"(\w+ \w+)"
        patterns = {
            "to whom is the document addressed?": rf"{name} Reference:|TO: {name}|To {name} Hello",
            "who wrote the document?": rf"Yours sincerely, {name}|FROM: {name}|From {name}",
            "what is the reference?": r"(?:Reference:|REF:|Ref\.) (\S+)",
        }
        known = {
            "what amount is due?": amount,
            "when is the amount due?": due,
            f"who is the contact in {place}?": contact,
            "from what time on can the contact be reached?": hour,
        }
        for question, answer in answers_of(drawing).items():
            if question in patterns:
                assert answer == next(filter(None, re.search(patterns[question], everything).groups()))
            assert known.get(question, answer) == answer
            seen.add(question)
    assert len(seen) > 8


def test_receipts_add_up(drawn):
    for drawing in drawn["receipt", "train"] + drawn["receipt", "test"]:
        rows, answers = read_rows(drawing), answers_of(drawing)
        money = [row for row in rows if row[-1].startswith("$")]
        sums = {row[0].lower(): to_number(row[-1]) for row in money if row[0] in ("Subtotal", "Tax", "TOTAL")}
        items = [row for row in money if row[0] not in ("Subtotal", "Tax", "TOTAL")]
        assert sum(to_number(row[-1]) for row in items) == pytest.approx(sums["subtotal"])
        assert sums["subtotal"] + sums["tax"] == pytest.approx(sums["total"])
        assert to_number(answers.get("what is the total?", str(sums["total"]))) == sums["total"]
        for question, answer in answers.items():
            if match := re.match(r"(?:what is the amount for|how many) (\w+)", question):
                (row,) = [row for row in items if match[1] in " ".join(row).lower()]
                number = re.search(r"\b\d\b", " ".join(row[:-1] if len(row) == 2 else row[:1]))
                assert answer == (row[-1] if "amount" in question else number[0])


def read_table(drawing):
    """Return {name: {column: cell}} from where the texts stand."""
    template, (_title, *rows) = drawing.template, read_rows(drawing)
    if template == "sideways":
        rows = [list(column) for column in zip(*rows, strict=True)]
    if template == "cards":
        table = {}
        for start in range(0, len(rows), 4):
            names, *cells = rows[start : start + 4]
            for i, name in enumerate(names):
                table[name] = {row[2 * i].lower(): row[2 * i + 1] for row in cells}
        return table
    head, *rows = rows
    return {row[0]: dict(zip([name.lower() for name in head[1:]], row[1:], strict=True)) for row in rows}


def test_tables_are_read_rightly(drawn):
    found = set()
    for drawing in drawn["table", "train"] + drawn["table", "test"]:
        table = read_table(drawing)
        for question, answer in answers_of(drawing).items():
            words = question.rstrip("?").split()
            if question.startswith("what is the title"):
                assert answer == read_rows(drawing)[0][0]
            elif match := re.match(r"how many (\w+) does (\w+) have|what is the (\w+) of (\w+)", question):
                column, name = (part for part in match.groups() if part)
                assert table[name][column] == answer
            elif question.endswith("are listed?"):
                assert int(answer) == len(table)
            elif match := re.match(r"which \w+ has the (most|fewest|highest|lowest) (\w+)", question):
                pick = max if match[1] in ("most", "highest") else min
                assert answer == pick(table, key=lambda name: to_number(table[name][match[2]]))
            else:
                column, cell = words[-2:] if words[3] == "the" else words[:-3:-1]
                assert [name for name in table if table[name][column] == cell] == [answer]
            found.add(words[0])
    assert found == {"what", "how", "which"}


def read_chart(axes, template):
    """Return {name: value}, or {(name, year): value}, from what matplotlib was given to draw."""
    ticks = {"columns": axes.get_xticklabels, "grouped": axes.get_xticklabels}.get(template, axes.get_yticklabels)
    names = [label.get_text() for label in ticks()]
    if template == "columns":
        return dict(zip(names, [bar.get_height() for bar in axes.patches], strict=True))
    if template == "bars":
        return dict(zip(names, [bar.get_width() for bar in axes.patches], strict=True))
    if template == "dots":
        return dict(zip(*axes.lines[0].get_data()[::-1], strict=True))
    if template == "lines":
        return {(line.get_label(), x): y for line in axes.lines for x, y in zip(*line.get_data(), strict=True)}
    if template == "grouped":
        bars = {c.get_label(): [bar.get_height() for bar in c] for c in axes.containers}
        return {(n, year): h for year, heights in bars.items() for n, h in zip(names, heights, strict=True)}
    turns = [wedge.theta2 - wedge.theta1 for wedge in axes.patches if hasattr(wedge, "theta1")]
    shown = axes.get_legend().get_texts() if template == "donut" else axes.texts
    names = [text.get_text() for text in shown if "%" not in text.get_text()]
    return {name: round(turn / 3.6) for name, turn in zip(names, turns, strict=True)}


@pytest.mark.parametrize(("split", "template"), [(s, t) for s in SPLITS for t in TEMPLATES["chart"][s]])
def test_charts_show_the_values(split, template):
    for seed in range(4):
        axes = Figure().subplots()
        asked = TEMPLATES["chart"][split][template](axes, Words(Random(seed), split))
        if template in ("columns", "bars"):
            axes.figure.canvas.draw()
        values = read_chart(axes, template)
        assert len({*values.values()}) == len(values) > 2 or template == "grouped"
        for _kind, question, answer in asked:
            said, names = question.rstrip("?"), re.findall(r"[A-Z][A-Za-z]+", question)
            years = re.findall(r"\b(?:19|20)\d\d\b", question)
            if "title" in said:
                assert answer == axes.get_title()
            elif "difference" in said:
                assert to_number(answer) == abs(values[names[0]] - values[names[1]])
            elif said.startswith("how many values"):
                assert int(answer) == sum(value > to_number(said) for value in values.values())
            elif said.startswith("what is the value"):
                assert to_number(answer) == values[(names[0], years[0]) if years else names[0]]
            elif said.startswith("which has the value"):
                assert values[answer] == to_number(said)
            elif said.startswith("when is"):
                of_name = {year: value for (name, year), value in values.items() if name == names[0]}
                assert answer == max(of_name, key=of_name.get)
            else:
                some = {n: v for (n, y), v in values.items() if y == years[0]} if years else values
                assert answer == (min if "lowest" in said else max)(some, key=some.get)


def test_values_without_a_number_stand_on_the_grid_or_half_between():
    for seed in range(20):
        axes = Figure().subplots()
        charts.dots(axes, Words(Random(seed), "test"))
        step = axes.get_xticks()[1]
        assert all(x % (step / 2) == 0 and x < axes.get_xlim()[1] for x in axes.lines[0].get_xdata())


def test_formulas_are_what_is_drawn(drawn):
    """The answer is the text that was set, and the part that is asked about stands in its place."""
    for split in SPLITS:
        for drawing in drawn["formula", split]:
            (latex,) = [text for _box, text in drawing.texts if "=" in text]
            answers = answers_of(drawing)
            assert answers.get("write the formula in LaTeX.", latex) == latex
            assert answers.get("what is left of the equals sign?", latex[0]) == latex.split("=")[0]
            for question, before in (("what is the denominator?", "}{"), ("what is under the root?", r"\sqrt{"),
                                     ("what is the upper limit of the sum?", "=1}^{"),
                                     ("what is the lower limit of the integral?", r"\int_{")):  # fmt: skip
                if question in answers:
                    assert before + answers[question] + "}" in latex


# --- as a source and a task -------------------------------------------------------------------------------------------


def test_a_source_of_all_kinds_or_of_some():
    source = open_source("documents")
    assert len(source) == 1_000_000 and source.name == "documents"
    kinds = [source.read(i)["template"].split("/")[0] for i in range(len(KINDS))]
    assert tuple(kinds) == KINDS and "sign" not in KINDS
    some = open_source("documents:receipt,text", split="test")
    assert [some.read(i)["template"] for i in range(2)] == ["receipt/bill", "text/note"]
    sample = to_sample(some.read(0))
    assert sample.independent and len(sample.messages) == 10 and sample.images[0].mode == "RGB"
    with pytest.raises(UserError, match=r"documents:recipe: unknown kind 'recipe'; there are letter, form, receipt"):
        open_source("documents:recipe")
    with pytest.raises(UserError, match="documents has no split 'compositional'; there are train, test"):
        Documents("compositional")


def test_the_task_scores_each_kind_as_its_benchmark_does():
    pytest.importorskip("anls", reason="needs the extra eval")
    task = open_task("documents", 2 * len(KINDS))
    questions = list(task.questions())
    assert {question.kind for question in questions} == DOCUMENT_METRICS.keys()
    assert all(task.score(q, q.truth) == {"score": 1.0, "exact": 1.0} for q in questions)
    assert all(task.score(q, "nothing of it") == {"score": 0.0, "exact": 0.0} for q in questions)
    (number, *_) = [q for q in questions if q.kind == "chart" and q.truth.isdigit()]
    assert task.score(number, str(float(number.truth) * 1.04)) == {"score": 1.0, "exact": 0.0}
    (name, *_) = [q for q in questions if q.kind == "letter" and len(q.truth) > 8]
    assert task.score(name, name.truth[:-1])["score"] == pytest.approx(1 - 1 / len(name.truth))
    (formula, *_) = [q for q in questions if q.kind == "formula" and len(q.truth) > 8]
    assert task.score(formula, formula.truth[:-1])["score"] == 0.0
