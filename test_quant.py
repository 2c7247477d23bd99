#!/usr/bin/env python3
"""Quantize a Vision Transformer without its data, and say how accurate it still is."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch

from inversion import ImagePool, InversionConfig, SynthesisReport, synthesize
from inversion.arguments import add_inversion_arguments, inversion_config
from inversion.events import require_tensorboard
from models import DEFAULT_MODEL, LoadedModel, SparseImages, SparseViT, load_model
from quant import OBSERVERS, QuantConfig, evaluate, export, fitting, quantize, require_own_folder, save_quantized
from quant.sensitivity import save_sensitivity, sensitivity
from utils.cli import Parser, add_common_arguments, positive, rate
from utils.data import limited, load_split, loader, random_subset
from utils.device import device_name, physical_memory_bytes, pick_dtype, seed_all, versions
from utils.errors import UserError, run_main
from utils.files import writable_folder, write_json
from utils.pictures import save_image_grid, save_loss_curve
from utils.ranks import process_group, rank, rank_zero_first
from utils.report import duration, table

AGREEMENT = 99.5
"""Share of images, in per cent, that an exported file should put in the class that the simulated model does."""
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
    add_quantization_arguments(parser)
    add("--calib-batchsize", type=positive, default=32, help="images per inversion and calibration batch")
    add("--num_images", type=positive, help="calibration images; default one batch")
    add("--tensorboard", action="store_true", help="write the course of the inversion to OUTPUT/tensorboard")
    add_inversion_arguments(parser)
    add_common_arguments(parser, seed=0, output="./runs/MODEL-CALIBRATION-wWaA-sSEED")
    return parser


def add_quantization_arguments(parser: Parser) -> None:
    """How ranges are chosen, what is done about the error, and what becomes of the quantized model."""
    add = parser.add_argument
    add(
        "--observer",
        choices=(*OBSERVERS, "auto"),
        default="minmax",
        help="how ranges are chosen; minmax quantizes residual sums, scores and embeddings too, as published, the "
        "others the factors of matrix products alone; auto: repq below 8 bits of activations, else mse",
    )
    add(
        "--fill",
        action="store_true",
        help="calibrate on full grids: the places of stopped patches get copies of the nearest kept one of their image",
    )
    add("--keep", metavar="PARTS", help="first,last,head or parts of layers' names: these get at least 8 bits")
    add("--bias_correction", action="store_true", help="shift biases until every layer's mean output is as it was")
    add("--reconstruct", action="store_true", help="learn rounding and ranges, block by block, on the images")
    add("--reconstruct_steps", type=positive, default=QuantConfig.reconstruct_steps, help="steps for each block")
    add("--reconstruct_seconds", type=rate, metavar="S", help="time limit of the reconstruction in s; default none")
    add("--sensitivity", action="store_true", help="measure what each layer alone costs; OUTPUT/sensitivity.json, .png")
    add("--export", metavar="FILE.onnx", help="write the quantized model for ONNX Runtime, check and time it there")
    add("--save", metavar="DIR", help="write the quantized model, to be read by quant.load_quantized(DIR)")


def quant_config(args: argparse.Namespace, w_bit: int | None = None, a_bit: int | None = None) -> QuantConfig:
    """What the flags ask for, at other widths if they are given."""
    return QuantConfig(
        w_bit=args.w_bit if w_bit is None else w_bit,
        a_bit=args.a_bit if a_bit is None else a_bit,
        observer=args.observer,
        fill=args.fill,
        keep=tuple(part.strip() for part in args.keep.split(",")) if args.keep is not None else (),
        bias_correction=args.bias_correction,
        reconstruct=args.reconstruct,
        reconstruct_steps=args.reconstruct_steps,
        reconstruct_seconds=args.reconstruct_seconds,
        batch_size=args.calib_batchsize,
        seed=args.seed,
    )


def main(argv: list[str] | None = None) -> dict:
    """Run the task and return the report."""
    args = parser().parse_args(argv)
    quant_config(args)  # what cannot go together is refused first
    with process_group(args.device, args.gpu) as device:
        return run(args, device)


def run(args: argparse.Namespace, device: torch.device) -> dict:
    """The task on one rank."""
    config = inversion_config(args, args.calib_batchsize, pick_dtype(args.dtype, device))
    count = args.num_images or args.calib_batchsize
    seed_all(args.seed)
    model = load_model(args.model, args.model_path)
    how = fitting(SparseViT(model.vit), quant_config(args))
    calibration = config.strategy if args.mode == 0 else MODES[args.mode]
    name = f"{model.name.rstrip('/').split('/')[-1]}-{calibration}-w{args.w_bit}a{args.a_bit}-s{args.seed}"
    output = writable_folder(args.output or Path("runs", name), "--output")
    check_outcome(args, how, model)
    test_set = load_split("test", model.dataset, args.dataset, model.preprocessing.eval_transform(), model.classes)

    images, synthesis = calibration_images(model, config, args, count, device, output)
    vit = SparseViT(model.vit).to(device)
    start = time.perf_counter()
    quantized = quantize(vit, images, how)
    calibration_seconds = time.perf_counter() - start
    models = {"fp": vit, "quant": quantized}
    with rank_zero_first():
        if args.save and rank() == 0:
            save_quantized(args.save, quantized, model, how, test_set.classes)
        if args.export:
            models["export"] = export.OnnxModel(exported(args, quantized, model, how, test_set.classes))
    data = loader(limited(test_set, args.val_limit), args.val_batchsize, args.num_workers)
    accuracy = evaluate(models, data, device, agreement_with="quant" if args.export else None)

    report = {
        "task": "quant",
        "model": model.name,
        "mode": args.mode,
        "calibration": calibration,
        "w_bit": args.w_bit,
        "a_bit": args.a_bit,
        "quantization": {**asdict(quant_config(args)), "method": how.method},
        "seed": args.seed,
        "device": device_name(device),
        "dtype": config.dtype,
        **accuracy,
        "inversion": asdict(synthesis),
        "calibration_images": len(images),
        "calibration_seconds": round(calibration_seconds, 3),
        "versions": versions(),
    }
    if args.sensitivity:
        report["sensitivity"] = sensitivity(vit, images, how)
    if rank() == 0:
        save_pictures(model, vit, images, output)
        if args.export:
            report["export"] |= export_report(args, report, vit, model)
        if args.sensitivity:
            write_json(output / "sensitivity.json", report["sensitivity"])
            save_sensitivity(output / "sensitivity.png", report["sensitivity"])
        write_json(output / "report.json", report)
    print_summary(report, output)
    return report


def check_outcome(args: argparse.Namespace, config: QuantConfig, model: LoadedModel) -> None:
    """Raise `UserError`, before anything is computed, for a model that cannot be quantized, saved or exported so."""
    if args.sensitivity and config.w_bit == config.a_bit == 32:
        raise UserError("--sensitivity needs something quantized, and --w_bit 32 --a_bit 32 leaves all alone")
    if args.save:
        require_own_folder(args.save)
    if args.export:
        export.require_export(args.export, model)


def exported(args: argparse.Namespace, quantized: SparseViT, model: LoadedModel, config: QuantConfig, classes) -> Path:
    """The ONNX file, written by rank 0."""
    path = Path(args.export).expanduser()
    return export.export(path, quantized, model, config, classes) if rank() == 0 else path


def export_report(args: argparse.Namespace, report: dict, vit: SparseViT, model: LoadedModel) -> dict:
    """What is said about the ONNX file besides its accuracy."""
    path = Path(args.export).expanduser()
    difference = round(report["export"]["top1"] - report["quant"]["top1"], 3)
    return {"file": str(path), "top1_difference": difference, **export.speed(path, vit, model)}


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
    _require_memory(count, model)
    noise = torch.randn(count, *model.preprocessing.input_size, generator=torch.Generator().manual_seed(seed))
    return SparseImages.whole(SparseViT(model.vit).grid, noise, torch.zeros(count, dtype=torch.long))


def real_images(model: LoadedModel, dataset: str | None, count: int | None, seed: int) -> SparseImages:
    """`count` images of the training split, drawn with `seed`; all of them if None."""
    train_set = load_split("train", model.dataset, dataset, model.preprocessing.eval_transform(), model.classes)
    chosen = random_subset(train_set, count or len(train_set), seed)
    _require_memory(len(chosen), model)
    real, labels = zip(*chosen, strict=True)
    return SparseImages.whole(SparseViT(model.vit).grid, torch.stack(real), torch.tensor(labels))


def _require_memory(count: int, model: LoadedModel) -> None:
    """Raise `UserError` where whole images, held in float32 once as they come and once as patches, find no room."""
    needed, there = 2 * 4 * count * math.prod(model.preprocessing.input_size), physical_memory_bytes()
    if needed > there:
        raise UserError(
            f"{count:,} images of this size need {needed / 1e9:.0f} GB of memory, this machine has {there / 1e9:.0f}; "
            "ask for fewer (--num_images, --max_images)"
        )


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
    if "export" in report:
        rows.append(
            [
                "ONNX file",
                *(f"{report['export'][key]:.2f}" for key in ("top1", "top5")),
                f"{report['export']['loss']:.4f}",
            ]
        )
    print(f"\n{report['model']}, {report['calibration_images']} {report['calibration']} calibration images")
    print(table(["model", "top-1 %", "top-5 %", "loss"], rows))
    if report["mode"] == 0:
        print(f"inversion: {duration(report['inversion']['seconds'])}, images in {report['inversion']['pool']}")
    if "export" in report:
        print_export(report["export"])
    if "sensitivity" in report:
        shown = report["sensitivity"][:10]
        lines = [[r["layer"], r["w_bit"] or "-", r["a_bit"], f"{r['divergence']:.5f}", r["changed"]] for r in shown]
        print("quantized alone, the ten that cost most (all in sensitivity.json):")
        print(table(["layer", "W", "A", "divergence", "changed %"], lines))
    print(f"report and pictures: {output}")


def print_export(found: dict) -> None:
    """What an exported file is like."""
    print(f"{found['file']}: {found['bytes'] / 1e6:.2f} MB, {found['size_ratio']:.3f}x of float32", end="; ")
    print(f"{found['agreement']:.2f}% of the images are classified as by the simulated model")
    if found["agreement"] < AGREEMENT:
        print(f"warning: below {AGREEMENT}%; at few bits values on rounding boundaries fall either way, see the top-1")
    columns = [("ONNX file", "quantized"), ("ONNX file, float32", "float32"), ("PyTorch, float32", "pytorch")]
    lines = [[label, f"{found['latency_ms'][key]:.2f}", f"{found['throughput'][key]:.1f}"] for label, key in columns]
    print(table([f"{found['threads']} threads", "ms, batch 1", "images/s, batch 32"], lines))


if __name__ == "__main__":
    run_main(main)
