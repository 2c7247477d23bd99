"""Random changes of kept patches. Teacher and student see the same changed image, so no change makes a label wrong."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from models import PatchGrid, SparseImages
from utils.lazy import torch

if TYPE_CHECKING:
    from torch import Generator

    Augmentation = Callable[[SparseImages, PatchGrid, Generator], SparseImages]


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
