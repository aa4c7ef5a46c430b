"""`tamis.sdpa` and the registered flash attention: any code that calls torch's attention, against torch."""

from __future__ import annotations

import doctest
import importlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from guides import run_guide
from hypothesis import strategies as st
from torch import Tensor, overrides
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import tamis
from tamis.integrations import flash

EVERYTHING = tamis.Sparge(topk=1.0, similarity=-1.0)
EXACT: dict[str, Any] = {"precision": "full", "pv_threshold": None}
# Rows of fp32 summed in another order.
CLOSE = {"atol": 2e-6, "rtol": 1e-5}
SOME = tamis.Window(32, sink=0)


def tensors(queries: int = 200, keys: int = 200, *, heads: int = 2, lead: tuple[int, ...] = (2,)) -> list[Tensor]:
    shapes = ((4, queries), (heads, keys), (heads, keys))
    return [torch.randn(*lead, *shape, 16) for shape in shapes]


def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, **options)


def padding() -> Tensor:
    return torch.arange(200)[None, None, None] < torch.tensor([200, 130])[:, None, None, None]


def pattern() -> Tensor:
    distance = torch.arange(200)[:, None] - torch.arange(200)
    return distance.abs() < 90


TAKEN: dict[str, tuple[list[int], dict[str, Any]]] = {
    "plain": ([200, 200], {"scale": 0.2}),
    "causal": ([200, 200], {"is_causal": True}),
    "all visible": ([200, 200], {"attn_mask": torch.ones(1, 200, dtype=torch.bool)}),
    "padding": ([200, 200], {"attn_mask": padding()}),
    "pattern": ([200, 200], {"attn_mask": pattern()}),
    "cross": ([150, 200], {}),
    "lower right": ([150, 200], {"attn_mask": causal_lower_right(150, 200)}),
}


@pytest.mark.parametrize("case", TAKEN)
def test_calls_that_are_taken_over_equal_torch(case: str) -> None:
    lengths, options = TAKEN[case]
    query, key, value = tensors(*lengths)
    expected = attention(query, key, value, enable_gqa=True, **options)
    with tamis.sdpa(EVERYTHING, **EXACT) as handle:
        output = attention(query, key, value, enable_gqa=True, **options)
    torch.testing.assert_close(output, expected, **CLOSE)
    assert handle.calls == {"sparse": 1, "dense": 0}
    assert list(handle.stats()) == ["4 heads of 16"]


def test_calls_run_sparse_as_asked_for() -> None:
    query, key, value = tensors(heads=4)
    with tamis.sdpa(SOME, **EXACT) as handle:
        output = attention(query, key, value, attn_mask=padding())
    rows = torch.zeros(2, 200, dtype=torch.int32)
    segments = (rows, padding()[:, 0, 0].to(torch.int32) - 1)
    mask = SOME(query, key, segments=segments)
    torch.testing.assert_close(output, tamis.attend(query, key, value, mask, segments=segments).output, **CLOSE)
    assert not torch.allclose(output, attention(query, key, value, attn_mask=padding()), atol=0.1)
    assert handle.stats()["4 heads of 16"].last is not None


@pytest.mark.parametrize("lead", [(), (3, 2)])
def test_other_numbers_of_dimensions(lead: tuple[int, ...]) -> None:
    """Missing ones are added; of more than four torch takes care itself."""
    query, key, value = tensors(heads=4, lead=lead)
    expected = attention(query, key, value)
    with tamis.sdpa(EVERYTHING, **EXACT) as handle:
        output = attention(query, key, value)
    torch.testing.assert_close(output, expected, **CLOSE)
    assert output.shape == expected.shape
    assert handle.calls == {"sparse": int(not lead), "dense": int(bool(lead))}


