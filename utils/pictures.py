"""Pictures: image grids and curves, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from models import LoadedModel, SparseImages
from utils.files import atomic

TILE = 96
"""Least side of an image in a grid, in pixels; smaller images are enlarged by a whole factor."""


@dataclass(frozen=True)
class LossCurve:
    """The inversion loss (batches, iterations), with the first iteration of each stage and the patches left in it."""

    losses: Tensor
    starts: Sequence[int]
    patches: Sequence[int]


def save_image_grid(path: Path, images: Tensor, columns: int = 8) -> None:
    """Images (B, C, H, W) in [0, 1] -> one PNG, `columns` images a row, white between them."""
    factor = max(1, -(-TILE // min(images.shape[-2:])))
    enlarged = in_colours(images.clamp(0, 1)).repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)
    grid = make_grid(enlarged, nrow=columns, padding=4, pad_value=1.0)
    with atomic(path) as partial:
        to_pil_image(grid.mul(255).round().byte()).save(partial, format="PNG")


def in_colours(images: Tensor) -> Tensor:
    """Images (B, C, H, W) in [0, 1] as they look in RGB, (B, 3, H, W): grey in all three, RGBA laid on white."""
    if images.shape[1] == 4:
        colours, opacity = images[:, :3], images[:, 3:]
        return colours * opacity + (1 - opacity)
    return images.expand(-1, 3, -1, -1)


def save_images(path: Path, images: SparseImages, model: LoadedModel) -> None:
    """Up to 64 images; stopped patches black where pictures do not show them."""
    shown = images.batches(64)[0].shown()
    pixels = model.preprocessing.denormalize(shown.patches).clamp(0, 1)
    save_image_grid(path, model.grid.unpatchify(pixels, shown.positions))


def save_loss_curve(path: Path, curve: LossCurve) -> None:
    """The inversion loss as mean and range over batches, the stages marked by their patches."""
    losses = curve.losses
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    iterations = torch.arange(1, losses.shape[1] + 1)
    axes.plot(iterations, losses.mean(dim=0), linewidth=1, color="tab:blue")
    if len(losses) > 1:
        axes.fill_between(iterations, losses.amin(dim=0), losses.amax(dim=0), alpha=0.25, linewidth=0)
    for start, count in zip(curve.starts, curve.patches, strict=True):
        axes.axvline(start + 1, color="0.7", linewidth=0.8, zorder=0)
        axes.annotate(
            f"{count}", (start + 1, 1), xycoords=("data", "axes fraction"), xytext=(2, -10), textcoords="offset points"
        )
    axes.set(xlabel="iteration", ylabel="inversion loss", yscale="log", xlim=(1, losses.shape[1]))
    axes.set_title("patches left at the grey lines", fontsize="medium", color="0.4")
    save_figure(path, figure)


def save_figure(path: Path, figure: Figure) -> None:
    """A matplotlib figure as PNG, without a display."""
    with atomic(path) as partial:
        FigureCanvasAgg(figure).print_png(partial)
