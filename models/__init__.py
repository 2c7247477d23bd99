"""Vision Transformers: loading them by name, and running them on a subset of their patches."""

from models.packed import pack_blocks
from models.patches import PatchGrid, SparseImages
from models.registry import DEFAULT_MODEL, LoadedModel, ModelConfig, load_model
from models.sparse_vit import SparseViT, ViTOutput

__all__ = [
    "DEFAULT_MODEL",
    "LoadedModel",
    "ModelConfig",
    "PatchGrid",
    "SparseImages",
    "SparseViT",
    "ViTOutput",
    "load_model",
    "pack_blocks",
]
