#!/usr/bin/env python3
"""What missing patches alone cost: calibrate on real images of which only some patches, drawn at random, are left.

Inverted images that keep as many patches are to be held against these. OUTPUT gets missing_patches.json.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.realpath(f"{__file__}/../../.."))

from utils.errors import exit_on_interrupt, run_main

exit_on_interrupt(__name__)

from dataclasses import replace
from pathlib import Path

import torch

from models import SparseImages
from quant import quantize
from scripts.compare import ONE_MODEL, Bench
from scripts.comparison import refuse_flags
from utils.cli import Parser, positive
from utils.errors import UserError
from utils.files import write_json
from utils.flags import quant_parser, quant_task
from utils.report import table


def thinned(images: SparseImages, count: int, generator: torch.Generator) -> SparseImages:
    """The same images with `count` of their patches, another draw for each image."""
    kept = torch.rand(images.positions.shape, generator=generator).argsort(dim=1)[:, :count].sort(dim=1).values
    rows = torch.arange(len(images))[:, None]
    return SparseImages(images.patches[rows, kept], images.positions[rows, kept], images.labels)


def main(argv: list[str] | None = None) -> list[dict]:
    """Calibrate and evaluate once for every number of patches; print and write the table."""
    parser = Parser(__doc__ + " Every other flag goes to test_quant.py.")
    parser.add_argument("--patches", nargs="+", type=positive, required=True, metavar="N", help="patches that are left")
    parser.add_argument("--output", metavar="DIR", default="./runs/missing_patches", help="where the table goes")
    ours, others = parser.parse_known_args(argv)
    refuse_flags(others, dict.fromkeys(("--mode", "--images", *ONE_MODEL), "is not for this script; see --help"))
    task, output = quant_task(quant_parser("").parse_args([*others, "--mode", "2"])), Path(ours.output)
    task, bench = replace(task, run=replace(task.run, output=output)), Bench(task)
    if max(ours.patches) > bench.vit.grid.count:
        raise UserError(f"--patches {max(ours.patches)}: images of this model have {bench.vit.grid.count}")
    images, rows = bench.images(task)[0], []
    for count in ours.patches:
        sparse = thinned(images, count, torch.Generator().manual_seed(task.run.seed))
        result = bench.evaluated({"quant": quantize(bench.vit, sparse, task.quantization)})["quant"]
        rows.append({"patches": count, "calibration_images": len(images), **result})
    write_json(output / "missing_patches.json", rows)
    print(table(["patches", "top-1 %", "loss"], [[r["patches"], f"{r['top1']:.2f}", f"{r['loss']:.4f}"] for r in rows]))
    return rows


if __name__ == "__main__":
    run_main(main)
