"""Kernels as plain Python functions: their source, with the language and all they call replaced by emulated ones."""

from __future__ import annotations

import ast
import functools
import inspect
import random
import textwrap
import types
from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from emulator import language, machine
from emulator.hopper import Descriptor
from emulator.pointers import Memory, Pointer
from emulator.values import KernelError, scalar

Mutation = Callable[[str, str], str]


class Source:
    """The kernels of a run as Python functions; each is made once.

    Args:
        mutation: from the name and the source of a function to the source that is run.
    """

    def __init__(self, mutation: Mutation | None = None) -> None:
        self.mutation = mutation
        self.made: dict[Any, Callable[..., Any]] = {}

    def function(self, kernel: Any) -> Callable[..., Any]:
        """A kernel as a function on values."""
        plain = kernel.fn
        if plain in self.made:
            return self.made[plain]
        text = textwrap.dedent("".join(kernel.raw_src))
        if self.mutation is not None:
            text = self.mutation(plain.__name__, text)
        code, names = _compiled(text, kernel.starting_line_number, inspect.getfile(plain))
        scope: dict[str, Any] = {"_to_tensor": language.to_tensor, "_span": language.span}
        exec(code, scope)
        made = scope[plain.__name__]
        self.made[plain] = made
        for name in names & plain.__globals__.keys():
            scope[name] = self.translated(plain.__globals__[name])
        return made

    def translated(self, thing: Any) -> Any:
        """What stands for a global of a kernel."""
        if isinstance(thing, types.ModuleType):
            return _Room(thing, self)
        if thing is tl.constexpr:
            return _constant
        if thing is tl.static_range:
            return language.static_range
        if thing is tl.range:
            return language.span
        if isinstance(thing, tl.constexpr):
            return thing.value
        if hasattr(thing, "__triton_builtin__"):
            return _builtin(thing)
        if isinstance(thing, JITFunction):
            return _builtin(thing.fn) if thing.fn.__module__.startswith("triton.") else self.function(thing)
        return thing


@functools.cache
def _compiled(text: str, line: int, file: str) -> tuple[types.CodeType, set[str]]:
    """A function of a kernel, for `exec`, and the names that it uses."""
    tree = ast.parse(text)
    (definition,) = tree.body
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    ast.increment_lineno(tree, line - 1)
    return compile(ast.fix_missing_locations(_Casts().visit(tree)), file, "exec"), names


class _Room:
    """A module, with everything taken from it translated."""

    def __init__(self, module: types.ModuleType, source: Source) -> None:
        self.module, self.source = module, source

    def __getattr__(self, name: str) -> Any:
        return self.source.translated(getattr(self.module, name))


class _Casts(ast.NodeTransformer):
    """`x.to(..)` also where x is a number of Python, which the compiler makes a scalar; and `range` of the device."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "to":
            node.func.value = ast.Call(ast.Name("_to_tensor", ast.Load()), [node.func.value], [])
        elif isinstance(node.func, ast.Name) and node.func.id == "range":
            node.func.id = "_span"
        return node


def _constant(x: Any) -> Any:
    return x.value if isinstance(x, tl.constexpr) else x


def _builtin(function: Any) -> Any:
    room = function.__module__.split(".")[-1]
    known = language.FUNCTIONS.get(room, language.FUNCTIONS[""])
    if function.__name__ in known:
        return known[function.__name__]

    def unknown(*arguments: Any, **options: Any) -> Any:
        raise NotImplementedError(f"the emulator has no {function.__module__}.{function.__name__}")

    return unknown


def argument(x: Any, name: str) -> Any:
    """What a kernel gets for an argument of the host."""
    if isinstance(x, torch.Tensor):
        return Pointer(Memory(x, name), torch.tensor(x.storage_offset()))
    if isinstance(x, TensorDescriptor):
        return Descriptor(Memory(x.base, name), x.shape, x.strides, x.block_shape, x.layout)
    if isinstance(x, (tuple, list)):
        return tuple(argument(part, f"{name}[{index}]") for index, part in enumerate(x))
    return x if x is None else scalar(x)


def run(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    seed: int = 0,
    races: bool = True,
    source: Source | None = None,
    **constants: Any,
) -> None:
    """Run a kernel on CPU tensors, one program after the other in an order drawn from the seed.

    Args:
        seed: which of the orders in which things may happen.
        races: whether accesses that nothing orders raise; else they see what chance and poison make of them.
        source: where the kernel's functions come from, if they are to be kept or changed.

    Raises:
        KernelError: what the kernel does is wrong, in this order or in another.
    """
    if len(grid) != 1:
        raise KernelError(f"the emulator runs grids of one axis, not {grid}")
    function = (source or Source()).function(kernel)
    free = [name for name in kernel.arg_names if name not in constants]
    named = dict(zip(free, arguments, strict=True))
    given = {name: argument(x, name) for name, x in named.items()} | {k: _constant(v) for k, v in constants.items()}
    programs = list(range(grid[0]))
    random.Random(seed).shuffle(programs)
    for program in programs:
        here = machine.Machine((program, grid[0]), seed, races)
        machine.enter(here)
        try:
            function(**given)
            here.finish()
        finally:
            machine.leave()
