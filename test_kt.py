#!/usr/bin/env python3
"""Teach a student what a Vision Transformer knows, without its data, and say how well it learnt."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from inversion import ImagePool, InversionConfig, SynthesisReport, synthesis_report, synthesize
from inversion.arguments import add_inversion_arguments, inversion_config
from kt import AUGMENTATIONS, Distiller, load_student, save_student
from kt.distill import OPTIMIZERS
from models import DEFAULT_MODEL, LoadedModel, SparseImages, load_model
from quant import evaluate
from test_quant import MODES, events_folder, noise_images, real_images, save_pictures
from utils.checkpoint import configuration, read_checkpoint, write_checkpoint
from utils.cli import Parser, add_common_arguments, natural, positive, rate
from utils.data import limited, load_split, loader
from utils.device import device_name, pick_dtype, seed_all, versions
from utils.errors import UserError, run_main
from utils.files import writable_folder, write_json
from utils.ranks import process_group, rank, rank_zero_first, wait_for_all
from utils.report import duration, table

# Flags that say where and how fast, not what: a run may go on with others.
NOT_CONFIGURATION = ("output", "device", "gpu", "num_workers", "val_batchsize", "epochs", "tensorboard")


def settings(args: argparse.Namespace, *without: str) -> dict:
    """What a run's numbers depend on; more epochs only add to them, but where they set a length of something else."""
    sets_length = args.kd_lr_schedule != "constant" or args.mode == 1
    return configuration(args, (*NOT_CONFIGURATION, *without)) | ({"epochs": args.epochs} if sets_length else {})


def parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, metavar="NAME", help="teacher: as for test_quant.py")
    add("--dataset", metavar="DIR", help="evaluation data; the bundled model needs none")
    add("--model_path", metavar="PATH", help="the teacher's weights, a file or a folder with NAME.pth")
    add("--datapool", default="./datapool", metavar="DIR", help="where inverted images are kept")
    add("--mode", type=int, choices=MODES, default=0, help="images to learn from: 0 inverted, 1 Gaussian noise, 2 real")
    add("--student", metavar="NAME", help="architecture of the student; default the teacher's")
    add("--student_path", metavar="PATH", help="backbone weights of the student, a file or a folder")
    add("--student_init", choices=("pretrained", "scratch"), default="pretrained", help="where its weights start")
    add("--finetune", choices=("linear", "full"), default="linear", help="what learns: the new head, or everything")
    add("--kr-batchsize", type=positive, default=32, help="images per distillation step")
    add(
        "--epoches", "--epochs", dest="epochs", type=positive, default=1000, help="rounds of synthesis and distillation"
    )
    add("--images_per_epoch", type=natural, default=100, help="images added to the pool each epoch; 0: only use it")
    add("--max_images", type=positive, help="images after which no more are added; default no limit")
    add("--inversion-batchsize", type=positive, default=100, help="images per inversion batch")
    add("--kd_steps", type=positive, default=1, help="distillation steps per epoch")
    add("--eval_every", type=positive, default=1, help="epochs between two evaluations")
    add("--optimizer", choices=OPTIMIZERS, default="sgd", help="of the student; sgd has momentum 0.9")
    add("--lr", type=rate, default=0.1, help="learning rate of the student")
    add("--kd_lr_schedule", choices=("constant", "cosine"), default="constant", help="of --lr, over all epochs")
    add("--temperature", type=rate, default=20.0, help="of the soft targets; logits are divided by it")
    add("--augment", nargs="*", choices=AUGMENTATIONS, default=["flip", "shift"], help="changes of the images")
    add("--tensorboard", action="store_true", help="write the course of the inversion to OUTPUT/tensorboard")
    add_inversion_arguments(parser)
    add_common_arguments(parser, seed=42, output="./runs/MODEL-kt-IMAGES-FINETUNE-sSEED")
    return parser


def main(argv: list[str] | None = None) -> dict:
    """Run the task and return the report."""
    args = parser().parse_args(argv)
    with process_group(args.device, args.gpu) as device:
        return run(args, device)


