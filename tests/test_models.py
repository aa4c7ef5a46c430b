"""Models of transformers through tamis, dense and in full precision, against their own attention, eager and sdpa.

The bound is 1e-5 on outputs of a few units: twice what eager and sdpa themselves differ by is about 5e-6.
"""

from __future__ import annotations

import copy
import math
import weakref
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import LANGUAGE, OTHERS, outputs, tokens

import tamis
from tamis.integrations.audit import Audit
from tamis.integrations.decoding import BLOCK, Decode, KeyMeans
from tamis.integrations.schedule import Schedule
from tamis.profile import LayerSettings, Stage

transformers = pytest.importorskip("transformers")

EVERYTHING = tamis.Sparge(topk=1.0, similarity=-1.0)
NO_SDPA = ("gemma2", "gpt_oss")  # transformers refuses it: softcap, sinks
CLOSE = {"atol": 1e-5, "rtol": 0.0}
GENERATED = 64


def profile(model: str = "LlamaForCausalLM", heads: int = 4, layer: str = "model.layers.0.self_attn") -> tamis.Profile:
    settings = LayerSettings(tamis.Sparge(topk=(0.5,) * heads))
    return tamis.Profile({layer: (Stage(settings),)}, model=model)


def through_tamis(model: Any, *, kernels: bool) -> Any:
    """tamis's own kernels for every call, those of one query too; or dense attention as the hook runs it."""
    least = 1 if kernels else 10**6
    return tamis.apply(model, EVERYTHING, precision="full", pv_threshold=None, min_queries=least)


def own(model: Any, implementation: str, run: Any) -> Any:
    """What a model says by its own attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        with torch.no_grad():
            return run(model)
    finally:
        model.set_attn_implementation(before)


def peers(name: str) -> tuple[str, ...]:
    return ("eager",) if name in NO_SDPA else ("eager", "sdpa")


def check(name: str, model: Any, run: Any) -> None:
    """Every way through tamis agrees with every one of the model's own."""
    expected = [own(model, implementation, run) for implementation in peers(name)]
    for kernels in (True, False):
        with through_tamis(model, kernels=kernels) as handle, torch.no_grad():
            found = run(model)
        assert handle.calls["sparse" if kernels else "dense"] > 0
        for wanted in expected:
            torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("name", list(LANGUAGE))
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_prefill(name: str, padding: str) -> None:
    ids = tokens(2)
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[1, slice(0, 70) if padding == "left" else slice(130, None)] = 0
    check(name, LANGUAGE[name](), lambda model: model(input_ids=ids, attention_mask=mask).logits[mask.bool()])


@pytest.mark.parametrize("name", list(LANGUAGE))
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_prefill_in_chunks(name: str, cache: str) -> None:
    ids = tokens()

    def run(model: Any) -> torch.Tensor:
        config = model.config
        state = (
            transformers.DynamicCache(config=config)
            if cache == "dynamic"
            else transformers.StaticCache(config=config, max_cache_len=256)
        )
        ends = (90, 91, 160, 200)
        parts = [
            model(input_ids=ids[:, start:end], past_key_values=state).logits
            for start, end in zip((0, *ends), ends, strict=False)
        ]
        return torch.cat(parts, dim=1)

    check(name, LANGUAGE[name](), run)


