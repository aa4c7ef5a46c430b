"""What the shards of one text tell each other before a transformers model runs on them.

The library finds packed documents by positions that do not go on, and padding by a mask. A shard shows neither the
document that began on another rank nor the padding of another one, and a document that ends where a shard ends leaves
no trace at all. So the ranks exchange, once for every run of the model, what their own tokens look like, and all of
them come to the same documents and the same padding, or to the same error.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tamis.errors import UnsupportedError
from tamis.integrations.mine import Mine

if TYPE_CHECKING:
    from tamis.parallel.wire import Peers

_NOWHERE = -1  # first and last position where a rank has padding only
_MASKS = ("no attention_mask", "an attention_mask of its tokens", "another attention_mask")


class Shards:
    """Documents and padding of this rank's tokens while a model runs.

    Attributes:
        segments: of this rank's tokens, int64 `[batch | 1, tokens]`: their document, -1 for padding; None where no rank
            has either.
    """

    def __init__(self, peers: Callable[[], Peers]) -> None:
        self._peers = peers
        self._inside: list[object] = []  # parts of the model that are running, the outermost first
        self.segments: Tensor | None = None

    def follow(self, model: nn.Module) -> list[RemovableHandle]:
        """Exchange before every run of a model, or of a part of it that takes positions by itself.

        Raises:
            UnsupportedError: nothing in the model takes `position_ids`: it would number every shard from 0.
        """
        from transformers import PreTrainedModel

        parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
        parts = [part for part in parts if {"position_ids", "attention_mask"} <= set(_names(part))]
        if not parts:
            raise UnsupportedError(
                f"mesh must be None with {type(model).__name__}: it takes no position_ids, so it cannot know where a "
                "rank's tokens stand"
            )
        handles: list[RemovableHandle] = []
        for part in parts:
            handles.append(part.register_forward_pre_hook(Mine(self._enter), with_kwargs=True))
            handles.append(part.register_forward_hook(Mine(self._leave), always_call=True))
        return handles

    def _enter(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        self._inside.append(module)
        if len(self._inside) > 1:
            return None  # a part of what has exchanged already
        names = _names(module)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        tokens = next(x for name in ("input_ids", "inputs_embeds") if (x := given.get(name)) is not None)
        self.segments, documents = _agreed(tokens, given, _cached(module, given), self._peers())
        if not documents:
            return None
        # Given a mask, the library looks for no documents; those it finds in a shard would be a mask of the shard.
        seen, at = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device), names.index("attention_mask")
        if at < len(args):
            return (*args[:at], seen, *args[at + 1 :]), kwargs
        return args, {**kwargs, "attention_mask": seen}

    def _leave(self, module: object, args: object, output: object) -> None:
        if not self._inside or self._inside[-1] is not module:
            return  # another hook failed before this one could enter
        self._inside.pop()
        if not self._inside:
            self.segments = None
            if output is None:  # the run failed
                self._peers().failed()


def _names(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _cached(module: Any, given: dict[str, Any]) -> bool:
    """Whether the model keeps its keys, of which the library asks before it looks for documents."""
    asked = given.get("use_cache")
    asked = getattr(module.config.get_text_config(), "use_cache", False) if asked is None else asked
    return bool(asked) or given.get("past_key_values") is not None


def _agreed(tokens: Tensor, given: dict[str, Any], cached: bool, at: Peers) -> tuple[Tensor | None, bool]:
    """Segments of this rank's tokens, and whether they are documents.

    Raises:
        ValueError: on every rank: one of them has no positions or no tokens, or they were called differently.
    """
    positions: Tensor | None = given.get("position_ids")
    mask: Any = given.get("attention_mask")
    own = isinstance(mask, Tensor) and mask.shape == tokens.shape[:2]
    kind = 0 if mask is None else 1 if own else 2
    padded = kind == 1 and not bool(mask.all())
    rows = at.tell("model", [positions is not None, padded, tokens.shape[1], tokens.shape[0], cached, kind])
    if at.size > 1 and not all(row[0] for row in rows):
        raise ValueError("position_ids must be given on every rank: where its tokens stand in the whole sequence")
    if not all(row[2] for row in rows):
        raise ValueError(f"every rank must have tokens, got {[row[2] for row in rows]}")
    if len({tuple(row[3:]) for row in rows}) > 1:
        shown = [f"{row[3]} texts, {'a' if row[4] else 'no'} cache, {_MASKS[row[5]]}" for row in rows]
        raise ValueError(f"ranks disagree: all must call the model alike, got {shown}")
    padded = any(row[1] for row in rows)
    segments = mask.to(torch.int64).ne(0).long() - 1 if padded else None
    places = None if positions is None else _places(positions)
    places = None if places is None else places.expand(tokens.shape[0], -1)
    if places is None:
        return segments, False
    if cached or kind:  # the library does not look for documents either: it is one text
        _refuse_gaps(places, segments, at)
        return segments, False
    documents = _documents(places, tokens, at)
    return documents, documents is not None


def _places(positions: Tensor) -> Tensor | None:
    """Positions in the text, `[batch | 1, tokens]`; of positions with several axes the library reads a fourth."""
    if positions.dim() == 3:
        return positions[0] if positions.shape[0] == 4 else None
    return positions[None] if positions.dim() == 1 else positions


def _refuse_gaps(places: Tensor, segments: Tensor | None, at: Peers) -> None:
    """Raise on all ranks if one's tokens do not go on where those of the rank before end; padding does not count."""
    ends = []
    for row, own in enumerate(places):
        seen = own if segments is None else own[segments[min(row, len(segments) - 1)] == 0]
        ends += [int(seen[0]), int(seen[-1])] if len(seen) else [_NOWHERE, _NOWHERE]
    rows = at.tell("documents", ends)
    for first, last in zip(range(0, len(ends), 2), range(1, len(ends), 2), strict=True):
        there = [rank for rank, row in enumerate(rows) if row[first] != _NOWHERE]
        for before, rank in itertools.pairwise(there):
            if rows[rank][first] != rows[before][last] + 1:
                raise ValueError(
                    f"position_ids must go on from rank to rank: rank {before} ends at {rows[before][last]} and rank "
                    f"{rank} begins at {rows[rank][first]}. Give every rank its own part of the text and the positions "
                    "of that part in the whole; documents in one sequence go without attention_mask, and with "
                    "use_cache=False"
                )


