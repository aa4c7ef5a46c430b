"""Transformers of diffusers through `tamis.apply`, each against itself: every model of the table, tiny and random."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion import IMAGE, PIXELS, TEXT, TINY, VIDEO, hunyuan, make, noise, video
from guides import run_guide
from torch import Tensor, nn

import tamis
from tamis.integrations.audit import Audit
from tamis.integrations.capture import Captures, record
from tamis.integrations.diffusers import adapters
from tamis.integrations.hook import attention_layers, install
from tamis.integrations.request import Request, dense, sparse
from tamis.integrations.schedule import Schedule
from tamis.profile import LayerSettings, Profile, Stage

pytest.importorskip("diffusers")
# A model of fp32 autocasts to fp32, which a CPU says it cannot.
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported:UserWarning")

EXACT: dict[str, Any] = {"precision": "full", "pv_threshold": None}
EVERYTHING = tamis.Sparge(topk=1.0, similarity=-1.0)
SOME = tamis.Window(16, sink=0)
# Sums in another order and a permutation leave 6e-7 on outputs of about 1.
CLOSE = {"atol": 1e-5, "rtol": 0.0}


@pytest.fixture(params=list(TINY))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(model: Any, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        sample: Tensor = model(**given).sample
    return sample


def differ(one: Tensor, other: Tensor) -> bool:
    """By ten times what `CLOSE` allows."""
    return bool((one - other).abs().max() > 1e-4)


def state(model: nn.Module) -> list[Any]:
    """All that hooking a model may change in its modules."""
    return [
        (sorted(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks))
        for module in model.modules()
    ]


def test_dense_equal_and_sparse_ran(name: str) -> None:
    tiny = TINY[name]
    model = tiny.make()
    before, expected = state(model), run(model, tiny.given())
    layers = attention_layers(model)
    with tamis.apply(model, EVERYTHING, **EXACT) as handle:
        torch.testing.assert_close(run(model, tiny.given()), expected, **CLOSE)
    stats = handle.stats()
    ran = [layer for layer in stats if stats[layer].sparse]
    assert ran == layers != []
    assert handle.calls["sparse"] == len(layers)
    assert set(handle.dense_reasons) <= {"cross-attention", "not among image tokens"}
    with tamis.apply(model, SOME, **EXACT) as handle:
        assert differ(run(model, tiny.given()), expected)
    assert all(stats.last is not None and stats.last.density < 1 for stats in map(handle.stats().get, layers) if stats)
    assert torch.equal(run(model, tiny.given()), expected)
    assert state(model) == before


def test_dense_calls_are_the_models_own(name: str) -> None:
    tiny = TINY[name]
    model = tiny.make()
    expected = run(model, tiny.given())
    with tamis.apply(model, min_queries=10**6) as handle:
        assert torch.equal(run(model, tiny.given()), expected)
    assert handle.calls["sparse"] == 0
    assert handle.dense_reasons["fewer than 1000000 queries"] == len(attention_layers(model))


def around_everything(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    adapter = adapters.find(model)
    assert adapter is not None
    monkeypatch.setitem(adapters.TABLE, type(model).__name__, replace(adapter, around=lambda config, given: True))


def test_a_token_order_changes_no_dense_output(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of the blocks and around attention, which choose the same blocks; other blocks than row by row."""
    tiny = TINY[name]
    model = tiny.make()
    before, expected = state(model), run(model, tiny.given())
    with tamis.apply(model, SOME, **EXACT):
        by_rows = run(model, tiny.given())
    chosen = []
    for around in (False, True):
        if around:
            around_everything(monkeypatch, model)
        for predictor in (EVERYTHING, SOME):
            with tamis.apply(model, predictor, order="hilbert", **EXACT) as handle:
                chosen.append(run(model, tiny.given()))
            assert handle.calls["sparse"] == len(attention_layers(model))
    for output in chosen[::2]:
        torch.testing.assert_close(output, expected, **CLOSE)
    torch.testing.assert_close(chosen[1], chosen[3], **CLOSE)
    assert differ(chosen[1], by_rows)
    assert torch.equal(run(model, tiny.given()), expected)
    assert state(model) == before


