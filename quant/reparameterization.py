"""Scale reparameterization (RepQ-ViT, Li et al., ICCV 2023): ranges per channel at the price of one per tensor.

The channels that a layer norm puts out differ by orders of magnitude. They are calibrated one by one, and what differs
is then moved into the norm's affine and the weights that read it: the same function, all channels on one scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.layers import RmsNorm
from torch import Tensor, nn

from models import SparseViT
from quant.observers import EPS, codes

NORMS = (nn.LayerNorm, nn.RMSNorm, RmsNorm)
"""A scale of the channels, and perhaps an offset, are the last that these do."""


@dataclass(frozen=True)
class NormSite:
    """A norm and every layer that reads it, by name."""

    norm: str
    readers: tuple[str, ...]


def norm_sites(vit: SparseViT) -> list[NormSite]:
    """The norms whose output only linear layers read: those of every block, and the one before the classifier.

    One without a scale is none of them: nothing can be moved into it.
    """
    sites, classifiers = block_sites(vit), _named(vit, "head", "head", "head_dist")
    if not isinstance(vit.head.fc_norm, nn.Identity):
        sites.append(NormSite("head.fc_norm", classifiers))
    elif vit.head.attn_pool is None and vit.head.pool_type == "token":  # else it reads what the norm did not put out
        sites.append(NormSite("norm", classifiers))
    norms = [vit.get_submodule(site.norm) for site in sites]
    return [
        site
        for site, norm in zip(sites, norms, strict=True)
        if isinstance(norm, NORMS) and getattr(norm, "weight", None) is not None
    ]


def block_sites(vit: SparseViT) -> list[NormSite]:
    """The norms of every block that only linear layers read."""
    return [
        NormSite(f"blocks.{i}.{norm}", tuple(f"blocks.{i}.{name}" for name in readers))
        for i, block in enumerate(vit.blocks)
        for norm, readers in block.readers.items()
    ]


def reparameterize(
    vit: SparseViT, site: NormSite, low: Tensor, high: Tensor, bits: int, symmetric: bool = False
) -> tuple[Tensor, Tensor] | None:
    """Put the channels of a norm on one scale, in place; the model computes what it did (eq. 9 to 14).

    With s, z the scale and zero point of each channel and S, Z their means (Z = 0 if symmetric), r = s / S and
    d = s (z - Z), the norm gives (x + d) / r and its readers take r * weight and bias - weight d.

    A norm without an offset cannot be shifted: d = 0, and r is the largest magnitude of each channel over their mean.

    Args:
        vit: the model.
        site: which norm.
        low: lowest value to represent of each channel (D,).
        high: highest value (D,).
        bits: of the quantizer that follows.
        symmetric: whether its zero point is 0.

    Returns:
        S and Z, the quantizer's scale () and zero point (), int32; None where the tensor has to be observed anew.
    """
    norm = vit.get_submodule(site.norm)
    if getattr(norm, "bias", None) is None:
        magnitudes = torch.maximum(low.abs(), high.abs()).clamp(min=EPS)
        _rescale(vit, site, magnitudes / magnitudes.mean())
        return None
    lowest, highest = codes(bits, symmetric)
    scales = ((high - low) / (highest - lowest)).clamp(min=EPS)
    scale = scales.mean()
    zero_point = scale.new_zeros(()) if symmetric else (-low / scales).mean().round().clamp(lowest, highest)
    shift = (lowest - zero_point) * scales - low
    norm.bias.data = norm.bias + shift
    for reader in site.readers:
        layer = vit.get_submodule(reader)
        moved = layer.weight @ shift
        bias = -moved if layer.bias is None else layer.bias - moved
        layer.bias = nn.Parameter(bias, requires_grad=False)
    _rescale(vit, site, scales / scale)
    return scale, zero_point.to(torch.int32)


def _rescale(vit: SparseViT, site: NormSite, ratio: Tensor) -> None:
    """Divide what a norm puts out by `ratio` (D,), and make up for it in the layers that read it."""
    norm = vit.get_submodule(site.norm)
    norm.weight.data = norm.weight / ratio
    if getattr(norm, "bias", None) is not None:
        norm.bias.data = norm.bias / ratio
    for reader in site.readers:
        layer = vit.get_submodule(reader)
        layer.weight.data = layer.weight * ratio


def _named(vit: SparseViT, parent: str, *names: str) -> tuple[str, ...]:
    """Full names of those children that are linear layers."""
    module = vit.get_submodule(parent)
    return tuple(f"{parent}.{name}" for name in names if isinstance(getattr(module, name, None), nn.Linear))
