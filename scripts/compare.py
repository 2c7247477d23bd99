#!/usr/bin/env python3
"""Compare calibration images: quantize models with the images of every method, at each width and seed.

Methods are baselines (real images, noise) and every prior with every strategy. Finished cells are kept in
OUTPUT/rows.jsonl and not computed again. OUTPUT gets results.csv, summary.json, accuracy.png and images.png.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch import Tensor

import test_quant
from inversion import InversionConfig, SynthesisReport
from inversion.arguments import inversion_config
from models import DEFAULT_MODEL, SparseImages, SparseViT, load_model
from quant import check_bits, evaluate, fitting, quantize
from scripts.comparison import (
    BASELINES,
    Method,
    Rows,
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
from test_quant import calibration_images, quant_config, save_pictures
from utils.checkpoint import configuration
from utils.cli import Parser
from utils.data import limited, load_split, loader
from utils.device import device_name, pick_device, pick_dtype, versions
from utils.errors import run_main
from utils.files import writable_folder, write_json

# Flags of test_quant.py that no result depends on, and those that a grid runs over.
NOT_CELL = ("output", "datapool", "device", "gpu", "num_workers", "val_batchsize", "w_bit", "a_bit", "tensorboard")
VARIED = {"--model", "--mode", "--seed", "--w_bit", "--a_bit", "--prior", "--strategy", "--output"}
# Those whose outcome is a file of one quantized model.
ONE_MODEL = {"--export", "--save", "--sensitivity"}


def bits(text: str) -> tuple[int, int]:
    """argparse type: `4/8` -> weights 4 bits, activations 8 bits."""
    try:
        w_bit, a_bit = (int(part) for part in text.upper().replace("W", "").replace("A", "").split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form 4/8") from None
    return w_bit, a_bit


def grid_parser(about: str = __doc__, output: str = "./runs/compare") -> Parser:
    """A parser of the flags that name methods, seeds, models and widths."""
    parser = Parser(about + " Every other flag goes to test_quant.py.")
    add_grid_arguments(parser, seed=0)
    parser.add_argument(
        "--bits", nargs="+", type=bits, default=[(8, 8), (4, 8), (4, 4)], metavar="W/A", help="widths in bits"
    )
    parser.add_argument("--output", metavar="DIR", default=output, help="where everything goes")
    return parser


def parse_arguments(parser: Parser, argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The flags of `parser`, a `grid_parser`, and those that go to test_quant.py as they are."""
    args, others = parser.parse_known_args(argv)
    for flags in (others, *(further_flags("--with", flags) for _, flags in args.extra)):
        refuse_flags(flags, VARIED, "is what this script varies; see --help")
        refuse_flags(flags, ONE_MODEL, "is for one model; give it to test_quant.py")
    for w_bit, a_bit in args.bits:
        check_bits(w_bit, a_bit)
    return args, others


