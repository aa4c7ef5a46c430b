"""`python -m tamis.compat [-m MODULE | SCRIPT] ARGUMENTS`: run a program that imports `spas_sage_attn`, on tamis.

The Python processes that the program starts get it too.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from tamis.compat.alias import install, install_in_children

USAGE = "usage: python -m tamis.compat [-m MODULE | SCRIPT] [ARGUMENTS ..]"


def main(arguments: Sequence[str]) -> int:
    """Install and run; 2 if there is nothing to run."""
    by_name = list(arguments[:1]) == ["-m"]
    rest = list(arguments[1:] if by_name else arguments)
    if not rest or rest[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        return 2
    install()
    install_in_children()
    sys.argv = rest
    if by_name:
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(rest[0]).resolve().parent)
        runpy.run_path(rest[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
