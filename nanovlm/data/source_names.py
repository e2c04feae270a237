"""The images that a record names -> the bytes of their files, from its own folder and, if allowed, from addresses.

A record is a stranger's: its names may lead out of the folder, to devices, or into the network.
"""

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

from nanovlm.data.pictures import Record, fetch_images, is_empty
from nanovlm.data.source_address import download
from nanovlm.data.source_files import LARGEST_FILE
from nanovlm.errors import UserError, printable


class ImageFile(bytes):
    """The contents of an image file that remember where they are from, for messages."""

    name: str


def fetch_named(record: dict, base: Path, folder: Path, where: str, allow_urls: bool) -> Record:
    """Return a record with the contents of the images that it names, as `read_named` reads them.

    The images remember that they are from `where`, with which each UserError begins.
    """
    return fetch_from(record, lambda name: read_named(name, base, folder, where, allow_urls), where)


def fetch_from(record: dict, read: Callable[[str], bytes], where: str) -> Record:
    """Return a record with the contents of the images that it names, from a function that reads a name."""
    try:
        record = fetch_images(_name_images(record), read)
    except UserError as error:
        raise error if str(error).startswith(where) else UserError(f"{where}: {error}") from error
    if isinstance(images := record.get("images"), list):
        record["images"] = [name_image(image, where) if type(image) is bytes else image for image in images]
    return record


def name_image(data: bytes, name: str) -> ImageFile:
    image = ImageFile(data)
    image.name = name
    return image


def _name_images(record: dict) -> dict:
    """Give the columns of image folders the names that they have as columns of `datasets`; empty ones are left out.

    `file_name` becomes `image`, `file_names` `images`, `x_file_name` `x`, unless these are there.
    """
    named = {}
    for key, value in record.items():
        match = re.fullmatch(r"(?:(.+)_)?file_name(s?)", key) if isinstance(key, str) else None
        new = key if match is None else match[1] or f"image{match[2]}"
        is_other = match is not None and (new in record or (match[1] is None and not is_empty(record.get("images"))))
        if new != "image" or not is_empty(value):  # an empty cell of a table
            named[key if is_other else new] = value
    return named


def read_named(name: str, base: Path, folder: Path, where: str, allow_urls: bool) -> ImageFile:
    """Return the image that a record names: a file, or an address if allowed.

    A file's name is relative to `base`; the file is in `folder` or below. Raises UserError that begins with `where`.
    """
    shown = printable(name, most=100)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name):
        if not allow_urls:
            raise UserError(f"{where} names the address {shown}: add --data.allow-urls to fetch images from there")
        return name_image(download(name, where), f"{shown}, {where}")
    return name_image(read_file(base / name, folder, where), f"{shown}, {where}")


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
