"""Every kind of architecture against timm's own forward: logits, gradients, kept patches, attention, products."""

import copy
import functools

import pytest
import timm
import torch
from timm.models.vision_transformer import ParallelScalingBlock
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from inversion import InversionConfig, Inverter
from inversion.canvas import PatchCanvas
from inversion.importance import IMPORTANCES
from kt import DistillConfig, Distiller
from models import SparseImages, SparseViT, pack_blocks
from models.packed import PackedBlock
from tests.conftest import run_script
from tests.families import ALL_FAMILIES, FAMILIES, LATE_NAMES, family_model, family_vit, fed_to_timm, images_of
from utils.errors import UserError

# A layer for the outputs of attention and MLP together, and no layer scale.
JoinedOutput = functools.partial(ParallelScalingBlock, fuse_out_proj=True)
LATE = not timm.is_model(LATE_NAMES[0])
# What the named models do not show, of architectures that have parts of their own.
OPTIONS = [
    ("cait_xxs24_224", {"global_pool": "avg"}),
    ("cait_xxs24_224", {"depth_token_only": 1, "qkv_bias": False}),
    ("vit_pwee_patch16_reg1_gap_256", {"qkv_bias": False, "global_pool": "token", "class_token": True}),
    ("vit_tiny_patch16_224", {"block_fn": ParallelScalingBlock, "qk_norm": True}),
    ("vit_tiny_patch16_224", {"block_fn": JoinedOutput}),
    ("vit_small_patch16_18x2_224", {"qk_norm": True, "scale_attn_norm": True, "global_pool": "avg"}),
]
LATE_OPTIONS = [
    ("vit_tiny_patch16_224", {"attn_layer": "diff", "reg_tokens": 1}),
    ("vit_tiny_patch16_224", {"attn_layer": "diff", "scale_attn_norm": True, "qk_norm": True, "global_pool": "avg"}),
    ("vit_small_patch16_18x2_224", {"attn_layer": "diff"}),
    ("vit_dpwee_patch16_reg1_gap_256", {"qkv_bias": False, "class_token": True, "global_pool": "token"}),
]
ALL = [*((name, {}) for name in FAMILIES), *OPTIONS, *([] if LATE else LATE_OPTIONS)]
every = pytest.mark.parametrize(("name", "options"), ALL, ids=str)


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


