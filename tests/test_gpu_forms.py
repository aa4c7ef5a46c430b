"""The list of what `make gpu-static` compiles, held against the kernels: it has each, in every way to compile it."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import itertools
import pkgutil
import textwrap
from types import SimpleNamespace
from typing import Any

import pytest
import triton

from tamis.backends.triton import chips, hopper, kernels, launch, settings
from tamis.backends.triton.kernels import gluon_api
from tamis.bench import gpu_forms, gpu_static

# Conditions that come out one way in every call that there is: no settings have tiles of 128 keys.
ONE_WAY = {("_visit", "TILE_K <= 64")}


@functools.cache
def launches(name: str) -> tuple[tuple[str, launch.Launch], ...]:
    """What is compiled for an architecture, with the name of the call."""
    return tuple((call.what, item) for call in gpu_forms.calls(name) for item in call.launches)


def compiled() -> set[Any]:
    """Every function that is compiled, kernels and what they call."""
    modules = (
        importlib.import_module(found.name) for found in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}.")
    )
    return {value for module in modules for value in vars(module).values() if isinstance(value, triton.JITFunction)}


@functools.cache
def tree_of(function: Any) -> ast.Module:
    return ast.parse(textwrap.dedent("".join(function.raw_src)))


@functools.cache
def code_of(node: ast.expr) -> Any:
    return compile(ast.Expression(node), "condition", "eval")


@functools.cache
def called(function: Any) -> set[Any]:
    """Functions that one names, and those that they do."""
    names = {node.id for node in ast.walk(tree_of(function)) if isinstance(node, ast.Name)}
    named = {function.fn.__globals__.get(name) for name in names}
    found = {value for value in named if isinstance(value, triton.JITFunction)}
    return found.union(*(called(value) for value in found))


def test_every_kernel_is_compiled() -> None:
    """Those are kernels that no other function calls."""
    every = compiled()
    helpers = set().union(*(called(function) for function in every))
    assert {item.kernel for _, item in launches("sm_90")} == every - helpers


def device_form(x: Any) -> Any:
    """An argument as the compiler knows it: no number, and of a descriptor which kind of numbers it finds."""
    if hasattr(x, "base"):
        return SimpleNamespace(dtype=gluon_api._KINDS[x.base.dtype])
    return object() if isinstance(x, (int, float)) else x


class Branches(ast.NodeVisitor):
    """How conditions come out that arguments and constants decide, in a function and those that it calls.

    Known are parameters and annotated constants. Branches that are not taken are passed over; where it is the device
    that decides, or what the caller computed, both are looked at.
    """

    def __init__(self, found: dict[tuple[Any, ast.expr], set[bool | None]]) -> None:
        self.found = found

    def follow(self, function: Any, known: dict[str, Any]) -> None:
        outer = self.__dict__.copy()
        self.function, self.known, self.names = function, dict(known), function.fn.__globals__
        self.visit(tree_of(function))
        self.__dict__.update(outer)

    def value(self, node: ast.expr) -> Any:
        """Of an expression; NotImplemented if it is not known."""
        with contextlib.suppress(Exception):
            return eval(code_of(node), self.names, self.known)
        return NotImplemented

    def note(self, test: ast.expr) -> None:
        """Parts of a condition apart, at `and`, `or` and `not`."""
        match test:
            case ast.BoolOp(values=parts):
                for part in parts:
                    self.note(part)
            case ast.UnaryOp(op=ast.Not(), operand=part):
                self.note(part)
            case _:
                self.visit(test)
                value = self.value(test)
                self.found.setdefault((self.function, test), set()).add(value if isinstance(value, bool) else None)

    def branch(self, node: Any) -> None:
        self.note(node.test)
        value = self.value(node.test)
        for way, part in ((True, node.body), (False, node.orelse)):
            if value is not (not way):
                for child in part if isinstance(part, list) else [part]:
                    self.visit(child)

    visit_If = visit_IfExp = branch

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        assert isinstance(node.target, ast.Name)
        assert node.value is not None
        self.visit(node.value)
        if (value := self.value(node.value)) is not NotImplemented:
            self.known[node.target.id] = value

    def visit_Name(self, node: ast.Name) -> None:
        """Of a function that is handed on: it knows what its kernel does."""
        handed = self.names.get(node.id)
        if isinstance(handed, triton.JITFunction):
            self.follow(handed, self.known)

    def visit_Call(self, node: ast.Call) -> None:
        for part in (*node.args, *(part.value for part in node.keywords)):
            self.visit(part)
        callee = self.names.get(node.func.id) if isinstance(node.func, ast.Name) else None
        if isinstance(callee, triton.JITFunction) and not any(isinstance(part, ast.Starred) for part in node.args):
            given = zip((parameter.name for parameter in callee.params), node.args, strict=False)
            pairs = [*given, *((part.arg, part.value) for part in node.keywords)]
            usual = {parameter.name: parameter.default for parameter in callee.params if parameter.has_default}
            values = usual | {name: self.value(part) for name, part in pairs}
            self.follow(callee, {name: value for name, value in values.items() if value is not NotImplemented})


def outcomes(name: str) -> dict[tuple[str, str, str], set[bool | None]]:
    """How conditions come out, by kernel and function: None where that is not known."""
    found: dict[tuple[str, str, str], set[bool | None]] = {}
    for _, item in launches(name):
        given = [parameter.name for parameter in item.kernel.params if not parameter.is_constexpr]
        known = item.constants | {name: device_form(x) for name, x in zip(given, item.arguments, strict=True)}
        here: dict[tuple[Any, ast.expr], set[bool | None]] = {}
        Branches(here).follow(item.kernel, known)
        for (function, test), ways in here.items():
            where = item.kernel.fn.__name__, function.fn.__name__, ast.unparse(test)
            found.setdefault(where, set()).update(ways)
    return found


def test_every_condition_is_compiled_both_ways() -> None:
    """On sm_90, which has both kernels of attention and every precision."""
    found = outcomes("sm_90")
    assert ("attend_kernel", "_visit", "QK8") in found
    assert ("hopper_kernel", "_item", "LISTS > 0") in found
    one_way = {key for key, ways in found.items() if ways in ({True}, {False})}
    assert {key for key in one_way if key[1:] not in ONE_WAY} == set()


@pytest.mark.parametrize("name", gpu_static.architectures())
def test_every_cut_is_compiled(name: str) -> None:
    """Each line of settings.py that a call can meet, for each kind of products and head dim."""
    chip = chips.CHIPS[name]
    there = set()
    for row in gpu_forms.attention_rows(name):
        for item in gpu_forms.attention(name, row):
            if item.kernel.fn.__name__ == "attend_kernel" and not item.constants["FLAG_ROWS"]:
                shape = item.constants["TILE_Q"], item.constants["TILE_K"], item.warps, item.stages, item.registers
                dim = max(item.constants["D"], item.constants["DV"])
                there.add((row["kind"], row["dtype"] == "fp32", dim, row["sight"], shape))
    sights = {"causal": {}, "causal window": {"window": True}, "all masks": {"regular": False}}
    for kind, dim, block_q, q_len, sight, skips in itertools.product(
        gpu_forms.kinds(name), gpu_forms.DIMS, (64, 128), (16, 1000), sights, (False, True)
    ):
        for fp32 in (False, True) if kind == "full" else (False,):
            form = ("fp32" if fp32 else "half") if kind == "full" else kind
            cut = settings.tiles(chip, form, dim, dim, block_q, 64, q_len, skips=skips, **sights[sight])
            assert (kind, fp32, dim, sight, tuple(cut)) in there, (kind, fp32, dim, sight, block_q, q_len)


@pytest.mark.parametrize("name", ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_a_share_has_every_cut(name: str) -> None:
    """Of all architectures but sm_86, which shares sm_89's; and the list of any is the same each time."""
    compiled = {call.what for call in gpu_forms.calls(name, whole=False)}
    rows = gpu_forms.attention_rows(name)
    for part in gpu_forms.cut_rows(name):
        assert compiled & {gpu_forms.words(row) for row in rows if part.items() <= row.items()}, part
    again = [[call.what for call in gpu_forms.calls(name, whole=False)] for _ in range(2)]
    assert again[0] == again[1]


