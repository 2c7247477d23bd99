"""Rotation of what is quantized per tensor: exact, offline, without anything new in the architecture.

Channels of the residual stream, and of queries, keys and values, differ by orders of magnitude. A random orthogonal
matrix makes them all alike, so that one scale for a tensor does what one for each channel would (QuaRot, Ashkboos et
al., NeurIPS 2024). LN(Q x) = Q LN(x) for an orthogonal Q that leaves the vector of ones where it is, so that layer
norms stay layer norms once scale and offset are in the layers that read them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from timm.layers import LayerScale
from torch import Tensor, nn

from models import SparseViT
from models.blocks import SparseBlock
from quant.reparameterization import NORMS, block_sites

LINEAR_POOLING = ("token", "avg")


@dataclass(frozen=True)
class Rotations:
    """What of a model is rotated: None, or why it is not.

    `stream`: the residual stream. `scores`: queries and keys, each head by a matrix of its own. `values`: what a head
    puts out, with the projection that reads it.
    """

    stream: str | None
    scores: str | None
    values: str | None

    def refused(self) -> list[str]:
        """A line for each part that is left as it is."""
        called = {"stream": "the residual stream", "scores": "queries and keys", "values": "values"}
        found = {key: getattr(self, key) for key in called}
        return [f"{called[key]}: {why}" for key, why in found.items() if why]

    def __bool__(self) -> bool:
        return None in (self.stream, self.scores, self.values)


def rotations(vit: SparseViT) -> Rotations:
    """What of `vit` can be rotated."""
    return Rotations(_stream(vit), _between_scores(vit), _between_values(vit))


def _stream(vit: SparseViT) -> str | None:
    """What stands between the residual stream and the layers that write or read it."""
    if len({vit.patch_proj.out_features, *(block.proj.out_features for block in _attentions(vit))}) > 1:
        return "its width is not the same in all blocks"
    for name in ("patch_norm", "norm_pre"):
        if not isinstance(getattr(vit, name), nn.Identity):
            return f"{name} scales the channels of the embedding"
    for name, norm in _norms(vit):
        if not isinstance(norm, (*NORMS, nn.Identity)):
            return f"{name} is a {type(norm).__name__}"
    for block in _attentions(vit):
        for scale in (block.ls1, block.ls2):
            if not isinstance(scale, LayerScale | nn.Identity):
                return f"a {type(scale).__name__} scales the channels that a block adds to it"
        if not all(norm in block.readers for norm in block.norms):
            return "a block reads it without a norm"
        if not isinstance(getattr(block.mlp, "fc2", None), nn.Linear):
            return f"the MLP is a {type(block.mlp).__name__}"
    pool, norms = vit.head.attn_pool, (vit.norm, vit.head.fc_norm)
    if pool is None and vit.head.head_dist is None and not any(isinstance(n, nn.Identity) for n in norms):
        return "it is normalized twice before the classifier"
    if pool is None and vit.head.head_dist is None and vit.head.pool_type not in LINEAR_POOLING:
        return f"{vit.head.pool_type} pooling is done channel by channel"
    if pool is not None and not (isinstance(getattr(pool, "kv", None), nn.Linear) and pool.pos_embed is None):
        return "the attention pool adds position embeddings"
    return None


def _between_scores(vit: SparseViT) -> str | None:
    if any(block.position.turns for block in _attentions(vit)):
        return "they are turned by where their tokens are"
    norms = [norm for block in _attentions(vit) for norm in (block.q_norm, block.k_norm)]
    return None if all(isinstance(norm, nn.Identity) for norm in norms) else "they are normalized"


def _between_values(vit: SparseViT) -> str | None:
    if any(block.gate is not None for block in _attentions(vit)):
        return "a gate multiplies them channel by channel"
    plain = all(isinstance(block.attn_norm, nn.Identity) for block in _attentions(vit))
    return None if plain else "they are normalized before the projection"


def _attentions(vit: SparseViT) -> list[SparseBlock]:
    """Everything that has an attention and an MLP: the blocks, or the branches of a block that has several."""
    return [module for module in vit.blocks.modules() if isinstance(module, SparseBlock)]


def _norms(vit: SparseViT) -> Iterator[tuple[str, nn.Module]]:
    """Every norm that reads the residual stream, by name."""
    for name in (*(site.norm for site in block_sites(vit)), "norm", "head.fc_norm"):
        yield name, vit.get_submodule(name)


@torch.no_grad()
def rotated(vit: SparseViT, seed: int = 0) -> SparseViT:
    """A copy of `vit` that computes the same, rotated where `rotations(vit)` says that it can be.

    LayerScale and the scale and offset of norms go into the layers beside them; a norm keeps a scale of ones and an
    offset of zeros, so that it can be reparameterized.

    Args:
        vit: a full-precision model; left as it is.
        seed: of the matrices.
    """
    vit, parts = copy.deepcopy(vit).requires_grad_(False), rotations(vit)
    generator = torch.Generator().manual_seed(seed)
    if parts.stream is None:
        _rotate_stream(vit, orthogonal(vit.patch_proj.out_features, generator, fixed=True).to(vit.device))
    for block in _attentions(vit):
        for part, heads, apply in (
            ("scores", block.score_heads, _rotate_scores),
            ("values", block.heads, _rotate_values),
        ):
            width = block.proj.in_features // heads
            matrices = torch.stack([orthogonal(width, generator) for _ in range(heads)]).to(vit.device)
            if getattr(parts, part) is None:
                apply(block, matrices)
    return vit


def without_scales(vit: SparseViT) -> SparseViT:
    """Itself, without the LayerScales that rotation puts into the layers in front of them."""
    if rotations(vit).stream is None:
        for block in _attentions(vit):
            block.ls1, block.ls2 = nn.Identity(), nn.Identity()
    return vit


def orthogonal(size: int, generator: torch.Generator, fixed: bool = False) -> Tensor:
    """A random orthogonal matrix (size, size), float64; `fixed`: one that leaves the vector of ones where it is."""

    matrix = torch.eye(size, dtype=torch.float64)
    if not fixed:
        return nn.init.orthogonal_(matrix, generator=generator)
    basis = matrix.clone()
    basis[:, 0] = 1
    basis = torch.linalg.qr(basis).Q  # its first vector is that of ones
    nn.init.orthogonal_(matrix[1:, 1:], generator=generator)
    return basis @ matrix @ basis.T


def _rotate_stream(vit: SparseViT, matrix: Tensor) -> None:
    for site in block_sites(vit):
        _fold_norm(vit.get_submodule(site.norm), [vit.get_submodule(name) for name in site.readers], matrix)
    head = vit.head
    classifiers = [head.attn_pool.kv] if head.attn_pool is not None else [head.head, head.head_dist]
    classifiers = [layer for layer in classifiers if layer is not None]
    fc_norm = head.fc_norm if head.attn_pool is None and head.head_dist is None else nn.Identity()
    _fold_norm(vit.norm if isinstance(fc_norm, nn.Identity) else fc_norm, classifiers, matrix)
    for block in vit.blocks:
        for name, (_, scale) in block.writers.items():
            layer, gamma = block.get_submodule(name), getattr(block.get_submodule(scale), "gamma", None)
            _write(layer, matrix if gamma is None else matrix * gamma.double())
    without_scales(vit)
    _write(vit.patch_proj, matrix)
    tokens = [(vit, name) for name in ("cls_token", "other_tokens", "pos_embed")]
    # A block may put a token in front of what it reads.
    for owner, name in (*tokens, *((block, "cls_token") for block in vit.blocks)):
        token = getattr(owner, name, None)
        if token is not None:
            setattr(owner, name, nn.Parameter((token.double() @ matrix.T).to(token.dtype), requires_grad=False))


def _fold_norm(norm: nn.Module, layers: list[nn.Linear], matrix: Tensor) -> None:
    """Scale and offset of a norm into the layers that read it, which then read a rotated stream."""
    scale, offset = getattr(norm, "weight", None), getattr(norm, "bias", None)
    for layer in layers:
        weight = layer.weight.double()
        if offset is not None:
            moved = weight @ offset.double()
            _set(layer, bias=moved if layer.bias is None else layer.bias.double() + moved)
        _set(layer, weight=(weight if scale is None else weight * scale.double()) @ matrix.T)
    for value, neutral in ((scale, 1.0), (offset, 0.0)):
        if value is not None:
            value.data = torch.full_like(value, neutral)


def _write(layer: nn.Linear, matrix: Tensor) -> None:
    """What a layer puts out, times `matrix` (out, out)."""
    _set(layer, weight=matrix @ layer.weight.double())
    if layer.bias is not None:
        _set(layer, bias=matrix @ layer.bias.double())


def _rotate_scores(block: SparseBlock, matrices: Tensor) -> None:
    for part in (0, 1):
        _rotate_part(block, part, matrices)


def _rotate_values(block: SparseBlock, matrices: Tensor) -> None:
    _rotate_part(block, 2, matrices)
    weight = block.proj.weight.double().unflatten(1, (block.heads, -1))
    _set(block.proj, weight=torch.einsum("ohw,hvw->ohv", weight, matrices).flatten(1))


def _rotate_part(block: SparseBlock, part: int, matrices: Tensor) -> None:
    """Queries (0), keys (1) or values (2), each head times its matrix (heads, head_dim, head_dim)."""
    layer, rows = block.projection(part)
    for name in ("weight", "bias"):
        value = getattr(layer, name)
        if value is not None:
            value = value.double().clone()
            of_heads = value[rows].unflatten(0, (len(matrices), -1))
            value[rows] = torch.einsum("hvw,hw...->hv...", matrices, of_heads).flatten(0, 1)
            _set(layer, **{name: value})


def _set(layer: nn.Linear, **values: Tensor) -> None:
    """Give a layer its weight or bias, in its number format; a copy, as layers may share theirs."""
    for name, value in values.items():
        setattr(layer, name, nn.Parameter(value.to(layer.weight.dtype), requires_grad=False))
