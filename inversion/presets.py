"""Published settings as a whole: `--preset NAME`. A flag that is given wins over them."""

from __future__ import annotations

PRESETS: dict[str, dict[str, object]] = {
    # Hu et al., ICML 2024: DeepInversion's loss without what a ViT has not, on a schedule.
    "smi": {
        "prior": ["deepinversion"],
        "strategy": "smi",
        "iterations": 4000,
        "lr_g": 0.25,
        "prune_it": [50, 100, 200, 300],
        "prune_ratio": [0.3, 0.3, 0.3, 0.3],
    },
    # Yin et al., CVPR 2020, for ImageNet; its batch-norm term needs a CNN: add --bn 0.05.
    "deepinversion": {"prior": ["deepinversion"], "strategy": "dense", "iterations": 4000, "lr_g": 0.25, "l2": 1e-5},
    # Li et al., ECCV 2022, for DeiT.
    "psaq_vit": {
        "prior": ["psaq"],
        "strategy": "dense",
        "iterations": 500,
        "lr_g": 0.25,
        "betas": [0.5, 0.9],
        "lr_schedule": "cosine",
        "warmup": 100,
    },
    # Fang et al., IJCAI 2021; pixels are optimized here, not a generator, and TV stands in for it.
    "cmi": {"prior": ["deepinversion", "cmi"], "strategy": "dense", "iterations": 200, "oh": 0.5, "cr": 0.8},
}
