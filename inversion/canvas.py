"""The pixels under optimization: kept patches alone, and what jitter does to them.

The full image never exists here. A roll by (dy, dx) followed by a flip, applied to the image that has the kept patches
and zeros elsewhere, is a new grid position for every kept patch (whole patches) and a window that is read at most half
a patch beside it (the remainder), parts of which may lie in its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from inversion.inits import INITS
from models import PatchGrid

OFFSETS = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1))


class Jitter(NamedTuple):
    """A roll by (`dy`, `dx`) pixels, then a horizontal flip if `flip`; one draw for the batch.

    Numbers, or int64 tensors () on the device: what a CUDA graph records must not depend on the draw.
    """

    dy: int | Tensor
    dx: int | Tensor
    flip: bool | Tensor


def draw_jitters(count: int, grid: PatchGrid, generator: torch.Generator, flip: bool = True) -> list[Jitter]:
    """`count` draws: rolls uniform in [-H/8, H/8] and [-W/8, W/8] pixels, flips (if `flip`) with probability 1/2."""
    height, width = (size // 8 for size in grid.image_size)
    rows = torch.randint(-height, height + 1, (count,), generator=generator).tolist()
    cols = torch.randint(-width, width + 1, (count,), generator=generator).tolist()
    flips = torch.randint(0, 2, (count,), generator=generator).tolist()
    return [Jitter(dy, dx, flip and bool(flipped)) for dy, dx, flipped in zip(rows, cols, flips, strict=True)]


def split_roll(roll: int | Tensor, patch: int) -> tuple[int, int] | tuple[Tensor, Tensor]:
    """A roll in pixels -> (whole patches, remainder in pixels), the remainder in [-patch/2, patch/2)."""
    whole = (roll + patch // 2) // patch
    return whole, roll - whole * patch


def jittered_positions(positions: Tensor, grid: PatchGrid, jitter: Jitter) -> Tensor:
    """Where the patches at `positions` (B, n) are after the jitter: the grid wraps around, a flip mirrors columns."""
    rows = (positions // grid.cols + split_roll(jitter.dy, grid.height)[0]) % grid.rows
    cols = (positions % grid.cols + split_roll(jitter.dx, grid.width)[0]) % grid.cols
    return rows * grid.cols + cols + jitter.flip * (grid.cols - 1 - 2 * cols)


@dataclass(frozen=True)
class Neighbours:
    """For each of the M = B * n kept patches its eight neighbours (and itself), among the M.

    Keys are (row, column) offsets in -1, 0, 1. `index` (M,) is meaningless where `kept` (M,) is 0.
    `kept` counts neighbours across the border of the image, as a roll does; `adjacent` does not, as TV does.
    """

    index: dict[tuple[int, int], Tensor]
    kept: dict[tuple[int, int], Tensor]
    adjacent: dict[tuple[int, int], Tensor]

    @classmethod
    def of(cls, positions: Tensor, grid: PatchGrid) -> Neighbours:
        """Neighbours of the patches at `positions` (B, n), int64."""
        batch, count = positions.shape
        device = positions.device
        slot = torch.full((batch, grid.count), -1, device=device)
        slot.scatter_(1, positions, torch.arange(batch * count, device=device).view(batch, count))
        index, kept, adjacent = {}, {}, {}
        for dy, dx in OFFSETS:
            rows, cols = positions // grid.cols + dy, positions % grid.cols + dx
            found = slot.gather(1, rows % grid.rows * grid.cols + cols % grid.cols).flatten()
            inside = ((rows >= 0) & (rows < grid.rows) & (cols >= 0) & (cols < grid.cols)).flatten()
            index[dy, dx] = found.clamp(min=0)
            kept[dy, dx] = (found >= 0).float().view(-1, 1, 1, 1)
            adjacent[dy, dx] = ((found >= 0) & inside).float().view(-1, 1, 1, 1)
        return cls(index, kept, adjacent)


class PatchCanvas:
    """Kept patches of a batch: `pixels` (B, n, C, height, width), a float32 leaf, at `positions` (B, n).

    `plain`: what is computed of them leaves its gradient to autograd.
    """

    def __init__(self, grid: PatchGrid, pixels: Tensor, positions: Tensor, plain: bool = False) -> None:
        self.grid, self.plain = grid, plain
        self.pixels = pixels.detach().requires_grad_(True)
        self.positions = positions
        self.neighbours = Neighbours.of(positions, grid)

    @classmethod
    def noise(
        cls,
        grid: PatchGrid,
        batch: int,
        generator: torch.Generator,
        device: torch.device,
        init: str = "white",
        plain: bool = False,
    ) -> PatchCanvas:
        """Whole images of noise, a key of `INITS`; drawn on the CPU so that a seed means the same on every device."""
        images = INITS[init]((batch, grid.channels, *grid.image_size), generator)
        return cls(grid, grid.patchify(images).to(device), grid.all_positions(batch, device).contiguous(), plain)

    def windows(self, jitter: Jitter, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the kept patches read after the roll, before the flip: (B, n, C, height, width) in `dtype`.

        A flip is left to the model (`mirrored`), which mirrors its patch projection instead of the pixels.
        """
        shift = split_roll(jitter.dy, self.grid.height)[1], split_roll(jitter.dx, self.grid.width)[1]
        if self.plain:
            return _shifted(self.pixels.flatten(0, 1), self.neighbours, shift, dtype).view(self.pixels.shape)
        return _Shifted.apply(self.pixels, self.neighbours, shift, dtype)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the pixels and positions of the patches at `index` (B, k) of each image."""
        rows = torch.arange(len(index), device=index.device)[:, None]
        return self.pixels.detach()[rows, index], self.positions[rows, index]

    def jittered_positions(self, jitter: Jitter) -> Tensor:
        """Grid positions (B, n) of the kept patches after the jitter."""
        return jittered_positions(self.positions, self.grid, jitter)


def _spans(shift: int, size: int) -> list[tuple[int, slice, slice]]:
    """A shifted window along one axis: (neighbour that is read, where it goes, what is read of it)."""
    own = 0, slice(max(shift, 0), size + min(shift, 0)), slice(max(-shift, 0), size - max(shift, 0))
    if shift > 0:
        return [own, (-1, slice(0, shift), slice(size - shift, size))]
    if shift < 0:
        return [own, (1, slice(size + shift, size), slice(0, -shift))]
    return [own]


def _shifted(pixels: Tensor, links: Neighbours, shift: tuple, dtype: torch.dtype) -> Tensor:
    """The windows (M, C, h, w) of patches (M, C, h, w) whose content moved by `shift` pixels; stopped patches are 0."""
    if isinstance(shift[0], Tensor):
        return _gathered(pixels, links, shift).to(dtype)
    out = torch.empty_like(pixels, dtype=dtype)
    for dy, to_rows, rows in _spans(shift[0], pixels.shape[-2]):
        for dx, to_cols, cols in _spans(shift[1], pixels.shape[-1]):
            part = pixels[..., rows, cols]
            if (dy, dx) != (0, 0):
                part = part.index_select(0, links.index[dy, dx]) * links.kept[dy, dx]
            out[..., to_rows, to_cols] = part
    return out


def _gathered(pixels: Tensor, links: Neighbours, shift: tuple[Tensor, Tensor]) -> Tensor:
    """As `_shifted`, by one gather whose shape does not depend on the shift."""
    _, channels, height, width = pixels.shape
    rows, cols = (torch.arange(size, device=pixels.device) - s for size, s in zip((height, width), shift, strict=True))
    neighbour = ((rows // height + 1)[:, None] * 3 + cols // width + 1).flatten()
    inside = ((rows % height)[:, None] * width + cols % width).flatten()
    index = torch.stack([links.index[offset] for offset in OFFSETS])[neighbour].t()
    kept = torch.stack([links.kept[offset].flatten() for offset in OFFSETS])[neighbour].t()
    channel = torch.arange(channels, device=pixels.device)[:, None]
    return (pixels.flatten(2)[index[:, None], channel, inside] * kept[:, None]).view(pixels.shape)


class _Shifted(torch.autograd.Function):
    """`_shifted` on (B, n, C, h, w). Every pixel lies in at most one window, so the gradient is the shift back."""

    @staticmethod
    def forward(ctx, pixels: Tensor, links: Neighbours, shift: tuple, dtype: torch.dtype) -> Tensor:
        ctx.links, ctx.shift, ctx.dtype = links, shift, pixels.dtype
        return _shifted(pixels.flatten(0, 1), links, shift, dtype).view(pixels.shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        back = -ctx.shift[0], -ctx.shift[1]
        pixels = _shifted(grad.flatten(0, 1), ctx.links, back, ctx.dtype)
        return pixels.view(grad.shape), None, None, None
