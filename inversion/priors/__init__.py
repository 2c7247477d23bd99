"""Priors: what an inverted image is asked to be besides sure of its label. One file each; `PRIORS` names them."""

from inversion.priors import adversarial, cmi, deepinversion, mimiq, natural, psaq, sardfq, synq
from inversion.priors.base import Context, Loss, LossInputs, Option, Prior, Term
from inversion.priors.deepinversion import CrossEntropy

PRIORS: dict[str, Prior] = {
    "deepinversion": deepinversion.PRIOR,
    "psaq": psaq.PRIOR,
    "mimiq": mimiq.PRIOR,
    "sardfq": sardfq.PRIOR,
    "synq": synq.PRIOR,
    "cmi": cmi.PRIOR,
    "adversarial": adversarial.PRIOR,
    "natural": natural.PRIOR,
}

LABELS = Term(CrossEntropy, 1.0, "weight of the cross-entropy with the target labels")
"""The one term that every inversion has."""


def terms() -> dict[str, Term]:
    """Every known term by its name, the labels' first."""
    return {"oh": LABELS, **{name: term for prior in PRIORS.values() for name, term in prior.terms.items()}}


def options() -> dict[str, Option]:
    """Every known option by its name."""
    return {name: option for prior in PRIORS.values() for name, option in prior.options.items()}


__all__ = [
    "LABELS",
    "PRIORS",
    "Context",
    "Loss",
    "LossInputs",
    "Option",
    "Prior",
    "Term",
    "options",
    "terms",
]
