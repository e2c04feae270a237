"""The pictures of a raw record: under which keys they are, how they are written, and where its text shows them.

A picture is an encoded file (bytes), a PIL image, a file's name, a `data:` URL, base64, or a dict with one of these as
`bytes`, `path` or `url`. It stands where an image part of a message or a marker in the text is, `<image>` or, by its
number, `<image 1>`; else before the first question.
"""

import base64
import binascii
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from nanovlm.errors import UserError

Image.init()
# What is read, of all that PIL knows: formats that people keep pictures in. Among the others are programs that it would
# have Ghostscript run (EPS), and decoders that hardly anyone uses or looks after.
FORMATS = tuple(
    kind
    for kind in ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP")
    if kind in Image.OPEN  # AVIF and WEBP are not in every build
)
# The keys of a record's pictures; the first that is not empty holds all of them.
PICTURE_KEYS = ("images", "image", "file_names", "file_name")
# A line break that only sets the marker apart from the text goes with it.
MARKER = re.compile(r"<image(?:[ _]?(\d{1,3}))?>\n?|\n<image(?:[ _]?(\d{1,3}))?>$")
SUFFIX = re.compile(r"\.(png|jpe?g|jfif|webp|gif|bmp|tiff?|ppm|pgm|avif|heic|jp2|ico)([?#].*)?$", re.IGNORECASE)
# Keys that name a picture whatever they hold.
NAMES = re.compile(r"(the_)?(imgs?|images?|pics?|pictures?|photos?)([ _-]?(ids?|paths?|files?|urls?|names?|\d))*")
BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")  # how the base64 of PNG, JPEG, GIF and WebP begins
# How files begin, and their kinds.
KINDS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp"}
KINDS |= {b"II*\0": "tiff", b"MM\0*": "tiff"}
VIDEO_KEYS = ("videos", "video")
OTHER_MEDIA = ("audio", "audios")


@dataclass(frozen=True)
class Video:
    """A video among the pictures of a record: an encoded file, whatever `fetch` makes one of, or a Clip (video.py)."""

    source: Any

    def tobytes(self) -> bytes:
        """Return what tells it from others: its file, or the pixels of its frames."""
        return self.source if isinstance(self.source, bytes) else b"".join(x.tobytes() for x in self.source.images)


class Record(dict):
    """A raw record with a function that reads a file which it names."""

    def __init__(self, values: dict, read: Callable[[str], Any]):
        super().__init__(values)
        self.read = read


def kind_of(value) -> str:
    return "nothing" if value is None else f"an empty {type(value).__name__}" if value == [] else type(value).__name__


def is_empty(image) -> bool:
    """Tell whether a value of `image` or `images` says that there is none."""
    return image is None or (isinstance(image, str | list | dict) and not image)


def list_keys(raw: dict) -> str:
    """Name the first keys of a record."""
    return ", ".join(str(key)[:40] for key in list(raw)[:10]) or "none"


def find_pictures(raw: dict) -> list:
    """Return the pictures or videos of a record that are beside its text, not fetched yet.

    Raises UserError for a record of both, and for other media.
    """
    for key in OTHER_MEDIA:
        if not is_empty(raw.get(key)):
            raise UserError(f"{key} is not empty, and sound is not read: leave it out")
    pictures = _find_values(raw, PICTURE_KEYS)
    if (videos := _find_values(raw, VIDEO_KEYS)) and pictures:
        raise UserError("the record has pictures and videos: give a picture as a video of one frame, or leave it out")
    return pictures or [Video(video) for video in videos]


def _find_values(raw: dict, keys: tuple[str, ...]) -> list:
    for key in keys:
        if not is_empty(pictures := raw.get(key)):
            if key in ("images", "file_names", "videos") and not isinstance(pictures, list):
                raise UserError(f"{key} must be a list, not {kind_of(pictures)}")
            return pictures if isinstance(pictures, list) else [pictures]
    return []


def refuse_unread(raw: dict, known: set[str]):
    """Raise UserError that names a key which seems to hold a picture that the sample would lack."""
    has_pictures = bool(find_pictures(raw)) or any(map(_carries_pictures, raw.values()))
    for key, value in raw.items():
        if key in known or key in PICTURE_KEYS or key in VIDEO_KEYS:
            continue
        if re.fullmatch(r"image[ _]?\d+", str(key).lower()) if has_pictures else _seems_picture(key, value):
            key = str(key)[:40]
            raise UserError(
                f"the field {key!r} seems to hold a picture, which the sample would not show: name it, as in "
                f"--data.fields {'images=image_1,image_2' if has_pictures else f'image={key}'}, or leave it out"
            )


