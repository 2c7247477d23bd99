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

from models import PatchGrid

OFFSETS = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1))


class Jitter(NamedTuple):
    """A roll by (`dy`, `dx`) pixels, then a horizontal flip if `flip`; one draw for the batch.

    Numbers, or int64 tensors () on the device: what a CUDA graph records must not depend on the draw.
    """

    dy: int | Tensor
    dx: int | Tensor
    flip: bool | Tensor


def draw_jitters(
    count: int,
    grid: PatchGrid,
    generator: torch.Generator,
    flip: bool = True,
    share: float = 1 / 8,
    diagonal: bool = False,
) -> list[Jitter]:
    """`count` draws: rolls uniform in up to `share` of height and width, flips (if `flip`) with probability 1/2.

    `diagonal`: both axes are rolled by one draw, of up to `share` of the shorter.
    """
    height, width = (int(size * share) for size in grid.image_size)
    rows = torch.randint(-height, height + 1, (count,), generator=generator).tolist()
    cols = torch.randint(-width, width + 1, (count,), generator=generator).tolist()
    if diagonal:
        rows = cols = rows if height <= width else cols
    flips = torch.randint(0, 2, (count,), generator=generator).tolist()
    return [Jitter(dy, dx, flip and bool(flipped)) for dy, dx, flipped in zip(rows, cols, flips, strict=True)]


def split_roll(roll: int | Tensor, patch: int) -> tuple[int, int] | tuple[Tensor, Tensor]:
    """A roll in pixels -> (whole patches, remainder in pixels), the remainder in [-patch/2, patch/2)."""
    whole = (roll + patch // 2) // patch
    return whole, roll - whole * patch


def rolled_positions(positions: Tensor, grid: PatchGrid, jitter: Jitter) -> Tensor:
    """Where the patches at `positions` (B, n) are after the roll: the grid wraps around."""
    rows = (positions // grid.cols + split_roll(jitter.dy, grid.height)[0]) % grid.rows
    cols = (positions % grid.cols + split_roll(jitter.dx, grid.width)[0]) % grid.cols
    return rows * grid.cols + cols


def mirrored_positions(positions: Tensor, grid: PatchGrid, jitter: Jitter) -> Tensor:
    """Where the patches at `positions` (B, n) are after the flip, which mirrors columns."""
    return positions + jitter.flip * (grid.cols - 1 - 2 * (positions % grid.cols))


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
    """Kept patches of a batch, as terms of the loss see them: `pixels` (B, n, C, height, width) at `positions` (B, n).

    Pixels that carry no gradient become a leaf of their own. As a canvas it is the one whose pixels are themselves what
    is optimized, and are clamped to `limits`.

    Args:
        grid: what positions count in.
        pixels: float32, normalized.
        positions: int64.
        plain: what is computed of them leaves its gradient to autograd.
        neighbours: of the positions, where they are known already.
        limits: black and white, (C, 1, 1) each.
        waiting: pixels (B, N, C, height, width) of patches that have not begun yet, at all positions of the grid.
    """

    def __init__(
        self,
        grid: PatchGrid,
        pixels: Tensor,
        positions: Tensor,
        plain: bool = False,
        neighbours: Neighbours | None = None,
        limits: tuple[Tensor, Tensor] | None = None,
        waiting: Tensor | None = None,
    ) -> None:
        self.grid, self.plain = grid, plain
        self.pixels = pixels if pixels.requires_grad else pixels.detach().requires_grad_(True)
        self.positions = positions
        self.neighbours = Neighbours.of(positions, grid) if neighbours is None else neighbours
        self.limits, self.waiting = limits, waiting

    @classmethod
    def start(
        cls, grid: PatchGrid, noise: Tensor, limits: tuple[Tensor, Tensor], plain: bool, first: Tensor | None
    ) -> PatchCanvas:
        """Of whole images (B, C, H, W) of noise, from the patches at `first` (k,) on, or from all (None)."""
        patches, everywhere = grid.patchify(noise), grid.all_positions(len(noise), noise.device).contiguous()
        if first is None:
            return cls(grid, patches, everywhere, plain, limits=limits)
        positions = first.expand(len(noise), -1).contiguous()
        return cls(grid, patches[:, first], positions, plain, limits=limits, waiting=patches)

    @property
    def parameter(self) -> Tensor:
        """What the optimizer changes."""
        return self.pixels

    def patches(self) -> PatchCanvas:
        """The kept patches as they are now."""
        return self

    def with_patches(self, kept: Tensor) -> PatchCanvas:
        """The canvas of the patches at `kept` (B, k) of each image alone."""
        return PatchCanvas(self.grid, *self.take(kept), self.plain, limits=self.limits, waiting=self.waiting)

    def moments_of(self, kept: Tensor, moments: Tensor) -> Tensor:
        """What is left of a tensor of the parameter's shape after `with_patches`."""
        return moments[torch.arange(len(kept), device=kept.device)[:, None], kept].contiguous()

    def with_more(self, positions: Tensor) -> PatchCanvas:
        """The canvas with the patches at `positions` (k,) as well, which begin as the noise that they were."""
        more = positions.expand(len(self.positions), -1)
        order = torch.cat([self.positions, more], dim=1).argsort(dim=1)
        pixels = torch.cat([self.pixels.detach(), self.waiting[:, positions]], dim=1)
        rows = torch.arange(len(order), device=order.device)[:, None]
        places = torch.cat([self.positions, more], dim=1)[rows, order]
        return PatchCanvas(self.grid, pixels[rows, order], places, self.plain, limits=self.limits, waiting=self.waiting)

    def settle(self) -> None:
        """After a step: pixels stay between black and white, channel by channel."""
        torch.clamp(self.pixels, *self.limits, out=self.pixels)

    def overwrite(self, patches: PatchCanvas) -> None:
        """Take what was done to the pixels of `patches()` from outside: it was done to these."""

    def coarser(self, factor: int) -> PatchCanvas:
        """The same patches at fewer pixels: means of squares of so many by so many; gradients flow to the pixels."""
        if factor == 1:
            return self
        grid, (batch, count) = self.grid.coarser(factor), self.positions.shape
        squares = self.pixels.view(batch, count, grid.channels, grid.height, factor, grid.width, factor)
        return PatchCanvas(grid, squares.mean(dim=(4, 6)), self.positions, self.plain, self.neighbours)

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


class Taken(torch.autograd.Function):
    """`PatchGrid.taken` at positions of which none is there twice: the gradient is put back there, not added."""

    @staticmethod
    def forward(ctx, images: Tensor, positions: Tensor, grid: PatchGrid) -> Tensor:
        ctx.positions, ctx.grid = positions, grid
        return grid.taken(images, positions)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.grid.unpatchify(grad, ctx.positions), None, None


class Placed(torch.autograd.Function):
    """`PatchGrid.unpatchify` with zeros elsewhere; the gradient of patches that are kept is all that is read."""

    @staticmethod
    def forward(ctx, patches: Tensor, positions: Tensor, grid: PatchGrid) -> Tensor:
        ctx.positions, ctx.grid = positions, grid
        return grid.unpatchify(patches, positions)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.grid.taken(grad.contiguous(), ctx.positions), None, None
