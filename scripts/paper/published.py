#!/usr/bin/env python3
"""Set what a comparison found beside what papers have published: a table of top-1 for pages, "ours / published".

FOLDER is the output of scripts/compare.py or compare_kt.py. A published figure stands beside the same model, method and
width alone, "-" where there is none; of a model that no paper has, ours stand alone.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.realpath(f"{__file__}/../../.."))

from utils.errors import exit_on_interrupt, run_main

exit_on_interrupt(__name__)

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.config import short_name
from utils.cli import Parser
from utils.errors import UserError
from utils.files import is_number, user_path
from utils.report import accuracy, markdown

NONE = "-"
COLUMNS = {"quant": "width", "kt": "student"}
"""What stands across in a comparison's table, by its task."""
IMAGENET = 50_000
"""Images that papers measure on."""


@dataclass(frozen=True)
class Paper:
    """What a paper calls itself, and where and when it came out."""

    name: str
    where: str

    def __str__(self) -> str:
        return f"{self.name} ({self.where})"


SMI = Paper("SMI", "Hu et al., ICML 2024")
PRI = Paper("PRI", "2025")
PSAQ = Paper("PSAQ-ViT", "ECCV 2022")
SARDFQ = Paper("SARDFQ", "ICCV 2025")
REPQ = Paper("RepQ-ViT", "ICCV 2023")
FDD = Paper("FDD", "year and quantizer not known here")


@dataclass(frozen=True)
class Figures:
    """Top-1 on ImageNet in per cent that a paper gives for a method at a width, by its name of the model."""

    paper: Paper
    method: str
    """As comparisons call it; each paper's baselines, and others' methods as it measured them, are here as well."""
    width: str
    top1: Mapping[str, float]


DEITS = ("DeiT-T", "DeiT-S", "DeiT-B")
ALL = (*DEITS, "ViT-S", "ViT-B", "Swin-S", "Swin-B")


def of(models: Sequence[str], *top1: float) -> dict[str, float]:
    """Top-1 by model."""
    return dict(zip(models, top1, strict=True))


FIGURES = (
    Figures(PSAQ, "psaq-dense", "W8/A8", of(DEITS, 71.56, 76.92, 79.10)),
    Figures(PSAQ, "psaq-dense", "W4/A8", of(DEITS, 65.57, 73.23, 77.05)),
    Figures(FDD, "real", "W8/A8", {"DeiT-B": 78.68}),
    Figures(FDD, "real", "W4/A8", {"DeiT-B": 76.28}),
    Figures(FDD, "gaussian", "W8/A8", {"DeiT-B": 15.7}),
    Figures(FDD, "gaussian", "W4/A8", {"DeiT-B": 12.1}),
    Figures(REPQ, "real", "W6/A6", of(DEITS, 70.76, 78.90, 81.27)),
    Figures(REPQ, "real", "W4/A4", of(DEITS, 57.43, 69.03, 75.61)),
    Figures(SARDFQ, "smi", "W4/A4", of(ALL, 30.14, 42.77, 65.33, 24.33, 35.27, 65.85, 65.23)),
    Figures(SARDFQ, "sardfq-dense", "W4/A4", of(ALL, 52.06, 62.29, 72.17, 50.32, 51.84, 74.74, 76.42)),
)

TABLES = {
    "smi": (SMI, (PSAQ, FDD)),
    "pri": (PRI, (PSAQ, FDD)),
    "sardfq": (SARDFQ, (SARDFQ, REPQ)),
}
"""By the argument PAPER: the paper, and those whose figures were made with quantizers of its comparison's kind."""

MODELS = {
    "DeiT-T": ("deit_tiny_16_imagenet", "deit_tiny_patch16_224", "deit_tiny_patch16_224.fb_in1k"),
    "DeiT-S": ("deit_small_16_imagenet", "deit_small_patch16_224", "deit_small_patch16_224.fb_in1k"),
    "DeiT-B": ("deit_base_16_imagenet", "deit_base_patch16_224", "deit_base_patch16_224.fb_in1k"),
    "ViT-S": ("vit_small_patch16_224", "vit_small_patch16_224.augreg_in21k_ft_in1k"),
    "ViT-B": ("vit_base_patch16_224.augreg_in21k_ft_in1k",),
    "Swin-S": ("swin_small_patch4_window7_224.ms_in1k",),
    "Swin-B": ("swin_base_patch4_window7_224", "swin_base_patch4_window7_224.ms_in22k_ft_in1k"),
    "DeiT-T, CIFAR-10": ("deit_tiny_16_cifar10",),
    "DeiT-B, CIFAR-10": ("deit_base_16_cifar10",),
    "DeiT-T, CIFAR-100": ("deit_tiny_16_cifar100",),
    "DeiT-B, CIFAR-100": ("deit_base_16_cifar100",),
}
"""What papers call models, and what they are called here; timm's plain name only where it means the same weights."""
THEIRS = {ours: theirs for theirs, names in MODELS.items() for ours in names}


