"""Quantized models on disk: saved and read back, and as ONNX files."""

import copy
import dataclasses
import json
import sys
from functools import partial

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import test_quant
from models import DEFAULT_MODEL, SparseImages, SparseViT, load_model
from models.blocks import SparseBlock
from models.registry import Preprocessing
from quant import QuantConfig, load_quantized, quantize, save_quantized
from quant.export import default_opset, require_export, runtime_for
from tests.conftest import randomize, run_script, tiny_model, tiny_vit
from tests.families import ALL_FAMILIES, LATE_NAMES, family_model, family_vit
from tests.test_swin import CONFIGURATIONS, swin
from utils.data import Digits
from utils.device import multiplies_bytes
from utils.errors import UserError

CLASSES = list(Digits.classes)


def noise(vit: SparseViT, count: int = 8) -> SparseImages:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, vit.grid.channels, *vit.grid.image_size, generator=generator)
    return SparseImages.whole(vit.grid, images, torch.zeros(count, dtype=torch.long))


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(8, 8),
        QuantConfig(4, 4, "repq", keep=("first", "head"), bias_correction=True),
        QuantConfig(3, 4, "repq", reconstruct=True, reconstruct_steps=3),
        QuantConfig(4, 4, "repq", symmetric=True, reconstruct=True, reconstruct_steps=2),
        QuantConfig(4, 32, "mse"),
        QuantConfig(32, 6, "percentile"),
        QuantConfig(3, 3, "auto"),
        QuantConfig(4, 4, "heads", symmetric=True, rotate=True, reconstruct=True, reconstruct_steps=2),
    ],
    ids=lambda config: f"{config.observer}-w{config.w_bit}a{config.a_bit}",
)
def test_a_saved_model_gives_identical_logits(tmp_path, config):
    model = load_model(DEFAULT_MODEL)
    vit = SparseViT(model.vit)
    quantized = quantize(vit, noise(vit), config)
    again = load_quantized(save_quantized(tmp_path / "saved", quantized, model, config, CLASSES))
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.forward_images(images), quantized.forward_images(images))
    about = json.loads((tmp_path / "saved" / "quantized.json").read_text())
    assert about["classes"] == CLASSES
    if config.w_bit <= 8:
        size = (tmp_path / "saved" / "model.safetensors").stat().st_size
        assert size < 0.32 * 4 * sum(parameter.numel() for parameter in model.vit.parameters())


def test_a_bias_that_reparameterization_made_is_read_back(tmp_path):
    model = load_model(DEFAULT_MODEL)
    for block in model.vit.blocks:
        block.attn.qkv.bias = None
    model.architecture[1]["qkv_bias"] = False
    vit, config = SparseViT(model.vit), QuantConfig(4, 4, "repq")
    quantized = quantize(vit, noise(vit), config)
    again = load_quantized(save_quantized(tmp_path, quantized, model, config, CLASSES))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.forward_images(images), quantized.forward_images(images))


def test_saving_leaves_another_models_folder_alone(tmp_path):
    model = load_model(DEFAULT_MODEL)
    teacher = tmp_path / "model.safetensors"
    teacher.write_bytes(b"weights of a teacher")
    with pytest.raises(UserError, match="another model's"):
        test_quant.main(
            [
                "--mode",
                "1",
                "--check_images",
                "0",
                "--val_limit",
                "8",
                "--save",
                str(tmp_path),
                "--output",
                str(tmp_path / "out"),
            ]
        )
    with pytest.raises(UserError, match="another model's"):
        save_quantized(tmp_path, SparseViT(model.vit), model, QuantConfig(), CLASSES)
    assert teacher.read_bytes() == b"weights of a teacher"


def test_two_heads_behind_one_reparameterized_norm_are_saved(tmp_path):
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    vit = randomize(timm.create_model("deit_tiny_distilled_patch16_224", **arguments))
    architecture = ("deit_tiny_distilled_patch16_224", arguments)
    model = dataclasses.replace(tiny_model(), vit=vit, architecture=architecture)
    sparse, config = SparseViT(vit), QuantConfig(4, 4, "repq")
    quantized = quantize(sparse, noise(sparse), config)
    again = load_quantized(save_quantized(tmp_path, quantized, model, config, CLASSES))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.forward_images(images), quantized.forward_images(images))


