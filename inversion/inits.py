"""What the pixels are before the first iteration. `INITS` names the ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from utils.lazy import np, torch

if TYPE_CHECKING:
    from torch import Generator, Tensor

GREY = 0.9
"""Share of pink noise's variance that the channels have in common."""
LEAVES = 30
"""Shapes in an image of dead leaves, at most."""
FEW, PARTS = 15, 8
"""Leaves in a scene, and parts of what is in front of them, at most."""
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


class Shapes(NamedTuple):
    """N ellipses and rectangles for each of B images, in the order in which they are painted, those at the back first.

    `count` (B,): how many there are, the first ones. Lengths in pixels. `centre` (B, N, 2), down and right; `flatness`,
    of the side across as a share of the one along, which `angle` turns; `colour` (B, N, C, 1, 1); `shade`, what it
    changes by from its middle to its end; `grained`, how much of the image's grain it has; `edge`, over which it goes
    from covered to clear.
    """

    count: Tensor
    centre: Tensor
    radius: Tensor
    angle: Tensor
    flatness: Tensor
    box: Tensor
    colour: Tensor
    shade: Tensor
    grained: Tensor
    edge: Tensor


def leaves(shape: tuple[int, int, int, int], generator: Generator) -> Tensor:
    """Dead leaves: shapes of one colour each, shaded and grained, the smaller ones in front of the larger.

    Why photographs have the spectrum that they have: objects hide objects, and sizes follow a power law (Lee, Mumford
    and Huang, IJCV 2001; Baradad et al., NeurIPS 2021, learn from such images). So there are edges, things and grounds
    to begin with. 4 to 30 ellipses and rectangles, radii of 0.06 to 0.5 of the shorter side with a density as
    r^-3; pixels of a mean near 0 and a variance of about 0.65.
    """
    batch, _, height, width = shape
    draw = _Draw(shape, generator)
    grain = pink(shape, generator)
    number = torch.randint(4, LEAVES + 1, (batch, 1), generator=generator)
    radius = draw.radii(LEAVES, 0.06, 0.5)
    radius = torch.where(torch.arange(LEAVES) < number, radius, 0).sort(dim=1, descending=True).values
    centre, angle, flatness = draw.uniform(LEAVES, 2), draw.uniform(LEAVES) * torch.pi, 0.3 + 0.7 * draw.uniform(LEAVES)
    box = draw.uniform(LEAVES) < 1 / 3
    shade = draw.normal(LEAVES) * 0.4
    grained, ground = draw.uniform(LEAVES + 1) * 0.4, draw.colours(1)
    centre = centre * torch.tensor([height, width])
    colour, edge = draw.colours(LEAVES), torch.full_like(radius, EDGE)
    leaf = Shapes(number[:, 0], centre, radius, angle, flatness, box, colour, shade, grained[:, :-1], edge)
    return _painted(ground[:, 0] + grained[:, -1, None, None, None] * grain, grain, leaf)


def scenes(shape: tuple[int, int, int, int], generator: Generator) -> Tensor:
    """A thing in front of dead leaves in front of a ground, mostly of two parts, one above the other.

    What photographs have besides: sky or wall above and floor below, each shaded as a whole, and what they were taken
    for near the middle. The border, which 60% of the images have, lies at 0.3 to 0.9 of the height, slopes and is
    rough; in front are up to 15 leaves, radii of 0.05 to 0.3 of the shorter side; the thing has 2 to 8 parts in two
    colours, most of them lying and either all ellipses or all rectangles, the first with a radius of 0.15 to 0.45.
    Pixels of a mean near 0 and a variance of about 0.9.
    """
    batch, _, height, width = shape
    draw, size = _Draw(shape, generator), torch.tensor([height, width])
    grain = pink(shape, generator)
    pixels = _ground(shape, grain, draw)
    number = torch.randint(0, FEW + 1, (batch,), generator=generator)
    radius = draw.radii(FEW, 0.05, 0.3).sort(dim=1, descending=True).values
    centre, angle, flatness = draw.uniform(FEW, 2) * size, draw.uniform(FEW) * torch.pi, 0.3 + 0.7 * draw.uniform(FEW)
    box, colour, shade = draw.uniform(FEW) < 1 / 3, draw.colours(FEW), draw.normal(FEW) * 0.4
    grained, edge = draw.uniform(FEW) * 0.4, torch.full_like(radius, EDGE)
    leaf = Shapes(number, centre, radius, angle, flatness, box, colour, shade, grained, edge)
    return _painted(_painted(pixels, grain, leaf), grain, _thing(size, draw))


def _ground(shape: tuple[int, int, int, int], grain: Tensor, draw: _Draw) -> Tensor:
    """Images (B, C, H, W) of one part, or of two with a rough border between them."""
    batch, _, height, width = shape
    down = ((torch.arange(height) + 0.5) / height)[:, None] - 0.5
    right = (torch.arange(width) + 0.5) / width - 0.5
    colour, slope, grained = draw.colours(2), draw.normal(2, 2, 1, 1, 1) * 0.5, draw.uniform(2, 1, 1, 1) * 0.4
    above, below = (
        colour[:, part] + slope[:, part, 0] * down + slope[:, part, 1] * right + grained[:, part] * own
        for part, own in enumerate((grain, grain.flip(-1)))
    )
    border = draw.uniform(1, 1, 1) * 0.6 - 0.2 + draw.normal(1, 1, 1) * 0.15 * right
    border = border + 0.03 * pink((batch, 1, height, width), draw.generator)
    two, blur = draw.uniform(1, 1, 1) < 0.6, 0.5 + 4 * draw.uniform(1, 1, 1)
    return torch.where(two, torch.lerp(above, below, ((down - border) * height / blur).sigmoid()), above)