def logits_and_gradient(run, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a function of images, the gradient being that of some sum of the logits."""
    leaf = images.clone().requires_grad_()
    logits = run(leaf)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    return logits.detach(), torch.autograd.grad((logits * weights).sum(), leaf)[0]


@every
def test_logits_and_gradients_are_those_of_timm(name, options):
    """As it comes, with weights packed, with patches in another order, and by plain code."""
    vit = family_vit(name, **options)
    images = torch.randn(2, 3, *vit.patch_embed.img_size)
    expected = logits_and_gradient(vit, images)
    sparse = SparseViT(vit)
    packed = copy.deepcopy(sparse).requires_grad_(False)
    pack_blocks(packed, torch.float32)
    order = torch.stack([torch.randperm(sparse.grid.count) for _ in images])
    rows = torch.arange(2)[:, None]

    def permuted(images: torch.Tensor) -> torch.Tensor:
        return sparse(sparse.grid.patchify(images)[rows, order], order).logits

    runs = (sparse.forward_images, packed.forward_images, permuted, copy.deepcopy(sparse).plainly().forward_images)
    for run in runs:
        logits, gradient = logits_and_gradient(run, images)
        assert_near(logits, expected[0], 1e-4)
        assert_near(gradient, expected[1], 1e-3)


@every
def test_kept_patches_give_what_timm_gives_for_their_tokens(name, options):
    vit = family_vit(name, **options)
    sparse = SparseViT(vit)
    images = torch.randn(3, 3, *vit.patch_embed.img_size)
    kept = torch.stack([torch.randperm(16)[:6] for _ in images])
    with torch.no_grad():
        found = sparse(sparse.grid.patchify(images)[torch.arange(3)[:, None], kept], kept).logits
        expected = fed_to_timm(vit, images, kept)
    assert_near(found, expected, 1e-4)


def test_only_blocks_that_are_written_out_are_packed():
    packed = {}
    for name in FAMILIES:
        vit = SparseViT(family_vit(name)).requires_grad_(False)
        pack_blocks(vit, torch.float32)
        packed[name] = isinstance(vit.blocks[0], PackedBlock)
    if packed["vit_tiny_patch16_224"]:  # else nothing is packed on this machine
        assert packed["vit_small_patch16_rope_mixed_224"] and packed["vit_srelpos_small_patch16_224"]
        assert not packed["cait_xxs24_224"] and not packed["vit_pwee_patch16_reg1_gap_256"]
        assert not packed["vit_base_patch16_rpn_224"] and not packed["vit_small_patch16_18x2_224"]


@every
def test_flops_match_torch_counting_the_products(name, options):
    """Of layers and between tokens, forward and backward to the pixels, with frozen weights."""
    sparse = SparseViT(family_vit(name, **options)).requires_grad_(False)
    for block in sparse.blocks:
        if hasattr(block, "position"):  # once for all images
            block.position = block.position.fixed(torch.float32)
    images = images_of(sparse, 1, kept=9)
    patches = images.patches.requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            logits = sparse(patches, images.positions).logits
        with FlopCounterMode(display=False) as backward:
            logits.sum().backward()
    assert forward.get_total_flops() == pytest.approx(sparse.forward_flops(9), rel=0.02)
    assert forward.get_total_flops() + backward.get_total_flops() == pytest.approx(sparse.step_flops(9), rel=0.02)


@every
def test_what_a_block_saves_is_about_what_is_said(name, options):
    """Numbers that autograd keeps of the blocks' forward pass, and the largest tensor among them."""
    sparse = SparseViT(family_vit(name, **options)).requires_grad_(False)
    images = images_of(sparse, 1)
    x, where, kept = sparse.embed(images.patches, images.positions).detach(), sparse.where(images.positions), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in sparse.parameters()}
    tokens = x.shape[1]
    for block in sparse.blocks:
        kept.clear()
        x = x.detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            y = block(x, where=where).tokens
        found = [count for pointer, count in kept.items() if pointer not in weights]
        said = block.saved(tokens, pairs=True)
        assert 0.3 * said < sum(found) < 2.2 * said
        assert max(found) <= 3 * block.largest(tokens)
        x = y


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize(("name", "options"), [*ALL], ids=str)
def test_patches_are_ranked_or_the_ranking_is_refused(name, options, importance):
    """Each patch by itself, whichever place it has in the batch; what cannot be ranked is refused at the start."""
    model = family_model(name, **options)
    vit = SparseViT(model.vit)
    images = images_of(vit, 2, kept=7)
    lacks = not (hasattr(vit.head.attn_pool, "latent") if importance == "pool" else vit.has_class_token)
    if importance in ("cls", "rollout", "pool") and lacks:
        config = InversionConfig(iterations=4, prune_it=(1,), prune_ratio=(0.5,), importance=importance)
        with pytest.raises(UserError, match=f"--importance {importance} cannot rank"):
            Inverter(model, config, torch.device("cpu"))
        return
    canvas = PatchCanvas(vit.grid, images.patches, images.positions)
    found = IMPORTANCES[importance](vit, canvas, images.labels)
    assert found.shape == (2, 7)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    moved = PatchCanvas(vit.grid, images.patches[:, order], images.positions[:, order])
    torch.testing.assert_close(
        IMPORTANCES[importance](vit, moved, images.labels), found[:, order], rtol=1e-3, atol=1e-6
    )


def test_class_attention_of_cait_is_what_timm_computes():
    vit = family_vit("cait_xxs24_224")
    for block in vit.blocks_token_only:
        block.attn.fused_attn = False
    seen = []
    for block in vit.blocks_token_only:
        block.attn.attn_drop.register_forward_hook(lambda _, __, out: seen.append(out))
    sparse = SparseViT(vit)
    images = torch.randn(2, 3, 64, 64)
    patches, positions = sparse.grid.patchify(images), sparse.grid.all_positions(2)
    with torch.no_grad():
        vit(images)
        weights = sparse.attention_weights(patches, positions)
        torch.testing.assert_close(sparse.class_attention(patches, positions), seen[1][:, :, 0, 1:].mean(dim=1))
    assert [each.shape[-1] for each in weights] == [16, 16, 17, 17]
    torch.testing.assert_close(weights[2][:, 0], seen[0][:, :, 0].mean(dim=1))
    assert torch.equal(weights[2][:, 1:], torch.eye(17)[1:].expand(2, -1, -1))


