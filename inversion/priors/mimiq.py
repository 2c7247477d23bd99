"""MimiQ (Choi et al., *Low-Bit Data-Free Quantization of Vision Transformers*, AAAI 2025): inter-head similarity.

On real images the heads of a block look at much the same places, on noise they do not. The prior makes them alike: each
head's row of the attention map, an image of its own, is compared with that of each other head by the structural
similarity of whole images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from inversion.priors.base import Context, Loss, LossInputs, Prior, Term
from utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class InterHeadSimilarity(Loss):
    """Mean of 1 - SSIM^2 over blocks, images, query patches and pairs of heads.

    S = q k^T, query patches x key patches. For every query and head its row, scaled to [0, 1] by its own minimum and
    maximum, is an image of n values; SSIM is the global one, of means, variances and covariance over all n. Of
    attention in windows these take the place of images.

    Raises:
        UserError: a model of which no block has two heads.
    """

    reads_inside = True

    def __init__(self, context: Context) -> None:
        self.prefix = context.vit.prefix_tokens
        if all(block.score_heads < 2 for block in context.vit.blocks):
            raise UserError(f"--ihs: no block of {context.model.name} has two heads to compare")

    def __call__(self, inputs: LossInputs) -> Tensor:
        from inversion.head_similarity import mean_unlike

        blocks = [
            (inside.queries[:, :, self.prefix :], inside.keys[:, :, self.prefix :], inside.present)
            for inside in inputs.output.inside
            if inside.queries.shape[1] > 1
        ]
        return mean_unlike(blocks, inputs.canvas.plain)


class ScaledTotalVariation(Loss):
    """As `tv2`, the norms of diagonal differences divided by the root of 2, the distance of these pixels."""

    def __call__(self, inputs: LossInputs) -> Tensor:
        from inversion.total_variation import total_variation

        return total_variation(inputs.canvas, 2, diagonal=0.5**0.5)


PRIOR = Prior(
    terms={
        "ihs": Term(InterHeadSimilarity, 1.0, "weight of how unlike the heads of a block look"),
        "tvd": Term(ScaledTotalVariation, 2.5e-5, "weight of the l2 total variation, diagonals at their distance"),
    }
)
