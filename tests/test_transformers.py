"""Models of transformers through `tamis.apply`, against their own eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tamis
from tamis.integrations.apply import apply

transformers = pytest.importorskip("transformers")

EVERYTHING = tamis.Sparge(topk=1.0, similarity=-1.0)
WINDOW = 48
TOKENS = 200
# Logits of two tiny layers in fp32: eager and ours sum in different orders, errors of 1e-6 grow by less than 10.
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


def make(name: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **SPECIAL, **settings})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


MODELS = {
    "llama": lambda: make("Llama"),
    "mistral": lambda: make("Mistral", sliding_window=WINDOW),
    "qwen3": lambda: make("Qwen3", head_dim=12),
    "gemma2": lambda: make("Gemma2", head_dim=8, sliding_window=WINDOW, attn_logit_softcapping=5.0),
    "gpt_oss": lambda: make("GptOss", head_dim=8, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=1),
}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def ids(batch: int = 1, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(2, 64, (batch, tokens), generator=torch.Generator().manual_seed(1))


def run(model: Any, implementation: str | None = None, **inputs: Any) -> torch.Tensor:
    """Logits; with `implementation`, by one of the model's own attention functions."""
    previous = model.config._attn_implementation
    if implementation is not None:
        model.set_attn_implementation(implementation)
    with torch.no_grad():
        logits = model(**inputs).logits
    if implementation is not None:
        model.set_attn_implementation(previous)
    return logits


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_prefill_equals_eager(model: Any, padding: str, sparse: bool) -> None:
    tokens = ids(2)
    mask = torch.ones_like(tokens)
    if padding != "none":
        mask[1, : 70 if padding == "left" else None] = 0
        mask[1, : 130 if padding == "right" else 0] = 1
    expected = run(model, "eager", input_ids=tokens, attention_mask=mask)
    with apply(model, EVERYTHING, precision="full", pv_threshold=None, min_queries=1 if sparse else 10**6) as handle:
        logits = run(model, input_ids=tokens, attention_mask=mask)
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], **TOLERANCE)
    assert logits.isfinite().all()
    assert handle.calls == ({"sparse": 2, "dense": 0} if sparse else {"sparse": 0, "dense": 2})


