"""Every step on a CUDA device that is not there: no tensor on the wrong side, and nothing that the host waits for."""

import pytest
import torch
from torch import nn

import inversion.capture
from inversion import CANVASES, IMPORTANCES, INITS, STRATEGIES, VIEWS, InversionConfig, Inverter
from inversion.priors import options, terms
from kt import DistillConfig
from kt.config import OPTIMIZERS
from kt.distillation import Distiller, Memory
from models import SparseImages, SparseViT
from quant import OBSERVERS, QuantConfig, quantize
from quant.fidelity import fidelity
from quant.insert import quantized_layers
from quant.integers import IntegerLinear
from tests.conftest import tiny_model
from tests.fake_cuda import CUDA, cuda  # noqa: F401
from utils import AUGMENTATIONS
from utils.evaluation import evaluate

SCHEDULE = {"prune_it": (2,), "prune_ratio": (0.3,)}
ALONE = {"weights": {"oh": 1.0}}
SCHEDULED = [name for name in STRATEGIES if name not in ("dense", "pri")]
INVERSIONS = [
    *({"weights": {"oh": 1.0, name: 1.0}, "iterations": 3} for name in terms()),
    *({"strategy": name, **SCHEDULE} for name in SCHEDULED),
    {"strategy": "dense"},
    {"strategy": "pri", "pri_division": 2},
    *({"importance": name, **ALONE, **SCHEDULE} for name in IMPORTANCES),
    *({"init": name, **ALONE, "iterations": 2} for name in INITS),
    *({"canvas": name, **SCHEDULE} for name in CANVASES),
    *({"views": (name,), **ALONE, **SCHEDULE} for name in VIEWS),
    {"views": tuple(VIEWS), "canvas": "spectral", "copies": 2, "iterations": 3},
    {"strategy": "grow", "canvas": "spectral", "iterations": 14, "lr_schedule": "phases", "phases": ("1",) * 7},
    {"strategy": "grow", "iterations": 14},
    {"phases": ("1:coarse=2", "1:fresh=1,roll.share=0.25"), "lr_end": 0.01, "soft_logits": 5.0},
    {"projections": ("lowpass:every=1",), "lr_schedule": "cosine", "warmup": 1, **SCHEDULE},
    {"snapshots": (2,), "targets": ("balanced",), "soft_label": 0.1, "flip": False, "dtype": "bfloat16", **SCHEDULE},
]


@pytest.fixture
def images() -> SparseImages:
    """On the host."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(4, 12, 3, 8, 8, generator=generator)
    positions = torch.stack([torch.randperm(16, generator=generator)[:12] for _ in range(4)])
    return SparseImages(patches, positions, torch.zeros(4, dtype=torch.long))


def small_cnn(source: str) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))


@pytest.mark.parametrize("settings", INVERSIONS, ids=str)
def test_an_inversion_on_the_device(settings, images, monkeypatch, request):
    monkeypatch.setattr("inversion.priors.deepinversion.load_cnn", small_cnn)
    monkeypatch.setattr(inversion.capture, "EAGER_STEPS", 1)
    pooled = {"class_token": False, "global_pool": "map"} if settings.get("importance") == "pool" else {}
    model = tiny_model(**pooled)
    config = InversionConfig(**{"iterations": 4, **settings}, batch_size=2, student="a student")
    device = request.getfixturevalue("cuda")
    inverter = Inverter(model, config, CUDA, tiny_model(depth=1), lambda batch: images)
    for name in ("_split", "_reduced", "_project"):
        setattr(inverter, name, device.inside("step", getattr(inverter, name)))
    batch = inverter.invert(0)
    assert batch.images.patches.device.type == "cpu"
    assert len(batch.losses) == config.iterations


def test_all_options_of_priors_are_known():
    """So that the cases above are all there are."""
    known = {
        "bn_source",
        "psaq_bandwidth",
        "cmi_temperature",
        "cmi_bank",
        "adv_temperature",
        "synq_cutoff",
        "synq_sure",
    }
    assert set(options()) == known


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("observer", OBSERVERS)
def test_calibration_reconstruction_and_evaluation_on_the_device(observer, images, monkeypatch, request):
    """The host may wait between batches: for ranges that are fixed, now and then for an error to show, for sums."""
    model = tiny_model(embed_dim=16, depth=1)  # weights are rounded column by column
    device = request.getfixturevalue("cuda")
    vit = model.sparse(CUDA)
    forward = SparseViT.forward
    monkeypatch.setattr(SparseViT, "forward", device.inside("step", forward))
    fitted = {"rotate": True, "compensate": True} if observer == "heads" else {}
    config = QuantConfig(4, 4, observer, batch_size=2, bias_correction=True, fill=observer == "mse", **fitted)
    quantized = quantize(vit, images, config)
    assert {x.device.type for x in quantized.state_dict().values()} == {"cuda"}
    loss = {"heads": "fisher", "repq": "global"}.get(observer, "mse")
    learning = QuantConfig(4, 4, observer, batch_size=2, reconstruct=True, reconstruct_steps=3, reconstruct_loss=loss)
    fixed, device.waits = device.waits, 0
    quantize(vit, images, learning)
    assert device.waits <= fixed + len(vit.blocks) + 2
    whole = SparseImages.whole(model.grid, torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.long))
    fidelity(vit, quantized, whole, 2)
    batches = [(torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.long))] * 2
    device.waits = 0
    evaluate({"fp": vit, "quant": quantized}, batches, CUDA, agreement_with="fp")
    assert device.waits == 2 * 2 * 4  # four sums of a model and a batch
    for layer in quantized_layers(quantized).values():
        if hasattr(layer.quantizer, "zero_point"):
            x = torch.zeros(2, 20, layer.linear.in_features, device=CUDA)
            assert IntegerLinear(layer)(x).device == CUDA


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "lbfgs"])
def test_a_distillation_step_on_the_device(optimizer, images, request):
    """With every change of the images; what the host waits for is what the teacher's check found, before the first
    step, and the mean loss, after the last.
    """
    teacher, student = tiny_model(), tiny_model(depth=1)
    device = request.getfixturevalue("cuda")
    config = DistillConfig(batch_size=3, optimizer=optimizer, lr_schedule="cosine", augment=tuple(AUGMENTATIONS))
    distiller = Distiller(teacher, student, config, CUDA)
    distiller._step = device.inside("step", distiller._step)
    checked = device.waits
    distiller.run(images, 2)
    assert (checked, device.waits) == (2, 3)


def test_what_a_head_is_fitted_to_stays_on_the_device(request):
    """Nothing is waited for until it is fitted. (A head that learns alone cannot be made on this device.)"""
    device, memory = request.getfixturevalue("cuda"), Memory(None)
    add = device.inside("step", memory.add)
    rows = [(torch.randn(6, 5).to(CUDA), torch.randn(6, 3).to(CUDA)) for _ in range(4)]
    before = device.waits
    for pair in rows:
        add(*pair)
    features, logits = memory.rows()
    assert device.waits == before
    assert (features.shape, logits.shape) == ((24, 5), (24, 3)) and {features.device, logits.device} == {CUDA}
