"""Write files and folders so that a kill at any moment loses nothing that was saved.

A file or folder is written under a temporary name, flushed to disk and renamed, so one with its final name is complete.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

from nanovlm.errors import UserError, printable


@contextlib.contextmanager
def new_folder(path: Path):
    """Yield a temporary folder to fill; it becomes `path` on success and is removed on an error.

    Raises OSError that names `path` when the disk is full or not writable.
    """
    temporary, replaced = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        restore(path)
        shutil.rmtree(replaced, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.iterdir():
            if file.is_file():  # safetensors lets nobody else read its files
                file.chmod(temporary.stat().st_mode & 0o666)
            flush(file)
        flush(temporary)
        if path.exists():
            path.rename(replaced)
        temporary.rename(path)
        flush(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not write {path}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def restore(path: Path):
    """Put back the folder that `new_folder` was replacing when it was killed between its two renames."""
    replaced = path.with_name(f".{path.name}.old")
    if replaced.exists() and not path.exists():
        replaced.rename(path)


def find_folder(path: Path) -> Path:
    """Return `path`, or the old folder that `new_folder` had moved aside if `path` is missing; renames nothing."""
    if not (name := path.resolve().name):
        return path
    replaced = path.resolve().with_name(f".{name}.old")
    return replaced if replaced.exists() and not path.exists() else path


@contextlib.contextmanager
def lock(folder: Path):
    """Create a folder if needed and lock it for this process; a new one that stays empty is removed at the end.

    Raises UserError while another process holds the lock (a killed process releases it), or if it cannot be created.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made a folder: {error}") from error
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing to {folder}: wait for it, or use another folder") from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
                raise
            print(f"note: {folder} cannot be locked ({error.strerror}): let no other process write to it")
        yield folder
    finally:
        os.close(descriptor)
        if is_new:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


@contextlib.contextmanager
def new_file(path: Path):
    """Yield a temporary binary file to write; flushed and renamed, it becomes `path` on success; else it is removed."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        flush(temporary)
        temporary.rename(path)
        flush(path.parent)
    except OSError as error:
        raise OSError(f"could not write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, data: str | bytes):
    """Write a file under a temporary name, flush it, rename it and flush its folder."""
    with new_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def read_json(path: Path) -> dict:
    """Read a JSON file. Raises UserError that names the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no {path}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(data).__name__}")
    return data


def changes(before: dict, now: dict) -> str:
    """Say in which of its settings an attempt differs from an earlier one, with both values; nothing if in none.

    Of a setting that has settings of its own, those that differ are named: writer.model.
    """

    def show(value) -> str:
        return printable(repr(value), most=200)

    def differ(name: str, was, value) -> list[str]:
        if not (isinstance(was, dict) and isinstance(value, dict) and was and value):
            return [f"{name}: {show(was)} against {show(value)}"]
        inner = [key for key in was | value if was.get(key, ...) != value.get(key, ...)]
        return [sentence for key in inner for sentence in differ(f"{name}.{key}", was.get(key), value.get(key))]

    changed = [name for name, value in now.items() if before.get(name) != value]
    return "; ".join(sentence for name in changed for sentence in differ(name, before.get(name), now[name]))


def flush(path: Path):
    """Flush a file or folder to disk now; some shared file systems can only flush files, which is not an error."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def refuse_run(folder: Path):
    """Raise UserError if a folder is that of a run, where that of a model is wanted."""
    if (folder / "model" / "config.json").exists():
        raise UserError(f"{folder} is the folder of a run; its model is {folder / 'model'}")
    if (folder / "checkpoints").is_dir():
        go_on = f"python train.py --run-dir {folder}"
        raise UserError(f"{folder} is a run that has not ended, so it has no model yet; to go on with it: {go_on}")
