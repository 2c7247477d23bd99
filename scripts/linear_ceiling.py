#!/usr/bin/env python3
"""What a linear head could learn at best from each kind of images, without training: least squares.

The teacher's logits are fitted by the frozen student's features, and the fitted head is evaluated on the test images.
Real images are fitted whole, and with few of their patches, chosen by attention or at random: what is lost there is
lost to the missing patches, not to the inversion.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from inversion import ImagePool, synthesize
from inversion.arguments import add_inversion_arguments, inversion_config
from kt import AUGMENTATIONS, augmented, load_student
from kt.augment import drawn
from models import DEFAULT_MODEL, LoadedModel, SparseImages, SparseViT, load_model
from test_quant import noise_images, real_images
from utils.cli import Parser, add_common_arguments, natural, positive
from utils.data import limited, load_split, loader
from utils.device import pick_device, pick_dtype
from utils.errors import run_main
from utils.files import writable_folder, write_json
from utils.report import table

RIDGE = 1e-2
"""Ridge penalty, as a share of the features' mean variance."""


def parser() -> Parser:
    """The command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, metavar="NAME", help="teacher: as for test_kt.py")
    add("--model_path", metavar="PATH", help="the teacher's weights")
    add("--dataset", metavar="DIR", help="evaluation data; the bundled model needs none")
    add("--datapool", default="./datapool", metavar="DIR", help="where inverted images are kept")
    add("--student", metavar="NAME", help="architecture of the student; default the teacher's")
    add("--student_path", metavar="PATH", help="backbone weights of the student")
    add("--images", type=positive, default=400, help="images of each kind")
    add("--inversion-batchsize", type=positive, default=100, help="images per inversion batch")
    add("--samples", type=positive, default=3000, help="changed images that the head is fitted to, with --augment")
    add("--augment", nargs="*", choices=AUGMENTATIONS, default=[], help="changes of the images")
    add("--kept", type=natural, nargs="*", default=[14, 21, 30], help="patches kept of real images")
    add_inversion_arguments(parser)
    add_common_arguments(parser, seed=42, output="./runs/linear_ceiling")
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


def kinds(teacher: LoadedModel, vit: SparseViT, args, output: Path) -> Iterator[tuple[str, SparseImages]]:
    """Every kind of images, one after another."""
    real = real_images(teacher, args.dataset, args.images, args.seed)
    yield "real", real
    attention = attention_to(vit, real)
    generator = torch.Generator().manual_seed(args.seed)
    for count in args.kept:
        yield f"real, {count} patches by attention", kept_parts(real, attention, count)
        yield (
            f"real, {count} patches at random",
            kept_parts(real, torch.rand(attention.shape, generator=generator), count),
        )
    yield "Gaussian", noise_images(teacher, args.images, args.seed)
    device = pick_device(args.device, args.gpu)
    config = inversion_config(args, args.inversion_batchsize, pick_dtype(args.dtype, device))
    pool = ImagePool(args.datapool, teacher, config)
    synthesize(pool, args.images, device, output / "synthesis.jsonl")
    yield config.strategy, pool.read(args.images)


def main(argv: list[str] | None = None) -> list[dict]:
    """Fit a head to each kind; print and write the accuracies."""
    args = parser().parse_args(argv)
    output = writable_folder(args.output or "runs/linear_ceiling", "--output")
    device = pick_device(args.device, args.gpu)
    teacher = load_model(args.model, args.model_path)
    student = load_student(teacher, args.student, args.student_path, "pretrained", "linear")
    student.vit.head = nn.Identity()
    test_set = load_split(
        "test", teacher.dataset, args.dataset, teacher.preprocessing.eval_transform(), teacher.classes
    )
    data = loader(limited(test_set, args.val_limit), args.val_batchsize, args.num_workers)
    vit, features = (SparseViT(model.vit.eval()).to(device) for model in (teacher, student))
    parts = [SparseImages.whole(vit.grid, images, labels) for images, labels in data]
    labels = torch.cat([part.labels for part in parts])
    test_features, test_logits = (torch.cat([logits_of(m, part) for part in parts]) for m in (features, vit))
    rows = [{"images": "teacher", "teacher_top1": top1(test_logits, labels), "top1": None}]
    for name, images in kinds(teacher, vit, args, output):
        generator = torch.Generator().manual_seed(args.seed)
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
