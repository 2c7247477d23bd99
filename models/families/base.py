"""What a family of architectures says of a timm model: the parts that `SparseViT` runs it by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from timm.layers import LayerScale
from torch import Tensor, nn

from models.blocks import joined_linear
from models.head import Head
from models.positions import Places


@dataclass(frozen=True)
class Parts:
    """A model's parts; modules and parameters are timm's own, or learn as they do.

    `blocks`: as `SparseBlock`, first to last. `norm`: what the last block's tokens are normalized by. `cls_token`,
    `other_tokens` (1, P, D): the prefix tokens, in this order. `pos_embed` (1, N or P + N, D), with those of prefix
    tokens first if `prefix_has_positions`. `norm_pre`: in front of the blocks. `places`: what blocks read of positions.
    """

    blocks: Sequence[nn.Module]
    norm: nn.Module
    head: Head
    cls_token: Tensor | None = None
    other_tokens: Tensor | None = None
    pos_embed: Tensor | None = None
    prefix_has_positions: bool = True
    norm_pre: nn.Module = field(default_factory=nn.Identity)
    places: Places = field(default_factory=Places)


class Family(Protocol):
    """Architectures that differ in options alone. A module of `models.families` is one."""

    MODELS: tuple[type[nn.Module], ...]
    """timm's classes, not their subclasses."""

    @staticmethod
    def refusal(vit: nn.Module) -> str | None:
        """What of `vit` cannot be honoured, in words that go on "the model cannot be run on kept patches: "."""

    @staticmethod
    def tokens_per_side(vit: nn.Module) -> int:
        """How many tokens high and wide a patch of the grid is, which stops as a whole."""

    @staticmethod
    def parts(vit: nn.Module) -> Parts:
        """The parts of a model that is not refused."""


def one_token(vit: nn.Module) -> int:
    """`Family.tokens_per_side` where a patch is a token."""
    return 1


def block_parts(block: nn.Module, post_norm: bool = False) -> dict[str, Any]:
    """What `SparseBlock` takes of a timm block with `attn` and `mlp`, by timm's names."""
    attn, in_front = block.attn, not post_norm
    return {
        "heads": attn.num_heads,
        "scale": getattr(attn, "scale", 1.0),  # cosines have none
        "qkv": joined_qkv(attn),
        "proj": attn.proj,
        "mlp": block.mlp,
        "norm1": block.norm1 if in_front else None,
        "norm2": block.norm2 if in_front else None,
        "ls1": layer_scale(block, 1) if in_front else block.norm1,
        "ls2": layer_scale(block, 2) if in_front else block.norm2,
        "q_norm": getattr(attn, "q_norm", None),
        "k_norm": getattr(attn, "k_norm", None),
        "attn_norm": getattr(attn, "norm", None),
        "gate": getattr(attn, "gate", None),  # late versions of timm have it
    }


def layer_scale(block: nn.Module, number: int) -> nn.Module | None:
    """A block's LayerScale: its module, or one of the parameter that timm's older blocks have."""
    if hasattr(block, f"ls{number}"):
        return getattr(block, f"ls{number}")
    gamma = getattr(block, f"gamma_{number}", None)
    if gamma is None:
        return None
    scale = LayerScale(len(gamma), device="meta")
    scale.gamma = gamma
    return scale


def joined_qkv(attn: nn.Module) -> nn.Linear:
    """Queries, keys and values as one layer, however an attention has them: together, apart, or with biases apart."""
    if getattr(attn, "qkv", None) is None:
        apart = ("q_proj", "k_proj", "v_proj") if hasattr(attn, "q_proj") else ("q", "k", "v")
        return joined_linear([getattr(attn, name) for name in apart])
    if getattr(attn, "q_bias", None) is None:
        return attn.qkv
    return joined_linear([attn.qkv], [attn.q_bias, None, attn.v_bias])
