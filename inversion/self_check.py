"""What is fast is held against plain code once, where it first runs: no wrong kernel shall go unnoticed."""

from __future__ import annotations

import copy
import weakref

import torch
from torch import Tensor, nn

from inversion.canvas import Jitter, PatchCanvas
from inversion.total_variation import total_variation
from models import LoadedModel, SparseViT

IMAGES = 2
"""Of the first batch."""
SLACK = 4.0
"""Errors of the fast paths, in those of plain code in the same number format."""
FLOOR = 1e-2
"""Relative error that is nobody's fault."""

_found: weakref.WeakKeyDictionary[nn.Module, dict[tuple, bool]] = weakref.WeakKeyDictionary()


def verdict(model: LoadedModel, device: torch.device, dtype: torch.dtype) -> bool | None:
    """What `fast_paths_agree` has found for this model in this process, None before it was asked."""
    return _found.get(model.vit, {}).get((device, dtype))


def fast_paths_agree(model: LoadedModel, fast: SparseViT, canvas: PatchCanvas, draws: tuple[Jitter, Jitter]) -> bool:
    """Whether the forward pass, the gradient to the pixels and the total variation are those of plain code.

    Plain code runs in float32 and in the number format of `fast`; how far the two are apart is what precision allows.

    Args:
        model: what `fast` was made from.
        fast: as the engine runs it.
        canvas: of the first batch; left alone.
        draws: the first jitter, as the engine feeds it, and in numbers.
    """
    device, dtype = canvas.pixels.device, fast.patch_proj.weight.dtype
    few, positions = canvas.pixels.detach()[:IMAGES], canvas.positions[:IMAGES]
    found = _outcome(fast, PatchCanvas(canvas.grid, few, positions), draws[0])
    exact, expected = (
        _outcome(
            copy.deepcopy(SparseViT(model.vit)).to(device, kind).requires_grad_(False).plainly(),
            PatchCanvas(canvas.grid, few, positions, plain=True),
            draws[1],
        )
        for kind in (torch.float32, dtype)
    )
    agree = all(_near(*values) for values in zip(found, expected, exact, strict=True))
    _found.setdefault(model.vit, {})[device, dtype] = agree
    return agree


def _outcome(vit: SparseViT, canvas: PatchCanvas, jitter: Jitter) -> list[Tensor]:
    """What attention puts out, logits, both total variations, and gradients to the pixels of these."""
    dtype, positions = vit.patch_proj.weight.dtype, canvas.jittered_positions(jitter)
    found = []
    for wanted in (False, True):
        output = vit(canvas.windows(jitter, dtype), positions, mirrored=jitter.flip, return_attended=wanted)
        found += [output.logits, *output.attended]
    parts = output.logits[:, 0].sum(), *(total_variation(canvas, order) for order in (1, 2))
    return [x.detach().float() for x in (*found, *parts[1:], *(_gradient(part, canvas) for part in parts))]


def _gradient(value: Tensor, canvas: PatchCanvas) -> Tensor:
    return torch.autograd.grad(value, canvas.pixels)[0]


def _near(found: Tensor, expected: Tensor, exact: Tensor) -> bool:
    """Whether an error is about as large as another one, or small. A model that is not finite is no kernel's fault."""
    allowed = SLACK * (expected - exact).norm() + FLOOR * exact.norm()
    return not bool(allowed.isfinite()) or bool((found - exact).norm() <= allowed)
