"""Weights files as tools leave them: the odd but right ones give the logits of their model, the others one line."""

from __future__ import annotations

import copy
import json
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
import torch.distributed.checkpoint
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.deit import _create_deit
from timm.models.vision_transformer import VisionTransformer, _create_vision_transformer
from torch import nn

from models import DEFAULT_MODEL, LoadedModel, ModelConfig, load_model
from models.registry import bare_model
from tests.conftest import randomize
from tests.test_models import Evil
from utils.errors import UserError, UserNote

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
HF = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128} | {
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
    "layer_norm_eps": 1e-6,
}
NAME = "vit_weights_test"


@register_model
def vit_weights_test(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """A two-block ViT on 32x32 images, 16 patches."""
    return _create_vision_transformer("vit_weights_test", pretrained, **(SIZES | kwargs))


@register_model
def vit_weights_test_distilled(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """The same with a distillation token."""
    return _create_deit("vit_weights_test_distilled", pretrained, distilled=True, **(SIZES | kwargs))


@register_model
def vit_weights_test_scaled(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """The same with layer scales, as DeiT III and DINOv2 have them."""
    return _create_deit("vit_weights_test_scaled", pretrained, **(SIZES | {"init_values": 1.0} | kwargs))


@register_model
def vit_weights_test_registers(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """The same with registers, as timm's DINOv2 has them."""
    args = SIZES | {"init_values": 1.0, "reg_tokens": 4, "no_embed_class": True} | kwargs
    return _create_vision_transformer("vit_weights_test_registers", pretrained, **args)


def sharpened(model: nn.Module) -> nn.Module:
    """`randomize`d, with matrices so large that attention is far from uniform and heads, order and scale matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in randomize(model).parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3, generator=generator)
    return model


def made(name: str = NAME, **kwargs) -> VisionTransformer:
    torch.manual_seed(0)
    return sharpened(timm.create_model(name, **({"num_classes": 5} | kwargs)))


def hf_model(kind: str, **kwargs) -> nn.Module:
    """A small model of transformers with random weights, by the first part of its class's name."""
    transformers = pytest.importorskip("transformers", reason="its files are made by itself")
    config = kind.split("For")[0].removesuffix("Model") + "Config"
    torch.manual_seed(0)
    return sharpened(getattr(transformers, kind)(getattr(transformers, config)(**(HF | kwargs))))


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + key: value for key, value in state.items()}


def saved(content: object, file: Path) -> Path:
    torch.save(content, file)
    return file


class Case(NamedTuple):
    """What is given to `load_model`, and whose logits it must have."""

    reference: nn.Module
    path: Path | None
    name: str = NAME
    given: dict = {}  # noqa: RUF012


RIGHT: dict[str, Callable[[Path], Case]] = {}
WRONG: dict[str, tuple[Callable[[Path], Case], str]] = {}


def right(make: Callable[[Path], Case]) -> Callable[[Path], Case]:
    RIGHT[make.__name__] = make
    return make


def wrong(match: str) -> Callable:
    def add(make: Callable[[Path], Case]) -> Callable[[Path], Case]:
        WRONG[make.__name__] = make, match
        return make

    return add


@pytest.mark.parametrize("name", RIGHT)
def test_an_odd_but_right_file_gives_the_logits_of_its_model(name, tmp_path):
    reference, path, model_name, given = RIGHT[name](tmp_path)
    model = load_model(ModelConfig(model_name, path, **given))
    images = torch.randn(3, 3, *model.grid.image_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(images)
        torch.testing.assert_close(model.vit(images), getattr(expected, "logits", expected), rtol=1e-5, atol=1e-5)
    assert_can_be_made_again(model, images)


def assert_can_be_made_again(model: LoadedModel, images: torch.Tensor) -> None:
    """`architecture` and weights give the same model: quantized ones are stored by them."""
    again = bare_model(*model.architecture).eval()
    again.load_state_dict(model.vit.state_dict())
    with torch.no_grad():
        assert torch.equal(again(images), model.vit(images))


@pytest.mark.parametrize("name", WRONG)
def test_an_ambiguous_or_wrong_file_is_one_line(name, tmp_path):
    make, match = WRONG[name]
    _, path, model_name, given = make(tmp_path)
    with pytest.raises(UserError, match=match) as error:
        load_model(ModelConfig(model_name, path, **given))
    assert len(str(error.value).splitlines()) == 1 and not (tmp_path / "trap").exists()
    where = str(path) if path is not None else model_name.partition(":")[2]
    assert where in str(error.value) or re.search(r"num_classes=1|--img_size 33", str(error.value))


# ---- torch's files, safetensors and numpy's


@right
def a_pt_file(folder):
    vit = made()
    return Case(vit, saved(vit.state_dict(), folder / "w.pt"))


@right
def a_bin_file_in_torchs_old_format(folder):
    vit = made()
    torch.save(vit.state_dict(), folder / "w.bin", _use_new_zipfile_serialization=False)
    return Case(vit, folder / "w.bin")


@right
def safetensors_with_the_wrong_suffix(folder):
    vit = made()
    save_file(vit.state_dict(), folder / "w.pth")
    return Case(vit, folder / "w.pth")


@right
def numpy_arrays_by_timms_names(folder):
    vit = made()
    np.savez(folder / "w.npz", **{key: value.numpy() for key, value in vit.state_dict().items()})
    return Case(vit, folder / "w.npz")


def half_of(vit: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model that half precision leaves, in float32."""
    return copy.deepcopy(vit).to(dtype).float()


@right
def half_precision(folder):
    vit = made()
    return Case(half_of(vit, torch.float16), saved(vit.half().state_dict(), folder / "w.pth"))


@right
def bfloat16(folder):
    vit = made()
    save_file(vit.bfloat16().state_dict(), folder / "w.safetensors")
    return Case(vit.float(), folder / "w.safetensors")


@right
def double_precision(folder):
    vit = made()
    state = {key: value.double() for key, value in vit.state_dict().items()}
    return Case(vit, saved(state, folder / "w.pth"))


@right
def one_file_of_any_name_in_a_folder(folder):
    vit = made()
    saved(vit.state_dict(), folder / "checkpoint-9.pth")
    for file in ("optimizer.pt", "training_args.bin", "scheduler.pt"):
        saved({"lr": 1.0}, folder / file)
    (folder / "log.txt").write_text("epoch 9\n")
    return Case(vit, folder)


@right
def the_models_own_name_before_all_others_in_a_folder(folder):
    vit = made()
    saved(vit.state_dict(), folder / f"{NAME}.pth")
    saved(made(depth=1).state_dict(), folder / "other.pth")
    return Case(vit, folder)


def sharded(vit: nn.Module, folder: Path, suffix: str) -> Path:
    """Two shards and their index, as transformers and accelerate write them."""
    items = list(vit.state_dict().items())
    weight_map = {}
    for number, part in enumerate((dict(items[::2]), dict(items[1::2])), 1):
        file = f"model-0000{number}-of-00002.{suffix}"
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / f"model.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@right
def shards_of_safetensors_by_their_index(folder):
    vit = made()
    return Case(vit, sharded(vit, folder, "safetensors"))


@right
def shards_of_torch_by_their_folder(folder):
    vit = made()
    sharded(vit, folder, "bin")
    return Case(vit, folder)


# ---- dictionaries around it, and prefixes


@right
def deit_and_mae_keep_it_beside_the_optimizer(folder):
    vit = made()
    optimizer = torch.optim.AdamW(vit.parameters())
    vit(torch.randn(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    content = {"model": vit.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "scaler": {"scale": 1.0}}
    return Case(vit, saved(content, folder / "w.pth"))


@right
def a_state_dict_with_a_number_beside_its_tensors(folder):
    vit = made()
    return Case(vit, saved({**vit.state_dict(), "epoch": 3}, folder / "w.pth"))


@right
def of_student_and_teacher_the_one_asked_for(folder):
    vit = made()
    content = {"student": made(depth=1).state_dict(), "teacher": prefixed(vit.state_dict(), "module.")}
    return Case(vit, saved(content, folder / "w.pth"), given={"key": "teacher"})


@right
def of_weights_and_their_average_the_one_asked_for(folder):
    vit = made()
    content = {"state_dict": made(depth=1).state_dict(), "state_dict_ema": vit.state_dict()}
    return Case(vit, saved(content, folder / "w.pth"), given={"key": "state_dict_ema"})


@right
def of_two_prefixes_the_one_asked_for(folder):
    vit = made()
    state = prefixed(vit.state_dict(), "ema.") | prefixed(made(depth=1).state_dict(), "online.")
    return Case(vit, saved(state, folder / "w.pth"), given={"key": "ema"})


@right
def a_dictionary_in_a_dictionary(folder):
    vit = made()
    return Case(vit, saved({"state": {"model": vit.state_dict(), "history": []}}, folder / "w.pth"))


@right
def data_parallel(folder):
    vit = made()
    return Case(vit, saved(nn.DataParallel(vit).state_dict(), folder / "w.pth"))


@right
def compiled_in_data_parallel(folder):
    vit = made()
    return Case(vit, saved(nn.DataParallel(torch.compile(vit)).state_dict(), folder / "w.pth"))


@right
def compiled_block_by_block(folder):
    vit = made()
    compiled = copy.deepcopy(vit)
    for index, block in enumerate(compiled.blocks):
        compiled.blocks[index] = torch.compile(block)
    assert any("blocks.0._orig_mod" in key for key in compiled.state_dict())
    return Case(vit, saved(compiled.state_dict(), folder / "w.pth"))


@right
def wrapped_block_by_block_by_fsdp(folder):
    vit = made()
    state = {key.replace("attn.", "_fsdp_wrapped_module.attn."): value for key, value in vit.state_dict().items()}
    state = {key.replace("mlp.", "_checkpoint_wrapped_module.mlp."): value for key, value in state.items()}
    return Case(vit, saved(prefixed(state, "_fsdp_wrapped_module."), folder / "w.pth"))


@right
def averaged_by_torch(folder):
    vit = made()
    return Case(vit, saved(torch.optim.swa_utils.AveragedModel(vit).state_dict(), folder / "w.pth"))


class Probe(nn.Module):
    """A backbone without a head, and a linear classifier beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.fc = made(num_classes=0), nn.Linear(32, 5)

    def forward(self, images):
        return self.fc(self.backbone(images))


@right
def a_linear_head_beside_its_backbone(folder):
    probe = Probe().eval()
    return Case(probe, saved({"state_dict": probe.state_dict()}, folder / "w.pth"))


@right
def a_lightning_checkpoint(folder):
    lightning = pytest.importorskip("lightning", reason="its file is made by itself")
    vit = made()

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"lr": 1e-3})
            self.model = vit

        def training_step(self, batch):
            return self.model(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-3)

    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(max_steps=1, default_root_dir=folder, enable_checkpointing=False, **silent)
        trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(2, 3, 32, 32)))
    trainer.save_checkpoint(folder / "last.ckpt")
    return Case(vit.eval(), folder / "last.ckpt")


def distributed(vit: nn.Module, folder: Path, **beside: object) -> Path:
    """A folder that torch.distributed.checkpoint wrote."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.distributed.checkpoint.save({"model": vit.state_dict(), **beside}, checkpoint_id=folder / "sharded")
    return folder / "sharded"


@right
def a_distributed_checkpoint(folder):
    vit = made()
    return Case(vit, distributed(vit, folder))


@right
def a_distributed_checkpoint_with_its_optimizer(folder):
    vit = made()
    optim = {"state": {"blocks.0.norm1.weight": {"exp_avg": torch.zeros(32)}}}
    return Case(vit, distributed(vit, folder, optim=optim))


@right
def a_distributed_checkpoint_made_a_file_of(folder):
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    vit = made()
    dcp_to_torch_save(distributed(vit, folder), folder / "w.pth")
    return Case(vit, folder / "w.pth")


# ---- what the tensors tell of the model


@right
def mean_pooling_of_mae_fine_tunes(folder):
    vit = made(global_pool="avg")
    return Case(vit, saved({"model": vit.state_dict()}, folder / "w.pth"))


@right
def layer_scales_as_deit_iii_calls_them(folder):
    vit = made("vit_weights_test_scaled")
    state = {
        key.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): v
        for key, v in vit.state_dict().items()
    }
    return Case(vit, saved(state, folder / "w.pth"), "vit_weights_test_scaled")


@right
def queries_and_values_alone_have_a_bias(folder):
    vit = made()
    state = vit.state_dict()
    for index in range(2):
        bias = state.pop(f"blocks.{index}.attn.qkv.bias")
        bias[32:64] = 0
        state[f"blocks.{index}.attn.q_bias"], state[f"blocks.{index}.attn.v_bias"] = bias[:32], bias[64:]
    return Case(vit, saved(state, folder / "w.pth"))


@right
def patches_embedded_by_a_matrix(folder):
    vit = made()
    state = vit.state_dict()
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].flatten(1)
    return Case(vit, saved(state, folder / "w.pth"))


@right
def images_of_the_size_that_the_weights_know(folder):
    vit = made(img_size=48)
    return Case(vit, saved(vit.state_dict(), folder / "w.pth"), given={"img_size": 48})


@right
def images_of_another_size(folder):
    vit = made()
    file = saved(vit.state_dict(), folder / "w.pth")
    vit.set_input_size(img_size=48)
    return Case(vit, file, given={"img_size": 48})


@right
def images_that_are_not_square(folder):
    vit = made(img_size=(16, 128))  # as many patches as a square has
    config = {"architecture": NAME}
    timm.models.save_for_hf(
        vit,
        folder,
        model_args=SIZES | {"img_size": (16, 128), "num_classes": 5},
        model_config=config,
        safe_serialization=True,
    )
    return Case(vit, None, f"local-dir:{folder}")


def local_dir(folder: Path, vit: nn.Module, **config) -> str:
    args = SIZES | {"num_classes": 5}
    timm.models.save_for_hf(
        vit, folder, model_args=args, model_config={"architecture": NAME, **config}, safe_serialization=True
    )
    return f"local-dir:{folder}"


@right
def a_local_dir_of_another_image_size(folder):
    vit = made()
    name = local_dir(folder, vit)
    vit.set_input_size(img_size=64)
    return Case(vit, None, name, given={"img_size": 64})


@right
def a_local_dir_beside_the_state_of_its_training(folder):
    vit = made()
    saved({"config": {}, "state": {"model": made(depth=1).state_dict()}}, folder / "checkpoint.pt")
    (folder / "training.json").write_text("{}")
    return Case(vit, None, local_dir(folder, vit))


# ---- JAX


def jax_arrays(vit: VisionTransformer) -> dict[str, np.ndarray]:
    """The inverse of timm's reader of Google's `.npz` files."""
    state = {key: value.numpy() for key, value in vit.state_dict().items()}
    heads, width = 2, 32
    arrays = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    for index in range(len(vit.blocks)):
        old, new = f"blocks.{index}.", f"Transformer/encoderblock_{index}/"
        for norm, name in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            arrays |= {
                f"{new}{name}/scale": state[f"{old}{norm}.weight"],
                f"{new}{name}/bias": state[f"{old}{norm}.bias"],
            }
        attention = f"{new}MultiHeadDotProductAttention_1/"
        for part, name in enumerate(("query", "key", "value")):
            rows = slice(part * width, (part + 1) * width)
            weight, bias = state[f"{old}attn.qkv.weight"][rows], state[f"{old}attn.qkv.bias"][rows]
            arrays[f"{attention}{name}/kernel"] = weight.T.reshape(width, heads, -1)
            arrays[f"{attention}{name}/bias"] = bias.reshape(heads, -1)
        arrays[f"{attention}out/kernel"] = state[f"{old}attn.proj.weight"].T.reshape(heads, -1, width)
        arrays[f"{attention}out/bias"] = state[f"{old}attn.proj.bias"]
        for layer in (0, 1):
            arrays[f"{new}MlpBlock_3/Dense_{layer}/kernel"] = state[f"{old}mlp.fc{layer + 1}.weight"].T
            arrays[f"{new}MlpBlock_3/Dense_{layer}/bias"] = state[f"{old}mlp.fc{layer + 1}.bias"]
    return arrays


def npz(arrays: dict[str, np.ndarray], file: Path) -> Path:
    np.savez(file, **arrays)
    return file


@right
def augreg_arrays(folder):
    vit = made()
    return Case(vit, npz(jax_arrays(vit), folder / "w.npz"))


@right
def augreg_arrays_at_another_image_size(folder):
    vit = made()
    file = npz(jax_arrays(vit), folder / "w.npz")
    larger = made(img_size=48)
    larger.load_pretrained(str(file))
    return Case(larger, file, given={"img_size": 48})


# ---- transformers and torchvision


@right
def transformers_vit_in_a_folder(folder):
    model = hf_model("ViTForImageClassification")
    model.save_pretrained(folder)
    return Case(model, folder)


@right
def transformers_vit_with_its_own_epsilon(folder):
    model = hf_model("ViTForImageClassification", layer_norm_eps=1e-12)
    model.save_pretrained(folder)
    return Case(model, folder)


@right
def transformers_vit_with_a_large_epsilon(folder):
    model = hf_model("ViTForImageClassification", layer_norm_eps=1e-3)
    model.save_pretrained(folder)
    return Case(model, folder)


@right
def transformers_vit_in_shards(folder):
    model = hf_model("ViTForImageClassification")
    model.save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return Case(model, folder)


@right
def transformers_vit_by_the_names_in_memory(folder):
    model = hf_model("ViTForImageClassification")
    return Case(model, saved({"state_dict": prefixed(model.state_dict(), "model.")}, folder / "w.ckpt"))


@right
def transformers_vit_msn(folder):
    model = hf_model("ViTMSNForImageClassification")
    model.save_pretrained(folder)
    return Case(model, folder)


@right
def transformers_deit_whose_second_token_has_no_head(folder):
    model = hf_model("DeiTForImageClassification")
    model.save_pretrained(folder)
    return Case(model, folder)


@right
def transformers_deit_with_its_teachers_head(folder):
    model = hf_model("DeiTForImageClassificationWithTeacher")
    model.save_pretrained(folder)
    return Case(model, folder, "vit_weights_test_distilled")


class OnClassToken(nn.Module):
    """A DINOv2 of transformers with a linear head on its class token alone."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.classifier = backbone, nn.Linear(32, 5)

    def forward(self, images):
        return self.classifier(self.backbone(images).last_hidden_state[:, 0])


@right
def transformers_dinov2_with_a_head_on_its_class_token(folder):
    model = OnClassToken(hf_model("Dinov2Model")).eval()
    return Case(model, saved(model.state_dict(), folder / "w.pth"), "vit_weights_test_scaled")


@right
def transformers_dinov2_with_registers_and_a_head(folder):
    model = OnClassToken(hf_model("Dinov2WithRegistersModel")).eval()
    return Case(model, saved(model.state_dict(), folder / "w.pth"), "vit_weights_test_registers")


@right
def torchvisions_vit(folder):
    from torchvision.models import VisionTransformer as TorchvisionViT

    torch.manual_seed(0)
    model = sharpened(TorchvisionViT(32, 8, 2, 2, 32, 128, num_classes=5))
    return Case(model, saved(model.state_dict(), folder / "w.pth"))


# ---- ambiguous or wrong


@wrong(r"several weights.*checkpoint-0\.pth, checkpoint-9\.pth")
def two_checkpoints(folder):
    for epoch in (0, 9):
        saved(made().state_dict(), folder / f"checkpoint-{epoch}.pth")
    return Case(None, folder)


@wrong(r"several weights.*model\.pth, model\.safetensors")
def a_safe_and_an_unsafe_file(folder):
    saved(made().state_dict(), folder / "model.pth")
    save_file(made().state_dict(), folder / "model.safetensors")
    return Case(None, folder)


@wrong(r"several weights.*vit_weights_test\.pth, vit_weights_test\.safetensors")
def the_models_own_name_twice(folder):
    saved(made().state_dict(), folder / f"{NAME}.pth")
    save_file(made().state_dict(), folder / f"{NAME}.safetensors")
    return Case(None, folder)


@wrong(r"several models: student, teacher; say which .*--weights_key")
def student_and_teacher(folder):
    return Case(None, saved({"student": made().state_dict(), "teacher": made().state_dict()}, folder / "w.pth"))


@wrong("several models: model, model_ema; say which")
def weights_and_their_average(folder):
    return Case(None, saved({"model": made().state_dict(), "model_ema": made().state_dict()}, folder / "w.pth"))


@wrong("several models: net, teacher; say which")
def two_prefixes(folder):
    state = prefixed(made().state_dict(), "net.") | prefixed(made().state_dict(), "teacher.")
    return Case(None, saved(state, folder / "w.pth"))


@wrong("--weights_key ema is no model in it; it (holds|has) student, teacher")
def a_key_that_is_not_there(folder):
    content = {"student": made().state_dict(), "teacher": made().state_dict()}
    return Case(None, saved(content, folder / "w.pth"), given={"key": "ema"})


@wrong(r"holds criterion\.centre beside the model in model; --weights_key model")
def a_tensor_beside_the_model(folder):
    state = prefixed(made().state_dict(), "model.") | {"criterion.centre": torch.zeros(3)}
    return Case(None, saved(state, folder / "w.pth"))


@wrong("model-00001-of-00002.*index")
def shards_without_an_index(folder):
    sharded(made(), folder, "safetensors").unlink()
    return Case(None, folder)


@wrong("one shard of several; give the folder")
def one_shard(folder):
    sharded(made(), folder, "safetensors")
    return Case(None, folder / "model-00001-of-00002.safetensors")


@wrong(r"names model-00002-of-00002\.safetensors, which is not beside it")
def a_shard_that_is_missing(folder):
    index = sharded(made(), folder, "safetensors")
    (folder / "model-00002-of-00002.safetensors").unlink()
    return Case(None, index)


@wrong(r"differ: head\.bias is in one of them only")
def an_index_that_leaves_a_tensor_out(folder):
    index = sharded(made(), folder, "safetensors")
    content = json.loads(index.read_text())
    del content["weight_map"]["head.bias"]
    index.write_text(json.dumps(content))
    return Case(None, index)


@wrong(r"\.\./secret\.safetensors, which is not beside it")
def an_index_that_leads_out_of_its_folder(folder):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"cls_token": "../secret.safetensors"}}))
    return Case(None, index)


