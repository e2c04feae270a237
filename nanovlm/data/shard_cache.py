"""The address of a shard -> a file on this machine: fetched whole through fsspec, and kept while there is room.

Processes share a cache: one fetches a shard while the others that need it wait. What was not used for longest goes
first. A shard that changes at its address is another one, by the size, date or tag that the server tells.
"""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from nanovlm.errors import UserError, printable

ATTEMPTS = 3
WAITS = (1.0, 4.0)  # seconds between attempts
FREE_SPACE = 2**30  # bytes that fetching leaves on the disk
PACKAGES = {"s3": "s3fs", "http": "aiohttp", "https": "aiohttp", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs"}


class CacheOptions(NamedTuple):
    """Where shards are kept, empty for ~/.cache/nanovlm/shards, and about how many gigabytes of them."""

    folder: str = ""
    most_gb: float = 100.0

    @property
    def path(self) -> Path:
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(self.folder or f"{home}/nanovlm/shards").expanduser()


def is_address(spec: str) -> bool:
    """Tell whether a name is an address, protocol://place, and no path."""
    protocol, colon, _rest = spec.partition("://")
    return bool(colon) and protocol.replace("+", "").isalnum()


def connect(url: str) -> tuple:
    """Return the file system of fsspec for an address, and the path there. Raises UserError that names the address."""
    import fsspec

    protocol, options = url.partition("://")[0], {}
    try:
        if protocol in ("http", "https"):
            import aiohttp  # pyright: ignore[reportMissingImports]

            # By default a shard that takes more than five minutes would fail.
            options = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)}}
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        package = PACKAGES.get(protocol, str(error))
        raise UserError(f"{printable(url, most=100)} needs the package {package}: pip install {package}") from error
    except ValueError as error:
        raise UserError(f"{printable(url, most=100)} cannot be opened: {error}") from error


def read_whole(url: str, most_bytes: int) -> bytes | None:
    """Return the contents of a small file; None if there is none at the address."""

    def read():
        fs, path = connect(url)
        with fs.open(path, "rb") as file:
            return file.read(most_bytes + 1)

    try:
        data = try_again(read, url)
    except FileNotFoundError:
        return None
    if len(data) > most_bytes:
        raise UserError(f"{printable(url, most=100)} has more than {most_bytes} bytes")
    return data


def find(url: str) -> list[str]:
    """Return the addresses that an address with a glob stands for, sorted."""
    fs, path = connect(url)
    return sorted(fs.unstrip_protocol(found) for found in try_again(lambda: fs.glob(path), url))


def fetch(url: str, options: CacheOptions) -> Path:
    """Return the file of a shard, which is there already or is fetched. Raises UserError that names the address."""
    fs, path = connect(url)
    try:
        info = try_again(lambda: fs.info(path), url)
    except FileNotFoundError as error:
        raise UserError(f"there is no {printable(url, most=200)}") from error
    # Not where a redirect led: some servers sign that anew each time.
    marks = sorted((name, str(value)) for name, value in info.items() if name != "url")
    folder = options.path
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{hashlib.sha256(repr((url, marks)).encode()).hexdigest()[:32]}.tar"
    part = file.with_suffix(".part")
    while True:
        with open(part, "ab") as held:
            fcntl.flock(held, fcntl.LOCK_EX)  # given up with the process, however it ends
            if not _is_at(held, part):
                continue  # whom it waited for has renamed it, so that it holds nobody back
            if file.exists():
                part.unlink()
            else:
                make_room(options, info.get("size") or 0)
                try_again(lambda: _download(fs, path, part, info.get("size")), url)
                part.rename(file)
        os.utime(file)
        return file


def _is_at(opened: BinaryIO, path: Path) -> bool:
    """Tell whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(opened.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _download(fs, path: str, part: Path, size: int | None):
    fs.get_file(path, str(part))
    if size is not None and part.stat().st_size != size:
        raise OSError(f"{part.stat().st_size} of its {size} bytes came")


def make_room(options: CacheOptions, size: int):
    """Remove the shards that were not used for longest until there is room for another one of so many bytes."""
    kept = []
    for file in options.path.glob("*.tar"):
        try:
            kept.append((file.stat().st_mtime, file.stat().st_size, file))
        except FileNotFoundError:
            continue  # another process made room
    total, most = sum(of_file for _time, of_file, _file in kept), options.most_gb * 1e9
    for _time, of_file, file in sorted(kept):
        if total + size <= most:
            break
        file.unlink(missing_ok=True)
        total -= of_file
    if shutil.disk_usage(options.path).free < size + FREE_SPACE:
        raise UserError(
            f"{options.path} has no room for a shard of {size} bytes: name a larger folder by --data.shard-cache, or "
            f"keep fewer by --data.shard-cache-gb, now {options.most_gb:g}"
        )


def try_again(call: Callable[[], Any], url: str) -> Any:
    """Call a function of a file system up to ATTEMPTS times. Raises FileNotFoundError at once, else UserError."""
    for wait in (*WAITS, None):
        try:
            return call()
        except UserError:
            raise
        except Exception as error:  # every file system raises errors of its own
            if isinstance(error, FileNotFoundError) and not _is_unasked(error.__cause__):
                raise
            if wait is None:
                cause = error.__cause__ if isinstance(error, FileNotFoundError) else error
                reason = printable(str(cause) or type(cause).__name__, most=300)
                raise UserError(
                    f"{printable(url, most=200)} cannot be read, tried {ATTEMPTS} times: {reason}"
                ) from error
            time.sleep(wait)
    return None


def _is_unasked(cause: BaseException | None) -> bool:
    """Tell whether a server did not say what it has; of http fsspec calls that a file that is not found, too."""
    is_broken = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
    return is_broken or getattr(cause, "status", 0) >= 500
