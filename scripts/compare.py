#!/usr/bin/env python3
"""Compare calibration images: quantize one model with each kind, at each width and seed, and tabulate the accuracy.

Finished cells are kept in OUTPUT/rows.jsonl and not computed again; OUTPUT/summary.json has the means over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inversion import ImagePool, InversionConfig
from inversion.arguments import add_inversion_arguments, inversion_config
from models import DEFAULT_MODEL, LoadedModel, SparseViT, load_model
from quant import calibrate, check_bits, evaluate
from test_quant import calibration_images, save_pictures
from utils.cli import Parser, add_common_arguments, natural, positive
from utils.data import limited, load_split, loader
from utils.device import device_name, pick_device, pick_dtype, versions
from utils.errors import run_main
from utils.files import writable_folder, write_json
from utils.pictures import save_side_by_side
from utils.report import duration, table

MODE_OF = {"real": 2, "gaussian": 1, "dense": 0, "smi": 0}


def bits(text: str) -> tuple[int, int]:
    """argparse type: `4/8` -> weights 4 bits, activations 8 bits."""
    try:
        w_bit, a_bit = (int(part) for part in text.upper().replace("W", "").replace("A", "").split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form 4/8") from None
    return w_bit, a_bit


def parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, metavar="NAME", help="as for test_quant.py")
    add("--dataset", metavar="DIR", help="as for test_quant.py")
    add("--model_path", metavar="PATH", help="as for test_quant.py")
    add("--datapool", default="./datapool", metavar="DIR", help="where inverted images are kept")
    add("--calibrations", nargs="+", choices=MODE_OF, default=list(MODE_OF), help="kinds of calibration images")
    add("--bits", nargs="+", type=bits, default=[(8, 8), (4, 8), (4, 4)], metavar="W/A", help="widths in bits")
    add("--seeds", nargs="+", type=natural, default=[0], help="seeds of the calibration images")
    add("--calib-batchsize", type=positive, default=32, help="images per inversion and calibration batch")
    add("--num_images", type=positive, help="calibration images; default one batch")
    add_inversion_arguments(parser)
    add_common_arguments(parser, seed=0, output="./runs/compare")
    parser.set_defaults(prune_it=[50, 100, 200, 300], prune_ratio=[0.3] * 4)
    return parser


def main(argv: list[str] | None = None) -> list[dict]:
    """Run the grid, cell by cell; print and write the means over seeds."""
    args = parser().parse_args(argv)
    for w_bit, a_bit in args.bits:
        check_bits(w_bit, a_bit)
    device = pick_device(args.device, args.gpu)
    dtype = pick_dtype(args.dtype, device)
    output = writable_folder(args.output or "runs/compare", "--output")
    model = load_model(args.model, args.model_path)
    test_set = load_split("test", model.dataset, args.dataset, model.preprocessing.eval_transform(), model.classes)
    data = loader(limited(test_set, args.val_limit), args.val_batchsize, args.num_workers)
    vit = SparseViT(model.vit).to(device)
    rows_file = output / "rows.jsonl"
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()] if rows_file.is_file() else []
    chosen = [find_or_add_fp(rows, rows_file, model, vit, data, device, args)]
    for seed in args.seeds:
        for calibration in args.calibrations:
            args.seed, args.mode = seed, MODE_OF[calibration]
            config = config_of(calibration, args, dtype)
            settings = {
                "model": model.name,
                "source": source_of(model, config, args),
                "calibration": calibration,
                "seed": seed,
                "images": args.num_images or args.calib_batchsize,
                "val_images": len(data.dataset),
            }
            missing = [b for b in args.bits if find(rows, settings, b) is None]
            if missing:
                start = time.perf_counter()
                folder = writable_folder(output / f"{calibration}-s{seed}", "--output")
                images, synthesis = calibration_images(model, config, args, settings["images"], device, folder)
                seconds = synthesis.seconds if args.mode == 0 else time.perf_counter() - start
                save_pictures(model, vit, images, folder)
                models = {f"{w}/{a}": calibrate(vit, images, w, a, batch_size=args.calib_batchsize) for w, a in missing}
                for (w_bit, a_bit), result in zip(missing, evaluate(models, data, device).values(), strict=True):
                    row = {**result, **settings, "w_bit": w_bit, "a_bit": a_bit, "seconds": seconds}
                    add_row(rows, rows_file, row)
            chosen += [find(rows, settings, b) for b in args.bits]
    summary = means(chosen)
    write_json(output / "summary.json", summary)
    write_json(output / "environment.json", {"device": device_name(device), "dtype": dtype, "versions": versions()})
    print_table(summary, len(args.seeds))
    grids = {kind: output / f"{kind}-s{args.seeds[0]}" / "images.png" for kind in args.calibrations}
    save_side_by_side(output / "images.png", {kind: file for kind, file in grids.items() if file.is_file()})
    print(f"rows, summary and pictures: {output}")
    return summary


def config_of(calibration: str, args: argparse.Namespace, dtype: str) -> InversionConfig:
    """The inversion configuration of one kind of images; noise and real images do not use it."""
    schedule = {} if calibration == "smi" else {"prune_it": [-1], "prune_ratio": [0]}
    return inversion_config(argparse.Namespace(**{**vars(args), **schedule}), args.calib_batchsize, dtype)


def source_of(model: LoadedModel, config: InversionConfig, args: argparse.Namespace) -> str:
    """What the images depend on, as one name: the pool's folder, or the model's weights."""
    return ImagePool(args.datapool, model, config).path.name if args.mode == 0 else model.fingerprint()


def find(rows: list[dict], settings: dict, width: tuple[int, int]) -> dict | None:
    """The finished row of a cell, if any."""
    wanted = {**settings, "w_bit": width[0], "a_bit": width[1]}
    return next((row for row in rows if wanted.items() <= row.items()), None)


def find_or_add_fp(rows, rows_file, model, vit, data, device, args) -> dict:
    """The full-precision row."""
    settings = {"model": model.name, "source": model.fingerprint(), "calibration": "none", "seed": None}
    settings["val_images"] = len(data.dataset)
    row = find(rows, settings, (32, 32))
    if row is None:
        row = {**evaluate({"fp": vit}, data, device)["fp"], **settings, "images": 0, "w_bit": 32, "a_bit": 32}
        add_row(rows, rows_file, {**row, "seconds": 0.0})
    return find(rows, settings, (32, 32))


def add_row(rows: list[dict], rows_file: Path, row: dict) -> None:
    """Append a finished cell to the list and the file."""
    rows.append(row)
    with open(rows_file, "a") as file:
        file.write(json.dumps(row) + "\n")


def means(rows: list[dict]) -> list[dict]:
    """One row per kind of images and width: mean and standard deviation of top-1 over seeds, mean seconds."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["calibration"], row["w_bit"], row["a_bit"]), []).append(row)
    summary = []
    for (calibration, w_bit, a_bit), group in groups.items():
        top1 = [row["top1"] for row in group]
        seconds = [row["seconds"] for row in group if row["seconds"] is not None]
        summary.append(
            {
                "calibration": calibration,
                "w_bit": w_bit,
                "a_bit": a_bit,
                "top1": round(statistics.mean(top1), 3),
                "top1_std": round(statistics.stdev(top1), 3) if len(top1) > 1 else None,
                "top1_per_seed": top1,
                "top5": round(statistics.mean(row["top5"] for row in group), 3),
                "seconds": round(statistics.mean(seconds), 2) if seconds else None,
                "images": group[0]["images"],
                "val_images": group[0]["val_images"],
            }
        )
    return summary


def print_table(summary: list[dict], seeds: int) -> None:
    """Kinds of images down, widths across."""
    widths = list(dict.fromkeys((row["w_bit"], row["a_bit"]) for row in summary if row["calibration"] != "none"))
    by_cell = {(row["calibration"], row["w_bit"], row["a_bit"]): row for row in summary}
    full = by_cell[("none", 32, 32)]
    lines = []
    for calibration in dict.fromkeys(row["calibration"] for row in summary if row["calibration"] != "none"):
        cells = [by_cell[(calibration, *width)] for width in widths]
        accuracies = [
            f"{cell['top1']:.2f}" + ("" if cell["top1_std"] is None else f" ± {cell['top1_std']:.2f}") for cell in cells
        ]
        lines.append([calibration, *accuracies, duration(cells[0]["seconds"])])
    spread = f", mean ± standard deviation of {seeds} seeds" if seeds > 1 else ""
    print(f"\ntop-1 in per cent on {full['val_images']} images{spread}; full precision {full['top1']:.2f}")
    print(table(["calibration", *(f"W{w}/A{a}" for w, a in widths), "images made in"], lines))


if __name__ == "__main__":
    run_main(main)
