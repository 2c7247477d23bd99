"""Images as sets of patches at positions of a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from utils.errors import UserError
from utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PatchGrid:
    """A grid of `rows` x `cols` patches of `height` x `width` pixels; positions are row-major, 0 .. rows * cols - 1."""

    rows: int
    cols: int
    height: int
    width: int
    channels: int = 3

    @property
    def count(self) -> int:
        """Patches in a full image."""
        return self.rows * self.cols

    @property
    def pixels(self) -> int:
        """Values in one patch, channels included."""
        return self.channels * self.height * self.width

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        return self.rows * self.height, self.cols * self.width

    def coarser(self, factor: int) -> PatchGrid:
        """The grid of images whose sides have that many times fewer pixels.

        Raises:
            UserError: patches cannot be parted so.
        """
        if self.height % factor or self.width % factor:
            raise UserError(f"patches of {self.height}x{self.width} pixels cannot be averaged over {factor}x{factor}")
        return replace(self, height=self.height // factor, width=self.width // factor)

    def all_positions(self, batch: int, device: torch.device | str | None = None) -> Tensor:
        """Every position, for each of `batch` images: (batch, count), int64."""
        return torch.arange(self.count, device=device).expand(batch, -1)

    def patchify(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> patches (B, count, C, height, width)."""
        batch = images.shape[0]
        split = images.reshape(batch, self.channels, self.rows, self.height, self.cols, self.width)
        return split.permute(0, 2, 4, 1, 3, 5).reshape(batch, self.count, self.channels, self.height, self.width)

    def unpatchify(self, patches: Tensor, positions: Tensor, fill: float | Tensor = 0.0) -> Tensor:
        """Patches (B, n, C, height, width) at `positions` (B, n) -> images (B, C, H, W).

        Args:
            patches: kept patches.
            positions: their grid positions, int64, no position twice in an image.
            fill: value of every other pixel; a tensor of shape (C,) gives one per channel.
        """
        if positions.shape[1] == self.count:  # whole patches are moved faster than their lines
            ordered = torch.empty_like(patches)
            ordered[self._rows(positions), positions] = patches
            split = ordered.view(len(patches), self.rows, self.cols, self.channels, self.height, self.width)
            return split.permute(0, 3, 1, 4, 2, 5).reshape(len(patches), self.channels, *self.image_size)
        images = patches.new_empty(len(patches), self.channels, *self.image_size)
        images[:] = fill.to(patches).reshape(-1, 1, 1) if isinstance(fill, torch.Tensor) else fill
        self._split(images)[self._places(positions)] = patches
        return images

    def taken(self, images: Tensor, positions: Tensor) -> Tensor:
        """Images (B, C, H, W) -> their patches (B, n, C, height, width) at `positions` (B, n)."""
        if positions.shape[1] == self.count:
            return self.patchify(images)[self._rows(positions), positions]
        return self._split(images)[self._places(positions)]

    def _split(self, images: Tensor) -> Tensor:
        """A view of images (B, C, H, W) as (B, rows, cols, C, height, width)."""
        parts = images.view(len(images), self.channels, self.rows, self.height, self.cols, self.width)
        return parts.permute(0, 2, 4, 1, 3, 5)

    def _places(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image, row and column of the patches at `positions` (B, n)."""
        return self._rows(positions), positions // self.cols, positions % self.cols

    @staticmethod
    def _rows(positions: Tensor) -> Tensor:
        """The number of each image (B, 1) of positions (B, n)."""
        return torch.arange(len(positions), device=positions.device)[:, None]


@dataclass(frozen=True)
class SparseImages:
    """Images of which only some patches are left: what calibration and distillation are fed.

    `patches` (B, n, C, height, width) normalized, `positions` (B, n) int64, `labels` (B,) int64. `stopped`: the other
    patches where pictures show them; they are fed to nothing but as what `filled` fills in.
    """

    patches: Tensor
    positions: Tensor
    labels: Tensor
    stopped: SparseImages | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def whole(cls, grid: PatchGrid, images: Tensor, labels: Tensor) -> SparseImages:
        """Whole images (B, C, H, W) with all their patches."""
        return cls(grid.patchify(images), grid.all_positions(len(images)), labels)

    @classmethod
    def of_parts(cls, parts: Sequence[SparseImages]) -> SparseImages:
        """The images of all parts, one after another; all keep as many patches."""
        fields = ([getattr(part, key) for part in parts] for key in ("patches", "positions", "labels"))
        stopped = [part.stopped for part in parts]
        return cls(*map(torch.cat, fields), None if None in stopped else cls.of_parts(stopped))

    def joined(self, others: SparseImages) -> SparseImages:
        """These images and, after them, others that keep as many patches."""
        return SparseImages.of_parts([self, others])

    def shown(self) -> SparseImages:
        """The images as pictures have them: with the stopped patches where these are shown, behind the others."""
        if self.stopped is None:
            return self
        pairs = ((getattr(self, key), getattr(self.stopped, key)) for key in ("patches", "positions"))
        return SparseImages(*(torch.cat(pair, dim=1) for pair in pairs), self.labels)

    def at(self, index: Tensor | slice) -> SparseImages:
        """The images at `index`."""
        stopped = None if self.stopped is None else self.stopped.at(index)
        return SparseImages(self.patches[index], self.positions[index], self.labels[index], stopped)

    def last(self, count: int) -> SparseImages:
        """The last `count` images, all of them if there are no more."""
        return self.at(slice(max(len(self) - count, 0), None))

    def put_together(self, grid: PatchGrid) -> SparseImages:
        """The images of each trajectory as one, on full grids; what is still empty is `filled`.

        Of one trajectory are images that follow one another, have the same label and no patch in common.
        """
        parts: list[SparseImages] = []
        taken = torch.zeros(grid.count, dtype=torch.bool)
        for one in self.batches(1):
            positions = one.positions[0].cpu()
            if parts and one.labels[0] == parts[-1].labels[0] and not taken[positions].any():
                both = (
                    torch.cat([getattr(p, key) for p in (parts[-1], one)], dim=1) for key in ("patches", "positions")
                )
                parts[-1] = SparseImages(*both, one.labels)
            else:
                parts.append(one)
                taken.zero_()
            taken[positions] = True
        return SparseImages.of_parts([part.filled(grid) for part in parts])

    def filled(self, grid: PatchGrid) -> SparseImages:
        """Full grids: a place without a kept patch gets the stopped one, or a copy of the nearest of the same image."""
        shown = self.shown()
        if shown.positions.shape[1] == grid.count:
            return SparseImages.whole(grid, grid.unpatchify(shown.patches, shown.positions), self.labels)
        everywhere = grid.all_positions(len(self), self.positions.device)
        rows, cols = (
            (everywhere[:, :, None] // grid.cols - self.positions[:, None] // grid.cols),
            (everywhere[:, :, None] % grid.cols - self.positions[:, None] % grid.cols),
        )
        nearest = (rows.square() + cols.square()).argmin(dim=2)
        images = torch.arange(len(self), device=self.positions.device)[:, None]
        return SparseImages(self.patches[images, nearest], everywhere, self.labels)

    def batches(self, size: int) -> list[SparseImages]:
        """The same images in batches of at most `size`."""
        return [self.at(slice(first, first + size)) for first in range(0, len(self), size)]


def crop_lines(side: Tensor, place: Tensor, length: int) -> Tensor:
    """Where an enlarged part of an image reads its lines along one axis: (B, length), in pixels, none past the border.

    Args:
        side: (B,), of the part, a share of the image's.
        place: (B,), of the part in the room that it leaves, in [0, 1].
        length: pixels along the axis.
    """
    line = torch.arange(length, device=side.device) + 0.5
    read = ((1 - side) * place * length)[:, None] + line * side[:, None] - 0.5
    return read.clamp(0, length - 1)


def bilinear_weights(lines: Tensor, length: int) -> Tensor:
    """Of each of `length` pixels in what is read at `lines` (B, n): (B, n, length)."""
    return (1 - (lines[:, :, None] - torch.arange(length, device=lines.device)).abs()).clamp(min=0)
