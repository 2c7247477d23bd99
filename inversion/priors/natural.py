"""A second pair of eyes: images whose tokens in a student's backbone are spread as those of drawn scenes are.

An inverted image answers to what one teacher is sensitive to. A backbone that was pretrained on photographs is not, and
tells such images from natural ones by the sizes and the spread of its tokens. What these are on photographs is not
known without any; on `inversion.inits.scenes` they are much the same (docs/transfer.md#which-images), and play the part
of the running statistics that DeepInversion matches (Yin et al., CVPR 2020, eq. 4) and a Vision Transformer lacks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from inversion.priors.base import Context, Loss, LossInputs, Prior, Term, precise
from utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from inversion.views import Seen
    from models import SparseViT
    from models.blocks import Inside

SCENES = 64
"""Drawn images that say how tokens are spread."""
FLOOR = 1e-6
"""Of variances."""


class DrawnTokens:
    """How far a model's tokens are from those of drawn scenes: 0 where moments are alike.

    Of each channel of queries, keys and what attention puts out, over all patches of a batch: squared distance of the
    means in variances of the scenes', and squared difference of the variances' logarithms. Mean over channels and
    blocks.

    Args:
        vit: the model.
        device: where it runs.
        dtype: of its pixels.
    """

    def __init__(self, vit: SparseViT, device: torch.device, dtype: torch.dtype) -> None:
        from inversion.inits import scenes

        self.vit, grid = vit, vit.grid
        drawn = scenes((SCENES, grid.channels, *grid.image_size), torch.Generator().manual_seed(0))
        with torch.no_grad():
            output = vit(grid.patchify(drawn.to(device, dtype)), grid.all_positions(SCENES, device), return_inside=True)
            self.wanted = [self._moments(inside) for inside in output.inside]

    def distance(self, seen: Seen) -> Tensor:
        """Of what the model is fed, a scalar in float32 or better."""
        found, total = map(self._moments, self.vit(*seen, return_inside=True).inside), 0.0
        for (mean, variance), (wanted, usual) in zip(found, self.wanted, strict=True):
            total = total + ((mean - wanted).square() / usual).mean() + (variance / usual).log().square().mean()
        return total / len(self.wanted)

    def _moments(self, inside: Inside) -> tuple[Tensor, Tensor]:
        """Mean and variance (channels,) over patches."""
        first = self.vit.prefix_tokens
        compared = (x.transpose(1, 2).flatten(2)[:, first:] for x in (inside.queries, inside.keys))
        parts = [*(moments(x, inside.present) for x in compared), moments(inside.attended[:, first:])]
        mean, variance = (torch.cat(each) for each in zip(*parts, strict=True))
        return mean, variance


class LooksNatural(Loss):
    """`DrawnTokens.distance` in the student's backbone of what the teacher was fed."""

    def __init__(self, context: Context) -> None:
        self.drawn = DrawnTokens(context.frozen(context.student), context.device, context.dtype)
        self.runs = (self.drawn.vit,)

    def __call__(self, inputs: LossInputs) -> Tensor:
        return self.drawn.distance(inputs.seen)


def moments(x: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and variance (channels,), at least `FLOOR`, of values (B, places, channels), in float32 at least.

    `present` (B, places): which places count; None: all.
    """
    x = precise(x)
    weights = x.new_ones(x.shape[:2]) if present is None else present.to(x.dtype)
    weights = (weights / weights.sum())[:, :, None]
    mean = (weights * x).sum(dim=(0, 1))
    return mean, (weights * (x - mean).square()).sum(dim=(0, 1)) + FLOOR


PRIOR = Prior(
    {
        "natural": Term(
            LooksNatural,
            3.0,
            "weight of how far tokens in the student's backbone are from those of drawn scenes",
            frozenset({"backbone"}),
        )
    }
)
