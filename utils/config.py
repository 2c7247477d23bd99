"""What a run is evaluated on, how image files are read, and where it runs: frozen objects, checked when made."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from utils.cli import any_seed, check_numbers, natural, positive, setting, workers
from utils.errors import UserError

Colour = tuple[int, int, int]
ORDERS = ("text", "numeric")


def colour(text: str) -> Colour:
    """argparse type: R,G,B, each 0 to 255."""
    try:
        return checked_colour([int(part) for part in text.split(",")])
    except (ValueError, UserError):
        raise argparse.ArgumentTypeError(f"'{text}' is not R,G,B with numbers from 0 to 255") from None


def checked_colour(value: Sequence[int]) -> Colour:
    """The colour. Raises `UserError` unless it is three integers from 0 to 255."""
    if len(value) != 3 or not all(isinstance(part, int) and 0 <= part <= 255 for part in value):
        raise UserError(f"background {value} is not three integers from 0 to 255")
    return tuple(value)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How image folders are read. Raises `UserError` for an order or a colour that is none."""

    class_order: str | None = setting(
        None, "the folders, sorted so, are the model's classes; default: found out", choices=ORDERS
    )
    background: Colour | None = setting(
        None, "what is behind transparency, 0 to 255 each; default white", type=colour, metavar="R,G,B"
    )

    def __post_init__(self) -> None:
        if self.class_order not in (None, *ORDERS):
            raise UserError(f"class_order {self.class_order} is none of {', '.join(ORDERS)}")
        if self.background is not None:
            checked_colour(self.background)

    def reading(self) -> dict[str, object]:
        """What was asked for, by the names of the flags."""
        asked = {"class_order": self.class_order, "background": self.background}
        return {name: value for name, value in asked.items() if value is not None}


@dataclass(frozen=True)
class DataConfig(Reading):
    """What a model is evaluated on, and how it is read. Raises `UserError` as `Reading`, and for odd numbers."""

    dataset: str | None = setting(None, "data: image folder or CIFAR; the bundled model needs none", metavar="DIR")
    val_limit: int | None = setting(None, "evaluate on N images only; default all", type=positive, metavar="N")
    val_batchsize: int = setting(200, "images per evaluation batch", "--val-batchsize", type=positive)
    num_workers: int = setting(4, "processes that load images, at most one a usable CPU", "--num-workers", type=workers)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self)


@dataclass(frozen=True)
class RunConfig:
    """Where a task runs and where its outcome goes; only `seed` changes numbers.

    `progress`: show progress bars on stderr. `command`: as typed, for the report. Raises `UserError` for impossible
    numbers.
    """

    output: str | None = setting(None, "where report and pictures go; default runs/ and the task's name", metavar="DIR")
    device: str = setting("auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))
    gpu: int = setting(0, "number of the CUDA GPU", type=natural)
    seed: int = setting(0, "seed of noise, labels, jitter and random choices", type=any_seed)
    tensorboard: bool = setting(False, "write the course of the inversion to OUTPUT/tensorboard")
    eager: bool = setting(False, "no CUDA graph, packed layer or gradient written out: slower, the same up to rounding")
    progress: bool = False
    command: str | None = None

    def __post_init__(self) -> None:
        check_numbers(self)
