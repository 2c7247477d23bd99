"""Uniform quantization by torch's own fake-quantize operators, so that a quantized model can be exported."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from utils.ranks import highest, lowest

EPS = torch.finfo(torch.float32).eps


class Observer(Protocol):
    """Sees the tensors that pass a place in the model, and says which range to quantize them in."""

    def observe(self, x: Tensor) -> None:
        """Take a tensor of any shape into account."""

    def range(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest value to represent, scalars; what every rank observed counts."""


class MinMaxObserver:
    """The lowest and the highest value seen. Starts at an empty range, so that a tensor of zeros counts as seen."""

    def __init__(self) -> None:
        self.low, self.high = torch.tensor(torch.inf), torch.tensor(-torch.inf)

    def observe(self, x: Tensor) -> None:
        low, high = torch.aminmax(x.detach().float())
        self.low, self.high = torch.minimum(self.low.to(low), low), torch.maximum(self.high.to(high), high)

    def range(self) -> tuple[Tensor, Tensor]:
        return lowest(self.low), highest(self.high)


OBSERVERS: dict[str, type[Observer]] = {"minmax": MinMaxObserver}


class ActivationQuantizer(nn.Module):
    """Per tensor, asymmetric: q = clamp(round(x / scale) + zero_point, 0, 2^bits - 1).

    Passes tensors through while it observes; quantizes once `freeze` has fixed `scale` and `zero_point`.
    """

    def __init__(self, bits: int, observer: Observer) -> None:
        super().__init__()
        self.high = 2**bits - 1
        self.observer: Observer | None = observer
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))

    def freeze(self) -> None:
        """Fix the range; zero is always represented exactly. Raises `RuntimeError` if nothing was observed."""
        low, high = self.observer.range()
        if not low <= high:
            raise RuntimeError("this quantizer saw no tensor during calibration")
        low, high = low.clamp(max=0), high.clamp(min=0)
        self.scale = ((high - low) / self.high).clamp(min=EPS)
        self.zero_point = (-low / self.scale).round().clamp(0, self.high).int()
        self.observer = None

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer.observe(x)
            return x
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, 0, self.high)


def quantized_weight(weight: Tensor, bits: int) -> Tensor:
    """A weight (out, in) rounded to `bits` bits, symmetric, with one scale per output channel."""
    high = 2 ** (bits - 1) - 1
    scale = (weight.detach().abs().amax(dim=1) / high).clamp(min=EPS)
    zero_point = torch.zeros(len(scale), dtype=torch.int32, device=weight.device)
    return torch.fake_quantize_per_channel_affine(weight.detach(), scale, zero_point, 0, -high - 1, high)
