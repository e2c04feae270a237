"""Raw records in Arrow files, and in the folders that the package datasets writes with `save_to_disk`."""

import bisect
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from nanovlm.data.source import IN_ORDER, Order, Ref, deal
from nanovlm.data.source_files import check_index, find_files, join_names
from nanovlm.data.source_names import fetch_named
from nanovlm.data.source_parquet import class_names, import_arrow, name_classes
from nanovlm.errors import UserError
from nanovlm.files import read_json

MAGIC = b"ARROW1\0\0"  # of a file with a table of contents at its end; its batches are also a stream


class Arrow:
    """Records in the rows of .arrow files: a file, a glob, a folder, or a list of these.

    Files are mapped into memory, so only the rows that are read take any. One that is cut off keeps its whole batches.
    """

    blocks = None

    def __init__(self, paths: str | Path | Iterable[str | Path], order: Order = IN_ORDER, allow_urls: bool = False):
        self.files, self.damaged, self.order, self.allow_urls = find_files(paths, ".arrow"), [], order, allow_urls
        self.name = join_names(self.files)
        self.schemas, self.classes = [], []  # of each file
        self.batches = []  # of each batch: number of the file, place
        self.starts = array("q", [0])  # the first row of each batch, and the end
        for number, file in enumerate(self.files):
            self._scan(number, file)
        if not len(self):
            raise UserError("; ".join(self.damaged) or f"{self.name} has no rows")

    def __len__(self):
        return self.starts[-1]

    def refs(self, slots: Sequence[int], num_slots: int, start: int | None = None) -> Iterator[Ref]:
        return deal(self, slots, num_slots, start)

    def read(self, key: int) -> dict:
        check_index(self, key)
        batch = bisect.bisect_right(self.starts, key) - 1
        number, place = self.batches[batch]
        file, row = self.files[number], key - self.starts[batch]
        where = f"row {row} of the batch at byte {place} of {file}"
        arrow = import_arrow("pyarrow")
        try:
            with arrow.memory_map(str(file)) as source:
                source.seek(place)
                rows = arrow.ipc.read_record_batch(arrow.ipc.read_message(source), self.schemas[number]).slice(row, 1)
                rows.validate(full=True)  # whose offsets may lead out of the file
                record = name_classes(rows.to_pylist()[0], self.classes[number])
        except (OSError, ValueError, LookupError, TypeError, EOFError, NotImplementedError) as error:
            raise UserError(f"{where} cannot be read: {error}") from error
        return fetch_named(record, file.parent, file.parent, where, self.allow_urls)

    def _scan(self, number: int, file: Path):
        """Note where the batches of a file are, and what is wrong with it."""
        arrow = import_arrow("pyarrow")
        num_rows = len(self)
        try:
            with arrow.memory_map(str(file)) as source:
                if source.read(len(MAGIC)) != MAGIC:
                    source.seek(0)
                schema = arrow.ipc.read_schema(arrow.ipc.read_message(source))
                self.schemas.append(schema)
                self.classes.append(class_names(schema))
                while True:
                    place = source.tell()
                    if place == source.size():  # datasets ends its streams with a mark; one without it is whole too
                        break
                    message = arrow.ipc.read_message(source)
                    if message.type != "record batch":
                        raise UserError(f"holds a {message.type} at byte {place}: save it as parquet instead")
                    batch = arrow.ipc.read_record_batch(message, schema)
                    self.batches.append((number, place))
                    self.starts.append(self.starts[-1] + batch.num_rows)
        except EOFError:
            return  # the mark of the end
        except (OSError, ValueError, TypeError, NotImplementedError) as error:
            if len(self.schemas) == number or isinstance(error, UserError):
                raise UserError(f"{file} is damaged or no Arrow file: {error}") from error
            whole = len(self) - num_rows
            self.damaged.append(f"{file} is cut off or damaged ({error}): {whole} whole records are before that")


def is_saved(folder: Path) -> bool:
    """Tell whether a folder was written by `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def open_saved(folder: Path, split: str, order: Order, allow_urls: bool) -> Arrow:
    """Open a folder that `save_to_disk` wrote; one of several splits has its folder in it."""
    if (folder / "dataset_dict.json").is_file():
        splits = list(map(str, read_json(folder / "dataset_dict.json").get("splits") or []))
        if split not in splits or not (folder / split).is_dir():
            raise UserError(f"{folder} has no split {split!r}: name the folder of one of {', '.join(splits)} in it")
        folder = folder / split
    state = read_json(folder / "state.json")
    try:
        names = [str(part["filename"]) for part in state["_data_files"]]
    except (LookupError, TypeError) as error:
        raise UserError(f"{folder / 'state.json'} does not name the files of a saved data set") from error
    if outside := [name for name in names if Path(name).name != name]:
        raise UserError(f"{folder / 'state.json'} names {outside[0]!r}, which is not a file of its folder")
    return Arrow([folder / name for name in names], order, allow_urls)
