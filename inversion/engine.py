"""Model inversion: from noise to images that a frozen Vision Transformer is sure of, on kept patches alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from inversion.canvas import Jitter, PatchCanvas, draw_jitters
from inversion.capture import CapturedStep
from inversion.config import InversionConfig
from inversion.losses import LOSSES, LossInputs
from inversion.schedule import Stage
from models import LoadedModel, SparseImages, SparseViT, pack_blocks
from utils.device import keep_freed_memory
from utils.errors import UserError

BETAS = (0.5, 0.99)
REFRESH = 20
"""Iterations between two looks at the loss."""


@dataclass(frozen=True)
class Progress:
    """Where a batch stands: iterations done, the last loss that arrived from the device, patches left per image."""

    iteration: int
    loss: float
    patches: int


@dataclass(frozen=True)
class InvertedBatch:
    """A finished batch, on the CPU, and its loss at every iteration (iterations,)."""

    images: SparseImages
    losses: Tensor


class Inverter:
    """Inverts batches of images out of one model.

    Args:
        model: what `load_model` gave; its weights are copied to `device` in the configured dtype, and frozen.
        config: the inversion.
        device: where to run.
        student: as it is now; what the adversarial loss looks for disagreement with.
    """

    def __init__(
        self, model: LoadedModel, config: InversionConfig, device: torch.device, student: LoadedModel | None = None
    ) -> None:
        self.config, self.device = config, device
        self.dtype = getattr(torch, config.dtype)
        self.vit = self._frozen(model)
        self.student = self._frozen(student) if config.weights.get("adv") else None
        self.strategy = config.strategy()
        self.stages = self.strategy.stages(config.iterations, self.vit.grid.count)
        self.losses = [(weight, LOSSES[name]) for name, weight in config.weights.items() if weight]
        black, white = (model.preprocessing.normalize(torch.full((3, 1, 1), value)) for value in (0.0, 1.0))
        self.pixel_range = black.to(device), white.to(device)

    def _frozen(self, model: LoadedModel) -> SparseViT:
        """A copy on the device, in the configured dtype, made fast for gradients to pixels alone."""
        vit = SparseViT(model.vit)
        if self.device.type == "cpu":
            keep_freed_memory()
            pack_blocks(vit, self.dtype)
        return copy.deepcopy(vit).to(self.device, self.dtype).requires_grad_(False)

    def invert(self, batch_index: int, on_progress: Callable[[Progress], None] | None = None) -> InvertedBatch:
        """Batch number `batch_index`: its labels, noise and jitter depend on it and the seed alone.

        Args:
            batch_index: 0-based.
            on_progress: called about every `REFRESH` iterations.

        Raises:
            UserError: the loss is no longer finite.
        """
        config = self.config
        generator = batch_generator(config.seed, batch_index)
        labels = torch.randint(self.vit.num_classes, (config.batch_size,), generator=generator).sort().values
        canvas = PatchCanvas.noise(self.vit.grid, config.batch_size, generator, self.device)
        draws = self.on_device(draw_jitters(config.iterations, self.vit.grid, generator, config.flip))
        losses = LossLog(config.iterations, self.device)
        targets = labels.to(self.device)
        optimizer = self.adam(canvas)
        for stage in self.stages:
            if stage.patches < canvas.positions.shape[1]:
                canvas, optimizer = self._stop_patches(canvas, optimizer, stage.patches)
            step = self.stepper(canvas, optimizer, targets)
            for iteration in self._watched(stage, losses, on_progress):
                losses.record(iteration, step(draws[iteration]))
        images = SparseImages(canvas.pixels.detach().cpu(), canvas.positions.cpu(), labels)
        return InvertedBatch(images, losses.values())

    def step_flops(self) -> list[int]:
        """Floating-point operations of one iteration of one batch, for each stage."""
        models = [self.vit] if self.student is None else [self.vit, self.student]
        return [self.config.batch_size * sum(vit.step_flops(stage.patches) for vit in models) for stage in self.stages]

    def total_flops(self) -> int:
        """Floating-point operations of one batch, the forward passes that rank the patches included."""
        steps = sum(stage.iterations * flops for stage, flops in zip(self.stages, self.step_flops(), strict=True))
        ranked = sum(self.vit.forward_flops(stage.patches) for stage in self.stages[:-1])
        return steps + self.config.batch_size * ranked

    def on_device(self, draws: list[Jitter]) -> Sequence[Jitter | Tensor]:
        """Jitters as a `stepper` takes them: on a GPU rows of one tensor, which no iteration has to copy there."""
        return torch.tensor(draws, device=self.device) if self.device.type == "cuda" else draws

    def stepper(self, canvas: PatchCanvas, optimizer: torch.optim.Adam, labels: Tensor) -> Callable[..., Tensor]:
        """One iteration at a stage: takes a jitter of `on_device`, returns the loss, not yet waited for."""
        step = partial(self._step, canvas, optimizer, labels)
        return CapturedStep(step, self.device) if self.device.type == "cuda" else step

    def _step(self, canvas: PatchCanvas, optimizer: torch.optim.Adam, labels: Tensor, jitter: Jitter) -> Tensor:
        """One iteration. Returns the loss, still on the device: nothing here waits for it."""
        windows = canvas.windows(jitter, self.dtype)
        positions = canvas.jittered_positions(jitter)
        logits, _ = self.vit(windows, positions, mirrored=jitter.flip)
        student_logits = None if self.student is None else self.student(windows, positions, mirrored=jitter.flip)[0]
        inputs = LossInputs(logits, labels, canvas, student_logits)
        loss = sum(weight * term(inputs) for weight, term in self.losses)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch.clamp(canvas.pixels, *self.pixel_range, out=canvas.pixels)
        return loss.detach()

    @torch.no_grad()
    def _stop_patches(
        self, canvas: PatchCanvas, optimizer: torch.optim.Adam, keep: int
    ) -> tuple[PatchCanvas, torch.optim.Adam]:
        """Go on with the `keep` most important patches of each image: pixels, positions and optimizer state."""
        _, attention = self.vit(canvas.pixels.to(self.dtype), canvas.positions, return_attention=True)
        kept = self.strategy.keep(attention.float(), keep)
        rows = torch.arange(len(kept), device=kept.device)[:, None]
        smaller = PatchCanvas(canvas.grid, canvas.pixels[rows, kept], canvas.positions[rows, kept])
        state = optimizer.state[canvas.pixels]
        reduced = self.adam(smaller)
        if state:
            moments = {key: state[key][rows, kept].contiguous() for key in ("exp_avg", "exp_avg_sq")}
            reduced.state[smaller.pixels] = {"step": state["step"].clone(), **moments}
        return smaller, reduced

    def adam(self, canvas: PatchCanvas) -> torch.optim.Adam:
        """A fresh optimizer of the canvas."""
        on_gpu = self.device.type == "cuda"
        kind = {"fused": on_gpu or self.device.type == "cpu", "capturable": on_gpu}
        return torch.optim.Adam([canvas.pixels], lr=self.config.lr, betas=BETAS, **kind)

    def _watched(self, stage: Stage, losses: LossLog, on_progress: Callable[[Progress], None] | None) -> Iterator[int]:
        """The iterations of a stage; between them, now and then, a look at the loss that waits for no device."""
        for iteration in range(stage.start, stage.stop):
            yield iteration
            done = iteration + 1
            if done % REFRESH == 0 or done == stage.stop:
                loss = losses.latest(done, wait=done == stage.stop)
                if on_progress is not None:
                    on_progress(Progress(done, loss, stage.patches))


class LossLog:
    """The loss of every iteration, kept on the device and copied to the host in the background."""

    def __init__(self, iterations: int, device: torch.device) -> None:
        self.device_losses = torch.zeros(iterations, device=device)
        pinned = device.type == "cuda"
        self.host_losses = torch.zeros(iterations, pin_memory=pinned)
        self.seen = 0

    def record(self, iteration: int, loss: Tensor) -> None:
        """Keep the loss of an iteration."""
        self.device_losses[iteration] = loss

    def latest(self, done: int, wait: bool) -> float:
        """The last loss that has arrived. Raises `UserError` if one of them is not finite."""
        if wait:
            self.host_losses.copy_(self.device_losses)
            self.seen = done
        arrived = self.host_losses[: self.seen]
        self.host_losses.copy_(self.device_losses, non_blocking=True)
        if not torch.isfinite(arrived).all():
            first = int((~torch.isfinite(arrived)).nonzero()[0])
            raise UserError(
                f"the inversion loss is {arrived[first].item()} at iteration {first}; "
                "lower --lr_g or the loss weights, or try --dtype float32"
            )
        loss = arrived[-1].item() if self.seen else float("nan")
        self.seen = done
        return loss

    def values(self) -> Tensor:
        """All losses (iterations,), on the CPU."""
        return self.device_losses.cpu()


def batch_generator(seed: int, batch_index: int) -> torch.Generator:
    """The random numbers of one batch; other batches and other seeds have independent ones."""
    state = np.random.SeedSequence([seed, batch_index]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)
