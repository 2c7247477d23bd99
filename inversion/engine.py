"""Model inversion: from noise to images that a frozen Vision Transformer is sure of, on kept patches alone."""

from __future__ import annotations

import contextlib
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from inversion.canvas import PatchCanvas
from inversion.canvases import CANVASES, Canvas
from inversion.capture import CapturedStep, cuda_graphs
from inversion.config import DEFAULT_VIEWS, InversionConfig
from inversion.importance import IMPORTANCES, require_ranking
from inversion.inits import INITS
from inversion.phases import Phase
from inversion.priors import Context, LossInputs
from inversion.projections import Projection, parse_projection
from inversion.schedule import Stage, ranked
from inversion.self_check import fast_paths_agree, verdict
from inversion.strategies import others
from inversion.targets import distributions, draw_labels, random_distributions
from inversion.views import Draw, Views, numbers_of, squares
from models import DISAGREE, LoadedModel, SparseImages, SparseViT, frozen_copy
from utils.device import require_memory, within_memory
from utils.errors import UserError, UserNote

REFRESH = 20
"""Iterations between two looks at the loss."""
COPIES = 2
"""Of the loss that may be under way: the host is at most (`COPIES` + 1) * `REFRESH` iterations ahead of a device."""


@dataclass(frozen=True)
class Progress:
    """Where a batch stands: iterations done, the last loss that arrived from the device, patches left per image."""

    iteration: int
    loss: float
    patches: int


@dataclass(frozen=True)
class Snapshot:
    """An un-jittered batch in the middle of its inversion, on the CPU: for pictures of the process.

    `pixels` (B, n, C, height, width) at `positions` (B, n), `attention` (B, n) of the class token to them (None where
    the model has none), after `iteration` iterations.
    """

    iteration: int
    pixels: Tensor
    positions: Tensor
    attention: Tensor | None


@dataclass(frozen=True)
class InvertedBatch:
    """A finished batch, on the CPU, its loss at every iteration (iterations,), and the snapshots asked for."""

    images: SparseImages
    losses: Tensor
    snapshots: tuple[Snapshot, ...] = ()


@dataclass(frozen=True)
class StageStart:
    """What a callback sees when a stage begins: which it is, the canvas, and its labels (B,)."""

    batch: int
    number: int
    stage: Stage
    canvas: PatchCanvas
    labels: Tensor


@dataclass(frozen=True)
class Span:
    """A phase, its iterations `start` .. `stop - 1`, and how images are looked at in it."""

    phase: Phase
    start: int
    stop: int
    views: Views


