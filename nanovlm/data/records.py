"""A raw record, as datasets publish them -> Sample: checked, its images decoded.

A raw record is a dict in one of the forms of layouts.py, such as

    {"images": [...], "texts": [{"user": str, "assistant": str}, ...], "independent": bool}
    {"images": [...], "messages": [{"role": str, "content": str | [{"type": "text", "text": str}, {"type": "image"}]}]}

Its images are encoded files (bytes), PIL images, or what pictures.py fetches; a text-only sample has none. In their
place it may have a `video`, an encoded file, or `videos`: frames of each are its images (video.py). What a task needs
of the same record, all right answers and the options of a multiple choice, are `references` and `choices`.
"""

import itertools
import re
from collections.abc import Callable
from typing import Any

from PIL import Image

from nanovlm.config import DataConfig, VideoConfig, pick
from nanovlm.data.columns import parse_fields, rename
from nanovlm.data.images import decode_image, to_rgb
from nanovlm.data.layouts import LAYOUTS, Conversation, known_keys, read_layout, recognise
from nanovlm.data.pictures import (
    MARKER,
    Record,
    Video,
    carried_picture,
    fetch,
    find_pictures,
    kind_of,
    refuse_unread,
)
from nanovlm.data.types import Filtered, Sample
from nanovlm.data.video import Clip, decode_video
from nanovlm.errors import UserError

# FineVision's ratings of each turn, from 1 (bad) to 5: columns parallel to `texts`.
RATINGS = ("relevance_ratings", "visual_dependency_ratings", "image_correspondence_ratings", "formatting_ratings")


def options_of(config: DataConfig) -> dict:
    """Return the keyword arguments of the functions below that a config sets. Raises UserError for unknown names."""
    if config.layout:
        pick(LAYOUTS, config.layout, "data.layout")
    least = dict(zip(RATINGS, config.min_ratings, strict=True))
    return {"min_ratings": least, "layout": config.layout, "fields": parse_fields(config.fields)}


def to_sample(
    raw: dict,
    min_ratings: dict[str, int] | None = None,
    layout: str = "",
    fields: dict | None = None,
    video: VideoConfig | None = None,
    decode: Callable[[Any, int], Any] | None = None,
) -> Sample:
    """Check a raw record and decode its images, or the frames of its videos that `video` chooses.

    `decode` makes of an image, or a video that is not decoded, and its number, what the sample has in its place.
    Raises UserError for anything malformed, Filtered as `check` does.
    """
    raw, conversation = read_raw(raw, min_ratings, layout, fields)
    images, messages, independent = _check(raw, conversation)
    rejected = None if conversation.rejected is None else read_rejected(conversation.rejected)
    if decode is None and any(isinstance(image, Video) for image in images):
        images, messages = _show_frames(images, messages, video or VideoConfig())
    images = [(decode or to_image)(image, i) for i, image in enumerate(images)]
    return Sample(images, messages, independent, rejected, conversation.ref_logprobs)


def check(
    raw: dict, min_ratings: dict[str, int] | None = None, layout: str = "", fields: dict | None = None
) -> tuple[list, list[dict], bool]:
    """Return the images of a record, not decoded yet, its messages, and whether they are independent.

    `layout` is a key of LAYOUTS, empty to recognise it; `fields` is what `parse_fields` returns. Images that nothing
    places stand at the beginning of the first user turn, or of every one with `independent`. Turns of `texts` that are
    rated below `min_ratings` are dropped. Raises UserError for anything malformed, Filtered where no turn is left.
    """
    return _check(*read_raw(raw, min_ratings, layout, fields))


def _check(raw: dict, conversation: Conversation) -> tuple[list, list[dict], bool]:
    independent = raw.get("independent")
    if not isinstance(independent, bool | None):
        raise UserError(f"independent must be true or false, not {kind_of(independent)}")
    if not isinstance(conversation.messages, list):
        raise UserError(f"messages must be a list, not {kind_of(conversation.messages)}")
    pictures = find_pictures(raw)
    told = conversation.messages
    if any(isinstance(picture, Video) for picture in pictures):
        told = list(map(_mark_videos, told))
    messages = [_read_message(message, f"message {number}") for number, message in enumerate(told)]
    _check_roles([message["role"] for message in messages], independent)
    read = raw.read if isinstance(raw, Record) else None
    images = [fetch(image, read) for image in _place(messages, pictures, bool(independent))]
    if not any(_text(message).strip() for message in messages if message["role"] in ("assistant", "text")):
        raise UserError(f"{'the text' if messages[0]['role'] == 'text' else 'every answer'} of the record is empty")
    return images, messages, bool(independent)


