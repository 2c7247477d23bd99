"""Models of grey images, of RGBA images, and of images that are not square, from files to pictures and export."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import test_kt
import test_quant
from inversion import ImagePool, InversionConfig, invert
from inversion.views import VIEWS
from kt import StudentConfig, load_student
from models import LoadedModel, SparseImages, load_model
from models.registry import MODES, Preprocessing, save_local_dir
from quant import load_quantized
from scripts import run_onnx, train_teacher
from tests.conftest import tiny_vit
from utils.augment import grey
from utils.config import DataConfig
from utils.data import evaluation_set
from utils.errors import UserError, UserNote
from utils.image_files import read_image
from utils.images import Noise, Real, Stored, calibration_images
from utils.pictures import in_colours, save_images

SHAPES = {"grey": (1, 32, 32), "rgba": (4, 32, 32), "tall": (3, 48, 32), "wide grey": (1, 16, 32)}
CLASSES = ["a", "b", "c", "d", "e"]


def made(shape: tuple[int, int, int], **config: object) -> LoadedModel:
    """A two-block ViT on images of that shape in patches of 8 px, with a mean and a deviation for each channel."""
    channels, *size = shape
    vit = tiny_vit(in_chans=channels, img_size=size)
    values = {"mean": [0.4, 0.5, 0.3, 0.6][:channels], "std": [0.2, 0.3, 0.25, 0.35][:channels], "crop_pct": 0.9}
    sides = {"input_size": shape, "label_names": CLASSES, "num_classes": 5}
    vit.pretrained_cfg = {**vit.pretrained_cfg, **values, **sides, **config}
    args = {"img_size": size, "in_chans": channels, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return LoadedModel.of(vit, "shaped", architecture=("deit_tiny_patch16_224", args))


def in_a_folder(folder: Path, shape: tuple[int, int, int], **config: object) -> str:
    """`made`, as a `local-dir:`."""
    save_local_dir(made(shape, **config), folder, "shaped", label_names=CLASSES)
    return f"local-dir:{folder}"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two images of each class in `train/` and `val/`: colours, some transparent in part, none square."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in CLASSES:
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for number, mode in enumerate(("RGB", "RGBA")):
                pixels = generator.integers(0, 256, (40, 56, len(mode)), dtype=np.uint8)
                Image.fromarray(pixels, mode).save(folder / f"{number}.png")
    return tmp_path / "data"


QUICK = ["--iterations", "6", "--prune_it", "2", "--prune_ratio", "0.5", "--check_images", "2", "--val-batchsize", "10"]
QUICK += ["--calib-batchsize", "2", "--num-workers", "0", "--dtype", "float32"]


@pytest.mark.filterwarnings("ignore::utils.errors.UserNote")
@pytest.mark.parametrize("name", SHAPES)
def test_quantization_and_export_end_to_end(name, data, tmp_path, capsys):
    model = in_a_folder(tmp_path / "model", SHAPES[name])
    file, where = tmp_path / "w.onnx", ["--model", model, "--dataset", str(data), "--datapool", str(tmp_path / "pool")]
    where += ["--output", str(tmp_path / "out")]
    report = test_quant.main([*QUICK, *where, "--export", str(file)])
    assert report["inversion"]["patches_per_stage"][1] == report["inversion"]["patches_per_stage"][0] // 2
    assert report["export"]["agreement"] >= 90
    assert load_quantized(tmp_path / "out" / "quantized").grid == load_model(model).grid
    assert Image.open(tmp_path / "out" / "images.png").mode == "RGB"
    channels, height, width = SHAPES[name]
    for picture in (tmp_path / "pool").rglob("*.png"):
        with Image.open(picture) as image:
            assert (image.mode, image.size) == (MODES[channels], (width, height))
    capsys.readouterr()
    files = sorted(map(str, (data / "val").rglob("*.png")))
    found = run_onnx.main([str(file), *files])
    loaded = load_model(model)
    images = torch.stack([image for image, _ in evaluation_set(loaded, DataConfig(str(data)))])
    with torch.no_grad():
        expected = [CLASSES[index] for index in loaded.vit(images).argmax(1)]
    assert sum(a == b for a, b in zip(found, expected, strict=True)) >= 9
    again = ["--images", report["inversion"]["pool"], "--output", str(tmp_path / "again"), "--check_images", "0"]
    stored = test_quant.main([*QUICK, *where[:-2], *again])
    assert stored["quant"] == report["quant"]


@pytest.mark.filterwarnings("ignore::utils.errors.UserNote")
@pytest.mark.parametrize("name", SHAPES)
def test_transfer_end_to_end(name, data, tmp_path):
    model = in_a_folder(tmp_path / "model", SHAPES[name])
    flags = ["--model", model, "--dataset", str(data), "--datapool", str(tmp_path / "pool"), "--epochs", "2"]
    flags += ["--student_init", "scratch", "--finetune", "full", "--images_per_epoch", "2", "--iterations", "3"]
    flags += ["--inversion-batchsize", "2", "--kr-batchsize", "4", "--num-workers", "0", "--adv", "1"]
    flags += ["--augment", "flip", "shift", "mix", "grey", "contrast", "scatter", "noise", "--dtype", "float32"]
    report = test_kt.main([*flags, "--output", str(tmp_path / "out")])
    assert len(report["history"]) == 2
    student = load_model(f"local-dir:{tmp_path / 'out' / 'student'}")
    assert student.preprocessing == load_model(model).preprocessing


@pytest.mark.parametrize("canvas", ["pixels", "spectral"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_view_canvas_and_prior_and_what_a_pool_gives_back(name, canvas, tmp_path):
    model, shape = made(SHAPES[name]), SHAPES[name]
    schedule = {"prune_it": (2,), "prune_ratio": (0.5,), "iterations": 4, "batch_size": 3}
    weights = {"oh": 1.0, "tv1": 1e-3, "tv2": 1e-3, "l2": 1e-4, "pse": 1.0, "tvt": 1e-3, "cr": 0.1}
    config = InversionConfig(
        canvas=canvas, init="pink", views=tuple(VIEWS), weights=weights, snapshots=(2,), **schedule
    )
    pool = invert(model, config, 6, tmp_path, "cpu")
    images = pool.read(6)
    assert images.patches.shape == (6, model.grid.count // 2, shape[0], 8, 8)
    pixels = model.preprocessing.denormalize(images.patches)
    assert pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6
    for channel in range(shape[0]):
        assert pixels[:, :, channel].std() > 0.01
    assert pool.snapshots(0)[0].pixels.shape[2] == shape[0]
    assert ImagePool.existing(pool.path, model).read(6).patches.equal(images.patches)
    save_images(tmp_path / "grid.png", images, model)
    assert Image.open(tmp_path / "grid.png").mode == "RGB"
    eager = invert(model, config, 3, tmp_path / "eager", "cpu", eager=True)
    assert (eager.read(3).patches - pool.read(3).patches).abs().mean() < 1e-2


def test_limits_are_those_of_each_channel(tmp_path):
    model = made((4, 32, 32))
    config = InversionConfig(iterations=1, batch_size=2, lr=100.0, weights={"oh": 1.0})
    patches = invert(model, config, 2, tmp_path, "cpu").read(2).patches
    for channel, (mean, std) in enumerate(zip(model.preprocessing.mean, model.preprocessing.std, strict=True)):
        ends = patches[:, :, channel].min().item(), patches[:, :, channel].max().item()
        assert ends == pytest.approx((-mean / std, (1 - mean) / std), abs=1e-4)


@pytest.mark.filterwarnings("ignore::utils.errors.UserNote")
def test_noise_real_and_stored_images_have_the_models_channels(data):
    for shape in SHAPES.values():
        model = made(shape)
        for source in (Noise(), Real(str(data)), Stored(str(data / "train"))):
            assert calibration_images(model, source, 4).patches.shape == (4, model.grid.count, shape[0], 8, 8)


def test_files_are_read_in_the_models_channels_and_alike_without_the_repository(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)
    file = tmp_path / "a.png"
    Image.fromarray(pixels, "RGBA").save(file)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    kept, laid = read_image(file, mode="RGBA")
    assert np.array_equal(np.asarray(kept), pixels) and not laid
    grey_image, laid = read_image(file, (10, 20, 30), "L")
    assert laid
    assert np.array_equal(np.asarray(grey_image), np.asarray(read_image(file, (10, 20, 30))[0].convert("L")))
    assert np.array_equal(np.asarray(read_image(tmp_path / "grey.png", mode="L")[0]), pixels[..., 0])
    assert np.asarray(read_image(tmp_path / "grey.png", mode="RGBA")[0])[..., 3].min() == 255
    for name in ("a.png", "grey.png"):
        for mode in MODES.values():
            ours, theirs = (read(str(tmp_path / name), mode=mode) for read in (read_image, run_onnx.read_image))
            assert np.array_equal(np.asarray(ours[0]), np.asarray(theirs[0])) and ours[1] == theirs[1]


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("shape", [(1, 48, 32), (3, 32, 56), (4, 40, 40)], ids=str)
def test_the_runner_prepares_images_as_timm_does(shape, crop_mode):
    mean, std = (0.5, 0.4, 0.3, 0.6)[: shape[0]], (0.2, 0.3, 0.4, 0.25)[: shape[0]]
    how = Preprocessing(shape, mean, std, "bicubic", 0.9, crop_mode)
    for size in ((50, 70, 4), (90, 31, 4)):
        pixels = np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8)
        image = Image.fromarray(pixels, "RGBA").convert(how.mode)
        found = run_onnx.preprocess(image, vars(how) | {"mean": list(mean), "std": list(std)})
        np.testing.assert_allclose(found, how.eval_transform()(image).numpy(), atol=1e-5)


def test_three_numbers_are_averaged_for_other_channels_as_timms_loaders_do():
    with pytest.warns(UserNote, match="its mean has 3 numbers for 1 channel; their mean 0.4"):
        assert made((1, 32, 32), mean=(0.3, 0.4, 0.5)).preprocessing.mean == pytest.approx((0.4,))
    with pytest.raises(UserError, match=r"its std \[0\.2\] is not a number for each of 4 channels"):
        made((4, 32, 32), std=(0.2,))


def test_other_channels_are_refused():
    with pytest.raises(UserError, match=r"images of 2 channels; known are 1 \(L\), 3 \(RGB\), 4 \(RGBA\)"):
        LoadedModel.of(tiny_vit(in_chans=2), "pair")


def test_a_network_of_rgb_images_is_refused_before_anything_is_computed(tmp_path):
    config = InversionConfig(iterations=2, weights={"oh": 1.0, "bn": 1.0}, options={"bn_source": "resnet18"})
    with pytest.raises(UserError, match="--bn: torchvision's networks see RGB images, those of shaped have 1 channel"):
        invert(made((1, 32, 32)), config, 1, tmp_path, "cpu")
    assert not list(tmp_path.rglob("*.png"))


def test_a_student_of_other_channels_is_refused(tmp_path):
    name = in_a_folder(tmp_path / "student", (4, 32, 32))
    with pytest.raises(UserError, match="takes 4 channels, the teacher's images have 1"):
        load_student(made((1, 32, 32)), StudentConfig(name, init="scratch", finetune="full"))


def test_grey_leaves_how_opaque_pixels_are():
    model = made((4, 32, 32))
    images = SparseImages.whole(model.grid, torch.randn(64, 4, 32, 32), torch.zeros(64, dtype=torch.long))
    found = grey(images, model.grid, torch.Generator().manual_seed(0)).patches
    changed = (found != images.patches).flatten(1).any(1)
    assert 10 < changed.sum() < 54
    assert torch.equal(found[:, :, 3], images.patches[:, :, 3])
    assert torch.equal(found[changed][:, :, 0], found[changed][:, :, 2])


def test_pictures_lay_rgba_on_white():
    images = torch.zeros(1, 4, 2, 2)
    images[:, 3, 0] = 1.0
    assert in_colours(images)[0, :, :, 0].tolist() == [[0.0, 1.0]] * 3
    assert in_colours(torch.full((1, 1, 2, 2), 0.5)).shape == (1, 3, 2, 2)


def test_digits_are_learnt_by_a_model_of_grey_images_and_need_no_data_set_afterwards(tmp_path):
    config = {"architecture": "deit_tiny_patch16_224", "num_classes": 10}
    config["model_args"] = {"in_chans": 1, "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    config["pretrained_cfg"] = {"input_size": [1, 32, 32], "mean": [0.5], "std": [0.5], "crop_pct": 1.0}
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "config.json").write_text(json.dumps(config))
    flags = ["--model", f"local-dir:{tmp_path / 'start'}", "--init", "scratch", "--data", "digits", "--epochs", "1"]
    train_teacher.main([*flags, "--warmup_epochs", "0", "--output", str(tmp_path / "out")])
    trained = json.loads((tmp_path / "out" / "training.json").read_text())
    name = f"local-dir:{tmp_path / 'out'}"
    flags = ["--model", name, "--mode", "2", "--check_images", "0", "--output", str(tmp_path / "quant")]
    report = test_quant.main(flags)
    assert report["fp"]["top1"] == pytest.approx(trained["top1"], abs=0.3) and report["fp"]["images"] == 360
    assert load_model(name).preprocessing.mode == "L"
