"""A Hilbert curve through any box: no power-of-two padding, and every step goes to a neighbouring cell.

A box of a x b x c cells is walked from the corner (0, 0, 0) to the corner (a - 1, 0, 0). It is cut into smaller boxes
that are walked the same way, each beginning beside the cell where the one before ends, down to lines:

    two      a = a1 + a2       one after the other
    three    b = b1 + b2       up b1 over a1, along a over b2, down b1 over a2
    five     all three halved  up b1, across c, along a, back c, down b1: the octants of Hilbert's cube

Why no step is longer: a walk of n cells makes n - 1 steps, each changes the parity of the sum of the coordinates, and
its ends lie a - 1 apart. So a must be even, or a, b and c all odd, and the cuts keep to it: b1 is even, so are the
parts of an even a where they must be, and a box that is odd all round is never cut in five. A whole grid is walked
along an even edge if it has one.

The idea of such cuts for boxes of any size is known as the generalised Hilbert curve ("gilbert", J. Červený); his
rules accept diagonal steps in some boxes with odd edges, these do not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Size = tuple[int, int, int]
_A, _B, _C = 1, 2, 3  # the edges of a box; negative where a piece runs against them


class Piece(NamedTuple):
    """A part of a box: its own a, b and c, its first cell, and the edges of the box that its own follow."""

    size: Size
    start: tuple[int, int, int]
    along: tuple[int, int, int]


def cells(sizes: Size) -> Tensor:
    """Coordinates along the curve, int32 `[cells, 3]` on the CPU; it begins at (0, 0, 0)."""
    return _joined(_whole(sizes), {})


def _walk(size: Size, known: dict[Size, Tensor]) -> Tensor:
    """The walk of one box, `[cells, 3]`; boxes of one size are walked once."""
    if size not in known:
        if size[1] == size[2] == 1:
            line = torch.arange(size[0], dtype=torch.int32, device="cpu")
            known[size] = torch.stack([line, torch.zeros_like(line), torch.zeros_like(line)], 1)
        else:
            known[size] = _joined(_cut(size), known)
    return known[size]


def _joined(pieces: list[Piece], known: dict[Size, Tensor]) -> Tensor:
    walks = []
    for piece in pieces:
        own = _walk(piece.size, known)
        placed = [own] * 3
        for column, edge in zip(own.unbind(1), piece.along, strict=True):
            axis = abs(edge) - 1
            placed[axis] = column + piece.start[axis] if edge > 0 else piece.start[axis] - column
        walks.append(torch.stack(placed, 1))
    return torch.cat(walks)


def _whole(sizes: Size) -> list[Piece]:
    """The grid as one box along its longest edge, or along its longest even edge if it has one and the longest is odd.

    A grid with an odd edge of twice that length or more would be walked up in one half and down in the other: it
    becomes two boxes, an even length along the long edge and the rest along the even one.
    """
    longest = max(range(3), key=lambda axis: sizes[axis])
    evens = [axis for axis in range(3) if sizes[axis] % 2 == 0]
    main = longest if not evens or longest in evens else max(evens, key=lambda axis: sizes[axis])
    if main == longest or sizes[longest] < 2 * sizes[main]:
        return [_placed(main, (main + 1) % 3, sizes)]
    end = sizes[main] + 1
    before = list(sizes)
    before[longest] -= end
    after = list(sizes)
    after[longest] = end
    start = [0, 0, 0]
    start[longest] = before[longest]
    return [
        _placed(longest, main, before),
        _placed(main, longest, after)._replace(start=(start[0], start[1], start[2])),
    ]


def _placed(a: int, b: int, sizes: list[int] | Size) -> Piece:
    c = 3 - a - b
    return Piece((sizes[a], sizes[b], sizes[c]), (0, 0, 0), (a + 1, b + 1, c + 1))


def _cut(size: Size) -> list[Piece]:
    """A box that is not a line in its pieces, in the order of the walk."""
    a, b, c = size
    if b < c:
        return _exchanged(_cut((a, c, b)))
    # Of thresholds from 6/5 to 2, 4/3 made about the most compact blocks over eleven grids; they differ by 4%.
    if a >= 4 and 3 * a > 4 * b:
        return _two(a, b, c)
    if a % 2 == 0 and c > 1 and (3 * b <= 4 * c or b == 2):
        return _five(a, b, c)
    return _three(a, b, c)


def _two(a: int, b: int, c: int) -> list[Piece]:
    a1 = _even_half(a)
    return [Piece((a1, b, c), (0, 0, 0), (_A, _B, _C)), Piece((a - a1, b, c), (a1, 0, 0), (_A, _B, _C))]


def _three(a: int, b: int, c: int) -> list[Piece]:
    a1, b1 = a // 2, _even_half(b) if b > 2 else 1
    return [
        Piece((b1, a1, c), (0, 0, 0), (_B, _A, _C)),
        Piece((a, b - b1, c), (0, b1, 0), (_A, _B, _C)),
        Piece((b1, a - a1, c), (a - 1, b1 - 1, 0), (-_B, -_A, _C)),
    ]


def _five(a: int, b: int, c: int) -> list[Piece]:
    """With a even. Walking across an odd c asks for odd a1, a - a1 and b - b1, so b is then odd too."""
    if b % 2 == 0 and c % 2 == 1:
        return _exchanged(_five(a, c, b))
    a1 = a // 2 if c % 2 == 0 else a // 4 * 2 + 1
    b1, c1 = _even_half(b) if b > 2 else 1, c // 2
    return [
        Piece((b1, c1, a1), (0, 0, 0), (_B, _C, _A)),
        Piece((c, a1, b - b1), (0, b1, 0), (_C, _A, _B)),
        Piece((a, b1, c - c1), (0, b1 - 1, c - 1), (_A, -_B, -_C)),
        Piece((c, a - a1, b - b1), (a - 1, b1, c - 1), (-_C, -_A, _B)),
        Piece((b1, c1, a - a1), (a - 1, b1 - 1, 0), (-_B, _C, -_A)),
    ]


def _exchanged(pieces: list[Piece]) -> list[Piece]:
    """The same pieces of a box whose b and c have changed names."""
    other = {_A: _A, -_A: -_A, _B: _C, -_B: -_C, _C: _B, -_C: -_B}
    return [
        Piece(size, (start[0], start[2], start[1]), (other[along[0]], other[along[1]], other[along[2]]))
        for size, start, along in pieces
    ]


def _even_half(edge: int) -> int:
    """The even number nearest to half of an edge."""
    return (edge + 2) // 4 * 2
