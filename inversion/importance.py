"""How much a patch matters: what ranks the patches when some of them stop. `IMPORTANCES` names the ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from utils.errors import UserError
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


def attention_of_pool(vit: SparseViT, canvas: PatchCanvas, targets: Tensor) -> Tensor:
    """What the latent token of the pool in front of the classifier gives each patch, mean over heads."""
    return vit.pool_attention(*_fed(vit, canvas))


IMPORTANCES: dict[str, Importance] = {
    "cls": class_attention,
    "rollout": attention_rollout,
    "gradient": gradient_size,
    "all": attention_of_all,
    "pool": attention_of_pool,
}


def usual(vit: SparseViT) -> str:
    """What `auto` stands for: the attention of what the classifier reads, as far as there is one token of that kind."""
    if vit.has_class_token:
        return "cls"
    return "pool" if hasattr(vit.head.attn_pool, "latent") else "all"


def require_ranking(importance: str, vit: SparseViT, name: str) -> None:
    """Raise `UserError` where a model, called `name`, has not the token whose attention would rank its patches."""
    lacking = None
    if importance in ("cls", "rollout") and not vit.has_class_token:
        lacking = "no class token"
    if importance == "pool" and not hasattr(vit.head.attn_pool, "latent"):
        lacking = "no pool with a latent token"
    if lacking:
        raise UserError(
            f"{name} has {lacking}, so --importance {importance} cannot rank its patches; "
            f"give --importance {usual(vit)} or gradient, or --strategy dense"
        )


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