def run(args: argparse.Namespace, device: torch.device) -> dict:
    """The task on one rank."""
    dtype = pick_dtype(args.dtype, device)
    config = inversion_config(args, args.inversion_batchsize, dtype, adversary(args))
    seed_all(args.seed)
    teacher = load_model(args.model, args.model_path)
    images = config.strategy if args.mode == 0 else MODES[args.mode]
    name = f"{re.sub(r'.*/', '', args.model.rstrip('/'))}-kt-{images}-{args.finetune}-s{args.seed}"
    output = writable_folder(args.output or Path("runs", name), "--output")
    state = read_checkpoint(output, settings(args), made_by_run="student")
    transform = teacher.preprocessing.eval_transform()
    test_set = load_split("test", teacher.dataset, args.dataset, transform, teacher.classes)
    data = loader(limited(test_set, args.val_limit), args.val_batchsize, args.num_workers)
    student = load_student(teacher, args.student, args.student_path, args.student_init, args.finetune)
    source = image_source(teacher, student, config, args, device, output)
    distiller = Distiller(
        teacher,
        student,
        device,
        batch_size=args.kr_batchsize,
        temperature=args.temperature,
        optimizer=args.optimizer,
        lr=args.lr,
        decay_steps=args.epochs * args.kd_steps if args.kd_lr_schedule == "cosine" else None,
        augment=args.augment,
        seed=args.seed,
    )
    progress = train(distiller, source, data, args, output, state)
    distiller.student.load_state_dict(progress.best_weights)
    report = {
        "task": "kt",
        "model": teacher.name,
        "mode": args.mode,
        "images": images,
        "student_name": student.name,
        "finetune": args.finetune,
        "student_init": args.student_init,
        "seed": args.seed,
        "device": device_name(device),
        "dtype": config.dtype,
        "epochs": len(progress.history),
        "teacher": evaluate({"teacher": distiller.teacher}, data, device)["teacher"],
        "student": {"top1": progress.last_top1, "best_top1": progress.best_top1},
        "pool": {"images": progress.images, "path": source.path},
        "synthesis": source.report(progress.images),
        "distill": {"seconds": round(progress.seconds, 3), "steps": len(progress.history) * args.kd_steps},
        "history": progress.history,
        "versions": versions(),
    }
    shown = source.upto(0)
    if rank() == 0:
        facts = {"top1": progress.best_top1, "test_images": len(limited(test_set, args.val_limit))}
        save_student(student, teacher, output / "student", **facts)
        save_pictures(teacher, distiller.teacher, shown, output)
        write_json(output / "report.json", report)
    print_summary(report, output)
    return report


@dataclass
class Progress:
    """Where a run stands."""

    history: list[dict]
    best_top1: float
    best_weights: dict
    seconds: float
    images: int

    def evaluate(self, distiller: Distiller, data: DataLoader) -> None:
        """Let the student's accuracy stand beside the last epoch, and keep the student if it is the best."""
        top1 = evaluate({"student": distiller.student}, data, distiller.device, quiet=True)["student"]["top1"]
        self.history[-1]["top1"] = top1
        if top1 > self.best_top1:
            self.best_top1, self.best_weights = top1, distiller.weights()

    @property
    def last_top1(self) -> float:
        """Of the last evaluation."""
        return next(entry["top1"] for entry in reversed(self.history) if entry["top1"] is not None)


def train(
    distiller: Distiller,
    source: ImageSource,
    data: DataLoader,
    args: argparse.Namespace,
    output: Path,
    state: dict | None,
) -> Progress:
    """Epochs of synthesis and distillation, each ended by a checkpoint; goes on from `state`."""
    progress = Progress([], -1.0, {}, 0.0, 0)
    if state is not None:
        distiller.load_state_dict(state["distiller"])
        progress = Progress(**state["progress"])
        print(f"going on after epoch {len(progress.history)} of {args.epochs}")
    config = settings(args)
    epochs = range(len(progress.history), args.epochs)
    with tqdm(total=args.epochs, initial=len(progress.history), unit="epoch", disable=rank() > 0) as bar:
        for epoch in epochs:
            images = source.upto(epoch)
            start = time.perf_counter()
            loss = distiller.run(images, args.kd_steps)
            progress.seconds += time.perf_counter() - start
            progress.images = len(images)
            progress.history.append({"loss": round(loss, 5), "top1": None, "images": len(images)})
            if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
                progress.evaluate(distiller, data)
            if rank() == 0:
                state = {"distiller": distiller.state_dict(), "progress": vars(progress)}
                write_checkpoint(output, config, state)
            bar.set_postfix(loss=f"{loss:.4g}", best=f"{progress.best_top1:.2f}", images=len(images), refresh=False)
            bar.update()
    if not progress.best_weights:  # stopped before its first evaluation, and told to end there
        progress.evaluate(distiller, data)
    wait_for_all()
    return progress


