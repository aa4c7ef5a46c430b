"""Attention of ComfyUI's models through tamis, by the override that its attention functions ask for.

ComfyUI looks into `transformer_options["optimized_attention_override"]` at every attention call of a model and calls
what it finds there with the function that would have run and the call's own arguments:

    override(func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kw)

q, k, v are `[batch, seq, heads * head_dim]`, or with skip_reshape `[batch, heads, seq, head_dim]`; the output is
`[batch, seq, heads * head_dim]`, or with skip_output_reshape `[batch, heads, seq, head_dim]`. Nothing of ComfyUI is
imported here. examples/comfyui-tamis is the folder that goes into its custom_nodes.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tamis.attend import DEFAULT_PV_THRESHOLD, predict_and_attend
from tamis.backends.base import BACKENDS
from tamis.call import DTYPES, PerHead
from tamis.errors import UnsupportedError
from tamis.predictors import Sparge
from tamis.predictors.base import Predictor
from tamis.stats import AttentionStats

_LOG = logging.getLogger("tamis")
OPTION = "optimized_attention_override"
# Arguments that say how a call is made, not what it computes. `_inside_attn_wrapper` keeps ComfyUI from asking for the
# override again: it has to stay among those that the given function gets.
_HARMLESS = frozenset(("transformer_options", "_inside_attn_wrapper"))
_HONOURED = frozenset(("scale", "enable_gqa", "low_precision_attention"))


@dataclass
class Override:
    """An attention override that runs sparse what it can and hands the rest, with a counted reason, to the function.

    Args:
        predictor: which blocks to keep; None = `Sparge()`.
        precision: "int8", "fp8" or "full". A call that asks for fp32 (`attn_precision`) runs in "full".
        pv_threshold, backend: as in `tamis.attend`.
        min_tokens: calls with fewer queries or keys go to the function, as those to a short prompt do.
        previous: another override, which gets the calls that this one does not run.

    Attributes:
        calls: how many ran "sparse" and "dense".
        reasons: why calls went to the function, and how many.
        last: stats of the last sparse call.

    Example:
        >>> import torch
        >>> from torch.nn.functional import scaled_dot_product_attention
        >>> def func(q, k, v, heads, **options):
        ...     q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        ...     return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        >>> override = Override(min_tokens=256)
        >>> x = torch.randn(1, 512, 128)
        >>> override(func, x, x, x, 2).shape, override(func, x, x[:, :77], x[:, :77], 2).shape
        (torch.Size([1, 512, 128]), torch.Size([1, 512, 128]))
        >>> override.calls, override.reasons
        ({'sparse': 1, 'dense': 1}, Counter({'fewer than 256 keys': 1}))
    """

    predictor: Predictor | None = None
    precision: str = "int8"
    pv_threshold: PerHead | None = DEFAULT_PV_THRESHOLD
    backend: str | None = None
    min_tokens: int = 1024
    previous: Callable[..., Any] | None = None
    calls: dict[str, int] = field(default_factory=lambda: {"sparse": 0, "dense": 0}, init=False)
    reasons: Counter[str] = field(default_factory=Counter, init=False)
    last: AttentionStats | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.precision not in ("int8", "fp8", "full"):
            raise ValueError(f"precision must be 'int8', 'fp8' or 'full', got {self.precision!r}")
        if isinstance(self.min_tokens, bool) or not isinstance(self.min_tokens, int) or self.min_tokens < 0:
            raise ValueError(f"min_tokens must be a whole number of at least 0, got {self.min_tokens!r}")
        if self.backend not in (None, *BACKENDS):
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {self.backend!r}")
        if self.predictor is not None and not callable(self.predictor):
            raise TypeError(f"predictor must be a predictor, as tamis.Sparge(topk=0.5), got {self.predictor!r}")
        if self.predictor is None:
            self.predictor = Sparge()

    def __call__(
        self,
        func: Callable[..., Any],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kw: Any,
    ) -> Any:
        """Attention as `func` has it, in its layouts."""
        reason = self._obstacle((q, k, v), heads, mask, skip_reshape, kw)
        if reason is None:
            try:
                output = self._sparse((q, k, v), heads, mask, attn_precision, skip_reshape, kw)
                return output if skip_output_reshape else output.transpose(1, 2).flatten(2)
            except UnsupportedError as error:
                if self.backend is not None:
                    raise
                reason = str(error).splitlines()[0]
        self.calls["dense"] += 1
        self.reasons[reason] += 1
        if self.reasons[reason] == 1:
            _LOG.info("tamis: an attention call of this model runs as before: %s", reason)
        options = {"mask": mask, "attn_precision": attn_precision, "skip_reshape": skip_reshape, **kw}
        options["skip_output_reshape"] = skip_output_reshape
        if self.previous is not None:
            return self.previous(func, q, k, v, heads, **options)
        return func(q, k, v, heads, **options)

    def _sparse(
        self,
        qkv: tuple[Tensor, ...],
        heads: int,
        mask: Tensor | None,
        attn_precision: torch.dtype | None,
        skip_reshape: bool,
        kw: dict[str, Any],
    ) -> Tensor:
        query, key, value = qkv
        if not skip_reshape:
            dim = query.shape[2] // heads
            query, key, value = (torch.unflatten(tensor, 2, (-1, dim)).transpose(1, 2) for tensor in qkv)
        if mask is not None:  # [queries, keys] and [batch, queries, keys] are all heads'
            mask = mask[None] if mask.dim() == 2 else mask
            mask = mask[:, None] if mask.dim() == 3 else mask
        assert self.predictor is not None
        result = predict_and_attend(
            query,
            key,
            value,
            self.predictor,
            {"causal": False, "attn_mask": mask, "scale": kw.get("scale"), "positions": None, "backend": self.backend},
            precision="full" if attn_precision == torch.float32 else self.precision,
            pv_threshold=self.pv_threshold,
        )
        if self.calls["sparse"] == 0:
            _LOG.info("tamis: attention of this model runs sparse")
        self.calls["sparse"] += 1
        self.last = result.stats
        return result.output

    def _obstacle(
        self, qkv: tuple[Tensor, ...], heads: int, mask: Tensor | None, skip_reshape: bool, kw: dict[str, Any]
    ) -> str | None:
        """Why a call goes to the function, or None."""
        q, k, v = qkv
        for name, item in kw.items():
            if name not in _HARMLESS | _HONOURED and item is not None and item is not False:
                return f"argument {name}"
        if kw.get("low_precision_attention", True) is False:
            return "low_precision_attention=False"
        if q.dtype not in DTYPES or any(tensor.dtype != q.dtype for tensor in (k, v)):
            return f"dtypes {q.dtype}, {k.dtype}, {v.dtype}"
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in qkv):
            return "gradients"
        sequence = 2 if skip_reshape else 1
        if q.dim() != (4 if skip_reshape else 3) or (q.shape[1] != heads if skip_reshape else q.shape[2] % heads):
            return f"a layout of shape {tuple(q.shape)} for {heads} heads"
        if k.shape[-1] != q.shape[-1] and not kw.get("enable_gqa", False):
            return f"keys of shape {tuple(k.shape)} for queries of shape {tuple(q.shape)}"
        for name, tensor in (("queries", q), ("keys", k)):
            if tensor.shape[sequence] < self.min_tokens:
                return f"fewer than {self.min_tokens} {name}"
        if mask is not None and mask.dim() not in (2, 3, 4):
            return f"a mask with {mask.dim()} dimensions"
        return None


def patch(model: Any, override: Override) -> Any:
    """A clone of a ComfyUI MODEL whose attention goes through the override, and then to the override it had, if any.

    Args:
        model: anything with `.clone()` and the mapping `.model_options`, as ComfyUI's ModelPatcher.

    Returns:
        The clone; the model is as it was.
    """
    clone = model.clone()
    options = dict(clone.model_options.get("transformer_options", {}))
    previous = options.get(OPTION)
    if isinstance(previous, Override) and previous.reasons is override.reasons:
        previous = previous.previous  # patched twice: once is enough
    own = copy.copy(override)  # what comes after is this model's affair; the counts stay those of the override
    own.previous = previous if previous is not None else override.previous
    options[OPTION] = own
    clone.model_options = {**clone.model_options, "transformer_options": options}
    return clone
