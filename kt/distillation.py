"""Distillation: the student imitates the teacher's soft targets on images that stand in for the data."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from kt.config import DistillConfig
from kt.fit import fitted_head
from kt.match import Match, distillation_loss, made
from kt.whole import WholeStudent, classifier_parameters, classifiers
from models import DISAGREE, LoadedModel, SparseImages, SparseViT, ViTOutput, frozen_copy, near
from utils.augment import augmented, drawn
from utils.checkpoint import Checkpoint
from utils.device import pick_device, pick_dtype, require_memory, within_memory
from utils.errors import UserError, UserNote
from utils.ranks import gathered, rank, ranks, summed, wait_for_all

NEGLIGIBLE = 1e-3
"""A distillation loss that says nothing when it doubles: the student's answers are the teacher's."""
Result = TypeVar("Result")


class Lesson(nn.Module):
    """What a student says of a batch, held against what the teacher says of it: the loss, as one module.

    What learns in a way of matching learns with the student, also where several ranks average gradients.

    Args:
        student: fed patches and positions; or, where its head alone learns, what the head reads, and tokens.
        matches: ways of matching with their weights.
        dtype: of the student's products.
        head_alone: which of the two it is fed.
    """

    def __init__(
        self, student: nn.Module, matches: list[tuple[float, Match]], dtype: torch.dtype, head_alone: bool
    ) -> None:
        super().__init__()
        self.student, self.weights = student, [weight for weight, _ in matches]
        self.matches = nn.ModuleList(match for _, match in matches)
        self.dtype, self.head_alone = dtype, head_alone

    @property
    def reads_tokens(self) -> bool:
        """Whether patch tokens are compared."""
        return any(match.reads_tokens for match in self.matches)

    def said(self, fed: tuple[Tensor | None, ...]) -> ViTOutput:
        """What the student says, in float32."""
        if self.head_alone:
            features, tokens = fed
            return ViTOutput(self.student.classify(features), features, tokens=tokens)
        patches, positions = fed
        with torch.autocast(patches.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            said = self.student(patches, positions, **tokens_if(self.reads_tokens))
        return in_float(said)

    def forward(self, fed: tuple[Tensor | None, ...], taught: ViTOutput) -> Tensor:
        """The loss () of a batch of which the teacher says `taught`."""
        said = self.said(fed)
        return sum(w * match(said, taught) for w, match in zip(self.weights, self.matches, strict=True))


def in_float(said: ViTOutput) -> ViTOutput:
    """Logits, features and tokens in float32."""
    tokens = None if said.tokens is None else said.tokens.float()
    return ViTOutput(said.logits.float(), said.features.float(), tokens=tokens)


class Memory:
    """What a frozen backbone gave for the batches seen last, and the teacher's logits: rows of images.

    Args:
        limit: as many are kept; None: all.
    """

    SIZE = 4096

    def __init__(self, limit: int | None) -> None:
        self.limit, self.parts = limit, []

    def add(self, features: Tensor, logits: Tensor) -> None:
        """Put a batch in; the oldest go."""
        self.parts.append((features, logits))

    def rows(self) -> tuple[Tensor, Tensor] | None:
        """Features (N, .., D) and logits (N, classes); None where nothing was seen."""
        if len(self.parts) > 1:
            self.parts = [tuple(map(torch.cat, zip(*self.parts, strict=True)))]
        if self.parts and self.limit is not None:
            self.parts = [tuple(rows[-self.limit :] for rows in self.parts[0])]
        return self.parts[0] if self.parts else None

    def drawn(self, count: int, generator: torch.Generator) -> tuple[tuple[Tensor, None], ViTOutput]:
        """As many rows, none twice: what a head is fed, and what the teacher says."""
        features, logits = self.rows()
        index = torch.randperm(len(features), generator=generator)[:count].to(features.device)
        return (features[index], None), ViTOutput(logits[index], logits[index])


def tokens_if(wanted: bool) -> dict[str, bool]:
    """The argument that asks a model for its tokens."""
    return {"return_tokens": True} if wanted else {}


def few_images(held_back: int, there: int) -> str:
    """What a user is told who holds back all images of the first epoch."""
    return (
        f"--held_back {held_back}: the first epoch has {there} images; give fewer, or raise --images_per_epoch, "
        "--max_images or --minutes"
    )


class Distiller:
    """A student in training. With several ranks each takes a part of every batch, and gradients are averaged.

    Args:
        teacher: gives the targets; copied and frozen.
        student: from `load_student`; what requires gradients learns.
        config: how.
        device: where both run.
        eager: by stock kernels and autograd alone; the weights are the same up to rounding.

    Raises:
        UserError: a batch that the ranks cannot divide evenly, or settings that the student does not allow.
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
        self.dtype, self.eager = getattr(torch, pick_dtype(config.dtype, device)), eager
        self.teacher = self._frozen(teacher.vit)
        self.student = student.sparse(device)
        whole = isinstance(student, WholeStudent)
        classifier = {id(parameter) for parameter in classifier_parameters(student.vit)}
        head_alone = all(id(p) in classifier for p in student.vit.parameters() if p.requires_grad)
        ends_in_heads = not whole or self.student.ends_in_classifier()
        head_alone = head_alone and ends_in_heads
        self.backbone = self._frozen(student.vit) if head_alone and not whole else None
        self.fill = whole if config.fill is None else config.fill
        if whole and not (self.fill or config.join):
            raise UserError(f"--no-fill: {student.name} is fed whole images; leave it out, or give --join")
        if whole and config.batch_size == ranks() and self.student.learns_statistics:
            raise UserError(
                f"--kr-batchsize {config.batch_size}: the batch norms of {student.name} learn from 2 images or more at "
                "a time, on each rank"
            )
        if eager and not whole:
            self.student.plainly()
        matches = made(config.match, self.student, self.teacher, config.temperature)
        # Gradients through batch norms of a small batch lose too much by rounding.
        learns_in = torch.float32 if whole else self.dtype
        self.lesson, self.fits = Lesson(self.student, matches, learns_in, head_alone), config.optimizer == "lbfgs"
        self.memory = Memory(None if self.fits else Memory.SIZE)
        self._require_reuse(student.name)
        self.heads = classifiers(student.vit)
        if self.fits or config.head_steps:
            self._require_fit(student.name, ends_in_heads)
        self.model = DistributedDataParallel(self.lesson) if ranks() > 1 else self.lesson
        learning = [p for p in self.lesson.parameters() if p.requires_grad]
        self.optimizer = None
        if config.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(learning, lr=config.lr, momentum=0.9, weight_decay=1e-4)
        elif config.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(learning, lr=config.lr, weight_decay=1e-4)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.begun = not config.head_steps
        """Whether the first head is there."""

    def _frozen(self, vit: nn.Module) -> SparseViT:
        """A copy that does not learn. Where it would compute something else than plain code does, it is plain."""
        fast = frozen_copy(vit, self.device, self.dtype, self.eager)
        if self.eager:
            return fast
        grid, generator = fast.grid, torch.Generator().manual_seed(0)
        images = torch.randn(2, grid.channels, *grid.image_size, generator=generator).to(self.device)
        plain = [frozen_copy(vit, self.device, dtype, plain=True) for dtype in (self.dtype, torch.float32)]
        with torch.no_grad():
            said = [one.forward_images(images.to(one.patch_proj.weight.dtype)) for one in (fast, *plain)]
        if near(*(logits.float() for logits in said)):
            return fast
        warnings.warn(UserNote(DISAGREE), stacklevel=2)
        return plain[0]

    def _require_reuse(self, name: str) -> None:
        """Raise `UserError` where what was seen cannot be fed to the student again."""
        reuse = self.config.reuse
        if reuse == 1:
            return
        if not self.lesson.head_alone:
            raise UserError(
                f"--reuse {reuse} is for a student of which one layer learns, at its end; {name} is not taught so"
            )
        if self.lesson.reads_tokens:
            raise UserError(f"--reuse {reuse} keeps no tokens, which --match features and relations compare")
        if ranks() > 1:
            raise UserError(f"--reuse {reuse} is for one process")

    def _require_fit(self, name: str, ends_in_heads: bool) -> None:
        """Raise `UserError` where a head is not fitted at once, or what that takes finds no room."""
        config = self.config
        linear = all(isinstance(head, nn.Linear) and head.bias is not None for head in self.heads)
        if self.fits:
            if not (self.lesson.head_alone and linear) or ranks() > 1:
                raise UserError(
                    f"--optimizer lbfgs is for a student of which linear layers at its end learn alone, and for one "
                    f"process; {name} is not taught so"
                )
            steps, looks, flag = config.steps, config.epochs * config.batch_size, "--kd_steps"
        else:
            if not (ends_in_heads and linear):
                raise UserError(
                    f"--head_steps {config.head_steps} fits linear layers, which {name} does not end in; give 0"
                )
            steps, looks, flag = config.head_steps, config.batch_size, "--head_steps"
        width, classes = sum(head.in_features for head in self.heads), self.heads[0].out_features
        each = 4 * (width + classes) + 8 * (3 * width + 5 * classes)  # in float64 too, and what a gradient takes
        require_memory(steps, looks * each, self.device, "all that is looked at", flag)

    def _require_memory(self, student: LoadedModel | WholeStudent) -> None:
        """Raise `UserError` where a batch of whole images, and what a block keeps for its gradients, finds no room."""
        if isinstance(student, WholeStudent):  # which may be anything
            return
        vit = SparseViT(student.vit)
        tokens, learning = vit.grid.count + vit.prefix_tokens, any(p.requires_grad for p in vit.blocks.parameters())
        saved = 2 * sum(block.saved(tokens, pairs=True) for block in vit.blocks) if learning else 0
        each = 4 * (saved + 3 * vit.grid.count * vit.grid.pixels + 2 * vit.largest(tokens))
        require_memory(self.config.batch_size // ranks(), each, self.device, "a step", "--kr-batchsize")

    def run(self, images: SparseImages, steps: int, tick: Callable[[], object] = lambda: None) -> float:
        """`steps` steps on batches drawn from `images`, `begin` before the first of all. Returns the mean loss.

        `tick` is called after every batch.

        Raises:
            UserError: no images, a loss that is no longer finite, or not enough GPU memory.
        """
        if not len(images):
            raise UserError(
                "the pool is empty; let images be synthesized (--images_per_epoch) or give another --datapool"
            )
        if steps and not self.begun:
            self.begin(images, tick)
        total = torch.zeros((), device=self.device)
        with _quiet_norms():
            for _ in range(steps):
                total += self._look(images) if self.fits else self._step(images)
                tick()
        loss = summed([total.item()], self.device)[0] / (max(steps, 1) * ranks())
        if loss != loss or loss in (float("inf"), float("-inf")):
            mend = "" if self.fits else "; lower --lr, in a new --output"
            raise UserError(f"the distillation loss became {loss}{mend}")
        if steps and self.fits:
            self._fit(self.memory)
        return loss

    def _step(self, images: SparseImages) -> Tensor:
        config = self.config
        if config.lr_schedule == "cosine":
            done = min(self.steps / (config.epochs * config.steps), 1)
            for group in self.optimizer.param_groups:
                group["lr"] = config.lr * (1 + math.cos(math.pi * done)) / 2
        self.optimizer.zero_grad()
        if config.reuse == 1:
            batch = self._batch(images)
            loss = self._within_memory(lambda: self._gradient(self.model, *self._seen(batch)), batch)
        else:
            if self.steps % config.reuse == 0 or self.memory.rows() is None:
                batch = self._batch(images)
                (features, _), taught = self._within_memory(lambda: self._seen(batch), batch)
                self.memory.add(features, taught.logits)
            loss = self._gradient(self.model, *self.memory.drawn(config.batch_size, self.generator))
        self.optimizer.step()
        self.steps += 1
        return loss

    @torch.no_grad()
    def _look(self, images: SparseImages) -> Tensor:
        """Keep what teacher and backbone say of a batch. Returns the loss of the head as it is."""
        batch = self._batch(images)
        fed, taught = self._within_memory(lambda: self._seen(batch), batch)
        self.memory.add(fed[0], taught.logits)
        self.steps += 1
        return self.lesson(fed, taught)

    @torch.no_grad()
    def begin(self, images: SparseImages, tick: Callable[[], object] = lambda: None) -> None:
        """Fit the first head to what it reads of `head_steps` batches, before anything is learnt.

        The gradients of a head that is fitted already leave a pretrained backbone what it knows (Kumar et al., 2022).
        `tick` is called after every batch.
        """
        memory = Memory(None)
        with _quiet_norms():
            for _ in range(self.config.head_steps):
                batch = self._batch(images)
                fed, taught = self._within_memory(lambda batch=batch: self._seen(batch), batch)
                memory.add(gathered(self.lesson.said(fed).features), gathered(taught.logits))
                tick()
        self._fit(memory)
        self.begun = True

    @torch.no_grad()
    def _fit(self, memory: Memory) -> None:
        """The head that is best for all that was looked at; of two, whose mean it is, each has its token's part."""
        features, logits = memory.rows()
        weights, biases = fitted_head(features.flatten(1), logits, self.config.temperature, self.config.head_penalty)
        for head, part in zip(self.heads, weights.chunk(len(self.heads), dim=1), strict=True):
            head.weight.copy_(len(self.heads) * part)
            head.bias.copy_(biases)

    def _batch(self, images: SparseImages) -> SparseImages:
        """This rank's part of a batch: every rank draws the whole of it, from the same random numbers."""
        batch = drawn(images, self.config.batch_size, self.generator)
        batch = batch.filled(self.teacher.grid) if self.fill else batch
        batch = augmented(batch, self.teacher.grid, self.config.augment, self.generator)
        return batch.at(slice(rank(), None, ranks()))

    def _within_memory(self, do: Callable[[], Result], batch: SparseImages) -> Result:
        return within_memory(
            do,
            lambda images: self._gradient(self.lesson, *self._seen(batch.at(slice(images)))),
            len(batch),
            "--kr-batchsize",
            self.device,
        )

    def _gradient(self, model: nn.Module, fed: tuple[Tensor | None, ...], taught: ViTOutput) -> Tensor:
        """The loss, whose gradient is left for the optimizer."""
        loss = model(fed, taught)
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def _seen(self, batch: SparseImages) -> tuple[tuple[Tensor | None, ...], ViTOutput]:
        """What learns of the student is fed of a batch, and what the teacher says of it."""
        patches, positions = batch.patches.to(self.device), batch.positions.to(self.device)
        how = tokens_if(self.lesson.reads_tokens)
        taught = in_float(self.teacher(patches.to(self.dtype), positions, **how))
        if not self.lesson.head_alone:
            return (patches, positions), taught
        if self.backbone is not None:
            said = self.backbone(patches.to(self.dtype), positions, **how)
        else:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                said = self.student(patches, positions)
        said = in_float(said)
        return (said.features, said.tokens), taught

    @torch.no_grad()
    def agreement(self, images: SparseImages) -> tuple[float, float]:
        """Per cent of images that student and teacher put in one class, and the negative mean divergence of the two."""
        images = images.filled(self.teacher.grid) if self.fill else images
        same, divergence = 0.0, 0.0
        for batch in images.batches(self.config.batch_size):
            fed, taught = self._seen(batch)
            said = self.lesson.said(fed).logits
            same += (said.argmax(dim=1) == taught.logits.argmax(dim=1)).sum().item()
            divergence += len(batch) * distillation_loss(said, taught.logits, self.config.temperature).item()
        return 100 * same / len(images), -divergence / len(images)

    def weights(self) -> dict[str, Tensor]:
        """A copy of the student's weights, on the CPU."""
        return {key: value.detach().cpu().clone() for key, value in self.student.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on."""
        return {
            "student": self.weights(),
            "matches": {key: value.cpu().clone() for key, value in self.lesson.matches.state_dict().items()},
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "begun": self.begun,
            "steps": self.steps,
            "memory": [rows.cpu() for rows in self.memory.rows() or ()],
            "random": self.generator.get_state(),
            "dropout": torch.get_rng_state(),
            "cuda_dropout": torch.cuda.get_rng_state_all(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.student.load_state_dict(state["student"])
        self.lesson.matches.load_state_dict(state["matches"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self.begun, self.steps = state["begun"], state["steps"]
        self.memory.parts = [tuple(rows.to(self.device) for rows in state["memory"])] if state["memory"] else []
        self.generator.set_state(state["random"])
        torch.set_rng_state(state["dropout"])
        if len(state["cuda_dropout"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda_dropout"])


@contextlib.contextmanager
def _quiet_norms() -> Iterator[None]:
    """Without what torch says once of an RMS norm whose weights are in float32."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        yield


@dataclass
class Distilled:
    """What a student learnt, or where it stands.

    `history`: for each epoch its mean `loss`, `images` it drew from, `top1` on test images and `agreement` with the
    teacher on images held back (None where they were not looked at). `kept`: the number of the epoch, from 1, whose
    student is kept, `kept_weights` if it is not the last, `nearest` how near the teacher it is. `seconds`: of the
    steps. `images`: that the last epoch was given, those of a trajectory one by one and those held back among them.
    """

    history: list[dict] = field(default_factory=list)
    kept: int = 0
    kept_weights: dict[str, Tensor] = field(default_factory=dict)
    nearest: tuple[float, float] = (-1.0, -math.inf)
    seconds: float = 0.0
    images: int = 0

    def looked_at(self, distiller: Distiller, held_back: SparseImages | None) -> None:
        """Keep the student of the last epoch, if nothing was held back or it is nearer the teacher than those before.

        Test images have no say in it.
        """
        if held_back is not None:
            found = distiller.agreement(held_back)
            self.history[-1]["agreement"] = round(found[0], 3)
            if found <= self.nearest:
                return
            self.nearest, self.kept_weights = found, distiller.weights()
        self.kept = len(self.history)

    @property
    def top1(self) -> float | None:
        """On test images, of the student that is kept; None where it was not evaluated."""
        return self.history[self.kept - 1]["top1"]


def distill(
    teacher: LoadedModel,
    student: LoadedModel | WholeStudent,
    images: SparseImages | Callable[[int], SparseImages],
    config: DistillConfig,
    device: torch.device | str | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    checkpoint: Checkpoint | None = None,
    progress: bool = False,
    eager: bool = False,
) -> Distilled:
    """Let a student imitate a teacher on images that stand in for the data (Hinton et al., 2015).

    The student is changed in place: it ends as the last step left it or, of `config.keep` "agreement", as it was when
    it was nearest to the teacher on images that were held back. What `evaluate` says is reported and decides nothing.

    Args:
        teacher: gives the targets; left alone.
        student: from `load_student`.
        images: kept patches, the same for every epoch; or a function of the 0-based number of the epoch.
        config: how.
        device: where to run; None: a GPU if there is one.
        evaluate: gives the student's top-1 in per cent; None: it is not evaluated.
        checkpoint: where the first head and every epoch leave their state, and whose state the training goes on from.
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
            keys = ("loss", "images", "top1", "agreement")
            found.history, found.nearest = [{key: one[key] for key in keys} for one in found.history], (*found.nearest,)
    begun, hidden = len(found.history), not progress or rank() > 0

    def keep_state() -> None:
        if checkpoint is not None and rank() == 0:
            checkpoint.write({"distiller": distiller.state_dict(), "progress": vars(found)})

    def finish(epoch: int, held_back: SparseImages | None) -> None:
        """Look at the student where it is time; what was learnt is kept, whatever becomes of that."""
        try:
            if (epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs:
                if evaluate is not None:
                    found.history[-1]["top1"] = evaluate(distiller.student)
                found.looked_at(distiller, held_back)
        finally:
            keep_state()

    def fed(epoch: int) -> tuple[SparseImages, SparseImages | None]:
        """The images of an epoch, and those that are held back of them."""
        there = of_epoch(epoch)
        found.images = len(there)
        there = there.put_together(teacher.grid) if config.join else there
        if config.keep == "last":
            return there, None
        if len(there) <= config.held_back:
            raise UserError(few_images(config.held_back, len(there)))
        return there.at(slice(config.held_back, None)), there.at(slice(config.held_back))

    due = begun % config.eval_every == 0 or begun == config.epochs
    last_seen = "top1" if config.keep == "last" else "agreement"
    if begun and due and found.history[-1][last_seen] is None:
        finish(begun - 1, fed(begun - 1)[1])  # it was stopped while it looked
    batches = config.head_steps + config.epochs * config.steps
    gone = (config.head_steps if distiller.begun else 0) + begun * config.steps
    with tqdm(total=batches, initial=gone, desc="distillation", unit="batch", disable=hidden) as bar:
        for epoch in range(begun, config.epochs):
            there, held_back = fed(epoch)
            start = time.perf_counter()
            if not distiller.begun:
                distiller.begin(there, bar.update)
                found.seconds, start = found.seconds + time.perf_counter() - start, time.perf_counter()
                keep_state()
            loss = distiller.run(there, config.steps, bar.update)
            found.seconds += time.perf_counter() - start
            found.history.append({"loss": round(loss, 5), "images": len(there), "top1": None, "agreement": None})
            finish(epoch, held_back)
            bar.set_postfix(epoch=epoch + 1, loss=f"{loss:.4g}", images=len(there), refresh=False)
    if not found.kept or (config.keep == "last" and found.kept < len(found.history)):
        finish(config.epochs - 1, fed(len(found.history) - 1)[1])  # stopped between two looks, and told to end there
    first, last = (found.history[epoch]["loss"] for epoch in (0, -1))
    if last > 2 * max(first, NEGLIGIBLE) and not distiller.fits and rank() == 0:
        told = f"the distillation loss was {first:.4g} in the first epoch and is {last:.4g} in the last"
        warnings.warn(UserNote(f"{told}: lower --lr, in a new --output"), stacklevel=2)
    if found.kept_weights:
        distiller.student.load_state_dict(found.kept_weights)
    wait_for_all()
    return found
