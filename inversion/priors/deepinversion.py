"""DeepInversion (Yin et al., *Dreaming to Distill*, CVPR 2020): the image prior R_prior (eq. 3), batch norm (eq. 4).

Every term but the cross-entropy looks at the un-jittered pixels of kept patches. The statistics are those of a CNN that
is given beside the teacher: a Vision Transformer has no batch norm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from inversion.priors.base import Context, Loss, LossInputs, Option, Prior, Term, precise
from utils.errors import UserError
from utils.files import user_path
from utils.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FIRST_LAYER = 10.0
"""What the first batch norm's statistics are multiplied with, as published."""


class CrossEntropy(Loss):
    """Cross-entropy of the logits with the target distributions, mean over the batch."""

    def __call__(self, inputs: LossInputs) -> Tensor:
        logits = precise(inputs.output.logits)
        return F.cross_entropy(logits, inputs.targets.to(logits.dtype))


class TotalVariationL1(Loss):
    """Sum of the means of the four absolute neighbour differences, over pairs in kept patches."""

    def __call__(self, inputs: LossInputs) -> Tensor:
        from inversion.total_variation import total_variation

        return total_variation(inputs.canvas, 1)


class TotalVariationL2(Loss):
    """Sum of the Frobenius norms of the four neighbour differences over the batch (R_TV), in kept patches."""

    def __call__(self, inputs: LossInputs) -> Tensor:
        from inversion.total_variation import total_variation

        return total_variation(inputs.canvas, 2)


class L2(Loss):
    """Frobenius norm of the kept pixels of the batch (R_l2)."""

    def __call__(self, inputs: LossInputs) -> Tensor:
        return torch.linalg.vector_norm(inputs.canvas.pixels)


class MeanL2(Loss):
    """Norm of the kept pixels of an image, mean over the batch (R_l2 as DeepInversion's own code has it)."""

    def __call__(self, inputs: LossInputs) -> Tensor:
        return torch.linalg.vector_norm(inputs.canvas.pixels.flatten(1), dim=1).mean()


class BatchNormStatistics(Loss):
    """R_feature (eq. 4): summed over BatchNorm2d layers, ||mean - running mean||_2 + ||var - running var||_2.

    Mean and variance of a layer's input go over the batch and the places of each channel; the first layer counts ten
    times. The network sees the jittered image, zero where patches have stopped.

    Raises:
        UserError: images that are not RGB, no such network in torchvision, weights that cannot be had or do not fit, or
            no BatchNorm2d in it.
    """

    def __init__(self, context: Context) -> None:
        source, channels = str(context.options["bn_source"]), context.model.grid.channels
        if channels != 3:
            ours = f"those of {context.model.name} have {channels} channel{'s' * (channels > 1)}"
            raise UserError(f"--bn: torchvision's networks see RGB images, {ours}")
        self.cnn = load_cnn(source).to(context.device, context.dtype).eval().requires_grad_(False)
        self.norms = [module for module in self.cnn.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        if not self.norms:
            raise UserError(f"--bn_source {source} has no BatchNorm2d layer; give a CNN such as resnet50")
        self.seen: list[Tensor] = []
        for norm in self.norms:
            norm.register_forward_pre_hook(lambda _, inputs: self.seen.append(inputs[0]))
        ours = context.model.preprocessing
        statistics = (ours.mean, ours.std, IMAGENET_MEAN, IMAGENET_STD)
        self.statistics = [torch.tensor(values, device=context.device).view(3, 1, 1) for values in statistics]

    def __call__(self, inputs: LossInputs) -> Tensor:
        our_mean, our_std, mean, std = self.statistics
        image = (precise(inputs.image()) * our_std + our_mean - mean) / std
        self.seen.clear()
        self.cnn(image.to(next(self.cnn.parameters()).dtype))
        distances = [self._distance(norm, precise(x)) for norm, x in zip(self.norms, self.seen, strict=True)]
        self.seen.clear()
        return FIRST_LAYER * distances[0] + sum(distances[1:])

    @staticmethod
    def _distance(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        return (mean - norm.running_mean).norm() + (var - norm.running_var).norm()


def load_cnn(source: str) -> nn.Module:
    """A torchvision network by its name, with torchvision's weights, or `NAME=FILE` with weights of one's own.

    Raises:
        UserError: an unknown name, a download that fails, or weights that do not fit.
    """
    import torchvision

    from models.weights import read_weights

    name, _, file = source.partition("=")
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise UserError(f"--bn_source {name} is not a classifier of torchvision; give for instance resnet50")
    if not file:
        try:
            return torchvision.models.get_model(name, weights="DEFAULT")
        except OSError as error:
            raise UserError(
                f"torchvision's weights of {name} cannot be downloaded ({error}); "
                f"give --bn_source {name}=FILE with a state_dict"
            ) from None
    state = read_weights(user_path(file, "--bn_source"))
    head = next((value for key, value in reversed(state.items()) if value.ndim == 2), None)
    classes = {} if head is None else {"num_classes": len(head)}
    cnn = torchvision.models.get_model(name, weights=None, **classes)
    try:
        cnn.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{file} does not fit {name}: {str(error).strip().splitlines()[-1].strip()}") from None
    return cnn


PRIOR = Prior(
    terms={
        "tv1": Term(TotalVariationL1, 0.0, "weight of the l1 total variation"),
        "tv2": Term(TotalVariationL2, 1e-4, "weight of the l2 total variation"),
        "l2": Term(L2, 0.0, "weight of the l2 norm of the pixels"),
        "l2_mean": Term(MeanL2, 0.0, "weight of the mean over images of the l2 norm of their pixels"),
        "bn": Term(BatchNormStatistics, 0.0, "weight of batch-norm statistics of a CNN"),
    },
    options={"bn_source": Option("resnet50", str, "CNN of --bn: a name of torchvision, or NAME=FILE with its weights")},
)