@wrong(r"blocks\.1\.mlp\.fc1\.weight has values that are not finite")
def a_tensor_that_is_not_finite(folder):
    state = made().state_dict()
    state["blocks.1.mlp.fc1.weight"][3, 3] = torch.nan
    return Case(None, saved(state, folder / "w.pth"))


@wrong(r"head\.weight has values that are not finite")
def a_number_beyond_float32(folder):
    state = {key: value.double() for key, value in made().state_dict().items()}
    state["head.weight"][0, 0] = 1e200
    return Case(None, saved(state, folder / "w.pth"))


@wrong(r"blocks\.0\.attn\.qkv\.weight is int8, not floating point")
def an_integer_weight(folder):
    state = made().state_dict()
    state["blocks.0.attn.qkv.weight"] = state["blocks.0.attn.qkv.weight"].to(torch.int8)
    return Case(None, saved(state, folder / "w.pth"))


@wrong("is quint8, not floating point")
def a_quantized_tensor(folder):
    state = made().state_dict()
    state["head.weight"] = torch.quantize_per_tensor(state["head.weight"], 0.1, 0, torch.quint8)
    return Case(None, saved(state, folder / "w.pth"))


@wrong("num_classes=1")
def one_class(folder):
    return Case(None, saved(made(num_classes=1).state_dict(), folder / "w.pth"))


