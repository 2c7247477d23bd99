"""Post-training quantization: observe activations on calibration images, then fix the ranges."""

from __future__ import annotations

import torch

from models import SparseImages, SparseViT
from quant.insert import quantized_vit, quantizers
from quant.quantizers import OBSERVERS
from utils.errors import UserError
from utils.ranks import rank, ranks

BITS = (*range(2, 9), 32)


def check_bits(w_bit: int, a_bit: int) -> None:
    """Raise `UserError` unless both widths can be had."""
    for flag, bits in (("--w_bit", w_bit), ("--a_bit", a_bit)):
        if bits not in BITS:
            raise UserError(f"{flag} {bits} is not 2 to 8, or 32 for full precision")


@torch.no_grad()
def calibrate(
    vit: SparseViT, images: SparseImages, w_bit: int, a_bit: int, observer: str = "minmax", batch_size: int = 32
) -> SparseViT:
    """A quantized copy of `vit`, its activation ranges taken from `images`; only kept patches are fed.

    The weights are quantized first, so that the ranges are those of the model that will run. Several ranks divide the
    batches and end with the same ranges.

    Args:
        vit: the full-precision model, on its device.
        images: calibration images, normalized; moved to the model's device batch by batch.
        w_bit: bits of the weights, 2 to 8 or 32.
        a_bit: bits of the activations, 2 to 8 or 32.
        observer: a key of `OBSERVERS`.
        batch_size: images a forward pass.

    Raises:
        UserError: widths out of range, no images, or more ranks than batches.
    """
    check_bits(w_bit, a_bit)
    if not len(images):
        raise UserError("there are no calibration images")
    quantized = quantized_vit(vit, w_bit, a_bit, OBSERVERS[observer])
    batches = images.batches(batch_size)
    if ranks() > len(batches):
        raise UserError(
            f"{ranks()} ranks for {len(batches)} calibration batches; start fewer or lower --calib-batchsize"
        )
    for batch in batches[rank() :: ranks()]:
        quantized(batch.patches.to(vit.device), batch.positions.to(vit.device))
    for quantizer in quantizers(quantized).values():
        quantizer.freeze()
    return quantized
