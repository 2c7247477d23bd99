"""Post-training quantization: observe activations on calibration images, fix the ranges, mend what was lost."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from models import SparseImages, SparseViT
from models.blocks import SparseBlock
from quant.compensation import compensate
from quant.config import QuantConfig
from quant.hadamard import can_mix, unmixed, with_hadamard
from quant.insert import observers, places, quantized_layers, quantized_vit, quantizers, wrapped
from quant.observers import OBSERVERS, MinMaxObserver, Observer
from quant.output_error import fit_ranges
from quant.reconstruction import FinishedStages, reconstruct
from quant.reparameterization import norm_sites, reparameterize
from quant.rotation import rotated, rotations
from quant.stages import correct_biases
from utils.device import require_memory, within_memory
from utils.errors import UserError
from utils.ranks import rank, ranks


def calibrate(
    vit: SparseViT, images: SparseImages, w_bit: int, a_bit: int, observer: str = "minmax", batch_size: int = 32
) -> SparseViT:
    """`quantize` with nothing but widths and an observer."""
    return quantize(vit, images, QuantConfig(w_bit, a_bit, observer, batch_size=batch_size))


def quantize(
    vit: SparseViT,
    images: SparseImages,
    config: QuantConfig,
    progress: bool = False,
    finished: FinishedStages | None = None,
) -> SparseViT:
    """A quantized copy of `vit`, its activation ranges taken from `images`; only kept patches are fed, or copies of
    them in every place (`config.fill`).

    The weights are quantized first, so that the ranges are those of the model that will run. Several ranks divide the
    batches and end with the same ranges.

    Args:
        vit: the full-precision model, on its device.
        images: calibration images, normalized; moved to the model's device batch by batch.
        config: widths, observer, and what is done about the error that is left.
        progress: show progress bars on stderr.
        finished: as for `reconstruct`; what is there has to be of the same model, images and settings.

    Raises:
        UserError: no images, no memory for them, more ranks than batches, `--keep` of a layer that is not there, or a
            model that the observer is not for.
    """
    config = fitting(vit, config)
    require_memory_for(vit, config, len(images), images.positions.shape[1], vit.device)
    images = config.fed(images, vit.grid)
    reference, quantized = calibrated(vit, images, config, progress)
    fitted = compensate(reference, quantized, images, config.batch_size, progress) if config.compensate else {}
    if config.reconstruct:
        reconstruct(reference, quantized, images, config, fitted, progress, finished)
    if config.bias_correction:
        correct_biases(reference, quantized, images, config.batch_size)
    return quantized


def fitting(vit: SparseViT, config: QuantConfig) -> QuantConfig:
    """`config` with all that `auto` stands for at these widths and for this model.

    Raises `UserError`, without computing anything, where `vit` cannot be quantized as `config` says.
    """
    if config.w_bit == config.a_bit == 32:
        return config
    if config.reconstruct and ranks() > 1:
        raise UserError("--reconstruct runs in one process; start it without torchrun")
    parts = rotations(vit)
    chosen = config.resolved(rotates=bool(parts), mixes=can_mix(vit))
    if chosen.rotate and not parts:
        raise UserError(f"--rotate: nothing of this model can be rotated: {'; '.join(parts.refused())}")
    if chosen.hadamard and not can_mix(vit):
        raise UserError(f"--hadamard: nothing of this model can be mixed: {'; '.join(unmixed(vit))}")
    if OBSERVERS[chosen.observer].published and any(type(block) is not SparseBlock for block in vit.blocks):
        raise UserError("--observer published is for plain Vision Transformers; take minmax")
    chosen.widths(list(places(vit, OBSERVERS[chosen.observer])), len(vit.blocks))
    return chosen


def require_memory_for(vit: SparseViT, config: QuantConfig, count: int, patches: int, device: torch.device) -> None:
    """Raise `UserError`, before anything is computed, where a calibration finds no room on `device`.

    Args:
        vit: the model.
        config: of the calibration.
        count: images.
        patches: kept of each.
        device: where.
    """
    tokens = (vit.grid.count if config.fill or config.join else patches) + vit.prefix_tokens
    batch = min(count, config.batch_size)
    require_memory(batch, observed_bytes(vit, tokens, config), device, "a calibration batch", "--calib-batchsize")
    mends = config.reconstruct or config.bias_correction or config.compensate
    walks = mends or OBSERVERS[config.method].output_error
    if walks:  # what both models feed a stage is held, and learned from joined
        forms = 8 if config.reconstruct else 5
        held = forms * 4 * tokens * vit.tokens_per_side**2 * vit.patch_proj.out_features
        require_memory(count, held, device, "the calibration", "--num_images")


def observed_bytes(vit: SparseViT, tokens: int, config: QuantConfig) -> int:
    """About what the forward pass of one image needs: the largest tensor in some forms, histograms' indices among."""
    forms = 5 if OBSERVERS[config.method].observer is MinMaxObserver else 12
    return 4 * forms * vit.largest(tokens)