def test_rollout_of_cait_goes_through_both_kinds_of_blocks():
    """By hand: the class token has seen itself until its first block; patches rest in its blocks."""
    vit = SparseViT(family_vit("cait_xxs24_224"))
    images = images_of(vit, 1, kept=5)
    found = IMPORTANCES["rollout"](vit, PatchCanvas(vit.grid, images.patches, images.positions), images.labels)
    with torch.no_grad():
        first, second, third, fourth = (w[0].double() for w in vit.attention_weights(images.patches, images.positions))
    patches = (second + torch.eye(5)) / 2 @ ((first + torch.eye(5)) / 2)
    row = (third[0] + torch.eye(6)[0]) / 2
    token, seen = row[0], row[1:] @ patches
    row = (fourth[0] + torch.eye(6)[0]) / 2
    torch.testing.assert_close(found[0].double(), row[0] * seen + row[1:] @ patches, rtol=1e-4, atol=1e-7)
    assert 0 < token < 1


@pytest.mark.skipif(LATE, reason="this version of timm has no differential attention")
def test_differential_attention_is_the_difference_that_timm_computes():
    vit = family_vit("vit_tiny_patch16_224", attn_layer="diff")
    attn = vit.blocks[-1].attn
    attn.fused_attn, seen = False, []
    attn.attn_drop.register_forward_hook(lambda _, __, out: seen.append(out))
    sparse, images = SparseViT(vit), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        vit(images)
        found = sparse.class_attention(sparse.grid.patchify(images), sparse.grid.all_positions(2))
        first, second = seen[0].view(2, 4, 2, 17, 17).unbind(2)
        expected = (first - attn._compute_lambda() * second)[:, :, 0, 1:].mean(dim=1)
    torch.testing.assert_close(found, expected)


@every
def test_attended_is_of_every_patch(name, options):
    sparse = SparseViT(family_vit(name, **options)).requires_grad_(False)
    images = images_of(sparse, 2, kept=5)
    plain, asked = (sparse(images.patches, images.positions, return_inside=asks) for asks in (False, True))
    assert_near(asked.logits, plain.logits, 1e-5)
    tokens = 5 + sparse.prefix_tokens
    assert asked.inside and all(inside.attended.shape[:2] == (2, tokens) for inside in asked.inside)
    assert len(asked.inside) == (2 if "cait" in name else len(sparse.blocks))


def test_families_are_there_without_what_only_late_versions_of_timm_have():
    code = """
import timm, timm.models.vision_transformer as timm_vit
models = [timm.create_model(f"vit_{name}", depth=1) for name in ("tiny_patch16_224", "pwee_patch16_reg1_gap_256")]
for name in ("DiffAttention", "DiffParallelScalingBlock"):
    vars(timm_vit).pop(name, None)
from models import SparseViT
print(*(type(SparseViT(model).blocks[0]).__name__ for model in models))
"""
    assert run_script("-c", code).stdout == "SparseBlock ParallelBlock\n"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("full", [False, True], ids=["head", "whole"])
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_fast_code_teaches_what_plain_code_does(name, full):
    """Two steps of distillation, in float32 up to rounding and in bfloat16 nearly."""

    def learnt(dtype: str, eager: bool) -> torch.Tensor:
        torch.manual_seed(1)
        teacher, student = family_model(name), family_model(name)
        for parameter in student.vit.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape)
        student.vit.requires_grad_(full)
        student.vit.get_classifier().requires_grad_(True)
        grid, generator = student.grid, torch.Generator().manual_seed(0)
        pixels = torch.randn(4, grid.channels, *grid.image_size, generator=generator)
        before = {key: value.clone() for key, value in student.sparse().state_dict().items()}
        config = DistillConfig(batch_size=4, lr=0.01, dtype=dtype, match=("logits", "relations"))
        distiller = Distiller(teacher, student, config, torch.device("cpu"), eager)
        distiller.run(SparseImages.whole(grid, pixels, torch.zeros(4).long()), 2)
        after = distiller.weights()
        return torch.cat([(after[key] - value).flatten() for key, value in before.items() if value.is_floating_point()])

    plain = learnt("float32", eager=True)
    assert plain.norm() > 1e-3
    assert (learnt("float32", eager=False) - plain).norm() < 1e-3 * plain.norm()
    assert (learnt("bfloat16", eager=False) - plain).norm() < 0.1 * plain.norm()
