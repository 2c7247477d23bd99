#!/usr/bin/env python3
"""Check what a GPU computes against the CPU, then measure it: a JSON file and a table under docs/benchmarks.

Every part is kept in the output folder as it ends; the same command goes on with those that failed or were not begun.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
import torch.nn.functional as F

from inversion import VIEWS, InversionConfig, Inverter, invert
from inversion.canvas import Jitter
from kt import DistillConfig, Distiller
from models import DEFAULT_MODEL, LoadedModel, SparseImages, load_model
from quant import QuantConfig, quantize
from quant.calibration import calibrated
from quant.reconstruction import reconstruct
from scripts.bench import bench_inversion
from scripts.bench.bench_inversion import Engine, random_positions
from utils.cli import Parser, positive
from utils.data import DataConfig, evaluation_loader
from utils.device import device_name, pick_device, pick_dtype, versions
from utils.errors import UserError, run_main
from utils.evaluation import evaluate
from utils.files import read_json, writable_folder, write_json
from utils.images import Real, calibration_images
from utils.report import table

ROOT = Path(__file__).resolve().parents[2]
DTYPES = ("float32", "bfloat16")
ACCURACY = 0.6
"""Points of top-1 that W8/A8 may differ by: two of the digits' test images."""
SCHEDULE = {"prune_it": (50, 100, 200, 300), "prune_ratio": (0.3, 0.3, 0.3, 0.3)}


@dataclass(frozen=True)
class Bench:
    """Where the parts run, and how large: `dry` is small enough for a CPU."""

    device: torch.device
    dry: bool
    work: Path

    def model(self, name: str) -> LoadedModel:
        """With its weights if they can be had, else random; the bundled one if dry."""
        if self.dry:
            return load_model(DEFAULT_MODEL)
        try:
            return load_model(name)
        except UserError:
            return load_model(name, random_weights=True)

    def of(self, full: int, dry: int) -> int:
        """A size."""
        return dry if self.dry else full

    @property
    def dtype(self) -> str:
        """The engine's number format."""
        return pick_dtype("auto", self.device)

    def noise(self, model: LoadedModel, count: int) -> SparseImages:
        """Whole images of noise."""
        images = torch.randn(count, *model.preprocessing.input_size, generator=torch.Generator().manual_seed(0))
        return SparseImages.whole(model.grid, images, torch.zeros(count, dtype=torch.long))

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], object]) -> float:
        """Of a call."""
        self.synchronize()
        start = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - start


