"""Command-line parsing: settings that are fields of a configuration and flags at once, and the types of flags."""

from __future__ import annotations

import argparse
import numbers
import shlex
import sys
from collections.abc import Collection, Iterator
from dataclasses import Field, dataclass, field, fields
from typing import Any, NoReturn, TypeVar

from utils.errors import UserError

NUMBER_FORMATS = ("auto", "float32", "bfloat16")
"""What a flag can ask `utils.device.pick_dtype` for."""


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


@dataclass(frozen=True)
class Number:
    """The numbers that a setting may be, from `low` to `high`: an argparse type, and a check for Python's callers.

    `why`: what stands behind the upper limit.
    """

    kind: type
    low: float
    high: float
    why: str

    def __str__(self) -> str:
        return f"{'an integer' if self.kind is int else 'a number'} from {self.low} to {self.high} ({self.why})"

    def __call__(self, text: str) -> int | float:
        """What a flag's text stands for."""
        try:
            value = self.kind(text)
        except ValueError:
            value = None
        if not self.holds(value):
            raise argparse.ArgumentTypeError(f"{_short(text)} is not {self}")
        return value

    def holds(self, value: object) -> bool:
        """Whether `value` is one of them."""
        kind = numbers.Integral if self.kind is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool) and self.low <= value <= self.high

    def check(self, value: object, name: str) -> None:
        """Raise `UserError`, which calls it `name`, unless `value` is one of them."""
        if not self.holds(value):
            raise UserError(f"{name} {_short(str(value))} is not {self}")


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:36]} .."


def check_numbers(config: object) -> None:
    """Raise `UserError` unless the settings of a configuration whose flags take a `Number` are one, or None."""
    for one, flags, _ in _settings(type(config)):
        how, value = one.metadata["how"], getattr(config, one.name)
        if isinstance(how.get("type"), Number) and value is not None:
            for single in value if "nargs" in how else [value]:
                how["type"].check(single, flags[-1])


positive = Number(int, 1, 2**31 - 1, "32 bits")
natural = Number(int, 0, 2**31 - 1, "32 bits")
any_seed = Number(int, 0, 2**63 - 1, "64 bits")
rate = Number(float, 1e-38, 1e38, "what float32 tells from 0 and infinity")
weight = Number(float, 0, 1e38, "what float32 tells from infinity")
workers = Number(int, 0, 4096, "each is a process")
image_side = Number(int, 1, 4096, "attention compares all pairs of patches")
