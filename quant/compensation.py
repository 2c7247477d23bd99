"""Layers fitted, in closed form, to what quantization has done to their input; no gradient and no steps.

Two errors of a quantized layer are known when the calibration images pass: that of its input, made by everything in
front of it, and that of its own rounded weights. The first is answered by least squares: the weights that, fed with the
quantized input, come nearest to what the full-precision layer gives. The second by rounding the columns of the weight
one after another, where the columns still to be rounded make up for the error of those that are (GPTQ, Frantar et al.,
ICLR 2023). Behind proj and fc2 what is wanted is the residual sum, so that they also answer for the error that the
stream brings along.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from models import SparseImages, SparseViT
from quant.insert import QuantizedLinear, quantized_layers
from quant.quantizers import EPS, least_error_scale
from quant.stages import Stage, walk

RIDGE = 4.0
"""What holds the fitted weights to the original ones: so much of the input's mean square, for every value."""
DAMPING = 0.01
"""The same for what makes up for rounding; keeps its matrix from being singular."""
SINGLE = 1e-5
"""Of the mean square, as what sums in float32 are off by."""
COLUMNS = 128
"""Rounded before what they leave is passed on to all others."""


class _Seen(Exception):
    """A forward pass has come as far as it has to."""


@dataclass
class Moments:
    """Sums over tokens of a layer's quantized input, y = (x - center, 1), and of what its output lacks.

    `inputs` (in + 1, in + 1): y y^T. `lacking` (out, in + 1): (wanted - W x - b) y^T, for the original W and b.
    `center` (in,): the mean of the first tokens, since squares around zero lose what differs between large values.
    """

    count: int = 0
    center: Tensor | None = None
    inputs: Tensor | int = field(default=0)
    lacking: Tensor | int = field(default=0)

    def add(self, x: Tensor, lacking: Tensor) -> None:
        """Rows x (n, in), lacking (n, out)."""
        self.center = x.mean(dim=0) if self.center is None else self.center
        x = torch.cat([x - self.center, x.new_ones(len(x), 1)], dim=1)
        self.inputs, self.lacking = self.inputs + x.T @ x, self.lacking + lacking.T @ x
        self.count += len(x)


@torch.no_grad()
def compensate(
    reference: SparseViT, quantized: SparseViT, images: SparseImages, batch_size: int, progress: bool = False
) -> dict[str, nn.Linear]:
    """Fit the weights and biases of every quantized layer, in place, in the order of the forward pass.

    Args:
        reference: the full-precision model, `wrapped`.
        quantized: its calibrated copy, weights not rounded yet; ranges stay as they are.
        images: calibration images.
        batch_size: images a forward pass.
        progress: show a progress bar on stderr.

    Returns:
        Every layer as it was fitted, before it was rounded.
    """
    fitted = {}
    with tqdm(total=len(quantized_layers(quantized)), desc="compensation", unit="layer", disable=not progress) as bar:
        for stage in walk(reference, quantized, images, batch_size):
            for name in _in_order(stage, quantized):
                layer, original = quantized.get_submodule(name), reference.get_submodule(name)
                fitted[name] = _fit(layer, original.linear, _moments(stage, reference, quantized, name))
                bar.update()
    return fitted


def _in_order(stage: Stage, vit: SparseViT) -> list[str]:
    """The names of the stage's layers as the forward pass comes to them."""
    order, hooks = [], []
    for name, layer in quantized_layers(vit).items():
        if stage.owns(name):
            hooks.append(layer.register_forward_pre_hook(lambda _, __, name=name: order.append(name)))
    stage.run(vit, *stage.quantized_inputs[0])
    for hook in hooks:
        hook.remove()
    return order


def _moments(stage: Stage, reference: SparseViT, quantized: SparseViT, name: str) -> Moments:
    """Of a layer's input in the quantized model, and of what its output lacks there of the original one's."""
    original, moments = reference.get_submodule(name).linear, Moments()
    entering = _stream(quantized, name)
    for inputs, quantized_inputs in zip(stage.inputs, stage.quantized_inputs, strict=True):
        wanted, stream = _reached(reference, name, entering, lambda i=inputs: stage.run(reference, *i))
        found, quantized_stream = _reached(
            quantized, name, entering, lambda i=quantized_inputs: stage.run(quantized, *i)
        )
        x = quantized.get_submodule(name).quantizer(found)
        lacking = F.linear(wanted - x, original.weight)
        if entering is not None:
            lacking = lacking + (stream - quantized_stream)[:, : lacking.shape[1]]
        moments.add(x.flatten(0, -2), lacking.flatten(0, -2))
    return moments


