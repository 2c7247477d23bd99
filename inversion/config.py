"""What defines an inversion, checked once."""

from __future__ import annotations

import math
from argparse import BooleanOptionalAction
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

from inversion.canvases import CANVASES
from inversion.importance import IMPORTANCES, usual
from inversion.inits import INITS
from inversion.phases import EXAMPLE, WHOLE, Phase, spans
from inversion.priors import PRIORS, Term, options, terms
from inversion.projections import parse_projection
from inversion.schedule import GROWTHS, check_schedule
from inversion.strategies import STRATEGIES, Strategy
from inversion.targets import check_targets
from inversion.views import VIEWS, canonical_views
from utils.cli import Number, any_seed, check_numbers, natural, positive, rate, setting, weight
from utils.errors import UserError

if TYPE_CHECKING:
    from models import PatchGrid, SparseViT

DEFAULT_WEIGHTS = {"oh": 1.0, "tv1": 0.0, "tv2": 1e-4, "l2": 0.0}
DEFAULT_VIEWS = ("roll", "flip")
LR_SCHEDULES = ("constant", "cosine", "phases")
TIMES = {"type": int, "nargs": "+", "metavar": "T"}
DIVISION = Number(int, 2, 2**31 - 1, "32 bits")
DTYPES = ("float32", "bfloat16", "float16", "float64")
STOPPED = ("black", "kept")
OF_STUDENT = {"student", "backbone"}


def _of_canvases(name: str) -> str:
    """What the canvases have, in words."""
    return ", ".join(f"{getattr(kind, name)} of {canvas}" for canvas, kind in CANVASES.items())


