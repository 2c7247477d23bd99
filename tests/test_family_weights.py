"""Weights of every family: timm's names, those of the papers' code and of transformers, sizes, and round trips."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from kt import StudentConfig, load_student, save_student
from models import LoadedModel, ModelConfig, SparseViT, load_model
from models.registry import bare_model, save_local_dir
from models.weights import load_into, read_vit
from scripts import train_teacher
from tests.test_weights import hf_model, prefixed, saved, sharpened
from utils.errors import UserError

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
FAMILY: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {}),
    "eva": ("eva_giant_patch14_224", {}),
    "eva02": ("eva02_tiny_patch14_224", {}),
    "eva02_apart": ("eva02_base_patch14_448", {}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "dinov3_biased": ("vit_small_patch16_dinov3_qkvb", {}),
    "rope_mixed": ("vit_small_patch16_rope_mixed_224", {}),
    "beit": ("beit_base_patch16_224", {}),
    "beit_shared": ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
    "beit_absolute": ("beitv2_base_patch16_224", {"use_abs_pos_emb": True, "global_pool": "token"}),
    "relpos": ("vit_relpos_medium_patch16_cls_224", {}),
    "relpos_table": ("vit_relpos_small_patch16_224", {"rel_pos_type": "bias"}),
    "relpos_shared": ("vit_srelpos_small_patch16_224", {}),
}
BEIT3 = (
    (r"^cls_token$", "beit3.vision_embed.cls_token"),
    (r"^patch_embed\.", "beit3.vision_embed."),
    (r"^pos_embed$", "beit3.encoder.embed_positions.A.weight"),
    (r"^blocks\.(\d+)\.attn\.norm\.", r"beit3.encoder.layers.\1.self_attn.inner_attn_ln.A."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"beit3.encoder.layers.\1.self_attn.out_proj.A."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"beit3.encoder.layers.\1.self_attn.qkv.A."),
    (r"^blocks\.(\d+)\.norm1\.", r"beit3.encoder.layers.\1.self_attn_layer_norm.A."),
    (r"^blocks\.(\d+)\.norm2\.", r"beit3.encoder.layers.\1.final_layer_norm.A."),
    (r"^blocks\.(\d+)\.mlp\.norm\.", r"beit3.encoder.layers.\1.ffn.A.ffn_layernorm."),
    (r"^blocks\.(\d+)\.mlp\.", r"beit3.encoder.layers.\1.ffn.A."),
)
"""timm's names, and those of BEiT-3's code."""
SWIN_V2 = "swinv2_tiny_window8_256"
POSITIONS = ("vit", "eva", "eva02", "beit", "beit_shared", "beit_absolute", "relpos_table")
"""Those with embeddings or tables that are of one size."""


def made(family: str, **kwargs: object) -> nn.Module:
    """A small model of the family, whose every tensor matters."""
    name, args = FAMILY[family]
    torch.manual_seed(0)
    return sharpened(timm.create_model(name, **(SIZES | args | kwargs)))


def folder_of(folder: Path, family: str, **kwargs: object) -> str:
    """The name of a `local-dir:` that is the family's configuration alone."""
    name, args = FAMILY[family]
    args = SIZES | args | kwargs
    size = args["img_size"]
    sides = size if isinstance(size, list) else [size, size]
    config = {"architecture": name, "num_classes": 5, "model_args": args}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": {"input_size": [3, *sides]}}))
    return f"local-dir:{folder}"


def given(folder: Path, family: str, state: object, **kwargs: object) -> LoadedModel:
    """The family's model with the weights in a file."""
    name = folder_of(folder / "config", family)
    return load_model(ModelConfig(name, saved(state, folder / "w.pth"), **kwargs))


def resized(family: str, vit: nn.Module, size: int, **kwargs: object) -> nn.Module:
    """What timm makes of the weights of `vit` at another size."""
    name, args = FAMILY[family]
    found = timm.create_model(name, **(SIZES | args | kwargs | {"img_size": size})).eval()
    found.load_state_dict(sys.modules[type(found).__module__].checkpoint_filter_fn(vit.state_dict(), found))
    return found