@pytest.mark.parametrize("name", [*LANGUAGE, "whisper", "t5", "qwen2_5_vl"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_64_generated_tokens(name: str, cache: str) -> None:
    given = {"input_ids": tokens(2, 70), "attention_mask": torch.ones(2, 70, dtype=torch.long)}
    given["attention_mask"][1, :30] = 0
    if name in OTHERS:
        given = {key: value for key, value in tiny_models.inputs(name).items() if key != "decoder_input_ids"}
    options: dict[str, Any] = {"max_new_tokens": GENERATED, "min_new_tokens": GENERATED, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}

    def run(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        result = model.generate(**given, **options)
        return result.sequences, torch.stack(result.logits)

    model = (LANGUAGE | OTHERS)[name]()
    expected = [own(model, implementation, run) for implementation in peers(name)]
    assert len(expected[0][1]) == GENERATED
    for kernels in (True, False):
        with through_tamis(model, kernels=kernels):
            found = run(model)
        for words, logits in expected:
            assert found[0].equal(words)
            torch.testing.assert_close(found[1], logits, **CLOSE)


@pytest.mark.parametrize("name", list(OTHERS))
def test_other_models(name: str) -> None:
    given = tiny_models.inputs(name)
    model = OTHERS[name]()
    expected = [own(model, implementation, lambda model: outputs(model(**given))) for implementation in peers(name)]
    for kernels in (True, False):
        with through_tamis(model, kernels=kernels) as handle, torch.no_grad():
            found = outputs(model(**given))
        for wanted in expected:
            torch.testing.assert_close(found, wanted, **CLOSE)
        if name == "t5":  # its scores take a bias of their own: no kernel here adds one
            assert set(handle.dense_reasons) == {"argument position_bias"}
        else:
            assert handle.calls["dense" if kernels else "sparse"] == 0


@pytest.mark.parametrize("name", [*LANGUAGE, *OTHERS])
def test_apply_and_remove_leave_a_model_as_it_was(name: str) -> None:
    """Bit for bit: outputs, weights, and what its configuration says."""
    given = tiny_models.inputs(name) if name in OTHERS else {"input_ids": tokens(2)}
    model = (LANGUAGE | OTHERS)[name]()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    config = model.config.to_dict()
    with torch.no_grad():
        before = outputs(model(**given))
        with tamis.apply(model, tamis.Window(16), min_queries=1, decode=0.5, audit=Audit(share=0.01, budget=math.inf)):
            model(**given)
        after = outputs(model(**given))
    assert after.equal(before)
    assert model.config.to_dict() == config
    assert all(value.equal(weights[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "phi", "gemma3", "vit", "whisper"])
def test_gradients_are_those_of_eager(name: str) -> None:
    """Attention here cannot be trained through, so it runs dense, and says so."""
    given = tiny_models.inputs(name) if name in OTHERS else {"input_ids": tokens(2)}
    model = (LANGUAGE | OTHERS)[name]().train()
    found = []
    for through in (False, True):
        model.zero_grad()
        model.set_attn_implementation("eager")
        handle = tamis.apply(model, EVERYTHING, min_queries=1) if through else None
        outputs(model(**given)).square().mean().backward()
        found.append({key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None})
        if handle is not None:
            assert set(handle.dense_reasons) == {"gradients"}
            handle.remove()
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, atol=1e-5 * max(1.0, float(gradient.abs().max())), rtol=0)


def test_twice_is_refused_and_the_model_untouched() -> None:
    model = LANGUAGE["llama"]()
    with tamis.apply(model, EVERYTHING) as handle:
        name = model.config._attn_implementation
        for again in (model, model.model):
            with pytest.raises(ValueError, match=r"runs through tamis already: .remove\(\) that handle first"):
                tamis.apply(again)
        assert model.config._attn_implementation == name
        with torch.no_grad():
            model(tokens())
        assert handle.calls == {"sparse": 2, "dense": 0}
    with tamis.apply(model.model, EVERYTHING), pytest.raises(ValueError, match="already"):
        tamis.apply(model)
    tamis.apply(model).remove()


def test_by_name() -> None:
    """`attn_implementation="tamis"`, for models that are made or loaded later."""
    from tamis.integrations.apply import register

    expected = own(LANGUAGE["llama"](), "eager", lambda model: model(tokens()).logits)
    with register(predictor=EVERYTHING, precision="full", pv_threshold=None) as handle:
        model = tiny_models.language("Llama", attn_implementation="tamis")
        with torch.no_grad():
            found = model(tokens()).logits
        assert list(handle.stats()) == ["LlamaAttention.0", "LlamaAttention.1"]
        with pytest.raises(ValueError, match="'tamis' is registered already"):
            register()
    torch.testing.assert_close(found, expected, **CLOSE)
    assert handle.calls == {"sparse": 2, "dense": 0}
    assert "tamis" not in transformers.AttentionInterface().valid_keys()
    with pytest.raises(TypeError, match="min_queries must be"):
        register(min_queries="never")


LONG = 64 * 24 + 5


def long_model() -> Any:
    return tiny_models.language("Llama", max_position_embeddings=2048)


def test_means_follow_a_growing_key_and_choose_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(2, 3, 333, 16, generator=generator)
    query = torch.randn(2, 3, 4, 16, generator=generator)
    grown = KeyMeans.of(key[:, :, :1])
    for length in (63, 64, 65, 66, 200, 320, 333):
        grown.extend(key[:, :, :length])
    means = torch.stack([part.double().mean(2) for part in key.split(BLOCK, 2)], 2)
    torch.testing.assert_close(grown.means[:, :, : means.shape[2]].double(), means, atol=1e-6, rtol=0)
    score = (query.double() @ means.transpose(2, 3)).amax(2)
    score[:, :, [0, -1, -2]] = torch.inf
    chosen = grown.select(query, 4)
    assert chosen.dtype == torch.int32
    assert chosen[:, :, 0].equal(score.topk(4, 2).indices.sort(2).values.int())


def test_decoding_reads_the_chosen_blocks() -> None:
    """Against attention over the same blocks, by torch, from the cache's own keys."""
    model, ids = long_model(), tokens(2, LONG)
    for layer in model.model.layers:
        layer.self_attn.scaling *= 1.7  # another one than the default, as in Gemma 2
    seen = []
    from tamis.integrations import applied

    real = applied.attend_selected

    def watch(request: Any, decode: Decode, backend: str | None) -> Any:
        result = real(request, decode, backend)
        seen.append((request, result.output))
        return result

    cache = transformers.DynamicCache(config=model.config)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(applied, "attend_selected", watch)
        with tamis.apply(model, EVERYTHING, precision="full", decode=Decode(0.3, least=5)) as handle:
            model(ids, past_key_values=cache)
            model(ids[:, :1], past_key_values=cache)
    assert handle.calls == {"sparse": 4, "dense": 0}
    blocks = -(-(LONG + 1) // BLOCK)
    kept = Decode(0.3, least=5).kept(blocks)
    for layer in handle.stats().values():
        assert layer.last is not None
        assert layer.last.density == pytest.approx(kept / blocks)
    assert len(seen) == 2
    for request, output in seen:
        rows = request.query.unflatten(1, (2, 2)).squeeze(3)
        chosen = KeyMeans.of(request.key).select(rows, kept).long()
        visible = torch.zeros(2, 2, 1, blocks, dtype=torch.bool).scatter(3, chosen, True)
        mask = visible.repeat_interleave(BLOCK, 3)[..., : LONG + 1]
        expected = torch.nn.functional.scaled_dot_product_attention(
            rows.double(), request.key.double(), request.value.double(), mask, scale=request.scale
        )
        torch.testing.assert_close(output, expected.reshape(output.shape).float(), **CLOSE)


@pytest.mark.parametrize("way", ["all blocks", "beams", "cropped", "begun without"])
def test_decoding_goes_on_whatever_happens_to_the_cache(way: str) -> None:
    """The cache's keys stay those of transformers' own cache."""
    model, ids = long_model(), tokens(1, LONG)
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    options["num_beams"] = 3 if way == "beams" else 1
    expected = own(model, "eager", lambda model: model.generate(ids, **options))
    share = Decode(1.0 - 1e-9, least=3)  # as good as everything, through the selection
    cache = transformers.DynamicCache(config=model.config)
    if way == "begun without":
        with torch.no_grad():
            model(ids[:, :-1], past_key_values=cache)
        options["past_key_values"] = cache
    with tamis.apply(model, EVERYTHING, precision="full", pv_threshold=None, decode=share) as handle:
        if way == "cropped":
            with torch.no_grad():
                model(torch.cat([ids[:, :-1], ids[:, :9]], dim=1), past_key_values=cache)
            cache.crop(-9)
            options["past_key_values"] = cache
        found = model.generate(ids, **options)
    assert found.tolist() == expected.tolist()
    assert set(handle.dense_reasons) <= {"decoding: every block is kept"}


def test_decoding_that_must_read_everything_says_why() -> None:
    model = long_model()
    mask = torch.ones(2, LONG, dtype=torch.long)
    mask[1, :100] = 0
    options: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with tamis.apply(model, EVERYTHING, decode=0.5) as handle:
        model.generate(tokens(2, LONG), attention_mask=mask, **options)
        assert set(handle.dense_reasons) == {"decoding: under a mask, a window or padding"}
        handle.reset()
        model.generate(tokens(1, 300), **options)
        assert set(handle.dense_reasons) == {"decoding: every block is kept"}
        handle.reset()
        model.generate(tokens(1, 300), cache_implementation="static", disable_compile=True, **options)
        assert any(reason.startswith("decoding: the cache keeps no means") for reason in handle.dense_reasons)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"share": 0.0}, r"share must be in \(0, 1\], got 0.0"),
        ({"share": True}, "share must be a number"),
        ({"least": 2}, "least must be at least 3"),
        ({"least": 4.0}, "least must be an integer"),
    ],
)
def test_wrong_settings_of_decoding(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Decode(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"predictor": "profile.json"}, r"got a path: tamis.Profile.load\('profile.json'\)"),
        ({"predictor": 0.3}, "must be a predictor or a Profile, got float"),
        ({"precision": "int4"}, "precision must be one of 'full', 'int8', 'fp8', got 'int4'"),
        ({"compensate": "magic"}, "compensate must be one of None, 'centroid', got 'magic'"),
        ({"min_queries": 0}, "min_queries must be at least 1"),
        ({"min_queries": 1.5}, "min_queries must be an integer"),
        ({"schedule": 0.3}, "schedule must be a Schedule, got float"),
        ({"schedule": Schedule(dense_layers=3)}, "dense_layers is 3, the model has 2 attention layers"),
        ({"predictor": profile(model="Other")}, "the profile is for Other, the model is LlamaForCausalLM"),
        ({"predictor": profile(heads=3)}, "for 3 heads in model.layers.0.self_attn, the model has 4 there"),
        ({"predictor": profile(layer="layers.0")}, "layers that the model does not have: layers.0"),
    ],
)
def test_wrong_use_is_refused_and_the_model_untouched(arguments: dict[str, Any], message: str) -> None:
    model = LANGUAGE["llama"]()
    before = model.config.to_dict()
    with pytest.raises((TypeError, ValueError), match=message):
        tamis.apply(model, **arguments)
    assert model.config.to_dict() == before
    tamis.apply(model, profile(model="")).remove()


