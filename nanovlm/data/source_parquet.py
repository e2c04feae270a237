"""Raw records in the rows of parquet files."""

import bisect
import importlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from nanovlm.data.source import IN_ORDER, Order, Ref, deal
from nanovlm.data.source_files import check_index, find_files, join_names
from nanovlm.data.source_names import fetch_named
from nanovlm.errors import UserError

LARGEST_GROUP = 2**32  # bytes of a row group, which is in memory as a whole


class Parquet:
    """Records in the rows of parquet files: a file, a glob, a folder, or a list of these.

    Images are bytes or structs of bytes and path, one or a list, as in FineVision and The Cauldron. The last row group
    read stays in memory, so reading is fast when successive rows are in the same row group.
    """

    def __init__(self, paths: str | Path | Iterable[str | Path], order: Order = IN_ORDER, allow_urls: bool = False):
        parquet = import_arrow("pyarrow.parquet")
        self.files, self.damaged, self.order, self.allow_urls = find_files(paths, ".parquet"), [], order, allow_urls
        self.name = join_names(self.files)
        self.groups = []  # of each row group: file, number in the file
        self.starts = self.blocks = array("q", [0])  # the first row of each row group, and the end
        for file in self.files:
            try:
                metadata = parquet.read_metadata(file)
                metadata.schema.to_arrow_schema()
            except (OSError, ValueError, NotImplementedError) as error:
                raise UserError(f"{file} is damaged or no parquet file: {error}") from error
            for number in range(metadata.num_row_groups):
                self.groups.append((file, number))
                self.starts.append(self.starts[-1] + metadata.row_group(number).num_rows)
        if not len(self):
            raise UserError(f"{self.name} has no rows")
        self.last = None  # (row group, its table, the names of its classes)

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
                parquet = import_arrow("pyarrow.parquet")
                metadata = parquet.read_metadata(file)
                if (size := metadata.row_group(number).total_byte_size) > LARGEST_GROUP:
                    raise UserError(f"its row group has {size} bytes, more than {LARGEST_GROUP}")
                # A value that a file holds once and repeats is not copied for each row, or 20 MB become all memory.
                columns = map(metadata.schema.column, range(len(metadata.schema)))
                columns = (column for column in columns if column.physical_type == "BYTE_ARRAY")
                texts = [column.path for column in columns if column.logical_type.type != "DECIMAL"]
                # One thread: a forked process does not inherit the other threads.
                with parquet.ParquetFile(file, read_dictionary=texts, metadata=metadata) as opened:
                    names = class_names(opened.schema_arrow)
                    last = self.last = group, opened.read_row_group(number, use_threads=False), names
            record = name_classes(last[1].slice(row, 1).to_pylist()[0], last[2])
        except (OSError, ValueError, LookupError, TypeError, NotImplementedError) as error:
            raise UserError(f"{where} cannot be read: {error}") from error
        return fetch_named(record, file.parent, file.parent, where, self.allow_urls)


def class_names(schema) -> dict[str, list[str]]:
    """Return the names of the classes of the columns that the package datasets writes as ClassLabel, numbers."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: list(feature["names"])
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}  # a file that datasets did not write


def name_classes(record: dict, classes: dict[str, list[str]]) -> dict:
    """Replace the numbers of classes by their names; -1 is datasets' number of a class that is not known."""
    for column, names in classes.items():
        if isinstance(number := record.get(column), int):
            record[column] = names[number] if 0 <= number < len(names) else None
    return record


def import_arrow(module: str):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError("parquet and arrow files need the package pyarrow: pip install pyarrow") from None
