"""Grids of runs: what is compared, finished cells on disk, means over seeds, and their tables and pictures."""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import shlex
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inversion import PRESETS, PRIORS, STRATEGIES, InversionConfig
from models import DEFAULT_MODEL
from models.config import short_name
from utils.cli import Parser, any_seed
from utils.errors import UserError
from utils.files import append_json_line, atomic, is_number, read_json_lines, write_json
from utils.lazy import torch
from utils.report import accuracy, by_method, duration, table

if TYPE_CHECKING:
    from torch import Tensor

    from inversion import SynthesisReport
    from models import LoadedModel, SparseImages

BASELINES = {"real": 2, "gaussian": 1}
UNSCHEDULED = ("dense", "pri")
SCHEDULE = {"prune_it": [50, 100, 200, 300], "prune_ratio": [0.3] * 4}
"""Of strategies that have a schedule, where neither flags nor a preset give one."""
STOPS = 0.1, 0.2, 0.3, 0.4
"""Shares of the iterations after which patches stop instead, in a run that is too short for it."""
VARIES = "is what this script varies; see --help"
# Flags of the tasks that a grid has no place for, and why.
REFUSED = dict.fromkeys(("--model", "--mode", "--images", "--seed", "--prior", "--strategy", "--output"), VARIES)


@dataclass(frozen=True)
class Method:
    """One kind of images: a baseline, or a prior with a strategy."""

    prior: str | None
    strategy: str

    @property
    def name(self) -> str:
        """The strategy alone for the default prior."""
        return self.strategy if self.prior in (None, "deepinversion") else f"{self.prior}-{self.strategy}"


def grid_parser(about: str, task: str, seed: int, output: str) -> Parser:
    """A parser of the flags that name methods, seeds and models; `task` is the script that all others are for."""
    parser = Parser(f"{about} Every other flag goes to {task}.")
    add = parser.add_argument
    add("--models", nargs="+", metavar="NAME", default=[DEFAULT_MODEL], help="models, as for --model")
    add("--baselines", nargs="*", choices=BASELINES, default=list(BASELINES), help="images that are not inverted")
    add("--priors", nargs="*", choices=PRIORS, help="priors, each with every strategy; default deepinversion")
    add("--strategies", nargs="*", choices=STRATEGIES, help="strategies; default dense smi")
    pairs = "instead of both: these alone, PRIOR-STRATEGY, or STRATEGY for the prior deepinversion, as psaq-dense smi"
    add("--methods", nargs="*", metavar="NAME", help=pairs)
    about = "schedule of strategies that have one, iterations; default a preset's, else 50 100 200 300"
    add("--prune_it", type=int, nargs="+", metavar="T", help=about)
    about = "shares stopped on it; default a preset's, else 0.3 0.3 0.3 0.3"
    add("--prune_ratio", type=float, nargs="+", metavar="R", help=about)
    add("--seeds", nargs="+", type=any_seed, default=[seed], help="seeds; the table has their mean")
    add(
        "--with",
        dest="extra",
        nargs=2,
        action="append",
        metavar=("NAME", "FLAGS"),
        default=[],
        help='further flags of one prior or strategy, such as --with psaq "--preset psaq_vit"; may be given again',
    )
    add("--output", metavar="DIR", default=output, help="where everything goes")
    return parser


def variants(
    args: argparse.Namespace, others: Sequence[str], parser: Parser, refused: Mapping[str, str]
) -> Iterator[tuple[Method, argparse.Namespace]]:
    """Every method for every model and seed of a `grid_parser`, with what `parser` gives for it.

    Prior and strategy are those that a method is named for, whatever a preset says, but for the priors that a preset
    adds to the one whose `--with` asks for it. All other flags win over a preset, those of `--with` over the common
    ones, those of a strategy over those of a prior.

    Args:
        args: what the `grid_parser` gave.
        others: flags of the task, the same for all.
        parser: the task's.
        refused: flags that no method may be given, and why.

    Raises:
        UserError: a flag that is not to be had, or names something that is not compared.
    """
    extra: dict[str, list[str]] = {}
    for name, flags in args.extra:
        extra.setdefault(name, []).extend(further_flags(f"--with {name}", flags))
    inverted = inverted_methods(args.methods, args.priors, args.strategies)
    unknown = extra.keys() - {name for method in inverted for name in (method.prior, method.strategy)}
    if unknown:
        raise UserError(f"--with {sorted(unknown)[0]}: no prior and no strategy that is compared is called so")
    for flags in (others, *extra.values()):
        refuse_flags(flags, refused)
    methods = [*(Method(None, name) for name in args.baselines), *inverted]
    if not methods:
        raise UserError("nothing to compare: give --baselines, --methods, or --priors and --strategies")
    common = vars(parser.parse_args(others)) | {"command": args.command}
    for model, seed, method in itertools.product(args.models, args.seeds, methods):
        chosen = argparse.Namespace(**common | {"model": model, "seed": seed})
        if method.prior is None:
            chosen.mode = BASELINES[method.strategy]
        else:
            of_prior, of_strategy = extra.get(method.prior, []), extra.get(method.strategy, [])
            chosen.prior, chosen.strategy = priors_of(method, parser.parse_args(of_prior).preset), method.strategy
            parser.parse_args([*of_prior, *of_strategy], chosen)
            of_preset = PRESETS.get(chosen.preset, {})
            iterations = chosen.iterations or of_preset.get("iterations", InversionConfig.iterations)
            for name, value in schedule_of(method, chosen.preset, iterations, args.prune_it, args.prune_ratio).items():
                if getattr(chosen, name) is None:
                    setattr(chosen, name, value)
        yield method, chosen


