#!/usr/bin/env python3
"""Compare calibration images: quantize models with the images of every method, at each width and seed.

Methods are baselines (real images, noise) and pairs of a prior and a strategy. Finished cells are kept in
OUTPUT/rows.jsonl and not computed again. OUTPUT gets results.csv, summary.json, accuracy.png, images.png, report.html.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.realpath(f"{__file__}/../.."))

from utils.errors import exit_on_interrupt, run_main

exit_on_interrupt(__name__)

import argparse
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from models.config import short_name
from quant import check_bits
from scripts.comparison import (
    REFUSED,
    VARIES,
    Method,
    Rows,
    costs,
    grid_parser,
    means,
    print_table,
    shown_images,
    variants,
    write_results,
)
from utils.cli import Parser
from utils.device import device_name, pick_device, versions
from utils.files import writable_folder
from utils.flags import quant_parser, quant_task

if TYPE_CHECKING:
    from torch import Tensor

    from inversion import SynthesisReport
    from models import SparseImages, SparseViT
    from utils.quant_task import QuantTask

ONE_MODEL = dict.fromkeys(("--export", "--save", "--sensitivity"), "is for one model; give it to test_quant.py")
COLUMNS = dict.fromkeys(("task", "model", "method", "strategy", "width"), str) | {"prior": str | None}
COLUMNS |= dict.fromkeys(("seed", "top1", "top5", "loss", "images", "val_images"), float)
COLUMNS |= dict.fromkeys(("synthesis_seconds", "images_per_second", "gflop_per_image", "peak_memory_mb"), float | None)
"""What a finished cell's row has."""
QUANT_REFUSED = {**REFUSED, "--w_bit": VARIES, "--a_bit": VARIES, **ONE_MODEL}


