"""Grids of runs: what is compared, finished cells on disk, means over seeds, and their tables and pictures."""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from inversion.priors import PRIORS
from inversion.strategies import STRATEGIES
from utils.cli import natural
from utils.errors import UserError
from utils.files import append_json_line, atomic, read_json_lines, write_json
from utils.pictures import save_figure
from utils.report import duration, table

BASELINES = {"real": 2, "gaussian": 1}
UNSCHEDULED = ("dense", "pri")


@dataclass(frozen=True)
class Method:
    """One kind of images: a baseline, or a prior with a strategy; `flags` ask test_quant.py or test_kt.py for it."""

    prior: str | None
    strategy: str
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        """The strategy alone for the default prior."""
        return self.strategy if self.prior in (None, "deepinversion") else f"{self.prior}-{self.strategy}"


def add_grid_arguments(parser: argparse.ArgumentParser, seed: int) -> None:
    """What a grid runs over."""
    add = parser.add_argument
    add("--models", nargs="+", metavar="NAME", help="models, as for --model; default the bundled one")
    add("--baselines", nargs="*", choices=BASELINES, default=list(BASELINES), help="images that are not inverted")
    add("--priors", nargs="*", choices=PRIORS, default=["deepinversion"], help="priors, each with every strategy")
    add("--strategies", nargs="*", choices=STRATEGIES, default=["dense", "smi"], help="strategies")
    add(
        "--prune_it",
        nargs="+",
        metavar="T",
        default=["50", "100", "200", "300"],
        help="schedule of those that have one",
    )
    add("--prune_ratio", nargs="+", metavar="R", default=["0.3"] * 4, help="shares stopped on that schedule")
    add("--seeds", nargs="+", type=natural, default=[seed], help="seeds; the table has their mean")
    add(
        "--with",
        dest="extra",
        nargs=2,
        action="append",
        metavar=("NAME", "FLAGS"),
        default=[],
        help='further flags of one prior or strategy, such as --with psaq "--tvt 0.01"',
    )


def short_name(model: str) -> str:
    """A model's name without the path or the hub that it comes from."""
    return model.rstrip("/").split("/")[-1]


def methods(args: argparse.Namespace) -> list[Method]:
    """What `add_grid_arguments` asks for. Raises `UserError` where flags name something that is not compared."""
    extra = {name: further_flags(f"--with {name}", flags) for name, flags in args.extra}
    unknown = extra.keys() - {*args.priors, *args.strategies}
    if unknown:
        raise UserError(f"--with {sorted(unknown)[0]}: that is neither among --priors nor among --strategies")
    found = [Method(None, name, ("--mode", str(BASELINES[name]))) for name in args.baselines]
    for prior in args.priors:
        for strategy in args.strategies:
            schedule = ["--prune_it", *args.prune_it, "--prune_ratio", *args.prune_ratio]
            flags = ["--mode", "0", "--prior", prior, "--strategy", strategy]
            flags += [] if strategy in UNSCHEDULED else schedule
            found.append(Method(prior, strategy, (*flags, *extra.get(prior, []), *extra.get(strategy, []))))
    if not found:
        raise UserError("nothing to compare: give --baselines, or --priors and --strategies")
    return found


def further_flags(flag: str, text: str) -> list[str]:
    """What stands in quotes behind `flag`, split as a shell does. Raises `UserError` where that cannot be."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{flag}: {error}: {text}") from None


def refuse_flags(flags: Sequence[str], refused: Iterable[str], why: str) -> None:
    """Raise `UserError` where one of `refused` is among `flags`."""
    given = {flag.partition("=")[0].replace("-", "_").replace("__", "--", 1) for flag in flags}
    for flag in sorted(given & set(refused)):
        raise UserError(f"{flag} {why}")


class Rows:
    """Finished cells, one JSON object a line in `OUTPUT/rows.jsonl`; a cell is the configuration that it came from."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "rows.jsonl"
        self.rows = read_json_lines(self.file)

    def find(self, cell: Mapping[str, object]) -> dict | None:
        """The row of a cell, if it is finished."""
        wanted = json.loads(json.dumps(cell))
        return next((row for row in self.rows if row["cell"] == wanted), None)

    def add(self, cell: Mapping[str, object], row: Mapping[str, object]) -> dict:
        """Keep a finished cell."""
        self.rows.append({**row, "cell": json.loads(json.dumps(cell))})
        append_json_line(self.file, self.rows[-1])
        return self.rows[-1]


