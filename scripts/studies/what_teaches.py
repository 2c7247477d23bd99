#!/usr/bin/env python3
"""What images teach best? Ways to invert at equal seconds, and a linear head on a student's backbone for each.

Every row is --preset with some flags changed; it gets as many images as are made in --seconds, in whole batches. The
head is the figure of image_quality.py, with the changes of the preset's lessons; beside it stand figures that need no
real image, and how their ranks go with the head's. Real images and noise, --num_images of each, are rows of their own.
Pools and finished figures are kept; OUTPUT gets table.md and table.json.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.realpath(f"{__file__}/../../.."))

from utils.errors import exit_on_interrupt, run_main

exit_on_interrupt(__name__)

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from inversion import PRESETS
from kt.config import PRESETS as LESSONS
from models.config import ModelConfig
from scripts.comparison import Rows, further_flags
from scripts.studies.image_quality import (
    FIGURES,
    REFERENCES,
    Bench,
    QualityConfig,
    correlations,
    has_data,
    kinds,
    measured,
    shown,
    summary,
)
from utils.cli import Parser, add_flags, from_flags, positive, rate
from utils.config import DataConfig, RunConfig
from utils.device import pick_device, versions
from utils.errors import UserError
from utils.files import atomic, writable_folder, write_json
from utils.flags import add_dtype_argument, add_inversion_arguments, inversion_config
from utils.report import markdown, table

if TYPE_CHECKING:
    import torch

    from inversion import InversionConfig
    from models import LoadedModel, SparseImages

ROWS: dict[str, str] = {
    "preset": "",
    "pink noise": "--init pink",
    "5 iterations": "--iterations 5",
    "20 iterations": "--iterations 20",
    "views roll flip": "--views roll flip",
    "views + noise": "--views roll flip crop colour noise:deviation=1",
    "spectral": "--canvas spectral --init leaves --tv2 0",
    "smi": "--strategy smi --prune_it 1 2 3 4 --prune_ratio 0.3 0.3 0.3 0.3",
    "pri": "--strategy pri",
    "pri, joined": "--strategy pri --join",
    "mimiq": "--prior deepinversion mimiq",
    "natural": "--prior deepinversion natural --init scenes",
    "scenes": "--init scenes",
    "soft labels": "--soft_label 0.4",
    "low-pass, 30 iterations": "--iterations 30 --projection clamp lowpass:cutoff=0.3,every=1",
}
"""One change of the preset at a time, as flags of test_kt.py."""
QUALITY = ("num_images", "seeds", "head", "augment", "looks", "output")
"""Settings of image_quality.py that are settings here too."""
SHOWN = tuple(name for name, figure in FIGURES.items() if name == "head" or not figure.real)


def parser() -> Parser:
    """The command line."""
    parser = Parser(__doc__.splitlines()[0])
    for kind in (ModelConfig, DataConfig):
        add_flags(parser, kind)
    add_flags(parser, QualityConfig, only=QUALITY)
    add_flags(parser, RunConfig, only=("device", "gpu"))
    add_dtype_argument(parser)
    about = "a row, named, with flags of test_kt.py that say how images are inverted; may be given again"
    parser.add_argument(
        "--row", nargs=2, action="append", metavar=("NAME", "FLAGS"), help=f"{about}; default all known"
    )
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="NAME", help=f"of those known: {', '.join(ROWS)}")
    parser.add_argument("--preset", choices=PRESETS, default="transfer", help="what each row changes")
    parser.add_argument("--seconds", type=rate, default=300.0, help="of inversion for each row and seed")
    parser.add_argument("--batch", type=positive, default=20, help="images of an inversion batch")
    parser.add_argument("--datapool", default="./datapool", metavar="DIR", help="where pools are kept")
    parser.set_defaults(output="./runs/what_teaches", augment=LESSONS["transfer"]["augment"], head="", num_images=400)
    return parser


class Row(NamedTuple):
    """How a row inverts, for each seed, and whether what a PRI trajectory's images are together is one image."""

    configs: dict[int, InversionConfig]
    join: bool


