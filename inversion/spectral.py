"""The spectral canvas: what is optimized are coefficients of a real Fourier transform, not pixels.

As in feature visualization (Olah et al., *Feature Visualization*, Distill 2017; Mordvintsev et al., *Differentiable
Image Parameterizations*, Distill 2018): a coefficient of frequency f counts 1 / max(f, 1 / side), as in photographs, so
that one step of Adam moves low frequencies more than high ones, which only the inverted model can read.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from inversion.canvas import Neighbours, PatchCanvas, Taken
from models import PatchGrid

EDGE = 1e-3
"""How near a given pixel may be to black and white, as a share of the range: at the limits themselves, no coefficient
stands for it."""


class SpectralCanvas:
    """Whole images as coefficients (B, C, H, W // 2 + 1, 2), of which kept patches are shown at `positions` (B, n).

    x = black + (white - black) * sigmoid(irfft2(coefficients * scale)): the sigmoid keeps the limits. A coefficient
    belongs to the whole image, so all of them go on moving when patches stop; a stopped patch is not looked at any more
    and is shown as it was when it stopped.
    """

    def __init__(
        self,
        grid: PatchGrid,
        coefficients: Tensor,
        positions: Tensor,
        limits: tuple[Tensor, Tensor],
        plain: bool = False,
    ) -> None:
        self.grid, self.limits, self.plain = grid, limits, plain
        self.parameter = coefficients if coefficients.requires_grad else coefficients.detach().requires_grad_(True)
        self.positions = positions
        self.neighbours = Neighbours.of(positions, grid)
        self.scale = spectrum(grid.image_size, coefficients.device)
        self.index = torch.arange(len(positions), device=positions.device)[:, None]

    @classmethod
    def start(
        cls, grid: PatchGrid, noise: Tensor, limits: tuple[Tensor, Tensor], plain: bool, first: Tensor | None
    ) -> SpectralCanvas:
        """Arguments as for `PatchCanvas.start`; the noise is what goes into the sigmoid."""
        batch, device = len(noise), noise.device
        everywhere = grid.all_positions(batch, device) if first is None else first.expand(batch, -1)
        return cls(grid, _coefficients(noise), everywhere.contiguous(), limits, plain)

    def patches(self) -> PatchCanvas:
        """The kept patches as they are now; their gradient flows to the coefficients."""
        if self.positions.shape[1] == self.grid.count:
            pixels = self.grid.patchify(self._raw())
        elif self.plain:
            pixels = self.grid.taken(self._raw(), self.positions)
        else:
            pixels = Taken.apply(self._raw(), self.positions, self.grid)
        black, white = self.limits
        pixels = black + (white - black) * pixels.sigmoid()
        return PatchCanvas(self.grid, pixels, self.positions, self.plain, self.neighbours)

    def with_patches(self, kept: Tensor) -> SpectralCanvas:
        """The canvas of the patches at `kept` (B, k) of each image alone: the same coefficients."""
        positions = self.positions[self.index, kept]
        return SpectralCanvas(self.grid, self.parameter, positions, self.limits, self.plain)

    def moments_of(self, kept: Tensor, moments: Tensor) -> Tensor:
        """What is left of a tensor of the parameter's shape after `with_patches`: all of it."""
        return moments

    def with_more(self, positions: Tensor) -> SpectralCanvas:
        """The canvas with the patches at `positions` (k,) as well, which begin as their coefficients have them."""
        more = torch.cat([self.positions, positions.expand(len(self.positions), -1)], dim=1).sort(dim=1).values
        return SpectralCanvas(self.grid, self.parameter, more, self.limits, self.plain)

    def settle(self) -> None:
        """After a step: the sigmoid has kept the limits."""

    def overwrite(self, patches: PatchCanvas) -> None:
        """Take what was done to the pixels of `patches()` from outside: coefficients of the image that has them."""
        black, white = self.limits
        share = ((patches.pixels.detach() - black) / (white - black)).clamp(EDGE, 1 - EDGE)
        whole = self.grid.patchify(self._raw().detach()).clone()
        whole[self.index, self.positions] = share.logit()
        images = self.grid.unpatchify(whole, self.grid.all_positions(len(whole), whole.device))
        self.parameter.detach().copy_(_coefficients(images))

    def _raw(self) -> Tensor:
        """What goes into the sigmoid: (B, C, H, W)."""
        spectrum = torch.view_as_complex(self.parameter) * self.scale
        return torch.fft.irfft2(spectrum, s=self.grid.image_size, norm="ortho")


@functools.lru_cache(maxsize=8)
def _amplitude(size: tuple[int, int]) -> Tensor:
    height, width = size
    rows, cols = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)
    amplitude = 1 / torch.hypot(rows, cols).clamp(min=1 / max(size))
    both = torch.full((width // 2 + 1,), 2.0)  # a column stands for two, but for the first, and the last of even width
    both[0] = 1
    if width % 2 == 0:
        both[-1] = 1
    power = (amplitude.square() * both).sum() / (height * width)
    return amplitude / power.sqrt()


def spectrum(size: tuple[int, int], device: torch.device) -> Tensor:
    """What coefficients of images of that size are multiplied with, (H, W // 2 + 1).

    White noise of variance 1, transformed to coefficients of variance 1, becomes pink noise of variance 1.
    """
    return _amplitude(size).to(device)


def _coefficients(images: Tensor) -> Tensor:
    """The coefficients (B, C, H, W // 2 + 1, 2) that stand for what goes into the sigmoid (B, C, H, W)."""
    scale = spectrum(tuple(images.shape[-2:]), images.device)
    return torch.view_as_real(torch.fft.rfft2(images, norm="ortho") / scale).contiguous()