@pytest.mark.parametrize("sparse", [True, False])
def test_chunked_prefill_is_aligned_at_the_end(model: Any, sparse: bool) -> None:
    tokens = ids()
    expected = run(model, "eager", input_ids=tokens)
    cache = transformers.DynamicCache(config=model.config)
    parts = []
    with apply(model, EVERYTHING, precision="full", pv_threshold=None, min_queries=2 if sparse else 10**6) as handle:
        for start, end in ((0, 90), (90, 91), (91, 160), (160, TOKENS)):
            parts.append(run(model, input_ids=tokens[:, start:end], past_key_values=cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, **TOLERANCE)
    assert handle.calls == ({"sparse": 6, "dense": 2} if sparse else {"sparse": 0, "dense": 8})
    assert handle.dense_reasons["decoding"] == 2


@pytest.mark.parametrize("padded", [False, True])
def test_generation_decodes_dense_and_says_so(model: Any, padded: bool) -> None:
    tokens = ids(2, 150)
    mask = torch.ones_like(tokens)
    mask[1, : 40 if padded else 0] = 0
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    model.set_attn_implementation("eager")
    expected = model.generate(tokens, attention_mask=mask, **options)
    with apply(model, EVERYTHING, precision="full") as handle:
        found = model.generate(tokens, attention_mask=mask, **options)
    assert found.tolist() == expected.tolist()
    assert handle.calls == {"sparse": 2, "dense": 10}
    assert handle.dense_reasons == {"decoding": 10}


def test_sparse_prefill_reports_by_layer() -> None:
    model = MODELS["llama"]()
    with apply(model, tamis.Window(64), precision="int8") as handle:
        logits = run(model, input_ids=ids(1, 512))
    stats = handle.stats()
    assert list(stats) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    for layer in stats.values():
        assert (layer.sparse, layer.dense) == (1, 0)
        assert layer.last is not None
        assert 0 < layer.last.density < 0.9
        assert layer.last.qk_dtype == "int8"
    assert not torch.equal(logits, run(model, input_ids=ids(1, 512)))
    handle.reset()
    assert handle.calls == {"sparse": 0, "dense": 0}


def test_compensate_reaches_attention() -> None:
    model = MODELS["llama"]()
    found = []
    for compensate in (None, "centroid"):
        with apply(model, tamis.Window(64), compensate=compensate) as handle:
            found.append(run(model, input_ids=ids(1, 512)))
        assert [layer.last and layer.last.compensate for layer in handle.stats().values()] == [compensate] * 2
    assert not torch.equal(*found)
    with pytest.raises(ValueError, match="compensate must be one of"), apply(model, compensate="magic"):
        run(model, input_ids=ids(1, 512))


def test_static_caches_and_packed_sequences() -> None:
    model = MODELS["qwen3"]()
    tokens = ids()
    cache = transformers.StaticCache(config=model.config, max_cache_len=256)
    expected = run(model, "eager", input_ids=tokens)
    with apply(model, EVERYTHING, precision="full", pv_threshold=None, min_queries=1) as handle:
        logits = run(model, input_ids=tokens, past_key_values=cache)
    torch.testing.assert_close(logits, expected, **TOLERANCE)
    assert handle.calls["sparse"] == 2
    positions = torch.cat([torch.arange(80), torch.arange(120)])[None]
    expected = run(model, "eager", input_ids=tokens, position_ids=positions, use_cache=False)
    with apply(model, EVERYTHING, precision="full", pv_threshold=None, min_queries=1) as handle:
        logits = run(model, input_ids=tokens, position_ids=positions, use_cache=False)
    torch.testing.assert_close(logits, expected, **TOLERANCE)
    assert handle.calls["sparse"] == 2


def test_custom_masks() -> None:
    model = MODELS["llama"]()
    tokens = ids()
    visible = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    visible[100:, 30:60] = False
    additive = torch.zeros(1, 1, TOKENS, TOKENS).masked_fill(~visible, torch.finfo(torch.float32).min)
    expected = run(model, "eager", input_ids=tokens, attention_mask=additive)
    for mask, calls in ((visible[None, None], {"sparse": 2, "dense": 0}), (additive, {"sparse": 0, "dense": 2})):
        with apply(model, EVERYTHING, precision="full") as handle:
            logits = run(model, input_ids=tokens, attention_mask=mask)
        torch.testing.assert_close(logits, expected, **TOLERANCE)
        assert handle.calls == calls
    assert handle.dense_reasons == {"additive mask": 2}


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_training_runs_dense_with_the_right_gradients(name: str) -> None:
    model, tokens = MODELS[name]().train(), ids()
    weight = model.get_input_embeddings().weight
    gradients = []
    for implementation in ("eager", "tamis"):
        model.zero_grad()
        if implementation == "eager":
            model.set_attn_implementation("eager")
            model(input_ids=tokens, labels=tokens).loss.backward()
        else:
            with apply(model) as handle:
                model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append(weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], **TOLERANCE)
    assert handle.dense_reasons == {"gradients": 2}


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_training_with_softcap_or_sinks_is_refused(name: str) -> None:
    model, tokens = MODELS[name]().train(), ids()
    with apply(model), pytest.raises(tamis.UnsupportedError, match="requires grad"):
        model(input_ids=tokens, labels=tokens)


def test_unknown_arguments_run_dense_with_a_reason() -> None:
    model = MODELS["llama"]()
    with apply(model) as handle:
        run(model, input_ids=ids(), cu_seq_lens_q=torch.tensor([0, TOKENS]))
    assert handle.dense_reasons == {"argument cu_seq_lens_q": 2}


def test_double_precision_runs_dense_with_a_reason() -> None:
    model, tokens = MODELS["mistral"]().double(), ids()
    expected = run(model, "eager", input_ids=tokens)
    with apply(model) as handle:
        logits = run(model, input_ids=tokens)
    torch.testing.assert_close(logits, expected, **TOLERANCE)  # eager takes its softmax in fp32
    assert handle.dense_reasons == {"dtype torch.float64": 2}