def inversions(
    rows: Mapping[str, str], preset: str, batch: int, seeds: Sequence[int], device: str, dtype: str
) -> dict[str, Row]:
    """Rows by their names. Raises `UserError` where a row's flags make no sense."""
    found = {}
    for name, flags in rows.items():
        if name in REFERENCES:
            raise UserError(f"--row {name}: that is the name of a row that is always there")
        of_row = Parser(f"--row {name}")
        add_inversion_arguments(of_row)
        of_row.add_argument("--join", action="store_true")
        of_row.set_defaults(preset=preset, device=device, dtype=dtype)
        args, configs = of_row.parse_args(further_flags(f"--row {name}", flags)), {}
        for seed in seeds:
            args.seed = seed
            configs[seed] = inversion_config(args, batch, student="the backbone of --head")
            if configs[seed].needs("student"):
                raise UserError(f"--row {name}: --adv is about a student that learns; test_kt.py has one")
            if args.join and configs[seed].strategy != "pri":
                from utils.images import NEEDS_PRI

                raise UserError(f"--row {name}: {NEEDS_PRI}")
        found[name] = Row(configs, args.join)
    return found


class Made:
    """The images of every row: as many as are made in so many seconds.

    Args:
        bench: of the teacher, and the student whose backbone a prior may look with.
        rows: how each of them inverts.
        seconds: of inversion for each row and seed.
        datapool: where pools are kept.
        output: where what a batch took is kept.
        device: where to invert.
    """

    def __init__(
        self,
        bench: Bench,
        rows: Mapping[str, Row],
        seconds: float,
        datapool: str,
        output: Path,
        device: torch.device,
    ) -> None:
        self.bench, self.rows, self.seconds = bench, rows, seconds
        self.datapool, self.output, self.device = datapool, output, device
        self.spent: dict[str, list[float]] = {}

    def kinds(self) -> Iterator[tuple[str, Callable[[int], SparseImages]]]:
        """Rows as `measured` takes them."""
        for name in self.rows:
            yield name, lambda seed, name=name: self.images(name, seed)

    def images(self, name: str, seed: int) -> SparseImages:
        """Those of one row and seed; made where they are not there."""
        from inversion.synthesis import logged_seconds
        from utils.images import Inverted, Synthesis

        log, model, row = self.output / "synthesis.jsonl", self.bench.model, self.rows[name]
        config, looking = row.configs[seed], None
        if config.needs("backbone"):
            looking = self.backbone
            config = replace(config, student=looking.fingerprint())
        source = Inverted(config, self.datapool)
        synthesis = Synthesis(model, source, self.device, log, student=looking, progress=True)
        images = synthesis.first(synthesis.filled_for(self.seconds))
        self.spent.setdefault(name, []).append(logged_seconds(synthesis.pool, log))
        return images.put_together(model.grid) if row.join else images

    @cached_property
    def backbone(self) -> LoadedModel:
        """What priors look with."""
        from kt.student import backbone_of

        return backbone_of(self.bench.untaught)


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Make what is missing, measure it, print and write the tables."""
    args = parser().parse_args(argv)
    of_model, data = from_flags(ModelConfig, args), from_flags(DataConfig, args)
    known = {name: ROWS[name] for name in args.only or (() if args.row else ROWS)}
    rows = known | dict(args.row or ())
    quality = QualityConfig(figures=SHOWN, **{name: getattr(args, name) for name in QUALITY})
    how = inversions(rows, args.preset, args.batch, quality.seeds, args.device, args.dtype)
    output, device = writable_folder(quality.output, "--output"), pick_device(args.device, args.gpu)
    from models import load_model

    model = load_model(of_model)
    if not has_data(model, data):
        raise UserError("a head is tested on real images; give --dataset")
    bench = Bench(model, data, {}, quality.head, quality.augment, quality.looks)
    made = Made(bench, how, args.seconds, args.datapool, output, device)
    found = measured(bench, quality, Rows(output), [*kinds(bench, quality), *made.kinds()])
    lines = summary(found)
    header = ["images", "N", "s", *SHOWN]
    body = []
    for line in lines:
        spent = made.spent.get(line["images"])
        seconds = "" if spent is None else f"{sum(spent) / len(spent):.0f}"
        counts = [row["count"] for row in found if row["images"] == line["images"]]
        many = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        body.append([line["images"], many, seconds, *(shown(line[key], line[f"{key}_std"]) for key in SHOWN)])
    ranks = correlations(lines)
    told = [(header, body)]
    if ranks:
        told.append(
            (["without real images", "rank correlation with head"], [[r["without"], shown(r["head"])] for r in ranks])
        )
    with atomic(output / "table.md") as partial:
        partial.write_text("\n\n".join(markdown(*one) for one in told) + "\n", encoding="utf-8")
    facts = {"command": args.command, "flags": rows, "seconds": args.seconds, "spent": made.spent}
    write_json(output / "table.json", {**facts, "summary": lines, "rows": found, "correlations": ranks, **versions()})
    print("\n\n".join(table(*one) for one in told))
    print(f"tables: {output}")
    return lines


if __name__ == "__main__":
    run_main(main)
