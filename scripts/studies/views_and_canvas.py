#!/usr/bin/env python3
"""What views and canvases are worth: every pair of them, strategy and length, on one model, judged and used.

A table of what judges that never saw the teacher name, of the Fréchet distance and of a linear head (the figures of
image_quality.py), of seconds, and of the accuracy of models that were calibrated with the images. Pools and finished
figures are kept; OUTPUT gets table.md, table.json and images.png: of the longest cells, in the table's order, a row
each with an image of every class.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.realpath(f"{__file__}/../../.."))

from utils.errors import exit_on_interrupt, run_main

exit_on_interrupt(__name__)

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from inversion import InversionConfig
from inversion.canvases import CANVASES
from models.config import ModelConfig
from quant import OBSERVERS, QuantConfig
from scripts.compare import bits
from scripts.comparison import Rows
from scripts.studies.image_quality import Bench, Images, QualityConfig, cell, chosen_figures, shown
from scripts.studies.train_judges import JudgeConfig, judges
from utils.cli import Number, Parser, add_flags, check_numbers, from_flags, natural, positive, setting, weight
from utils.config import DataConfig, RunConfig
from utils.device import pick_device, pick_dtype, versions
from utils.files import atomic, writable_folder, write_json
from utils.lazy import torch
from utils.report import markdown, table

if TYPE_CHECKING:
    from torch import Tensor

    from models import LoadedModel, SparseImages

STOPS, RATIO = (0.1, 0.2, 0.3, 0.4), 0.3
"""When patches stop, as shares of the iterations, and how many of them."""
QUALITY = ("num_images", "seeds", "head", "augment", "looks", "figures", "judges", "output")
"""Settings of image_quality.py that are settings here too."""
LENGTH = Number(int, 10, 2**31 - 1, "patches stop at tenths of it")


@dataclass(frozen=True)
class GridConfig:
    """The cells. Raises `UserError` for what cannot be."""

    canvases: tuple[str, ...] = setting(tuple(CANVASES), "canvases", nargs="+", choices=CANVASES)
    views: tuple[str, ...] = setting(
        ("roll,flip", "roll,flip,crop,colour"), "sets of views, names with commas between", nargs="+", metavar="V,V"
    )
    strategies: tuple[str, ...] = setting(
        ("dense", "smi", "pri"), "strategies", nargs="+", choices=("dense", "smi", "pri")
    )
    iterations: tuple[int, ...] = setting((30, 100, 300), "lengths", nargs="+", type=LENGTH, metavar="N")
    inversions: tuple[int, ...] = setting((0,), "seeds of images", nargs="+", type=natural, metavar="SEED")
    tv2: float = setting(1e-3, "weight of total variation on a canvas of pixels; a spectral one has none", type=weight)
    batch: int = setting(100, "images of an inversion batch", type=positive)
    bits: tuple[tuple[int, int], ...] = setting(
        (), "widths to calibrate at, such as 8/8 4/4; default none", nargs="*", type=bits, metavar="W/A"
    )
    calibration_images: int = setting(32, "images that calibrate", type=positive, metavar="N")
    observer: str = setting("auto", "how they calibrate, as for test_quant.py", choices=(*OBSERVERS, "auto"))
    fill: bool = setting(False, "fill stopped patches for calibration")
    datapool: str = setting("./datapool", "where pools are kept", metavar="DIR")

    def __post_init__(self) -> None:
        check_numbers(self)
        for width in self.bits:
            QuantConfig(*width)

    def cells(self, dtype: str) -> Iterator[tuple[dict[str, object], InversionConfig]]:
        """What each cell is called in the table, and its inversion."""
        for length, strategy, canvas, views, seed in itertools.product(
            self.iterations, self.strategies, self.canvases, self.views, self.inversions
        ):
            stops = tuple(int(share * length) for share in STOPS)
            schedule = {"prune_it": stops, "prune_ratio": (RATIO,) * len(stops)} if strategy == "smi" else {}
            config = InversionConfig(
                iterations=length,
                strategy=strategy,
                canvas=canvas,
                views=tuple(views.split(",")),
                init="pink",
                lr_schedule="cosine",
                weights={"oh": 1.0, "tv2": self.tv2 if canvas == "pixels" else 0.0},
                targets=("balanced",),
                batch_size=self.batch,
                seed=seed,
                dtype=dtype,
                **schedule,
            )
            yield {"its": length, "strategy": strategy, "canvas": canvas, "views": views, "seed": seed}, config


def calibrated(bench: Bench, images: SparseImages, config: GridConfig) -> dict[str, float]:
    """Top-1 on the test images of models that these images calibrated, by width."""
    from quant import quantize
    from utils.data import evaluation_loader
    from utils.evaluation import evaluate

    few = images.at(spaced(len(images), config.calibration_images))
    models = {
        f"{width[0]}/{width[1]}": quantize(bench.teacher, few, QuantConfig(*width, config.observer, fill=config.fill))
        for width in config.bits
    }
    found = evaluate(models, evaluation_loader(bench.model, bench.data), torch.device("cpu"))
    return {text: one["top1"] for text, one in found.items()}


def spaced(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` numbers, as far apart as can be: images are sorted by label."""
    return [number * count // wanted for number in range(wanted)] if wanted < count else list(range(count))


def measured(
    bench: Bench, quality: QualityConfig, config: GridConfig, rows: Rows, label: dict, images, pool: str
) -> dict:
    """All figures of one pool's images, from disk where they are there."""
    found = dict(label)
    for seed in quality.seeds:
        kind = Images(pool, images, bench.model, seed)
        for key, figure in chosen_figures(quality, bench.model, bench.data).items():
            if key != "head" and seed != quality.seeds[0]:
                continue
            wanted = cell(bench, kind, key)
            row = rows.find(wanted) or rows.add(wanted, {"name": pool, "value": figure.measure(bench, kind)})
            found.setdefault(key, []).append(row["value"])
    if config.bits:
        wanted = {"calibrated": list(config.bits), "images": kind.digest, "model": bench.model.fingerprint()}
        wanted |= {"count": config.calibration_images, "observer": config.observer, "fill": config.fill}
        wanted |= {"val_limit": bench.data.val_limit}
        row = rows.find(wanted) or rows.add(wanted, {"name": pool, "value": calibrated(bench, images, config)})
        found |= {text: [value] for text, value in row["value"].items()}
    return found


def one_of_each(model: LoadedModel, images: SparseImages) -> Tensor:
    """The first image of every class that there is, up to ten, as pictures have it: (K, C, H, W) in [0, 1]."""
    first = [int((images.labels == label).nonzero()[0]) for label in images.labels.unique()[:10]]
    few = images.at(torch.tensor(first)).shown()
    return model.grid.unpatchify(model.preprocessing.denormalize(few.patches), few.positions)


def lines_of(found: Sequence[dict], keys: Sequence[str]) -> list[list[object]]:
    """Rows of the table: means, and deviations where there is more than one value."""
    lines = []
    for one in found:
        cells = []
        for key in keys:
            value = one.get(key)
            if isinstance(value, list):
                several = torch.tensor(value, dtype=torch.float64)
                cells.append(shown(several.mean().item(), several.std().item() if len(value) > 1 else None))
            else:
                cells.append("" if value is None else value)
        lines.append(cells)
    return lines


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Make what is missing, measure it, and write the table after every cell."""
    parser = Parser(__doc__.splitlines()[0])
    add_flags(parser, GridConfig)
    add_flags(parser, QualityConfig, only=QUALITY)
    for kind in (ModelConfig, DataConfig, JudgeConfig):
        add_flags(parser, kind)
    add_flags(parser, RunConfig, only=("device", "gpu"))
    args = parser.parse_args(argv)
    config, of_model, data, trained = (
        from_flags(kind, args) for kind in (GridConfig, ModelConfig, DataConfig, JudgeConfig)
    )
    quality = QualityConfig(**{name: getattr(args, name) for name in QUALITY})
    output, folder = writable_folder(quality.output, "--output"), writable_folder(quality.judges, "--judges")
    device = pick_device(args.device, args.gpu)
    from inversion import ImagePool, synthesize
    from models import load_model
    from utils.pictures import save_image_grid

    model, rows = load_model(of_model), Rows(output)
    asked = {figure.judge for figure in chosen_figures(quality, model, data).values()} - {None}
    bench = Bench(
        model, data, judges(model, data, trained, folder, asked), quality.head, quality.augment, quality.looks
    )
    found: list[dict] = []
    pictures: list[Tensor] = []
    for label, inversion in config.cells(pick_dtype("auto", device)):
        pool = ImagePool(config.datapool, model, inversion)
        made = synthesize(pool, quality.num_images, device, output / "synthesis.jsonl", progress=True)
        label["s"] = None if made.seconds is None else f"{made.seconds:.0f}"
        images = pool.read(quality.num_images)
        if inversion.iterations == max(config.iterations):
            pictures.append(one_of_each(model, images))
        found.append(measured(bench, quality, config, rows, label, images, str(pool.path)))
        keys = list(dict.fromkeys(key for one in found for key in one))
        lines = lines_of(found, keys)
        print("  ".join(map(str, lines[-1])), flush=True)
        with atomic(output / "table.md") as partial:
            partial.write_text(markdown(keys, lines) + "\n", encoding="utf-8")
        write_json(output / "table.json", {"command": args.command, "rows": found, **versions()})
    save_image_grid(output / "images.png", torch.cat(pictures), columns=len(pictures[0]))
    print(table(keys, lines))
    return found


if __name__ == "__main__":
    run_main(main)