def _documents(places: Tensor, tokens: Tensor, at: Peers) -> Tensor | None:
    """Numbers of the documents of own tokens, counted over all ranks; None if every text is a single one.

    Raises:
        ValueError: on every rank: all were given the same tokens.
    """
    inside = torch.nn.functional.pad(places.diff(dim=1) != 1, (1, 0)).cumsum(1)
    ends = torch.stack([places[:, 0], places[:, -1], inside[:, -1]], 1).flatten().tolist()
    whole = zlib.crc32(tokens.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    rows = at.tell("documents", [whole, *ends])
    if at.size > 1 and all(row == rows[0] for row in rows):
        raise ValueError(
            "every rank must have its own part of the text: all were given the same tokens at the same positions"
        )
    first, last, breaks = torch.tensor([row[1:] for row in rows]).view(at.size, -1, 3).unbind(2)  # [ranks, batch]
    if at.size > 1 and not breaks.any() and not first.any():
        warnings.warn(
            "position_ids are 0 where the tokens of every rank begin, so each rank has a document of its own. If it is "
            "one text, give the positions in the whole of it",
            stacklevel=2,
        )
    breaks[1:] += first[1:] != last[:-1] + 1
    if not breaks.any():
        return None
    before = breaks[: at.rank + 1].sum(0).to(inside.device) - inside[:, -1]
    return inside + before[:, None]
