"""One iteration as a CUDA graph: within a stage every shape is fixed, so its launches can be recorded once."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from utils.errors import UserNote

EAGER_STEPS = 3
"""Iterations that run as they are before the recording, so that every kernel and buffer exists."""


class Recorder(Protocol):
    """What can run a step as it is, and record it."""

    agrees: bool | None
    """Whether replays were found to do what the step does; None: nobody has looked yet."""

    def run(self, step: Callable[[], Tensor]) -> Tensor:
        """One step as it is; its loss."""

    def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """A replay of a step, which is not run. Raises `RuntimeError` for one that cannot be recorded."""


class CudaGraphs:
    """The `Recorder` of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.agrees: bool | None = None

    def run(self, step: Callable[[], Tensor]) -> Tensor:
        """On the stream that is recorded."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            loss = step()
        current.wait_stream(self.stream)
        return loss

    def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Every replay overwrites the loss of the one before."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            loss = step()

        def replay() -> Tensor:
            graph.replay()
            return loss

        return replay


@functools.cache
def cuda_graphs(device: torch.device) -> CudaGraphs:
    """The one of this process: what it records is held against the step once."""
    return CudaGraphs(device)


class CapturedStep:
    """Runs `step` as it is for a few iterations, then records it, then replays the recording.

    Every call is one iteration, whichever way it runs. A step that cannot be recorded, or whose replay does not do what
    it does, goes on as it is, after one note.

    Args:
        step: one iteration; takes a tensor of draws on the device, returns the loss, and waits for nothing. What
            changes between iterations it must read from the draws, or from tensors that it updates in place.
        state: these tensors, the optimized one first.
        dtype: what products are computed in; it says how far a replay may be from the step.
        recorder: records it.
    """

    def __init__(
        self,
        step: Callable[[Tensor], Tensor],
        state: Callable[[], Sequence[Tensor]],
        dtype: torch.dtype,
        recorder: Recorder,
    ) -> None:
        self.step, self.state, self.recorder = step, state, recorder
        # Of the loss, and of how far the pixels move; a step that reads anything stale is past 0.4.
        self.tolerance = 1e-2 if torch.finfo(dtype).eps < 1e-3 else 0.2
        self.draw: Tensor | None = None
        self.replay: Callable[[], Tensor] | None = None
        self.eager_left = EAGER_STEPS

    def __call__(self, draw: Tensor) -> Tensor:
        """One iteration with its draws. The returned loss is overwritten by the next call."""
        if self.draw is None:
            self.draw = torch.zeros_like(draw)
        if self.replay is None and self.eager_left == 0 and self.recorder.agrees is not False:
            self._record(draw)
        self.draw.copy_(draw)
        if self.replay is not None:
            return self.replay()
        self.eager_left -= 1
        return self.recorder.run(self._run)

    def _run(self) -> Tensor:
        return self.step(self.draw)

    def _record(self, draw: Tensor) -> None:
        untested = self.recorder.agrees is None
        # Before the recording, which gives the memory of what ran before it back.
        expected = self._elsewhere(draw, lambda: self.recorder.run(self._run)) if untested else None
        self.draw.zero_()
        try:
            replay = self.recorder.record(self._run)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(UserNote(f"no CUDA graph, so every kernel is launched by itself: {reason}"), stacklevel=3)
            return
        if untested:
            self.recorder.agrees = self._near(self._elsewhere(draw, replay), expected)
        if self.recorder.agrees:
            self.replay = replay
        else:
            text = "the recorded CUDA graph does not compute what the step does, so every kernel is launched by itself"
            warnings.warn(UserNote(f"{text}: slower, and right (as with --eager)"), stacklevel=3)

    @torch.no_grad()
    def _elsewhere(self, draw: Tensor, run: Callable[[], Tensor]) -> list[Tensor]:
        """Loss and pixels after a step from another state than that of the recording, how it moved them, and no trace.

        Half of every value of the state: a step that reads a copy, or a number, of the time of the recording differs.
        """
        kept = [x.clone() for x in self.state()]
        for x in self.state():
            x.mul_(0.5)
        self.draw.copy_(draw)
        with torch.enable_grad():
            loss = run().clone()
        pixels = self.state()[0].detach().clone()
        for x, before in zip(self.state(), kept, strict=True):
            x.copy_(before)
        return [loss, pixels, pixels - kept[0] / 2]

    def _near(self, found: list[Tensor], expected: list[Tensor]) -> bool:
        loss, pixels = ((a - b).norm() for a, b in zip(found[:2], expected[:2], strict=True))
        near = (loss <= self.tolerance * expected[0].abs()) & (pixels <= self.tolerance * expected[2].norm())
        return bool(near | ~expected[0].isfinite())  # a loss that is not finite is no recording's fault
