"""What the images shall be of: labels, and the distributions that the cross-entropy compares with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from utils.errors import UserError
from utils.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor


def check_targets(targets: tuple[str, ...]) -> None:
    """Raise `UserError` unless `targets` is `uniform`, `balanced`, `class:K` or a list of classes."""
    if targets in (("uniform",), ("balanced",)):
        return
    numbers = [targets[0].removeprefix("class:")] if len(targets) == 1 else list(targets)
    if not numbers or not all(number.isdecimal() and len(number) <= 9 for number in numbers):
        raise UserError(
            f"--targets {' '.join(targets)} is none of uniform, balanced, class:K, or a list of class numbers"
        )


def draw_labels(targets: tuple[str, ...], count: int, classes: int, generator: torch.Generator) -> Tensor:
    """Sorted labels (count,).

    Args:
        targets: `uniform` draws each; `balanced` takes every class equally often, as far as `count` goes, and draws
            which classes get one more; `class:K` is one class; a list of classes is repeated from its start.
        count: how many.
        classes: of the model.
        generator: for the draws.

    Raises:
        UserError: a class that the model does not have.
    """
    drawn = torch.randint(classes, (count,), generator=generator)
    if targets == ("uniform",):
        labels = drawn
    elif targets == ("balanced",):
        more = torch.randperm(classes, generator=generator)[: count % classes]
        labels = torch.cat([torch.arange(classes).repeat(count // classes), more])
    else:
        numbers = torch.tensor([int(number.removeprefix("class:")) for number in targets])
        if numbers.max() >= classes:
            raise UserError(f"--targets: there is no class {numbers.max()}, the model has 0 to {classes - 1}")
        labels = numbers.repeat(-(-count // len(numbers)))[:count]
    return labels.sort().values


def random_distributions(labels: Tensor, classes: int, height: float, generator: torch.Generator) -> Tensor:
    """Labels (B,) -> distributions (B, classes): the softmax of normal logits, that of a label `height` higher."""
    logits = torch.randn(len(labels), classes, generator=generator)
    return (logits + height * F.one_hot(labels, classes)).softmax(dim=1)


def distributions(labels: Tensor, classes: int, softness: float) -> Tensor:
    """Labels (B,) -> target distributions (B, classes): a share `softness` of each is spread over all classes."""
    return F.one_hot(labels, classes).float() * (1 - softness) + softness / classes
