"""Row -> Batch. Read records, turn them into documents, pack them, stack rows into batches, and track the position.

```
source --- refs ---> Reader: raw -> Document ---> inbox of the slot ---> buffer --- pack ---> rows ---> Batch
         of our slots         (in order)                                         best rows first
```

A slot is one micro-batch of every step. Its buffer and its batches depend only on its own records: neither on the
number of workers nor on which slots are on the same rank.
"""

import hashlib
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from nanovlm.config import DataConfig
from nanovlm.data.mixture import parts_of
from nanovlm.data.packing import image_cost, make_row, pack
from nanovlm.data.reader import Reader, Skipped
from nanovlm.data.source import Ref, Source
from nanovlm.data.types import Batch, Document, Row, Shrunk
from nanovlm.errors import UserError, printable

NAMED = 20  # skipped records to name; further ones are only counted
SHOWN = 3  # of them in the error that ends a run
JUDGED_AFTER = 100  # records to read before the share of bad ones is checked
LOSSES = ("too long", "corrupt", "damaged")
# Counts of records that were read, became documents, were packed, or were skipped.
COUNTED = ("read", "documents", "packed", "shrunk", "filtered", "other split", *LOSSES)


def collate(rows: list[Row]) -> Batch:
    """Stack rows and renumber their documents so that `doc_ids` are unique in the batch."""
    doc_ids, tile_doc_ids, first = [], [], 0
    for row in rows:
        doc_ids.append(torch.where(row.doc_ids < 0, row.doc_ids, row.doc_ids + first))
        tile_doc_ids.append(row.tile_doc_ids + first)
        first += int(row.doc_ids.max()) + 1
    return Batch(
        input_ids=torch.stack([r.input_ids for r in rows]),
        labels=torch.stack([r.labels for r in rows]),
        doc_ids=torch.stack(doc_ids),
        branch_ids=torch.stack([r.branch_ids for r in rows]),
        position_ids=torch.stack([r.position_ids for r in rows]),
        pixel_values=torch.cat([r.tiles for r in rows]),
        tile_doc_ids=torch.cat(tile_doc_ids),
        values={name: torch.stack([r.values[name] for r in rows]) for name in rows[0].values},
        grids=[grid for r in rows for grid in r.grids],
        span_ids=fill_spans(torch.stack, rows),
    )


def join(batches: list[Batch]) -> Batch:
    """Stack the rows of several batches and renumber their documents."""
    firsts = [0, *itertools.accumulate(int(batch.doc_ids.max()) + 1 for batch in batches)]
    shifted = [
        (torch.where(batch.doc_ids < 0, batch.doc_ids, batch.doc_ids + first), batch.tile_doc_ids + first)
        for batch, first in zip(batches, firsts, strict=False)
    ]
    doc_ids, tile_doc_ids = (torch.cat(parts) for parts in zip(*shifted, strict=True))
    names = ("input_ids", "labels", "branch_ids", "position_ids", "pixel_values")
    stacked: dict[str, Any] = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}
    values = {name: torch.cat([batch.values[name] for batch in batches]) for name in batches[0].values}
    spans, grids = fill_spans(torch.cat, batches), [grid for batch in batches for grid in batch.grids]
    return Batch(**stacked, doc_ids=doc_ids, tile_doc_ids=tile_doc_ids, values=values, grids=grids, span_ids=spans)


def fill_spans(put: Callable[[list[torch.Tensor]], torch.Tensor], parts: Sequence[Row | Batch]) -> torch.Tensor | None:
    """Put together the spans of rows or batches, int32[B, T], 0 for those without any; None where none has any."""
    if all(part.span_ids is None for part in parts):
        return None
    return put([torch.zeros_like(part.doc_ids) if part.span_ids is None else part.span_ids for part in parts])


