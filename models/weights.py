"""Weights files of many makers -> the state_dict of a timm model. No file can run code.

`read_vit` finds the one model in a file or a folder and gives its tensors timm's names; `load_into` puts them into a
model, all of them and nothing else. What is read, converted and refused: docs/odd_inputs.md.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import math
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import timm
import torch
from timm.models import clean_state_dict
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode

from models.families import family_of, known_classes
from models.formats import INDEX, read_tree
from utils.cli import Number, rate
from utils.errors import UserError, UserNote
from utils.files import read_json

STANDARD_NAMES = ("model.safetensors", "pytorch_model.bin", "model" + INDEX[0], "pytorch_model" + INDEX[1])
"""Names that a `config.json` in the same folder speaks of."""

UNUSED = re.compile(
    r"((vit|deit|dinov2\w*|beit|swin\w*)\.)?(embeddings\.mask_token|pooler\.(?!layernorm).*)|mask_token|decoder[._].*"
    r"|beit3\.(.*\.B\..*|text_embed\.weight|vision_embed\.mask_token)"
    r"|(.*\.)?(relative_position_index|relative_coords_table|attn_mask|bias_mask|rope\w*\.(periods|freqs_(cos|sin)))"
)
"""Tensors that a classifier does not read, or that follow from its sizes: of the pretraining's masks and decoder, of
pooling for other tasks, of texts, of places in the image."""

TABLE = "relative_position_bias_table"
HEADS = ("head.weight", "head.fc.weight")
"""What timm calls a classifier."""

FACTS = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "label_names", "label_descriptions")
"""What timm's configuration says of weights, besides their architecture."""

TRANSFORMERS = (
    *("vit", "deit", "dinov2", "dinov2_with_registers", "vit_mae", "vit_msn"),
    *("beit", "dinov3_vit", "swin", "swinv2"),
)
"""transformers' `model_type`s that are models of timm."""

