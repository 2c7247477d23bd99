#!/usr/bin/env python3
"""Time one iteration of the inversion engine, dense and at every stage, against a straightforward implementation.

Both run in this one process, alternating, on the same model, images and device; every figure is a median.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.realpath(f"{__file__}/../../.."))

from utils.errors import exit_on_interrupt, run_main

exit_on_interrupt(__name__)

import copy
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch.utils.flop_counter import FlopCounterMode

from inversion import InversionConfig, Inverter
from inversion.canvas import Jitter, draw_jitters
from inversion.canvases import CANVASES
from inversion.capture import EAGER_STEPS
from inversion.config import DEFAULT_VIEWS, DEFAULT_WEIGHTS
from inversion.schedule import Stage
from inversion.targets import distributions
from models import DEFAULT_MODEL, LoadedModel, PatchGrid, SparseViT, load_model
from utils.cli import Parser, positive
from utils.device import device_name, pick_device, versions
from utils.files import writable_folder, write_json
from utils.flags import add_device_arguments, add_inversion_arguments, inversion_config
from utils.report import table


class Reference:
    """One iteration in plain code: everything that a first implementation does, and nothing to make it fast.

    Stock timm model in float32 with weights that require gradients; attention matrices of all blocks formed and kept;
    patch embedding of the full image and a gather after it; TV, Adam and clamp over the full image; `.item()`. Where
    timm's blocks ask for more than tokens, kept patches go through ours by stock kernels and autograd.

    `backend` of `torch.compile`: instead in the engine's number format, compiled, timm's attention, nothing kept of it.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: InversionConfig,
        device: torch.device,
        positions: torch.Tensor,
        backend: str | None = None,
    ):
        self.dtype = torch.float32 if backend is None else getattr(torch, config.dtype)
        self.vit = copy.deepcopy(model.vit).to(device, self.dtype).requires_grad_(True)
        self.attention: list[torch.Tensor] = []
        for attn in self.vit.modules() if backend is None else ():
            if hasattr(attn, "fused_attn") and hasattr(attn, "attn_drop"):
                attn.fused_attn = False
                attn.attn_drop.register_forward_hook(lambda module, inputs, output: self.attention.append(output))
        self.config, self.positions = config, positions
        size = (config.batch_size, *model.preprocessing.input_size)
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(size, generator=generator).to(device).requires_grad_(True)
        self.labels = torch.randint(model.classes, (config.batch_size,), generator=generator).to(device)
        self.optimizer = torch.optim.Adam([self.images], lr=config.lr, betas=(0.5, 0.99))
        self.low, self.high = (model.preprocessing.normalize(torch.full((3, 1, 1), v)).to(device) for v in (0.0, 1.0))
        self.dense = positions.shape[1] == model.grid.count
        self.sparse = None if isinstance(self.vit, VisionTransformer) else SparseViT(self.vit).plainly()
        with FlopCounterMode(display=False) as counter:
            self.step(Jitter(0, 0, False))
        self.flops = counter.get_total_flops()
        if backend is not None:
            self._logits = torch.compile(self._logits, backend=backend)

    def step(self, jitter: Jitter) -> float:
        """Forward, backward, update."""
        self.attention.clear()
        rolled = torch.roll(self.images, (jitter.dy, jitter.dx), dims=(2, 3))
        rolled = rolled.flip(3) if jitter.flip else rolled
        logits = self._logits(rolled.to(self.dtype)).float()
        loss = F.cross_entropy(logits, self.labels) + self.config.weights.get("tv2", 0.0) * self._tv()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.images.data = torch.maximum(torch.minimum(self.images.data, self.high), self.low)
        return loss.item()

    def _logits(self, images: torch.Tensor) -> torch.Tensor:
        if self.dense:
            return self.vit(images)
        if self.sparse is not None:
            return self.sparse(self.sparse.grid.taken(images, self.positions), self.positions).logits
        tokens = self.vit._pos_embed(self.vit.patch_embed(images))
        prefix = self.vit.num_prefix_tokens
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        tokens = torch.cat([tokens[:, :prefix], tokens[:, prefix:][rows, self.positions]], dim=1)
        return self.vit.forward_head(self.vit.norm(self.vit.blocks(self.vit.norm_pre(tokens))))

    def _tv(self) -> torch.Tensor:
        x = self.images
        right, down = x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]
        diagonal, other = x[..., 1:, 1:] - x[..., :-1, :-1], x[..., 1:, :-1] - x[..., :-1, 1:]
        return right.norm() + down.norm() + diagonal.norm() + other.norm()


