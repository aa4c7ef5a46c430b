"""Attention over several devices: a sequence spread over the ranks of a process group, in two modes, and a planner."""

from tamis.parallel.attention import attend, exchange_layout, layer_attention, sparse_attention
from tamis.parallel.diffusers import from_diffusers
from tamis.parallel.layout import Layout
from tamis.parallel.planning import Plan, Speeds, Workload, plan
from tamis.parallel.wire import Traffic

__all__ = [
    "Layout",
    "Plan",
    "Speeds",
    "Traffic",
    "Workload",
    "attend",
    "exchange_layout",
    "from_diffusers",
    "layer_attention",
    "plan",
    "sparse_attention",
]