def assert_same(found: nn.Module, expected: nn.Module, size: tuple[int, ...] = (3, 32, 32)) -> None:
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = expected(images)
        wanted = getattr(wanted, "logits", wanted)
        torch.testing.assert_close(found(images), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("size", [[32, 32], [48, 32]], ids=str)
@pytest.mark.parametrize("family", FAMILY)
def test_what_is_saved_is_loaded_and_made_again(family, size, tmp_path):
    vit = made(family, img_size=size)
    model = LoadedModel.of(vit, "one", architecture=(FAMILY[family][0], SIZES | FAMILY[family][1] | {"img_size": size}))
    model.sparse()  # joins layers that save_local_dir then saves
    save_local_dir(model, tmp_path, "test")
    found = load_model(f"local-dir:{tmp_path}")
    assert found.grid.image_size == tuple(size)
    assert_same(found.vit, vit, (3, *size))
    assert_same(found.sparse().__class__.forward_images.__get__(found.sparse()), vit, (3, *size))
    again = bare_model(*found.architecture).eval()
    again.load_state_dict(found.vit.state_dict())
    assert_same(again, vit, (3, *size))


@pytest.mark.parametrize("family", FAMILY)
def test_a_file_in_wrappings_gives_the_logits_of_its_model(family, tmp_path):
    vit = made(family)
    assert_same(given(tmp_path, family, {"epoch": 3, "model": prefixed(vit.state_dict(), "module.")}).vit, vit)


@pytest.mark.parametrize("family", FAMILY)
def test_another_image_size_is_what_timm_makes_of_it(family, tmp_path):
    vit = made(family)
    model = given(tmp_path, family, vit.state_dict(), img_size=48)
    expected = resized(family, vit, 48)
    assert_same(model.vit, expected, (3, 48, 48))
    again = bare_model(*model.architecture).eval()
    again.load_state_dict(model.vit.state_dict())
    assert_same(again, expected, (3, 48, 48))


@pytest.mark.parametrize("family", POSITIONS)
def test_positions_are_resampled_only_where_it_is_asked_for(family, tmp_path):
    name = folder_of(tmp_path / "config", family, img_size=48)
    file = saved(made(family).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"4 x 4 patches.*6 x 6; give --img_size 32 .* or --img_size 48"):
        load_model(name, file)


@pytest.mark.parametrize("family", ["eva02", "dinov3", "beit", "relpos_table"])
def test_hub_repositories_of_every_family_at_their_size_and_another(family, tmp_path, monkeypatch):
    """The hub is a folder here: what would be downloaded lies in it."""
    vit = made(family, in_chans=1)
    folder_of(tmp_path, family, in_chans=1)
    about = json.loads((tmp_path / "config.json").read_text())
    about["pretrained_cfg"] |= {"input_size": [1, 32, 32], "mean": [0.5], "std": [0.5]}
    (tmp_path / "config.json").write_text(json.dumps(about))
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    for module in ("timm.models._hub", "huggingface_hub"):
        monkeypatch.setattr(f"{module}.hf_hub_download", lambda repo_id, filename, **_: str(tmp_path / filename))
    for size in (None, 48):
        found = load_model(ModelConfig("hf-hub:org/name", img_size=size))
        expected = resized(family, vit, size or 32, in_chans=1)
        assert_same(found.vit, expected, (1, size or 32, size or 32))


@pytest.mark.parametrize("patch", [4, 16, 32])
def test_patch_sizes(patch, tmp_path):
    for family in ("eva02", "beit", "relpos"):
        vit = made(family, patch_size=patch, img_size=64)
        name = folder_of(tmp_path / "config", family, patch_size=patch, img_size=64)
        model = load_model(name, saved(vit.state_dict(), tmp_path / "w.pth"))
        assert model.grid.height == patch
        assert_same(model.vit, vit, (3, 64, 64))


# ---- names of the papers' code


def renamed(state: dict[str, torch.Tensor], *rules: tuple[str, str]) -> dict[str, torch.Tensor]:
    """The tensors by other names."""
    found = {}
    for name, value in state.items():
        for old, new in rules:
            name = name.replace(old, new)
        found[name] = value
    return found


def test_names_of_eva02s_code(tmp_path):
    vit = made("eva02_apart")
    names = (("q_proj.bias", "q_bias"), ("v_proj.bias", "v_bias"), ("mlp.norm", "mlp.ffn_ln"))
    names += (("attn.norm", "attn.inner_attn_ln"), ("fc1_g", "w1"), ("fc1_x", "w2"), ("mlp.fc2", "mlp.w3"))
    state = renamed(vit.state_dict(), *names)
    buffers = {f"{place}rope.freqs_{kind}": torch.rand(16, 16) for place in ("", "blocks.0.attn.") for kind in ("cos",)}
    assert_same(given(tmp_path, "eva02_apart", {"module": state | buffers}).vit, vit)


def dinov3_state(vit: nn.Module) -> dict[str, torch.Tensor]:
    """By the names of DINOv3's code, with what its training leaves there."""
    names = ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma"), ("reg_token", "storage_tokens")
    state = renamed(vit.state_dict(), *names)
    for block in range(2):
        attn = f"blocks.{block}.attn."
        q, v = (state.pop(f"{attn}{one}_bias", torch.zeros(32)) for one in "qv")
        state[f"{attn}qkv.bias"] = torch.cat([q, torch.zeros(32), v])
        state[f"{attn}qkv.bias_mask"] = torch.full((96,), math.nan)
    return state | {"mask_token": torch.randn(1, 32), "rope_embed.periods": torch.rand(8)}


@pytest.mark.parametrize("family", ["dinov3", "dinov3_biased"])
def test_names_of_dinov3s_code(family, tmp_path, capsys):
    vit = made(family)
    assert_same(given(tmp_path, family, dinov3_state(vit)).vit, vit)
    assert capsys.readouterr().out == ""


def test_a_tensor_that_timm_would_leave_out_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"w\.pth do not fit.*unexpected blocks\.0\.attn\.qkv\.bias"):
        given(tmp_path, "dinov3", dinov3_state(made("dinov3_biased")))