def inverted_methods(
    names: Sequence[str] | None, priors: Sequence[str] | None, strategies: Sequence[str] | None
) -> list[Method]:
    """The methods of these names, or every prior with every strategy; None: not given.

    Raises:
        UserError: an unknown name, or names beside priors or strategies.
    """
    if names is None:
        priors = ["deepinversion"] if priors is None else priors
        return crossed(priors, ["dense", "smi"] if strategies is None else strategies)
    for flag, given in (("--priors", priors), ("--strategies", strategies)):
        if given is not None:
            raise UserError(f"--methods says what is compared, and so does {flag}; leave one of them out")
    known = {method.name: method for method in crossed(PRIORS, STRATEGIES)}
    for name in names:
        if name not in known:
            raise UserError(
                f"--methods {name} is unknown; there are {', '.join(STRATEGIES)} for the prior deepinversion, "
                f"and PRIOR-STRATEGY for {', '.join(prior for prior in PRIORS if prior != 'deepinversion')}"
            )
    return [known[name] for name in dict.fromkeys(names)]


def crossed(priors: Iterable[str], strategies: Iterable[str]) -> list[Method]:
    """Every prior with every strategy."""
    return [Method(prior, strategy) for prior, strategy in itertools.product(priors, strategies)]


def priors_of(method: Method, preset: str | None) -> list[str]:
    """What its images are asked to be: its prior, with those that this preset of the prior's has beside it."""
    beside = PRESETS.get(preset, {}).get("prior", [])
    return list(beside) if method.prior in beside else [method.prior]


def schedule_of(
    method: Method, preset: str | None, iterations: int, prune_it: list[int] | None, prune_ratio: list[float] | None
) -> dict[str, list]:
    """`prune_it` and `prune_ratio` of a method: those given, else those that are not left to its preset."""
    if method.strategy in UNSCHEDULED:
        return {}
    found = {"prune_it": prune_it, "prune_ratio": prune_ratio}
    given = {name: value for name, value in found.items() if value is not None}
    of_preset = PRESETS.get(preset, {})
    left = "prune_it" in of_preset or of_preset.get("strategy") == method.strategy
    if left and prune_it is None:
        return given
    return (SCHEDULE if iterations > SCHEDULE["prune_it"][-1] else short_schedule(iterations)) | given


def short_schedule(iterations: int) -> dict[str, list]:
    """The ratios of `SCHEDULE` after `STOPS` of the iterations."""
    starts = [0]
    for share in STOPS:
        starts.append(max(round(share * iterations), starts[-1] + 1))
    return SCHEDULE | {"prune_it": starts[1:]}


def further_flags(flag: str, text: str) -> list[str]:
    """What stands in quotes behind `flag`, split as a shell does. Raises `UserError` where that cannot be."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{flag}: {error}: {text}") from None


def refuse_flags(flags: Sequence[str], refused: Mapping[str, str]) -> None:
    """Raise `UserError` where one of `refused` is among `flags`; the values say why."""
    given = {flag.partition("=")[0].replace("-", "_").replace("__", "--", 1) for flag in flags}
    for flag in sorted(given & refused.keys()):
        raise UserError(f"{flag} {refused[flag]}")


class Rows:
    """Finished cells, one JSON object a line in `OUTPUT/rows.jsonl`; a cell is the configuration that it came from.

    Raises `UserError` where the file holds something else.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "rows.jsonl"
        self.rows = read_json_lines(self.file, cell=dict)

    def find(self, cell: Mapping[str, object], columns: Mapping[str, Any] | None = None) -> dict | None:
        """The row of a cell, if it is finished. Raises `UserError` where it lacks `columns` of these types."""
        wanted = json.loads(json.dumps(cell))
        number, row = next((found for found in enumerate(self.rows, 1) if found[1]["cell"] == wanted), (0, None))
        for name, kind in (columns or {}).items() if row is not None else ():
            if not _fits(row.get(name, ...), kind):
                raise UserError(f"{self.file} is damaged: row {number} has no {name} that can be; remove the row")
        return row

    def add(self, cell: Mapping[str, object], row: Mapping[str, object]) -> dict:
        """Keep a finished cell."""
        self.rows.append({**row, "cell": json.loads(json.dumps(cell))})
        append_json_line(self.file, self.rows[-1])
        return self.rows[-1]