def published(papers: Sequence[Paper], model: str | None, method: str, width: str) -> Figures | None:
    """The figures of these papers that have one for a model (as they call it), a method and a width."""
    asked = (method, width)
    fits = (one for one in FIGURES if one.paper in papers and (one.method, one.width) == asked and model in one.top1)
    return next(fits, None)


def comparison_rows(folder: Path) -> list[dict]:
    """The rows of methods in `folder/summary.json`.

    Raises:
        UserError: the file is missing, damaged or something else.
    """
    file = folder / "summary.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; is that the output of a comparison?") from None
    except (ValueError, RecursionError):
        raise UserError(f"cannot read {file}: it is no JSON") from None
    rows = [row for row in found if not isinstance(row, dict) or "method" in row] if isinstance(found, list) else []
    if not rows:
        raise UserError(f"{file} is not of a comparison: it holds no list of methods")
    for number, row in enumerate(rows, start=1):
        if not _is_row(row):
            raise UserError(f"{file} is damaged: method {number} lacks its task, model, column or top-1")
    return rows


def _is_row(row: object) -> bool:
    """Whether this is a comparison's row, as far as it is read here."""
    if not isinstance(row, dict) or row.get("task") not in tuple(COLUMNS):
        return False
    texts = all(isinstance(row.get(name), str) for name in ("model", "method", COLUMNS[row["task"]]))
    spread = row.get("top1_std", NONE)
    numbers = is_number(row.get("top1"), float) and (spread is None or is_number(spread, float))
    return texts and numbers and is_number(row.get("val_images", IMAGENET), int)


def side_by_side(rows: Sequence[dict], papers: Sequence[Paper]) -> str:
    """Rows of `comparison_rows`, methods down, models and widths across, with what these papers have published."""
    cells = {(row["method"], row["model"], row[COLUMNS[row["task"]]]): row for row in rows}
    columns = list(dict.fromkeys(key[1:] for key in cells))
    header = ["images", *(f"{THEIRS.get(model, short_name(model))}, {width}" for model, width in columns)]
    lines = []
    for method in dict.fromkeys(key[0] for key in cells):
        figures = [published(papers, THEIRS.get(model), method, width) for model, width in columns]
        ours = [accuracy(cells.get((method, *column))) or NONE for column in columns]
        beside = [cell(*parts) for parts in zip(ours, (model for model, _ in columns), figures, strict=True)]
        sources = dict.fromkeys(str(one.paper) for one in figures if one is not None)
        lines.append([method, *beside, ", ".join(sources) or NONE])
    if not any(model in THEIRS for model, _ in columns):
        return markdown(header, [line[:-1] for line in lines])
    return markdown([*header, "published by"], lines)


def cell(ours: str, model: str, figures: Figures | None) -> str:
    """`ours / published` of a model that papers have, ours alone of any other."""
    if model not in THEIRS:
        return ours
    return f"{ours} / {NONE if figures is None else f'{figures.top1[THEIRS[model]]:.2f}'}"


def remarks(rows: Sequence[dict], papers: Sequence[Paper]) -> list[str]:
    """What is to be known of their table besides, a line each."""
    found = []
    alone = list(dict.fromkeys(short_name(row["model"]) for row in rows if row["model"] not in THEIRS))
    if alone:
        found.append(f"Ours alone: the published figures are not of {', '.join(alone)}.")
    theirs = [row for row in rows if row["model"] in THEIRS]
    have = [published(papers, THEIRS[row["model"]], row["method"], row[COLUMNS[row["task"]]]) for row in theirs]
    if theirs and not any(have):
        found.append("For none of these is a published figure at hand.")
    counts = {row["val_images"] for row in theirs if "val_images" in row} - {IMAGENET}
    if counts:
        found.append(f"Ours are of {', '.join(map(str, sorted(counts)))} test images, published ones of {IMAGENET}.")
    return found


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = Parser(__doc__)
    parser.add_argument("paper", metavar="PAPER", choices=TABLES, help=f"whose comparison it is: {', '.join(TABLES)}")
    parser.add_argument("folder", metavar="FOLDER", help="output of the comparison")
    args = parser.parse_args(argv)
    paper, papers = TABLES[args.paper]
    rows = comparison_rows(user_path(args.folder, "FOLDER"))
    what = "ours / published" if THEIRS.keys() & {row["model"] for row in rows} else "ours"
    print(f"{paper}, top-1 in per cent, {what}\n\n{side_by_side(rows, papers)}")
    for remark in remarks(rows, papers):
        print(f"\n{remark}")


if __name__ == "__main__":
    run_main(main)
