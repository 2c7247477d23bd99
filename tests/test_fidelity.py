"""How far a quantized model is from its original, without labels: the figure, and what a run says of it."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import test_quant
from models import ModelConfig, load_model
from quant import QuantConfig, quantize
from quant.fidelity import Fidelity, fidelity
from utils import DataConfig, QuantTask, Real, RunConfig, calibration_images
from utils.quant_task import check_source, remedies

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return load_model("deit_nano_4_digits")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    pool = tmp_path_factory.mktemp("pool")
    return QuantTask(ModelConfig(), DataConfig(), Real(), RunConfig(), 32, QuantConfig(), check_pool=pool)


@pytest.fixture(scope="module")
def images(model, task):
    return calibration_images(model, check_source(model, task, CPU), 32)


def test_a_model_is_its_own_like(model, images):
    found = fidelity(model.sparse(), model.sparse(), images)
    assert (found.agreement, found.divergence, found.lost_confidence, found.predicted_drop) == (100, 0, 0, 0)


def test_the_figures_are_the_formulas(model, images):
    quantized = quantize(model.sparse(), calibration_images(model, Real(), 32), QuantConfig(3, 3, "repq"))
    with torch.no_grad():
        p, q = (vit(images.patches, images.positions).logits.double().softmax(1) for vit in (model.sparse(), quantized))
    found, best = fidelity(model.sparse(), quantized, images, batch_size=7), p.argmax(1)
    assert found.agreement == pytest.approx(100 * (best == q.argmax(1)).double().mean().item(), abs=0.01)
    assert found.divergence == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-4)
    lost = [max(0, a[c].item() - b[c].item()) for a, b, c in zip(p, q, best, strict=True)]
    assert found.lost_confidence == pytest.approx(sum(lost) / len(lost), rel=1e-6)
    assert Fidelity(100, 0, 0.04).predicted_drop < 1 < Fidelity(100, 0, 0.1).predicted_drop < found.predicted_drop


def test_images_to_check_with_are_whole_right_and_the_same_every_time(model, task, images, tmp_path):
    assert images.positions.shape == (32, 64)
    with torch.no_grad():
        found = model.sparse()(images.patches, images.positions).logits.argmax(1)
    assert (found == images.labels).float().mean() > 0.9
    source = check_source(model, replace(task, check_pool=tmp_path), CPU)
    again = calibration_images(model, source, 32)
    assert torch.equal(images.patches, again.patches)


def test_it_ranks_widths_as_the_accuracy_does(model, images):
    calibration, vit = calibration_images(model, Real(), 32), model.sparse()
    configs = [QuantConfig(bits, bits, "minmax") for bits in (8, 6, 4, 3)]
    found = [fidelity(vit, quantize(vit, calibration, config), images) for config in configs]
    divergences = [one.divergence for one in found]
    assert divergences == sorted(divergences)
    assert found[0].agreement >= 96 and found[3].agreement < 50  # 0.0 and 90 points of top-1 are lost


def massive(path, factor=1000.0):
    """Weights of the bundled model that compute what they did, one channel of every block's values huge."""
    state = {key: value.clone() for key, value in load_model("deit_nano_4_digits").vit.state_dict().items()}
    channel, width = 5, state["cls_token"].shape[-1]
    for block in range(6):
        for key in (f"blocks.{block}.attn.qkv.weight", f"blocks.{block}.attn.qkv.bias"):
            state[key][2 * width + channel] *= factor
        state[f"blocks.{block}.attn.proj.weight"][:, channel] /= factor
    save_file(state, path)
    return ["--model_path", str(path)]


def test_a_massive_activation_is_not_passed_over_in_silence(tmp_path, capsys):
    flags = ["--mode", "2", "--output", str(tmp_path / "out"), "--datapool", str(tmp_path)]
    report = test_quant.main([*flags, *massive(tmp_path / "weights.safetensors")])
    assert report["fp"]["top1"] == pytest.approx(99.44, abs=0.01)
    assert report["quant"]["top1"] < 90
    assert report["check"]["agreement"] < 90
    assert report["check"]["costliest"][0].endswith((".tap_v", ".proj"))
    assert "--observer auto" in report["check"]["try"]
    printed = capsys.readouterr().out
    assert f"agreement {report['check']['agreement']:.2f}%" in printed
    warned = [line for line in printed.splitlines() if line.startswith("warning:")]
    assert len(warned) == 1 and report["check"]["costliest"][0] in warned[0] and "--observer auto" in warned[0]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Without labels" in page and report["check"]["costliest"][0] in page


def test_a_good_model_is_not_warned_of_and_its_images_are_kept(tmp_path, capsys):
    where = ["--output", str(tmp_path / "out"), "--datapool", str(tmp_path / "pool")]
    flags = ["--mode", "2", "--val_limit", "40", *where]
    first, again = test_quant.main(flags)["check"], test_quant.main([*flags, "--w_bit", "7"])["check"]
    assert first["images"] == again["images"] == 32
    assert first["agreement"] >= 96
    printed = capsys.readouterr()
    assert "warning" not in printed.out
    assert len(list((tmp_path / "pool").glob("*/batches/*.json"))) == 1
    assert "check" not in test_quant.main([*flags, "--check_images", "0"])


@pytest.mark.parametrize(
    ("config", "mode", "expected"),
    [
        (QuantConfig(8, 8), 0, ["--observer auto", "--reconstruct"]),
        (
            QuantConfig(4, 4, "auto", compensate=True, reconstruct=True),
            1,
            ["--mode 0", "--keep with these", "more bits"],
        ),
        (QuantConfig(32, 8, "mse"), 2, []),
    ],
)
def test_what_to_try_is_what_has_not_been_tried(config, mode, expected):
    assert remedies(config, mode) == expected