class Engine:
    """One iteration of the engine at a stage, as `Inverter.invert` runs it."""

    def __init__(
        self,
        model: LoadedModel,
        config: InversionConfig,
        device: torch.device,
        positions: torch.Tensor,
        eager: bool = False,
    ):
        self.inverter = inverter = Inverter(model, config, device, eager=eager)
        self.generator = generator = torch.Generator().manual_seed(0)
        images = torch.randn(config.batch_size, *model.preprocessing.input_size, generator=generator).to(device)
        start = CANVASES[config.canvas].start
        self.canvas = start(inverter.vit.grid, images, inverter.limits, inverter.plain, None).with_patches(positions)
        labels = torch.randint(model.classes, (config.batch_size,), generator=generator)
        targets = distributions(labels, model.classes, config.soft_label).to(device)
        self.inverter.begin(0, generator, config.batch_size)
        self.run = self.inverter.stepper(self.canvas, self.inverter.adam(self.canvas), targets)
        self.flops = config.batch_size * self.inverter.vit.step_flops(positions.shape[1])

    def step(self, jitter: Jitter) -> torch.Tensor:
        """Forward, backward, update; what other views than roll and flip draw is drawn here."""
        views, config = self.inverter.spans[0].views, self.inverter.config
        drawn = views.draws(config.copies, config.batch_size, self.generator)
        return self.run(self.inverter.on_device([draw._replace(jitter=jitter) for draw in drawn])[0])


def parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, metavar="NAME", help="as for test_quant.py")
    add("--model_path", metavar="PATH", help="as for test_quant.py")
    add("--random_weights", action="store_true", help="do not load weights: time does not depend on them")
    add("--batch", type=positive, default=32, help="images per batch")
    add("--repeats", type=positive, default=5, help="timed iterations of each, after one to warm up")
    add(
        "--divisions",
        type=positive,
        nargs="*",
        default=[],
        metavar="V",
        help="also time pri at these divisions",
    )
    about = "also time plain code in --dtype with torch.compile and this backend, such as inductor; dense alone"
    add("--compiled", metavar="BACKEND", help=about)
    add("--peak_size", type=positive, help="side of the matrices that give the peak; default 4096, on a GPU 8192")
    add_device_arguments(parser)
    add("--output", default="./runs/bench", metavar="DIR", help="where the JSON goes")
    add_inversion_arguments(parser)
    parser.set_defaults(prune_it=[50, 100, 200, 300], prune_ratio=[0.3] * 4, seed=0)
    return parser


def random_positions(grid: PatchGrid, batch: int, kept: int, device: torch.device) -> torch.Tensor:
    """`kept` different positions for each image, ascending."""
    generator = torch.Generator().manual_seed(kept)
    drawn = [torch.randperm(grid.count, generator=generator)[:kept].sort().values for _ in range(batch)]
    return torch.stack(drawn).to(device)


def warm_up(device: torch.device) -> int:
    """Iterations that are not timed: on a GPU those before the replay of a recorded one, and the recording."""
    return EAGER_STEPS + 2 if device.type == "cuda" else 1


def timed(step: Callable[[Jitter], object], jitter: Jitter, device: torch.device) -> float:
    """Seconds of one iteration."""
    _synchronize(device)
    start = time.perf_counter()
    step(jitter)
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a large square matrix product: the best of five."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = [timed(lambda _: a @ b, None, device) for _ in range(6)]
    return 2 * size**3 / min(seconds[1:])


