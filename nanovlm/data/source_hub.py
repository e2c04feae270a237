"""Raw records of a dataset of the hub, as a stream."""

from collections.abc import Iterator

import numpy as np

from nanovlm.data.source_files import fetch_images


class Hub:
    """A dataset of the hub, read as a stream: `hub:owner/name` or `hub:owner/name:config`.

    Each epoch reads the files in another order, or with `shuffle` False in their own. Read it in one process: inside
    a torch DataLoader, `datasets` would deal the files out to the workers.
    """

    def __init__(self, spec: str, split: str = "train", seed: int = 0, shuffle: bool = True, **options):
        """Open the dataset; `options` go to `datasets.load_dataset`."""
        try:
            import datasets
        except ImportError:
            raise ValueError(f"{spec} needs the package datasets: pip install datasets") from None
        self.name, self.seed, self.shuffle, self.damaged = spec, seed, shuffle, []
        dataset, _, config = spec.removeprefix("hub:").partition(":")
        if not dataset:
            raise ValueError(f"{spec!r} names no dataset; write hub:owner/name or hub:owner/name:config")
        try:
            self.dataset = datasets.load_dataset(dataset, config or None, split=split, streaming=True, **options)
        except Exception as error:  # the network, the hub and every builder have errors of their own
            raise ValueError(f"{spec}, split {split!r}, cannot be opened: {error}") from error
        if self.dataset.features is not None:
            self.dataset = self.dataset.decode(False)  # images as the bytes of their files

    def stream(self, start: int, epoch: int) -> Iterator[dict]:
        """Yield the records of a pass from the start-th on. An image that cannot be read is left for `to_sample`."""
        dataset = self.dataset
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch])
            # A buffer of one leaves the records of a file in their order, which is cheap to come back to.
            dataset = dataset.shuffle(generator=order, buffer_size=1, max_buffer_input_shards=1)
        for record in dataset.skip(start):
            yield fetch_images(record, _read_remote)


def _read_remote(name: str) -> bytes | str:
    import fsspec  # comes with datasets

    try:
        with fsspec.open(name, "rb") as file:
            return file.read()
    except (OSError, ValueError, ImportError):
        return name
