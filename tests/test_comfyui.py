"""ComfyUI's calling convention, by a stand-in for its attention wrapper and its model patcher, and the node."""

from __future__ import annotations

import ast
import copy
import doctest
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import tamis
from tamis.integrations import comfyui
from tamis.integrations.comfyui import OPTION, Override, patch

FOLDER = Path(__file__).parents[1] / "examples" / "comfyui-tamis"
HEADS, DIM = 4, 32
OVERRIDDEN: list[str] = []


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> Tensor:
    """What ComfyUI's own functions take and return, whole."""
    assert kwargs.pop("_inside_attn_wrapper"), "or its wrapper would ask for the override again, without end"
    OVERRIDDEN.append("dense")
    if not skip_reshape:
        q, k, v = (t.unflatten(2, (-1, q.shape[2] // heads)).transpose(1, 2) for t in (q, k, v))
    if mask is not None:
        mask = mask[None] if mask.dim() == 2 else mask
        mask = mask[:, None] if mask.dim() == 3 else mask
    known = {name: kwargs[name] for name in ("scale", "enable_gqa") if name in kwargs}
    output = scaled_dot_product_attention(q, k, v, mask, **known)
    return output if skip_output_reshape else output.transpose(1, 2).reshape(q.shape[0], -1, heads * q.shape[3])


def call(override: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Tensor:
    """As ComfyUI's wrapper calls: the override gets the function, positions and keywords as they came, and a mark."""
    options = {} if override is None else {OPTION: override}
    kwargs = {**kwargs, "transformer_options": options, "_inside_attn_wrapper": True}
    OVERRIDDEN.clear()
    result: Tensor = attention(*args, **kwargs) if override is None else override(attention, *args, **kwargs)
    return result


def flat(length: int = 700, keys: int | None = None, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    lengths = (length, keys or length, keys or length)
    return tuple(torch.randn(2, number, HEADS * DIM).to(dtype) for number in lengths)


def split(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.unflatten(2, (HEADS, DIM)).transpose(1, 2) for tensor in tensors)


def everything(**settings: Any) -> Override:
    """Keeps all blocks in full precision: what differs from dense is the convention alone."""
    chosen: dict[str, Any] = {"precision": "full", "pv_threshold": None, "min_tokens": 256, **settings}
    return Override(tamis.Sparge(topk=1.0), **chosen)


def close(found: Tensor, expected: Tensor) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    # Two orders of summation in fp32, of values around 1.
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize("skip_reshape", [False, True])
def test_both_layouts(skip_reshape: bool, skip_output_reshape: bool) -> None:
    tensors = flat()
    given = split(tensors) if skip_reshape else tensors
    options = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape, "scale": 0.3}
    override = everything()
    found = call(override, *given, HEADS, **options)
    assert OVERRIDDEN == []
    assert override.calls == {"sparse": 1, "dense": 0}
    assert override.last is not None
    close(found, call(None, *given, HEADS, **options))


def test_masks_of_every_form() -> None:
    tensors = flat(500)
    kept = torch.rand(500, 500) < 0.5
    added = torch.where(kept, torch.randn(500, 500), -math.inf)
    for mask in (kept, added, torch.stack([kept, ~kept]), added.expand(2, HEADS, 500, 500), kept[None, None, :1]):
        override = everything()
        found = call(override, *tensors, HEADS, mask)
        assert override.calls["sparse"] == 1
        close(found, call(None, *tensors, HEADS, mask=mask))


def test_fewer_key_heads() -> None:
    q, k, v = split(flat(400))
    options = {"skip_reshape": True, "enable_gqa": True}
    override = everything()
    close(call(override, q, k[:, :2], v[:, :2], HEADS, **options), call(None, q, k[:, :2], v[:, :2], HEADS, **options))
    one, two, three = flat(400)
    narrow = (one, two[..., : 2 * DIM], three[..., : 2 * DIM])
    close(call(override, *narrow, HEADS, enable_gqa=True), call(None, *narrow, HEADS, enable_gqa=True))
    assert override.calls == {"sparse": 2, "dense": 0}


def test_it_is_sparse_and_in_the_precision_asked_for() -> None:
    tensors = flat(dtype=torch.bfloat16)
    override = Override(tamis.Sparge(topk=0.25, similarity=-1, sink=False), min_tokens=256)
    output = call(override, *tensors, HEADS)
    q, k, v = split(tensors)
    expected = tamis.sparse_attention(q, k, v, predictor=override.predictor)
    assert isinstance(expected, Tensor)
    assert torch.equal(output, expected.transpose(1, 2).flatten(2))
    assert override.last is not None
    assert override.last.qk_dtype == "int8"
    # 3 of 11 blocks in every row: a quarter, rounded up.
    assert override.last.qk_density == pytest.approx(3 / 11)
    call(override, *tensors, HEADS, attn_precision=torch.float32)
    assert override.last.qk_dtype != "int8"


Q, K, V = torch.randn(3, 1, 300, HEADS * DIM)
FALLBACKS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "low precision": ((Q, K, V, HEADS), {"low_precision_attention": False}, "low_precision_attention=False"),
    "short prompt": ((Q, K[:, :77], V[:, :77], HEADS), {}, "fewer than 256 keys"),
    "few queries": ((Q[:, :10], K, V, HEADS), {}, "fewer than 256 queries"),
    "unknown argument": ((Q, K, V, HEADS), {"var_lengths": [300]}, "argument var_lengths"),
    "fp64": ((Q.double(), K.double(), V.double(), HEADS), {}, "dtypes torch.float64, torch.float64, torch.float64"),
    "gradients": ((Q.clone().requires_grad_(), K, V, HEADS), {}, "gradients"),
    "no backend": ((Q, K, V, HEADS), {"precision": "fp8"}, "no backend can serve this call"),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_the_rest_goes_to_the_function_and_is_counted(name: str) -> None:
    tensors, options, reason = FALLBACKS[name]
    override = everything(precision=options.get("precision", "full"))
    options = {key: value for key, value in options.items() if key != "precision"}
    found = call(override, *tensors, **options)
    assert OVERRIDDEN == ["dense"]
    assert override.calls == {"sparse": 0, "dense": 1}
    assert list(override.reasons) == [reason]
    assert torch.equal(found, call(None, *tensors, **options))


def test_a_named_backend_does_not_fall_back() -> None:
    with pytest.raises(tamis.UnsupportedError, match="backend 'cpu' can't serve this call"):
        call(everything(precision="fp8", backend="cpu"), Q, K, V, HEADS)


def test_settings_are_checked() -> None:
    for wrong in ({"precision": "int4"}, {"min_tokens": -1}, {"backend": "foo"}, {"predictor": "topk"}):
        with pytest.raises((TypeError, ValueError), match=f"^{next(iter(wrong))} must be"):
            Override(**wrong)  # type: ignore[arg-type]


def test_the_log_names_what_happens_once(caplog: pytest.LogCaptureFixture) -> None:
    override = everything(min_tokens=200)
    with caplog.at_level("INFO", "tamis"):
        for _ in range(2):
            call(override, Q, K, V, HEADS)
            call(override, Q[:, :100], K, V, HEADS)
    said = [record.getMessage() for record in caplog.records]
    assert [text.rpartition(" ")[2] for text in said] == ["sparse", "queries"]


class Patcher:
    """As much of ComfyUI's ModelPatcher as a node needs."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.model_options = options

    def clone(self) -> Patcher:
        return Patcher(copy.copy(self.model_options))


def node() -> Any:
    """The folder as ComfyUI loads it: by its path, under a name of its own."""
    spec = importlib.util.spec_from_file_location("comfyui_tamis", FOLDER / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_node_patches_a_clone() -> None:
    module = node()
    assert module.NODE_CLASS_MAPPINGS.keys() == module.NODE_DISPLAY_NAME_MAPPINGS.keys()
    (kind,) = module.NODE_CLASS_MAPPINGS.values()
    inputs = kind.INPUT_TYPES()["required"]
    settings = {name: entry[1].get("default", entry[0][0]) for name, entry in inputs.items() if name != "model"}
    settings["min_tokens"] = 256
    model = Patcher({"transformer_options": {"kept": 1}, "other": 2})
    (patched,) = getattr(kind(), kind.FUNCTION)(model, **settings)
    assert model.model_options == {"transformer_options": {"kept": 1}, "other": 2}
    override = patched.model_options["transformer_options"][OPTION]
    assert patched.model_options["transformer_options"]["kept"] == 1
    assert override.predictor == tamis.Sparge(topk=0.5)
    call(override, Q, K, V, HEADS)
    assert override.calls == {"sparse": 1, "dense": 0}
    assert getattr(kind(), kind.FUNCTION)(model, **{**settings, "enabled": False}) == (model,)
    (by_mass,) = getattr(kind(), kind.FUNCTION)(model, **{**settings, "keep": "cdf", "amount": 0.9})
    assert by_mass.model_options["transformer_options"][OPTION].predictor == tamis.Sparge(cdf=0.9)


def test_an_override_that_was_there_gets_the_rest() -> None:
    seen = []

    def before(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["_inside_attn_wrapper"])
        return func(*args, **kwargs)

    patched = patch(Patcher({"transformer_options": {OPTION: before}}), everything())
    override = patched.model_options["transformer_options"][OPTION]
    call(override, Q, K, V, HEADS)
    assert seen == []
    found = call(override, Q, K[:, :9], V[:, :9], HEADS)
    assert seen == [True]
    assert torch.equal(found, call(None, Q, K[:, :9], V[:, :9], HEADS))


def test_one_override_for_two_models_and_twice_for_one() -> None:
    """Each model goes on to what it had before, and nobody to itself."""
    asked: list[str] = []

    def before(name: str) -> Callable[..., Any]:
        def function(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            asked.append(name)
            return func(*args, **kwargs)

        return function

    override = everything(min_tokens=10**6)
    models = [Patcher({"transformer_options": {OPTION: before(name)}}) for name in ("a", "b")]
    patched = [patch(model, override) for model in models]
    patched.append(patch(patched[0], override))
    for clone in patched:
        call(clone.model_options["transformer_options"][OPTION], *flat(), 4)
    assert asked == ["a", "b", "a"]
    assert override.calls == {"sparse": 0, "dense": 3}


def test_the_example_runs() -> None:
    results = doctest.testmod(comfyui)
    assert results.failed == 0 < results.attempted


def test_importing_needs_no_comfyui() -> None:
    """What the folder and the integration name at their top is torch, tamis and the standard library."""

    root = Path(tamis.__file__).parent
    for path in (FOLDER / "__init__.py", root / "integrations" / "comfyui.py"):
        names = set()
        for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(statement, ast.Import):
                names |= {alias.name.split(".")[0] for alias in statement.names}
            elif isinstance(statement, ast.ImportFrom):
                names.add(str(statement.module).split(".")[0])
        assert names <= {"torch", "tamis", *sys.stdlib_module_names}
