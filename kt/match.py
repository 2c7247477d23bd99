"""What of a teacher its student imitates: `MATCHES` names the ways, each with a weight of its own.

A way is made for a teacher and a student, and gives a loss of what both say of the same images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from utils.calls import parse_call
from utils.errors import UserError
from utils.lazy import F, nn

if TYPE_CHECKING:
    from torch import Tensor

    from models import SparseViT, ViTOutput


class Match(Protocol):
    """A part of the loss; an `nn.Module`, what learns in it learns with the student.

    `reads_tokens`: whether it looks at tokens, so that both have to be run to their last token.
    """

    reads_tokens: bool

    def __call__(self, student: ViTOutput, teacher: ViTOutput) -> Tensor:
        """The loss () of what both say of the same batch."""


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of the distributions at temperature T (Hinton et al., 2015), mean over the batch.

    Args:
        student: logits (B, classes).
        teacher: logits (B, classes), the target.
        temperature: T; both logits are divided by it. T^2 keeps the gradient's size.
    """
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def logits(student: SparseViT, teacher: SparseViT, temperature: float) -> Match:
    """The teacher's distribution over classes: `distillation_loss`."""

    class Logits(nn.Module):
        reads_tokens = False

        def forward(self, ours: ViTOutput, theirs: ViTOutput) -> Tensor:
            return distillation_loss(ours.logits, theirs.logits, temperature)

    return Logits()


def features(student: SparseViT, teacher: SparseViT, temperature: float) -> Match:
    """The teacher's patch tokens through a linear map of the student's, which learns (FitNets, Romero et al., 2015).

    Mean squared error between tokens of unit variance: each of the teacher's is normalized over its channels.
    """
    _require_same_patches("features", student)

    class Features(nn.Module):
        reads_tokens = True

        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(student.head.head.in_features, teacher.head.head.in_features, device=teacher.device)

        def forward(self, ours: ViTOutput, theirs: ViTOutput) -> Tensor:
            wanted = F.layer_norm(theirs.tokens, theirs.tokens.shape[-1:])
            return F.mse_loss(self.map(ours.tokens), wanted)

    return Features()


def relations(student: SparseViT, teacher: SparseViT, temperature: float) -> Match:
    """How alike any two patch tokens of an image are: cosines, which need no map (after Park et al., 2019).

    Mean squared error of the matrices (B, n, n).
    """
    _require_same_patches("relations", student)

    class Relations(nn.Module):
        reads_tokens = True

        def forward(self, ours: ViTOutput, theirs: ViTOutput) -> Tensor:
            return F.mse_loss(*(cosines(said.tokens) for said in (ours, theirs)))

    return Relations()


def hard(student: SparseViT, teacher: SparseViT, temperature: float) -> Match:
    """The teacher's decision, taught to the classifier of the distillation token (DeiT, Touvron et al., ICML 2021)."""
    if getattr(getattr(student, "head", None), "head_dist", None) is None:
        raise UserError("--match hard is for a student with a distillation token, as deit_tiny_distilled_patch16_224")

    class Hard(nn.Module):
        reads_tokens = False

        def forward(self, ours: ViTOutput, theirs: ViTOutput) -> Tensor:
            decided = student.head.head_dist(ours.features[:, 1])
            return F.cross_entropy(decided, theirs.logits.argmax(dim=1))

    return Hard()


def cosines(tokens: Tensor) -> Tensor:
    """Tokens (B, n, D) -> cosines of the angles between them (B, n, n)."""
    unit = F.normalize(tokens, dim=-1)
    return unit @ unit.transpose(1, 2)


MATCHES: dict[str, Callable[[SparseViT, SparseViT, float], Match]] = {
    "logits": logits,
    "features": features,
    "relations": relations,
    "hard": hard,
}


@dataclass(frozen=True)
class Weight:
    """How much a way counts."""

    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise UserError(f"--match: weight {self.weight} is not a number above 0")


def parse_match(text: str) -> tuple[str, float]:
    """`NAME` or `NAME:weight=W` -> the name and its weight, 1 if none is given. `UserError` for anything else."""
    name, found = parse_call(text, dict.fromkeys(MATCHES, Weight), "--match")
    return name, found.weight


def _require_same_patches(name: str, student: object) -> None:
    if not hasattr(student, "blocks"):
        raise UserError(
            f"--match {name} compares patch tokens, and a student that is fed whole images of its own size has none of "
            "the teacher's; give --match logits"
        )


def made(
    ways: tuple[str, ...], student: SparseViT, teacher: SparseViT, temperature: float
) -> list[tuple[float, Match]]:
    """Weight and part of the loss, for each of `ways`. Raises `UserError` where a student has not what one reads."""
    parsed = [parse_match(way) for way in ways]
    return [(weight, MATCHES[name](student, teacher, temperature)) for name, weight in parsed]