def references(
    raw: dict, min_ratings: dict[str, int] | None = None, layout: str = "", fields: dict | None = None
) -> list[tuple[str, ...]]:
    """Return all that is right for each answer of the sample, in their order; what is trained is the first."""
    _raw, conversation = read_raw(raw, min_ratings, layout, fields)
    if conversation.references:
        return conversation.references
    messages = [_read_message(message, f"message {number}") for number, message in enumerate(conversation.messages)]
    return [(_text(message).strip(),) for message in messages if message["role"] == "assistant"]


def choices(
    raw: dict, min_ratings: dict[str, int] | None = None, layout: str = "", fields: dict | None = None
) -> tuple[str, ...]:
    """Return the options of a multiple choice in the order of their letters, none for another record."""
    return read_raw(raw, min_ratings, layout, fields)[1].options


def is_pair(raw: dict, min_ratings: dict[str, int] | None = None, layout: str = "", fields: dict | None = None) -> bool:
    """Tell whether a record has an answer that is worse than its last message."""
    return read_raw(raw, min_ratings, layout, fields)[1].rejected is not None


def turns_of_texts(
    raw: dict, min_ratings: dict[str, int] | None = None, layout: str = "", fields: dict | None = None
) -> list[dict]:
    """Return the turns of a record of the layout texts that are rated well enough, none for another record."""
    raw, _conversation = read_raw(raw, min_ratings, layout, fields)
    return raw["texts"] if (layout or recognise(raw)) == "texts" else []


def read_raw(
    raw: dict, min_ratings: dict[str, int] | None = None, layout: str = "", fields: dict | None = None
) -> tuple[dict, Conversation]:
    """Return a record with the names of `fields`, without turns rated too low, and what its layout makes of it."""
    if not isinstance(raw, dict):
        raise UserError(f"a record must be a dict, not {kind_of(raw)}")
    raw = rename(raw, fields or {})
    layout = layout or recognise(raw)
    refuse_unread(raw, {"independent", *RATINGS, *known_keys(layout)})
    if layout == "texts" and min_ratings:
        raw = _drop_low(raw, min_ratings)
    return raw, read_layout(raw, layout)


def _place(messages: list[dict], images: list, independent: bool) -> list:
    """Put the images of a record where parts, markers or nothing places them; return them in the order shown."""
    shown = [part for message in messages for part in content_parts(message["content"]) if part["type"] == "image"]
    carried = [part["image"] for part in shown if "image" in part]
    marked = [part for part in shown if "marker" in part]
    numbers = [part.get("number", 0) for part in shown]
    if carried:
        if images or independent or len(carried) != len(shown):
            raise UserError("image parts that carry their image must all do so, without images or independent beside")
        images = carried
    if marked and len(marked) != len(shown):
        raise UserError("the text has the marker <image>, and image parts are beside it: keep one of the two")
    if marked and not images:
        raise UserError(
            f"the text shows <image> {len(marked)} times, and the record has no picture: name its field, as in "
            "--data.fields image=..., or write the word in another way"
        )
    if any("marker" in part for m in messages if m["role"] == "assistant" for part in content_parts(m["content"])):
        raise UserError("an answer has the marker <image>, and answers show no pictures: move it into the question")
    if images and not shown:
        asked = [message for message in messages if message["role"] in ("user", "text")]
        for message in asked if independent else asked[:1]:
            message["content"] = [{"type": "image"} for _ in images] + content_parts(message["content"])
    elif independent:
        for number, message in enumerate(messages):
            if _num_images(message) != (len(images) if message["role"] == "user" else 0):
                raise UserError(f"message {number} shows {_num_images(message)} images, the record has {len(images)}")
        if any(numbers) and numbers != [*range(1, len(images) + 1)] * (len(messages) // 2):
            raise UserError(f"independent questions must show the pictures in one order, not {numbers[:20]}")
    elif any(numbers):
        if not all(numbers) or {*numbers} != {*range(1, len(images) + 1)}:
            raise UserError(f"the text shows the pictures {numbers[:20]} (0 is none), the record has {len(images)}")
        images = [images[number - 1] for number in numbers]
    elif len(shown) != len(images):
        raise UserError(f"the messages show {len(shown)} images, the record has {len(images)}")
    for part in shown:
        for key in ("image", "marker", "number"):
            part.pop(key, None)
    return images


def to_image(image, number: int) -> Image.Image:
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


def _mark_videos(message):
    """Write where a message shows a video, <video> or a part of that type, as it would show a picture."""
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str):
        return {**message, "content": content.replace("<video>", "<image>")}
    if not isinstance(content, list):
        return message
    parts = [{"type": "image"} if part == {"type": "video"} else part for part in content]
    return {**message, "content": parts}


