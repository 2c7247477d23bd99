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
    from models import LoadedModel, PatchGrid, SparseImages, SparseViT, ViTOutput


def precise(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class LossInputs:
    """What a term may look at in one iteration.

    `output` of the teacher on what it was fed, `targets` (B, classes), rows that sum to 1, the `canvas` as it is before
    any view (in a coarse phase of fewer pixels than it is fed with), and what the teacher was fed (`seen`), on `grid`.
    `numbers` (B, k): as many as the term asks for, uniform in [0, 1), drawn anew for every image and look.
    """

    output: ViTOutput
    targets: Tensor
    canvas: PatchCanvas
    seen: Seen
    grid: PatchGrid
    numbers: Tensor | None = None

    def seen_by(self, vit: SparseViT) -> ViTOutput:
        """What another model gives for what the teacher was fed."""
        return vit(*self.seen)

    def fed(self) -> Tensor:
        """The patches that the teacher was fed (B, n, C, height, width) at `seen.positions`, mirrored where it is."""
        # Positions are mirrored already, the pixels inside a patch are not.
        patches, flip = self.seen.patches, self.seen.mirrored
        if isinstance(flip, torch.Tensor):
            return torch.where(flip.bool(), patches.flip(-1), patches)
        return patches.flip(-1) if flip else patches

    def image(self) -> Tensor:
        """What the teacher was fed as an image (B, C, H, W), zeros where there is no patch."""
        return self.grid.unpatchify(self.fed(), self.seen.positions)

    def part(self, side: Tensor, place: Tensor, mirrored: bool | Tensor = False) -> Seen:
        """A part of each image of the canvas, enlarged to all of it, as what a model is fed.

        Args:
            side: (B,), of the part, a share of the image's.
            place: (B, 2), of the part in the room that it leaves down and right, in [0, 1].
            mirrored: whether it is mirrored.
        """
        from inversion.canvas import Jitter, mirrored_positions
        from inversion.views import Seen, enlarged, squares

        canvas, dtype = self.canvas, self.seen.patches.dtype
        patches, positions = enlarged(canvas.pixels.to(dtype), canvas.positions, side, place, canvas.grid, canvas.plain)
        patches = squares(patches, self.grid.height // canvas.grid.height)
        return Seen(patches, mirrored_positions(positions, canvas.grid, Jitter(0, 0, mirrored)), mirrored)


@dataclass(frozen=True)
class Context:
    """What a term is made from: the inverted model, as the user gave it and as the engine runs it, and what else.

    `options` and `views`: the configuration's; `frozen` makes the engine's copy of another model.
    """

    model: LoadedModel
    vit: SparseViT
    device: torch.device
    dtype: torch.dtype
    options: Mapping[str, object]
    student: LoadedModel | None
    frozen: Callable[[LoadedModel], SparseViT]
    views: tuple[str, ...] = ()

    def has_view(self, name: str) -> bool:
        """Whether a view is among those of the configuration."""
        return any(view.partition(":")[0] == name for view in self.views)


class Loss:
    """One term of the loss: made once for a model, asked at every iteration of every batch."""

    reads_inside = False
    """Whether `output.inside` is read."""
    numbers = 0
    """How many `LossInputs.numbers` it takes for each image."""
    runs: tuple[SparseViT, ...] = ()
    """Models that are run on each image besides the teacher's own pass (for the count of operations)."""

    def __init__(self, context: Context) -> None:
        pass

    def begin(self, earlier: SparseImages | None, generator: torch.Generator, images: int) -> None:
        """A new batch begins.

        Args:
            earlier: images of the batches before it, for terms whose prior `needs` them; else None.
            generator: for random choices; what is drawn from it moves nothing else.
            images: of the batch, as they are optimized.
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
    """Of `student`, as it is now, `backbone`, which may have learnt nothing yet, and `earlier` images."""


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
