#!/usr/bin/env python3
"""Teach a student what a Vision Transformer knows, without its data, and say how well it learnt."""

from __future__ import annotations

from utils.errors import exit_on_interrupt, run_main

exit_on_interrupt(__name__)

from pathlib import Path

from utils.flags import transfer_parser, transfer_task
from utils.ranks import process_group
from utils.report import duration, table


def main(argv: list[str] | None = None) -> dict:
    """Run the task and return the report."""
    args = transfer_parser(__doc__).parse_args(argv)
    from utils.transfer_task import transfer_report

    task = transfer_task(args)
    with process_group(task.run.device, task.run.gpu) as device:
        report = transfer_report(task, device, tell=print)
        print_summary(report, task.folder)
    return report


def print_summary(report: dict, output: Path) -> None:
    """The final table."""
    student = report["student"]
    kept = "the last" if student["kept"] == "last" else f"of epoch {student['epoch']}, by agreement"
    tops = {"teacher": report["teacher"]["top1"], f"student, {kept}": student["top1"]}
    images = f"{report['pool']['images']} {report['images']} images"
    print(f"\n{report['model']}, {images}, {report['finetune']} fine-tuning")
    print(table(["model", "top-1 %"], [[name, f"{top1:.2f}"] for name, top1 in tops.items()]))
    synthesis, learning = (duration(report[key]["seconds"]) for key in ("synthesis", "distill"))
    print(f"synthesis: {synthesis}, distillation: {learning}")
    print(f"report, pictures and student: {output}")


if __name__ == "__main__":
    run_main(main)
