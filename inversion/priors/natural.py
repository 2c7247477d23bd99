"""A second pair of eyes: images whose tokens in a student's backbone are spread as those of drawn scenes are.

An inverted image answers to what one teacher is sensitive to. A backbone that was pretrained on photographs is not, and
tells such images from natural ones by the sizes and the spread of its tokens. What these are on photographs is not
known without any; on `inversion.inits.scenes` they are much the same (docs/transfer.md#which-images), and play the part
of the running statistics that DeepInversion matches (Yin et al., CVPR 2020, eq. 4) and a Vision Transformer lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from inversion.priors.base import Context, Loss, LossInputs, Prior, Term, precise
from utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from models import SparseImages, SparseViT
    from models.blocks import Inside

SCENES = 64
"""Drawn images that say how tokens are spread."""
SLICE = 16
"""Of them, shown to the model at once."""
FLOOR = 1e-6
"""Of variances."""


class Moments(NamedTuple):
    """Mean and variance (channels,) over patches."""

    mean: Tensor
    variance: Tensor


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
        patches, positions = grid.patchify(drawn.to(device, dtype)), grid.all_positions(SCENES, device)
        with torch.no_grad():
            slices = zip(patches.split(SLICE), positions.split(SLICE), strict=True)
            self.wanted = pooled([self.moments(*part) for part in slices])

    def moments(self, patches: Tensor, positions: Tensor, mirrored: bool | Tensor = False) -> list[Moments]:
        """Of every block, when the model is fed that (`Seen`)."""
        return [self._moments(inside) for inside in self.vit(patches, positions, mirrored, return_inside=True).inside]

    def distance(self, found: Sequence[Moments]) -> Tensor:
        """Of the moments of every block, a scalar in float32 or better."""
        total = 0.0
        for (mean, variance), (wanted, usual) in zip(found, self.wanted, strict=True):
            total = total + ((mean - wanted).square() / usual).mean() + (variance / usual).log().square().mean()
        return total / len(self.wanted)

    def _moments(self, inside: Inside) -> Moments:
        first = self.vit.prefix_tokens
        compared = (x.transpose(1, 2).flatten(2) for x in (inside.queries, inside.keys))
        parts = [moments(x[:, first:], inside.present) for x in (*compared, inside.attended)]
        return Moments(*(torch.cat(each) for each in zip(*parts, strict=True)))


class LooksNatural(Loss):
    """`DrawnTokens.distance` in the student's backbone of what the teacher was fed."""

    def __init__(self, context: Context) -> None:
        self.drawn, self.where = None, (context.device, context.dtype)
        self.runs = (context.frozen(context.student),)

    def begin(self, earlier: SparseImages | None, generator: torch.Generator, images: int) -> None:
        if self.drawn is None:  # not of a run whose images are all there
            self.drawn = DrawnTokens(*self.runs, *self.where)

    def __call__(self, inputs: LossInputs) -> Tensor:
        return self.drawn.distance(self.drawn.moments(*inputs.seen))


def pooled(parts: Sequence[Sequence[Moments]], counts: Sequence[int] | None = None) -> list[Moments]:
    """Of every block over all parts, given their moments; `counts`: how much each part has, None: all the same."""
    shares = torch.tensor([1.0] * len(parts) if counts is None else counts)
    shares = (shares / shares.sum())[:, None]
    found = []
    for block in zip(*parts, strict=True):
        means, variances = (torch.stack(each) for each in zip(*block, strict=True))
        share = shares.to(means)
        mean = (share * means).sum(dim=0)
        found.append(Moments(mean, (share * (variances + (means - mean).square())).sum(dim=0)))
    return found


def moments(x: Tensor, present: Tensor | None = None) -> Moments:
    """Of values (B, places, channels), the variance at least `FLOOR`, in float32 at least.

    `present` (B, places): which places count; None: all.
    """
    x = precise(x)
    weights = x.new_ones(x.shape[:2]) if present is None else present.to(x.dtype)
    weights = (weights / weights.sum())[:, :, None]
    mean = (weights * x).sum(dim=(0, 1))
    return Moments(mean, (weights * (x - mean).square()).sum(dim=(0, 1)) + FLOOR)


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
