"""Distillation: the student imitates the teacher's soft targets on images that stand in for the data."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from kt.augment import augmented, drawn, take
from models import LoadedModel, SparseImages, SparseViT
from utils.errors import UserError
from utils.ranks import rank, ranks, summed

OPTIMIZERS = ("sgd", "adamw")


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of the distributions at temperature T (Hinton et al., 2015), mean over the batch.

    Args:
        student: logits (B, classes).
        teacher: logits (B, classes), the target.
        temperature: T; both logits are divided by it. T^2 keeps the gradient's size.
    """
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


class Distiller:
    """A student in training. With several ranks each takes a part of every batch, and gradients are averaged.

    Args:
        teacher: gives the targets; frozen.
        student: from `load_student`; what requires gradients learns.
        device: where both run.
        batch_size: images a step, over all ranks.
        temperature: of the soft targets.
        optimizer: `sgd` (momentum 0.9) or `adamw`.
        lr: its learning rate; weight decay is 1e-4.
        decay_steps: the learning rate falls to zero over so many steps, along half a cosine; None keeps it.
        augment: names of `AUGMENTATIONS`.
        seed: of the batches and the augmentation.

    Raises:
        UserError: a batch that the ranks cannot divide evenly.
    """

    def __init__(
        self,
        teacher: LoadedModel,
        student: LoadedModel,
        device: torch.device,
        batch_size: int = 32,
        temperature: float = 20.0,
        optimizer: str = "sgd",
        lr: float = 0.1,
        decay_steps: int | None = None,
        augment: Sequence[str] = ("flip", "shift"),
        seed: int = 42,
    ) -> None:
        if batch_size % ranks():
            raise UserError(f"--kr-batchsize {batch_size} cannot be divided evenly among {ranks()} ranks")
        self.device, self.batch_size, self.temperature, self.augment = device, batch_size, temperature, tuple(augment)
        self.teacher = SparseViT(copy.deepcopy(teacher.vit).requires_grad_(False).to(device))
        self.student = SparseViT(student.vit.to(device))
        self.model = DistributedDataParallel(self.student) if ranks() > 1 else self.student
        learning = [p for p in self.student.parameters() if p.requires_grad]
        if optimizer == "sgd":
            self.optimizer = torch.optim.SGD(learning, lr=lr, momentum=0.9, weight_decay=1e-4)
        else:
            self.optimizer = torch.optim.AdamW(learning, lr=lr, weight_decay=1e-4)
        self.lr, self.decay_steps, self.steps = lr, decay_steps, 0
        self.generator = torch.Generator().manual_seed(seed)

    def run(self, images: SparseImages, steps: int) -> float:
        """`steps` steps on batches drawn from `images`. Returns the mean loss.

        Raises:
            UserError: no images, or a loss that is no longer finite.
        """
        if not len(images):
            raise UserError(
                "the pool is empty; let images be synthesized (--images_per_epoch) or give another --datapool"
            )
        total = torch.zeros((), device=self.device)
        for _ in range(steps):
            total += self._step(images)
        loss = summed([total.item()], self.device)[0] / (max(steps, 1) * ranks())
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise UserError(f"the distillation loss became {loss}; lower --lr, in a new --output")
        return loss

    def _step(self, images: SparseImages) -> Tensor:
        # Every rank draws the whole batch, from the same random numbers, and takes its part.
        batch = drawn(images, self.batch_size, self.generator)
        batch = augmented(batch, self.student.grid, self.augment, self.generator)
        batch = take(batch, slice(rank(), None, ranks()))
        patches, positions = batch.patches.to(self.device), batch.positions.to(self.device)
        with torch.no_grad():
            target = self.teacher(patches, positions).logits
        loss = distillation_loss(self.model(patches, positions).logits, target, self.temperature)
        if self.decay_steps is not None:
            done = min(self.steps / self.decay_steps, 1)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * (1 + math.cos(math.pi * done)) / 2
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        return loss.detach()

    def weights(self) -> dict[str, Tensor]:
        """A copy of the student's weights, on the CPU."""
        return {key: value.detach().cpu().clone() for key, value in self.student.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on."""
        return {
            "student": self.weights(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "random": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]
        self.generator.set_state(state["random"])
