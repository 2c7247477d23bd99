#!/usr/bin/env python3
"""Compare what students learn from the images of every method: runs of test_kt.py, in one table.

Methods are baselines (real images, noise) and every prior with every strategy. Each cell is a run in
OUTPUT/MODEL-METHOD-STUDENT-sSEED and goes on where it was stopped. OUTPUT gets results.csv, summary.json,
accuracy.png and images.png.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import test_kt
from inversion import ImagePool
from models import DEFAULT_MODEL, load_model
from scripts.comparison import (
    Method,
    add_grid_arguments,
    costs,
    further_flags,
    means,
    methods,
    print_table,
    refuse_flags,
    save_images,
    short_name,
    write_results,
)
from utils.cli import Parser
from utils.errors import run_main
from utils.files import writable_folder, write_json

STUDENTS = {
    "linear": ["--student_init", "pretrained", "--finetune", "linear"],
    "full": ["--student_init", "pretrained", "--finetune", "full"],
    "scratch": ["--student_init", "scratch", "--finetune", "full"],
}
VARIED = {"--model", "--mode", "--seed", "--finetune", "--student_init", "--prior", "--strategy", "--output"}


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Our flags, and those that go to test_kt.py as they are."""
    parser = Parser(__doc__ + " Every other flag goes to test_kt.py.")
    add_grid_arguments(parser, seed=42)
    add = parser.add_argument
    add("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS), help="what learns, and from which weights")
    add("--linear", metavar="FLAGS", default="", help='further flags where the head alone learns, such as "--lr 0.1"')
    add("--scratch", metavar="FLAGS", default="", help="further flags of students from scratch")
    add("--output", metavar="DIR", default="./runs/compare_kt", help="where everything goes")
    args, others = parser.parse_known_args(argv)
    further = [further_flags(f"--{name}", getattr(args, name)) for name in ("linear", "scratch")]
    for flags in (others, *further, *(further_flags("--with", flags) for _, flags in args.extra)):
        refuse_flags(flags, VARIED, "is what this script varies; see --help")
        test_kt.parser().parse_args([*others, *flags])  # all flags are read before anything is computed
    return args, others


def run_cell(model: str, method: Method, student: str, seed: int, further: list[str], output: Path) -> dict:
    """One run of test_kt.py, as a row."""
    folder = output / f"{short_name(model)}-{method.name}-{student}-s{seed}"
    print(f"== {model}, {method.name}, {student}, seed {seed}", flush=True)
    flags = [*further, "--model", model, "--seed", str(seed), *method.flags, *STUDENTS[student]]
    report = test_kt.main([*flags, "--output", str(folder)])
    return {
        "task": "kt",
        "model": model,
        "method": method.name,
        "data": method.name,
        "prior": method.prior,
        "strategy": method.strategy,
        "seed": seed,
        "student": student,
        "finetune": report["finetune"],
        "student_init": report["student_init"],
        "top1": report["student"]["best_top1"],
        "last_top1": report["student"]["top1"],
        "teacher_top1": report["teacher"]["top1"],
        **costs(report["synthesis"], report["pool"]["images"]),
        "distill_seconds": report["distill"]["seconds"],
        "steps": report["distill"]["steps"],
        "pool": report["pool"]["path"],
    }


def with_known_costs(rows: list[dict]) -> list[dict]:
    """A pool is made by the first run that needs it; the others take it as it is, at no time of their own."""
    made = {row["pool"]: row for row in rows if row["pool"] and row["synthesis_seconds"] is not None}
    keys = ("synthesis_seconds", "images_per_second", "peak_memory_mb")
    return [{**row, **{key: made[row["pool"]][key] for key in keys}} if row["pool"] in made else row for row in rows]


def shown(rows: list[dict], model: str, further: list[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Images in [0, 1] and labels of every pool of a model, by method, for the first seed."""
    teacher = load_model(model, test_kt.parser().parse_args(further).model_path)
    found = {}
    for row in rows:
        if row["model"] == model and row["pool"] and row["method"] not in found:
            pool = ImagePool.existing(Path(row["pool"]), teacher)
            images = pool.read(min(row["images"], 100))
            pixels = teacher.preprocessing.denormalize(images.patches)
            found[row["method"]] = pool.grid.unpatchify(pixels, images.positions), images.labels
    return found


def main(argv: list[str] | None = None) -> list[dict]:
    """Run every cell, print and write the table."""
    args, others = parse_arguments(argv)
    chosen, output = methods(args), writable_folder(args.output, "--output")
    further = {
        "linear": further_flags("--linear", args.linear),
        "full": [],
        "scratch": further_flags("--scratch", args.scratch),
    }
    models = args.models or [DEFAULT_MODEL]
    rows = [
        run_cell(model, method, student, seed, [*others, *further[student]], output)
        for model in models
        for student in args.students
        for seed in args.seeds
        for method in chosen
    ]
    rows = with_known_costs(rows)
    summary = means(rows, ("model", "method", "student"))
    write_results(output, rows, summary, "student")
    teachers = [
        {"data": "teacher", "model": model, "top1": next(row["teacher_top1"] for row in rows if row["model"] == model)}
        for model in models
    ]
    write_json(output / "summary.json", [*summary, *teachers])
    for number, model in enumerate(models):
        pictures = shown(rows, model, others)
        if pictures:
            save_images(output / ("images.png" if number == 0 else f"images-{short_name(model)}.png"), pictures)
    print_table(summary, "student")
    for teacher in teachers:
        print(f"teacher {teacher['model']}: {teacher['top1']:.2f}")
    print(f"rows, summary and pictures: {output}")
    return summary


if __name__ == "__main__":
    run_main(main)