class Inverter:
    """Inverts batches of images out of one model.

    Args:
        model: what `load_model` gave; its weights are copied to `device` in the configured dtype, and frozen.
        config: the inversion.
        device: where to run.
        student: as it is now; what the adversarial term looks for disagreement with.
        earlier: gives the images of all batches before a numbered one; asked only for terms that need them.
        eager: no CUDA graph, no packed layer, no gradient written out; the images are the same up to rounding. So it
            is as well after a note, where any of them computes something else than plain code does.

    Raises:
        UserError: something that a term or the ranking of patches needs is absent.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: InversionConfig,
        device: torch.device,
        student: LoadedModel | None = None,
        earlier: Callable[[int], SparseImages | None] | None = None,
        eager: bool = False,
    ) -> None:
        self.model, self.device, self.student = model, device, student
        self.config = config = config.of(SparseViT(model.vit))
        self.dtype = getattr(torch, config.dtype)
        self.recorder = cuda_graphs(device) if device.type == "cuda" and not eager else None
        self._prepare(plain=eager or verdict(model, device, self.dtype, config.views) is False)
        draw_labels(config.targets, 1, self.vit.num_classes, torch.Generator())  # refuses what is no class
        self.strategy = config.strategy_object()
        self.stages = self.strategy.stages(config.iterations, self.vit.grid)
        self.ranked = ranked(self.stages, self.vit.grid.count)
        if self.ranked:
            require_ranking(self.config.importance, self.vit, model.name)
        self.earlier = earlier if config.needs("earlier") else None
        ends = (torch.full((model.grid.channels, 1, 1), value) for value in (0.0, 1.0))
        black, white = map(model.preprocessing.normalize, ends)
        self.limits = black.to(device), white.to(device)
        self.projections = [p for p in map(parse_projection, config.projections) if p is not None]

    def _prepare(self, plain: bool) -> None:
        """The model and the terms of the loss, which may run models as well: fast, or by plain code."""
        self.plain, config = plain, self.config
        self.vit = self._frozen(self.model)
        how = self.device, self.dtype, config.options, self.student, self._frozen, config.views
        context = Context(self.model, self.vit, *how)
        self.losses = [(weight, term.make(context)) for weight, term in config.active_terms()]
        self.reads_inside = any(loss.reads_inside for _, loss in self.losses)
        extra = sum(loss.numbers for _, loss in self.losses)
        self.spans = [
            Span(phase, *span, Views(phase.views(config.views), self.vit.grid, self.device, plain, extra, phase.coarse))
            for phase, span in zip(config.phase_list(), config.spans(), strict=True)
        ]

    def _frozen(self, model: LoadedModel) -> SparseViT:
        """A copy on the device, in the configured dtype, made fast for gradients to pixels alone."""
        return frozen_copy(model.vit, self.device, self.dtype, self.plain)

    @property
    def images_per_trajectory(self) -> int:
        """Images that one optimized canvas becomes."""
        return len(self.stages) if self.strategy.detaches else 1

    @property
    def trajectories(self) -> int:
        """Canvases that are optimized for one batch of images."""
        return -(-self.config.batch_size // self.images_per_trajectory)

    def invert(
        self,
        batch_index: int,
        on_progress: Callable[[Progress], None] | None = None,
        on_stage: Callable[[StageStart], None] | None = None,
    ) -> InvertedBatch:
        """Batch number `batch_index`: its labels, noise and jitter depend on it and the seed alone.

        Args:
            batch_index: 0-based.
            on_progress: called about every `REFRESH` iterations.
            on_stage: called at the start of every stage, the first included; may change the pixels in place.

        Raises:
            UserError: the loss is no longer finite, a target class that the model does not have, or not enough GPU
                memory.
        """
        return within_memory(
            lambda: self._invert(batch_index, on_progress, on_stage),
            partial(self._one_iteration, batch_index),
            self.config.batch_size,
            "--calib-batchsize of test_quant.py, --inversion-batchsize of test_kt.py",
            self.device,
            self.images_per_trajectory,
        )

    def _invert(
        self,
        batch_index: int,
        on_progress: Callable[[Progress], None] | None,
        on_stage: Callable[[StageStart], None] | None,
    ) -> InvertedBatch:
        config, generator = self.config, batch_generator(self.config.seed, batch_index)
        labels = draw_labels(config.targets, self.trajectories, self.vit.num_classes, generator)
        canvas = self._noise(self.trajectories, generator)
        drawn = [
            draw
            for span in self.spans
            for draw in span.views.draws((span.stop - span.start) * config.copies, self.trajectories, generator)
        ]
        draws = self.on_device(drawn)
        if not self.plain and verdict(self.model, self.device, self.dtype, config.views) is None:
            canvas = self._checked(canvas, self._looks(draws[0], self.trajectories)[0], drawn[0])
        self.begin(batch_index, generator, self.trajectories)
        losses, finished, snapshots, stopped = LossLog(config.iterations, self.device), [], [], []
        targets = self.targets(labels, generator)
        optimizer = self.adam(canvas)
        for number, stage in enumerate(self.stages):
            more = stage.begins if number else ()
            if stage.patches - len(more) < canvas.positions.shape[1]:
                shown = self._shown(canvas, stage.start)
                going_on, gone = self._split(shown, targets, stage.patches - len(more), generator)
                if self.strategy.detaches:
                    finished.append(taken(shown, gone))
                elif config.shows_stopped:
                    stopped.append(taken(shown, gone))
                canvas, optimizer = self._reduced(canvas, optimizer, going_on)
            if more:
                canvas = canvas.with_more(torch.tensor(more, device=self.device))
                optimizer = self.adam(canvas)
            if on_stage is not None:
                with self._changed_outside(canvas) as patches:
                    on_stage(StageStart(batch_index, number, stage, patches, labels))
            for span, part in self._parts(stage):
                if span.phase.fresh and part.start == span.start > 0:
                    optimizer = self.adam(canvas)
                step = self.stepper(canvas, optimizer, targets, span)
                for iteration in self._watched(part, losses, on_progress):
                    if iteration in config.snapshots:
                        snapshots.append(self._snapshot(iteration, canvas))
                    set_lr(optimizer, config.lr_at(iteration))
                    losses.record(iteration, step(draws[iteration]))
                    for projection in self.projections:
                        if (iteration + 1) % projection.every == 0:
                            self._project(projection, canvas)
        shown = self._shown(canvas, config.iterations)
        if self.strategy.detaches and finished:
            count = finished[0][1].shape[1]
            _, last = self._split(shown, targets, canvas.positions.shape[1] - count, generator)
            finished.append(taken(shown, last))
        finished = finished or [taken(shown)]
        if config.iterations in config.snapshots:
            snapshots.append(self._snapshot(config.iterations, canvas))
        # Images of one trajectory stand together, so that labels stay sorted.
        pixels, positions = (torch.stack(parts, dim=1).flatten(0, 1).cpu() for parts in zip(*finished, strict=True))
        of_each = labels.repeat_interleave(len(finished))
        if stopped:
            stopped = SparseImages(*(torch.cat(parts, dim=1).cpu() for parts in zip(*stopped, strict=True)), labels)
        images = SparseImages(pixels, positions, of_each, stopped or None)
        return InvertedBatch(images.batches(config.batch_size)[0], losses.values(), tuple(snapshots))

    def _parts(self, stage: Stage) -> list[tuple[Span, Stage]]:
        """A stage, cut where phases begin."""
        cut = [(span, max(stage.start, span.start), min(stage.stop, span.stop)) for span in self.spans]
        return [(span, replace(stage, start=start, stop=stop)) for span, start, stop in cut if start < stop]

    @torch.no_grad()
    def _shown(self, canvas: Canvas, done: int) -> PatchCanvas:
        """The kept patches after so many iterations, as the model was fed them: in a coarse phase squares."""
        coarse, patches = next(s.phase.coarse for s in self.spans if max(done, 1) <= s.stop), canvas.patches()
        if coarse == 1:
            return patches
        pixels = squares(patches.coarser(coarse).pixels, coarse)
        return PatchCanvas(patches.grid, pixels, patches.positions, patches.plain, patches.neighbours)

    def targets(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """What the cross-entropy compares with for labels (B,), as `distributions` or `random_distributions` say."""
        classes, config = self.vit.num_classes, self.config
        if config.soft_logits:
            return random_distributions(labels, classes, config.soft_logits, generator).to(self.device)
        return distributions(labels, classes, config.soft_label).to(self.device)

    def _noise(self, trajectories: int, generator: torch.Generator) -> Canvas:
        """A canvas of noise; drawn on the CPU so that a seed means the same on every device."""
        grid, kind = self.vit.grid, CANVASES[self.config.canvas]
        noise = INITS[self.config.init]((trajectories, grid.channels, *grid.image_size), generator)
        first = torch.tensor(self.stages[0].begins, device=self.device) if self.stages[0].begins else None
        return kind.start(grid, noise.to(self.device) * kind.spread, self.limits, self.plain, first)

    def _checked(self, canvas: Canvas, draw: Draw, drawn: Draw) -> Canvas:
        """The canvas of the first batch; from here on plain code runs if what is fast computes something else."""
        with torch.no_grad():
            patches = canvas.patches()
        if fast_paths_agree(self.model, self.vit, patches, self.config.views, (draw, drawn)):
            return canvas
        warnings.warn(UserNote(DISAGREE), stacklevel=2)
        self._prepare(plain=True)
        canvas.plain = True
        return canvas

    def _one_iteration(self, batch_index: int, trajectories: int) -> None:
        """The first iteration of a batch of another size, for what it takes."""
        generator = batch_generator(self.config.seed, batch_index)
        canvas = self._noise(trajectories, generator)
        self.begin(batch_index, generator, trajectories)
        targets = distributions(torch.zeros(trajectories, dtype=torch.long), self.vit.num_classes, 0.0)
        draws = self.spans[0].views.draws(self.config.copies, trajectories, generator)
        self._step(canvas, self.adam(canvas), targets.to(self.device), self.on_device(draws)[0])

    def begin(self, batch_index: int, generator: torch.Generator, images: int) -> None:
        """Tell every term that a batch of so many images begins; what they draw comes after noise and jitter."""
        earlier = None if self.earlier is None else self.earlier(batch_index)
        for _, loss in self.losses:
            loss.begin(earlier, generator, images)

    def step_flops(self) -> list[int]:
        """Floating-point operations of one iteration of one batch, for each stage."""
        models = [self.vit, *(vit for _, loss in self.losses for vit in loss.runs)]
        looks = self.trajectories * self.config.copies
        return [looks * sum(vit.step_flops(stage.patches) for vit in models) for stage in self.stages]

    def total_flops(self) -> int:
        """Floating-point operations of one batch, the forward passes that rank the patches included."""
        steps = sum(stage.iterations * flops for stage, flops in zip(self.stages, self.step_flops(), strict=True))
        return steps + self.trajectories * sum(map(self.vit.forward_flops, self.ranked))

    def on_device(self, draws: list[Draw]) -> list[tuple[Draw, ...]] | Tensor:
        """Draws as a `stepper` takes them, those of a step together; for a recording rows of one tensor."""
        copies = self.config.copies
        if self.recorder is None:
            placed = [Draw(draw.jitter, draw.numbers.to(self.device)) for draw in draws]
            return [tuple(placed[first : first + copies]) for first in range(0, len(placed), copies)]
        packed = torch.stack([draw.packed() for draw in draws])
        return packed.unflatten(0, (-1, copies)).to(self.device)

    def stepper(
        self, canvas: Canvas, optimizer: torch.optim.Adam, targets: Tensor, span: Span | None = None
    ) -> Callable[..., Tensor]:
        """One iteration at a stage: takes draws of `on_device`, returns the loss, not yet waited for.

        Args:
            canvas: whose parameter the optimizer changes.
            optimizer: as `adam` gives it.
            targets: as `targets` gives them.
            span: the phase; None: the first.
        """
        step = partial(self._step, canvas, optimizer, targets, span=span)
        if self.recorder is None:
            return step
        return CapturedStep(step, lambda: changing(canvas, optimizer), self.dtype, self.recorder)

    def _step(
        self,
        canvas: Canvas,
        optimizer: torch.optim.Adam,
        targets: Tensor,
        draws: Tensor | tuple[Draw, ...],
        span: Span | None = None,
    ) -> Tensor:
        """One iteration. Returns the loss, still on the device: nothing here waits for it."""
        span = self.spans[0] if span is None else span
        patches, looks = canvas.patches().coarser(span.phase.coarse), self._looks(draws, len(canvas.positions))
        optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for number, draw in enumerate(looks, 1):  # one after another, so that a look takes no memory from the next
            loss = self._loss(patches, targets, span.views, draw) / len(looks)
            loss.backward(retain_graph=number < len(looks))
            total = total + loss.detach()
        optimizer.step()
        with torch.no_grad():
            canvas.settle()
        return total

    @staticmethod
    def _looks(draws: Tensor | tuple[Draw, ...], batch: int) -> Sequence[Draw]:
        """The draws of a step at a batch of so many images."""
        return [Draw.unpacked(row, batch) for row in draws] if isinstance(draws, Tensor) else draws

    def _loss(self, canvas: PatchCanvas, targets: Tensor, views: Views, draw: Draw) -> Tensor:
        """The loss of one look at the batch."""
        seen = views.look(canvas, draw, self.dtype)
        output = self.vit(*seen, return_inside=self.reads_inside)
        inputs, total, first = LossInputs(output, targets, canvas, seen, self.vit.grid), 0.0, views.numbers
        for weight, term in self.losses:
            last = first + term.numbers
            numbers, first = draw.numbers[:, first:last], last
            total = total + weight * term(replace(inputs, numbers=numbers) if term.numbers else inputs)
        return total

    @contextlib.contextmanager
    def _changed_outside(self, canvas: Canvas) -> Iterator[PatchCanvas]:
        """The patches of a canvas, whose pixels may be changed in place."""
        with torch.no_grad():
            patches = canvas.patches()
        before = patches.pixels._version
        yield patches
        if patches.pixels._version != before:
            canvas.overwrite(patches)

    @torch.no_grad()
    def _project(self, projection: Projection, canvas: Canvas) -> None:
        with self._changed_outside(canvas) as patches:
            projection(patches)
        canvas.settle()

    @torch.no_grad()
    def _split(
        self, canvas: PatchCanvas, targets: Tensor, keep: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Which patches of each image go on, (B, keep), and which stop, as indices among those that are left."""
        importance = IMPORTANCES[self.config.importance](self.vit, canvas, targets)
        kept = self.strategy.keep(importance.float(), keep, generator)
        return kept, others(kept, canvas.positions.shape[1])

    @torch.no_grad()
    def _reduced(self, canvas: Canvas, optimizer: torch.optim.Adam, kept: Tensor) -> tuple[Canvas, torch.optim.Adam]:
        """The canvas and optimizer of the patches that go on."""
        smaller = canvas.with_patches(kept)
        if smaller.parameter is canvas.parameter:
            return smaller, optimizer
        state = optimizer.state[canvas.parameter]
        reduced = self.adam(smaller)
        if state:
            moments = {key: canvas.moments_of(kept, state[key]) for key in ("exp_avg", "exp_avg_sq")}
            reduced.state[smaller.parameter] = {"step": state["step"].clone(), **moments}
        return smaller, reduced

    @torch.no_grad()
    def _snapshot(self, iteration: int, canvas: Canvas) -> Snapshot:
        attention, canvas = None, self._shown(canvas, iteration)
        if self.vit.has_class_token:
            attention = self.vit.class_attention(canvas.pixels.to(self.dtype), canvas.positions).float().cpu()
        return Snapshot(iteration, canvas.pixels.detach().cpu().clone(), canvas.positions.cpu().clone(), attention)

    def adam(self, canvas: Canvas) -> torch.optim.Adam:
        """A fresh optimizer of the canvas."""
        on_gpu, decay = self.device.type == "cuda", self.config.weight_decay
        how = {"lr": self.config.lr, "betas": self.config.betas}
        how |= {"fused": on_gpu or self.device.type == "cpu", "capturable": on_gpu}
        kind = partial(torch.optim.AdamW, weight_decay=decay) if decay else torch.optim.Adam
        optimizer = kind([canvas.parameter], **how)
        if on_gpu:
            # What a CUDA graph shall read anew at every replay must be a tensor. Adam itself would wait for its value.
            optimizer.param_groups[0]["lr"] = torch.full((), self.config.lr, device=self.device)
        return optimizer

    def _watched(self, stage: Stage, losses: LossLog, on_progress: Callable[[Progress], None] | None) -> Iterator[int]:
        """The iterations of a stage; between them, now and then, a look at the loss that waits for no device."""
        for iteration in range(stage.start, stage.stop):
            yield iteration
            done = iteration + 1
            if done % REFRESH == 0 or done == stage.stop:
                loss = losses.latest(done, wait=done == stage.stop)
                if on_progress is not None:
                    on_progress(Progress(done, loss, stage.patches))


