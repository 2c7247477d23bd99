"""Loading models by name, and refusing what cannot be loaded safely."""

import json
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file

from models import DEFAULT_MODEL, LoadedModel, load_model
from models.registry import NAMED_MODELS
from tests.conftest import tiny_vit
from utils.errors import UserError


@pytest.fixture(scope="module")
def cifar_state() -> dict:
    return timm.create_model("deit_tiny_patch16_224", num_classes=10).state_dict()


def local_dir(folder, vit) -> str:
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    timm.models.save_for_hf(
        vit, folder, model_args=args, model_config={"num_classes": 5, **vit.pretrained_cfg}, safe_serialization=True
    )
    return f"local-dir:{folder}"


def test_a_model_that_one_has_is_known_by_timms_name_where_that_is_enough():
    plain = LoadedModel.of(timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=7), "mine")
    assert plain.architecture[0] == "vit_tiny_patch16_224"
    again = timm.create_model(plain.architecture[0], **plain.architecture[1])
    again.load_state_dict(plain.vit.state_dict())
    assert (plain.classes, plain.grid.image_size) == (7, (64, 64))
    assert not any(parameter.requires_grad for parameter in plain.vit.parameters()) and not plain.vit.training
    assert LoadedModel.of(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2)).architecture is None


def test_the_bundled_model_needs_nothing():
    model = load_model(DEFAULT_MODEL)
    assert (model.classes, model.dataset) == (10, "digits")
    assert model.preprocessing.input_size == (3, 32, 32)
    assert not any(p.requires_grad for p in model.vit.parameters())


def test_the_bundled_model_is_also_a_timm_local_dir():
    folder = NAMED_MODELS[DEFAULT_MODEL].weights.parent
    vit = timm.create_model(f"local-dir:{folder}", checkpoint_path=f"{folder}/model.safetensors").eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(vit(images), load_model(DEFAULT_MODEL).vit(images))
    config = timm.data.resolve_model_data_config(vit)
    ours = load_model(DEFAULT_MODEL).preprocessing
    assert all(tuple(config[key]) == tuple(getattr(ours, key)) for key in ("mean", "std", "input_size"))


@pytest.mark.parametrize("layout", ["folder.pth", "folder.safetensors", "file", "wrapped"])
def test_named_cifar_models_load_local_weights(tmp_path, cifar_state, layout):
    name = "deit_tiny_16_cifar10"
    path = tmp_path / f"{name}.pth"
    if layout == "folder.safetensors":
        save_file(cifar_state, tmp_path / f"{name}.safetensors")
    else:
        torch.save({"model": cifar_state} if layout == "wrapped" else cifar_state, path)
    model = load_model(name, path if layout in ("file", "wrapped") else tmp_path)
    assert torch.equal(model.vit.head.weight, cifar_state["head.weight"])
    assert model.preprocessing.mean == (0.4914, 0.4822, 0.4465)
    assert model.preprocessing.std == (0.2023, 0.1994, 0.2010)
    assert model.preprocessing.crop_pct == 224 / 256
    assert model.preprocessing.interpolation == "bicubic"


def test_named_imagenet_models_are_timms_deit():
    model = load_model("deit_tiny_16_imagenet", random_weights=True)
    expected = timm.create_model("deit_tiny_patch16_224")
    assert model.vit.state_dict().keys() == expected.state_dict().keys()
    assert (model.classes, model.preprocessing.input_size) == (1000, (3, 224, 224))
    cfg = expected.pretrained_cfg
    assert (model.preprocessing.mean, model.preprocessing.crop_pct) == (cfg["mean"], cfg["crop_pct"])


def test_local_dir_gives_size_and_normalization(tmp_path):
    vit = tiny_vit()
    vit.pretrained_cfg.update(input_size=(3, 32, 32), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), num_classes=5)
    model = load_model(local_dir(tmp_path, vit))
    assert model.preprocessing.mean == (0.1, 0.2, 0.3)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(model.vit(images), vit(images))


def test_a_timm_name_takes_its_class_count_from_local_weights(tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=7)
    torch.save(vit.state_dict(), tmp_path / "weights.pth")
    assert load_model("vit_tiny_patch16_224", tmp_path / "weights.pth").classes == 7


def test_fingerprint_tells_weights_apart():
    first, again = load_model(DEFAULT_MODEL), load_model(DEFAULT_MODEL)
    assert first.fingerprint() == again.fingerprint()
    with torch.no_grad():
        again.vit.head.bias[0] += 1e-6
    assert first.fingerprint() != again.fingerprint()


class Evil:
    """A pickle that would create a file when loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("raw", [True, False])
def test_a_weights_file_that_runs_code_does_not_run(tmp_path, raw):
    trap = tmp_path / "trap"
    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps(Evil(trap))) if raw else torch.save({"head.weight": Evil(trap)}, path)
    with pytest.raises(UserError, match=r"weights\.pth"):
        load_model("deit_tiny_16_cifar10", path)
    assert not trap.exists()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("kept", [0, 1000])
def test_truncated_weights_are_refused(tmp_path, cifar_state, suffix, kept):
    path = tmp_path / f"weights.{suffix}"
    torch.save(cifar_state, path) if suffix == "pth" else save_file(cifar_state, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="cannot read weights"):
        load_model("deit_tiny_16_cifar10", path)


def test_weights_with_other_classes_are_refused(tmp_path, cifar_state):
    torch.save(cifar_state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"10 classes.*100"):
        load_model("deit_tiny_16_cifar100", tmp_path / "w.pth")


def test_weights_that_do_not_fit_are_refused(tmp_path, cifar_state):
    state = {key: value for key, value in cifar_state.items() if "blocks.3" not in key}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"do not fit.*blocks\.3"):
        load_model("deit_tiny_16_cifar10", tmp_path / "w.pth")
    torch.save(cifar_state, tmp_path / "w.pth")
    with pytest.raises(UserError, match="do not fit"):
        load_model("deit_small_16_cifar10", tmp_path / "w.pth")
    torch.save([1, 2], tmp_path / "w.pth")
    with pytest.raises(UserError, match="state_dict"):
        load_model("deit_small_16_cifar10", tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("deit_tiny_16_cifar", "deit_tiny_16_cifar10"),
        ("deit_nano_4_digit", "deit_nano_4_digits"),
        ("vit_tiny_patch16_225", "vit_tiny_patch16_224"),
        ("resnet50", "ResNet"),
        ("xcit_nano_12_p16_224", "Xcit"),
        ("local-dir:/nowhere", r"config\.json"),
        ("deit_tiny_16_cifar10", "--model_path"),
    ],
)
def test_names_that_cannot_be_loaded_say_why(name, why):
    with pytest.raises(UserError, match=why):
        load_model(name)


def test_missing_weights_say_what_was_looked_for(tmp_path):
    with pytest.raises(UserError, match=r"deit_tiny_16_cifar10\.pth"):
        load_model("deit_tiny_16_cifar10", tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_model("deit_tiny_16_cifar10", tmp_path / "nothing.pth")


def test_a_broken_local_dir_is_one_clear_error(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"})[:-5])
    with pytest.raises(UserError, match=r"cannot read .*config\.json"):
        load_model(f"local-dir:{tmp_path}")
