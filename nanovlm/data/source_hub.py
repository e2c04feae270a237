"""Raw records of a dataset on the hub, as a stream."""

import copy
import functools
import itertools
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from nanovlm.data.source import IN_ORDER, Order, Ref
from nanovlm.data.source_files import LARGEST_FILE
from nanovlm.data.source_names import fetch_from, read_named
from nanovlm.errors import UserError, printable


class Hub:
    """A dataset on the hub, read as a stream: `hub:owner/name` or `hub:owner/name:config`.

    Each pass reads the files in a new order, or in their own order if `order` does not shuffle. If the files divide
    evenly among the slots, each slot reads only its own; else every rank reads all and keeps its slots' records.
    """

    def __init__(self, spec: str, split: str = "train", order: Order = IN_ORDER, allow_urls: bool = False, **options):
        """Open the dataset; `options` go to `datasets.load_dataset`."""
        try:
            import datasets
        except ImportError:
            raise UserError(f"{spec} needs the package datasets: pip install datasets") from None
        self.name, self.order, self.damaged, self.allow_urls = spec, order, [], allow_urls
        dataset, _, config = spec.removeprefix("hub:").partition(":")
        if not dataset:
            raise UserError(f"{spec!r} names no dataset; write hub:owner/name or hub:owner/name:config")
        self.own_files = f"hf://datasets/{dataset}"
        try:
            self.dataset = datasets.load_dataset(dataset, config or None, split=split, streaming=True, **options)
        except Exception as error:  # the network, the hub and every builder raise errors of their own
            raise UserError(f"{spec}, split {split!r}, cannot be opened: {error}") from error
        if self.dataset.features is not None:
            self.dataset = self.dataset.decode(False)  # images as the bytes of their files
        # `datasets` warns that resuming loses the shuffle buffer; ours holds one record, which was already yielded.
        logging.getLogger("datasets.iterable_dataset").addFilter(_is_no_warning_of_a_lost_buffer)

    def refs(self, slots: Sequence[int], num_slots: int, start: dict | None = None) -> Iterator[Ref]:
        """Deal the records; each is its own key. `after` holds the state dicts of `datasets`."""
        start = start or {"number": 0, "places": {}}
        is_shared_out = num_slots > 1 and self.dataset.num_shards % num_slots == 0
        if start["number"] and is_shared_out == ("all" in start["places"]):
            raise UserError(
                f"the number of files of {self.name} has changed since the run stopped, so it cannot go on where it was"
            )
        if is_shared_out:
            if start["number"] and not set(map(str, slots)) <= start["places"].keys():
                raise UserError(
                    f"the files of {self.name} are shared out among the micro-batches, and those of this rank were on "
                    "several ranks: go on with as many ranks as before"
                )
            readers = {slot: self._read_on(start["places"].get(str(slot)), slot, num_slots) for slot in slots}
        else:
            readers = dict.fromkeys(range(num_slots), self._read_on(start["places"].get("all")))
        for number in itertools.count(start["number"]):
            records, places = {}, {}
            for slot, reader in readers.items():
                *records[slot], place = next(reader)
                places[str(slot) if is_shared_out else "all"] = place
            after = {"number": number + 1, "places": {name: place() for name, place in places.items()}}
            for slot in slots:
                record, epoch, count = records[slot]
                yield Ref(slot, number, epoch, record, self.name, f"record {count} of pass {epoch}", after)

    def read(self, key: dict) -> dict:
        """Fetch the images of a record: in it, among the files of the dataset, or from addresses if allowed."""
        return fetch_from(key, self._read_named, f"a record of {self.name}")

    def _read_named(self, name: str) -> bytes:
        where = f"a record of {self.name}"
        if re.match(re.escape(self.own_files) + "[@/]", name) and ".." not in name.split("/"):
            return _read_remote(name, where)
        if re.match(r"https?://", name, re.IGNORECASE):
            return read_named(name, Path(), Path(), where, self.allow_urls)
        raise UserError(f"{where} names {printable(name, most=100)}, which is not a file of the dataset")

    def _read_on(
        self, place: dict | None, slot: int = 0, num_slots: int = 1
    ) -> Iterator[tuple[dict, int, int, Callable]]:
        """Yield (record, pass, number in the pass, function that returns the place after it), starting at `place`."""
        epoch, count, state = (place or {"epoch": 0, "count": 0, "state": None}).values()
        while True:
            dataset = self._open(epoch, slot, num_slots)
            if state is not None:
                dataset.load_state_dict(state)
            for record in dataset:
                yield record, epoch, count, functools.partial(_place, epoch, count + 1, dataset)
                count += 1
            if not count:
                raise UserError(f"{self.name} has no records{f' for slot {slot}' if num_slots > 1 else ''}")
            epoch, count, state = epoch + 1, 0, None

    def _open(self, epoch: int, slot: int, num_slots: int):
        """Return the dataset in the order of a pass; with several slots, only the given slot's share of the files."""
        from datasets.distributed import split_dataset_by_node

        dataset = copy.deepcopy(self.dataset)  # the object stores its position
        if self.order.shuffle:
            seeds = [self.order.seed, epoch] + ([] if self.order.part is None else [self.order.part])
            # A buffer of one keeps the order of the records in a file, so resuming is cheap.
            dataset = dataset.shuffle(generator=np.random.default_rng(seeds), buffer_size=1, max_buffer_input_shards=1)
        return split_dataset_by_node(dataset, slot, num_slots) if num_slots > 1 else dataset


def _place(epoch, count, dataset) -> dict:
    return {"epoch": epoch, "count": count, "state": dataset.state_dict()}


def _is_no_warning_of_a_lost_buffer(record: logging.LogRecord) -> bool:
    return "without the buffer content" not in record.getMessage()


def _read_remote(name: str, where: str) -> bytes:
    """Read a file of the hub. Raises UserError that begins with `where`."""
    import fsspec  # comes with datasets

    try:
        with fsspec.open(name, "rb") as file:
            data = file.read(LARGEST_FILE + 1)  # pyright: ignore[reportAttributeAccessIssue]
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{where} names {printable(name, most=100)}, which cannot be read: {error}") from error
    if len(data) > LARGEST_FILE:
        raise UserError(f"{where} names {printable(name, most=100)}, which has more than {LARGEST_FILE} bytes")
    return data