def forward_and_gradient(bench: Bench) -> dict:
    """Loss and pixel gradient of an iteration, dense and sparse, against plain code on the CPU in float32."""
    model, found = bench.model("deit_tiny_patch16_224"), {"ok": True}
    for count in (model.grid.count, model.grid.count // 4):
        positions = random_positions(model.grid, 4, count, torch.device("cpu"))
        config = InversionConfig(batch_size=4, weights={"oh": 1.0, "tv1": 0.1, "tv2": 1e-4, "l2": 1e-3})
        plain = Engine(model, config, torch.device("cpu"), positions, eager=True)
        wanted = plain.step(Jitter(3, -2, True)).item()
        for dtype in DTYPES:
            engine = Engine(model, replace(config, dtype=dtype), bench.device, positions.to(bench.device))
            loss = engine.step(Jitter(3, -2, True)).item()
            grads = (one.canvas.pixels.grad.flatten().cpu() for one in (engine, plain))
            error, cosine = abs(loss / wanted - 1), F.cosine_similarity(*grads, dim=0).item()
            found[f"{dtype}, {count} patches"] = {"loss_error": error, "gradient_cosine": cosine}
            found["ok"] &= error < (1e-3 if dtype == "float32" else 3e-2)
            found["ok"] &= cosine > (0.9999 if dtype == "float32" else 0.98)
    return found


def recorded_and_eager(bench: Bench) -> dict:
    """The same batch by CUDA graphs and by launches, over stage changes, with a falling rate, and under all views."""
    model, found = bench.model("deit_tiny_patch16_224"), {"ok": True}
    viewed = {"canvas": "spectral", "views": tuple(VIEWS), "copies": 2}
    stage = bench.of(8, 2)
    for dtype, (kind, looks) in itertools.product(DTYPES, {"": {}, ", all views": viewed}.items()):
        stops = {"prune_it": (stage, 2 * stage), "prune_ratio": (0.3, 0.3)}
        how = {"lr_schedule": "cosine", "dtype": dtype, **stops, **looks}
        config = InversionConfig(iterations=3 * stage, batch_size=4, **how)
        recorded = Inverter(model, config, bench.device).invert(0)
        with patch("inversion.capture.EAGER_STEPS", 10**9):
            launched = Inverter(model, config, bench.device).invert(0)
        # Until the first patches stop: which do may depend on a rounding.
        losses = launched.losses[:stage]
        error = ((recorded.losses[:stage] - losses).abs().max() / losses.abs().max()).item()
        same, at_the_end = torch.equal(recorded.losses, launched.losses), recorded.losses[-1] / launched.losses[-1] - 1
        found[dtype + kind] = {
            "loss_error": error,
            "loss_error_at_the_end": abs(at_the_end.item()),
            "same_losses": same,
        }
        found["ok"] &= error < (1e-3 if dtype == "float32" else 2e-2)
    graphs = Inverter(model, config, bench.device).recorder
    found["graphs"] = None if graphs is None else graphs.agrees
    found["ok"] &= found["graphs"] is not False
    return found


def pool_twice(bench: Bench) -> dict:
    """The same pool made twice: the same bytes."""
    model = bench.model("deit_tiny_patch16_224")
    config = InversionConfig(iterations=24, batch_size=4, prune_it=(8,), prune_ratio=(0.3,), dtype=bench.dtype)
    first, again = (_bytes(model, config, bench.device, bench.work / f"pool-{n}") for n in range(2))
    return {"ok": first == again, "files": len(first)}


def _bytes(model: LoadedModel, config: InversionConfig, device: torch.device, root: Path) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=root.name) as folder:
        path = invert(model, config, 8, folder, device).path
        return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def accuracy(bench: Bench) -> dict:
    """W8/A8 of the bundled model, calibrated and evaluated here and on the CPU."""
    model = load_model(DEFAULT_MODEL)
    images, found = calibration_images(model, Real(), 32), {}
    data = evaluation_loader(model, DataConfig(num_workers=0, val_limit=100 if bench.dry else None))
    for device in (torch.device("cpu"), bench.device):
        vit = model.sparse(device)
        models = {"full": vit, "W8/A8": quantize(vit, images, QuantConfig(8, 8))}
        found[device.type] = {name: one["top1"] for name, one in evaluate(models, data, device).items()}
    here, there = found[bench.device.type], found["cpu"]
    return {"ok": all(abs(here[name] - there[name]) <= ACCURACY for name in here), **found}


def two_ranks(bench: Bench) -> dict:
    """Two ranks on one device make the pool and the ranges that one makes; by NCCL if it lets them, else by gloo."""
    # A process that has used CUDA cannot be forked.
    context = torch.multiprocessing.get_context("spawn" if bench.device.type == "cuda" else "fork")
    errors = {}
    for backend in ("nccl", "gloo") if bench.device.type == "cuda" else ("gloo",):
        with tempfile.TemporaryDirectory(dir=bench.work) as folder:
            ranks = [context.Process(target=_rank, args=(n, backend, bench, Path(folder))) for n in range(2)]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join(120)
            failed = any(process.exitcode != 0 for process in ranks)
            for process in ranks:
                if process.is_alive():
                    process.kill()
            outcomes = [read_json(file) for file in sorted(Path(folder).glob("rank*.json"))]
            if not failed and len(outcomes) == 2:
                alone = _ranges_and_pool(bench, Path(folder) / "alone")
                pixels = abs(outcomes[0]["pixels"] / alone["pixels"] - 1)  # attention's gradient may add in any order
                same = all(outcomes[0][key] == outcomes[1][key] == alone[key] for key in ("files", "scales"))
                return {"ok": same and pixels < 1e-2, "backend": backend, "pixels": pixels, "refused": errors}
            errors[backend] = next((one["error"] for one in outcomes if "error" in one), "no answer in two minutes")
    raise RuntimeError(f"no backend works: {errors}")


def _rank(number: int, backend: str, bench: Bench, folder: Path) -> None:
    file = folder / f"rank{number}.json"
    try:
        if bench.device.type == "cuda":
            torch.cuda.set_device(bench.device)
        dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=number, world_size=2)
        write_json(file, _ranges_and_pool(bench, folder / "pool"))
        dist.destroy_process_group()
    except Exception as error:  # whatever it is, it is told in the report
        write_json(file, {"error": _line(error)})
        os._exit(1)


