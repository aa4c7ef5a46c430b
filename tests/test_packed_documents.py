"""Several documents in one row of a transformers model: each sees itself alone, and no mask of all pairs is made."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_models import LANGUAGE, tokens
from torch import Tensor

import tamis
from tamis.integrations import transformers_masks
from tamis.integrations.request import Request
from tamis.integrations.spread import Spread

transformers = pytest.importorskip("transformers")
masking_utils = pytest.importorskip("transformers.masking_utils")

EVERYTHING = tamis.Sparge(topk=1.0, similarity=-1.0)
EXACT: dict[str, Any] = {"precision": "full", "pv_threshold": None}
# As tests/test_models.py: twice what eager and sdpa differ by is half of this.
CLOSE = {"atol": 1e-5, "rtol": 0.0}
MODELS = ("llama", "mistral", "gemma2")  # without a window, with one, with both kinds of layers and softcap
LENGTHS = ((80, 70, 50), (120, 80))


def positions(*lengths: tuple[int, ...]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])


def given(*lengths: tuple[int, ...]) -> dict[str, Any]:
    return {"input_ids": tokens(len(lengths)), "position_ids": positions(*lengths), "use_cache": False}


def eager(model: Any, **arguments: Any) -> Tensor:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logits: Tensor = model(**arguments).logits
    model.set_attn_implementation(before)
    return logits


@contextmanager
def no_complete_mask() -> Iterator[None]:
    def refuse(**_: Any) -> None:
        raise AssertionError("a mask of all pairs was made")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking_utils, "sdpa_mask", refuse)
        yield


@pytest.mark.parametrize("name", MODELS)
def test_documents_equal_eager(name: str) -> None:
    model, arguments = LANGUAGE[name](), given(*LENGTHS)
    expected = eager(model, **arguments)
    for least in (1, 10**6):
        with tamis.apply(model, EVERYTHING, min_queries=least, **EXACT) as handle, torch.no_grad(), no_complete_mask():
            found = model(**arguments).logits
        torch.testing.assert_close(found, expected, **CLOSE)
        assert handle.calls == ({"sparse": 2, "dense": 0} if least == 1 else {"sparse": 0, "dense": 2})


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_documents_run_sparse_and_apart(name: str) -> None:
    """What one document holds changes nothing in another, bit for bit."""
    model = LANGUAGE[name]()
    ids, places = tokens(1, 384), positions((320, 64))
    with tamis.apply(model, tamis.Window(16, sink=0), min_queries=1, **EXACT) as handle, torch.no_grad():
        found = model(ids, position_ids=places, use_cache=False).logits
        ids[:, :320] = ids[:, :320].flip(1)
        changed = model(ids, position_ids=places, use_cache=False).logits
    assert changed[:, 320:].equal(found[:, 320:])
    assert not changed[:, :320].equal(found[:, :320])
    layers = handle.stats().values()
    assert [layer.sparse for layer in layers] == [2, 2]
    # Of the layer with a window of the model's own everything visible is near.
    assert min(layer.last.density for layer in layers if layer.last is not None) < 1


def flattened() -> dict[str, Any]:
    """A batch as transformers' collator packs it, with the offsets that flash attention takes."""
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")
    parts = tokens().split(LENGTHS[0], dim=1)
    batch = dict(collator([{"input_ids": part[0]} for part in parts]))
    del batch["labels"]
    return batch


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("cached", [False, True])
def test_offsets_of_flash_attention_are_honoured(name: str, cached: bool) -> None:
    """Also with a cache, which makes transformers' own eager attention forget about documents."""
    model, batch = LANGUAGE[name](), flattened()
    expected = eager(model, **given(LENGTHS[0]))
    for least in (1, 10**6):
        with tamis.apply(model, EVERYTHING, min_queries=least, **EXACT) as handle, torch.no_grad(), no_complete_mask():
            found = model(**batch, use_cache=cached).logits
        torch.testing.assert_close(found, expected, **CLOSE)
        assert handle.calls["sparse" if least == 1 else "dense"] == 2


