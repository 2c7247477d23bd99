"""Where the quantizers go in a Vision Transformer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models import SparseViT
from models.blocks import SparseBlock
from quant.config import QuantConfig
from quant.observers import OBSERVERS, Method, Observer
from quant.quantizers import (
    ActivationQuantizer,
    LogSqrt2Quantizer,
    largest_value_scale,
    least_error_scale,
    published_scale,
    round_weight,
)

Quantizer = ActivationQuantizer | LogSqrt2Quantizer

UNQUANTIZED = ("places", "position", "between_heads")
"""Parts of a model whose layers read no tokens."""


class QuantizedLinear(nn.Module):
    """A linear layer (or the patch projection) with a quantizer on its input and its weight rounded once, or later.

    `weight_scale` (out,) is the scale of each output channel, None where the weight is left alone.
    """

    def __init__(
        self,
        linear: nn.Linear,
        quantizer: nn.Module,
        w_bit: int,
        weight_scale: Tensor | None,
        rounded: bool = True,
    ) -> None:
        super().__init__()
        self.quantizer, self.linear, self.w_bit = quantizer, linear, w_bit
        self.register_buffer("weight_scale", weight_scale)
        if rounded:
            self.round_weight()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.quantizer(x))

    def round_weight(self) -> None:
        """Round the weight, where that has waited."""
        if self.weight_scale is not None:
            rounded = round_weight(self.linear.weight, self.weight_scale, self.w_bit)
            self.linear.weight = nn.Parameter(rounded, requires_grad=False)

    def integers(self) -> Tensor:
        """The weight in units of its scale, int8 (out, in)."""
        return (self.linear.weight / self.weight_scale[:, None]).round().to(torch.int8)


def places(vit: SparseViT, method: Method) -> dict[str, nn.Module]:
    """What `method` quantizes, by name: every linear layer that reads tokens, the patch projection, and taps."""
    found = {}
    for name, module in vit.named_modules():
        if any(part in UNQUANTIZED for part in name.split(".")):
            continue
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Linear) or (leaf.startswith("tap_") and leaf[len("tap_") :] in method.taps):
            found[name] = module
    return found


def quantized_vit(
    vit: SparseViT, config: QuantConfig, scale_of: Callable[[Tensor, int], Tensor] | None = None
) -> SparseViT:
    """A copy of `vit` with rounded weights and observing activation quantizers.

    `scale_of` gives a weight's scales for a width in bits; by default it is the observer's, and weights that
    `config.compensate` is for wait for it. Raises `UserError` where `config.keep` names nothing.
    """
    vit = copy.deepcopy(vit).requires_grad_(False)
    if config.w_bit == config.a_bit == 32:
        return vit
    method = OBSERVERS[config.method]
    waits = (config.compensate or method.published) and scale_of is None
    if scale_of is None:
        searched = method.least_error_weights and not waits
        scale_of = least_error_scale if searched else published_scale if method.published else largest_value_scale
    found = places(vit, method)
    for name, (w_bit, a_bit) in config.widths(list(found), len(vit.blocks)).items():
        quantizer: nn.Module = nn.Identity()
        if a_bit < 32:
            if method.log_probs and name.endswith("tap_probs") and not _block(vit, name).signed_probs:
                quantizer = LogSqrt2Quantizer(a_bit, method.observer(a_bit))
            else:
                heads = _heads(vit, name) if method.per_head else None
                observer = method.observer(a_bit, heads, config.symmetric)
                quantizer = ActivationQuantizer(a_bit, observer, config.symmetric, heads)
        layer = found[name]
        if isinstance(layer, nn.Linear):
            scale = scale_of(layer.weight, w_bit) if w_bit < 32 else None
            quantizer = QuantizedLinear(layer, quantizer, w_bit, scale, rounded=not waits)
        vit.set_submodule(name, quantizer)
    return vit


def _heads(vit: SparseViT, name: str) -> int | None:
    """How many heads the tensor at a tap has; None where it has none, as the input of a layer."""
    leaf = name.rpartition(".")[2]
    if leaf == "tap_v":
        return _block(vit, name).heads
    return _block(vit, name).score_heads if leaf in ("tap_q", "tap_k", "tap_probs") else None


def _block(vit: SparseViT, name: str) -> SparseBlock:
    """The block that has the tap of this name."""
    return vit.get_submodule(name.rpartition(".")[0])


def wrapped(vit: SparseViT) -> SparseViT:
    """A copy of `vit` that computes in full precision, its layers under the names that they have when quantized."""
    vit = copy.deepcopy(vit).requires_grad_(False)
    for name, layer in places(vit, Method(Observer, taps=())).items():
        vit.set_submodule(name, QuantizedLinear(layer, nn.Identity(), 32, None))
    return vit


def quantizers(vit: nn.Module) -> dict[str, Quantizer]:
    """The activation quantizers of a model, by name."""
    return {name: module for name, module in vit.named_modules() if isinstance(module, Quantizer)}


def quantized_layers(vit: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantized layers of a model, by name."""
    return {name: module for name, module in vit.named_modules() if isinstance(module, QuantizedLinear)}


def observers(vit: nn.Module) -> list[Observer]:
    """The observers that have not given their range yet."""
    return [quantizer.observer for quantizer in quantizers(vit).values() if quantizer.observer is not None]
