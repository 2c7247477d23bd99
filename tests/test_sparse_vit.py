"""The sparse forward against timm's own."""

import pytest
import timm
import torch
from timm.models.vision_transformer import Attention, Block
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import PatchGrid, SparseImages, SparseViT
from tests.conftest import randomize, tiny_vit
from utils.errors import UserError

# Name and arguments; sizes are small, every architecture option is as in the named model.
ARCHITECTURES = [
    ("deit_tiny_patch16_224", {"img_size": 64}),
    ("deit_base_distilled_patch16_224", {"img_size": 48, "depth": 3}),
    ("deit3_small_patch16_224", {"img_size": 64}),
    ("vit_small_patch16_224", {"img_size": 64}),
    ("vit_small_patch14_dinov2", {"img_size": 70}),
    ("vit_small_patch14_reg4_dinov2", {"img_size": 70}),
    ("vit_base_patch16_clip_224", {"img_size": 48, "depth": 3}),
    ("vit_giant_patch14_dinov2", {"img_size": 28, "depth": 2}),
]
TIMM = tuple(int(part) for part in timm.__version__.split(".")[:3])
OPTIONS = [
    {"qk_norm": True},
    {"global_pool": "avg"},
    {"global_pool": "avgmax", "fc_norm": False},
    {"global_pool": "max", "reg_tokens": 2},
    {"global_pool": "map"},
    {"global_pool": "prr"},
    {"scale_attn_norm": True, "scale_mlp_norm": True},
    {"pos_embed": "none"},
    {"dynamic_img_size": True},
    {"no_embed_class": True, "reg_tokens": 3, "init_values": 0.1},
    {"img_size": (16, 32), "patch_size": (8, 4)},
    {"qkv_bias": False, "proj_bias": False, "pre_norm": True, "final_norm": False},
]


def assert_same_logits(vit, generator=None):
    images = torch.randn(2, 3, *vit.patch_embed.img_size)
    with torch.no_grad():
        expected, got = vit(images), SparseViT(vit).forward_images(images)
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("name", "args"), ARCHITECTURES, ids=[name for name, _ in ARCHITECTURES])
def test_all_patches_give_the_logits_of_timm(name, args):
    assert_same_logits(randomize(timm.create_model(name, num_classes=7, **args)))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_accepted_option_is_honoured_or_refused_where_timm_does_not_honour_it(options):
    """Versions of timm before 1.0.26 have no prr and forget the class token of models without position embeddings."""
    if TIMM < (1, 0, 26) and options == {"global_pool": "prr"}:
        pytest.skip("this version of timm has no such pooling")
    vit = tiny_vit(**options)
    if TIMM < (1, 0, 26) and options == {"pos_embed": "none"}:
        with pytest.raises(UserError, match="class token"):
            SparseViT(vit)
    else:
        assert_same_logits(vit)


@pytest.mark.parametrize("options", [{}, {"global_pool": "avg"}, {"reg_tokens": 2}], ids=str)
def test_kept_patches_give_what_timm_gives_for_those_tokens(options):
    """The reference embeds every patch and drops tokens before the first block."""
    vit = tiny_vit(**options)
    images = torch.randn(3, 3, 32, 32)
    kept = torch.stack([torch.randperm(16)[:6] for _ in range(3)])
    sparse = SparseViT(vit)
    rows = torch.arange(3)[:, None]
    with torch.no_grad():
        tokens = vit._pos_embed(vit.patch_embed(images))
        prefix = vit.num_prefix_tokens
        tokens = torch.cat([tokens[:, :prefix], tokens[:, prefix:][rows, kept]], dim=1)
        expected = vit.forward_head(vit.norm(vit.blocks(vit.norm_pre(tokens))))
        got = sparse(sparse.grid.patchify(images)[rows, kept], kept).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "reg_tokens": 2}, {"global_pool": "avg"}], ids=str)
def test_attention_is_the_cls_row_of_the_last_block(options):
    """Against the softmax that timm's last block computes, mean over heads, without the prefix tokens."""
    vit = tiny_vit(**options)
    attn = vit.blocks[-1].attn
    attn.fused_attn = False
    seen = []
    attn.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(output))
    images = torch.randn(2, 3, 32, 32)
    sparse = SparseViT(vit)
    with torch.no_grad():
        vit(images)
        got = sparse.class_attention(sparse.grid.patchify(images), sparse.grid.all_positions(2))
    expected = seen[0][:, :, 0, vit.num_prefix_tokens :].mean(dim=1)
    torch.testing.assert_close(got, expected)


