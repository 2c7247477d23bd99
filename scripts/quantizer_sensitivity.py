#!/usr/bin/env python3
"""Which activation quantizers cost the accuracy: top-1 with some left out, for each kind of calibration images."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch import nn

import test_quant
from models import DEFAULT_MODEL, SparseViT
from quant import evaluate, quantize
from quant.insert import quantizers
from scripts import compare
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
    """Calibrate once per method and seed, leave out, evaluate; print and write the means over seeds."""
    args, others = compare.parse_arguments(compare.grid_parser(__doc__, "./runs/sensitivity"), argv)
    output, name = writable_folder(args.output, "--output"), (args.models or [DEFAULT_MODEL])[0]
    bench = compare.Bench(name, test_quant.parser().parse_args([*others, "--model", name]))
    sources, run = bench.sources(args, others, output)
    rows = []
    for w_bit, a_bit in args.bits:
        config = test_quant.quant_config(run, w_bit, a_bit)
        for label, parts in LEFT_OUT.items():
            row = {"left_out": label, "w_bit": w_bit, "a_bit": a_bit}
            for kind, seeds in sources.items():
                models = {str(i): without(quantize(bench.vit, images, config), parts) for i, images in enumerate(seeds)}
                top1 = [result["top1"] for result in evaluate(models, bench.data, bench.device, quiet=True).values()]
                row[kind] = round(statistics.mean(top1), 2)
            rows.append(row)
    write_json(output / "sensitivity.json", rows)
    lines = [[r["left_out"], f"W{r['w_bit']}/A{r['a_bit']}", *(f"{r[k]:.2f}" for k in sources)] for r in rows]
    print(table(["left out", "width", *sources], lines))
    return rows


if __name__ == "__main__":
    run_main(main)
