"""Which patches stop, and when. A strategy is one small object; `STRATEGIES` names them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from inversion.schedule import GROWTHS, Stage, check_schedule, left_of, stages_of
from utils.errors import UserError
from utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from models import PatchGrid


class Strategy(Protocol):
    """What the engine asks of a strategy."""

    detaches: bool
    """Whether the patches that stop become images of their own."""

    def stages(self, iterations: int, grid: PatchGrid) -> tuple[Stage, ...]:
        """The stages of an inversion of images of that grid."""

    def keep(self, importance: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Importance (B, n) of the remaining patches -> indices (B, count), ascending, of those that go on."""


@dataclass(frozen=True)
class Dense:
    """DeepInversion: no patch ever stops."""

    detaches = False

    def stages(self, iterations: int, grid: PatchGrid) -> tuple[Stage, ...]:
        return stages_of(iterations, grid.count, [-1], [0])

    def keep(self, importance: Tensor, count: int, generator: torch.Generator) -> Tensor:
        raise AssertionError("dense inversion has one stage")


@dataclass(frozen=True)
class StopLowest:
    """Sparse model inversion (Hu et al., ICML 2024): the least important patches stop, on a schedule."""

    prune_it: Sequence[int]
    prune_ratio: Sequence[float]
    detaches = False

    def stages(self, iterations: int, grid: PatchGrid) -> tuple[Stage, ...]:
        return stages_of(iterations, grid.count, self.prune_it, self.prune_ratio)

    def keep(self, importance: Tensor, count: int, generator: torch.Generator) -> Tensor:
        return highest(importance, count)


class StopHighest(StopLowest):
    """A control: the most important patches stop."""

    def keep(self, importance: Tensor, count: int, generator: torch.Generator) -> Tensor:
        return highest(-importance, count)


class StopRandom(StopLowest):
    """A control: patches stop at random."""

    def keep(self, importance: Tensor, count: int, generator: torch.Generator) -> Tensor:
        return highest(torch.rand(importance.shape, generator=generator).to(importance.device), count)


@dataclass(frozen=True)
class PatchRebirth:
    """Patch Rebirth Inversion (2025): the most important patches leave as an image, the others go on as the next one.

    Of N patches N / v leave at iteration k * floor(T / v), k = 1 .. v - 1, and N / v at the end: v images with disjoint
    patches out of one trajectory. Where v does not divide N, the N mod v least important are dropped at the end.
    """

    division: int
    detaches = True

    def stages(self, iterations: int, grid: PatchGrid) -> tuple[Stage, ...]:
        patches = grid.count
        size, length = patches // self.division, iterations // self.division
        if size < 1 or length < 1:
            raise UserError(
                f"--pri_division {self.division} needs at least as many patches and iterations; "
                f"there are {patches} and {iterations}"
            )
        starts = [k * length for k in range(self.division)]
        return tuple(
            Stage(start, stop, patches - k * size)
            for k, (start, stop) in enumerate(zip(starts, [*starts[1:], iterations], strict=True))
        )

    def keep(self, importance: Tensor, count: int, generator: torch.Generator) -> Tensor:
        return highest(-importance, count)


class Grow(StopLowest):
    """The centering of Plug-In Inversion (Ghiasi et al., ICML 2022): patches begin, from the middle outwards.

    The image is at first the central part of it with a quarter of its sides, and grows by an eighth of them in
    `GROWTHS` phases of equal length to all of it; parts are whole patches. A model that runs on kept patches is fed the
    part as it is, where the paper enlarges it or resamples position embeddings. The least important of the patches that
    have begun stop, on a schedule, if there is one; where patches stop and begin at once, they stop first. A roll moves
    the part on the grid, as any sparse image, so what its remainder pushes out of the part is not read in that step;
    the paper's wraps around within the part.
    """

    def stages(self, iterations: int, grid: PatchGrid) -> tuple[Stage, ...]:
        check_schedule(iterations, self.prune_it, self.prune_ratio)
        scheduled = list(self.prune_it) != [-1]
        stops = dict(zip(self.prune_it, self.prune_ratio, strict=True)) if scheduled else {}
        begins, seen = {}, set()
        for phase in range(GROWTHS):
            more = central_patches(grid, (phase + 2) / (GROWTHS + 1)) - seen
            if more:
                begins.setdefault(phase * iterations // GROWTHS, set()).update(more)
                seen |= more
        starts, stages, patches = sorted({*stops, *begins}), [], 0
        for start, stop in zip(starts, [*starts[1:], iterations], strict=True):
            if patches and start in stops:
                patches = left_of(patches, stops[start], start)
            patches += len(begins.get(start, ()))
            stages.append(Stage(start, stop, patches, tuple(sorted(begins.get(start, ())))))
        return tuple(stages)


def central_patches(grid: PatchGrid, share: float) -> set[int]:
    """Positions of the middle of the grid that has a share of its sides, at least a patch."""
    middle = []
    for count in (grid.rows, grid.cols):
        size = max(1, round(share * count))
        middle.append(range((count - size) // 2, (count - size) // 2 + size))
    return {row * grid.cols + col for row in middle[0] for col in middle[1]}


def highest(importance: Tensor, count: int) -> Tensor:
    """Indices (B, count), ascending, of the `count` highest values of (B, n); of equal ones the first."""
    order = importance.argsort(dim=1, descending=True, stable=True)
    return order[:, :count].sort(dim=1).values


def others(kept: Tensor, count: int) -> Tensor:
    """Indices (B, count - k), ascending, of 0 .. count - 1 that are not among `kept` (B, k)."""
    free = torch.ones(len(kept), count, dtype=torch.uint8, device=kept.device).scatter_(1, kept, 0)
    return highest(free, count - kept.shape[1])


STRATEGIES = {
    "dense": lambda config: Dense(),
    "smi": lambda config: StopLowest(config.prune_it, config.prune_ratio),
    "lowest": lambda config: StopLowest(config.prune_it, config.prune_ratio),
    "highest": lambda config: StopHighest(config.prune_it, config.prune_ratio),
    "random": lambda config: StopRandom(config.prune_it, config.prune_ratio),
    "pri": lambda config: PatchRebirth(config.pri_division),
    "grow": lambda config: Grow(config.prune_it, config.prune_ratio),
}
