"""SynQ (Kim et al., *Accurate Zero-shot Quantization by Synthesis-aware Fine-tuning*, ICLR 2025): smooth, and soft.

Of the paper, as remembered: images are passed through a Gaussian low-pass filter, for inversion leaves noise in high
frequencies; and where the model is unsure of an image the label is not trusted, the model's own answer is. The paper
does both while a quantized model is fine-tuned; here they act on the image that is made. Its third part, class
activation maps of a quantized model, has no counterpart before there is one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from inversion.priors.base import Context, Loss, LossInputs, Option, Prior, Term, precise
from utils.cli import Number, rate
from utils.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor

SHARE = Number(float, 0, 1, "a share")


class HighFrequencies(Loss):
    """Frobenius norm of what a Gaussian low-pass filter takes from the batch, in kept patches.

    The filter multiplies the amplitude of frequency (u, v), in shares of the highest, by exp(-(u^2 + v^2) / (2
    cutoff^2)). Stopped patches are read as zeros.
    """

    def __init__(self, context: Context) -> None:
        self.cutoff = float(context.options["synq_cutoff"])

    def __call__(self, inputs: LossInputs) -> Tensor:
        canvas = inputs.canvas
        images = canvas.grid.unpatchify(canvas.pixels, canvas.positions)
        rows, cols = (
            2 * f(size, device=images.device)
            for f, size in zip((torch.fft.fftfreq, torch.fft.rfftfreq), images.shape[-2:], strict=True)
        )
        passed = (-(rows.square()[:, None] + cols.square()) / (2 * self.cutoff**2)).exp()
        removed = torch.fft.irfft2(torch.fft.rfft2(images) * (1 - passed), s=images.shape[-2:])
        return torch.linalg.vector_norm(canvas.grid.taken(removed, canvas.positions))


class SoftWhereUnsure(Loss):
    """Cross-entropy with the target where the model gives it at least `synq_sure`, else with a softer one.

    The softer one is half the target and half the model's own answer, which carries no gradient.
    """

    def __init__(self, context: Context) -> None:
        self.sure = float(context.options["synq_sure"])

    def __call__(self, inputs: LossInputs) -> Tensor:
        logits = precise(inputs.output.logits)
        targets, answer = inputs.targets.to(logits.dtype), logits.detach().softmax(dim=1)
        unsure = answer.gather(1, targets.argmax(dim=1, keepdim=True)) < self.sure
        return F.cross_entropy(logits, torch.where(unsure, (targets + answer) / 2, targets))


PRIOR = Prior(
    terms={
        "hf": Term(HighFrequencies, 1e-2, "weight of what a Gaussian low-pass filter takes away"),
        "soft": Term(SoftWhereUnsure, 1.0, "weight of the cross-entropy with labels soft where the model is unsure"),
    },
    options={
        "synq_cutoff": Option(0.3, rate, "deviation of the low-pass filter, a share of the highest frequency"),
        "synq_sure": Option(0.5, SHARE, "probability of the label from which the model counts as sure"),
    },
)
