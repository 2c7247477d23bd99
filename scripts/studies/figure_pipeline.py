#!/usr/bin/env python3
"""Draw how images come to be: noise, early, each stage, final, with the class token's attention below.

    python test_quant.py --iterations 300 --prune_it 30 60 120 200 --prune_ratio 0.3 0.3 0.3 0.3 --tv2 0.02 \\
        --snapshots 0 15 30 60 120 200 300 --datapool runs/pipeline --output runs/pipeline/report
    python scripts/studies/figure_pipeline.py runs/pipeline/deit_nano_4_digits-smi-*
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.realpath(f"{__file__}/../../.."))

from utils.errors import exit_on_interrupt, run_main

exit_on_interrupt(__name__)

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from inversion import ImagePool, Snapshot
from models import DEFAULT_MODEL, LoadedModel, PatchGrid, load_model
from utils.cli import Parser, natural
from utils.errors import UserError
from utils.files import writable_folder
from utils.pictures import in_colours, save_figure


def parser() -> Parser:
    """The command line."""
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("pool", metavar="POOL", help="a pool's folder, the one with pool.json, made with --snapshots")
    add("--model", default=DEFAULT_MODEL, metavar="NAME", help="the model that the pool was made of")
    add("--model_path", metavar="PATH", help="its weights, as for test_quant.py")
    add("--batch", type=natural, default=0, help="number of the batch")
    add("--images", type=natural, nargs="+", default=[0, 1, 2], help="numbers of the images in it, a row each")
    add("--output", metavar="FILE", default="./runs/pipeline.png", help="the PNG")
    return parser


def main(argv: list[str] | None = None) -> Path:
    """Draw the figure; returns its path."""
    args = parser().parse_args(argv)
    model = load_model(args.model, args.model_path)
    pool = ImagePool.existing(Path(args.pool), model)
    snapshots = sorted(pool.snapshots(args.batch), key=lambda snapshot: snapshot.iteration)
    missing = [image for image in args.images if image >= len(snapshots[0].pixels)]
    if missing:
        raise UserError(f"--images {missing[0]}: the batch has images 0 to {len(snapshots[0].pixels) - 1}")
    path = Path(args.output)
    writable_folder(path.parent, "--output")
    save_figure(path, pipeline(snapshots, args.images, model, pool.grid))
    print(f"{len(snapshots)} snapshots of {len(args.images)} images: {path}")
    return path


def pipeline(snapshots: list[Snapshot], images: list[int], model: LoadedModel, grid: PatchGrid) -> Figure:
    """For each image a row of what it looked like and, where there is attention, a row of that."""
    rows = 2 if snapshots[0].attention is not None else 1
    figure = Figure(figsize=(1.3 * len(snapshots), 1.3 * rows * len(images) + 0.4), layout="constrained")
    axes = figure.subplots(rows * len(images), len(snapshots), squeeze=False)
    for column, snapshot in enumerate(snapshots):
        axes[0, column].set_title(f"{snapshot.iteration}\n{snapshot.positions.shape[1]} patches", fontsize="small")
        for number, image in enumerate(images):
            one = slice(image, image + 1)
            pixels = model.preprocessing.denormalize(snapshot.pixels[one]).clamp(0, 1)
            shown = in_colours(grid.unpatchify(pixels, snapshot.positions[one]))[0]
            axes[rows * number, column].imshow(shown.permute(1, 2, 0).numpy(), interpolation="nearest")
            if rows == 2:
                heat = heatmap(snapshot.attention[image], snapshot.positions[image], grid)
                axes[rows * number + 1, column].imshow(heat.numpy(), cmap="magma", vmin=0, interpolation="nearest")
    for panel in axes.flat:
        panel.set(xticks=[], yticks=[])
        panel.set_facecolor("0.85")
    for number in range(len(images)):
        axes[rows * number, 0].set_ylabel("image", fontsize="small")
        if rows == 2:
            axes[rows * number + 1, 0].set_ylabel("attention", fontsize="small")
    return figure


def heatmap(attention: Tensor, positions: Tensor, grid: PatchGrid) -> Tensor:
    """Attention (n,) at `positions` (n,) -> (rows, cols), nothing (NaN) where patches have stopped."""
    values = torch.full((grid.count,), float("nan"))
    values[positions] = attention
    return values.view(grid.rows, grid.cols)


if __name__ == "__main__":
    run_main(main)
