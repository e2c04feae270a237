"""Raw record -> Document, or why it gave none: in the training process, or in worker processes beside it."""

import ctypes
import itertools
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from nanovlm.config import DataConfig
from nanovlm.data.features import Missing
from nanovlm.data.records import options_of
from nanovlm.data.source import Damaged, Ref, Source
from nanovlm.data.split import is_validation
from nanovlm.data.types import Document, Filtered
from nanovlm.errors import UserError, printable
from nanovlm.limits import time_limit

RECORD_SECONDS = 60  # of computing that a record may take
CHUNK = 16  # records that a worker turns into documents at a time


class Skipped(NamedTuple):
    """Why a record gave no document: filtered, other split, too long, corrupt, missing; or how a source is damaged."""

    kind: str
    reason: str = ""


class Reader(Dataset):
    """Reads keys as documents, in a worker or not. A record is corrupt if reading it or `process(raw)` raises."""

    def __init__(self, source: Source, process: Callable[[dict], Document], config: DataConfig, split: str):
        if split not in ("train", "val"):
            raise UserError(f"unknown split {split!r}; there are train and val")
        self.source, self.process, self.config, self.split = source, process, config, split
        self.options = options_of(config)

    def __getitem__(self, keys: list) -> tuple:
        """Read a chunk."""
        return flatten([self.read(key) for key in keys])

    def is_ours(self, key) -> bool:
        """Tell whether a record is of our split; what cannot be read is of the training split."""
        try:
            return not self.config.val_fraction or self.is_of_split(self.source.read(key))
        except Exception:
            return self.split == "train"

    def is_of_split(self, raw: dict) -> bool:
        """Tell whether a raw record is of our split; all are of `train` where nothing is held out."""
        return is_validation(raw, self.config.val_fraction, self.options) == (self.split == "val")

    def read(self, key) -> Document | Skipped:
        """Read the record of a ref's key."""
        raw = None
        try:
            with time_limit(RECORD_SECONDS, "the record"):
                raw = self.source.read(key)
                if self.config.val_fraction and not self.is_of_split(raw):
                    return Skipped("other split")
                document = self.process(raw)
        except Filtered as error:
            return Skipped("filtered", printable(str(error)))
        except Missing as error:
            return Skipped("missing", printable(str(error)))
        except Exception as error:  # whatever a record does, it is counted and named
            if raw is None and self.split == "val":  # of what cannot be read no one knows the split: once is enough
                return Skipped("other split")
            return Skipped("damaged" if isinstance(error, Damaged) else "corrupt", printable(explain(error)))
        reason = why_too_long(document, self.config)
        return Skipped("too long", reason) if reason else document

    def read_all(self, refs: Iterable[Ref]) -> Generator[tuple[Ref, Document | Skipped], None, None]:
        """Read refs in their order, here or with `num_workers` processes."""
        if not self.config.num_workers:
            yield from ((ref, self.read(ref.key)) for ref in refs)
            return
        refs = iter(refs)
        chunks, sent = itertools.tee(iter(lambda: list(itertools.islice(refs, CHUNK)), []))
        results = DataLoader(
            self,
            sampler=([ref.key for ref in chunk] for chunk in chunks),
            batch_size=None,
            collate_fn=lambda flat: flat,
            num_workers=self.config.num_workers,
            multiprocessing_context="fork",  # the processor need not be pickled
            worker_init_fn=start_worker,
        )
        try:
            for chunk, flat in zip(sent, results, strict=True):
                yield from zip(chunk, unflatten(flat), strict=True)
        except RuntimeError as error:
            if not re.match(r"DataLoader worker .*(killed by signal|exited unexpectedly)", str(error)):
                raise
            raise UserError(
                "a process that reads samples was ended from outside, as a system does that runs out of memory: start "
                f"the run again, with fewer data.num_workers ({str(error).splitlines()[0]})"
            ) from error


def why_too_long(document: Document, config: DataConfig) -> str:
    """Say why a document fits into no row; nothing if it does."""
    if len(document) > config.row_length:
        return f"{len(document)} tokens, more than data.row_length = {config.row_length}"
    if config.max_tiles and len(document.tiles) > config.max_tiles:
        return f"{len(document.tiles)} tiles, more than data.max_tiles = {config.max_tiles}"
    return ""


def start_worker(_number: int):
    """Make a worker ignore SIGTERM, SIGUSR1 and SIGINT unless its parent sends them, and die when its parent dies.

    Schedulers, torchrun and Ctrl-C reach every process, and losing a worker would end the run before it is saved.
    A worker that outlived a killed run would hold the run's lock, and the run could not start again at once.
    """
    if sys.platform != "linux":
        return
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    ends = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)

    def wait():
        while signal.sigwaitinfo(ends).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def explain(error: Exception) -> str:
    """Return the message of an error that reading raised; one that may be a bug of ours also says what and where."""
    if isinstance(error, ValueError | OSError):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"


def flatten(results: list[Document | Skipped]) -> tuple:
    """Join documents into few tensors, as each tensor that goes from one process to another costs a file handle."""
    documents = [result for result in results if isinstance(result, Document)]
    kinds = [type(result) if isinstance(result, Document) else result for result in results]
    if not documents:
        return kinds, [], [], None, {}, [], None
    lengths, num_tiles = [len(d) for d in documents], [len(d.tiles) for d in documents]
    fields = ("input_ids", "labels", "branch_ids", "tiles")
    values = {name: torch.cat([d.values[name] for d in documents]) for name in documents[0].values}
    joined = [torch.cat([getattr(d, name) for d in documents]) for name in fields]
    spans = None
    if any(d.span_ids is not None for d in documents):
        spans = torch.zeros(sum(lengths), dtype=torch.int32)
        for own, document in zip(spans.split(lengths), documents, strict=True):
            if document.span_ids is not None:
                own[: len(document.span_ids)] = document.span_ids
    return kinds, lengths, num_tiles, joined, values, [d.grids for d in documents], spans


def unflatten(flat: tuple) -> list[Document | Skipped]:
    """Undo `flatten`."""
    kinds, lengths, num_tiles, joined, values, grids, spans = flat
    if joined is None:
        return kinds
    *texts, tiles = joined
    pieces = [tensor.split(lengths) for tensor in texts]
    named = {name: tensor.split(lengths) for name, tensor in values.items()}
    of_each = [{name: parts[i] for name, parts in named.items()} for i in range(len(lengths))]
    of_spans = [None] * len(lengths) if spans is None else spans.split(lengths)
    fields = zip(*pieces, tiles.split(num_tiles), of_each, grids, of_spans, strict=True)
    return [kind(*next(fields)) if isinstance(kind, type) else kind for kind in kinds]
