"""Captured attention calls: what is written is what the model computed, and nothing broken is read."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tamis.integrations import capture_files
from tamis.integrations.capture import Captured, Captures, capture, record

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

LAYERS = [f"model.layers.{number}.self_attn" for number in range(3)]
SMALL = {
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
TOKENS = 33


def make(name: str = "Llama", **settings: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **settings})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def ids(tokens: int = TOKENS, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 64, (1, tokens), generator=torch.Generator().manual_seed(seed))


def seen(model: Any, run: Callable[[], Any]) -> list[Captured]:
    """Every call, as it is while the model runs."""
    found: list[Captured] = []

    def visit(call: Captured) -> torch.Tensor:
        found.append(call)
        return scaled_dot_product_attention(
            call.query, call.key, call.value, is_causal=call.causal, scale=call.scale, enable_gqa=True
        )

    capture(model, run, visit)
    return found


@pytest.fixture
def model() -> Any:
    return make()


@pytest.fixture
def folder(model: Any, tmp_path: Path) -> Path:
    """A folder with all layers of two inputs."""
    for number in range(2):
        record(model, lambda number=number: model(ids(seed=number)), tmp_path / "captures", input=number)
    return tmp_path / "captures"


def test_a_capture_is_what_the_model_computed(model: Any, folder: Path) -> None:
    captures = Captures(folder)
    assert (captures.layers, captures.inputs, captures.steps) == (LAYERS, [0, 1], [0])
    assert (captures.model, captures.skipped, len(captures)) == ("LlamaForCausalLM", (), 6)
    found = list(captures)
    assert [(call.input, call.index) for call in found] == [(i, layer) for i in range(2) for layer in range(3)]
    expected = seen(model, lambda: model(ids(seed=0))) + seen(model, lambda: model(ids(seed=1)))
    for call, exact in zip(found, expected, strict=True):
        assert (call.name, call.causal, call.scale, call.window) == (exact.name, True, exact.scale, None)
        assert (call.heads, call.num_heads, call.step) == (tuple(range(6)), 6, 0)
        assert call.query.shape == (1, 6, TOKENS, 8)
        assert call.key.shape == call.value.shape == (1, 2, TOKENS, 8)
        for name in ("query", "key", "value"):
            # fp32 sums of one tiny layer, in another order where a dense kernel other than SDPA's ran before.
            torch.testing.assert_close(getattr(call, name), getattr(exact, name), atol=1e-5, rtol=1e-5)


def test_load_takes_names_and_numbers(folder: Path) -> None:
    captures = Captures(folder)
    assert torch.equal(captures.load(1, input=1).query, captures.load(LAYERS[1], 1, 0).query)
    assert not torch.equal(captures.load(1, input=1).query, captures.load(1, input=0).query)
    with pytest.raises(ValueError, match=r"no layer 3 of input 0, step 0: layers \['model.layers.0"):
        captures.load(3)
    with pytest.raises(ValueError, match=r"input 2, step 0: .* inputs \[0, 1\]"):
        captures.load(LAYERS[0], 2)


def test_running_a_capture_does_not_change_the_model(model: Any, tmp_path: Path) -> None:
    with torch.inference_mode():
        expected = model(ids()).logits
        found = []
        record(model, lambda: found.append(model(ids()).logits), tmp_path / "captures")
        after = model(ids()).logits
    assert torch.equal(after, expected)
    torch.testing.assert_close(found[0], expected, atol=2e-5, rtol=1e-4)  # two dense kernels, fp32, three tiny layers


@pytest.mark.parametrize(
    ("wanted", "heads", "kv_heads"),
    [([0], [0, 1, 2], [0]), ([4], [3, 4, 5], [1]), ([5, 0], list(range(6)), [0, 1]), (None, list(range(6)), [0, 1])],
)
def test_heads_come_in_whole_groups(
    model: Any, tmp_path: Path, wanted: list[int] | None, heads: list[int], kv_heads: list[int]
) -> None:
    record(model, lambda: model(ids()), tmp_path / "captures", heads=wanted)
    everything = seen(model, lambda: model(ids()))
    for call in Captures(tmp_path / "captures"):
        exact = everything[call.index]
        assert list(call.heads or ()) == heads
        assert torch.equal(call.query, exact.query[:, heads])
        assert torch.equal(call.key, exact.key[:, kv_heads])
        part = scaled_dot_product_attention(call.query, call.key, call.value, is_causal=True, enable_gqa=True)
        whole = scaled_dot_product_attention(exact.query, exact.key, exact.value, is_causal=True, enable_gqa=True)
        # The heads are independent: the same sums.
        torch.testing.assert_close(part, whole[:, heads], atol=1e-6, rtol=1e-6)


def test_layers_by_number_and_name(model: Any, tmp_path: Path) -> None:
    record(model, lambda: model(ids()), tmp_path / "captures", layers=[2, LAYERS[0]])
    captures = Captures(tmp_path / "captures")
    assert captures.layers == [LAYERS[0], LAYERS[2]]
    assert [call.index for call in captures] == [0, 2]
    record(model, lambda: model(ids()), tmp_path / "captures", layers=[1])
    assert Captures(tmp_path / "captures").layers == LAYERS


def test_steps_count_the_calls_of_a_layer(model: Any, tmp_path: Path) -> None:
    def generate() -> None:
        model.generate(ids(), max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)

    record(model, generate, tmp_path / "captures", steps=[0, 2], layers=[1])
    captures = Captures(tmp_path / "captures")
    assert captures.steps == [0, 2]
    assert captures.load(1, step=0).query.shape[2] == TOKENS
    later = captures.load(1, step=2)
    assert (later.query.shape[2], later.key.shape[2]) == (1, TOKENS + 2)
    with pytest.raises(ValueError, match="steps has 9, and no layer was called more than 4 times"):
        record(model, generate, tmp_path / "other", steps=[0, 9])


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")]
)
def test_dtype(model: Any, tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    record(model, lambda: model(ids()), tmp_path / "captures", dtype=dtype, layers=[0])
    (call,) = Captures(tmp_path / "captures")
    (exact, *_) = seen(model, lambda: model(ids()))
    assert call.query.dtype == call.key.dtype == call.value.dtype == dtype
    assert torch.equal(call.value, exact.value.to(dtype))
    assert Captures(tmp_path / "captures").entries[0].dtype == name


def test_a_model_in_bf16_is_captured_in_bf16(tmp_path: Path) -> None:
    model = make().to(torch.bfloat16)
    record(model, lambda: model(ids()), tmp_path / "captures", layers=[0])
    assert next(iter(Captures(tmp_path / "captures"))).query.dtype == torch.bfloat16


def test_values_that_do_not_fit_the_dtype_are_refused(model: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(1e6)
    with pytest.raises(ValueError, match=r"value of model.layers.1.self_attn reaches .* too large for torch.float16"):
        record(model, lambda: model(ids()), tmp_path / "captures", dtype=torch.float16)
    assert Captures(tmp_path / "captures").layers == LAYERS[:1]


def test_windows_are_captured(tmp_path: Path) -> None:
    model = make("Mistral", sliding_window=9)
    record(model, lambda: model(ids()), tmp_path / "captures")
    assert [(call.causal, call.window) for call in Captures(tmp_path / "captures")] == [(True, 9)] * 3


def test_what_the_format_cannot_hold_is_skipped_with_the_reason(tmp_path: Path) -> None:
    model = make("Gemma2", head_dim=8, attn_logit_softcapping=5.0)
    with pytest.raises(ValueError, match=r"no attention call could be captured \(model.layers.0.self_attn: softcap\)"):
        record(model, lambda: model(ids()), tmp_path / "captures")
    skipped = Captures(tmp_path / "captures").skipped
    assert [(call.layer, call.reason) for call in skipped] == [(name, "softcap") for name in LAYERS]


@pytest.mark.parametrize("kind", ["padding", "a batch of 2, not one input"])
def test_padding_and_batches_are_skipped(model: Any, tmp_path: Path, kind: str) -> None:
    mask = torch.ones(1, TOKENS, dtype=torch.long)
    mask[0, :5] = 0
    inputs = {"input_ids": ids(), "attention_mask": mask} if kind == "padding" else {"input_ids": ids().repeat(2, 1)}
    with pytest.raises(ValueError, match=kind):
        record(model, lambda: model(**inputs), tmp_path / "captures")
    record(model, lambda: model(ids()), tmp_path / "captures", input=1)
    assert Captures(tmp_path / "captures").inputs == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input": -1}, "input must be whole numbers of at least 0, got -1"),
        ({"layers": [True]}, r"layers must be whole numbers of at least 0, got \[True\]"),
        ({"layers": []}, "layers must be a list with something in it, or None for all"),
        ({"layers": LAYERS[0]}, "layers must be a list"),
        ({"layers": ["model.nothing"]}, "'model.nothing', and LlamaForCausalLM has no module of that name"),
        ({"layers": [0, 7]}, "layers has 7, which was not called: 0 model.layers.0.self_attn, 1 "),
        ({"layers": ["model.norm"]}, "layers has 'model.norm', which was not called"),
        ({"heads": [6]}, "heads has 6, and model.layers.0.self_attn has 6 heads"),
        ({"heads": [-1]}, "heads must be whole numbers"),
        ({"steps": [1]}, "steps has 1, and no layer was called more than 1 times"),
        ({"dtype": torch.int8}, "dtype must be one of torch.float32"),
        ({"max_bytes": 0}, "max_bytes must be above 0"),
    ],
)
def test_wrong_arguments(model: Any, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record(model, lambda: model(ids()), tmp_path / "captures", **arguments)


def test_only_models_of_transformers(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel, got Linear"):
        record(torch.nn.Linear(2, 2), lambda: None, tmp_path / "captures", layers=["nothing"])
    assert not (tmp_path / "captures").exists()


def test_max_bytes_stops_before_it_is_exceeded(model: Any, tmp_path: Path) -> None:
    target = tmp_path / "captures"
    record(model, lambda: model(ids()), target, layers=[0])
    size = Captures(target).entries[0].bytes
    bound = 3 * size - 1  # one more fits, two do not
    with pytest.raises(ValueError, match=r"capturing model.layers.2.self_attn would bring .* over the .* GB allowed"):
        record(model, lambda: model(ids()), target, layers=[1, 2], max_bytes=bound)
    captures = Captures(target)
    assert captures.layers == LAYERS[:2]
    assert [call.index for call in captures] == [0, 1]
    assert sum(path.stat().st_size for path in target.glob("*.safetensors")) == 2 * size <= bound


def test_a_folder_is_not_mixed_up(model: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds step 0 of model.layers.0.self_attn for input 1 already"):
        record(model, lambda: model(ids()), folder, input=1)
    other = make("Mistral", sliding_window=None)
    with pytest.raises(ValueError, match="holds captures of LlamaForCausalLM, not MistralForCausalLM"):
        record(other, lambda: other(ids()), folder, input=2)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "diary").write_text("dear")
    for taken in (tmp_path / "home", tmp_path / "home" / "diary"):
        with pytest.raises(ValueError, match="is not empty and holds no captures"):
            record(model, lambda: model(ids()), taken)
    assert len(list(Captures(folder))) == 6


def test_an_interrupted_run_can_be_read_up_to_there(model: Any, tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    model.model.layers[1].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        record(model, lambda: model(ids()), tmp_path / "captures")
    assert [call.name for call in Captures(tmp_path / "captures")] == LAYERS[:2]


@pytest.mark.parametrize("renames", range(8))
def test_an_interrupted_write_leaves_no_half_file(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """Stopped before any of its renames: first the empty index, then file and index in turn, at last the index."""
    done = []

    def replace(source: Path, target: Path) -> None:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        os.rename(source, target)

    monkeypatch.setattr(capture_files.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        record(model, lambda: model(ids()), tmp_path / "captures")
    monkeypatch.undo()
    assert not list((tmp_path / "captures").glob(".part-*"))
    if renames == 0:
        with pytest.raises(ValueError, match=r"holds no captures: index.json is not there"):
            Captures(tmp_path / "captures")
    else:
        captures = Captures(tmp_path / "captures")
        assert [call.index for call in captures] == list(range((renames - 1) // 2))
    # What was not captured can be captured now, over a file that no index names.
    missing = list(range(max(renames - 1, 0) // 2, 3))
    if missing:
        record(model, lambda: model(ids()), tmp_path / "captures", layers=missing)
    assert Captures(tmp_path / "captures").layers == LAYERS


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / "index.json").read_text())
    change(content)
    (folder / "index.json").write_text(json.dumps(content))


def first(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    """A change of one field of the first entry."""
    return lambda content: content["entries"][0].update({name: value})


GOOD_NAME = "input000-step000-layer000.safetensors"


@pytest.mark.parametrize(
    "name",
    [
        "../" + GOOD_NAME,
        "/etc/passwd",
        "/tmp/" + GOOD_NAME,
        "sub/" + GOOD_NAME,
        "..\\" + GOOD_NAME,
        "C:" + GOOD_NAME,
        "..safetensors",
        ".safetensors",
        "index.json",
        GOOD_NAME + "\n",
        GOOD_NAME + "\0",
        "é.safetensors",
    ],
)
def test_names_do_not_leave_the_folder(folder: Path, name: str) -> None:
    (folder.parent / GOOD_NAME).write_bytes((folder / GOOD_NAME).read_bytes())
    edit(folder, first("file", name))
    with pytest.raises(
        ValueError, match=r"index.json: entries\[0\]: file must be the plain name of a .safetensors file"
    ):
        Captures(folder)


def test_links_do_not_leave_the_folder(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    (folder / GOOD_NAME).rename(outside)
    (folder / GOOD_NAME).symlink_to(outside)
    with pytest.raises(ValueError, match=rf"{GOOD_NAME} leads out of its folder: refused"):
        Captures(folder).load(0)
    assert Captures(folder).load(1).index == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "index.json is not JSON"),
        (b"{", "index.json is not JSON"),
        (b"\xff\xfe\xff", "index.json is not JSON"),
        (b"[" * 100_000, "index.json is not JSON"),
        (b"[]", "index.json must be an object, got list"),
        (b"{}", "index.json has no 'schema'"),
        (b'{"schema": 2}', "index.json has schema 2, this tamis reads 1: capture again"),
        (b'{"schema": "1"}', "schema must be a whole number"),
        (b'{"schema": 1}', "index.json has no 'model'"),
    ],
)
def test_a_broken_index_is_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / "index.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Captures(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(extra=1), "has 'extra', which schema 1 does not know"),
        (lambda index: index.update(model=1), "model must be text, got 1"),
        (lambda index: index.update(layers="abc"), "layers must be a list, got str"),
        (lambda index: index.update(layers=LAYERS[1:]), "layers does not name 'model.layers.0.self_attn'"),
        (lambda index: index.update(layers=[*LAYERS, LAYERS[0]]), "the same layer name twice"),
        (lambda index: index.update(skipped=[3]), r"skipped\[0\] must be an object"),
        (lambda index: index["entries"].append(index["entries"][0]), "the same file twice"),
        (lambda index: index["entries"][1].update(file=GOOD_NAME.upper()[:-11] + "safetensors"), "the same file twice"),
        (lambda index: index["entries"][1].update(layer=LAYERS[0]), "the same input, step and layer twice"),
        (lambda index: index["entries"][0].pop("bytes"), r"entries\[0\] has no 'bytes'"),
        (first("extra", 1), r"entries\[0\] has 'extra'"),
        (first("input", -1), r"entries\[0\]: input must be a whole number of at least 0, got -1"),
        (first("step", True), "step must be a whole number"),
        (first("causal", 1), "causal must be true or false, got 1"),
        (first("window", 0), "window must be a whole number of at least 1"),
        (first("scale", float("nan")), "scale must be a finite number or null, got nan"),
        (first("scale", "1"), "scale must be a finite number"),
        (first("dtype", "int8"), "dtype must be one of fp32, bf16, fp16, got 'int8'"),
        (first("sha256", "0"), "sha256 must be 64 hexadecimal digits"),
        (first("num_heads", 5), "num_heads 5 is no multiple of num_kv_heads 2"),
        (first("heads", [0, 1, 2]), r"heads must be all query heads of kv_heads \[0, 1\]"),
        (first("kv_heads", [1, 0]), "kv_heads must ascend below 2"),
        (first("kv_heads", [0, 2]), "kv_heads must ascend below 2"),
        (first("kv_heads", []), "kv_heads must ascend below 2"),
        (first("shapes", {"query": [1, 6, 33, 8]}), "shapes has no 'key'"),
        (lambda index: index["entries"][0]["shapes"].update(query=[1, 6, 33]), "do not fit together"),
        (lambda index: index["entries"][0]["shapes"].update(query=[1, 4, 33, 8]), "do not fit together"),
        (lambda index: index["entries"][0]["shapes"].update(key=[1, 2, 32, 8]), "do not fit together"),
        (lambda index: index["entries"][0]["shapes"].update(query=[1, 6, 33, 4]), "do not fit together"),
        (lambda index: index["entries"][0]["shapes"].update(query=[1, 6, 0, 8]), "do not fit together"),
    ],
)
def test_a_wrong_index_is_refused(folder: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        Captures(folder)


def spoil(folder: Path, content: bytes, *, admit: bool) -> None:
    """Put other bytes into the first file; `admit` makes size and digest of the index agree with them."""
    (folder / GOOD_NAME).write_bytes(content)
    if admit:
        edit(folder, first("bytes", len(content)))
        edit(folder, first("sha256", hashlib.sha256(content).hexdigest()))


def test_spoiled_files_are_refused(folder: Path) -> None:
    path = folder / GOOD_NAME
    good = path.read_bytes()
    cases: list[tuple[bytes, bool, str]] = [
        (good[:-1], False, "cut short or altered"),
        (b"", False, "cut short or altered"),
        (good[:-1] + bytes([good[-1] ^ 1]), False, "does not have the sha256"),
        (good[:-1], True, "no readable safetensors file"),
        (good[:100], True, "no readable safetensors file"),
        (b"\xff" * 100, True, "no readable safetensors file"),
        (b"\x80\x04N.", True, "no readable safetensors file"),  # a pickle
    ]
    for content, admit, message in cases:
        spoil(folder, content, admit=admit)
        with pytest.raises(ValueError, match=rf"{GOOD_NAME}.*{message}"):
            Captures(folder).load(0)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{GOOD_NAME} is not there"):
        Captures(folder).load(0)


def test_other_tensors_are_refused(folder: Path) -> None:
    call = Captures(folder).load(0)
    right = {"query": call.query, "key": call.key, "value": call.value}
    for wrong in (
        {"query": call.query, "key": call.key},
        {**right, "more": torch.ones(1)},
        {**right, "key": call.key[:, :, 1:].contiguous()},
        {**right, "value": call.value.half()},
        {**right, "value": call.value.view(torch.int32)},
    ):
        spoil(folder, safetensors_torch.save(wrong), admit=True)
        with pytest.raises(ValueError, match=rf"{GOOD_NAME} holds .* index.json says"):
            Captures(folder).load(0)
    spoil(folder, safetensors_torch.save(right), admit=True)
    assert torch.equal(Captures(folder).load(0).query, call.query)


def test_reading_needs_no_transformers(folder: Path) -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from tamis.integrations.capture import Captures\n"
        "print(sum(call.query.numel() for call in Captures(sys.argv[1])))"
    )
    result = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert int(result.stdout) == 6 * 6 * TOKENS * 8


def test_files_can_be_read_by_whom_the_umask_allows(folder: Path) -> None:
    plain = folder.parent / "plain"
    plain.touch()
    assert {path.stat().st_mode for path in folder.iterdir()} == {plain.stat().st_mode}


def test_nothing_there(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="holds no captures"):
            Captures(place)
