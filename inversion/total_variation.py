"""Total variation of kept patches, with its gradient written out."""

from __future__ import annotations

import torch
from torch import Tensor

from inversion.canvas import Neighbours, PatchCanvas

# Right, down, and the two diagonals: every pair of neighbouring pixels once, seen from one of the two.
DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))


def total_variation(canvas: PatchCanvas, order: int, diagonal: float = 1.0) -> Tensor:
    """Sum over four directions of the norm (order 2) or the mean absolute value (order 1) of neighbour differences.

    The norm goes over the whole batch. Only pairs of pixels that both lie in kept patches count. `diagonal`: what the
    two diagonal directions are multiplied with.
    """
    if canvas.plain:
        return _by_autograd(canvas.pixels.flatten(0, 1), canvas.neighbours, order, diagonal)
    return _TotalVariation.apply(canvas.pixels, canvas.neighbours, order, diagonal)


def _by_autograd(flat: Tensor, links: Neighbours, order: int, diagonal: float) -> Tensor:
    """The total variation of patches (M, C, h, w), every difference as it is defined."""
    total = flat.new_zeros(())
    for direction in DIRECTIONS:
        parts, pairs = [], flat.new_zeros(())
        for offset, first, second in _pairs(direction, flat.shape[-2:]):
            difference = flat[second].index_select(0, links.index[offset]) - flat[first]
            parts.append((difference * links.adjacent[offset]).flatten())
            pairs = pairs + links.adjacent[offset].sum() * difference[0].numel()
        differences = torch.cat(parts)
        value = differences.norm() if order == 2 else differences.abs().sum() / pairs.clamp(min=1)
        total = total + value * (diagonal if all(direction) else 1.0)
    return total


def _crossing(direction: tuple[int, int], size: tuple[int, int]) -> list[tuple[tuple[int, int], tuple, tuple]]:
    """Those of `_pairs` that cross a patch's border."""
    return [pair for pair in _pairs(direction, size) if pair[0] != (0, 0)]


def _pairs(direction: tuple[int, int], size: tuple[int, int]) -> list[tuple[tuple[int, int], tuple, tuple]]:
    """The pixel pairs of a direction: (patch offset of the second, slices of both)."""

    def along(step: int, length: int) -> list[tuple[int, slice, slice]]:
        if step == 0:
            return [(0, slice(None), slice(None))]
        if step > 0:
            return [(0, slice(0, length - 1), slice(1, length)), (1, slice(length - 1, length), slice(0, 1))]
        return [(0, slice(1, length), slice(0, length - 1)), (-1, slice(0, 1), slice(length - 1, length))]

    rows, cols = along(direction[0], size[0]), along(direction[1], size[1])
    return [((dy, dx), (..., r, c), (..., r2, c2)) for dy, r, r2 in rows for dx, c, c2 in cols]


def _inside(rows: Tensor, direction: tuple[int, int], width: int) -> tuple[Tensor, int]:
    """Differences of the pairs inside a patch, and their distance, in patches written as `rows` (M, h * w).

    One long shift is several times faster than a slice of every row; the pairs that wrap into another row are zeroed.
    """
    distance = direction[0] * width + direction[1]
    differences = rows[:, distance:] - rows[:, : rows.shape[1] - distance]
    if direction[1]:
        differences[:, width - 1 if direction[1] > 0 else 0 :: width] = 0
    return differences, distance


class _TotalVariation(torch.autograd.Function):
    """Total variation of kept patches (B, n, C, h, w); the gradient is made in the forward pass, where it is cheap.

    d||D x||_F / dx = D^T D x / ||D x||_F, and d mean|D x| / dx = D^T sign(D x) / pairs; 0 where the norm is 0.
    """

    @staticmethod
    def forward(ctx, pixels: Tensor, links: Neighbours, order: int, diagonal: float) -> Tensor:
        flat = pixels.detach().flatten(0, 1)
        height, width = flat.shape[-2:]
        rows = flat.view(-1, height * width)
        grad = torch.zeros_like(flat)
        to_rows = grad.view(rows.shape)
        total = flat.new_zeros(())
        for direction in DIRECTIONS:
            inside, distance = _inside(rows, direction, width)
            pairs = len(rows) * (height - direction[0]) * (width - abs(direction[1]))
            parts, crossing = [inside], _crossing(direction, (height, width))
            for offset, first, second in crossing:
                beyond = flat[second].index_select(0, links.index[offset])
                part = (beyond - flat[first]).mul_(links.adjacent[offset])
                pairs = pairs + links.adjacent[offset].sum() * part[0].numel()
                parts.append(part)
            value, (slope, *slopes) = _norm(parts, pairs, order, diagonal if all(direction) else 1.0)
            total = total + value
            to_rows[:, : rows.shape[1] - distance].sub_(slope)
            to_rows[:, distance:].add_(slope)
            for (offset, first, second), slope in zip(crossing, slopes, strict=True):
                grad[first] -= slope
                # The pair that ends here begins in the opposite neighbour: a gather, where autograd would scatter.
                back = -offset[0], -offset[1]
                grad[second] += slope.index_select(0, links.index[back]) * links.adjacent[back]
        ctx.save_for_backward(grad.view(pixels.shape))
        return total

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.saved_tensors[0] * grad_output, None, None, None


def _norm(differences: list[Tensor], pairs: Tensor, order: int, factor: float) -> tuple[Tensor, list[Tensor]]:
    """The norm (order 2) or mean absolute value (order 1) of one direction's differences, and its gradient to each.

    Both are multiplied with a factor.

    The differences are overwritten.
    """
    if order == 2:
        norm = torch.stack([torch.linalg.vector_norm(d) for d in differences]).norm()
        scale = torch.where(norm > 0, factor / norm, 0)
        return factor * norm, [d.mul_(scale) for d in differences]
    scale = factor / pairs.clamp(min=1)
    value = sum(d.abs().sum() for d in differences) * scale
    return value, [d.sign_().mul_(scale) for d in differences]