def test_compiled_in_one_graph(name: str) -> None:
    """With an order, by backend "eager": the graph is traced whole and no code is made of it. One block will do."""
    tiny = TINY[name]
    model = tiny.make()
    del (model.blocks if name == "wan" else model.transformer_blocks)[1:]
    torch._dynamo.reset()
    with tamis.apply(model, SOME, order="hilbert", **EXACT) as handle:
        expected = run(model, tiny.given())
        before = handle.calls
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(run(compiled, tiny.given()), expected, **CLOSE)
        assert handle.calls == before  # not counted in a graph
    assert differ(run(model, tiny.given()), expected)


def first_request(model: nn.Module, given: dict[str, Any]) -> Request:
    """What the first layer of image tokens is asked."""
    found: list[Request] = []

    def keep(request: Request) -> Tensor:
        if request.obstacle is None:
            found.append(request)
        return dense(request)

    with install(model, keep):
        run(model, given)
    return found[0]


def test_text_is_kept_wherever_it_lies(name: str) -> None:
    """What of the first layer's queries does not change with the latent is text."""
    tiny = TINY[name]
    model, given = tiny.make(), tiny.given()
    request = first_request(model, given)
    other = first_request(model, {**given, "hidden_states": given["hidden_states"] + 1})
    text = (request.query == other.query).all(-1).all(1)[0].nonzero().flatten().tolist()
    assert len(text) == tiny.text
    length, keep = request.query.shape[2], request.keep
    assert length == tiny.text + tiny.grid[0] * tiny.grid[1] * tiny.grid[2]
    for ranges in () if keep is None else (keep.keys, keep.queries):
        assert sorted(place for start, stop in ranges for place in range(length)[start:stop]) == text
    assert (keep is not None) == (text != [])
    if text:
        tensors = (request.query, request.key, request.value)
        places = [(text[0], text[-1] + 1)]
        kept = replace(SOME, keep={"keys": places, "queries": places})
        expected = tamis.attend(*tensors, kept(*tensors[:2])).output
        assert torch.equal(sparse(request, LayerSettings(SOME, precision="full"), None).output, expected)
        assert differ(tamis.attend(*tensors, SOME(*tensors[:2])).output, expected)


def test_keep_of_a_predictor_is_kept_too() -> None:
    model, given = TINY["flux"].make(), TINY["flux"].given()
    densities = []
    for predictor in (SOME, replace(SOME, keep={"keys": [(100, 101)]})):
        with tamis.apply(model, predictor, **EXACT) as handle:
            run(model, given)
        last = handle.stats()["transformer_blocks.0.attn"].last
        assert last is not None
        densities.append(last.density)
    assert densities[0] < densities[1]
    with tamis.apply(model, lambda query, key, **seen: SOME(query, key, **seen)) as handle:
        run(model, given)
    assert handle.dense_reasons == {"function has no setting 'keep', which the model's text tokens need": 2}