@wrong("num_classes=1")
def a_local_dir_of_one_class(folder):
    args = SIZES | {"num_classes": 1}
    timm.models.save_for_hf(
        made(num_classes=1), folder, model_args=args, model_config={"architecture": NAME}, safe_serialization=True
    )
    return Case(None, None, f"local-dir:{folder}")


@wrong(r"12 classes.*has 5")
def a_local_dir_for_other_classes_than_its_weights(folder):
    name = local_dir(folder, made())
    save_file(made(num_classes=12).state_dict(), folder / "model.safetensors")
    return Case(None, None, name)


@wrong(r"10 classes|10 in its config\.json|has 10")
def a_local_dir_edited_in_one_place(folder):
    name = local_dir(folder, made())
    config = json.loads((folder / "config.json").read_text())
    config["num_classes"] = 10
    (folder / "config.json").write_text(json.dumps(config))
    return Case(None, None, name)


@wrong("several weights")
def a_local_dir_with_two_checkpoints(folder):
    name = local_dir(folder, made())
    (folder / "model.safetensors").unlink()
    for epoch in (0, 9):
        saved(made().state_dict(), folder / f"checkpoint-{epoch}.pth")
    return Case(None, None, name)


@wrong("of transformers.*--model_path")
def a_local_dir_of_transformers(folder):
    (folder / "config.json").write_text(
        json.dumps({"model_type": "vit", "architectures": ["ViTForImageClassification"]})
    )
    return Case(None, None, f"local-dir:{folder}")


