"""`import spas_sage_attn` for tamis, from when the user asks for it to when he takes it back."""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from tamis.compat import autotune, functions, utils

PACKAGE = "spas_sage_attn"
_FUNCTIONS = (
    "block_sparse_sage2_attn_cuda",
    "spas_sage2_attn_meansim_cuda",
    "spas_sage2_attn_meansim_topk_cuda",
)
# The functions of the authors' older kernels take the same arguments; here the numbers are rounded the same way.
_OLDER = {
    "spas_sage_attn_meansim_cuda": "spas_sage2_attn_meansim_cuda",
    "spas_sage_attn_meansim_topk_cuda": "spas_sage2_attn_meansim_topk_cuda",
}
CHILDREN = Path(__file__).parent / "children"
_MARK = "__tamis__"


def install() -> None:
    """Make tamis importable as `spas_sage_attn`, with its submodules `core`, `autotune` and `utils`, in this process.

    Safe to call twice.

    Raises:
        RuntimeError: the authors' own package is installed or imported: it stays what it is.

    Example:
        >>> import tamis.compat
        >>> tamis.compat.install()
        >>> from spas_sage_attn import spas_sage2_attn_meansim_topk_cuda
        >>> from spas_sage_attn.autotune import SparseAttentionMeansim
        >>> tamis.compat.uninstall()
    """
    if _ours():
        return
    if PACKAGE in sys.modules or _installed():
        place = getattr(sys.modules.get(PACKAGE), "__file__", None)
        raise RuntimeError(
            f"{PACKAGE} is already {'imported' if PACKAGE in sys.modules else 'installed'}"
            f"{f' from {place}' if place else ''}, and tamis does not shadow it: uninstall it, or import tamis.compat "
            "by its own name"
        )
    for module in _modules():
        sys.modules[module.__name__] = module


def uninstall() -> None:
    """Undo `install`; code that has imported names keeps them. Safe to call twice."""
    if _ours():
        for name in [name for name in sys.modules if name == PACKAGE or name.startswith(f"{PACKAGE}.")]:
            del sys.modules[name]


def install_in_children() -> None:
    """Let every Python that this process starts find tamis under that name too, by a folder on its path.

    `PYTHONPATH` is for new programs; multiprocessing hands its children the parent's `sys.path` instead.
    """
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(CHILDREN) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([path for path in paths if path] + [str(CHILDREN)])
    if str(CHILDREN) not in sys.path:
        sys.path.append(str(CHILDREN))


def _installed() -> bool:
    """Whether the authors' package can be imported."""
    path = sys.path[:]
    sys.path[:] = [place for place in path if place != str(CHILDREN)]
    try:
        return importlib.util.find_spec(PACKAGE) is not None
    finally:
        sys.path[:] = path


def _ours() -> bool:
    return hasattr(sys.modules.get(PACKAGE), _MARK)


def _modules() -> list[ModuleType]:
    """The package and its submodules. They have specs, by which others ask whether a package is there."""
    package = _module(PACKAGE, is_package=True)
    core = _module(f"{PACKAGE}.core")
    tuner, helpers = _module(f"{PACKAGE}.autotune"), _module(f"{PACKAGE}.utils")
    for module in (package, core):
        for name in _FUNCTIONS:
            setattr(module, name, getattr(functions, name))
        for name, newer in _OLDER.items():
            setattr(module, name, getattr(functions, newer))
    for module, source in ((tuner, autotune), (helpers, utils)):
        for name in source.__all__:
            setattr(module, name, getattr(source, name))
    for module in (core, tuner, helpers):
        setattr(package, module.__name__.rpartition(".")[2], module)
    return [package, core, tuner, helpers]


def _module(name: str, *, is_package: bool = False) -> ModuleType:
    module = ModuleType(name, "Names of the authors of SpargeAttn, made by tamis.compat.")
    module.__spec__ = ModuleSpec(name, None, origin="tamis.compat", is_package=is_package)
    module.__package__ = PACKAGE
    if is_package:
        module.__path__ = []
    setattr(module, _MARK, True)
    return module
