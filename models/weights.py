"""Weights files of many makers -> the state_dict of a timm Vision Transformer. No file can run code.

`read_vit` finds the one model in a file or a folder and gives its tensors timm's names; `load_into` puts them into a
model, all of them and nothing else. What is read, converted and refused: docs/odd_inputs.md.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import timm
import torch
from timm.models import clean_state_dict
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode

from models.formats import INDEX, read_tree
from utils.cli import Number, rate
from utils.errors import UserError, UserNote
from utils.files import read_json

STANDARD_NAMES = ("model.safetensors", "pytorch_model.bin", "model" + INDEX[0], "pytorch_model" + INDEX[1])
"""Names that a `config.json` in the same folder speaks of."""

UNUSED = re.compile(r"((vit|deit|dinov2\w*)\.)?(embeddings\.mask_token|pooler\..*)|mask_token|decoder[._].*")
"""Tensors that a classifier does not read: of the pretraining's masks and decoder, and of pooling for other tasks."""

FACTS = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "label_names", "label_descriptions")
"""What timm's configuration says of weights, besides their architecture."""

TRANSFORMERS = ("vit", "deit", "dinov2", "dinov2_with_registers", "vit_mae", "vit_msn")
"""transformers' `model_type`s that are a VisionTransformer of timm."""

TANH = str(nn.GELU("tanh"))
ACTIVATIONS = {"gelu": str(nn.GELU()), "gelu_new": TANH, "gelu_fast": TANH, "gelu_pytorch_tanh": TANH}
"""transformers' names of activations, and how torch prints them."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# The name of the patch embedding's weight tells who wrote the names; each rule is a pattern and its replacement.
NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "patch_embed.proj.weight": (),
    "embeddings.patch_embeddings.projection.weight": (
        (r"^(vit|deit|dinov2|dinov2_with_registers|beit)\.", ""),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.", ""),
        (r"^(encoder\.)?layers?\.(\d+)\.", r"blocks.\2."),
        (r"\.attention\.(attention\.(q)uery|attention\.(k)ey|attention\.(v)alue)\.", r".attn.\2\3\4_proj."),
        (r"\.attention\.([qkv])_proj\.", r".attn.\1_proj."),
        (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
        (r"\.mlp\.weights_in\.", ".mlp.w12."),
        (r"\.mlp\.weights_out\.", ".mlp.w3."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
        (r"^layernorm\.", "norm."),
        (r"^(cls_)?classifier\.", "head."),
        (r"^distillation_classifier\.", "head_dist."),
    ),
    "conv_proj.weight": (
        (r"^class_token$", "cls_token"),
        (r"^conv_proj\.", "patch_embed.proj."),
        (r"^encoder\.pos_embedding$", "pos_embed"),
        (r"^encoder\.ln\.", "norm."),
        (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
        (r"\.ln_([12])\.", r".norm\1."),
        (r"\.self_attention\.in_proj_", ".attn.qkv."),
        (r"\.self_attention\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.(linear_1|0)\.", ".mlp.fc1."),
        (r"\.mlp\.(linear_2|3)\.", ".mlp.fc2."),
        (r"^heads\.head\.", "head."),
    ),
}
"""Names of timm and the papers' code, of transformers and of torchvision."""

# A tensor's name, what the file then is, and what to do.
REFUSED_NAMES = (
    (r"relative_position_bias|^beit\.", "a BEiT, whose relative positions cannot be had on kept patches"),
    (r"pre_logits", "a ViT with a pre_logits layer before its head, which timm's has not; train a head anew"),
    (r"lora_[AB]\b", "a LoRA adapter; merge it into its model (peft's merge_and_unload) and save that"),
    (r"flat_param", "shards of FSDP; save its full state_dict (StateDictType.FULL_STATE_DICT)"),
    (r"^visual\.conv1\.|^vision_model\.", "a CLIP, which has no classifier; give a fine-tuned classifier"),
)


