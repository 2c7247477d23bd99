"""Observers: they see the tensors that pass a place in the model, and say which range to quantize them in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from utils.lazy import torch
from utils.ranks import highest, lowest, total

if TYPE_CHECKING:
    from torch import Tensor

EPS = 2.0**-23
"""Of float32."""
AT_ONCE = 2**21
"""Numbers in the largest tensor of a search for a range."""


def codes(bits: int, symmetric: bool) -> tuple[int, int]:
    """The lowest and the highest code of an activation."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


class Observer(Protocol):
    """What a quantizer asks for its range.

    Made for a width in bits, for a tensor or each of its last channels, and for zero points of 0 (`symmetric`) or any.
    """

    passes: int
    """How often the calibration images must pass."""

    def observe(self, x: Tensor) -> None:
        """Take a tensor of any shape into account."""

    def end_pass(self) -> None:
        """All calibration images have passed once; from here on what every rank observed counts."""

    def range(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest value to represent, scalars or (channels,)."""


class MinMaxObserver:
    """The lowest and the highest value seen. Starts at an empty range, so that a tensor of zeros counts as seen."""

    passes = 1

    def __init__(self, bits: int = 8, channels: int | None = None, symmetric: bool = False) -> None:
        self.bits, self.channels, self.symmetric = bits, channels, symmetric
        shape = () if channels is None else (channels,)
        self.low, self.high = torch.full(shape, torch.inf), torch.full(shape, -torch.inf)

    def observe(self, x: Tensor) -> None:
        x = x.detach().float()
        low, high = torch.aminmax(x) if self.channels is None else torch.aminmax(x.reshape(-1, self.channels), dim=0)
        self.low, self.high = torch.minimum(self.low.to(low), low), torch.maximum(self.high.to(high), high)

    def end_pass(self) -> None:
        self.low, self.high = lowest(self.low), highest(self.high)

    def range(self) -> tuple[Tensor, Tensor]:
        return self.low, self.high


class HistogramObserver(MinMaxObserver):
    """Counts values in equal bins between the lowest and the highest one: two passes, bounded memory."""

    passes = 2

    def __init__(self, bits: int = 8, channels: int | None = None, symmetric: bool = False) -> None:
        super().__init__(bits, channels, symmetric)
        self.bins = min(2048, 32 * 2**bits)
        self.counts: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        if self.counts is None:
            return super().observe(x)
        x = x.detach().float().reshape(-1, self.channels or 1)
        rows = self.counts.shape[0]
        index = ((x - self.low) / self._step()).long().clamp(0, self.bins - 1) + self.bins * torch.arange(
            rows, device=x.device
        )
        if x.device.type == "cpu":
            self.counts += torch.bincount(index.flatten(), minlength=rows * self.bins).view(rows, self.bins)
        else:  # there `bincount` waits for the highest index
            self.counts.view(-1).scatter_add_(0, index.flatten(), torch.ones_like(index).flatten())

    def end_pass(self) -> None:
        if self.counts is None:
            super().end_pass()
            self.counts = torch.zeros(self.channels or 1, self.bins, dtype=torch.int64, device=self.low.device)
        else:
            self.counts = total(self.counts)

    def range(self) -> tuple[Tensor, Tensor]:
        if not bool((self.low <= self.high).all()):
            return self.low, self.high
        low, high = self._range(self.low.view(-1), self.high.view(-1))
        return low.view_as(self.low), high.view_as(self.high)

    def _step(self) -> Tensor:
        return ((self.high - self.low) / self.bins).clamp(min=torch.finfo(torch.float32).tiny)

    def _centers(self) -> Tensor:
        """The middle of every bin (rows, bins)."""
        return self.low.view(-1, 1) + (torch.arange(self.bins, device=self.low.device) + 0.5) * self._step().view(-1, 1)

    def _range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Range (rows,) within the lowest and highest value (rows,)."""
        raise NotImplementedError


class PercentileObserver(HistogramObserver):
    """Leaves one value in 10,000 out at either end."""

    tail = 1e-4

    def _range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        share = self.counts.cumsum(dim=1) / self.counts.sum(dim=1, keepdim=True)
        step = self._step().view(-1)
        below, within = (share <= self.tail).sum(dim=1), (share < 1 - self.tail).sum(dim=1)
        return low + below * step, torch.minimum(low + (within + 1) * step, high)


class MSEObserver(HistogramObserver):
    """The range with the least squared error: the upper and the lower end are searched in turn, twice.

    A whole tensor's range holds zero, as its quantizer wants it; a channel's need not (its zero point is not bounded).
    Of a symmetric range the scale is searched.
    """

    candidates, rounds = 40, 2

    def _range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if self.symmetric:
            ends = codes(self.bits, True)
            widest = torch.maximum(low / ends[0], high / ends[1])
            scales = [widest * share for share in torch.linspace(1, 0.02, self.candidates).tolist()]
            return self._least([(scale * ends[0], scale * ends[1]) for scale in scales])
        if self.channels is None:
            low, high = low.clamp(max=0), high.clamp(min=0)
        span = high - low
        shrunk = [share * span for share in torch.linspace(0, 0.98, self.candidates).tolist()]
        lows, highs = [low + by for by in shrunk], [high - by for by in shrunk]
        if self.channels is None:
            lows, highs = [end.clamp(max=0) for end in lows], [end.clamp(min=0) for end in highs]
        for _ in range(self.rounds):
            high = self._least([(low, end) for end in highs])[1]
            low = self._least([(end, high) for end in lows])[0]
        return low, high

    def _least(self, ranges: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Of these ranges, in each row that with the least error."""
        lows, highs = (torch.stack(ends) for ends in zip(*ranges, strict=True))
        several = max(1, AT_ONCE // self.counts.numel())
        pairs = zip(lows.split(several), highs.split(several), strict=True)
        least = torch.cat([self._error(low, high) for low, high in pairs]).argmin(dim=0, keepdim=True)
        return lows.gather(0, least)[0], highs.gather(0, least)[0]

    def _error(self, low: Tensor, high: Tensor) -> Tensor:
        """Squared error (candidates, rows) of what was counted, rounded in ranges (candidates, rows)."""
        x, scale = self._centers(), ((high - low) / (2**self.bits - 1)).clamp(min=EPS)[..., None]
        zero_point = (-low[..., None] / scale).round()
        rounded = (x / scale).round_().add_(zero_point).clamp_(0, 2**self.bits - 1).sub_(zero_point).mul_(scale)
        error = rounded.sub_(x).square_().mul_(self.counts).sum(dim=-1)
        return torch.where(high > low, error, torch.inf)


@dataclass(frozen=True)
class Method:
    """A value of `--observer`: which tensors are quantized, and how their ranges are chosen."""

    observer: Callable[..., Observer]
    """Makes the observer of an activation."""
    taps: tuple[str, ...]
    """What is quantized besides the inputs of linear layers and of the patch projection."""
    least_error_weights: bool = True
    """Scales of weights by least squared error, not by the largest value."""
    reparameterize: bool = False
    """Ranges per channel of what a layer norm puts out, moved into it and the next layer: `reparameterize`."""
    log_probs: bool = False
    """Softmax outputs in powers of the square root of two: `LogSqrt2Quantizer`."""
    per_head: bool = False
    """One range for each head of q, k, v and softmax outputs."""
    wide_input: bool = False
    """The patch projection's input at 8 bits or more, as images have them."""
    output_error: bool = False
    """Ranges of layers' inputs, and scales of weights, by the error of the layer's output: `fit_ranges`."""
    published: bool = False
    """As SMI's and PSAQ-ViT's code has it: ranges of the full-precision model, of all tokens, `published_scale`."""


# Every residual sum, the embeddings and the scores.
SUMS = ("q", "k", "v", "scores", "attn_sum", "mlp_sum", "embed")
# With the inputs of linear layers what SMI's and PSAQ-ViT's code quantizes; softmax outputs it does not.
PUBLISHED = ("patches", "joined", "positions", "embed", "qkv", "scores", "proj", "attn_sum", "mlp", "mlp_sum", "logits")
# With the inputs of linear layers these are the factors of every matrix product.
FACTORS = ("q", "k", "v", "probs")

# `repq` is after RepQ-ViT and not its code: as with the others, so that two of them differ in ranges alone, weights are
# symmetric (which integer kernels ask for) by least squared error, the end of softmax outputs is that of least uniform
# error, and pixels have the bits of all activations; the norm in front of the classifier is moved as those of blocks.
OBSERVERS: dict[str, Method] = {
    "minmax": Method(MinMaxObserver, SUMS, least_error_weights=False),
    "published": Method(MinMaxObserver, PUBLISHED, least_error_weights=False, published=True),
    "percentile": Method(PercentileObserver, FACTORS),
    "mse": Method(MSEObserver, FACTORS),
    "repq": Method(MSEObserver, FACTORS, reparameterize=True, log_probs=True),
    "heads": Method(MSEObserver, FACTORS, per_head=True, wide_input=True),
    "output": Method(MSEObserver, FACTORS, per_head=True, wide_input=True, output_error=True),
}
