"""Sparse model inversion: images out of a trained Vision Transformer (Hu et al., ICML 2024).

`invert` makes them, an `InversionConfig` says how, an `ImagePool` holds them. What can be added from outside is a row
of `PRIORS`, `STRATEGIES`, `IMPORTANCES`, `INITS` or `PROJECTIONS`.
"""

from inversion.config import DEFAULT_WEIGHTS, InversionConfig
from inversion.engine import InvertedBatch, Inverter, Progress, Snapshot, StageStart
from inversion.importance import IMPORTANCES
from inversion.inits import INITS
from inversion.pool import ImagePool
from inversion.presets import PRESETS, configured
from inversion.priors import PRIORS, Context, Loss, LossInputs, Option, Prior, Term
from inversion.projections import PROJECTIONS
from inversion.strategies import STRATEGIES
from inversion.synthesis import SynthesisReport, invert, synthesis_report, synthesize

__all__ = [
    "DEFAULT_WEIGHTS",
    "IMPORTANCES",
    "INITS",
    "PRESETS",
    "PRIORS",
    "PROJECTIONS",
    "STRATEGIES",
    "Context",
    "ImagePool",
    "InversionConfig",
    "InvertedBatch",
    "Inverter",
    "Loss",
    "LossInputs",
    "Option",
    "Prior",
    "Progress",
    "Snapshot",
    "StageStart",
    "SynthesisReport",
    "Term",
    "configured",
    "invert",
    "synthesis_report",
    "synthesize",
]
