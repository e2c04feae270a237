"""Row -> Batch. Read samples, turn them into documents, pack them, stack rows into batches, and know where it is.

```
source --- places ---> workers: raw -> Document ---> buffer --- pack ---> rows ---> Batch
           this rank's          (in order, by chunks)           best rows first
```

Every sample has a place in an epoch; rank r of R reads the places r, r + R, r + 2 R, ... of each. Workers only turn
samples into documents, and these come back in order, so that batches do not depend on the number of workers.
"""

import ctypes
import hashlib
import itertools
import json
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from nanovlm.config import DataConfig
from nanovlm.data.images import normalize
from nanovlm.data.packing import make_row, pack
from nanovlm.data.types import Batch, Document, Filtered, Row

CHUNK = 16  # samples that a worker turns into documents at a time
NAMED = 20  # samples that are named when they are skipped; the rest is only counted
JUDGED_AFTER = 100  # samples before the share of bad ones is judged


def collate(rows: list[Row]) -> Batch:
    """Stack rows and number their documents through, so that `doc_ids` are unique in the batch."""
    doc_ids, first = [], 0
    for row in rows:
        doc_ids.append(torch.where(row.doc_ids < 0, row.doc_ids, row.doc_ids + first))
        first += int(row.doc_ids.max()) + 1
    return Batch(
        input_ids=torch.stack([r.input_ids for r in rows]),
        labels=torch.stack([r.labels for r in rows]),
        doc_ids=torch.stack(doc_ids),
        branch_ids=torch.stack([r.branch_ids for r in rows]),
        position_ids=torch.stack([r.position_ids for r in rows]),
        pixel_values=normalize(torch.cat([r.tiles for r in rows])),
    )


class Skipped(NamedTuple):
    """Why a sample is no document: filtered, other split, too long or corrupt; or what a source is damaged by."""

    kind: str
    reason: str = ""


LOSSES = ("too long", "corrupt", "damaged")
# Samples that were read, became documents, lie in rows, or were skipped.
COUNTED = ("read", "documents", "packed", "filtered", "other split", *LOSSES)


