"""Swin Transformers on kept patches, against timm's own forward."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import window_partition
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models import SparseViT
from tests.conftest import randomize
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