def test_a_folder_that_holds_no_quantized_model_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"quantized\.json"):
        load_quantized(tmp_path)
    model = load_model(DEFAULT_MODEL)
    vit = SparseViT(model.vit)
    save_quantized(tmp_path, quantize(vit, noise(vit), QuantConfig()), model, QuantConfig(), CLASSES)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is damaged"):
        load_quantized(tmp_path)
    (tmp_path / "quantized.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="format 99"):
        load_quantized(tmp_path)
    with pytest.raises(UserError, match="architecture"):
        save_quantized(tmp_path, vit, dataclasses.replace(model, architecture=None), QuantConfig(), [])


def test_without_the_packages_export_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"requirements-export\.txt"):
        test_quant.main(["--export", str(tmp_path / "a.onnx"), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "report.json").exists()


@pytest.fixture
def onnx_packages():
    pytest.importorskip("onnx", reason="onnx is not installed (requirements-export.txt)")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (requirements-export.txt)")


@pytest.mark.usefixtures("onnx_packages")
def test_the_bundled_model_is_exported_checked_and_run(tmp_path):
    file = tmp_path / "digits.onnx"
    flags = ["--mode", "2", "--output", str(tmp_path / "out"), "--export", str(file), "--save", str(tmp_path / "saved")]
    report = test_quant.main([*flags, "--observer", "auto", "--check_images", "0"])
    found = json.loads((tmp_path / "out" / "report.json").read_text())["export"]
    assert found["agreement"] >= 99.5
    assert abs(found["top1_difference"]) <= 0.3  # one of 360 images
    assert found["top1"] == report["export"]["top1"] > 98
    assert found["bytes"] == file.stat().st_size < 0.35 * found["float32_bytes"]
    for times in (found["latency_ms"], found["throughput"]):
        assert times.keys() == {"quantized", "float32", "pytorch"}
        assert all(value > 0 for value in times.values())

    digits = Digits("test", lambda image: image)
    paths = []
    for index in range(12):
        paths.append(tmp_path / f"{index}.png")
        digits[index][0].save(paths[-1])
    result = run_script("scripts/run_onnx.py", file, *paths, "--top", 2)
    assert result.returncode == 0, result.stderr
    named = [line.partition(": ")[2].split(" ")[0] for line in result.stdout.splitlines()]
    assert sum(name == str(digits[index][1]) for index, name in enumerate(named)) >= 11
    assert "torch" not in (run_script.__globals__["ROOT"] / "scripts" / "run_onnx.py").read_text()
    for wrong in ([tmp_path / "none.onnx", paths[0]], [file, tmp_path / "none.png"]):
        result = run_script("scripts/run_onnx.py", *wrong)
        assert result.returncode == 2
        assert result.stderr.startswith("error: ")
        assert len(result.stderr.splitlines()) == 1


OPTIONS = [
    {},
    {"init_values": 0.1},
    {"reg_tokens": 2, "global_pool": "avg", "fc_norm": True},
    {"qk_norm": True, "qkv_bias": False},
    {"pre_norm": True, "no_embed_class": True},
    {"class_token": False, "global_pool": "avg"},
    {"class_token": False, "global_pool": "max"},
]


def logits_of(vit: SparseViT, images: torch.Tensor, opset: int = 21) -> np.ndarray:
    from quant.export import OnnxModel
    from quant.onnx_graph import onnx_model

    file = onnx_model(copy.deepcopy(vit), {}, opset).SerializeToString()
    return OnnxModel(file).forward_images(images).numpy()


@pytest.mark.usefixtures("onnx_packages")
@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_full_precision_graph_gives_the_logits_of_the_model(options, approximate, opset):
    vit = SparseViT(tiny_vit(**options))
    for block in vit.blocks:
        block.mlp.act = torch.nn.GELU(approximate)
    images = noise(vit, 3)
    for count in (1, 3):
        pixels = vit.grid.unpatchify(images.patches, images.positions)[:count]
        with torch.no_grad():
            expected = vit.forward_images(pixels).numpy()
        np.testing.assert_allclose(logits_of(vit, pixels, opset), expected, rtol=1e-3, atol=1e-4)


# What the named models do not show, of blocks that write themselves.
FAMILY_OPTIONS = [
    ("cait_xxs24_224", {"global_pool": "avg"}),
    ("cait_xxs24_224", {"depth_token_only": 1, "qkv_bias": False}),
    ("vit_pwee_patch16_reg1_gap_256", {"qkv_bias": False, "global_pool": "token", "class_token": True}),
    ("vit_small_patch16_18x2_224", {"qk_norm": True, "scale_attn_norm": True, "global_pool": "avgmax"}),
]
LATE_OPTIONS = [
    ("vit_tiny_patch16_224", {"attn_layer": "diff", "scale_attn_norm": True, "qk_norm": True}),
    ("vit_small_patch16_18x2_224", {"attn_layer": "diff"}),
    ("vit_dpwee_patch16_reg1_gap_256", {"class_token": True, "global_pool": "token"}),
]
EXPORTED = {
    **{name: partial(family_vit, name) for name in ALL_FAMILIES},
    **{
        f"{name} {options}": partial(family_vit, name, **options)
        for name, options in [*FAMILY_OPTIONS, *(LATE_OPTIONS if timm.is_model(LATE_NAMES[0]) else [])]
    },
}


@pytest.mark.usefixtures("onnx_packages")
@pytest.mark.parametrize("name", EXPORTED)
def test_every_family_is_exported(name):
    """In full precision to the last digits; quantized as far as sums in another order allow."""
    from quant.onnx_graph import require_exportable

    vit = SparseViT(EXPORTED[name]())
    require_exportable(vit)
    images = noise(vit, 8)
    pixels = vit.grid.unpatchify(images.patches, images.positions)
    quantized = quantize(vit, images, QuantConfig(6, 6, "mse"))
    with torch.no_grad():
        plain, simulated = (model.forward_images(pixels).numpy() for model in (vit, quantized))
    for opset in (17, 21):
        assert np.abs(logits_of(vit, pixels, opset) - plain).max() < 1e-4 * np.abs(plain).max(), opset
        off = np.abs(logits_of(quantized, pixels, opset) - simulated).mean()
        assert off < 0.3 * np.abs(plain - simulated).mean(), opset


@pytest.mark.usefixtures("onnx_packages")
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_windows_of_every_cut_are_exported(name):
    """Quantized, images in which no value lies on a rounding boundary, about half of them, to the last digits."""
    vit = SparseViT(swin(name))
    images = noise(vit, 8)
    pixels = vit.grid.unpatchify(images.patches, images.positions)
    quantized = quantize(vit, images, QuantConfig(6, 6, "mse"))
    with torch.no_grad():
        plain, simulated = (model.forward_images(pixels).numpy() for model in (vit, quantized))
    for opset in (17, 21):
        assert np.abs(logits_of(vit, pixels, opset) - plain).max() < 1e-4 * np.abs(plain).max()
        off = np.abs(logits_of(quantized, pixels, opset) - simulated).max(axis=1)
        lost = np.abs(plain - simulated).mean()
        assert np.sort(off)[1] < 1e-3 * lost
        assert off.mean() < 2 * lost


@pytest.mark.usefixtures("onnx_packages")
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_sums_of_every_family_are_quantized_in_int8(name):
    """Whatever reads them, as below."""
    vit = SparseViT(family_vit(name))
    images = noise(vit, 4)
    quantized = quantize(vit, images, QuantConfig(8, 8, "minmax", symmetric=True))
    pixels = vit.grid.unpatchify(images.patches, images.positions)
    with torch.no_grad():
        expected = quantized.forward_images(pixels).numpy()
    np.testing.assert_allclose(logits_of(quantized, pixels, 22), expected, atol=0.05 * np.abs(expected).max())


@pytest.mark.usefixtures("onnx_packages")
@pytest.mark.parametrize("name", ["cait_xxs24_224", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_what_a_file_needs_is_tried_on_a_block_of_every_kind_and_width(name, tmp_path):
    require_export(tmp_path / "a.onnx", family_model(name), QuantConfig(4, 4, "auto"))


@pytest.mark.usefixtures("onnx_packages")
def test_a_distilled_model_is_exported_with_both_heads():
    import timm

    torch.manual_seed(0)
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    vit = SparseViT(randomize(timm.create_model("deit_tiny_distilled_patch16_224", **args)))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = vit.forward_images(pixels).numpy()
    np.testing.assert_allclose(logits_of(vit, pixels), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("onnx_packages")
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("w_bit", "a_bit", "observer"),
    [(8, 8, "minmax"), (4, 6, "repq"), (8, 8, "mse"), (8, 8, "heads"), (4, 6, "auto")],
)
def test_a_quantized_graph_gives_nearly_the_logits_of_the_model(w_bit, a_bit, observer, symmetric):
    """Sums in another order move a value over a rounding step now and then, so not exactly."""
    if symmetric and observer == "mse" and not multiplies_bytes():
        pytest.skip("without VNNI ONNX Runtime's products of two int8 activations overflow")
    vit = SparseViT(tiny_vit())
    images = noise(vit, 16)
    quantized = quantize(
        vit, images, QuantConfig(w_bit, a_bit, observer, symmetric, rotate=observer == "heads" or None)
    )
    pixels = vit.grid.unpatchify(images.patches, images.positions)
    with torch.no_grad():
        plain, expected = (model.forward_images(pixels).numpy() for model in (vit, quantized))
    found = logits_of(quantized, pixels)
    assert np.abs(found - expected).mean() < 0.3 * np.abs(plain - expected).mean()
    if w_bit == 4:  # int4 in one file, int8 in the other
        np.testing.assert_array_equal(found, logits_of(quantized, pixels, opset=20))


@pytest.mark.usefixtures("onnx_packages")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_residual_sums_are_quantized_in_int8_whatever_reads_them(options):
    """ONNX Runtime's optimizer turns int8 into uint8 on x86 CPUs, and fails where it has moved it over a reshape."""
    vit = SparseViT(tiny_vit(**options))
    images = noise(vit, 4)
    quantized = quantize(vit, images, QuantConfig(8, 8, "minmax", symmetric=True))
    pixels = vit.grid.unpatchify(images.patches, images.positions)
    with torch.no_grad():
        expected = quantized.forward_images(pixels).numpy()
    np.testing.assert_allclose(logits_of(quantized, pixels, 22), expected, atol=0.05 * np.abs(expected).max())


@pytest.mark.usefixtures("onnx_packages")
@pytest.mark.parametrize("opset", [17, 21])
def test_a_symmetric_file_has_int8_and_zero_points_of_0_alone(opset):
    from onnx import numpy_helper

    from quant.onnx_graph import onnx_model

    vit = SparseViT(tiny_vit())
    graph = onnx_model(quantize(vit, noise(vit), QuantConfig(4, 8, "mse", symmetric=True)), {}, opset).graph
    constants = {one.name: one for one in graph.initializer}
    places = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert sum(node.op_type == "QuantizeLinear" for node in places) == 18
    for node in places:
        zero_point = numpy_helper.to_array(constants[node.input[2]])
        assert zero_point.dtype == np.int8
        assert not zero_point.any()


@pytest.mark.usefixtures("onnx_packages")
def test_opsets_that_cannot_be_had_are_refused_before_anything_is_computed(tmp_path, monkeypatch):
    import onnxruntime

    def refused(why, config, opset):
        with pytest.raises(UserError, match=why):
            require_export(tmp_path / "a.onnx", tiny_model(), config, opset)

    require_export(tmp_path / "a.onnx", tiny_model(), QuantConfig(4, 4, "repq"), None)
    require_export(tmp_path / "a.onnx", tiny_model(), QuantConfig(4, 4, "mse", symmetric=True), 17)
    refused("--opset 16 is not 17 to", QuantConfig(), 16)
    refused("--opset 1000 is not 17 to", QuantConfig(), 1000)

    class Old:
        def __init__(self, *args, **kwargs):
            raise RuntimeError("Could not find an implementation for Cast(21)\nand so on")

    monkeypatch.setattr(onnxruntime, "InferenceSession", Old)
    monkeypatch.setattr(onnxruntime, "__version__", "1.22.1")
    refused(
        r"int4 weights needs onnxruntime 1\.23 or newer, 1\.22\.1 is installed; .* --opset 20", QuantConfig(4, 8), 21
    )
    refused(r"opset 23 needs onnxruntime 1\.24 or newer, 1\.22\.1 is", QuantConfig(8, 8), 23)
    refused(r"onnxruntime 1\.22\.1 does not run a file of opset 20 \(Could not find", QuantConfig(4, 8), 20)


@pytest.mark.usefixtures("onnx_packages")
def test_a_file_says_what_it_needs():
    for config, opset, version in (
        (QuantConfig(8, 8), None, "1.15"),
        (QuantConfig(4, 8), None, "1.23"),
        (QuantConfig(4, 8), 20, "1.17"),
        (QuantConfig(4, 8), 26, "1.25"),
        (QuantConfig(32, 32), 10**3, None),
    ):
        assert runtime_for(config, opset or default_opset(config)) == version


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--opset", "17"], "--export, which is not given"),
        (["--export", "a.onnx", "--opset", "16"], "--opset 16 is not 17 to"),
        (["--export", "a.onnx", "--opset", "x"], "invalid int"),
    ],
    ids=["without a file", "too old", "no number"],
)
@pytest.mark.usefixtures("onnx_packages")
def test_a_wrong_opset_is_one_error(tmp_path, monkeypatch, flags, why):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=why):
        test_quant.main([*flags, "--mode", "1", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "report.json").exists()


@pytest.mark.usefixtures("onnx_packages")
def test_what_cannot_be_exported_is_refused(tmp_path):
    import timm

    def refused(model, why, file="a.onnx"):
        with pytest.raises(UserError, match=why):
            require_export(tmp_path / file, model, QuantConfig())

    refused(tiny_model(), "ends in .onnx", "a.pt")
    convolved = tiny_model()
    convolved.vit.blocks[0].mlp = timm.layers.GatedMlp(32, 64)
    refused(convolved, "GatedMlp")
    relu = tiny_model()
    relu.vit.blocks[1].mlp.act = torch.nn.ReLU()
    refused(relu, "ReLU")
    pooled = tiny_model(global_pool="map")
    pooled.vit.attn_pool = torch.nn.Identity()
    refused(pooled, "a pooling of the kind Identity")
    own = tiny_model()
    own.vit.blocks[0].norm1 = torch.nn.GroupNorm(1, 32)
    refused(own, "GroupNorm")
    (tmp_path / "file").write_text("")
    refused(tiny_model(), "cannot be written", "file/a.onnx")


@pytest.mark.usefixtures("onnx_packages")
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_18x2_224"])
def test_a_block_that_computes_something_else_and_does_not_write_itself_is_refused(name):
    from quant.onnx_graph import require_exportable

    class Other(SparseBlock):
        pass

    vit = SparseViT(family_vit(name))
    next(module for module in vit.modules() if type(module) is SparseBlock).__class__ = Other
    with pytest.raises(UserError, match="a block of the kind Other cannot be exported"):
        require_exportable(vit)


@pytest.mark.usefixtures("onnx_packages")
@pytest.mark.parametrize(("crop_mode", "crop_pct"), [("center", 0.9), ("center", 1.0), ("squash", 0.875)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_runner_prepares_images_as_timm_does(crop_mode, crop_pct, interpolation):
    from dataclasses import asdict

    from scripts.run_onnx import preprocess

    how = Preprocessing((3, 56, 56), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), interpolation, crop_pct, crop_mode)
    generator = np.random.default_rng(0)
    for size in ((80, 61), (57, 90), (200, 200)):
        image = Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8))
        expected = how.eval_transform()(image).numpy()
        np.testing.assert_allclose(preprocess(image, asdict(how)), expected, atol=1e-5)


@pytest.mark.usefixtures("onnx_packages")
def test_the_study_of_runtimes_runs_every_file_here(tmp_path, monkeypatch):
    """With no other runtime at hand its table has the simulated models and the runtime of this environment."""
    from scripts.studies import runtimes

    monkeypatch.setattr(runtimes, "WIDTHS", ((8, 8), (4, 4)))
    flags = ["--val_limit", "40", "--num_images", "8", "--num_workers", "0", "--output", str(tmp_path)]
    simulated, *rows = runtimes.main(flags)
    assert simulated.pop("runs") == "simulated" and len(rows) >= 2
    assert set(simulated) == {"W8/A8", "W8/A8, symmetric", "W4/A4", "W4/A4, symmetric"}
    for row in rows:
        assert row.pop("runs").startswith("opset ")
        assert row == pytest.approx(simulated, abs=5.1)  # two of the 40 images
    assert "| simulated |" in (tmp_path / "runtimes.md").read_text()
