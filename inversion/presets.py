"""Settings as a whole, published ones and ours, and a configuration out of a preset, priors and single settings."""

from __future__ import annotations

from collections.abc import Sequence

from inversion.config import InversionConfig
from inversion.phases import Phase
from inversion.priors import PRIORS, options, terms
from inversion.schedule import GROWTHS
from utils.errors import UserError

NATURAL: dict[str, object] = {
    "prior": ["deepinversion"],
    "strategy": "dense",
    "iterations": 10,
    "init": "leaves",
    "lr_schedule": "cosine",
    "views": ["roll", "flip", "crop", "colour"],
    "tv2": 1e-3,
}
"""Images of much that photographs have: edges, shades, colours that go together."""
PRESETS: dict[str, dict[str, object]] = {
    # Ours, by measurement (docs/quantize.md, transfer.md, results.md): what calibrates, teaches, and others can read.
    "quantize": {**NATURAL, "init": "scenes"},
    "transfer": NATURAL,
    "readable": {
        "prior": [],
        "strategy": "smi",
        "canvas": "spectral",
        "iterations": 100,
        "prune_it": [10, 20, 30, 40],
        "prune_ratio": [0.3, 0.3, 0.3, 0.3],
    },
    # Hu et al., ICML 2024: DeepInversion's loss without what a ViT has not, on a schedule.
    "smi": {
        "prior": ["deepinversion"],
        "strategy": "smi",
        "iterations": 4000,
        "lr": 0.25,
        "prune_it": [50, 100, 200, 300],
        "prune_ratio": [0.3, 0.3, 0.3, 0.3],
    },
    # What SMI and DataFree call DeepInversion: one resolution, a constant rate, l2 over the batch.
    "datafree": {"prior": ["deepinversion"], "strategy": "dense", "iterations": 4000, "lr": 0.25, "l2": 1e-5},
    # Yin et al., CVPR 2020, for ImageNet: 2,000 iterations at half the resolution, 1,000 at all of it, each with an
    # optimizer of its own; rolls of up to 30 pixels of 224. A ViT sees the small image enlarged to its one input size.
    # Its batch-norm term needs a CNN: add --bn 0.05. Its rate is that of the DataFree variant.
    "deepinversion": {
        "prior": ["deepinversion"],
        "strategy": "dense",
        "iterations": 3000,
        "lr": 0.25,
        "betas": [0.5, 0.9],
        "lr_schedule": "phases",
        "warmup": 100,
        "phases": ["2:coarse=2", "1:fresh=1"],
        "views": ["roll:share=0.134", "flip"],
        "l2_mean": 1e-5,
    },
    # Li et al., ECCV 2022, for DeiT and ViT (Swin: --lr_g 0.25): twice 500 iterations, rolls of up to 15 and 30 pixels
    # of 224, the same for both axes, and no other prior.
    "psaq_vit": {
        "prior": ["psaq"],
        "strategy": "dense",
        "iterations": 1000,
        "lr": 0.2,
        "betas": [0.5, 0.9],
        "lr_schedule": "phases",
        "warmup": 100,
        "phases": ["1:roll.share=0.067", "1:roll.share=0.134"],
        "views": ["roll:diagonal=1", "flip"],
    },
    # Choi et al., AAAI 2025: rolls of up to 8 and then 16 pixels of 224, no flips. The paper adds noise that fades out
    # and changes colours by amounts that are not stated: here noise is there in the first half alone.
    "mimiq": {
        "prior": ["mimiq"],
        "strategy": "dense",
        "iterations": 1000,
        "lr": 0.1,
        "lr_end": 0.001,
        "betas": [0.9, 0.999],
        "weight_decay": 0.01,
        "lr_schedule": "cosine",
        "phases": ["1:roll.share=0.036", "1:roll.share=0.0715,noise.deviation=0.0"],
        "views": ["roll", "colour:scale=0.2,shift=0.2", "noise"],
    },
    # Zhong et al., ICCV 2025: its three parts; iterations and rate are PSAQ-ViT's, on whose code it builds.
    "sardfq": {
        "prior": ["sardfq"],
        "strategy": "dense",
        "iterations": 1000,
        "lr": 0.2,
        "betas": [0.5, 0.9],
        "lr_schedule": "phases",
        "warmup": 100,
        "phases": ["1:roll.share=0.067", "1:roll.share=0.134"],
        "soft_logits": 10.0,
    },
    # Kim et al., ICLR 2025: what of it acts on images, beside SMI's loss.
    "synq": {"prior": ["deepinversion", "synq"], "strategy": "dense", "iterations": 1000, "lr": 0.25, "oh": 0.0},
    # Fang et al., IJCAI 2021; pixels are optimized here, not a generator, and TV stands in for it.
    "cmi": {"prior": ["deepinversion", "cmi"], "strategy": "dense", "iterations": 200, "oh": 0.5, "cr": 0.8},
    # Ghiasi et al., ICML 2022: views in place of image priors. The paper inverts one image at a time, out of 32 looks a
    # step at 224 px, 400 steps a phase; its learning rate is taken as one of normalized pixels.
    "plug_in": {
        "prior": [],
        "strategy": "grow",
        "iterations": 2800,
        "lr": 0.01,
        "lr_schedule": "phases",
        "phases": ["1"] * GROWTHS,
        "views": ["roll:share=0.142858", "colour:scale=1,shift=1"],
        "copies": 32,
    },
}