def _stream(vit: SparseViT, name: str) -> str | None:
    """The norm that reads the residual stream which this layer's output is added to as it is.

    Where several layers write behind one norm, the last of them alone answers for the stream.
    """
    block, _, leaf = name.partition(".")[2].partition(".")
    if not name.startswith("blocks."):
        return None
    writers = vit.blocks[int(block)].writers
    norm, behind = writers.get(leaf, (None, None))
    if norm is None or leaf != [layer for layer, (other, _) in writers.items() if other == norm][-1]:
        return None
    if not isinstance(vit.blocks[int(block)].get_submodule(behind), nn.Identity):
        return None
    return f"blocks.{block}.{norm}"


def _reached(vit: SparseViT, name: str, stream: str | None, run: Callable[[], object]) -> tuple[Tensor, Tensor | None]:
    """What `vit` feeds the layer `name` and the module `stream`, computing nothing behind the layer."""
    seen = {}

    def keep(_: nn.Module, inputs: tuple[Tensor]) -> None:
        seen["stream"] = inputs[0]

    def stop(_: nn.Module, inputs: tuple[Tensor]) -> None:
        seen["layer"] = inputs[0]
        raise _Seen

    hooks = [vit.get_submodule(name).register_forward_pre_hook(stop)]
    if stream is not None:
        hooks.append(vit.get_submodule(stream).register_forward_pre_hook(keep))
    try:
        run()
    except _Seen:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return seen["layer"], seen.get("stream")


def _fit(layer: QuantizedLinear, original: nn.Linear, moments: Moments) -> nn.Linear:
    """Give a layer the weight and the bias that `moments` ask for, rounded; returned is what was not rounded yet."""
    weight, inputs = original.weight, moments.inputs
    energy = (inputs.diagonal()[:-1] + moments.count * moments.center.square()).mean().clamp(min=EPS)
    held = inputs.double().clone()
    held.diagonal()[:-1].add_(RIDGE * energy)
    change = torch.cholesky_solve(moments.lacking.T.double(), torch.linalg.cholesky(held)).T.to(weight.dtype)
    bias = change[:, -1] - change[:, :-1] @ moments.center
    bias = bias if original.bias is None else original.bias + bias
    weight = weight + change[:, :-1]
    fitted = _linear(weight, bias)
    if layer.weight_scale is not None:
        mean = inputs[-1, :-1] / moments.count
        centred = inputs[:-1, :-1] - moments.count * mean[:, None] * mean  # the bias makes up for the mean
        centred.diagonal().add_(SINGLE * energy)
        scale = least_error_scale(weight, layer.w_bit)
        rounded = rounded_in_turn(weight, centred, scale, layer.w_bit)
        bias = bias + (weight - rounded) @ (moments.center + mean)
        layer.weight_scale.copy_(scale)
        weight = rounded
    layer.linear = _linear(weight, bias)
    return fitted


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A layer with this weight (out, in) and bias (out,), which do not learn."""
    layer = nn.Linear(*weight.T.shape, device="meta")
    layer.weight, layer.bias = (nn.Parameter(value, requires_grad=False) for value in (weight, bias))
    return layer


def rounded_in_turn(weight: Tensor, moments: Tensor, scale: Tensor, bits: int) -> Tensor:
    """A weight (out, in) rounded so that what it gives for inputs of these second moments changes little (GPTQ).

    Columns are rounded one after another, those of the largest inputs first; what rounding one does to the output is
    made up for, as far as the inputs go together, by the columns that are left.

    Args:
        weight: (out, in).
        moments: (in, in), sum of x x^T.
        scale: (out,), of each output channel.
        bits: width.
    """
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    moments = moments.clone()
    moments.diagonal().add_((DAMPING * moments.diagonal().mean()).clamp(min=EPS))
    order = moments.diagonal().argsort(descending=True)
    lower = torch.linalg.cholesky(moments[order][:, order])
    upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    left = weight[:, order].T.contiguous()  # a column of the weight is a row here
    rounded = torch.empty_like(left)
    for first in range(0, len(left), COLUMNS):
        few = slice(first, first + COLUMNS)
        rows, factors = left[few], upper[few, few]
        errors = torch.empty_like(rows)
        for i in range(len(rows)):
            rounded[first + i] = (rows[i] / scale).round().clamp(lowest, highest) * scale
            errors[i] = (rows[i] - rounded[first + i]) / factors[i, i]
            rows[i + 1 :] -= factors[i, i + 1 :, None] * errors[i]
        left[first + COLUMNS :] -= upper[few, first + COLUMNS :].T @ errors
    return rounded[order.argsort()].T.contiguous()