def left() -> dict[str, tuple[list[Tensor], dict[str, Any], str]]:
    """Calls that stay with torch: arguments, options, and the reason."""
    plain, few = tensors(heads=4), tensors(90, heads=4)
    trained = [tensor.requires_grad_() for tensor in tensors(heads=4)]
    single = [tensors(heads=4)[0], *tensors(heads=4, lead=(1,))[1:]]
    return {
        "additive": (plain, {"attn_mask": torch.randn(200, 200)}, "additive mask"),
        "dropout": (plain, {"dropout_p": 0.5}, "dropout"),
        "short": (few, {}, "fewer than 128 queries"),
        "decoding": (tensors(1, heads=4), {}, "decoding"),
        "gradients": (trained, {}, "gradients"),
        "fp64": ([tensor.double() for tensor in plain], {}, "dtypes torch.float64, torch.float64, torch.float64"),
        "top left": (tensors(150, heads=4), {"is_causal": True}, "causal from the first key on"),
        "upper left": (
            tensors(150, heads=4),
            {"attn_mask": causal_upper_left(150, 200)},
            "causal from the first key on",
        ),
        "broadcast": (single, {}, "shapes that torch broadcasts or refuses"),
    }


@pytest.mark.parametrize("case", left())
def test_other_calls_are_torchs_and_counted(case: str) -> None:
    given, options, reason = left()[case]
    torch.manual_seed(1)
    expected = attention(*given, **options)
    torch.manual_seed(1)
    with tamis.sdpa(EVERYTHING) as handle:
        output = attention(*given, **options)
    assert torch.equal(output, expected)
    assert output.requires_grad == expected.requires_grad
    assert handle.calls == {"sparse": 0, "dense": 1}
    assert handle.dense_reasons == {reason: 1}


def test_wrong_calls_raise_what_torch_raises() -> None:
    query, key, value = tensors(heads=4)
    for given, options in (
        ((query[..., :8], key, value), {}),
        ((query, key, value), {"attn_mask": torch.ones(200, dtype=torch.bool)}),
        ((query, key, value), {"attn_mask": torch.ones(1, 90, dtype=torch.bool)}),
    ):
        with pytest.raises((RuntimeError, IndexError)) as expected:
            attention(*given, **options)
        with tamis.sdpa(EVERYTHING), pytest.raises((RuntimeError, IndexError)) as found:
            attention(*given, **options)
        assert str(found.value) == str(expected.value)


def test_autocast_reaches_the_call() -> None:
    query, key, value = tensors(heads=4)
    with torch.autocast("cpu", torch.bfloat16), tamis.sdpa(EVERYTHING, **EXACT) as handle:
        output = attention(query, key, value)
    expected = attention(query, key, value)
    assert output.dtype == torch.bfloat16
    # Inputs and output are rounded to 8 bits.
    torch.testing.assert_close(output.float(), expected, atol=0.03, rtol=0.02)
    assert handle.calls == {"sparse": 1, "dense": 0}


def test_layers_of_torch_that_no_mode_sees_are_counted() -> None:
    layer = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
    x = torch.randn(1, 200, 16)
    with tamis.sdpa(EVERYTHING) as handle:
        layer(x, x, x, need_weights=False)
        layer(x, x, x)  # with weights it has no attention call
    assert handle.dense_reasons == {"inside of nn.MultiheadAttention": 1}


def test_blocks_end_and_nest_and_leave_other_threads_alone() -> None:
    given = tensors(heads=4)
    dense = attention(*given)
    outputs = []
    with tamis.sdpa(SOME, **EXACT) as outer:
        with tamis.sdpa(EVERYTHING, min_queries=10**6) as inner:
            attention(*given)
        with pytest.raises(ValueError, match="entered already"):
            outer.__enter__()
        thread = threading.Thread(target=lambda: outputs.append(attention(*given)))
        thread.start()
        thread.join()
        assert not torch.equal(attention(*given), dense)
    assert torch.equal(outputs[0], dense)
    assert inner.calls == {"sparse": 0, "dense": 1}
    # What the inner block leaves to torch comes to the outer one.
    assert outer.calls == {"sparse": 2, "dense": 0}
    assert torch.equal(attention(*given), dense)
    with outer:
        assert not torch.equal(attention(*given), dense)
    with pytest.raises(ZeroDivisionError), tamis.sdpa(SOME):
        raise ZeroDivisionError
    assert torch.equal(attention(*given), dense)


