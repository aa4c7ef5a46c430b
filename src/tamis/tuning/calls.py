"""One attention call as a layer of a model made it: what tuning looks at."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tamis import geometry


@dataclass(frozen=True, eq=False)
class LayerCall:
    """Tensors `[1, heads, seq, head_dim]`; key and value may have fewer heads.

    Attributes:
        layer: qualified name of the attention module.
        input: which of the inputs, from 0.
        step: how often the layer had been called before on this input, whether tuning could judge those calls or not.
        batch: which of the batch.
    """

    layer: str
    input: int
    step: int
    batch: int
    query: Tensor
    key: Tensor
    value: Tensor
    causal: bool
    window: int | None
    scale: float | None

    @property
    def groups(self) -> int:
        """Query heads that share a key head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def factor(self) -> float:
        """The factor of q.k."""
        return float(self.query.shape[-1] ** -0.5) if self.scale is None else self.scale

    def full(self) -> LayerCall:
        """The same call in fp32."""
        q, k, v = (t.float() for t in (self.query, self.key, self.value))
        return replace(self, query=q, key=k, value=v)

    def visible(self, first: int, last: int, keys: int) -> Tensor | None:
        """Pairs of the queries first .. last - 1 and the first keys that are visible, or None if all are."""
        if not self.causal and self.window is None:
            return None
        q_at, k_at = geometry.default_positions(self.query.shape[2], self.key.shape[2], self.query.device)
        return geometry.visible_pairs(
            q_at[:, first:last], k_at[:, :keys], None, None, causal=self.causal, window=self.window
        )[0]


def exact_output(call: LayerCall) -> Tensor:
    """Dense attention in fp32 by torch, whatever the caller's autocast says."""
    with torch.autocast(call.query.device.type, enabled=False):
        return dense_output(call.full())


def dense_output(call: LayerCall) -> Tensor:
    """Dense attention by torch in the dtype of the call."""
    q, k, v = call.query, call.key, call.value
    whole = q.shape[2] == k.shape[2]
    mask = None
    if call.window is not None or (call.causal and not whole):
        mask = call.visible(0, q.shape[2], k.shape[2])
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask, is_causal=call.causal and mask is None, scale=call.scale, enable_gqa=call.groups > 1
    )


def refuse_not_finite(call: LayerCall, sizes: Tensor) -> None:
    """Refuse a call whose dense output, or its size, is not finite: no error can be told there.

    Raises:
        ValueError: it names the call.
    """
    if not bool(sizes.isfinite().all()):
        raise ValueError(
            f"dense attention of layer {call.layer} is not finite (nan or inf in its query, key or value), in call "
            f"{call.step} of input {call.input}, both counted from 0: there is no error to keep within a budget"
        )