TANH = str(nn.GELU("tanh"))
ACTIVATIONS = {"gelu": str(nn.GELU()), "gelu_new": TANH, "gelu_fast": TANH, "gelu_pytorch_tanh": TANH}
ACTIVATIONS |= {"silu": str(nn.SiLU()), "relu": str(nn.ReLU()), "GELU()": str(nn.GELU()), "GELUTanh()": TANH}
"""transformers' names of activations, and how timm prints its own ones, to how torch prints them."""

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's names of images with so many channels: grey, colours, colours and how opaque a pixel is."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# What transformers calls the layers of an attention and of an MLP.
LAYERS = (
    (r"(\.attention(\.attention|\.self)?)?\.relative_position_bias\.", ".attn."),
    (r"\.attention\.(?:attention|self)\.(?:(q)uery|(k)ey|(v)alue)\.", r".attn.\1\2\3_proj."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1_proj."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(?:self\.)?(relative_position_bias_table|logit_scale)$", r".attn.\1"),
    (r"\.attention\.(self\.)?continuous_position_bias_mlp\.", ".attn.cpb_mlp."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
)

# The name of the patch embedding's weight tells who wrote the names; each rule is a pattern and its replacement.
NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "patch_embed.proj.weight": (),
    "embeddings.patch_embeddings.projection.weight": (
        (rf"^({'|'.join(TRANSFORMERS)})\.", ""),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.norm\.", "patch_embed.norm."),
        (r"^embeddings\.", ""),
        (r"^encoder\.(?=layers\.\d+\.(blocks|downsample)\.)", ""),
        (r"^(encoder\.)?layers?\.(\d+)\.(?!blocks\.|downsample\.)", r"blocks.\2."),
        (r"^(encoder\.relative_position_bias|shared_position_bias)\.", "rel_pos_bias."),
        *LAYERS,
        (r"\.lambda_([12])$", r".gamma_\1"),
        (r"\.mlp\.weights_in\.", ".mlp.w12."),
        (r"\.mlp\.weights_out\.", ".mlp.w3."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
        (r"^layernorm\.", "norm."),
        (r"^pooler\.layernorm\.", "fc_norm."),
        (r"^(cls_)?classifier\.", "head."),
        (r"^distillation_classifier\.", "head_dist."),
    ),
    "embeddings.patch_embeddings.weight": (
        (rf"^({'|'.join(TRANSFORMERS)})\.", ""),
        (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
        (r"^embeddings\.register_tokens$", "reg_token"),
        (r"^embeddings\.", ""),
        (r"^(model\.|encoder\.)?layers?\.(\d+)\.", r"blocks.\2."),
        *LAYERS,
        (r"\.layer_scale(\d)\.lambda1$", r".gamma_\1"),
        (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
        (r"\.mlp\.up_proj\.", ".mlp.fc1."),
        (r"\.mlp\.down_proj\.", ".mlp.fc2."),
        (r"^classifier\.", "head."),
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
    (r"pre_logits", "a ViT with a pre_logits layer before its head, which timm's has not; train a head anew"),
    (r"lora_[AB]\b", "a LoRA adapter; merge it into its model (peft's merge_and_unload) and save that"),
    (r"flat_param", "shards of FSDP; save its full state_dict (StateDictType.FULL_STATE_DICT)"),
    (r"^visual\.conv1\.|^vision_model\.", "a CLIP, which has no classifier; give a fine-tuned classifier"),
)


@dataclass(frozen=True)
class Weights:
    """One model out of a file or a folder."""

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
        head = next((self.state[name] for name in HEADS if name in self.state), None)
        return None if head is None or head.ndim != 2 else len(head)

    def arguments(self, vit: nn.Module) -> dict[str, object]:
        """What `vit`, made by its name alone, has to be made with besides, as the tensors show."""
        found, known, own = {}, inspect.signature(type(vit)).parameters, vit.state_dict()
        if "fc_norm.weight" in self.state and isinstance(getattr(vit, "fc_norm", None), nn.Identity):
            found["global_pool"] = "avg"
        registers = self.state.get("reg_token")
        ours = own.get("reg_token")
        if registers is not None and registers.ndim == 3 and (ours is None or registers.shape != ours.shape):
            found |= {name: registers.shape[1] for name in ("reg_tokens", "num_reg_tokens") if name in known}
        bias = {f"blocks.0.attn.{name}" for name in ("qkv.bias", "q_bias", "q_proj.bias")}
        if "blocks.0.attn.qkv.weight" in self.state and not bias & self.state.keys() and bias & own.keys():
            found["qkv_bias"] = False
        return found


def read_weights(path: Path, key: str | None = None, flag: str | None = None) -> dict[str, Tensor]:
    """The one state_dict in a file, whatever model it is of, or the one that `key`, given by `flag`, is a part of.

    Raises `UserError` where it is not one.
    """
    found = dict(_state_dicts(read_tree(path)))
    return clean_state_dict(found[_chosen(found, path, key, flag)])


def read_vit(path: Path, vit: nn.Module, key: str | None = None, flags: str = "--", to_train: bool = False) -> Weights:
    """The model in a file or a folder.

    Args:
        path: a file, the index of several, or a folder of torch.distributed.checkpoint.
        vit: made by the name that it shall have; may be on the meta device.
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
    found = _model_tensors(tree, path, vit, key, flags)
    found = {name: value for name, value in found.items() if not (to_train and "pre_logits" in name)}
    _refuse_names(found, path)
    state = {name: _float32(value, name, path) for name, value in found.items() if not UNUSED.fullmatch(name)}
    return Weights(path, _joined(_named(state), vit.state_dict()), **_configuration(path))


def load_into(vit: nn.Module, name: str, weights: Weights, to_train: bool, flags: str | None) -> None:
    """Give `vit` the weights: every tensor of them, and every one of its own from them.

    Args:
        vit: gets them, in place.
        name: what errors call it.
        weights: whose.
        to_train: a head that does not fit, or is not there, is left as it is in `vit`.
        flags: positions for another size are an error, which calls its flag `<flags>img_size`; None: they are
            resampled.

    Raises:
        UserError: weights that do not fit.
    """
    path, state, own = weights.path, weights.state, vit.state_dict()
    head = next((state[name] for name in HEADS if name in state), None)
    if head is None and not to_train:
        raise UserError(f"{path} has no classifier; make one with scripts/train_teacher.py --model_path")
    if head is not None and tuple(head.shape[1:]) == (2 * vit.num_features,) and not to_train:
        raise UserError(
            f"the classifier in {path} reads the class token and the mean of the patches side by side, as "
            "Dinov2ForImageClassification; timm's reads one of them: train one with scripts/train_teacher.py"
        )
    if not to_train and weights.classes not in (None, vit.num_classes):
        raise UserError(f"{path} has {weights.classes} classes, {name} has {vit.num_classes}")
    for trait, made in _traits(vit).items():
        said = getattr(weights, trait)
        if said not in (None, made) and not (to_train and trait == "pooling"):
            raise_unfit(name, path, differ=[f"{trait} {said} for {made}{weights.advice}"])
    state = _with_kernel(vit, name, path, state)
    _require_grid(vit, name, path, state, flags)
    if "register_tokens" in state:
        state = {**state, "mask_token": state["register_tokens"]}  # tells timm that these are names of DINOv2's code
    try:
        state = _converted(vit, name, path, state, weights.resampling)
    except UserError:
        raise
    except Exception as error:  # timm takes the shapes of tensors for granted
        raise_unfit(name, path, differ=[f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"])
    fresh = {key: value for key, value in own.items() if key.startswith("head")}
    if to_train and any(key not in state or state[key].shape != value.shape for key, value in fresh.items()):
        state = {**{key: value for key, value in state.items() if not key.startswith("head")}, **fresh}
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    differ = sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape)
    if missing or extra or differ:
        differ = [f"{key}: {tuple(state[key].shape)} for {tuple(own[key].shape)}" for key in differ]
        raise_unfit(name, path, missing, extra, differ)
    vit.load_state_dict(state)


def timm_filter(vit: nn.Module, **how: object) -> Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]:
    """What timm does to tensors before models of the class of `vit` load them: its module's `checkpoint_filter_fn`.

    `how`: arguments of it; what it does not know is left out. Where a module has none, tensors stay as they are.
    """
    convert = getattr(sys.modules[type(vit).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return lambda state, _: state
    known = inspect.signature(convert).parameters
    how = {name: value for name, value in ({"adapt_layer_scale": True} | how).items() if name in known}

    def quietly(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        with contextlib.redirect_stdout(io.StringIO()):  # timm prints what it looks for in vain
            return convert(state, model, **how)

    return quietly


def _converted(
    vit: nn.Module, name: str, path: Path, state: Mapping[str, Tensor], resampling: Mapping[str, object]
) -> dict[str, Tensor]:
    """The tensors after `timm_filter`. Raises `UserError` where it leaves out one that says something."""
    own = vit.state_dict()
    # A table of the model's own size stays: of windows that are not square, timm may guess another shape.
    same = {key for key, value in state.items() if key in own and own[key].shape == value.shape}
    fitting = {key: state[key] for key in same if key.endswith(TABLE)}
    rest = {key: value for key, value in state.items() if key not in fitting}
    strange = [key for key in rest if key.endswith(TABLE) and key not in own]
    if strange:
        raise_unfit(name, path, extra=strange)
    found = timm_filter(vit, **resampling)(dict(rest), vit)
    lost = {key: value for key, value in rest.items() if key not in found and key != "mask_token" and value.any()}
    lost = {key: value for key, value in lost.items() if not any(_overlap(value, one) for one in found.values())}
    made = {key: value for key, value in found.items() if key not in rest}
    made = {key: value for key, value in made.items() if not any(_overlap(value, one) for one in rest.values())}
    # What was put together of several, as one layer of queries, keys and values, has as many numbers as they have.
    if lost and sum(value.numel() for value in lost.values()) != sum(value.numel() for value in made.values()):
        raise_unfit(name, path, extra=sorted(lost))
    return found | fitting


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two contiguous tensors share memory: one is the other, or a part of it."""
    (first, size), (second, length) = ((tensor.data_ptr(), tensor.nbytes) for tensor in (one, other))
    return first < second + length and second < first + size


def require_complete(name: str, missing: Sequence[str], extra: Sequence[str]) -> None:
    """Raise `UserError` where tensors of a model are not in its weights, `missing`, or the other way round, `extra`."""
    if missing or extra:
        raise_unfit(name, "its folder or repository", sorted(missing), sorted(extra))


def raise_unfit(
    name: str, path: object, missing: Sequence[str] = (), extra: Sequence[str] = (), differ: Sequence[str] = ()
) -> NoReturn:
    """Raise `UserError`: tensors of a model are not in its weights, the other way round, or differ, in words."""
    found = []
    for kind, keys in (("missing ", missing), ("unexpected ", extra), ("", differ)):
        found += [f"{kind}{keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")] if keys else []
    if "dist_token" in extra:
        found.append("they are of a distilled model, whose timm name has _distilled_")
    raise UserError(f"the weights in {path} do not fit {name}: {'; '.join(found)}")


def _with_kernel(vit: nn.Module, name: str, path: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with a patch embedding of the model's shape. Raises `UserError` where timm would resample it."""
    ours, kernel = vit.patch_embed.proj.weight, state.get("patch_embed.proj.weight")
    if kernel is None or kernel.shape == ours.shape:
        return dict(state)
    if kernel.ndim != 2 or kernel.numel() != ours.numel():
        differ = f"patch_embed.proj.weight: {tuple(kernel.shape)} for {tuple(ours.shape)}"
        raise_unfit(name, path, differ=[differ])
    warnings.warn(UserNote(f"{path}: patches are read as channels, rows and columns of a matrix"), stacklevel=3)
    return {**state, "patch_embed.proj.weight": kernel.reshape(ours.shape)}


def _require_grid(vit: nn.Module, name: str, path: Path, state: Mapping[str, Tensor], flags: str | None) -> None:
    """Raise `UserError` where timm would resample positions that nobody asked to be resampled."""
    grid, positions, ours = vit.patch_embed.grid_size, state.get("pos_embed"), getattr(vit, "pos_embed", None)
    if positions is not None and ours is not None and positions.shape != ours.shape:
        prefix = 0 if getattr(vit, "no_embed_class", False) else ours.shape[1] - math.prod(grid)
        patches = positions.shape[1] - (1 if "register_tokens" in state else prefix) if positions.ndim == 3 else 0
        side = math.isqrt(max(patches, 0))
        if side * side != patches or patches == 0:
            extra = ["dist_token"] if "dist_token" in state and not hasattr(vit, "dist_token") else []
            differ = f"pos_embed: {tuple(positions.shape)} for {tuple(ours.shape)}"
            raise_unfit(name, path, (), extra, [differ])
        if patches != math.prod(grid) and flags is not None:
            _raise_another_size(vit, name, path, side, flags)
    for key, ours in vit.state_dict().items():
        table = state.get(key)
        if not key.endswith(TABLE) or table is None or table.shape == ours.shape:
            continue
        window = tuple(vit.get_submodule(key.removesuffix(f".{TABLE}")).window_size)
        others = len(ours) - math.prod(2 * size - 1 for size in window)  # distances to prefix tokens
        side = math.isqrt(max(len(table) - others, 0))
        if table.shape[1:] != ours.shape[1:] or side**2 != len(table) - others or side % 2 == 0:
            raise_unfit(name, path, differ=[f"{key}: {tuple(table.shape)} for {tuple(ours.shape)}"])
        if flags is not None and window == tuple(grid):
            _raise_another_size(vit, name, path, (side + 1) // 2, flags)
        if flags is not None:
            raise_unfit(name, path, differ=[f"{key}: {tuple(table.shape)} for {tuple(ours.shape)}"])


def _raise_another_size(vit: nn.Module, name: str, path: Path, side: int, flags: str) -> NoReturn:
    """For weights with positions of `side` x `side` patches."""
    (rows, cols), height = vit.patch_embed.grid_size, vit.patch_embed.patch_size[0]
    raise UserError(
        f"{path} has positions for {side} x {side} patches, {name} has {rows} x {cols}; give {flags}img_size "
        f"{side * height} to run it as it was trained, or {flags}img_size {rows * height} to resample them"
    )


def _model_tensors(tree: Any, path: Path, vit: nn.Module, key: str | None, flags: str) -> dict[str, Tensor]:
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
        if not _prefixes(state) and _is_known_to_timm(state, vit):
            models[label], beside[label] = state, {}
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


def _is_known_to_timm(state: Mapping[str, Tensor], vit: nn.Module) -> bool:
    """Whether timm's own conversion for models like `vit` makes timm's names of these."""
    try:
        return "patch_embed.proj.weight" in timm_filter(vit)(dict(state), vit)
    except Exception:  # timm takes names and shapes for granted
        return False


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
        wrapped = rf"((?:{'|'.join(TRANSFORMERS)})\.)?" if marker.startswith("embeddings") else ""
        pattern = re.compile(rf"((?:.*?\.)??){wrapped}{re.escape(marker)}")
        found += [match[1] for name in state if (match := pattern.fullmatch(name))]
    return found


def _named(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by timm's names. Raises nothing: what no rule knows keeps its name."""
    rules = next((rules for marker, rules in NAMES.items() if any(name.endswith(marker) for name in state)), ())
    named = {}
    for name, value in state.items():
        for pattern, to in rules:
            name = re.sub(pattern, to, name)
        named[name] = value
    gated = {name for name in named if name.endswith(".mlp.fc1_g.weight")}
    if gated:  # of the two layers of a gated MLP transformers calls one as the only one of a plain MLP
        named = {re.sub(r"\.mlp\.fc1\.", ".mlp.fc1_x.", name): value for name, value in named.items()}
    if "distillation_token" in named:
        # With one classifier, which reads the class token, the other token is what timm calls a register.
        named["dist_token" if "head_dist.weight" in named else "reg_token"] = named.pop("distillation_token")
    return named


def _joined(state: Mapping[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """Separate queries, keys and values put into `qkv` where the model has them so; a bias that keys have not is zero.

    `own`: the names of the model's tensors. A zero bias that the model has not says nothing, and is left out.
    """
    found, parts = {}, {}
    for name, value in state.items():
        match = re.fullmatch(r"(.*\.attn\.)([qkv])_(?:proj\.)?(weight|bias)", name)
        if match is None:
            found[name] = value
        else:
            parts.setdefault((match[1], match[3]), {})[match[2]] = value
    for (attn, kind), part in parts.items():
        joined = f"{attn}qkv.{kind}"
        complete = {"q", "v"} <= part.keys() and ("k" in part or kind == "bias")
        if joined in own and complete and joined not in found:
            found[joined] = torch.cat([part[one] if one in part else torch.zeros_like(part["q"]) for one in "qkv"])
            continue
        for one, value in part.items():
            apart = [f"{attn}{one}{between}{kind}" for between in ("_proj.", "_", ".")]
            known = next((name for name in apart if name in own), None)
            if known is not None or kind == "weight" or value.any():
                found[known or f"{joined} ({one})"] = value
    return found


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
        if not isinstance(values, list | tuple) or len(values) not in MODES:
            raise UserError(f"{where}: its {name} {values} is not a number for each channel")
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
    if family_of(vit) is None:
        raise UserError(f"{file} is of a {type(vit).__name__}, which is not one of timm's {known_classes()}")
    advice = f"; its own is --model local-dir:{file.parent}"
    return {"config": config, "norm_eps": _first(vit, "eps"), "advice": advice, **_traits(vit)}


def _traits(vit: nn.Module) -> dict[str, Any]:
    """What changes logits and no shape, by the names of the fields of `Weights`."""
    act = next((str(module) for name, module in _blocks(vit).named_modules() if name.endswith("act")), None)
    return {"heads": _first(vit, "num_heads"), "activation": ACTIVATIONS.get(act, act), "pooling": vit.global_pool}


def _first(vit: nn.Module, attribute: str) -> Any:
    """What the first module of the blocks that has it has of this name; None where none has."""
    return next((getattr(module, attribute) for module in _blocks(vit).modules() if hasattr(module, attribute)), None)


def _blocks(vit: nn.Module) -> nn.Module:
    """The transformer blocks of a timm model, or its stages of them."""
    return vit.blocks if hasattr(vit, "blocks") else vit.layers


def _of_transformers(file: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """`_configuration` of a folder of transformers."""
    if about["model_type"] not in TRANSFORMERS:
        known = ", ".join(TRANSFORMERS)
        raise UserError(f"{file} is of a {about['model_type']}, which is no model of timm that is known; {known} are")
    config = _preprocessing(file.with_name("preprocessor_config.json"))
    labels = {int(number): name for number, name in (about.get("id2label") or {}).items()}
    if sorted(labels) == list(range(len(labels))) and any(name != f"LABEL_{one}" for one, name in labels.items()):
        config["label_names"] = [labels[number] for number in range(len(labels))]
    act = about.get("hidden_act")
    heads, eps = about.get("num_attention_heads", about.get("num_heads")), about.get("layer_norm_eps")
    heads = heads[0] if isinstance(heads, list) else heads
    pooling = {True: "avg", False: "token"}.get(about.get("use_mean_pooling"))
    if about["model_type"] == "dinov3_vit" and about.get("rope_theta", 100) != 100:
        raise UserError(f"{file}: its rope_theta {about['rope_theta']} is not the 100 of timm's DINOv3")
    if eps is not None:
        rate.check(eps, f"{file}: its layer_norm_eps")
    traits = {"heads": heads, "activation": ACTIVATIONS.get(act, act), "pooling": pooling}
    return {"config": config, "norm_eps": eps, **traits}


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
