"""Writing a quantized model as an ONNX file, running the file, and timing it."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from models import LoadedModel, SparseViT
from quant.config import QuantConfig
from utils.errors import UserError
from utils.files import atomic, user_path, writable_folder

PACKAGES = ("onnx", "onnxruntime")
SECONDS_TIMED, LEAST_RUNS, MOST_RUNS = 10.0, 5, 20


def require_export(file: str | Path, model: LoadedModel) -> None:
    """Raise `UserError` unless the packages are there, the file can be written and the model can be exported."""
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError:
            raise UserError(f"--export needs the package {package}: pip install -r requirements-export.txt") from None
    from quant.onnx_graph import require_exportable

    path = user_path(file, "--export")
    if path.suffix != ".onnx":
        raise UserError(f"--export {file}: give a file name that ends in .onnx")
    if path.is_dir():
        raise UserError(f"--export {file} is a folder")
    writable_folder(path.parent, "--export")
    require_exportable(SparseViT(model.vit))
    _, height, width = model.preprocessing.input_size
    crops = ("squash", "center") if height == width else ("squash",)
    if model.preprocessing.crop_mode not in crops:
        raise UserError(f"--export: images cropped by '{model.preprocessing.crop_mode}' cannot be exported")


def export(file: str | Path, vit: SparseViT, model: LoadedModel, config: QuantConfig, classes: list[str]) -> Path:
    """Write `vit`, quantized with `config`, with the preprocessing and the classes that it needs; see `onnx_model`."""
    from quant.onnx_graph import onnx_model

    path = Path(file).expanduser()
    metadata = {
        "model": model.name,
        "preprocessing": json.dumps(dataclasses.asdict(model.preprocessing)),
        "classes": json.dumps(list(classes)),
        "quantization": json.dumps({"w_bit": config.w_bit, "a_bit": config.a_bit, "observer": config.method}),
    }
    proto = onnx_model(copy.deepcopy(vit), metadata)
    with atomic(path) as partial:
        partial.write_bytes(proto.SerializeToString())
    return path


class OnnxModel:
    """An ONNX file in ONNX Runtime on the CPU, for `evaluate`."""

    def __init__(self, file: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        if not torch.cpu.get_capabilities().get("avx512_vnni"):
            # Without it, products of uint8 and int8 are summed in 16 bits on some CPUs, which overflow.
            options.add_session_config_entry("session.x64quantprecision", "1")
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def forward_images(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of normalized images (B, C, H, W)."""
        logits = self.session.run(None, {"images": images.cpu().numpy()})[0]
        return torch.from_numpy(logits).to(images.device)


def speed(file: Path, vit: SparseViT, model: LoadedModel) -> dict:
    """Size and speed of an exported file, of the same model in float32 as an ONNX file, and of PyTorch.

    Runs take turns on as many threads as torch has; medians. On the CPU, whatever `vit` is on.

    Returns:
        `bytes`, `float32_bytes`, `size_ratio`; `latency_ms` of one image and `throughput` in images/s at 32, each for
        `quantized`, `float32` (both in ONNX Runtime) and `pytorch` (float32).
    """
    vit = copy.deepcopy(vit).cpu()
    with tempfile.TemporaryDirectory() as folder:
        plain = export(Path(folder, "float32.onnx"), vit, model, QuantConfig(32, 32), [])
        sizes = file.stat().st_size, plain.stat().st_size
        models = {"quantized": OnnxModel(file), "float32": OnnxModel(plain), "pytorch": vit}
        images = torch.randn(32, *model.preprocessing.input_size)
        latency, throughput = (
            _medians({name: (lambda m=m, x=x: m.forward_images(x)) for name, m in models.items()})
            for x in (images[:1], images)
        )
    return {
        "bytes": sizes[0],
        "float32_bytes": sizes[1],
        "size_ratio": round(sizes[0] / sizes[1], 4),
        "threads": torch.get_num_threads(),
        "latency_ms": {name: round(1000 * seconds, 3) for name, seconds in latency.items()},
        "throughput": {name: round(len(images) / seconds, 2) for name, seconds in throughput.items()},
    }


@torch.no_grad()
def _medians(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each, all in turn after one run that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    start = time.perf_counter()
    for round_ in range(MOST_RUNS):
        if round_ >= LEAST_RUNS and time.perf_counter() - start > SECONDS_TIMED:
            break
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}
