"""Where the quantizers go in a Vision Transformer."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor, nn

from models import SparseViT
from quant.quantizers import ActivationQuantizer, Observer, quantized_weight


class QuantizedLinear(nn.Module):
    """A linear layer (or the patch projection) with a quantizer on its input and its weight quantized once."""

    def __init__(self, linear: nn.Linear, quantizer: nn.Module, w_bit: int) -> None:
        super().__init__()
        self.quantizer, self.linear = quantizer, linear
        if w_bit < 32:
            linear.weight = nn.Parameter(quantized_weight(linear.weight, w_bit), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.quantizer(x))


def quantized_vit(vit: SparseViT, w_bit: int, a_bit: int, observer: Callable[[], Observer]) -> SparseViT:
    """A copy of `vit` with quantized weights and observing activation quantizers.

    Quantizers sit on the input of every linear layer and of the patch projection, on q, k, v, on the attention scores
    before the softmax, on both residual sums of every block and on the embeddings.

    Args:
        vit: the full-precision model.
        w_bit: bits of the weights, 2 to 8; 32 leaves them alone.
        a_bit: bits of the activations, 2 to 8; 32 leaves them alone.
        observer: makes the observer of each activation quantizer.
    """
    vit = copy.deepcopy(vit).requires_grad_(False)
    if w_bit == a_bit == 32:
        return vit
    for module in list(vit.modules()):
        if isinstance(module, QuantizedLinear):
            continue
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, QuantizedLinear(child, _quantizer(a_bit, observer), w_bit))
            elif name.startswith("tap_"):
                setattr(module, name, _quantizer(a_bit, observer))
    return vit


def quantizers(vit: nn.Module) -> dict[str, ActivationQuantizer]:
    """The activation quantizers of a model, by name."""
    return {name: module for name, module in vit.named_modules() if isinstance(module, ActivationQuantizer)}


def _quantizer(bits: int, observer: Callable[[], Observer]) -> nn.Module:
    return ActivationQuantizer(bits, observer()) if bits < 32 else nn.Identity()
