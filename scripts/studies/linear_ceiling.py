#!/usr/bin/env python3
"""What a linear head could learn at best from each kind of images, without training: least squares.

The teacher's logits are fitted by the frozen student's features, and the fitted head is evaluated on the test images.
Real images are fitted whole, and with few of their patches, chosen by attention or at random: what is lost there is
lost to the missing patches, not to the inversion.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from kt import AUGMENTATIONS, augmented, load_student
from kt.augment import drawn
from models import LoadedModel, SparseImages, SparseViT, load_model
from utils.cli import Parser, natural, positive
from utils.data import evaluation_loader
from utils.device import pick_device
from utils.errors import UserError, run_main
from utils.files import writable_folder, write_json
from utils.flags import transfer_parser, transfer_task
from utils.images import Inverted, Noise, Real, calibration_images
from utils.report import table
from utils.transfer_task import TransferTask

RIDGE = 1e-2
"""Ridge penalty, as a share of the features' mean variance."""


def parser() -> Parser:
    """The flags that are not for test_kt.py."""
    parser = Parser(__doc__ + " Every other flag goes to test_kt.py.")
    add = parser.add_argument
    add("--images", type=positive, default=400, help="images of each kind")
    add("--samples", type=positive, default=3000, help="changed images that the head is fitted to, with --augment")
    add("--augment", nargs="*", choices=AUGMENTATIONS, default=[], help="changes of the images")
    add("--kept", type=natural, nargs="*", default=[14, 21, 30], help="patches kept of real images")
    add("--output", metavar="DIR", default="./runs/linear_ceiling", help="where the table goes")
    return parser


def kept_parts(images: SparseImages, scores: Tensor, count: int) -> SparseImages:
    """The `count` patches of each image with the highest scores (B, n)."""
    chosen = scores.topk(count, dim=1).indices.sort(dim=1).values
    rows = torch.arange(len(chosen))[:, None]
    return SparseImages(images.patches[rows, chosen], images.positions[rows, chosen], images.labels)


@torch.inference_mode()
def logits_of(vit: SparseViT, images: SparseImages) -> Tensor:
    """Logits (or what stands in for them) of all images, on the CPU."""
    batches = (vit(b.patches.to(vit.device), b.positions.to(vit.device)) for b in images.batches(200))
    return torch.cat([batch.logits.float().cpu() for batch in batches])


@torch.inference_mode()
def attention_to(vit: SparseViT, images: SparseImages) -> Tensor:
    """The class token's attention to every patch of all images, on the CPU."""
    batches = (vit.class_attention(b.patches.to(vit.device), b.positions.to(vit.device)) for b in images.batches(200))
    return torch.cat([batch.float().cpu() for batch in batches])


def fitted_head(features: Tensor, logits: Tensor) -> nn.Linear:
    """Ridge regression of centred logits (B, classes) on features (B, dim), as the limit of high temperatures is."""
    features, logits = features.double(), logits.double()
    logits = logits - logits.mean(dim=1, keepdim=True)
    centre, target = features.mean(dim=0), logits.mean(dim=0)
    x, z = features - centre, logits - target
    covariance = x.t() @ x / len(x)
    covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
    weight = torch.linalg.solve(covariance, x.t() @ z / len(x)).t()
    head = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(target - weight @ centre)
    return head


def kinds(
    teacher: LoadedModel, vit: SparseViT, task: TransferTask, count: int, kept: Sequence[int]
) -> Iterator[tuple[str, SparseImages]]:
    """Every kind of images, `count` of each, one after another; real ones also with so many `kept` patches."""
    seed = task.run.seed
    real = calibration_images(teacher, Real(task.data.dataset), count, seed)
    yield "real", real
    attention, generator = attention_to(vit, real), torch.Generator().manual_seed(seed)
    for patches in kept:
        yield f"real, {patches} patches by attention", kept_parts(real, attention, patches)
        anything = torch.rand(attention.shape, generator=generator)
        yield f"real, {patches} patches at random", kept_parts(real, anything, patches)
    yield "Gaussian", calibration_images(teacher, Noise(), count, seed)
    yield task.images.kind, calibration_images(teacher, task.images, count, device=vit.device)


def main(argv: list[str] | None = None) -> list[dict]:
    """Fit a head to each kind; print and write the accuracies."""
    args, others = parser().parse_known_args(argv)
    task = transfer_task(transfer_parser("").parse_args(others))
    if not isinstance(task.images, Inverted):
        raise UserError("real images and noise are there in any case; leave out --mode")
    output, device = writable_folder(args.output, "--output"), pick_device(task.run.device, task.run.gpu)
    teacher = load_model(task.model.name, task.model.path)
    student = load_student(teacher, task.student)
    student.vit.head = nn.Identity()
    vit, features = (model.sparse(device) for model in (teacher, student))
    parts = [SparseImages.whole(vit.grid, images, labels) for images, labels in evaluation_loader(teacher, task.data)]
    labels = torch.cat([part.labels for part in parts])
    test_features, test_logits = (torch.cat([logits_of(m, part) for part in parts]) for m in (features, vit))
    rows = [{"images": "teacher", "teacher_top1": top1(test_logits, labels), "top1": None}]
    for name, images in kinds(teacher, vit, task, args.images, args.kept):
        generator = torch.Generator().manual_seed(task.run.seed)
        if args.augment:
            images = augmented(drawn(images, args.samples, generator), vit.grid, args.augment, generator)
        logits = logits_of(vit, images)
        head = fitted_head(logits_of(features, images), logits)
        with torch.inference_mode():
            accuracy = top1(head(test_features), labels)
        sure = None if name == "Gaussian" else top1(logits, images.labels)
        rows.append({"images": name, "teacher_top1": sure, "top1": accuracy})
    write_json(output / "linear_ceiling.json", rows)
    shown = [["-" if value is None else value for value in row.values()] for row in rows]
    print(table(["images", "teacher's top-1 on them %", "fitted head's top-1 %"], shown))
    return rows


def top1(logits: Tensor, labels: Tensor) -> float:
    """Accuracy in per cent."""
    return round(100 * (logits.argmax(dim=1) == labels).float().mean().item(), 2)


if __name__ == "__main__":
    run_main(main)
