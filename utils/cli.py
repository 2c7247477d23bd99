"""Command-line parsing that both entry scripts share."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from typing import NoReturn

from utils.errors import UserError


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but for flags whose help says in words what leaving them out means."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser that takes `--some_flag` and `--some-flag` alike and reports errors as `UserError`.

    What it gives also has `command`, the command line, for reports.
    """

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)

    def parse_known_args(self, args=None, namespace=None):
        given = sys.argv[1:] if args is None else args
        spelling = {flag.replace("_", "-"): flag for flag in self._option_string_actions}
        tokens = []
        for token in given:
            flag, equals, value = token.partition("=")
            tokens.append(spelling.get(flag.replace("_", "-"), flag) + equals + value if flag[:2] == "--" else token)
        found, rest = super().parse_known_args(tokens, namespace)
        if namespace is None:
            found.command = shlex.join(["python", self.prog, *given])
        return found, rest

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