def configured(preset: str | None = None, prior: Sequence[str] | None = None, **settings: object) -> InversionConfig:
    """A configuration in the words of the command line: `configured("smi", prior=["psaq"], iterations=500, tv2=0.02)`.

    Args:
        preset: a key of `PRESETS`; what is given beside it wins.
        prior: keys of `PRIORS`, whose terms have their published weights; `deepinversion` alone if None.
        settings: fields of `InversionConfig`, weights of terms and options of priors, each by its name.

    Raises:
        UserError: an unknown name, or settings that make no sense.
    """
    if preset is not None and preset not in PRESETS:
        raise UserError(f"--preset {preset} is unknown; there are {', '.join(PRESETS)}")
    given = {**settings} if prior is None else {**settings, "prior": prior}
    # A schedule that is given says by itself whether the run is sparse, but for patches that begin, some of which may
    # stop; a strategy without one does not inherit it.
    if "prune_it" in given:
        grows = PRESETS.get(preset, {}).get("strategy") == "grow"
        dropped = ("prune_ratio",) if grows else ("strategy", "prune_ratio")
        if list(given["prune_it"]) != [-1] and "prune_ratio" not in given:
            raise UserError("--prune_it needs --prune_ratio, the share of patches that stops at each of its iterations")
    else:
        dropped = ("prune_it", "prune_ratio") if given.get("strategy") in ("dense", "pri") else ()
    canvas = PRESETS.get(preset, {}).get("canvas", "pixels")
    if given.get("canvas", canvas) != canvas:
        dropped = *dropped, "lr", "lr_schedule", "init"  # a canvas has its own
    own = PRESETS.get(preset, {}).get("prior", ())
    if sorted(given.get("prior", own)) != sorted(own):
        dropped = *dropped, "oh"  # it is what goes with the preset's own priors
    kept = {name: value for name, value in PRESETS.get(preset, {}).items() if name not in dropped}
    if "views" in given and "phases" in kept:
        kept["phases"] = [Phase.parse(text).beside(given["views"]).text() for text in kept["phases"]]
    chosen = {**kept, **given}
    known, extras = terms(), options()
    weights = {"oh": known["oh"].weight}
    for name in chosen.pop("prior", ["deepinversion"]):
        if name not in PRIORS:
            raise UserError(f"--prior {name} is unknown; there are {', '.join(PRIORS)}")
        weights |= {term: one.weight for term, one in PRIORS[name].terms.items()}
    weights |= {name: float(chosen[name]) for name in known if name in chosen}
    fields = {name: value for name, value in chosen.items() if name not in known and name not in extras}
    unknown = fields.keys() - InversionConfig.__dataclass_fields__.keys()
    if unknown:
        raise UserError(f"an inversion has no setting {sorted(unknown)[0]}")
    frozen = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return InversionConfig(**frozen, weights=weights, options={name: chosen[name] for name in extras if name in chosen})
