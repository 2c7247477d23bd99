"""CMI (Fang et al., *Contrastive Model Inversion for Data-Free Knowledge Distillation*, IJCAI 2021).

Images are made diverse by contrast (eq. 5 of the paper): an image shall be told apart, in the teacher's features, from
the others of its batch and from images made earlier, while a part of it stays like the whole. As in the paper's code,
the positive stands in the denominator as well and nothing flows to what an image is unlike. The paper compares what a
small network, trained along, makes of the features of all layers, so that it can be fed a CNN's; here it is what the
classifier reads, which a ViT has made out of all layers, and nothing is trained beside the images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from inversion.priors.base import Context, Loss, LossInputs, Option, Prior, Term, precise
from utils.cli import natural, rate
from utils.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor

    from models import SparseImages


SMALLEST = 0.25
"""Share of an image that a part of it has, at least."""


class Contrast(Loss):
    """-log (exp(s(x, x+) / T) / (exp(s(x, x+) / T) + sum exp(s(x, x-) / T))), mean over the batch.

    s is the cosine of features. x is the image as the teacher is fed it, x+ a part of it, of a share uniform in [1/4,
    1], anywhere, enlarged to it, and mirrored, all of the batch, with probability 1/2 where there are flips. The x- are
    the other images of the batch and the memory bank: the last `cmi_bank` images of the batches before. Nothing flows
    into any x-.
    """

    numbers = 4

    def __init__(self, context: Context) -> None:
        self.vit, self.flips = context.vit, context.has_view("flip")
        self.temperature, self.size = float(context.options["cmi_temperature"]), int(context.options["cmi_bank"])
        self.runs = (self.vit,)
        self.bank: Tensor | None = None

    def begin(self, earlier: SparseImages | None, generator: torch.Generator, images: int) -> None:
        self.bank = None
        if earlier is not None and len(earlier) and self.size:
            device, dtype = self.vit.device, self.vit.patch_proj.weight.dtype
            with torch.no_grad():
                parts = [
                    self.vit(batch.patches.to(device, dtype), batch.positions.to(device)).features
                    for batch in earlier.last(self.size).batches(64)
                ]
                self.bank = unit(torch.cat(parts))

    def __call__(self, inputs: LossInputs) -> Tensor:
        u = inputs.numbers
        mirrored = (u[0, 3] < 0.5).long() if self.flips else False
        other = self.vit(*inputs.part((SMALLEST + (1 - SMALLEST) * u[:, 0]).sqrt(), u[:, 1:3], mirrored))
        return contrast(unit(inputs.output.features), unit(other.features), self.bank, self.temperature)


def unit(features: Tensor) -> Tensor:
    """Features (B, ...) -> vectors (B, D) of length 1, in float32 or better."""
    return F.normalize(precise(features.flatten(1)), dim=1)


def contrast(first: Tensor, second: Tensor, bank: Tensor | None, temperature: float) -> Tensor:
    """The term for two views (B, D) of each image and a bank (K, D) or None, all of length 1; 0 for an image alone."""
    others = (first if bank is None else torch.cat([first, bank])).detach()
    alike = (first * second).sum(dim=1) / temperature
    itself = torch.eye(len(first), len(others), dtype=torch.bool, device=first.device)
    unlike = ((first @ others.t()) / temperature).masked_fill(itself, float("-inf"))
    return (torch.cat([alike[:, None], unlike], dim=1).logsumexp(dim=1) - alike).mean()


PRIOR = Prior(
    terms={"cr": Term(Contrast, 0.8, "weight of the contrast between images", frozenset({"earlier"}))},
    options={
        "cmi_temperature": Option(0.1, rate, "temperature of the contrast"),
        "cmi_bank": Option(40960, natural, "earlier images to be unlike; 0: the batch alone"),
    },
)
