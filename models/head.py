"""What makes logits of the last block's tokens."""

from __future__ import annotations

from timm.layers import AttentionPoolLatent
from timm.models.vision_transformer import global_pool_nlc
from torch import Tensor, nn


class Head(nn.Module):
    """Normalized tokens -> logits: timm's pooling, its norm after it, and the classifier.

    Args:
        head: the classifier.
        pool_type: timm's name of the pooling, which an `attn_pool` stands for.
        prefix_tokens: how many tokens are no patches.
        class_token: whether the first of them is a class token.
        fc_norm: the norm after pooling.
        attn_pool: timm's pooling by attention.
        include_prefix: whether pooling of all tokens is of prefix tokens as well.
        head_dist: of a distilled model, the classifier of the distillation token.
    """

    def __init__(
        self,
        head: nn.Module,
        pool_type: str,
        prefix_tokens: int,
        class_token: bool,
        fc_norm: nn.Module | None = None,
        attn_pool: nn.Module | None = None,
        include_prefix: bool = False,
        head_dist: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.class_token = class_token
        self.reads_prefix_only = pool_type == "token" and attn_pool is None
        self.pool_type, self.include_prefix, self.prefix_tokens = pool_type, include_prefix, prefix_tokens
        self.attn_pool, self.head, self.head_dist = attn_pool, head, head_dist
        self.fc_norm = nn.Identity() if fc_norm is None else fc_norm
        self.tap_logits = nn.Identity()

    def features(self, x: Tensor) -> Tensor:
        """Normalized tokens (B, T, D) -> what the classifier reads: (B, D), of a distilled model (B, 2, D)."""
        if self.head_dist is not None:
            return x[:, :2]
        if self.attn_pool is not None:
            x = self.attn_pool(self._pooled_tokens(x))
        else:
            x = global_pool_nlc(x, self.pool_type, self.prefix_tokens, self.include_prefix)
        return self.fc_norm(x)

    def pool_attention(self, x: Tensor) -> Tensor:
        """Normalized tokens (B, T, D) -> what the pool's latent token gives each patch (B, n), mean over heads."""
        pool, tokens = self.attn_pool, self._pooled_tokens(x)
        if getattr(pool, "pos_embed", None) is not None:
            tokens = tokens + pool.pos_embed
        q = pool.q(pool.latent).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)
        k = pool.kv(tokens).unflatten(-1, (2, pool.num_heads, -1))[:, :, 0].transpose(1, 2)
        scores = pool.scale * pool.q_norm(q) @ pool.k_norm(k).transpose(-2, -1)
        skipped = self.prefix_tokens if self.include_prefix else 0
        return scores.softmax(dim=-1).mean(dim=(1, 2))[:, skipped:]

    def flops(self, tokens: int) -> tuple[int, int]:
        """Operations in the layers, and between tokens, for one image of so many tokens."""
        layers, attention, pool = self.head.weight.numel(), 0, self.attn_pool
        if self.head_dist is not None:
            layers += self.head_dist.weight.numel()
        read = tokens if self.include_prefix else tokens - self.prefix_tokens
        if isinstance(pool, AttentionPoolLatent):
            inside = sum(layer.weight.numel() for layer in pool.modules() if isinstance(layer, nn.Linear))
            of_tokens = pool.kv.weight.numel()
            layers += read * of_tokens + pool.latent_len * (inside - of_tokens)
            attention = pool.latent_len * read * pool.kv.in_features
        elif pool is not None:  # tokens ask each other, without layers
            attention = read * read * self.head.in_features
        return 2 * layers, 4 * attention

    def classify(self, features: Tensor) -> Tensor:
        """Features -> logits (B, classes)."""
        if self.head_dist is not None:
            return self.tap_logits((self.head(features[:, 0]) + self.head_dist(features[:, 1])) / 2)
        return self.tap_logits(self.head(features))

    def _pooled_tokens(self, x: Tensor) -> Tensor:
        return x if self.include_prefix else x[:, self.prefix_tokens :]