@dataclass(frozen=True)
class Weights:
    """One Vision Transformer out of a file or a folder."""

    path: Path
    state: dict[str, Tensor]
    """Tensors by timm's names, float32 and finite."""
    heads: int | None = None
    """Attention heads, where the file or the configuration beside it says them."""
    norm_eps: float | None = None
    """What layer norms add to the variance, where the configuration beside it says it."""
    activation: str | None = None
    """The activation, as torch prints it, where the configuration beside it says it."""
    pooling: str | None = None
    """timm's name of the pooling, where the configuration beside it says it."""
    resampling: dict[str, Any] = field(default_factory=dict)
    """How timm resamples position embeddings of such files, where it is not its usual way."""
    advice: str = ""
    """What errors add where that configuration is of another model."""
    config: dict[str, Any] = field(default_factory=dict)
    """Normalization, crop and class names of the configuration beside it, as in timm's `pretrained_cfg`."""

    @property
    def classes(self) -> int | None:
        """Rows of the classifier; None where there is none."""
        head = self.state.get("head.weight")
        return None if head is None or head.ndim != 2 else len(head)

    def arguments(self, vit: VisionTransformer) -> dict[str, object]:
        """What `vit`, made by its name alone, has to be made with besides, as the tensors show."""
        found: dict[str, object] = {}
        if "fc_norm.weight" in self.state and isinstance(vit.fc_norm, nn.Identity):
            found["global_pool"] = "avg"
        if "reg_token" in self.state and self.state["reg_token"].ndim == 3:
            found["reg_tokens"] = self.state["reg_token"].shape[1]
        if "blocks.0.attn.qkv.weight" in self.state and "blocks.0.attn.qkv.bias" not in self.state:
            found["qkv_bias"] = False
        return found


def read_weights(path: Path, key: str | None = None, flag: str | None = None) -> dict[str, Tensor]:
    """The one state_dict in a file, whatever model it is of, or the one that `key`, given by `flag`, is a part of.

    Raises `UserError` where it is not one.
    """
    found = dict(_state_dicts(read_tree(path)))
    return clean_state_dict(found[_chosen(found, path, key, flag)])


def read_vit(path: Path, key: str | None = None, flags: str = "--", to_train: bool = False) -> Weights:
    """The Vision Transformer in a file or a folder.

    Args:
        path: a file, the index of several, or a folder of torch.distributed.checkpoint.
        key: which of several models: where in the file, or what its tensors' names begin with.
        flags: errors call `key` `<flags>weights_key`.
        to_train: it gets a new head; a layer before its own is left out.

    Raises:
        UserError: it cannot be read, holds none or several, or tensors that no model can be made of.
    """
    tree = read_tree(path)
    jax = [name for name in tree if str(name).endswith("embedding/kernel")] if isinstance(tree, Mapping) else []
    if jax:
        return _from_jax(path, tree, jax[0].removesuffix("embedding/kernel"), to_train)
    found = _model_tensors(tree, path, key, flags)
    found = {name: value for name, value in found.items() if not (to_train and "pre_logits" in name)}
    _refuse_names(found, path)
    state = {name: _float32(value, name, path) for name, value in found.items() if not UNUSED.fullmatch(name)}
    return Weights(path, _fused(_named(state)), **_configuration(path))


def load_into(vit: VisionTransformer, name: str, weights: Weights, to_train: bool, flags: str | None) -> None:
    """Give `vit` the weights: every tensor of them, and every one of its own from them.

    Args:
        vit: gets them, in place.
        name: what errors call it.
        weights: whose.
        to_train: a head that does not fit, or is not there, is left as it is in `vit`.
        flags: position embeddings for another size are an error, which calls its flag `<flags>img_size`; None: they
            are resampled.

    Raises:
        UserError: weights that do not fit.
    """
    path, state = weights.path, weights.state
    fresh = {key: value for key, value in vit.state_dict().items() if key.startswith("head")}
    if to_train and any(key not in state or state[key].shape != value.shape for key, value in fresh.items()):
        state = {**state, **fresh}
    if "head.weight" not in state:
        raise UserError(f"{path} has no classifier; make one with scripts/train_teacher.py --model_path")
    if tuple(state["head.weight"].shape[1:]) == (2 * vit.embed_dim,):
        raise UserError(
            f"the classifier in {path} reads the class token and the mean of the patches side by side, as "
            "Dinov2ForImageClassification; timm's reads one of them: train one with scripts/train_teacher.py"
        )
    if not to_train and weights.classes not in (None, vit.num_classes):
        raise UserError(f"{path} has {weights.classes} classes, {name} has {vit.num_classes}")
    for trait, made in _traits(vit).items():
        said = getattr(weights, trait)
        if said not in (None, made) and not (to_train and trait == "pooling"):
            _raise_unfit(name, path, differ=[f"{trait} {said} for {made}{weights.advice}"])
    _require_grid(vit, name, path, state, flags)
    if "register_tokens" in state:
        state = {**state, "mask_token": state["register_tokens"]}  # tells timm that these are names of DINOv2's code
    own = vit.state_dict()
    try:
        state = checkpoint_filter_fn(dict(state), vit, adapt_layer_scale=True, **weights.resampling)
    except Exception as error:  # timm takes the shapes of tensors for granted
        _raise_unfit(name, path, differ=[f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"])
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    differ = sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape)
    if missing or extra or differ:
        differ = [f"{key}: {tuple(state[key].shape)} for {tuple(own[key].shape)}" for key in differ]
        _raise_unfit(name, path, missing, extra, differ)
    vit.load_state_dict(state)


def require_complete(name: str, missing: Sequence[str], extra: Sequence[str]) -> None:
    """Raise `UserError` where tensors of a model are not in its weights, `missing`, or the other way round, `extra`."""
    if missing or extra:
        _raise_unfit(name, "its folder or repository", sorted(missing), sorted(extra))


def _raise_unfit(
    name: str, path: object, missing: Sequence[str] = (), extra: Sequence[str] = (), differ: Sequence[str] = ()
) -> NoReturn:
    found = []
    for kind, keys in (("missing ", missing), ("unexpected ", extra), ("", differ)):
        found += [f"{kind}{keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")] if keys else []
    if "dist_token" in extra:
        found.append("they are of a distilled model, whose timm name has _distilled_")
    raise UserError(f"the weights in {path} do not fit {name}: {'; '.join(found)}")


