"""The names of models, and which model is meant."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from utils.cli import check_numbers, image_side, setting

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
    """Which model: what `load_model` takes in place of a name. Raises `UserError` for a size that cannot be."""

    name: str = setting(
        DEFAULT_MODEL, "named DeiT, timm ViT, hf-hub:ORG/NAME, local-dir:DIR", "--model", metavar="NAME"
    )
    path: str | None = setting(None, "local weights, a file or a folder with NAME.pth", "--model_path", metavar="PATH")
    key: str | None = setting(None, "which of several models in a weights file", "--weights_key", metavar="KEY")
    img_size: int | None = setting(None, "side of its images in px; default its own", type=image_side, metavar="PX")

    def __post_init__(self) -> None:
        check_numbers(self)
