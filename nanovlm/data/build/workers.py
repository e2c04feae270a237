"""Jobs -> their results, in order, by worker processes."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from nanovlm.data.reader import start_worker
from nanovlm.errors import UserError


def work_all(worker: Dataset, jobs: Iterable, num_workers: int) -> Iterator[Any]:
    """Yield what a worker makes of each job, in their order, here or in worker processes."""
    results = DataLoader(
        Careful(worker),
        sampler=jobs,  # pyright: ignore[reportArgumentType]
        batch_size=None,
        collate_fn=lambda result: result,
        num_workers=num_workers,
        multiprocessing_context="fork" if num_workers else None,
        worker_init_fn=start_worker,
    )
    try:
        for result in results:
            if isinstance(result, Exception):
                raise result
            yield result
    except RuntimeError as error:
        if not re.match(r"DataLoader worker .*(killed by signal|exited unexpectedly)", str(error)):
            raise
        raise UserError(
            "a process that judges records was ended from outside, as a system does that runs out of memory: give the "
            f"command again, with fewer num_workers ({str(error).splitlines()[0]})"
        ) from error


class Careful(Dataset):
    """Returns the errors that are the user's or the system's, so that they arrive as they are."""

    def __init__(self, worker: Dataset):
        self.worker = worker

    def __getitem__(self, job):
        try:
            return self.worker[job]
        except (UserError, OSError) as error:
            return error