def test_names_of_transformers_are_its_own() -> None:
    """ "eager" stands in its registry of masks alone: taken and given back, no model of the process would be causal."""
    from tamis.integrations.apply import register

    for name in ("eager", "sdpa"):
        with pytest.raises(ValueError, match=f"'{name}' is registered already"):
            register(name)


def test_chunks_that_depend_on_the_padding_of_a_text() -> None:
    """Llama 4 counts chunks from the first token of each text: what ends one text's chunk does not end another's."""
    config = transformers.Llama4TextConfig(
        hidden_size=32,
        intermediate_size=32,
        intermediate_size_mlp=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=64,
        attention_chunk_size=16,
        num_local_experts=2,
        max_position_embeddings=512,
        pad_token_id=0,
        initializer_range=0.6,
    )
    torch.manual_seed(0)
    model = transformers.Llama4ForCausalLM(config).eval()
    given = {"input_ids": tokens(2, 10), "attention_mask": torch.ones(2, 10, dtype=torch.long)}
    given["attention_mask"][1, :5] = 0
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "output_logits": True}

    def run(model: Any) -> torch.Tensor:
        return torch.stack(model.generate(**given, **options, return_dict_in_generate=True).logits)

    expected = own(model, "eager", run)
    with tamis.apply(model):
        found = run(model)
    # Weights as large as this make the wrong chunks visible, and logits ten times those of the other models.
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_models_of_one_configuration_are_two_models() -> None:
    config = LANGUAGE["llama"]().config
    first, second = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    with torch.no_grad():
        expected = [model(tokens()).logits for model in (first, second)]
        with tamis.apply(first, tamis.Window(16), min_queries=1) as handle:
            torch.testing.assert_close(second(tokens()).logits, expected[1], **CLOSE)
            assert handle.calls == {"sparse": 0, "dense": 0}
            with pytest.raises(ValueError, match="shares its configuration with a model that runs through tamis"):
                tamis.apply(second)
            copied = copy.deepcopy(first)
        assert first(tokens()).logits.equal(expected[0])
        with tamis.apply(copied, tamis.Window(16), min_queries=1) as handle:
            copied(tokens())
        assert handle.calls["sparse"] == 2
        assert copied(tokens()).logits.equal(expected[0])


