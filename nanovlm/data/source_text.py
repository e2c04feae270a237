"""A text file -> its bytes as UTF-8 by position, whether it is plain, compressed or in another encoding.

A plain file is read in place. A file that is compressed (.gz, .zst) or UTF-16 or UTF-32 cannot be read by position, so
it is unpacked once, into a nameless file in the folder for temporary files, which the system removes with the process.
"""

import codecs
import contextlib
import gzip
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from nanovlm.errors import UserError

BLOCK = 2**20  # bytes that are read at a time
PIECE = 2**13  # bytes that are unpacked at a time: what is before a damage counts only in whole pieces
# Bytes that a compressed file may become: records shrink to a hundredth at best, and zeros to a thousandth.
LARGEST_RATIO, ALWAYS_ALLOWED = 200, 2**30
FREE_SPACE = 2**30  # bytes that unpacking leaves on the disk


class Text:
    """The bytes of a text file as UTF-8, without a mark of the encoding.

    `damage` says what hinders reading to the end of a compressed file, and where; what comes before is there.
    """

    def __init__(self, path: Path):
        self.path, self.damage, self.first = path, "", 0
        self.unpacked: BinaryIO | None = None
        try:
            with open(path, "rb") as file:
                head = file.read(BLOCK)
            if path.suffix.lower() in (".gz", ".zst"):
                self._unpack()
                head = self.read(0, BLOCK)
            self.first = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
            encoding = json.detect_encoding(head[:4]) if head else "utf-8"
            if not encoding.startswith("utf-8"):
                self._decode(encoding)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the text to read all of it, before processes share the file."""
        if self.unpacked is not None:
            self.unpacked.seek(0)
            yield self.unpacked
            return
        with open(self.path, "rb") as file:
            file.seek(self.first)
            yield file

    def read(self, start: int, size: int) -> bytes:
        """Read bytes by position; other processes may do so at the same time."""
        if self.unpacked is not None:
            return os.pread(self.unpacked.fileno(), size, start)
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(size)

    def _unpack(self):
        limit = max(ALWAYS_ALLOWED, LARGEST_RATIO * self.path.stat().st_size)
        with _decompress(self.path) as file:
            self._keep(iter(lambda: file.read1(PIECE), b""), limit)

    def _decode(self, encoding: str):
        """Write the text as UTF-8 in place of what it is."""
        decoder = codecs.getincrementaldecoder(encoding)()

        def pieces():
            with self.open() as file:
                while block := file.read(BLOCK):
                    yield decoder.decode(block).encode()
            yield decoder.decode(b"", final=True).encode()

        self._keep(pieces(), None)

    def _keep(self, pieces: Iterator[bytes], limit: int | None):
        """Write pieces to a file without a name; an error in making them is the damage of the text."""
        folder = tempfile.gettempdir()
        file, size = tempfile.TemporaryFile(), 0
        while True:
            try:
                piece = next(pieces, None)
            except (OSError, EOFError, ValueError, zlib.error) as error:
                self.damage = self.damage or f"is cut off or damaged after {size} bytes of its text ({error})"
                break
            if piece is None:
                break
            size += len(piece)
            if limit is not None and size > limit:
                raise UserError(f"{self.path} unpacks to more than {limit} bytes: if that is right, unpack it yourself")
            if shutil.disk_usage(folder).free < FREE_SPACE + len(piece):
                raise UserError(f"{self.path} is too large to be unpacked in {folder}: set TMPDIR to a larger folder")
            file.write(piece)
        file.flush()
        self.unpacked, self.first = file, 0  # pyright: ignore[reportAttributeAccessIssue]


def _decompress(path: Path):
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    try:  # the standard library has zstd from Python 3.14 on; pyarrow comes with the extra that parquet needs anyway
        import pyarrow
    except ImportError:
        raise UserError(f"{path} needs the package pyarrow: pip install pyarrow") from None
    return pyarrow.input_stream(str(path), compression="zstd")