def _thing(size: Tensor, draw: _Draw) -> Shapes:
    """The parts of one thing in each image; `size` (2,) of the image."""
    radius = (0.15 + 0.3 * draw.uniform(1)) * draw.side
    number = torch.randint(2, PARTS + 1, (draw.batch,), generator=draw.generator)
    first = torch.arange(PARTS) == 0
    middle = (0.5 + 0.12 * draw.normal(1, 2)) * size
    offset = torch.where(first[:, None], 0, draw.normal(PARTS, 2)) * torch.tensor([0.6, 0.8]) * radius[:, :, None]
    radius = radius * torch.where(first, 1, 0.15 + 0.5 * draw.uniform(PARTS))
    lying, flatness = draw.normal(PARTS) * 0.4, 0.25 + 0.75 * draw.uniform(PARTS)
    box = (draw.uniform(1) < 0.4) ^ (draw.uniform(PARTS) < 0.2)
    two, second = draw.colours(2), draw.uniform(PARTS, 1, 1, 1) < 0.3
    colour = torch.where(second, two[:, 1:], two[:, :1])
    colour = colour + 0.15 * draw.normal(PARTS, 1, 1, 1) + 0.08 * draw.normal(PARTS, draw.channels, 1, 1)
    shade, grained = draw.normal(PARTS) * 0.4, draw.uniform(PARTS) * 0.4
    edge = (0.7 + 1.5 * draw.uniform(1)).expand(-1, PARTS).contiguous()
    return Shapes(number, middle + offset, radius, lying, flatness, box, colour, shade, grained, edge)


class _Draw:
    """Draws for a batch of images."""

    def __init__(self, shape: tuple[int, int, int, int], generator: Generator) -> None:
        self.batch, self.channels, height, width = shape
        self.side, self.generator = min(height, width), generator

    def uniform(self, *size: int) -> Tensor:
        """(B, *size), in [0, 1)."""
        return torch.rand(self.batch, *size, generator=self.generator)

    def normal(self, *size: int) -> Tensor:
        """(B, *size), standard normal."""
        return torch.randn(self.batch, *size, generator=self.generator)

    def colours(self, count: int) -> Tensor:
        """(B, count, C, 1, 1): brightness, and less of what channels differ by."""
        both = self.normal(count, 1 + self.channels, 1, 1)
        return 0.8 * both[:, :, :1] + 0.35 * both[:, :, 1:]

    def radii(self, count: int, smallest: float, largest: float) -> Tensor:
        """(B, count) pixels with a density as r^-3, between these shares of the shorter side."""
        most, least = 1 / smallest**2, 1 / largest**2
        return (1 / (most - self.uniform(count) * (most - least))).sqrt() * self.side


def _painted(pixels: Tensor, grain: Tensor, shapes: Shapes) -> Tensor:
    """The images (B, C, H, W), which are changed in place, with `shapes` in front; `grain` is as large."""
    # Most shapes are small, and only the part of an image that one reaches is painted: in numpy, whose calls cost less.
    painted, noise = pixels.numpy(), grain.numpy()
    count, centre, radius, angle, flatness, box, colour, shade, grained, edge = (x.numpy() for x in shapes)
    rows, cols = (np.arange(side, dtype=np.float32) + np.float32(0.5) for side in painted.shape[2:])
    for image, number in enumerate(count.tolist()):
        for one in ((image, i) for i in range(number)):
            (down, right), clear = centre[one], CLEAR * edge[one] / np.float32(EDGE)
            reach = (radius[one] + clear) * 2**0.5  # at the corners of a rectangle
            top, left = max(0, int(down - reach)), max(0, int(right - reach))
            bottom, end = max(0, int(down + reach) + 1), max(0, int(right + reach) + 1)
            where = np.s_[image, :, top:bottom, left:end]
            y, x = rows[where[2], None] - down, cols[where[3]] - right
            sine, cosine = np.sin(angle[one]), np.cos(angle[one])
            along, across = x * cosine + y * sine, (y * cosine - x * sine) / flatness[one]
            far = np.maximum(abs(along), abs(across)) if box[one] else np.hypot(along, across)
            covers = (1 + np.tanh((radius[one] - far) / (2 * edge[one]))) / 2
            shading = along * (shade[one] / max(radius[one], 1))
            painted[where] += covers * (colour[one] + shading + grained[one] * noise[where] - painted[where])
    return pixels


INITS: dict[str, Callable[[tuple[int, int, int, int], Generator], Tensor]] = {
    "white": white,
    "pink": pink,
    "leaves": leaves,
    "scenes": scenes,
}
