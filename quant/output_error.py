"""Ranges by what they do to a layer's output: that of its input and the scales of its weight, searched in turn.

The range that changes a tensor least is not the one that changes least what the next product makes of it: rounding
errors of channels that large weights read cost more. So the error that is made small is that of the output, where the
original weight on the unrounded input gives what is wanted; weight and input in turn, as FIMA-Q (CVPR 2025) has it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from models import SparseImages, SparseViT
from quant.insert import QuantizedLinear, quantized_layers
from quant.quantizers import ActivationQuantizer, largest_value_scale, round_weight, uniform
from quant.stages import Stage, walk

ROWS = 512
"""Tokens of all images that a layer's output is compared on."""
SHARES = tuple(0.03 ** (number / 19) for number in range(20))
"""Of the widest range, and of the largest scale, that are candidates: each 0.83 of the one before."""
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
    layers = quantized_layers(quantized)
    originals = quantized_layers(reference) if weights else layers
    with tqdm(total=len(layers), desc="ranges", unit="layer", disable=not progress) as bar:
        for stage in walk(reference, quantized, images, batch_size):
            for name, rows in _inputs(stage, quantized).items():
                layer = layers[name]
                _fit(layer, originals[name].linear.weight, rows, weights and layer.weight_scale is not None)
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
    inputs = isinstance(layer.quantizer, ActivationQuantizer)
    for _ in range(ROUNDS if inputs and weights else 1):
        if inputs:
            _fit_input(layer.quantizer, layer.linear.weight, original, rows)
        if weights:
            scale = _least_scale(original, layer.w_bit, layer.weight_scale, rows, layer.quantizer(rows))
            layer.weight_scale.copy_(scale)
            layer.linear.weight = nn.Parameter(round_weight(original, scale, layer.w_bit), requires_grad=False)


def _fit_input(quantizer: ActivationQuantizer, weight: Tensor, original: Tensor, rows: Tensor) -> None:
    """The range with the least error: the upper and the lower end in turn, of a symmetric one both at once.

    With e for what rounding does to the input x, and V for what has been done to the original weight, which is W by
    now, the output is off by W e + V x: squared |W e|^2 + 2 e^T W^T V x, and what no range changes.
    """
    cross = (rows @ (weight - original).T) @ weight
    square = _square(weight)

    def least(lows: list[Tensor], highs: list[Tensor]) -> tuple[Tensor, Tensor]:
        errors = []
        for ends in zip(lows, highs, strict=True):
            off = uniform(rows, *quantizer.at(*ends), quantizer.low, quantizer.high).sub_(rows)
            errors.append(square(off).sum() + 2 * (off * cross).sum())
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


def _least_scale(weight: Tensor, bits: int, scale: Tensor, rows: Tensor, rounded: Tensor) -> Tensor:
    """Of each output channel the scale (out,) with the least error; `rounded` (n, in) are the rows as quantized.

    As above, with the two errors in each other's place.
    """
    cross = ((rounded - rows) @ weight.T).T @ rounded
    square, errors, largest = _square(rounded), [], largest_value_scale(weight, bits)
    scales = torch.stack([scale, *(largest * share for share in SHARES)])
    for each in scales:
        off = round_weight(weight, each, bits).sub_(weight)
        errors.append(square(off).sum(dim=1) + 2 * (off * cross).sum(dim=1))
    return scales.gather(0, torch.stack(errors).argmin(dim=0, keepdim=True))[0]


def _square(factor: Tensor) -> Callable[[Tensor], Tensor]:
    """A function of tensors (n, in): terms that sum up, in every row x, to |factor x|^2.

    `factor` (m, in) is multiplied with itself first where that makes fewer products.
    """
    if factor.shape[0] <= factor.shape[1]:
        return lambda x: (x @ factor.T).square()
    gram = factor.T @ factor
    return lambda x: (x @ gram).mul_(x)
