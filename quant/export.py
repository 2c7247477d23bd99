"""Writing a quantized model as an ONNX file, running the file, and timing it."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from models import LoadedModel, SparseViT
from quant.config import INT4_OPSET, OLDEST_OPSET, QuantConfig, stores_int4
from quant.insert import quantized_vit, quantizers
from quant.quantizers import largest_value_scale
from utils.device import multiplies_bytes
from utils.errors import UserError
from utils.files import atomic, user_path, writable_folder

PACKAGES = ("onnx", "onnxruntime")
SECONDS_TIMED, LEAST_RUNS, MOST_RUNS = 10.0, 5, 20
RUNTIMES = {17: "1.15", 19: "1.16", 20: "1.17", 21: "1.20", 22: "1.21", 23: "1.24", 26: "1.25", 27: "1.32"}
"""The oldest onnxruntime (of 1.15 and newer) that runs a file of this opset and of those up to the next."""
INT4_RUNTIME = "1.23"
"""The oldest onnxruntime that runs a file with int4 in it."""


def default_opset(config: QuantConfig) -> int:
    """The oldest one that stores the weights without waste."""
    return INT4_OPSET if config.w_bit <= 4 else OLDEST_OPSET


def require_export(file: str | Path, model: LoadedModel, config: QuantConfig, opset: int | None = None) -> None:
    """Raise `UserError` unless `export` will succeed, as far as can be told without the quantized model.

    The packages are there and take this opset, which the last block of the model tries, or all blocks where their
    widths differ, the file can be written, and all of the model can be exported.
    """
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError:
            raise UserError(f"--export needs the package {package}: pip install -r requirements-export.txt") from None
    import onnx

    from quant.onnx_graph import require_exportable

    opset = default_opset(config) if opset is None else opset
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise UserError(f"--opset {opset} is not {OLDEST_OPSET} to {newest}, which onnx {onnx.__version__} writes")
    path = user_path(file, "--export")
    if path.suffix != ".onnx":
        raise UserError(f"--export {file}: give a file name that ends in .onnx")
    if path.is_dir():
        raise UserError(f"--export {file} is a folder")
    writable_folder(path.parent, "--export")
    vit = SparseViT(model.vit)
    require_exportable(vit)
    if model.preprocessing.crop_mode not in ("squash", "center"):
        raise UserError(f"--export: images cropped by '{model.preprocessing.crop_mode}' cannot be exported")
    if vit.head.head.in_features == vit.patch_proj.out_features:  # else the last block does not fit the embedding
        vit.blocks = vit.blocks[-1:]
    _require_runtime(quantized_vit(vit, dataclasses.replace(config, keep=()), largest_value_scale), config, opset)


def _require_runtime(vit: SparseViT, config: QuantConfig, opset: int) -> None:
    """Raise `UserError` where the installed onnxruntime does not run `vit`, not calibrated, with this opset."""
    import onnxruntime

    from quant.onnx_graph import onnx_model

    for quantizer in quantizers(vit).values():
        quantizer.observer = None
    proto = onnx_model(vit, {}, opset)
    try:
        OnnxModel(proto.SerializeToString()).forward_images(torch.zeros(1, vit.grid.channels, *vit.grid.image_size))
    except Exception as error:  # the runtime raises many kinds
        installed, needed = onnxruntime.__version__, runtime_for(config, opset)
        if needed is None or _release(needed) <= _release(installed):
            line = str(error).strip().splitlines()[0][:160]
            why = f"onnxruntime {installed} does not run a file of opset {opset} ({line})"
            raise UserError(f"--export: {why}; give a lower --opset") from None
        what, lower = f"of opset {opset}", "a lower --opset"
        if needed == INT4_RUNTIME:
            what, lower = "with int4 weights", f"--opset {INT4_OPSET - 1}, which stores them as int8"
        raise UserError(
            f"--export: a file {what} needs onnxruntime {needed} or newer, {installed} is installed; "
            f"pip install -U onnxruntime, or give {lower}"
        ) from None


def runtime_for(config: QuantConfig, opset: int) -> str | None:
    """The oldest onnxruntime that runs such a file, None where it is not known."""
    if opset > max(RUNTIMES):
        return None
    of_opset = next(version for least, version in reversed(RUNTIMES.items()) if least <= opset)
    return max(of_opset, INT4_RUNTIME, key=_release) if stores_int4(config.w_bit, opset) else of_opset


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def export(
    file: str | Path,
    vit: SparseViT,
    model: LoadedModel,
    config: QuantConfig,
    classes: list[str],
    opset: int | None = None,
) -> Path:
    """Write a quantized model for ONNX Runtime, with the preprocessing and the names that it needs.

    Args:
        file: where to.
        vit: what `quantize` made of `model`; left as it is.
        model: whose preprocessing is written down.
        config: what it was quantized with.
        classes: names of the classes, in order.
        opset: see `onnx_model`; None: `default_opset`.
    """
    path, written = user_path(file, "--export"), _serialized(vit, model, config, classes, opset)
    with atomic(path) as partial:
        partial.write_bytes(written)
    return path


def _serialized(
    vit: SparseViT, model: LoadedModel, config: QuantConfig, classes: list[str], opset: int | None
) -> bytes:
    """What `export` writes."""
    import onnxruntime

    from quant.onnx_graph import onnx_model

    opset = default_opset(config) if opset is None else opset
    how = {"w_bit": config.w_bit, "a_bit": config.a_bit, "observer": config.method, "symmetric": config.symmetric}
    metadata = {
        "model": model.name,
        "preprocessing": json.dumps(dataclasses.asdict(model.preprocessing)),
        "classes": json.dumps(list(classes)),
        "quantization": json.dumps(how),
        "requires": f"onnxruntime>={runtime_for(config, opset) or onnxruntime.__version__}",
    }
    return onnx_model(copy.deepcopy(vit), metadata, opset).SerializeToString()


class OnnxModel:
    """An ONNX file, or what is in one, in ONNX Runtime on the CPU, for `evaluate`."""

    def __init__(self, file: Path | bytes) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        if not multiplies_bytes():
            # Without it, products of uint8 and int8 are summed in 16 bits on some CPUs, which overflow.
            options.add_session_config_entry("session.x64quantprecision", "1")
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def forward_images(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of normalized images (B, C, H, W)."""
        logits = self.session.run(None, {"images": images.cpu().numpy()})[0]
        return torch.from_numpy(logits).to(images.device)


def speed(file: Path, vit: SparseViT, model: LoadedModel, opset: int | None = None) -> dict:
    """Size and speed of an exported file, of the same model in float32 as a file of this opset, and of PyTorch.

    Runs take turns on as many threads as torch has; medians. On the CPU, whatever `vit` is on.

    Returns:
        `bytes`, `float32_bytes`, `size_ratio`; `latency_ms` of one image and `throughput` in images/s at 32, each for
        `quantized`, `float32` (both in ONNX Runtime) and `pytorch` (float32).
    """
    vit = copy.deepcopy(vit).cpu()
    plain = _serialized(vit, model, QuantConfig(32, 32), [], opset)
    sizes = file.stat().st_size, len(plain)
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
