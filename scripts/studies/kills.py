#!/usr/bin/env python3
"""Kill runs of test_quant.py, test_kt.py and compare.py, start each again, and compare what they leave.

A run is killed (SIGKILL, with all processes that it started) and started again until it ends; then every file and
folder is held against those of a run that was left alone: bytes, and of checkpoints the content. What measures time and
memory stands still in all runs, so that numbers and pictures of these are equal as well. Exit code 1 where anything is
not.

    python scripts/studies/kills.py                         # 20 kills at random moments for each program
    python scripts/studies/kills.py --kills 0 --changes 999 # one before every change of a file
"""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.cli import Parser, natural
from utils.errors import UserError, run_main
from utils.files import writable_folder
from utils.report import table

ROOT = Path(__file__).resolve().parents[2]
INVERSION = "--iterations 8 --prune_it 2 4 --prune_ratio 0.3 0.3 --val_limit 20 --num-workers 1"
FOLDERS = "--datapool pool --output out"
PROGRAMS = {
    "test_quant.py": f"{INVERSION} {FOLDERS} --calib-batchsize 4 --num_images 12 --w_bit 4 --reconstruct "
    "--reconstruct_steps 4 --save saved --export model.onnx",
    "test_kt.py": f"{INVERSION} {FOLDERS} --inversion-batchsize 4 --images_per_epoch 8 --epochs 3 --eval_every 2 "
    "--kr-batchsize 4 --kd_steps 2 --student_init scratch --finetune full --lr 0.01 --snapshots 0 6",
    "scripts/compare.py": f"{INVERSION} {FOLDERS} --calib-batchsize 4 --num_images 8 --baselines "
    "--strategies smi --bits 8/8 4/8 --reconstruct --reconstruct_steps 2",
}
USED = ("quant.onnx_graph", "sklearn.datasets", "sklearn.model_selection", "onnxruntime", "scripts.compare")
USED += ("utils.quant_task", "utils.transfer_task")
FRESH = 5
"""Every so manyth kill is of a program that has its imports before it, and comes among these."""
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}


def run(script: str, folder: Path, changes: Any, die_at: int = 0) -> None:
    """Run a program in `folder`, in this process, which becomes the leader of a group.

    Args:
        script: of `PROGRAMS`.
        folder: what it writes goes here, what it says beside it.
        changes: a shared integer that counts changes of files.
        die_at: the number of the change before which the group is killed, 0 for none.
    """
    os.setsid()
    os.chdir(folder)
    log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    time.perf_counter = itertools.count(0.0).__next__
    resource.getrusage = lambda who: resource.struct_rusage((0, 0, 2**20, *[0] * 13))
    mine = os.getpid()

    def watch(event: str, args: tuple) -> None:
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        named = (event in CHANGES or writes) and isinstance(args[0], (str, os.PathLike))
        if named and os.path.abspath(args[0]).startswith(f"{folder}{os.sep}") and os.getpid() == mine:
            changes.value += 1
            if changes.value == die_at:
                os.killpg(0, signal.SIGKILL)

    sys.addaudithook(watch)
    sys.argv = [script, *PROGRAMS[script].split()]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None


