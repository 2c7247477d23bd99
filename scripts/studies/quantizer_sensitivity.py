#!/usr/bin/env python3
"""Which activation quantizers cost the accuracy: top-1 with some left out, for each kind of calibration images."""

from __future__ import annotations

import copy
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from torch import nn

from models import SparseViT
from quant.insert import quantizers
from scripts.compare import Bench, cells_of, quant_grid_parser
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
    """A copy of `vit` without the activation quantizers whose names contain one of `parts`."""
    vit = copy.deepcopy(vit)
    for name in quantizers(vit):
        if any(part in name for part in parts):
            vit.set_submodule(name, nn.Identity())
    return vit


def main(argv: list[str] | None = None) -> list[dict]:
    """Calibrate once per method and seed, leave out, evaluate; print and write the means over seeds."""
    args, others = quant_grid_parser(__doc__, "./runs/sensitivity").parse_known_args(argv)
    cells = [cell for cell in cells_of(args, others) if cell.task.model.name == args.models[0]]
    output, bench = writable_folder(args.output, "--output"), Bench(cells[0].task)
    rows = []
    for width in dict.fromkeys(cell.width for cell in cells):
        models = bench.quantized([cell for cell in cells if cell.width == width])
        for label, parts in LEFT_OUT.items():
            row = {"left_out": label, "width": width}
            for method, seeds in models.items():
                changed = {str(seed): without(model, parts) for seed, model in enumerate(seeds)}
                row[method] = round(statistics.mean(r["top1"] for r in bench.evaluated(changed).values()), 2)
            rows.append(row)
    write_json(output / "sensitivity.json", rows)
    lines = [[row["left_out"], row["width"], *(f"{row[method]:.2f}" for method in models)] for row in rows]
    print(table(["left out", "width", *models], lines))
    return rows


if __name__ == "__main__":
    run_main(main)
