"""Show documents to people: one as marked text and as tiles, many as lengths and as packed rows."""

import itertools
import math
import re

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nanovlm.data.chat import Processor
from nanovlm.data.images import marker_tokens
from nanovlm.data.types import IGNORE, Document

STYLES = {"trained": "\33[30;42m", "image": "\33[36m", "special": "\33[2m", "text": ""}
WIDTH, MARGIN = 1000, 20  # of a picture, in pixels
MOST_TILES, MOST_ROWS, MOST_COLUMNS = 64, 32, 12  # shown at most
COLORS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#edc948", "#b07aa1", "#ff9da7", "#9c755f")


# --- as text ---------------------------------------------------------------------------------------------


def render(document: Document, processor: Processor, with_tokens: bool = False, in_color: bool = False) -> str:
    """Write a document as text, each branch under a title, with the trained tokens marked."""
    trained = [False, *(label != IGNORE for label in document.labels.tolist()[:-1])]  # a label is the next token
    tokens = zip(document.input_ids.tolist(), trained, document.branch_ids.tolist(), strict=True)
    lines = []
    for branch, members in itertools.groupby(tokens, lambda token: token[2]):
        members = list(members)
        if document.branch_ids.max() > 0:
            counts = f"{len(members)} tokens, {sum(is_trained for _, is_trained, _ in members)} trained"
            lines.append(f"--- {f'branch {branch}' if branch else 'prefix'}: {counts}")
        lines.append(_render_tokens(members, processor, with_tokens, in_color))
    return "\n".join(lines)


def _render_tokens(tokens, processor, with_tokens, in_color):
    image, special = processor.config.image_token_id, set(processor.special.values())

    def find_kind(token):
        i, is_trained, _branch = token
        return "trained" if is_trained else "image" if i == image else "special" if i in special else "text"

    text, starts_line = "", False
    for kind, members in itertools.groupby(tokens, find_kind):
        ids = [i for i, _trained, _branch in members]
        if kind == "image":
            shown = f"{processor.tokenizer.id_to_token(image)}x{len(ids)}"
        else:
            pieces = _split_tokens(ids, processor) if with_tokens else [_decode_apart(ids, processor)]
            shown = "│".join(map(show_text, pieces))
            starts_line = starts_line or (kind == "special" and "_col_1>" in shown)  # a row of tiles
        plain = shown
        if in_color and STYLES[kind]:
            shown = "\n".join(f"{STYLES[kind]}{line}\33[0m" if line else "" for line in shown.split("\n"))
        elif kind == "trained":
            shown = f"⟦{shown}⟧"
        is_whole = not text or text.endswith("\n") or plain.startswith("↵")
        text += ("│" if with_tokens and text else "") + ("\n" if starts_line and not is_whole else "") + shown
        starts_line = ids[-1] == processor.config.eos_token_id  # the next turn
    return text


def _decode(ids, processor):
    """Return the text of tokens as it is in the middle of a text, where decoders keep the first space."""
    end = processor.config.eos_token_id
    return processor.tokenizer.decode([end, *ids], skip_special_tokens=False).removeprefix(
        processor.tokenizer.decode([end], skip_special_tokens=False)
    )


def _decode_apart(ids, processor):
    """Return the text of tokens with a backslash before what only looks like a special token.

    Backslashes of the text before any special token are doubled.
    """
    special, text = set(processor.special.values()), ""
    for is_special, members in itertools.groupby(ids, special.__contains__):
        piece = _decode(list(members), processor)
        if not is_special:
            piece = re.sub(rf"(\\*)({processor.special_pattern.pattern}|$)", _escape, piece)
        text += piece
    return text


def _escape(found: re.Match) -> str:
    backslashes, written = found[1], found[2]
    return 2 * backslashes + (f"\\{written}" if written else "")


def _split_tokens(ids, processor):
    """Return the text of each token; tokens that form a character only together stay together."""
    pieces, start = [], 0
    for end in range(1, len(ids) + 1):
        piece, after = ids[start:end], ids[end : end + 4]  # a character has at most four bytes
        if _decode(piece, processor) + _decode(after, processor) == _decode(piece + after, processor):
            pieces, start = [*pieces, _decode(piece, processor)], end
    return pieces


def show_text(text: str) -> str:
    """Make newlines visible, and other control characters harmless to a terminal."""
    text = re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)
    return text.replace("\n", "↵\n")


def describe(document: Document) -> str:
    """Count the tokens, trained tokens, tiles and branches of a document."""
    trained, branches = int((document.labels != IGNORE).sum()), int(document.branch_ids.max())
    parts = ((len(document), "token"), (trained, "trained token"), (len(document.tiles), "tile"), (branches, "branch"))
    names = [f"{n} {name}{'' if n == 1 else 'es' if name == 'branch' else 's'}" for n, name in parts]
    return ", ".join(names if branches else names[:3])