@pytest.mark.parametrize("valid", [TEXT, TEXT - 3])
@pytest.mark.parametrize("order", [None, "hilbert"])
def test_masks_of_padding_run_sparse(order: str | None, valid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """HunyuanVideo always has one; on a CPU one that hides nothing is seen through."""
    model, given = TINY["hunyuan"].make(), hunyuan(valid)
    expected = run(model, given)
    assert (first_request(model, given).segments is None) == (valid == TEXT)
    for around in (False, True):
        if around:
            around_everything(monkeypatch, model)
        with tamis.apply(model, EVERYTHING, order=order, **EXACT) as handle:
            torch.testing.assert_close(run(model, given), expected, **CLOSE)
        assert handle.calls == {"sparse": 2, "dense": 1}


def test_batches_and_text_of_several_lengths() -> None:
    """Mochi calls attention for each of a batch, with as much text as is valid."""
    model, given = TINY["mochi"].make(), TINY["mochi"].given()
    given["hidden_states"] = video(batch=2)
    given["encoder_hidden_states"] = noise(2, TEXT, 16)
    given["encoder_attention_mask"] = torch.arange(TEXT) < torch.tensor([[TEXT], [2]])
    given["timestep"] = torch.tensor([500.0, 500.0])
    expected = run(model, given)
    with tamis.apply(model, EVERYTHING, order="hilbert", **EXACT) as handle:
        torch.testing.assert_close(run(model, given), expected, **CLOSE)
    assert handle.calls == {"sparse": 4, "dense": 0}


def around_cases() -> dict[str, dict[str, Any]]:
    """Arguments that go by token, so that the order has to be changed around attention."""
    image = noise(1, PIXELS, 24)
    shapes = TINY["qwenimage"].given()
    shapes["hidden_states"], shapes["img_shapes"] = noise(1, PIXELS + 38, 4), [[IMAGE, (2, 3, 4), (1, 2, 7)]]
    return {
        "wan": {**TINY["wan"].given(), "timestep": noise(1, 288).abs() * 500},
        "ltx": {**TINY["ltx"].given(), "timestep": noise(1, 288).abs() * 500},
        "flux": {**TINY["flux"].given(), "controlnet_block_samples": [image]},
        "sd3": {**TINY["sd3"].given(), "block_controlnet_hidden_states": [image]},
        "qwenimage": shapes,  # not around: several images, one behind the other
    }


@pytest.mark.parametrize("case", ["wan", "ltx", "flux", "sd3", "qwenimage"])
def test_orders_with_more_than_plain_arguments(case: str) -> None:
    model, given = TINY[case].make(), around_cases()[case]
    expected = run(model, given)
    with tamis.apply(model, EVERYTHING, order="random", **EXACT) as handle:
        torch.testing.assert_close(run(model, given), expected, **CLOSE)
    assert handle.calls["sparse"] == len(attention_layers(model))


def wrong_grids() -> dict[str, tuple[dict[str, Any], str]]:
    flux, ltx, qwen = (TINY[name].given() for name in ("flux", "ltx", "qwenimage"))
    without = {name: item for name, item in ltx.items() if name not in ("num_frames", "height", "width")}
    # Positions from elsewhere, as pipelines with conditions hand them over.
    without["video_coords"] = noise(1, 3, 288).abs()
    return {
        "flux": ({**flux, "img_ids": flux["img_ids"][torch.randperm(PIXELS)]}, "384 tokens are not those of a grid"),
        "ltx": (without, "needs the arguments num_frames, height and width"),
        "qwenimage": ({**qwen, "hidden_states": noise(1, 190, 4)}, "384 tokens and the model 190"),
    }


@pytest.mark.parametrize("case", ["flux", "ltx", "qwenimage"])
def test_a_wrong_grid_is_an_error(case: str) -> None:
    model = TINY[case].make()
    expected = run(model, TINY[case].given())
    given, message = wrong_grids()[case]
    with tamis.apply(model, EVERYTHING, order="hilbert", **EXACT):
        with pytest.raises(ValueError, match=message):
            run(model, given)
        torch.testing.assert_close(run(model, TINY[case].given()), expected, **CLOSE)
    assert torch.equal(run(model, TINY[case].given()), expected)


def unknown() -> tuple[nn.Module, dict[str, Any]]:
    """A model that the table does not name, whose attention does not know the dispatcher either."""
    settings = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4}
    model = make("AllegroTransformer3DModel", **settings, num_layers=1, cross_attention_dim=24, caption_channels=16)
    return model, {
        "hidden_states": video(),
        "encoder_hidden_states": noise(1, TEXT, 16),
        "timestep": torch.tensor([500]),
    }


def test_models_that_the_table_does_not_name() -> None:
    model, given = unknown()
    expected = run(model, given)
    with tamis.apply(model, EVERYTHING, **EXACT) as handle:
        torch.testing.assert_close(run(model, given), expected, **CLOSE)
    assert handle.calls == {"sparse": 1, "dense": 1}
    assert handle.dense_reasons == {"cross-attention": 1}
    with pytest.raises(tamis.UnsupportedError, match=r"order must be None with Allegro.* is known of WanTransformer3D"):
        tamis.apply(model, order="hilbert")
    assert torch.equal(run(model, given), expected)


def wan() -> tuple[nn.Module, dict[str, Any]]:
    return TINY["wan"].make(), TINY["wan"].given()


