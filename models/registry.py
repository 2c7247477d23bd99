"""Model names -> a frozen timm model with its weights, its preprocessing and its data set."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_pretrained, save_for_hf
from torch import Tensor, nn

from models.config import NAMED_MODELS, ModelConfig, NamedModel, short_name
from models.families import FAMILIES
from models.formats import weights_file
from models.patches import PatchGrid
from models.sparse_vit import SparseViT, grid_of, require_supported
from models.weights import MODES, Weights, check_preprocessing, load_into, read_vit, require_complete, timm_filter
from utils.cli import Number
from utils.errors import UserError, UserNote
from utils.files import read_json, require_fields, user_path

logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a failed download is told in one line of ours

LOCAL = {"architecture": str, "model_args": dict, "pretrained_cfg": dict}
DEPTH = Number(int, 1, 1000, "each block is made")


@dataclass(frozen=True)
class Preprocessing:
    """How a model wants its images, from its timm `pretrained_cfg`. `mean` and `std` have a number for each channel."""

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str

    @classmethod
    def of(cls, vit: nn.Module, name: str = "model") -> Preprocessing:
        """What the configuration of `vit` says; the image's size is what its patch embedding takes.

        Raises `UserError`, which names the model, for what cannot be.
        """
        check_preprocessing(getattr(vit, "pretrained_cfg", None) or {}, name)
        config = timm.data.resolve_model_data_config(vit)
        config["input_size"] = (vit.patch_embed.proj.in_channels, *vit.patch_embed.img_size)
        for key in ("mean", "std"):
            config[key] = _of_channels(key, tuple(config[key]), config["input_size"][0], name)
        return cls(**{key: config[key] for key in cls.__dataclass_fields__})

    @property
    def mode(self) -> str:
        """Pillow's name of images with the model's channels."""
        return MODES[self.input_size[0]]

    def eval_transform(self) -> Callable:
        """PIL image of that `mode` -> normalized tensor of shape `input_size`, by timm's own evaluation transform."""
        return timm.data.create_transform(
            self.input_size,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )

    def normalize(self, images: Tensor) -> Tensor:
        """Images in [0, 1], channels third from the end -> normalized."""
        mean, std = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return (images - mean) / std

    def denormalize(self, images: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        mean, std = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return images * std + mean


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be inverted: evaluation mode, no gradients to its weights."""

    name: str
    vit: nn.Module
    preprocessing: Preprocessing
    dataset: str | None
    """`digits`, `cifar10`, `cifar100`, `imagenet`, or None where neither the name nor the configuration tells."""
    architecture: tuple[str, dict] | None = None
    """timm's name of the architecture, and the arguments with which `bare_model` makes it; None: it cannot be saved."""

    @classmethod
    def of(
        cls,
        vit: nn.Module,
        name: str = "model",
        dataset: str | None = None,
        architecture: tuple[str, dict] | None = None,
    ) -> LoadedModel:
        """A timm model that one has as an object; it is frozen, and changes to evaluation mode.

        Args:
            vit: with its weights; normalization and crop are those of its `pretrained_cfg`.
            name: what pools and reports call it.
            dataset: as the field.
            architecture: as the field; found by itself where timm's name and the sizes of images and head are enough.

        Raises:
            UserError: an architecture that `SparseViT` cannot honour, or a normalization or crop that cannot be.
        """
        require_supported(vit, name)
        channels = vit.patch_embed.proj.in_channels
        if channels not in MODES:
            known = ", ".join(f"{count} ({mode})" for count, mode in MODES.items())
            raise UserError(f"{name} takes images of {channels} channels; known are {known}")
        architecture = architecture or _known_architecture(vit)
        return cls(name, vit.eval().requires_grad_(False), Preprocessing.of(vit, name), dataset, architecture)

    @property
    def classes(self) -> int:
        """How many classes it tells apart."""
        return self.vit.num_classes

    @property
    def grid(self) -> PatchGrid:
        """The patches of its images."""
        return grid_of(self.vit)

    def sparse(self, device: torch.device | str = "cpu") -> SparseViT:
        """The model on kept patches, on `device`; it shares its weights with `vit`, which moves along."""
        return SparseViT(self.vit.to(device))  # moved first: some of its weights are views of those of `vit`

    def fingerprint(self) -> str:
        """SHA-256 of architecture and weights, first 16 hex digits: what makes two models the same."""
        digest = hashlib.sha256(type(self.vit).__name__.encode())
        for key, value in sorted(self.vit.state_dict().items()):
            digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def load_model(
    name: str | ModelConfig,
    model_path: str | Path | None = None,
    random_weights: bool = False,
    classes: int | None = None,
    path_flag: str = "--model_path",
) -> LoadedModel:
    """Load a model by name.

    Args:
        name: a name of `NAMED_MODELS`, any timm model of `models.families`, `hf-hub:org/name` or `local-dir:PATH`; or a
            `ModelConfig`, which says the path as well.
        model_path: local weights, where `name` is a name: a file, or a folder with `<name>.pth`, `<name>.safetensors`
            or one other weights file in it. None takes those of the `local-dir:`, or the hub's.
        random_weights: leave the weights at their initialization (benchmarks, training from scratch).
        classes: load it to be trained for so many classes: weights with another number of them, or without a head, get
            a new head, and a named CIFAR model starts from timm's ImageNet weights.
        path_flag: what errors call `model_path`.

    Raises:
        UserError: unknown name, an architecture that `SparseViT` cannot honour, a size that it cannot have, or weights
            that are missing, damaged, unsafe, not certain or do not fit.
    """
    config = name if isinstance(name, ModelConfig) else ModelConfig(name, model_path)
    name, named, size, to_train = config.name, NAMED_MODELS.get(config.name), config.img_size, classes is not None
    if named is None and not name.startswith(("hf-hub:", "local-dir:")):
        require_timm_name(name)
    outline, flags = _outline(name, named, path_flag), path_flag.removesuffix("path").removesuffix("model_")
    side = outline.patch_embed.patch_size
    if size is not None and (size % side[0] or size % side[1]):
        raise UserError(f"{flags}img_size {size} is no multiple of {side[0]}, the patch size of {name}")
    file = None if random_weights else _weights_path(name, named, config.path, to_train, path_flag)
    if config.key is not None and file is None:
        raise UserError(f"{flags}weights_key {config.key} chooses in a file; give one with {path_flag}")
    weights = None if file is None else read_vit(file, outline, config.key, flags, to_train)
    args = {} if weights is None else weights.arguments(outline)
    args |= {} if size is None else {"img_size": size}
    own = config.path is None  # the name's own weights: they and its configuration have to agree
    count = named.classes if named else None if weights is None or own else weights.classes
    vit = _create(name, named, {**args, "num_classes": classes if to_train else count}, path_flag)
    if named is not None and named.pretrained_cfg:
        vit.pretrained_cfg = {**vit.pretrained_cfg, **named.pretrained_cfg, "num_classes": named.classes}
    require_supported(vit, name)
    said = vit.pretrained_cfg["num_classes"]
    if own and not to_train and said != vit.num_classes:
        raise UserError(f"{name}: its configuration says {said} classes in one place and {vit.num_classes} in another")
    if weights is None and not random_weights:
        _fetch(vit, name, to_train, path_flag)
    elif weights is not None:
        load_into(vit, name, weights, to_train, None if size is not None else flags)
        theirs = {module.eps for module in vit.modules() if isinstance(module, nn.LayerNorm)}
        if not to_train and weights.norm_eps not in (None, *theirs):
            args["norm_eps"] = weights.norm_eps
            _set_norm_eps(vit, weights.norm_eps)
        _configure(vit, weights, labelled=not to_train)
    return LoadedModel.of(vit, name, _dataset(named, vit), _architecture(name, named, vit, args))


def _dataset(named: NamedModel | None, vit: nn.Module) -> str | None:
    """The data set that a model was trained on: what its name tells, or what `save_local_dir` wrote down as `tag`."""
    if named is not None:
        return named.dataset
    tag = vit.pretrained_cfg.get("tag")
    return tag if tag in {one.dataset for one in NAMED_MODELS.values()} else None


def _of_channels(what: str, values: tuple[float, ...], channels: int, name: str) -> tuple[float, ...]:
    """A mean or deviation for each channel: as given, or of three colours their mean, as timm's loaders take it.

    Raises `UserError` for another number of values.
    """
    if len(values) not in (3, channels):
        raise UserError(f"{name}: its {what} {list(values)} is not a number for each of {channels} channels")
    if len(values) == channels:
        return values
    mean = sum(values) / len(values)
    said = f"{name}: its {what} has 3 numbers for {channels} channel{'s' * (channels > 1)}"
    warnings.warn(UserNote(f"{said}; their mean {mean:.4g} is taken for each"), stacklevel=4)
    return (mean,) * channels


def bare_model(timm_name: str, args: dict[str, Any]) -> nn.Module:
    """A model with random weights from what `LoadedModel.architecture` says."""
    vit = timm.create_model(timm_name, pretrained=False, **{key: args[key] for key in args if key != "norm_eps"})
    if "norm_eps" in args:
        _set_norm_eps(vit, args["norm_eps"])
    return vit


def new_model(name: str, args: dict[str, Any], classes: int, flag: str) -> LoadedModel:
    """A model with random weights of an architecture of timm's that `args` change.

    Args:
        name: timm's name.
        args: of its class.
        classes: how many it shall tell apart.
        flag: what errors call `args`.

    Raises:
        UserError: an unknown name or argument, one that does not change the architecture, or an architecture that
            `SparseViT` cannot honour.
    """
    if name in NAMED_MODELS or ":" in name:
        raise UserError(f"{flag} is for timm's own names, as vit_tiny_patch16_224; {name} is not one")
    require_timm_name(name)
    # What timm's factory takes for itself, weights and files, and what the data says.
    fixed = {*inspect.signature(timm.create_model).parameters, "num_classes"}
    for key in args:
        if key in fixed:
            raise UserError(f"{flag}: {key} does not change the architecture; leave it out")
    for key in ("depth", "depths"):
        for depth in args[key] if isinstance(args.get(key), tuple | list) else [args.get(key, 1)]:
            DEPTH.check(depth, f"{flag}: {key}")
    try:
        vit = timm.create_model(name, pretrained=False, **{**args, "num_classes": classes})
    except Exception as error:  # timm's classes fail in their own ways
        raise UserError(f"{flag}: {name} cannot be made so ({' '.join(str(error).split())[:160]})") from None
    require_supported(vit, name)
    return LoadedModel.of(vit, name, None, (name.split(".")[0], {**args, **_sizes(vit)}))


def save_local_dir(model: LoadedModel, folder: str | Path, tag: str, **facts: object) -> None:
    """Write `config.json` and `model.safetensors`, timm's `local-dir` format; `facts` go into the configuration.

    `tag` is what timm's configuration says of where the weights come from.
    """
    vit = model.vit
    # Late versions of timm find these by themselves; all take what they are given.
    args = {} if model.architecture is None else model.architecture[1]
    args = {key: args[key] for key in args if key != "norm_eps"} | _sizes(vit)
    size = {"input_size": (vit.patch_embed.proj.in_channels, *vit.patch_embed.img_size)}
    vit.pretrained_cfg = {**vit.pretrained_cfg, **size, "num_classes": vit.num_classes, "tag": tag}
    save_for_hf(vit, folder, model_config=facts, model_args=args, safe_serialization=True)


def _set_norm_eps(vit: nn.Module, eps: float) -> None:
    """Replace what layer norms add to the variance, which timm has no argument for."""
    for module in vit.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps


def _outline(name: str, named: NamedModel | None, path_flag: str) -> nn.Module:
    """The model as its name alone makes it, for two classes, without memory for weights; nothing is downloaded."""
    with torch.device("meta"):
        vit = _create(name, named, {"num_classes": 2}, path_flag)
    require_supported(vit, name)
    return vit


def _configure(vit: nn.Module, weights: Weights, labelled: bool) -> None:
    """Take over what the configuration beside weights says; names of classes only for the classes of the weights."""
    config = {**vit.pretrained_cfg, **weights.config}
    if not labelled or (config["num_classes"] != vit.num_classes and "label_names" not in weights.config):
        config = {key: value for key, value in config.items() if not key.startswith("label_")}
    vit.pretrained_cfg = {**config, "num_classes": vit.num_classes}


def _fetch(vit: nn.Module, name: str, to_train: bool, path_flag: str) -> None:
    """Give `vit` timm's own weights. Raises `UserError` where they cannot be had, or timm leaves some of them out."""
    missing, extra = [], []

    def note(_: nn.Module, keys: Any) -> None:
        missing.extend(keys.missing_keys)
        extra.extend(keys.unexpected_keys)

    hook = vit.register_load_state_dict_post_hook(note)
    channels = vit.patch_embed.proj.in_channels
    with explained(name, path_flag), tensors_only(), hook:
        load_pretrained(vit, num_classes=vit.num_classes, in_chans=channels, filter_fn=timm_filter(vit), strict=False)
    require_complete(name, [key for key in missing if not (to_train and key.startswith("head"))], extra)


def _architecture(name: str, named: NamedModel | None, vit: nn.Module, args: dict[str, Any]) -> tuple[str, dict]:
    """What `bare_model` takes for a model like `vit`, which was made with `args` besides its name."""
    timm_name, own = name.split(".")[0], {}
    if named is not None:
        timm_name, own = named.timm_name, named.model_args or {}
    elif name.startswith("local-dir:"):
        config = local_config(name)
        timm_name, own = config["architecture"], config.get("model_args")
    elif name.startswith("hf-hub:"):
        _, timm_name, own = timm.models.load_model_config_from_hf(name.removeprefix("hf-hub:"))
    return timm_name, {**(own or {}), **args, **_sizes(vit)}


def _known_architecture(vit: nn.Module) -> tuple[str, dict] | None:
    """What makes a model like `vit`, by the name that timm gave it; None where that gives other weights."""
    name, args = (getattr(vit, "pretrained_cfg", None) or {}).get("architecture"), _sizes(vit)
    if not name or not timm.is_model(name):
        return None
    with torch.device("meta"):
        made = timm.create_model(name, **args)
    shapes = ({key: value.shape for key, value in model.state_dict().items()} for model in (vit, made))
    return (name, args) if next(shapes) == next(shapes) else None


def _sizes(vit: nn.Module) -> dict[str, object]:
    """What may differ from timm's model of the same name."""
    size = {"img_size": list(vit.patch_embed.img_size), "in_chans": vit.patch_embed.proj.in_channels}
    return {**size, "global_pool": vit.global_pool, "num_classes": vit.num_classes}


def require_timm_name(name: str, known: Sequence[str] | None = None) -> None:
    """Raise `UserError` unless timm has a model of this name; suggestions are `known`, by default our families."""
    base = name.split(".")[0]
    if timm.is_model(base) and (base == name or name in timm.list_pretrained(f"{base}.*")):
        return
    modules = {kind.__module__.rpartition(".")[2] for family in FAMILIES for kind in family.MODELS}
    ours = [*NAMED_MODELS, *(one for module in sorted(modules) for one in timm.list_models(module=module))]
    known = ours if known is None else known
    if base != name and timm.is_model(base):
        known = timm.list_pretrained(f"{base}.*")
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.4) or list(NAMED_MODELS)[:4]
    raise UserError(f"unknown model '{name}'; did you mean {', '.join(near)}?")


