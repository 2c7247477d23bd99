"""How far a quantized model is from its original, without labels: the figure, and what a run says of it."""

import pytest
import torch
from safetensors.torch import save_file

import test_quant
from models import load_model
from quant import QuantConfig, quantize
from quant.fidelity import fidelity
from utils import Real, calibration_images
from utils.quant_task import check_images, remedies

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return load_model("deit_nano_4_digits")


@pytest.fixture(scope="module")
def images(model):
    return check_images(model, 32, CPU)


def test_a_model_is_its_own_like(model, images):
    found = fidelity(model.sparse(), model.sparse(), images)
    assert (found.agreement, found.divergence) == (100, 0)


def test_the_figures_are_the_formulas(model, images):
    quantized = quantize(model.sparse(), calibration_images(model, Real(), 32), QuantConfig(3, 3, "repq"))
    with torch.no_grad():
        p, q = (vit(images.patches, images.positions).logits.double().softmax(1) for vit in (model.sparse(), quantized))
    found, best = fidelity(model.sparse(), quantized, images, batch_size=7), p.argmax(1)
    assert found.agreement == pytest.approx(100 * (best == q.argmax(1)).double().mean().item(), abs=0.01)
    assert found.divergence == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-4)


def test_images_to_check_with_are_whole_right_and_the_same_every_time(model, images):
    assert images.positions.shape == (32, 64)
    with torch.no_grad():
        found = model.sparse()(images.patches, images.positions).logits.argmax(1)
    assert (found == images.labels).float().mean() > 0.9
    assert torch.equal(images.patches, check_images(model, 32, CPU).patches)


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
    flags = ["--mode", "2", "--output", str(tmp_path / "out"), *massive(tmp_path / "weights.safetensors")]
    report = test_quant.main([*flags, "--check_images", "32"])
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


def test_a_good_model_is_not_warned_of_and_nothing_is_checked_unasked(tmp_path, capsys):
    flags = ["--mode", "2", "--val_limit", "40", "--output", str(tmp_path / "out")]
    report = test_quant.main([*flags, "--check_images", "32"])
    assert report["check"]["images"] == 32
    assert report["check"]["agreement"] >= 96
    assert "warning" not in capsys.readouterr().out
    assert "check" not in test_quant.main(flags)


@pytest.mark.parametrize(
    ("config", "mode", "expected"),
    [
        (QuantConfig(8, 8), 0, ["--observer auto", "--reconstruct"]),
        (QuantConfig(4, 4, "repq", reconstruct=True), 1, ["--mode 0", "--keep with these", "more bits"]),
        (QuantConfig(32, 8, "mse"), 2, []),
    ],
)
def test_what_to_try_is_what_has_not_been_tried(config, mode, expected):
    assert remedies(config, mode) == expected