def test_mirrored_reads_patches_with_their_columns_reversed():
    sparse = SparseViT(tiny_vit())
    patches, positions = torch.randn(2, 16, 3, 8, 8), sparse.grid.all_positions(2)
    with torch.no_grad():
        expected = sparse(patches.flip(-1), positions).logits
        got = sparse(patches, positions, mirrored=True).logits
    torch.testing.assert_close(got, expected)


class OtherBlock(Block):
    """Nothing that is known."""


class OtherAttention(Attention):
    """Nothing that is known."""


REFUSED = [
    ("resnet18", {}, "ResNet"),
    ("vit_tiny_patch16_224", {"num_classes": 0}, "head"),
    ("vit_tiny_patch16_224", {"img_size": 72}, "multiple"),
    ("vit_tiny_r_s16_p8_224", {}, "embedded"),
    ("vit_tiny_patch16_224", {"block_fn": OtherBlock}, "OtherBlock"),
    ("vit_tiny_patch16_224", {"attn_layer": OtherAttention}, "OtherAttention"),
    ("cait_xxs24_224", {"attn_block": OtherAttention}, "LayerScaleBlock of OtherAttention"),
    ("cait_xxs24_224", {"depth_token_only": 0}, "no class-attention blocks"),
    ("vit_tiny_patch16_224", {"global_pool": ""}, "pooling"),
]


@pytest.mark.parametrize(("name", "args", "why"), REFUSED, ids=[why for _, _, why in REFUSED])
def test_what_cannot_be_honoured_is_refused_with_the_reason(name, args, why):
    if TIMM < (1, 0, 26) and "attn_layer" in args:
        pytest.skip("this version of timm has one attention")
    with torch.device("meta"):
        vit = timm.create_model(name, **args)
    with pytest.raises(UserError, match=why):
        SparseViT(vit)


def test_flops_match_torch_counting_the_products():
    """The analytic count of a forward pass and of a step against torch's own counter."""
    sparse = SparseViT(tiny_vit()).requires_grad_(False)
    positions = torch.arange(9)[None]
    patches = torch.randn(1, 9, 3, 8, 8, requires_grad=True)
    # Plain attention: what a fused kernel counts, and computes twice, differs between versions of torch.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            logits = sparse(patches, positions).logits
        with FlopCounterMode(display=False) as backward:
            logits.sum().backward()
    assert forward.get_total_flops() == sparse.forward_flops(9)
    assert forward.get_total_flops() + backward.get_total_flops() == sparse.step_flops(9)


def test_filled_places_hold_the_nearest_kept_patch_of_their_own_image():
    grid = PatchGrid(3, 3, 2, 2, channels=1)
    positions = torch.tensor([[0, 8], [2, 6]])
    patches = torch.arange(4.0).view(2, 2, 1, 1, 1).expand(2, 2, 1, 2, 2)
    filled = SparseImages(patches, positions, torch.tensor([7, 8])).filled(grid)
    assert torch.equal(filled.positions, grid.all_positions(2))
    assert torch.equal(filled.labels, torch.tensor([7, 8]))
    shown = filled.patches[:, :, 0, 0, 0].view(2, 3, 3)
    equally_far = -1
    expected = torch.tensor([[[0, 0, -1], [0, -1, 1], [-1, 1, 1]], [[-1, 2, 2], [3, -1, 2], [3, 3, -1]]])
    decided = expected != equally_far
    assert torch.equal(shown[decided], expected[decided].float())
    assert {*shown[0].unique().tolist()} == {0, 1}
    assert {*shown[1].unique().tolist()} == {2, 3}


def test_filling_leaves_whole_images_as_they_are():
    grid = PatchGrid(2, 2, 4, 4)
    whole = SparseImages.whole(grid, torch.randn(3, 3, 8, 8), torch.zeros(3, dtype=torch.long))
    assert torch.equal(whole.filled(grid).patches, whole.patches)


def test_images_of_a_trajectory_are_put_together():
    """Three images with label 7, of which the third shares a patch with those before it, and one with label 8."""
    grid = PatchGrid(2, 2, 1, 1, 1)
    positions = torch.tensor([[0, 1], [3, 2], [1, 3], [2, 0]])
    patches = torch.arange(1.0, 9).view(4, 2, 1, 1, 1)
    whole = SparseImages(patches, positions, torch.tensor([7, 7, 7, 8])).put_together(grid)
    assert whole.labels.tolist() == [7, 7, 8]
    pixels = grid.unpatchify(whole.patches, whole.positions).flatten(1)
    assert pixels[0].tolist() == [1, 2, 4, 3]
    assert pixels[1].tolist() == [5, 5, 6, 6]  # its own two, and copies of the nearest of them
    assert set(pixels[2].tolist()) == {7, 8}
