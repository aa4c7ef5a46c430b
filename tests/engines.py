"""Every engine of this machine: the reference backend, and the cpu backend once per target; it proves which one ran."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import oracle
import torch
from torch import Tensor

import tamis

DEVICE = os.environ.get("TAMIS_TEST_DEVICE", "cpu")  # "cuda": the triton backend on a GPU


@dataclass(frozen=True)
class Engine:
    """One backend on one target; its methods are the public functions, with stats checked."""

    backend: str
    target: str | None

    def __str__(self) -> str:
        return self.backend if self.target is None else f"{self.backend}-{self.target}"

    @contextlib.contextmanager
    def selected(self) -> Iterator[None]:
        """Whatever runs on the cpu backend inside runs on this target."""
        if self.backend != "cpu":
            yield
            return
        cpu = importlib.import_module("tamis.backends.cpu")
        with cpu.force_target(self.target):
            yield

    def unmixed(self, x: Tensor) -> Tensor:
        """Queries or keys that become `x` when this engine mixes their channels."""
        return x if self.backend == "triton" else (x.double() @ oracle.mixer(x.shape[-1]).T).to(x.dtype)

    def grain(
        self, query: Tensor, value: Tensor, block_size: tuple[int, int] = (128, 64), regular: bool = True
    ) -> dict[str, int]:
        """Query rows and keys whose product stage 2 skips together, on a GPU the whole tile; and in which order."""
        if self.backend != "triton":
            return {"group": 16, "keys": 64}
        from tamis.backends.triton import chips, launch, settings

        kind = "fp32" if query.dtype == torch.float32 else "half"
        dims = launch.power(query.shape[-1]), launch.power(value.shape[-1])
        chip, q_len = chips.of(torch.device(DEVICE)), query.shape[-2]
        tiles = settings.tiles(chip, kind, *dims, *block_size, q_len, regular=regular, skips=True)
        return {"group": tiles.rows, "keys": tiles.keys, "whole_first": regular}

    def _ran(self, stats: Any) -> None:
        assert (stats.backend, stats.target) == (self.backend, self.target)

    def attend(self, query: Tensor, key: Any, value: Tensor | None = None, *args: Any, **options: Any) -> Any:
        return self._run(tamis.attend, query, key, value, *args, backend=self.backend, **options)

    def attend_varlen(self, *args: Any, **options: Any) -> Any:
        return self._run(tamis.attend_varlen, *args, backend=self.backend, **options)

    def sparse_attention(self, *args: Any, **options: Any) -> tuple[Tensor, Any]:
        run = functools.partial(tamis.sparse_attention, return_stats=True, backend=self.backend)
        output, stats = self._run(run, *args, **options)
        return output, stats

    def predict(self, predictor: Any, query: Tensor, key: Tensor, **options: Any) -> Any:
        return self._run(predictor, query, key, backend=self.backend, **options)

    def op(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """One of the `tamis::` ops, by name."""
        return self._run(getattr(torch.ops.tamis, name), *args, **kwargs, backend=self.backend)

    def _run(self, function: Any, *args: Any, **options: Any) -> Any:
        """Call with everything on the device, and bring what comes back to the CPU."""
        device = DEVICE if self.backend == "triton" else "cpu"
        with self.selected():
            result = moved(function(*moved(args, device), **moved(options, device)), "cpu")
        for part in result if isinstance(result, tuple) else ():
            if isinstance(part, tamis.AttentionStats):
                self._ran(part)
        return result

    def check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        block_mask: Any = None,
        yardstick: torch.dtype | None = None,
        **options: Any,
    ) -> Any:
        """Run full precision, and hold output and lse against the oracle.

        Plain torch, the yardstick, runs in the inputs' dtype or the one given.
        """
        result = self.attend(query, key, value, block_mask, **options)
        masks = dict(options)
        if block_mask is not None:
            masks |= {"blocks": oracle.blocks_of(block_mask), "block_size": block_mask.block_size}
        expected = oracle.attention(query, key, value, **masks)
        assert result.output.dtype == query.dtype
        assert result.lse.dtype == torch.float32
        plain = oracle.attention(query, key, value, **masks, dtype=yardstick or query.dtype)
        oracle.assert_within(result.output, expected.output, plain.output)
        # The lse is fp32 whatever the inputs are, and so are its scores: the yardstick is plain torch in fp32, and
        # where weights are bf16 their formulas.
        plains = [oracle.attention(query, key, value, **masks, dtype=torch.float32)]
        if result.stats.pv_dtype == "bfloat16" and self.backend == "cpu":
            plains.append(oracle.attention_bf16(query, key, value, **masks, rounds=False))
        oracle.assert_within(result.lse, expected.lse, *(p.lse for p in plains), what="lse")
        return result

    def check_int8(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        block_mask: Any = None,
        packed: Any = None,
        formulas: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Run int8, on `packed` if given, and hold it against the oracle; int8 formulas and plain fp32 are the measure.

        `formulas` are further arguments of the formulas alone. Returns the result and what the formulas gave.
        """
        inputs = (key, value) if packed is None else (packed, None)
        result = self.attend(query, *inputs, block_mask, precision="int8", **options)
        if block_mask is not None:
            options |= {"blocks": oracle.blocks_of(block_mask), "block_size": block_mask.block_size}
        expected = oracle.attention(query, key, value, **options)
        plain = oracle.attention(query, key, value, **options, dtype=torch.float32)
        quantised = int8_formulas(
            result.stats, query, key, value, packed=packed is not None, **(options | (formulas or {}))
        )
        assert result.output.dtype == query.dtype
        oracle.assert_within(result.output, expected.output, quantised.output, plain.output)
        oracle.assert_within(result.lse, expected.lse, quantised.lse, plain.lse, what="lse")
        return result, quantised


