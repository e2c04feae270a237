"""Raw records in the rows of parquet files."""

import bisect
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from nanovlm.data.pictures import fetch_images
from nanovlm.data.records import RATINGS
from nanovlm.data.source import IN_ORDER, Order, Ref, deal
from nanovlm.data.source_files import check_index, find_files, join_names, read_file
from nanovlm.errors import UserError


class Parquet:
    """Records in the rows of parquet files: a file, a glob, a folder, or a list of these.

    Images are bytes or structs of bytes and path, one or a list, as in FineVision and The Cauldron. The last row group
    read stays in memory, so reading is fast when successive rows are in the same row group.
    """

    columns = ("images", "image", "texts", "messages", "independent", *RATINGS)

    def __init__(self, paths: str | Path | Iterable[str | Path], order: Order = IN_ORDER):
        parquet = _import_parquet()
        self.files, self.damaged, self.order = find_files(paths, ".parquet"), [], order
        self.name = join_names(self.files)
        self.groups = []  # of each row group: file, number in the file
        self.starts = self.blocks = array("q", [0])  # the first row of each row group, and the end
        for file in self.files:
            try:
                metadata = parquet.read_metadata(file)
                names = metadata.schema.to_arrow_schema().names
            except (OSError, ValueError, NotImplementedError) as error:
                raise UserError(f"{file} is damaged or no parquet file: {error}") from error
            if not {"texts", "messages"} & set(names):
                raise UserError(f"{file} needs a column texts or messages; it has {', '.join(names)}")
            for number in range(metadata.num_row_groups):
                self.groups.append((file, number))
                self.starts.append(self.starts[-1] + metadata.row_group(number).num_rows)
        if not len(self):
            raise UserError(f"{self.name} has no rows")
        self.last = None  # (row group, its table)

    def __len__(self):
        return self.starts[-1]

    def refs(self, slots: Sequence[int], num_slots: int, start: int | None = None) -> Iterator[Ref]:
        return deal(self, slots, num_slots, start)

    def read(self, key: int) -> dict:
        check_index(self, key)
        group = bisect.bisect_right(self.starts, key) - 1
        file, number = self.groups[group]
        row = key - self.starts[group]
        where = f"row {row} of row group {number} of {file}"
        last = self.last
        try:
            if last is None or last[0] != group:
                # One thread: a forked process does not inherit the other threads.
                with _import_parquet().ParquetFile(file) as opened:
                    names = [name for name in opened.schema_arrow.names if name in self.columns]
                    last = self.last = group, opened.read_row_group(number, columns=names, use_threads=False)
            record = last[1].slice(row, 1).to_pylist()[0]
        except (OSError, ValueError, LookupError, TypeError, NotImplementedError) as error:
            raise UserError(f"{where} cannot be read: {error}") from error
        return fetch_images(record, lambda name: read_file(file.parent / name, where))


def _import_parquet():
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet files need the package pyarrow: pip install pyarrow") from None
    return pyarrow.parquet
