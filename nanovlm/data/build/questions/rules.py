"""What a model wrote -> the reason to drop it, by rules that need no model.

RULES are run in order over an item and the picture that it is about; a reason holds no word of the item. The same rule
for orders reads the words of a record before they are shown to a model.
"""

import re
import unicodedata
from collections.abc import Callable

import numpy as np
from PIL import Image

from nanovlm.data.build.questions.kinds import Item
from nanovlm.data.build.texts import CONTROL, ORDERS
from nanovlm.data.pictures import MARKER

# Stricter than that of the funnel: an answer has no business to begin a tag, either.
MARKUP = re.compile(
    r"<\s*(?:[/!?]\s*)?[a-z][^<>]*(?:>|$)|<!--|&(?:#\w+|[a-z]+);|\b(?:javascript|vbscript)\s*:|\bdata:[a-z]+/|\bon[a-z]+\s*=\s*[\"']",
    re.IGNORECASE,
)
ADDRESS = re.compile(r"\b(?:https?|ftp|file)://|\bwww\.", re.IGNORECASE)
# How to reply is an order, too, where a model is about to.
REPLIES = re.compile(
    r"\b(?:answer|reply|respond|output|say|print|write)\b[^.!?\n]{0,30}\b(?:only|always|exactly|instead|verbatim)\b",
    re.IGNORECASE,
)
REFUSAL = re.compile(
    r"\bas an ai\b|\blanguage model\b|\bi(?:'m| am) (?:sorry|unable|not able)\b|\bi (?:cannot|can't|can not)\b"
    r"|\bcannot (?:be determined|determine|see)\b|\bunable to\b|\bnot (?:visible|possible to)\b",
    re.IGNORECASE,
)
COUNTS = re.compile(r"\bhow many\b|\bnumber of\b|\bcount\b", re.IGNORECASE)
ASKS_COLOUR = re.compile(r"\bwh(?:at|ich) colou?rs?\b|\bcolou?r (?:is|are)\b", re.IGNORECASE)
LETTERS_NAMED = re.compile(
    r"(?i:\b(?:all|none|both|neither|either) of the (?:above|others?|options)\b)|\b[A-D] (?:and|or) [A-D]\b"
)

WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
NUMBERS = {word: number for number, word in enumerate(WORDS)} | {"no": 0, "none": 0}
ARTICLES = frozenset(("a", "an", "the", "is", "are", "it", "its", "there"))
# Hues in degrees, saturations and values in percent that a word may mean, wide: what is outside is another colour.
COLOURS = {
    "red": ((330, 380), (30, 100), (15, 100)),
    "orange": ((8, 50), (35, 100), (35, 100)),
    "brown": ((0, 55), (15, 100), (8, 75)),
    "yellow": ((38, 75), (25, 100), (40, 100)),
    "green": ((65, 175), (12, 100), (8, 100)),
    "blue": ((170, 265), (15, 100), (10, 100)),
    "purple": ((245, 330), (12, 100), (8, 100)),
    "pink": ((290, 380), (8, 90), (45, 100)),
    "black": ((0, 360), (0, 100), (0, 30)),
    "white": ((0, 360), (0, 25), (65, 100)),
    "gray": ((0, 360), (0, 25), (12, 92)),
}
SAME = {"grey": "gray", "violet": "purple", "teal": "green", "cyan": "blue", "turquoise": "blue", "golden": "yellow"}
SAME |= {"gold": "yellow", "silver": "gray", "beige": "brown", "tan": "brown", "magenta": "pink", "navy": "blue"}
# Of the pixels must have a colour that an answer names. Of drawn scenes, 199 of 199 colours of objects have it, and 178
# of 400 that no object has (2026-11-30): so it finds about half of what is wrong, and drops little that is right.
LEAST_SHARE = 0.002
SIDE = 256  # pixels of the longer side of the picture in which colours are counted
LEAST_BOX = 0.01  # width and height of a box


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, numbers as digits, without punctuation and articles."""
    words = re.findall(r"-?\d+(?:[.,]\d+)*|[^\W\d_]+(?:'[^\W\d_]+)?", unicodedata.normalize("NFKC", text).lower())
    words = [str(NUMBERS.get(word, word)) if word not in ("no", "none") else word for word in words]
    return [word for word in words if word not in ARTICLES]


def find_numbers(text: str) -> list[float]:
    """Return the numbers in a text, digits or words."""
    found = []
    for word in re.findall(r"-?\d[\d,]*(?:\.\d+)?|[a-z]+", text.lower()):
        if word in NUMBERS:
            found.append(float(NUMBERS[word]))
        elif word[0] in "-0123456789":
            found.append(float(word.replace(",", "")[:30]))
    return found


def find_colours(text: str) -> set[str]:
    """Return the colours that a text names, by the words of COLOURS."""
    words = {SAME.get(word, word) for word in re.findall(r"[a-z]+", text.lower())}
    return {colour for colour in COLOURS if colour in words}


def share_of(colour: str, image: Image.Image) -> float:
    """Return the share of a picture's pixels that a word for a colour may mean."""
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.NEAREST)
    hue, saturation, value = np.asarray(image.convert("HSV"), float).reshape(-1, 3).T / 255
    hues, saturations, values = COLOURS[colour]
    is_in = [(360 * hue + turn >= hues[0]) & (360 * hue + turn <= hues[1]) for turn in (0, 360)]
    is_in = is_in[0] | is_in[1]
    for found, (least, most) in ((saturation, saturations), (value, values)):
        is_in &= (100 * found >= least) & (100 * found <= most)
    return float(is_in.mean())


