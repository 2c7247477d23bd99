"""Several processes on one task, as `torchrun` starts them. Without it there is one rank, and nothing here acts."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from utils.device import pick_device
from utils.lazy import dist, torch

if TYPE_CHECKING:
    from torch import Tensor


def rank() -> int:
    """The number of this process, 0 for the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """How many processes work on the task."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def process_group(device: str, gpu: int) -> Iterator[torch.device]:
    """Join the other ranks, if `torchrun` started any, and give this one its device.

    Ranks take the GPUs of their machine in turn. Only rank 0 prints.

    Args:
        device: `--device`.
        gpu: `--gpu`, for a task of one process.

    Raises:
        UserError: a device that does not exist.
    """
    if "RANK" not in os.environ:
        yield pick_device(device, gpu)
        return
    chosen = pick_device(device, int(os.environ["LOCAL_RANK"]) if device != "cpu" and torch.cuda.is_available() else 0)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
            if rank() > 0:
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            yield chosen
        sys.stdout.flush()
    finally:
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Return once every rank is here."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def rank_zero_first() -> Iterator[None]:
    """What stands inside is done by rank 0, then by the others: files that one makes and all read."""
    if rank() > 0:
        wait_for_all()
    yield
    if rank() == 0:
        wait_for_all()


def summed(values: list[float], device: torch.device) -> list[float]:
    """The sums of numbers over the ranks."""
    if ranks() == 1:
        return values
    return _reduced(torch.tensor(values, dtype=torch.float64, device=device), dist.ReduceOp.SUM).tolist()


def total(values: Tensor) -> Tensor:
    """The sum of a tensor, element by element, over the ranks."""
    return _reduced(values, dist.ReduceOp.SUM)


def gathered(values: Tensor) -> Tensor:
    """The rows of a tensor, as many on each, of all ranks: the same on all of them."""
    if ranks() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(ranks())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def lowest(values: Tensor) -> Tensor:
    """The lowest of a tensor, element by element, over the ranks."""
    return _reduced(values, dist.ReduceOp.MIN)


def highest(values: Tensor) -> Tensor:
    """The highest of a tensor, element by element, over the ranks."""
    return _reduced(values, dist.ReduceOp.MAX)


def _reduced(values: Tensor, operation: dist.ReduceOp) -> Tensor:
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values, operation)
    return values
