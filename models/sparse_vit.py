"""A timm Vision Transformer that runs on kept patches alone.

The modules are timm's own; only the walk through them is ours, so that stopped patches cost nothing, the last block
computes no token that nobody reads, and the CLS attention can be had without storing every attention matrix. What
differs between architectures is said by their families (`models/families`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import Tensor, nn

from models.blocks import Inside, SparseBlock
from models.families import family_of, known_classes
from models.patches import PatchGrid
from utils.errors import UserError


def require_supported(vit: nn.Module, name: str = "the model") -> None:
    """Raise `UserError` unless `SparseViT` gives exactly the logits that timm's own forward gives for `vit`."""

    def refuse(why: str) -> None:
        raise UserError(f"{name} cannot be run on kept patches: {why}")

    family = family_of(vit)
    if family is None:
        refuse(f"it is a {type(vit).__name__}, not one of timm's {known_classes()}")
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
    if why := family.refusal(vit):
        refuse(why)


class ViTOutput(NamedTuple):
    """What `SparseViT` gives: logits (B, classes), what the classifier read (B, D), and what was asked for besides.

    `inside`: what the attention of each block whose patches put something out computes on the way. `tokens` (B, n, D):
    of the patches, as the pooling reads them.
    """

    logits: Tensor
    features: Tensor
    inside: tuple[Inside, ...] = ()
    tokens: Tensor | None = None


