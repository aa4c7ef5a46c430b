"""A tuning run's journal: whose it is, who has it, what it measured, and what happens to files that are none."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_tuning import Calls, planted, texts, tiny
from torch import Tensor

from tamis.integrations.capture import Captures, record
from tamis.tuning import Budget, choose, settings, tune_source
from tamis.tuning.identity import Digest, Unidentified
from tamis.tuning.journal import Journal
from tamis.tuning.run import Run, Task, survey
from tamis.tuning.sources import CaptureSource, ModelSource


def identity(value: Any) -> str:
    digest = Digest()
    digest.value(value)
    return digest.hexdigest()


def test_parts_do_not_run_into_each_other() -> None:
    one, other = Digest(), Digest()
    for digest, parts in ((one, ("ab", "c")), (other, ("a", "bc"))):
        for part in parts:
            digest.add(part)
    assert one.hexdigest() != other.hexdigest()


def test_values_are_told_apart() -> None:
    numpy = pytest.importorskip("numpy")
    ids = torch.arange(6)
    different = [
        {"n": [1, 12]},
        {"n": [11, 2]},
        [{"a": 1}, {"b": 2}],
        [{"a": 1, "b": 2}],
        "ab",
        ["a", "b"],
        (["a"], "b"),
        1,
        True,
        1.0,
        None,
        b"",
        ids,
        ids.int(),
        ids.view(2, 3),
        ids.flip(0),
        ids[:0],
        torch.tensor(0.0),
        torch.tensor(-0.0),
        torch.tensor(0.0, dtype=torch.bfloat16),
        numpy.arange(6),
        numpy.arange(6).astype("int32"),
    ]
    assert len({identity(value) for value in different}) == len(different)
    assert identity({"x": ids.view(2, 3).T}) == identity({"x": ids.view(2, 3).T.contiguous()})
    for unknown in (print, object(), [partial(print, 1)], torch.ones(2, device="meta"), numpy.array([object()])):
        with pytest.raises(Unidentified):
            identity(unknown)


def permuted(model: Any) -> None:
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.copy_(weight.flip(0))


def swapped(model: Any) -> None:
    first, second = (model.model.layers[0].self_attn.get_submodule(name).weight for name in ("k_proj", "v_proj"))
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)


def buffered(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


@pytest.mark.parametrize("change", [permuted, swapped, buffered, lambda model: model.bfloat16()])
def test_a_model_is_told_by_its_weights(change: Callable[[Any], Any]) -> None:
    """Weights of the same sum in another order, another dtype, and what is no parameter."""
    one, other = tiny(1), tiny(1)
    inputs = texts(1, 200)
    assert ModelSource(one, inputs).identity() == ModelSource(other, inputs).identity()
    with torch.no_grad():
        change(other)
    assert ModelSource(one, inputs).identity() != ModelSource(other, inputs).identity()


def test_functions_are_told_by_the_calls_they_make() -> None:
    """A lambda has no bytes: what its calls hold counts. Every input counts, not the first alone."""
    model = tiny(1)
    one, two = texts(2, 200)

    def of(*inputs: Any) -> str:
        return ModelSource(model, inputs).identity()

    first = of(lambda: model(one))
    assert first == of(lambda: model(one))
    assert first != of(lambda: model(two))
    assert of(one, one) != of(one, two)
    assert of(one, lambda: model(one)) != of(one, lambda: model(two))
    source = ModelSource(model, [lambda: model(one[:, :50])])
    source.identity()
    assert source.left_out == Counter(), "counted when it is read, not when it is identified"


def test_captures_are_told_by_their_contents(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = tiny(1)
    for number, ids in enumerate(texts(2, 200)):
        record(model, lambda ids=ids: model.model(ids, use_cache=False), tmp_path / str(number))
    one, two = (CaptureSource(Captures(tmp_path / name)).identity() for name in "01")
    assert one != two


class Named(Calls):
    """Prepared calls with another name."""

    def identity(self) -> str:
        return "other"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"steps": [3]}, "steps"),
        ({"calls_per_step": 2}, "calls per step"),
        ({"rows": 5}, "rows"),
        ({"backend": "reference"}, "backend"),
        ({"held_out": Named([[planted(1)]])}, "held out"),
        ({"source": Named([[planted(0)]])}, "inputs"),
    ],
)
def test_a_journal_is_for_one_question(tmp_path: Path, change: dict[str, Any], name: str) -> None:
    asked: dict[str, Any] = {"source": Calls([[planted(0)]]), "held_out": None, "budget": Budget(0.05, 0.06)}
    path = tmp_path / "journal"
    tune_source(**asked, resume=path)
    with pytest.raises(ValueError, match=rf"of another run \(other {name}\)"):
        tune_source(**asked | change, resume=path)


def test_another_processor_is_another_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal"
    tune_source(Calls([[planted(0)]]), None, Budget(), resume=path)
    monkeypatch.setattr("tamis.backends.cpu.target", lambda: "abacus")
    with pytest.raises(ValueError, match=r"of another run \(other cpu\)"):
        tune_source(Calls([[planted(0)]]), None, Budget(), resume=path)


def test_results_belong_to_the_settings_that_were_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other trials or decisions, by another budget or another version of a table: none takes the numbers of others."""
    inputs, held = [[planted(0)], [planted(1)]], [[planted(2)]]
    path = tmp_path / "journal"

    def both(budget: Budget) -> None:
        alone = tune_source(Calls(inputs), Calls(held), budget)
        assert tune_source(Calls(inputs), Calls(held), budget, resume=path) == alone

    both(Budget(0.05, 0.06))
    both(Budget(0.2, 0.3))
    monkeypatch.setattr(choose, "THRESHOLDS", (choose.THRESHOLDS[0], *reversed(choose.THRESHOLDS[1:])))
    both(Budget(0.2, 0.3))
    real = settings.best
    monkeypatch.setattr(settings, "best", lambda *of: real(*of) * 0)
    both(Budget(0.2, 0.3))


