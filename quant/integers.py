"""Integer products in the place of simulated ones, for evaluation on CPUs that multiply bytes."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import SparseViT
from quant.insert import QuantizedLinear, quantized_layers
from quant.quantizers import ActivationQuantizer
from utils.device import multiplies_bytes
from utils.errors import UserNote

IMAGES = 8
"""On which integer products are held against simulated ones."""
DIFFERENCE = 0.1
"""Of a layer's output, relative: what activations on the edge between two codes cannot make."""


class IntegerLinear(nn.Module):
    """What a `QuantizedLinear` computes, by one product of int8 codes summed exactly in int32.

    s t (q - z) W + b, with codes q, zero point z, scale s, integer weights W and their scales t. Codes of 0 to 255 are
    shifted by 128 into int8; others fit as they are.
    """

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        quantizer = layer.quantizer
        offset = 128 if quantizer.high > 127 else 0
        self.low, self.high = quantizer.low - offset, quantizer.high - offset
        self.inverse, self.zero_point = 1 / quantizer.scale, int(quantizer.zero_point) - offset
        self.weight = weight = layer.integers()
        self.out_scale = layer.weight_scale * quantizer.scale
        bias = 0 if layer.linear.bias is None else layer.linear.bias.detach()
        self.bias = bias - self.out_scale * (self.zero_point * weight.sum(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        codes = (rows * self.inverse).round_().add_(self.zero_point).clamp_(self.low, self.high)
        out = integer_product(codes, self.weight).float().mul_(self.out_scale).add_(self.bias)
        return out.unflatten(0, x.shape[:-1])


def integer_product(rows: Tensor, weight: Tensor) -> Tensor:
    """Integers from -128 to 127 in any number format, rows (n, in) and a weight (out, in) -> products (n, out), int32.

    `torch._int_mm` reads operands with a row stride of 0 or 1 in the wrong places and says nothing, so no other layout
    than row after row reaches it. A single column, of which the row stride is 1 in any case, gets one of zeros.
    """
    if weight.shape[1] == 1:
        rows, weight = F.pad(rows, (0, 1)), F.pad(weight, (0, 1))
    return torch._int_mm(_row_after_row(rows), _row_after_row(weight).t())


def _row_after_row(x: Tensor) -> Tensor:
    """Integers as int8 in this layout; `contiguous()` would let a single row have any stride."""
    if x.dtype == torch.int8 and x.stride() == (x.shape[1], 1):
        return x
    return torch.empty(x.shape, dtype=torch.int8, device=x.device).copy_(x)


def with_integer_products(model: nn.Module, images: Tensor) -> nn.Module:
    """The same model with `IntegerLinear` layers where this CPU is fast at them, or `model` itself.

    Sums of floats round, so an activation on the edge between two codes may fall to the other side; accuracies do not
    differ by more than that. Inference only. Where a layer gives something else on the first of `images` (B, C, H, W),
    `model` goes on as it is, after a note.
    """
    on_cpu = isinstance(model, SparseViT) and model.device.type == "cpu"
    if not (on_cpu and multiplies_bytes()):
        return model
    found = [name for name, layer in quantized_layers(model).items() if _integer(layer)]
    if not found:
        return model
    fast = copy.deepcopy(model)
    for name in found:
        fast.set_submodule(name, IntegerLinear(fast.get_submodule(name)))
    if not _alike(model, fast, found, images[:IMAGES]):
        text = "integer products do not give what simulated ones do here, so the model is evaluated by these"
        warnings.warn(UserNote(f"{text}: slower, and right (as with --eager)"), stacklevel=3)
        return model
    return fast


def _alike(model: SparseViT, fast: SparseViT, names: list[str], images: Tensor) -> bool:
    """Whether each named layer of both gives the same of the same input; few bits make much of little over many."""
    alike = []

    def compare(layer: IntegerLinear, _: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        near = (layer(inputs[0]) - output).norm() <= DIFFERENCE * output.norm()
        alike.append(bool(near) or not output.isfinite().all())

    pairs = [(model.get_submodule(name), fast.get_submodule(name)) for name in names]
    hooks = [layer.register_forward_hook(partial(compare, other)) for layer, other in pairs]
    try:
        model.forward_images(images)
    finally:
        for hook in hooks:
            hook.remove()
    return all(alike)


def _integer(layer: QuantizedLinear) -> bool:
    """Whether both factors of its product are integers of at most 8 bits."""
    return layer.weight_scale is not None and isinstance(layer.quantizer, ActivationQuantizer)