def test_wrong_use_leaves_the_model_untouched() -> None:
    model, given = wan()
    before, expected = state(model), run(model, given)
    strange = Profile({"blocks.0.attn3": (Stage(LayerSettings(SOME)),)})
    for options, message in (
        ({"order": "spiral"}, "order must be one of row, column, time, random, hilbert, or None, got 'spiral'"),
        ({"predictor": strange}, "does not have: blocks.0.attn3; did you mean blocks.0.attn1"),
        ({"schedule": Schedule(dense_layers=["blocks.0.attn2"])}, "no attention layer 'blocks.0.attn2'"),
    ):
        with pytest.raises(ValueError, match=message):
            tamis.apply(model, **options)  # type: ignore[arg-type]
        assert state(model) == before
    with tamis.apply(model, EVERYTHING, **EXACT) as handle:
        inside = state(model)
        with pytest.raises(ValueError, match="WanTransformer3DModel runs through tamis already"):
            tamis.apply(model)
        with pytest.raises(ValueError, match="WanTransformer3DModel runs through tamis already"):
            install(model, dense)  # as capture and tune do
        assert state(model) == inside
        torch.testing.assert_close(run(model, given), expected, **CLOSE)
    handle.remove()
    assert state(model) == before
    with pytest.raises(TypeError, match=r"got Linear .which is no diffusers model"):
        tamis.apply(nn.Linear(2, 2))
    from diffusers import AutoencoderTiny

    with pytest.raises(tamis.UnsupportedError, match="AutoencoderTiny has no attention modules"):
        tamis.apply(AutoencoderTiny())


def test_other_attention_backends_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    model, given = wan()
    before = state(model)
    monkeypatch.setattr(model.blocks[0].attn1.processor, "_attention_backend", AttentionBackendName.FLEX)
    with pytest.raises(tamis.UnsupportedError, match=r"blocks.0.attn1 of Wan.* uses the attention backend 'flex'"):
        tamis.apply(model)
    monkeypatch.setattr(model.blocks[0].attn1.processor, "_attention_backend", None)
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.SAGE)
    with pytest.raises(tamis.UnsupportedError, match="backend 'sage', which does not call"):
        tamis.apply(model)
    assert state(model) == before
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName._NATIVE_MATH)
    with tamis.apply(model, EVERYTHING) as handle:
        run(model, given)
    assert handle.calls["sparse"] == 2


