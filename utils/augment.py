"""Random changes of kept patches, of images that a student learns from or a model is calibrated on.

What is wanted of a changed image is what the full-precision model or the teacher says of it, so that no change makes a
label wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from models import PatchGrid, SparseImages
from models.patches import bilinear_weights, crop_lines
from utils.lazy import torch

if TYPE_CHECKING:
    from torch import Generator, Tensor

    Augmentation = Callable[[SparseImages, PatchGrid, Generator], SparseImages]

SMALLEST_CROP = 0.35
"""Share of an image that is enlarged, at least."""
TRACE = 1e-4
"""Weight of kept pixels below which there are none."""


def flip(images: SparseImages, grid: PatchGrid, generator: Generator) -> SparseImages:
    """Mirror half of the images: the pixels of every patch, and its column."""
    chosen = torch.randint(0, 2, (len(images), 1), generator=generator).bool()
    rows, cols = images.positions // grid.cols, images.positions % grid.cols
    positions = torch.where(chosen, rows * grid.cols + grid.cols - 1 - cols, images.positions)
    patches = torch.where(chosen[..., None, None, None], images.patches.flip(-1), images.patches)
    return SparseImages(patches, positions, images.labels)


def shift(images: SparseImages, grid: PatchGrid, generator: Generator) -> SparseImages:
    """Move the patches of each image by up to an eighth of the grid, at least one patch; the grid wraps around."""
    most_rows, most_cols = max(1, grid.rows // 8), max(1, grid.cols // 8)
    dy = torch.randint(-most_rows, most_rows + 1, (len(images), 1), generator=generator)
    dx = torch.randint(-most_cols, most_cols + 1, (len(images), 1), generator=generator)
    rows = (images.positions // grid.cols + dy) % grid.rows
    cols = (images.positions % grid.cols + dx) % grid.cols
    return SparseImages(images.patches, rows * grid.cols + cols, images.labels)


def mix(images: SparseImages, grid: PatchGrid, generator: Generator) -> SparseImages:
    """Blend each image with another that keeps the same number of patches, patch by patch, by a share from U(0, 1)."""
    other = torch.randperm(len(images), generator=generator)
    share = torch.rand(len(images), 1, 1, 1, 1, generator=generator)
    return SparseImages(images.patches.lerp(images.patches[other], share), images.positions, images.labels)


def grey(images: SparseImages, grid: PatchGrid, generator: Generator) -> SparseImages:
    """Replace the colours of half of the images by their mean; how opaque pixels are stays."""
    chosen = torch.randint(0, 2, (len(images), 1, 1, 1, 1), generator=generator).bool()
    colours, opacity = images.patches[:, :, :3], images.patches[:, :, 3:]
    mean = colours.mean(dim=2, keepdim=True).expand_as(colours)
    patches = torch.cat([torch.where(chosen, mean, colours), opacity], dim=2)
    return SparseImages(patches, images.positions, images.labels)


def contrast(images: SparseImages, grid: PatchGrid, generator: Generator) -> SparseImages:
    """Scale the normalized pixels of each image by a factor from U(0.5, 1.5) and move them by one from U(-0.5, 0.5)."""
    factor = 0.5 + torch.rand(len(images), 1, 1, 1, 1, generator=generator)
    offset = torch.rand(len(images), 1, 1, 1, 1, generator=generator) - 0.5
    return SparseImages(images.patches * factor + offset, images.positions, images.labels)


def scatter(images: SparseImages, grid: PatchGrid, generator: Generator) -> SparseImages:
    """Put the patches of half of the images at grid positions drawn at random, none twice."""
    chosen = torch.randint(0, 2, (len(images), 1), generator=generator).bool()
    anywhere = torch.rand(len(images), grid.count, generator=generator).argsort(dim=1)
    positions = torch.where(chosen, anywhere[:, : images.positions.shape[1]], images.positions)
    return SparseImages(images.patches, positions, images.labels)


def noise(images: SparseImages, grid: PatchGrid, generator: Generator) -> SparseImages:
    """Add normal noise to the normalized pixels of each image, its standard deviation from U(0, 1)."""
    deviation = torch.rand(len(images), 1, 1, 1, 1, generator=generator)
    pixels = torch.randn(images.patches.shape, generator=generator)
    return SparseImages(images.patches + deviation * pixels, images.positions, images.labels)


def drop(images: SparseImages, grid: PatchGrid, generator: Generator) -> SparseImages:
    """Leave out patches of each image drawn at random, as many of all: up to half of them."""
    count = images.positions.shape[1]
    fewer = count - int(torch.randint(0, count // 2 + 1, (), generator=generator))
    chosen = torch.rand(len(images), count, generator=generator).argsort(dim=1)[:, :fewer]
    rows = torch.arange(len(images))[:, None]
    return SparseImages(images.patches[rows, chosen], images.positions[rows, chosen], images.labels)


def collage(images: SparseImages, grid: PatchGrid, generator: Generator) -> SparseImages:
    """Put patches of another image on the grid of half of the images: as many in all as each had.

    The other's patches keep their places; where both images have one, the first image's stays.
    """
    count, other = images.positions.shape[1], torch.randperm(len(images), generator=generator)
    both = torch.cat([images.positions, images.positions[other]], dim=1)
    patches = torch.cat([images.patches, images.patches[other]], dim=1)
    taken = (both[:, count:, None] == images.positions[:, None]).any(dim=2)
    draw = torch.rand(both.shape, generator=generator)
    draw[:, count:][taken] = 2.0  # never chosen: there are at least `count` others
    mixed = draw.argsort(dim=1)[:, :count]
    mixed = torch.where(torch.rand(len(images), 1, generator=generator) < 0.5, mixed, torch.arange(count))
    rows = torch.arange(len(images))[:, None]
    return SparseImages(patches[rows, mixed], both[rows, mixed], images.labels)


def crop(images: SparseImages, grid: PatchGrid, generator: Generator) -> SparseImages:
    """Enlarge a part of each image to all of it: a share from U(0.35, 1) of its shape, anywhere in it; bilinear.

    Kept patches are seen where they land. Fed are the places that they cover at least half of, as many of every image
    as the one with the fewest has; an image that would be left with fewer than half of its patches stays as it was.
    """
    side = (SMALLEST_CROP + (1 - SMALLEST_CROP) * torch.rand(len(images), generator=generator)).sqrt()
    place = torch.rand(2, len(images), generator=generator)

    def cropped(side: Tensor) -> tuple[Tensor, Tensor]:
        axes = zip(place, grid.image_size, strict=True)
        return _resampled(images, grid, *(bilinear_weights(crop_lines(side, at, size), size) for at, size in axes))

    patches, cover = cropped(side)
    few = 2 * (cover >= 0.5).sum(dim=1) < images.positions.shape[1]
    if few.any():
        patches, cover = cropped(torch.where(few, 1.0, side))
    count = int((cover >= 0.5).sum(dim=1).min())
    positions = cover.argsort(dim=1, descending=True, stable=True)[:, :count]
    rows = torch.arange(len(images))[:, None]
    return SparseImages(patches[rows, positions], positions, images.labels)


def blur(images: SparseImages, grid: PatchGrid, generator: Generator) -> SparseImages:
    """Blur each image by a Gaussian of a standard deviation from U(0, 1/7) of a patch, over kept pixels alone."""
    deviation = torch.rand(len(images), generator=generator) / 7
    lines = (
        _blurring(deviation * patch, size)
        for patch, size in zip((grid.height, grid.width), grid.image_size, strict=True)
    )
    patches, _ = _resampled(images, grid, *lines)
    rows = torch.arange(len(images))[:, None]
    return SparseImages(patches[rows, images.positions], images.positions, images.labels)


def colour(images: SparseImages, grid: PatchGrid, generator: Generator) -> SparseImages:
    """Scale each normalized channel by a factor from U(0.6, 1.4), move it by one from U(-0.4, 0.4); not how opaque."""
    colours, opacity = images.patches[:, :, :3], images.patches[:, :, 3:]
    factor, offset = torch.rand(2, len(images), 1, colours.shape[2], 1, 1, generator=generator) * 0.8
    patches = torch.cat([colours * (0.6 + factor) + (offset - 0.4), opacity], dim=2)
    return SparseImages(patches, images.positions, images.labels)


def _blurring(deviation: Tensor, size: int) -> Tensor:
    """Weights (B, size, size) of Gaussians of these standard deviations (B,) in pixels, beyond the border none."""
    lines = torch.arange(size)
    away = (lines[:, None] - lines) / deviation.clamp(min=1e-3)[:, None, None]
    weights = torch.exp(-away.square() / 2)
    return weights / weights.sum(dim=2, keepdim=True)


def _resampled(images: SparseImages, grid: PatchGrid, down: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Full grids (B, N, C, height, width) of weighted means over kept pixels, and the share (B, N) that these cover.

    Where none is near, a pixel is the mean of its patch.

    `down` (B, H, H), `right` (B, W, W): the weights of lines and of columns.
    """
    pixels, kept = (
        down[:, None].to(each.dtype) @ grid.unpatchify(each, images.positions) @ right[:, None].mT.to(each.dtype)
        for each in (images.patches, torch.ones_like(images.patches))
    )
    pixels, kept = grid.patchify(pixels), grid.patchify(kept)
    mean = pixels.sum(dim=(3, 4), keepdim=True) / kept.sum(dim=(3, 4), keepdim=True).clamp(min=TRACE)
    return torch.where(kept > TRACE, pixels / kept.clamp(min=TRACE), mean), kept.mean(dim=(2, 3, 4))


AUGMENTATIONS: dict[str, Augmentation] = {
    "flip": flip,
    "shift": shift,
    "mix": mix,
    "grey": grey,
    "contrast": contrast,
    "scatter": scatter,
    "noise": noise,
    "drop": drop,
    "collage": collage,
    "crop": crop,
    "blur": blur,
    "colour": colour,
}


def augmented(images: SparseImages, grid: PatchGrid, names: Collection[str], generator: Generator) -> SparseImages:
    """The images after the named changes, one after another.

    Args:
        images: on the CPU.
        grid: the patch grid that positions count in.
        names: keys of `AUGMENTATIONS`.
        generator: where the random numbers come from.
    """
    for name in names:
        images = AUGMENTATIONS[name](images, grid, generator)
    return images


def drawn(images: SparseImages, count: int, generator: Generator) -> SparseImages:
    """`count` images drawn from all of them, none twice while there are enough."""
    if count <= len(images):
        index = torch.randperm(len(images), generator=generator)[:count]
    else:
        index = torch.randint(len(images), (count,), generator=generator)
    return images.at(index)
