"""What a transformers model may see, without the complete mask where transformers lets us.

transformers asks for a mask once, before the layers run, and hands what it got to each of them. Most masks say little:
causal, a window, padding, packed documents. These are handed over as key codes, int32 `[batch, planes, 1, kv_len]`; the
dtype tells them from masks, which are bool or floating. Plane 0 is 0 for padding, else the window (`_NO_WINDOW` without
one). Plane 1, if there is one, is the number of the document that a token belongs to. Models may cut a mask's rows, so
there is one row, which cutting leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Pattern = Callable[..., Any]
# Where packed documents end, as transformers tells flash attention; what follows from it.
OFFSETS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_NO_WINDOW = 2**31 - 1


class Sight(NamedTuple):
    """What a mask says: a complete mask, or a window and segments.

    Attributes:
        packed: whether segments number documents; else 0 is a token and -1 padding.
    """

    mask: Tensor | None = None
    window: int | None = None
    segments: tuple[Tensor, Tensor] | None = None
    packed: bool = False


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Pattern | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    shards: bool = False,
    packing: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """What transformers asks for before a forward pass: None for plain causal, key codes for causal with a window,
    padding or packed documents, and the complete bool mask for everything else.

    `shards`: the tokens are a part of longer texts, whose padding and documents are known elsewhere (`Shards`).
    `packing`: False for a model that works on complete masks itself.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    pattern: Pattern = causal_mask_function if mask_function is None else mask_function
    aligned = not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length
    window = local_size if local_size is not None and (shards or kv_length > local_size) else None
    # A pattern of indices goes on beyond a shard: attention in chunks and a window differ from there on only.
    length = max(kv_length, window + 2) if shards and window is not None else kv_length
    sizes = (batch_size, q_length, length)
    if torch.compiler.is_compiling():
        if allow_is_causal_skip and aligned and attention_mask is None and local_size is None:
            return None
    elif allow_is_causal_skip and aligned and _is_causal(pattern, sizes, kv_offset, window, device):
        return _causal_codes(batch_size, kv_length, kv_offset, None if shards else attention_mask, window, device)
    elif packing and q_length == kv_length and attention_mask is None and (found := _packing(pattern)) is not None:
        inside, documents = found
        if _is_causal(inside, sizes, 0, window, device):
            codes = torch.full_like(documents, _NO_WINDOW if window is None else window, dtype=torch.int32)
            return torch.stack([codes, documents.to(torch.int32)], dim=1)[:, :, None]
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # type: ignore[arg-type]  # a tensor with static caches
        kv_offset=kv_offset,
        mask_function=pattern,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        device=device,
        **kwargs,
    )


def _causal_codes(
    batch: int,
    keys: int,
    kv_offset: int,
    attention_mask: Tensor | None,
    window: int | None,
    device: torch.device | str,
) -> Tensor | None:
    """Codes of a causal mask; None if there is neither window nor padding."""
    from transformers.masking_utils import prepare_padding_mask

    padding = prepare_padding_mask(attention_mask, keys, kv_offset)
    tokens = None if padding is None else padding[:, kv_offset : kv_offset + keys].to(torch.bool)
    if tokens is None or bool(tokens.all()):
        if window is None:
            return None
        tokens = torch.ones(batch, keys, dtype=torch.bool, device=device)
    codes = tokens.to(torch.int32) * (_NO_WINDOW if window is None else window)
    return codes[:, None, None, :]


def _is_causal(
    pattern: Pattern,
    sizes: tuple[int, int, int],
    offset: int,
    window: int | None,
    device: torch.device | str,
) -> bool:
    """Whether a pattern is causal, with a window if one is given, judged by its last two rows of every text.

    The other pattern with a local size, attention in chunks, agrees with a window in at most one of two adjacent rows.
    """
    batch, queries, keys = sizes
    last = offset + keys - 1
    texts = torch.arange(batch, device=device)[:, None, None]
    zero = torch.zeros((), dtype=torch.long, device=device)
    rows = torch.arange(last - min(queries, 2) + 1, last + 1, device=device)[:, None]
    columns = torch.arange(offset, offset + keys, device=device)[None, :]
    distance = rows - columns
    expected = (distance >= 0) & (distance < (keys + 1 if window is None else window))
    return bool((pattern(texts, zero, rows, columns) == expected).all())


