"""What a call needs on every rank, from its sizes alone: bytes sent, bytes held, and seconds if speeds are given.

Traffic is exact: `tamis bench scale` and the tests compare it with counted bytes. Memory is what the code allocates, by
its largest tensors. Seconds are a model: they hold as far as the speeds that were given do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from tamis import geometry
from tamis.parallel.heads import Share, share_of
from tamis.parallel.layout import Layout
from tamis.parallel.ring import overlaps, ring_layouts
from tamis.parallel.smoothing import TILE
from tamis.parallel.wire import MESSAGE

MODES = ("heads", "ring")
PRECISIONS = ("full", "int8", "fp8")
_BLOCK_Q, _BLOCK_KV = geometry.DEFAULT_BLOCK_SIZE


@dataclass(frozen=True)
class Workload:
    """Self-attention over one long sequence in equal shards.

    Args:
        tokens: of the whole sequence. heads, kv_heads (heads by default), head_dim, value_dim (head_dim by default).
        item: bytes of a number, 4 for fp32, 2 for bf16.
        density: share of the visible blocks that is computed; `predicted`: by `Sparge`, else by no mask.

    Raises:
        TypeError, ValueError: a size is no integer above 0, heads is no multiple of kv_heads, density is not in (0, 1].
    """

    tokens: int
    heads: int
    head_dim: int = 128
    kv_heads: int | None = None
    value_dim: int | None = None
    batch: int = 1
    item: int = 2
    causal: bool = False
    precision: str = "full"
    density: float = 1.0
    predicted: bool = True

    def __post_init__(self) -> None:
        for name in ("tokens", "heads", "head_dim", "batch", "item"):
            _check_count(name, getattr(self, name))
        _check_count("kv_heads", self.keys)
        _check_count("value_dim", self.values)
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.heads % self.keys:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.keys}")
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")

    @property
    def keys(self) -> int:
        """Heads of key and value."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def values(self) -> int:
        """Size of a value."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def products(self) -> float:
        """Floating point operations of both products, as computed."""
        pairs = self.tokens**2 * self.density * (0.5 if self.causal else 1.0)
        return 2.0 * self.batch * self.heads * pairs * (self.head_dim + self.values)


@dataclass(frozen=True)
class Speeds:
    """What a model of the time rests on.

    Args:
        rate: floating point operations a second of attention on one device.
        near, far: bytes a second that a device sends to one of its own node, and of another.
        node: devices of a node.
        wait: seconds that an exchange takes before a byte moves.
    """

    rate: float
    near: float
    far: float
    node: int = 8
    wait: float = 2e-5

    def __post_init__(self) -> None:
        _check_count("node", self.node)
        for name in ("rate", "near", "far"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not self.wait >= 0:
            raise ValueError(f"wait must be at least 0 seconds, got {self.wait}")


@dataclass(frozen=True)
class Plan:
    """What every rank needs, at most.

    Attributes:
        traffic: bytes that a rank sends in one call, by kind as in `Traffic`; of the rank that sends most.
        memory: bytes that a rank holds at once, by kind; of the rank that holds most.
    """

    work: Workload
    ranks: int
    mode: str
    traffic: dict[str, int]
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def sent(self) -> int:
        """Bytes that a rank sends."""
        return sum(self.traffic.values())

    @property
    def held(self) -> int:
        """Bytes that a rank holds."""
        return sum(self.memory.values())

    def seconds(self, speeds: Speeds) -> float:
        """Modelled seconds of one call: products at full rate on the busiest rank, prediction not counted.

        Mode "heads" waits for its exchanges; a ring passes keys on while it computes.
        """
        compute = self.work.products / speeds.rate / self.ranks * balance(self.work, self.ranks, self.mode)
        if self.ranks == 1:
            return compute
        apart = self.ranks > speeds.node
        if self.mode == "heads":
            outside = (self.ranks - speeds.node) / (self.ranks - 1) if apart else 0.0
            return compute + 4 * speeds.wait + self.sent * max((1 - outside) / speeds.near, outside / speeds.far)
        steps, link = self.ranks - 1, speeds.far if apart else speeds.near
        passing = self.traffic.get("ring", 0) / steps / link + speeds.wait
        others = (self.sent - self.traffic.get("ring", 0)) / link + 4 * speeds.wait
        return others + steps * max(passing, compute / self.ranks) + compute / self.ranks


def plan(work: Workload, ranks: int, mode: str = "heads") -> Plan:
    """Traffic and memory of one attention call on so many ranks.

    Raises:
        TypeError, ValueError: ranks is no integer above 0, or the mode is not known or cannot do the precision.

    Example:
        >>> from tamis.parallel import Workload, plan
        >>> made = plan(Workload(tokens=1 << 20, heads=32, kv_heads=8, density=0.1), ranks=8)
        >>> made.sent < 2**30 < made.held
        True
    """
    _check_count("ranks", ranks)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "ring" and work.precision == "fp8":
        raise ValueError("precision 'fp8' has scales of all keys, which no rank of a ring sees: use mode='heads'")
    places = range(ranks)
    traffic = max((traffic_of(work, ranks, mode, rank) for rank in places), key=lambda sent: sum(sent.values()))
    memory = max((memory_of(work, ranks, mode, rank) for rank in places), key=lambda held: sum(held.values()))
    return Plan(work, ranks, mode, traffic, memory)


def traffic_of(work: Workload, ranks: int, mode: str, rank: int, *, lse: bool = False) -> dict[str, int]:
    """Bytes that one rank sends in a call on equal shards, whose lengths the ranks exchange; with `lse` of `attend`."""
    if ranks == 1:
        return {}
    sent = {"lengths": (ranks - 1) * MESSAGE}
    more = _ring_traffic if mode == "ring" else _heads_traffic
    return sent | more(work, ranks, rank, lse)


def _heads_traffic(work: Workload, ranks: int, rank: int, lse: bool) -> dict[str, int]:
    """Own tokens of the others' heads go out, own heads' output of the others' tokens goes back."""
    own, tokens = _share(work, ranks, rank), _even(work, ranks).lengths[rank]
    heads, elsewhere = _size(own.query), work.heads - _size(own.query)
    key_heads = _copies(work, ranks) - _size(own.key)
    out = work.head_dim * elsewhere + (work.head_dim + work.values) * key_heads
    back = (work.item * work.values + 4 * lse) * heads * (work.tokens - tokens)
    sent = {"heads": work.item * work.batch * tokens * out, "output": work.batch * back}
    split = any(share * work.heads // ranks % (work.heads // work.keys) for share in range(ranks))
    if work.predicted and split and work.precision != "full":
        tiles = geometry.num_blocks(work.tokens, TILE)
        sent["summaries"] = 2 * (ranks - 1) * 4 * work.batch * work.keys * tiles // ranks
    return sent


def _ring_traffic(work: Workload, ranks: int, rank: int, lse: bool) -> dict[str, int]:
    """Tokens go to their chunks and back; then every chunk but that of the next rank is passed on."""
    even, chunks = _even(work, ranks), _chunks(work, ranks)
    stay = sum(piece.length for piece in overlaps(even.ranks[rank], chunks.ranks[rank]))
    there = work.heads * work.head_dim + work.keys * (work.head_dim + work.values)
    back = work.heads * (work.item * work.values + 4 * lse)
    moved = there * work.item * (even.lengths[rank] - stay) + back * (chunks.lengths[rank] - stay)
    summaries = 0
    if work.predicted:
        most = geometry.num_blocks(max(chunks.lengths), _BLOCK_KV)
        summaries += _reduced(ranks, 8 * _rows(work)) + (ranks - 1) * 4 * _rows(work) * most
    if work.precision != "full":
        tiles = geometry.num_blocks(work.tokens, TILE)
        summaries += _reduced(ranks, work.batch * work.keys * tiles) + _reduced(ranks, 8 * _rows(work))
    sent = {
        "order": work.batch * moved,
        "ring": _all_parcels(work, ranks) - _parcel(work, chunks.lengths[(rank + 1) % ranks]),
    }
    return sent | ({"summaries": summaries} if summaries else {})


def memory_of(work: Workload, ranks: int, mode: str, rank: int) -> dict[str, int]:
    """Bytes that one rank of a GPU holds at the peak of a call, by its largest tensors.

    Lists of blocks have room for every visible block there, whatever the density; a CPU cuts them to the longest.
    """
    item, batch = work.item, work.batch
    given = work.heads * (work.head_dim + work.values) + work.keys * (work.head_dim + work.values)
    held = {"own tokens": item * batch * _even(work, ranks).lengths[rank] * given}
    q_blocks, kv_blocks = (geometry.num_blocks(work.tokens, block) for block in (_BLOCK_Q, _BLOCK_KV))
    if mode == "heads":
        own = _share(work, ranks, rank)
        heads, keys = _size(own.query), _size(own.key)
        whole = heads * (work.head_dim + work.values) + keys * (work.head_dim + work.values)
        held["heads"] = (
            (item * whole + 4 * heads) * batch * work.tokens if ranks > 1 else 4 * batch * heads * work.tokens
        )
        tokens = _even(work, ranks).lengths[rank]
        buffers = item * batch * work.head_dim * (tokens * work.heads + work.tokens * heads)
        held["buffers"] = buffers if ranks > 1 else 0
        if work.precision != "full":
            held["8 bit"] = batch * keys * _packed(work, work.tokens) + batch * heads * work.tokens * work.head_dim
        if work.predicted:
            held["blocks"] = 4 * batch * heads * q_blocks * kv_blocks
        return held
    chunks = _chunks(work, ranks)
    tokens = chunks.lengths[rank]
    moved = 0 if chunks == _even(work, ranks) else given
    held["chunks"] = item * batch * tokens * moved
    held["ring"] = 2 * _parcel(work, max(chunks.lengths))
    held["output"] = 3 * 4 * batch * work.heads * tokens * work.values  # fp32: merged so far, one part, their sum
    if work.predicted:
        rows = geometry.num_blocks(tokens, _BLOCK_Q)
        held["blocks"] = 5 * batch * work.heads * rows * kv_blocks  # lists as chosen, and the table they become
        held["summaries"] = 4 * batch * work.keys * kv_blocks * (work.head_dim + 1)
    return held


def balance(work: Workload, ranks: int, mode: str) -> float:
    """Work of the busiest rank / mean work of all: 1 is perfect."""
    if mode == "heads":
        return max(_size(_share(work, ranks, rank).query) for rank in range(ranks)) * ranks / work.heads
    loads = [_pairs(chunks, work.causal) for chunks in _chunks(work, ranks).ranks]
    return max(loads) * ranks / sum(loads)


def _pairs(runs: Sequence[tuple[int, int]], causal: bool) -> float:
    """Keys that the queries of these runs see, together."""
    return sum(length * (start + length / 2) if causal else length for start, length in runs)


def _check_count(name: str, number: object) -> None:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name} must be an integer, got {number!r}")
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")


