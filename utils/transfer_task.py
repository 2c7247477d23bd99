"""The task of `test_kt.py`: teach a student what a model knows, without its data, and say how well it learnt."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from inversion import SynthesisReport
from kt import DistillConfig, StudentConfig, distill, load_student, save_student
from kt.distillation import few_images
from kt.student import backbone_of
from kt.whole import WholeStudent
from models import LoadedModel, SparseImages, SparseViT, load_model
from models.registry import short_name
from utils import evaluation
from utils.checkpoint import Checkpoint
from utils.cli import by_flag, natural, positive
from utils.data import evaluation_set, limited, loader
from utils.device import pick_device, seed_all
from utils.errors import UserError
from utils.evaluation import evaluate
from utils.files import write_json
from utils.images import NEEDS_PRI, Inverted, Noise, Synthesis, images_at_hand
from utils.pictures import save_images
from utils.ranks import rank
from utils.report_page import write_transfer_page
from utils.task import Task


@dataclass(frozen=True)
class TransferTask(Task):
    """Everything that a run of the task is asked for.

    `images_per_epoch`: inverted images added to the pool each epoch; 0: the pool is used as it is. `max_images`: after
    which no more are added, or how many noise, real or stored images there are; None: no limit, or all. `minutes`: time
    in which inverted images are made before the first epoch, instead of some each epoch.

    Raises `UserError` for what cannot go together.
    """

    images_per_epoch: int
    max_images: int | None
    minutes: float | None
    student: StudentConfig
    distillation: DistillConfig

    def __post_init__(self) -> None:
        natural.check(self.images_per_epoch, "--images_per_epoch")
        if self.minutes is not None and not isinstance(self.images, Inverted):
            raise UserError("--minutes is the time to invert images in, and none are inverted here")
        if self.max_images is not None:
            positive.check(self.max_images, "--max_images")
        if isinstance(self.images, Noise) and not self.fixed_images:
            raise UserError("--mode 1 --images_per_epoch 0 asks for no images; give --max_images")
        self._require_enough_to_hold_back()
        if self.distillation.join and self.images.kind not in ("pri", "stored"):
            raise UserError(NEEDS_PRI)

    def _require_enough_to_hold_back(self) -> None:
        """Raise `UserError` where it is known before images are made that no more than are held back will be."""
        grows = isinstance(self.images, Inverted) and self.minutes is None and self.images_per_epoch > 0
        counts = [self.images_per_epoch if grows else None, self.max_images]
        most = min((count for count in counts if count is not None), default=math.inf)
        if self.distillation.keep == "agreement" and most <= self.distillation.held_back:
            raise UserError(few_images(self.distillation.held_back, most))

    @property
    def name(self) -> str:
        """What its folder is called."""
        return f"{short_name(self.model.name)}-kt-{self.images.kind}-{self.student.finetune}-s{self.run.seed}"

    @property
    def fixed_images(self) -> int | None:
        """How many images there are of a kind that does not grow; None: all."""
        if isinstance(self.images, Noise):
            return self.max_images or self.distillation.epochs * self.images_per_epoch
        return self.max_images

    def settings(self) -> dict[str, object]:
        """What a run's numbers depend on besides the weights, by the names of the flags.

        More epochs only add to them, but where they set the length of something else.
        """
        flags = super().settings() | by_flag(self.student) | by_flag(self.distillation)
        flags |= {"images_per_epoch": self.images_per_epoch, "max_images": self.max_images, "minutes": self.minutes}
        if isinstance(self.images, Inverted):
            flags["datapool"] = str(self.images.datapool)
        if self.distillation.lr_schedule == "constant" and not isinstance(self.images, Noise):
            del flags["epochs"]
        return flags


def transfer_report(
    task: TransferTask, device: torch.device | None = None, tell: Callable[[str], None] | None = None
) -> dict:
    """Run the task, on one rank of a `process_group`; its report, which stands in the output folder.

    The folder also gets pictures, the student in timm's format and a checkpoint, from which the same task goes on.

    Args:
        task: what to do.
        device: where to run; None: as the task says.
        tell: is told where a stopped run goes on.

    Raises:
        UserError: whatever the user can mend.
    """
    device = device or pick_device(task.run.device, task.run.gpu)
    seed_all(task.run.seed)
    teacher = load_model(task.model)
    output = task.folder
    checkpoint = Checkpoint(output, task.settings(), made_by_run="student")
    test_set = evaluation_set(teacher, task.data)
    data = _loader(task, teacher, test_set)
    evaluation.require_memory_for(SparseViT(teacher.vit), data, device)
    student = load_student(teacher, task.student)
    of_student = data
    if isinstance(student, WholeStudent):
        wanted = replace(teacher, preprocessing=student.preprocessing)
        of_student = _loader(task, wanted, evaluation_set(wanted, task.data))
    images, synthesis = _images(task, teacher, student, device, output)
    if checkpoint.state is not None and tell is not None:
        with checkpoint.going_on():
            done = len(checkpoint.state["progress"]["history"])
        tell(f"going on after epoch {done} of {task.distillation.epochs}")
    found = distill(
        teacher,
        student,
        images,
        task.distillation,
        device,
        evaluate=lambda vit: evaluate({"student": vit}, of_student, device)["student"]["top1"],
        checkpoint=checkpoint,
        progress=task.run.progress,
        eager=task.run.eager,
    )
    cost = SynthesisReport() if synthesis is None else synthesis.cost(found.images)
    report = {
        "task": "kt",
        "model": teacher.name,
        "mode": task.images.mode,
        "images": task.images.kind,
        "student_name": student.name,
        "finetune": task.student.finetune,
        "student_init": task.student.init,
        **task.origin(device),
        "epochs": len(found.history),
        "teacher": evaluate({"teacher": teacher.sparse(device)}, data, device, progress=task.run.progress)["teacher"],
        "student": {"top1": found.top1, "kept": task.distillation.keep, "epoch": found.kept},
        "pool": {"images": found.images, "path": cost.pool},
        "synthesis": asdict(cost),
        "distill": {"seconds": round(found.seconds, 3), "steps": len(found.history) * task.distillation.steps},
        "history": found.history,
    }
    shown = images(len(found.history) - 1).at(slice(found.images))  # a pool may have grown since they were used
    if rank() == 0:
        facts = {"top1": found.top1, "test_images": report["teacher"]["images"], "label_names": test_set.classes}
        save_student(student, teacher, output / "student", **facts)
        save_images(output / "images.png", shown, teacher)
        write_json(output / "report.json", report)
        write_transfer_page(output, report, None if synthesis is None else synthesis.course(found.images))
    return report


def _loader(task: TransferTask, model: LoadedModel, test_set: Dataset) -> DataLoader:
    """Batches of the test images, made ready for a model."""
    chosen, size = limited(test_set, task.data.val_limit), model.preprocessing.input_size
    return loader(chosen, task.data.val_batchsize, task.data.num_workers, size)


def _images(
    task: TransferTask, teacher: LoadedModel, student: LoadedModel | WholeStudent, device: torch.device, output: Path
) -> tuple[Callable[[int], SparseImages], Synthesis | None]:
    """The images that an epoch draws from, by its number, and what makes them where they are inverted."""
    if not isinstance(task.images, Inverted):
        fixed = images_at_hand(teacher, task.images, task.fixed_images, task.run.seed)
        return lambda epoch: fixed, None
    config, looked_at = task.images.config, student
    if isinstance(student, WholeStudent) and config.student is not None:
        raise UserError(f"--adv and --natural show a student the teacher's patches, which {student.name} has not")
    if config.needs("backbone") and task.student.init == "scratch":
        raise UserError("--natural looks with a backbone that has seen images; leave out --student_init scratch")
    if config.needs("student"):
        config = replace(config, student=_adversary(task))
    elif config.needs("backbone"):
        looked_at = backbone_of(student)
        config = replace(config, student=looked_at.fingerprint())
    source = replace(task.images, config=config)
    where = {
        "log": output / "synthesis.jsonl",
        "student": looked_at,
        "tensorboard": task.events,
        "eager": task.run.eager,
    }
    synthesis = Synthesis(teacher, source, device, **where)
    most = math.inf if task.max_images is None else task.max_images
    if task.minutes is not None:
        # Only when they are asked for: what a student cannot learn from is refused before.
        count = cache(lambda: synthesis.filled_for(60 * task.minutes, most))
        return lambda epoch: synthesis.first(count()), synthesis
    if task.images_per_epoch:
        return lambda epoch: synthesis.first(min((epoch + 1) * task.images_per_epoch, most)), synthesis
    return lambda epoch: synthesis.first(synthesis.made(most), add=False), synthesis


def _adversary(task: TransferTask) -> str:
    """What the images of the adversarial term depend on: the student, and all that it learns from before them."""
    elsewhere = ("datapool", "eval_every", "val_limit", "dataset")
    config = {key: value for key, value in task.settings().items() if key not in elsewhere}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