def _show_frames(videos: list, messages: list[dict], config: VideoConfig) -> tuple[list[Image.Image], list[dict]]:
    """Decode the videos of a record; return their frames, and messages that show them in the places of the videos."""
    clips = [_to_clip(video.source, f"video {i}", config) for i, video in enumerate(videos)]
    shown, following = [], itertools.cycle(clips)  # independent questions show all of them each
    for message in messages:
        content = content_parts(message["content"])
        parts = [next(following).part() if part["type"] == "image" else part for part in content]
        shown.append({**message, "content": parts})
    return [image for clip in clips for image in clip.images], shown


def _to_clip(video, name: str, config: VideoConfig) -> Clip:
    if isinstance(video, Clip):
        return video
    if not isinstance(video, bytes):
        found = f"only the name {video!r}" if isinstance(video, str) else kind_of(video)
        raise UserError(f"{name} must be an encoded file (bytes), not {found}")
    return decode_video(video, name, config)


def _drop_low(raw: dict, min_ratings: dict[str, int]) -> dict:
    """Return a record of `texts` without the turns that are not rated well enough."""
    texts = raw["texts"]
    if not isinstance(texts, list) or not all(isinstance(turn, dict) for turn in texts):
        return raw  # its layout says what is wrong
    low = set()
    for name, lowest in min_ratings.items():
        if name not in RATINGS:
            raise UserError(f"unknown rating {name!r}; there are {', '.join(RATINGS)}")
        ratings = [turn.get(name) for turn in texts] if raw.get(name) is None else raw[name]
        is_list = isinstance(ratings, list) and len(ratings) == len(texts)
        if not is_list or not all(isinstance(rating, int | float | None) for rating in ratings):
            raise UserError(f"{name} must be a list of one number for each of {len(texts)} turns")
        low |= {number for number, rating in enumerate(ratings) if rating is not None and rating < lowest}
    if texts and len(low) == len(texts):
        raise Filtered(f"all {len(texts)} turns are rated below the minimum")
    columns = ("texts", *(name for name in RATINGS if isinstance(raw.get(name), list)))
    kept = raw | {key: [x for number, x in enumerate(raw[key]) if number not in low] for key in columns}
    return Record(kept, raw.read) if isinstance(raw, Record) else kept


def _read_message(message, where: str) -> dict:
    """Check one message and bring its parts to their plain form.

    An image part keeps the `image` that it carries or the `number` by which it shows one of the record; one that takes
    the place of a marker says so.
    """
    if not isinstance(message, dict):
        raise UserError(f"{where} must be a dict with role and content, not {kind_of(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant", "text"):
        raise UserError(f"{where} must have the role system, user or assistant, not {str(role)[:40]!r}")
    if isinstance(content, str):
        _check_text(content, where)
        parts = _split_markers(content)
        return {"role": role, "content": content if parts == content_parts(content) else parts}
    if not isinstance(content, list):
        raise UserError(f"the content of {where} must be a string or a list of parts, not {kind_of(content)}")
    parts = []
    for part in content:
        kind = (part.get("type") or ("text" if "text" in part else "image")) if isinstance(part, dict) else None
        picture = carried_picture(part) if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str) and picture is None:
            _check_text(part["text"], where)
            parts += _split_markers(part["text"])
        elif kind == "image" and part.get("type") == "image" and picture is None:
            index = part.get("index")
            parts.append({"type": "image"} | ({"number": index + 1} if isinstance(index, int) else {}))
        elif kind in ("image", "image_url") and picture is not None:
            parts.append({"type": "image", "image": picture})
        else:
            raise UserError(
                f"each part of {where} must be a text part with a string text or an image part, not {_describe(part)}"
            )
    return {"role": role, "content": parts}


def read_rejected(message: dict) -> dict:
    message = _read_message(message, "the rejected answer")
    if _num_images(message):
        raise UserError("the rejected answer shows a picture or has the marker <image>: move it into the prompt")
    return message


def _describe(part) -> str:
    if not isinstance(part, dict):
        return kind_of(part)
    has_both = "text" in part and carried_picture(part) is not None
    return "one with text and a picture" if has_both else f"a part of type {str(part.get('type'))[:40]}"


def _split_markers(text: str) -> list[dict]:
    """Return a text as parts, with an image part in the place of each marker."""
    parts, end = [], 0
    for marker in MARKER.finditer(text):
        parts += [{"type": "text", "text": text[end : marker.start()]}] if marker.start() > end else []
        parts.append({"type": "image", "marker": True, "number": int(marker[1] or marker[2] or 0)})
        end = marker.end()
    return parts + ([{"type": "text", "text": text[end:]}] if end < len(text) or not parts else [])


def _check_text(text: str, where: str):
    if re.search("[\ud800-\udfff]", text):
        raise UserError(f"the text of {where} has half a surrogate pair, which is not valid Unicode")


def _check_roles(roles: list[str], independent: bool | None):
    if roles == ["text"] and not independent:
        return
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
