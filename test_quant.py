#!/usr/bin/env python3
"""Quantize a Vision Transformer without its data, and say how accurate it still is."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path

import torch

from inversion import ImagePool, InversionConfig, SynthesisReport, synthesize
from inversion.arguments import add_inversion_arguments, inversion_config
from inversion.events import require_tensorboard
from models import DEFAULT_MODEL, LoadedModel, SparseImages, SparseViT, load_model
from quant import calibrate, check_bits, evaluate
from utils.cli import Parser, add_common_arguments, positive
from utils.data import limited, load_split, loader, random_subset
from utils.device import device_name, pick_dtype, seed_all, versions
from utils.errors import run_main
from utils.files import writable_folder, write_json
from utils.pictures import save_image_grid, save_loss_curve
from utils.ranks import process_group, rank
from utils.report import duration, table

MODES = {0: "inverted", 1: "gaussian", 2: "real"}


def parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME",
        help="a named DeiT, a timm ViT, hf-hub:ORG/NAME, local-dir:DIR",
    )
    add(
        "--dataset",
        metavar="DIR",
        help="evaluation data: image folder, ImageNet or CIFAR; the bundled model needs none",
    )
    add("--model_path", metavar="PATH", help="local weights, a file or a folder with NAME.pth, instead of the hub's")
    add("--datapool", default="./datapool", metavar="DIR", help="where inverted images are kept")
    add("--mode", type=int, choices=MODES, default=0, help="calibration images: 0 inverted, 1 Gaussian noise, 2 real")
    add("--w_bit", type=int, default=8, help="bits of the weights, 2 to 8; 32 leaves them alone")
    add("--a_bit", type=int, default=8, help="bits of the activations, 2 to 8; 32 leaves them alone")
    add("--calib-batchsize", type=positive, default=32, help="images per inversion and calibration batch")
    add("--num_images", type=positive, help="calibration images; default one batch")
    add("--tensorboard", action="store_true", help="write the course of the inversion to OUTPUT/tensorboard")
    add_inversion_arguments(parser)
    add_common_arguments(parser, seed=0, output="./runs/MODEL-CALIBRATION-wWaA-sSEED")
    return parser


def main(argv: list[str] | None = None) -> dict:
    """Run the task and return the report."""
    args = parser().parse_args(argv)
    check_bits(args.w_bit, args.a_bit)
    with process_group(args.device, args.gpu) as device:
        return run(args, device)


def run(args: argparse.Namespace, device: torch.device) -> dict:
    """The task on one rank."""
    config = inversion_config(args, args.calib_batchsize, pick_dtype(args.dtype, device))
    count = args.num_images or args.calib_batchsize
    seed_all(args.seed)
    model = load_model(args.model, args.model_path)
    calibration = config.strategy if args.mode == 0 else MODES[args.mode]
    name = f"{model.name.rstrip('/').split('/')[-1]}-{calibration}-w{args.w_bit}a{args.a_bit}-s{args.seed}"
    output = writable_folder(args.output or Path("runs", name), "--output")
    test_set = load_split("test", model.dataset, args.dataset, model.preprocessing.eval_transform(), model.classes)

    images, synthesis = calibration_images(model, config, args, count, device, output)
    vit = SparseViT(model.vit).to(device)
    start = time.perf_counter()
    quantized = calibrate(vit, images, args.w_bit, args.a_bit, batch_size=args.calib_batchsize)
    calibration_seconds = time.perf_counter() - start
    data = loader(limited(test_set, args.val_limit), args.val_batchsize, args.num_workers)
    accuracy = evaluate({"fp": vit, "quant": quantized}, data, device)

    report = {
        "task": "quant",
        "model": model.name,
        "mode": args.mode,
        "calibration": calibration,
        "w_bit": args.w_bit,
        "a_bit": args.a_bit,
        "seed": args.seed,
        "device": device_name(device),
        "dtype": config.dtype,
        **accuracy,
        "inversion": asdict(synthesis),
        "calibration_images": len(images),
        "calibration_seconds": round(calibration_seconds, 3),
        "versions": versions(),
    }
    if rank() == 0:
        save_pictures(model, vit, images, output)
        write_json(output / "report.json", report)
    print_summary(report, output)
    return report


def calibration_images(
    model: LoadedModel, config: InversionConfig, args, count: int, device: torch.device, output: Path
) -> tuple[SparseImages, SynthesisReport]:
    """The images that `--mode` asks for, and what synthesizing them cost (nothing for noise and real images)."""
    if args.mode == 0:
        pool = ImagePool(args.datapool, model, config)
        report = synthesize(pool, count, device, output / "synthesis.jsonl", tensorboard=events_folder(args, output))
        stages = config.strategy_object().stages(config.iterations, pool.grid.count)
        if rank() == 0:
            starts, patches = [stage.start for stage in stages], [stage.patches for stage in stages]
            save_loss_curve(output / "loss.png", pool.losses(count), starts, patches)
        return pool.read(count), report
    free = SynthesisReport(None, 0, 0, 0.0, [], 0, 0, None)
    if args.mode == 1:
        return noise_images(model, count, args.seed), free
    return real_images(model, args.dataset, count, args.seed), free


def events_folder(args: argparse.Namespace, output: Path) -> Path | None:
    """Where TensorBoard's files go, None if nobody asked. Raises `UserError` where its writer is missing."""
    if not getattr(args, "tensorboard", False):
        return None
    require_tensorboard()
    return output / "tensorboard"


def noise_images(model: LoadedModel, count: int, seed: int) -> SparseImages:
    """`count` images of standard normal pixels; their labels mean nothing."""
    noise = torch.randn(count, *model.preprocessing.input_size, generator=torch.Generator().manual_seed(seed))
    return SparseImages.whole(SparseViT(model.vit).grid, noise, torch.zeros(count, dtype=torch.long))


def real_images(model: LoadedModel, dataset: str | None, count: int | None, seed: int) -> SparseImages:
    """`count` images of the training split, drawn with `seed`; all of them if None."""
    train_set = load_split("train", model.dataset, dataset, model.preprocessing.eval_transform(), model.classes)
    real, labels = zip(*random_subset(train_set, count or len(train_set), seed), strict=True)
    return SparseImages.whole(SparseViT(model.vit).grid, torch.stack(real), torch.tensor(labels))


def save_pictures(model: LoadedModel, vit: SparseViT, images: SparseImages, output: Path) -> None:
    """`images.png`: up to 64 calibration images, stopped patches black."""
    shown = images.batches(64)[0]
    pixels = model.preprocessing.denormalize(shown.patches).clamp(0, 1)
    save_image_grid(output / "images.png", vit.grid.unpatchify(pixels, shown.positions))


def print_summary(report: dict, output: Path) -> None:
    """The final table."""
    rows = [
        [label, f"{report[key]['top1']:.2f}", f"{report[key]['top5']:.2f}", f"{report[key]['loss']:.4f}"]
        for key, label in (("fp", "full precision"), ("quant", f"W{report['w_bit']}/A{report['a_bit']}"))
    ]
    print(f"\n{report['model']}, {report['calibration_images']} {report['calibration']} calibration images")
    print(table(["model", "top-1 %", "top-5 %", "loss"], rows))
    if report["mode"] == 0:
        print(f"inversion: {duration(report['inversion']['seconds'])}, images in {report['inversion']['pool']}")
    print(f"report and pictures: {output}")


if __name__ == "__main__":
    run_main(main)
