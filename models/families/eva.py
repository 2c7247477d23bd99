"""`Eva`: EVA, EVA-02, DINOv3, the Perception Encoder and ViTs with rotary embeddings."""

from __future__ import annotations

from timm.layers import AttentionRope, RotaryEmbedding
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import nn

from models.blocks import SparseBlock
from models.families.base import Parts, block_parts, one_token
from models.head import Head
from models.positions import Places, RotaryPlaces, Turned

tokens_per_side = one_token
MODELS = (Eva,)


def refusal(vit: Eva) -> str | None:
    for block in vit.blocks:
        if type(block) not in (EvaBlock, EvaBlockPostNorm):
            return f"its blocks are {type(block).__name__}, which is not known"
        if type(block.attn) not in (EvaAttention, AttentionRope):
            return f"its attention is {type(block.attn).__name__}, which is not known"
        if getattr(block.attn, "num_kv_groups", 1) > 1:
            return "several heads share their keys and values (grouped-query attention)"
    if type(vit.rope) is RotaryEmbedding:
        return "its rotary embeddings (rope_type='base') are not what timm's own attention takes"
    return None


def parts(vit: Eva) -> Parts:
    mixed, prefix = getattr(vit, "rope_mixed", False), vit.num_prefix_tokens

    def position(index: int, block: nn.Module) -> Turned | None:
        if vit.rope is None:
            return None
        return Turned(prefix, getattr(block.attn, "rotate_half", False), index if mixed else None)

    return Parts(
        blocks=[
            SparseBlock(**block_parts(block, type(block) is EvaBlockPostNorm), position=position(index, block))
            for index, block in enumerate(vit.blocks)
        ],
        norm=vit.norm,
        head=Head(
            vit.head,
            vit.global_pool,
            prefix,
            vit.cls_token is not None,
            vit.fc_norm,
            vit.attn_pool,
            include_prefix=vit.attn_pool is not None,
        ),
        cls_token=vit.cls_token,
        other_tokens=vit.reg_token,
        pos_embed=vit.pos_embed,
        prefix_has_positions=not vit.no_embed_class,
        norm_pre=vit.norm_pre,
        places=Places() if vit.rope is None else RotaryPlaces(vit.rope, vit.patch_embed.grid_size, mixed),
    )