@wrong("positions for 6 x 6 patches.*give --img_size 48 .*--img_size 32")
def positions_of_another_size(folder):
    return Case(None, saved(made(img_size=48).state_dict(), folder / "w.pth"))


@wrong(r"--img_size 33 is no multiple of 8")
def a_size_that_is_no_multiple_of_the_patch(folder):
    return Case(None, saved(made().state_dict(), folder / "w.pth"), given={"img_size": 33})


@wrong(r"patch_embed\.proj\.weight: \(32, 3, 4, 4\) for \(32, 3, 8, 8\)")
def arrays_of_another_patch_size(folder):
    return Case(None, npz(jax_arrays(made(patch_size=4, img_size=16)), folder / "w.npz"))


@wrong(r"do not fit .*unexpected blocks\.2")
def arrays_of_a_deeper_model(folder):
    return Case(None, npz(jax_arrays(made(depth=3)), folder / "w.npz"))


@wrong(r"do not fit .*missing blocks\.1")
def arrays_of_a_shallower_model(folder):
    return Case(None, npz(jax_arrays(made(depth=1)), folder / "w.npz"))


@wrong("pre_logits")
def arrays_with_a_layer_that_timm_leaves_out(folder):
    more = {"pre_logits/kernel": np.zeros((32, 32), np.float32), "pre_logits/bias": np.zeros(32, np.float32)}
    return Case(None, npz(jax_arrays(made()) | more, folder / "w.npz"))


