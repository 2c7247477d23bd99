"""SARDFQ (Zhong et al., *Semantic Alignment and Reinforcement for Data-Free Quantization of ViTs*, ICCV 2025).

Two of its three parts are terms: *attention priors*, maps of a few Gaussian spots that the class token's attention is
pulled to, and *multi-semantic* images, whose parts are images of other labels by themselves. The third, labels that are
soft at random, is `--soft_logits`. From the paper as remembered: which blocks, how many spots and parts, and that the
distance is squared, are its; that a step looks at one part of each image, and the weights, are ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from inversion.priors.base import Context, Loss, LossInputs, Prior, Term, precise
from utils.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor

    from models import PatchGrid, SparseImages

SPOTS = 5
"""Gaussian spots of a map, at most."""
PARTS = 4
"""Parts of an image with labels of their own, at most: its quarters."""


class AttentionPrior(Loss):
    """Squared distance between the class token's attention and a map, summed over patches.

    Mean over images, heads, and the later half of the blocks, each of which has a map of its own for every batch. The
    map is the maximum of 1 to `SPOTS` Gaussians over the grid with random centres and covariances, of which the fed
    patches' values sum to 1. Where patches are attended to by no class token, it is their own mean attention. A map
    moves with the image as it is rolled and mirrored, so that it is about the image's patches; with a crop among the
    views it stays with the grid.
    """

    reads_inside = True

    def __init__(self, context: Context) -> None:
        vit = context.vit
        self.grid, self.prefix = vit.grid, vit.prefix_tokens
        self.class_token, self.stays = vit.cls_token is not None, context.has_view("crop")
        self.device, self.blocks = context.device, -(-len(vit.blocks) // 2)
        self.heads = max(block.heads for block in vit.blocks)

    def begin(self, earlier: SparseImages | None, generator: torch.Generator, images: int) -> None:
        maps = spots(images * self.blocks, self.heads, self.grid, generator)
        self.maps = list(maps.unflatten(0, (self.blocks, images)).to(self.device))

    def __call__(self, inputs: LossInputs) -> Tensor:
        later = inputs.output.inside[len(inputs.output.inside) // 2 :]
        positions = inputs.seen.positions if self.stays else inputs.canvas.positions
        total = 0.0
        for number, inside in enumerate(later):
            if self.class_token:
                given = precise(inside.weights(1))[:, :, 0, self.prefix :]
            else:
                given = precise(inside.weights(None))[:, :, self.prefix :, self.prefix :].mean(dim=2)
            places = positions[:, None].expand(-1, given.shape[1], -1)
            wanted = self.maps[number][:, : given.shape[1]].gather(2, places)
            wanted = wanted / wanted.sum(dim=2, keepdim=True).clamp(min=1e-12)
            total = total + (given - wanted.to(given.dtype)).square().sum(dim=2).mean()
        return total / len(later)


class Parts(Loss):
    """Cross-entropy of a quarter of each image, enlarged to all of it, with a label of its own.

    An image has 1 to `PARTS` quarters that count, drawn for the batch with their labels, which are those of other
    images of it; every step looks at one of them.
    """

    numbers = 1

    def __init__(self, context: Context) -> None:
        self.vit = context.vit
        self.runs = (self.vit,)
        self.device = context.device

    def begin(self, earlier: SparseImages | None, generator: torch.Generator, images: int) -> None:
        counts = torch.randint(1, PARTS + 1, (images,), generator=generator)
        order = torch.rand(images, PARTS, generator=generator).argsort(dim=1)
        labels = torch.stack([torch.randperm(images, generator=generator) for _ in range(PARTS)], dim=1)
        self.counts, self.order, self.labels = (x.to(self.device) for x in (counts, order, labels))

    def __call__(self, inputs: LossInputs) -> Tensor:
        drawn = (inputs.numbers * self.counts[:, None]).long()
        part = self.order.gather(1, drawn)
        targets = inputs.targets[self.labels.gather(1, part)[:, 0]]
        place = torch.cat([part // 2, part % 2], dim=1).to(inputs.numbers.dtype)
        seen = inputs.part(torch.full_like(place[:, 0], 0.5), place, inputs.seen.mirrored)
        logits = precise(self.vit(*seen).logits)
        return F.cross_entropy(logits, targets.to(logits.dtype))


def spots(images: int, heads: int, grid: PatchGrid, generator: torch.Generator) -> Tensor:
    """Maps (images, heads, N) in (0, 1]: each the maximum of 1 to `SPOTS` Gaussians over the grid.

    Centres are uniform over it; deviations along two axes at a random angle are uniform in [1/16, 1/4] of its sides.
    """
    shape = images, heads, SPOTS
    count = torch.randint(1, SPOTS + 1, (images, heads, 1), generator=generator)
    centres, deviations = (torch.rand(*shape, 2, generator=generator) for _ in range(2))
    angle = torch.pi * torch.rand(shape, generator=generator)
    deviations = 1 / 16 + deviations * (1 / 4 - 1 / 16)
    rows, cols = ((torch.arange(size) + 0.5) / size for size in (grid.rows, grid.cols))
    down = rows.view(-1, 1) - centres[..., 0, None, None]
    right = cols - centres[..., 1, None, None]
    cos, sin = (f(angle)[..., None, None] for f in (torch.cos, torch.sin))
    along, across = cos * down + sin * right, cos * right - sin * down
    exponent = (along / deviations[..., 0, None, None]).square() + (across / deviations[..., 1, None, None]).square()
    values = (-exponent / 2).exp().flatten(3)
    return values.masked_fill((torch.arange(SPOTS) >= count)[..., None], 0).amax(dim=2)


PRIOR = Prior(
    terms={
        "ap": Term(AttentionPrior, 1.0, "weight of the distance of attention to maps of random spots"),
        "parts": Term(Parts, 1.0, "weight of the cross-entropy of quarters with labels of their own"),
    }
)
