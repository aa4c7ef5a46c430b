"""The gate of `tamis bench gpu`: what a call computed against plain torch in fp64, before anything is timed."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tamis.bench.gpu_calls import Candidate, Inputs, Shape
from tamis.block_mask import BlockMask
from tamis.errors import UnsupportedError
from tamis.predictors.sparge import Sparge
from tamis.stats import AttentionOutput, AttentionStats

# Relative L1. bf16: twice its unit with room for the sum of P; int8 and e4m3 on normals: .015 and .04, doubled.
_LIMIT = {"full": 0.02, "int8": 0.05, "fp8": 0.1}
_LEAST_AGREEMENT = 0.98  # of a prediction with the reference backend's: blocks at the threshold may differ by rounding
_HEADS, _ROWS = 4, 64  # that are computed exactly


class Verdict(NamedTuple):
    """What a candidate's row gets, and whether tamis is to blame: `wrong` of its output, `broken` if it has none."""

    density: float | None = None
    error: float | None = None
    agreement: float | None = None
    failure: str | None = None
    wrong: bool = False
    broken: bool = False


def check(shape: Shape, candidate: Candidate, inputs: Inputs) -> Verdict:
    """Run a candidate once and judge it; one that cannot run is no reason to stop."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # torch tells by warnings why a backend of SDPA refuses
        try:
            verdict = _judge(shape, candidate, inputs)
        except Exception as error:  # whatever a peer's compiler comes up with
            failure = one_line(error, [str(warning.message) for warning in caught])
            return Verdict(failure=failure, broken=candidate.ours and not isinstance(error, UnsupportedError))
    fault = _fault(candidate, verdict)
    return verdict if fault is None else verdict._replace(failure=fault, wrong=candidate.ours)


def _judge(shape: Shape, candidate: Candidate, inputs: Inputs) -> Verdict:
    """The density that ran, and the error against fp64 or a prediction's agreement with the reference backend."""
    with _poisoned() if candidate.ours else contextlib.nullcontext():
        answer = candidate.call(inputs)
    if candidate.name == "predict":
        mask = answer[0]
        return Verdict(density=mask.density(shape.causal), agreement=_agreement(shape, candidate, inputs, mask))
    if candidate.name == "quantise value":
        return Verdict()
    output, stats = _parts(answer)
    mask = candidate.mask(inputs)
    density = stats.density if stats is not None else 1.0 if mask is None else mask.density(shape.causal)
    error = sampled_error(inputs, output, mask, causal=shape.causal)
    finite = bool(output.isfinite().all()) and error < float("inf")
    return Verdict(density=density, error=error if finite else None)


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """Inside, `torch.empty` hands out NaN: else what is never written may hold the right output of the call before."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])


def _parts(answer: Any) -> tuple[Tensor, AttentionStats | None]:
    if isinstance(answer, Tensor):
        return answer, None
    return (answer.output, answer.stats) if isinstance(answer, AttentionOutput) else answer


def _fault(candidate: Candidate, verdict: Verdict) -> str | None:
    """What is wrong with a candidate that ran."""
    if candidate.name == "quantise value":
        return None
    if candidate.name == "predict":
        agreement = verdict.agreement or 0.0
        low = f"only {agreement:.1%} of its blocks are the reference's"
        return None if agreement >= _LEAST_AGREEMENT else low
    limit = _LIMIT.get(candidate.precision, _LIMIT["full"])
    if verdict.error is None:
        return "its output is not finite"
    return None if verdict.error <= limit else f"relative L1 {verdict.error:.2e} is above {limit:.0e}"


def _agreement(shape: Shape, candidate: Candidate, inputs: Inputs, mask: BlockMask) -> float:
    """Blocks in common with the reference backend's prediction / blocks of either, in the first head."""
    query, key = inputs.query[:1, :1], inputs.key[:1, :1]
    predictor = Sparge(topk=candidate.density, similarity=-1)
    expected = predictor(query, key, causal=shape.causal, backend="reference").to_dense()
    found = mask.to_dense()[:1, :1]
    return int((found & expected).sum()) / max(1, int((found | expected).sum()))


def sampled_error(inputs: Inputs, output: Tensor, mask: BlockMask | None, *, causal: bool) -> float:
    """Relative L1 error of some rows of some heads against fp64."""
    batch, heads, length, dim = inputs.query.shape
    group = heads // inputs.key.shape[1]
    rows = torch.linspace(0, length - 1, min(_ROWS, length), device=output.device).round().to(torch.int64)
    places = torch.arange(length, device=output.device)
    error = size = 0.0
    for flat in torch.linspace(0, batch * heads - 1, min(_HEADS, batch * heads)).round().to(torch.int64).tolist():
        item, head = divmod(flat, heads)
        key, value = (tensor[item, head // group].double() for tensor in inputs[1:])
        scores = inputs.query[item, head, rows].double() @ key.T * dim**-0.5
        if mask is not None:
            scores.masked_fill_(~_kept(mask, item, head, rows), float("-inf"))
        if causal:
            scores.masked_fill_(rows[:, None] < places, float("-inf"))
        exact = scores.softmax(-1) @ value
        error += float((output[item, head, rows].double() - exact).abs().sum())
        size += float(exact.abs().sum())
    return error / size


def _kept(mask: BlockMask, item: int, head: int, rows: Tensor) -> Tensor:
    """Which keys these rows' blocks keep, bool `[rows, kv_len]`."""
    counts, indices = mask.kv_num_blocks, mask.kv_indices
    item, head = min(item, counts.shape[0] - 1), min(head, counts.shape[1] - 1)
    lists = BlockMask(counts[item, head][None, None], indices[item, head][None, None], mask.block_size, mask.seq_lens)
    blocks = lists.to_dense()[0, 0, rows // mask.block_size[0]]
    return blocks.repeat_interleave(mask.block_size[1], dim=-1)[:, : mask.seq_lens[1]]


def one_line(error: BaseException, said: Iterable[str] = ()) -> str:
    """An error in one line, and the warnings that came before it."""
    parts = [f"{type(error).__name__}: {error}", *dict.fromkeys(said)]
    return "; ".join(" ".join(part.split())[:300] for part in parts)
