"""`Cait`: talking heads between patches, then blocks in which the class token alone asks.

Going deeper with Image Transformers, Touvron et al., ICCV 2021.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Any

import torch
from timm.models.cait import Cait, ClassAttn, LayerScaleBlock, LayerScaleBlockClassAttn, TalkingHeadAttn
from torch import Tensor, nn

from models.blocks import BlockOutput, SparseBlock
from models.families.base import Parts, block_parts, layer_scale, one_token
from models.head import Head

tokens_per_side = one_token
MODELS = (Cait,)


def refusal(vit: Cait) -> str | None:
    for block in vit.blocks:
        if type(block) is not LayerScaleBlock or type(block.attn) is not TalkingHeadAttn:
            return f"its blocks are {type(block).__name__} of {type(block.attn).__name__}, which is not known"
    if not vit.blocks_token_only:
        return "it has no class-attention blocks"
    for block in vit.blocks_token_only:
        if type(block) is not LayerScaleBlockClassAttn or type(block.attn) is not ClassAttn:
            kinds = f"{type(block).__name__} of {type(block.attn).__name__}"
            return f"its class-attention blocks are {kinds}, which is not known"
    return None


def parts(vit: Cait) -> Parts:
    blocks = [TalkingHeadsBlock(block.attn.proj_l, block.attn.proj_w, **block_parts(block)) for block in vit.blocks]
    for number, block in enumerate(vit.blocks_token_only):
        blocks.append(ClassAttentionBlock(block, None if number else vit.cls_token))
    return Parts(
        blocks=blocks,
        norm=vit.norm,
        head=Head(vit.head, vit.global_pool, prefix_tokens=1, class_token=True),
        pos_embed=vit.pos_embed,
        prefix_has_positions=False,
    )


class TalkingHeadsBlock(SparseBlock):
    """A block whose heads are mixed before the softmax, and its outputs after it (Shazeer et al., Talking-Heads, 2020).

    `tap_scores` and `tap_probs` are on what is mixed: what the softmax reads, and what multiplies the values, which may
    be negative.

    Args:
        before: heads -> heads, of the scores.
        after: the same of the softmax's output.
        parts: as of `SparseBlock`.
    """

    signed_probs = True

    def __init__(self, before: nn.Linear, after: nn.Linear, **parts: Any) -> None:
        super().__init__(**parts)
        self.between_heads = nn.ModuleDict(OrderedDict(before=before, after=after))

    def flops(self, tokens: int, queries: int) -> tuple[int, int]:
        """As `SparseBlock.flops`; what mixes the heads are layers, which have fixed weights."""
        layers, attention = super().flops(tokens, queries)
        return layers + 4 * queries * tokens * self.heads**2, attention

    def saved(self, tokens: int, pairs: bool) -> int:
        """As `SparseBlock.saved`; what is mixed is kept on every device."""
        return super().saved(tokens, False) + 2 * self.heads * tokens**2

    def write(self, graph: Any, stream: Any, queries: int | None, where: Any) -> Any:
        """As `quant.onnx_graph.Graph` asks for."""
        return graph.in_turn(self, stream, queries, where)

    def write_probs(self, graph: Any, scores: str) -> str:
        """As `SparseBlock.write_probs`."""
        before, after = (self.between_heads[when] for when in ("before", "after"))
        scores = graph.quantized(graph.mixed_heads(scores, before.weight, before.bias), self.tap_scores)
        probs = graph.op("Softmax", scores, axis=-1)
        return graph.quantized(graph.mixed_heads(probs, after.weight, after.bias), self.tap_probs)

    def _probs(self, q: Tensor, k: Tensor, where: Tensor | None) -> Tensor:
        scores = self.tap_scores(self._mixed((q * self.scale) @ k.transpose(-2, -1), "before"))
        return self.tap_probs(self._mixed(scores.softmax(dim=-1), "after"))

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, where: Tensor | None) -> Tensor:
        return (self._probs(q, k, where) @ v).transpose(1, 2).flatten(2)

    def _mixed(self, x: Tensor, when: str) -> Tensor:
        """(B, heads, Q, T) -> the same, each head a mix of all."""
        layer = self.between_heads[when]
        weight = layer.weight.expand(len(x), -1, -1)
        return torch.baddbmm(layer.bias[:, None], weight, x.flatten(2)).view_as(x)

    def _folds(self) -> bool:
        return False


class ClassAttentionBlock(SparseBlock):
    """Class attention (section 3.2 of the paper): the class token asks, and alone is changed; patches pass through.

    Tokens (B, 1 + n, D) have the class token first; so have those that it gives. `flops`, `largest` and `saved` count
    the tokens that the first block of the model is fed, which are the patches.

    Args:
        block: timm's.
        cls_token: (1, 1, D), of the first of these blocks, which is fed patches (B, n, D) and puts it in front.
    """

    sources = ("q", "k", "v")

    def __init__(self, block: LayerScaleBlockClassAttn, cls_token: Tensor | None) -> None:
        attn = block.attn
        super().__init__(
            heads=attn.num_heads,
            scale=attn.scale,
            qkv=None,
            proj=attn.proj,
            mlp=block.mlp,
            norm1=block.norm1,
            norm2=block.norm2,
            ls1=layer_scale(block, 1),
            ls2=layer_scale(block, 2),
        )
        self.q, self.k, self.v, self.cls_token = attn.q, attn.k, attn.v, cls_token

    def forward(
        self, x: Tensor, queries: int | None = None, return_inside: bool = False, where: Tensor | None = None
    ) -> BlockOutput:
        """As `SparseBlock.forward`; `inside` is never there, as patches put nothing out."""
        x = self._joined(x)
        tokens = super().forward(x, 1, False, where).tokens
        return BlockOutput(tokens if queries == 1 else torch.cat([tokens, x[:, 1:queries]], dim=1))

    def attention_weights(self, x: Tensor, queries: int | None = None, where: Tensor | None = None) -> Tensor:
        """As `SparseBlock.attention_weights`; a patch, which stays as it is, gives itself everything."""
        x = self._joined(x)
        row = super().attention_weights(x, 1, where)
        others = torch.eye(x.shape[1], dtype=row.dtype, device=row.device)[1:queries]
        return torch.cat([row, others.expand(len(x), -1, -1)], dim=1)

    def write(self, graph: Any, stream: Any, queries: int | None, where: Any) -> Any:
        """As `quant.onnx_graph.Graph` asks for; all tokens, unless the class token alone is wanted."""
        tokens, width = stream.tokens, stream.width
        x = graph.quantized(graph.reshape(stream.rows, -1, tokens, width), stream.tap)
        if self.cls_token is not None:
            x, tokens = graph.in_front(self.cls_token, x), tokens + 1
        rows = graph.reshape(x, -1, width)
        joined = replace(stream, rows=rows, tap=nn.Identity(), tokens=tokens)
        out = graph.attended(self, graph.norm(rows, self.norm1), joined, 1, where)
        first = graph.behind_attention(self, graph.first(rows, 1, tokens, width), out)
        if queries == 1:
            return replace(joined, rows=first, tap=self.tap_mlp_sum, tokens=1)
        first = graph.quantized(graph.reshape(first, -1, 1, width), self.tap_mlp_sum)
        x = graph.op("Concat", first, graph.sliced(x, 1, tokens), axis=1)
        return replace(joined, rows=graph.reshape(x, -1, width))

    def flops(self, tokens: int, queries: int) -> tuple[int, int]:
        """As `SparseBlock.flops`; of all tokens the first is computed."""
        if self._folds():
            return super().flops(tokens + 1, 1)
        layers, attention = super().flops(tokens + 1, 1)
        return layers - 2 * tokens * self.q.weight.numel(), attention

    def largest(self, tokens: int) -> int:
        """As `SparseBlock.largest`: normalized tokens, or what one token reads or computes."""
        return max((tokens + 1) * max(self.heads, self.proj.out_features), self.hidden)

    def saved(self, tokens: int, pairs: bool) -> int:
        """As `SparseBlock.saved`: tokens, their norm's input, and the scores of one; the rest is of one token."""
        return (tokens + 1) * (2 * self.proj.out_features + 2 * self.heads) + super().saved(1, False)

    def _folds(self) -> bool:
        """Not where the keys' bias learns, to which folding gives no gradient at all."""
        bias = getattr(self.k, "bias", None)
        return super()._folds() and (bias is None or not bias.requires_grad)

    def _joined(self, x: Tensor) -> Tensor:
        """Tokens with the class token in front."""
        return x if self.cls_token is None else torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)

    def _qkv(self, y: Tensor, queries: int | None, where: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.q(y[:, :queries]), self.k(y), self.v(y)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        return self.tap_q(q), self.tap_k(k), self.tap_v(v)
