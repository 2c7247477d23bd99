"""What attention knows of where tokens are, besides what was added to them: rotations of queries and keys, or a bias.

`Places` says once, for all blocks, what they read of the positions; the `Position` of a block uses it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn


class Position(nn.Module):
    """Nothing: positions are in the tokens alone. Its layers, in subclasses, read no tokens and are not quantized."""

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


class RelativeBias(Position):
    """A bias for every pair of tokens of the full grid, of which those of the kept tokens are taken.

    Args:
        module: timm's, which holds the table.
        whole: `module` -> the bias of all pairs (heads, T, T), prefix tokens first.
    """

    def __init__(self, module: nn.Module, whole: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.module, self.whole = module, whole

    def bias(self, where: Tensor | None) -> Tensor:
        whole = self.whole(self.module)
        pairs = where[:, :, None] * whole.shape[-1] + where[:, None, :]
        return whole.flatten(1)[:, pairs].transpose(0, 1)

    def fixed(self, dtype: torch.dtype) -> Position:
        whole = self.whole(self.module).detach().to(dtype)
        return RelativeBias(nn.Identity(), lambda _: whole)


class Places(nn.Module):
    """Positions (B, n) -> what the blocks read of them. This one: nothing."""

    def forward(self, positions: Tensor) -> Tensor | tuple | None:
        """Positions (B, n) -> a tensor, a tuple of what a block finds its own in, or None."""
        return None


class TokenPlaces(Places):
    """The place of each token on the full grid, prefix tokens first: (B, T), or (1, T) if all images have the same."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix

    def forward(self, positions: Tensor) -> Tensor:
        positions = _once(positions)
        prefix = torch.arange(self.prefix, device=positions.device).expand(len(positions), -1)
        return torch.cat([prefix, positions + self.prefix], dim=1)


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

    def forward(self, positions: Tensor) -> Tensor:
        # As timm asks for it: what is stored where there is such a thing.
        stored = getattr(self.rope, "feat_shape", None) is not None
        whole = self.rope.get_embed() if stored else self.rope.get_embed(shape=list(self.grid))
        positions = _once(positions)
        if self.mixed:
            return whole[:, :, positions].transpose(1, 2)
        return whole[positions][:, None]


def _once(positions: Tensor) -> Tensor:
    """Positions (B, n) -> (1, n) if all images have the same, where asking waits for no device."""
    same = positions.device.type == "cpu" and bool((positions == positions[:1]).all())
    return positions[:1] if same else positions
