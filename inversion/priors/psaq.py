"""PSAQ-ViT (Li et al., *Patch Similarity Aware Data-Free Quantization for Vision Transformers*, ECCV 2022).

On noise the patches of an image all look alike to a ViT's attention; on real images they do not. The prior maximizes
how diverse the similarities are: the differential entropy of their density (eqs. 4 to 7 of the paper), and pulls the
total variation to a level that was drawn for the batch (its code does so, with levels for 32 images of 224 pixels).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from inversion.priors.base import Context, Loss, LossInputs, Option, Prior, Term, precise
from utils.cli import rate
from utils.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor

    from models import SparseImages

TV_RANGE = 2500.0, 3000.0
"""Levels of the total variation, of the published 32 images of 224 pixels."""
TV_VALUES = 32 * 3 * 224 * 224


class PatchSimilarityEntropy(Loss):
    """Minus the sum over blocks of the entropy of the patch similarities, mean over the batch.

    The similarities of an image are the cosines between what the attention of a block puts out for each two of its kept
    patches, every pair once. Of attention in windows these take the place of images, those with one token left out.
    """

    reads_attended = True

    def __init__(self, context: Context) -> None:
        self.bandwidth = float(context.options["psaq_bandwidth"])

    def __call__(self, inputs: LossInputs) -> Tensor:
        output = inputs.output
        return -sum(self._entropy(precise(x), there) for x, there in zip(output.attended, output.present, strict=True))

    def _entropy(self, x: Tensor, there: Tensor | None) -> Tensor:
        """Of the similarities of vectors (B, n, D), mean over B; `there` (B, n): those that count, None for all."""
        from inversion.entropy import entropy

        if there is None:
            return entropy(pair_cosines(x), self.bandwidth).mean()
        pairs = of_pairs(there[:, :, None] & there[:, None]).to(x.dtype)
        counts = pairs.sum(dim=1)
        found = entropy(pair_cosines(x), self.bandwidth, pairs / counts.clamp(min=1)[:, None])
        return (found * (counts > 0)).sum() / (counts > 0).sum().clamp(min=1)


class TargetedVariation(Loss):
    """|TV - target|: the l2 total variation is pulled to a level in `TV_RANGE`, drawn for each batch.

    A norm of differences grows with the root of how many there are, and so does the target.
    """

    def begin(self, earlier: SparseImages | None, generator: torch.Generator) -> None:
        low, high = TV_RANGE
        self.target = low + (high - low) * torch.rand((), generator=generator).item()

    def __call__(self, inputs: LossInputs) -> Tensor:
        from inversion.total_variation import total_variation

        scale = math.sqrt(inputs.canvas.pixels.numel() / TV_VALUES)
        return (total_variation(inputs.canvas, 2) - scale * self.target).abs()


def pair_cosines(x: Tensor) -> Tensor:
    """Vectors (B, n, D) -> cosines of every pair (B, n * (n - 1) / 2)."""
    unit = F.normalize(x, dim=-1)
    return of_pairs(unit @ unit.transpose(1, 2))


def of_pairs(square: Tensor) -> Tensor:
    """(B, n, n) -> what is above the diagonal (B, n * (n - 1) / 2)."""
    rows, cols = torch.triu_indices(*square.shape[1:], offset=1, device=square.device)
    return square[:, rows, cols]


PRIOR = Prior(
    terms={
        "pse": Term(PatchSimilarityEntropy, 1.0, "weight of the entropy of patch similarities, negated"),
        "tvt": Term(TargetedVariation, 0.05, "weight of the distance of the total variation to its target"),
    },
    options={"psaq_bandwidth": Option(0.05, rate, "width of the density's kernel, in cosines")},
)