@wrong("cannot read weights.*[Pp]ickle")
def arrays_of_objects(folder):
    return Case(None, npz({"embedding/kernel": np.array([{}, {}], dtype=object)}, folder / "w.npz"))


@wrong(r"patch_embed\.proj\.weight: \(32, 3, 4, 4\) for \(32, 3, 8, 8\)")
def weights_of_another_patch_size(folder):
    return Case(None, saved(made(patch_size=4, img_size=16).state_dict(), folder / "w.pth"))


@wrong("has no classifier")
def a_backbone_without_a_head(folder):
    return Case(None, saved(made(num_classes=0).state_dict(), folder / "w.pth"))


@wrong(r"unexpected blocks\.2")
def a_deeper_model(folder):
    return Case(None, saved(made(depth=3).state_dict(), folder / "w.pth"))


@wrong("unexpected dist_token")
def a_token_that_the_model_has_not(folder):
    return Case(None, saved(made("vit_weights_test_distilled").state_dict(), folder / "w.pth"))


@wrong(r"unexpected blocks\.0\.attn\.relative_position_bias_table")
def relative_positions(folder):
    state = made().state_dict() | {"blocks.0.attn.relative_position_bias_table": torch.zeros(3, 2)}
    return Case(None, saved(state, folder / "w.pth"))


