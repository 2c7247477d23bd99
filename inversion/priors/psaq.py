"""PSAQ-ViT (Li et al., *Patch Similarity Aware Data-Free Quantization for Vision Transformers*, ECCV 2022).

On noise the patches of an image all look alike to a ViT's attention; on real images they do not. The prior maximizes
how diverse the similarities are: the differential entropy of their density (eqs. 4 to 7 of the paper), and pulls the
total variation to a level that was drawn for the batch (its code does so, with levels for 32 images of 224 pixels).
What the two are of is as in the paper's code; `--preset psaq_vit` has its schedule.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from inversion.priors.base import Context, Loss, LossInputs, Option, Prior, Term, precise
from utils.cli import rate
from utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from models import SparseImages

TV_RANGE = 2500.0, 3000.0
"""Levels of the total variation, of the published 32 images of 224 pixels."""
TV_VALUES = 32 * 3 * 224 * 224


class PatchSimilarityEntropy(Loss):
    """Minus the sum over blocks of the entropy of the patch similarities (`similarity_entropy`), mean over the batch.

    The similarities of an image are the cosines between what the attention of a block puts out for each two of its kept
    patches, mean over heads. Of attention in windows these take the place of images, and those without a token are left
    out.
    """

    reads_inside = True

    def __init__(self, context: Context) -> None:
        self.bandwidth, self.prefix = float(context.options["psaq_bandwidth"]), context.vit.prefix_tokens

    def __call__(self, inputs: LossInputs) -> Tensor:
        from inversion.entropy import similarity_entropy

        total = 0.0
        for inside in inputs.output.inside:
            patches = precise(inside.attended[:, self.prefix :]).unflatten(-1, (inside.heads, -1)).mean(dim=2)
            total = total - similarity_entropy(patches, self.bandwidth, inside.present, inputs.canvas.plain)
        return total


class TargetedVariation(Loss):
    """|TV - target|: the l2 total variation is pulled to a level in `TV_RANGE`, drawn for each batch.

    It is that of what the teacher is fed, jitter included. A norm of differences grows with the root of how many there
    are, and so does the target.
    """

    def begin(self, earlier: SparseImages | None, generator: torch.Generator, images: int) -> None:
        low, high = TV_RANGE
        self.target = low + (high - low) * torch.rand((), generator=generator).item()

    def __call__(self, inputs: LossInputs) -> Tensor:
        from inversion.canvas import PatchCanvas
        from inversion.total_variation import total_variation

        fed = precise(inputs.fed())
        seen = PatchCanvas(inputs.grid, fed, inputs.seen.positions, inputs.canvas.plain)
        scale = math.sqrt(fed.numel() / TV_VALUES)
        return (total_variation(seen, 2) - scale * self.target).abs()


PRIOR = Prior(
    terms={
        "pse": Term(PatchSimilarityEntropy, 1.0, "weight of the entropy of patch similarities, negated"),
        "tvt": Term(TargetedVariation, 0.05, "weight of the distance of the total variation to its target"),
    },
    options={"psaq_bandwidth": Option(0.01, rate, "width of the density's kernel, in cosines")},
)
