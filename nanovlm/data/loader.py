"""Row -> Batch. Read documents, pack them, stack rows into batches, and know where it is."""

import functools
from collections.abc import Callable

import numpy as np
import torch

from nanovlm.config import DataConfig
from nanovlm.data.images import normalize
from nanovlm.data.packing import make_row, pack
from nanovlm.data.types import Batch, Document, Row, Sample


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


class Loader:
    """An endless iterator of batches over a source.

    `source[i]` is a Sample, `process(sample)` its Document. The source is read over and over, each time in
    another order that the seed decides, or in its own order with `shuffle=False`.

    Before each batch the buffer is filled up to `pack_buffer` documents and packed; the fullest rows make the
    batch, and so does the row with the oldest document, so that none waits for ever. What is not used stays in
    the buffer. The state is the next index and the indices in the buffer: a loader that is given it goes on with
    exactly the documents that have not been seen.
    """

    def __init__(self, source, process: Callable[[Sample], Document], config: DataConfig, pad_token_id: int, seed: int):
        self.source, self.process, self.config = source, process, config
        self.pad_token_id, self.seed = pad_token_id, seed
        self.next_index = 0  # counts on from one pass over the source to the next
        self.buffer = {}  # index -> Document, oldest first
        self._order = functools.lru_cache(maxsize=2)(self._make_order)

    def __next__(self) -> Batch:
        size = self.config.pack_buffer
        while True:
            while len(self.buffer) < size:
                self._read(self.next_index)
                self.next_index += 1
            indices = list(self.buffer)
            documents = list(self.buffer.values())
            lengths = [len(d) for d in documents]
            packed = pack(lengths, [len(d.tiles) for d in documents], self.config.row_length)
            if len(packed) >= self.config.batch_rows:
                break
            size *= 2
        oldest = next(row for row in packed if 0 in row)
        fullest = sorted(packed, key=lambda row: (row is not oldest, -sum(lengths[i] for i in row)))
        rows = []
        for row in fullest[: self.config.batch_rows]:
            chosen = [self.buffer.pop(indices[i]) for i in row]
            rows.append(make_row(chosen, self.config.row_length, self.pad_token_id))
        return collate(rows)

    def _read(self, index):
        epoch, place = divmod(index, len(self.source))
        place = int(self._order(epoch)[place])
        document = self.process(self.source[place])
        if len(document) > self.config.row_length:
            raise ValueError(
                f"sample {place} has {len(document)} tokens, more than data.row_length = {self.config.row_length}"
            )
        self.buffer[index] = document

    def _make_order(self, epoch):
        if not self.config.shuffle:
            return range(len(self.source))
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.source))

    def places_read(self) -> list[int]:
        """List the indices of the source that were read at least once."""
        return list(map(int, self._order(0)[: self.next_index]))

    def state_dict(self) -> dict:
        """Return the position as plain numbers."""
        return {"next_index": self.next_index, "buffer": list(self.buffer)}

    def load_state_dict(self, state: dict):
        """Go to a position that `state_dict` returned."""
        self.next_index = state["next_index"]
        self.buffer = {}
        for index in state["buffer"]:
            self._read(index)
