"""When the inversion of how many patches stops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from utils.errors import UserError

GROWTHS = 7
"""Phases in which an image grows from a quarter of its sides to all of them, by an eighth (Plug-In Inversion)."""


@dataclass(frozen=True)
class Stage:
    """Iterations `start` .. `stop - 1`, run with `patches` patches per image.

    `begins`: positions of the patches that begin with it; in the first stage all that there are, `()`: the whole grid.
    """

    start: int
    stop: int
    patches: int
    begins: tuple[int, ...] = ()

    @property
    def iterations(self) -> int:
        return self.stop - self.start


def patches_kept(patches: int, ratio: float) -> int:
    """floor(n * (1 - r)), exact for the decimal that the user wrote: 10 patches at r = 0.9 leave 1."""
    return math.floor(patches * (1 - Fraction(str(ratio))))


def left_of(patches: int, ratio: float, iteration: int) -> int:
    """`patches_kept`. Raises `UserError` where none is."""
    left = patches_kept(patches, ratio)
    if left < 1:
        raise UserError(f"--prune_ratio {ratio} at iteration {iteration} leaves none of {patches} patches")
    return left


def check_schedule(iterations: int, prune_it: Sequence[int], prune_ratio: Sequence[float]) -> None:
    """Raise `UserError` unless the two lists are a schedule for `iterations` iterations."""
    if list(prune_it) == [-1]:
        if any(prune_ratio):
            raise UserError("--prune_ratio needs --prune_it: -1 means dense, which stops no patch")
        return
    if len(prune_it) != len(prune_ratio):
        raise UserError(
            f"--prune_it has {len(prune_it)} entries and --prune_ratio {len(prune_ratio)}; give one ratio an iteration"
        )
    if any(t < 0 for t in prune_it):
        raise UserError("--prune_it takes iterations from 0 on, or -1 alone for dense inversion")
    if any(later <= earlier for earlier, later in itertools.pairwise(prune_it)):
        raise UserError(f"--prune_it must rise from entry to entry, got {' '.join(map(str, prune_it))}")
    if prune_it and prune_it[-1] >= iterations:
        raise UserError(f"--prune_it {prune_it[-1]} is past the last iteration; --iterations is {iterations}")
    for ratio in prune_ratio:
        if not 0 <= ratio < 1:
            raise UserError(f"--prune_ratio {ratio} is not in [0, 1)")


def stages_of(
    iterations: int, patches: int, prune_it: Sequence[int], prune_ratio: Sequence[float]
) -> tuple[Stage, ...]:
    """Cut `iterations` where patches stop: at t_i, before that step, floor(n * (1 - r_i)) of n patches go on.

    Raises:
        UserError: not a schedule, or one that leaves no patch.
    """
    check_schedule(iterations, prune_it, prune_ratio)
    if list(prune_it) == [-1]:
        return (Stage(0, iterations, patches),)
    stages, start = [], 0
    for stop, ratio in zip(prune_it, prune_ratio, strict=True):
        if stop > start:
            stages.append(Stage(start, stop, patches))
        start, patches = stop, left_of(patches, ratio, stop)
    return (*stages, Stage(start, iterations, patches))


def ranked(stages: Sequence[Stage], patches: int) -> list[int]:
    """How many patches an image of `patches` has whenever some of them stop, for which they are ranked."""
    counts, left = [], stages[0].patches if stages[0].begins else patches
    for number, stage in enumerate(stages):
        if stage.patches - (len(stage.begins) if number else 0) < left:
            counts.append(left)
        left = stage.patches
    return counts