def _ranges_and_pool(bench: Bench, datapool: Path) -> dict:
    model = load_model(DEFAULT_MODEL)
    config = InversionConfig(iterations=8, batch_size=4, dtype=bench.dtype)
    pool = invert(model, config, 8, datapool, bench.device)
    quantized = quantize(model.sparse(bench.device), bench.noise(model, 8), QuantConfig(8, 8, batch_size=4))
    return {
        "files": sorted(str(file.relative_to(pool.path)) for file in pool.path.rglob("*")),
        "pixels": pool.read(8).patches.double().abs().sum().item(),
        "scales": {key: value.item() for key, value in quantized.state_dict().items() if key.endswith("r.scale")},
    }


def timing(name: str, batch: int, *flags: str) -> Callable[[Bench], dict]:
    """The part that is `bench_inversion.py` with these settings."""

    def part(bench: Bench) -> dict:
        how = ["--model", name, "--random_weights", "--batch", str(batch), "--compiled", "inductor", *flags]
        if bench.dry:
            how = ["--batch", "2", "--repeats", "1", "--compiled", "eager", "--peak_size", "256"]
            how += ["--prune_it", "50", "--prune_ratio", "0.3"] if "-1" not in flags else flags
        where = ["--device", bench.device.type, "--gpu", str(bench.device.index or 0)]
        return bench_inversion.main([*how, *where, "--output", str(bench.work / "bench")])

    return part


def run(**settings: object) -> Callable[[Bench], dict]:
    """The part that inverts 32 images of DeiT-Base and makes the pool, from noise to files."""

    def part(bench: Bench) -> dict:
        model = bench.model("deit_base_patch16_224")
        config = InversionConfig(batch_size=bench.of(32, 4), dtype=bench.dtype, **settings)
        if bench.dry:
            short = {"prune_it": (2,), "prune_ratio": (0.3,)} if "prune_it" in settings else {}
            config = replace(config, iterations=8, **short)
        with tempfile.TemporaryDirectory(dir=bench.work) as folder:
            seconds = bench.seconds(lambda: invert(model, config, None, folder, bench.device))
        return {"seconds": seconds, "images": config.batch_size, "iterations": config.iterations}

    return part


def learning(bench: Bench) -> dict:
    """Reconstruction and distillation of DeiT-Base, 32 images: steps a second."""
    model, student = bench.model("deit_base_patch16_224"), bench.model("deit_base_patch16_224")
    images, steps = bench.noise(model, bench.of(32, 8)), bench.of(20, 2)
    config = QuantConfig(4, 4, "mse", reconstruct=True, reconstruct_steps=steps)
    reference, quantized = calibrated(model.sparse(bench.device), images, config)
    spent = bench.seconds(lambda: reconstruct(reference, quantized, images, config))
    student.vit.requires_grad_(True)
    distiller = Distiller(model, student, DistillConfig(batch_size=len(images), lr=1e-6), bench.device)
    distiller.run(images, 2)
    learnt = bench.seconds(lambda: distiller.run(images, steps))
    return {
        "reconstruction_steps_per_second": (len(quantized.blocks) + 2) * steps / spent,
        "distillation_steps_per_second": steps / learnt,
    }


DENSE = ("--prune_it", "-1", "--prune_ratio", "0")
PARTS: dict[str, Callable[[Bench], dict]] = {
    "forward and gradient": forward_and_gradient,
    "recorded and eager": recorded_and_eager,
    "pool twice": pool_twice,
    "accuracy": accuracy,
    "two ranks": two_ranks,
    "DeiT-Base, 128 images": timing("deit_base_patch16_224", 128, *DENSE),
    "DeiT-Base, 32 images": timing("deit_base_patch16_224", 32),
    "DeiT-Tiny, 100 images": timing("deit_tiny_patch16_224", 100),
    "sparse run": run(**SCHEDULE),
    "pri run": run(strategy="pri", pri_division=4),
    "learning": learning,
}


