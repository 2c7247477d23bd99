#!/usr/bin/env python3
"""Time steps of reconstruction, block by block, against plain autograd code.

Both run in this one process, in turns, on the same images; nothing else of the two differs.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.realpath(f"{__file__}/../../.."))

from utils.errors import exit_on_interrupt, run_main

exit_on_interrupt(__name__)

import contextlib
import statistics
import time
from unittest import mock

import torch
from torch import Tensor

from models import DEFAULT_MODEL, SparseImages, SparseViT, load_model
from quant import QuantConfig, quantize, reconstruction
from quant.quantizers import ActivationQuantizer
from quant.reconstruction import AdaptiveRounding, LearnedQuantizer, _coins
from utils.cli import Parser, positive
from utils.device import device_name, pick_device, versions
from utils.files import writable_folder, write_json
from utils.flags import add_device_arguments
from utils.report import markdown


def parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, metavar="NAME", help="as for test_quant.py")
    add("--model_path", metavar="PATH", help="as for test_quant.py")
    add("--random_weights", action="store_true", help="do not load weights: time does not depend on them")
    add("--w_bit", type=int, default=4, help="as for test_quant.py")
    add("--a_bit", type=int, default=4, help="as for test_quant.py")
    add("--reconstruct_loss", default="mse", help="as for test_quant.py")
    add("--images", type=positive, default=32, help="calibration images, whole ones")
    add("--steps", type=positive, default=10, help="steps a stage, of 8 images")
    add("--repeats", type=positive, default=3, help="timed runs of each, in turns, after one to warm up")
    add_device_arguments(parser)
    add("--output", default="./runs/bench", metavar="DIR", help="where the JSON goes")
    return parser


def plain_share(rounding: AdaptiveRounding) -> Tensor:
    """`AdaptiveRounding.share`, as its formula reads."""
    return (rounding.raised.sigmoid() * 1.2 - 0.1).clamp(0, 1)


def plain_undecided(rounding: AdaptiveRounding, power: float) -> Tensor:
    """`AdaptiveRounding.undecided`, as its formula reads."""
    return (1 - (2 * rounding.shared - 1).abs().pow(power)).sum()


def plain_quantizer(learned: LearnedQuantizer, x: Tensor) -> Tensor:
    """`LearnedQuantizer.forward`, as its formula reads."""
    quantizer, kept = learned.quantizer, _coins(x, learned.generator).bool()
    if not isinstance(quantizer, ActivationQuantizer):
        return torch.where(kept, x, x + (quantizer(x) - x).detach())
    scale, zero_point = quantizer.spread(learned.log_scale.exp()), quantizer.spread(quantizer.zero_point)
    level = (x / scale + zero_point).clamp(quantizer.low, quantizer.high)
    return torch.where(kept, x, (level + (level.round() - level).detach() - zero_point) * scale)


def plain_code() -> contextlib.ExitStack:
    """Reconstruction by torch's operators and autograd alone, and an optimizer of single operators."""
    stack, adam = contextlib.ExitStack(), torch.optim.Adam
    for owner, name, plain in (
        (AdaptiveRounding, "share", plain_share),
        (AdaptiveRounding, "undecided", plain_undecided),
        (LearnedQuantizer, "forward", plain_quantizer),
        (torch.optim, "Adam", lambda groups, fused: adam(groups)),
    ):
        stack.enter_context(mock.patch.object(owner, name, plain))
    return stack


def seconds_a_block(vit: SparseViT, images: SparseImages, config: QuantConfig) -> float:
    """Mean over the blocks of a reconstruction, with what the full-precision block gives, without what is in front."""
    seconds, learn = [], reconstruction._reconstruct_stage

    def timed(*args: object) -> None:
        start = time.perf_counter()
        learn(*args)  # rounding at its end waits for the device
        seconds.append(time.perf_counter() - start)

    with mock.patch.object(reconstruction, "_reconstruct_stage", timed):
        quantize(vit, images, config)
    return statistics.mean(seconds[1:-1])  # neither the embedding nor the classifier


def main(argv: list[str] | None = None) -> dict:
    """Time both, print a table, write JSON."""
    args = parser().parse_args(argv)
    device, output = pick_device(args.device, args.gpu), writable_folder(args.output, "--output")
    classes = 1000 if args.random_weights else None
    model = load_model(args.model, args.model_path, random_weights=args.random_weights, classes=classes)
    vit = model.sparse(device)
    pixels = torch.randn(args.images, vit.grid.channels, *vit.grid.image_size)
    images = SparseImages.whole(vit.grid, pixels, torch.zeros(args.images, dtype=torch.long))
    learning = {"reconstruct_steps": args.steps, "reconstruct_loss": args.reconstruct_loss}
    config = QuantConfig(args.w_bit, args.a_bit, "mse", reconstruct=True, **learning)
    contenders = {"plain code": plain_code, "here": contextlib.nullcontext}
    seconds = {name: [] for name in contenders}
    for number in range(args.repeats + 1):
        for name, way in contenders.items():
            with way():
                took = seconds_a_block(vit, images, config)
            if number:
                seconds[name].append(took)
    ratios = [plain / ours for plain, ours in zip(*seconds.values(), strict=True)]
    report = {
        "arguments": vars(args),
        "device": device_name(device),
        "seconds_a_block": seconds,
        "over_plain": ratios,
        "versions": versions(),
    }
    file = output / f"reconstruction-{args.model.rstrip('/').split('/')[-1]}-{device.type}.json"
    write_json(file, report)
    lines = []
    for name, each in seconds.items():
        median = statistics.median(each)
        over = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})" if name == "here" else ""
        lines.append([name, f"{median:.2f}", f"{args.steps / median:.3g}", over])
    print(markdown(["reconstruction", "seconds a block", "steps/s", "over plain"], lines))
    print(f"{report['device']}; {file}")
    return report


if __name__ == "__main__":
    run_main(main)