def _require_grid(
    vit: VisionTransformer, name: str, path: Path, state: Mapping[str, Tensor], flags: str | None
) -> None:
    """Raise `UserError` where timm would resample patches, or positions that nobody asked to be resampled."""
    embed, kernel, positions = vit.patch_embed, state.get("patch_embed.proj.weight"), state.get("pos_embed")
    if kernel is not None and kernel.ndim == 2 and kernel.numel() == embed.proj.weight.numel():
        warnings.warn(UserNote(f"{path}: patches are read as channels, rows and columns of a matrix"), stacklevel=3)
    elif kernel is not None and kernel.shape != embed.proj.weight.shape:
        differ = f"patch_embed.proj.weight: {tuple(kernel.shape)} for {tuple(embed.proj.weight.shape)}"
        _raise_unfit(name, path, differ=[differ])
    if positions is None or vit.pos_embed is None or positions.shape == vit.pos_embed.shape:
        return
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    patches = positions.shape[1] - (1 if "register_tokens" in state else prefix) if positions.ndim == 3 else 0
    side = math.isqrt(max(patches, 0))
    if side * side != patches or patches == 0:
        extra = ["dist_token"] if "dist_token" in state and not hasattr(vit, "dist_token") else []
        differ = f"pos_embed: {tuple(positions.shape)} for {tuple(vit.pos_embed.shape)}"
        _raise_unfit(name, path, (), extra, [differ])
    if patches != embed.num_patches and flags is not None:
        (rows, cols), height = embed.grid_size, embed.patch_size[0]
        raise UserError(
            f"{path} has positions for {side} x {side} patches, {name} has {rows} x {cols}; give {flags}img_size "
            f"{side * height} to run it as it was trained, or {flags}img_size {rows * height} to resample them"
        )


def _model_tensors(tree: Any, path: Path, key: str | None, flags: str) -> dict[str, Tensor]:
    """The tensors of the one ViT in a tree of dicts, by its own names. Raises `UserError` where it is not one."""
    states = dict(_state_dicts(tree))
    models, beside = {}, {}
    for label, state in states.items():
        plain = {WRAPPERS.sub("", name): value for name, value in state.items()}
        state = plain if len(plain) == len(state) else state
        for prefix in _prefixes(state):
            one = ".".join(part for part in (label, prefix.rstrip(".")) if part)
            models[one] = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            others = {name: value for name, value in state.items() if not name.startswith(prefix)}
            # Counters, as of averaging, are no weights.
            beside[one] = {name: value for name, value in others.items() if value.ndim or value.is_floating_point()}
    if states and not models:
        names = [name for state in states.values() for name in state]
        _refuse_names(names, path)
        raise UserError(f"{path} holds no Vision Transformer that is known; its tensors are {', '.join(names[:3])} ..")
    label = _chosen(models, path, key, f"{flags}weights_key")
    model, others = models[label], beside[label]
    head = _linear(others)
    if head is not None and not any(re.match(r"head\.|(\w+_)?classifier\.", name) for name in model):
        about = f"read as a linear classifier of what the model in {label} pools"
        warnings.warn(UserNote(f"{path}: {', '.join(others)} {about}"), stacklevel=2)
        return {**model, **head}
    if others and key is None:
        raise UserError(
            f"{path} holds {next(iter(others))} beside the model in {label}; {flags}weights_key {label} leaves it out"
        )
    return model


