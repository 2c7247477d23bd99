"""Competition with a student, as in SMI's transfer (Yin et al., *Dreaming to Distill*, CVPR 2020, R_compete, eq. 9)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from inversion.priors.base import Context, Loss, LossInputs, Option, Prior, Term, precise
from utils.cli import rate

if TYPE_CHECKING:
    from torch import Tensor

BOUNDS = 0.01, 0.99
"""What probabilities are clamped to, as in DeepInversion's code."""


class Disagreement(Loss):
    """1 - JS(teacher, student), mean over the batch: low for images that the two disagree on.

    JS is the Jensen-Shannon divergence of the two predicted distributions at a temperature, clamped to `BOUNDS`, in
    nats.
    """

    def __init__(self, context: Context) -> None:
        self.student, self.temperature = context.frozen(context.student), float(context.options["adv_temperature"])
        self.runs = (self.student,)

    def __call__(self, inputs: LossInputs) -> Tensor:
        return disagreement(inputs.output.logits, inputs.seen_by(self.student).logits, self.temperature)


def disagreement(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """1 - JS of the distributions that two sets of logits (B, classes) stand for at a temperature."""
    p, q = ((precise(logits) / temperature).softmax(dim=1).clamp(*BOUNDS) for logits in (teacher, student))
    mean = (p + q) / 2
    return 1 - sum((x * (x / mean).log()).sum(dim=1).mean() for x in (p, q)) / 2


PRIOR = Prior(
    {"adv": Term(Disagreement, 1.0, "weight of 1 - JS divergence of teacher and student", frozenset({"student"}))},
    {"adv_temperature": Option(3.0, rate, "temperature of the two distributions that are to differ")},
)
