"""What `tamis.apply` refuses at the door, and what its handle tells: nothing runs dense, or not at all, in silence."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusion import TINY
from tiny_models import LANGUAGE, OTHERS, inputs, tokens

import tamis
from tamis import order
from tamis.integrations.apply import register
from tamis.integrations.hook import attention_layers
from tamis.integrations.schedule import Schedule
from tamis.profile import LayerSettings, Stage

transformers = pytest.importorskip("transformers")

WINDOW = tamis.Window(16)


def sam() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "mlp_dim": 32}
    return transformers.SamVisionModel(transformers.SamVisionConfig(**sizes, output_channels=8))


def mamba() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4, "vocab_size": 64}
    return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))


@pytest.mark.parametrize("make", [sam, mamba])
def test_a_model_without_attention_functions_is_refused(make: Any) -> None:
    with pytest.raises(tamis.UnsupportedError, match=r"does not take an attention function.*tamis\.sdpa\(\)"):
        tamis.apply(make())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"predictor": tamis.Sparge}, TypeError, r"predictor must be an object such as Sparge\(\), got the class"),
        ({"backend": "cuda"}, ValueError, "backend must be one of cpu, triton, reference or None, got 'cuda'"),
        ({"pv_threshold": -1}, ValueError, "pv_threshold must be > 0"),
        ({"pv_threshold": (5.0, float("nan"))}, ValueError, "pv_threshold must be > 0"),
        ({"pv_threshold": ("a",)}, TypeError, "pv_threshold must be a number"),
    ],
)
def test_settings_that_no_call_could_run_with(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = LANGUAGE["llama"]()
    for door in (lambda **given: tamis.apply(model, **given), tamis.sdpa, register):
        with pytest.raises(error, match=message):
            door(**options)
    assert model.config._attn_implementation == "sdpa"


def test_predictors_that_are_none() -> None:
    profile: Any = tamis.Profile({})
    for door in (tamis.sdpa, register):
        with pytest.raises(TypeError, match="predictor must be a predictor such as Sparge"):
            door(predictor=profile)
    with pytest.raises(TypeError, match="step 3 must be an object such as Sparge"):
        Schedule(predictors={3: tamis.Sparge})  # type: ignore[dict-item]


def test_a_reason_says_what_every_backend_misses() -> None:
    with torch.no_grad(), tamis.apply(model := LANGUAGE["llama"](), WINDOW, precision="fp8") as handle:
        model(tokens())
    (reason,) = handle.dense_reasons
    assert reason.startswith("no backend can serve this call (cpu: ")
    assert "triton: " in reason and "reference: " in reason


@pytest.mark.parametrize("name", ["llama", "siglip"])
def test_weights_of_attention_are_refused(name: str) -> None:
    """Llama hands the argument on to attention; SigLIP only collects what its layers return."""
    model = {**LANGUAGE, **OTHERS}[name]()
    given = {"input_ids": tokens()} if name in LANGUAGE else inputs(name)
    with torch.no_grad(), tamis.apply(model):
        with pytest.raises(tamis.UnsupportedError, match=r"set_attn_implementation\('eager'\)"):
            model(**given, output_attentions=True)
        model(**given)


def test_forgotten_inference_mode_warns_once() -> None:
    model = LANGUAGE["llama"]()
    with tamis.apply(model, WINDOW) as handle:
        with pytest.warns(RuntimeWarning, match=r"gradients are recorded.*torch\.inference_mode\(\)"):
            model(tokens())
        model(tokens())  # warnings are errors
    assert handle.dense_reasons == {"gradients": 4}
    with tamis.apply(model.train(), WINDOW):
        model(tokens())


def test_compiled_calls_are_told_apart() -> None:
    model = LANGUAGE["llama"]()
    with torch.no_grad(), tamis.apply(model, WINDOW, schedule=Schedule(dense_layers=1)) as handle:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for _ in range(2):
            compiled(tokens(), use_cache=False)
    assert handle.calls == {"sparse": 0, "dense": 0}
    assert handle.traced == {"sparse": 1, "dense": 1}
    assert handle.stats()["model.layers.1.self_attn"].traced == {"sparse": 1}
    assert "traced={'sparse': 1, 'dense': 1} (graphs do not count their calls)" in repr(handle)


def test_a_handle_prints_what_ran_and_is_used_once() -> None:
    model = LANGUAGE["llama"]()
    with torch.no_grad(), tamis.apply(model, WINDOW) as handle:
        model(tokens())
        model(tokens(length=100))
    text = repr(handle)
    reasons = {"fewer than 128 queries": 2}
    assert text == f"Applied(calls={handle.calls}, density=1.000, dense_reasons={reasons}, removed)"
    with pytest.raises(ValueError, match=r"call tamis\.apply again"), handle:
        pass


def saved(model: Any) -> bytes:
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


def test_a_file_of_a_transformers_model_is_without_tamis() -> None:
    model = LANGUAGE["llama"]()
    with torch.no_grad(), tamis.apply(model, WINDOW) as handle:
        data = saved(model)
        loaded = torch.load(io.BytesIO(data), weights_only=False)
        for other in (loaded, copy.deepcopy(model)):
            assert type(other.config._attn_implementation) is str and other.config._attn_implementation == "sdpa"
        loaded(tokens())
        assert handle.calls == {"sparse": 0, "dense": 0}
        assert b"tamis" not in data.replace(b"_tamis_", b"")  # a process without tamis can read it


def test_a_file_of_a_diffusers_model_is_without_tamis() -> None:
    pytest.importorskip("diffusers")
    model, given = TINY["wan"].make(), TINY["wan"].given()
    with torch.no_grad():
        expected = model(**given).sample
        with tamis.apply(model, WINDOW, min_queries=1, order="hilbert") as handle:
            loaded = torch.load(io.BytesIO(saved(model)), weights_only=False)
            copied = copy.deepcopy(model)
            for other in (loaded, copied):
                torch.testing.assert_close(other(**given).sample, expected, atol=0, rtol=0)
            assert handle.calls == {"sparse": 0, "dense": 0}


def test_a_profile_of_a_smaller_model_warns() -> None:
    settings = (Stage(LayerSettings(WINDOW)),)
    some = {"model.layers.0.self_attn": settings}
    with pytest.warns(RuntimeWarning, match=r"no settings for 1 of the model's 2 .*layers\.1\.self_attn"):
        tamis.apply(model := LANGUAGE["llama"](), tamis.Profile(some, "LlamaForCausalLM")).remove()
    tamis.apply(model, tamis.Profile({**some, "model.layers.1.self_attn": settings}, "LlamaForCausalLM")).remove()


def test_names_of_the_automatic_kind_are_refused() -> None:
    with pytest.raises(ValueError, match=r"kind that tamis\.apply uses, got 'tamis_0'"):
        register("tamis_0")


def test_an_order_prints_what_it_is() -> None:
    made = order.tokens("hilbert", (2, 3, 4), after=5)
    assert repr(made) == "TokenOrder('hilbert', grid=(2, 3, 4), after=5, device='cpu')"


def test_what_holds_a_model_is_told_apart() -> None:
    model = LANGUAGE["llama"]()
    for held, advice in (
        (torch.nn.Sequential(torch.nn.Identity(), model), r"give its \.1, which is a LlamaForCausalLM"),
        (SimpleNamespace(model=model), r"give its \.model, which is a LlamaForCausalLM"),
        (torch.nn.Linear(2, 2), r"tamis\.sdpa\(\)"),
    ):
        with pytest.raises(TypeError, match=advice):
            tamis.apply(held)


def test_a_model_that_runs_by_a_registered_name_is_refused() -> None:
    model = LANGUAGE["llama"]()
    with register():
        model.set_attn_implementation("tamis")
        with pytest.raises(ValueError, match=r"already, by the name 'tamis' of register"):
            tamis.apply(model)
        model.set_attn_implementation("sdpa")
        tamis.apply(model).remove()
    assert model.config._attn_implementation == "sdpa"


def test_cross_attention_of_an_unknown_model_is_no_image_layer() -> None:
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    sizes = {"block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 4}
    model = diffusers.UNet2DConditionModel(**blocks, **sizes, cross_attention_dim=8)
    names = attention_layers(model)
    assert names and all(name.endswith("attn1") for name in names)


@pytest.mark.parametrize("kind", ["DeepseekV32", "GlmMoeDsa", "DeepseekV4"])
def test_models_that_choose_by_themselves_are_refused(kind: str) -> None:
    """Their choice is told to attention of the names that they know only: under another it would be lost, silently."""
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(num_hidden_layers=2))
    with pytest.raises(tamis.UnsupportedError, match=r"self_attn: \w+Attention chooses by itself what its tokens see"):
        tamis.apply(model)
    assert not model.config._attn_implementation.startswith("tamis")


def test_models_that_choose_by_themselves_are_refused_by_name_too() -> None:
    config = transformers.DeepseekV32Config(
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=2,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        vocab_size=64,
        attn_implementation="tamis_for_all",
    )
    with register("tamis_for_all"), torch.no_grad():
        model = transformers.DeepseekV32ForCausalLM(config).eval()
        with pytest.raises(
            tamis.UnsupportedError, match=r"DeepseekV32Attention.0: .* chooses by itself what its tokens"
        ):
            model(tokens(1, 128))
