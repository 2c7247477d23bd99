"""Which patches stop, and when. A strategy is one small object; `STRATEGIES` names them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from inversion.schedule import Stage, stages_of


class Strategy(Protocol):
    """What the engine asks of a strategy."""

    def stages(self, iterations: int, patches: int) -> tuple[Stage, ...]:
        """The stages of an inversion that starts with `patches` patches."""

    def keep(self, importance: Tensor, count: int) -> Tensor:
        """Importance (B, n) of the remaining patches -> indices (B, count), ascending, of those that go on."""


@dataclass(frozen=True)
class Dense:
    """DeepInversion: no patch ever stops."""

    def stages(self, iterations: int, patches: int) -> tuple[Stage, ...]:
        return stages_of(iterations, patches, [-1], [0])

    def keep(self, importance: Tensor, count: int) -> Tensor:
        raise AssertionError("dense inversion has one stage")


@dataclass(frozen=True)
class Smi:
    """Sparse model inversion (Hu et al., ICML 2024): the patches with the lowest CLS attention stop, on a schedule."""

    prune_it: Sequence[int]
    prune_ratio: Sequence[float]

    def stages(self, iterations: int, patches: int) -> tuple[Stage, ...]:
        return stages_of(iterations, patches, self.prune_it, self.prune_ratio)

    def keep(self, importance: Tensor, count: int) -> Tensor:
        order = importance.argsort(dim=1, descending=True, stable=True)
        return order[:, :count].sort(dim=1).values


STRATEGIES = {"dense": Dense, "smi": Smi}
