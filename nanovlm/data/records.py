"""A raw record, as datasets publish them -> Sample: checked, its images decoded.

A raw record is a dict in one of two forms. Its images are encoded files (bytes) or PIL images; a text-only sample has
none:

    {"images": [...], "texts": [{"user": str, "assistant": str}, ...], "independent": bool}
    {"images": [...], "messages": [{"role": str, "content": str | [{"type": "text", "text": str}, {"type": "image"}]}]}

Without `images`, an `image` (one or a list) stands for them.
"""

import itertools
import re

from PIL import Image

from nanovlm.data.images import decode_image, to_rgb
from nanovlm.data.types import Filtered, Sample
from nanovlm.errors import UserError

# FineVision's ratings of each turn, from 1 (bad) to 5: columns parallel to `texts`.
RATINGS = ("relevance_ratings", "visual_dependency_ratings", "image_correspondence_ratings", "formatting_ratings")


def to_sample(raw: dict, min_ratings: dict[str, int] | None = None) -> Sample:
    """Check a raw record and decode its images. Raises UserError for anything malformed, Filtered as `check` does."""
    images, messages, independent = check(raw, min_ratings)
    return Sample([_to_image(image, i) for i, image in enumerate(images)], messages, independent)


def check(raw: dict, min_ratings: dict[str, int] | None = None) -> tuple[list, list[dict], bool]:
    """Return the images of a record, not decoded yet, its messages, and whether they are independent.

    Images that no image part places stand at the beginning of the first user turn, or of every one with
    `independent`. Turns of `texts` that are rated below `min_ratings` are dropped. Raises UserError for anything
    malformed, Filtered where no turn is left.
    """
    if not isinstance(raw, dict):
        raise UserError(f"a record must be a dict, not {kind_of(raw)}")
    texts, messages, independent = raw.get("texts"), raw.get("messages"), raw.get("independent")
    if (texts is None) == (messages is None):
        keys = ", ".join(map(str, itertools.islice(raw, 10)))
        raise UserError(f"a record needs either texts or messages; this one has the keys: {keys or 'none'}")
    if not isinstance(independent, bool | None):
        raise UserError(f"independent must be true or false, not {kind_of(independent)}")
    pairs = _read_texts(raw, min_ratings or {}) if messages is None else messages
    if not isinstance(pairs, list):
        raise UserError(f"messages must be a list, not {kind_of(pairs)}")
    messages, carried = [], []
    for number, message in enumerate(pairs):
        messages.append(_read_message(message, f"message {number}", carried))
    _check_roles([message["role"] for message in messages], independent)

    images = [] if raw.get("images") is None else raw["images"]
    if is_empty(images) and not is_empty(image := raw.get("image")):
        images = image if isinstance(image, list) else [image]
    if not isinstance(images, list):
        raise UserError(f"images must be a list, not {kind_of(images)}")
    num_parts = sum(_num_images(message) for message in messages)
    if carried:
        if images or independent or len(carried) != num_parts:
            raise UserError("image parts that carry their image must all do so, without images or independent beside")
        images = carried
    if images and num_parts == 0:
        for message in [message for message in messages if message["role"] == "user"][: None if independent else 1]:
            message["content"] = [{"type": "image"} for _ in images] + content_parts(message["content"])
    elif independent:
        for number, message in enumerate(messages):
            if _num_images(message) != (len(images) if message["role"] == "user" else 0):
                raise UserError(f"message {number} shows {_num_images(message)} images, the record has {len(images)}")
    elif num_parts != len(images):
        raise UserError(f"the messages show {num_parts} images, the record has {len(images)}")
    if not any(_text(message).strip() for message in messages if message["role"] == "assistant"):
        raise UserError("every answer of the record is empty")
    return images, messages, bool(independent)


def _to_image(image, number: int) -> Image.Image:
    """Decode one item of `images`."""
    if isinstance(image, bytes):
        return decode_image(image, f"image {number}")
    if isinstance(image, Image.Image):
        try:
            return to_rgb(image)
        except Exception as error:  # PIL reads lazily, so this may be the first read
            raise UserError(f"image {number} cannot be read: {error}") from error
    name = image.get("path") if isinstance(image, dict) else image if isinstance(image, str) else None
    found = f"only the name {name!r}" if isinstance(name, str) else kind_of(image)
    raise UserError(f"image {number} must be an encoded file (bytes) or a PIL image, not {found}")


