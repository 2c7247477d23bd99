#!/usr/bin/env python3
"""Quantize a Vision Transformer without its data, and say how accurate it still is."""

from __future__ import annotations

from utils.errors import exit_on_interrupt, run_main

exit_on_interrupt(__name__)

from pathlib import Path

from utils.flags import quant_parser, quant_task
from utils.ranks import process_group
from utils.report import duration, table

AGREEMENT = 99.5
"""Share of images, in per cent, that an exported file should put in the class that the simulated model does."""


def main(argv: list[str] | None = None) -> dict:
    """Run the task and return the report."""
    args = quant_parser(__doc__).parse_args(argv)
    from utils.quant_task import quant_report

    task = quant_task(args)
    with process_group(task.run.device, task.run.gpu) as device:
        report = quant_report(task, device)
        print_summary(report, task.folder)
    return report


def print_summary(report: dict, output: Path) -> None:
    """The final table."""
    shown = {"fp": "full precision", "quant": f"W{report['w_bit']}/A{report['a_bit']}", "export": "ONNX file"}
    rows = [
        [label, f"{report[key]['top1']:.2f}", f"{report[key]['top5']:.2f}", f"{report[key]['loss']:.4f}"]
        for key, label in shown.items()
        if key in report
    ]
    print(f"\n{report['model']}, {report['calibration_images']} {report['calibration']} calibration images")
    print(table(["model", "top-1 %", "top-5 %", "loss"], rows))
    if report["chosen"]:
        print(report["chosen"])
    if report["mode"] == 0:
        print(f"inversion: {duration(report['inversion']['seconds'])}, images in {report['inversion']['pool']}")
    if "check" in report:
        print_check(report["check"])
    if "export" in report:
        print_export(report["export"])
    if "sensitivity" in report:
        shown = report["sensitivity"][:10]
        lines = [[r["layer"], r["w_bit"] or "-", r["a_bit"], f"{r['divergence']:.5f}", r["changed"]] for r in shown]
        print("quantized alone, the ten that cost most (all in sensitivity.json):")
        print(table(["layer", "W", "A", "divergence", "changed %"], lines))
    print(f"report and pictures: {output}")


def print_check(found: dict) -> None:
    """How far the quantized model is from its original, and what is to blame if that is far."""
    print(
        f"without labels, on {found['images']} other inverted images: agreement {found['agreement']:.2f}%, divergence "
        f"{found['divergence']:.4f} nats, lost confidence {100 * found['lost_confidence']:.1f}%; models like that lost "
        f"about {found['predicted_drop']:.1f} points of top-1"
    )
    if "costliest" in found:
        print(f"warning: {', '.join(found['costliest'])} cost most; try {', '.join(found['try'])}")


def print_export(found: dict) -> None:
    """What an exported file is like."""
    print(f"{found['file']}: {found['bytes'] / 1e6:.2f} MB, {found['size_ratio']:.3f}x of float32", end="; ")
    print(f"{found['agreement']:.2f}% of the images are classified as by the simulated model")
    if found["agreement"] < AGREEMENT:
        print(f"warning: below {AGREEMENT}%; at few bits values on rounding boundaries fall either way, see the top-1")
    columns = [("ONNX file", "quantized"), ("ONNX file, float32", "float32"), ("PyTorch, float32", "pytorch")]
    lines = [[label, f"{found['latency_ms'][key]:.2f}", f"{found['throughput'][key]:.1f}"] for label, key in columns]
    print(table([f"{found['threads']} threads", "ms, batch 1", "images/s, batch 32"], lines))


if __name__ == "__main__":
    run_main(main)