def refuse_in_turn(turn: dict, known: tuple[str, ...]):
    """Raise UserError that names a key of one turn of a conversation which seems to hold a picture."""
    for key, value in turn.items():
        if key not in known and _seems_picture(key, value):
            raise UserError(
                f"the field {str(key)[:40]!r} of a turn seems to hold a picture: put it into the images of the record, "
                "and <image> where it stands"
            )


def _seems_picture(key, value) -> bool:
    if is_empty(value) or value is False:
        return False
    return NAMES.fullmatch(str(key).lower()) is not None or any(
        map(_is_picture, value if isinstance(value, list) else [value])
    )


def _carries_pictures(value) -> bool:
    """Tell whether a field holds messages with parts that carry pictures."""
    messages = [message for message in value if isinstance(message, dict)] if isinstance(value, list) else []
    contents = [parts for message in messages if isinstance(parts := message.get("content"), list)]
    return any(carried_picture(part) is not None for parts in contents for part in parts if isinstance(part, dict))


def _is_picture(value) -> bool:
    """Tell whether a value of any kind looks like a picture or the name of one, or has a field that does."""
    if isinstance(value, dict):
        return any(_is_picture(inner) for inner in value.values() if not isinstance(inner, dict))
    if isinstance(value, bytes):
        return value.startswith(tuple(KINDS))
    if not isinstance(value, str):
        return isinstance(value, Image.Image)
    is_name = len(value) < 1000 and "\n" not in value and SUFFIX.search(value) is not None
    return is_name or value[:11].lower() == "data:image/" or _is_base64(value)


def _is_base64(text: str) -> bool:
    return len(text) > 60 and text.startswith(BASE64) and re.fullmatch(r"[\w+/-]+={0,2}", text[:200]) is not None


def fetch(picture, read: Callable[[str], Any] | None):
    """Return the bytes of a picture that is a name, a URL or a dict; without `read`, a name stays a name.

    What is no picture comes back as it is. Raises UserError for a `data:` URL that is damaged.
    """
    if isinstance(picture, Video):
        return Video(fetch(picture.source, read))
    if isinstance(picture, dict):
        found = [picture[key] for key in ("bytes", "path", "url") if picture.get(key) is not None]
        picture = found[0] if found else picture
    if not isinstance(picture, str):
        return picture
    if picture[:5].lower() == "data:":
        head, comma, data = picture.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise UserError(f"a data: URL must be data:image/...;base64,... and not {picture[:40]!r}")
    elif _is_base64(picture):
        data = picture
    else:
        return picture if read is None else read(picture)
    try:
        return base64.b64decode("".join(data.split()), validate=True)  # some wrap its lines
    except (binascii.Error, ValueError) as error:
        raise UserError(f"the base64 of a picture that begins with {picture[:40]!r} is damaged: {error}") from error


def to_url(picture) -> str:
    """Return a picture, as `fetch` does, as a data: URL, in which a record of JSON can hold it."""
    if isinstance(picture, Image.Image):
        file = io.BytesIO()
        picture.save(file, "PNG")
        picture = file.getvalue()
    if not isinstance(picture, bytes):
        raise UserError(f"a picture must be an encoded file (bytes) or a PIL image, not {kind_of(picture)}")
    kind = next((name for head, name in KINDS.items() if picture.startswith(head)), "png")
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def fetch_images(record: dict, read: Callable[[str], Any]) -> Record:
    """Replace names in `images`, `image` (moved to `images`) and image parts of messages by what `read` returns.

    Other names, such as those of columns that only `data.fields` tells to be pictures, are read by the record itself.
    """
    record = Record(record, read)
    image = record.pop("image", None)
    images = record.get("images")
    if images is None or (is_empty(images) and not is_empty(image)):
        images = image
    if images is not None:
        images = [] if is_empty(images) else images
        record["images"] = [fetch(image, read) for image in (images if isinstance(images, list) else [images])]
    if isinstance(record.get("messages"), list):
        record["messages"] = [_fetch_parts(message, read) for message in record["messages"]]
    return record


def _fetch_parts(message, read):
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    content = []
    for part in message["content"]:
        is_image = isinstance(part, dict) and part.get("type") in ("image", "image_url", None)
        if is_image and (picture := carried_picture(part)) is not None:
            part = {"type": "image", "image": fetch(picture, read)}
        content.append(part)
    return {**message, "content": content}


def carried_picture(part: dict):
    """Return the picture that a part of a message carries, whatever its spelling; None if it carries none."""
    values = [part.get(key) for key in ("bytes", "image", "path", "url", "image_url")]
    return next((value for value in values if not is_empty(value)), None)