class Loader:
    """An iterator of batches over a source, endless or of `num_epochs`.

    `process(raw)` turns a raw record into a Document; a ValueError of it means a corrupt sample, `Filtered` one that
    is not wanted, any other error stops the run. With `shuffle` the seed decides another order for each epoch. With
    `val_fraction` the split `train` leaves out, and the split `val` is, what a hash of the contents picks.

    Before each batch the buffer is filled up to `pack_buffer` documents and packed; the fullest rows make the
    batch, and so does the row with the oldest document, so that none waits for ever. What is not used stays in
    the buffer. The state is the next place and the places in the buffer: a loader that is given it, with any
    number of workers, goes on with exactly the documents that have not been seen.
    """

    def __init__(
        self,
        source,
        process: Callable[[dict], Document],
        config: DataConfig,
        pad_token_id: int,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
        split: str = "train",
        num_epochs: int | None = None,
    ):
        self.source, self.config, self.pad_token_id, self.seed = source, config, pad_token_id, seed
        self.rank, self.num_ranks, self.num_epochs = rank, num_ranks, num_epochs
        self.is_scheduled = getattr(source, "is_scheduled", False)
        if num_epochs is not None and self.is_scheduled:
            raise ValueError(f"{source.name} is read by weights or as lessons, so it has no epochs to count")
        self.reader = Reader(source, process, config, split)
        self.next_place = (0, 0)  # epoch, and the number of this rank's places in it that were read
        self.buffer = {}  # (epoch, number) -> Document, oldest first
        parts = [f"documents of {part.name}" for part in source.sources] if self.is_scheduled else []
        self.counts = Counter(dict.fromkeys((*COUNTED, *parts), 0))
        self.batch_names = []  # the samples of the last batch
        self._names = {}  # of what is in the buffer
        self.reasons = []
        self._printed = set()
        self._results = None
        self._orders = {}  # part of a mixture (None: the whole source) -> its last epoch, and the order of that
        for sentence in getattr(source, "damaged", ()):
            self._note("damaged", sentence)

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        size, is_over = self.config.pack_buffer, False
        while True:
            while len(self.buffer) < size and not is_over:
                is_over = not self._read_one()
            places, documents = list(self.buffer), list(self.buffer.values())
            lengths, num_tiles = [len(d) for d in documents], [len(d.tiles) for d in documents]
            packed = pack(lengths, num_tiles, self.config.row_length, self.config.max_tiles or None)
            if is_over or len(packed) >= self.config.batch_rows:
                break
            size *= 2
        if not packed:
            if self.counts["read"] > self.counts["other split"] and not self.counts["documents"]:
                raise self._unusable()
            raise StopIteration
        oldest = next(row for row in packed if 0 in row)
        fullest = sorted(packed, key=lambda row: (row is not oldest, -sum(lengths[i] for i in row)))
        rows, self.batch_names = [], []
        for row in fullest[: self.config.batch_rows]:
            chosen = [self.buffer.pop(places[i]) for i in row]
            self.batch_names += [self._names.pop(places[i]) for i in row]
            rows.append(make_row(chosen, self.config.row_length, self.pad_token_id))
            self.counts["packed"] += len(row)
        batch = collate(rows)
        return batch.pin_memory() if torch.cuda.is_available() else batch

    def state_dict(self) -> dict:
        """Return the position and the counts as plain numbers."""
        return {
            "next_place": list(self.next_place),
            "buffer": [list(place) for place in self.buffer],
            "counts": dict(self.counts),
            "reasons": list(self.reasons),
            "data": self._describe(),
        }

    def _describe(self) -> dict:
        """What must be the same for the places to mean the same samples."""
        length = None if hasattr(self.source, "stream") else len(self.source)
        return {"source": self.source.name, "samples": length, "seed": self.seed, "num_ranks": self.num_ranks}

    def load_state_dict(self, state: dict):
        """Go to a position that `state_dict` returned. Raises ValueError when the data is not what it was."""
        for name, value in self._describe().items():
            if state["data"][name] != value:
                raise ValueError(f"the run was started with {name} = {state['data'][name]}, now it is {value}")
        self.close()
        self.next_place, self.counts = tuple(state["next_place"]), Counter(state["counts"])
        self.reasons, self.buffer, self._names = list(state["reasons"]), {}, {}
        waiting = {tuple(place) for place in state["buffer"]}
        for place, task in self._tasks(*min(waiting)) if waiting else ():
            if place in waiting:
                result = self.reader.read(task)
                if isinstance(result, Document):
                    self.buffer[place], self._names[place] = result, self._name(place, task)
                else:  # it could be read before
                    self._note(result.kind, f"{self._name(place, task)}: {result.reason}")
            if place >= max(waiting):
                break

    def close(self):
        """End the worker processes; the loader starts new ones when it goes on."""
        if self._results is not None:
            self._results.close()
            self._results = None

    def places_read(self) -> list[int]:
        """List the indices that this rank has read in its first pass over the source; none of a stream."""
        if hasattr(self.source, "stream"):
            return []
        end = min(self.next_place, (1, 0))
        return [task for _place, task in itertools.takewhile(lambda item: item[0] < end, self._tasks(0, 0))]

    def _read_one(self) -> bool:
        """Read the next sample into the buffer, or count why not; return False when there is none."""
        if self._results is None:
            self._results = self._read_all(self._tasks(*self.next_place))
        item = next(self._results, None)
        if item is None:
            return False
        place, task, result = item
        is_whole_epoch = place[0] > self.next_place[0] or self.counts["read"] * self.num_ranks >= self._size()
        if is_whole_epoch and not self.counts["documents"]:
            raise self._unusable()
        self.next_place = (place[0], place[1] + 1)
        self.counts["read"] += 1
        if isinstance(result, Document):
            self.counts["documents"] += 1
            self.buffer[place], self._names[place] = result, self._name(place, task)
            if self.is_scheduled:
                part, _count = self.source.locate(place[1], self.rank, self.num_ranks)
                self.counts[f"documents of {self.source.sources[part].name}"] += 1
        else:
            self._note(result.kind, f"{self._name(place, task)}: {result.reason}")
        return True

    def _size(self) -> float:
        return float("inf") if hasattr(self.source, "stream") else len(self.source)

    def _name(self, place, task) -> str:
        """Name a sample as `raw` and `nanovlm.data.inspect` know it."""
        if isinstance(task, dict):
            return f"{self.source.name}, record {place[1] * self.num_ranks + self.rank} of epoch {place[0]}"
        source, index = self.source.find(task) if hasattr(self.source, "sources") else (self.source, task)
        return f"{source.name}, sample {index}"

    def _note(self, kind: str, sentence: str):
        """Count what was skipped, name a loss once, and stop when there are too many."""
        self.counts[kind] += 1
        if kind not in LOSSES:
            return
        if sentence not in self._printed and len(self._printed) < NAMED:
            self._printed.add(sentence)
            print(f"skipped as {kind}: {sentence}", flush=True)
        if sentence not in self.reasons and len(self.reasons) < NAMED:
            self.reasons.append(sentence)
        bad, read = sum(self.counts[kind] for kind in LOSSES), self.counts["read"] - self.counts["other split"]
        if read >= JUDGED_AFTER and bad > self.config.max_bad_fraction * read:
            raise ValueError(
                f"{bad} of {read} samples are unusable, more than data.max_bad_fraction = "
                f"{self.config.max_bad_fraction} allows ({self._summary()}): {'; '.join(self.reasons)}"
            )

    def _unusable(self) -> ValueError:
        named = "".join(f"; {sentence}" for sentence in self.reasons)
        return ValueError(f"no sample of {self.source.name} could be used: {self._summary()}{named}")

    def _summary(self):
        return ", ".join(f"{number} {kind}" for kind, number in sorted(self.counts.items()) if number)

    def _tasks(self, epoch: int, number: int) -> Iterator[tuple[tuple[int, int], object]]:
        """Yield places of this rank from here on, each with what the reader needs: an index, or a streamed record."""
        while self.num_epochs is None or epoch < self.num_epochs:
            start = number * self.num_ranks
            if hasattr(self.source, "stream"):
                records = enumerate(self.source.stream(start, epoch), start)
                mine = ((at, raw) for at, raw in records if at % self.num_ranks == self.rank)
            elif self.is_scheduled:  # one endless epoch, in which each source has its own
                numbers = itertools.count(number)
                mine = ((n * self.num_ranks + self.rank, self._locate(n)) for n in numbers)
            else:
                order = self._order(epoch)
                mine = ((at, int(order[at])) for at in range(start + self.rank, len(order), self.num_ranks))
            at = None
            for at, task in mine:
                yield (epoch, at // self.num_ranks), task
            if at is None and not number:
                raise ValueError(f"{self.source.name} has too few samples: none for rank {self.rank}")
            epoch, number = epoch + 1, 0

    def _locate(self, number: int) -> int:
        """Return the index in the whole mixture of this rank's n-th sample."""
        part, count = self.source.locate(number, self.rank, self.num_ranks)
        epoch, place = divmod(count, len(self.source.sources[part]))
        return self.source.starts[part] + int(self._order(epoch, part)[place])

    def _read_all(self, tasks):
        """Yield (place, task, result) in order, read here or by worker processes."""
        if not self.config.num_workers:
            yield from ((place, task, self.reader.read(task)) for place, task in tasks)
            return
        chunks, sent = itertools.tee(iter(lambda: list(itertools.islice(tasks, CHUNK)), []))
        results = DataLoader(
            self.reader,
            sampler=([task for _place, task in chunk] for chunk in chunks),
            batch_size=None,
            collate_fn=lambda flat: flat,
            num_workers=self.config.num_workers,
            multiprocessing_context="fork",  # the processor need not be pickled
            worker_init_fn=start_worker,
        )
        for chunk, flat in zip(sent, results, strict=True):
            for (place, task), result in zip(chunk, unflatten(flat), strict=True):
                yield place, task, result

    def _order(self, epoch, part=None):
        """Return the order in which a source, or a part of a mixture, is read in an epoch."""
        if self._orders.get(part, (None, None))[0] != epoch:
            self._orders[part] = epoch, self._make_order(epoch, part)
        return self._orders[part][1]

    def _make_order(self, epoch, part):
        """Shuffle the indices of a source, or of a part of a mixture; `blocks`, which are read whole, stay together."""
        source = self.source if part is None else self.source.sources[part]
        if not self.config.shuffle:
            return range(len(source))
        rng = np.random.default_rng((self.seed, epoch) if part is None else (self.seed, epoch, part))
        if not hasattr(source, "blocks"):
            return rng.permutation(len(source))
        blocks = [rng.permutation(np.arange(start, end)) for start, end in itertools.pairwise(source.blocks)]
        return np.concatenate([blocks[i] for i in rng.permutation(len(blocks))])


class Reader(Dataset):
    """What a worker does: raw record -> Document, or why not."""

    def __init__(self, source, process, config: DataConfig, split: str):
        if split not in ("train", "val"):
            raise ValueError(f"unknown split {split!r}; there are train and val")
        self.source, self.process, self.config, self.split = source, process, config, split

    def __getitem__(self, tasks: list) -> tuple:
        """Read a chunk."""
        return flatten([self.read(task) for task in tasks])

    def read(self, task) -> Document | Skipped:
        """Read the sample at an index, or a record that was streamed."""
        row_length, max_tiles = self.config.row_length, self.config.max_tiles
        try:
            raw = task if isinstance(task, dict) else self.source.raw(task)
            if self.config.val_fraction and is_validation(raw, self.config.val_fraction) != (self.split == "val"):
                return Skipped("other split")
            document = self.process(raw)
        except Filtered as error:
            return Skipped("filtered", str(error))
        except (ValueError, OSError) as error:
            return Skipped("corrupt", str(error))
        if len(document) > row_length:
            return Skipped("too long", f"{len(document)} tokens, more than data.row_length = {row_length}")
        if max_tiles and len(document.tiles) > max_tiles:
            return Skipped("too long", f"{len(document.tiles)} tiles, more than data.max_tiles = {max_tiles}")
        return document


def start_worker(_number: int):
    """Let nobody but the process that reads from this one end it, and end with that one, however it ends.

    A scheduler and torchrun send SIGTERM to all there are, and a worker that is gone would end the run before it is
    saved. One that outlived a killed run would hold its lock, and the run could not start again at once.
    """
    if sys.platform != "linux":
        return
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    ends = {signal.SIGTERM, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)

    def wait():
        while signal.sigwaitinfo(ends).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def is_validation(raw: dict, fraction: float) -> bool:
    """Decide by a hash of a record's conversation and pixels (encoded bytes where they are encoded) alone."""
    images = raw.get("images") or []
    digest = hashlib.blake2b(digest_size=8)
    turns = raw.get("texts") or raw.get("messages") or []
    said = [
        turn.get(key) for turn in turns if isinstance(turn, dict) for key in ("user", "assistant", "role", "content")
    ]
    digest.update(json.dumps(said, sort_keys=True, default=str).encode(errors="replace"))
    for image in images if isinstance(images, list) else [images]:
        digest.update(image if isinstance(image, bytes) else getattr(image, "tobytes", lambda: b"")())
    return int.from_bytes(digest.digest()) < fraction * 2**64


def flatten(results: list[Document | Skipped]) -> tuple:
    """Join documents into few tensors, as each tensor that goes from one process to another costs a file handle."""
    documents = [result for result in results if isinstance(result, Document)]
    skipped = [None if isinstance(result, Document) else result for result in results]
    if not documents:
        return skipped, [], [], None
    lengths, num_tiles = [len(d) for d in documents], [len(d.tiles) for d in documents]
    fields = ("input_ids", "labels", "branch_ids", "tiles")
    return skipped, lengths, num_tiles, [torch.cat([getattr(d, name) for d in documents]) for name in fields]


def unflatten(flat: tuple) -> list[Document | Skipped]:
    """Undo `flatten`."""
    skipped, lengths, num_tiles, joined = flat
    if joined is None:
        return skipped
    *texts, tiles = joined
    pieces = [tensor.split(lengths) for tensor in texts]
    documents = map(Document, *pieces, tiles.split(num_tiles))
    return [next(documents) if reason is None else reason for reason in skipped]
