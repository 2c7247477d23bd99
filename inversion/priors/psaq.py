"""PSAQ-ViT (Li et al., *Patch Similarity Aware Data-Free Quantization for Vision Transformers*, ECCV 2022).

On noise the patches of an image all look alike to a ViT's attention; on real images they do not. The prior maximizes
how diverse the similarities are: the differential entropy of their density (eqs. 4 to 7 of the paper), and pulls the
total variation to a level that was drawn for the batch (its code does so, with levels for 32 images of 224 pixels).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from inversion.priors.base import Context, Loss, LossInputs, Option, Prior, Term, precise
from inversion.total_variation import total_variation
from models import SparseImages
from utils.cli import rate

GRID_POINTS = 41
"""Where the density is evaluated, over the whole range of a cosine."""
TV_RANGE = 2500.0, 3000.0
"""Levels of the total variation, of the published 32 images of 224 pixels."""
TV_VALUES = 32 * 3 * 224 * 224


class PatchSimilarityEntropy(Loss):
    """Minus the sum over blocks of the entropy of the patch similarities, mean over the batch.

    The similarities of an image are the cosines between what the attention of a block puts out for each two of its kept
    patches, every pair once.
    """

    reads_attended = True

    def __init__(self, context: Context) -> None:
        self.bandwidth = float(context.options["psaq_bandwidth"])

    def __call__(self, inputs: LossInputs) -> Tensor:
        return -sum(entropy(pair_cosines(precise(x)), self.bandwidth).mean() for x in inputs.output.attended)


class TargetedVariation(Loss):
    """|TV - target|: the l2 total variation is pulled to a level in `TV_RANGE`, drawn for each batch.

    A norm of differences grows with the root of how many there are, and so does the target.
    """

    def begin(self, earlier: SparseImages | None, generator: torch.Generator) -> None:
        low, high = TV_RANGE
        self.target = low + (high - low) * torch.rand((), generator=generator).item()

    def __call__(self, inputs: LossInputs) -> Tensor:
        scale = math.sqrt(inputs.canvas.pixels.numel() / TV_VALUES)
        return (total_variation(inputs.canvas, 2) - scale * self.target).abs()


def pair_cosines(x: Tensor) -> Tensor:
    """Vectors (B, n, D) -> cosines of every pair (B, n * (n - 1) / 2)."""
    unit = F.normalize(x, dim=-1)
    rows, cols = torch.triu_indices(x.shape[1], x.shape[1], offset=1, device=x.device)
    return (unit @ unit.transpose(1, 2))[:, rows, cols]


def entropy(values: Tensor, bandwidth: float) -> Tensor:
    """Differential entropy (B,) in nats of values (B, M) in [-1, 1].

    The density is estimated with a Gaussian kernel, f(x) = 1 / (M h) sum_m K((x - v_m) / h), and -f log f integrated
    over [-1, 1] by the trapezoid rule.
    """
    return _Entropy.apply(values, bandwidth)


class _Entropy(torch.autograd.Function):
    """Point by point, so that nothing of M values times points is ever kept; the gradient is made at once."""

    @staticmethod
    def forward(ctx, values: Tensor, bandwidth: float) -> Tensor:
        points = torch.linspace(-1, 1, GRID_POINTS, dtype=values.dtype).tolist()
        height = 1 / (bandwidth * math.sqrt(2 * math.pi))

        def kernel(point: float) -> Tensor:
            # Bounded, for denormal numbers take ten times as long; what lies below adds nothing.
            return ((values - point) / bandwidth).square_().mul_(-0.5).clamp_(min=-80).exp_()

        density = torch.stack([kernel(point).mean(dim=1) for point in points]) * height
        density = density.clamp_min(torch.finfo(values.dtype).tiny)
        step = 2 / (GRID_POINTS - 1)
        weight = torch.full((GRID_POINTS, 1), step, dtype=values.dtype, device=values.device)
        weight[0], weight[-1] = step / 2, step / 2
        log = density.log()
        # d(-f log f) / df = -(log f + 1), and df(x) / dv = height / M * K * (x - v) / h^2.
        slopes = -weight * (log + 1) * height / (values.shape[1] * bandwidth**2)
        grad = torch.zeros_like(values)
        for point, slope in zip(points, slopes, strict=True):
            grad += kernel(point).mul_(point - values).mul_(slope[:, None])
        ctx.save_for_backward(grad)
        return -(weight * density * log).sum(dim=0)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * grad_output[:, None], None


PRIOR = Prior(
    terms={
        "pse": Term(PatchSimilarityEntropy, 1.0, "weight of the entropy of patch similarities, negated"),
        "tvt": Term(TargetedVariation, 0.05, "weight of the distance of the total variation to its target"),
    },
    options={"psaq_bandwidth": Option(0.05, rate, "width of the density's kernel, in cosines")},
)
