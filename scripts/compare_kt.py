#!/usr/bin/env python3
"""Compare what students learn from the images of every method: runs of test_kt.py, in one table.

Methods are baselines (real images, noise) and pairs of a prior and a strategy. Each cell is a run in
OUTPUT/MODEL-METHOD-STUDENT-sSEED and goes on where it was stopped. OUTPUT gets results.csv, summary.json,
accuracy.png, images.png and report.html.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.realpath(f"{__file__}/../.."))

from utils.errors import exit_on_interrupt, run_main

exit_on_interrupt(__name__)

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from models.config import short_name
from scripts.comparison import (
    REFUSED,
    VARIES,
    Method,
    costs,
    further_flags,
    grid_parser,
    means,
    print_table,
    refuse_flags,
    shown_images,
    variants,
    write_results,
)
from utils.cli import Parser
from utils.device import device_name, pick_device, versions
from utils.files import writable_folder, write_json
from utils.flags import transfer_parser, transfer_task

if TYPE_CHECKING:
    from torch import Tensor

    from models import ModelConfig
    from utils.transfer_task import TransferTask

STUDENTS = {
    "linear": ["--student_init", "pretrained", "--finetune", "linear"],
    "full": ["--student_init", "pretrained", "--finetune", "full"],
    "scratch": ["--student_init", "scratch", "--finetune", "full"],
}
TRANSFER_REFUSED = {**REFUSED, "--finetune": VARIES, "--student_init": VARIES}


@dataclass(frozen=True)
class Cell:
    """One configuration of the comparison: a kind of images and a kind of student, with their task."""

    method: Method
    student: str
    task: TransferTask


def transfer_grid_parser() -> Parser:
    """A parser of the flags that name methods, seeds, models and students."""
    parser = grid_parser(__doc__, "test_kt.py", 42, "./runs/compare_kt")
    add = parser.add_argument
    add("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS), help="what learns, and from which weights")
    add("--linear", metavar="FLAGS", default="", help='further flags where the head alone learns, such as "--lr 0.1"')
    add("--scratch", metavar="FLAGS", default="", help="further flags of students from scratch")
    return parser


def cells_of(args: argparse.Namespace, others: Sequence[str]) -> list[Cell]:
    """The comparison that the flags of a `transfer_grid_parser` and those for test_kt.py ask for."""
    cells, parser = [], transfer_parser("")
    further = {name: further_flags(f"--{name}", getattr(args, name, "")) for name in STUDENTS}
    for flags in further.values():
        refuse_flags(flags, TRANSFER_REFUSED)
        parser.parse_args(flags)  # those of students that are not compared are read as well
    for student in args.students:
        flags = [*others, *further[student]]
        for method, chosen in variants(args, flags, parser, TRANSFER_REFUSED):
            task = transfer_task(parser.parse_args(STUDENTS[student], chosen))
            name = f"{short_name(task.model.name)}-{method.name}-{student}-s{task.run.seed}"
            run = replace(task.run, output=Path(args.output, name))
            cells.append(Cell(method, student, replace(task, run=run)))
    return sorted(cells, key=lambda cell: args.models.index(cell.task.model.name))


def row_of(cell: Cell) -> dict:
    """The outcome of a cell's run."""
    from inversion import SynthesisReport
    from utils.transfer_task import transfer_report

    print(f"== {cell.task.model.name}, {cell.method.name}, {cell.student}, seed {cell.task.run.seed}", flush=True)
    report = transfer_report(cell.task, tell=print)
    print(f"top-1 {report['student']['top1']:.2f}, teacher {report['teacher']['top1']:.2f}", flush=True)
    return {
        "task": "kt",
        "model": cell.task.model.name,
        "method": cell.method.name,
        "data": cell.method.name,
        "prior": cell.method.prior,
        "strategy": cell.method.strategy,
        "seed": report["seed"],
        "student": cell.student,
        "finetune": report["finetune"],
        "student_init": report["student_init"],
        "top1": report["student"]["top1"],
        "kept": report["student"]["kept"],
        "teacher_top1": report["teacher"]["top1"],
        **costs(SynthesisReport(**report["synthesis"]), report["pool"]["images"]),
        "distill_seconds": report["distill"]["seconds"],
        "steps": report["distill"]["steps"],
        "pool": report["pool"]["path"],
    }


def with_known_costs(rows: list[dict]) -> list[dict]:
    """A pool is made by the first run that needs it; the others take it as it is, at no time of their own."""
    made = {row["pool"]: row for row in rows if row["pool"] and row["synthesis_seconds"] is not None}
    keys = ("synthesis_seconds", "images_per_second", "peak_memory_mb")
    return [{**row, **{key: made[row["pool"]][key] for key in keys}} if row["pool"] in made else row for row in rows]


def pool_images(rows: list[dict], model: ModelConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """The first images of every method's first pool of a model: see `save_images`."""
    from inversion import ImagePool
    from models import load_model

    found, teacher = {}, load_model(model)
    for row in rows:
        if row["model"] == model.name and row["pool"] and row["method"] not in found:
            pool = ImagePool.existing(Path(row["pool"]), teacher)
            found[row["method"]] = shown_images(teacher, pool.read(min(row["images"], 100)))
    return found


def main(argv: list[str] | None = None) -> list[dict]:
    """Run every cell, print and write the table."""
    args, others = transfer_grid_parser().parse_known_args(argv)
    cells = cells_of(args, others)
    output = writable_folder(args.output, "--output")
    rows = with_known_costs([row_of(cell) for cell in cells])
    summary = means(rows, ("model", "method", "student"))
    models = {cell.task.model.name: cell.task.model for cell in cells}
    pictures = {name: found for name, model in models.items() if (found := pool_images(rows, model))}
    run = cells[0].task.run
    facts = {"device": device_name(pick_device(run.device, run.gpu)), "versions": versions(), "command": args.command}
    write_results(output, "Students compared", rows, summary, "student", pictures, facts)
    teachers = {row["model"]: row["teacher_top1"] for row in rows}
    lines = [{"data": "teacher", "model": model, "top1": top1} for model, top1 in teachers.items()]
    write_json(output / "summary.json", [*summary, *lines])
    print_table(summary, "student")
    for model, top1 in teachers.items():
        print(f"teacher {model}: {top1:.2f}")
    print(f"rows, summary and pictures: {output}")
    return summary


if __name__ == "__main__":
    run_main(main)