def int8_formulas(
    stats: Any, query: Tensor, key: Tensor, value: Tensor, *, packed: bool = False, **options: Any
) -> oracle.Result:
    """The formulas of what ran, in fp64."""
    if stats.backend == "triton":
        weights, *_ = stats.pv_dtype.split(" x ")
        form = getattr(torch, weights)
        return oracle.attention_gpu(query, key, value, weights=form, values=form, packed=packed, **options)
    if stats.pv_dtype == "bfloat16":
        return oracle.attention_bf16(query, key, value, packed=packed, **options)
    return oracle.attention_int8(query, key, value, words=in_words(stats), **options)


def in_words(stats: Any) -> bool:
    """Whether weights in 8 bits come from integers of 16, as with AVX-512: on amx too, for few rows."""
    return stats.target in ("avx512", "avx512_vnni", "amx") and stats.pv_dtype != "bfloat16"


def moved(what: Any, device: str) -> Any:
    """The same with its tensors on a device; what lies there already is left alone."""
    if isinstance(what, Tensor):
        return what if what.device.type == device else what.to(device)
    if isinstance(what, tamis.BlockMask):
        lists = (moved(what.kv_num_blocks, device), moved(what.kv_indices, device))
        return tamis.BlockMask(*lists, what.block_size, what.seq_lens)
    if isinstance(what, tamis.PackedKV) and what.tensors[0].device.type != device:
        tensors = [moved(t, device) for t in what.tensors[:7]]
        return tamis.PackedKV(tensors, what.length, what.mixed, moved(what._tail, device), "triton")
    if isinstance(what, tamis.AttentionStats):
        what.counts = moved(what.counts, device)
    if isinstance(what, tamis.AttentionOutput):
        return tamis.AttentionOutput(*(moved(part, device) for part in what))
    if isinstance(what, (tuple, list)):
        return type(what)(moved(part, device) for part in what)
    if isinstance(what, dict):
        return {name: moved(part, device) for name, part in what.items()}
    return what


def value_step(stats: Any) -> float:
    """Relative error of a value by itself: 8 bits have a scale of their own, 16 bits round what comes in fp32."""
    return 2**-8 if stats.pv_dtype.startswith("bfloat16") and stats.backend == "triton" else 4e-7


def cpu_targets() -> list[str]:
    """The targets of the cpu backend that this machine can run, the best one last; empty without the native library."""
    cpu = importlib.import_module("tamis.backends.cpu")
    return list(reversed(cpu.available_targets()))


def engines() -> list[Engine]:
    """From the plainest to the fastest; under Triton's interpreter, or on a GPU, the triton backend alone."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return [Engine("triton", "interpreter")]
    if DEVICE != "cpu":
        chips = importlib.import_module("tamis.backends.triton.chips")
        return [Engine("triton", chips.of(torch.device(DEVICE)).name)]
    return [Engine("reference", None), *(Engine("cpu", target) for target in cpu_targets())]