class Runs:
    """Runs of one program, each in a folder of its own in `output`; imports take it so many seconds."""

    def __init__(self, script: str, output: Path, imports: float) -> None:
        self.script, self.output, self.numbers = script, output, itertools.count()
        self.kills, self.found, self.different = 0, 0, []
        self.imports = imports
        start = time.monotonic()
        self.expected = contents(self._ended(self._folder()))
        self.seconds = time.monotonic() - start

    def at_moments(self, count: int, random: random.Random) -> None:
        """`count` kills, spread over the time of an undisturbed run, and over the imports."""
        moments = [self.seconds * (number + random.random()) / count for number in range(count)]
        random.shuffle(moments)
        moments = [
            (moment, False) if number % FRESH else (self.imports * random.random(), True)
            for number, moment in enumerate(moments)
        ]
        while moments:
            folder, killed = self._folder(), True
            while moments and killed:
                process, _ = self._start(folder, fresh=moments[-1][1])
                process.join(moments[-1][0])
                if killed := process.is_alive():
                    _kill(process)
                    moments.pop()
                    self.kills += 1
            self._compare(folder, process if not killed else None)

    def at_changes(self, count: int) -> None:
        """At most `count` kills, each before another change of a file, spread over those of an undisturbed run."""
        count = min(count, self.changes)
        for number in range(count):
            folder = self._folder()
            process, _ = self._start(folder, die_at=1 + (2 * number + 1) * self.changes // (2 * count))
            process.join()
            self.kills += 1
            self._compare(folder)

    def row(self) -> list[object]:
        """Of the table."""
        return [self.script, f"{self.seconds:.1f}", self.kills, self.found, len(self.expected), len(self.different)]

    def _folder(self) -> Path:
        folder = self.output / f"{Path(self.script).stem}-{next(self.numbers):03d}"
        folder.mkdir()
        return folder

    def _start(self, folder: Path, fresh: bool = False, die_at: int = 0) -> tuple[Any, Any]:
        context = multiprocessing.get_context("spawn" if fresh else "fork")
        changes = context.Value("i", 0, lock=False)
        process = context.Process(target=run, args=(self.script, folder, changes, die_at))
        process.start()
        return process, changes

    def _ended(self, folder: Path, process: Any = None) -> Path:
        """The folder once a run in it came to its end."""
        if process is None:
            process, changes = self._start(folder)
            process.join()
            self.changes = max(getattr(self, "changes", 0), changes.value)
        process.join()
        if process.exitcode:
            raise UserError(f"{self.script} ended with exit code {process.exitcode}: see {folder}.log")
        return folder

    def _compare(self, folder: Path, process: Any = None) -> None:
        self.found += 1
        if different := differences(self.expected, contents(self._ended(folder, process))):
            self.different += different
            print(f"{folder}: {', '.join(different)}", flush=True)
        else:
            shutil.rmtree(folder)
            Path(f"{folder}.log").unlink()


def contents(folder: Path) -> dict[str, object]:
    """What each file in a folder holds, and None for each folder, by name."""
    return {str(path.relative_to(folder)): None if path.is_dir() else _content(path) for path in folder.rglob("*")}


def differences(expected: dict[str, object], found: dict[str, object]) -> list[str]:
    """Names that are in one of two `contents` alone, or hold something else."""
    said = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    said += [f"{name} was left behind" for name in sorted(found.keys() - expected.keys())]
    return said + [f"{name} differs" for name in sorted(expected.keys() & found) if expected[name] != found[name]]


def _content(path: Path) -> object:
    """Bytes; of torch's files, which may differ in their bytes alone, what they hold."""
    if path.suffix != ".pt":
        return path.read_bytes()
    import torch

    return _plain(torch.load(path, weights_only=True))


def _plain(value: Any) -> object:
    """The same with bytes for tensors."""
    if isinstance(value, dict):
        return [(key, _plain(one)) for key, one in value.items()]
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return (value.dtype, tuple(value.shape), value.numpy().tobytes()) if hasattr(value, "dtype") else value


def _kill(process: Any) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it leads no group yet
        process.kill()
    process.join()


def _preload() -> float:
    """Import what the programs use, once, so that runs are forked with it. The seconds that it took."""
    start = time.monotonic()
    for name in USED:
        importlib.import_module(name)
    return time.monotonic() - start


def main(argv: list[str] | None = None) -> None:
    """Kill, compare, print the table."""
    parser = Parser(__doc__)
    parser.add_argument("--kills", type=natural, default=20, help="kills of each program at random moments")
    parser.add_argument("--changes", type=natural, default=0, help="kills of each program before a change of a file")
    parser.add_argument("--seed", type=natural, default=0, help="of the moments")
    parser.add_argument(
        "--output", metavar="DIR", default="./runs/kills", help="a new folder; what differs stays there"
    )
    args = parser.parse_args(argv)
    output = writable_folder(args.output, "--output").resolve()
    if any(output.iterdir()):
        raise UserError(f"--output {output} is not empty; give a new folder")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    imports, done = _preload(), []
    for script in PROGRAMS:
        done.append(Runs(script, output, imports))
        done[-1].at_moments(args.kills, random.Random(args.seed))
        done[-1].at_changes(args.changes)
    header = ["program", "seconds alone", "kills", "runs compared", "files and folders", "different"]
    print(table(header, [runs.row() for runs in done]))
    if any(runs.different for runs in done):
        raise SystemExit(1)


if __name__ == "__main__":
    run_main(main)