def parser() -> Parser:
    """The command line."""
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dry", action="store_true", help="go through every part on the CPU, small; nothing is written to docs")
    add("--device", default="cuda", choices=("cuda", "cpu"), help="where to run; --dry runs on the CPU")
    add("--gpu", type=int, default=0, help="number of the CUDA GPU")
    add("--output", default="./runs/gpu", metavar="DIR", help="where the parts are kept")
    add("--seconds", type=positive, default=510, help="after which no further part is begun")
    add("--tried", nargs="*", default=[], metavar="PART", help="leave these out of this run")
    return parser


def main(argv: list[str] | None = None) -> dict:
    """Run what is missing, print and write what there is."""
    args = parser().parse_args(argv)
    device = torch.device("cpu") if args.dry else pick_device(args.device, args.gpu)
    output = writable_folder(args.output, "--output") / (re.sub(r"\W+", "_", device_name(device)) + "_dry" * args.dry)
    output.mkdir(exist_ok=True)
    bench, start, tried = Bench(device, args.dry, output), time.monotonic(), [*args.tried]
    for name, part in PARTS.items():
        file = output / f"{re.sub(r'[^a-z0-9]+', '_', name.lower())}.json"
        done = file.is_file() and "error" not in read_json(file)
        if done or name in tried or time.monotonic() - start > args.seconds:
            continue
        print(f"== {name}", flush=True)
        began = time.perf_counter()
        try:
            result = part(bench)
        except Exception as error:  # whatever it is, the other parts go on
            result = {"error": _line(error)}
            print(f"failed: {result['error']}")
        write_json(file, {"part": name, "took": round(time.perf_counter() - began, 1), **result})
        tried.append(name)
        if "error" in result and not _alive(bench):
            # A device that failed refuses everything in this process.
            rest = ["--output", args.output, "--device", args.device, "--gpu", str(args.gpu)]
            left = max(1, args.seconds - int(time.monotonic() - start))
            os.execv(sys.executable, [sys.executable, __file__, *rest, "--seconds", str(left), "--tried", *tried])
    report = summary(bench, device)
    write(report, output if args.dry else ROOT / "docs" / "benchmarks", device)
    return report


def _alive(bench: Bench) -> bool:
    with suppress(RuntimeError):
        bench.synchronize()
        return True
    return False


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def summary(bench: Bench, device: torch.device) -> dict:
    """What the parts have found so far."""
    found = [json.loads(file.read_text()) for file in sorted(bench.work.glob("*.json"))]
    parts = {one.pop("part"): one for one in found if "part" in one}
    return {
        "device": device_name(device),
        "versions": versions(),
        "parts": {name: parts.get(name, {"error": "not run yet"}) for name in PARTS},
    }


def write(report: dict, folder: Path, device: torch.device) -> None:
    """The JSON, and the table beside it."""
    file = folder / f"{re.sub(r'[^a-z0-9]+', '-', device_name(device).lower()).strip('-')}.json"
    write_json(file, report)
    lines = [(name, *row) for name, part in report["parts"].items() for row in rows_of(part)]
    print(table(["part", "", ""], [list(line) for line in lines]))
    text = [f"# {report['device']}", "", "`scripts/bench/gpu.sh`, torch " + report["versions"]["torch"] + ".", ""]
    text += ["| part | | |", "|---|---|---|", *(f"| {' | '.join(line)} |" for line in lines)]
    file.with_suffix(".md").write_text("\n".join(text) + "\n")
    print(f"written: {file} and {file.with_suffix('.md').name}")


def rows_of(part: dict) -> list[tuple[str, str]]:
    """What the table says of a part: names and values."""
    if "error" in part:
        return [("failed", part["error"])]
    if "speedup" in part:
        rows = [(f"{key.replace('_', ' ')}, times as fast", f"{value:.2f}") for key, value in part["speedup"].items()]
        for row in part["rows"]:
            what = f"{row['name']}, {row['stage_patches']} patches"
            rows.append((f"{what}: share of peak", f"{100 * row['share_of_peak']:.0f}%"))
            rows.append((f"{what}: ms an iteration", f"{1000 * row['seconds_per_iteration']:.2f}"))
            rows.append((f"{what}: peak memory, MiB", f"{row['peak_memory_bytes'] / 2**20:.0f}"))
        return rows
    named = [(key, value) for key, value in part.items() if key not in ("took", "ok")]
    checked = [("as it should be", "yes" if part["ok"] else "NO")] if "ok" in part else []
    return checked + [(key.replace("_", " "), _shown(value)) for key, value in named]


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(one)}" for key, one in value.items()) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run_main(main)
