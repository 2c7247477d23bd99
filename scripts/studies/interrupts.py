#!/usr/bin/env python3
"""Interrupt programs (Ctrl-C) at many moments of their first seconds: each has to end with one line and code 130.

Every moment is a run of its own; all processes of it get the signal, as from a terminal. Before Python has started and
read the first lines of a program nothing of it can answer: those moments are counted apart, as are those after its end.
OUTPUT gets interrupts.json; exit code 1 if any other moment ended otherwise.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.realpath(f"{__file__}/../../.."))

from utils.errors import exit_on_interrupt, run_main

exit_on_interrupt(__name__)

import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from utils.cli import Parser, positive, rate
from utils.files import writable_folder, write_json
from utils.report import table

ROOT = Path(__file__).resolve().parents[2]
SCHEDULE = ["--prune_it", "50", "100", "--prune_ratio", "0.3", "0.3"]
LONG = ["--iterations", "100000", *SCHEDULE]
BENCH = ["--model", "deit_tiny_patch16_224", "--random_weights", "--batch", "2"]
PROGRAMS = {
    "test_quant.py": [*LONG, "--output", "out", "--datapool", "pool"],
    "test_quant.py, workers": ["--mode", "1", "--dataset", "data", "--num-workers", "2", "--output", "out"],
    "test_kt.py": [*LONG, "--output", "out", "--datapool", "pool"],
    "scripts/compare.py": ["--iterations", "100000", "--output", "out", "--datapool", "pool"],
    "scripts/compare_kt.py": ["--iterations", "100000", "--output", "out", "--datapool", "pool"],
    "scripts/train_teacher.py": ["--init", "scratch", "--lr", "1e-3", "--output", "out"],
    "scripts/run_onnx.py": ["model.onnx"],
    "scripts/bench/bench_inversion.py": [*BENCH, "--repeats", "1000", "--output", "out"],
    "scripts/bench/profile_inversion.py": [*BENCH],
    "scripts/studies/activation_ranges.py": ["--iterations", "100000", "--output", "out", "--datapool", "pool"],
    "scripts/studies/label_free.py": ["--iterations", "100000", "--output", "out", "--datapool", "pool"],
    "scripts/studies/missing_patches.py": ["--patches", "64", "32", "16", "--reconstruct", "--output", "out"],
}
"""What runs long enough; `data` and `model.onnx` are made by `things`."""
BEFORE, AFTER = "before its handler", "after its end"
FIRST_LINES = "import exit_on_interrupt", "import signal"
"""By which a program has its handler."""
RIGHT = "one line, 130"


def things(folder: Path, programs: Sequence[str]) -> None:
    """What the programs are given: an image folder of digits, and an exported model."""
    if not {"test_quant.py, workers", "scripts/run_onnx.py"} & set(programs):
        return
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images[:500], digits.target[:500], strict=True)):
        path = folder / "data" / "val" / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype("uint8")).resize((512, 512)).save(path)
    if "scripts/run_onnx.py" in programs:
        flags = ["--mode", "1", "--val_limit", "32", "--export", folder / "model.onnx", "--output", folder / "exported"]
        subprocess.run([sys.executable, ROOT / "test_quant.py", *map(str, flags)], check=True, capture_output=True)


def interrupted(program: str, folder: Path, moment: float, twice: float | None = None) -> str:
    """How a program ends that is interrupted `moment` seconds after its start, and once more `twice` seconds later."""
    script, flags = ROOT / program.split(",")[0], list(PROGRAMS[program])
    if program == "scripts/run_onnx.py":
        flags += [str(path) for path in sorted((folder / "data").rglob("*.png"))] * 40
    with tempfile.TemporaryDirectory(dir=folder) as own:
        for name in ("data", "model.onnx"):
            Path(own, name).symlink_to(folder / name)
        process = subprocess.Popen(
            [sys.executable, script, *flags],
            cwd=own,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells ignore it in the background
        )
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            if twice is not None:
                time.sleep(twice)
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGINT)
        return outcome(process, script.name)


def outcome(process: subprocess.Popen, script: str) -> str:
    """How a program ended: by its exit code and what it said besides bars of progress."""
    try:
        errors = process.communicate(timeout=60)[1].decode()
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        errors = process.communicate()[1].decode()
    lines = [line for line in errors.split("\n") if line and "\r" not in line]
    if process.returncode == 130 and len(lines) == 1 and lines[0].startswith("interrupted"):
        return RIGHT
    # Python has no handler yet; or it looks for its packages, and may even go on after that; or reads our first lines.
    early = script not in errors or any(line in errors for line in FIRST_LINES)
    if ("KeyboardInterrupt" in errors and early) or (process.returncode == -signal.SIGINT and not lines):
        return BEFORE
    if process.returncode == 0 and not lines:
        return AFTER
    return f"code {process.returncode}, {len(lines)} lines, the last: {lines[-1][:100] if lines else ''}"


def parser() -> Parser:
    """The command line."""
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), help="what is interrupted")
    add("--moments", type=positive, default=20, help="so many, evenly spread")
    add("--seconds", type=rate, default=10.0, help="from 0.1 s to this one after the start")
    add("--twice", type=rate, metavar="S", help="interrupt once more, S seconds later")
    add("--output", default="./runs/interrupts", metavar="DIR", help="where the JSON goes")
    return parser


def main(argv: list[str] | None = None) -> list[dict]:
    """Interrupt, print and write the table."""
    args = parser().parse_args(argv)
    output, rows = writable_folder(args.output, "--output"), []
    step = (args.seconds - 0.1) / max(args.moments - 1, 1)
    with tempfile.TemporaryDirectory() as folder:
        things(Path(folder), args.programs)
        for program in args.programs:
            moments = [round(0.1 + number * step, 3) for number in range(args.moments)]
            ended = [interrupted(program, Path(folder), moment, args.twice) for moment in moments]
            wrong = [
                f"{m} s: {end}" for m, end in zip(moments, ended, strict=True) if end not in (RIGHT, BEFORE, AFTER)
            ]
            counts = Counter(ended)
            rows.append({"program": program, **{end: counts[end] for end in (RIGHT, BEFORE, AFTER)}, "wrong": wrong})
    write_json(output / "interrupts.json", rows)
    print(
        table(
            ["program", RIGHT, BEFORE, AFTER, "wrong"], [[*list(row.values())[:-1], len(row["wrong"])] for row in rows]
        )
    )
    for row in rows:
        for line in row["wrong"]:
            print(f"{row['program']}, {line}")
    if any(row["wrong"] for row in rows):
        raise SystemExit(1)
    return rows


if __name__ == "__main__":
    run_main(main)
