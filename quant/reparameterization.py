"""Scale reparameterization (RepQ-ViT, Li et al., ICCV 2023): ranges per channel at the price of one per tensor.

The channels that a layer norm puts out differ by orders of magnitude. They are calibrated one by one, and what differs
is then moved into the norm's affine and the weights that read it: the same function, all channels on one scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models import SparseViT
from quant.observers import EPS, codes
from utils.errors import UserError


@dataclass(frozen=True)
class NormSite:
    """A layer norm and every layer that reads it, by name."""

    norm: str
    readers: tuple[str, ...]


def norm_sites(vit: SparseViT) -> list[NormSite]:
    """The norms whose output only linear layers read: both of every block, and the one before the classifier.

    Raises `UserError` for a norm without scale and offset, which nothing can be moved into.
    """
    sites, classifiers = block_sites(vit), _named(vit, "head", "head", "head_dist")
    if isinstance(vit.head.fc_norm, nn.LayerNorm):
        sites.append(NormSite("head.fc_norm", classifiers))
    elif vit.head.attn_pool is None and vit.head.pool_type == "token":  # else it reads what the norm did not put out
        sites.append(NormSite("norm", classifiers))
    for site in sites:
        norm = vit.get_submodule(site.norm)
        if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
            raise UserError(f"--observer repq: {site.norm} is no layer norm with scale and offset; take --observer mse")
    return sites


def block_sites(vit: SparseViT) -> list[NormSite]:
    """The norms of every block that only linear layers read."""
    return [
        NormSite(f"blocks.{i}.{norm}", tuple(f"blocks.{i}.{name}" for name in readers))
        for i, block in enumerate(vit.blocks)
        for norm, readers in block.readers.items()
    ]


def reparameterize(
    vit: SparseViT, site: NormSite, low: Tensor, high: Tensor, bits: int, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """Put the channels of a norm on one scale, in place; the model computes what it did (eq. 9 to 14).

    With s, z the scale and zero point of each channel and S, Z their means (Z = 0 if symmetric), r = s / S and
    d = s (z - Z), the norm gives (x + d) / r and its readers take r * weight and bias - weight d.

    Args:
        vit: the model.
        site: which norm.
        low: lowest value to represent of each channel (D,).
        high: highest value (D,).
        bits: of the quantizer that follows.
        symmetric: whether its zero point is 0.

    Returns:
        S and Z, the quantizer's scale () and zero point (), int32.
    """
    lowest, highest = codes(bits, symmetric)
    scales = ((high - low) / (highest - lowest)).clamp(min=EPS)
    scale = scales.mean()
    zero_point = scale.new_zeros(()) if symmetric else (-low / scales).mean().round().clamp(lowest, highest)
    ratio, shift = scales / scale, (lowest - zero_point) * scales - low
    norm = vit.get_submodule(site.norm)
    norm.weight.data, norm.bias.data = norm.weight / ratio, (norm.bias + shift) / ratio
    for reader in site.readers:
        layer = vit.get_submodule(reader)
        moved = layer.weight @ shift
        bias = -moved if layer.bias is None else layer.bias - moved
        layer.bias = nn.Parameter(bias, requires_grad=False)
        layer.weight.data = layer.weight * ratio
    return scale, zero_point.to(torch.int32)


def _named(vit: SparseViT, parent: str, *names: str) -> tuple[str, ...]:
    """Full names of those children that are linear layers."""
    module = vit.get_submodule(parent)
    return tuple(f"{parent}.{name}" for name in names if isinstance(getattr(module, name, None), nn.Linear))