def _weights_path(
    name: str, named: NamedModel | None, model_path: str | Path | None, to_train: bool, path_flag: str
) -> Path | None:
    """Where the weights are, or None where timm is to fetch them."""
    if model_path is None and not name.startswith("local-dir:"):
        if named is None or named.dataset == "imagenet":
            return None
        if named.weights is not None:
            return named.weights
        if to_train:
            return None
        raise UserError(
            f"the weights of {name} are on no hub; give them with {path_flag} (a folder with {name}.pth), "
            "or make them with scripts/train_teacher.py"
        )
    path = user_path(*((name.removeprefix("local-dir:"), "--model") if model_path is None else (model_path, path_flag)))
    if path.is_dir():
        stem = short_name(name.removeprefix("local-dir:"))
        return weights_file(path, [f"{stem}.pth", f"{stem}.safetensors"], path_flag)
    if not path.is_file():
        raise UserError(f"{path_flag} {path} does not exist")
    return path


def _create(name: str, named: NamedModel | None, args: dict[str, Any], path_flag: str) -> nn.Module:
    """The model with random weights; `args` win over what its name says."""
    if name.startswith("local-dir:"):
        local_config(name)
    with explained(name, path_flag):
        args = {**(named.model_args or {}), **args} if named else args
        return timm.create_model(named.timm_name if named else name, pretrained=False, **args)