def test_names_of_beits_code(tmp_path):
    vit = made("beit")
    index = {f"blocks.{block}.attn.relative_position_index": torch.zeros(17, 17, dtype=torch.long) for block in (0, 1)}
    assert_same(given(tmp_path, "beit", {"model": vit.state_dict() | index}).vit, vit)


def test_names_of_beit3s_code(tmp_path):
    args = SIZES | {"scale_attn_norm": True, "scale_mlp_norm": True, "global_pool": "avg", "fc_norm": True}
    (tmp_path / "config").mkdir()
    about = {"architecture": "beit3_base_patch16_224", "num_classes": 5, "model_args": args}
    size = {"pretrained_cfg": {"input_size": [3, 32, 32]}}
    (tmp_path / "config" / "config.json").write_text(json.dumps(about | size))
    vit = sharpened(timm.create_model("beit3_base_patch16_224", **args))
    state = {}
    for name, value in vit.state_dict().items():
        for pattern, to in BEIT3:
            name = re.sub(pattern, to, name)
        if "qkv" in name:
            for one, part in zip("qkv", value.chunk(3), strict=True):
                state[name.replace("qkv", f"{one}_proj")] = part.clone()
        else:
            state[name] = torch.cat([torch.randn(2, 32), value[0]]) if "embed_positions" in name else value
    state |= {"beit3.text_embed.weight": torch.randn(7, 32), "beit3.encoder.layers.0.ffn.B.fc1.bias": torch.randn(9)}
    found = load_model(f"local-dir:{tmp_path / 'config'}", saved({"model": state}, tmp_path / "w.pth"))
    assert_same(found.vit, vit)
    with pytest.raises(UserError, match=r"unexpected strange\.weight"):
        saved({"model": state | {"beit3.encoder.strange.weight": torch.ones(3)}}, tmp_path / "w.pth")
        load_model(f"local-dir:{tmp_path / 'config'}", tmp_path / "w.pth")


def test_a_bias_of_keys_that_the_model_has_not_is_refused_unless_it_is_zero(tmp_path):
    vit = made("beit")
    for value, fits in ((torch.zeros(32), True), (torch.ones(32), False)):
        state = vit.state_dict() | {"blocks.0.attn.k_bias": value}
        if fits:
            assert_same(given(tmp_path, "beit", state).vit, vit)
        else:
            with pytest.raises(UserError, match=r"unexpected blocks\.0\.attn\.qkv\.bias \(k\)"):
                given(tmp_path, "beit", state)


# ---- names of transformers


@pytest.mark.parametrize("family", ["beit", "beit_shared"])
def test_beit_of_transformers(family, tmp_path):
    kind = {"beit": "use_relative_position_bias", "beit_shared": "use_shared_relative_position_bias"}[family]
    model = hf_model("BeitForImageClassification", use_absolute_position_embeddings=False, **{kind: True})
    assert_same(given(tmp_path, family, model.state_dict()).vit, model)
    model.save_pretrained(tmp_path / "hf")
    assert_same(load_model(folder_of(tmp_path / "config", family), tmp_path / "hf").vit, model)


