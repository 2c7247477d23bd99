#!/usr/bin/env python3
"""Which activation quantizers cost the accuracy: top-1 with some left out, for each kind of calibration images."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from torch import nn

from models import SparseImages, SparseViT, load_model
from quant import calibrate, evaluate
from quant.insert import quantizers
from scripts import compare
from test_quant import calibration_images
from utils.data import limited, load_split, loader
from utils.device import pick_device, pick_dtype
from utils.errors import run_main
from utils.files import writable_folder, write_json
from utils.report import table

# What is left out -> parts of the quantizers' names.
LEFT_OUT = {
    "nothing": [],
    "all but inputs of linear layers": ["tap_"],
    "patch projection input": ["patch_proj"],
    "embeddings": ["tap_embed"],
    "qkv input": [".qkv."],
    "q, k, v": ["tap_q", "tap_k", "tap_v"],
    "attention scores": ["tap_scores"],
    "projection input": [".proj."],
    "residual sums": ["tap_attn_sum", "tap_mlp_sum"],
    "fc1 input": [".fc1."],
    "fc2 input": [".fc2."],
    "head input": ["head."],
    "every activation": [""],
}


def without(vit: SparseViT, parts: list[str]) -> SparseViT:
    """`vit` with the activation quantizers removed whose names contain one of `parts`."""
    for name in quantizers(vit):
        if any(part in name for part in parts):
            vit.set_submodule(name, nn.Identity())
    return vit


def main(argv: list[str] | None = None) -> list[dict]:
    """Calibrate once per kind and seed, leave out, evaluate; print and write the means over seeds."""
    args = compare.parser().parse_args(argv)
    device = pick_device(args.device, args.gpu)
    output = writable_folder(args.output or "runs/sensitivity", "--output")
    model = load_model(args.model, args.model_path)
    test_set = load_split("test", model.dataset, args.dataset, model.preprocessing.eval_transform(), model.classes)
    data = loader(limited(test_set, args.val_limit), args.val_batchsize, args.num_workers)
    vit = SparseViT(model.vit).to(device)
    sources: dict[str, list[SparseImages]] = {kind: [] for kind in args.calibrations}
    for kind, images in sources.items():
        for seed in args.seeds:
            args.seed, args.mode = seed, compare.MODE_OF[kind]
            config = compare.config_of(kind, args, pick_dtype(args.dtype, device))
            count = args.num_images or args.calib_batchsize
            folder = writable_folder(output / f"{kind}-s{args.seed}", "--output")
            images.append(calibration_images(model, config, args, count, device, folder)[0])
    rows = []
    for w_bit, a_bit in args.bits:
        for label, parts in LEFT_OUT.items():
            row = {"left_out": label, "w_bit": w_bit, "a_bit": a_bit}
            for kind, seeds in sources.items():
                models = {
                    str(i): without(calibrate(vit, images, w_bit, a_bit), parts) for i, images in enumerate(seeds)
                }
                top1 = [result["top1"] for result in evaluate(models, data, device, quiet=True).values()]
                row[kind] = round(statistics.mean(top1), 2)
            rows.append(row)
    write_json(output / "sensitivity.json", rows)
    header = ["left out", "width", *sources]
    print(
        table(
            header, [[r["left_out"], f"W{r['w_bit']}/A{r['a_bit']}", *(f"{r[k]:.2f}" for k in sources)] for r in rows]
        )
    )
    return rows


if __name__ == "__main__":
    run_main(main)
