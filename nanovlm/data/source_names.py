"""The images that a record names -> the bytes of their files, from its own folder and, if allowed, from addresses.

A record is a stranger's: its names may lead out of the folder, to devices, or into the network.
"""

import base64
import binascii
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

from nanovlm.data.records import is_empty
from nanovlm.data.source_address import download
from nanovlm.data.source_files import LARGEST_FILE
from nanovlm.errors import UserError, printable

# How the files of JPEG, PNG, GIF, WEBP and BMP begin, in base64.
BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk")
LONGEST_NAME = 255  # characters of a file's name, which an image in base64 exceeds


class ImageFile(bytes):
    """The contents of an image file that remember where they are from, for messages."""

    name: str


def fetch_images(record: dict, read: Callable[[str], bytes | str]) -> dict:
    """Replace the names of images in a record by the contents of their files, from `read`.

    They are in `images`, in `image` or the `file_name(s)` of image folders (both moved to `images`), and in the image
    parts of messages (all brought to `{"type": "image", "image": ...}`).
    """

    def fetch(image):
        if isinstance(image, dict):
            image = next((image[key] for key in ("bytes", "path", "url") if image.get(key) is not None), None)
        return read(image) if isinstance(image, str) else image

    record = _name_images(record)
    image = record.pop("image", None)
    images = record.get("images")
    if images is None or (is_empty(images) and not is_empty(image)):
        images = image
    if not is_empty(images):
        record["images"] = [fetch(image) for image in (images if isinstance(images, list) else [images])]
    for key, value in record.items():
        if isinstance(value, list) and any(isinstance(message, dict) and "content" in message for message in value):
            record[key] = [_fetch_parts(message, fetch) for message in value]
    return record


def _name_images(record: dict) -> dict:
    """Give the columns of image folders the names that they have as columns of `datasets`.

    `file_name` becomes `image`, `file_names` `images`, `x_file_name` `x`, unless these are there.
    """
    named = {}
    for key, value in record.items():
        match = re.fullmatch(r"(?:(.+)_)?file_name(s?)", key) if isinstance(key, str) else None
        new = key if match is None else match[1] or f"image{match[2]}"
        is_other = match is not None and (new in record or (match[1] is None and not is_empty(record.get("images"))))
        named[key if is_other else new] = value
    return named


def _fetch_parts(message, fetch):
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    content = []
    for part in message["content"]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("image", "image_url"):
            held = ("image", "image_url", "bytes", "path", "url")
            carried = next((part[key] for key in held if part.get(key) is not None), None)
            part = {"type": "image", "image": fetch(carried)}
        content.append(part)
    return {**message, "content": content}


def read_named(name: str, base: Path, folder: Path, where: str, allow_urls: bool) -> ImageFile:
    """Return the image that a record names: a file, a data: URL, base64, or an address if allowed.

    A file's name is relative to `base`; the file is in `folder` or below. Raises UserError that begins with `where`.
    """
    shown = printable(name, most=100)
    if name[:5].lower() == "data:":
        data, shown = decode_data_url(name, where), "a data: URL"
    elif is_base64(name):
        data, shown = _decode_base64(name, where), "in base64"
    elif re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name):
        if not allow_urls:
            raise UserError(f"{where} names the address {shown}: set --data.allow-urls True to fetch images from there")
        data = download(name, where)
    else:
        data = read_file(base / name, folder, where)
    image = ImageFile(data)
    image.name = f"{shown}, {where}"
    return image


def is_base64(name: str) -> bool:
    """Tell whether the name of an image is the image itself, as in the tables of VLMEvalKit."""
    return len(name) > LONGEST_NAME and name.startswith(BASE64_STARTS)


def decode_data_url(url: str, where: str) -> bytes:
    """Return the contents of `data:image/png;base64,...`."""
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise UserError(f"{where} has a data: URL that must begin as data:image/png;base64, not {printable(url, 60)}")
    return _decode_base64(data, where)


def _decode_base64(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{where} has an image whose base64 is damaged: {error}") from error


def read_file(path: Path, folder: Path, where: str) -> bytes:
    """Read a regular file that a record names; raises UserError for anything else, and for what lies outside `folder`.

    Links are followed first. Nothing but a regular file is opened: a device or a pipe might never end.
    """
    shown = printable(str(path), most=200)
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(folder.resolve()):
            raise UserError(
                f"{where} names {shown}, which is outside the folder of its record: it must be in {folder} or below"
            )
        if not stat.S_ISREG(real.stat().st_mode):
            raise UserError(f"{where} names a file that cannot be read: {shown} is not a regular file")
        descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)  # it may have been exchanged just now
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UserError(f"{where} names a file that cannot be read: {shown} is not a regular file")
            data = file.read(LARGEST_FILE + 1)  # some files of the system say that they are empty and never end
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{where} names a file that cannot be read: {shown}: {reason}") from error
    if len(data) > LARGEST_FILE:
        raise UserError(f"{where} names {shown}, which has more than {LARGEST_FILE} bytes")
    return data