@pytest.mark.parametrize("gated", [False, True])
def test_dinov3_of_transformers_with_a_linear_classifier(gated, tmp_path):
    sizes = {"num_register_tokens": 4, "use_gated_mlp": gated, "layer_norm_eps": 1e-5}
    sizes |= {"hidden_act": "silu"} if gated else {}
    model = hf_model("DINOv3ViTModel", **sizes)
    head = nn.Linear(32, 5)
    state = prefixed(model.state_dict(), "backbone.") | prefixed(head.state_dict(), "classifier.")
    extra = {"swiglu_mlp": True, "swiglu_align_to": 8} if gated else {}
    name = folder_of(tmp_path / "config", "dinov3_biased", **extra)
    with pytest.warns(match="linear classifier of what the model in backbone pools"):
        found = load_model(name, saved(state, tmp_path / "w.pth"))

    class Classifier(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return head(model(images).last_hidden_state[:, 5:].mean(1))

    def tokens(images: torch.Tensor) -> torch.Tensor:
        return found.vit.forward_features(images)[:, 5:].mean(1)

    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(tokens(images), model(images).last_hidden_state[:, 5:].mean(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "name"), [("Swin", "swin_tiny_patch4_window7_224"), ("Swinv2", SWIN_V2)])
def test_swin_of_transformers(kind, name, tmp_path):
    sizes = {"embed_dim": 16, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4, "patch_size": 4}
    transformers = pytest.importorskip("transformers", reason="its files are made by itself")
    config = getattr(transformers, f"{kind}Config")(**sizes, image_size=32, num_labels=5)
    model = sharpened(getattr(transformers, f"{kind}ForImageClassification")(config))
    vit = timm.create_model(name, **sizes | {"depths": (2, 1), "num_heads": (2, 2)}, img_size=32, num_classes=5)
    model.save_pretrained(tmp_path / "hf")
    for file in (saved(model.state_dict(), tmp_path / "w.pth"), tmp_path / "hf" / "model.safetensors"):
        load_into(vit.eval(), name, read_vit(file, vit), False, "--")
        assert_same(vit, model)


# ---- students and teachers


@pytest.mark.parametrize("family", ["eva02", "beit", "relpos", "dinov3"])
def test_students_of_every_family(family, tmp_path):
    teacher = load_model(folder_of(tmp_path / "teacher", "vit"), random_weights=True)
    name = folder_of(tmp_path / "config", family)
    file = tmp_path / "w.safetensors"
    save_file({key: value for key, value in made(family).state_dict().items() if "head" not in key}, file)
    student = load_student(teacher, StudentConfig(name, str(file)))
    learning = {key for key, value in student.vit.named_parameters() if value.requires_grad}
    assert learning == {"head.weight", "head.bias"}
    student.sparse()
    save_student(student, teacher, tmp_path / "student")
    assert_same(load_model(f"local-dir:{tmp_path / 'student'}").vit, student.vit.eval())


@pytest.mark.parametrize("family", ["eva02", "beit", "relpos"])
def test_teachers_of_every_family_are_trained(family, tmp_path):
    name = folder_of(tmp_path / "config", family, depth=1, embed_dim=16)
    flags = ["--model", name, "--init", "scratch", "--data", "digits", "--epochs", "1", "--batch_size", "256"]
    train_teacher.main([*flags, "--val_limit", "20", "--warmup_epochs", "0", "--output", str(tmp_path / "out")])
    model = load_model(f"local-dir:{tmp_path / 'out'}")
    assert (model.classes, model.dataset) == (10, "digits")


@pytest.mark.parametrize("family", ["eva02", "vit", "beit"])
def test_patches_are_dropped_in_training(tmp_path, family):
    """By timm's own module where its class has one, else by the model on kept patches: all of it learns."""
    name = folder_of(tmp_path / family, family, depth=1, embed_dim=16)
    flags = ["--model", name, "--init", "scratch", "--data", "digits", "--epochs", "1", "--warmup_epochs", "0"]
    flags += ["--patch_drop", "0.5", "--batch_size", "512", "--val_limit", "20", "--output", str(tmp_path / "out")]
    seen, count = [], SparseViT.forward
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            SparseViT, "forward", lambda vit, *args, **kw: seen.append(args[1].shape[1]) or count(vit, *args, **kw)
        )
        train_teacher.main(flags)
    assert bool(seen) == (family == "beit")
    learnt = load_model(f"local-dir:{tmp_path / 'out'}").vit.state_dict()
    torch.manual_seed(0)
    begun = load_model(name, random_weights=True, classes=10).vit.state_dict()
    still = [key for key, value in learnt.items() if torch.equal(value, begun[key])]
    assert not [key for key in still if "k_bias" not in key and "index" not in key]
