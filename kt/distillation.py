"""Distillation: the student imitates the teacher's soft targets on images that stand in for the data."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from kt.augment import augmented, drawn
from kt.config import DistillConfig
from models import LoadedModel, SparseImages, SparseViT
from utils.checkpoint import Checkpoint
from utils.device import pick_device, require_memory, within_memory
from utils.errors import UserError
from utils.ranks import rank, ranks, summed, wait_for_all


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
        teacher: gives the targets; copied and frozen.
        student: from `load_student`; what requires gradients learns.
        config: how.
        device: where both run.
        eager: by stock kernels and autograd alone; the weights are the same up to rounding.

    Raises:
        UserError: a batch that the ranks cannot divide evenly.
    """

    def __init__(
        self,
        teacher: LoadedModel,
        student: LoadedModel,
        config: DistillConfig,
        device: torch.device,
        eager: bool = False,
    ) -> None:
        if config.batch_size % ranks():
            raise UserError(f"--kr-batchsize {config.batch_size} cannot be divided evenly among {ranks()} ranks")
        self.config, self.device, self.steps = config, device, 0
        self._require_memory(student)
        self.teacher = SparseViT(copy.deepcopy(teacher.vit).requires_grad_(False).to(device))
        self.student = student.sparse(device)
        if eager:
            self.teacher.plainly(), self.student.plainly()
        self.model = DistributedDataParallel(self.student) if ranks() > 1 else self.student
        learning = [p for p in self.student.parameters() if p.requires_grad]
        if config.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(learning, lr=config.lr, momentum=0.9, weight_decay=1e-4)
        else:
            self.optimizer = torch.optim.AdamW(learning, lr=config.lr, weight_decay=1e-4)
        self.generator = torch.Generator().manual_seed(config.seed)

    def _require_memory(self, student: LoadedModel) -> None:
        """Raise `UserError` where a batch of whole images, and what a block keeps for its gradients, finds no room."""
        vit, width = SparseViT(student.vit), student.vit.embed_dim
        tokens, learning = vit.grid.count + vit.prefix_tokens, any(p.requires_grad for p in vit.blocks.parameters())
        saved = tokens * sum(9 * width + 2 * b.hidden + b.score_heads * tokens for b in vit.blocks) if learning else 0
        each = 4 * (saved + 3 * vit.grid.count * vit.grid.pixels + 2 * vit.largest(tokens))
        require_memory(self.config.batch_size // ranks(), each, self.device, "a step", "--kr-batchsize")

    def run(self, images: SparseImages, steps: int) -> float:
        """`steps` steps on batches drawn from `images`. Returns the mean loss.

        Raises:
            UserError: no images, a loss that is no longer finite, or not enough GPU memory.
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
        batch = drawn(images, self.config.batch_size, self.generator)
        batch = batch.filled(self.teacher.grid) if self.config.fill else batch
        batch = augmented(batch, self.student.grid, self.config.augment, self.generator)
        batch = batch.at(slice(rank(), None, ranks()))
        if self.config.lr_schedule == "cosine":
            done = min(self.steps / (self.config.epochs * self.config.steps), 1)
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.lr * (1 + math.cos(math.pi * done)) / 2
        self.optimizer.zero_grad()
        loss = within_memory(
            lambda: self._gradient(self.model, batch),
            lambda images: self._gradient(self.student, batch.at(slice(images))),
            len(batch),
            "--kr-batchsize",
            self.device,
        )
        self.optimizer.step()
        self.steps += 1
        return loss

    def _gradient(self, model: nn.Module, batch: SparseImages) -> Tensor:
        """The loss, whose gradient is left for the optimizer."""
        patches, positions = batch.patches.to(self.device), batch.positions.to(self.device)
        with torch.no_grad():
            target = self.teacher(patches, positions).logits
        loss = distillation_loss(model(patches, positions).logits, target, self.config.temperature)
        loss.backward()
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


@dataclass
class Distilled:
    """What a student learnt, or where it stands.

    `history`: for each epoch its mean `loss`, `images` it drew from and `top1` (None where there was no evaluation).
    `best_weights`: those that `best_top1` was measured with. `seconds`: of the steps. `images`: of the last epoch.
    """

    history: list[dict] = field(default_factory=list)
    best_top1: float = -1.0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    images: int = 0

    def evaluated(self, distiller: Distiller, evaluate: Callable[[SparseViT], float]) -> None:
        """Let the student's accuracy stand beside the last epoch, and keep the student if it is the best."""
        top1 = evaluate(distiller.student)
        self.history[-1]["top1"] = top1
        if top1 > self.best_top1:
            self.best_top1, self.best_weights = top1, distiller.weights()

    @property
    def last_top1(self) -> float:
        """Of the last evaluation."""
        return next(entry["top1"] for entry in reversed(self.history) if entry["top1"] is not None)


def distill(
    teacher: LoadedModel,
    student: LoadedModel,
    images: SparseImages | Callable[[int], SparseImages],
    config: DistillConfig,
    device: torch.device | str | None = None,
    evaluate: Callable[[SparseViT], float] | None = None,
    checkpoint: Checkpoint | None = None,
    progress: bool = False,
    eager: bool = False,
) -> Distilled:
    """Let a student imitate a teacher on images that stand in for the data (Hinton et al., 2015).

    The student is changed in place: it ends as it was at its best evaluation, or as the last step left it.

    Args:
        teacher: gives the targets; left alone.
        student: from `load_student`.
        images: kept patches, the same for every epoch; or a function of the 0-based number of the epoch.
        config: how.
        device: where to run; None: a GPU if there is one.
        evaluate: gives the student's top-1 in per cent; None: it is not evaluated.
        checkpoint: where every epoch leaves its state, and whose state the training goes on from.
        progress: show a progress bar on stderr.
        eager: as for `Distiller`.

    Raises:
        UserError: no images, a loss that is no longer finite, a batch that the ranks cannot divide evenly, a checkpoint
            of something else, or not enough memory.
    """
    device = torch.device(device) if device is not None else pick_device("auto")
    of_epoch = images if callable(images) else lambda epoch: images
    distiller, found = Distiller(teacher, student, config, device, eager), Distilled()
    state = None if checkpoint is None else checkpoint.state
    if state is not None:
        with checkpoint.going_on():
            distiller.load_state_dict(state["distiller"])
            found = Distilled(**state["progress"])
            found.history = [
                {"loss": one["loss"], "top1": one["top1"], "images": one["images"]} for one in found.history
            ]
    begun, hidden = len(found.history), not progress or rank() > 0

    def finish(epoch: int) -> None:
        """Evaluate where it is time; what was learnt is kept, whatever becomes of that."""
        try:
            if evaluate is not None and ((epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs):
                found.evaluated(distiller, evaluate)
        finally:
            if checkpoint is not None and rank() == 0:
                checkpoint.write({"distiller": distiller.state_dict(), "progress": vars(found)})

    if begun and found.history[-1]["top1"] is None:
        finish(begun - 1)
    with tqdm(total=config.epochs, initial=begun, unit="epoch", disable=hidden) as bar:
        for epoch in range(begun, config.epochs):
            fed = of_epoch(epoch)
            start = time.perf_counter()
            loss = distiller.run(fed, config.steps)
            found.seconds += time.perf_counter() - start
            found.images = len(fed)
            found.history.append({"loss": round(loss, 5), "top1": None, "images": len(fed)})
            finish(epoch)
            bar.set_postfix(loss=f"{loss:.4g}", best=f"{found.best_top1:.2f}", images=len(fed), refresh=False)
            bar.update()
    if evaluate is not None:
        if not found.best_weights:  # stopped before its first evaluation, and told to end there
            found.evaluated(distiller, evaluate)
        distiller.student.load_state_dict(found.best_weights)
    wait_for_all()
    return found
