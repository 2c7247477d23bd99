"""What is optimized: the pixels themselves, or coefficients that stand for them. `CANVASES` names the ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from inversion.canvas import PatchCanvas


class Canvas(Protocol):
    """Images under optimization, kept patches of which are shown at `positions` (B, n)."""

    positions: Tensor
    parameter: Tensor
    """What the optimizer changes in place: one leaf tensor, float32."""

    def patches(self) -> PatchCanvas:
        """The kept patches as they are now; their gradient flows to the parameter."""

    def with_patches(self, kept: Tensor) -> Canvas:
        """The canvas of the patches at `kept` (B, k) of each image alone, which may share the parameter."""

    def moments_of(self, kept: Tensor, moments: Tensor) -> Tensor:
        """What is left of a tensor of the parameter's shape after `with_patches`."""

    def with_more(self, positions: Tensor) -> Canvas:
        """The canvas with the patches at `positions` (k,) as well."""

    def settle(self) -> None:
        """Called after a step: keeps the limits that pixels have."""

    def overwrite(self, patches: PatchCanvas) -> None:
        """Take what was done to the pixels of `patches()` from outside."""


@dataclass(frozen=True)
class CanvasKind:
    """A way to hold images, and what a configuration has with it where nothing else is said.

    `start` takes the grid, noise (B, C, H, W), black and white (C, 1, 1), `plain` and the positions (k,) that it begins
    with (None: all).
    """

    start: Callable[..., Canvas]
    spread: float
    """What the noise that it starts from is multiplied with."""
    lr: float
    lr_schedule: str
    init: str
    shows_stopped: bool
    """Whether pictures show stopped patches as they were when they stopped; if not, black."""


def _pixels(*args) -> Canvas:
    from inversion.canvas import PatchCanvas

    return PatchCanvas.start(*args)


def _spectral(*args) -> Canvas:
    from inversion.spectral import SpectralCanvas

    return SpectralCanvas.start(*args)


CANVASES: dict[str, CanvasKind] = {
    "pixels": CanvasKind(_pixels, spread=1.0, lr=0.25, lr_schedule="constant", init="white", shows_stopped=False),
    "spectral": CanvasKind(_spectral, spread=1.0, lr=0.3, lr_schedule="cosine", init="pink", shows_stopped=True),
}
