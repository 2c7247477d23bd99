#!/usr/bin/env python3
"""Compare what students learn from real images, noise, dense and sparse inversion: runs of test_kt.py, in one table.

Each cell is a run in OUTPUT/DATA-STUDENT and goes on where it was stopped; OUTPUT/summary.json has the table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import test_kt
from utils.cli import Parser
from utils.errors import UserError, run_main
from utils.files import writable_folder, write_json
from utils.report import duration, table

MODE_OF = {"real": 2, "gaussian": 1, "dense": 0, "smi": 0}
STUDENTS = {
    "linear": ["--student_init", "pretrained", "--finetune", "linear"],
    "full": ["--student_init", "pretrained", "--finetune", "full"],
    "scratch": ["--student_init", "scratch", "--finetune", "full"],
}


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Our flags, and those that go to test_kt.py as they are."""
    parser = Parser(__doc__ + " Every other flag goes to test_kt.py.")
    add = parser.add_argument
    add("--data", nargs="+", choices=MODE_OF, default=list(MODE_OF), help="kinds of images to learn from")
    add("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS), help="students, one table row each")
    add("--linear_lr", metavar="LR", help="learning rate where the head alone learns; default --lr")
    add("--output", metavar="DIR", default="./runs/compare_kt", help="where runs and table go")
    args, others = parser.parse_known_args(argv)
    taken = {"--mode", "--finetune", "--student_init", "--student-init"} & set(others)
    if taken:
        raise UserError(f"{sorted(taken)[0]} is what this script varies; use --data and --students")
    return args, others


def run_cell(data: str, student: str, args: argparse.Namespace, others: list[str], output: Path) -> dict:
    """One run of test_kt.py, as a row."""
    flags = [*others, *STUDENTS[student], "--mode", str(MODE_OF[data]), "--output", str(output / f"{data}-{student}")]
    if data == "dense":
        flags += ["--prune_it", "-1", "--prune_ratio", "0"]
    if student == "linear" and args.linear_lr is not None:
        flags += ["--lr", args.linear_lr]
    print(f"== {data} images, {student}", flush=True)
    report = test_kt.main(flags)
    return {
        "data": data,
        "finetune": report["finetune"],
        "student_init": report["student_init"],
        "top1": report["student"]["best_top1"],
        "last_top1": report["student"]["top1"],
        "synthesis_seconds": report["synthesis"]["seconds"],
        "distill_seconds": report["distill"]["seconds"],
        "images": report["pool"]["images"],
        "steps": report["distill"]["steps"],
        "teacher_top1": report["teacher"]["top1"],
    }


def main(argv: list[str] | None = None) -> list[dict]:
    """Run every cell, print and write the table."""
    args, others = parse_arguments(argv)
    output = writable_folder(args.output, "--output")
    rows = [run_cell(data, student, args, others, output) for student in args.students for data in args.data]
    # A pool is made by the first run that needs it; the others take it as it is, at no time of their own.
    for row in rows:
        if row["synthesis_seconds"] is None:
            known = (other["synthesis_seconds"] for other in rows if other["data"] == row["data"])
            row["synthesis_seconds"] = next((seconds for seconds in known if seconds is not None), None)
    teacher = {"data": "teacher", "top1": rows[0]["teacher_top1"]}
    write_json(output / "summary.json", [*rows, teacher])
    names = {("pretrained", "linear"): "linear", ("pretrained", "full"): "full", ("scratch", "full"): "scratch"}
    lines = [
        [
            names[row["student_init"], row["finetune"]],
            row["data"],
            f"{row['top1']:.2f}",
            f"{row['last_top1']:.2f}",
            row["images"],
            row["steps"],
            duration(row["synthesis_seconds"]),
            duration(row["distill_seconds"]),
        ]
        for row in rows
    ]
    print(f"\nteacher: {teacher['top1']:.2f}")
    print(table(["student", "images from", "best %", "last %", "images", "steps", "synthesis", "distillation"], lines))
    return rows


if __name__ == "__main__":
    run_main(main)
