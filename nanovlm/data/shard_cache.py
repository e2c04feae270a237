"""The address of a shard -> a file on this machine: fetched whole through fsspec, and kept while there is room.

Processes share a cache: one fetches a shard while the others that need it wait. What was not used for longest goes
first. A shard that changes at its address is another one, by the size, date or tag that the server tells.
"""

import contextvars
import fcntl
import hashlib
import os
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from nanovlm.data.source_address import is_public
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
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
            options = {"client_kwargs": {"timeout": timeout}, "get_client": open_session}
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        package = PACKAGES.get(protocol, str(error))
        raise UserError(f"{printable(url, most=100)} needs the package {package}: pip install {package}") from error
    except ValueError as error:
        raise UserError(f"{printable(url, most=100)} cannot be opened: {error}") from error


async def open_session(**options):
    """Open a session of aiohttp in which no public server redirects into the network of this machine.

    The address that counts is the one that is connected to, before anything is sent there, so that neither a name that
    changes its address nor a connection that is open already leads around it. A server that the user names may itself
    be in this network, and redirect within it.
    """
    import aiohttp  # pyright: ignore[reportMissingImports]

    came_from = contextvars.ContextVar("came_from", default="")  # the public host whose answer this request follows

    class Connector(aiohttp.TCPConnector):
        async def connect(self, req, *rest, **more):
            connection = await super().connect(req, *rest, **more)
            try:
                address = connection.transport.get_extra_info("peername")[0]  # pyright: ignore[reportOptionalMemberAccess]
                is_inside = not is_public(address)
                if came_from.get() and is_inside:
                    raise UserError(
                        f"{came_from.get()} redirects to {req.url.host}, which is {address}, not a public address"
                    )
            except BaseException:
                connection.close()
                raise
            came_from.set("" if is_inside else req.url.host)
            return connection

    async def begin(*_event):
        came_from.set("")

    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(begin)  # not of what follows a redirect
    return aiohttp.ClientSession(connector=Connector(), trace_configs=[trace], **options)


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
                try:
                    try_again(lambda: _download(fs, path, part, info.get("size"), options), url)
                except BaseException:
                    part.unlink(missing_ok=True)
                    raise
                part.rename(file)
        os.utime(file)
        return file


def _is_at(opened: BinaryIO, path: Path) -> bool:
    """Tell whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(opened.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _download(fs, path: str, part: Path, size: int | None, options: CacheOptions):
    """Fetch a shard of so many bytes; where that is not known, one that fills no more than the room."""
    from fsspec.callbacks import DEFAULT_CALLBACK, Callback

    room = make_room(options, size or 0)

    def stop(_size, came: int, **_more):
        if size is not None and came > size:
            raise OSError(f"more than its {size} bytes came")
        if size is None and came > room:
            raise UserError(
                f"{printable(fs.unstrip_protocol(path), most=200)} has more than {room} bytes, all that "
                f"{options.path} has room for: name a larger folder by --data.shard-cache, or keep more by "
                f"--data.shard-cache-gb, now {options.most_gb:g}"
            )

    # Stores keep to the sizes that they tell, and that of Hugging Face is slower when it is watched.
    is_watched = size is None or path.startswith("http")
    # What is cut off a second time is damage of the shard itself, which is counted where it is read.
    for _ in range(2 if size is None else 1):
        fs.get_file(path, str(part), callback=Callback(hooks={"stop": stop}) if is_watched else DEFAULT_CALLBACK)
        if _ends_as_tar(part):
            break
    if size is not None and part.stat().st_size != size:
        raise OSError(f"{part.stat().st_size} of its {size} bytes came")


def _ends_as_tar(file: Path) -> bool:
    """Tell whether a file ends with a block of zeros."""
    with open(file, "rb") as opened:
        opened.seek(-min(tarfile.BLOCKSIZE, file.stat().st_size), os.SEEK_END)
        return opened.read() == bytes(tarfile.BLOCKSIZE)


def make_room(options: CacheOptions, size: int) -> int:
    """Remove the shards that were not used for longest until there is room for another one of so many bytes.

    Returns how many bytes one of unknown size may have.
    """
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
    free = shutil.disk_usage(options.path).free - FREE_SPACE
    if free < size:
        raise UserError(
            f"{options.path} has no room for a shard of {size} bytes: name a larger folder by --data.shard-cache, or "
            f"keep fewer by --data.shard-cache-gb, now {options.most_gb:g}"
        )
    return int(min(most, free))


def try_again(call: Callable[[], Any], url: str) -> Any:
    """Call a function of a file system up to ATTEMPTS times. Raises FileNotFoundError at once, else UserError."""
    for wait in (*WAITS, None):
        try:
            return call()
        except UserError:
            raise
        except Exception as error:  # every file system raises errors of its own
            # fsspec says of http that a file is not found, whatever kept it from looking.
            cause = error.__cause__ if isinstance(error, FileNotFoundError) else error
            if isinstance(cause, UserError):
                raise cause from None
            if isinstance(error, FileNotFoundError) and not _is_unasked(cause):
                raise
            if wait is None:
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