def test_forwards_replaced_by_others_meanwhile() -> None:
    """As accelerate does to move weights: whoever comes later keeps what he put there."""
    model, given = wan()
    expected = run(model, given)
    handle = tamis.apply(model, SOME, **EXACT)
    calls: list[str] = []

    def wrap(module: Any, name: str) -> Any:
        inner = module.forward

        def outer(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return inner(*args, **kwargs)

        module.forward = outer
        return outer

    attention = model.get_submodule("blocks.0.attn1")
    outer = wrap(model, "model"), wrap(attention, "attention")
    assert differ(run(model, given), expected)
    handle.remove()
    assert torch.equal(run(model, given), expected)
    assert calls == ["model", "attention"] * 2
    assert (model.forward, attention.forward) == outer


def test_gradients_run_dense() -> None:
    model, given = wan()
    model.train()
    with tamis.apply(model) as handle:
        model(**given).sample.sum().backward()
    assert handle.calls["sparse"] == 0
    assert handle.dense_reasons == {"gradients": 2, "cross-attention": 2}


def pipeline(second: nn.Module | None = None) -> Any:
    """Wan's own pipeline without its text encoder and decoder; with a second transformer for late steps."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=TINY["wan"].make(),
        transformer_2=second,
        boundary_ratio=None if second is None else 0.6,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def denoise(pipe: Any, steps: int = 4) -> Tensor:
    """Guided: the transformer is called twice a step."""
    frames: Tensor = pipe(
        prompt_embeds=noise(1, TEXT, 16),
        negative_prompt_embeds=noise(1, TEXT, 16) * 2,
        height=16 * VIDEO[1],
        width=16 * VIDEO[2],
        num_frames=9,
        num_inference_steps=steps,
        guidance_scale=3.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).frames
    return frames


def test_pipelines_tell_the_step() -> None:
    pipe = pipeline()
    expected = denoise(pipe)
    schedule = Schedule(dense_steps=1, dense_layers=1)
    with tamis.apply(pipe, SOME, schedule=schedule, order="hilbert", **EXACT) as handle:
        assert handle.step == 0
        for videos in (1, 2):  # steps begin again with every video
            assert differ(denoise(pipe), expected)
            assert handle.step == 4
            assert handle.dense_reasons["a dense layer of the schedule"] == videos * 8
            assert handle.dense_reasons["one of the first 1 steps"] == videos * 2
            assert handle.calls["sparse"] == videos * 6
        handle.start()
        assert handle.step == 0
        twin = copy.deepcopy(pipe.scheduler)
        twin.set_timesteps(3)
        assert handle.step == 0 and twin.step.__self__ is twin
        assert len(pipe.scheduler.timesteps) == 4
    assert torch.equal(denoise(pipe), expected)
    assert "step" not in vars(pipe.scheduler) and "set_timesteps" not in vars(pipe.scheduler)


def test_pipelines_with_two_transformers() -> None:
    pipe = pipeline(TINY["wan"].make())
    expected = denoise(pipe)
    names = ["blocks.0.attn1", "blocks.1.attn1", "transformer_2.blocks.0.attn1", "transformer_2.blocks.1.attn1"]
    assert attention_layers(pipe) == names
    with tamis.apply(pipe, EVERYTHING, **EXACT) as handle:
        torch.testing.assert_close(denoise(pipe), expected, **CLOSE)
        with pytest.raises(ValueError, match="runs through tamis already"):
            tamis.apply(pipe.transformer_2)
    assert [name for name in names if handle.stats()[name].sparse] == names
    with tamis.apply(pipe.transformer_2), pytest.raises(ValueError, match="runs through tamis already"):
        tamis.apply(pipe)
    assert torch.equal(denoise(pipe), expected)
    pipe.transformer = pipe.transformer_2 = None
    with pytest.raises(tamis.UnsupportedError, match="WanPipeline has none of transformer"):
        tamis.apply(pipe)


def test_capture_tune_profile_and_audit(tmp_path: Path) -> None:
    model, given = wan()
    record(model, lambda: model(**given), tmp_path)
    captures = Captures(tmp_path)
    assert captures.layers == attention_layers(model)
    assert captures.model == "WanTransformer3DModel"
    profile = tamis.tune(model, [given], l1=0.3, pv_l1=0.35)
    assert list(profile.layers) == attention_layers(model)
    with tamis.apply(model, profile, audit=Audit(share=1.0, budget=0.4, seed=0)) as handle:
        run(model, given)
    assert handle.calls["sparse"] == 2
    assert set(handle.audit()) == set(attention_layers(model))
    assert all(0 < layer.estimate < 0.4 for layer in handle.audit().values())


def test_blocks_compiled_one_by_one_share_graphs() -> None:
    """As pipelines do: one graph for the first block, where tokens change their order, and one for all others."""
    model, given = wan()
    model.blocks.extend(TINY["wan"].make().blocks)
    with tamis.apply(model, SOME, order="hilbert", **EXACT):
        expected = run(model, given)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        torch.testing.assert_close(run(model, given), expected, **CLOSE)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_the_guide_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Every block of docs/diffusers.md; what it says is printed, is. Its table names the models of the table."""
    text = (Path(__file__).parent.parent / "docs" / "diffusers.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)`", text, re.MULTILINE) == list(adapters.TABLE)
    run_guide(text, capsys)


def test_a_deep_copy_is_a_model_of_its_own() -> None:
    """It computes with its own weights, with its class's forward, whenever it was taken."""
    tiny = TINY["wan"]
    model, given = tiny.make(), tiny.given()
    expected = run(model, given)
    with tamis.apply(model, SOME, min_queries=1):
        twin = copy.deepcopy(model)
        assert run(twin, given).equal(expected)
    for weights in twin.parameters():
        weights.data.mul_(0.5)
    assert differ(run(twin, given), expected)
    assert run(model, given).equal(expected)
    with tamis.apply(twin, SOME, min_queries=1) as handle:
        run(twin, given)
    assert handle.calls["sparse"] > 0


def test_an_order_is_refused_under_gradient_checkpointing() -> None:
    """Blocks would be run again without the tokens' order."""
    tiny = TINY["wan"]
    model, given = tiny.make(), tiny.given()
    model.enable_gradient_checkpointing()
    model.train()
    with (
        tamis.apply(model, order="hilbert"),
        pytest.raises(tamis.UnsupportedError, match="order must be None with grad"),
    ):
        model(**given)
    with tamis.apply(model):
        model(**given).sample.square().sum().backward()