def _share(work: Workload, ranks: int, rank: int) -> Share:
    return share_of(rank, ranks, work.heads, work.keys)


def _size(heads: slice) -> int:
    return int(heads.stop - heads.start)


def _copies(work: Workload, ranks: int) -> int:
    """Key heads of all ranks together: more than there are if groups of query heads are split."""
    return _all_copies(work.heads, work.keys, ranks)


@lru_cache(maxsize=64)
def _all_copies(heads: int, keys: int, ranks: int) -> int:
    return sum(_size(share_of(rank, ranks, heads, keys).key) for rank in range(ranks))


@lru_cache(maxsize=64)
def _even_layout(tokens: int, ranks: int) -> Layout:
    return Layout.even(tokens, ranks)


@lru_cache(maxsize=64)
def _chunk_layout(tokens: int, ranks: int, causal: bool) -> Layout:
    even = _even_layout(tokens, ranks)
    return ring_layouts((even, even), ranks, causal)[0]


@lru_cache(maxsize=64)
def _all_parcels(work: Workload, ranks: int) -> int:
    return sum(_parcel(work, length) for length in _chunks(work, ranks).lengths)


def _even(work: Workload, ranks: int) -> Layout:
    return _even_layout(work.tokens, ranks)


def _chunks(work: Workload, ranks: int) -> Layout:
    return _chunk_layout(work.tokens, ranks, work.causal)


def _rows(work: Workload) -> int:
    """Numbers of one summary of all key heads: a mean and what stands beside it."""
    return work.batch * work.keys * (work.head_dim + 1)


def _reduced(ranks: int, size: int) -> int:
    return 2 * (ranks - 1) * size // ranks


def _packed(work: Workload, tokens: int) -> int:
    """Bytes of the 8-bit keys and values of one head: scales and sums are those of a `PackedKV`."""
    tiles = geometry.num_blocks(tokens, TILE)
    padded = -(-work.head_dim // 4) * 4
    return tiles * (TILE * (padded + work.values) + 4 + 4 * TILE + 8 * work.values)


def _parcel(work: Workload, tokens: int) -> int:
    """Bytes of keys and values that go around a ring."""
    if work.precision != "full":
        return work.batch * work.keys * _packed(work, tokens)
    return work.batch * work.keys * tokens * work.item * (work.head_dim + work.values)