def test_wrong_arguments() -> None:
    for given, message in (
        ({"pv_threshold": "off"}, "pv_threshold must be a number"),
        ({"min_queries": "always"}, "min_queries must be an integer or 'auto'"),
        ({"audit": 2.0}, "share must be in"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            tamis.sdpa(**given)  # type: ignore[arg-type]  # that is the point
    with pytest.raises(ValueError, match="precision must be one of"), tamis.sdpa(precision="half"):
        attention(*tensors(heads=4))
    with pytest.raises(tamis.UnsupportedError), tamis.sdpa(EVERYTHING, precision="fp8", backend="cpu"):
        attention(*tensors(heads=4))


def layer(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """With a method that torch.compile traces under a mode only if it is told how."""
    query = query.flatten(1, 2).unflatten(1, (4, -1))
    return attention(query, key, value, attn_mask=mask) * 2


def inside(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    with tamis.sdpa(SOME, **EXACT):
        return layer(query, key, value, mask)


def test_compiled() -> None:
    """In one graph, with the block outside or inside of it; backend "aot_eager" compiles no code."""
    given = tensors(heads=4)
    dense = layer(*given, padding())
    with tamis.sdpa(SOME, **EXACT) as handle:
        expected = layer(*given, padding())
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*given, padding()), expected, **CLOSE)
        assert handle.calls == {"sparse": 1, "dense": 0}
    torch.testing.assert_close(compiled(*given, padding()), dense, **CLOSE)
    compiled = torch.compile(inside, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given, padding()), expected, **CLOSE)
    assert not torch.allclose(expected, dense, atol=0.1)


@pytest.fixture
def activated() -> Iterator[flash.Registered]:
    handle = flash.register(SOME, **EXACT)
    torch.nn.attention.activate_flash_attention_impl("tamis")
    yield handle
    torch.nn.attention.restore_flash_attention_impl()


def test_registered_flash_attention(activated: flash.Registered) -> None:
    given = tensors(heads=4)
    expected = tamis.attend(*given, SOME(*given[:2])).output
    torch.testing.assert_close(attention(*given), expected, **CLOSE)
    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.append(attention(*given)))
    thread.start()
    thread.join()
    torch.testing.assert_close(results[0], expected, **CLOSE)
    assert activated.calls == {"sparse": 2, "dense": 0}


def test_registered_flash_attention_leaves_the_rest_to_torch(activated: flash.Registered) -> None:
    for case in ("additive", "short", "gradients", "top left"):
        given, options, reason = left()[case]
        before = activated.dense_reasons[reason]
        output = attention(*given, **options)
        assert activated.dense_reasons[reason] == before + 1
        if output.requires_grad:
            output.sum().backward()
        torch.nn.attention.restore_flash_attention_impl()
        assert torch.equal(output, attention(*given, **options))
        torch.nn.attention.activate_flash_attention_impl("tamis")
    assert activated.calls["sparse"] == 0


def test_registering_changes_nothing() -> None:
    given = tensors(heads=4)
    dense = attention(*given)
    handle = flash.register(SOME)
    assert torch.nn.attention.current_flash_attention_impl() is None
    assert torch.equal(attention(*given), dense)
    assert handle.calls == {"sparse": 0, "dense": 0}
    with pytest.raises(TypeError, match="min_queries must be an integer, got 'auto'"):
        flash.register(min_queries="auto")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["sdpa", "flash"])
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"tamis.integrations.{name}")).failed == 0


def test_the_guide_runs(capsys: pytest.CaptureFixture[str]) -> None:
    run_guide((Path(__file__).parent.parent / "docs" / "any-torch-code.md").read_text(encoding="utf-8"), capsys)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of torch's own vmap
def test_what_has_no_data_or_is_transformed_is_torchs() -> None:
    query = torch.randn(1, 2, 256, 16)
    with tamis.sdpa() as handle:
        assert F.scaled_dot_product_attention(*(query.to("meta"),) * 3).shape == query.shape
        F.scaled_dot_product_attention(query, query, query)
        torch.vmap(lambda x: F.scaled_dot_product_attention(x, x, x))(query[None])
    assert handle.calls == {"sparse": 1, "dense": 2}
    assert set(handle.dense_reasons) == {"tensors without data", "forward-mode derivatives or torch.func"}


