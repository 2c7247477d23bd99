"""Views: how the image is changed, by chance and at every step, between the canvas and the model. `VIEWS` names them.

`roll` and `flip` are one draw for the batch, as published; every other view draws anew for each image. A stopped patch
is read as zeros, the mean colour, before anything else is done, by every view alike: what the model is fed is what it
would be fed if the view were applied to the whole image with zeros where patches have stopped. The next view reads what
is fed: zeros as well where a roll moves pixels to a position at which nothing is fed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from models.patches import bilinear_weights, crop_lines
from utils.calls import canonical, parse_call
from utils.errors import UserError
from utils.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor

    from inversion.canvas import Jitter, PatchCanvas
    from models import PatchGrid

LEVELS = 4
"""Crops that are tried, each larger than the one before, until there is enough to see."""
SEEN = 1e-4
"""Share of a patch that has to be covered for its position to count."""
NOISE_PATCHES = 4096


class Seen(NamedTuple):
    """What the model is fed: `patches` (B, n, C, height, width) at `positions` (B, n), each mirrored if `mirrored`."""

    patches: Tensor
    positions: Tensor
    mirrored: bool | Tensor = False


class Draw(NamedTuple):
    """The chance of one look at a batch: a `jitter` for all of it, and `numbers` (B, k) in [0, 1).

    They are those of the other views, and after them what terms of the loss have asked for.
    """

    jitter: Jitter
    numbers: Tensor

    def packed(self) -> Tensor:
        """As one tensor (3 + B * k,), for what a recording reads."""
        return torch.cat([torch.tensor(self.jitter, dtype=torch.float32), self.numbers.flatten()])

    @staticmethod
    def unpacked(row: Tensor, batch: int) -> Draw:
        """The draw of `batch` images that a row of `packed` stands for; nothing waits for its values."""
        from inversion.canvas import Jitter

        return Draw(Jitter(*row[:3].long().unbind()), row[3:].view(batch, -1))


class View:
    """A change of what the model is fed. Its fields are its settings, `NAME:key=value,key=value`."""

    numbers = 0

    def numbers_for(self, channels: int) -> int:
        """Uniform numbers that it takes for each image, of so many channels, and look."""
        return self.numbers

    def prepare(self, grid: PatchGrid, device: torch.device) -> None:
        """Called once before any look."""

    def __call__(self, patches: Tensor, positions: Tensor, u: Tensor, grid: PatchGrid, plain: bool):
        """The changed patches and where they are.

        Args:
            patches: (B, n, C, height, width).
            positions: (B, n), int64.
            u: (B, `numbers_for`), uniform in [0, 1).
            grid: what positions count in.
            plain: by stock kernels and autograd alone.
        """
        raise NotImplementedError


@dataclass
class Roll(View):
    """The image is rolled by up to `share` of its height and width, one draw for the batch; it wraps around.

    `diagonal`: 1 for one draw of both axes, as PSAQ-ViT's code has it.
    """

    share: float = 1 / 8
    diagonal: float = 0

    def __post_init__(self) -> None:
        _within(self.share, 0, 1, "roll: share")
        if self.diagonal not in (0, 1):
            raise UserError(f"--views roll: diagonal {self.diagonal:g} is neither 0 nor 1")


@dataclass
class Flip(View):
    """The batch is mirrored in half of the looks."""


@dataclass
class Crop(View):
    """A part of the image, of a share uniform in [`area`, 1] of it and of its shape, anywhere in it, is enlarged to it.

    Bilinear, pixels beyond the border are those at it. Kept patches are resampled onto the grid where they land. As
    many positions are fed as patches are kept, those of which most is covered by kept patches, so that shapes do not
    depend on the draw; a position that nothing lands on is left out. Where a crop covers fewer positions than that, it
    is enlarged towards the whole image, of which just as many are covered.
    """

    area: float = 0.35
    numbers = 3

    def __post_init__(self) -> None:
        _within(self.area, 0.01, 1, "crop: area")

    def __call__(self, patches, positions, u, grid, plain):
        side = (self.area + (1 - self.area) * u[:, 0]).sqrt()
        return enlarged(patches, positions, side, u[:, 1:], grid, plain)


@dataclass
class Colour(View):
    """Each channel becomes x * s + m, s = exp(uniform in [-`scale`, `scale`]), m uniform in [-`shift`, `shift`].

    The colour shift of Plug-In Inversion (Ghiasi et al., ICML 2022), where both settings are 1; normalized pixels.
    """

    scale: float = 0.5
    shift: float = 0.5

    def __post_init__(self) -> None:
        _within(self.scale, 0, 5, "colour: scale")
        _within(self.shift, 0, 5, "colour: shift")

    def numbers_for(self, channels: int) -> int:
        return 2 * channels

    def __call__(self, patches, positions, u, grid, plain):
        u = (2 * u - 1).view(len(u), 2, -1, 1, 1).to(patches.dtype)
        scale, shift = (self.scale * u[:, 0]).exp(), self.shift * u[:, 1]
        return torch.addcmul(shift[:, None], patches, scale[:, None]), positions


@dataclass
class Contrast(View):
    """All channels are scaled about the mean colour by exp(uniform in [-`scale`, `scale`])."""

    scale: float = 0.5
    numbers = 1

    def __post_init__(self) -> None:
        _within(self.scale, 0, 5, "contrast: scale")

    def __call__(self, patches, positions, u, grid, plain):
        return patches * (self.scale * (2 * u - 1)).exp().to(patches.dtype).view(-1, 1, 1, 1, 1), positions


@dataclass
class Noise(View):
    """Normal noise is added, its standard deviation uniform in [0, `deviation`] normalized pixels.

    It comes from a sequence of a few thousand patches of noise, drawn once, each look of each image at a place of its
    own: the same on every device, and several times cheaper than new noise.
    """

    deviation: float = 0.3
    numbers = 2

    def __post_init__(self) -> None:
        _within(self.deviation, 0, 10, "noise: deviation")

    def prepare(self, grid, device):
        drawn = torch.randn(NOISE_PATCHES, grid.pixels, generator=torch.Generator().manual_seed(0))
        self.patches = drawn.to(device)

    def __call__(self, patches, positions, u, grid, plain):
        start = (u[:, 1:] * NOISE_PATCHES).long()
        rows = (start + torch.arange(positions.shape[1], device=u.device)) % NOISE_PATCHES
        deviation = (self.deviation * u[:, 0]).to(patches.dtype).view(-1, 1, 1, 1, 1)
        return patches + deviation * self.patches[rows].view(patches.shape).to(patches.dtype), positions


VIEWS: dict[str, type[View]] = {
    "roll": Roll,
    "flip": Flip,
    "crop": Crop,
    "colour": Colour,
    "contrast": Contrast,
    "noise": Noise,
}
"""In the order in which they are applied, whatever order they are asked for in; the flip comes last."""


def parse_views(texts: Sequence[str]) -> dict[str, View]:
    """The views by their names, in the order in which they are applied.

    Raises:
        UserError: an unknown name or setting, a setting out of range, or a view that is there twice.
    """
    found: dict[str, View] = {}
    for text in texts:
        name, view = parse_call(text, VIEWS, "--views")
        if name in found:
            raise UserError(f"--views has {name} twice")
        found[name] = view
    return {name: found[name] for name in VIEWS if name in found}


def canonical_views(texts: Sequence[str]) -> tuple[str, ...]:
    """The same views as every configuration writes them: in order, settings of their own alone. Raises as above."""
    return tuple(canonical(name, view) for name, view in parse_views(texts).items())


def numbers_of(texts: Sequence[str], channels: int) -> int:
    """Numbers that a look takes for each image of so many channels."""
    return sum(view.numbers_for(channels) for view in parse_views(texts).values())


def enlarged(
    patches: Tensor, positions: Tensor, side: Tensor, place: Tensor, grid: PatchGrid, plain: bool
) -> tuple[Tensor, Tensor]:
    """A part of each image, enlarged to all of it as `Crop` says: its patches, and their positions (B, n).

    Args:
        patches: (B, n, C, height, width).
        positions: (B, n), int64.
        side: (B,), of the part, a share of the image's.
        place: (B, 2), of the part in the room that it leaves down and right, in [0, 1].
        grid: what positions count in.
        plain: by stock kernels and autograd alone.
    """
    chosen = everywhere = grid.all_positions(len(positions), positions.device)
    if positions.shape[1] < grid.count:
        side, chosen = _roomy(side, positions, place, grid)
    exact = torch.promote_types(patches.dtype, torch.float32)
    axes = zip(place.to(exact).unbind(1), grid.image_size, strict=True)
    lines = [crop_lines(side.to(exact), along, length) for along, length in axes]
    if plain or patches.device.type != "cpu" or (chosen is everywhere and patches.dtype != exact):
        return _by_weights(patches, positions, *lines, chosen, grid, plain), chosen
    return _by_points(patches, positions, *lines, chosen, grid), chosen


class Views:
    """The views of a configuration, ready to look.

    Args:
        texts: as the configuration has them.
        grid: what positions count in.
        device: where the images are.
        plain: by stock kernels and autograd alone.
        extra: numbers that a draw has for each image besides those of the views.
        coarse: the canvases are so many times coarser than what the model is fed.
    """

    def __init__(
        self,
        texts: Sequence[str],
        grid: PatchGrid,
        device: torch.device,
        plain: bool = False,
        extra: int = 0,
        coarse: int = 1,
    ) -> None:
        grid = grid.coarser(coarse)
        views, self.numbers = parse_views(texts), numbers_of(texts, grid.channels)
        self.grid, self.plain, self.extra, self.coarse = grid, plain, extra, coarse
        self.flip = views.pop("flip", None) is not None
        self.roll: Roll | None = views.pop("roll", None)
        self.others = list(views.values())
        for view in self.others:
            view.prepare(grid, device)

    def draws(self, count: int, batch: int, generator: torch.Generator) -> list[Draw]:
        """The chance of `count` looks at a batch of `batch` images."""
        from inversion.canvas import draw_jitters

        share, diagonal = (0.0, False) if self.roll is None else (self.roll.share, bool(self.roll.diagonal))
        jitters = draw_jitters(count, self.grid, generator, self.flip, share, diagonal)
        each = self.numbers + self.extra
        numbers = torch.rand(count, batch, each, generator=generator) if each else torch.zeros(1, batch, 0)
        return [Draw(*pair) for pair in zip(jitters, numbers.expand(count, -1, -1), strict=True)]

    def look(self, canvas: PatchCanvas, draw: Draw, dtype: torch.dtype) -> Seen:
        """What the model is fed of a canvas, in `dtype`. A flip is left to the model, which mirrors its projection."""
        from inversion.canvas import mirrored_positions, rolled_positions

        jitter, first = draw.jitter, 0
        patches, positions = canvas.windows(jitter, dtype), rolled_positions(canvas.positions, self.grid, jitter)
        for view in self.others:
            count = view.numbers_for(self.grid.channels)
            u = draw.numbers[:, first : first + count]
            patches, positions = view(patches, positions, u, self.grid, self.plain)
            first += count
        patches = squares(patches, self.coarse)
        return Seen(patches, mirrored_positions(positions, self.grid, jitter), jitter.flip)


def squares(patches: Tensor, side: int) -> Tensor:
    """Patches (B, n, C, h, w), every pixel shown as a square of so many by so many."""
    return patches.repeat_interleave(side, dim=-1).repeat_interleave(side, dim=-2) if side > 1 else patches


def _within(value: float, low: float, high: float, what: str) -> None:
    if not low <= value <= high:
        raise UserError(f"--views {what} {value:g} is not in [{low:g}, {high:g}]")


def _roomy(side: Tensor, positions: Tensor, place: Tensor, grid: PatchGrid) -> tuple[Tensor, Tensor]:
    """The side of each crop that shows enough, (B,), and the positions (B, n) of which it covers most."""
    from inversion.strategies import highest

    batch, count = positions.shape
    steps = torch.linspace(0, 1, LEVELS, device=side.device)[:, None]
    sides = torch.lerp(side, torch.ones_like(side), steps)
    kept = torch.zeros(batch, grid.count, device=side.device).scatter_(1, positions, 1.0)
    rows, cols = (_overlaps(sides, place[:, axis], size) for axis, size in enumerate((grid.rows, grid.cols)))
    covered = (rows @ kept.view(batch, grid.rows, grid.cols) @ cols.transpose(-2, -1)).flatten(2)
    covered = covered / sides.square()[..., None]
    enough = (covered > SEEN).sum(dim=2) >= count
    first = (enough.cumsum(dim=0) == 0).sum(dim=0, keepdim=True)
    best = covered.gather(0, first[..., None].expand(-1, -1, grid.count))[0]
    return sides.gather(0, first)[0], highest(best, count)


def _overlaps(side: Tensor, place: Tensor, count: int) -> Tensor:
    """How much of each patch a crop puts at each place, along one axis of `count` patches: (.., B, count, count).

    Args:
        side: (.., B), of the crop, a share of the image's.
        place: (B,), of the crop within the room that it leaves, in [0, 1).
        count: patches along the axis.
    """
    index = torch.arange(count, device=side.device)
    start = ((1 - side) * place * count)[..., None] + index * side[..., None]
    end = torch.minimum((start + side[..., None])[..., None], index + 1.0)
    return (end - torch.maximum(start[..., None], index.to(start))).clamp(min=0)


def _by_weights(
    patches: Tensor, positions: Tensor, rows: Tensor, cols: Tensor, chosen: Tensor, grid: PatchGrid, plain: bool
) -> Tensor:
    """Bilinear samples (B, n, C, h, w) at `chosen` positions, of lines `rows` (B, H) and `cols` (B, W), by products.

    Its gradient is a product as well, and so the same every time on a GPU.
    """
    from inversion.canvas import Placed, Taken

    image = grid.unpatchify(patches, positions) if plain else Placed.apply(patches, positions, grid)
    (batch, channels), (height, width) = image.shape[:2], grid.image_size
    down, right = (bilinear_weights(lines, size).to(image.dtype) for lines, size in ((rows, height), (cols, width)))
    stretched = down @ image.transpose(1, 2).reshape(batch, height, channels * width)
    read = (stretched.view(batch, height * channels, width) @ right.transpose(1, 2)).view(
        batch, height, channels, width
    )
    read = read.transpose(1, 2)
    if chosen.shape[1] == grid.count:  # in their order
        return grid.patchify(read)
    return grid.taken(read.contiguous(), chosen) if plain else Taken.apply(read.contiguous(), chosen, grid)


def _by_points(
    patches: Tensor, positions: Tensor, rows: Tensor, cols: Tensor, chosen: Tensor, grid: PatchGrid
) -> Tensor:
    """As `_by_weights`, at the chosen positions alone."""
    from inversion.canvas import Placed

    batch, count = chosen.shape
    (height, width), index = grid.image_size, torch.arange(batch, device=chosen.device)[:, None]
    y = rows.view(batch, grid.rows, -1)[index, chosen // grid.cols] * (2 / height) + (1 / height - 1)
    x = cols.view(batch, grid.cols, -1)[index, chosen % grid.cols] * (2 / width) + (1 / width - 1)
    shape = batch, count, grid.height, grid.width
    points = torch.stack([x[:, :, None].expand(shape), y[..., None].expand(shape)], dim=-1).flatten(1, 2)
    image = Placed.apply(patches.to(points.dtype), positions, grid)
    sampled = F.grid_sample(image, points, padding_mode="border", align_corners=False)
    return sampled.view(batch, -1, count, grid.height, grid.width).transpose(1, 2).to(patches.dtype)
