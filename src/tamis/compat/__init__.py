"""The names and argument lists of the authors' package `spas_sage_attn`, on tamis: code written for it runs here.

arguments.py  what their arguments mean;  functions.py  their functions;  autotune.py  their tuned module
search.py     how it is tuned;  utils.py  a helper
alias.py      `import spas_sage_attn` on request;  plugin.py  the same, called by serving engines;  __main__.py  and
              for whole programs

docs/engines.md says what to type in which engine.
"""

from tamis.compat.alias import install, uninstall
from tamis.compat.autotune import (
    SparseAttentionMeansim,
    extract_sparse_attention_state_dict,
    load_sparse_attention_state_dict,
)
from tamis.compat.functions import (
    block_sparse_sage2_attn_cuda,
    spas_sage2_attn_meansim_cuda,
    spas_sage2_attn_meansim_topk_cuda,
)

__all__ = [
    "SparseAttentionMeansim",
    "block_sparse_sage2_attn_cuda",
    "extract_sparse_attention_state_dict",
    "install",
    "load_sparse_attention_state_dict",
    "spas_sage2_attn_meansim_cuda",
    "spas_sage2_attn_meansim_topk_cuda",
    "uninstall",
]
