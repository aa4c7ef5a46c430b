"""What serving engines call in each of their processes, by the entry points of this package.

vLLM (`vllm.general_plugins`) and SGLang (`sglang.srt.plugins`, `sglang.multimodal_gen.plugins`) call it whenever tamis
is installed beside them. It does nothing unless the environment says TAMIS_COMPAT=1; then it is `tamis.compat.install`.
"""

from __future__ import annotations

import os

from tamis.compat.alias import install

VARIABLE = "TAMIS_COMPAT"


def register() -> None:
    """`tamis.compat.install()` if the environment says TAMIS_COMPAT=1, else nothing.

    Raises:
        ValueError: the variable is neither 1 nor 0 nor empty.
        RuntimeError: as `install`.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE} must be 1, 0 or empty, got {asked!r}")
    if asked == "1":
        install()
