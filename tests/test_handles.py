"""Handles that nobody kept: found again, undone, and gone with their model."""

from __future__ import annotations

import copy
import doctest
import gc
import importlib
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusion import TINY
from tiny_models import LANGUAGE, tokens

import tamis
from tamis.integrations.apply import applied

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

WAN = "wan"


def wan_pipeline() -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.WanPipeline(None, None, None, scheduler, transformer=TINY[WAN].make())


MADE: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "transformers": (LANGUAGE["llama"], lambda model: model(tokens())),
    "diffusers": (TINY[WAN].make, lambda model: model(**TINY[WAN].given())),
    "pipeline": (wan_pipeline, lambda pipeline: pipeline.transformer(**TINY[WAN].given())),
}
OPTIONS: dict[str, dict[str, Any]] = {"transformers": {"decode": 0.5, "audit": 0.01}, "pipeline": {"audit": 0.01}}


@pytest.fixture(params=list(MADE))
def library(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def names() -> list[str]:
    """What transformers knows of tamis."""
    registries = transformers.AttentionInterface(), transformers.AttentionMaskInterface()
    return [name for registry in registries for name in registry.valid_keys() if name.startswith("tamis")]


def test_a_dropped_handle_is_found_and_undone(library: str) -> None:
    make, run = MADE[library]
    model = make()
    assert applied(model) is None
    tamis.apply(model, tamis.Window(16), min_queries=1)
    gc.collect()
    with torch.no_grad():
        run(model)
    handle = applied(model)
    assert handle is not None
    assert handle.calls["sparse"] == 2 if library == "transformers" else handle.calls["sparse"] > 0
    with pytest.raises(ValueError, match=r"tamis.integrations.apply.applied\(model\) has it"):
        tamis.apply(model)
    handle.remove()
    assert applied(model) is None
    with tamis.apply(model) as second:
        assert applied(model) is second


def test_parts_and_wholes_have_one_handle() -> None:
    model = LANGUAGE["llama"]()
    with tamis.apply(model.model) as handle:
        assert applied(model) is applied(model.model.layers[1]) is handle
        assert applied(model.lm_head) is None


@pytest.mark.parametrize("kept", [False, True])
def test_a_model_takes_everything_with_it(library: str, kept: bool) -> None:
    make, run = MADE[library]
    model = make()
    handle = tamis.apply(model, tamis.Window(16), min_queries=1, **OPTIONS.get(library, {}))
    with torch.no_grad():
        run(model)
    if kept:  # a handle that is done with holds counts, and no weights
        handle.remove()
    gone = [weakref.ref(model), *(weakref.ref(weight) for weight in getattr(model, "transformer", model).parameters())]
    watched = weakref.ref(handle)
    counts = handle.calls
    if not kept:
        del handle
    del model
    gc.collect()
    assert [found() for found in gone if found() is not None] == []
    assert names() == []
    assert (watched() is not None) == kept
    if kept:
        assert handle.calls == counts


def test_a_part_that_is_kept_keeps_running_through_tamis() -> None:
    model = LANGUAGE["llama"]()
    tamis.apply(model, tamis.Window(16), min_queries=1)
    inner = model.model
    del model
    gc.collect()
    handle = applied(inner)
    assert handle is not None
    with torch.no_grad():
        inner(tokens())
    assert handle.calls == {"sparse": 2, "dense": 0}
    handle.remove()


def test_copies_and_files_of_a_model_hold_none_of_it() -> None:
    model = LANGUAGE["llama"]()
    with torch.no_grad():
        expected = model(tokens()).logits
        handle = tamis.apply(model, tamis.Window(16), min_queries=1)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert applied(other) is None
            handle.reset()
            torch.testing.assert_close(other(tokens()).logits, expected, atol=1e-5, rtol=0)
            assert handle.calls == {"sparse": 0, "dense": 0}
    handle.remove()
    assert not any(name.startswith("_tamis") for module in model.modules() for name in module.__dict__)


def test_examples() -> None:
    module = importlib.import_module("tamis.integrations.apply")
    assert doctest.testmod(module).failed == 0


def test_two_threads_each_with_its_own_call_of_a_diffusers_model() -> None:
    """How the tokens of one call lie does not reach the other, which comes while the first is between two blocks."""
    model = TINY["wan"].make()
    given, other = TINY["wan"].given(), TINY["wan"].given()
    other["hidden_states"] = other["hidden_states"][..., :8]
    meanwhile: list[torch.Tensor] = []

    def run(arguments: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad():
            sample: torch.Tensor = model(**arguments).sample
        return sample

    def interrupt(*_: Any) -> None:
        waiting.remove()
        thread = threading.Thread(target=lambda: meanwhile.append(run(other)))
        thread.start()
        thread.join()

    everything = tamis.Sparge(topk=1.0, similarity=-1.0)
    expected = [run(given), run(other)]
    with tamis.apply(model, everything, precision="full", pv_threshold=None, min_queries=1, order="hilbert"):
        waiting = model.blocks[1].register_forward_pre_hook(interrupt)
        found = run(given)
    torch.testing.assert_close([found, *meanwhile], expected, atol=1e-5, rtol=0)
