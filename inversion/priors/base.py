"""What a prior is: terms of the inversion loss, with the weights and options that they are published with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from inversion.canvas import PatchCanvas
    from inversion.views import Seen
    from models import LoadedModel, SparseImages, SparseViT, ViTOutput


def precise(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class LossInputs:
    """What a term may look at in one iteration.

    `output` of the teacher on what it was fed, `targets` (B, classes), rows that sum to 1, the `canvas` as it is before
    any view, and what the teacher was fed (`seen`). `opposite` gives another look at the same images, under views that
    have as little in common with this one's as there is.
    """

    output: ViTOutput
    targets: Tensor
    canvas: PatchCanvas
    seen: Seen
    opposite: Callable[[], Seen]

    def seen_by(self, vit: SparseViT) -> ViTOutput:
        """What another model gives for what the teacher was fed."""
        return vit(*self.seen)

    def image(self) -> Tensor:
        """What the teacher was fed as an image (B, C, H, W), zeros where there is no patch."""
        # Positions are mirrored already, the pixels inside a patch are not.
        patches, flip = self.seen.patches, self.seen.mirrored
        if isinstance(flip, torch.Tensor):
            patches = torch.where(flip.bool(), patches.flip(-1), patches)
        elif flip:
            patches = patches.flip(-1)
        return self.canvas.grid.unpatchify(patches, self.seen.positions)


@dataclass(frozen=True)
class Context:
    """What a term is made from: the inverted model, as the user gave it and as the engine runs it, and what else.

    `options`: the configuration's; `frozen` makes the engine's copy of another model.
    """

    model: LoadedModel
    vit: SparseViT
    device: torch.device
    dtype: torch.dtype
    options: Mapping[str, object]
    student: LoadedModel | None
    frozen: Callable[[LoadedModel], SparseViT]


class Loss:
    """One term of the loss: made once for a model, asked at every iteration of every batch."""

    reads_attended = False
    """Whether `output.attended` is read."""
    runs: tuple[SparseViT, ...] = ()
    """Models that are run on each image besides the teacher's own pass (for the count of operations)."""

    def __init__(self, context: Context) -> None:
        pass

    def begin(self, earlier: SparseImages | None, generator: torch.Generator) -> None:
        """A new batch begins.

        Args:
            earlier: images of the batches before it, for terms whose prior `needs` them; else None.
            generator: for random choices; what is drawn from it moves nothing else.
        """

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The term, a scalar in float32 or better."""
        raise NotImplementedError


@dataclass(frozen=True)
class Term:
    """A term as the command line knows it: the flag `--NAME` is its weight.

    `make` gets a `Context`; `weight` is what it has where its prior is chosen and nothing else is said.
    """

    make: Callable[[Context], Loss]
    weight: float
    help: str
    needs: frozenset[str] = frozenset()
    """Of `student`, `earlier`."""


@dataclass(frozen=True)
class Option:
    """A setting of a prior besides weights: the flag `--NAME`."""

    default: object
    type: Callable[[str], object]
    help: str


@dataclass(frozen=True)
class Prior:
    """What `--prior NAME` stands for."""

    terms: Mapping[str, Term]
    options: Mapping[str, Option] = field(default_factory=dict)
