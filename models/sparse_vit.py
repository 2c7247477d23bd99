"""A timm Vision Transformer that runs on kept patches alone.

The modules are timm's own; only the walk through them is ours, so that stopped patches cost nothing, the last block
computes no token that nobody reads, and the CLS attention can be had without storing every attention matrix.
"""

from __future__ import annotations

from typing import NamedTuple

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
    if type(vit.patch_embed) is not PatchEmbed:
        refuse(f"its patches are embedded by a {type(vit.patch_embed).__name__}, not by one convolution")
    if not vit.global_pool:
        refuse("it has no pooling (global_pool=''), so it gives no logits per image")
    if vit.num_classes <= 0:
        refuse("it has no classifier head (num_classes=0); give weights with a head by --model_path")
    if vit.num_classes == 1:
        refuse("it has one class (num_classes=1), and so nothing to tell apart; give it two, such as yes and no")
    size, patch = vit.patch_embed.img_size, vit.patch_embed.patch_size
    if any(s % p for s, p in zip(size, patch, strict=True)):
        refuse(f"its image size {tuple(size)} is not a multiple of its patch size {tuple(patch)}")
    if vit.pos_embed is None and vit.num_prefix_tokens:
        tokens = vit.patch_embed.proj.weight.new_zeros(1, *vit.patch_embed.grid_size, vit.embed_dim)
        if vit._pos_embed(tokens).shape[1] != vit.patch_embed.num_patches + vit.num_prefix_tokens:
            refuse("without position embeddings this version of timm leaves the class token out; install a newer one")
    for block in vit.blocks:
        if type(block) is not Block:
            refuse(f"its blocks are {type(block).__name__}, only timm's plain Block is known")
        if type(block.attn) is not Attention:
            refuse(f"its attention is {type(block.attn).__name__}, only timm's plain Attention is known")


class BlockOutput(NamedTuple):
    """What a block gives: tokens (B, Q, D), and on request the attention's output (B, T, D) before its projection."""

    tokens: Tensor
    attended: Tensor | None = None


class ViTOutput(NamedTuple):
    """What `SparseViT` gives: logits (B, classes), what the classifier read (B, D), and what was asked for besides.

    `attended`: for each block the attention's output of every patch (B, n, D), heads side by side, not projected yet.
    """

    logits: Tensor
    features: Tensor
    attended: tuple[Tensor, ...] = ()


