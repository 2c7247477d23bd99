"""Sparse model inversion: images out of a trained Vision Transformer (Hu et al., ICML 2024).

`invert` makes them, an `InversionConfig` says how, an `ImagePool` holds them. What can be added from outside is a row
of `PRIORS`, `VIEWS`, `CANVASES`, `STRATEGIES`, `IMPORTANCES`, `INITS` or `PROJECTIONS`.
"""

from utils.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "inversion.canvases": ("CANVASES",),
        "inversion.config": ("DEFAULT_WEIGHTS", "InversionConfig"),
        "inversion.engine": ("InvertedBatch", "Inverter", "Progress", "Snapshot", "StageStart"),
        "inversion.importance": ("IMPORTANCES",),
        "inversion.inits": ("INITS",),
        "inversion.pool": ("ImagePool",),
        "inversion.presets": ("PRESETS", "configured"),
        "inversion.priors": ("PRIORS", "Context", "Loss", "LossInputs", "Option", "Prior", "Term"),
        "inversion.projections": ("PROJECTIONS",),
        "inversion.strategies": ("STRATEGIES",),
        "inversion.synthesis": ("SynthesisReport", "invert", "synthesis_report", "synthesize"),
        "inversion.views": ("VIEWS",),
    },
)
