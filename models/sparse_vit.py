"""A timm Vision Transformer that runs on kept patches alone.

The modules are timm's own; only the walk through them is ours, so that stopped patches cost nothing, the last block
computes no token that nobody reads, and the CLS attention can be had without storing every attention matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Attention, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer, global_pool_nlc
from torch import Tensor, nn

from models.attention import attention
from models.patches import PatchGrid
from utils.errors import UserError


def require_supported(vit: nn.Module, name: str = "the model") -> None:
    """Raise `UserError` unless `SparseViT` gives exactly the logits that timm's own forward gives for `vit`."""

    def refuse(why: str) -> None:
        raise UserError(f"{name} cannot be run on kept patches: {why}")

    if type(vit) not in (VisionTransformer, VisionTransformerDistilled):
        refuse(f"it is a {type(vit).__name__}, not a timm VisionTransformer")
    if vit.cls_token is None:
        refuse("it has no class token, which is what ranks the patches")
    if type(vit.patch_embed) is not PatchEmbed:
        refuse(f"its patches are embedded by a {type(vit.patch_embed).__name__}, not by one convolution")
    if not vit.global_pool:
        refuse("it has no pooling (global_pool=''), so it gives no logits per image")
    if vit.num_classes <= 0:
        refuse("it has no classifier head (num_classes=0); give weights with a head by --model_path")
    size, patch = vit.patch_embed.img_size, vit.patch_embed.patch_size
    if any(s % p for s, p in zip(size, patch, strict=True)):
        refuse(f"its image size {tuple(size)} is not a multiple of its patch size {tuple(patch)}")
    for block in vit.blocks:
        if type(block) is not Block:
            refuse(f"its blocks are {type(block).__name__}, only timm's plain Block is known")
        if type(block.attn) is not Attention:
            refuse(f"its attention is {type(block.attn).__name__}, only timm's plain Attention is known")