def line(text: bytes) -> bytes:
    return b"%08x " % zlib.crc32(text) + text + b"\n"


@pytest.mark.parametrize(
    "content",
    [
        b"my only copy, no newline at its end",
        b"notes\nof several\nlines\n",
        line(b"[]"),
        line(b'{"x":1}'),
        line(b'{"head":null}'),
        line(b'{"head":{'),
        line(b'{"head":{}}') + line(b"[]"),
        line(b'{"head":{}}') + line(b'{"key":1,"value":2}'),
        line(b'{"head":{}}') + line(b'{"key":"a"}'),
        line(b'{"head":{}}') + line(b'{"head":{}}'),
        b"00000000",
    ],
)
def test_a_file_that_is_no_journal_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"no journal|damaged"):
        Journal(path, {})
    assert path.read_bytes() == content
    with pytest.raises((ValueError, OSError)):
        Journal(Path("/dev/null"), {})


def test_a_journal_without_one_of_its_lines_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    tune_source(Calls([[planted(0)]]), None, Budget(), resume=path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], *lines[2:]]))
    with pytest.raises(ValueError, match="is damaged: it lacks 'survey /0/layer/0/0'"):
        tune_source(Calls([[planted(0)]]), None, Budget(), resume=path)


def test_one_run_at_a_time_has_a_journal(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    path = tmp_path / "journal"
    first = Journal(path, {})
    with pytest.raises(ValueError, match="in use by another run"):
        Journal(path, {})
    first.put("a", 1)
    first.close()
    first.close()
    second = Journal(path, {})
    assert second["a"] == 1
    second.close()
    asked: Any = {"budget": Budget(), "held_out": None, "resume": tmp_path / "free"}
    with pytest.raises(RuntimeError, match="stopped"):
        tune_source(Stopping([[planted(0)]]), **asked)
    tune_source(Calls([[planted(0)]]), **asked)


class Stopping(Calls):
    """Prepared calls that cannot be read."""

    def visit(self, number: int, function: Callable[[Any], None]) -> None:
        raise RuntimeError("stopped")


def test_calls_of_a_batch_are_kept_apart() -> None:
    """Two texts at once are two samples: what each of them alone would be."""
    model, inputs = tiny(1), texts(2, 200)

    def surveyed(*given: Tensor) -> Tensor:
        run = Run(Journal(None, {}), (), 1, 1, None)
        (found,) = run.read("survey", ModelSource(model, given), Task(survey, (16, None))).values()
        return found["square"]

    both, alone = surveyed(torch.cat(inputs)), surveyed(*inputs)
    # The model's own products, for two texts and for one.
    torch.testing.assert_close(both, alone, rtol=1e-3, atol=1e-9)
    assert not torch.allclose(both[0], both[1], rtol=0.1), "or the test would show nothing"


def test_layers_are_fed_what_dense_attention_gives() -> None:
    """Later layers see exact outputs of earlier ones, of every one of a batch."""
    model = tiny(2)
    ids = torch.cat(texts(2, 200))
    with torch.no_grad():
        states = model.model(ids, output_hidden_states=True).hidden_states[1]
    seen: dict[tuple[str, int], Tensor] = {}
    ModelSource(model, [ids]).visit(0, lambda call: seen.update({(call.layer, call.batch): call.value}))
    layer = model.model.layers[1]
    with torch.no_grad():
        value = layer.self_attn.v_proj(layer.input_layernorm(states)).view(2, 200, 2, 8).transpose(1, 2)
    for batch in range(2):
        # fp32 through one layer, in two orders of summation.
        torch.testing.assert_close(seen["model.layers.1.self_attn", batch][0], value[batch], atol=1e-5, rtol=1e-4)