# --- as a picture ----------------------------------------------------------------------------------------


def stack(parts: list[Image.Image]) -> Image.Image:
    """Put the parts of a picture below each other."""
    tops = [0, *itertools.accumulate(part.height for part in parts)]
    picture = Image.new("RGB", (WIDTH, tops[-1]))
    for top, part in zip(tops, parts, strict=False):
        picture.paste(part, (0, top))
    return picture


def draw_tiles(document: Document, processor: Processor) -> Image.Image:
    """Lay out the tiles as they lie in their images, each under the marker that precedes it."""
    places = (document.input_ids == processor.config.image_token_id).nonzero().flatten().tolist()
    before = document.input_ids[[max(0, p - 1) for p in places[:: processor.config.num_image_tokens]]].tolist()
    markers = [token if token in marker_tokens(processor.config) else ""
               for token in map(processor.tokenizer.id_to_token, before[:MOST_TILES])]  # fmt: skip
    lines = [[]]
    for number, marker in enumerate(markers):
        if lines[-1] and ("_col_1>" in marker or len(lines[-1]) == MOST_COLUMNS):
            lines.append([])
        lines[-1].append((number, marker))
    side = min(160, (WIDTH - 2 * MARGIN) // max(map(len, lines)) - 8)
    left_out = f", the first {MOST_TILES} of them" if len(before) > MOST_TILES else ""
    sheet, canvas = _sheet(f"tiles of the sample: {describe(document)}{left_out}", (side + 22) * len(lines))
    for row, line in enumerate(lines):
        for column, (number, marker) in enumerate(line):
            x, y = MARGIN + column * (side + 8), 40 + row * (side + 22)
            label = f"{number + 1} {marker.strip('<>')}"
            canvas.text((x, y), label, fill="#555", font=ImageFont.load_default(11 if side > 100 else 9))
            tile = Image.fromarray(document.tiles[number].permute(1, 2, 0).numpy())
            sheet.paste(tile.resize((side, side), Image.Resampling.NEAREST), (x, y + 15))
    return sheet


def histogram(lengths: list[int], most_bins: int = 14) -> list[tuple[int, int, int]]:
    """Count lengths in bins of equal, round width; return each bin's first length, last length and count."""
    widths = (step * 10**power for power in itertools.count() for step in (1, 2, 5))
    low, high = min(lengths), max(lengths)
    width = next(w for w in widths if high // w - low // w < most_bins)
    counts = np.bincount([length // width - low // width for length in lengths])
    start = low // width * width
    return [(start + i * width, start + (i + 1) * width - 1, int(n)) for i, n in enumerate(counts)]


def draw_histogram(lengths: list[int]) -> Image.Image:
    bins, font, height = histogram(lengths, 20), ImageFont.load_default(12), 180
    sheet, canvas = _sheet(f"tokens of {len(lengths)} documents", height + 24)
    step, most = (WIDTH - 2 * MARGIN) / len(bins), max(count for _first, _last, count in bins)
    for number, (first, _last, count) in enumerate(bins):
        x, top = MARGIN + number * step, 40 + height - round((height - 16) * count / most)
        if count:
            canvas.rectangle((x, top, x + step - 3, 40 + height), fill=COLORS[0])
        canvas.text((x + step / 2, top - 2), str(count or ""), fill="#555", font=font, anchor="md")
        canvas.text((x, 44 + height), str(first), fill="black", font=font)
    return sheet


def draw_rows(rows: list[list[int]], lengths: list[int], row_length: int) -> Image.Image:
    shown = rows[:: math.ceil(len(rows) / MOST_ROWS)]
    title = f"packed rows of {row_length} tokens: {len(shown)} of {len(rows)}, a document a color, padding grey"
    sheet, canvas = _sheet(title, 16 * len(shown))
    scale = (WIDTH - 2 * MARGIN) / row_length
    for number, row in enumerate(shown):
        y, ends = 40 + 16 * number, [0, *itertools.accumulate(lengths[i] for i in row)]
        canvas.rectangle((MARGIN, y, WIDTH - MARGIN, y + 12), fill="#ccc")
        for place, (start, end) in enumerate(itertools.pairwise(ends)):
            box = (MARGIN + start * scale, y, max(MARGIN + start * scale, MARGIN + end * scale - 1), y + 12)
            canvas.rectangle(box, fill=COLORS[(place + number) % len(COLORS)])
    return sheet


def _sheet(title, height):
    """Start a part of the picture: a title with `height` pixels of room below it."""
    sheet = Image.new("RGB", (WIDTH, 40 + height + 10), "white")
    canvas = ImageDraw.Draw(sheet)
    canvas.text((MARGIN, 12), title, fill="black", font=ImageFont.load_default(16))
    return sheet, canvas
