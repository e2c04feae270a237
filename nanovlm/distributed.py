"""One run in several processes: join the process group, and exchange values between ranks.

torchrun starts a process (a rank) for each GPU, or several on a CPU, and restarts all of them when one fails. Without
torchrun there is one rank, and everything here is the identity.
"""

import contextlib
import functools
import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nanovlm.errors import UserError

T = TypeVar("T")


@contextlib.contextmanager
def ranks(device: torch.device):
    """Join the process group if torchrun started this process; yield its device, on CUDA its local rank's GPU."""
    if "LOCAL_RANK" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        device, most = torch.device("cuda", int(os.environ["LOCAL_RANK"])), torch.cuda.device_count()
        if device.index >= most:
            raise UserError(f"there is no GPU for local rank {device.index}: --nproc-per-node must be at most {most}")
        torch.cuda.set_device(device)
    store, rank, num_ranks = next(dist.rendezvous("env://"))  # pyright: ignore[reportPrivateImportUsage]
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # After a restart torchrun's store still holds the addresses of the dead ranks (pytorch issue 135712). Restart
        # counts may differ between machines, so examples/slurm.sh has torchrun make new stores there.
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)  # pyright: ignore[reportPrivateImportUsage]
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks)
    yield device
    dist.destroy_process_group()  # not after an error, when other ranks may be gone


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def wait():
    """Wait until every rank has called this."""
    if dist.is_initialized():
        dist.barrier()


def add_up(numbers: dict[str, int]) -> dict[str, int]:
    """Sum counts over all ranks; every rank must pass the same names in the same order."""
    if num_ranks() == 1:
        return numbers
    values = torch.tensor(list(numbers.values()), dtype=torch.float64)
    dist.all_reduce(values)
    return dict(zip(numbers, map(int, values.tolist()), strict=True))


def add_up_tensor(x: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, on its device and without waiting for it."""
    if num_ranks() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


@functools.cache
def checkpoint_group() -> dist.ProcessGroup | None:
    """Return a process group of all ranks for checkpoints, so that their messages do not mix with those of training."""
    if not dist.is_initialized():
        return None
    return dist.new_group(backend="gloo")  # pyright: ignore[reportReturnType]


def gather(value, group: dist.ProcessGroup | None = None) -> list:
    """Return the values of all ranks, in rank order; `group` is another one of all ranks than the default."""
    values = [value] * num_ranks()
    if num_ranks() > 1:
        dist.all_gather_object(values, value, group)
    return values


def from_first(make: Callable[[], T]) -> T:
    """Return what `make` returns on the first rank, the only one that calls it; it is pickled for the others."""
    values: list = [make() if rank() == 0 else None]
    if num_ranks() > 1:
        dist.broadcast_object_list(values)
    return values[0]
