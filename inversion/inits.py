"""What the pixels are before the first iteration. `INITS` names the ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from utils.lazy import torch

if TYPE_CHECKING:
    from torch import Generator, Tensor

GREY = 0.9
"""Share of pink noise's variance that the channels have in common."""


def white(shape: tuple[int, int, int, int], generator: Generator) -> Tensor:
    """Standard normal pixels, all independent: the published start."""
    return torch.randn(shape, generator=generator)


def pink(shape: tuple[int, int, int, int], generator: Generator) -> Tensor:
    """Normal pixels of variance 1 with the spectrum of natural images, whose amplitude falls as 1 / frequency.

    Known of images at large (Field, JOSA A 1987; Baradad et al., *Learning to See by Looking at Noise*, NeurIPS 2021,
    learn from such noise), so it is no data. Images differ in brightness and channels go together, as in photographs
    and other than in white noise, whose every image and every large patch has the same mean. Neighbours beyond an edge
    are those at the opposite one, as for the jitter.
    """
    batch, channels, height, width = shape
    rows, cols = torch.fft.fftfreq(height, 1 / height), torch.fft.fftfreq(width, 1 / width)
    # The mean, which has no frequency, counts as the lowest one.
    amplitude = 1 / torch.hypot(rows[:, None], cols).clamp(min=1)
    amplitude /= amplitude.square().mean().sqrt()
    spectrum = torch.fft.rfft2(torch.randn(batch, 1 + channels, height, width, generator=generator))
    pixels = torch.fft.irfft2(spectrum * amplitude[:, : width // 2 + 1], s=(height, width))
    return GREY**0.5 * pixels[:, :1] + (1 - GREY) ** 0.5 * pixels[:, 1:]


INITS: dict[str, Callable[[tuple[int, int, int, int], Generator], Tensor]] = {"white": white, "pink": pink}
