"""Settings inside a flag's value: `NAME:key=value,key=value` stands for an object of a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import TypeVar

from utils.errors import UserError

Made = TypeVar("Made")


def parse_call(text: str, table: Mapping[str, Callable[..., Made]], flag: str) -> tuple[str, Made]:
    """The name and what `table` makes of the numbers that follow it.

    Raises:
        UserError: an unknown name or key, a value that is no number, or one that the object refuses.
    """
    name, _, rest = text.partition(":")
    if name not in table:
        raise UserError(f"{flag} {name} is unknown; there are {', '.join(table)}")
    try:
        given = [part.split("=") for part in rest.split(",") if part]
        values = {key: float(value) for key, value in given}
        if len(values) < len(given):
            raise ValueError("a key that is there twice")
        return name, table[name](**values)
    except (ValueError, TypeError, OverflowError):
        made = table[name]
        known = [f"{one.name}={one.default:g}" for one in fields(made)] if is_dataclass(made) else []
        what = f"what follows the colon must be like {','.join(known)}" if known else "it has no settings"
        raise UserError(f"{flag} {text}: {what}") from None


def canonical(name: str, made: object) -> str:
    """The text of a call with the settings alone that are not the defaults."""
    own = [f"{one.name}={getattr(made, one.name)!r}" for one in fields(made) if getattr(made, one.name) != one.default]
    return f"{name}:{','.join(own)}" if own else name
