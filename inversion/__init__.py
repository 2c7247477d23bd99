"""Sparse model inversion: images out of a trained Vision Transformer (Hu et al., ICML 2024)."""

from inversion.config import DEFAULT_WEIGHTS, InversionConfig
from inversion.engine import InvertedBatch, Inverter, Progress, Snapshot, StageStart
from inversion.pool import ImagePool
from inversion.priors import PRIORS
from inversion.strategies import STRATEGIES
from inversion.synthesis import SynthesisReport, synthesis_report, synthesize

__all__ = [
    "DEFAULT_WEIGHTS",
    "PRIORS",
    "STRATEGIES",
    "ImagePool",
    "InversionConfig",
    "InvertedBatch",
    "Inverter",
    "Progress",
    "Snapshot",
    "StageStart",
    "SynthesisReport",
    "synthesis_report",
    "synthesize",
]