def test_caches_of_two_parts() -> None:
    """Only what the decoder itself grows has means; its other keys are the encoder's."""
    model = OTHERS["whisper"]()
    given = {key: value for key, value in tiny_models.inputs("whisper").items() if key != "decoder_input_ids"}
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    expected = model.generate(**given, **options)
    with tamis.apply(model, EVERYTHING, precision="full", decode=0.5) as handle:
        assert model.generate(**given, **options).equal(expected)
    assert {"decoding: every block is kept", "decoding: the cache keeps no means"} <= set(handle.dense_reasons)


def test_a_cache_outlives_inference_mode_gradients_and_copies() -> None:
    model, ids = long_model().train(), tokens(1, 220)
    expected = own(model, "eager", lambda model: model(ids).logits)
    cache = transformers.DynamicCache(config=model.config)
    with tamis.apply(model, EVERYTHING, precision="full", pv_threshold=None, decode=0.5):
        with torch.inference_mode():
            parts = [model(ids[:, :100], past_key_values=cache).logits.clone()]
        with torch.no_grad():
            parts.append(model(ids[:, 100:150], past_key_values=cache).logits)
            twin = copy.copy(cache)
            twin.layers = [copy.copy(layer) for layer in cache.layers]
            parts.append(model(ids[:, 150:160], past_key_values=cache).logits)
            model(ids[:, :10], past_key_values=twin)
            parts.append(model(ids[:, 160:200], past_key_values=cache).logits)
        parts.append(model(ids[:, 200:], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1).detach(), expected, **CLOSE)
    fresh = transformers.DynamicCache(config=model.config)
    with tamis.apply(model, decode=0.5):
        both = [model(ids[:, start : start + 100], past_key_values=fresh).logits.sum() for start in (0, 100)]
        (both[0] + both[1]).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_offloaded_cache_leaves_nothing_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is one device alone, copies stand for moves: what is left of the others would be left there."""
    from transformers.cache_utils import CacheLayerMixin, DynamicLayer

    from tamis.integrations.cache import MeansLayer

    def move(layer: Any) -> None:
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()

    monkeypatch.setattr(CacheLayerMixin, "offload", move)
    monkeypatch.setattr(CacheLayerMixin, "prefetch", move)
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, 2, 400, 16, generator=generator) for _ in range(2))
    layer, plain = MeansLayer(), DynamicLayer()
    for start, end in ((0, 300), (300, 301), (301, 400)):
        layer.prefetch() if start else None
        held, _ = layer.update(key[:, :, start:end], value[:, :, start:end])
        plain.update(key[:, :, start:end], value[:, :, start:end])
        of_call = held.tamis_means
        room = weakref.ref(held.untyped_storage())
        layer.offload()
        assert layer.means is not of_call  # attention of this call comes after, and reads the means where they were
        del held
        assert room() is None
        assert layer.means is not None
        assert layer.means.length == end
    expected = KeyMeans.of(plain.keys)
    torch.testing.assert_close(layer.means.means[:, :, :7], expected.means[:, :, :7], atol=1e-6, rtol=0)
    assert layer.keys.equal(plain.keys)
    assert layer.values.equal(plain.values)
