"""Attention in windows: which of the kept tokens look at each other (Swin, Liu et al., ICCV 2021, section 3.2).

A stage's tokens are cut into windows, of which those where nothing is kept are left out. A window has places for tokens
and, at the edge of a grid that it does not divide, for padding, which is a key like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.positions import Known, Places, Position

APART = -100.0
"""What timm adds to the scores of tokens that only the cyclic shift has brought into one window."""
ABSENT = -30000.0
"""What is added to the scores of a place without a token: the softmax makes zero of it in every number format."""


@dataclass(frozen=True)
class WindowCut:
    """How the tokens of a stage are cut into windows; all sizes are rows and columns, in tokens.

    `grid`: of the whole stage. `window`: of a window. `shift`: of the cyclic shift. `side`: of a patch of the grid.
    """

    grid: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int]
    side: int

    @property
    def area(self) -> int:
        """Places in a window."""
        return self.window[0] * self.window[1]

    @property
    def counts(self) -> tuple[int, int]:
        """Rows and columns of windows, those with padding included."""
        return -(-self.grid[0] // self.window[0]), -(-self.grid[1] // self.window[1])

    @property
    def windows(self) -> int:
        """Windows of an image."""
        return self.counts[0] * self.counts[1]

    @property
    def pads(self) -> bool:
        """Whether some windows reach beyond the grid."""
        return self.windows * self.area > self.grid[0] * self.grid[1]

    def places(self) -> Tensor:
        """Where the tokens of each patch are, (patches, side * side): window * area + place in the window."""
        (rows, cols), (high, wide), side = self.grid, self.window, self.side
        down, right = (
            (torch.arange(size) - shift) % size for size, shift in zip(self.grid, self.shift, strict=True)
        )  # after the shift
        of_row = down // high * self.counts[1] * self.area + down % high * wide
        of_col = right // wide * self.area + right % wide
        whole = of_row[:, None] + of_col
        split = whole.view(rows // side, side, cols // side, side).transpose(1, 2)
        return split.reshape(-1, side * side)

    def regions(self) -> Tensor:
        """The part of the image that each place belongs to (windows, area): the shift brings several into a window."""
        parts = []
        for window, count, shift in zip(self.window, self.counts, self.shift, strict=True):
            at, size = torch.arange(window * count), window * count
            parts.append((at >= size - window).long() + (at >= size - shift) if shift else torch.zeros_like(at))
        whole = 3 * parts[0][:, None] + parts[1]
        split = whole.view(self.counts[0], self.window[0], self.counts[1], self.window[1]).transpose(1, 2)
        return split.reshape(-1, self.area)


class Windows(NamedTuple):
    """The windows of a batch of T tokens an image: M of them, with L places each; M = groups * K.

    `rows` (M, L): the token of each place, counted through all images, any where there is none. `at` (B * T,): the
    place of each token, counted through all windows. `groups`: windows come in so many groups that are alike. `slots`
    (K, L): which places of a whole window these are; None: all, in order. `mask` (K, 1 or L, L): added to the scores;
    None: nothing. `present` (M, L): where there is a token; None: everywhere. `padding` (M, L): where there is padding;
    None: nowhere.
    """

    rows: Tensor
    at: Tensor
    groups: int
    slots: Tensor | None = None
    mask: Tensor | None = None
    present: Tensor | None = None
    padding: Tensor | None = None

    def of(self, tokens: Tensor, padding: Tensor | None = None, plain: bool = False) -> Tensor:
        """Tokens (B * T, D), and what padding is (D,) -> windows (M, L, D)."""
        index = self.rows.flatten()
        found = tokens.index_select(0, index) if plain else _Moved.apply(tokens, index, self.at, None)
        if padding is not None:
            found = torch.where(self.padding.view(-1, 1), padding, found)
        return found.unflatten(0, self.rows.shape)

    def tokens(self, windows: Tensor, plain: bool = False) -> Tensor:
        """Windows (M, L, D) -> tokens (B * T, D)."""
        windows = windows.flatten(0, 1)
        if plain:
            return windows.index_select(0, self.at)
        return _Moved.apply(windows, self.at, self.rows.flatten(), self.present)

    def between_patches(self, weights: Tensor, images: int, patches: int) -> Tensor:
        """What each place gives each in its window (M, L, L) -> what each patch gives each (images, patches, patches).

        That is the mean over the tokens of one patch of the sum over those of the other.
        """
        each = len(self.at) // (images * patches)
        patch = self.rows // each  # counted through all images
        index = patch[:, :, None] * patches + patch[:, None, :] % patches
        if self.present is not None:
            weights = weights * (self.present[:, :, None] & self.present[:, None, :])
        sums = weights.new_zeros(images * patches**2).index_add(0, index.flatten(), weights.flatten())
        return (sums / each).view(images, patches, patches)


class _Moved(torch.autograd.Function):
    """Rows of `x` (R, D) at `there` (S,), none of them twice where the result matters: the gradient is a gather too.

    `back` (R,) is where each row is found in the result; `read` (R in all): which of them are there, None for all.
    """

    @staticmethod
    def forward(ctx, x: Tensor, there: Tensor, back: Tensor, read: Tensor | None) -> Tensor:
        ctx.save_for_backward(there, back)
        ctx.read = read
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        there, back = ctx.saved_tensors
        moved = _Moved.apply(grad, back, there, None)
        return (moved if ctx.read is None else moved * ctx.read.view(-1, 1)), None, None, None


class WindowPlaces(Places):
    """The `Windows` of every cut, in this order.

    `counted`: windows and places in them are as many as the kept tokens need; else, and where counting would wait for a
    device, as many as any tokens could need.

    Args:
        cuts: of the stages, as they are and shifted.
    """

    counted = True

    def __init__(self, cuts: Sequence[WindowCut]) -> None:
        super().__init__()
        self.cuts = nn.ModuleList(_Cut(cut) for cut in cuts)

    def forward(self, positions: Tensor) -> tuple[Windows, ...]:
        counted = self.counted and positions.device.type == "cpu"
        return tuple(cut(positions, counted) for cut in self.cuts)


class _Cut(nn.Module):
    """Positions (B, n), and whether places are counted -> the `Windows` of one cut."""

    def __init__(self, cut: WindowCut) -> None:
        super().__init__()
        self.cut = cut
        places, regions = cut.places(), cut.regions()
        filled = torch.zeros(cut.windows * cut.area, dtype=torch.bool).index_fill(0, places.flatten(), True)
        self.most_padding = cut.area - int(filled.view(-1, cut.area).sum(dim=1).min())
        self.touched = max(len(row.unique()) for row in places // cut.area)
        for name, value in {"places": places, "regions": regions, "filled": filled.view(-1, cut.area)}.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, positions: Tensor, counted: bool) -> Windows:
        images, patches = positions.shape
        places = self.places[positions].flatten(1)
        rows = torch.arange(places.numel(), device=places.device).view_as(places)
        held = rows.new_full((images, self.cut.windows * self.cut.area), -1).scatter(1, places, rows)
        held = held.view(-1, self.cut.area)
        if patches == len(self.places):
            return self._whole(held, images)
        return self._kept(held, images, patches, counted)

    def _whole(self, held: Tensor, images: int) -> Windows:
        """The windows of images of which everything is kept; `held`: the row of each place, -1 where there is none."""
        shifted, pads = any(self.cut.shift), self.cut.pads
        mask = APART * (self.regions[:, :, None] != self.regions[:, None]) if shifted else None
        present = held >= 0
        return Windows(
            rows=held.clamp(min=0),
            at=_inverse(held, images * self.places.numel()),
            groups=images if shifted else len(held),
            mask=mask,
            present=present if pads else None,
            padding=~present if pads else None,
        )

    def _kept(self, held: Tensor, images: int, patches: int, counted: bool) -> Windows:
        """The windows of which something is kept, with places for as many tokens as the fullest one has."""
        chosen = self._some(held >= 0) if counted else self._most(held >= 0, images, patches)
        held, window = held[chosen], chosen % self.cut.windows
        padding = ~self.filled[window]
        used = (held >= 0) | padding
        most = min(self.cut.area, patches * self.places.shape[1] + self.most_padding)
        slots = used.byte().sort(dim=1, descending=True, stable=True).indices
        slots = slots[:, : int(used.sum(dim=1).max()) if counted else most]
        held, padding, used = held.gather(1, slots), padding.gather(1, slots), used.gather(1, slots)
        mask = ABSENT * ~used[:, None]
        if any(self.cut.shift):
            regions = self.regions[window].gather(1, slots)
            mask = mask + APART * (regions[:, :, None] != regions[:, None])
        present = held >= 0
        return Windows(
            rows=held.clamp(min=0),
            at=_inverse(held, images * patches * self.places.shape[1]),
            groups=1,
            slots=slots,
            mask=mask,
            present=present,
            padding=padding if self.cut.pads else None,
        )

    @staticmethod
    def _some(present: Tensor) -> Tensor:
        """Windows with a token, counted through all images."""
        return present.any(dim=1).nonzero()[:, 0]

    def _most(self, present: Tensor, images: int, patches: int) -> Tensor:
        """As many windows of each image as so many patches could touch, those with a token among them."""
        counts, most = present.sum(dim=1).view(images, -1), min(self.cut.windows, patches * self.touched)
        first = torch.arange(images, device=counts.device)[:, None] * self.cut.windows
        return (counts.topk(most, dim=1).indices + first).flatten()


def _inverse(held: Tensor, tokens: int) -> Tensor:
    """Tokens (M, L) of places, -1 where there is none -> the place of each token (tokens,)."""
    held = held.flatten()
    at = torch.empty(tokens + 1, dtype=torch.long, device=held.device)  # the last is where there is none
    return at.scatter_(0, held.remainder(tokens + 1), torch.arange(len(held), device=held.device))[:-1]


class WindowBias(Position):
    """A bias for every distance within a window.

    Args:
        table: gives the biases of all distances (distances, heads), row by row, from the most negative on.
        window: rows and columns.
    """

    def __init__(self, table: nn.Module, window: tuple[int, int]) -> None:
        super().__init__()
        self.table, self.window, (rows, cols) = table, window, window
        steps = torch.arange(rows)[:, None] * (2 * cols - 1) + torch.arange(cols)
        self.register_buffer("steps", steps.flatten(), persistent=False)
        self.none = (rows - 1) * (2 * cols - 1) + cols - 1  # the number of distance zero

    def bias(self, where: Windows) -> Tensor:
        """What is added to the scores of windows that are alike, besides their mask: (K, heads, L, L), or (1, ..)."""
        steps = self.steps[None] if where.slots is None else self.steps[where.slots]
        distances = steps[:, :, None] - steps[:, None] + self.none
        return F.embedding(distances, self.table()).permute(0, 3, 1, 2)

    def fixed(self, dtype: torch.dtype) -> WindowBias:
        return WindowBias(Known(self.table(), dtype), self.window).to(self.steps.device)
