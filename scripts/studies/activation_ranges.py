#!/usr/bin/env python3
"""Which activation ranges do images give: the width of every quantizer's range against that from real images.

OUTPUT gets ranges.json and ranges.png, a panel for each kind of place, blocks from left to right; 1 is real images'.
With --exchange, exchange.json: which places' ranges have to come from real images for accuracy to be what theirs is.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.realpath(f"{__file__}/../../.."))

from utils.errors import exit_on_interrupt, run_main

exit_on_interrupt(__name__)

import copy
import math
import statistics
from collections.abc import Collection
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from models import SparseViT
from quant import OBSERVERS, fitting
from quant.insert import quantizers
from quant.quantizers import ActivationQuantizer
from quant.reparameterization import NormSite, norm_sites
from scripts.compare import Bench, cells_of, quant_grid_parser
from utils.errors import UserError
from utils.files import writable_folder, write_json
from utils.pictures import save_figure
from utils.report import table


def kind(name: str) -> str:
    """`blocks.3.mlp.fc1.quantizer` -> `fc1`: where a quantizer sits, whatever the block."""
    return name.removesuffix(".quantizer").rpartition(".")[2].removeprefix("tap_")


def widths(quantized: SparseViT) -> dict[str, float]:
    """Width of the range of every uniform quantizer, by name."""
    return {
        name: quantizer.scale.item() * (quantizer.high - quantizer.low)
        for name, quantizer in quantizers(quantized).items()
        if isinstance(quantizer, ActivationQuantizer)
    }


def exchanged(
    quantized: SparseViT, source: SparseViT, kinds: Collection[str], sites: Collection[NormSite]
) -> SparseViT:
    """A copy of `quantized` with the ranges of these kinds of places from `source`, the same model on other images.

    A range that was moved into the norm of one of `sites` comes with the norm and all layers that read it.
    """
    names = {name.removesuffix(".quantizer") for name in quantizers(quantized) if kind(name) in kinds}
    for site in sites:
        if not names.isdisjoint(site.readers):
            names |= {site.norm, *site.readers}
    vit = copy.deepcopy(quantized)
    for name in names:
        vit.set_submodule(name, copy.deepcopy(source.get_submodule(name)))
    return vit


def exchange(
    bench: Bench, models: dict[str, list[SparseViT]], sites: Collection[NormSite]
) -> list[dict[str, str | float]]:
    """Mean top-1 of every method with each kind's ranges from the real images of the same seed."""
    kinds = list(dict.fromkeys(map(kind, quantizers(models["real"][0]))))
    rows = []
    for label, chosen in {"none": [], **{name: [name] for name in kinds}, "all": kinds}.items():
        made = {
            (method, seed): exchanged(model, models["real"][seed], chosen, sites)
            for method, seeds in models.items()
            for seed, model in enumerate(seeds)
            if method != "real"
        }
        top1 = {key: result["top1"] for key, result in bench.evaluated(made).items()}
        rows.append({"from_real": label})
        for method, _ in made:
            rows[-1][method] = statistics.mean(value for (name, _), value in top1.items() if name == method)
    return rows


def main(argv: list[str] | None = None) -> list[dict]:
    """Calibrate once per method and seed; print and write each range's width over the mean width of real images."""
    parser = quant_grid_parser(__doc__, "./runs/ranges")
    parser.add_argument(
        "--exchange",
        action="store_true",
        help="evaluate the models of the other images with one kind of places' ranges from real images at a time",
    )
    args, others = parser.parse_known_args(argv)
    if "real" not in args.baselines:
        raise UserError("ranges are held against those of real images; let --baselines have real among them")
    if any(a_bit == 32 for _, a_bit in args.bits):
        raise UserError("32-bit activations have no ranges; give --bits fewer")
    cells = [cell for cell in cells_of(args, others) if cell.task.model.name == args.models[0]]
    how = cells[0].task.quantization
    if args.exchange and (how.reconstruct or how.bias_correction):
        raise UserError("--exchange is for ranges alone; leave --reconstruct and --bias_correction out")
    output, bench = writable_folder(args.output, "--output"), Bench(cells[0].task)
    rows, swaps = [], []
    for width in dict.fromkeys(cell.width for cell in cells):
        of_width = [cell for cell in cells if cell.width == width]
        models = bench.quantized(of_width)
        found = {method: [widths(model) for model in made] for method, made in models.items()}
        for place in found["real"][0]:
            mean = {method: statistics.mean(seed[place] for seed in seeds) for method, seeds in found.items()}
            ratios = {method: mean[method] / mean["real"] for method in mean}
            rows.append({"width": width, "place": place, "real_range": mean["real"], **ratios})
        if args.exchange:
            method = OBSERVERS[fitting(bench.vit, of_width[0].task.quantization).method]
            sites = norm_sites(bench.vit) if method.reparameterize else []
            swaps += [{"width": width, **row} for row in exchange(bench, models, sites)]
    methods = list(models)
    write_json(output / "ranges.json", rows)
    save_ranges(output / "ranges.png", [row for row in rows if row["width"] == rows[-1]["width"]], methods)
    print_medians(rows, methods)
    if swaps:
        write_json(output / "exchange.json", swaps)
        changed = [method for method in methods if method != "real"]
        lines = [[row["width"], row["from_real"], *(f"{row[m]:.2f}" for m in changed)] for row in swaps]
        print(table(["width", "ranges from real", *(f"{m}, top-1 %" for m in changed)], lines))
    print(f"ranges and picture: {output}")
    return rows


def print_medians(rows: list[dict], methods: list[str]) -> None:
    """Median ratio over blocks, for each kind of place."""
    lines = []
    for width in dict.fromkeys(row["width"] for row in rows):
        for place in dict.fromkeys(kind(row["place"]) for row in rows):
            mine = [row for row in rows if row["width"] == width and kind(row["place"]) == place]
            lines.append([width, place, *(f"{statistics.median(row[m] for row in mine):.2f}" for m in methods)])
    print(table(["width", "range of", *methods], lines))


def save_ranges(path: Path, rows: list[dict], methods: list[str]) -> None:
    """A panel for each kind of place, a line for each method."""
    kinds = list(dict.fromkeys(kind(row["place"]) for row in rows))
    columns = min(4, len(kinds))
    lines = math.ceil(len(kinds) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * lines), layout="constrained")
    first = None
    for number, place in enumerate(kinds, start=1):
        axes = figure.add_subplot(lines, columns, number, sharey=first)
        mine = [row for row in rows if kind(row["place"]) == place]
        for method in methods:
            axes.plot([row[method] for row in mine], marker=".", linewidth=1, label=method)
        axes.set_title(place, fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True) if len(mine) > 1 else NullLocator())
        axes.tick_params(labelsize=7, which="both")
        if first is None:
            first = axes
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(base=2**0.25, numticks=8))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.2g}"))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.legend(fontsize=7)
    figure.supylabel("width / width from real images", fontsize=8)
    figure.supxlabel("block", fontsize=8)
    save_figure(path, figure)


if __name__ == "__main__":
    run_main(main)
