"""Attention that knows where tokens are: what the forward pass, training, devices, rotation and export make of it."""

import copy

import pytest
import timm
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer_relpos import VisionTransformerRelPos

import inversion.capture
from inversion import InversionConfig, Inverter
from models import LoadedModel, SparseImages, SparseViT
from quant import QuantConfig, load_quantized, quantize, save_quantized
from quant.rotation import rotated, rotations
from scripts.model_checks import with_random_weights
from tests.fake_cuda import CUDA, cuda  # noqa: F401
from utils.errors import UserError

SIZES = {"img_size": (24, 32), "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
ROPE = {"use_rot_pos_emb": True}
ROTARY = [
    ROPE,
    ROPE | {"rope_type": "mixed"},
    ROPE | {"rope_type": "dinov3", "rope_rotate_half": True, "attn_type": "rope"},
    ROPE | {"dynamic_img_size": True},
    ROPE | {"rope_type": "mixed", "dynamic_img_size": True},
    ROPE | {"rope_type": "dinov3", "dynamic_img_size": True},
]
APART = {"qkv_fused": False}
BIASED = [
    (Beit, {"use_rel_pos_bias": True}),
    (Beit, {"use_shared_rel_pos_bias": True, "use_abs_pos_emb": False}),
    (VisionTransformerRelPos, {}),
    (VisionTransformerRelPos, {"rel_pos_type": "bias", "class_token": True, "shared_rel_pos": True}),
]
ALL = [*((Eva, options) for options in (*ROTARY, APART)), *BIASED]
IDS = [f"{kind.__name__}-{options}" for kind, options in ALL]


def made(kind, **options):
    torch.manual_seed(0)
    return with_random_weights(kind(**SIZES | options)).eval()


def images(count=3):
    return torch.randn(count, 3, 24, 32, generator=torch.Generator().manual_seed(1))


def assert_near(got, expected, bound=1e-4):
    assert (got - expected).abs().max() < bound * expected.abs().max()


@pytest.mark.parametrize(("kind", "options"), ALL, ids=IDS)
def test_a_model_that_learns_on_kept_patches_is_what_timm_learns(kind, options):
    """After two steps of SGD with decay, in timm's modules as well; nothing learns beside, as a bias of the keys."""
    vit = made(kind, **options)
    alone, sparse, pixels = copy.deepcopy(vit), SparseViT(vit), images()
    for model, logits in ((alone, alone), (sparse, sparse.forward_images)):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, weight_decay=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            (logits(pixels) * torch.linspace(-1, 1, 15).view(3, 5)).sum().backward()
            optimizer.step()
    with torch.no_grad():
        expected = alone(pixels)
        assert_near(sparse.forward_images(pixels), expected)
        assert_near(vit(pixels), expected)
        assert_near(SparseViT(vit).forward_images(pixels), expected)
        assert_near(copy.deepcopy(sparse).forward_images(pixels), expected)


@pytest.mark.parametrize(("kind", "options"), ALL, ids=IDS)
def test_a_model_on_a_device_shares_all_its_weights_with_timm(kind, options):
    """So that what a student learns there is saved."""
    model = LoadedModel.of(made(kind, **options))
    sparse = model.sparse("meta")
    assert {value.device.type for value in (*model.vit.state_dict().values(), *sparse.parameters())} == {"meta"}


@pytest.mark.parametrize(("kind", "options"), ALL, ids=IDS)
def test_bfloat16_is_as_near_as_timm_in_bfloat16(kind, options):
    vit, pixels = made(kind, **options), images()
    exact = vit(pixels).detach()
    low, fed = copy.deepcopy(vit).bfloat16(), pixels.bfloat16()
    with torch.no_grad():
        ours = copy.deepcopy(SparseViT(vit)).to(torch.bfloat16).forward_images(fed).float()
        assert (ours - exact).norm() < 2 * (low(fed).float() - exact).norm()


@pytest.mark.parametrize(("kind", "options"), [*((Eva, options) for options in ROTARY), *BIASED[::3]], ids=str)
def test_an_inversion_on_a_device_waits_for_nothing(kind, options, monkeypatch, request):
    """Rotary embeddings that timm makes on the host are made once, so that a step can be recorded."""
    monkeypatch.setattr(inversion.capture, "EAGER_STEPS", 1)
    model = LoadedModel.of(made(kind, **options))
    config = InversionConfig(iterations=4, batch_size=2, prune_it=(2,), prune_ratio=(0.3,))
    device = request.getfixturevalue("cuda")
    inverter = Inverter(model, config, CUDA)
    for name in ("_split", "_reduced"):
        setattr(inverter, name, device.inside("step", getattr(inverter, name)))
    assert len(inverter.invert(0).losses) == 4


@pytest.mark.parametrize(("kind", "options"), ALL, ids=IDS)
def test_a_rotated_model_computes_the_same(kind, options):
    """Queries and keys that are turned have no other rotation in front of it."""
    vit, pixels = SparseViT(made(kind, **options)), images()
    assert bool(rotations(vit).scores) == ("use_rot_pos_emb" in options)
    with torch.no_grad():
        assert_near(rotated(vit).forward_images(pixels), vit.forward_images(pixels))


def test_a_stream_that_is_normalized_twice_is_not_rotated():
    vit = SparseViT(made(Eva, use_post_transformer_norm=True, use_fc_norm=True))
    assert "twice" in rotations(vit).stream
    with torch.no_grad():
        assert_near(rotated(vit).forward_images(images()), vit.forward_images(images()))


@pytest.mark.parametrize(("kind", "options"), [(Eva, ROPE), *BIASED], ids=str)
def test_a_file_knows_where_tokens_are(kind, options):
    pytest.importorskip("onnx", reason="onnx is not installed (requirements-export.txt)")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from quant.onnx_graph import onnx_model, require_exportable

    vit = SparseViT(made(kind, **options))
    require_exportable(vit)
    file = onnx_model(copy.deepcopy(vit), {}, 17).SerializeToString()
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"images": images().numpy()})[0])
    assert_near(found, vit.forward_images(images()).detach())