class SparseBlock(nn.Module):
    """One pre-norm transformer block, built from the modules of a timm `Block`.

    `tap_*` are identities on tensors that are no module's input; a caller may put its own modules there.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        attn = block.attn
        self.heads, self.scale = attn.num_heads, attn.scale
        self.norm1, self.ls1 = block.norm1, block.ls1
        self.qkv, self.q_norm, self.k_norm = attn.qkv, attn.q_norm, attn.k_norm
        self.attn_norm, self.gate, self.proj = attn.norm, attn.gate, attn.proj
        self.norm2, self.mlp, self.ls2 = block.norm2, block.mlp, block.ls2
        self.tap_q, self.tap_k, self.tap_v = nn.Identity(), nn.Identity(), nn.Identity()
        self.tap_scores = nn.Identity()
        self.tap_attn_sum, self.tap_mlp_sum = nn.Identity(), nn.Identity()

    def taps(self) -> tuple[nn.Module, ...]:
        """The taps, in the order of the forward pass."""
        return self.tap_q, self.tap_k, self.tap_v, self.tap_scores, self.tap_attn_sum, self.tap_mlp_sum

    def forward(self, x: Tensor, queries: int | None = None, return_attention: bool = False) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, D) -> tokens (B, Q, D) and, on request, the CLS row of the attention (B, T), mean over heads.

        Args:
            x: tokens.
            queries: compute only the first Q tokens of the output; all of them if None.
            return_attention: whether the CLS row is wanted; without it the second result is None.
        """
        y = self.norm1(x)
        attend = self._attention_of_few if queries is not None and self._folds() else self._attention
        out, cls_row = attend(y, queries, return_attention)
        out = self.attn_norm(out)
        if self.gate is not None:
            out = out * self.gate(y[:, :queries]).sigmoid()
        x = self.tap_attn_sum(x[:, :queries] + self.ls1(self.proj(out)))
        x = self.tap_mlp_sum(x + self.ls2(self.mlp(self.norm2(x))))
        return x, cls_row

    def flops(self, tokens: int, queries: int) -> tuple[int, int]:
        """Operations in the layers, and between tokens, of `forward` on one image."""
        inner, width = self.proj.in_features, self.proj.out_features
        mlp = sum(m.weight.numel() for m in self.mlp.modules() if isinstance(m, nn.Linear))
        gate = 0 if self.gate is None else self.gate.weight.numel()
        if queries < tokens and self._folds():
            return 2 * queries * (4 * inner * width + mlp + gate), 4 * queries * tokens * self.heads * width
        layers = tokens * self.qkv.weight.numel() + queries * (inner * width + mlp + gate)
        return 2 * layers, 4 * queries * tokens * inner

    def _attention(self, y: Tensor, queries: int | None, return_attention: bool) -> tuple[Tensor, Tensor | None]:
        """Normalized tokens (B, T, D) -> attention's output (B, Q, heads * head_dim), and the CLS row or None."""
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k, v = self.tap_q(self.q_norm(q[:, :, :queries])), self.tap_k(self.k_norm(k)), self.tap_v(v)
        if return_attention or type(self.tap_scores) is not nn.Identity:
            weights = self.tap_scores((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
            out = weights @ v
        else:
            weights, out = None, attention(q, k, v, self.scale)
        return out.transpose(1, 2).flatten(2), weights[:, :, 0].mean(dim=1) if return_attention else None

    def _folds(self) -> bool:
        """Whether keys and values are plain products, which `_attention_of_few` moves behind the sum over tokens."""
        between = (self.q_norm, self.k_norm, self.tap_q, self.tap_k, self.tap_v, self.tap_scores)
        return type(self.qkv) is nn.Linear and all(type(module) is nn.Identity for module in between)

    def _attention_of_few(self, y: Tensor, queries: int, return_attention: bool) -> tuple[Tensor, Tensor | None]:
        """As `_attention`, without a key or value of any token: q (W y) = (q W) y, and sum a (W y) = W (sum a y).

        A key's bias adds the same to every score of a query, which the softmax does not see.
        """
        q_weight, k_weight, v_weight = self.qkv.weight.unflatten(0, (3, self.heads, -1)).unbind(0)
        q_bias, v_bias = (None, None) if self.qkv.bias is None else self.qkv.bias.unflatten(0, (3, -1))[::2]
        q = F.linear(y[:, :queries], q_weight.flatten(0, 1), q_bias).unflatten(-1, (self.heads, -1))
        asked = torch.einsum("bqhd,hdw->bqhw", q * self.scale, k_weight).flatten(1, 2)
        weights = (asked @ y.transpose(1, 2)).softmax(dim=-1)
        seen = (weights @ y).unflatten(1, (queries, self.heads))
        out = torch.einsum("bqhw,hdw->bqhd", seen, v_weight).flatten(2)
        out = out if v_bias is None else out + v_bias
        return out, weights[:, : self.heads].mean(dim=1) if return_attention else None


class SparseViT(nn.Module):
    """Patches and their grid positions in, logits out; with all patches it equals timm's own forward.

    It is an inference-time model (no dropout, no stochastic depth). The modules are shared with `vit`, not copied.
    Raises `UserError` for an architecture that it cannot honour (see `require_supported`).
    """

    def __init__(self, vit: VisionTransformer) -> None:
        require_supported(vit)
        super().__init__()
        embed = vit.patch_embed
        self.grid = PatchGrid(*embed.grid_size, *embed.patch_size, embed.proj.in_channels)
        self.num_classes = vit.num_classes
        self.patch_proj = nn.Linear(self.grid.pixels, vit.embed_dim, bias=embed.proj.bias is not None, device="meta")
        self.patch_proj.weight = nn.Parameter(embed.proj.weight.detach().flatten(1), embed.proj.weight.requires_grad)
        self.patch_proj.bias = embed.proj.bias
        self.patch_norm = embed.norm
        self.cls_token, self.pos_embed = vit.cls_token, vit.pos_embed
        self.other_tokens = vit.dist_token if isinstance(vit, VisionTransformerDistilled) else vit.reg_token
        self.prefix_tokens, self.prefix_has_positions = vit.num_prefix_tokens, not vit.no_embed_class
        self.norm_pre = vit.norm_pre
        self.tap_embed = nn.Identity()
        self.blocks = nn.ModuleList(SparseBlock(block) for block in vit.blocks)
        self.norm = vit.norm
        self.head = _Head(vit)
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.cls_token.device

    def forward(
        self, patches: Tensor, positions: Tensor, return_attention: bool = False, mirrored: bool | Tensor = False
    ) -> tuple[Tensor, Tensor | None]:
        """Run the model on kept patches.

        Args:
            patches: (B, n, C, height, width), normalized pixels.
            positions: (B, n), int64, the grid position of each.
            return_attention: also return what the CLS token of the last block gives each patch, mean over heads.
            mirrored: read every patch with its columns reversed (costs nothing: the weights are mirrored instead);
                a bool, or an int64 tensor () that is 0 or 1.

        Returns:
            logits (B, classes), and the attention (B, n) or None.
        """
        x = self._embed(patches, positions, mirrored)
        for block in self.blocks[:-1]:
            x, _ = block(x)
        queries = self.prefix_tokens if self.head.reads_prefix_only else None
        x, attention = self.blocks[-1](x, queries, return_attention)
        logits = self.head(self.norm(x))
        return logits, attention[:, self.prefix_tokens :] if return_attention else None

    def forward_images(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of whole images (B, C, H, W)."""
        return self(self.grid.patchify(images), self.grid.all_positions(len(images), images.device))[0]

    def forward_flops(self, patches: int) -> int:
        """Floating-point operations of the matrix products in a forward pass of one image with `patches` patches."""
        return sum(self._flops(patches))

    def step_flops(self, patches: int) -> int:
        """The same for a forward pass and the gradient to the pixels: twice the layers, three times the attention."""
        layers, attention = self._flops(patches)
        return 2 * layers + 3 * attention

    def _flops(self, patches: int) -> tuple[int, int]:
        """Operations in the layers, and between tokens, of a forward pass of one image."""
        width, tokens = self.cls_token.shape[-1], patches + self.prefix_tokens
        layers, attention = 2 * (patches * self.grid.pixels * width + width * self.num_classes), 0
        for block in self.blocks:
            few = block is self.blocks[-1] and self.head.reads_prefix_only
            in_layers, between_tokens = block.flops(tokens, self.prefix_tokens if few else tokens)
            layers, attention = layers + in_layers, attention + between_tokens
        return layers, attention

    def _embed(self, patches: Tensor, positions: Tensor, mirrored: bool | Tensor) -> Tensor:
        batch, count = positions.shape
        flat = patches.reshape(batch, count, self.grid.pixels)
        if mirrored is False:
            x = self.patch_proj(flat)
        else:
            shape = (-1, self.grid.channels, self.grid.height, self.grid.width)
            weight = self.patch_proj.weight.view(shape).flip(-1).flatten(1)
            if mirrored is not True:
                either = torch.stack([self.patch_proj.weight, weight])
                weight = either.index_select(0, mirrored.view(1)).squeeze(0)
            x = F.linear(flat, weight, self.patch_proj.bias)
        prefix, pos_embed = self._prefix_and_positions()
        x = self.patch_norm(x)
        x = x if pos_embed is None else x + pos_embed[positions]
        x = torch.cat([prefix.expand(batch, -1, -1), x], dim=1)
        return self.norm_pre(self.tap_embed(x))

    def _prefix_and_positions(self) -> tuple[Tensor, Tensor | None]:
        """Prefix tokens with their position embeddings (1, P, D), and the patches' position embeddings (N, D)."""
        prefix = torch.cat([self.cls_token] + ([] if self.other_tokens is None else [self.other_tokens]), dim=1)
        if self.pos_embed is None:
            return prefix, None
        if not self.prefix_has_positions:
            return prefix, self.pos_embed[0]
        return prefix + self.pos_embed[:, : self.prefix_tokens], self.pos_embed[0, self.prefix_tokens :]


class _Head(nn.Module):
    """Normalized tokens -> logits: timm's pooling, its norm after it, and the classifier."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.reads_prefix_only = vit.global_pool == "token" and vit.attn_pool is None
        self.pool_type, self.include_prefix = vit.global_pool, vit.pool_include_prefix
        self.prefix_tokens = vit.num_prefix_tokens
        self.attn_pool, self.fc_norm, self.head = vit.attn_pool, vit.fc_norm, vit.head
        self.head_dist = vit.head_dist if isinstance(vit, VisionTransformerDistilled) else None

    def forward(self, x: Tensor) -> Tensor:
        if self.head_dist is not None:
            return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2
        if self.attn_pool is not None:
            x = self.attn_pool(x if self.include_prefix else x[:, self.prefix_tokens :])
        else:
            x = global_pool_nlc(x, self.pool_type, self.prefix_tokens, self.include_prefix)
        return self.head(self.fc_norm(x))