@pytest.mark.parametrize("name", gpu_static.architectures())
def test_a_share_has_usual_calls_with_stage_2(name: str) -> None:
    """Which `sparse_attention` makes unless told otherwise."""
    skips = {
        (item.constants["QK8"], item.constants["PV"], item.constants["D"])
        for call in gpu_forms.calls(name, whole=False)
        for item in call.launches
        if item.kernel.fn.__name__ == "attend_kernel" and "causal stage 2" in call.what
    }
    ways = {"full": (False, "input"), "int8": (True, "bf16"), "packed": (True, "packed"), "fp8": (True, "fp8")}
    assert skips >= {(*ways[kind], dim) for kind in gpu_forms.kinds(name) for dim in gpu_forms.DIMS}


def test_every_cut_for_hopper_is_compiled_with_everything() -> None:
    there = {
        tuple(item.constants[name] for name in ("D", "DV", "TILE_K", "STAGES", "SPLIT", "CAUSAL", "STAGE2", "HEADROOM"))
        for _, item in launches("sm_90")
        if item.kernel.fn.__name__ == "hopper_kernel"
    }
    for precision, dim, block_q in itertools.product(("full", "int8", "fp8"), (64, 128, 192, 256), (128, 64)):
        cut = hopper.cut(precision, dim, dim, block_q)
        for causal, stage2 in itertools.product((False, True), repeat=2):
            if cut is not None:
                form = (cut.dim, cut.value_dim, cut.keys, cut.stages, cut.split, causal, stage2)
                assert (*form, 8 if precision == "fp8" else 0) in there


@pytest.mark.parametrize("name", ["sm_80", "gfx942"])
def test_every_pair_is_in_some_call(name: str) -> None:
    """Of two axes, where the values go together: 64-row blocks have lists, and a PackedKV has one layout."""
    rows = gpu_forms.attention_rows(name)
    assert [row for row in rows if row["lists"] == "no lists" and "64 rows" in row.values()] == []
    for a, b in itertools.combinations(rows[0], 2):
        there = {(row[a], row[b]) for row in rows}
        missing = set(itertools.product({row[a] for row in rows}, {row[b] for row in rows})) - there
        allowed = {("64 rows", "no lists"), ("128 keys", "no lists"), ("packed", "columns"), ("packed", "wide")}
        assert missing <= allowed, (a, b)


def test_cover_holds_parts_and_pairs() -> None:
    axes = {"a": ("", "x"), "b": ("", "y"), "c": ("", "z", "w")}
    whole = {"a": "x", "b": "y", "c": "w"}
    rows = gpu_forms.cover(axes, [whole], lambda row: (row.get("a"), row.get("b")) != ("x", ""))
    assert rows[0] == whole
    for a, b in itertools.combinations(axes, 2):
        wanted = set(itertools.product(axes[a], axes[b])) - ({("x", "")} if (a, b) == ("a", "b") else set())
        assert {(row[a], row[b]) for row in rows} == wanted
    assert len(rows) < 2 * 2 * 3
    assert gpu_forms.cover(axes, [{"c": "z"}], lambda row: True, pairs=False)[0]["c"] == "z"