def _read_texts(raw: dict, min_ratings: dict[str, int]) -> list[dict]:
    """Return the turns of `texts` that are rated well enough, as messages."""
    texts = raw["texts"]
    if not isinstance(texts, list) or not texts:
        raise UserError(f"texts must be a list of at least one turn, not {kind_of(texts)}")
    for number, turn in enumerate(texts):
        for key in ("user", "assistant"):
            if not isinstance(turn, dict) or not isinstance(turn.get(key), str):
                raise UserError(f"turn {number} of texts must be a dict with the strings user and assistant")
    low = set()
    for name, lowest in min_ratings.items():
        if name not in RATINGS:
            raise UserError(f"unknown rating {name!r}; there are {', '.join(RATINGS)}")
        ratings = [turn.get(name) for turn in texts] if raw.get(name) is None else raw[name]
        is_list = isinstance(ratings, list) and len(ratings) == len(texts)
        if not is_list or not all(isinstance(rating, int | float | None) for rating in ratings):
            raise UserError(f"{name} must be a list of one number for each of {len(texts)} turns")
        low |= {number for number, rating in enumerate(ratings) if rating is not None and rating < lowest}
    if len(low) == len(texts):
        raise Filtered(f"all {len(texts)} turns are rated below the minimum")
    pairs = [(turn["user"], turn["assistant"]) for number, turn in enumerate(texts) if number not in low]
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(("user", "assistant"), pair)]  # noqa: B905


def _read_message(message, where: str, carried: list) -> dict:
    """Check one message and bring its parts to their plain form; add images that parts carry to `carried`."""
    if not isinstance(message, dict):
        raise UserError(f"{where} must be a dict with role and content, not {kind_of(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant"):
        raise UserError(f"{where} must have the role system, user or assistant, not {str(role)[:40]!r}")
    if isinstance(content, str):
        _check_text(content, where)
        return {"role": role, "content": content}
    if not isinstance(content, list):
        raise UserError(f"the content of {where} must be a string or a list of parts, not {kind_of(content)}")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            _check_text(part["text"], where)
            parts.append({"type": "text", "text": part["text"]})
        elif kind == "image":
            carried += [part[key] for key in ("bytes", "image", "path") if part.get(key) is not None][:1]
            parts.append({"type": "image"})
        else:
            raise UserError(f"each part of {where} must be a text part with a string text or an image part")
    return {"role": role, "content": parts}


def _check_text(text: str, where: str):
    if re.search("[\ud800-\udfff]", text):
        raise UserError(f"the text of {where} has half a surrogate pair, which is not valid Unicode")


def _check_roles(roles: list[str], independent: bool | None):
    if "assistant" not in roles:
        raise UserError(f"a record needs an assistant turn; its messages are of: {', '.join(roles) or 'nobody'}")
    if independent and roles != ["user", "assistant"] * (len(roles) // 2):
        raise UserError(f"independent questions must be pairs of user and assistant, not {', '.join(roles)}")
    first = roles[0] == "system"
    for number, role in enumerate(roles[first:]):
        if role != ("user", "assistant")[number % 2]:
            raise UserError(f"message {number + first} is of {role}; after an optional system message user and "
                             "assistant must take turns")  # fmt: skip


def content_parts(content: str | list[dict]) -> list[dict]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _num_images(message: dict) -> int:
    return sum(part["type"] == "image" for part in content_parts(message["content"]))


def _text(message: dict) -> str:
    return "".join(part.get("text", "") for part in content_parts(message["content"]))


def is_empty(image) -> bool:
    """Tell whether a value of `image` or `images` says that there is none."""
    return image is None or (isinstance(image, str | list | dict) and not image)


def kind_of(value) -> str:
    return "nothing" if value is None else f"an empty {type(value).__name__}" if value == [] else type(value).__name__
