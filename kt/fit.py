"""A linear head that is best for all that was looked at, instead of one that steps have brought somewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from kt.match import distillation_loss

ITERATIONS = 200
"""Of L-BFGS, at most. Whitened, tens are enough."""
DROPPED = 1e-10
"""Share of the largest variance below which a direction of the features is none."""


def fitted_head(features: Tensor, logits: Tensor, temperature: float, penalty: float) -> tuple[Tensor, Tensor]:
    """Weights (classes, D) and biases (classes,), float64, with which a head imitates a teacher best.

    Least is `distillation_loss` of all rows (Hinton et al., 2015) and `penalty` / (2 classes) times the squared weights
    of features of variance 1: convex. Where logits are small beside the temperature this is the ridge regression of the
    centred logits, which the search starts from (L-BFGS, Liu and Nocedal, 1989, in whitened features).

    Args:
        features: (N, D), what the head reads.
        logits: (N, classes), the teacher's.
        temperature: of the distributions.
        penalty: 0 takes the smallest of heads that are equally good.
    """
    where = torch.device("cpu") if features.device.type == "mps" else features.device  # which has no float64
    x, wanted = features.to(where).double(), logits.to(where).double()
    mean = x.mean(dim=0)
    x = x - mean
    spread = x.square().mean(dim=0).clamp(min=1e-12).sqrt()
    x /= spread
    variance, directions = torch.linalg.eigh(x.T @ x / len(x))
    kept = variance > DROPPED * variance[-1]
    cost = variance[kept] + penalty
    basis = directions[:, kept] / cost.sqrt()
    x = x @ basis
    centred = wanted - wanted.mean(dim=1, keepdim=True)
    biases = centred.mean(dim=0).requires_grad_(True)
    weights = ((centred - biases.detach()).T @ x / len(x)).requires_grad_(True)
    weigh = penalty / (2 * wanted.shape[1])
    search = torch.optim.LBFGS(
        [weights, biases],
        max_iter=ITERATIONS,
        history_size=20,
        tolerance_grad=1e-8,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        search.zero_grad()
        found = distillation_loss(torch.addmm(biases, x, weights.T), wanted, temperature)
        found = found + weigh * (weights.square() / cost).sum()
        found.backward()
        return found

    search.step(loss)
    with torch.no_grad():
        of_features = weights @ basis.T / spread
        return of_features, biases - of_features @ mean
