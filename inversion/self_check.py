"""What is fast is held against plain code once, where it first runs: no wrong kernel shall go unnoticed."""

from __future__ import annotations

import copy
import weakref

import torch
from torch import Tensor, nn

from inversion.canvas import PatchCanvas
from inversion.total_variation import total_variation
from inversion.views import Draw, Views
from models import LoadedModel, SparseViT, near
from models.blocks import Inside

IMAGES = 2
"""Of the first batch."""

_found: weakref.WeakKeyDictionary[nn.Module, dict[tuple, bool]] = weakref.WeakKeyDictionary()


def verdict(model: LoadedModel, device: torch.device, dtype: torch.dtype, views: tuple[str, ...]) -> bool | None:
    """What `fast_paths_agree` has found for this model in this process, None before it was asked."""
    return _found.get(model.vit, {}).get((device, dtype, views))


def fast_paths_agree(
    model: LoadedModel, fast: SparseViT, canvas: PatchCanvas, views: tuple[str, ...], draws: tuple[Draw, Draw]
) -> bool:
    """Whether the forward pass, the gradient to the pixels and the total variation are those of plain code.

    Plain code runs in float32 and in the number format of `fast`; how far the two are apart is what precision allows.

    Args:
        model: what `fast` was made from.
        fast: as the engine runs it.
        canvas: of the first batch; left alone.
        views: how the engine looks at it.
        draws: the first of them, as the engine feeds it, and on the host.
    """
    device, dtype, grid = canvas.pixels.device, fast.patch_proj.weight.dtype, canvas.grid
    few, positions = canvas.pixels.detach()[:IMAGES], canvas.positions[:IMAGES]
    fed, drawn = (Draw(draw.jitter, draw.numbers[:IMAGES].to(device)) for draw in draws)
    found = _outcome(fast, PatchCanvas(grid, few, positions), Views(views, grid, device), fed)
    exact, expected = (
        _outcome(
            copy.deepcopy(SparseViT(model.vit)).to(device, kind).requires_grad_(False).plainly(),
            PatchCanvas(grid, few, positions, plain=True),
            Views(views, grid, device, plain=True),
            drawn,
        )
        for kind in (torch.float32, dtype)
    )
    agree = all(near(*values) for values in zip(found, expected, exact, strict=True))
    _found.setdefault(model.vit, {})[device, dtype, views] = agree
    return agree


def _outcome(vit: SparseViT, canvas: PatchCanvas, views: Views, draw: Draw) -> list[Tensor]:
    """Logits, what attention computes, both total variations, and gradients to the pixels of these."""
    found, parts = [], []
    for wanted in (False, True):
        output = vit(*views.look(canvas, draw, vit.patch_proj.weight.dtype), return_inside=wanted)
        on_the_way = [x for inside in output.inside for x in _that_count(inside)]
        found += [output.logits, *on_the_way]
        parts.append(output.logits[:, 0].sum() + sum(x.float().square().mean() for x in on_the_way))
    variations = [total_variation(canvas, order) for order in (1, 2)]
    gradients = [_gradient(part, canvas) for part in (*parts, *variations)]
    return [x.detach().float() for x in (*found, *variations, *gradients)]


def _that_count(inside: Inside) -> list[Tensor]:
    """What attention puts out, queries but for their scale, and keys; zeros where there is no token."""
    found = inside.attended, inside.queries, inside.keys
    if inside.present is not None:
        found = (inside.present.view(len(x), *(1,) * (x.ndim - 3), -1, 1) * x for x in found)
    attended, queries, keys = found
    return [attended, queries / queries.norm(), keys]


def _gradient(value: Tensor, canvas: PatchCanvas) -> Tensor:
    return torch.autograd.grad(value, canvas.pixels)[0]