def test_documents_by_positions_and_by_offsets_are_both_kept_apart() -> None:
    model, arguments = LANGUAGE["llama"](), given((80, 70, 50))
    offsets = torch.tensor([0, 40, 80, 200], dtype=torch.int32)
    inner = torch.tensor([0, 40, 80, 150, 200])
    number = torch.bucketize(torch.arange(200), inner, right=True)
    visible = (number[:, None] == number) & torch.ones(200, 200, dtype=torch.bool).tril()
    mask = torch.zeros(1, 1, 200, 200).masked_fill(~visible, torch.finfo(torch.float32).min)
    expected = eager(model, **arguments, attention_mask=mask)
    with tamis.apply(model, EVERYTHING, min_queries=1, **EXACT) as handle, torch.no_grad():
        found = model(**arguments, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets).logits
    torch.testing.assert_close(found, expected, **CLOSE)
    assert handle.calls["sparse"] == 2


@pytest.mark.parametrize("wrong", ["batch", "end", "start", "falling", "keys", "padding", "list"])
def test_offsets_of_other_tokens_run_dense_and_say_so(wrong: str) -> None:
    model = LANGUAGE["llama"]()
    offsets = {"end": [0, 80, 150], "start": [10, 80, 200], "falling": [0, 150, 80, 200]}.get(wrong, [0, 80, 200])
    arguments: dict[str, Any] = {"input_ids": tokens(2 if wrong == "batch" else 1)}
    arguments["cu_seq_lens_q"] = offsets if wrong == "list" else torch.tensor(offsets)
    arguments["cu_seq_lens_k"] = torch.tensor([0, 90, 200]) if wrong == "keys" else arguments["cu_seq_lens_q"]
    if wrong == "padding":
        arguments["attention_mask"] = torch.ones(1, 200, dtype=torch.long)
        arguments["attention_mask"][:, :30] = 0
    with tamis.apply(model, EVERYTHING, min_queries=1) as handle, torch.no_grad():
        model(**arguments)
    assert handle.dense_reasons == {"argument cu_seq_lens_q": 2}


def test_gradients_of_packed_documents_are_those_of_eager() -> None:
    model, arguments = LANGUAGE["mistral"]().train(), given(*LENGTHS)
    found = []
    for through in (False, True):
        model.zero_grad()
        model.set_attn_implementation("eager")
        handle = tamis.apply(model, EVERYTHING) if through else None
        model(**arguments).logits.square().mean().backward()
        found.append(model.get_input_embeddings().weight.grad.clone())
        if handle is not None:
            assert set(handle.dense_reasons) == {"gradients"}
            handle.remove()
    torch.testing.assert_close(found[1], found[0], atol=1e-5 * max(1.0, float(found[0].abs().max())), rtol=0)


def test_patterns_that_are_not_known_get_the_complete_mask() -> None:
    """Chunks inside of documents, and something else beside documents."""
    rows = {"position_ids": positions((20, 12)), "packed_sequence_mask": (positions((20, 12)) == 0).cumsum(1)}
    chunks = masking_utils.chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.long))
    documents = masking_utils.packed_sequence_mask_function(rows["packed_sequence_mask"])
    inside = masking_utils.remap_positions_for_packed_sequence(masking_utils.causal_mask_function, rows["position_ids"])
    for pattern, size in (
        (masking_utils.packed_sequence_compatibility_function(chunks, **rows), 8),
        (masking_utils.and_masks(documents, masking_utils.causal_mask_function), None),
        (masking_utils.and_masks(documents, inside, lambda text, head, row, column: row - column < 5), None),
    ):
        sizes: dict[str, Any] = {"batch_size": 1, "q_length": 32, "kv_length": 32, "mask_function": pattern}
        sizes |= {"local_size": size, "allow_is_causal_skip": False}
        found = transformers_masks.mask_function(**sizes)
        assert found is not None
        assert found.dtype == torch.bool
        assert found.equal(masking_utils.sdpa_mask(**sizes))


