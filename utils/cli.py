"""Command-line parsing: settings that are fields of a configuration and flags at once, and the types of flags."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Collection, Iterator
from dataclasses import Field, field, fields
from typing import Any, NoReturn, TypeVar

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
            found.command = shlex.join(["python", sys.argv[0], *given])
        return found, rest

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


Config = TypeVar("Config")


def setting(default: object, help: str, *flags: str, **how: object) -> Any:
    """A field of a frozen configuration that is also a flag; `help` explains both.

    Args:
        default: of field and flag. A field that is False is set by giving the flag.
        help: one line, with the unit.
        flags: how the flag is spelt, the last one names the parsed value; the field's name if none is given.
        how: what else `add_argument` takes.
    """
    if default is False and not how:
        how = {"action": "store_true"}
    return field(default=default, metadata={"flags": flags, "how": {"help": help, **how}})


def add_flags(
    parser: Parser, config: type, only: Collection[str] | None = None, unset: bool = False, **defaults: object
) -> None:
    """The flags of a configuration's settings.

    Args:
        parser: gets them.
        config: a dataclass with `setting` fields.
        only: the fields to take; None: all.
        unset: flags that are not given are None, so that a preset can speak first; help names the default.
        defaults: other defaults than the fields', by the fields' names.
    """
    for one, flags, name in _settings(config):
        if only is not None and one.name not in only:
            continue
        default, how = defaults.get(one.name, one.default), dict(one.metadata["how"])
        if unset and "default" not in how["help"]:
            how["help"] += f"; default {default}"
        parser.add_argument(*flags, dest=name, default=None if unset else default, **how)


def from_flags(config: type[Config], args: argparse.Namespace, **given: object) -> Config:
    """A configuration from parsed flags; `given` are fields that no flag of their own stands for."""
    return config(**{one.name: _frozen(getattr(args, name)) for one, _, name in _settings(config)} | given)


def given_flags(config: type, args: argparse.Namespace) -> dict[str, object]:
    """The settings, by the fields' names, whose flags of `add_flags(unset=True)` were given."""
    found = {one.name: _frozen(getattr(args, name)) for one, _, name in _settings(config)}
    return {name: value for name, value in found.items() if value is not None}


def by_flag(config: object) -> dict[str, object]:
    """The settings of a configuration by the names of their flags, without dashes."""
    return {name: getattr(config, one.name) for one, _, name in _settings(type(config))}


def _settings(config: type) -> Iterator[tuple[Field, tuple[str, ...], str]]:
    """Every `setting` with its flags and the name of the parsed value."""
    for one in fields(config):
        if "flags" in one.metadata:
            flags = one.metadata["flags"] or (f"--{one.name}",)
            yield one, flags, flags[-1].lstrip("-").replace("-", "_")


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


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
