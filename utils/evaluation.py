"""Accuracy of one or more models in a single pass over the data."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from models import SparseViT
from quant.integers import with_integer_products
from utils.data import tell_transparent
from utils.device import require_memory, within_memory
from utils.ranks import rank, summed


def require_memory_for(vit: SparseViT, data: DataLoader, device: torch.device) -> None:
    """Raise `UserError`, before anything is computed, where a batch of an evaluation finds no room on `device`."""
    each = 4 * (5 * vit.largest(vit.grid.count + vit.prefix_tokens) + 3 * vit.grid.count * vit.grid.pixels)
    require_memory(min(data.batch_size, len(data.dataset)), each, device, "an evaluation batch", "--val-batchsize")


@torch.no_grad()
def evaluate(
    models: Mapping[str, SparseViT],
    data: DataLoader,
    device: torch.device,
    agreement_with: str | None = None,
    progress: bool = False,
    eager: bool = False,
) -> dict[str, dict[str, float]]:
    """Evaluate every model on the same batches; quantized layers by integer products where the CPU has them.

    Args:
        models: name -> model, in float32 on `device`.
        data: batches of normalized images (B, C, H, W) and labels (B,); of several ranks, each has its own part.
        device: where the models are.
        agreement_with: one of the models, which the others are compared with.
        progress: show a progress bar on stderr.
        eager: simulate quantized layers everywhere.

    Returns:
        name -> `top1` and `top5` in per cent, `loss` (mean cross-entropy), `images`, and `agreement` with that model:
        per cent of the images that both put in the same class.

    Raises:
        UserError: not enough GPU memory.
    """
    sums = {name: [0.0, 0.0, 0.0, 0.0] for name in models}
    images_seen = 0
    for images, labels in tqdm(data, desc="evaluation", unit="batch", disable=not progress or rank() > 0):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        if not images_seen and not eager:
            models = {name: with_integer_products(model, images) for name, model in models.items()}
        run = partial(_outputs, models, images)
        outputs = within_memory(run, run, len(images), "--val-batchsize", device)
        compared = outputs.get(agreement_with)
        for name, logits in outputs.items():
            same = logits.new_zeros(()) if compared is None else (logits.argmax(1) == compared.argmax(1)).sum()
            ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            seen = torch.stack([ranked[:, 0].sum(), ranked.sum(), loss, same]).tolist()
            sums[name] = [total + value for total, value in zip(sums[name], seen, strict=True)]
        images_seen += len(labels)
    tell_transparent(getattr(data, "dataset", None), device)
    images_seen = round(summed([images_seen], device)[0])
    sums = {name: summed(total, device) for name, total in sums.items()}
    return {
        name: {
            "top1": round(100 * total[0] / images_seen, 3),
            "top5": round(100 * total[1] / images_seen, 3),
            "loss": total[2] / images_seen,
            "images": images_seen,
            **({"agreement": round(100 * total[3] / images_seen, 3)} if agreement_with not in (None, name) else {}),
        }
        for name, total in sums.items()
    }


def _outputs(models: Mapping[str, SparseViT], images: Tensor, few: int | None = None) -> dict[str, Tensor]:
    """Logits of every model, of all images or the first few."""
    return {name: model.forward_images(images[:few]) for name, model in models.items()}
