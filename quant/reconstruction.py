"""Reconstruction of one stage after another: rounding and ranges are learned to give the full-precision output.

What is learned is, of every weight, whether it is rounded up or down (AdaRound, Nagel et al., ICML 2020) and, of every
activation quantizer, its scale (LSQ, Esser et al., ICLR 2020); the unit is a block with its output as the target
(BRECQ, Li et al., ICLR 2021); half of the activations, drawn anew every step, are left in full precision (QDrop, Wei et
al., ICLR 2022). Fed are the images as they come: kept patches alone, or filled grids.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from models import SparseImages, SparseViT
from quant.config import QuantConfig
from quant.insert import QuantizedLinear, quantized_layers, quantizers
from quant.losses import LOSSES
from quant.quantizers import ActivationQuantizer, uniform
from quant.rows import outputs
from quant.stages import Stage, walk
from utils.errors import UserError
from utils.files import atomic

STEP_IMAGES = 8
"""Whole images a step; of sparse ones as many as have that many patches."""
ROUNDING_LR, SCALE_LR = 2e-2, 2e-3
ROUNDING_WEIGHT = 0.01
"""What an undecided weight costs, against the squared error of a token."""
SHOWN = 20
"""Steps between two looks at the error, which wait for the device."""
WARM_UP = 0.2
"""Share of the steps before rounding is decided."""


class AdaptiveRounding(nn.Module):
    """A linear layer whose weights are floor(weight / scale) + h, h in [0, 1] learned (AdaRound, eq. 20 to 24).

    `original` is what is rounded, with the scales and the width of `layer`.
    """

    def __init__(self, layer: QuantizedLinear, original: nn.Linear) -> None:
        super().__init__()
        self.scale, self.bias = layer.weight_scale[:, None], original.bias
        codes = original.weight / self.scale
        self.floor = codes.floor().clamp(-(2 ** (layer.w_bit - 1)), 2 ** (layer.w_bit - 1) - 2)
        rest = (codes - self.floor).clamp(0.01, 0.99)
        self.raised = nn.Parameter(torch.logit((rest + 0.1) / 1.2))

    def share(self) -> Tensor:
        """h: how far each weight is rounded up, 0 to 1."""
        return _Share.apply(self.raised)

    def weight(self, share: Tensor) -> Tensor:
        """The weight (out, in) that is rounded up by `share`."""
        return (self.floor + share) * self.scale

    def undecided(self, power: float) -> Tensor:
        """The sum of 1 - |2h - 1|^power in the last forward pass: zero once every weight is rounded one way."""
        return _Undecided.apply(self.shared, power)

    def forward(self, x: Tensor) -> Tensor:
        self.shared = self.share()
        return F.linear(x, self.weight(self.shared), self.bias)


class _Share(torch.autograd.Function):
    """`AdaptiveRounding.share` in few passes over the weights, forwards and backwards."""

    @staticmethod
    def forward(ctx, raised: Tensor) -> Tensor:
        sigmoid = raised.sigmoid()
        stretched = (sigmoid * 1.2).sub_(0.1)
        ctx.save_for_backward(sigmoid, stretched)
        return F.hardtanh(stretched, 0, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        sigmoid, stretched = ctx.saved_tensors
        inside = torch.ops.aten.hardtanh_backward(grad, stretched, 0, 1)
        return torch.ops.aten.sigmoid_backward(inside, sigmoid).mul_(1.2)


class _Undecided(torch.autograd.Function):
    """`AdaptiveRounding.undecided` by one power for the value and the gradient."""

    @staticmethod
    def forward(ctx, share: Tensor, power: float) -> Tensor:
        signed = share * 2 - 1
        powers = signed.abs().pow_(power - 1)
        gradient = powers * signed.sign()
        ctx.save_for_backward(gradient)
        ctx.factor = -2 * power
        return share.numel() - (gradient * signed).sum()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (grad * ctx.factor), None


class LearnedQuantizer(nn.Module):
    """A quantizer that lets some activations through and whose scale, of a uniform one, is learned."""

    def __init__(self, quantizer: nn.Module, generator: torch.Generator) -> None:
        super().__init__()
        self.quantizer, self.generator = quantizer, generator
        self.log_scale = nn.Parameter(quantizer.scale.log())

    def forward(self, x: Tensor) -> Tensor:
        kept = _coins(x, self.generator)
        if isinstance(self.quantizer, ActivationQuantizer):
            return _DroppedUniform.apply(x, self.log_scale, self.quantizer, kept)
        return x + (self.quantizer(x.detach()) - x.detach()).lerp_(torch.zeros_like(x), kept)

    def learned(self) -> nn.Module:
        """The quantizer with the scale that was learned."""
        if isinstance(self.quantizer, ActivationQuantizer):
            self.quantizer.scale = self.log_scale.detach().exp()
        return self.quantizer


class _DroppedUniform(torch.autograd.Function):
    """Uniform quantization with a learned scale (LSQ, eq. 2 and 3) of the values that are not `kept` (0 or 1, as `x`).

    Straight through within the range. By the logarithm of the scale what is rounded changes by its rounding error, what
    is clipped by the end of the range.
    """

    @staticmethod
    def forward(ctx, x: Tensor, log_scale: Tensor, quantizer: ActivationQuantizer, kept: Tensor) -> Tensor:
        scale, zero_point = quantizer.spread(log_scale.exp()), quantizer.spread(quantizer.zero_point)
        low, high = ((end - zero_point) * scale for end in (quantizer.low, quantizer.high))
        rounded = uniform(x, scale, zero_point, quantizer.low, quantizer.high)
        out = torch.lerp(rounded, x, kept)
        passes = torch.maximum(kept, ((x >= low) & (x <= high)).to(x.dtype))
        ctx.dims = [dim for dim in range(x.ndim) if quantizer.heads is None or dim != 1]
        ctx.save_for_backward(passes, torch.addcmul(out, x, passes, value=-1))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        passes, by_scale = ctx.saved_tensors
        return grad * passes, by_scale.mul(grad).sum(ctx.dims), None, None


@dataclass(frozen=True)
class FinishedStages:
    """What a reconstruction has learned so far, a file for each stage: a run that was stopped goes on behind them."""

    folder: Path

    def restore(self, number: int, quantized: SparseViT, generator: torch.Generator) -> bool:
        """Put what a stage has learned into `quantized`, `generator` where it was; False if it is not there.

        Raises `UserError` for a damaged file.
        """
        file = self._file(number)
        if not file.is_file():
            return False
        try:
            state = load_file(file)
            generator.set_state(state.pop("generator"))
            there = quantized.state_dict()
            for name, value in state.items():
                there[name].copy_(value)
        except (SafetensorError, OSError, KeyError, RuntimeError) as error:
            raise UserError(f"{file} is damaged ({str(error).splitlines()[0][:80]}); remove its folder") from None
        return True

    def keep(self, number: int, stage: Stage, quantized: SparseViT, generator: torch.Generator) -> None:
        """Write what a finished stage has learned."""
        state = {name: value.cpu().contiguous() for name, value in quantized.state_dict().items() if stage.owns(name)}
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic(self._file(number)) as partial:
            save_file({**state, "generator": generator.get_state()}, partial)

    def _file(self, number: int) -> Path:
        return self.folder / f"stage-{number:03d}.safetensors"


def reconstruct(
    reference: SparseViT,
    quantized: SparseViT,
    images: SparseImages,
    config: QuantConfig,
    fitted: Mapping[str, nn.Linear] | None = None,
    progress: bool = False,
    finished: FinishedStages | None = None,
) -> None:
    """Learn the rounding and the ranges of `quantized`, in place, stage by stage.

    Args:
        reference: the full-precision model, `wrapped`.
        quantized: its calibrated copy.
        images: calibration images, any number; `STEP_IMAGES` a step.
        config: `reconstruct_steps` a stage, `reconstruct_seconds` in all: a stage may use what the stages before it
            left, divided by the stages to come, and decides the rounding in time. `seed` draws images and dropping.
        fitted: layers that rounding starts from, by their names; None: the full-precision ones.
        progress: show a progress bar on stderr.
        finished: where stages are kept; those that are there are not learned again.
    """
    generator = torch.Generator(quantized.device).manual_seed(config.seed)
    end = None if config.reconstruct_seconds is None else time.monotonic() + config.reconstruct_seconds
    count = len(quantized.blocks) + 2
    step_images = STEP_IMAGES * quantized.grid.count // images.positions.shape[1]
    total = count * config.reconstruct_steps
    with tqdm(total=total, desc="reconstruction", unit="step", disable=not progress) as bar:
        for number, stage in enumerate(walk(reference, quantized, images, config.batch_size)):
            now = time.monotonic()
            seconds = None if end is None else (end - now) / (count - number)
            if finished is None or not finished.restore(number, quantized, generator):
                _reconstruct_stage(
                    stage, reference, quantized, config, fitted or {}, step_images, seconds, generator, bar
                )
                if finished is not None:
                    finished.keep(number, stage, quantized, generator)
            bar.update((number + 1) * config.reconstruct_steps - bar.n)


def _reconstruct_stage(
    stage: Stage,
    reference: SparseViT,
    quantized: SparseViT,
    config: QuantConfig,
    fitted: Mapping[str, nn.Linear],
    step_images: int,
    seconds: float | None,
    generator: torch.Generator,
    bar: tqdm,
) -> None:
    inputs, quantized_inputs = stage.inputs, stage.quantized_inputs
    target = outputs(partial(stage.run, reference), inputs)
    wanted = LOSSES[config.reconstruct_loss](stage, reference, target, inputs.tensors[-1], config.batch_size)
    start = time.monotonic()
    with _learning(stage, reference, quantized, fitted, generator) as (roundings, scales):
        groups = [([rounding.raised for rounding in roundings], ROUNDING_LR), (scales, SCALE_LR)]
        optimizer = torch.optim.Adam(
            [{"params": params, "lr": lr} for params, lr in groups if params],
            fused=quantized.device.type in ("cpu", "cuda"),
        )
        for step in range(config.reconstruct_steps):
            progress = step / config.reconstruct_steps
            if seconds is not None:
                progress = max(progress, (time.monotonic() - start) / max(seconds, 1e-9))
            if progress >= 1:
                break
            chosen = torch.randperm(len(target), generator=generator, device=inputs.device)[:step_images]
            pairs = zip(inputs.at(chosen), quantized_inputs.at(chosen), strict=True)
            mixed = [_mixed(*pair, generator) for pair in pairs]
            wanted.look(progress, lambda n: stage.run(quantized, *quantized_inputs.first(n)))
            loss = error = wanted(stage.run(quantized, *mixed), chosen)
            if progress > WARM_UP:
                power = 2 + 18 * (1 - progress) / (1 - WARM_UP)
                loss = error + ROUNDING_WEIGHT * sum(rounding.undecided(power) for rounding in roundings)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            bar.update()
            if step % SHOWN == 0:
                bar.set_postfix(error=f"{error.item():.3g}", refresh=False)


@contextlib.contextmanager
def _learning(
    stage: Stage,
    reference: SparseViT,
    quantized: SparseViT,
    fitted: Mapping[str, nn.Linear],
    generator: torch.Generator,
) -> Iterator[tuple[list[AdaptiveRounding], list[nn.Parameter]]]:
    """Put what can be learned in the place of the stage's layers and quantizers; at the end, what was learned."""
    originals, layers, learned = quantized_layers(reference), [], {}
    for name, layer in quantized_layers(quantized).items():
        if stage.owns(name) and layer.weight_scale is not None:
            layers.append((layer, layer.linear))
            layer.linear = AdaptiveRounding(layer, fitted.get(name, originals[name].linear))
    for name, quantizer in quantizers(quantized).items():
        if stage.owns(name):
            learned[name] = LearnedQuantizer(quantizer, generator)
            quantized.set_submodule(name, learned[name])
    scales = [one.log_scale for one in learned.values() if isinstance(one.quantizer, ActivationQuantizer)]
    yield [layer.linear for layer, _ in layers], scales
    with torch.no_grad():
        for layer, linear in layers:
            linear.weight.copy_(layer.linear.weight((layer.linear.raised >= 0).float()))
            linear.bias = layer.linear.bias
            layer.linear = linear
        for name, one in learned.items():
            quantized.set_submodule(name, one.learned())


def _mixed(full: Tensor, quantized: Tensor, generator: torch.Generator) -> Tensor:
    """What the full-precision model gives, at a random half of the places, what the quantized one gives elsewhere."""
    if not full.is_floating_point():  # positions, which are the same
        return full
    return torch.lerp(quantized, full, _coins(full, generator))


def _coins(like: Tensor, generator: torch.Generator) -> Tensor:
    """0 or 1 with equal chances, for every value of a tensor and in its format: eight out of one random integer."""
    drawn = torch.empty(-(-like.numel() // 8), dtype=torch.int64, device=like.device).random_(generator=generator)
    return drawn.view(torch.uint8)[: like.numel()].bitwise_and_(1).view(like.shape).to(like.dtype)