def test_low_precision_is_no_worse_than_eager() -> None:
    model, tokens = MODELS["llama"](), ids()
    exact = run(model, "eager", input_ids=tokens)
    model = model.bfloat16()
    eager = run(model, "eager", input_ids=tokens)
    with apply(model, EVERYTHING, precision="full") as handle:
        logits = run(model, input_ids=tokens)
    assert logits.dtype == torch.bfloat16
    assert (logits - exact).abs().mean() <= 1.5 * (eager - exact).abs().mean()
    assert handle.calls == {"sparse": 2, "dense": 0}


def test_image_model_is_not_causal() -> None:
    torch.manual_seed(0)
    config = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=224)
    model = transformers.Dinov2Model(config).eval()
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(pixel_values=pixels).last_hidden_state
        with apply(model, EVERYTHING, precision="full") as handle:
            features = model(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(features, expected, **TOLERANCE)
    assert handle.calls == {"sparse": 2, "dense": 0}


def test_remove_restores_and_models_are_independent() -> None:
    first, second = MODELS["llama"](), MODELS["llama"]()
    handle = apply(first, tamis.Window(64))
    assert second.config._attn_implementation == "sdpa"
    inner = apply(second, EVERYTHING)
    run(first, input_ids=ids())
    assert (handle.calls["sparse"], inner.calls["sparse"]) == (2, 0)
    handle.remove()
    handle.remove()
    inner.remove()
    assert first.config._attn_implementation == second.config._attn_implementation == "sdpa"
    assert not [name for name in transformers.AttentionInterface().valid_keys() if name.startswith("tamis")]
    torch.testing.assert_close(run(first, input_ids=ids()), run(first, "eager", input_ids=ids()), **TOLERANCE)


def test_future_tokens_change_nothing() -> None:
    model = MODELS["llama"]()
    tokens = ids(1, 256)
    changed = tokens.clone()
    changed[:, 200:] = (changed[:, 200:] + 7) % 60 + 2
    with apply(model, tamis.Window(64), precision="full"):
        before, after = run(model, input_ids=tokens), run(model, input_ids=changed)
    assert torch.equal(before[:, :200], after[:, :200])
    assert not torch.equal(before[:, 200:], after[:, 200:])


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
        apply(torch.nn.Linear(2, 2))
    model = MODELS["llama"]()
    with pytest.raises(ValueError, match="backend must be one of"):
        apply(model, backend="nowhere")


def test_compiles_in_one_graph() -> None:
    model = MODELS["llama"]()
    tokens = ids(1, 256)
    with apply(model, EVERYTHING, precision="full"):
        expected = run(model, input_ids=tokens, use_cache=False)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            logits = compiled(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(logits, expected, **TOLERANCE)


@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_a_compiled_model_takes_a_handle_and_gives_it_back(way: str) -> None:
    """Compiled and run before: graphs of the model's own attention are neither kept nor lost. One graph each time."""
    model, tokens = MODELS["llama"](), ids(1, 256)
    expected = run(model, "eager", input_ids=tokens)
    options: dict[str, Any] = {"fullgraph": True, "backend": "eager"}
    compiled = torch.compile(model, **options) if way == "wrapped" else model
    if way == "in place":
        model.compile(**options)
    with torch.no_grad():
        own = compiled(input_ids=tokens).logits
        with apply(compiled, tamis.Window(16, sink=0), precision="full") as handle:
            with pytest.raises(ValueError, match="runs through tamis already"):
                apply(model)
            sparse = compiled(input_ids=tokens).logits
            wanted = model.forward(input_ids=tokens).logits  # not compiled, and so counted
        assert list(handle.stats()) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
        assert compiled(input_ids=tokens).logits.equal(own)
    torch.testing.assert_close(own, expected, **TOLERANCE)
    torch.testing.assert_close(sparse, wanted, **TOLERANCE)
    assert (sparse - own).abs().max() > 0.1
