"""What the pixels are before the first iteration. `INITS` names the ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from utils.lazy import np, torch

if TYPE_CHECKING:
    from torch import Generator, Tensor

GREY = 0.9
"""Share of pink noise's variance that the channels have in common."""
LEAVES = 30
"""Shapes in an image of dead leaves, at most."""
EDGE, CLEAR = 1.5, 14
"""Pixels from clear to covered at a shape's edge, and pixels from it on that are clear."""


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


def leaves(shape: tuple[int, int, int, int], generator: Generator) -> Tensor:
    """Dead leaves: shapes of one colour each, shaded and grained, the smaller ones in front of the larger.

    Why photographs have the spectrum that they have: objects hide objects, and sizes follow a power law (Lee, Mumford
    and Huang, IJCV 2001; Baradad et al., NeurIPS 2021, learn from such images). So there are edges, things and grounds
    to begin with. 4 to 30 ellipses and rectangles, radii of 0.06 to 0.5 of the shorter side with a density as
    r^-3; pixels of a mean near 0 and a variance of about 0.65.
    """
    batch, channels, height, width = shape
    side = min(height, width)

    def uniform(*size: int) -> Tensor:
        return torch.rand(batch, *size, generator=generator)

    def colours(count: int) -> Tensor:
        both = torch.randn(batch, count, 1 + channels, 1, 1, generator=generator)
        return 0.8 * both[:, :, :1] + 0.35 * both[:, :, 1:]

    grain = pink(shape, generator)
    number = torch.randint(4, LEAVES + 1, (batch, 1), generator=generator)
    radii = (1 / (1 / 0.06**2 - uniform(LEAVES) * (1 / 0.06**2 - 1 / 0.5**2))).sqrt() * side
    radii = torch.where(torch.arange(LEAVES) < number, radii, 0).sort(dim=1, descending=True).values
    centres, angles, flatness = uniform(LEAVES, 2), uniform(LEAVES) * torch.pi, 0.3 + 0.7 * uniform(LEAVES)
    boxes = uniform(LEAVES, 1, 1) < 1 / 3
    shading = torch.randn(batch, LEAVES, 1, 1, generator=generator) * 0.4
    grained, ground = uniform(LEAVES + 1, 1, 1, 1) * 0.4, colours(1)
    colour = colours(LEAVES)
    pixels = ground[:, 0] + grained[:, -1] * grain
    # Most leaves are small, and only the part of an image that one reaches is painted: in numpy, whose calls cost less.
    painted, noise, radii, centres, angles, flatness, boxes, shading, grained, colour = (
        x.numpy() for x in (pixels, grain, radii, centres, angles, flatness, boxes, shading, grained, colour)
    )
    rows, cols = (np.arange(side, dtype=np.float32) + np.float32(0.5) for side in (height, width))
    for image, count in enumerate(number.flatten().tolist()):
        for leaf in range(count):
            one = image, leaf
            radius, down, right = radii[one], centres[one][0] * height, centres[one][1] * width
            reach = (radius + CLEAR) * 2**0.5  # at the corners of a rectangle
            top, left = max(0, int(down - reach)), max(0, int(right - reach))
            where = np.s_[image, :, top : int(down + reach) + 1, left : int(right + reach) + 1]
            y, x = rows[where[2], None] - down, cols[where[3]] - right
            sine, cosine = np.sin(angles[one]), np.cos(angles[one])
            along, across = x * cosine + y * sine, (y * cosine - x * sine) / flatness[one]
            far = np.maximum(abs(along), abs(across)) if boxes[one] else np.hypot(along, across)
            covers = (1 + np.tanh((radius - far) / np.float32(2 * EDGE))) / 2
            shade = along * (shading[one] / max(radius, 1))
            painted[where] += covers * (colour[one] + shade + grained[one] * noise[where] - painted[where])
    return pixels


INITS: dict[str, Callable[[tuple[int, int, int, int], Generator], Tensor]] = {
    "white": white,
    "pink": pink,
    "leaves": leaves,
}
