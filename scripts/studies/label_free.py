#!/usr/bin/env python3
"""Can accuracy be foretold without labels: what `--check_images` says of quantized models against what they lose.

Every method's images at every width with every observer. Finished cells are kept in OUTPUT/rows.jsonl, so that models
with other data can be added to it by further runs. OUTPUT gets label_free.json and label_free.png, of all cells there.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.realpath(f"{__file__}/../../.."))

from utils.errors import exit_on_interrupt, run_main

exit_on_interrupt(__name__)

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from matplotlib.figure import Figure
from scipy.stats import spearmanr
from sklearn.isotonic import IsotonicRegression
from torch.utils.data import Subset

from models import SparseViT
from models.registry import short_name
from quant import OBSERVERS, quantize
from quant.fidelity import Fidelity, fidelity
from scripts.compare import Bench, Cell, cells_of, quant_grid_parser
from scripts.comparison import Rows
from utils.data import loader
from utils.evaluation import evaluate
from utils.files import writable_folder, write_json
from utils.images import calibration_images
from utils.pictures import save_figure
from utils.quant_task import CHECK, SMOOTH, SUSPECT, check_source
from utils.report import table


def with_observers(cells: Sequence[Cell], observers: Sequence[str]) -> list[Cell]:
    """Every cell with every observer."""
    return [
        replace(cell, task=replace(cell.task, quantization=replace(cell.task.quantization, observer=observer)))
        for cell, observer in itertools.product(cells, observers)
    ]


def add_rows(bench: Bench, cells: Sequence[Cell], rows: Rows, check: Mapping[str, object]) -> None:
    """What each cell of one model loses, and what `check` finds; those of one method are evaluated in one pass."""
    source = check_source(bench.model, cells[0].task, bench.device)
    seen = calibration_images(bench.model, source, source.config.batch_size, device=bench.device)
    for (seed, method), group in itertools.groupby(cells, key=lambda cell: (cell.task.run.seed, cell.method)):
        group = list(group)
        keys = [cell.task.settings() | bench.facts for cell in group]
        unmeasured = [i for i, key in enumerate(keys) if rows.find(key) is None]
        unchecked = [i for i, key in enumerate(keys) if rows.find(key | {"check": check}) is None]
        if not unmeasured and not unchecked:
            continue
        print(f"== {bench.model.name}, {method.name}, seed {seed}, {len(group)} models", flush=True)
        images, _ = bench.images(group[0].task)
        models = {i: quantize(bench.vit, images, group[i].task.quantization) for i in {*unmeasured, *unchecked}}
        for i in unchecked:
            rows.add(keys[i] | {"check": check}, asdict(fidelity(bench.vit, models[i], seen)))
        top1 = top1_of_halves(bench, {i: models[i] for i in unmeasured} | {"full": bench.vit}) if unmeasured else {}
        for i in unmeasured:
            what = {"model": short_name(bench.model.name), "images": method.name, "seed": seed, "width": group[i].width}
            drops = [whole - half for whole, half in zip(top1["full"], top1[i], strict=True)]
            what |= {"observer": group[i].task.quantization.observer}
            rows.add(keys[i], what | {"drop": statistics.fmean(drops), "drops_of_halves": drops})


def joined(rows: Rows, check: Mapping[str, object]) -> list[dict]:
    """What every cell on disk loses, beside what `check` found."""
    checked = [row for row in rows.rows if row["cell"].get("check") == check]
    cells = [{key: value for key, value in row["cell"].items() if key != "check"} for row in checked]
    return [rows.find(cell) | row for cell, row in zip(cells, checked, strict=True)]


def top1_of_halves(bench: Bench, models: Mapping[object, SparseViT]) -> dict[object, list[float]]:
    """Top-1 on either half of the test images: what one half says of the other is the most that can be foretold."""
    images = bench.data.dataset
    halves = [Subset(images, range(start, len(images) // 2 * 2, 2)) for start in (0, 1)]
    size = bench.model.preprocessing.input_size
    loaders = [loader(half, bench.data.batch_size, bench.data.num_workers, size) for half in halves]
    found = [evaluate(models, half, bench.device) for half in loaders]
    return {name: [half[name]["top1"] for half in found] for name in models}


def summary(rows: Sequence[dict]) -> list[dict]:
    """Rank correlations with the true loss and between the halves, how far off the predicted loss is, and the alarm.

    All in points of top-1: `off` of the prediction that a run gives, `of others` of a rising curve fitted to the other
    models alone; `unsuspected` and `suspected` are the most and the least that models lost without and with an alarm.
    """
    names = list(dict.fromkeys(row["model"] for row in rows))
    groups = {name: [row for row in rows if row["model"] == name] for name in names} | {"all": list(rows)}
    found = []
    for name, group in groups.items():
        drops = [row["drop"] for row in group]
        off = sorted(abs(predicted(row) - row["drop"]) for row in group)
        others = [row for row in rows if row["model"] != name] if name != "all" else []
        silent = [row["drop"] for row in group if row["lost_confidence"] < SUSPECT]
        alarmed = [row["drop"] for row in group if row["lost_confidence"] >= SUSPECT]
        figures = {
            **{key: spearmanr(drops, [row[key] for row in group])[0] for key in ("lost_confidence", "divergence")},
            "agreement": spearmanr(drops, [-row["agreement"] for row in group])[0],
            "halves": spearmanr(*zip(*(row["drops_of_halves"] for row in group), strict=True))[0],
            "off, median": statistics.median(off),
            "90%": off[math.ceil(0.9 * len(off)) - 1],
            "most": off[-1],
            "of others, most": max(transferred(others, group)) if others else math.nan,
            "unsuspected": max(silent, default=math.nan),
            "suspected": min(alarmed, default=math.nan),
        }
        found.append({"model": name, "rows": len(group), **{key: round(float(v), 3) for key, v in figures.items()}})
    return found


def transferred(known: Sequence[dict], rows: Sequence[dict]) -> list[float]:
    """How far off each of `rows` is by the best rising curve through `known`, in points."""
    curve = IsotonicRegression(out_of_bounds="clip")
    curve.fit([row["lost_confidence"] for row in known], [row["drop"] for row in known])
    guesses = curve.predict([row["lost_confidence"] for row in rows])
    return [abs(guess - row["drop"]) for guess, row in zip(guesses, rows, strict=True)]


def predicted(row: Mapping[str, float]) -> float:
    """The loss of top-1 that a run foretells, in points."""
    return Fidelity(row["agreement"], row["divergence"], row["lost_confidence"]).predicted_drop


def save_picture(path: Path, rows: Sequence[dict]) -> None:
    """The lost confidence against the true loss, and what is predicted."""
    figure = Figure(figsize=(6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    names, observers = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "observer"))
    for (mark, name), (color, observer) in itertools.product(zip("ox^s", names, strict=False), enumerate(observers)):
        mine = [row for row in rows if (row["model"], row["observer"]) == (name, observer)]
        places = [row["lost_confidence"] for row in mine], [row["drop"] for row in mine]
        axes.scatter(*places, marker=mark, s=18, color=f"C{color}", label=f"{name}, {observer}", linewidth=0.8)
    line = [share / 1000 for share in range(1, 1001)]
    foretold = [Fidelity(0, 0, share).predicted_drop for share in line]
    axes.axvline(SUSPECT, color="0.8", linewidth=1)
    axes.plot(line, foretold, color="0.5", linewidth=1, label="foretold")
    axes.set(xlabel="lost confidence without labels", ylabel="top-1 lost, points", xscale="log")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(-1.2, 130)
    axes.legend(fontsize=7)
    save_figure(path, figure)


def main(argv: list[str] | None = None) -> list[dict]:
    """Measure every cell; print and write the correlations."""
    parser = quant_grid_parser(__doc__, "./runs/label_free")
    parser.add_argument("--observers", nargs="+", choices=OBSERVERS, default=list(OBSERVERS), help="observers")
    args, others = parser.parse_known_args(argv)
    cells = with_observers(cells_of(args, others), args.observers)
    output = writable_folder(args.output, "--output")
    rows, check = Rows(output), {"check_images": cells[0].task.check_images, **CHECK, "smooth": SMOOTH}
    for _, of_model in itertools.groupby(cells, key=lambda cell: cell.task.model):
        of_model = list(of_model)
        add_rows(Bench(of_model[0].task), of_model, rows, check)
    found = joined(rows, check)
    lines = summary(found)
    write_json(output / "label_free.json", {"summary": lines, "rows": found})
    save_picture(output / "label_free.png", found)
    print(table(list(lines[0]), [list(line.values()) for line in lines]))
    print(f"rows and picture: {output}")
    return lines


if __name__ == "__main__":
    run_main(main)
