"""CMI (Fang et al., *Contrastive Model Inversion for Data-Free Knowledge Distillation*, IJCAI 2021).

Images are made diverse by contrast (eq. 5 of the paper): an image shall be told apart, in the teacher's features, from
the others of its batch and from images made earlier, while two views of it stay alike. The paper trains a small network
on top of the features; here they are taken as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from inversion.priors.base import Context, Loss, LossInputs, Option, Prior, Term, precise
from utils.cli import natural, rate
from utils.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor

    from models import SparseImages


class Contrast(Loss):
    """-log (exp(s(x, x+) / T) / sum exp(s(x, x-) / T)), mean over the batch, s the cosine of features.

    x+ is another view of the image: rolled the other way, mirrored if x is not, and so on. The x- are the other images
    of the batch and the memory bank: the last `cmi_bank` images of the batches before. Nothing flows into the bank.
    """

    def __init__(self, context: Context) -> None:
        self.vit = context.vit
        self.temperature, self.size = float(context.options["cmi_temperature"]), int(context.options["cmi_bank"])
        self.runs = (self.vit,)
        self.bank: Tensor | None = None

    def begin(self, earlier: SparseImages | None, generator: torch.Generator) -> None:
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
        other = self.vit(*inputs.opposite())
        return contrast(unit(inputs.output.features), unit(other.features), self.bank, self.temperature)


def unit(features: Tensor) -> Tensor:
    """Features (B, ...) -> vectors (B, D) of length 1, in float32 or better."""
    return F.normalize(precise(features.flatten(1)), dim=1)


def contrast(first: Tensor, second: Tensor, bank: Tensor | None, temperature: float) -> Tensor:
    """The term for two views (B, D) of each image and a bank (K, D) or None, all of length 1; 0 for an image alone."""
    others = first if bank is None else torch.cat([first, bank])
    if len(others) == 1:
        return 0 * first.sum()
    alike = (first * second).sum(dim=1) / temperature
    unlike = (first @ others.t()) / temperature
    itself = torch.eye(len(first), len(others), dtype=torch.bool, device=first.device)
    return (unlike.masked_fill(itself, float("-inf")).logsumexp(dim=1) - alike).mean()


PRIOR = Prior(
    terms={"cr": Term(Contrast, 0.8, "weight of the contrast between images", frozenset({"earlier"}))},
    options={
        "cmi_temperature": Option(0.1, rate, "temperature of the contrast"),
        "cmi_bank": Option(1024, natural, "earlier images to be unlike; 0: the batch alone"),
    },
)