def _linear(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensors of one linear layer and of nothing else, as `head`; None where they are others."""
    layers = {name.rpartition(".")[0] for name in tensors}
    head = {f"head.{name.rpartition('.')[2]}": value for name, value in tensors.items()}
    shapes = {name: value.ndim for name, value in head.items()}
    return head if len(layers) == 1 and shapes == {"head.weight": 2, "head.bias": 1} else None


def _refuse_names(names: Iterable[str], path: Path) -> None:
    """Raise `UserError` for names of tensors that show another kind of model."""
    for pattern, kind in REFUSED_NAMES:
        if match := next((name for name in names if re.search(pattern, name)), None):
            raise UserError(f"{path} holds {kind} ({match})")


def _prefixes(state: Mapping[str, Tensor]) -> list[str]:
    """What the names of each ViT among the tensors begin with."""
    found = []
    for marker in NAMES:
        wrapped = r"((?:vit|deit|dinov2|dinov2_with_registers|beit)\.)?" if marker.startswith("embeddings") else ""
        pattern = re.compile(rf"((?:.*?\.)??){wrapped}{re.escape(marker)}")
        found += [match[1] for name in state if (match := pattern.fullmatch(name))]
    return found


def _named(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by timm's names. Raises nothing: what no rule knows keeps its name."""
    rules = next(rules for marker, rules in NAMES.items() if any(name.endswith(marker) for name in state))
    named = {}
    for name, value in state.items():
        for pattern, to in rules:
            name = re.sub(pattern, to, name)
        named[name] = value
    if "distillation_token" in named:
        # With one classifier, which reads the class token, the other token is what timm calls a register.
        named["dist_token" if "head_dist.weight" in named else "reg_token"] = named.pop("distillation_token")
    return named


def _fused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Separate queries, keys and values put into `qkv`; a bias that keys have not is zero."""
    fused, parts = {}, {}
    for name, value in state.items():
        match = re.fullmatch(r"(.*\.attn\.)([qkv])_(?:proj\.)?(weight|bias)", name)
        if match is None:
            fused[name] = value
        else:
            parts.setdefault(f"{match[1]}qkv.{match[3]}", {})[match[2]] = value
    for name, part in parts.items():
        if {"q", "v"} <= part.keys() and ("k" in part or name.endswith("bias")) and name not in fused:
            fused[name] = torch.cat([part[one] if one in part else torch.zeros_like(part["q"]) for one in "qkv"])
        else:
            fused |= {f"{name} ({one})": value for one, value in part.items()}
    return fused


def _float32(value: Tensor, name: str, path: Path) -> Tensor:
    """A tensor of weights in float32. Raises `UserError` where it is none."""
    if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided:
        raise UserError(f"{path}: {name} is a {type(value).__name__}, not a plain tensor; save the full state_dict")
    if value.dtype not in FLOATS:
        kind = str(value.dtype).removeprefix("torch.")
        raise UserError(f"{path}: {name} is {kind}, not floating point; give the weights before quantization")
    if value.numel() == 0:
        raise UserError(f"{path}: {name} is empty, as in shards of DeepSpeed or FSDP; save the full state_dict")
    value = value.detach().float()
    if not torch.isfinite(value).all():
        raise UserError(f"{path}: {name} has values that are not finite; the training diverged or the file is damaged")
    return value


def _state_dicts(tree: Any, label: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dict of tensors by their names in a tree of dicts and lists, and where it is."""
    if isinstance(tree, (list, tuple)):
        tree = dict(enumerate(tree))
    if not isinstance(tree, Mapping):
        return
    tensors = {name: value for name, value in tree.items() if isinstance(value, Tensor) and isinstance(name, str)}
    if any(re.search(r"(^|[._])weight$", name) for name in tensors):
        yield label, tensors
    for name, value in tree.items():
        if not isinstance(value, Tensor):
            yield from _state_dicts(value, f"{label}.{name}" if label else str(name))


def _chosen(found: Collection[str], path: Path, key: str | None = None, flag: str | None = None) -> str:
    """The one place, or the one that `key` is a part of. Raises `UserError` where it is not one."""
    if not found:
        raise UserError(f"cannot read weights from {path}: it holds no plain state_dict")
    chosen = [label for label in found if key is None or label == key]
    if not chosen:
        chosen = [label for label in found if f".{key}." in f".{label}."]
    if len(chosen) == 1:
        return chosen[0]
    listed = ", ".join(label or "one at its top" for label in found)
    if key is not None:
        raise UserError(f"{path}: {flag} {key} is {'several models' if chosen else 'no model'} in it; it has {listed}")
    advice = f"say which one is meant with {flag}" if flag else "save the one that is meant alone"
    raise UserError(f"{path} holds several models: {listed}; {advice}")


def _from_jax(path: Path, arrays: Mapping[str, Tensor], prefix: str, to_train: bool) -> Weights:
    """Arrays by the names of Google's ViT and big_vision, read by timm into a model of their own sizes."""
    arrays = {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
    arrays = {name: value for name, value in arrays.items() if not (to_train and "pre_logits" in name)}
    _refuse_names(arrays, path)
    arrays = {name: _float32(value, name, path) for name, value in arrays.items()}
    try:
        scratch = VisionTransformer(**_sizes_of(arrays))
        with torch.no_grad():
            for parameter in scratch.parameters():
                parameter.fill_(math.nan)
        scratch.load_pretrained(str(path))
    except (KeyError, StopIteration, RuntimeError, ValueError) as error:
        raise UserError(f"{path} is no ViT in JAX's names that is known: {str(error).splitlines()[0]}") from None
    state = {name: value for name, value in scratch.state_dict().items() if torch.isfinite(value).all()}
    if sum(value.numel() for value in state.values()) != sum(value.numel() for value in arrays.values()):
        raise UserError(f"{path} has arrays that a plain ViT has not; it has {', '.join(sorted(arrays)[:3])} ..")
    heads, resampling = scratch.blocks[0].attn.num_heads, {"interpolation": "bilinear", "antialias": False}
    return Weights(path, state, heads=heads, resampling=resampling)


def _sizes_of(arrays: Mapping[str, Tensor]) -> dict[str, Any]:
    """What makes a model for arrays by JAX's names. Raises `KeyError`, `StopIteration` where some are missing."""
    height, width, channels, dim = arrays["embedding/kernel"].shape
    block = {name: value for name, value in arrays.items() if name.startswith("Transformer/encoderblock")}
    norms = [value for name, value in block.items() if name.endswith("/LayerNorm_0/scale")]
    heads = next(value for name, value in block.items() if name.endswith("query/kernel")).shape[-2]
    hidden = next(value for name, value in block.items() if name.endswith("Dense_0/kernel")).shape[-1]
    positions = arrays.get("pos_embedding", arrays.get("Transformer/posembed_input/pos_embedding"))
    if positions is None:
        raise KeyError("pos_embedding")
    side = math.isqrt(positions.shape[1])
    embedded = side * side != positions.shape[1]  # the class token has a position of its own
    side = math.isqrt(positions.shape[1] - embedded)
    pool = "map" if any(name.startswith("MAPHead") for name in arrays) else "token" if "cls" in arrays else "avg"
    return {
        "img_size": (side * height, side * width),
        "patch_size": (height, width),
        "in_chans": channels,
        "num_classes": arrays["head/bias"].numel() if "head/bias" in arrays else 0,
        "global_pool": pool,
        "fc_norm": False,
        "class_token": "cls" in arrays,
        "no_embed_class": not embedded,
        "embed_dim": dim,
        "depth": len(norms[0]) if norms and norms[0].ndim == 2 else len(norms),
        "num_heads": heads,
        "mlp_ratio": hidden / dim,
    }


INTERPOLATIONS = tuple(mode.value for mode in InterpolationMode)
CROPS = ("center", "squash", "border")
MEAN = Number(float, -1e38, 1e38, "what float32 tells from infinity")
CROP = Number(float, 0.01, 2, "the share of the resized image's side that is left")


def check_preprocessing(config: Mapping[str, Any], where: object) -> None:
    """Raise `UserError`, which begins with `where`, unless what `pretrained_cfg` says of images can be."""
    for name, kind in (("mean", MEAN), ("std", rate)):
        values = config.get(name)
        if values is None:
            continue
        if not isinstance(values, list | tuple) or len(values) != 3:
            raise UserError(f"{where}: its {name} {values} is not three numbers")
        for value in values:
            kind.check(value, f"{where}: of its {name},")
    if config.get("crop_pct") is not None:
        CROP.check(config["crop_pct"], f"{where}: its crop_pct")
    for name, known in (("interpolation", INTERPOLATIONS), ("crop_mode", CROPS)):
        if config.get(name) is not None and config[name] not in known:
            raise UserError(f"{where}: its {name} {config[name]} is none of {', '.join(known)}")


def _configuration(path: Path) -> dict[str, Any]:
    """What the `config.json` beside weights says of them, as fields of `Weights`; nothing where there is none."""
    file = path.with_name("config.json")
    if path.name not in STANDARD_NAMES or not file.is_file():
        return {}
    about = read_json(file)
    if not about.keys() & {"architecture", "model_type"}:
        return {}
    try:
        found = _of_timm(file, about) if "architecture" in about else _of_transformers(file, about)
    except UserError:
        raise
    except Exception as error:  # its values can be of any type, and timm raises many kinds
        raise UserError(f"{file} is damaged: {type(error).__name__}: {' '.join(str(error).split())[:160]}") from None
    check_preprocessing(found["config"], file)
    return found


def _of_timm(file: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """`_configuration` of a folder in timm's `local-dir` format."""
    about = {**about.get("pretrained_cfg", {}), **about}
    config = {key: about[key] for key in FACTS if about.get(key) is not None}
    with torch.device("meta"):
        vit = timm.create_model(f"local-dir:{file.parent}")
    if not isinstance(vit, VisionTransformer):
        raise UserError(f"{file} is of a {type(vit).__name__}, which is no VisionTransformer of timm")
    advice = f"; its own is --model local-dir:{file.parent}"
    return {"config": config, "norm_eps": _first(vit.blocks, "eps"), "advice": advice, **_traits(vit)}


def _traits(vit: VisionTransformer) -> dict[str, Any]:
    """What changes logits and no shape, by the names of the fields of `Weights`."""
    activation = next((str(module) for name, module in vit.blocks.named_modules() if name.endswith("act")), None)
    return {"heads": _first(vit.blocks, "num_heads"), "activation": activation, "pooling": vit.global_pool}


def _first(blocks: nn.Module, attribute: str) -> Any:
    """What the first module of the blocks that has it has of this name; None where none has."""
    return next((getattr(module, attribute) for module in blocks.modules() if hasattr(module, attribute)), None)


def _of_transformers(file: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """`_configuration` of a folder of transformers."""
    if about["model_type"] not in TRANSFORMERS:
        known = ", ".join(TRANSFORMERS)
        raise UserError(
            f"{file} is of a {about['model_type']}, which is no VisionTransformer of timm; known are {known}"
        )
    config = _preprocessing(file.with_name("preprocessor_config.json"))
    labels = {int(number): name for number, name in (about.get("id2label") or {}).items()}
    if sorted(labels) == list(range(len(labels))) and any(name != f"LABEL_{one}" for one, name in labels.items()):
        config["label_names"] = [labels[number] for number in range(len(labels))]
    act = about.get("hidden_act")
    heads, eps = about.get("num_attention_heads"), about.get("layer_norm_eps")
    if eps is not None:
        rate.check(eps, f"{file}: its layer_norm_eps")
    return {"config": config, "heads": heads, "norm_eps": eps, "activation": ACTIVATIONS.get(act, act)}


def _preprocessing(file: Path) -> dict[str, Any]:
    """Normalization and crop of transformers, as in timm's `pretrained_cfg`; empty where there is no file.

    Raises:
        UserError: pixels on another scale than [0, 1], or a size that timm's transform has not.
    """
    if not file.is_file():
        return {}
    about = read_json(file)
    if not about.get("do_rescale", True) or abs(about.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
        raise UserError(f"{file}: pixels are to be scaled by {about.get('rescale_factor')}, only 1/255 is known")
    plain = not about.get("do_normalize", True)
    config = {"mean": (0.0,) * 3 if plain else about["image_mean"], "std": (1.0,) * 3 if plain else about["image_std"]}
    config["interpolation"] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}[about.get("resample", 2)]
    size = about.get("size", {})
    size = {"height": size, "width": size} if isinstance(size, int) else size
    config["crop_mode"] = "center" if "shortest_edge" in size else "squash"
    edge, crop = size.get("shortest_edge", size.get("height")), about.get("crop_size", {})
    crop = crop.get("height") if isinstance(crop, dict) else crop
    config["crop_pct"] = crop / edge if about.get("do_center_crop") and crop and edge else 1.0
    return config