def changing(canvas: Canvas, optimizer: torch.optim.Adam) -> list[Tensor]:
    """Every tensor that changes from iteration to iteration, in place: the parameter first."""
    return [canvas.parameter, *optimizer.state[canvas.parameter].values(), optimizer.param_groups[0]["lr"]]


@torch.no_grad()
def taken(patches: PatchCanvas, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Copies of the pixels and positions of the patches at `index` (B, k) of each image, of all of them if None."""
    return (patches.pixels.detach(), patches.positions) if index is None else patches.take(index)


def require_memory_for(
    vit: SparseViT, config: InversionConfig, device: torch.device, flag: str = "the batch size"
) -> None:
    """Raise `UserError`, before anything is computed, where a batch of an inversion finds no room on `device`.

    `flag` is what sets the number of its images.
    """
    strategy = config.strategy_object()
    stages = strategy.stages(config.iterations, vit.grid)
    images = len(stages) if strategy.detaches else 1
    each = trajectory_bytes(vit, config, device) // images
    # An iteration leaves its draws and its loss.
    cpu = torch.device("cpu")
    drawn = config.copies * (800 + 8 * numbers_of(config.views, vit.grid.channels) * config.batch_size)
    require_memory(config.iterations, drawn, cpu, "an inversion so long", "--iterations")
    require_memory(config.batch_size, each, device, "an inversion batch", flag)


def trajectory_bytes(vit: SparseViT, config: InversionConfig, device: torch.device) -> int:
    """About what one canvas of whole images needs: what its backward pass reads, and its pixels with their moments."""
    tokens, number = vit.grid.count + vit.prefix_tokens, getattr(torch, config.dtype).itemsize
    saved = [block.saved(tokens, pairs=device.type == "cpu") for block in vit.blocks]  # elsewhere attention is fused
    passes = 1 + sum(name in ("adv", "cr", "bn", "parts") for name, value in config.weights.items() if value)
    pairs = sum(block.score_heads for block in vit.blocks) * vit.grid.count**2
    between = pairs * sum(name in ("ihs", "ap") for name, value in config.weights.items() if value)
    # One block's gradients are held beside what was saved, and pixels in some fifteen forms, more for coefficients and
    # where views change them.
    forms = 25 if config.canvas != "pixels" or {*config.views} - {*DEFAULT_VIEWS} else 15
    return passes * number * (sum(saved) + 2 * max(saved)) + 4 * (forms * vit.grid.count * vit.grid.pixels + between)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give the optimizer a learning rate, in place where it is a tensor."""
    group = optimizer.param_groups[0]
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


class Event(Protocol):
    """Something that a device gets to: as `torch.cuda.Event`."""

    def query(self) -> bool:
        """Whether it has."""

    def synchronize(self) -> None:
        """Return once it has."""


class _Passed:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def start_copy(target: Tensor, source: Tensor) -> Event:
    """Copy to the host, on CUDA in the background; the event of its arrival."""
    if source.device.type != "cuda":
        target.copy_(source)
        return _Passed()
    target.copy_(source, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(source.device))
    return event


class LossLog:
    """The loss of every iteration, kept on the device and copied to the host in the background.

    Args:
        iterations: how many.
        device: where they arise.
        copy: as `start_copy`.
    """

    def __init__(
        self, iterations: int, device: torch.device, copy: Callable[[Tensor, Tensor], Event] = start_copy
    ) -> None:
        self.device_losses = torch.zeros(iterations, device=device)
        self.host_losses = torch.zeros(iterations, pin_memory=device.type == "cuda")
        self.copy = copy
        self.under_way: deque[tuple[int, Event]] = deque()
        self.sent = self.arrived = 0

    def record(self, iteration: int, loss: Tensor) -> None:
        """Keep the loss of an iteration."""
        self.device_losses[iteration] = loss

    def latest(self, done: int, wait: bool) -> float:
        """The last loss that has arrived, NaN before the first has. Raises `UserError` if one of them is not finite.

        Args:
            done: iterations that were started; those since the last call are sent.
            wait: for all of them. Otherwise for what is more than `COPIES` calls old.
        """
        new = slice(self.sent, done)
        self.under_way.append((done, self.copy(self.host_losses[new], self.device_losses[new])))
        self.sent = done
        while self.under_way and (wait or len(self.under_way) > COPIES or self.under_way[0][1].query()):
            self.arrived, event = self.under_way.popleft()
            event.synchronize()
        arrived = self.host_losses[: self.arrived]
        if not torch.isfinite(arrived).all():
            first = int((~torch.isfinite(arrived)).nonzero()[0])
            raise UserError(
                f"the inversion loss is {arrived[first].item()} at iteration {first}; "
                "lower --lr_g or the loss weights, or try --dtype float32"
            )
        return arrived[-1].item() if self.arrived else float("nan")

    def values(self) -> Tensor:
        """All losses (iterations,), on the CPU."""
        return self.device_losses.cpu()


def batch_generator(seed: int, batch_index: int) -> torch.Generator:
    """The random numbers of one batch; other batches and other seeds have independent ones."""
    state = np.random.SeedSequence([seed, batch_index]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)