def means(rows: Sequence[dict], group_by: Sequence[str]) -> list[dict]:
    """One row per group, in order of appearance: means over seeds, and the standard deviation of top-1."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in group_by), []).append(row)
    return [_mean(group) for group in groups.values()]


def _mean(group: list[dict]) -> dict:
    top1 = [row["top1"] for row in group]
    mean = {key: value for key, value in group[0].items() if key not in ("cell", "seed", "per_seed")}
    for key, value in mean.items():
        values = [row[key] for row in group]
        if isinstance(value, float):
            mean[key] = None if None in values else round(statistics.mean(values), 4)
    spread = round(statistics.stdev(top1), 3) if len(top1) > 1 else None
    return {**mean, "top1": round(statistics.mean(top1), 3), "top1_std": spread, "top1_per_seed": top1}


def costs(report: Mapping[str, object], images: int) -> dict[str, object]:
    """What `images` images cost, from a `SynthesisReport` as a dict, per image where that makes sense."""
    seconds, flops = report["seconds"], report["flops"]
    per_image = max(report["images"], 1)
    return {
        "images": images,
        "synthesis_seconds": seconds,
        "images_per_second": round(per_image / seconds, 4) if seconds else None,
        "gflop_per_image": round(flops / per_image / 1e9, 3) if flops else None,
        "peak_memory_mb": round(report["peak_memory_bytes"] / 2**20, 1) if flops else None,
    }


def accuracy(row: Mapping[str, object]) -> str:
    """`93.1 ± 0.2`, or without the spread where there is one seed."""
    return f"{row['top1']:.2f}" + ("" if row["top1_std"] is None else f" ± {row['top1_std']:.2f}")


def print_table(summary: Sequence[dict], column: str) -> None:
    """Methods down, the values of `column` across, then the cost of their images; a table for each model."""
    for model in dict.fromkeys(row["model"] for row in summary):
        mine = [row for row in summary if row["model"] == model]
        columns = list(dict.fromkeys(row[column] for row in mine))
        cells = {(row["method"], row[column]): row for row in mine}
        lines = []
        for method in dict.fromkeys(row["method"] for row in mine):
            found = [cells.get((method, value)) for value in columns]
            cost = next(row for row in found if row is not None)
            shown = ("images", "images_per_second", "gflop_per_image", "peak_memory_mb")
            lines.append(
                [
                    method,
                    *("-" if row is None else accuracy(row) for row in found),
                    duration(cost["synthesis_seconds"]),
                    *("-" if cost[key] is None else f"{cost[key]:g}" for key in shown),
                ]
            )
        print(f"\n{model}, top-1 in per cent")
        print(table(["images", *map(str, columns), "made in", "number", "images/s", "GFLOP/image", "peak MB"], lines))


def write_results(output: Path, rows: Sequence[dict], summary: Sequence[dict], column: str) -> None:
    """`results.csv` (a line a cell), `summary.json` (means) and `accuracy.png`."""
    flat = [{key: value for key, value in row.items() if key != "cell"} for row in rows]
    names = list(dict.fromkeys(key for row in flat for key in row))
    with atomic(output / "results.csv") as partial, open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(flat)
    write_json(output / "summary.json", list(summary))
    save_accuracy(output / "accuracy.png", summary, column)


def save_accuracy(path: Path, summary: Sequence[dict], column: str) -> None:
    """Top-1 against seconds of synthesis, a panel for each model and value of `column`; baselines are lines."""
    panels = list(dict.fromkeys((row["model"], row[column]) for row in summary))
    figure = Figure(figsize=(4.6 * len(panels) + 1, 4), layout="constrained")
    strategies = list(dict.fromkeys(row["strategy"] for row in summary if row["prior"]))
    priors = list(dict.fromkeys(row["prior"] for row in summary if row["prior"]))
    for number, (model, value) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        for row in (row for row in summary if (row["model"], row[column]) == (model, value)):
            if row["prior"] is None:
                style = {"real": "-", "gaussian": ":"}[row["method"]]
                axes.axhline(row["top1"], color="0.4", linestyle=style, linewidth=1, label=row["method"])
            elif row["synthesis_seconds"]:
                axes.errorbar(
                    row["synthesis_seconds"],
                    row["top1"],
                    yerr=row["top1_std"] or None,
                    marker="osD^vP"[strategies.index(row["strategy"]) % 6],
                    color=f"C{priors.index(row['prior'])}",
                    capsize=3,
                    linestyle="none",
                    label=row["method"],
                )
        axes.set(xlabel="seconds of synthesis", ylabel="top-1, %", xscale="log")
        axes.set_title(f"{short_name(model)}, {value}", fontsize="medium")
    entries = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside right center", fontsize="x-small")
    save_figure(path, figure)


def save_images(path: Path, shown: Mapping[str, tuple[Tensor, Tensor]], columns: int = 10) -> None:
    """A row of images for each method, every column one label.

    Args:
        path: the PNG.
        shown: for each method images (B, 3, H, W) in [0, 1] and their labels (B,).
        columns: at most so many labels, those that the most methods have.
    """
    counts = torch.zeros(1 + max(int(labels.max()) for _, labels in shown.values()), dtype=torch.long)
    for _, labels in shown.values():
        counts[labels.unique()] += 1
    chosen = counts.argsort(descending=True, stable=True)[:columns]
    chosen = chosen[counts[chosen] > 0].sort().values.tolist()
    figure = Figure(figsize=(1.2 + len(chosen), 0.3 + len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), len(chosen), squeeze=False)
    for row, (name, (images, labels)) in enumerate(shown.items()):
        for axes, label in zip(grid[row], chosen, strict=True):
            axes.set(xticks=[], yticks=[], frame_on=False)
            found = (labels == label).nonzero().flatten()
            if len(found):
                axes.imshow(images[found[0]].permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            if row == 0:
                axes.set_title(str(label), fontsize="small")
        grid[row][0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize="small")
    save_figure(path, figure)
