"""One iteration as a CUDA graph: within a stage every shape is fixed, so its launches can be recorded once."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from inversion.canvas import Jitter

EAGER_STEPS = 3
"""Iterations that run as they are before the recording, so that every kernel and buffer exists."""


class CapturedStep:
    """Runs `step` as it is for a few iterations, then records it, then replays the recording.

    Every call is one iteration, whichever way it runs. A step that cannot be recorded goes on as it is, after one
    warning.

    Args:
        step: one iteration; takes a jitter of tensors on `device`, returns the loss, and waits for nothing. What
            changes between iterations it must read from the jitter, or from tensors that it updates in place.
        device: a CUDA device.
    """

    def __init__(self, step: Callable[[Jitter], Tensor], device: torch.device) -> None:
        self.step, self.device = step, device
        self.stream = torch.cuda.Stream(device)
        self.draw = torch.zeros(3, dtype=torch.int64, device=device)
        self.jitter = Jitter(*self.draw.unbind())
        self.graph: torch.cuda.CUDAGraph | None = None
        self.eager_left = EAGER_STEPS

    def __call__(self, draw: Tensor) -> Tensor:
        """One iteration with a drawn jitter (3,). The returned loss is overwritten by the next call."""
        self.draw.copy_(draw)
        if self.graph is None and self.eager_left == 0:
            self._record()
        if self.graph is not None:
            self.graph.replay()
            return self.loss
        self.eager_left -= 1
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            loss = self.step(self.jitter)
        current.wait_stream(self.stream)
        return loss

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.loss = self.step(self.jitter)
        except RuntimeError as error:
            warnings.warn(f"no CUDA graph, so every kernel is launched by itself: {error}", stacklevel=3)
        else:
            self.graph = graph
