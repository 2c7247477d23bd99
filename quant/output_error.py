"""Ranges by what they do to a layer's output: that of its input and the scales of its weight, searched in turn.

The range that changes a tensor least is not the one that changes least what the next product makes of it: rounding
errors of channels that large weights read cost more. So the error that is made small is that of the output, as in
FIMA-Q (CVPR 2025), with the original weight on the unrounded input for what is wanted; input and weight in turn.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm import tqdm

from models import SparseImages, SparseViT
from quant.insert import QuantizedLinear, quantized_layers
from quant.quantizers import ActivationQuantizer, largest_value_scale, round_weight, uniform
from quant.stages import Stage, walk

ROWS = 1024
"""Tokens of all images that a layer's output is compared on."""
SHARES = tuple(0.02 ** (number / 23) for number in range(24))
"""Of the widest range, and of the largest scale, that are candidates: each 0.84 of the one before."""
ROUNDS = 2


@torch.no_grad()
def fit_ranges(
    reference: SparseViT,
    quantized: SparseViT,
    images: SparseImages,
    batch_size: int,
    weights: bool = True,
    progress: bool = False,
) -> None:
    """Fix the input ranges and the weight scales of every quantized layer anew, in place, stage by stage.

    Those that are there are candidates too, so that on what is compared no layer's error grows. Every rank sees all
    images, and finds the same.

    Args:
        reference: the full-precision model, `wrapped`.
        quantized: its calibrated copy, ranges fixed.
        images: calibration images.
        batch_size: images a forward pass.
        weights: scale and round the weights too; else they are taken as they are.
        progress: show a progress bar on stderr.
    """
    originals, layers = quantized_layers(reference), quantized_layers(quantized)
    with tqdm(total=len(layers), desc="ranges", unit="layer", disable=not progress) as bar:
        for stage in walk(reference, quantized, images, batch_size):
            for name, rows in _inputs(stage, quantized).items():
                layer, original = layers[name], originals[name].linear.weight if weights else layers[name].linear.weight
                _fit(layer, original, rows, weights and layer.weight_scale is not None)
                bar.update()


def _inputs(stage: Stage, quantized: SparseViT) -> dict[str, Tensor]:
    """Rows (n, in), of tokens drawn from all batches, of what each of the stage's layers is fed, by name."""
    layers = {name: layer for name, layer in quantized_layers(quantized).items() if stage.owns(name)}
    found, each = {name: [] for name in layers}, -(-ROWS // len(stage.quantized_inputs))
    generator = torch.Generator().manual_seed(0)

    def keep(name: str, x: Tensor) -> None:
        x = x.flatten(0, -2)
        found[name].append(x[torch.randperm(len(x), generator=generator)[:each].to(x.device)])

    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: keep(name, inputs[0]))
        for name, layer in layers.items()
    ]
    for batch in stage.quantized_inputs:
        stage.run(quantized, *batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in found.items() if rows}


def _fit(layer: QuantizedLinear, original: Tensor, rows: Tensor, weights: bool) -> None:
    """Range and scales of one layer; `original` (out, in) on `rows` (n, in) is what its output should be."""
    wanted, inputs = rows @ original.T, isinstance(layer.quantizer, ActivationQuantizer)
    for _ in range(ROUNDS if inputs and weights else 1):
        if inputs:
            _fit_input(layer.quantizer, layer.linear.weight, wanted, rows)
        if weights:
            scale = _least_scale(original, layer.w_bit, layer.weight_scale, wanted, layer.quantizer(rows))
            layer.weight_scale.copy_(scale)
            layer.linear.weight = nn.Parameter(round_weight(original, scale, layer.w_bit), requires_grad=False)


def _fit_input(quantizer: ActivationQuantizer, weight: Tensor, wanted: Tensor, rows: Tensor) -> None:
    """The range with the least error: the upper and the lower end in turn, of a symmetric one both at once."""

    def least(lows: list[Tensor], highs: list[Tensor]) -> tuple[Tensor, Tensor]:
        errors = [
            (uniform(rows, *quantizer.at(*ends), quantizer.low, quantizer.high) @ weight.T - wanted).square().sum()
            for ends in zip(lows, highs, strict=True)
        ]
        best = torch.stack(errors).argmin()
        return torch.stack(lows)[best], torch.stack(highs)[best]

    low, high = quantizer.ends()
    lowest, highest = torch.minimum(rows.min(), low), torch.maximum(rows.max(), high)
    lows, highs = ([end, *(widest * share for share in SHARES)] for end, widest in ((low, lowest), (high, highest)))
    if quantizer.symmetric:
        low, high = least(lows, highs)
    else:
        low, high = least([low] * len(highs), highs)
        low, high = least(lows, [high] * len(lows))
    quantizer.fix(*quantizer.at(low, high))


def _least_scale(weight: Tensor, bits: int, scale: Tensor, wanted: Tensor, inputs: Tensor) -> Tensor:
    """Of each output channel the scale (out,) with the least error; inputs (n, in) are rounded already."""
    scales = torch.stack([scale, *(largest_value_scale(weight, bits) * share for share in SHARES)])
    errors = [(inputs @ round_weight(weight, each, bits).T - wanted).square().sum(dim=0) for each in scales]
    return scales.gather(0, torch.stack(errors).argmin(dim=0, keepdim=True))[0]
