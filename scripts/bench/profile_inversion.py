#!/usr/bin/env python3
"""Where an iteration of the engine spends its time, and what each way of making it faster gives on this machine.

Prints the operators of one iteration by time, then the iteration with one way left out at a time, alternating.
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
from collections.abc import Iterator
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from inversion import InversionConfig
from inversion.canvas import draw_jitters
from models import DEFAULT_MODEL, LoadedModel, load_model
from scripts.bench.bench_inversion import Engine, random_positions, warm_up
from utils.cli import Parser, positive
from utils.device import device_name, pick_device
from utils.flags import add_device_arguments, add_inversion_arguments, inversion_config
from utils.report import table

CPU_ONLY = ("packed blocks", "written-out attention")


@contextlib.contextmanager
def left_out(way: str | None) -> Iterator[None]:
    """The engine without one of the ways; all are in use for None."""
    patches = {
        "packed blocks": patch("models.packed.pack_blocks", lambda vit, dtype: None),
        "written-out attention": patch("models.blocks.attention", _stock_attention),
        "folded last block": patch("models.blocks.SparseBlock._folds", lambda block: False),
        "CUDA graph": patch("inversion.capture.EAGER_STEPS", 10**9),
    }
    with contextlib.ExitStack() as stack:
        if way is not None:
            stack.enter_context(patches[way])
        if way == "written-out attention":  # packed blocks write it out as well
            stack.enter_context(patches["packed blocks"])
        yield


def _stock_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, metavar="NAME", help="as for test_quant.py")
    add("--model_path", metavar="PATH", help="as for test_quant.py")
    add("--random_weights", action="store_true", help="do not load weights: time does not depend on them")
    add("--batch", type=positive, default=32, help="images per batch")
    add("--patches", type=positive, help="kept patches per image; default all")
    add("--repeats", type=positive, default=7, help="timed iterations of each")
    add("--operators", type=positive, default=20, help="operators to list")
    add_device_arguments(parser)
    add("--return_memory", action="store_true", help="CPU: let glibc give freed memory back, in the whole run")
    add_inversion_arguments(parser)
    parser.set_defaults(seed=0)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Print both tables."""
    args = parser().parse_args(argv)
    if args.return_memory:
        patch("models.packed.keep_freed_memory", lambda: None).start()
    device = pick_device(args.device, args.gpu)
    config = inversion_config(args, args.batch)
    model = load_model(args.model, args.model_path, random_weights=args.random_weights)
    grid = model.grid
    patches = min(args.patches or grid.count, grid.count)
    positions = random_positions(grid, args.batch, patches, device)
    print(f"{args.model}, {args.batch} images, {patches} patches, {device_name(device)}, {config.dtype}")
    print_operators(Engine(model, config, device, positions), args.operators)
    ways = [None, "folded last block", *(("CUDA graph",) if device.type == "cuda" else CPU_ONLY)]
    seconds = time_without(ways, model, config, device, positions, args.repeats)
    everything = statistics.median(seconds[None])
    lines = [
        [
            f"without {way}" if way else "engine",
            f"{statistics.median(s):.4f}",
            f"{statistics.median(s) / everything:.2f}",
        ]
        for way, s in seconds.items()
    ]
    print(table(["", "s/iteration", "ratio"], lines))


def print_operators(engine: Engine, count: int) -> None:
    """One iteration by operator."""
    jitters = draw_jitters(warm_up(engine.inverter.device) + 1, engine.inverter.vit.grid, torch.Generator())
    for jitter in jitters:
        engine.step(jitter)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (engine.inverter.device.type == "cuda")
    with profile(activities=kinds) as profiler:
        engine.step(jitters[0])
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=count, max_name_column_width=50))


def time_without(
    ways: list[str | None],
    model: LoadedModel,
    config: InversionConfig,
    device: torch.device,
    positions: torch.Tensor,
    repeats: int,
) -> dict[str | None, list[float]]:
    """Seconds of iterations without each of `ways`, in turns."""
    engines = {}
    for way in ways:
        with left_out(way):
            engines[way] = Engine(model, config, device, positions)
    seconds = {way: [] for way in ways}
    first = warm_up(device)
    for number, jitter in enumerate(draw_jitters(first + repeats, engines[None].inverter.vit.grid, torch.Generator())):
        for way, engine in engines.items():
            with left_out(way):
                start = time.perf_counter()
                engine.step(jitter)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if number >= first:
                    seconds[way].append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    run_main(main)
