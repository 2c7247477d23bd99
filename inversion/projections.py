"""What is done to the pixels after a step, to keep them images. `PROJECTIONS` names the ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from utils.calls import parse_call
from utils.errors import UserError
from utils.lazy import torch

if TYPE_CHECKING:
    from inversion.canvas import PatchCanvas


class Projection(Protocol):
    """Changes the pixels in place, every `every` iterations."""

    every: int

    def __call__(self, canvas: PatchCanvas) -> None:
        """Project the canvas."""


@dataclass(frozen=True)
class LowPass:
    """Drops what oscillates faster than `cutoff` times the highest frequency of the pixel grid, in either direction.

    Stopped patches count as zeros; what the filter would put there is dropped.
    """

    cutoff: float = 0.8
    every: int = 100

    def __post_init__(self) -> None:
        if not 0 < self.cutoff <= 1:
            raise UserError(f"--projection lowpass: cutoff {self.cutoff} is not in (0, 1]")
        if self.every < 1 or self.every != int(self.every):
            raise UserError(f"--projection lowpass: every {self.every} is not a number of iterations")

    def __call__(self, canvas: PatchCanvas) -> None:
        grid = canvas.grid
        images = grid.unpatchify(canvas.pixels, canvas.positions)
        spectrum = torch.fft.rfft2(images)
        rows = torch.fft.fftfreq(images.shape[-2], device=images.device).abs()
        cols = torch.fft.rfftfreq(images.shape[-1], device=images.device)
        spectrum *= (rows <= self.cutoff / 2)[:, None] & (cols <= self.cutoff / 2)
        smooth = grid.patchify(torch.fft.irfft2(spectrum, s=images.shape[-2:]))
        chosen = torch.arange(len(smooth), device=smooth.device)[:, None]
        canvas.pixels.copy_(smooth[chosen, canvas.positions])


PROJECTIONS: dict[str, Callable[..., Projection]] = {"lowpass": LowPass}


def parse_projection(text: str) -> Projection | None:
    """`clamp` -> None, for it is always there; `NAME` or `NAME:key=value,key=value` -> that projection.

    Raises:
        UserError: an unknown name or key, or a value that is no number.
    """
    return None if text == "clamp" else parse_call(text, {"clamp": lambda: None, **PROJECTIONS}, "--projection")[1]
