"""Small real models and data that the tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from models import LoadedModel, PatchGrid, SparseImages
from models.registry import Preprocessing
from quant.observers import MSEObserver
from quant.quantizers import least_error_scale

ROOT = Path(__file__).resolve().parents[1]


# The models are small: a second thread gains little, and costs much where another program holds the core.
torch.set_num_threads(1)


def randomize(vit: nn.Module) -> nn.Module:
    """Give biases, norms, layer scales and tokens values that matter, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if parameter.ndim < 2:
                parameter.copy_(torch.empty_like(parameter).normal_(0.5, 0.2, generator=generator))
            elif "token" in name or "pos_embed" in name:
                parameter.copy_(torch.empty_like(parameter).normal_(0, 1, generator=generator))
    return vit.eval()


def lively(vit: nn.Module) -> nn.Module:
    """Itself, with weights such that patches and images differ in what it makes of them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in vit.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight.normal_(0, module.weight[0].numel() ** -0.5, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
            if isinstance(module, nn.LayerNorm):
                module.bias.normal_(0, 0.1, generator=generator)
    return vit


# Arguments that make timm's deit_tiny a small one.
TINY_ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def tiny_vit(**kwargs) -> nn.Module:
    """A two-block DeiT on 32x32 images, 16 patches, 5 classes."""
    torch.manual_seed(0)
    return randomize(timm.create_model("deit_tiny_patch16_224", **TINY_ARGS | kwargs))


def tiny_model(**kwargs) -> LoadedModel:
    """`tiny_vit` as the registry would give it, weights frozen or not as they come."""
    vit = tiny_vit(**kwargs)
    size = (3, *vit.patch_embed.img_size)
    preprocessing = Preprocessing(size, (0.48, 0.45, 0.41), (0.23, 0.22, 0.21), "bicubic", 1.0, "center")
    return LoadedModel("tiny", vit, preprocessing, None, ("deit_tiny_patch16_224", TINY_ARGS | kwargs))


def whole_images(count: int, seed: int = 0) -> SparseImages:
    """Noise with all its patches, for `tiny_vit`."""
    grid, generator = PatchGrid(4, 4, 8, 8), torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    return SparseImages.whole(grid, images, torch.zeros(count, dtype=torch.long))


@pytest.fixture
def model() -> LoadedModel:
    return tiny_model()


@pytest.fixture
def coarse(monkeypatch) -> None:
    """Ranges are searched among few: for what does not depend on how good they are."""
    monkeypatch.setattr(MSEObserver, "candidates", 3)
    monkeypatch.setattr("quant.output_error.SHARES", (1.0, 0.3))
    for module in ("quant.insert", "quant.compensation"):
        monkeypatch.setattr(f"{module}.least_error_scale", partial(least_error_scale, candidates=3))


def run_script(*args: object, cwd: Path = ROOT, timeout: float = 120) -> subprocess.CompletedProcess:
    """Run a script of the repository as a user would, on one thread."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
