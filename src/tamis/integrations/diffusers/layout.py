"""Where the tokens of an image or video stand during one run of a model, and the order they are brought into."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from tamis import order as orders
from tamis.integrations.diffusers.adapters import Grid
from tamis.predictors.base import Keep

Indices = tuple[Tensor, Tensor]  # the token that stands at each place, and the place where each token stands


class Layout:
    """One run of a model.

    Attributes:
        tokens: number of image tokens.
        text: on which side of them text stands in attention; None if it never does.
        indices: the order of the image tokens; None leaves them as they are.
        outside: whether the order holds for whole blocks, else each attention changes it and back.
        entered: whether the image tokens stand in that order now.
    """

    def __init__(
        self, tokens: int, text: Literal["before", "after"] | None, indices: Indices | None, *, outside: bool
    ) -> None:
        self.tokens = tokens
        self.text = text
        self.indices = indices
        self.outside = outside
        self.entered = False

    @property
    def keep(self) -> Keep | None:
        """All but the image tokens, however many there are; None if text is never among them."""
        if self.text is None:
            return None
        ranges = ((None, -self.tokens),) if self.text == "before" else ((self.tokens, None),)
        return Keep(keys=ranges, queries=ranges)

    def around(self, length: int) -> Indices | None:
        """The order of all tokens of an attention call that has to change it by itself."""
        if self.indices is None or self.outside:
            return None
        if self.text is None or length < self.tokens:
            self.check(length)
        extra = length - self.tokens
        return self.wide(extra, 0) if self.text == "before" else self.wide(0, extra)

    def wide(self, before: int, after: int) -> Indices:
        """The order of image tokens among others, which stay where they are."""
        assert self.indices is not None
        if before == after == 0:
            return self.indices
        others = torch.arange(before + self.tokens + after, device=self.indices[0].device)
        first, last = others[:before], others[before + self.tokens :]
        forward, inverse = (torch.cat([first, index + before, last]) for index in self.indices)
        return forward, inverse

    def check(self, found: int) -> None:
        """Raise unless the model has as many image tokens as the grid."""
        if found != self.tokens:
            raise ValueError(
                f"order: the grid that the arguments of the model tell has {self.tokens} tokens and the model {found}: "
                "give the model the sizes of its latents, or apply with order=None"
            )


def count(tokens: tuple[Grid, ...] | Tensor) -> int:
    """Number of tokens of some grids, or of ids."""
    return tokens.shape[0] if isinstance(tokens, Tensor) else sum(math.prod(grid) for grid in tokens)


def indices_of(kind: str, tokens: tuple[Grid, ...] | Tensor, device: torch.device) -> Indices:
    """The order of some grids, one behind the other, or of tokens of which the ids are known.

    Raises:
        ValueError: the ids are not those of whole grids, row by row.
    """
    if isinstance(tokens, Tensor):
        forward, inverse = _by_ids(kind, tokens)
        return forward.to(device), inverse.to(device)
    parts: list[Indices] = []
    start = 0
    for grid in tokens:
        made = orders.tokens(kind, grid, device=device)
        parts.append((made.forward + start, made.inverse + start))
        start += math.prod(grid)
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


@torch.library.custom_op("tamis::token_order_by_ids", mutates_args=())
def _by_ids(kind: str, ids: Tensor) -> tuple[Tensor, Tensor]:
    """An order from ids `[tokens, (image, row, column)]`: an op, since it has to read them, in compiled graphs too."""
    host = ids.detach().to("cpu", torch.float64)
    ends = [*(torch.nonzero(host[1:, 0] != host[:-1, 0]).flatten() + 1).tolist(), len(host)]
    grids, start = [], 0
    for end in ends:
        grids.append(_grid(host[start:end, 1:]))
        start = end
    forward, inverse = indices_of(kind, tuple(grids), ids.device)
    return forward.clone(), inverse.clone()


@_by_ids.register_fake
def _fake_by_ids(kind: str, ids: Tensor) -> tuple[Tensor, Tensor]:
    forward = ids.new_empty(ids.shape[0], dtype=torch.int64)
    return forward, torch.empty_like(forward)


def _grid(places: Tensor) -> Grid:
    """(1, H, W) from the rows and columns of its tokens."""
    width = int((places[:, 0] == places[0, 0]).sum())
    height = len(places) // width
    rows, columns = (torch.arange(size, dtype=places.dtype) for size in (height, width))
    whole = torch.cartesian_prod(rows, columns) + places[0]
    if height * width != len(places) or not torch.equal(whole, places):
        raise ValueError(
            f"order: the ids of {len(places)} tokens are not those of a grid, row by row: apply with order=None"
        )
    return 1, height, width