class ImageSource:
    """The images that an epoch draws from: a pool that grows, or a fixed set of real images or noise."""

    path: str | None = None

    def __init__(self, images: SparseImages) -> None:
        self.images = images

    def upto(self, epoch: int) -> SparseImages:
        """What epoch number `epoch` (0-based) may use; what is not there yet is made."""
        return self.images

    def report(self, count: int) -> dict:
        """What the first `count` images cost."""
        return asdict(SynthesisReport(None, 0, 0, 0.0, [], 0, 0, None))


class PoolSource(ImageSource):
    """Inverted images; every epoch adds some."""

    def __init__(
        self, pool: ImagePool, student: LoadedModel, device: torch.device, args: argparse.Namespace, output: Path
    ) -> None:
        self.pool, self.per_epoch = pool, args.images_per_epoch
        self.most = math.inf if args.max_images is None else args.max_images
        where = {"device": device, "log": output / "synthesis.jsonl", "student": student}
        self.synthesized = partial(synthesize, pool, **where, quiet=True, tensorboard=events_folder(args, output))
        self.reported = partial(synthesis_report, pool, **where)
        self.path = str(pool.path)
        self.images: SparseImages | None = None

    def upto(self, epoch: int) -> SparseImages:
        size = self.pool.config.batch_size
        count = min((epoch + 1) * self.per_epoch if self.per_epoch else self.pool.batches() * size, self.most)
        have = 0 if self.images is None else len(self.images)
        if count == 0:
            raise UserError(f"{self.path} holds no images; raise --images_per_epoch above 0 or give another --datapool")
        if count > have:
            if self.per_epoch:
                self.synthesized(count)
            new = self.pool.read(count, first=have)
            self.images = new if self.images is None else joined(self.images, new)
        return self.images

    def report(self, count: int) -> dict:
        return asdict(self.reported(count))


def joined(first: SparseImages, second: SparseImages) -> SparseImages:
    """Both sets of images."""
    pairs = ((getattr(first, key), getattr(second, key)) for key in ("patches", "positions", "labels"))
    return SparseImages(*(torch.cat(pair) for pair in pairs))


def adversary(args: argparse.Namespace) -> str:
    """What the images of the adversarial term depend on: the student, and all that it learns from before them."""
    config = settings(args, "datapool", "eval_every", "val_limit", "dataset")
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def image_source(
    teacher: LoadedModel,
    student: LoadedModel,
    config: InversionConfig,
    args: argparse.Namespace,
    device: torch.device,
    output: Path,
) -> ImageSource:
    """The images that `--mode` asks for."""
    if args.mode == 0:
        with rank_zero_first():
            pool = ImagePool(args.datapool, teacher, config)
        return PoolSource(pool, student, device, args, output)
    if args.mode == 1:
        count = args.max_images or args.epochs * args.images_per_epoch
        if not count:
            raise UserError("--mode 1 --images_per_epoch 0 asks for no images; give --max_images")
        return ImageSource(noise_images(teacher, count, args.seed))
    return ImageSource(real_images(teacher, args.dataset, args.max_images, args.seed))


def print_summary(report: dict, output: Path) -> None:
    """The final table."""
    rows = [
        ["teacher", f"{report['teacher']['top1']:.2f}"],
        ["student, best", f"{report['student']['best_top1']:.2f}"],
        ["student, last", f"{report['student']['top1']:.2f}"],
    ]
    print(
        f"\n{report['model']}, {report['pool']['images']} {report['images']} images, {report['finetune']} fine-tuning"
    )
    print(table(["model", "top-1 %"], rows))
    print(
        f"synthesis: {duration(report['synthesis']['seconds'])}, distillation: {duration(report['distill']['seconds'])}"
    )
    print(f"report, pictures and student: {output}")


if __name__ == "__main__":
    run_main(main)
