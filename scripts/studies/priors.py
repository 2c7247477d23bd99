#!/usr/bin/env python3
"""Which prior is worth its time? Every prior with every strategy at equal seconds of inversion, calibrated at low bits.

Dense inversion with the plain prior fills --seconds; every other pair has as many iterations as take the same time, by
short inversions of both in turns, in seconds of this process (schedules are cut in proportion). Images begin as pink
noise and are shown to the calibrator `auto` as they are. What is in OUTPUT is not done again, the numbers of iterations
included. Divergence is that of the quantized model's predictions from full precision's, on test images. Every other
flag goes to test_quant.py.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.realpath(f"{__file__}/../../.."))

from utils.errors import exit_on_interrupt, run_main

exit_on_interrupt(__name__)

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inversion import InversionConfig, Inverter
from models import SparseImages, SparseViT
from quant import quantize
from quant.fidelity import divergence
from quant.integers import with_integer_products
from scripts.compare import Bench, bits
from scripts.comparison import VARIES, Rows, refuse_flags, save_images, short_schedule, shown_images
from utils.cli import Parser, any_seed, positive, rate
from utils.files import read_json, writable_folder, write_json
from utils.flags import quant_parser, quant_task
from utils.images import Noise, Real, images_at_hand
from utils.report import markdown, table

if TYPE_CHECKING:
    from utils.quant_task import QuantTask

BASE = "--init pink --lr_schedule cosine --tv2 1e-3 --observer auto --no-hadamard --augment"
"""Of every pair; flags that are given win."""
PRIORS = {
    "deepinversion": "--prior deepinversion",
    "psaq": "--prior psaq",
    "mimiq": "--prior mimiq",
    "sardfq": "--prior sardfq --soft_logits 10",
    "synq": "--prior deepinversion synq --oh 0",
    "cmi": "--prior deepinversion cmi",
}
"""What each prior sets besides."""
VARIED = "--w_bit --a_bit --prior --strategy --iterations --prune_it --prune_ratio"
REFUSED = dict.fromkeys([*VARIED.split(), "--mode", "--seed", "--num_images", "--calib_batchsize"], VARIES)
STRATEGIES = ("dense", "smi", "pri")
PROBE, PROBED, TURNS = 20, 16, 2
"""Iterations and images of a short inversion, at most, and how often each is made: the fastest counts."""
PLAIN = "deepinversion", "dense"
"""What the others are timed against."""


def parser() -> Parser:
    """The command line."""
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--priors", nargs="+", choices=PRIORS, default=list(PRIORS), help="priors")
    add("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), help="strategies")
    add("--seconds", type=rate, default=60.0, help="of inversion for each set of images")
    add("--bits", nargs="+", type=bits, default=[(4, 4), (3, 3)], metavar="W/A", help="widths in bits")
    add("--seeds", nargs="+", type=any_seed, default=[0], help="of images and calibration")
    add("--images", type=positive, default=64, help="of a set")
    add("--output", default="./runs/priors", metavar="DIR", help="where everything goes")
    return parser


def asked(flags: Sequence[str]) -> QuantTask:
    """What the flags of `test_quant.py` stand for, beside `BASE`."""
    return quant_task(quant_parser("").parse_args([*BASE.split(), *flags]))


def inversion(
    prior: str, strategy: str, iterations: int, images: int, seed: int, flags: Sequence[str] = ()
) -> InversionConfig:
    """The inversion of a pair of that many iterations, with `flags` besides."""
    own = f"{PRIORS[prior]} --strategy {strategy} --iterations {iterations} --calib_batchsize {images} --seed {seed}"
    if strategy == "smi":
        for name, values in short_schedule(iterations).items():
            own += f" --{name} {' '.join(map(str, values))}"
    return asked([*flags, *own.split()]).images.config


def costs(bench: Bench, configs: Sequence[InversionConfig], clock: Callable[[], float]) -> list[float]:
    """What each inversion costs by a clock, made in turns."""
    inverters, spent = [Inverter(bench.model, config, bench.device) for config in configs], [[] for _ in configs]
    for _ in range(TURNS):
        for inverter, mine in zip(inverters, spent, strict=True):
            start = clock()
            inverter.invert(0)
            mine.append(clock() - start)
    return [min(mine) for mine in spent]


@torch.no_grad()
def answers(models: Mapping[str, SparseViT], bench: Bench) -> tuple[dict[str, Tensor], Tensor]:
    """Log-probabilities (N, classes) that each model gives the test images, and their labels (N,)."""
    found, seen = {name: [] for name in models}, []
    for images, labels in bench.data:
        images = images.to(bench.device)
        if not seen:
            models = {name: with_integer_products(model, images) for name, model in models.items()}
        for name, model in models.items():
            found[name].append(model.forward_images(images).double().log_softmax(dim=1).cpu())
        seen.append(labels)
    return {name: torch.cat(parts) for name, parts in found.items()}, torch.cat(seen)


class Study:
    """The grid of one model, with what is finished of it in `output`.

    Args:
        flags: of `test_quant.py`.
        widths: bits of weights and activations.
        images: of a set.
        seconds: of inversion for each set.
        output: where everything goes.
    """

    def __init__(
        self, flags: Sequence[str], widths: Sequence[tuple[int, int]], images: int, seconds: float, output: Path
    ) -> None:
        self.flags, self.widths, self.count, self.seconds, self.output = flags, widths, images, seconds, output
        self.task = asked([*flags, "--output", str(output / "run")])
        self.bench, self.rows = Bench(self.task), Rows(output)
        self.wanted: Tensor | None = None
        self.shown: dict[str, tuple[Tensor, Tensor]] = {}

    def iterations(self, prior: str, strategy: str) -> int:
        """Of a pair, as many as fill the seconds here; what a run before has found stays."""
        file = self.output / "iterations.json"
        known = read_json(file) if file.is_file() else {}
        name = " ".join([f"{prior}-{strategy}-{self.count}-{self.seconds:g}", *self.flags])
        if name not in known:
            asked = [PLAIN] if (prior, strategy) == PLAIN else [PLAIN, (prior, strategy)]
            configs = [inversion(*pair, PROBE, min(self.count, PROBED), 0, self.flags) for pair in asked]
            # A GPU's work is not in the time of the process.
            on_cpu = self.bench.device.type == "cpu"
            if len(asked) == 1:
                (spent,) = costs(self.bench, configs, time.perf_counter)
                iterations = self.seconds * PROBE / spent * min(self.count, PROBED) / self.count
            else:
                plain, spent = costs(self.bench, configs, time.process_time if on_cpu else time.perf_counter)
                iterations = self.iterations(*PLAIN) * plain / spent
            known = {**(read_json(file) if file.is_file() else {}), name: max(1, round(iterations))}
            write_json(file, known)
        return known[name]

    def images(self, prior: str | None, strategy: str, iterations: int, seed: int) -> tuple[SparseImages, float]:
        """A set of images and the seconds that it took; real ones and noise have no prior."""
        start = time.perf_counter()
        if prior is None:
            source = Noise() if strategy == "noise" else Real(self.task.data.dataset)
            images = images_at_hand(self.bench.model, source, self.count, seed)
        else:
            config = inversion(prior, strategy, iterations, self.count, seed, self.flags)
            images = Inverter(self.bench.model, config, self.bench.device).invert(0).images
        return images, time.perf_counter() - start

    def run(self, prior: str | None, strategy: str, seed: int) -> list[dict]:
        """The rows of a set of images, one for each width."""
        iterations = 0 if prior is None else self.iterations(prior, strategy)
        cell = {"prior": prior, "strategy": strategy, "seed": seed, "iterations": iterations, "flags": list(self.flags)}
        cell |= {"images": self.count, **self.bench.settings, **self.bench.facts}
        cells = {f"W{w}/A{a}": {**cell, "width": [w, a]} for w, a in self.widths}
        missing = {name: one for name, one in cells.items() if self.rows.find(one) is None}
        if missing:
            print(f"== {strategy if prior is None else f'{prior}-{strategy}'}, seed {seed}", flush=True)
            images, seconds = self.images(prior, strategy, iterations, seed)
            self.shown[strategy if prior is None else f"{prior}-{strategy}"] = shown_images(self.bench.model, images)
            models = {}
            for name, one in missing.items():
                w_bit, a_bit = one["width"]
                config = replace(self.task.quantization, w_bit=w_bit, a_bit=a_bit, seed=seed)
                models[name] = quantize(self.bench.vit, images, config)
            if self.wanted is None:
                self.wanted = answers({"fp": self.bench.vit}, self.bench)[0]["fp"]
            found, labels = answers(models, self.bench)
            for name, answer in found.items():
                row = {"top1": 100 * (answer.argmax(dim=1) == labels).double().mean().item()}
                row |= {"divergence": divergence(self.wanted, answer), "seconds": round(seconds, 2)}
                self.rows.add(missing[name], row)
        return [self.rows.find(one) for one in cells.values()]


def spread(values: Sequence[float], digits: int) -> str:
    """Mean, and the standard deviation of several."""
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing; print and write the table."""
    args, others = parser().parse_known_args(argv)
    refuse_flags(others, REFUSED)
    study = Study(others, args.bits, args.images, args.seconds, writable_folder(args.output, "--output"))
    sets = [(None, "real"), (None, "noise"), *itertools.product(args.priors, args.strategies)]
    widths = [f"W{w}/A{a}" for w, a in args.bits]
    header = ["prior", "strategy", "iterations", "seconds"]
    header += [f"{width}{what}" for width in widths for what in ("", ", divergence")]
    lines = []
    for prior, strategy in sets:
        found = [study.run(prior, strategy, seed) for seed in args.seeds]
        first = found[0][0]
        line = ["-" if prior is None else prior, strategy, *("--" if prior is None else ())]
        if prior is not None:
            line += [first["cell"]["iterations"], f"{statistics.mean(rows[0]['seconds'] for rows in found):.0f}"]
        for number in range(len(widths)):
            line.append(spread([rows[number]["top1"] for rows in found], 2))
            line.append(spread([rows[number]["divergence"] for rows in found], 3))
        lines.append(line)
    if study.shown:
        save_images(study.output / "images.png", study.shown)
    print(table(header, lines))
    (study.output / "table.md").write_text(markdown(header, lines) + "\n")
    print(f"written: {study.output / 'table.md'}")


if __name__ == "__main__":
    run_main(main)
