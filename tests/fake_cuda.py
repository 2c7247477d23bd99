"""A CUDA device that is not there: what runs on it is fake tensors, which have shapes and devices and no values.

The host's tensors are real. So labels, noise and jitter are drawn as always, and what the host computes runs; only
what is on the device has no values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten


# What fake tensors do not know yet.
NO_FAKE = {
    name: lambda x, *_: (torch.empty_like(x), torch.empty_like(x, dtype=torch.bool))
    for name in (
        aten.fake_quantize_per_channel_affine_cachemask,
        aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams,
    )
} | {aten._fused_adam_: lambda *_: None}


class HostAndDevice(TorchDispatchMode):
    """Refuses what a GPU would refuse or be slow at; `waits` counts what the host waits for elsewhere.

    Everywhere: an operation on tensors of both, and one on the device with a generator of the host. Inside a `step`:
    whatever the host waits for. Inside a `recorded` one: whatever is the host's but numbers, for a recording keeps it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits, self.level = 0, ""
        self.generators: list[torch.Generator] = []
        self.numbers: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = [x for x in tensors if x.device.type == "cuda"]
        target = kwargs.get("device")
        to_device = target is not None and torch.device(target).type == "cuda"
        if not on_device and not to_device:
            with unset_fake_temporarily():
                made = func(*args, **{key: value for key, value in kwargs.items() if key != "pin_memory"})
            if self.level == "recorded" and not [x for x in tensors if not self.is_number(x)]:
                self.numbers += [x for x in tree_leaves(made) if isinstance(x, Tensor)]
            return made
        name = func.overloadpacket
        generator = kwargs.get("generator")
        if generator is not None and not self.knows(generator):
            raise AssertionError(f"{func}: a generator of the host on the device")
        if name is aten._local_scalar_dense:
            return self.wait(func, 1)
        if name is aten._to_copy and on_device and target is not None and not to_device:
            dtype = kwargs.get("dtype") or args[0].dtype
            return self.wait(func, None) or self.value(args[0], dtype)
        if name is aten.copy_ and args[0].device.type == "cpu":
            if not (len(args) > 2 and args[2]):  # non_blocking
                self.wait(func, None)
            return args[0]
        if name in NO_FAKE:
            return NO_FAKE[name](*args)
        hosts = [x for x in tensors if x.device.type == "cpu"]
        if name not in (aten._to_copy, aten.copy_):
            # An item that is set to a number comes as `fill_`.
            hosts = [x for x in hosts if not (self.is_number(x) or (name is aten.fill_ and x.ndim == 0))]
        if self.level == "recorded" and hosts:
            raise AssertionError(f"{func}: a tensor of the host in a step that is recorded")
        if name not in (aten._to_copy, aten.copy_) and any(x.ndim for x in hosts):
            raise AssertionError(f"{func}: a tensor of the host with one of the device")
        return func(*args, **kwargs)

    def knows(self, generator: torch.Generator) -> bool:
        """Whether it is one of the device; what comes here is another object for the same one."""
        with unset_fake_temporarily():
            return any(torch.equal(generator.get_state(), known.get_state()) for known in self.generators)

    def is_number(self, x: Tensor) -> bool:
        """Whether it stands for a Python number: made inside the step, from nothing."""
        return x.ndim == 0 and any(x is number for number in self.numbers)

    def wait(self, func, value: object) -> object:
        """The host waits for a value."""
        if self.level:
            raise AssertionError(f"{func}: the host waits inside a step")
        self.waits += 1
        return value

    @staticmethod
    def value(x: Tensor, dtype: torch.dtype) -> Tensor:
        with unset_fake_temporarily():
            return torch.zeros(x.shape, dtype=dtype)

    @contextlib.contextmanager
    def step(self, level: str) -> Iterator[None]:
        """What stands inside is a step."""
        before, self.level, self.numbers = self.level, level, []
        try:
            yield
        finally:
            self.level = before

    def inside(self, level: str, run: Callable) -> Callable:
        """`run` as a step."""

        def held(*args, **kwargs):
            with self.step(level):
                return run(*args, **kwargs)

        return held


@torch.no_grad()
def run_backward(outputs, grads, retain_graph, create_graph, inputs, *_, accumulate_grad, **__):
    """Walks the graph as torch's engine does, which refuses CUDA tensors where there is no driver."""
    order, entered = [], set()
    for output in outputs:
        stack = [output.grad_fn]
        while stack:
            node = stack[-1]
            if node in entered:
                stack.pop()
                if node not in order:
                    order.append(node)
                continue
            entered.add(node)
            stack += [after for after, _ in node.next_functions if after is not None and after not in entered]
    pending = {}
    for output, grad in zip(outputs, grads, strict=True):
        pending.setdefault(output.grad_fn, {})[output.output_nr] = grad
    found = {}
    for node in reversed(order):
        given = pending.pop(node, None)
        if given is None:
            continue
        if hasattr(node, "variable"):
            found[id(node.variable)] = given[0]
            if accumulate_grad:
                node.variable.grad = given[0] if node.variable.grad is None else node.variable.grad + given[0]
            continue
        whole = [given.get(i) for i in range(len(node._input_metadata))]
        whole = [
            torch.zeros(tuple(seen.shape), dtype=seen.dtype, device=CUDA) if grad is None else grad
            for grad, seen in zip(whole, node._input_metadata, strict=True)
        ]
        is_ours = isinstance(node, torch.autograd.function.BackwardCFunction)
        out = node.apply(*whole) if is_ours else node(*whole)
        for (after, index), grad in zip(node.next_functions, out if isinstance(out, tuple) else (out,), strict=False):
            if after is not None and grad is not None:
                seen = after._input_metadata[index]
                grad = grad.sum_to_size(tuple(seen.shape)).to(seen.dtype)
                place = pending.setdefault(after, {})
                place[index] = grad if index not in place else place[index] + grad
    return tuple(found.get(id(x)) for x in inputs)


class FakeGraphs:
    """The `Recorder` of the device: what it runs or records is a step."""

    agrees = True

    def __init__(self, device: HostAndDevice) -> None:
        self.device = device

    def run(self, step: Callable[[], Tensor]) -> Tensor:
        with self.device.step("recorded"):
            return step()

    def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: self.run(step)


class Arrived:
    """An event."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def record(self, stream: object) -> None:
        pass


@pytest.fixture
def cuda(monkeypatch) -> Iterator[HostAndDevice]:
    """`CUDA` is there, as far as shapes and devices go."""
    device, real = HostAndDevice(), torch.Generator

    def generator(where: torch.device | str = "cpu") -> torch.Generator:
        made = real()
        if torch.device(where).type == "cuda":
            device.generators.append(made)
        return made

    monkeypatch.setattr(torch, "Generator", generator)
    monkeypatch.setattr("inversion.engine.cuda_graphs", lambda _: FakeGraphs(device))
    monkeypatch.setattr("inversion.engine.verdict", lambda *_: True)
    monkeypatch.setattr(torch.autograd, "_engine_run_backward", run_backward)
    monkeypatch.setattr(torch.autograd.graph, "_engine_run_backward", run_backward)
    monkeypatch.setattr(torch.cuda, "Event", Arrived)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr("utils.device.free_memory_bytes", lambda device: 2**40)
    host = torch.zeros(1)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            host.to(CUDA)
    except RuntimeError as error:
        pytest.skip(f"this version of torch has no fake tensors on CUDA without a driver: {error}")
    with FakeTensorMode(allow_non_fake_inputs=True), device:
        yield device
