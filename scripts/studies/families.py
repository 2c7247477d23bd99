#!/usr/bin/env python3
"""Every family of architectures from nothing: a teacher trained on the digits, quantized and taught on without them.

For each row a small model is trained (`scripts/train_teacher.py`), calibrated with SMI images of its own at W8/A8 and
W4/A4, and with real ones at W4/A4 (`test_quant.py`), and teaches a linear head on the bundled backbone, a plain ViT of
the same patches that has seen letters alone (`test_kt.py`). What is in OUTPUT is not done again. A table in Markdown,
top-1 in per cent on 360 test digits.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.realpath(f"{__file__}/../../.."))

from utils.errors import exit_on_interrupt, run_main

exit_on_interrupt(__name__)

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from utils.cli import Parser, positive
from utils.errors import UserError
from utils.files import writable_folder, write_json
from utils.report import markdown, table

PLAIN = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2}
WINDOWS = {"img_size": 32, "patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
# LayerScale that starts near zero takes longer than these trainings to grow.
ROWS: dict[str, tuple[str, dict]] = {
    "VisionTransformer": ("deit_tiny_patch16_224", PLAIN),
    "Eva (DINOv3)": ("vit_small_patch16_dinov3", PLAIN | {"init_values": 0.1}),
    "Eva (EVA-02)": ("eva02_tiny_patch14_224", PLAIN),
    "Beit": ("beit_base_patch16_224", PLAIN | {"init_values": 0.1}),
    "VisionTransformerRelPos": ("vit_relpos_small_patch16_224", PLAIN | {"init_values": 0.1}),
    "Cait": ("cait_xxs24_224", PLAIN | {"init_values": 0.1}),
    "SwinTransformer": ("swin_tiny_patch4_window7_224", WINDOWS),
    "SwinTransformerV2": ("swinv2_tiny_window8_256", WINDOWS),
}
"""Name of the row: timm's architecture, and what makes it small."""
CONFIG = {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0, "interpolation": "bicubic", "input_size": [3, 32, 32]}
"""As the bundled backbone wants its images."""

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {"train": "scripts/train_teacher.py", "quant": "test_quant.py", "kt": "test_kt.py"}
SCHEDULE = "--prune_ratio 0.3 0.3 0.3 0.3 --tv2 0.01 --no-flip"
QUANT = f"--iterations 200 --prune_it 10 20 30 40 {SCHEDULE}"
LOW = "--w_bit 4 --a_bit 4 --observer auto --no-hadamard --augment"
"""The images as they are."""
STEPS = "--epochs 2 --kd_steps 200 --eval_every 2 --lr 0.1 --kd_lr_schedule cosine --augment shift"
KT = f"--student deit_nano_4_digits {STEPS}"
READABLE = "--preset readable --no-flip --fill --images_per_epoch 200"
RUNS = {
    "SMI, W8/A8": ("quant", f"{QUANT} --w_bit 8 --a_bit 8 --observer auto"),
    "SMI, W4/A4": ("quant", f"{QUANT} {LOW}"),
    "real, W4/A4": ("quant", f"--mode 2 {LOW}"),
    "head, SMI": ("kt", f"{READABLE} {KT}"),
    "head, real": ("kt", f"--mode 2 --max_images 400 {KT}"),
}


def parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", metavar="NAME", help=f"rows; default all: {', '.join(ROWS)}")
    parser.add_argument("--epochs", type=positive, default=30, help="of a teacher's training; default 30")
    parser.add_argument("--output", default="./runs/families", metavar="DIR", help="where everything goes")
    return parser


def commands(row: str, epochs: int, output: Path) -> dict[str, tuple[str, str]]:
    """Script and arguments of everything that a row takes, by what it gives; the teacher comes first."""
    home = output / ROWS[row][0]
    training = f"--model local-dir:{home / 'outline'} --init scratch --data digits --epochs {epochs}"
    found = {"teacher": ("train", f"{training} --patch_drop 0.5 --num_workers 0 --output {home / 'teacher'}")}
    for name, (script, arguments) in RUNS.items():
        folder = home / "".join(c if c.isalnum() else "_" for c in name)
        model = f"--model local-dir:{home / 'teacher'} --datapool {output / 'datapool'} --num-workers 0"
        found[name] = script, f"{model} {arguments} --output {folder}"
    return found


def outline(row: str, output: Path) -> None:
    """Write the configuration of a row's teacher, a folder that training from random weights takes."""
    architecture, small = ROWS[row]
    config = {"architecture": architecture, "num_classes": 10, "model_args": small, "pretrained_cfg": CONFIG}
    write_json(writable_folder(output / architecture / "outline", "--output") / "config.json", config)


def top1(name: str, script: str, arguments: Sequence[str]) -> float:
    """What a command gives; run now, unless its folder says it."""
    folder = Path(arguments[-1])
    report = folder / ("training.json" if script == "train" else "report.json")
    if not report.is_file():
        print(f"== {name}: {script} {' '.join(arguments)}", flush=True)
        if subprocess.run([sys.executable, ROOT / SCRIPTS[script], *arguments]).returncode:
            raise UserError(f"{SCRIPTS[script]} failed; what it said is above")
    found = json.loads(report.read_text())
    return (found if script == "train" else found[{"quant": "quant", "kt": "student"}[script]])["top1"]


def main(argv: Sequence[str] | None = None) -> None:
    """Do all that is missing, and print the table."""
    args = parser().parse_args(argv)
    chosen = args.families or list(ROWS)
    if unknown := [name for name in chosen if name not in ROWS]:
        raise UserError(f"--families {unknown[0]} is unknown; there are {', '.join(ROWS)}")
    output, lines = writable_folder(args.output, "--output"), []
    for row in chosen:
        outline(row, output)
        wanted = commands(row, args.epochs, output)
        found = [f"{top1(f'{row}, {name}', script, text.split()):.2f}" for name, (script, text) in wanted.items()]
        lines.append([row, f"`{ROWS[row][0]}`", *found])
    header = ["family", "architecture", "teacher", *RUNS]
    print(table(header, lines))
    (output / "table.md").write_text(markdown(header, lines) + "\n")


if __name__ == "__main__":
    run_main(main)
