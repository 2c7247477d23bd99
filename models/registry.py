"""Model names -> a frozen timm Vision Transformer with its weights, its preprocessing and its data set."""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models.patches import PatchGrid
from models.sparse_vit import SparseViT, require_supported
from utils.cli import setting
from utils.errors import UserError
from utils.files import read_json

logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a failed download is told in one line of ours

DEFAULT_MODEL = "deit_nano_4_digits"
WEIGHTS_DIR = Path(__file__).parent / "weights"

# Arguments that make timm's deit_tiny the bundled nano model.
NANO_ARGS = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3}


@dataclass(frozen=True)
class NamedModel:
    """A row of the table of names: the timm model behind it and what its published weights were trained on."""

    timm_name: str
    classes: int
    dataset: str
    pretrained_cfg: dict | None = None
    model_args: dict | None = None
    weights: Path | None = None


def _cifar_cfg(mean: tuple[float, ...], std: tuple[float, ...]) -> dict:
    # Resized to 256, centre-cropped to 224, as the published CIFAR teachers were trained.
    return {"mean": mean, "std": std, "crop_pct": 224 / 256, "interpolation": "bicubic", "input_size": (3, 224, 224)}


CIFAR10_CFG = _cifar_cfg((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR100_CFG = _cifar_cfg((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
DIGITS_CFG = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0, "interpolation": "bicubic"}
DIGITS_CFG["input_size"] = (3, NANO_ARGS["img_size"], NANO_ARGS["img_size"])

NAMED_MODELS: dict[str, NamedModel] = {
    DEFAULT_MODEL: NamedModel(
        "deit_tiny_patch16_224", 10, "digits", DIGITS_CFG, NANO_ARGS, WEIGHTS_DIR / DEFAULT_MODEL / "model.safetensors"
    )
}
for _size in ("tiny", "small", "base"):
    _timm_name = f"deit_{_size}_patch16_224"
    NAMED_MODELS[f"deit_{_size}_16_imagenet"] = NamedModel(_timm_name, 1000, "imagenet")
    NAMED_MODELS[f"deit_{_size}_16_cifar10"] = NamedModel(_timm_name, 10, "cifar10", CIFAR10_CFG)
    NAMED_MODELS[f"deit_{_size}_16_cifar100"] = NamedModel(_timm_name, 100, "cifar100", CIFAR100_CFG)


def short_name(name: str) -> str:
    """A model's name without the folder or the hub that it comes from."""
    return name.rstrip("/").split("/")[-1]


@dataclass(frozen=True)
class ModelConfig:
    """Which model: what `load_model` takes as `name` and `model_path`."""

    name: str = setting(
        DEFAULT_MODEL, "named DeiT, timm ViT, hf-hub:ORG/NAME, local-dir:DIR", "--model", metavar="NAME"
    )
    path: str | None = setting(None, "local weights, a file or a folder with NAME.pth", "--model_path", metavar="PATH")


@dataclass(frozen=True)
class Preprocessing:
    """How a model wants its images, from its timm `pretrained_cfg`."""

    input_size: tuple[int, int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float
    crop_mode: str

    @classmethod
    def of(cls, vit: VisionTransformer) -> Preprocessing:
        """What the configuration of `vit` says; the image's size is what its patch embedding takes."""
        config = timm.data.resolve_model_data_config(vit)
        config["input_size"] = (vit.patch_embed.proj.in_channels, *vit.patch_embed.img_size)
        config["mean"], config["std"] = tuple(config["mean"]), tuple(config["std"])
        return cls(**{key: config[key] for key in cls.__dataclass_fields__})

    def eval_transform(self) -> Callable:
        """PIL image -> normalized tensor of shape `input_size`, by timm's own evaluation transform."""
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
    vit: VisionTransformer
    preprocessing: Preprocessing
    dataset: str | None
    """`digits`, `cifar10`, `cifar100`, `imagenet`, or None where the name does not tell."""
    architecture: tuple[str, dict] | None = None
    """timm's name of the architecture, and the arguments that make it without weights; None: it cannot be saved."""

    @classmethod
    def of(
        cls,
        vit: VisionTransformer,
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
            UserError: an architecture that `SparseViT` cannot honour.
        """
        require_supported(vit, name)
        channels = vit.patch_embed.proj.in_channels
        if channels != 3:
            raise UserError(f"{name} takes {channels} channels; only RGB models are supported")
        architecture = architecture or _known_architecture(vit)
        return cls(name, vit.eval().requires_grad_(False), Preprocessing.of(vit), dataset, architecture)

    @property
    def classes(self) -> int:
        """How many classes it tells apart."""
        return self.vit.num_classes

    @property
    def grid(self) -> PatchGrid:
        """The patches of its images."""
        embed = self.vit.patch_embed
        return PatchGrid(*embed.grid_size, *embed.patch_size, embed.proj.in_channels)

    def sparse(self, device: torch.device | str = "cpu") -> SparseViT:
        """The model on kept patches, on `device`; it shares its weights with `vit`, which moves along."""
        return SparseViT(self.vit).to(device)

    def fingerprint(self) -> str:
        """SHA-256 of architecture and weights, first 16 hex digits: what makes two models the same."""
        digest = hashlib.sha256(type(self.vit).__name__.encode())
        for key, value in sorted(self.vit.state_dict().items()):
            digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def load_model(
    name: str,
    model_path: str | Path | None = None,
    random_weights: bool = False,
    classes: int | None = None,
    path_flag: str = "--model_path",
) -> LoadedModel:
    """Load a model by name.

    Args:
        name: a name of `NAMED_MODELS`, any timm VisionTransformer, `hf-hub:org/name` or `local-dir:PATH`.
        model_path: local weights: a `.pth` or `.safetensors` file holding a plain state_dict, or a folder with
            `<name>.pth`, `<name>.safetensors` or `model.safetensors` in it. None takes the hub's.
        random_weights: leave the weights at their initialization (benchmarks, training from scratch).
        classes: load it to be trained for so many classes: weights with another number of them, or without a head, get
            a new head, and a named CIFAR model starts from timm's ImageNet weights.
        path_flag: what errors call `model_path`.

    Raises:
        UserError: unknown name, an architecture that `SparseViT` cannot honour, or weights that are missing, damaged,
            unsafe or do not fit.
    """
    named = NAMED_MODELS.get(name)
    if named is None and not name.startswith(("hf-hub:", "local-dir:")):
        _require_timm_name(name)
        with torch.device("meta"):  # refuse before anything is downloaded
            require_supported(timm.create_model(name, num_classes=1), name)
    weights = None if random_weights else _weights_file(name, named, model_path, classes is not None, path_flag)
    state = None if weights is None else read_weights(weights)
    vit = _create(name, named, state, weights is None and not random_weights, classes, path_flag)
    if named is not None and named.pretrained_cfg:
        vit.pretrained_cfg = {**vit.pretrained_cfg, **named.pretrained_cfg, "num_classes": named.classes}
    require_supported(vit, name)
    if state is not None:
        _load_weights(vit, name, weights, state if classes is None else _with_fitting_head(state, vit))
    return LoadedModel.of(vit, name, named.dataset if named else None, _architecture(name, named, vit))


def _architecture(name: str, named: NamedModel | None, vit: VisionTransformer) -> tuple[str, dict]:
    """What `timm.create_model` takes for a model like `vit`."""
    timm_name, args = name.split(".")[0], {}
    if named is not None:
        timm_name, args = named.timm_name, named.model_args or {}
    elif name.startswith("local-dir:"):
        config = read_json(Path(name.removeprefix("local-dir:")) / "config.json")
        timm_name, args = config["architecture"], config.get("model_args", {})
    elif name.startswith("hf-hub:"):
        _, timm_name, args = timm.models.load_model_config_from_hf(name.removeprefix("hf-hub:"))
    return timm_name, {**(args or {}), **_sizes(vit)}


def _known_architecture(vit: VisionTransformer) -> tuple[str, dict] | None:
    """What makes a model like `vit`, by the name that timm gave it; None where that gives other weights."""
    name, args = (getattr(vit, "pretrained_cfg", None) or {}).get("architecture"), _sizes(vit)
    if not name or not timm.is_model(name):
        return None
    with torch.device("meta"):
        made = timm.create_model(name, **args)
    shapes = ({key: value.shape for key, value in model.state_dict().items()} for model in (vit, made))
    return (name, args) if next(shapes) == next(shapes) else None


def _sizes(vit: VisionTransformer) -> dict[str, object]:
    """What may differ from timm's model of the same name."""
    size = {"img_size": list(vit.patch_embed.img_size), "global_pool": vit.global_pool}
    return {**size, "num_classes": vit.num_classes}


def _require_timm_name(name: str) -> None:
    base = name.split(".")[0]
    if timm.is_model(base) and (base == name or name in timm.list_pretrained(f"{base}.*")):
        return
    known = [*NAMED_MODELS, *timm.list_models(module="vision_transformer"), *timm.list_models(module="deit")]
    if base != name and timm.is_model(base):
        known = timm.list_pretrained(f"{base}.*")
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.4) or list(NAMED_MODELS)[:4]
    raise UserError(f"unknown model '{name}'; did you mean {', '.join(near)}?")


def _weights_file(
    name: str, named: NamedModel | None, model_path: str | Path | None, to_train: bool, path_flag: str
) -> Path | None:
    """The local file to load, or None where timm is to fetch the weights."""
    if model_path is None:
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
    path = Path(model_path).expanduser()
    if path.is_dir():
        stem = name.replace("local-dir:", "").replace("hf-hub:", "").rstrip("/").split("/")[-1]
        tried = [path / f"{stem}.pth", path / f"{stem}.safetensors", path / "model.safetensors"]
        found = [file for file in tried if file.is_file()]
        if not found:
            raise UserError(f"no weights in {path_flag} {path}: looked for {', '.join(f.name for f in tried)}")
        return found[0]
    if not path.is_file():
        raise UserError(f"{path_flag} {path} does not exist")
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state_dict in a file, safetensors or torch's own. Raises `UserError` where there is none."""
    try:
        state = load_state_dict(str(path), weights_only=True)
        if not state or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("it holds no plain state_dict")
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        if "weights_only" in str(error) or "Weights only" in str(error):
            reason = "it holds Python objects besides tensors, which could run code; save a plain state_dict instead"
        elif isinstance(error, (AttributeError, TypeError)):
            reason = "it holds no plain state_dict"
        raise UserError(f"cannot read weights from {path}: {reason}") from None
    return state


def _create(
    name: str,
    named: NamedModel | None,
    state: dict[str, Tensor] | None,
    pretrained: bool,
    classes: int | None,
    path_flag: str,
) -> VisionTransformer:
    args = {}
    if named is not None:
        args = {"num_classes": named.classes, **(named.model_args or {})}
    elif state is not None and "head.weight" in state:
        args = {"num_classes": state["head.weight"].shape[0]}
    if classes is not None:
        args["num_classes"] = classes
    if name.startswith("local-dir:") and not (Path(name.removeprefix("local-dir:")) / "config.json").is_file():
        raise UserError(f"{name}: there is no config.json in that folder")
    try:
        return timm.create_model(named.timm_name if named else name, pretrained=pretrained, **args)
    except KeyboardInterrupt:
        raise
    except Exception as error:  # timm, the hub client and safetensors each raise their own kinds
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
        where = "" if name.startswith("local-dir:") or not pretrained else f"; without network, give {path_flag}"
        raise UserError(f"cannot load {name} ({reason}){where}") from None


def _with_fitting_head(state: dict[str, Tensor], vit: VisionTransformer) -> dict[str, Tensor]:
    """`state`, with the fresh classifier of `vit` where it has none or one for another number of classes."""
    fresh = {key: value for key, value in vit.state_dict().items() if key.startswith("head")}
    fits = all(key in state and state[key].shape == value.shape for key, value in fresh.items())
    return state if fits else {**state, **fresh}


def _load_weights(vit: VisionTransformer, name: str, path: Path, state: dict[str, Tensor]) -> None:
    head = state.get("head.weight")
    if head is not None and head.shape[0] != vit.num_classes:
        raise UserError(f"{path} has {head.shape[0]} classes, {name} has {vit.num_classes}")
    own = vit.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    differ = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if missing or extra or differ:
        found = [f"missing {key}" for key in missing[:1]] + [f"unexpected {key}" for key in extra[:1]]
        found += [f"{key}: {tuple(state[key].shape)} for {tuple(own[key].shape)}" for key in sorted(differ)[:1]]
        raise UserError(f"the weights in {path} do not fit {name}: {'; '.join(found)}")
    vit.load_state_dict(state)