class SparseBlock(nn.Module):
    """One pre-norm transformer block, built from the modules of a timm `Block`.

    `tap_*` are identities on tensors that are no module's input; a caller may put its own modules there. `plain`: by
    stock kernels and autograd alone.
    """

    plain = False

    def __init__(self, block: Block) -> None:
        super().__init__()
        attn = block.attn
        self.heads, self.scale = attn.num_heads, attn.scale
        self.norm1, self.ls1 = block.norm1, block.ls1
        self.qkv, self.q_norm, self.k_norm = attn.qkv, attn.q_norm, attn.k_norm
        self.attn_norm, self.proj = attn.norm, attn.proj
        self.gate = getattr(attn, "gate", None)  # late versions of timm have it
        self.norm2, self.mlp, self.ls2 = block.norm2, block.mlp, block.ls2
        self.tap_q, self.tap_k, self.tap_v = nn.Identity(), nn.Identity(), nn.Identity()
        self.tap_scores, self.tap_probs = nn.Identity(), nn.Identity()
        self.tap_attn_sum, self.tap_mlp_sum = nn.Identity(), nn.Identity()

    @property
    def hidden(self) -> int:
        """Width of the widest layer of the MLP."""
        return max(layer.out_features for layer in self.mlp.modules() if isinstance(layer, nn.Linear))

    def taps(self) -> tuple[nn.Module, ...]:
        """The taps, in the order of the forward pass."""
        before = self.tap_q, self.tap_k, self.tap_v, self.tap_scores, self.tap_probs
        return *before, self.tap_attn_sum, self.tap_mlp_sum

    def forward(self, x: Tensor, queries: int | None = None, return_attended: bool = False) -> BlockOutput:
        """One block.

        Args:
            x: tokens (B, T, D).
            queries: compute only the first Q tokens of the output; all of them if None.
            return_attended: whether the attention's output is wanted as well.
        """
        y = self.norm1(x)
        out = (
            self._attention_of_few(y, queries) if queries is not None and self._folds() else self._attention(y, queries)
        )
        out = attended = self.attn_norm(out)
        if self.gate is not None:
            out = out * self.gate(y[:, :queries]).sigmoid()
        x = self.tap_attn_sum(x[:, :queries] + self.ls1(self.proj(out)))
        x = self.tap_mlp_sum(x + self.ls2(self.mlp(self.norm2(x))))
        return BlockOutput(x, attended if return_attended else None)

    def attention_weights(self, x: Tensor, queries: int | None = None) -> Tensor:
        """Tokens (B, T, D) -> what each of the first Q gives each token (B, Q, T), mean over heads."""
        q, k, _ = self._qkv(self.norm1(x), queries)
        return ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1).mean(dim=1)

    def flops(self, tokens: int, queries: int) -> tuple[int, int]:
        """Operations in the layers, and between tokens, of `forward` on one image."""
        inner, width = self.proj.in_features, self.proj.out_features
        mlp = sum(m.weight.numel() for m in self.mlp.modules() if isinstance(m, nn.Linear))
        gate = 0 if self.gate is None else self.gate.weight.numel()
        if queries < tokens and self._folds():
            return 2 * queries * (4 * inner * width + mlp + gate), 4 * queries * tokens * self.heads * width
        layers = tokens * self.qkv.weight.numel() + queries * (inner * width + mlp + gate)
        return 2 * layers, 4 * queries * tokens * inner

    def _qkv(self, y: Tensor, queries: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Normalized tokens (B, T, D) -> queries (B, heads, Q, head_dim), keys and values (B, heads, T, head_dim)."""
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.tap_q(self.q_norm(q[:, :, :queries])), self.tap_k(self.k_norm(k)), self.tap_v(v)

    def _attention(self, y: Tensor, queries: int | None) -> Tensor:
        """Normalized tokens (B, T, D) -> attention's output (B, Q, heads * head_dim)."""
        q, k, v = self._qkv(y, queries)
        if type(self.tap_scores) is type(self.tap_probs) is nn.Identity:
            run = F.scaled_dot_product_attention if self.plain else attention
            out = run(q, k, v, scale=self.scale)
        else:
            scores = self.tap_scores((q * self.scale) @ k.transpose(-2, -1))
            out = self.tap_probs(scores.softmax(dim=-1)) @ v
        return out.transpose(1, 2).flatten(2)

    def _folds(self) -> bool:
        """Whether keys and values are plain products, which `_attention_of_few` moves behind the sum over tokens."""
        between = (self.q_norm, self.k_norm, self.tap_q, self.tap_k, self.tap_v, self.tap_scores, self.tap_probs)
        identities = all(type(module) is nn.Identity for module in between)
        return identities and type(self.qkv) is nn.Linear and not self.plain

    def _attention_of_few(self, y: Tensor, queries: int) -> Tensor:
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
        return out if v_bias is None else out + v_bias


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

    def plainly(self) -> SparseViT:
        """Itself, from now on by stock kernels and autograd alone: what is fast is held against it."""
        for block in self.blocks:
            block.plain = True
        return self

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device

    @property
    def has_class_token(self) -> bool:
        """Whether there is a class token, whose attention can rank the patches."""
        return self.cls_token is not None

    @property
    def last_queries(self) -> int | None:
        """How many tokens of the last block's output the head reads: the first so many, or all of them (None)."""
        return self.prefix_tokens if self.head.reads_prefix_only else None

    def largest(self, tokens: int) -> int:
        """Numbers in the largest tensor of a forward pass of one image, of so many tokens."""
        return max(tokens * max(block.heads * tokens, block.hidden) for block in self.blocks)

    def forward(
        self, patches: Tensor, positions: Tensor, mirrored: bool | Tensor = False, return_attended: bool = False
    ) -> ViTOutput:
        """Run the model on kept patches.

        Args:
            patches: (B, n, C, height, width), normalized pixels.
            positions: (B, n), int64, the grid position of each.
            mirrored: read every patch with its columns reversed (costs nothing: the weights are mirrored instead);
                a bool, or an int64 tensor () that is 0 or 1.
            return_attended: also return what the attention of every block puts out.
        """
        x, attended = self.embed(patches, positions, mirrored), []
        few = None if return_attended else self.last_queries
        for block in self.blocks:
            x, out = block(x, few if block is self.blocks[-1] else None, return_attended)
            if return_attended:
                attended.append(out[:, self.prefix_tokens :])
        features = self.head.features(self.norm(x))
        return ViTOutput(self.head.classify(features), features, tuple(attended))

    def attention_weights(self, patches: Tensor, positions: Tensor, last_only: bool = False) -> list[Tensor]:
        """What every token gives every token in each block, mean over heads: (B, T, T), prefix tokens first.

        Args:
            patches: as for `forward`.
            positions: as for `forward`.
            last_only: the last block's alone.
        """
        x, weights = self.embed(patches, positions), []
        for block in self.blocks:
            last = block is self.blocks[-1]
            if last or not last_only:
                weights.append(block.attention_weights(x))
            x = x if last else block(x).tokens
        return weights

    def class_attention(self, patches: Tensor, positions: Tensor) -> Tensor:
        """What the class token of the last block gives each patch (B, n), mean over heads."""
        x = self.embed(patches, positions)
        for block in self.blocks[:-1]:
            x = block(x).tokens
        return self.blocks[-1].attention_weights(x, queries=1)[:, 0, self.prefix_tokens :]

    def forward_images(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of whole images (B, C, H, W)."""
        return self(self.grid.patchify(images), self.grid.all_positions(len(images), images.device)).logits

    def forward_flops(self, patches: int) -> int:
        """Floating-point operations of the matrix products in a forward pass of one image with `patches` patches."""
        return sum(self._flops(patches))

    def step_flops(self, patches: int) -> int:
        """The same for a forward pass and the gradient to the pixels: twice the layers, three times the attention."""
        layers, attention = self._flops(patches)
        return 2 * layers + 3 * attention

    def _flops(self, patches: int) -> tuple[int, int]:
        """Operations in the layers, and between tokens, of a forward pass of one image."""
        width, tokens = self.patch_proj.out_features, patches + self.prefix_tokens
        layers, attention = 2 * (patches * self.grid.pixels * width + width * self.num_classes), 0
        for block in self.blocks:
            few = self.last_queries if block is self.blocks[-1] else None
            in_layers, between_tokens = block.flops(tokens, tokens if few is None else few)
            layers, attention = layers + in_layers, attention + between_tokens
        return layers, attention

    def embed(self, patches: Tensor, positions: Tensor, mirrored: bool | Tensor = False) -> Tensor:
        """Patches as for `forward` -> the tokens (B, T, D) that the first block is fed, prefix tokens first."""
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
        prefix, pos_embed = self.prefix_and_positions()
        x = self.patch_norm(x)
        x = x if pos_embed is None else x + pos_embed[positions]
        if prefix is not None:
            x = torch.cat([prefix.expand(batch, -1, -1), x], dim=1)
        return self.norm_pre(self.tap_embed(x))

    def prefix_and_positions(self) -> tuple[Tensor | None, Tensor | None]:
        """Prefix tokens with their position embeddings (1, P, D), and the patches' position embeddings (N, D)."""
        tokens = [token for token in (self.cls_token, self.other_tokens) if token is not None]
        prefix = torch.cat(tokens, dim=1) if tokens else None
        if self.pos_embed is None:
            return prefix, None
        if prefix is None or not self.prefix_has_positions:
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

    def features(self, x: Tensor) -> Tensor:
        """Normalized tokens (B, T, D) -> what the classifier reads: (B, D), of a distilled model (B, 2, D)."""
        if self.head_dist is not None:
            return x[:, :2]
        if self.attn_pool is not None:
            x = self.attn_pool(x if self.include_prefix else x[:, self.prefix_tokens :])
        else:
            x = global_pool_nlc(x, self.pool_type, self.prefix_tokens, self.include_prefix)
        return self.fc_norm(x)

    def classify(self, features: Tensor) -> Tensor:
        """Features -> logits (B, classes)."""
        if self.head_dist is not None:
            return (self.head(features[:, 0]) + self.head_dist(features[:, 1])) / 2
        return self.head(features)