def test_biases_of_pairs_count_as_memory():
    """A fused attention keeps them for the backward pass, as it keeps no scores."""
    block = SparseViT(made(Beit, use_rel_pos_bias=True)).blocks[0]
    plain = SparseViT(made(Beit)).blocks[0]
    assert block.saved(13, pairs=False) - plain.saved(13, pairs=False) == 2 * 13 * 13


def test_rotary_embeddings_that_timm_does_not_run_are_refused():
    try:
        vit = made(Eva, **ROPE, rope_type="base")
    except TypeError:
        pytest.skip("this version of timm makes no such model")
    with pytest.raises(UserError, match="rope_type='base'"):
        SparseViT(vit)


def test_grouped_heads_are_refused():
    options = {"attn_type": "rope", **APART, "num_kv_heads": 1}
    try:
        vit = made(Eva, **options)
    except TypeError:
        pytest.skip("this version of timm has no grouped heads")
    with pytest.raises(UserError, match="grouped"):
        SparseViT(vit)


def test_a_quantized_model_whose_blocks_share_their_positions_is_saved(tmp_path):
    args = {"img_size": [48, 64], "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
    name = "vit_srelpos_small_patch16_224"
    model = LoadedModel.of(with_random_weights(timm.create_model(name, **args)), name, architecture=(name, args))
    pixels = torch.randn(4, 3, 48, 64)
    images = SparseImages.whole(model.grid, pixels, torch.zeros(4, dtype=torch.long))
    quantized = quantize(model.sparse(), images, config := QuantConfig(4, 8, "mse"))
    save_quantized(tmp_path / "quantized", quantized, model, config, classes=list("abcde"))
    assert torch.equal(load_quantized(tmp_path / "quantized").forward_images(pixels), quantized.forward_images(pixels))
