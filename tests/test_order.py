"""Token orders: each holds every token once, comes back bit for bit, and the curve goes from neighbour to neighbour."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tamis import order
from tamis.order import hilbert

GRIDS = [
    (1, 1, 1),
    (1, 6, 6),
    (1, 1, 7),
    (1, 2, 9),
    (1, 37, 37),
    (3, 5, 7),
    (2, 2, 2),
    (5, 1, 4),
    (13, 30, 45),
    (1, 4, 101),
]


def coordinates(index: Tensor, grid: order.Grid) -> Tensor:
    _, height, width = grid
    return torch.stack([index // (height * width), index // width % height, index % width], 1)


def longer_steps(cells: Tensor) -> int:
    return int((cells.long().diff(dim=0).abs().sum(-1) != 1).sum())


@pytest.mark.parametrize("kind", order.KINDS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_token_has_one_place(kind: str, grid: order.Grid) -> None:
    found = order.tokens(kind, grid)
    n = grid[0] * grid[1] * grid[2]
    assert found.length == n and found.forward.dtype == found.inverse.dtype == torch.int64
    assert torch.equal(found.forward.sort().values, torch.arange(n))
    assert torch.equal(found.inverse[found.forward], torch.arange(n))


def test_the_curve_never_steps_further_than_a_neighbour() -> None:
    """Every grid up to 9 x 9 x 9, all ways round: each cell once, and not one longer step."""
    for grid in itertools.product(range(1, 10), repeat=3):
        cells = hilbert.cells(grid).long()
        index = (cells[:, 0] * grid[1] + cells[:, 1]) * grid[2] + cells[:, 2]
        assert torch.equal(index.sort().values, torch.arange(grid[0] * grid[1] * grid[2])), grid
        assert bool(((cells >= 0) & (cells < torch.tensor(grid))).all()), grid
        assert longer_steps(cells) == 0, grid


@pytest.mark.parametrize(
    "grid",
    [(21, 45, 80), (33, 90, 160), (1, 67, 101), (1, 3, 1000), (1, 4, 1001), (7, 1, 999), (17, 31, 41), (13, 48, 53)],
    ids=str,
)
def test_the_curve_through_grids_of_models(grid: order.Grid) -> None:
    found = order.tokens("hilbert", grid)
    assert torch.equal(found.forward.sort().values, torch.arange(found.length))
    assert longer_steps(coordinates(found.forward, grid)) == 0


@pytest.mark.parametrize(("grid", "most", "of_row"), [((32, 32, 32), 5.5, 32), ((1, 2, 1001), 33, 64)], ids=str)
def test_a_block_of_the_curve_is_compact(grid: order.Grid, most: float, of_row: float) -> None:
    """The longest side of 64 tokens in a row, on average: at least 4 in a cube, 32 where two rows are all there are."""

    def side(kind: str) -> float:
        whole = order.tokens(kind, grid).length // 64 * 64
        cells = coordinates(order.tokens(kind, grid).forward[:whole], grid).view(-1, 64, 3)
        return float((cells.amax(1) - cells.amin(1) + 1).amax(1).float().mean())

    assert side("hilbert") <= most < of_row / 1.9
    assert side("row") >= 0.95 * of_row


def test_what_each_order_is() -> None:
    """On 2 frames of 2 x 3 tokens."""
    expected = {
        "row": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
        "column": [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11],
        "time": [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11],
    }
    for kind, places in expected.items():
        assert order.tokens(kind, (2, 2, 3)).forward.tolist() == places


@pytest.mark.parametrize("kind", order.KINDS)
def test_there_and_back(kind: str) -> None:
    """Along any dim, in any dtype, NaN and strides included; the text stays where it is."""
    found = order.tokens(kind, (3, 4, 5), before=7, after=2)
    x = torch.randn(2, 69, 3).to(torch.bfloat16)
    x[0, 10] = float("nan")
    for tensor, dim in ((x, 1), (x, -2), (x.mT, 2), (torch.arange(69), 0)):
        moved = found.apply(tensor, dim)
        assert torch.equal(found.undo(moved, dim).view(-1).isnan(), tensor.reshape(-1).isnan())
        assert torch.equal(found.undo(moved, dim).nan_to_num(), tensor.nan_to_num())
        places = moved.movedim(dim, 0)
        assert torch.equal(places.nan_to_num(), tensor.movedim(dim, 0)[found.forward].nan_to_num())
    kept = found.forward
    assert kept[:7].tolist() == list(range(7)) and kept[-2:].tolist() == [67, 68]
    assert torch.equal(kept[7:-2] - 7, order.tokens(kind, (3, 4, 5)).forward)


def test_gradients_find_their_token() -> None:
    found = order.tokens("hilbert", (1, 3, 4))
    x = torch.randn(12, requires_grad=True)
    (found.apply(x, 0) * torch.arange(12.0)).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, found.inverse.float())


def test_made_once() -> None:
    assert order.tokens("hilbert", (2, 3, 4)) is order.tokens("hilbert", [2, 3, 4], device="cpu")  # type: ignore[arg-type]
    assert order.tokens("hilbert", (2, 3, 4)) is not order.tokens("hilbert", (2, 4, 3))
    assert order.tokens("random", (2, 3, 4)) is order.tokens("random", (2, 3, 4), seed=0)


def test_random_is_what_its_seed_says() -> None:
    """Whatever the global generator is at, which it leaves alone."""
    state = torch.get_rng_state()
    one = order.tokens("random", (1, 9, 11), seed=5).forward
    assert torch.equal(state, torch.get_rng_state())
    again = torch.randperm(99, generator=torch.Generator().manual_seed(5))
    assert torch.equal(one, again) and not torch.equal(one, order.tokens("random", (1, 9, 11), seed=6).forward)


def test_made_in_inference_used_in_training() -> None:
    with torch.inference_mode():
        found = order.tokens("hilbert", (1, 5, 3))
    x = torch.randn(15, requires_grad=True)
    found.apply(x, 0).sum().backward()
    assert x.grad is not None


def test_the_device_is_the_one_asked_for() -> None:
    """A default device does not count: an order made while a model is built on "meta" holds numbers."""
    with torch.device("meta"):
        found = order.tokens("hilbert", (1, 7, 3))
    assert found.forward.device.type == "cpu" and longer_steps(coordinates(found.forward, (1, 7, 3))) == 0
    assert order.tokens("hilbert", (1, 7, 3), device="meta").inverse.device.type == "meta"


def test_compiled() -> None:
    """In one graph, for any grid, and what is kept is not given away."""

    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        found = order.tokens("hilbert", (1, *x.shape[2:]), before=1)
        moved = found.apply(torch.nn.functional.pad(x.flatten(2), (1, 0)), 2)
        return moved, found.undo(moved, -1)

    for height, width in ((3, 4), (5, 6), (7, 5)):
        x = torch.randn(2, 3, height, width)
        moved, back = function(x)
        kept = order.tokens("hilbert", (1, height, width))
        assert torch.equal(moved[..., 1:], kept.apply(x.flatten(2), 2))
        assert torch.equal(back[..., 1:], x.flatten(2)) and bool((back[..., 0] == 0).all())
    assert order.indices("row", 1, 1, 3, 0, 0, 0, torch.device("cpu"))[0] is not order.tokens("row", (1, 1, 3)).forward
    torch.library.opcheck(order.indices, ("hilbert", 2, 3, 4, 1, 2, 0, torch.device("cpu")))


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"kind": "zigzag"}, ValueError, "kind must be one of row, column, time, random, hilbert, got 'zigzag'"),
        ({"grid": (6, 6)}, ValueError, r"grid must be \(T, H, W\), of an image \(1, H, W\), got \(6, 6\)"),
        ({"grid": (1, 0, 6)}, ValueError, "grid must be 1 or more, got 0"),
        ({"grid": (1, 6.0, 6)}, TypeError, "grid must hold whole numbers, got float: 6.0"),
        ({"before": -1}, ValueError, "before must be 0 or more, got -1"),
        ({"after": True}, TypeError, "after must hold whole numbers, got bool"),
        ({"seed": 3}, ValueError, "seed is for the random order: leave it out with kind='hilbert'"),
    ],
)
def test_wrong_use(arguments: dict[str, object], error: type[Exception], said: str) -> None:
    given = {"kind": "hilbert", "grid": (1, 6, 6), **arguments}
    with pytest.raises(error, match=said):
        order.tokens(given.pop("kind"), given.pop("grid"), **given)  # type: ignore[arg-type]


def test_wrong_tensors() -> None:
    found = order.tokens("hilbert", (1, 6, 6), before=2)
    with pytest.raises(ValueError, match=r"36 tokens along dim 1 and the order 38 \(1 x 6 x 6 tokens, 2 before and 0"):
        found.apply(torch.zeros(1, 36), 1)
    with pytest.raises(ValueError, match="dim must name one of the 2 dimensions of x, got 2"):
        found.undo(torch.zeros(1, 38), 2)
    with pytest.raises(ValueError, match=r"x is on meta and the order on cpu: make it with device=x\.device"):
        found.apply(torch.zeros(1, 38, device="meta"), 1)
