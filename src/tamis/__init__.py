"""Sparse, quantised attention for any model: predict the blocks that matter, compute those, report what it cost."""

from tamis.attend import attend, attend_varlen, pack_kv, sparse_attention
from tamis.block_mask import BlockMask
from tamis.errors import UnsupportedError
from tamis.integrations.apply import apply
from tamis.integrations.sdpa import sdpa
from tamis.merge import merge
from tamis.packed import PackedKV
from tamis.predictors import Antidiagonal, Oracle, Probe, QuerySampled, Random, Sparge, VerticalSlash, Window
from tamis.profile import Profile
from tamis.stats import AttentionOutput, AttentionStats
from tamis.tuning import tune

__all__ = [
    "Antidiagonal",
    "AttentionOutput",
    "AttentionStats",
    "BlockMask",
    "Oracle",
    "PackedKV",
    "Probe",
    "Profile",
    "QuerySampled",
    "Random",
    "Sparge",
    "UnsupportedError",
    "VerticalSlash",
    "Window",
    "apply",
    "attend",
    "attend_varlen",
    "merge",
    "pack_kv",
    "sdpa",
    "sparse_attention",
    "tune",
]