@wrong("side by side")
def transformers_dinov2_with_its_own_head(folder):
    hf_model("Dinov2ForImageClassification").save_pretrained(folder)
    return Case(None, folder, "vit_weights_test_scaled")


@wrong(r"do not fit.*unexpected blocks\.0\.attn\.relative_position_bias_table and 1 more")
def transformers_beit_as_another_model(folder):
    model = hf_model("BeitForImageClassification", use_relative_position_bias=True)
    return Case(None, saved(model.state_dict(), folder / "w.pth"))


@wrong("has no classifier")
def transformers_mae_which_has_no_classes(folder):
    decoder = {"decoder_num_hidden_layers": 1, "decoder_hidden_size": 32, "decoder_num_attention_heads": 2}
    model = hf_model("ViTMAEForPreTraining", **decoder, decoder_intermediate_size=64)
    return Case(None, saved(model.state_dict(), folder / "w.pth"))


@wrong("heads 4 for 2")
def transformers_vit_with_other_heads(folder):
    hf_model("ViTForImageClassification", num_attention_heads=4).save_pretrained(folder)
    return Case(None, folder)


@wrong("activation quick_gelu for GELU")
def transformers_vit_with_another_activation(folder):
    hf_model("ViTForImageClassification", hidden_act="quick_gelu").save_pretrained(folder)
    return Case(None, folder)