def _fits(value: object, kind: Any) -> bool:
    """Whether a value of JSON is of a type, or of one of a union; floats are finite, and may be integers."""
    number = isinstance(value, int | float) and isinstance(0.0, kind)
    return is_number(value, float) if number else isinstance(value, kind)


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
        values = [row.get(key) for row in group]
        if isinstance(value, float):
            mean[key] = None if None in values else round(statistics.mean(values), 4)
    spread = round(statistics.stdev(top1), 3) if len(top1) > 1 else None
    return {**mean, "top1": round(statistics.mean(top1), 3), "top1_std": spread, "top1_per_seed": top1}


def costs(cost: SynthesisReport, images: int) -> dict[str, object]:
    """What `images` images cost, per image where that makes sense."""
    per_image = max(cost.images, 1)
    return {
        "images": images,
        "synthesis_seconds": cost.seconds,
        "images_per_second": round(per_image / cost.seconds, 4) if cost.seconds else None,
        "gflop_per_image": round(cost.flops / per_image / 1e9, 3) if cost.flops else None,
        "peak_memory_mb": round(cost.peak_memory_bytes / 2**20, 1) if cost.flops else None,
    }


def shown_images(model: LoadedModel, images: SparseImages) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) in [0, 1] as pictures have them, and their labels (B,)."""
    from utils.pictures import in_colours

    images = images.shown()
    pixels = model.preprocessing.denormalize(images.patches).clamp(0, 1)
    return in_colours(model.grid.unpatchify(pixels, images.positions)), images.labels


def print_table(summary: Sequence[dict], column: str) -> None:
    """Methods down, the values of `column` across, then the cost of their images; a table for each model."""
    for model in dict.fromkeys(row["model"] for row in summary):
        values, methods = by_method([row for row in summary if row["model"] == model], column)
        lines = []
        for method, found in methods.items():
            cost = next(filter(None, found))
            shown = ("images", "images_per_second", "gflop_per_image", "peak_memory_mb")
            numbers = ("-" if cost[key] is None else f"{cost[key]:g}" for key in shown)
            made_in = duration(cost["synthesis_seconds"])
            lines.append([method, *(accuracy(row) or "-" for row in found), made_in, *numbers])
        print(f"\n{model}, top-1 in per cent")
        print(table(["images", *map(str, values), "made in", "number", "images/s", "GFLOP/image", "peak MB"], lines))


def write_results(
    output: Path,
    title: str,
    rows: Sequence[dict],
    summary: Sequence[dict],
    column: str,
    pictures: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]],
    facts: Mapping[str, object],
) -> None:
    """What a comparison leaves in its folder.

    `results.csv` (a line a cell), `summary.json` (means), `accuracy.png`, `images.png` for the first model of
    `pictures` and `images-MODEL.png` for others (see `save_images`), `environment.json` (`facts`) and `report.html`.
    """
    from utils.report_page import write_comparison_page

    flat = [{key: value for key, value in row.items() if key != "cell"} for row in rows]
    names = list(dict.fromkeys(key for row in flat for key in row))
    with atomic(output / "results.csv") as partial, open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(flat)
    write_json(output / "summary.json", list(summary))
    save_accuracy(output / "accuracy.png", summary, column)
    for number, (model, shown) in enumerate(pictures.items()):
        save_images(output / ("images.png" if number == 0 else f"images-{short_name(model)}.png"), shown)
    write_json(output / "environment.json", facts)
    write_comparison_page(output, title, summary, column, facts)


def save_accuracy(path: Path, summary: Sequence[dict], column: str) -> None:
    """Top-1 against seconds of synthesis, a panel for each model and value of `column`; baselines are lines."""
    from matplotlib.figure import Figure

    from utils.pictures import save_figure

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
    from matplotlib.figure import Figure

    from utils.pictures import save_figure

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
