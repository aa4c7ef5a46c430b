"""Orders in which the tokens of an image or a video stand: neighbours in space and time that are neighbours in the
sequence make blocks whose tokens are alike, which a block mask needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tamis.order import hilbert

Grid = tuple[int, int, int]

KINDS = ("row", "column", "time", "random", "hilbert")
# Which axis of (T, H, W) changes slowest, and which fastest.
_NESTED = {"row": (0, 1, 2), "column": (0, 2, 1), "time": (1, 2, 0)}
_KEPT = 64  # orders in memory: 16 bytes per token each


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """An order of the tokens of a grid, and the way back.

    Attributes:
        kind: "row", "column", "time", "random" or "hilbert".
        grid: (T, H, W) of the visual tokens, which lie row-major in the input.
        forward: int64 `[tokens]`; the token that stands at place i is number `forward[i]` of the input.
        inverse: int64 `[tokens]`; token i of the input stands at place `inverse[i]`.
        before, after: tokens in front of and behind the grid, such as text; they stay where they are.
    """

    kind: str
    grid: Grid
    forward: Tensor
    inverse: Tensor
    before: int = 0
    after: int = 0

    def __repr__(self) -> str:
        around = "".join(f", {name}={number}" for name in ("before", "after") if (number := getattr(self, name)))
        return f"TokenOrder({self.kind!r}, grid={self.grid}{around}, device={str(self.forward.device)!r})"

    @property
    def length(self) -> int:
        """Tokens in all, those before and after the grid included."""
        return self.before + self.grid[0] * self.grid[1] * self.grid[2] + self.after

    def apply(self, x: Tensor, dim: int) -> Tensor:
        """A copy of `x` whose tokens, along `dim`, stand in this order.

        Raises:
            ValueError: `x` has another number of tokens along `dim`, or lies on another device.
        """
        return self._moved(x, dim, self.forward)

    def undo(self, x: Tensor, dim: int) -> Tensor:
        """A copy of `x` whose tokens, along `dim`, stand as they did before `apply`; bit for bit.

        Raises:
            ValueError: as in `apply`.
        """
        return self._moved(x, dim, self.inverse)

    def _moved(self, x: Tensor, dim: int, index: Tensor) -> Tensor:
        if not -x.dim() <= dim < x.dim():
            raise ValueError(f"dim must name one of the {x.dim()} dimensions of x, got {dim}")
        if x.shape[dim] != self.length:
            said = f"{' x '.join(map(str, self.grid))} tokens, {self.before} before and {self.after} after"
            raise ValueError(
                f"x has {x.shape[dim]} tokens along dim {dim} and the order {self.length} ({said}): "
                "make the order for the grid that x has, or name the dim of its tokens"
            )
        if x.device != index.device:
            raise ValueError(f"x is on {x.device} and the order on {index.device}: make it with device=x.device")
        return x.index_select(dim, index)


def tokens(
    kind: str,
    grid: Grid,
    *,
    before: int = 0,
    after: int = 0,
    seed: int | None = None,
    device: torch.device | str | None = None,
) -> TokenOrder:
    """An order of the tokens of an image or a video, made once and kept.

    Args:
        kind: what changes fastest along the sequence: "row": w, then h, then t, as the tokens lie anyway; "column": h,
            then w, then t; "time": t, then w, then h; "hilbert": all three together, along a curve whose every step
            goes to a neighbouring cell; "random": any, for comparison.
        grid: (T, H, W), each at least 1; of an image T is 1.
        before, after: tokens in front of and behind the grid that stay where they are, such as text.
        seed: of the random order, 0 by default; no other order takes one.
        device: where its tensors lie; the CPU by default.

    Raises:
        ValueError, TypeError: an argument is out of its range, or of the wrong kind.

    Source: SpargeAttn (arXiv 2502.18137), section 3.7. Apply it after the position embedding, and undo it on the
    output.

    Example:
        >>> import torch
        >>> from tamis import order
        >>> curve = order.tokens("hilbert", (1, 2, 3))
        >>> curve.forward.tolist()
        [0, 1, 2, 5, 4, 3]
        >>> x = torch.randn(1, 4, 6, 64)
        >>> bool((curve.undo(curve.apply(x, -2), -2) == x).all())
        True
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not isinstance(grid, (tuple, list)) or len(grid) != 3:
        raise ValueError(f"grid must be (T, H, W), of an image (1, H, W), got {grid!r}")
    sizes = (_count(grid[0], "grid", 1), _count(grid[1], "grid", 1), _count(grid[2], "grid", 1))
    if seed is not None and kind != "random":
        raise ValueError(f"seed is for the random order: leave it out with kind={kind!r}")
    text = (_count(before, "before", 0), _count(after, "after", 0))
    number = _count(0 if seed is None else seed, "seed", 0)
    where = torch.device("cpu" if device is None else device)
    if torch.compiler.is_compiling():
        forward, inverse = indices(kind, *sizes, *text, number, where)
        return TokenOrder(kind, sizes, forward, inverse, *text)
    return _made(kind, sizes, *text, number, where)


def _count(number: int, name: str, least: int) -> int:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name} must hold whole numbers, got {type(number).__name__}: {number!r}")
    if number < least:
        raise ValueError(f"{name} must be {least} or more, got {number}")
    return number


@lru_cache(maxsize=_KEPT)
def _made(kind: str, grid: Grid, before: int, after: int, seed: int, device: torch.device) -> TokenOrder:
    # Not in inference mode: a tensor made there may not be used again in training.
    with torch.inference_mode(False), torch.no_grad():
        visual = _visual(kind, grid, seed) + before
        end = before + len(visual)
        text = torch.arange(end + after, device="cpu")
        forward = torch.cat([text[:before], visual, text[end:]])
        inverse = torch.empty_like(forward)
        inverse[forward] = text
        return TokenOrder(kind, grid, forward.to(device), inverse.to(device), before, after)


@torch.library.custom_op("tamis::token_order", mutates_args=())
def indices(
    kind: str, t: int, h: int, w: int, before: int, after: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Both indices of an order, for compiled graphs: copies, which a graph may write over."""
    made = _made(kind, (t, h, w), before, after, seed, device)
    return made.forward.clone(), made.inverse.clone()


@indices.register_fake
def _fake_indices(
    kind: str, t: int, h: int, w: int, before: int, after: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    forward = torch.empty(before + t * h * w + after, dtype=torch.int64, device=device)
    return forward, torch.empty_like(forward)


def _visual(kind: str, grid: Grid, seed: int) -> Tensor:
    frames, height, width = grid
    if kind == "random":
        return torch.randperm(frames * height * width, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    if kind == "hilbert":
        t, h, w = hilbert.cells(grid).long().unbind(1)
        return (t * height + h) * width + w
    return torch.arange(frames * height * width, device="cpu").view(grid).permute(_NESTED[kind]).flatten()
