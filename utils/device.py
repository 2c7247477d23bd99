"""Device, dtype and seeds."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from utils.errors import UserError
from utils.lazy import torch

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Microseconds of how many a Linux container may compute, or `max`."""
# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def pick_device(device: str, gpu: int = 0) -> torch.device:
    """`auto`, `cpu`, `cuda` or `mps` -> a device that exists. Raises `UserError` where it does not."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: this machine has no CUDA GPU that torch can use; try --device cpu")
        if not 0 <= gpu < torch.cuda.device_count():
            raise UserError(f"--gpu {gpu}: this machine has GPUs 0 to {torch.cuda.device_count() - 1}")
        return torch.device("cuda", gpu)
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this machine has no Apple GPU that torch can use; try --device cpu")
    return torch.device(device)


def pick_dtype(dtype: str, device: torch.device) -> str:
    """`auto`: bfloat16 where the hardware multiplies it (GPU; CPU with AMX or AVX512-BF16), else float32."""
    if dtype != "auto":
        return dtype
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type == "cpu":
        return "bfloat16" if bfloat16_units() else "float32"
    return "float32"


def bfloat16_units() -> list[str]:
    """Of `avx512_bf16` and `amx_bf16`, those that this CPU has. Where AMX is, it multiplies bfloat16."""
    # torch.cpu.get_capabilities tells more, in late versions only.
    has = {"avx512_bf16": torch.cpu._is_avx512_bf16_supported(), "amx_bf16": torch.cpu._is_amx_tile_supported()}
    return [name for name in has if has[name]]


def multiplies_bytes() -> bool:
    """Whether this CPU has VNNI (of AVX512)."""
    return torch.cpu._is_vnni_supported()


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that are freed, for the next iteration, instead of giving them back to the system.

    Otherwise every large tensor is mapped, zeroed page by page and unmapped again. Without glibc nothing happens.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def seed_all(seed: int) -> None:
    """Seed Python, numpy and torch."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def device_name(device: torch.device) -> str:
    """The GPU's name; or the CPU's, the number of threads and what it has for bfloat16."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{device.type} ({platform.machine()})"
    units = " and ".join(bfloat16_units()) or "no bfloat16 unit"
    return f"{_cpu_name()} ({torch.get_num_threads()} threads, {units})"


def _cpu_name() -> str:
    """As Linux gives it; elsewhere the architecture."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.machine()


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring peak memory anew; on the CPU the system keeps one peak per process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use so far: allocated on the GPU, or resident in this process (weights and libraries included)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # Windows has none, and is told so by `run_main`

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


Result = TypeVar("Result")


def within_memory(
    run: Callable[[], Result],
    probe: Callable[[int], object],
    batch: int,
    flags: str,
    device: torch.device,
    unit: int = 1,
) -> Result:
    """What `run` gives.

    Args:
        run: works on batches of `batch` images.
        probe: the largest part of that work on a batch of so many units.
        batch: images.
        flags: what sets it.
        device: where.
        unit: images that are worked on as one.

    Raises:
        UserError: not enough GPU memory; it says about how many images would fit.
    """
    try:
        return run()
    except torch.OutOfMemoryError:
        pass  # from here on nothing holds what was allocated
    most = (batch - 1) // unit
    torch.cuda.empty_cache()
    free = free_memory_bytes(device)
    fitting = unit * fitting_batch(lambda units: memory_taken(lambda: probe(units), device), free, most)
    fits = f"about {fitting} would fit" if fitting else f"not even {unit} would fit"
    raise UserError(f"{batch} images a batch need more memory than {device_name(device)} has left; {fits} ({flags})")


def fitting_batch(needs: Callable[[int], int], free: int, most: int) -> int:
    """How many images, or units of them, fit in nine tenths of `free` bytes, at most `most`; 0 if none.

    `needs`: bytes for so many, asked for 1 and for 2, from which the rest is estimated.
    """
    fitting = 0
    try:
        one = needs(1)
        fitting = int(one <= 0.9 * free)
        each = max(needs(2) - one, 1)
        fitting = int((0.9 * free - one) // each) + 1
    except torch.OutOfMemoryError:
        pass
    return max(0, min(fitting, most))


def memory_taken(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes of a GPU's memory that a call holds at once, besides what is held already."""
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - held


def free_memory_bytes(device: torch.device) -> int:
    """What this process may still take: of the GPU, or of the machine and of the control groups that it is in."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    told = dict(line.split(":", 1) for line in _lines("/proc/meminfo"))
    if "MemAvailable" not in told:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([int(told["MemAvailable"].split()[0]) * 1024, *_free_in_groups()])


def require_memory(count: int, each: int, device: torch.device, what: str, flag: str) -> None:
    """Raise `UserError` where `count` times `each` bytes find no room; what was found to fit once is not asked again.

    Args:
        count: how many of what `flag` sets.
        each: bytes that each of them needs.
        device: where.
        what: what errors call the whole.
        flag: what sets the number.
    """
    needed, there = count * each, free_memory_bytes(device)
    if needed <= _fitted.get(device, 0):  # by then freed, and kept by the allocator for the next
        return
    if needed > there:
        fits = f"{there // each} would fit" if there >= each else "not even one would fit"
        text = f"{what} needs about {needed / 1e9:.3g} GB of memory, {there / 1e9:.3g} GB are free"
        raise UserError(f"{text}; lower {flag} {count}: {fits}")
    _fitted[device] = needed


_fitted: dict[torch.device, int] = {}


def _free_in_groups() -> Iterator[int]:
    """What is left in each control group of this process that has a limit, in either version of Linux's."""
    for line in _lines("/proc/self/cgroup"):
        _, kinds, path = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        limit, used, cache = _GROUP_FILES[kinds]
        root = Path("/sys/fs/cgroup", kinds)
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(root):
                numbers = [*_lines(group / limit), *_lines(group / used)]
                cached = [line.split()[1] for line in _lines(group / "memory.stat") if line.startswith(cache)]
                if len(numbers) == 2 and numbers[0].isdecimal():
                    yield max(int(numbers[0]) - int(numbers[1]) + sum(map(int, cached)), 0)


# By the kind of the control group: files of its limit and of what is in use, and what of it can be taken back.
_GROUP_FILES = {
    "": ("memory.max", "memory.current", "inactive_file "),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
}


def _lines(file: str | Path) -> list[str]:
    """The lines of a file of the system, none where there is no such file."""
    try:
        return Path(file).read_text().splitlines()
    except OSError:
        return []


def usable_cpus() -> int:
    """CPUs that this process may use: those that it is bound to, and no more than its control group has time for."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = map(int, CPU_QUOTA.read_text().split())
    except (OSError, ValueError):  # there is no such group, or its quota is "max"
        return bound
    return min(bound, math.ceil(quota / period))


def shared_memory_bytes() -> float:
    """What is free of the memory that processes can share; infinite where the system has no limit for it."""
    if sys.platform != "linux":
        return math.inf
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return 0


def versions() -> dict[str, str]:
    """What a number depends on besides the code."""
    import numpy as np
    import timm
    import torchvision

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
    }
