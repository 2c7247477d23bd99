"""Command-line parsing that both entry scripts share."""

from __future__ import annotations

import argparse
import math
import sys
from typing import NoReturn

from utils.errors import UserError


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but for flags whose help says in words what leaving them out means."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser that takes `--some_flag` and `--some-flag` alike and reports errors as `UserError`."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)

    def parse_known_args(self, args=None, namespace=None):
        spelling = {flag.replace("_", "-"): flag for flag in self._option_string_actions}
        tokens = []
        for token in sys.argv[1:] if args is None else args:
            flag, equals, value = token.partition("=")
            tokens.append(spelling.get(flag.replace("_", "-"), flag) + equals + value if flag[:2] == "--" else token)
        return super().parse_known_args(tokens, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


def positive(text: str) -> int:
    """argparse type: an integer of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def natural(text: str) -> int:
    """argparse type: an integer of 0 or more that fits into 63 bits, as seeds have to."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{value} is not in 0 to {2**63 - 1}")
    return value


def rate(text: str) -> float:
    """argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def add_common_arguments(parser: argparse.ArgumentParser, seed: int, output: str) -> None:
    """The flags that every task has: model, data, device, output."""
    parser.add_argument("--val-batchsize", type=positive, default=200, help="images per evaluation batch")
    parser.add_argument("--num-workers", type=natural, default=4, help="processes that load images")
    parser.add_argument("--seed", type=natural, default=seed, help="seed of noise, labels, jitter and random choices")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to run")
    parser.add_argument("--gpu", type=natural, default=0, help="number of the CUDA GPU")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="number format of the inverted model; auto: bfloat16 where the hardware multiplies it",
    )
    parser.add_argument("--output", metavar="DIR", help=f"where report and pictures go; default {output}")
    parser.add_argument("--val_limit", type=positive, metavar="N", help="evaluate on N images only; default all")
