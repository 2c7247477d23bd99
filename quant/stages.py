"""Walking the full-precision and the quantized model side by side, stage by stage: embedding, blocks, classifier."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from models import SparseImages, SparseViT
from quant.insert import QuantizedLinear, quantized_layers
from quant.rows import Rows, outputs

Run = Callable[..., Tensor]


@dataclass(frozen=True)
class Stage:
    """A part of the model, and what both models feed it, batches of tensors of the calibration images.

    `run(vit, *batch)` is its output of either model; the last tensor of a batch are positions. `prefixes` is how the
    names of what it holds begin; `behind` are the runs of the stages that follow.
    """

    prefixes: tuple[str, ...]
    run: Run
    inputs: Rows
    quantized_inputs: Rows
    behind: tuple[Run, ...]

    @property
    def last(self) -> bool:
        """Whether its output are logits."""
        return not self.behind

    def logits(self, vit: SparseViT, out: Tensor, positions: Tensor) -> Tensor:
        """What `vit` makes of an output of this stage: logits (B, classes)."""
        for run in self.behind:
            out = run(vit, out, positions)
        return out

    def features(self, vit: SparseViT, out: Tensor, positions: Tensor) -> Tensor:
        """The same without the classifier: what it reads, of the last stage its output."""
        if self.last:
            return out
        for run in self.behind[:-1]:
            out = run(vit, out, positions)
        return vit.head.features(vit.norm(out))

    def owns(self, name: str) -> bool:
        """Whether the stage holds the module of this name."""
        return name.startswith(self.prefixes)


def stages(vit: SparseViT) -> list[tuple[tuple[str, ...], Run]]:
    """Prefixes and `run` of every stage: patches -> tokens, tokens -> tokens, tokens -> logits."""
    last = len(vit.blocks) - 1

    def block(index: int) -> Run:
        queries = vit.last_queries if index == last else None
        return lambda model, tokens, at: model.blocks[index](tokens, queries, where=model.where(at)).tokens

    return [
        (("patch_proj", "tap_embed"), lambda model, patches, at: model.embed(patches, at)),
        *(((f"blocks.{index}.",), block(index)) for index in range(last + 1)),
        (("head.",), lambda model, tokens, at: model.head.classify(model.head.features(model.norm(tokens)))),
    ]


def walk(reference: SparseViT, quantized: SparseViT, images: SparseImages, batch_size: int) -> Iterator[Stage]:
    """Every stage in turn; the next one gets what the quantized model gives after the caller has changed it."""
    device = quantized.device
    positions = images.positions.to(device)
    inputs = quantized_inputs = Rows((images.patches.to(device), positions), batch_size, device)
    all_stages = stages(quantized)
    for number, (prefixes, run) in enumerate(all_stages):
        behind = tuple(run for _, run in all_stages[number + 1 :])
        yield Stage(prefixes, run, inputs, quantized_inputs, behind)
        inputs, quantized_inputs = (
            Rows((outputs(functools.partial(run, vit), rows), positions), batch_size, device)
            for vit, rows in ((reference, inputs), (quantized, quantized_inputs))
        )


@torch.no_grad()
def correct_biases(reference: SparseViT, quantized: SparseViT, images: SparseImages, batch_size: int) -> None:
    """Shift the bias of every quantized layer, in place, until its mean output is the full-precision one.

    Empirical bias correction (Nagel et al., Data-Free Quantization, ICCV 2019, section 4.2), in the order of the
    forward pass, so that each layer is corrected behind layers that are. `reference` is a `wrapped` model.
    """
    for stage in walk(reference, quantized, images, batch_size):
        originals = quantized_layers(reference)
        layers = {name: layer for name, layer in quantized_layers(quantized).items() if stage.owns(name)}
        wanted = _mean_outputs(
            {name: originals[name] for name in layers}, functools.partial(stage.run, reference), stage.inputs
        )
        for name, layer in layers.items():
            seen = _mean_outputs({name: layer}, functools.partial(stage.run, quantized), stage.quantized_inputs)
            change = wanted[name] - seen[name]
            bias = change if layer.linear.bias is None else layer.linear.bias + change
            layer.linear.bias = torch.nn.Parameter(bias, requires_grad=False)


def _mean_outputs(layers: dict[str, QuantizedLinear], run: Run, batches: Rows) -> dict[str, Tensor]:
    """Mean of each layer's output (out,) over all tokens of all batches."""
    sums, counts = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)

    def add(name: str, out: Tensor) -> None:
        rows = out.flatten(0, -2)
        sums[name], counts[name] = sums[name] + rows.sum(dim=0), counts[name] + len(rows)

    hooks = [
        layer.register_forward_hook(lambda _, __, out, name=name: add(name, out)) for name, layer in layers.items()
    ]
    for batch in batches:
        run(*batch)
    for hook in hooks:
        hook.remove()
    return {name: sums[name] / counts[name] for name in layers}