@dataclass(frozen=True)
class InversionConfig:
    """Everything that the pixels of a batch depend on besides the model; the defaults are the published setting.

    Raises:
        UserError: a value out of range, an unknown name, or an impossible schedule.
    """

    iterations: int = setting(4000, "optimizer steps per image", type=positive)
    lr: float | None = setting(None, f"Adam's learning rate; default {_of_canvases('lr')}", "--lr_g", type=rate)
    betas: tuple[float, float] = setting((0.5, 0.99), "Adam's averaging", type=float, nargs=2, metavar="B")
    lr_schedule: str | None = setting(
        None,
        f"cosine falls to --lr_end at the end, phases in each phase; default {_of_canvases('lr_schedule')}",
        choices=LR_SCHEDULES,
    )
    lr_end: float = setting(0.0, "learning rate at the end of a cosine", type=weight)
    warmup: int = setting(
        0,
        "iterations in which the learning rate rises from 0, of a phase where it falls in each",
        type=natural,
        metavar="N",
    )
    phases: tuple[str, ...] = setting(
        (),
        f"parts of the iterations with settings of their own, such as {EXAMPLE}; default one",
        nargs="+",
        metavar="P",
    )
    weight_decay: float = setting(0.0, "AdamW's, of the pixels", type=weight)
    canvas: str = setting("pixels", "what is optimized: pixels, or coefficients scaled by 1/f", choices=CANVASES)
    init: str | None = setting(
        None,
        "what to start from: white noise, pink noise with the spectrum of photographs, leaves (shapes in front of "
        f"shapes), scenes (a thing, leaves and a ground of two parts); default {_of_canvases('init')}",
        choices=INITS,
    )
    weights: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_WEIGHTS))
    """Of the terms of the loss, by name."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Settings of the priors besides weights; what is left out has its default."""
    strategy: str | None = setting(None, "what stops; default smi with --prune_it, else dense", choices=STRATEGIES)
    importance: str = setting(
        "auto",
        "what ranks the patches; auto: the attention of the class token (cls), of the pool, or of all tokens",
        choices=("auto", *IMPORTANCES),
    )
    prune_it: tuple[int, ...] = setting((-1,), "iterations at which patches stop; default -1: dense", **TIMES)
    prune_ratio: tuple[float, ...] = setting(
        (0.0,), "share of the remaining patches stopped at each of them, in [0, 1)", type=float, nargs="+", metavar="R"
    )
    pri_division: int = setting(4, "images of one pri trajectory", type=DIVISION, metavar="V")
    targets: tuple[str, ...] = setting(
        ("uniform",), "labels: uniform (default), balanced, class:K, or a list of classes", nargs="+", metavar="T"
    )
    soft_label: float = setting(0.0, "share of a label spread over all classes", type=float, metavar="ALPHA")
    soft_logits: float = setting(
        0.0, "instead: softmax of normal logits, the label's so much higher", type=weight, metavar="V"
    )
    projections: tuple[str, ...] = setting(
        ("clamp",), "after a step: clamp (always), lowpass:cutoff=0.8,every=100", "--projection", nargs="+", metavar="P"
    )
    views: tuple[str, ...] = setting(
        DEFAULT_VIEWS,
        f"changes at every step, by chance: {', '.join(VIEWS)}; with settings crop:area=0.35; default roll flip",
        nargs="+",
        metavar="V",
    )
    flip: bool = setting(True, "--no-flip leaves flip out of --views; default yes", action=BooleanOptionalAction)
    stopped: str = setting(
        "black", "what pictures show of a stopped patch: black, or kept as it was then", choices=STOPPED
    )
    copies: int = setting(1, "looks at each image that a step takes the mean over", type=positive, metavar="N")
    snapshots: tuple[int, ...] = setting((), "iterations at which a batch is kept, for pictures; default none", **TIMES)
    student: str | None = None
    """What the student is that terms look at and, where it matters, how it learns; ignored without such a term."""
    batch_size: int = 32
    """Images; a strategy that makes several of one trajectory optimizes fewer."""
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_numbers(self)
        positive.check(self.batch_size, "the batch size")
        any_seed.check(self.seed, "--seed")
        _require(self.dtype, DTYPES, "--dtype")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"--betas {' '.join(map(str, self.betas))} are not two numbers in [0, 1)")
        _require(self.canvas, CANVASES, "--canvas")
        for name in ("lr", "lr_schedule", "init"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(CANVASES[self.canvas], name))
        _require(self.lr_schedule, LR_SCHEDULES, "--lr_schedule")
        _require(self.init, INITS, "--init")
        views = canonical_views(self.views)
        object.__setattr__(self, "views", tuple(view for view in views if self.flip or view != "flip"))
        object.__setattr__(self, "flip", "flip" in self.views)
        if not self.phases and self.strategy == "grow" and self.lr_schedule == "phases":
            object.__setattr__(self, "phases", ("1",) * GROWTHS)  # those in which it grows
        phases = [Phase.parse(text) for text in self.phases]
        whole = [replace(phase, share=1.0) for phase in phases] == list(WHOLE)
        object.__setattr__(self, "phases", () if whole else tuple(phase.text() for phase in phases))
        for phase in phases:
            phase.views(self.views)
        falls = self._falls()
        shortest = min(stop - start for start, stop in falls)
        if self.warmup >= shortest:
            what = "the iterations of the shortest phase" if len(falls) > 1 else "the iterations"
            raise UserError(f"--warmup {self.warmup} is not in [0, {shortest}), {what}")
        if self.lr_end > self.lr:
            raise UserError(f"--lr_end {self.lr_end} is above --lr_g {self.lr}")
        _require(self.stopped, STOPPED, "--stopped")
        self._check_weights()
        check_targets(self.targets)
        if not 0 <= self.soft_label < 1:
            raise UserError(f"--soft_label {self.soft_label} is not in [0, 1)")
        if self.soft_label and self.soft_logits:
            raise UserError("--soft_label and --soft_logits are two ways to make labels soft; give one")
        for text in self.projections:
            parse_projection(text)
        _require(self.importance, ("auto", *IMPORTANCES), "--importance")
        self._check_strategy()
        outside = [t for t in self.snapshots if not 0 <= t <= self.iterations]
        if outside:
            raise UserError(f"--snapshots {outside[0]} is not in [0, {self.iterations}], the iterations")

    def _check_weights(self) -> None:
        for name, value in self.weights.items():
            _require(name, terms(), "the loss term")
            weight.check(value, f"--{name}")
        for name, value in self.options.items():
            _require(name, options(), "the option")
            if isinstance(options()[name].type, Number):
                options()[name].type.check(value, f"--{name}")
        looking = [name for name, value in self.weights.items() if value and terms()[name].needs & OF_STUDENT]
        if not looking:
            object.__setattr__(self, "student", None)
        elif self.student is None:
            prior = next(name for name, prior in PRIORS.items() if looking[0] in prior.terms)
            raise UserError(f"--{looking[0]}, of the prior {prior}, looks at a student; test_kt.py has one")
        if not any(self.weights.values()):
            raise UserError("every loss weight is 0; give at least --oh")
        object.__setattr__(self, "options", self._active_options())

    def _check_strategy(self) -> None:
        check_schedule(self.iterations, self.prune_it, self.prune_ratio)
        scheduled = self.prune_it != (-1,)
        if self.strategy is None:
            object.__setattr__(self, "strategy", "smi" if scheduled else "dense")
        _require(self.strategy, STRATEGIES, "--strategy")
        if self.strategy in ("dense", "pri"):
            if scheduled:
                raise UserError(f"--strategy {self.strategy} has no schedule; leave out --prune_it and --prune_ratio")
        elif not scheduled and self.strategy in ("smi", "lowest", "highest", "random"):
            raise UserError(
                f"--strategy {self.strategy} needs a schedule, such as --prune_it 50 100 200 300 "
                "--prune_ratio 0.3 0.3 0.3 0.3"
            )

    def _active_options(self) -> dict[str, object]:
        """The options of the priors that have a term, filled in."""
        active = {name for name, weight in self.weights.items() if weight}
        known = [prior.options for prior in PRIORS.values() if active & set(prior.terms)]
        return {name: self.options.get(name, option.default) for group in known for name, option in group.items()}

    def active_terms(self) -> list[tuple[float, Term]]:
        """Weight and term, of those that have a weight."""
        return [(weight, terms()[name]) for name, weight in self.weights.items() if weight]

    def needs(self, what: str) -> bool:
        """Whether a term needs `student`, `backbone` or `earlier`."""
        return any(what in term.needs for _, term in self.active_terms())

    def lr_at(self, iteration: int) -> float:
        """The learning rate of a 0-based iteration."""
        start, stop = next(span for span in self._falls() if iteration < span[1])
        if iteration - start < self.warmup:
            return self.lr * (iteration - start + 1) / self.warmup
        if self.lr_schedule == "constant":
            return self.lr
        done = (iteration - start - self.warmup) / (stop - start - self.warmup)
        return self.lr_end + (self.lr - self.lr_end) * (1 + math.cos(math.pi * done)) / 2

    def phase_list(self) -> tuple[Phase, ...]:
        """The phases, at least one."""
        return tuple(Phase.parse(text) for text in self.phases) or WHOLE

    def spans(self) -> list[tuple[int, int]]:
        """The iterations `start` .. `stop - 1` of each of them."""
        return spans(self.phase_list(), self.iterations)

    def _falls(self) -> list[tuple[int, int]]:
        """The iterations in which the learning rate has its course, once or in every phase."""
        if self.lr_schedule != "phases":
            return [(0, self.iterations)]
        return [(start, stop) for start, stop in self.spans() if start < stop]

    def settings(self) -> dict:
        """The configuration as JSON holds it; two that mean the same are equal."""
        weights = {name: float(weight) for name, weight in sorted(self.weights.items()) if weight}
        schedule = {"prune_it": list(self.prune_it), "prune_ratio": [float(ratio) for ratio in self.prune_ratio]}
        names = "betas", "targets", "projections", "snapshots", "phases"
        lists = {name: list(getattr(self, name)) for name in names}
        options = dict(sorted(self.options.items()))
        same = {**asdict(self), **lists, **schedule, "lr": float(self.lr), "weights": weights, "options": options}
        if self.strategy != "pri":
            del same["pri_division"]
        # As in pools from before there was a choice.
        usual = {"canvas": "pixels", "copies": 1, "phases": [], "stopped": "black"}
        usual |= {"lr_end": 0.0, "weight_decay": 0.0, "soft_logits": 0.0}
        usual |= {"init": "white"} if self.canvas == "pixels" else {}
        for name in [name for name, value in usual.items() if same[name] == value]:
            del same[name]
        same["views"] = list(self.views)
        if set(self.views) - {"flip"} == {"roll"}:
            del same["views"]
        return same

    @classmethod
    def from_settings(cls, settings: Mapping[str, object]) -> InversionConfig:
        """The configuration that `settings` describes. Raises `UserError` where they describe none."""
        try:
            return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()})
        except UserError:
            raise
        except Exception as error:  # values of JSON can be of any type
            raise UserError(f"these are not the settings of an inversion: {type(error).__name__}: {error}") from None

    def of(self, vit: SparseViT) -> InversionConfig:
        """The configuration with what `auto` stands for in this model; `cls` where nothing is ranked.

        Raises `UserError` for a phase that is coarser than its patches can be.
        """
        for phase in self.phase_list():
            vit.grid.coarser(phase.coarse)
        if self.importance != "auto":
            return self
        ranks = self.strategy != "dense" and not (self.strategy == "grow" and self.prune_it == (-1,))
        return replace(self, importance=usual(vit) if ranks else "cls")

    def kept(self, grid: PatchGrid) -> int:
        """Patches of a finished image of that grid. Raises `UserError` where none is left."""
        strategy = self.strategy_object()
        stages = strategy.stages(self.iterations, grid)
        return stages[0].patches - stages[1].patches if strategy.detaches else stages[-1].patches

    @property
    def shows_stopped(self) -> bool:
        """Whether pictures show stopped patches as they were when they stopped; if not, black."""
        shown = CANVASES[self.canvas].shows_stopped or self.stopped == "kept"
        return shown and not self.strategy_object().detaches

    def strategy_object(self) -> Strategy:
        """The strategy that the configuration asks for."""
        return STRATEGIES[self.strategy](self)


def _require(name: str, known: Mapping[str, object] | tuple[str, ...], what: str) -> None:
    if name not in known:
        raise UserError(f"{what} {name} is unknown; there are {', '.join(known)}")
