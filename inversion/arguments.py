"""The command-line flags of the inversion."""

from __future__ import annotations

import argparse

from inversion.config import DEFAULT_WEIGHTS, InversionConfig
from utils.cli import positive

WEIGHT_HELP = {
    "oh": "weight of the cross-entropy with the target labels",
    "tv1": "weight of the l1 total variation",
    "tv2": "weight of the l2 total variation",
    "l2": "weight of the l2 norm of the pixels",
    "bn": "weight of batch-norm statistics of a CNN (not available yet: only 0)",
    "adv": "weight of 1 - Jensen-Shannon divergence between teacher and student (test_kt.py)",
}


def add_inversion_arguments(parser: argparse.ArgumentParser) -> None:
    """Schedule, optimizer and loss weights, with the published defaults."""
    defaults = InversionConfig()
    parser.add_argument(
        "--prune_it",
        type=int,
        nargs="+",
        default=list(defaults.prune_it),
        metavar="T",
        help="iterations at which the inversion of some patches stops; -1: dense",
    )
    parser.add_argument(
        "--prune_ratio",
        type=float,
        nargs="+",
        default=[0],
        metavar="R",
        help="share of the remaining patches stopped at each of them, in [0, 1); 0: dense",
    )
    parser.add_argument("--iterations", type=positive, default=defaults.iterations, help="optimizer steps per image")
    parser.add_argument("--lr_g", type=float, default=defaults.lr, help="Adam's learning rate, in normalized pixels")
    parser.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        default=defaults.flip,
        help="mirror the image in half of the iterations; digits and letters are better without",
    )
    for name, text in WEIGHT_HELP.items():
        parser.add_argument(f"--{name}", type=float, default=DEFAULT_WEIGHTS.get(name, 0.0), help=text)


def inversion_config(
    args: argparse.Namespace, batch_size: int, dtype: str, student: str | None = None
) -> InversionConfig:
    """The configuration that parsed flags ask for. Raises `UserError` where they make no sense."""
    return InversionConfig(
        iterations=args.iterations,
        lr=args.lr_g,
        weights={name: getattr(args, name) for name in WEIGHT_HELP},
        prune_it=tuple(args.prune_it),
        prune_ratio=tuple(args.prune_ratio),
        flip=args.flip,
        student=student,
        batch_size=batch_size,
        seed=args.seed,
        dtype=dtype,
    )
