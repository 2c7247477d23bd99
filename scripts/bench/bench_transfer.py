#!/usr/bin/env python3
"""Time steps of distillation against plain float32 code: a student whose head learns alone, and one that learns whole.

All run in this one process, in turns, on the same images; teacher and student are the same architecture.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.realpath(f"{__file__}/../../.."))

from utils.errors import exit_on_interrupt, run_main

exit_on_interrupt(__name__)

import copy
import statistics
import time
from dataclasses import replace

import torch

from kt import DistillConfig, Distiller
from models import DEFAULT_MODEL, LoadedModel, SparseImages, load_model
from utils.cli import Parser, positive
from utils.device import device_name, pick_device, pick_dtype, versions
from utils.files import writable_folder, write_json
from utils.flags import add_device_arguments
from utils.report import markdown


def parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, metavar="NAME", help="as for test_kt.py")
    add("--model_path", metavar="PATH", help="as for test_kt.py")
    add("--random_weights", action="store_true", help="do not load weights: time does not depend on them")
    add("--batch", type=positive, default=32, help="images a step")
    add("--patches", type=positive, nargs="+", metavar="N", help="kept patches; default all, and a quarter")
    add("--reuse", type=positive, default=8, help="as for test_kt.py, of the last row")
    add("--repeats", type=positive, default=5, help="timed runs of each, of --reuse steps, after one to warm up")
    add_device_arguments(parser)
    add("--output", default="./runs/bench", metavar="DIR", help="where the JSON goes")
    return parser


def contenders(model: LoadedModel, config: DistillConfig, device: torch.device) -> dict[str, Distiller]:
    """Who is timed, by name: plain float32 code, what the project does, and that with reuse."""

    def one(full: bool, eager: bool, **changed: object) -> Distiller:
        student = LoadedModel.of(copy.deepcopy(model.vit), model.name)
        student.vit.requires_grad_(full)
        student.vit.get_classifier().requires_grad_(True)
        return Distiller(model, student, replace(config, **changed), device, eager)

    plain = {"dtype": "float32", "reuse": 1}
    return {
        "head, plain": one(False, True, **plain),
        "head": one(False, False, reuse=1),
        "head, reuse": one(False, False),
        "whole, plain": one(True, True, **plain),
        "whole": one(True, False, reuse=1),
    }


def timed(distiller: Distiller, images: SparseImages, steps: int) -> float:
    """Seconds a step."""
    start = time.perf_counter()
    distiller.run(images, steps)  # waits for the device: it gives the loss
    return (time.perf_counter() - start) / steps


def main(argv: list[str] | None = None) -> dict:
    """Time everything, print a table, write JSON."""
    args = parser().parse_args(argv)
    device, output = pick_device(args.device, args.gpu), writable_folder(args.output, "--output")
    classes = 1000 if args.random_weights else None
    model = load_model(args.model, args.model_path, random_weights=args.random_weights, classes=classes)
    config = DistillConfig(batch_size=args.batch, reuse=args.reuse, lr=1e-3)
    everyone, grid, results = contenders(model, config, device), model.grid, []
    for kept in args.patches or (grid.count, max(1, grid.count // 4)):
        generator = torch.Generator().manual_seed(0)
        places = torch.rand(args.batch, grid.count, generator=generator).argsort(dim=1)[:, :kept].sort().values
        patches = torch.randn(args.batch, kept, grid.channels, grid.height, grid.width, generator=generator)
        images = SparseImages(patches, places, torch.zeros(args.batch, dtype=torch.long))
        seconds = {name: [] for name in everyone}
        for number in range(args.repeats + 1):
            for name, distiller in everyone.items():
                took = timed(distiller, images, args.reuse)
                if number:
                    seconds[name].append(took)
        for name, each in seconds.items():
            median = statistics.median(each)
            plain = statistics.median(seconds[name.split(",")[0] + ", plain"])
            row = {"name": name, "patches": kept, "seconds_per_step": median, "seconds_min": min(each)}
            results.append(row | {"seconds_max": max(each), "over_plain": plain / median})
    report = {
        "model": args.model,
        "batch": args.batch,
        "device": device_name(device),
        "dtype": pick_dtype("auto", device),
        "reuse": args.reuse,
        "repeats": args.repeats,
        "rows": results,
        "versions": versions(),
    }
    file = output / f"transfer-{args.model.rstrip('/').split('/')[-1]}-b{args.batch}-{device.type}.json"
    write_json(file, report)
    lines = [
        [row["name"], str(row["patches"]), f"{1 / row['seconds_per_step']:.3g}", f"{row['over_plain']:.2f}x"]
        for row in results
    ]
    print(markdown(["who learns", "patches", "steps/s", "over plain"], lines))
    print(f"{report['device']}; {file}")
    return report


if __name__ == "__main__":
    run_main(main)
