"""A quantized model on disk: integers, scales and what is left in floating point, with all that makes it again."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models import LoadedModel, SparseImages, SparseViT
from models.registry import bare_model
from quant.calibration import fitting, quantize
from quant.config import QuantConfig
from quant.hadamard import with_hadamard
from quant.insert import quantized_layers, quantized_vit, quantizers
from quant.quantizers import largest_value_scale
from quant.reconstruction import FinishedStages
from quant.rotation import without_scales
from utils.device import device_name, versions
from utils.errors import UserError
from utils.files import atomic, read_json, require_fields, user_path, writable_folder, write_json
from utils.ranks import rank, ranks, summed

FORMAT = 1
WEIGHTS, CONFIG, MADE_FROM = "model.safetensors", "quantized.json", "made_from.json"
STAGES = "stages"
"""Folder of a reconstruction that is not finished."""


def save_quantized(
    folder: str | Path, quantized: SparseViT, model: LoadedModel, config: QuantConfig, classes: list[str]
) -> Path:
    """Write a quantized model so that `load_quantized(folder)` gives the same logits.

    A model that is there already is replaced; at no moment does the folder look like one that it does not hold.

    Args:
        folder: made if needed; gets `model.safetensors` (weights as int8 with their scales) and `quantized.json`.
        quantized: what `quantize` made of `model`.
        model: whose architecture and preprocessing are written down.
        config: what it was quantized with.
        classes: names of the classes, in order.

    Raises:
        UserError: a folder that cannot be written, or a model of which the architecture is not known.
    """
    if model.architecture is None:
        raise UserError(f"--save: the architecture of {model.name} is not known, so it could not be made again")
    folder, config = require_own_folder(folder), fitting(SparseViT(model.vit), config)
    state = _apart({name: value.detach().cpu().contiguous() for name, value in quantized.state_dict().items()})
    for name, layer in quantized_layers(quantized).items():
        if layer.weight_scale is not None:
            state[f"{name}.linear.weight"] = layer.integers().cpu()
    with atomic(folder / WEIGHTS) as partial:
        save_file(state, partial)
        for name in (MADE_FROM, WEIGHTS):
            (folder / name).unlink(missing_ok=True)
        about = _about(model, config, classes)
        write_json(folder / CONFIG, {**about, "sha256": _checksum(about, partial)})
    return folder


def _apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, a copy of its own for every name: blocks that share a table of positions share memory."""
    first = {value.data_ptr(): name for name, value in reversed(state.items())}
    return {name: value if first[value.data_ptr()] == name else value.clone() for name, value in state.items()}


def _about(model: LoadedModel, config: QuantConfig, classes: list[str]) -> dict[str, object]:
    """What `quantized.json` says."""
    timm_name, args = model.architecture
    return {
        "format": FORMAT,
        "model": model.name,
        "architecture": timm_name,
        "arguments": args,
        "quantization": dataclasses.asdict(config),
        "preprocessing": dataclasses.asdict(model.preprocessing),
        "classes": classes,
    }


