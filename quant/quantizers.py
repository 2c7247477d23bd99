"""Quantizers: uniform ones, to the bit those of torch's fake-quantize operators, and one in powers of sqrt(2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quant.observers import EPS, Observer, codes


class ActivationQuantizer(nn.Module):
    """Per tensor, or for each head: q = clamp(round(x / scale) + zero_point, low, high), of 0 to 2^bits - 1.

    A symmetric one has codes from -2^(bits - 1) to 2^(bits - 1) - 1, and a zero point of 0. `heads`: how many, of
    tensors (B, heads, ..); None: the tensor has one range.

    Passes tensors through while it observes; quantizes once `freeze` has fixed `scale` and `zero_point`, () or
    (heads,).
    """

    def __init__(self, bits: int, observer: Observer | None, symmetric: bool = False, heads: int | None = None) -> None:
        super().__init__()
        self.bits, self.symmetric, self.heads = bits, symmetric, heads
        self.low, self.high = codes(bits, symmetric)
        self.observer = observer
        shape = () if heads is None else (heads,)
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32))

    def freeze(self) -> None:
        """Fix the range; zero is always represented exactly. Raises `RuntimeError` if nothing was observed."""
        low, high = self.observer.range()
        if not bool((low <= high).all()):
            raise RuntimeError("this quantizer saw no tensor during calibration")
        self.fix(*self.at(low, high))

    def at(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of a range, () or (heads,), in which zero is always represented exactly."""
        low, high = low.clamp(max=0), high.clamp(min=0)
        if self.symmetric:
            return torch.maximum(low / self.low, high / self.high).clamp(min=EPS), torch.zeros_like(low).int()
        scale = ((high - low) / self.high).clamp(min=EPS)
        return scale, (-low / scale).round().clamp(0, self.high).int()

    def ends(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest value that are represented, () or (heads,)."""
        return (self.low - self.zero_point) * self.scale, (self.high - self.zero_point) * self.scale

    def fix(self, scale: Tensor, zero_point: Tensor) -> None:
        """Quantize from now on, with this scale and zero point, () or (heads,), int32."""
        # Copies: two readers of one norm are fixed to the same tensors, and files hold no shared ones.
        self.scale, self.zero_point, self.observer = scale.clone(), zero_point.clone(), None

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer.observe(x if self.heads is None else x.movedim(1, -1))
            return x
        if x.device.type == "cpu" and not (x.requires_grad and torch.is_grad_enabled()):
            return uniform(x, self.spread(self.scale), self.spread(self.zero_point), self.low, self.high)
        if self.heads is not None:
            return torch.fake_quantize_per_channel_affine(x, self.scale, self.zero_point, 1, self.low, self.high)
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, self.low, self.high)

    def spread(self, values: Tensor) -> Tensor:
        """Values () or (heads,) as they are broadcast over a tensor that is quantized."""
        return values if self.heads is None else values[:, None, None]


class LogSqrt2Quantizer(nn.Module):
    """For softmax outputs: powers of the square root of two below `scale` (RepQ-ViT, ICCV 2023, eq. 16 to 18).

    q = round(-2 log2(x / scale)); what lies past 2^bits - 1 is zero. The value 2^(-q/2) is taken in base 2, as
    2^-ceil(q/2) times the square root of two where q is odd, so that an integer kernel only shifts. `scale` is the
    upper end that the observer gives, as with every other quantizer; the paper searches percentiles by this one's own
    error.
    """

    def __init__(self, bits: int, observer: Observer | None) -> None:
        super().__init__()
        self.bits, self.high = bits, 2**bits - 1
        self.observer = observer
        self.register_buffer("scale", torch.ones(()))

    def freeze(self) -> None:
        """Fix `scale`, the upper end of the observed range. Raises `RuntimeError` if nothing was observed."""
        _, high = self.observer.range()
        if not high > -torch.inf:
            raise RuntimeError("this quantizer saw no tensor during calibration")
        self.scale = high.clamp(min=EPS)
        self.observer = None

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer.observe(x)
            return x
        return log_sqrt2(x, self.scale, self.high)


def uniform(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """(clamp(round(x / scale) + zero_point, low, high) - zero_point) scale; scale and zero point broadcast over `x`.

    What torch's fake-quantize operators compute, to the bit, without a gradient. Theirs take one value after another on
    a CPU, several times slower than the few vectorized passes here. A NaN stays one, and an infinity is the end of the
    range, where theirs turn both into numbers.
    """
    codes = (x * (1 / scale)).round_().add_(zero_point).clamp_(low, high)
    return codes.sub_(zero_point).mul_(scale)


def log_sqrt2(x: Tensor, scale: Tensor, high: int) -> Tensor:
    """`x` (any shape, 0 or more) at the nearest power of the square root of two: see `LogSqrt2Quantizer`."""
    q = (-2 * (x / scale).log2()).round().clamp(min=0)  # infinite of zero
    half = (q / 2).ceil()
    value = torch.exp2(-half) * torch.where(2 * half > q, 2**0.5, 1.0) * scale
    return torch.where(q > high, 0.0, value)


def round_weight(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """A weight (out, in) rounded to `bits` bits, symmetric, with `scale` (out,) for each output channel."""
    high = 2 ** (bits - 1) - 1
    zero_point = torch.zeros(len(scale), dtype=torch.int32, device=weight.device)
    return torch.fake_quantize_per_channel_affine(weight.detach(), scale, zero_point, 0, -high - 1, high)


def quantized_weight(weight: Tensor, bits: int) -> Tensor:
    """A weight (out, in) rounded to `bits` bits, its largest value at the end of each output channel's range."""
    return round_weight(weight, largest_value_scale(weight, bits), bits)


def largest_value_scale(weight: Tensor, bits: int) -> Tensor:
    """The scale (out,) at which the largest magnitude of each output channel of a weight (out, in) is not clipped."""
    return (weight.detach().abs().amax(dim=1) / (2 ** (bits - 1) - 1)).clamp(min=EPS)


def published_scale(weight: Tensor, bits: int) -> Tensor:
    """The scale (out,) of SMI's code: the largest magnitude over half of the levels, so that it is rounded down."""
    return (weight.detach().abs().amax(dim=1) / ((2**bits - 1) / 2)).clamp(min=EPS)


def least_error_scale(weight: Tensor, bits: int, candidates: int = 80) -> Tensor:
    """The scale (out,) of each output channel of a weight (out, in) with the least squared rounding error."""
    weight, high = weight.detach(), 2 ** (bits - 1) - 1
    largest = largest_value_scale(weight, bits)
    best, least = largest, torch.full_like(largest, torch.inf)
    for share in torch.linspace(1, 0.2, candidates).tolist():
        scale = (largest * share).clamp(min=EPS)
        each = scale[:, None]
        error = (weight / each).round_().clamp_(-high - 1, high).mul_(each).sub_(weight).square_().sum(dim=1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best
