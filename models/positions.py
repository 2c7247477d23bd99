"""What attention knows of where tokens are, besides what was added to them: rotations of queries and keys, or a bias.

`Places` says once, for all blocks, what they read of the positions; the `Position` of a block uses it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn


class Position(nn.Module):
    """Nothing: positions are in the tokens alone. Its layers, in subclasses, read no tokens and are not quantized.

    `turns`: whether queries and keys are turned. `biases`: whether something is added to the scores.
    """

    turns = biases = False

    def turned(self, x: Tensor, where: Tensor | None, back: bool = False) -> Tensor:
        """Queries or keys (B, heads, T, head_dim) as they are compared; `back`: the gradient of that."""
        return x

    def bias(self, where: Tensor | None) -> Tensor | None:
        """What is added to the scores: (B, heads, T, T), or the same for all images, (1, heads, T, T)."""
        return None

    def fixed(self, dtype: torch.dtype) -> Position:
        """The same, of what it holds now in this number format; it shares and learns nothing."""
        return self


class Turned(Position):
    """Rotary embeddings: patches are turned by where they are, prefix tokens are not.

    Args:
        prefix: prefix tokens.
        half: the two numbers that turn together are half a head apart, not neighbours.
        block: which of the rotations in `where` is its own, if each block has one.
    """

    turns = True

    def __init__(self, prefix: int, half: bool, block: int | None = None) -> None:
        super().__init__()
        self.prefix, self.half, self.block = prefix, half, block

    def turned(self, x: Tensor, where: Tensor | None, back: bool = False) -> Tensor:
        sines_and_cosines = where if self.block is None else where[self.block]
        count = x.shape[2] - self.prefix
        if count <= 0:
            return x
        rows = sines_and_cosines[:, :, :count]
        if back:
            sines, cosines = rows.chunk(2, dim=-1)
            rows = torch.cat([-sines, cosines], dim=-1)
        patches = apply_rot_embed_cat(x[:, :, self.prefix :], rows, half=self.half).to(x.dtype)
        return torch.cat([x[:, :, : self.prefix], patches], dim=2) if self.prefix else patches

    def as_products(self, where: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Cosines, sines (tokens, heads or 1, head_dim), matrix (head_dim, head_dim): x cos + (x matrix) sin is turned.

        For all patches in their order, behind the prefix tokens.
        """
        rows = (where if self.block is None else where[self.block])[0].float()
        sines, cosines = rows.transpose(0, 1).chunk(2, dim=-1)
        sines = torch.cat([torch.zeros_like(sines[:1]).expand(tokens - len(sines), -1, -1), sines])
        cosines = torch.cat([torch.ones_like(cosines[:1]).expand(tokens - len(cosines), -1, -1), cosines])
        size = sines.shape[-1]
        quarter = torch.cat([torch.ones(size), torch.zeros(size)])  # sines of ones, cosines of zeros
        return cosines, sines, apply_rot_embed_cat(torch.eye(size), quarter, half=self.half)


class RelativeBias(Position):
    """A bias for every pair of tokens of the full grid, of which those of the kept tokens are taken.

    Args:
        table: gives the bias of all pairs (heads, T, T), prefix tokens first.
    """

    biases = True

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table

    def bias(self, where: Tensor | None) -> Tensor:
        return self.table().flatten(1)[:, where].transpose(0, 1)

    def fixed(self, dtype: torch.dtype) -> Position:
        return RelativeBias(Known(self.table(), dtype))


class Known(nn.Module):
    """Gives a tensor as it was when this was made, in a number format; nothing learns from it."""

    def __init__(self, value: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("value", value.detach().to(dtype), persistent=False)

    def forward(self) -> Tensor:
        return self.value


class Places(nn.Module):
    """Positions (B, n) -> what the blocks read of them. This one: nothing."""

    def forward(self, positions: Tensor) -> Tensor | tuple | None:
        """Positions (B, n) -> a tensor, a tuple of what a block finds its own in, or None."""
        return None

    def fixed(self) -> Places:
        """The same, of what it holds now; it learns nothing."""
        return self


class PairPlaces(Places):
    """Where each pair of tokens is among all pairs of the full grid, prefix tokens first, as one number.

    (B, T, T), or (1, T, T) if all images have the same patches.

    Args:
        prefix: prefix tokens.
        patches: of the full grid.
    """

    def __init__(self, prefix: int, patches: int) -> None:
        super().__init__()
        self.prefix, self.tokens = prefix, prefix + patches

    def forward(self, positions: Tensor) -> Tensor:
        positions = _once(positions)
        prefix = torch.arange(self.prefix, device=positions.device).expand(len(positions), -1)
        tokens = torch.cat([prefix, positions + self.prefix], dim=1)
        return tokens[:, :, None] * self.tokens + tokens[:, None]


class RotaryPlaces(Places):
    """Sines and cosines of the patches, (B, 1, n, 2 head_dim); by blocks and heads where these have their own,
    (blocks, B, heads, n, 2 head_dim).

    Args:
        rope: timm's module.
        grid: rows and columns of patches.
        mixed: whether blocks and heads have their own.
    """

    def __init__(self, rope: nn.Module, grid: tuple[int, int], mixed: bool) -> None:
        super().__init__()
        self.rope, self.grid, self.mixed = rope, tuple(grid), mixed
        self.stored = getattr(rope, "feat_shape", None) is not None
        # Made once, where nothing learns: timm makes some of them on the host, which a device would wait for.
        self.computed = None if self.stored or mixed else rope.get_embed(shape=list(grid))

    def fixed(self) -> RotaryPlaces:
        fixed = copy.copy(self)
        fixed.computed = self._whole().detach()
        return fixed

    def forward(self, positions: Tensor) -> Tensor:
        whole, positions = self._whole(), _once(positions)
        if self.mixed:
            return whole[:, :, positions].transpose(1, 2)
        return whole[positions][:, None]

    def _whole(self) -> Tensor:
        """Those of the full grid, as timm asks for them: what is stored where there is such a thing."""
        if self.computed is not None:
            return self.computed
        return self.rope.get_embed() if self.stored else self.rope.get_embed(shape=list(self.grid))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryPlaces:
        super()._apply(fn, recurse)
        if self.computed is not None:  # moves along, in its own number format, as timm's do
            self.computed = self.computed.to(fn(self.computed).device)
        return self


def _once(positions: Tensor) -> Tensor:
    """Positions (B, n) -> (1, n) if all images have the same, where asking waits for no device."""
    same = positions.device.type == "cpu" and bool((positions == positions[:1]).all())
    return positions[:1] if same else positions