class PeakMemory:
    """Most memory that was in use since `start`, above what was in use then: GPU allocations, or resident pages."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> None:
        """Forget earlier peaks."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.base = torch.cuda.memory_allocated(self.device)
        else:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self.base = self._status("VmRSS")

    def bytes(self) -> int:
        """The peak since `start`."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.base
        return self._status("VmHWM") - self.base

    @staticmethod
    def _status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


@dataclass
class Row:
    """One contender at one stage."""

    name: str
    stage_patches: int
    make: Callable[[], Reference | Engine]
    peak_flops: float
    seconds: list[float] = field(default_factory=list)
    flops: int = 0
    memory: int = 0

    def measure_once(self, device: torch.device) -> None:
        """Peak memory, weights included, and the operations of one iteration."""
        jitter, peak = Jitter(3, -2, False), PeakMemory(device)
        peak.start()
        contender = self.make()
        for _ in range(warm_up(device) + 1):
            contender.step(jitter)
        self.memory = peak.bytes()
        self.flops = contender.flops

    def result(self, batch: int) -> dict:
        """The row as the JSON holds it."""
        median = statistics.median(self.seconds)
        return {
            "name": self.name,
            "stage_patches": self.stage_patches,
            "seconds_per_iteration": median,
            "seconds_min": min(self.seconds),
            "seconds_max": max(self.seconds),
            "image_iterations_per_second": batch / median,
            "peak_memory_bytes": self.memory,
            "flops": self.flops,
            "flops_per_second": self.flops / median,
            "share_of_peak": self.flops / median / self.peak_flops,
        }


def main(argv: list[str] | None = None) -> dict:
    """Time everything, print a table, write JSON."""
    args = parser().parse_args(argv)
    device = pick_device(args.device, args.gpu)
    output = writable_folder(args.output, "--output")
    classes = 1000 if args.random_weights else None  # some of timm's have no head
    model = load_model(args.model, args.model_path, random_weights=args.random_weights, classes=classes)
    config, grid = inversion_config(args, args.batch), model.grid
    dtype = config.dtype
    stages = config.strategy_object().stages(config.iterations, grid)
    size = args.peak_size or (4096 if device.type == "cpu" else 8192)
    peaks = {name: matmul_peak(device, getattr(torch, name), size) for name in {"float32", dtype}}
    rows = make_rows(model, config, device, stages, peaks, args.compiled)
    for row in rows:
        row.measure_once(device)
    first = warm_up(device)
    jitters = draw_jitters(args.repeats + first, grid, torch.Generator().manual_seed(0))
    for stage in stages:
        contenders = [(row, row.make()) for row in rows if row.stage_patches == stage.patches]
        for number, jitter in enumerate(jitters):
            for row, contender in contenders:
                seconds = timed(contender.step, jitter, device)
                if number >= first:
                    row.seconds.append(seconds)
        del contenders
    strategies = strategy_seconds(model, config, device, args.divisions, args.repeats) if args.divisions else None
    report = {
        "model": args.model,
        "batch": args.batch,
        "device": device_name(device),
        "dtype": dtype,
        "repeats": args.repeats,
        "schedule": [[stage.start, stage.stop, stage.patches] for stage in stages],
        "matmul_peak_flops": peaks,
        "rows": [row.result(args.batch) for row in rows],
        "schedule_seconds": {name: schedule_seconds(rows, name, stages) for name in ("reference", "engine")},
        "speedup": speedups(rows, stages),
        "seconds_per_image": strategies,
        "versions": versions(),
    }
    file = output / f"{args.model.rstrip('/').split('/')[-1]}-b{args.batch}-{device.type}.json"
    write_json(file, report)
    print_report(report, file)
    return report


def make_rows(
    model: LoadedModel,
    config: InversionConfig,
    device: torch.device,
    stages: tuple[Stage, ...],
    peaks: dict,
    backend: str | None,
) -> list[Row]:
    """Reference and engine at every stage, and the compiled reference at the first."""
    grid = model.grid
    rows = []
    for stage in stages:
        positions = random_positions(grid, config.batch_size, stage.patches, device)
        kinds = [("reference", Reference, config, "float32"), ("engine", Engine, config, config.dtype)]
        if usual(config).settings() != config.settings():
            kinds.append(("usual engine", Engine, usual(config), config.dtype))
        for name, kind, settings, dtype in kinds:
            rows.append(Row(name, stage.patches, partial(kind, model, settings, device, positions), peaks[dtype]))
        if backend is not None and stage is stages[0]:
            make = partial(Reference, model, config, device, positions, backend)
            rows.append(Row("compiled", stage.patches, make, peaks[config.dtype]))
    return rows


def usual(config: InversionConfig) -> InversionConfig:
    """The same inversion of pixels with the published loss and views, which tells what views and canvas cost."""
    return replace(config, canvas="pixels", views=DEFAULT_VIEWS, copies=1, weights=DEFAULT_WEIGHTS)


def seconds_of(rows: list[Row], name: str, patches: int) -> float:
    """Median seconds of an iteration."""
    return next(statistics.median(r.seconds) for r in rows if (r.name, r.stage_patches) == (name, patches))


def schedule_seconds(rows: list[Row], name: str, stages: tuple[Stage, ...]) -> float:
    """A whole schedule, summed from its stages."""
    return sum(stage.iterations * seconds_of(rows, name, stage.patches) for stage in stages)


def speedups(rows: list[Row], stages: tuple[Stage, ...]) -> dict[str, float]:
    """The engine against the reference: dense, in the last stage, and its schedule against the dense reference."""
    dense, final, iterations = stages[0].patches, stages[-1].patches, stages[-1].stop
    reference_run = iterations * seconds_of(rows, "reference", dense)
    compiled = [statistics.median(row.seconds) for row in rows if row.name == "compiled"]
    return {
        "dense": seconds_of(rows, "reference", dense) / seconds_of(rows, "engine", dense),
        "final_stage": seconds_of(rows, "reference", final) / seconds_of(rows, "engine", final),
        "schedule_vs_reference_dense": reference_run / schedule_seconds(rows, "engine", stages),
        "schedule_vs_engine_dense": iterations
        * seconds_of(rows, "engine", dense)
        / schedule_seconds(rows, "engine", stages),
        **(
            {
                f"usual_vs_engine_{name}": seconds_of(rows, "usual engine", count) / seconds_of(rows, "engine", count)
                for name, count in (("dense", dense), ("final_stage", final))
            }
            if any(row.name == "usual engine" for row in rows)
            else {}
        ),
        **({"dense_vs_compiled": compiled[0] / seconds_of(rows, "engine", dense)} if compiled else {}),
    }


def strategy_seconds(
    model: LoadedModel, config: InversionConfig, device: torch.device, divisions: list[int], repeats: int
) -> dict[str, float]:
    """Seconds of a whole run per image: dense, on the schedule, and by Patch Rebirth Inversion.

    The iterations of all stages of all of them are timed in turns; each batch has as many trajectories.
    """
    unscheduled = replace(config, strategy=None, prune_it=(-1,), prune_ratio=(0.0,))
    configs = {"dense": unscheduled, config.strategy: config}
    configs |= {f"pri {v}": replace(unscheduled, strategy="pri", pri_division=v) for v in divisions}
    grid = model.grid
    plans = {name: c.strategy_object().stages(c.iterations, grid) for name, c in configs.items()}
    counts = sorted({stage.patches for stages in plans.values() for stage in stages}, reverse=True)
    engines = {n: Engine(model, config, device, random_positions(grid, config.batch_size, n, device)) for n in counts}
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    first = warm_up(device)
    for number, jitter in enumerate(draw_jitters(repeats + first, grid, torch.Generator().manual_seed(0))):
        for count, engine in engines.items():
            spent = timed(engine.step, jitter, device)
            if number >= first:
                seconds[count].append(spent)
    found = {}
    for name, stages in plans.items():
        images = config.batch_size * (len(stages) if configs[name].strategy_object().detaches else 1)
        found[name] = sum(s.iterations * statistics.median(seconds[s.patches]) for s in stages) / images
    return found


def print_report(report: dict, file: Path) -> None:
    """The table and the ratios."""
    print(f"{report['model']}, {report['batch']} images, {report['device']}, engine in {report['dtype']}")
    lines = [
        [
            row["name"],
            row["stage_patches"],
            f"{row['seconds_per_iteration']:.4f}",
            f"{row['image_iterations_per_second']:.0f}",
            f"{row['flops_per_second'] / 1e12:.3f}",
            f"{100 * row['share_of_peak']:.0f}",
            f"{row['peak_memory_bytes'] / 2**20:.0f}",
        ]
        for row in report["rows"]
    ]
    print(table(["", "patches", "s/iteration", "images x it/s", "TFLOP/s", "% of peak", "peak MiB"], lines))
    for name, seconds in report["schedule_seconds"].items():
        print(f"whole schedule, {name}: {seconds:.0f} s")
    print("speed-up: " + ", ".join(f"{name} {value:.2f}x" for name, value in report["speedup"].items()))
    if report["seconds_per_image"]:
        per_image = report["seconds_per_image"]
        base = list(per_image.values())[1]
        lines = [[name, f"{value:.2f}", f"{value / base:.2f}"] for name, value in per_image.items()]
        print(table(["strategy", "s/image", "ratio"], lines))
    print(f"written: {file}")


if __name__ == "__main__":
    run_main(main)
