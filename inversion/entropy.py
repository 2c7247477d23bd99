"""Differential entropy of the similarities of vectors, with its gradient written out."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

POINTS = 10
"""Where the density is evaluated, from the smallest to the largest cosine of the batch (PSAQ-ViT's code)."""
FLOOR = 1e-4
"""What is added to the density (the same)."""
AT_ONCE = 2**18
"""Kernel values that are computed together: so many fit a core's cache."""


def similarity_entropy(x: Tensor, bandwidth: float, there: Tensor | None = None, plain: bool = False) -> Tensor:
    """Differential entropy in nats of the cosines of all pairs of vectors, mean over the batch.

    Of an image: the full n x n matrix of cosines, its diagonal included; density f(p) = 1 / (n^2 h) sum K((p - c) / h)
    + 1e-4 with a Gaussian kernel K at `POINTS` points equally spaced between the smallest and the largest cosine of the
    batch, which are constants; -f log f by the trapezoid rule.

    Args:
        x: vectors (B, n, D).
        bandwidth: h.
        there: (B, n), which of them count; images without any are left out. None: all.
        plain: leave the gradient to autograd.
    """
    unit = F.normalize(x, dim=-1)
    counts = x.new_full(x.shape[:1], x.shape[1]) if there is None else there.sum(dim=1).to(x.dtype)
    if not plain:
        each = _Entropy.apply(unit, bandwidth, counts, there)
    else:
        cosines = unit @ unit.transpose(1, 2)
        points = _points(cosines, there)
        kernels = (-0.5 * ((cosines - points.view(-1, 1, 1, 1)) / bandwidth).square()).exp()
        if there is not None:
            kernels = kernels * (there[:, :, None] & there[:, None])
        height = 1 / (bandwidth * math.sqrt(2 * math.pi) * counts.square().clamp(min=1))
        density = kernels.flatten(2).sum(dim=2) * height + FLOOR
        each = torch.trapezoid(-density * density.log(), points, dim=0)
    return (each * (counts > 0)).sum() / (counts > 0).sum().clamp(min=1)


def _points(cosines: Tensor, there: Tensor | None) -> Tensor:
    """The points (`POINTS`,) of a batch of cosines (B, n, n), those of vectors that count."""
    cosines = cosines.detach()
    if there is None:
        low, high = cosines.aminmax()
    else:
        pairs = there[:, :, None] & there[:, None]
        low, high = cosines.masked_fill(~pairs, 2).amin(), cosines.masked_fill(~pairs, -2).amax()
    return low + (high - low) * torch.linspace(0, 1, POINTS, dtype=cosines.dtype, device=cosines.device)


class _Entropy(torch.autograd.Function):
    """Entropy (B,) of unit vectors (B, n, D). The gradient is made at once, so that no n x n matrix is kept."""

    @staticmethod
    def forward(ctx, unit: Tensor, bandwidth: float, counts: Tensor, there: Tensor | None) -> Tensor:
        cosines = unit @ unit.transpose(1, 2)
        points = _points(cosines, there)
        step = (points[-1] - points[0]) / (POINTS - 1)
        weights = step * torch.ones_like(points)
        weights[0], weights[-1] = step / 2, step / 2
        height = 1 / (bandwidth * math.sqrt(2 * math.pi))
        entropies, gradient = unit.new_empty(len(unit)), torch.empty_like(unit)
        each = max(1, AT_ONCE // (POINTS * unit.shape[1] ** 2))
        shares = height / counts.square().clamp(min=1)
        for first in range(0, len(unit), each):
            some = slice(first, first + each)
            values = cosines[some].flatten(1)
            kernels = values[:, None] - points[:, None]
            # Bounded, for denormal numbers take ten times as long; what lies below adds nothing.
            kernels.square_().mul_(-0.5 / bandwidth**2).clamp_(min=-80).exp_()
            if there is not None:
                kernels *= (there[some, :, None] & there[some, None]).flatten(1)[:, None]
            density = kernels.sum(dim=2).mul_(shares[some, None]).add_(FLOOR)
            log = density.log()
            entropies[some] = -(weights * density * log).sum(dim=1)
            # d(-f log f) / df = -(log f + 1), and df(p) / dc = share * K * (p - c) / h^2.
            slopes = -weights * (log + 1) * shares[some, None] / bandwidth**2
            sums = torch.bmm(torch.stack([slopes * points, slopes], dim=1), kernels)
            to_cosines = (sums[:, 0] - values * sums[:, 1]).unflatten(1, (unit.shape[1], -1))
            gradient[some] = 2 * to_cosines @ unit[some]  # the matrix is symmetric
        ctx.save_for_backward(gradient)
        return entropies

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.saved_tensors[0] * grad_output[:, None, None], None, None, None