def require_batches(count: int, config: QuantConfig) -> None:
    """Raise `UserError` where `count` images are fewer batches than there are ranks."""
    batches = -(-count // config.batch_size)
    if ranks() > batches:
        raise UserError(
            f"{ranks()} ranks for {batches} batches of {config.batch_size} images; start fewer, lower "
            "--calib-batchsize or raise --num_images"
        )


@torch.no_grad()
def calibrated(
    vit: SparseViT, images: SparseImages, config: QuantConfig, progress: bool = False
) -> tuple[SparseViT, SparseViT]:
    """The full-precision model, rotated, mixed and reparameterized if it shall be, `wrapped`, and its quantized copy.

    Arguments and errors are those of `quantize`.
    """
    if not len(images):
        raise UserError("there are no calibration images")
    require_batches(len(images), config)
    reference, fixed = rotated(vit, config.seed) if config.rotate else vit, {}
    reference = with_hadamard(reference) if config.hadamard else reference
    if OBSERVERS[config.method].reparameterize:
        reference, fixed = _reparameterized(reference, images, config)
    quantized, published = quantized_vit(reference, config), OBSERVERS[config.method].published
    quantized.every_token = published
    for name, (scale, zero_point) in fixed.items():
        quantized.get_submodule(f"{name}.quantizer").fix(scale, zero_point)
    _observe(quantized, observers(quantized), images, config.batch_size)
    for quantizer in quantizers(quantized).values():
        if quantizer.observer is not None:
            quantizer.freeze()
    quantized.every_token = False
    if published and not config.compensate:
        for layer in quantized_layers(quantized).values():
            layer.round_weight()
    reference = wrapped(reference)
    if OBSERVERS[config.method].output_error:
        fit_ranges(reference, quantized, images, config.batch_size, not config.compensate, progress)
    return reference, quantized


def _reparameterized(
    vit: SparseViT, images: SparseImages, config: QuantConfig
) -> tuple[SparseViT, dict[str, tuple[Tensor, Tensor]]]:
    """A copy of `vit` with the outputs of its norms on one scale, and what is known of its readers' quantizers.

    That is scale and zero point, by name.
    """
    vit, method = copy.deepcopy(vit), OBSERVERS[config.method]
    widths = config.widths(list(places(vit, method)), len(vit.blocks))
    sites, observing, hooks = norm_sites(vit), [], []
    for site in sites:
        norm = vit.get_submodule(site.norm)
        observer = method.observer(widths[site.readers[0]][1], len(norm.weight))
        hooks.append(norm.register_forward_hook(lambda _, __, out, observer=observer: observer.observe(out)))
        observing.append(observer)
    _observe(vit, observing, images, config.batch_size)
    for hook in hooks:
        hook.remove()
    fixed = {}
    for site, observer in zip(sites, observing, strict=True):
        known = reparameterize(vit, site, *observer.range(), observer.bits, config.symmetric)
        if known is not None:
            # A reader of another width, which --keep can ask for, is observed like any other tensor.
            fixed |= {name: known for name in site.readers if widths[name][1] == observer.bits}
    return vit, fixed


def _observe(vit: SparseViT, observing: list[Observer], images: SparseImages, batch_size: int) -> None:
    """Feed this rank's batches as often as the observers ask."""
    for _ in range(max((observer.passes for observer in observing), default=0)):
        for batch in images.batches(batch_size)[rank() :: ranks()]:
            within_memory(
                lambda batch=batch: vit(batch.patches.to(vit.device), batch.positions.to(vit.device)),
                lambda few, batch=batch: vit(batch.patches[:few].to(vit.device), batch.positions[:few].to(vit.device)),
                len(batch),
                "--calib-batchsize",
                vit.device,
            )
        for observer in observing:
            observer.end_pass()
