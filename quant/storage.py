"""A quantized model on disk: integers, scales and what is left in floating point, with all that makes it again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models import LoadedModel, SparseViT
from models.registry import bare_model
from quant.calibration import fitting
from quant.config import QuantConfig
from quant.insert import quantized_layers, quantized_vit, quantizers
from quant.quantizers import largest_value_scale
from utils.errors import UserError
from utils.files import atomic, read_json, require_fields, user_path, writable_folder, write_json

FORMAT = 1
WEIGHTS, CONFIG = "model.safetensors", "quantized.json"


def save_quantized(
    folder: str | Path, quantized: SparseViT, model: LoadedModel, config: QuantConfig, classes: list[str]
) -> Path:
    """Write a quantized model so that `load_quantized(folder)` gives the same logits.

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
    state = {name: value.detach().cpu().contiguous() for name, value in quantized.state_dict().items()}
    for name, layer in quantized_layers(quantized).items():
        if layer.weight_scale is not None:
            state[f"{name}.linear.weight"] = layer.integers().cpu()
    with atomic(folder / WEIGHTS) as partial:
        save_file(state, partial)
    timm_name, args = model.architecture
    about = {
        "format": FORMAT,
        "model": model.name,
        "architecture": timm_name,
        "arguments": args,
        "quantization": dataclasses.asdict(config),
        "preprocessing": dataclasses.asdict(model.preprocessing),
        "classes": classes,
    }
    write_json(folder / CONFIG, {**about, "sha256": _digest(about, folder / WEIGHTS)})
    return folder


def _digest(about: dict, weights: Path) -> str:
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


def require_own_folder(folder: str | Path) -> Path:
    """Make the folder if needed. Raises `UserError` where it cannot be written to, or holds another model's weights."""
    folder = writable_folder(folder, "--save")
    if (folder / WEIGHTS).exists() and not (folder / CONFIG).exists():
        raise UserError(f"--save {folder} holds another model's {WEIGHTS}; give another folder")
    return folder


def load_quantized(folder: str | Path) -> SparseViT:
    """The model that `save_quantized` wrote, on the CPU. Raises `UserError` where there is none or it is damaged."""
    folder = user_path(folder, "load_quantized:")
    about = read_json(folder / CONFIG)
    if about.get("format") != FORMAT:
        raise UserError(f"{folder / CONFIG} has format {about.get('format')}, this program reads {FORMAT}")
    require_fields(about, {"architecture": str, "arguments": dict, "quantization": dict}, folder / CONFIG)
    if about.get("sha256", (found := _digest(about, folder / WEIGHTS))) != found:
        raise UserError(f"{folder} is damaged: {CONFIG} and {WEIGHTS} are not what was written; save it again")
    try:
        vit = bare_model(about["architecture"], about["arguments"])
        quantization = {**about["quantization"], "keep": tuple(about["quantization"]["keep"])}
        quantized = quantized_vit(SparseViT(vit), QuantConfig(**quantization), scale_of=largest_value_scale)
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