class SparseViT(nn.Module):
    """Patches and their grid positions in, logits out; with all patches it equals timm's own forward.

    It is an inference-time model (no dropout, no stochastic depth). The modules are shared with `vit`, not copied.
    Raises `UserError` for an architecture that it cannot honour (see `require_supported`).
    """

    def __init__(self, vit: nn.Module) -> None:
        require_supported(vit)
        super().__init__()
        embed, family = vit.patch_embed, family_of(vit)
        parts = family.parts(vit)
        self.grid, self.tokens_per_side = grid_of(vit), family.tokens_per_side(vit)
        self.num_classes = vit.num_classes
        kernel = embed.proj.weight
        self.patch_proj = nn.Linear(kernel[0].numel(), len(kernel), bias=embed.proj.bias is not None, device="meta")
        self.patch_proj.weight = nn.Parameter(embed.proj.weight.detach().flatten(1), embed.proj.weight.requires_grad)
        self.patch_proj.bias = embed.proj.bias
        self.patch_norm = embed.norm
        self.cls_token, self.other_tokens, self.pos_embed = parts.cls_token, parts.other_tokens, parts.pos_embed
        self.prefix_tokens = sum(x.shape[1] for x in (self.cls_token, self.other_tokens) if x is not None)
        self.prefix_has_positions = parts.prefix_has_positions
        self.norm_pre, self.places = parts.norm_pre, parts.places
        self.tap_patches, self.tap_joined, self.tap_positions = nn.Identity(), nn.Identity(), nn.Identity()
        self.tap_embed = nn.Identity()
        self.every_token = False
        self.blocks = nn.ModuleList(parts.blocks)
        self.norm, self.head = parts.norm, parts.head
        self.eval()

    def with_fixed_positions(self) -> SparseViT:
        """Itself, for weights that do not change: what says where tokens are is made once, not at every call."""
        self.places = self.places.fixed()
        for block in self.modules():
            if isinstance(block, SparseBlock):
                block.position = block.position.fixed(self.patch_proj.weight.dtype)
        return self

    def plainly(self) -> SparseViT:
        """Itself, from now on by stock kernels and autograd alone: what is fast is held against it."""
        for module in self.modules():
            if isinstance(module, SparseBlock):
                module.plain = True
        return self

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device

    @property
    def has_class_token(self) -> bool:
        """Whether there is a class token, whose attention can rank the patches."""
        return self.head.class_token

    @property
    def last_queries(self) -> int | None:
        """How many tokens of the last block's output the head reads: the first so many, or all of them (None).

        All are computed where `every_token` asks for it.
        """
        if self.every_token:
            return None
        return self.head.prefix_tokens if self.head.reads_prefix_only else None

    def largest(self, tokens: int) -> int:
        """Numbers in the largest tensor of a forward pass of one image, of so many tokens."""
        return max(block.largest(tokens) for block in self.blocks)

    def where(self, positions: Tensor) -> Tensor | tuple | None:
        """What the blocks read of positions (B, n), computed once for all of them."""
        return self.places(positions)

    def forward(
        self,
        patches: Tensor,
        positions: Tensor,
        mirrored: bool | Tensor = False,
        return_inside: bool = False,
        return_tokens: bool = False,
    ) -> ViTOutput:
        """Run the model on kept patches.

        Args:
            patches: (B, n, C, height, width), normalized pixels.
            positions: (B, n), int64, the grid position of each.
            mirrored: read every patch with its columns reversed (costs nothing: the weights are mirrored instead);
                a bool, or an int64 tensor () that is 0 or 1.
            return_inside: also return what the attention of every block computes.
            return_tokens: also return the patches' tokens.
        """
        x, found, where = self.embed(patches, positions, mirrored), [], self.where(positions)
        few = None if return_tokens else self.last_queries
        for block in self.blocks:
            x, inside = block(x, few if block is self.blocks[-1] else None, return_inside, where)
            if inside is not None:
                found.append(inside)
        x = self.norm(x)
        features = self.head.features(x)
        tokens = x[:, self.head.prefix_tokens :] if return_tokens else None
        return ViTOutput(self.classify(features), features, tuple(found), tokens)

    def classify(self, features: Tensor) -> Tensor:
        """What the classifier reads (B, D) -> logits (B, classes)."""
        return self.head.classify(features)

    def attention_weights(self, patches: Tensor, positions: Tensor, last_only: bool = False) -> list[Tensor]:
        """What every token gives every token in each block, mean over heads: (B, T, T), prefix tokens first.

        Where a patch is several tokens it is (B, n, n): the mean over those of one patch of what they give another.

        Args:
            patches: as for `forward`.
            positions: as for `forward`.
            last_only: the last block's alone.
        """
        x, weights, where = self.embed(patches, positions), [], self.where(positions)
        for block in self.blocks:
            last = block is self.blocks[-1]
            if last or not last_only:
                weights.append(block.attention_weights(x, where=where))
            x = x if last else block(x, where=where).tokens
        return weights

    def class_attention(self, patches: Tensor, positions: Tensor) -> Tensor:
        """What the class token of the last block gives each patch (B, n), mean over heads."""
        x, where = self.embed(patches, positions), self.where(positions)
        for block in self.blocks[:-1]:
            x = block(x, where=where).tokens
        return self.blocks[-1].attention_weights(x, 1, where)[:, 0, self.head.prefix_tokens :]

    def pool_attention(self, patches: Tensor, positions: Tensor) -> Tensor:
        """What the latent token of the pool gives each patch (B, n), mean over heads; for models with such a pool."""
        x, where = self.embed(patches, positions), self.where(positions)
        for block in self.blocks:
            x = block(x, where=where).tokens
        return self.head.pool_attention(self.norm(x))

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
        layers, attention = self.head.flops(tokens)
        layers += 2 * patches * self.grid.pixels * width
        for block in self.blocks:
            few = self.last_queries if block is self.blocks[-1] else None
            in_layers, between_tokens = block.flops(tokens, tokens if few is None else few)
            layers, attention = layers + in_layers, attention + between_tokens
        return layers, attention

    def embed(self, patches: Tensor, positions: Tensor, mirrored: bool | Tensor = False) -> Tensor:
        """Patches as for `forward` -> the tokens (B, T, D) that the first block is fed, prefix tokens first."""
        batch, side, grid = len(positions), self.tokens_per_side, self.grid
        height, width = grid.height // side, grid.width // side
        tokens = patches
        if side > 1:
            shape = (*positions.shape, grid.channels, side, height, side, width)
            tokens = patches.reshape(shape).permute(0, 1, 3, 5, 2, 4, 6)
            if mirrored is not False:
                back = torch.arange(side - 1, -1, -1, device=positions.device)
                # Columns of tokens change places, and the weights below those within a token.
                order = back if mirrored is True else torch.where(mirrored.view(1) > 0, back, back.flip(0))
                tokens = tokens.index_select(3, order)
        flat = tokens.reshape(batch, -1, grid.pixels // side**2)
        if mirrored is False:
            x = self.patch_proj(flat)
        else:
            shape = (-1, grid.channels, height, width)
            weight = self.patch_proj.weight.view(shape).flip(-1).flatten(1)
            if mirrored is not True:
                either = torch.stack([self.patch_proj.weight, weight])
                weight = either.index_select(0, mirrored.view(1)).squeeze(0)
            x = F.linear(flat, weight, self.patch_proj.bias)
        prefix, pos_embed = self.prefix_and_positions()
        x = self.tap_joined(self.tap_patches(self.patch_norm(x)))
        x = x if pos_embed is None else x + pos_embed[positions]
        if prefix is not None:
            x = torch.cat([prefix.expand(batch, -1, -1), x], dim=1)
        return self.norm_pre(self.tap_embed(x))

    def prefix_and_positions(self) -> tuple[Tensor | None, Tensor | None]:
        """Prefix tokens with their position embeddings (1, P, D), and the patches' position embeddings (N, D)."""
        tokens = [token for token in (self.cls_token, self.other_tokens) if token is not None]
        prefix = self.tap_joined(torch.cat(tokens, dim=1)) if tokens else None
        if self.pos_embed is None:
            return prefix, None
        positions = self.tap_positions(self.pos_embed)
        if prefix is None or not self.prefix_has_positions:
            return prefix, positions[0]
        return prefix + positions[:, : self.prefix_tokens], positions[0, self.prefix_tokens :]


def grid_of(vit: nn.Module) -> PatchGrid:
    """The patches of a timm model's images, of those that `require_supported` lets through."""
    embed, side = vit.patch_embed, family_of(vit).tokens_per_side(vit)
    rows, cols = (count // side for count in embed.grid_size)
    height, width = (size * side for size in embed.patch_size)
    return PatchGrid(rows, cols, height, width, embed.proj.in_channels)
