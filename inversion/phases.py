"""Phases: stretches of an inversion that differ in what is looked at, each with a learning rate that starts anew."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from inversion.views import canonical_views, parse_views
from utils.calls import canonical
from utils.errors import UserError

EXAMPLE = "2:coarse=2,fresh=1 1:roll.share=0.05"


@dataclass(frozen=True)
class Phase:
    """A share of the iterations, relative to those of the other phases, and what is set in it.

    `coarse`: the image is averaged over squares of so many pixels, and each shown as such a square: what the model is
    fed, by which patches are ranked, and what becomes of patches that stop or are finished in it; terms of the loss see
    the canvas as of that resolution (multi-resolution inversion; Yin et al., CVPR 2020, shrink the image, which a ViT
    of one input size cannot be fed). What pixels of a square differ by stays for a finer phase. `fresh`: Adam begins
    anew with it. `settings`: of views, by (view, setting).
    """

    share: float
    coarse: int = 1
    fresh: bool = False
    settings: Mapping[tuple[str, str], float] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Phase:
        """`SHARE` or `SHARE:key=value,..` with keys `coarse`, `fresh` and `VIEW.SETTING`. Raises `UserError`."""
        share, _, rest = text.partition(":")
        found: dict[str, float] = {}
        try:
            values = {"share": float(share)}
            for part in filter(None, rest.split(",")):
                key, value = part.split("=")
                if key in found:
                    raise ValueError
                found[key] = float(value)
        except ValueError:
            raise UserError(f"--phases {text} is not like {EXAMPLE}") from None
        if not (math.isfinite(values["share"]) and values["share"] > 0):
            raise UserError(f"--phases {text}: the share of a phase is a number above 0")
        coarse, fresh = found.pop("coarse", 1.0), found.pop("fresh", 0.0)
        if not (1 <= coarse <= 1024 and coarse == int(coarse)):
            raise UserError(f"--phases {text}: coarse is a whole number of pixels, from 1 on")
        if fresh not in (0, 1):
            raise UserError(f"--phases {text}: fresh is 1 or 0")
        unknown = [key for key in found if "." not in key]
        if unknown:
            raise UserError(f"--phases {text}: {unknown[0]} is unknown; there are coarse, fresh and VIEW.SETTING")
        settings = {tuple(key.split(".", 1)): value for key, value in sorted(found.items())}
        return cls(values["share"], int(coarse), bool(fresh), settings)

    def text(self) -> str:
        """As every configuration writes it."""
        parts = [f"coarse={self.coarse}"] if self.coarse > 1 else []
        parts += ["fresh=1"] if self.fresh else []
        parts += [f"{view}.{name}={value!r}" for (view, name), value in self.settings.items()]
        return ":".join([repr(self.share).removesuffix(".0"), *([",".join(parts)] if parts else [])])

    def beside(self, texts: Sequence[str]) -> Phase:
        """The phase without settings of views that are not among these, or that these say themselves."""
        there = parse_views(texts)
        said = {
            (name, part.partition("=")[0])
            for name, _, rest in (text.partition(":") for text in texts)
            for part in rest.split(",")
        }
        kept = {key: value for key, value in self.settings.items() if key[0] in there and key not in said}
        return replace(self, settings=kept)

    def views(self, texts: Sequence[str]) -> tuple[str, ...]:
        """The views of a configuration as they are in it. Raises `UserError` for a setting that is not there."""
        views = parse_views(texts)
        for (view, name), value in self.settings.items():
            if view not in views:
                raise UserError(f"--phases {self.text()}: {view} is not among --views {' '.join(texts)}")
            if name not in type(views[view]).__dataclass_fields__:
                raise UserError(f"--phases {self.text()}: the view {view} has no setting {name}")
            views[view] = replace(views[view], **{name: value})
        return canonical_views([canonical(name, view) for name, view in views.items()])


WHOLE = (Phase(1.0),)
"""An inversion without phases."""


def spans(phases: Sequence[Phase], iterations: int) -> list[tuple[int, int]]:
    """The iterations `start` .. `stop - 1` of each phase; none of one whose share is too small for one."""
    shares = [Fraction(str(phase.share)) for phase in phases]
    ends = [math.floor(iterations * done / sum(shares)) for done in itertools.accumulate(shares)]
    return list(zip([0, *ends[:-1]], ends, strict=True))