def local_config(name: str) -> dict[str, Any]:
    """The configuration of a `local-dir:`. Raises `UserError` where it is missing or damaged."""
    file = Path(name.removeprefix("local-dir:")) / "config.json"
    if not file.is_file():
        raise UserError(f"{name}: there is no config.json in that folder")
    config = read_json(file)
    if "architecture" in config:
        require_fields({"model_args": {}, "pretrained_cfg": {}} | config, LOCAL, file)
        DEPTH.check((config.get("model_args") or {}).get("depth", 1), f"{file}: the depth")
    return config


@contextmanager
def tensors_only() -> Iterator[None]:
    """`torch.load` takes no Python objects that could run code, even where timm (up to 1.0.25) asks it to."""
    force = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(force, "0")
    os.environ[force] = "1"
    try:
        yield
    finally:
        os.environ[force] = before


@contextmanager
def explained(name: str, path_flag: str) -> Iterator[None]:
    """Errors of timm, the hub's client and safetensors, each of their own kinds, as one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, KeyError) and error.args == ("architecture",):
            raise UserError(
                f"{name}: its config.json is not of timm; where it is of transformers, give timm's name of the model "
                f"(--model vit_base_patch16_224 or its like) and {path_flag} {name.partition(':')[2]}, a folder"
            ) from None
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        local = name.startswith("local-dir:") or "state_dict" in reason
        where = "" if local else f"; without network, give {path_flag}"
        raise UserError(f"cannot load {name} ({reason}){where}") from None