# --- the rules: (item, pictures) -> the reason to drop it, or nothing ------------------------------------------


def refuse_control(item: Item, _images: list) -> str:
    for text in item.words:
        if re.search("[\ud800-\udfff]", text) or any(unicodedata.category(c) == "Cc" and c not in "\n\t" for c in text):
            return "it has characters that are no text"
        if CONTROL.search(text):
            return "it spells a control token"
        if MARKER.search(text):
            return "it has the marker of a picture"
    return ""


def refuse_markup(item: Item, _images: list) -> str:
    if any(MARKUP.search(text) for text in item.words):
        return "it has markup"
    return "it has an address" if any(ADDRESS.search(text) for text in item.words) else ""


def refuse_orders(item: Item, _images: list) -> str:
    is_order = any(sign.search(text) for text in item.words for sign in (ORDERS, REPLIES))
    return "it gives orders to who reads it" if is_order else ""


def refuse_refusals(item: Item, _images: list) -> str:
    return "it says that it cannot answer" if any(REFUSAL.search(text) for text in item.words) else ""


def refuse_numbers(item: Item, _images: list) -> str:
    """A question of how many has one whole number for an answer."""
    for question, answer in item.turns:
        if COUNTS.search(question):
            numbers = find_numbers(answer)
            if len(set(numbers)) != 1 or numbers[0] < 0 or numbers[0] % 1:
                return "a count is not one whole number"
    return ""


def refuse_colours(item: Item, images: list) -> str:
    """A question of a colour is answered with one, and each colour of the answer is in a picture."""
    for question, answer in item.turns:
        if ASKS_COLOUR.search(question):
            colours = find_colours(answer)
            if not colours:
                return "a question of a colour is answered without one"
            if images and any(all(share_of(x, image) < LEAST_SHARE for image in images) for x in colours):
                return "it names a colour that the picture does not have"
    return ""


def refuse_boxes(item: Item, images: list) -> str:
    """A box is in the picture and has an area."""
    if not item.box:
        return ""
    left, top, right, bottom = item.box
    if not all(0 <= x <= 1 for x in item.box):
        return "a box is not inside the picture"
    if right - left < LEAST_BOX or bottom - top < LEAST_BOX:
        return "a box has no area"
    return "" if len(images) == 1 else "a box is of one of several pictures"


def refuse_options(item: Item, _images: list) -> str:
    """Options differ and say nothing of each other's letters, as they are put in another order."""
    if any(LETTERS_NAMED.search(option) for option in item.options):
        return "an option speaks of other options"
    if len({" ".join(words_of(option)) for option in item.options}) < len(item.options):
        return "two options are the same"
    return ""


def refuse_answers_in_questions(item: Item, _images: list) -> str:
    """A question does not hold its answer, but for one that offers several."""
    for question, answer in item.turns:
        asked, said = words_of(question), words_of(answer)
        if not said:
            return "an answer has no words"
        holds = any(asked[i : i + len(said)] == said for i in range(len(asked)))
        if holds and not item.box and "or" not in asked and said not in (["yes"], ["no"]):
            return "a question holds its answer"
    return ""


RULES: dict[str, Callable[[Item, list], str]] = {
    "control": refuse_control,
    "markup": refuse_markup,
    "orders": refuse_orders,
    "refusals": refuse_refusals,
    "numbers": refuse_numbers,
    "colours": refuse_colours,
    "boxes": refuse_boxes,
    "options": refuse_options,
    "answers": refuse_answers_in_questions,
}
