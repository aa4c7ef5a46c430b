"""Calls of `torch.nn.functional.scaled_dot_product_attention`, taken over wherever they are made while a mode is on.

A `TorchFunctionMode` sees every torch function that Python code of this thread calls: nothing is patched, and
torch.compile traces through it. `request_of` brings a call into the form that tamis answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn, overrides
from torch.autograd import forward_ad
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.overrides import TorchFunctionMode

from tamis.call import DTYPES
from tamis.integrations.request import Request

Segments = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Asked:
    """The arguments of one call, as torch names them."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def answer(self) -> Tensor:
        """What torch answers."""
        return F.scaled_dot_product_attention(
            self.query,
            self.key,
            self.value,
            self.attn_mask,
            self.dropout_p,
            self.is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
        )


class Interception(TorchFunctionMode):
    """While this mode is on, a function answers the calls.

    Args:
        answer: is given every call.
        miss: is told of every call of `nn.MultiheadAttention`, whose inner call no mode sees: torch hands the whole
            layer to modes, and runs what is inside of it with the mode off.
    """

    def __init__(self, answer: Callable[[Asked], Tensor], miss: Callable[[], None] | None = None) -> None:
        super().__init__()
        self._answer = answer
        self._miss = miss
        self.on = True

    def leave(self) -> None:
        """Turn the mode off, wherever it stands among the modes that are on.

        torch takes the latest mode off, whichever was meant: that may be somebody else's. In another thread than the
        one that turned it on, the mode stays among that thread's, where it hands every call on, until `sweep`.
        """
        if torch.compiler.is_compiling():
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # a graph has no other order
            return
        self.on = False
        sweep()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if not self.on:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._answer(Asked(*args, **kwargs))
        if func is F.multi_head_attention_forward and self._miss is not None and not kwargs.get("need_weights", True):
            self._miss()
        if func is Tensor.unflatten:
            # torch.compile cannot trace the method under a mode (it calls super()), and can this function.
            func = torch.unflatten
        return func(*args, **kwargs)


def sweep() -> None:
    """Take the interceptions that are off out of this thread's modes; all others stay as they stood."""
    modes = overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    left = [isinstance(mode, Interception) and not mode.on for mode in modes]
    if not any(left):
        return
    first = left.index(True)
    for _ in modes[first:]:
        overrides._pop_mode()  # type: ignore[no-untyped-call]
    for mode, gone in zip(modes[first:], left[first:], strict=True):
        if not gone:
            overrides._push_mode(mode)  # type: ignore[no-untyped-call]


def request_of(asked: Asked, layer: str, module: nn.Module | None = None) -> Request:
    """A call as a `Request`; what tamis cannot take over has an obstacle.

    Tensors of fewer than four dimensions get leading ones: see `as_asked`.
    """
    query, key, value = (_four_dims(_autocast(tensor)) for tensor in (asked.query, asked.key, asked.value))
    obstacle = _obstacle(asked, query, key, value)
    mask, causal, segments = None, asked.is_causal, None
    if obstacle is None and asked.attn_mask is not None:
        if isinstance(asked.attn_mask, CausalBias):
            causal = True
        else:
            mask, segments = _read_mask(asked.attn_mask, query, key.shape[2])
    return Request(
        layer=layer,
        module=module,
        query=query,
        key=key,
        value=value,
        mask=mask,
        causal=causal,
        window=None,
        segments=segments,
        scale=asked.scale,
        softcap=None,
        sink_logits=None,
        dropout=asked.dropout_p,
        obstacle=obstacle,
        original=lambda: _four_dims(asked.answer()),
    )


def as_asked(output: Tensor, asked: Asked) -> Tensor:
    """An output with as many dimensions as torch's: as the query, the key or the value, whichever has most."""
    extra = output.dim() - max(asked.query.dim(), asked.key.dim(), asked.value.dim())
    return output[(0,) * extra] if extra > 0 else output


