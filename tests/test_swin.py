"""Swin Transformers on kept patches, against timm's own forward."""

import math
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import window_partition
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from inversion import InversionConfig, Inverter
from inversion.canvas import PatchCanvas
from inversion.head_similarity import unlike
from inversion.priors.base import LossInputs
from inversion.priors.psaq import PatchSimilarityEntropy
from inversion.views import Seen
from kt import DistillConfig, Distiller
from models import LoadedModel, SparseImages, SparseViT
from models.registry import Preprocessing
from quant import QuantConfig, load_quantized, quantize, save_quantized
from quant.export import require_export
from quant.rotation import rotated, rotations
from tests.conftest import randomize
from tests.fake_cuda import CUDA, cuda  # noqa: F401
from utils.errors import UserError

TINY = {"img_size": 64, "embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 3, 4), "num_classes": 5}
V1, V2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"
SHIFTED = {"depths": (2, 2, 2, 2), "window_size": 4}
# What differs from the named model: stages of one window, several, shifted; padded where 7 divides no resolution.
CONFIGURATIONS = {
    "one window in the last stages": (V1, {"window_size": 4}),
    "shifted": (V1, SHIFTED),
    "not square": (V1, {**SHIFTED, "img_size": (64, 96)}),
    "padded": (V1, {"depths": (2, 2, 2, 2), "img_size": 96}),
    "padded beyond the resolution": (V1, {"depths": (2, 2, 2, 2), "always_partition": True}),
    "many windows": (V1, {"depths": (2, 2, 2, 2), "window_size": 2, "img_size": (64, 128)}),
    "windows that are not square": (V1, {"depths": (2, 2, 2, 2), "window_size": (4, 8)}),
    "heads of their own width, no bias": (V1, {**SHIFTED, "head_dim": 5, "qkv_bias": False}),
    "three stages": (V1, {"depths": (2, 2, 2), "num_heads": (1, 2, 3), "window_size": 4}),
    "largest value": (V1, {**SHIFTED, "global_pool": "max"}),
    "two stages, padded": (V1, {"depths": (2, 1), "num_heads": (1, 2)}),
    "version 2": (V2, {"window_size": 4}),
    "version 2, shifted": (V2, {**SHIFTED, "pretrained_window_sizes": (6, 6, 6, 6)}),
    "version 2, padded": (V2, {"depths": (2, 2, 2, 2), "window_size": 7, "img_size": (64, 96)}),
    "version 2, no bias": (V2, {**SHIFTED, "qkv_bias": False}),
}
EACH = pytest.mark.parametrize("name", CONFIGURATIONS)


def swin(name: str = "shifted", **kwargs) -> nn.Module:
    """A tiny model whose scores are far from alike."""
    architecture, options = CONFIGURATIONS[name]
    torch.manual_seed(0)
    vit = randomize(timm.create_model(architecture, **TINY | options | kwargs))
    with torch.no_grad():
        for key, parameter in vit.named_parameters():
            if "relative_position_bias_table" in key or "cpb_mlp" in key or "qkv.weight" in key:
                parameter.normal_(0, 0.3)
    return vit


def swin_model(name: str) -> LoadedModel:
    """As the registry would give it, its weights such that images differ in their logits."""
    architecture, options = CONFIGURATIONS[name]
    vit, generator = timm.create_model(architecture, **TINY | options), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in vit.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.fill_(1.0)
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight.normal_(0, module.weight[0].numel() ** -0.5, generator=generator)
                if module.bias is not None:
                    module.bias.normal_(0, 0.1, generator=generator)
    size = (3, *vit.patch_embed.img_size)
    preprocessing = Preprocessing(size, (0.48, 0.45, 0.41), (0.23, 0.22, 0.21), "bicubic", 1.0, "center")
    vit = vit.eval().requires_grad_(False)
    return LoadedModel("swin", vit, preprocessing, None, (architecture, TINY | options))


def images_of(vit: nn.Module, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *vit.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


def some(vit: SparseViT, images: int, count: int, seed: int = 0) -> torch.Tensor:
    """Positions of so many patches of each image."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(vit.grid.count, generator=generator)[:count] for _ in range(images)])


def kept_places(block: nn.Module, kept: torch.Tensor) -> torch.Tensor:
    """Kept tokens of a stage (H, W), bool -> by timm's windows, padding as kept: (windows, area)."""
    rolled = kept.roll([-shift for shift in block.shift_size], (0, 1))
    down, right = (-size % window for size, window in zip(kept.shape, block.window_size, strict=True))
    padded = F.pad(rolled, (0, right, 0, down), value=True)
    return window_partition(padded[None, :, :, None], block.window_size).flatten(1)


def plain_logits(vit: nn.Module, image: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits of the kept patches (n,) of an image: timm's modules on the full grid, where no stopped token is a key."""
    rows, cols = (count >> (len(vit.layers) - 1) for count in vit.patch_embed.grid_size)
    last = torch.zeros(rows * cols, dtype=torch.bool).index_fill(0, positions, True).view(rows, cols)
    for number, stage in enumerate(vit.layers):
        kept = last.repeat_interleave(2 ** (len(vit.layers) - 1 - number), 0)
        kept = kept.repeat_interleave(2 ** (len(vit.layers) - 1 - number), 1)
        for block in stage.blocks:
            absent = -1e6 * ~kept_places(block, kept)[:, None]
            between = block.get_attn_mask(device=image.device, dtype=image.dtype)
            area = math.prod(block.window_size)
            block.attn_mask = absent.expand(-1, area, -1) + (0 if between is None else between)
    tokens = vit.forward_features(image[None])[:, last]
    pooled = tokens.amax(dim=1) if vit.global_pool == "max" else tokens.mean(dim=1)
    return vit.head.fc(pooled)[0]


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


@EACH
def test_all_patches_give_the_logits_and_gradients_of_timm(name):
    vit = swin(name)
    sparse, ours, theirs = SparseViT(vit), images_of(vit).requires_grad_(), images_of(vit).requires_grad_()
    found, expected = sparse.forward_images(ours), vit(theirs)
    assert_near(found, expected, 1e-4)
    weights = torch.randn(found.shape)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_near(ours.grad, theirs.grad, 1e-3)


@EACH
@pytest.mark.parametrize("frozen", [False, True])
def test_kept_patches_give_what_timm_gives_where_stopped_tokens_are_no_keys(name, frozen):
    """A frozen model takes other paths: the bias that is added to the scores gets no gradient."""
    vit = swin(name).requires_grad_(not frozen)
    sparse, images = SparseViT(vit), images_of(vit, 3)
    rows = torch.arange(3)[:, None]
    for count in (1, sparse.grid.count // 2, sparse.grid.count - 1):
        positions = some(sparse, 3, count)
        ours, theirs = images.clone().requires_grad_(), images.clone().requires_grad_()
        found = sparse(sparse.grid.patchify(ours)[rows, positions], positions).logits
        expected = torch.stack([plain_logits(vit, *one) for one in zip(theirs, positions, strict=True)])
        assert_near(found, expected, 1e-4)
        found[:, 0].sum().backward()
        expected[:, 0].sum().backward()
        assert_near(ours.grad, theirs.grad, 1e-3)


@EACH
def test_gradients_to_the_weights_are_those_of_stock_kernels(name):
    """With padding too, which reads the bias of keys and values, and with places where there is no token."""
    vit = swin(name)
    gradients = []
    for sparse in (SparseViT(vit), SparseViT(vit).plainly()):
        positions = some(sparse, 2, max(1, sparse.grid.count // 2))
        patches = sparse.grid.taken(images_of(vit), positions)
        vit.zero_grad()
        sparse(patches, positions).logits[:, 1].sum().backward()
        gradients.append({key: parameter.grad.clone() for key, parameter in sparse.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for key, expected in gradients[1].items():
        assert (gradients[0][key] - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-6, key


@EACH
def test_as_many_places_as_any_tokens_could_need_give_the_same(name):
    """As where counting would wait for a device."""
    vit = swin(name).requires_grad_(False)
    counted, bounded = SparseViT(vit), SparseViT(vit)
    bounded.places.counted = False
    for count in (1, 2, counted.grid.count // 2):
        positions, found = some(counted, 2, count), []
        for sparse in (counted, bounded):
            patches = sparse.grid.taken(images_of(vit), positions).requires_grad_()
            logits = sparse(patches, positions).logits
            found.append((logits, *torch.autograd.grad(logits[:, 0].sum(), patches)))
        for ours, expected in zip(*found, strict=True):
            assert_near(ours, expected, 1e-4)


@pytest.mark.parametrize("name", ["shifted", "padded", "version 2, shifted"])
def test_the_order_of_patches_does_not_matter(name):
    vit = swin(name)
    sparse = SparseViT(vit)
    for count in (sparse.grid.count, sparse.grid.count // 2):
        positions, order = some(sparse, 2, count), torch.randperm(count)
        patches = sparse.grid.taken(images_of(vit), positions)
        with torch.no_grad():
            expected = sparse(patches, positions).logits
            found = sparse(patches[:, order], positions[:, order]).logits
        assert_near(found, expected, 1e-5)


@pytest.mark.parametrize("mirrored", [True, torch.tensor(1)])
def test_mirrored_reads_patches_with_their_columns_reversed(mirrored):
    vit = swin("not square")
    sparse = SparseViT(vit)
    positions = some(sparse, 2, 3)
    patches = sparse.grid.taken(images_of(vit), positions)
    with torch.no_grad():
        assert_near(sparse(patches, positions, mirrored).logits, sparse(patches.flip(-1), positions).logits, 1e-5)


def test_patches_become_their_tokens_row_by_row():
    vit = swin("not square")
    sparse, images = SparseViT(vit), images_of(vit)
    with torch.no_grad():
        tokens = sparse.embed(sparse.grid.patchify(images), sparse.grid.all_positions(2))
        whole = vit.patch_embed(images)
    side = sparse.tokens_per_side
    found = tokens.view(2, sparse.grid.rows, sparse.grid.cols, side, side, -1).transpose(2, 3)
    torch.testing.assert_close(found.reshape(whole.shape), whole)


@pytest.mark.parametrize("name", ["not square", "padded", "version 2", "many windows"])
def test_attention_between_patches_is_that_of_the_last_stage(name):
    """Of the last block, not shifted, whose tokens are patches: timm's softmax, mean over heads, zero between windows.

    What padding is given is left out.
    """
    vit = swin(name, depths=(1, 1, 1, 1))
    block = vit.layers[-1].blocks[-1]
    block.attn.fused_attn, seen = False, []
    block.attn.softmax.register_forward_hook(lambda module, inputs, output: seen.append(output.mean(dim=1)))
    sparse, images = SparseViT(vit), images_of(vit)
    patches, count = sparse.grid.patchify(images), sparse.grid.count
    with torch.no_grad():
        vit(images)
        (found,) = sparse.attention_weights(patches, sparse.grid.all_positions(2), last_only=True)
    numbers = torch.arange(count).view(1, sparse.grid.rows, sparse.grid.cols, 1)
    windows = window_partition(numbers, block.window_size).flatten(1)
    expected = torch.zeros(2, count, count)
    for window, weights in zip(windows.repeat(2, 1), seen[0], strict=True):
        image = expected[0 if expected[0, window[0]].sum() == 0 else 1]
        image[window[:, None], window] = weights
    torch.testing.assert_close(found, expected)


def test_attention_of_every_block_is_between_patches_and_rows_sum_to_one():
    vit = swin("shifted")
    sparse = SparseViT(vit)
    positions = some(sparse, 2, 3)
    with torch.no_grad():
        weights = sparse.attention_weights(sparse.grid.taken(images_of(vit), positions), positions)
    for found in weights:
        torch.testing.assert_close(found.sum(dim=2), torch.ones(2, 3))


@pytest.mark.parametrize("name", ["shifted", "padded", "version 2, padded"])
@pytest.mark.parametrize("kept", [None, 3])
def test_what_heads_give_is_between_patches_whose_mean_ranks_them(name, kept):
    """Windows counted, and as many as could be, as on a GPU; gradients flow."""
    vit = swin(name)
    sparse = SparseViT(vit)
    positions = some(sparse, 2, sparse.grid.count if kept is None else kept)
    patches = sparse.grid.taken(images_of(vit), positions).requires_grad_()
    expected = sparse.attention_weights(patches, positions)
    for counted in (True, False):
        sparse.places.counted = counted
        found = sparse(patches, positions, return_inside=True).inside
        for inside, mean in zip(found, expected, strict=True):
            weights = inside.weights(None)
            assert weights.shape == (2, inside.heads, positions.shape[1], positions.shape[1])
            torch.testing.assert_close(weights.mean(dim=1), mean)
            assert torch.equal(inside.weights(1), weights[:, :, :1])
        assert torch.autograd.grad(weights.square().sum(), patches)[0].abs().sum() > 0


@pytest.mark.parametrize("kept", [None, 3])
def test_attention_in_windows_is_pulled_to_maps_of_patches(kept):
    """Against the mean over query patches of what timm's order of the patches gives, loops over images and heads."""
    model, cpu = swin_model("shifted"), torch.device("cpu")
    inverter = Inverter(model, InversionConfig(weights={"ap": 1.0}, batch_size=2), cpu)
    ((_, term),) = inverter.losses
    term.begin(None, torch.Generator().manual_seed(0), 2)
    positions = some(inverter.vit, 2, inverter.vit.grid.count if kept is None else kept)
    canvas = PatchCanvas(inverter.vit.grid, inverter.vit.grid.taken(images_of(model.vit), positions), positions)
    output = inverter.vit(canvas.pixels, positions, return_inside=True)
    found = term(LossInputs(output, None, canvas, Seen(canvas.pixels, positions), canvas.grid))
    later, expected = output.inside[len(output.inside) // 2 :], 0.0
    for number, inside in enumerate(later):
        distances = []
        for image, heads in enumerate(inside.weights(None)):
            for head, weights in enumerate(heads):
                wanted = term.maps[number][image, head][positions[image]]
                distances.append((weights.mean(dim=0) - wanted / wanted.sum()).square().sum())
        expected += sum(distances) / len(distances)
    torch.testing.assert_close(found, expected / len(later))


def test_heads_are_compared_where_windows_have_nothing_in_them():
    """As on a GPU, which has as many windows as any patches could touch: what is found is that of counted ones."""
    vit, results = swin("many windows").double(), []
    sparse = SparseViT(vit)
    positions = torch.tensor([[0, 1, 4], [5, 6, 7]])
    patches = sparse.grid.taken(images_of(vit).double(), positions).requires_grad_()
    for counted in (True, False):
        sparse.places.counted = counted
        inside = sparse(patches, positions, return_inside=True).inside
        for plain in (True, False):
            value = sum(unlike(each.queries, each.keys, each.present, plain) for each in inside if each.heads > 1)
            results.append((value, torch.autograd.grad(value, patches, retain_graph=True)[0]))
    assert any(not each.present.any(dim=1).all() for each in inside if each.heads > 1)
    for value, gradient in results[1:]:
        torch.testing.assert_close(value, results[0][0])
        torch.testing.assert_close(gradient, results[0][1])


def test_operations_are_those_that_torch_counts_where_everything_is_kept():
    sparse = SparseViT(swin("shifted")).requires_grad_(False)
    patches = torch.randn(1, sparse.grid.count, 3, 32, 32, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        logits = sparse(patches, sparse.grid.all_positions(1)).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert forward.get_total_flops() == sparse.forward_flops(sparse.grid.count)
    assert forward.get_total_flops() + backward.get_total_flops() == sparse.step_flops(sparse.grid.count)


def test_windows_without_kept_tokens_are_not_computed():
    """A quarter of the patches, all in one corner: a quarter of the windows."""
    sparse = SparseViT(swin("one window in the last stages"))
    windows = sparse.where(torch.tensor([[0]]))
    assert [len(found.rows) for found in windows] == [4, 1, 1, 1]
    assert [found.rows.shape[1] for found in windows] == [16, 16, 4, 1]


REFUSED = {
    "is no multiple of": {"img_size": 80},
    "head": {"global_pool": "catavgmax"},
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_honoured_is_refused(why):
    with pytest.raises(UserError, match=why):
        SparseViT(swin(**REFUSED[why]))


def test_a_size_that_a_token_of_the_last_stage_does_not_divide_is_refused_by_its_pixels():
    with pytest.raises(UserError, match=r"\(80, 80\) is no multiple of \(32, 32\)"):
        SparseViT(swin(img_size=80))


# What reads the attention


@pytest.mark.parametrize("name", ["shifted", "padded", "version 2, shifted"])
def test_what_attention_puts_out_is_timms_window_by_window(name):
    vit, seen = swin(name), []
    for block in (block for stage in vit.layers for block in stage.blocks):
        block.attn.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    sparse, images = SparseViT(vit), images_of(vit)
    with torch.no_grad():
        vit(images)
        expected = list(seen)
        found = sparse(sparse.grid.patchify(images), sparse.grid.all_positions(2), return_inside=True)
    for inside, theirs in zip(found.inside, expected, strict=True):
        there = torch.ones(theirs.shape[:2], dtype=torch.bool) if inside.present is None else inside.present
        torch.testing.assert_close(inside.attended[there], theirs[there], rtol=1e-4, atol=1e-5)


def plain_entropy(cosines: torch.Tensor, points: torch.Tensor, width: float) -> torch.Tensor:
    """PSAQ-ViT's differential entropy of cosines (n, n) at points."""
    kernels = torch.exp(-(((points[:, None, None] - cosines) / width) ** 2) / 2) / math.sqrt(2 * math.pi)
    density = kernels.sum(dim=(1, 2)) / (cosines.numel() * width) + 1e-4
    return torch.trapezoid(-density * density.log(), points)


@pytest.mark.parametrize("counted", [True, False])
def test_the_entropy_of_similarities_is_of_windows_of_kept_tokens(counted):
    """Against windows one by one, of their tokens alone."""
    vit = swin("padded")
    sparse = SparseViT(vit).requires_grad_(False)
    sparse.places.counted = counted
    term = PatchSimilarityEntropy.__new__(PatchSimilarityEntropy)
    term.bandwidth, term.prefix = 0.1, 0
    positions, losses = some(sparse, 2, 4), []
    patches = sparse.grid.taken(images_of(vit), positions).requires_grad_()
    output = sparse(patches, positions, return_inside=True)
    canvas = PatchCanvas(sparse.grid, patches, positions)
    losses.append(term(LossInputs(output, None, canvas, None, sparse.grid)))
    each = []
    for x, heads, *_, there in output.inside:
        x = x.unflatten(-1, (heads, -1)).mean(dim=2)
        windows = [unit @ unit.t() for unit in (F.normalize(x[i][p], dim=-1) for i, p in enumerate(there) if p.any())]
        cosines = torch.cat([window.detach().flatten() for window in windows])
        points = torch.linspace(0, 1, 10) * (cosines.max() - cosines.min()) + cosines.min()
        each.append(torch.stack([plain_entropy(window, points, 0.1) for window in windows]).mean())
    losses.append(-sum(each))
    torch.testing.assert_close(losses[0], losses[1])
    found, expected = (torch.autograd.grad(loss, patches, retain_graph=True)[0] for loss in losses)
    assert_near(found, expected, 1e-3)


# What is done with the model

KEEPS = {"prune_it": (3,), "prune_ratio": (0.5,)}
INVERSIONS = {
    "dense": ({}, None),
    "always the same look": ({"views": ()}, None),
    "smi": ({**KEEPS, "importance": "all"}, 0.5),
    "gradient": ({**KEEPS, "importance": "gradient", "dtype": "bfloat16"}, 0.5),
    "pri": ({"strategy": "pri", "importance": "all", "pri_division": 2}, 0.5),
    "psaq": ({**KEEPS, "importance": "all", "weights": {"oh": 1.0, "pse": 1.0, "tvt": 0.05}}, 0.5),
}


@pytest.mark.parametrize("name", ["shifted", "version 2, padded"])
@pytest.mark.parametrize("settings", INVERSIONS)
def test_images_are_inverted(name, settings):
    model, (config, share) = swin_model(name), INVERSIONS[settings]
    config = InversionConfig(**{"iterations": 12, "batch_size": 4, "lr": 0.1, **config})
    batch = Inverter(model, config, torch.device("cpu")).invert(0)
    assert batch.images.positions.shape == (4, int(model.grid.count * (share or 1)))
    assert batch.losses.isfinite().all()
    if settings == "always the same look":
        assert batch.losses[-1] < 0.8 * batch.losses[0]


@pytest.mark.parametrize("importance", ["cls", "rollout"])
def test_what_needs_a_class_token_is_refused(importance):
    config = InversionConfig(iterations=6, batch_size=2, **KEEPS, importance=importance)
    with pytest.raises(UserError, match="no class token"):
        Inverter(swin_model("shifted"), config, torch.device("cpu"))


@pytest.mark.parametrize("term", [None, "ap", "ihs", "pse"])
def test_an_inversion_on_a_device_waits_for_nothing(term, request):
    model = swin_model("two stages, padded")
    weights = {"oh": 1.0} | ({} if term is None else {term: 1.0})
    how = {"prune_it": (2,), "prune_ratio": (0.5,), "importance": "all"}
    config = InversionConfig(iterations=4, batch_size=2, weights=weights, **how)
    device = request.getfixturevalue("cuda")
    inverter = Inverter(model, config, CUDA)
    for name in ("_split", "_reduced"):
        setattr(inverter, name, device.inside("step", getattr(inverter, name)))
    assert len(inverter.invert(0).losses) == 4


@pytest.mark.parametrize("name", ["padded", "version 2, padded"])
def test_fast_code_of_padded_windows_is_not_taken_for_wrong(name):
    """What the places of padding hold is read by nobody."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inverter = Inverter(swin_model(name), InversionConfig(iterations=1, batch_size=2), torch.device("cpu"))
        inverter.invert(0)
    assert not inverter.plain


def varied(model: LoadedModel, count: int) -> SparseImages:
    """Noise of different strength and brightness, half of its patches."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(count, 3, *model.grid.image_size, generator=generator)
    images = images * torch.rand(count, 3, 1, 1, generator=generator) * 2
    images = images + torch.randn(count, 3, 1, 1, generator=generator)
    positions = some(model, count, model.grid.count // 2)
    return SparseImages(model.grid.taken(images, positions), positions, torch.zeros(count, dtype=torch.long))


QUANTIZATIONS = {
    "minmax": {},
    "mse": {},
    "heads": {"rotate": True},
    "repq": {},
    "percentile": {},
    "compensated": {"observer": "mse", "compensate": True},
    "bias corrected": {"observer": "mse", "bias_correction": True},
    "reconstructed": {"observer": "mse", "reconstruct": True, "reconstruct_steps": 10},
}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *(("two stages, padded", way) for way in QUANTIZATIONS),
        *(("version 2, padded", way) for way in ("mse", "repq", "compensated", "bias corrected")),
        ("shifted", "minmax"),
    ],
)
def test_eight_bits_are_near_full_precision_and_saved_as_they_are(name, way, tmp_path):
    """In units of how logits differ between images."""
    model = swin_model(name)
    images, vit = varied(model, 16), SparseViT(model.vit)
    config = QuantConfig(8, 8, **{"observer": way, **QUANTIZATIONS[way]})
    quantized = quantize(vit, images, config)
    save_quantized(tmp_path / "q", quantized, model, config, list("abcde"))
    with torch.no_grad():
        full, found, loaded = (
            each(images.patches, images.positions).logits for each in (vit, quantized, load_quantized(tmp_path / "q"))
        )
    assert torch.equal(found, loaded)
    assert (found - full).norm() < 0.25 * (full - full.mean(dim=0)).norm()
    assert not any("position" in key for key in quantized.state_dict() if "quantizer" in key)


@pytest.mark.parametrize(("name", "scores"), [("shifted", True), ("padded", True), ("version 2, padded", False)])
def test_heads_are_rotated_where_that_is_exact_and_the_stream_is_not(name, scores):
    vit = SparseViT(swin(name))
    found, positions = rotations(vit), some(vit, 2, vit.grid.count // 2)
    assert "width" in found.stream
    assert (found.scores is None, found.values is None) == (scores, True)
    patches, turned = vit.grid.taken(images_of(swin(name)), positions), rotated(vit, seed=1)
    with torch.no_grad():
        assert_near(turned(patches, positions).logits, vit(patches, positions).logits, 1e-4)
    assert not torch.equal(turned.blocks[0].qkv.weight, vit.blocks[0].qkv.weight)


def test_a_student_learns():
    teacher, student = swin_model("shifted"), swin_model("version 2")
    student.vit.requires_grad_(True)
    distiller = Distiller(teacher, student, DistillConfig(batch_size=4, lr=1e-3), torch.device("cpu"))
    images = varied(teacher, 8)
    losses = [distiller.run(images, 5) for _ in range(3)]
    assert losses[-1] < losses[0]
    assert student.vit.layers[0].blocks[0].attn.cpb_mlp[0].weight.grad.abs().sum() > 0


def test_a_model_whose_blocks_differ_in_width_is_let_through_to_be_exported(tmp_path):
    """What is tried before an inversion fits together, where the last block alone does not fit the embedding."""
    pytest.importorskip("onnxruntime")
    args = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
    model = LoadedModel.of(timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, **args))
    require_export(tmp_path / "swin.onnx", model, QuantConfig(8, 8))