def _packing(pattern: Pattern) -> tuple[Pattern, Tensor] | None:
    """Of a pattern that transformers made for packed documents: what holds inside of each of them, by position, and the
    number of every token's, `[batch, tokens]`. Positions go up by one inside of a document, so that a causal pattern or
    a window of positions is one of places.

    A pattern says nothing of itself, so this looks at what transformers' functions close over. Where that changes, the
    complete mask is made as for any other pattern.
    """
    parts = _closed_over(pattern, "and_masks").get("mask_functions", ())
    documents, inside = None, None
    for part in parts:
        documents = _closed_over(part, "packed_sequence_mask_function").get("packed_sequence_mask", documents)
        inside = _closed_over(part, "remap_positions_for_packed_sequence").get("mask_function", inside)
    if len(parts) != 2 or inside is None or not isinstance(documents, Tensor):
        return None
    return inside, documents


def _closed_over(function: Any, maker: str) -> dict[str, Any]:
    """The variables of a function that another function of transformers made; none if some other function did."""
    made = getattr(function, "__module__", None), getattr(function, "__qualname__", "").split(".")[0]
    if made != ("transformers.masking_utils", maker) or function.__closure__ is None:
        return {}
    return {
        name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, function.__closure__, strict=True)
    }


def read_mask(mask: Tensor | None, queries: int, keys: int) -> Sight:
    """What `mask_function` returned, or a mask of the caller's own."""
    if mask is None or mask.dtype != torch.int32:
        return Sight(mask)
    codes = mask[:, 0, 0, :keys]
    found = int(codes.max())
    window = None if found in (0, _NO_WINDOW) else found
    if mask.shape[1] == 2:
        documents = mask[:, 1, 0, :keys]
        return Sight(None, window, (documents[:, keys - queries :], documents), packed=True)
    segments = (codes > 0).to(torch.int32) - 1
    padded = bool((segments < 0).any())
    return Sight(None, window, (segments[:, keys - queries :], segments) if padded else None)


def packed(sight: Sight, query: Tensor, key: Tensor, extra: Mapping[str, Any]) -> Tensor | None:
    """Numbers of the documents of one row, int32 `[1, tokens]`, from offsets as flash attention takes them.

    None where there are none, or they are not those of these tokens, or something else than documents hides tokens. Not
    in a graph, where offsets cannot be read.
    """
    offsets, of_keys = extra.get("cu_seq_lens_q"), extra.get("cu_seq_lens_k")
    hidden = sight.mask is not None or (sight.segments is not None and not sight.packed)
    if hidden or torch.compiler.is_compiling() or not (isinstance(offsets, Tensor) and isinstance(of_keys, Tensor)):
        return None
    tokens = query.shape[2]
    if query.shape[0] != 1 or key.shape[2] != tokens or offsets.dim() != 1 or not torch.equal(offsets, of_keys):
        return None
    if int(offsets[0]) != 0 or int(offsets[-1]) != tokens or bool((offsets.diff() < 0).any()):
        return None
    places = torch.arange(tokens, device=query.device)
    documents = torch.searchsorted(offsets[1:].to(query.device, torch.long), places, right=True).to(torch.int32)[None]
    if sight.segments is None:
        return documents
    # Positions start again as well: whatever begins a document by either begins one.
    begins = torch.zeros_like(documents)
    begins[:, 1:] = (documents.diff(dim=1) != 0) | (sight.segments[0].diff(dim=1) != 0)
    return begins.cumsum(1, dtype=torch.int32)
