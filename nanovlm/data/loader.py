"""Row -> Batch. Read documents, pack them, stack rows into batches, and know where it is."""

import torch

from nanovlm.data.images import normalize
from nanovlm.data.packing import make_row, pack
from nanovlm.data.types import Batch, Row


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

    `source[i]` is a Sample, `process(sample)` its Document; the source is read in order, over and over.
    Before each batch the buffer is filled up to `buffer_size` documents and packed; the fullest rows make
    the batch, and so does the row with the oldest document, so that none waits for ever. What is not used
    stays in the buffer. The state is the next index and the indices in the buffer: a loader that is given
    it goes on with exactly the documents that have not been seen.
    """

    def __init__(self, source, process, row_length: int, batch_rows: int, buffer_size: int, pad_token_id: int):
        self.source, self.process = source, process
        self.row_length, self.batch_rows, self.buffer_size = row_length, batch_rows, buffer_size
        self.pad_token_id = pad_token_id
        self.next_index = 0
        self.buffer = {}  # index -> Document, oldest first

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        size = self.buffer_size
        while True:
            while len(self.buffer) < size:
                self._read(self.next_index)
                self.next_index += 1
            indices = list(self.buffer)
            documents = list(self.buffer.values())
            lengths = [len(d) for d in documents]
            packed = pack(lengths, [len(d.tiles) for d in documents], self.row_length)
            if len(packed) >= self.batch_rows:
                break
            size *= 2
        oldest = next(row for row in packed if 0 in row)
        fullest = sorted(packed, key=lambda row: (row is not oldest, -sum(lengths[i] for i in row)))
        rows = []
        for row in fullest[: self.batch_rows]:
            rows.append(make_row([self.buffer.pop(indices[i]) for i in row], self.row_length, self.pad_token_id))
        return collate(rows)

    def _read(self, index):
        document = self.process(self.source[index % len(self.source)])
        if len(document) > self.row_length:
            raise ValueError(
                f"sample {index % len(self.source)} has {len(document)} tokens, "
                f"more than data.row_length = {self.row_length}"
            )
        self.buffer[index] = document

    def state_dict(self) -> dict:
        """Return the position as plain numbers."""
        return {"next_index": self.next_index, "buffer": list(self.buffer)}

    def load_state_dict(self, state: dict):
        """Go to a position that `state_dict` returned."""
        self.next_index = state["next_index"]
        self.buffer = {}
        for index in state["buffer"]:
            self._read(index)
