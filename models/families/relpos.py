"""`VisionTransformerRelPos`: ViTs with a bias for every distance, from a table or a small network, in place of position
embeddings."""

from __future__ import annotations

from timm.models.vision_transformer_relpos import (
    RelPosAttention,
    RelPosBlock,
    ResPostRelPosBlock,
    VisionTransformerRelPos,
)
from torch import Tensor, nn

from models.blocks import SparseBlock
from models.families.base import Parts, block_parts, one_token
from models.head import Head
from models.positions import PairPlaces, RelativeBias

tokens_per_side = one_token
MODELS = (VisionTransformerRelPos,)


def refusal(vit: VisionTransformerRelPos) -> str | None:
    for block in vit.blocks:
        if type(block) not in (RelPosBlock, ResPostRelPosBlock) or type(block.attn) is not RelPosAttention:
            return f"its blocks are {type(block).__name__} of {type(block.attn).__name__}, which is not known"
        if block.attn.rel_pos is not None and vit.shared_rel_pos is not None:
            return "it has relative positions of blocks and shared ones at once"
    return None


def parts(vit: VisionTransformerRelPos) -> Parts:
    blocks = []
    for block in vit.blocks:
        module = vit.shared_rel_pos if vit.shared_rel_pos is not None else block.attn.rel_pos
        position = None if module is None else RelativeBias(_Table(module))
        post_norm = type(block) is ResPostRelPosBlock
        blocks.append(SparseBlock(**block_parts(block, post_norm), position=position))
    return Parts(
        blocks=blocks,
        norm=vit.norm,
        head=Head(vit.head, vit.global_pool, vit.num_prefix_tokens, vit.cls_token is not None, vit.fc_norm),
        cls_token=vit.cls_token,
        places=PairPlaces(vit.num_prefix_tokens, vit.patch_embed.num_patches),
    )


class _Table(nn.Module):
    """The biases of all pairs (heads, T, T) of timm's module, which makes them of a table or by a small network."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self) -> Tensor:
        return self.module.get_bias()[0]