def _four_dims(tensor: Tensor) -> Tensor:
    return tensor[(None,) * (4 - tensor.dim())] if tensor.dim() < 4 else tensor


def _autocast(tensor: Tensor) -> Tensor:
    """As autocast would hand it to the kernel."""
    kind = tensor.device.type
    if kind != "meta" and tensor.dtype in DTYPES and torch.is_autocast_enabled(kind):
        return tensor.to(torch.get_autocast_dtype(kind))
    return tensor


def _transformed() -> bool:
    """Whether derivatives are taken forwards, or a transform of torch.func (vmap, grad, ..) is at work."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def _obstacle(asked: Asked, query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why a call can only be torch's."""
    tensors, mask = (query, key, value), asked.attn_mask
    if query.device.type == "meta":
        return "tensors without data"
    dims = [tensor.dim() for tensor in (asked.query, asked.key, asked.value)]
    if any(tensor.layout != torch.strided or tensor.dim() != 4 for tensor in tensors):
        return f"tensors of {' and '.join(map(str, sorted(set(dims))))} dimensions, layout {asked.query.layout}"
    if len(set(dims)) > 1 or dims[0] < (3 if asked.enable_gqa else 2):
        return "shapes that torch broadcasts or refuses"
    if query.dtype not in DTYPES or key.dtype != query.dtype or value.dtype != query.dtype:
        return f"dtypes {query.dtype}, {key.dtype}, {value.dtype}"
    if asked.dropout_p > 0:
        return "dropout"
    if not torch.compiler.is_compiling() and _transformed():
        return "forward-mode derivatives or torch.func"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "gradients"
    heads = query.shape[1] == key.shape[1] or (asked.enable_gqa and query.shape[1] % key.shape[1] == 0)
    if (
        not heads
        or key.shape[:3] != value.shape[:3]
        or (query.shape[0], query.shape[3]) != (key.shape[0], key.shape[3])
    ):
        return "shapes that torch broadcasts or refuses"
    if isinstance(mask, CausalBias):
        # Whoever has one has loaded what it comes from, which takes as long as torch.
        top_left = mask.variant == CausalVariant.UPPER_LEFT
        if (mask.seq_len_q, mask.seq_len_kv) != (query.shape[2], key.shape[2]) or asked.is_causal:
            return "shapes that torch broadcasts or refuses"
    else:
        top_left = asked.is_causal
        if mask is not None and (asked.is_causal or mask.dim() > dims[0] or not _fits(mask, query, key)):
            return "shapes that torch broadcasts or refuses"
        if mask is not None and mask.dtype != torch.bool:
            return "additive mask"
    return "causal from the first key on" if top_left and query.shape[2] != key.shape[2] else None


def _fits(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    """Whether a mask says something of every query and key, and of nothing else."""
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if not 2 <= mask.dim() <= 4:
        return False
    return all(size == 1 or size == want for size, want in zip(mask.shape, full[-mask.dim() :], strict=True))


def _read_mask(mask: Tensor, query: Tensor, kv_len: int) -> tuple[Tensor | None, Segments | None]:
    """Split a bool mask into a complete mask and segments, one of them None; both None if all is visible.

    A mask alike for all rows is padding of the keys. Whether it hides anything is asked on a CPU only, for a device
    would have to be waited for, and not in a graph.
    """
    if (mask.dim() > 1 and mask.shape[-2] != 1) or (mask.dim() > 2 and mask.shape[-3] != 1):
        return _four_dims(mask), None
    tokens = mask.reshape(mask.shape[0] if mask.dim() == 4 else 1, mask.shape[-1]).expand(-1, kv_len)
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(tokens.all()):
        return None, None
    segments = tokens.to(torch.int32) - 1
    # Rows of padding are not told apart from others: in torch they see what all see.
    return None, (segments.new_zeros(segments.shape[0], query.shape[2]), segments)