class Bench:
    """A model with its data, ready to be quantized."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.model, self.dataset = name, load_model(name, args.model_path), args.dataset
        self.device = pick_device(args.device, args.gpu)
        transform, classes = self.model.preprocessing.eval_transform(), self.model.classes
        test_set = load_split("test", self.model.dataset, args.dataset, transform, classes)
        self.data = loader(limited(test_set, args.val_limit), args.val_batchsize, args.num_workers)
        self.vit = SparseViT(self.model.vit).to(self.device)
        self.facts = {"fingerprint": self.model.fingerprint(), "val_images": len(self.data.dataset)}

    def config(self, args: argparse.Namespace) -> InversionConfig:
        """What test_quant.py would invert with."""
        return inversion_config(args, args.calib_batchsize, pick_dtype(args.dtype, self.device))

    def images(self, args: argparse.Namespace, folder: Path) -> tuple[SparseImages, SynthesisReport]:
        """What test_quant.py would calibrate with."""
        count = args.num_images or args.calib_batchsize
        return calibration_images(self.model, self.config(args), args, count, self.device, folder)

    def sources(
        self, args: argparse.Namespace, others: list[str], output: Path
    ) -> tuple[dict[str, list[SparseImages]], argparse.Namespace]:
        """The images of every method that `args` asks for, one entry per seed, and flags of test_quant.py for them."""
        found: dict[str, list[SparseImages]] = {}
        for method in methods(args):
            for seed in args.seeds:
                run = test_quant.parser().parse_args(
                    [*others, "--model", self.name, "--seed", str(seed), *method.flags]
                )
                folder = writable_folder(output / f"{method.name}-s{seed}", "--output")
                found.setdefault(method.name, []).append(self.images(run, folder)[0])
        return found, run

    def full_precision(self, rows: Rows) -> float:
        """Top-1 of the model as it is."""
        cell = {"model": self.name, "width": "full precision", "dataset": self.dataset, **self.facts}
        row = rows.find(cell) or rows.add(cell, evaluate({"fp": self.vit}, self.data, self.device)["fp"])
        return row["top1"]

    def run(self, method: Method, seed: int, args: argparse.Namespace, widths, rows: Rows, folder: Path) -> list[dict]:
        """The rows of one kind of images, one per width; all widths are evaluated in one pass over the data."""
        configs = {width: fitting(self.vit, quant_config(args, *width)) for width in widths}
        cells = {}
        for w_bit, a_bit in widths:
            cells[w_bit, a_bit] = {**configuration(args, NOT_CELL), "dtype": self.config(args).dtype, **self.facts}
            cells[w_bit, a_bit] |= {"w_bit": w_bit, "a_bit": a_bit}
        missing = [width for width, cell in cells.items() if rows.find(cell) is None]
        if missing:
            print(f"== {self.name}, {method.name}, seed {seed}", flush=True)
            start = time.perf_counter()
            images, synthesis = self.images(args, folder)
            report = asdict(synthesis)
            if method.strategy in BASELINES:
                report |= {"seconds": round(time.perf_counter() - start, 3), "images": len(images)}
            save_pictures(self.model, self.vit, images, folder)
            models = {width: quantize(self.vit, images, configs[width]) for width in missing}
            for (w_bit, a_bit), result in evaluate(models, self.data, self.device).items():
                row = {"task": "quant", "model": self.name, "method": method.name, "prior": method.prior}
                row |= {"strategy": method.strategy, "seed": seed, "width": f"W{w_bit}/A{a_bit}"}
                row |= {**result, "val_images": len(self.data.dataset), **costs(report, len(images))}
                rows.add(cells[w_bit, a_bit], row)
        return [rows.find(cell) for cell in cells.values()]

    def shown(self, args: argparse.Namespace, folder: Path) -> tuple[Tensor, Tensor]:
        """The images of a finished cell, in [0, 1], and their labels."""
        images, _ = self.images(args, folder)
        pixels = self.model.preprocessing.denormalize(images.patches)
        return self.vit.grid.unpatchify(pixels, images.positions), images.labels


def main(argv: list[str] | None = None) -> list[dict]:
    """Run the grid, cell by cell; print and write the means over seeds."""
    args, others = parse_arguments(grid_parser(), argv)
    chosen, output = methods(args), writable_folder(args.output, "--output")
    rows, found, pictures = Rows(output), [], {}
    names = args.models or [DEFAULT_MODEL]
    runs = {}
    for name in names:
        for seed in args.seeds:
            for method in chosen:  # all flags are read before anything is computed
                folder = output / f"{short_name(name)}-{method.name}-s{seed}"
                flags = [*others, "--model", name, "--seed", str(seed), *method.flags, "--output", str(folder)]
                runs[name, seed, method] = test_quant.parser().parse_args(flags)
    for name in names:
        bench = Bench(name, test_quant.parser().parse_args([*others, "--model", name]))
        for seed in args.seeds:
            for method in chosen:
                run = runs[name, seed, method]
                folder = writable_folder(run.output, "--output")
                found += bench.run(method, seed, run, args.bits, rows, folder)
                if seed == args.seeds[0] and method.prior is not None:
                    pictures.setdefault(short_name(name), {})[method.name] = bench.shown(run, folder)
        print(f"{name}: full precision {bench.full_precision(rows):.2f} on {len(bench.data.dataset)} images")
    summary = means(found, ("model", "method", "width"))
    write_results(output, found, summary, "width")
    facts = {"device": device_name(bench.device), "dtype": pick_dtype(run.dtype, bench.device), "versions": versions()}
    write_json(output / "environment.json", facts)
    for number, (short, shown) in enumerate(pictures.items()):
        save_images(output / ("images.png" if number == 0 else f"images-{short}.png"), shown)
    print_table(summary, "width")
    print(f"rows, summary and pictures: {output}")
    return summary


if __name__ == "__main__":
    run_main(main)
