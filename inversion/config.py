"""What defines an inversion, checked once."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

from inversion.losses import LOSSES
from inversion.schedule import check_schedule
from inversion.strategies import STRATEGIES, Strategy
from utils.errors import UserError

DEFAULT_WEIGHTS = {"oh": 1.0, "tv1": 0.0, "tv2": 1e-4, "l2": 0.0}


@dataclass(frozen=True)
class InversionConfig:
    """Everything that the pixels of a batch depend on besides the model; the defaults are the published setting.

    Raises:
        UserError: a value out of range, an unknown loss, or an impossible schedule.
    """

    iterations: int = 4000
    lr: float = 0.25
    weights: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_WEIGHTS))
    prune_it: tuple[int, ...] = (-1,)
    prune_ratio: tuple[float, ...] = (0.0,)
    flip: bool = True
    student: str | None = None
    """What the student of the adversarial loss is and how it learns; None without that loss."""
    batch_size: int = 32
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise UserError(f"--iterations {self.iterations} is below 1")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise UserError(f"--lr_g {self.lr} is not a positive number")
        if self.batch_size < 1:
            raise UserError(f"the batch size {self.batch_size} is below 1")
        for name, weight in self.weights.items():
            if not (weight >= 0 and math.isfinite(weight)):
                raise UserError(f"--{name} {weight} is not a weight of 0 or more")
            if weight and name not in LOSSES:
                raise UserError(f"--{name} is not available; the losses are {', '.join(LOSSES)}")
        if bool(self.weights.get("adv")) != (self.student is not None):
            raise UserError("--adv needs a student to disagree with; test_kt.py has one")
        if not any(self.weights.values()):
            raise UserError("every loss weight is 0; give at least --oh")
        check_schedule(self.iterations, self.prune_it, self.prune_ratio)

    def settings(self) -> dict:
        """The configuration as JSON holds it; two that mean the same are equal."""
        weights = {name: float(weight) for name, weight in sorted(self.weights.items()) if weight}
        schedule = {"prune_it": list(self.prune_it), "prune_ratio": [float(ratio) for ratio in self.prune_ratio]}
        return {**asdict(self), "lr": float(self.lr), "weights": weights, **schedule}

    @property
    def strategy_name(self) -> str:
        return "dense" if self.prune_it == (-1,) else "smi"

    def strategy(self) -> Strategy:
        """The strategy object that the schedule asks for."""
        if self.strategy_name == "dense":
            return STRATEGIES["dense"]()
        return STRATEGIES["smi"](self.prune_it, self.prune_ratio)
