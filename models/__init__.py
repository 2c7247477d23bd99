"""Vision Transformers: loading them by name, and running them on a subset of their patches."""

from utils.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "models.config": ("DEFAULT_MODEL", "ModelConfig"),
        "models.packed": ("DISAGREE", "frozen_copy", "near", "pack_blocks"),
        "models.patches": ("PatchGrid", "SparseImages"),
        "models.registry": ("LoadedModel", "load_model"),
        "models.sparse_vit": ("SparseViT", "ViTOutput"),
    },
)