@wrong("do not fit vit_weights_test: pooling avg for token")
def timms_folder_of_another_pooling(folder):
    args = SIZES | {"num_classes": 5, "global_pool": "avg", "fc_norm": False}
    vit = made(global_pool="avg", fc_norm=False)
    timm.models.save_for_hf(vit, folder, model_args=args, model_config={"architecture": NAME}, safe_serialization=True)
    return Case(None, folder)


@wrong("heads 4 for 2; its own is --model local-dir:")
def timms_folder_by_another_name(folder):
    vit = made(num_heads=4)
    timm.models.save_for_hf(
        vit,
        folder,
        model_args=SIZES | {"num_heads": 4, "num_classes": 5},
        model_config={"architecture": NAME},
        safe_serialization=True,
    )
    return Case(None, folder)


@wrong("cannot read the torch.distributed checkpoint .*dcp_to_torch")
def a_distributed_checkpoint_that_runs_code(folder):
    path = distributed(made(), folder)
    (path / ".metadata").write_bytes(pickle.dumps(Evil(folder / "trap")))
    return Case(None, path)


@wrong(r"cannot read the torch.distributed checkpoint|\.\./")
def a_distributed_checkpoint_that_leads_out_of_its_folder(folder):
    path = distributed(made(), folder)
    with open(path / ".metadata", "rb") as file:
        about = pickle.load(file)
    part = next(path.glob("*.distcp"))
    part.rename(folder / part.name)
    for record in about.storage_data.values():
        record.relative_path = f"../{record.relative_path}"
    (path / ".metadata").write_bytes(pickle.dumps(about))
    return Case(None, path)


@wrong("--weights_key ema")
def a_key_without_a_file(folder):
    return Case(None, None, DEFAULT_MODEL, {"key": "ema"})


@wrong("resnet")
def a_configuration_of_a_resnet_beside_weights(folder):
    save_file(made().state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "resnet", "architectures": ["ResNetForImageClassification"]})
    )
    return Case(None, folder)


@wrong("is TorchScript")
def torchscript(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(folder / "w.pt")
    return Case(None, folder / "w.pt")


@wrong(r"Python objects besides tensors \(timm.*save its state_dict")
def a_pickled_module(folder):
    return Case(None, saved(made(), folder / "w.pth"))


@wrong("HTML page|web page")
def a_web_page(folder):
    (folder / "w.pth").write_text("<!DOCTYPE html><html>sign in</html>")
    return Case(None, folder / "w.pth")


@wrong("Git LFS pointer")
def a_pointer_of_git_lfs(folder):
    (folder / "w.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n")
    return Case(None, folder / "w.safetensors")


FOREIGN = {
    "tf_model.h5": "Keras",
    "model.ckpt.index": "TensorFlow checkpoint",
    "saved_model.pb": "TensorFlow",
    "flax_model.msgpack": "JAX msgpack",
    "model.onnx": "ONNX",
    "model.gguf": "GGUF",
    "zero_to_fp32.py": "DeepSpeed",
    "mp_rank_00_model_states.pt": "DeepSpeed",
    "manifest.ocdbt": "Orbax",
    "model.pkl": "Python objects",
    "model.tflite": "TensorFlow Lite",
    "model.zip": "an archive",
}


@pytest.mark.parametrize("file", FOREIGN)
@pytest.mark.parametrize("by", ["file", "folder"])
def test_formats_that_are_not_read_are_named(tmp_path, file, by):
    (tmp_path / file).write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match=FOREIGN[file]) as error:
        load_model(NAME, tmp_path / file if by == "file" else tmp_path)
    assert str(tmp_path) in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("make", [a_linear_head_beside_its_backbone, patches_embedded_by_a_matrix])
