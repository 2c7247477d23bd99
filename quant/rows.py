"""Tensors over all calibration images, in memory or, where they are large, in a file that the system pages."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import UserError

HELD = 2**29
"""Bytes up to which a tensor is held in memory."""


class Rows(Sequence):
    """Tensors (N, ..) over the same images: a sequence of batches, tuples of tensors (B, ..) on `device`.

    Args:
        tensors: on any device.
        batch_size: images of a batch.
        device: where batches are wanted.
    """

    def __init__(self, tensors: Sequence[Tensor], batch_size: int, device: torch.device) -> None:
        self.tensors, self.batch_size, self.device = tuple(tensors), batch_size, device

    def __len__(self) -> int:
        return -(-len(self.tensors[0]) // self.batch_size)

    def __getitem__(self, number: int) -> tuple[Tensor, ...]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self.first(self.batch_size, number * self.batch_size)

    def first(self, count: int, start: int = 0) -> tuple[Tensor, ...]:
        """The images from `start` on, at most `count`."""
        return tuple(x[start : start + count].to(self.device) for x in self.tensors)

    def at(self, chosen: Tensor) -> tuple[Tensor, ...]:
        """The images `chosen` (k,)."""
        return tuple(rows_at(x, chosen) for x in self.tensors)


def rows_at(x: Tensor, chosen: Tensor) -> Tensor:
    """Rows `chosen` (k,) of a tensor on any device, on that of `chosen`."""
    return x[chosen.to(x.device)].to(chosen.device)


@torch.no_grad()
def outputs(run: Callable[..., Tensor], rows: Rows) -> Tensor:
    """What `run` makes of the batches, as one tensor (N, ..): where they are, or in a file if it is larger than `HELD`.

    Raises:
        UserError: no room for the file.
    """
    made, done = None, 0
    for batch in rows:
        out = run(*batch)
        if made is None:
            made = _empty((len(rows.tensors[0]), *out.shape[1:]), out)
        made[done : done + len(out)] = out
        done += len(out)
    return made


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A tensor to be filled. The file has no name, so it is gone with the tensor, however the process ends."""
    count = torch.Size(shape).numel()
    size = count * like.element_size()
    if size <= HELD:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows")
        try:
            with open(file, "wb") as opened:
                # What is mapped must be there: a full disk ends a process that writes to memory.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(opened.fileno(), 0, size)
                else:
                    opened.truncate(size)
        except OSError as error:
            where = f"{size / 2**30:.1f} GiB in {tempfile.gettempdir()}"
            raise UserError(
                f"no room for {where} ({error.strerror}); set TMPDIR, or calibrate on fewer images"
            ) from None
        return torch.from_file(str(file), shared=True, size=count, dtype=like.dtype).view(shape)
