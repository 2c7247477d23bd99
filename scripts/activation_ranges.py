#!/usr/bin/env python3
"""Which activation ranges do images give: the width of every quantizer's range against that from real images.

OUTPUT gets ranges.json and ranges.png, a panel for each kind of place, blocks from left to right; 1 is real images'.
"""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter

import test_quant
from models import DEFAULT_MODEL, SparseViT
from quant import quantize
from quant.insert import quantizers
from quant.quantizers import ActivationQuantizer
from scripts import compare
from utils.errors import UserError, run_main
from utils.files import writable_folder, write_json
from utils.pictures import save_figure
from utils.report import table


def kind(name: str) -> str:
    """`blocks.3.mlp.fc1.quantizer` -> `fc1`: where a quantizer sits, whatever the block."""
    return name.removesuffix(".quantizer").rpartition(".")[2].removeprefix("tap_")


def widths(quantized: SparseViT) -> dict[str, float]:
    """Width of the range of every uniform quantizer, by name."""
    return {
        name: quantizer.scale.item() * quantizer.high
        for name, quantizer in quantizers(quantized).items()
        if isinstance(quantizer, ActivationQuantizer)
    }


def main(argv: list[str] | None = None) -> list[dict]:
    """Calibrate once per method and seed; print and write each range's width over the mean width of real images."""
    args, others = compare.parse_arguments(argv, __doc__, "./runs/ranges")
    if "real" not in args.baselines:
        raise UserError("ranges are held against those of real images; let --baselines have real among them")
    output, name = writable_folder(args.output, "--output"), (args.models or [DEFAULT_MODEL])[0]
    bench = compare.Bench(name, test_quant.parser().parse_args([*others, "--model", name]))
    sources, run = bench.sources(args, others, output)
    rows = []
    for w_bit, a_bit in args.bits:
        config = test_quant.quant_config(run, w_bit, a_bit)
        found = {
            method: [widths(quantize(bench.vit, images, config)) for images in sets] for method, sets in sources.items()
        }
        for place in found["real"][0]:
            mean = {method: statistics.mean(seed[place] for seed in seeds) for method, seeds in found.items()}
            ratios = {method: mean[method] / mean["real"] for method in mean}
            rows.append({"width": f"W{w_bit}/A{a_bit}", "place": place, "real_range": mean["real"], **ratios})
    write_json(output / "ranges.json", rows)
    save_ranges(output / "ranges.png", [row for row in rows if row["width"] == rows[-1]["width"]], list(sources))
    print_medians(rows, list(sources))
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
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
            axes.legend(fontsize=7)
    figure.supylabel("width / width from real images", fontsize=8)
    figure.supxlabel("block", fontsize=8)
    save_figure(path, figure)


if __name__ == "__main__":
    run_main(main)
