"""Differential entropy of values, with its gradient written out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

GRID_POINTS = 41
"""Where the density is evaluated, over the whole range of a cosine."""


def entropy(values: Tensor, bandwidth: float, shares: Tensor | None = None) -> Tensor:
    """Differential entropy (B,) in nats of values (B, M) in [-1, 1].

    The density is estimated with a Gaussian kernel, f(x) = 1 / h sum_m s_m K((x - v_m) / h), and -f log f integrated
    over [-1, 1] by the trapezoid rule. `shares` (B, M): s_m, 1 / M if None.
    """
    return _Entropy.apply(values, bandwidth, 1 / max(values.shape[1], 1) if shares is None else shares)


class _Entropy(torch.autograd.Function):
    """Point by point, so that nothing of M values times points is ever kept; the gradient is made at once."""

    @staticmethod
    def forward(ctx, values: Tensor, bandwidth: float, shares: Tensor | float) -> Tensor:
        points = torch.linspace(-1, 1, GRID_POINTS, dtype=values.dtype).tolist()
        height = 1 / (bandwidth * math.sqrt(2 * math.pi))

        def kernel(point: float) -> Tensor:
            # Bounded, for denormal numbers take ten times as long; what lies below adds nothing.
            return ((values - point) / bandwidth).square_().mul_(-0.5).clamp_(min=-80).exp_()

        density = torch.stack([kernel(point).mul_(shares).sum(dim=1) for point in points]) * height
        density = density.clamp_min(torch.finfo(values.dtype).tiny)
        step = 2 / (GRID_POINTS - 1)
        weight = torch.full((GRID_POINTS, 1), step, dtype=values.dtype, device=values.device)
        weight[0], weight[-1] = step / 2, step / 2
        log = density.log()
        # d(-f log f) / df = -(log f + 1), and df(x) / dv = height * share * K * (x - v) / h^2.
        slopes = -weight * (log + 1) * height / bandwidth**2
        grad = torch.zeros_like(values)
        for point, slope in zip(points, slopes, strict=True):
            grad += kernel(point).mul_(point - values).mul_(slope[:, None])
        ctx.save_for_backward(grad.mul_(shares))
        return -(weight * density * log).sum(dim=0)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * grad_output[:, None], None, None