LEADS = ((), (1,), (2,), (1, 1), (1, 2), (2, 1), (2, 2), (2, 4), (3, 1, 2))
MASKS = (None, (20, 24), (1, 24), (2, 20, 24), (1, 1, 20, 24), (2, 1, 1, 24))
lead = st.sampled_from(LEADS)


@hypothesis.settings(max_examples=400)
@hypothesis.given(lead, lead, lead, st.booleans(), st.sampled_from(MASKS), st.booleans())
def test_every_rank_and_batch_that_torch_takes(
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    alike: bool,
    mask: tuple[int, ...] | None,
    grouped: bool,
) -> None:
    """The same numbers in the same shape as torch, or an error where torch has one; all calls are counted."""
    generator = torch.Generator().manual_seed(0)
    leads = (query, query, query) if alike else (query, key, value)
    tensors = [
        torch.randn(*lead, length, 8, generator=generator) for lead, length in zip(leads, (20, 24, 24), strict=True)
    ]
    visible = None if mask is None else torch.rand(mask, generator=generator) > 0.3
    if visible is not None:
        visible[..., 0] = True  # a row that sees nothing is not a number in torch
    options: dict[str, Any] = {"attn_mask": visible, "enable_gqa": grouped}
    try:
        expected = attention(*tensors, **options)
    except (RuntimeError, IndexError) as error:
        with tamis.sdpa(EVERYTHING, min_queries=1, **EXACT), pytest.raises(type(error)):
            attention(*tensors, **options)
        return
    with tamis.sdpa(EVERYTHING, min_queries=1, **EXACT) as handle:
        found = attention(*tensors, **options)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert found.shape == expected.shape
    assert sum(handle.calls.values()) == 1
    if alike and len(query) < 3 and mask is None and not (grouped and not query):
        assert handle.calls["sparse"] == 1


def modes() -> list[Any]:
    return overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]


def test_blocks_may_end_in_any_order() -> None:
    """Neither a block's own end nor its absence reaches another block, or a mode of somebody else's."""
    given = tensors(heads=4)
    dense = attention(*given)
    outer, inner = tamis.sdpa(SOME, **EXACT), tamis.sdpa(EVERYTHING, **EXACT)
    before = modes()
    outer.__enter__()
    other = torch.device("cpu")
    with other:
        theirs = modes()[-1]
        inner.__enter__()
        outer.remove()
        assert [mode is theirs for mode in modes()] == [*(False for _ in before), True, False]
        torch.testing.assert_close(attention(*given), dense, **CLOSE)
        assert (outer.calls["sparse"], inner.calls["sparse"]) == (0, 1)
        inner.remove()
        assert modes()[-1] is theirs
    assert modes() == before
    assert torch.equal(attention(*given), dense)


def test_a_block_in_a_generator_ends_alone() -> None:
    given = tensors(heads=4)
    dense = attention(*given)

    def steps() -> Iterator[None]:
        with tamis.sdpa(SOME, **EXACT):
            yield

    going = steps()
    next(going)
    with tamis.sdpa(EVERYTHING, **EXACT) as handle:
        next(going, None)  # ends while the later block is on
        torch.testing.assert_close(attention(*given), dense, **CLOSE)
        assert handle.calls["sparse"] == 1
    assert torch.equal(attention(*given), dense)
    assert modes() == []


def test_a_block_that_another_thread_ends_is_off_everywhere() -> None:
    given = tensors(heads=4)
    dense = attention(*given)
    handle, steps = tamis.sdpa(SOME, **EXACT), [threading.Event() for _ in range(3)]
    found: list[Any] = []

    def enter() -> None:
        with torch.device("cpu"):
            handle.__enter__()
            steps[0].set()
            steps[1].wait(60)
            found.append(attention(*given))
            with tamis.sdpa(SOME):
                pass  # sweeps
            found.append(len(modes()))
        found.append(modes())

    thread = threading.Thread(target=enter)
    thread.start()
    steps[0].wait(60)
    with torch.device("cpu"):
        theirs = modes()
        handle.remove()
        assert modes() == theirs
        with handle:  # again, here: not there
            steps[1].set()
            thread.join()
            assert not torch.equal(attention(*given), dense)
    assert torch.equal(found[0], dense)
    assert found[1:] == [1, []]
    assert modes() == []
