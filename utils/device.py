"""Device, dtype and seeds."""

from __future__ import annotations

import ctypes
import os
import platform
import random
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision

from utils.errors import UserError

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
        fast = torch.cpu.get_capabilities()
        return "bfloat16" if fast.get("avx512_bf16") or fast.get("amx_bf16") else "float32"
    return "float32"


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
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def device_name(device: torch.device) -> str:
    """The GPU's name; or the CPU's, the number of threads and what it has for bfloat16."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{device.type} ({platform.machine()})"
    fast = torch.cpu.get_capabilities()
    units = [name for name in ("avx512_bf16", "amx_bf16") if fast.get(name)]
    return f"{_cpu_name()} ({torch.get_num_threads()} threads, {' and '.join(units) or 'no bfloat16 unit'})"


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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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


def versions() -> dict[str, str]:
    """What a number depends on besides the code."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
    }
