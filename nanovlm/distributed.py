"""Several processes, one run: start the ranks, and exchange what they found.

torchrun starts a process (a rank) for each GPU, or several on a CPU, and starts them again when one fails. Without
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

T = TypeVar("T")


@contextlib.contextmanager
def ranks(device: torch.device):
    """Join the other ranks where torchrun started us; yield our device, which on a machine with GPUs is one of them."""
    if "LOCAL_RANK" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        device, most = torch.device("cuda", int(os.environ["LOCAL_RANK"])), torch.cuda.device_count()
        if device.index >= most:
            raise ValueError(f"there is no GPU for local rank {device.index}: --nproc-per-node must be at most {most}")
        torch.cuda.set_device(device)
    store, rank, num_ranks = next(dist.rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun keeps its store when it starts ranks again, and in it the addresses of those that are gone
        # (pytorch issue 135712). On several machines, where counts may differ, examples/slurm.sh lets it make new ones.
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks)
    yield device
    dist.destroy_process_group()  # not after an error, when other ranks may be gone


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def wait():
    """Wait until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def add_up(numbers: dict[str, int]) -> dict[str, int]:
    """Add counts up over all ranks, which name the same ones in the same order."""
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
    """Return a group of all ranks for what goes on beside the training, so that messages are not mixed up."""
    return dist.new_group(backend="gloo") if dist.is_initialized() else None


def gather(value) -> list:
    """Return the value of every rank, the first rank's first."""
    values = [value] * num_ranks()
    if num_ranks() > 1:
        dist.all_gather_object(values, value)
    return values


def from_first(make: Callable[[], T]) -> T:
    """Return what `make` returns on the first rank, the only one that calls it; it is pickled for the others."""
    values = [make() if rank() == 0 else None]
    if num_ranks() > 1:
        dist.broadcast_object_list(values)
    return values[0]
