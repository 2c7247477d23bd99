"""How far a quantized model is from its original, measured without labels and without data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models import SparseImages, SparseViT

MEASURED = ((0.0, 0.0), (0.05, 1.0), (0.1, 4.0), (0.6, 20.0), (0.8, 70.0), (1.0, 95.0))
"""Lost confidence and lost top-1 in points, of 120 quantized models (`scripts/studies/label_free.py`)."""


@dataclass(frozen=True)
class Fidelity:
    """What two models say of the same images.

    `agreement`: images that both put in the same class, per cent. `divergence`: mean Kullback-Leibler divergence of the
    quantized model's prediction from the original's, nats. `lost_confidence`: how much less probable the original's
    class is to the quantized model, mean, in [0, 1]; where it is more probable it counts as no loss.
    """

    agreement: float
    divergence: float
    lost_confidence: float

    @property
    def predicted_drop(self) -> float:
        """Points of top-1 that it will lose on real images, by the curve through what the models of `MEASURED` lost."""
        return float(np.interp(self.lost_confidence, *zip(*MEASURED, strict=True)))


@torch.no_grad()
def fidelity(vit: SparseViT, quantized: SparseViT, images: SparseImages, batch_size: int = 32) -> Fidelity:
    """Compare the predictions of a model and its quantized copy.

    Args:
        vit: the full-precision model.
        quantized: what `quantize` made of it, on the same device.
        images: ones that it was not calibrated on; their labels are not used.
        batch_size: images a forward pass.
    """
    wanted, found = (log_probabilities(model, images, batch_size) for model in (vit, quantized))
    best = wanted.argmax(dim=1, keepdim=True)
    same = (best[:, 0] == found.argmax(dim=1)).double().mean().item()
    lost = (wanted.gather(1, best).exp() - found.gather(1, best).exp()).clamp(min=0).mean().item()
    return Fidelity(round(100 * same, 2), divergence(wanted, found), lost)


def divergence(wanted: Tensor, found: Tensor) -> float:
    """Mean Kullback-Leibler divergence of log-probabilities (N, classes) from those that are wanted, nats."""
    return (wanted.exp() * (wanted - found)).sum(dim=1).mean().item()


def log_probabilities(vit: SparseViT, images: SparseImages, batch_size: int) -> Tensor:
    """Predictions (N, classes), in float64."""
    batches = images.batches(batch_size)
    logits = [vit(batch.patches.to(vit.device), batch.positions.to(vit.device)).logits for batch in batches]
    return torch.cat(logits).double().log_softmax(dim=1)
