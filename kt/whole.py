"""Students that are fed whole images: any timm classifier, with an image size and a normalization of its own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models import LoadedModel, PatchGrid, ViTOutput
from models.config import NAMED_MODELS
from models.formats import weights_file
from models.registry import Preprocessing, explained, local_config, require_timm_name, tensors_only
from models.weights import check_preprocessing, raise_unfit, read_weights, timm_filter
from utils.errors import UserError
from utils.files import user_path


@dataclass(frozen=True)
class WholeStudent:
    """A timm classifier as a student of `teacher`, whose normalized images it is fed, resized and normalized anew.

    `vit` is the model, whatever it is; `preprocessing` its own size and normalization, with the teacher's crop.
    """

    name: str
    vit: nn.Module
    preprocessing: Preprocessing
    teacher: Preprocessing
    grid: PatchGrid
    architecture: tuple[str, dict]

    def sparse(self, device: torch.device | str = "cpu") -> WholeImages:
        """The model as it is taught, on `device`; it shares its weights with `vit`."""
        return WholeImages(self.vit, self.grid, self.teacher, self.preprocessing).to(device)

    def save(self, folder: Path, **facts: object) -> None:
        """Write `config.json` and `model.safetensors`, timm's `local-dir` format; `facts` go into the configuration."""
        save_for_hf(self.vit, folder, model_config=facts, model_args=self.architecture[1], safe_serialization=True)


