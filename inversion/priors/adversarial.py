"""Adaptive DeepInversion's competition (Yin et al., *Dreaming to Distill*, CVPR 2020, R_compete, eq. 9)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from inversion.priors.base import Context, Loss, LossInputs, Prior, Term, precise
from utils.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor


class Disagreement(Loss):
    """1 - JS(teacher, student), mean over the batch: low for images that the two disagree on.

    JS is the Jensen-Shannon divergence of the two predicted distributions, in nats: 0 .. log 2.
    """

    def __init__(self, context: Context) -> None:
        self.student = context.frozen(context.student)
        self.runs = (self.student,)

    def __call__(self, inputs: LossInputs) -> Tensor:
        return disagreement(inputs.output.logits, inputs.seen_by(self.student).logits)


def disagreement(teacher: Tensor, student: Tensor) -> Tensor:
    """1 - JS of the distributions that two sets of logits (B, classes) stand for."""
    teacher, student = (F.log_softmax(precise(logits), dim=1) for logits in (teacher, student))
    mean = torch.logaddexp(teacher, student) - math.log(2)
    halves = (F.kl_div(mean, log_p, reduction="batchmean", log_target=True) for log_p in (teacher, student))
    return 1 - sum(halves) / 2


PRIOR = Prior(
    {"adv": Term(Disagreement, 1.0, "weight of 1 - JS divergence of teacher and student", frozenset({"student"}))}
)