class Slot:
    """The loader's state for one micro-batch of every step."""

    def __init__(self):
        self.next = 0  # number of the next record that it will read
        self.inbox: deque[tuple[Ref, Document]] = deque()  # read, but not in the buffer yet
        self.buffer: dict[int, tuple[str, Document]] = {}  # number -> name and document, oldest first
        # After a resume: number -> fingerprint of each document of the buffer or inbox that must be read again.
        self.waiting: dict[int, str] = {}
        self.num_buffered = 0  # how many of the oldest in `waiting` belong to the buffer
        self.counts = Counter()
        self.reasons: list[str] = []


class Loader:
    """An iterator over steps that yields a list of our slots' batches; endless, or for `num_epochs` passes.

    Before each batch the buffer of its slot is filled up to `pack_buffer` documents and packed. The batch takes the
    row with the oldest document, so that none waits for ever, and the fullest other rows; the rest stays in the
    buffer. When a slot's records end, its buffer is used up: its last batches are small, then it has none.

    With `val_fraction` a record is in the split `val` or `train` by its contents (split.py).
    A loader that loads a saved state goes on with exactly the documents that were not seen, with any number of workers
    and any assignment of slots to ranks.
    """

    def __init__(
        self,
        source: Source,
        process: Callable[[dict], Document],
        config: DataConfig,
        pad_token_id: int,
        slots: Sequence[int] = (0,),
        num_slots: int = 1,
        split: str = "train",
        num_epochs: int | None = None,
    ):
        self.source, self.config, self.pad_token_id = source, config, pad_token_id
        self.num_slots, self.num_epochs = num_slots, num_epochs
        self.reader = Reader(source, process, config, split)
        self.slots = {number: Slot() for number in slots}
        self.parts = [part.name for part in parts_of(source)]
        self.names = [*COUNTED, *(f"documents of {name}" for name in self.parts)]
        self.starts = {0: None}  # round -> `start` of the source for it, from the oldest round still needed
        self.batch_names = []  # the records of the last step
        self._printed, self._epoch = set(), None
        self._results = None
        for sentence in source.damaged:
            self._note(next(iter(self.slots.values())), "damaged", sentence)

    @property
    def counts(self) -> Counter:
        """The sum of our slots' counts: those in COUNTED, and the documents of each source."""
        return Counter({name: sum(slot.counts[name] for slot in self.slots.values()) for name in self.names})

    @property
    def sources(self) -> list[str]:
        """The names of several sources; of a single one nothing need be told apart."""
        return self.parts if len(self.parts) > 1 else []

    def __iter__(self):
        return self

    def __next__(self) -> list[Batch]:
        self.batch_names = []
        batches = [batch for slot in self.slots.values() if (batch := self._make_batch(slot)) is not None]
        oldest = self._oldest()
        self.starts = {number: start for number, start in self.starts.items() if number >= oldest}
        if not batches:
            raise StopIteration
        return batches

    def _make_batch(self, slot: Slot) -> Batch | None:
        """Pack the slot's documents and take out one batch; None when there is nothing left."""
        while slot.waiting and self._read_one():
            pass
        size, is_over = self.config.pack_buffer, False
        while True:
            while len(slot.buffer) < size and not is_over:
                is_over = not self._fill(slot)
            numbers, documents = list(slot.buffer), [document for _name, document in slot.buffer.values()]
            lengths, num_tiles = [len(d) for d in documents], [len(d.tiles) for d in documents]
            image_costs = [image_cost(d) for d in documents]
            packed = pack(lengths, num_tiles, self.config.row_length, self.config.max_tiles or None, image_costs)
            if is_over or len(packed) >= self.config.batch_rows:
                break
            size *= 2
        if not packed:
            if self.counts["read"] > self.counts["other split"] and not self.counts["documents"]:
                raise self._unusable()
            return None
        oldest = next(row for row in packed if 0 in row)
        fullest = sorted(packed, key=lambda row: (row is not oldest, -sum(lengths[i] for i in row)))
        rows = []
        for row in fullest[: self.config.batch_rows]:
            chosen = [slot.buffer.pop(numbers[i]) for i in row]
            self.batch_names += [name for name, _document in chosen]
            rows.append(make_row([document for _, document in chosen], self.config.row_length, self.pad_token_id))
            slot.counts["packed"] += len(row)
        batch = collate(rows)
        return batch.pin_memory() if torch.cuda.is_available() else batch

    def state_dict(self) -> dict[str, dict]:
        """Return the state of each of our slots by its number, ready for JSON."""
        oldest = self._oldest()
        shared = {"round": oldest, "start": self.starts[oldest], "data": self._describe()}
        return {
            str(number): shared
            | {
                "next": slot.next,
                "num_buffered": slot.num_buffered + len(slot.buffer),
                "waiting": slot.waiting
                | {n: fingerprint(document) for n, (_name, document) in slot.buffer.items()}
                | {ref.number: fingerprint(document) for ref, document in slot.inbox},
                "counts": dict(slot.counts),
                "reasons": list(slot.reasons),
            }
            for number, slot in self.slots.items()
        }

    def load_state_dict(self, states: dict[str, dict]):
        """Restore the position from the states of all slots. Raises UserError when the data have changed."""
        self.close()
        ours = {number: states[str(number)] for number in self.slots}
        for state in ours.values():
            for name, value in self._describe().items():
                if state["data"][name] != value:
                    raise UserError(f"the run was started with {name} = {state['data'][name]}, now it is {value}")
        first = min(ours.values(), key=lambda state: state["round"])
        self.starts = {first["round"]: first["start"]}
        for number, state in ours.items():
            slot = self.slots[number] = Slot()
            slot.next, slot.counts, slot.reasons = state["next"], Counter(state["counts"]), list(state["reasons"])
            slot.waiting = {int(n): mark for n, mark in state["waiting"].items()}
            slot.num_buffered = state["num_buffered"]

    def close(self):
        """End the worker processes; the loader starts new ones when it goes on."""
        if self._results is not None:
            self._results.close()
            self._results = None

    def refs_read(self) -> Iterator[Ref]:
        """Yield the refs of our split that our slots have read in their first pass, which takes reading them again."""
        ended = {}
        for ref in self.source.refs(list(self.slots), self.num_slots):
            if ref.number >= self.slots[ref.slot].next or ref.epoch > 0:
                ended[ref.slot] = True
            elif ref.slot not in ended and self.reader.is_ours(ref.key):
                yield ref
            if len(ended) == len(self.slots):
                return

    def _describe(self) -> dict:
        """Return what must be equal for a state to mean the same records."""
        return {"source": self.source.name, "micro_batches": self.num_slots}

    def _oldest(self) -> int:
        """Return the oldest round of which a slot still needs a record."""
        return min(min((slot.next, *slot.buffer, *slot.waiting, *(r.number for r, _ in slot.inbox)))
                   for slot in self.slots.values())  # fmt: skip

    def _fill(self, slot: Slot) -> bool:
        """Move the next document of a slot into its buffer; return False when there is none."""
        while not slot.inbox:
            if not self._read_one():
                return False
        ref, document = slot.inbox.popleft()
        slot.buffer[ref.number] = f"{ref.source}, {ref.where}", document
        return True

    def _read_one(self) -> bool:
        """Read the next record, of whichever slot it is; return False when there is none."""
        if self._results is None:
            self._results = self.reader.read_all(self._refs())
        item = next(self._results, None)
        if item is None:
            if self.counts["documents"]:
                self._judge()
            return False
        self._take(*item)
        return True

    def _refs(self) -> Iterator[Ref]:
        """Yield the refs to read, in order."""
        first, ended = min(self.starts), set()
        for ref in self.source.refs(list(self.slots), self.num_slots, self.starts[first]):
            slot = self.slots[ref.slot]
            self.starts[ref.number + 1] = ref.after
            if self.num_epochs is not None and ref.epoch >= self.num_epochs:
                ended.add(ref.slot)
                if len(ended) == len(self.slots):
                    return
            elif ref.number in slot.waiting or ref.number >= slot.next:
                yield ref

    def _take(self, ref: Ref, result: Document | Skipped):
        """Put a document into the inbox of its slot, or note why there is none."""
        slot, name = self.slots[ref.slot], printable(f"{ref.source}, {ref.where}", most=300)
        if self.sources and isinstance(result, Document):
            result.values["source"] = torch.full((len(result),), float(ref.part))
        if isinstance(result, Skipped) and result.kind == "missing":
            raise UserError(f"{name}: {result.reason}")
        if ref.number in slot.waiting:  # it was read before the run was resumed
            mark = slot.waiting.pop(ref.number)
            is_buffered, slot.num_buffered = slot.num_buffered > 0, max(0, slot.num_buffered - 1)
            if isinstance(result, Skipped):
                self._note(slot, result.kind, f"{name}: {result.reason}")
            elif fingerprint(result) != mark:
                raise UserError(f"{name} is not what it was when the run was stopped: its data, its tokenizer or its "
                                 "chat template has changed")  # fmt: skip
            elif is_buffered:
                slot.buffer[ref.number] = name, result
            else:
                slot.inbox.append((ref, result))
            return
        if ref.epoch > 0 and not self.counts["documents"]:
            raise self._unusable()
        if self._epoch is not None and ref.epoch > self._epoch:  # not after a resume: a pass is judged where it ends
            self._judge()
        self._epoch = ref.epoch
        slot.next = ref.number + 1
        slot.counts["read"] += not (isinstance(result, Skipped) and result.kind == "damaged")  # which is no record
        if isinstance(result, Skipped):
            self._note(slot, result.kind, f"{name}: {result.reason}")
            return
        slot.counts["documents"] += 1
        slot.counts["shrunk"] += isinstance(result, Shrunk)
        slot.counts[f"documents of {self.parts[ref.part]}"] += 1
        slot.inbox.append((ref, result))

    def _note(self, slot: Slot, kind: str, sentence: str):
        """Count what was skipped, and name a loss once."""
        slot.counts[kind] += 1
        if kind not in LOSSES:
            return
        sentence = printable(sentence)
        if sentence not in self._printed and len(self._printed) < NAMED:
            self._printed.add(sentence)
            print(f"skipped as {kind}: {sentence}", flush=True)
        if sentence not in slot.reasons and len(slot.reasons) < NAMED:
            slot.reasons.append(sentence)
        if self.counts["read"] - self.counts["other split"] >= JUDGED_AFTER:
            self._judge()

    def _judge(self):
        """Raise UserError when too many of the records read so far were lost."""
        counts = self.counts
        bad, read = counts["too long"] + counts["corrupt"], counts["read"] - counts["other split"]
        if bad > self.config.max_bad_fraction * read:
            kinds = ", ".join(f"{counts[kind]} {kind}" for kind in ("too long", "corrupt") if counts[kind])
            remedy = ". For what is too long, raise data.row_length, or give data.too_long = shrink"
            raise UserError(
                f"{bad} of {read} samples are unusable, more than data.max_bad_fraction = "
                f"{self.config.max_bad_fraction} allows ({kinds}): {self._reasons()}"
                f"{remedy if counts['too long'] else ''}"
            )

    def _unusable(self) -> UserError:
        named = self._reasons()
        return UserError(f"no sample of {self.source.name} could be used: {self._summary()}{named and f'; {named}'}")

    def _reasons(self) -> str:
        """Name the first of what was lost."""
        reasons = [sentence for slot in self.slots.values() for sentence in slot.reasons]
        return "; ".join(reasons[:SHOWN]) + ("; and others" if len(reasons) > SHOWN else "")

    def _summary(self) -> str:
        return ", ".join(f"{number} {kind}" for kind, number in sorted(self.counts.items()) if number)


def fingerprint(document: Document) -> str:
    """Hash the tokens, labels, values, grids and every 64th pixel, or feature, of a document, but not its source."""
    digest = hashlib.blake2b(str(document.grids or "").encode(), digest_size=8)
    values = [value for name, value in document.values.items() if name != "source"]
    for tensor in (document.input_ids, document.labels, document.tiles[..., ::8, ::8], *values):
        digest.update((tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy().tobytes())
    return digest.hexdigest()