def test_chunks_longer_than_a_shard_are_no_window() -> None:
    """Inside of the first chunk both are causal: what tells them apart lies beyond the shard."""
    sizes: dict[str, Any] = {"batch_size": 1, "q_length": 32, "kv_length": 32, "local_size": 40, "shards": True}
    window = transformers_masks.mask_function(
        **sizes, mask_function=masking_utils.sliding_window_causal_mask_function(40)
    )
    assert window is not None and window.dtype == torch.int32
    chunks = masking_utils.chunked_causal_mask_function(40, torch.zeros(1, dtype=torch.int))
    found = transformers_masks.mask_function(**sizes, mask_function=chunks)
    assert found is not None and found.dtype == torch.bool


def test_documents_are_refused_over_a_mesh() -> None:
    """Offsets say where documents end in a shard, not in the text."""
    tensors = torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, 8, 4)
    numbers = torch.zeros(1, 8, dtype=torch.int32)
    plain: dict[str, Any] = dict.fromkeys(("mask", "window", "scale", "softcap", "sink_logits", "obstacle"))
    request = Request(
        "layer", None, *tensors, causal=True, segments=(numbers, numbers), dropout=0.0, packed=True, **plain
    )
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        spread = Spread(dist.group.WORLD, "heads")
        with pytest.raises(tamis.UnsupportedError, match="layer: offsets of packed documents: attention over a mesh"):
            spread.attend(request, None, None)  # type: ignore[arg-type]  # refused before it looks at them
    finally:
        dist.destroy_process_group()


def check_packed(model: Any, ids: Tensor, places: Tensor, **given: Any) -> None:
    given |= {"position_ids": places, "use_cache": False}
    with torch.no_grad():
        expected = model(ids, **given).logits
        with tamis.apply(model, EVERYTHING, **EXACT):
            found = model(ids, **given).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


TEXT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


@pytest.mark.parametrize("kept", [1, 3])
def test_documents_survive_a_model_that_cuts_the_rows_of_its_mask(kept: int) -> None:
    """Layers that share keys are asked for the last rows only."""
    layers = ["sliding_attention", "full_attention"] * 2
    config = transformers.Gemma4TextConfig(
        **TEXT, head_dim=32, num_hidden_layers=4, sliding_window=512, num_kv_shared_layers=2, layer_types=layers
    )
    torch.manual_seed(0)
    model = transformers.Gemma4ForCausalLM(config).eval()
    check_packed(model, torch.randint(3, 64, (1, 200)), torch.arange(100).repeat(2)[None], logits_to_keep=kept)


def test_documents_of_a_model_that_works_on_complete_masks() -> None:
    torch.manual_seed(0)
    model = transformers.DogeForCausalLM(transformers.DogeConfig(**TEXT, num_hidden_layers=2)).eval()
    check_packed(model, torch.randint(3, 64, (2, 200)), torch.arange(100).repeat(2).expand(2, -1))


def test_copies_and_failed_calls_do_not_change_documents_over_a_mesh() -> None:
    """Hooks among ranks stay with the model they were put in, and are in step whatever another hook raises."""
    model = LANGUAGE["llama"]()
    ids, places = tokens(1, 128), torch.arange(64).repeat(2)[None]
    raising: list[bool] = []

    def first(*_: object) -> None:
        if raising:
            raise ValueError("of somebody else")

    model.register_forward_pre_hook(first)

    def logits(of: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = of(ids, position_ids=places, use_cache=False).logits
            return found

    expected = logits(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with tamis.apply(model, EVERYTHING, **EXACT, mesh=dist.group.WORLD):
            torch.testing.assert_close(logits(copy.deepcopy(model)), expected, atol=0, rtol=0)
            raising.append(True)
            with pytest.raises(ValueError, match="of somebody else"):
                logits(model)
            raising.clear()
            torch.testing.assert_close(logits(model), expected, **CLOSE)
    finally:
        dist.destroy_process_group()
