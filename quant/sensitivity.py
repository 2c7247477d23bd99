"""How much each layer alone costs when it is quantized: what it does to the predictions on the calibration images."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from models import SparseImages, SparseViT
from quant.calibration import calibrated, fitting
from quant.config import QuantConfig
from quant.fidelity import divergence, log_probabilities
from quant.insert import places
from quant.observers import OBSERVERS
from utils.pictures import save_figure
from utils.ranks import rank


@torch.no_grad()
def sensitivity(vit: SparseViT, images: SparseImages, config: QuantConfig, progress: bool = False) -> list[dict]:
    """Quantize one layer (or tap) after another, all others in full precision; no labels are needed.

    Returns:
        A row for each, the costliest first: `layer`, `w_bit` (None of a tap), `a_bit`, `divergence` (mean
        Kullback-Leibler divergence of the prediction from the full-precision one, in nats) and `changed` (per cent of
        the images that are classified otherwise).
    """
    config = fitting(vit, config)
    images = config.fed(images, vit.grid)
    # Alone, a layer has no error in front of it that it could answer for.
    reference, quantized = calibrated(vit, images, dataclasses.replace(config, compensate=False))
    names = list(places(vit, OBSERVERS[config.method]))
    widths = config.widths(names, len(vit.blocks))
    expected = log_probabilities(reference, images, config.batch_size)
    rows = []
    for name in tqdm(names, desc="sensitivity", unit="layer", disable=not progress or rank() > 0):
        original = reference.get_submodule(name)
        reference.set_submodule(name, quantized.get_submodule(name))
        found = log_probabilities(reference, images, config.batch_size)
        reference.set_submodule(name, original)
        changed = (found.argmax(dim=1) != expected.argmax(dim=1)).float().mean().item()
        w_bit, a_bit = widths[name]
        rows.append(
            {
                "layer": name,
                "w_bit": None if "tap_" in name else w_bit,
                "a_bit": a_bit,
                "divergence": divergence(expected, found),
                "changed": round(100 * changed, 2),
            }
        )
    return sorted(rows, key=lambda row: -row["divergence"])


def save_sensitivity(path: Path, rows: list[dict]) -> None:
    """The divergences as bars, in the order of the table."""
    figure = Figure(figsize=(8, 1.2 + 0.16 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh([row["layer"] for row in rows], [max(row["divergence"], 0) for row in rows], color="tab:blue")
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.tick_params(axis="y", labelsize=7)
    axes.set(xlabel="divergence of the prediction with this layer alone quantized, nats")
    save_figure(path, figure)
