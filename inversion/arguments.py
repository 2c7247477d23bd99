"""The command-line flags of the inversion."""

from __future__ import annotations

import argparse

from inversion.config import LR_SCHEDULES, InversionConfig
from inversion.importance import IMPORTANCES
from inversion.inits import INITS
from inversion.presets import PRESETS
from inversion.priors import PRIORS, options, terms
from inversion.strategies import STRATEGIES
from utils.cli import positive

# Flags that stand for a field of the configuration, by another name or in another type.
FIELDS = {
    "iterations": ("iterations", int),
    "lr_g": ("lr", float),
    "betas": ("betas", tuple),
    "lr_schedule": ("lr_schedule", str),
    "warmup": ("warmup", int),
    "init": ("init", str),
    "strategy": ("strategy", str),
    "importance": ("importance", str),
    "prune_it": ("prune_it", tuple),
    "prune_ratio": ("prune_ratio", tuple),
    "pri_division": ("pri_division", int),
    "targets": ("targets", tuple),
    "soft_label": ("soft_label", float),
    "projection": ("projections", tuple),
    "flip": ("flip", bool),
    "snapshots": ("snapshots", tuple),
}


def add_inversion_arguments(parser: argparse.ArgumentParser) -> None:
    """Priors, strategy, schedule, optimizer and loss weights. None means: not given."""
    defaults = InversionConfig()
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="published settings of a method; flags that are given win over them")
    add(
        "--prior",
        nargs="+",
        choices=PRIORS,
        help="what images are asked to be besides of a label; default deepinversion",
    )
    add("--strategy", choices=STRATEGIES, help="which patches stop; default smi with --prune_it, else dense")
    add("--importance", choices=IMPORTANCES, help="what ranks the patches; default cls, the class token's attention")
    add("--prune_it", type=int, nargs="+", metavar="T", help="iterations at which patches stop; default -1: dense")
    add(
        "--prune_ratio",
        type=float,
        nargs="+",
        metavar="R",
        help="share of the remaining patches stopped at each of them, in [0, 1); default 0: dense",
    )
    add("--pri_division", type=int, metavar="V", help=f"images of one pri trajectory; default {defaults.pri_division}")
    add("--iterations", type=positive, help=f"optimizer steps per image; default {defaults.iterations}")
    add("--lr_g", type=float, help=f"Adam's learning rate, in normalized pixels; default {defaults.lr}")
    add("--betas", type=float, nargs=2, metavar="B", help="Adam's averaging; default 0.5 0.99")
    add("--lr_schedule", choices=LR_SCHEDULES, help="course of the learning rate; default constant")
    add("--warmup", type=int, metavar="N", help="iterations in which the learning rate rises; default 0")
    add("--init", choices=INITS, help="noise that pixels start from; default white, pink has images' spectrum")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror the image in half of the iterations; default yes")
    add("--targets", nargs="+", metavar="T", help="labels: uniform (default), balanced, class:K, or a list of classes")
    add("--soft_label", type=float, metavar="ALPHA", help="share of a label spread over all classes; default 0")
    add(
        "--projection",
        nargs="+",
        metavar="P",
        help="what is done to pixels after a step: clamp (always), lowpass:cutoff=0.8,every=100",
    )
    add(
        "--snapshots",
        type=int,
        nargs="+",
        metavar="T",
        help="iterations at which a batch is kept as it is, for pictures",
    )
    for name, term in terms().items():
        used = f"default {term.weight:g} with its prior" if name != "oh" else f"default {term.weight:g}"
        add(f"--{name}", type=float, metavar="W", help=f"{term.help}; {used}")
    for name, option in options().items():
        add(f"--{name}", type=option.type, metavar="X", help=f"{option.help}; default {option.default}")


def inversion_config(
    args: argparse.Namespace, batch_size: int, dtype: str, student: str | None = None
) -> InversionConfig:
    """The configuration that parsed flags ask for. Raises `UserError` where they make no sense."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    preset = PRESETS[given["preset"]] if "preset" in given else {}
    # A schedule that is given says by itself whether the run is sparse; a strategy without one does not inherit it.
    if "prune_it" in given:
        dropped = ("strategy", "prune_ratio")
    else:
        dropped = ("prune_it", "prune_ratio") if given.get("strategy") in ("dense", "pri") else ()
    chosen = {**{name: value for name, value in preset.items() if name not in dropped}, **given}
    priors = [PRIORS[name] for name in chosen.get("prior", ["deepinversion"])]
    known = terms()
    weights = {
        "oh": known["oh"].weight,
        **{name: term.weight for prior in priors for name, term in prior.terms.items()},
    }
    weights |= {name: float(chosen[name]) for name in known if name in chosen}
    fields = {field: kind(chosen[flag]) for flag, (field, kind) in FIELDS.items() if flag in chosen}
    return InversionConfig(
        **fields,
        weights=weights,
        options={name: chosen[name] for name in options() if name in chosen},
        student=student,
        batch_size=batch_size,
        seed=args.seed,
        dtype=dtype,
    )
