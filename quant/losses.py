"""What a stage's output is asked for during reconstruction: the values of `--reconstruct_loss`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from models import SparseViT
from quant.rows import Rows, outputs, rows_at
from quant.stages import Stage

MOMENTS = 5
"""At which `fisher` looks at gradients, evenly spaced over a stage's steps."""
TEMPERATURE = 20.0
"""Of the predictions whose divergence `fisher` differentiates."""
LOOKED_AT = 32
"""Images that it takes them from."""


class Loss(Protocol):
    """Made for a stage, from what the full-precision model gives there; knows how far a step's output is from it.

    `positions` (N, n): of the patches of the images in `target` (N, ..).
    """

    def __init__(
        self, stage: Stage, reference: SparseViT, target: Tensor, positions: Tensor, batch_size: int
    ) -> None: ...

    def look(self, progress: float, outputs: Callable[[int], Tensor]) -> None:
        """Before a step, at this share of all steps; `outputs(n)` is what the stage gives of the first n images now."""

    def __call__(self, out: Tensor, chosen: Tensor) -> Tensor:
        """The loss () of the outputs (B, ..) of the images `chosen` (B,), int64."""


class SquaredError:
    """Squared distance of a token, mean over tokens (BRECQ, Li et al., ICLR 2021)."""

    def __init__(self, stage: Stage, reference: SparseViT, target: Tensor, positions: Tensor, batch_size: int) -> None:
        self.target, self.positions = target, positions

    def look(self, progress: float, outputs: Callable[[int], Tensor]) -> None:
        """Nothing to see."""

    def __call__(self, out: Tensor, chosen: Tensor) -> Tensor:
        return (out - rows_at(self.target, chosen)).square().sum(dim=-1).mean()


class Global(SquaredError):
    """That, and the distance of what the classifier reads once the stages behind have run in full precision (GLF-Q).

    The two count alike in the first step.
    """

    def __init__(self, stage: Stage, reference: SparseViT, target: Tensor, positions: Tensor, batch_size: int) -> None:
        super().__init__(stage, reference, target, positions, batch_size)
        self.through, self.weight = stage.features, None
        self.reference = reference
        rows = Rows((target, positions), batch_size, positions.device)
        self.features = outputs(partial(self.through, reference), rows)

    def __call__(self, out: Tensor, chosen: Tensor) -> Tensor:
        local = super().__call__(out, chosen)
        found = self.through(self.reference, out, self.positions[chosen])
        last = (found - rows_at(self.features, chosen)).square().sum(dim=-1).mean()
        if self.weight is None:
            self.weight = local.detach() / last.detach().clamp(min=1e-30)
        return local + self.weight * last


class Fisher(SquaredError):
    """The error weighted by what it does to the predictions: diagonal and low rank of the Fisher matrix (FIMA-Q).

    With e = |error| (B, T D) of an image, g_k the mean over images of the gradient's magnitude at the k-th moment and
    d_k the mean of e there, G and D of these rows: (e G^T)(D D^T)^-1 (e G^T)^T + mean(e^2 mean_k g_k), each relative to
    its first value behind each look, times that of the squared error. The classifier's is the divergence itself, times
    the square of `TEMPERATURE`. Gradients are those of the divergence of predictions at `TEMPERATURE`, the stages
    behind in full precision, of `LOOKED_AT` images.

    The paper divides by the first value of all and leaves the divergence as it is. So scaled every loss here is about
    as large as `mse` at any step, beside which rounding's fixed weight was chosen. It looks at all images; a few give
    the same means at a fraction of the time.
    """

    def __init__(self, stage: Stage, reference: SparseViT, target: Tensor, positions: Tensor, batch_size: int) -> None:
        super().__init__(stage, reference, target, positions, batch_size)
        self.stage, self.reference, self.few = stage, reference, batch_size
        self.seen: list[tuple[Tensor, Tensor]] = []
        logits = outputs(partial(stage.logits, reference), Rows((target, positions), batch_size, positions.device))
        self.wanted = (logits / TEMPERATURE).log_softmax(dim=-1)

    def look(self, progress: float, outputs: Callable[[int], Tensor]) -> None:
        """Take the gradients of the next moment once it has come."""
        if self.stage.last or progress * MOMENTS < len(self.seen):
            return
        with torch.no_grad():
            out = outputs(min(LOOKED_AT, len(self.target)))
        magnitudes = []
        parts = (x[: len(out)].to(out.device).split(self.few) for x in (out, self.positions, self.wanted))
        for part, at, wanted in zip(*parts, strict=True):
            part = part.detach().requires_grad_()
            divergence = self._divergences(self.stage.logits(self.reference, part, at), wanted).sum()
            magnitudes.append(torch.autograd.grad(divergence, part)[0].abs().flatten(1))
        error = (out - self.target[: len(out)].to(out.device)).abs().flatten(1)
        self.seen.append((torch.cat(magnitudes).mean(dim=0), error.mean(dim=0)))
        self.gradients, errors = (torch.stack(rows) for rows in zip(*self.seen, strict=True))
        self.diagonal, self.first = self.gradients.mean(dim=0), None
        squared = errors.double() @ errors.double().T
        squared.diagonal().add_(1e-6 * squared.diagonal().mean().clamp(min=1e-30))
        self.inverse = torch.linalg.inv(squared).float()

    def __call__(self, out: Tensor, chosen: Tensor) -> Tensor:
        if self.stage.last:
            return self._divergences(out, rows_at(self.wanted, chosen)).mean() * TEMPERATURE**2
        error = (out - rows_at(self.target, chosen)).abs().flatten(1)
        along = error @ self.gradients.T
        parts = ((along @ self.inverse) * along).sum(dim=1).mean(), (error.square() * self.diagonal).mean()
        if self.first is None:
            local = super().__call__(out, chosen).detach()
            self.first = [0.5 * local / part.detach().clamp(min=1e-30) for part in parts]
        return sum(first * part for first, part in zip(self.first, parts, strict=True))

    @staticmethod
    def _divergences(logits: Tensor, wanted: Tensor) -> Tensor:
        """Kullback-Leibler divergence (B,) from what is wanted, log-probabilities (B, classes)."""
        found = (logits / TEMPERATURE).log_softmax(dim=-1)
        return F.kl_div(found, wanted, reduction="none", log_target=True).sum(dim=-1)


LOSSES: dict[str, type[Loss]] = {"mse": SquaredError, "fisher": Fisher, "global": Global}
