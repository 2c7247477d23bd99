"""How much a patch matters: what ranks the patches when some of them stop. `IMPORTANCES` names the ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from utils.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor

    from inversion.canvas import PatchCanvas
    from models import SparseViT

    Importance = Callable[[SparseViT, PatchCanvas, Tensor], Tensor]


def class_attention(vit: SparseViT, canvas: PatchCanvas, targets: Tensor) -> Tensor:
    """What the class token of the last block gives each patch, mean over heads (SMI, ICML 2024)."""
    return vit.class_attention(*_fed(vit, canvas))


def attention_rollout(vit: SparseViT, canvas: PatchCanvas, targets: Tensor) -> Tensor:
    """The class token's row of the product over blocks of (A + I) / 2 (Abnar and Zuidema, ACL 2020).

    A token that a later block puts in front of the others has until then seen itself alone.
    """
    rolled = None
    for weights in vit.attention_weights(*_fed(vit, canvas)):
        mixed = (weights.float() + torch.eye(weights.shape[-1], device=weights.device)) / 2
        rolled = mixed if rolled is None else mixed @ _with_tokens_in_front(rolled, mixed.shape[-1])
    return rolled[:, 0, vit.head.prefix_tokens :]


def gradient_size(vit: SparseViT, canvas: PatchCanvas, targets: Tensor) -> Tensor:
    """Norm of the gradient of the cross-entropy to each patch's pixels."""
    with torch.enable_grad():
        pixels = canvas.pixels.detach().requires_grad_()
        logits = vit(pixels.to(_dtype(vit)), canvas.positions).logits
        (grad,) = torch.autograd.grad(F.cross_entropy(logits.float(), targets), pixels)
    return grad.flatten(2).norm(dim=2)


def attention_of_all(vit: SparseViT, canvas: PatchCanvas, targets: Tensor) -> Tensor:
    """What all tokens of the last block give each patch, mean over tokens and heads."""
    return vit.attention_weights(*_fed(vit, canvas), last_only=True)[0].mean(dim=1)[:, vit.head.prefix_tokens :]


IMPORTANCES: dict[str, Importance] = {
    "cls": class_attention,
    "rollout": attention_rollout,
    "gradient": gradient_size,
    "all": attention_of_all,
}
NEEDS_CLASS_TOKEN = ("cls", "rollout")


def _with_tokens_in_front(weights: Tensor, tokens: int) -> Tensor:
    """Weights (B, T, T) as of so many tokens (B, T', T'), those in front reading themselves alone."""
    more = tokens - weights.shape[-1]
    if not more:
        return weights
    front = torch.eye(tokens, device=weights.device)[:more].expand(len(weights), -1, -1)
    return torch.cat([front, F.pad(weights, (more, 0))], dim=1)


def _dtype(vit: SparseViT) -> torch.dtype:
    return vit.patch_proj.weight.dtype


def _fed(vit: SparseViT, canvas: PatchCanvas) -> tuple[Tensor, Tensor]:
    """The un-jittered canvas as the model takes it."""
    return canvas.pixels.detach().to(_dtype(vit)), canvas.positions
