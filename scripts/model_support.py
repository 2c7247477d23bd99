#!/usr/bin/env python3
"""Which of timm's pretrained classification models can be inverted, and why the others cannot: a table by family.

--check makes a small model of every kind among those that can, with random weights, and holds what is promised of it
against timm's own forward; exit code 1 where something does not hold.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.realpath(f"{__file__}/../.."))

from utils.errors import exit_on_interrupt, run_main

exit_on_interrupt(__name__)

import fnmatch
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import nn

from models.sparse_vit import require_supported
from utils.cli import Parser
from utils.errors import UserError
from utils.files import atomic, user_path
from utils.report import markdown, table

MODULES = (
    "vision_transformer",
    "deit",
    "eva",
    "beit",
    "vision_transformer_relpos",
    "cait",
    "xcit",
    "swin_transformer",
    "swin_transformer_v2",
    "swin_transformer_v2_cr",
    "hiera",
    "vision_transformer_hybrid",
)
"""timm's modules of plain and windowed transformers."""
BEGIN, END = "<!-- begin: python scripts/model_support.py --write docs/models.md -->", "<!-- end -->"


@dataclass(frozen=True)
class Architecture:
    """One of timm's, with its pretrained names that have a classifier; `why` it is refused, empty if it is not."""

    name: str
    family: str
    why: str
    parameters: int
    pretrained: tuple[str, ...]


def names_of(modules: Sequence[str], patterns: Sequence[str]) -> dict[str, list[str]]:
    """The pretrained names that one of the patterns fits, of every architecture of timm's modules that has some."""
    found = {}
    for name in dict.fromkeys(name for module in modules for name in timm.list_models(module=module)):
        if names := [one for one in timm.list_pretrained(f"{name}.*") if fits(one, patterns)]:
            found[name] = names
    return found


def fits(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern fits a name, with its tag or without; every name where there is none."""
    return not patterns or any(fnmatch.fnmatch(part, p) for part in (name, name.split(".")[0]) for p in patterns)


def architecture(name: str, pretrained: Sequence[str]) -> Architecture:
    """What becomes of an architecture; its model takes no memory."""
    with torch.device("meta"):
        vit = timm.create_model(name)
    why = ""
    try:
        require_supported(vit, name)
    except UserError as error:
        why = str(error).partition(": ")[2]
    return Architecture(name, type(vit).__name__, why, sum(p.numel() for p in vit.parameters()), tuple(pretrained))


HEADER = ("timm's class", "names", "accepted", "refused", "to start with")


def support_table(found: Sequence[Architecture], headless: int) -> str:
    """By family: how many pretrained names there are and can be used, why others cannot, and one to start with."""
    rows = []
    for family in dict.fromkeys(one.family for one in found):
        ours = [one for one in found if one.family == family]
        refused = Counter()
        for one in ours:
            refused[one.why] += len(one.pretrained)
        accepted = refused.pop("", 0)
        reasons = "; ".join(f"{count}: {why}" for why, count in refused.most_common())
        rows.append([f"`{family}`", accepted + refused.total(), accepted, reasons, first_of(ours)])
    names, accepted = counted(found), counted([one for one in found if not one.why])
    without = f"; {headless} more have none" if headless else ""
    return "\n".join(
        [
            markdown(HEADER, rows),
            "",
            f"{accepted} of {names} names with a classifier, in timm {timm.__version__}{without}.",
        ]
    )


def first_of(found: Sequence[Architecture]) -> str:
    """The name of the smallest that is accepted, but for those that timm tests itself with."""
    accepted = [one for one in found if not one.why and not one.name.startswith("test_")]
    if not accepted:
        return ""
    smallest = min(accepted, key=lambda one: (one.parameters, one.name))
    default = f"{smallest.name}.{timm.get_pretrained_cfg(smallest.name).tag}"
    return f"`{default if default in smallest.pretrained else smallest.pretrained[0]}`"


def counted(found: Sequence[Architecture]) -> int:
    """How many pretrained names these are."""
    return sum(len(one.pretrained) for one in found)


def with_table(page: str, text: str, file: Path) -> str:
    """A page with `text` between its marks. Raises `UserError` where it has not both, once and in order."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest:
        raise UserError(f"--write {file}: there is no place for the table, which is between {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def kinds(found: Sequence[Architecture]) -> Iterator[tuple[str, int, nn.Module | str]]:
    """A small model of every kind among those that are accepted, or in words why there is none, and how many are so."""
    from scripts.model_checks import kind, small_model

    models, same = {}, Counter()
    for one in found:
        if one.why:
            continue
        try:
            vit = small_model(one.name)
            key = kind(vit)
        except UserError as error:
            key, vit = one.name, str(error)
        models.setdefault(key, (one.name, vit))
        same[key] += 1
    for key, (name, vit) in models.items():
        yield name, same[key], vit


def check(found: Sequence[Architecture]) -> bool:
    """Check a model of every kind, print a table of how far things are apart, and what failed; whether all held."""
    from scripts.model_checks import CHECKS, checked

    rows, failures = [], []
    for name, same, vit in kinds(found):
        if isinstance(vit, str):
            rows.append([name, same, *("" for _ in CHECKS)])
            failures.append(vit)
            continue
        results = dict(checked(vit))
        rows.append([name, same, *results.values()])
        failures += [f"{name}: {key}: {result}" for key, result in results.items() if not result.held]
    print(table(["model", "like it", *CHECKS], rows))
    print("\n".join(["", *failures, f"{len(rows)} kinds of models, {len(failures)} failures"]))
    return not failures


def main(argv: list[str] | None = None) -> None:
    """Print the table, and what else is asked for. Raises `SystemExit(1)` where a check fails."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--family",
        nargs="+",
        choices=MODULES,
        default=MODULES,
        metavar="M",
        help=f"timm's modules: {' '.join(MODULES)}",
    )
    add("--model", nargs="+", default=[], metavar="NAME", help="timm's names, * for any letters; default all")
    add("--names", action="store_true", help="print every name as well, and why it is refused")
    add("--write", metavar="PAGE", help="put the table between the marks of this page")
    add("--check", action="store_true", help="check a small model of every kind; about two minutes for all")
    args = parser.parse_args(argv)
    page = None if args.write is None else user_path(args.write, "--write")
    if page is not None:
        if args.model or args.family != MODULES:
            raise UserError("--write is for the whole table; leave --family and --model out")
        if not page.is_file():
            raise UserError(f"--write {page}: there is no such file")
        with_table(page.read_text(), "", page)
    warnings.simplefilter("ignore")  # of names that timm has for others, and of initializers that take no memory
    names = names_of(args.family, args.model)
    if not names:
        raise UserError(f"--model {' '.join(args.model)}: timm has no pretrained model of that name in these modules")
    headed = {name: [one for one in ours if timm.get_pretrained_cfg(one).num_classes] for name, ours in names.items()}
    found = [architecture(name, ours) for name, ours in headed.items() if ours]
    text = support_table(found, sum(map(len, names.values())) - counted(found))
    print(text)
    if args.names:
        lines = [f"{name}  {one.why or 'accepted'}" for one in found for name in one.pretrained]
        print("\n".join(["", *lines]))
    if page is not None:
        written = with_table(page.read_text(), text, page)
        with atomic(page) as partial:
            partial.write_text(written)
    if args.check:
        print()
        if not check(found):
            raise SystemExit(1)


if __name__ == "__main__":
    run_main(main)