def _checksum(about: dict, weights: Path) -> str:
    """What tells whether a configuration or its weights were changed."""
    told = {key: value for key, value in about.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    try:
        with open(weights, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"cannot read {weights}: {error.strerror}") from None
    return digest.hexdigest()


def require_own_folder(folder: str | Path, flag: str = "--save") -> Path:
    """Make the folder if needed. Raises `UserError` where it cannot be written to, or holds another model's weights."""
    folder = writable_folder(folder, flag)
    if (folder / WEIGHTS).exists() and not (folder / CONFIG).exists():
        raise UserError(f"{flag} {folder} holds another model's {WEIGHTS}; give another folder")
    return folder


def quantized_once(
    folder: Path,
    vit: SparseViT,
    images: SparseImages,
    model: LoadedModel,
    config: QuantConfig,
    classes: list[str],
    progress: bool = False,
) -> tuple[SparseViT, float]:
    """`quantize`, and the seconds that it took; a run that ends later finds the model in `folder`.

    What is there is taken where it was made by the same code, on the same device, from the same weights, images and
    settings; else it is replaced. Nothing is written where nothing is quantized.

    Args:
        folder: for the model, as `save_quantized` writes it, and `made_from.json`, which is written last.
        vit: as for `quantize`; `model` on its device.
        images: as for `quantize`.
        model: as for `save_quantized`, as are `config` and `classes`.
        progress: as for `quantize`.

    Raises:
        UserError: what `quantize`, `save_quantized` and `load_quantized` raise.
    """
    if config.w_bit == config.a_bit == 32:
        return quantize(vit, images, config, progress), 0.0
    made, digest = folder / MADE_FROM, _digest(vit, images, model, config, classes)
    there = made.is_file() and (folder / WEIGHTS).is_file()
    found = read_json(made, digest=str, seconds=float) if there else {}
    if summed([float(found.get("digest") == digest)], vit.device)[0] == ranks():
        return load_quantized(folder).to(vit.device), found["seconds"]
    finished = _finished_stages(folder, digest) if config.reconstruct else None
    start = time.perf_counter()
    quantized = quantize(vit, images, config, progress, finished)
    seconds = round(time.perf_counter() - start, 3)
    if rank() == 0:
        save_quantized(folder, quantized, model, config, classes)
        write_json(made, {"digest": digest, "seconds": seconds})
        remove_stages(folder)
    return quantized, seconds


def _finished_stages(folder: Path, digest: str) -> FinishedStages:
    """Where a reconstruction of that digest keeps its stages; those of another one are removed."""
    stages = folder / STAGES
    marker = stages / MADE_FROM
    if not marker.is_file() or read_json(marker, digest=str)["digest"] != digest:
        remove_stages(folder)
        stages.mkdir(parents=True, exist_ok=True)
        write_json(marker, {"digest": digest})
    return FinishedStages(stages)


def remove_stages(folder: Path) -> None:
    """Take away what a reconstruction that was stopped left in `folder`."""
    shutil.rmtree(folder / STAGES, ignore_errors=True)


def remove_quantized(folder: Path) -> None:
    """Take away what `quantized_once` left in `folder`, and the folder if nothing else is in it."""
    remove_stages(folder)
    for name in (MADE_FROM, CONFIG, WEIGHTS):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _digest(vit: SparseViT, images: SparseImages, model: LoadedModel, config: QuantConfig, classes: list[str]) -> str:
    """SHA-256 of all that the model and what is written beside it depend on."""
    machine = {"device": device_name(vit.device), "ranks": ranks(), **versions()}
    settings = {**_about(model, config, classes), "weights": model.fingerprint(), **machine}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for tensor in (images.patches, images.positions):
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().numpy())
    root = Path(__file__).parents[1]
    for file in sorted((*root.glob("quant/*.py"), *root.glob("models/**/*.py"))):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def load_quantized(folder: str | Path) -> SparseViT:
    """The model that `save_quantized` wrote, on the CPU. Raises `UserError` where there is none or it is damaged."""
    folder = user_path(folder, "load_quantized:")
    about = read_json(folder / CONFIG)
    if about.get("format") != FORMAT:
        raise UserError(f"{folder / CONFIG} has format {about.get('format')}, this program reads {FORMAT}")
    require_fields(about, {"architecture": str, "arguments": dict, "quantization": dict}, folder / CONFIG)
    if about.get("sha256", (found := _checksum(about, folder / WEIGHTS))) != found:
        raise UserError(f"{folder} is damaged: {CONFIG} and {WEIGHTS} are not what was written; remove it")
    try:
        vit = bare_model(about["architecture"], about["arguments"])
        lists = {key: tuple(value) for key, value in about["quantization"].items() if isinstance(value, list)}
        config, bare = QuantConfig(**{**about["quantization"], **lists}), SparseViT(vit)
        bare = without_scales(bare) if config.rotate else bare
        bare = with_hadamard(bare) if config.hadamard else bare
        quantized = quantized_vit(bare, config, scale_of=largest_value_scale)
        state = load_file(folder / WEIGHTS)
        for name, layer in quantized_layers(quantized).items():
            if layer.weight_scale is not None:
                key = f"{name}.linear.weight"
                state[key] = state[key].float() * state[f"{name}.weight_scale"][:, None]
            if layer.linear.bias is None and f"{name}.linear.bias" in state:
                layer.linear.bias = nn.Parameter(torch.empty(layer.linear.out_features), requires_grad=False)
        quantized.load_state_dict(state)
    except UserError:
        raise
    except Exception as error:  # timm, safetensors and torch each raise their own kinds
        raise UserError(f"cannot load {folder}: {type(error).__name__}: {str(error).splitlines()[0][:160]}") from None
    for quantizer in quantizers(quantized).values():
        quantizer.observer = None
    return quantized
