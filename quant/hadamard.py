"""What an MLP's second layer reads, mixed by a Hadamard matrix in front of its quantizer.

What follows GELU has a few large values among many small ones, which no scale holds well, and no matrix can be moved
through GELU. So groups of channels are mixed where they are quantized, by a matrix that is its own inverse, and the
weights behind are those for mixed channels: the layer computes what it did (the online Hadamard transform of QuaRot,
Ashkboos et al., NeurIPS 2024).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from models import SparseViT
from models.blocks import SparseBlock, standard_mlp

GROUPS = (64, 16)
"""Channels that are mixed with one another: the first of these numbers that divides the width."""


class Hadamard(nn.Module):
    """A norm, or nothing, and behind it every group of channels times a Hadamard matrix.

    Args:
        norm: what stands in front of the MLP's second layer.
        width: of that layer's input.
        group: channels that are mixed with one another; a power of 4 that divides `width`.
    """

    def __init__(self, norm: nn.Module, width: int, group: int) -> None:
        super().__init__()
        self.norm, self.width = norm, width
        self.register_buffer("matrix", hadamard(group), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return mixed(self.norm(x), self.matrix)

    def write(self, graph: Any, rows: str) -> str:
        """Rows (n, width), as operators of an ONNX `quant.onnx_graph.Graph`."""
        groups = graph.reshape(graph.norm(rows, self.norm), -1, len(self.matrix))
        return graph.reshape(graph.op("MatMul", groups, graph.constant(self.matrix)), -1, self.width)


def hadamard(size: int) -> Tensor:
    """A Hadamard matrix (size, size), a power of 4: symmetric, orthogonal, and the vector of ones stays where it is.

    Were one of its rows all ones, a channel would have the mean of its group, large beside the others.
    """
    matrix, four = torch.ones(1, 1), 0.5 - torch.eye(4).fliplr()
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return matrix


def mixed(x: Tensor, matrix: Tensor) -> Tensor:
    """Groups of the last axis of `x`, as many channels as the matrix has rows, times the matrix."""
    return (x.unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2)


def unmixed(vit: SparseViT) -> list[str]:
    """Why MLPs of `vit` are left as they are, a line for each kind; none where all are mixed."""
    return list(dict.fromkeys(why for _, why in _mlps(vit) if why))


def can_mix(vit: SparseViT) -> bool:
    """Whether any MLP of `vit` can be mixed."""
    return any(why is None for _, why in _mlps(vit))


@torch.no_grad()
def with_hadamard(vit: SparseViT) -> SparseViT:
    """A copy of `vit` that computes the same, mixed where that can be."""
    vit = copy.deepcopy(vit).requires_grad_(False)
    for mlp, why in _mlps(vit):
        if why is None:
            second = mlp.fc2
            mlp.norm = Hadamard(mlp.norm, second.in_features, _group(second)).to(second.weight.device)
            weight = mixed(second.weight.double(), mlp.norm.matrix.double()).to(second.weight.dtype)
            second.weight = nn.Parameter(weight, requires_grad=False)
    return vit


def _mlps(vit: SparseViT) -> list[tuple[nn.Module, str | None]]:
    """The MLPs of all blocks, each once, and why one is left: None where it is mixed."""
    mlps = {id(mlp): mlp for block in vit.blocks.modules() if isinstance(block, SparseBlock) for mlp in [block.mlp]}
    return [(mlp, _refused(mlp)) for mlp in mlps.values()]


def _refused(mlp: nn.Module) -> str | None:
    if not standard_mlp(mlp) or not isinstance(mlp.fc2, nn.Linear):
        return f"the MLP is a {type(mlp).__name__}"
    return None if _group(mlp.fc2) else f"no group of {' or '.join(map(str, GROUPS))} divides its {mlp.fc2.in_features}"


def _group(layer: nn.Linear) -> int | None:
    return next((size for size in GROUPS if layer.in_features % size == 0), None)
