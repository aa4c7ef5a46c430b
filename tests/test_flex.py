"""FlexAttention, compiled for the CPU, as a second opinion on block masks: another team's kernel, given our lists."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from engines import Engine, engines
from samples import block_mask, qkv
from torch.nn.attention.flex_attention import flex_attention

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning"),
]


@pytest.fixture(scope="module")
def flex() -> Any:
    """Compiled once: compiling is what takes the time."""
    return torch.compile(flex_attention, fullgraph=True)


@pytest.mark.parametrize("causal", [False, True])
def test_same_lists_same_attention(flex: Any, causal: bool) -> None:
    """Both in fp32, so they differ by the order of their sums."""
    q, k, v = qkv(heads=2, q_len=512, dim=64)
    mask = block_mask((512, 512), heads=2, block_size=(128, 128), density=0.6)
    theirs = flex(q, k, v, block_mask=mask.to_flex(causal=causal))
    for engine in engines():
        ours = engine.attend(q, k, v, mask, causal=causal)
        seen = ours.lse > -math.inf
        assert seen.any()
        limit = 2 * torch.finfo(torch.float32).eps * math.sqrt(512) * float(theirs[seen].abs().max())
        assert float((ours.output[seen] - theirs[seen]).abs().max()) <= limit
        assert (ours.output[~seen] == 0).all()


def test_a_wrong_list_shows(flex: Any, any_engine: Engine) -> None:
    """The comparison can fail: one block more, and the two disagree."""
    q, k, v = qkv(heads=2, q_len=512, dim=64)
    mask = block_mask((512, 512), heads=2, block_size=(128, 128), density=0.6)
    dense = mask.to_dense()
    dense[0, 1, 2] = True
    other = type(mask).from_dense(dense, mask.block_size, mask.seq_lens)
    theirs = flex(q, k, v, block_mask=mask.to_flex(causal=False))
    ours = any_engine.attend(q, k, v, other).output
    assert float((ours - theirs)[0, 1, 256:384].abs().max()) > 1e-3