def bits(text: str) -> tuple[int, int]:
    """argparse type: `4/8` -> weights 4 bits, activations 8 bits."""
    try:
        w_bit, a_bit = (int(part) for part in text.upper().replace("W", "").replace("A", "").split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form 4/8") from None
    return w_bit, a_bit


@dataclass(frozen=True)
class Cell:
    """One configuration of the comparison: a kind of images with its task, at one width."""

    method: Method
    task: QuantTask

    @property
    def width(self) -> str:
        """Such as W4/A8."""
        return f"W{self.task.quantization.w_bit}/A{self.task.quantization.a_bit}"


def quant_grid_parser(about: str = __doc__, output: str = "./runs/compare") -> Parser:
    """A parser of the flags that name methods, seeds, models and widths."""
    parser = grid_parser(about, "test_quant.py", 0, output)
    widths = [(8, 8), (4, 8), (4, 4)]
    parser.add_argument("--bits", nargs="+", type=bits, default=widths, metavar="W/A", help="widths in bits")
    return parser


def cells_of(args: argparse.Namespace, others: Sequence[str]) -> list[Cell]:
    """The comparison that the flags of a `quant_grid_parser` and those for test_quant.py ask for."""
    for w_bit, a_bit in args.bits:
        check_bits(w_bit, a_bit)
    cells = []
    for method, chosen in variants(args, others, quant_parser(""), QUANT_REFUSED):
        for chosen.w_bit, chosen.a_bit in args.bits:
            task = quant_task(chosen)
            name = f"{short_name(task.model.name)}-{method.name}-s{task.run.seed}"
            cells.append(Cell(method, replace(task, run=replace(task.run, output=Path(args.output, name)))))
    return cells


class Bench:
    """A model with its data, ready to be quantized as cells say."""

    def __init__(self, task: QuantTask) -> None:
        from models import load_model
        from utils import evaluation_loader
        from utils.evaluation import require_memory_for

        self.device = pick_device(task.run.device, task.run.gpu)
        self.model = load_model(task.model)
        self.data = evaluation_loader(self.model, task.data)
        self.vit = self.model.sparse(self.device)
        require_memory_for(self.vit, self.data, self.device)
        self.facts = {"fingerprint": self.model.fingerprint(), "val_images": len(self.data.dataset)}
        self.settings = {"model": task.model.name, "dataset": task.data.dataset, **task.data.reading()}

    def images(self, task: QuantTask) -> tuple[SparseImages, SynthesisReport]:
        """What the task is calibrated with, and what it cost."""
        from inversion import SynthesisReport
        from utils.images import Inverted, Synthesis, images_at_hand

        if isinstance(task.images, Inverted):
            log = task.folder / "synthesis.jsonl"
            how = {"progress": task.run.progress, "eager": task.run.eager}
            synthesis = Synthesis(self.model, task.images, self.device, log, **how)
            return synthesis.first(task.num_images), synthesis.cost(task.num_images)
        start = time.perf_counter()
        images = images_at_hand(self.model, task.images, task.num_images, task.run.seed)
        return images, SynthesisReport(images=len(images), seconds=round(time.perf_counter() - start, 3))

    def evaluated(self, models: Mapping[str, SparseViT], progress: bool = False) -> dict[str, dict[str, float]]:
        """`evaluate` on the bench's data."""
        from utils import evaluate

        return evaluate(models, self.data, self.device, progress=progress)

    def quantized(self, cells: Sequence[Cell]) -> dict[str, list[SparseViT]]:
        """The quantized models of cells of one width, by method, in the order of the seeds."""
        from quant import quantize

        models: dict[str, list[SparseViT]] = {}
        for cell in cells:
            images, _ = self.images(cell.task)
            models.setdefault(cell.method.name, []).append(quantize(self.vit, images, cell.task.quantization))
        return models

    def full_precision(self, rows: Rows) -> float:
        """Top-1 of the model as it is."""
        cell = {**self.settings, "width": "full precision", **self.facts}
        row = rows.find(cell, {"top1": float}) or rows.add(cell, self.evaluated({"fp": self.vit})["fp"])
        return row["top1"]

    def run(self, cells: Sequence[Cell], rows: Rows) -> list[dict]:
        """The rows of cells that differ in their width alone, evaluated in one pass over the data."""
        from quant import fitting
        from quant.storage import quantized_once, remove_quantized
        from utils.pictures import save_images

        method, task = cells[0].method, cells[0].task
        configs = {cell.width: fitting(self.vit, cell.task.quantization) for cell in cells}
        keys = {cell.width: {**cell.task.settings(), **self.facts} for cell in cells}
        folders = {width: task.folder / f"quantized-{width.replace('/', '')}" for width in keys}
        missing = [width for width, key in keys.items() if rows.find(key, COLUMNS) is None]
        if missing:
            print(f"== {self.model.name}, {method.name}, seed {task.run.seed}", flush=True)
            images, cost = self.images(task)
            save_images(task.folder / "images.png", images, self.model)
            models = {
                width: quantized_once(
                    folders[width], self.vit, images, self.model, configs[width], [], task.run.progress
                )[0]
                for width in missing
            }
            for width, result in self.evaluated(models, task.run.progress).items():
                row = {"task": "quant", "model": self.model.name, "method": method.name, "prior": method.prior}
                row |= {"strategy": method.strategy, "seed": task.run.seed, "width": width}
                row |= {**result, "val_images": len(self.data.dataset), **costs(cost, len(images))}
                rows.add(keys[width], row)
        for folder in folders.values():  # a row is all that is asked of them
            remove_quantized(folder)
        return [rows.find(key, COLUMNS) for key in keys.values()]


def main(argv: list[str] | None = None) -> list[dict]:
    """Run the grid, cell by cell; print and write the means over seeds."""
    args, others = quant_grid_parser().parse_known_args(argv)
    cells = cells_of(args, others)
    output = writable_folder(args.output, "--output")
    rows, found = Rows(output), []
    pictures: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for name, of_model in itertools.groupby(cells, key=lambda cell: cell.task.model.name):
        of_model = list(of_model)
        bench = Bench(of_model[0].task)
        for (seed, method), widths in itertools.groupby(of_model, key=lambda cell: (cell.task.run.seed, cell.method)):
            widths = list(widths)
            found += bench.run(widths, rows)
            if seed == args.seeds[0] and method.prior is not None:
                images, _ = bench.images(widths[0].task)
                pictures.setdefault(name, {})[method.name] = shown_images(bench.model, images)
        print(f"{name}: full precision {bench.full_precision(rows):.2f} on {len(bench.data.dataset)} images")
    summary = means(found, ("model", "method", "width"))
    dtypes = {cell.task.images.config.dtype for cell in cells if cell.method.prior is not None}
    facts = {"device": device_name(bench.device), "dtype": "".join(dtypes) or "float32"}
    facts |= {"versions": versions(), "command": args.command}
    write_results(output, "Calibration images compared", found, summary, "width", pictures, facts)
    print_table(summary, "width")
    print(f"rows, summary and pictures: {output}")
    return summary


if __name__ == "__main__":
    run_main(main)