def test_what_is_guessed_is_said(make, tmp_path):
    case = make(tmp_path)
    with pytest.warns(UserNote, match=str(tmp_path)):
        load_model(case.name, case.path)


def test_a_configuration_is_what_its_fields_are(tmp_path):
    vit = made()
    saved({"a": vit.state_dict(), "b": made(depth=1).state_dict()}, tmp_path / "w.pth")
    config = ModelConfig(NAME, str(tmp_path / "w.pth"), "a", 48)
    assert (
        load_model(config).fingerprint()
        == load_model(ModelConfig(NAME, tmp_path / "w.pth", key="a", img_size=48)).fingerprint()
    )
    assert load_model(config).preprocessing.input_size == (3, 48, 48)


def test_to_be_trained_weights_keep_all_but_the_head(tmp_path):
    vit = made(num_classes=12)
    for file in (saved(vit.state_dict(), tmp_path / "w.pth"), npz(jax_arrays(vit), tmp_path / "w.npz")):
        model = load_model(NAME, file, classes=5)
        state = model.vit.state_dict()
        assert state["head.weight"].shape == (5, 32) and torch.isfinite(state["head.weight"]).all()
        assert all(torch.equal(value, state[key]) for key, value in vit.state_dict().items() if "head" not in key)
        same = load_model(NAME, file, classes=12).vit.state_dict()
        assert torch.equal(same["head.weight"], vit.head.weight)


def test_a_hub_repository_goes_through_the_same_checks(tmp_path, monkeypatch):
    """The hub is a folder here: what would be downloaded lies in it."""
    vit = made()
    local_dir(tmp_path, vit)
    for module in ("timm.models._hub", "huggingface_hub"):
        monkeypatch.setattr(f"{module}.hf_hub_download", lambda repo_id, filename, **_: str(tmp_path / filename))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_model("hf-hub:org/name").vit(images), vit(images))
    save_file(made(num_classes=12).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="hf-hub:org/name"):
        load_model("hf-hub:org/name")
    save_file(vit.state_dict() | {"extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"hf-hub:org/name.*extra"):
        load_model("hf-hub:org/name")


def test_a_pickle_that_a_hub_repository_names_does_not_run(tmp_path, monkeypatch):
    def download(repo_id, filename, **_):
        if not (tmp_path / filename).is_file():
            raise EntryNotFoundError(filename)
        return str(tmp_path / filename)

    for module in ("timm.models._hub", "huggingface_hub"):
        monkeypatch.setattr(f"{module}.hf_hub_download", download)
    vit, images = made(), torch.randn(2, 3, 32, 32)
    local_dir(tmp_path, vit, pretrained_cfg={"hf_hub_filename": "named.bin"})
    (tmp_path / "model.safetensors").unlink()
    torch.save(vit.state_dict(), tmp_path / "named.bin")
    assert torch.equal(load_model("hf-hub:org/name").vit(images), vit(images))
    torch.save({"head.weight": Evil(tmp_path / "trap")}, tmp_path / "named.bin")
    with pytest.raises(UserError, match="hf-hub:org/name"):
        load_model("hf-hub:org/name")
    assert not (tmp_path / "trap").exists()


def test_a_folder_of_transformers_says_how_images_are_read_and_what_classes_are_called(tmp_path):
    transformers = pytest.importorskip("transformers", reason="its files are made by itself")
    hf_model("ViTForImageClassification", id2label=dict(enumerate("abcde"))).save_pretrained(tmp_path)
    mean, std, size = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6], {"height": 40, "width": 40}
    processor = {"image_mean": mean, "image_std": std, "size": size, "do_center_crop": True, "crop_size": 32}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor | {"resample": 3}))
    model = load_model(NAME, tmp_path)
    ways = model.preprocessing
    assert (ways.mean, ways.std, ways.crop_pct, ways.interpolation) == (tuple(mean), tuple(std), 32 / 40, "bicubic")
    assert model.vit.pretrained_cfg["label_names"] == list("abcde")
    transformers.ViTImageProcessor(image_mean=mean, image_std=std).save_pretrained(tmp_path)
    assert load_model(NAME, tmp_path).preprocessing.crop_mode == "squash"
