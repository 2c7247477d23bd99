"""How alike the heads of a block look at patches, with the gradient written out where it is large."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

C1, C2 = 0.01**2, 0.03**2
"""Constants of the structural similarity, for values in [0, 1]."""
SMALLEST = 1e-12
"""Of a range that is divided by."""


def unlike(queries: Tensor, keys: Tensor, there: Tensor | None = None, plain: bool = False) -> Tensor:
    """Mean over images, queries and pairs of heads of 1 - SSIM^2, in float32 or better.

    S = q k^T; a query's row of it in each head, scaled to [0, 1] by its own minimum and maximum, is an image of n
    values. SSIM is the global one of two images: means, variances and covariance over all n.

    Args:
        queries: (B, heads, n, head_dim), at least two heads.
        keys: the same.
        there: (B, n), which of them count; None: all.
        plain: leave the gradient to autograd.
    """
    return mean_unlike([(queries, keys, there)], plain)


def mean_unlike(blocks: Sequence[tuple[Tensor, Tensor, Tensor | None]], plain: bool = False) -> Tensor:
    """Mean over blocks of `unlike` of their queries, keys, and which of them count.

    What is left of the rows is small, so blocks of the same shape are compared together.
    """
    together: dict[torch.Size, list[tuple[Tensor, ...]]] = {}
    for queries, keys, there in blocks:
        found = (_plain_moments if plain else _Moments.apply)(queries, keys, there)
        shares = torch.ones_like(found[2][..., 0]) if there is None else there.to(found[2].dtype)
        shares = shares / shares.sum().clamp(min=1)
        together.setdefault(found[2].shape[1:], []).append((*found, shares))
    total = 0.0
    for group in together.values():
        low, high, mean, cov, shares = (torch.cat(parts) for parts in zip(*group, strict=True))
        total = total + (_dissimilarities(low, high, mean, cov) * shares).sum()
    return total / len(blocks)


def _dissimilarities(low: Tensor, high: Tensor, mean: Tensor, cov: Tensor) -> Tensor:
    """Moments as `_plain_moments` gives them -> mean over pairs of heads of 1 - SSIM^2 (B, n)."""
    span = (high - low).clamp(min=SMALLEST)
    mean, cov = (mean - low) / span, cov / (span[..., None] * span[..., None, :])
    squares, variance = mean.square(), cov.diagonal(dim1=-2, dim2=-1)
    above = (2 * mean[..., None] * mean[..., None, :] + C1) * (2 * cov + C2)
    below = (squares[..., None] + squares[..., None, :] + C1) * (variance[..., None] + variance[..., None, :] + C2)
    # Every pair is there twice; a head with itself, whose similarity is 1, adds nothing.
    return (1 - (above / below).square()).flatten(2).sum(dim=2) / (mean.shape[-1] * (mean.shape[-1] - 1))


def _plain_moments(queries: Tensor, keys: Tensor, there: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Minimum, maximum, mean (B, n, heads) and covariances (B, n, heads, heads) of the rows of q k^T."""
    scores, counts, kept = _scores(queries, keys, there)
    low, high = (
        (scores.amin(dim=-1), scores.amax(dim=-1))
        if kept is None
        else (
            scores.masked_fill(~kept, float("inf")).amin(dim=-1),
            scores.masked_fill(~kept, float("-inf")).amax(dim=-1),
        )
    )
    mean = scores.sum(dim=-1) / counts if kept is None else (scores * kept).sum(dim=-1) / counts
    centered = scores - mean[..., None]
    centered = centered if kept is None else centered * kept
    return low, high, mean, centered @ centered.transpose(-2, -1) / counts[..., None]


def _scores(queries: Tensor, keys: Tensor, there: Tensor | None) -> tuple[Tensor, Tensor | float, Tensor | None]:
    """q k^T as (B, n, heads, n), how many keys count (B, 1, 1), and which (B, 1, 1, n), None for all."""
    scores = (queries @ keys.transpose(-2, -1)).transpose(1, 2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if there is None:
        return scores, scores.new_full((1, 1, 1), scores.shape[-1]), None
    kept = there | ~there.any(dim=1, keepdim=True)  # a row of nothing has no extremes; it is left out of the mean
    return scores, kept.sum(dim=1).to(scores.dtype).view(-1, 1, 1), kept[:, None, None]


class _Moments(torch.autograd.Function):
    """As `_plain_moments`; of the rows themselves only those without their means are kept, and where the ends are."""

    @staticmethod
    def forward(ctx, queries: Tensor, keys: Tensor, there: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scores, counts, kept = _scores(queries, keys, there)
        if kept is None:
            (low, lowest), (high, highest), mean = scores.min(dim=-1), scores.max(dim=-1), scores.mean(dim=-1)
        else:
            low, lowest = scores.masked_fill(~kept, float("inf")).min(dim=-1)
            high, highest = scores.masked_fill(~kept, float("-inf")).max(dim=-1)
            mean = (scores * kept).sum(dim=-1) / counts
        centered = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
        torch.sub(scores, mean[..., None], out=centered)
        if kept is not None:
            centered *= kept
        rows = centered.flatten(0, 1)
        cov = torch.bmm(rows, rows.transpose(1, 2)).unflatten(0, scores.shape[:2]) / counts[..., None]
        ctx.save_for_backward(queries, keys, centered, lowest, highest, counts)
        ctx.kept = kept
        return low, high, mean, cov

    @staticmethod
    def backward(ctx, to_low: Tensor, to_high: Tensor, to_mean: Tensor, to_cov: Tensor) -> tuple[Tensor, Tensor, None]:
        queries, keys, centered, lowest, highest, counts = ctx.saved_tensors
        both = (to_cov + to_cov.transpose(-2, -1)) / counts[..., None]
        to_mean = (to_mean / counts)[..., None]
        to_scores = torch.baddbmm(to_mean.flatten(0, 1), both.flatten(0, 1), centered.flatten(0, 1)).view_as(centered)
        if ctx.kept is not None:
            to_scores *= ctx.kept
        to_scores.scatter_add_(-1, lowest[..., None], to_low[..., None])
        to_scores.scatter_add_(-1, highest[..., None], to_high[..., None])
        to_scores = to_scores.transpose(1, 2).to(queries.dtype)
        return to_scores @ keys, to_scores.transpose(-2, -1) @ queries, None