class WholeImages(nn.Module):
    """Whole images as a teacher sees them -> logits of a model that wants them otherwise.

    Args:
        model: a timm classifier.
        grid: the teacher's.
        theirs: how the teacher's images are normalized.
        ours: size and normalization of the model's.
    """

    def __init__(self, model: nn.Module, grid: PatchGrid, theirs: Preprocessing, ours: Preprocessing) -> None:
        super().__init__()
        self.model, self.grid, self.theirs, self.ours = model, grid, theirs, ours
        self.learns = all(parameter.requires_grad for parameter in model.parameters())

    @property
    def learns_statistics(self) -> bool:
        """Whether batch norms learn, which takes two images at once."""
        return self.learns and any(isinstance(module, _BatchNorm) for module in self.model.modules())

    def forward(self, patches: Tensor, positions: Tensor, return_tokens: bool = False) -> ViTOutput:
        """Logits (B, classes) of full grids (B, N, C, height, width) at `positions`.

        While gradients are taken, all of a model that learns is in training mode: batch norms learn their statistics.
        """
        images = self.theirs.denormalize(self.grid.unpatchify(patches, positions))
        size = self.ours.input_size[1:]
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=True)
        self.model.train(self.learns and torch.is_grad_enabled())
        said, features = self._said_and_read(self.ours.normalize(images))
        self.model.eval()
        return ViTOutput(said, said if features is None else features)

    def _said_and_read(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, and what the classifier read for them; None where they are not what one classifier gave at last."""
        classifier, asked = self.model.get_classifier(), []
        heads = [classifier] if isinstance(classifier, nn.Module) else []
        handles = [head.register_forward_hook(lambda _, read, gave: asked.append((read[0], gave))) for head in heads]
        try:
            said = self.model(images)
        finally:
            for handle in handles:
                handle.remove()
        if len(asked) == 1 and asked[0][1].shape == said.shape and asked[0][1].data_ptr() == said.data_ptr():
            return said, asked[0][0]
        return said, None

    @torch.no_grad()
    def ends_in_classifier(self) -> bool:
        """Whether `classify` gives the logits: not of two heads, a convolution, or with something behind it."""
        zeros = torch.zeros(2, *self.ours.input_size, device=next(self.parameters()).device)
        self.model.eval()
        return self._said_and_read(zeros)[1] is not None

    def classify(self, features: Tensor) -> Tensor:
        """What the classifier reads -> logits (B, classes)."""
        return self.model.get_classifier()(features)

    def forward_images(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W) that were made ready for the model itself."""
        return self.model.eval()(images)


def load_whole(
    teacher: LoadedModel, name: str, path: str | Path | None, key: str | None, scratch: bool, img_size: int | None
) -> WholeStudent:
    """A timm classifier with a new head for the teacher's classes.

    Args:
        teacher: whose images it will be fed.
        name: timm's name of it, `hf-hub:ORG/NAME` or `local-dir:DIR`.
        path: its weights, a file or a folder; None: those of its name.
        key: which of several models in that file.
        scratch: leave the weights at their initialization.
        img_size: side of its images; None: what its configuration says.

    Raises:
        UserError: an unknown name, weights that do not fit, or a model that is not made for such images.
    """
    named = NAMED_MODELS.get(name)
    made, args = (name, {}) if named is None else (named.timm_name, named.model_args or {})
    path = named.weights if named is not None and path is None and not scratch else path
    if name.startswith("local-dir:"):
        local_config(name)
    elif not name.startswith("hf-hub:"):
        require_timm_name(made, timm.list_models())
    args = {**args, "num_classes": teacher.classes, **_channels(name, made, teacher.grid.channels)}
    if key is not None and path is None:
        raise UserError(f"--student_weights_key {key} chooses in a file; give one with --student_path")
    fetched = not scratch and path is None
    with explained(name, "--student_path"), tensors_only():
        model = timm.create_model(made, pretrained=fetched, **args)
        if img_size is not None and hasattr(model, "set_input_size"):
            model.set_input_size(img_size=(img_size, img_size))
    if path is not None:
        _fill(model, name, path, key)
    check_preprocessing(model.pretrained_cfg, name)
    config = timm.data.resolve_model_data_config(model)
    side = config["input_size"][1:] if img_size is None else (img_size, img_size)
    size = (teacher.grid.channels, *side)  # a configuration of timm's says 3 whatever the model was made for
    crop = {field: getattr(teacher.preprocessing, field) for field in ("interpolation", "crop_pct", "crop_mode")}
    ours = Preprocessing(input_size=tuple(size), mean=tuple(config["mean"]), std=tuple(config["std"]), **crop)
    if len(ours.mean) != teacher.grid.channels:
        ours = dataclasses.replace(ours, mean=teacher.preprocessing.mean, std=teacher.preprocessing.std)
    with torch.no_grad():
        try:
            said = model.eval()(torch.zeros(2, *ours.input_size))
        except Exception as error:  # models fail in their own ways
            reason = str(error).splitlines()[0][:120]
            raise UserError(f"--student {name} takes no images of {size[1]} x {size[2]} px ({reason})") from None
    if said.shape != (2, teacher.classes):
        raise UserError(
            f"--student {name} gives {tuple(said.shape[1:])} numbers an image, not {teacher.classes} logits"
        )
    own = {key: value for key, value in model.pretrained_cfg.items() if not key.startswith("test_")}
    model.pretrained_cfg = {**own, "input_size": ours.input_size, "num_classes": teacher.classes}
    grid, architecture = teacher.grid, (model.pretrained_cfg.get("architecture", made.split(".")[0]), args)
    return WholeStudent(name, model, ours, teacher.preprocessing, grid, architecture)


def _channels(name: str, made: str, wanted: int) -> dict[str, int]:
    """The argument that makes a model of timm's name for so many channels; what a configuration says stays.

    Raises `UserError` where that is another number.
    """
    if ":" not in name:
        return {"in_chans": wanted}
    with explained(name, "--student_path"), torch.device("meta"):
        config = timm.data.resolve_model_data_config(timm.create_model(made, pretrained=False))
    if config["input_size"][0] != wanted:
        raise UserError(
            f"--student {name} takes {config['input_size'][0]} channels, the teacher's images have {wanted}"
        )
    return {}


def _fill(model: nn.Module, name: str, path: str | Path, key: str | None) -> None:
    """Give a model the weights in a file, all but a head of other classes. Raises `UserError` where they do not fit."""
    file = user_path(path, "--student_path")
    file = weights_file(file, [], "--student_path") if file.is_dir() else file
    state = read_weights(file, key, "--student_weights_key")
    with explained(name, "--student_path"):
        state = timm_filter(model)(state, model)
    own = model.state_dict()
    heads = {id(parameter) for parameter in classifier_parameters(model)}
    head = {key for key, parameter in model.named_parameters() if id(parameter) in heads}
    state = {key: value for key, value in state.items() if key not in head or value.shape == own[key].shape}
    missing, extra = sorted(own.keys() - state.keys() - head), sorted(state.keys() - own.keys() - head)
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    differ = sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape)
    if missing or extra or differ:
        differ = [f"{key}: {tuple(state[key].shape)} for {tuple(own[key].shape)}" for key in differ]
        raise_unfit(name, path, missing, extra, differ)
    model.load_state_dict(state, strict=False)


def classifier_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those of a timm model's last layer, or layers."""
    return [parameter for layer in classifiers(model) for parameter in layer.parameters()]


def classifiers(model: nn.Module) -> tuple[nn.Module, ...]:
    """A timm model's last layer, or layers."""
    found = model.get_classifier()
    return tuple(found) if isinstance(found, tuple | list) else (found,)
