"""What a call returns beside the output: how much was computed, by which backend, in which number formats."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tamis import geometry


class Formats(NamedTuple):
    """Number formats of the query-key and the probability-value product, with few query rows and with many."""

    few: tuple[str, str]
    many: tuple[str, str]

    def of(self, rows: int) -> tuple[str, str]:
        """Those of a call with so many query rows."""
        return self.many if rows >= geometry.TILE_ROWS else self.few


class AttentionStats:
    """How much of the visible attention map a call computed.

    Densities are shares of the block pairs that are *visible* (causal, window, segments, masks), in [0, 1]; they are
    computed when read, so that making the object never synchronises a device. `qk_density` counts query-key products,
    `pv_density` probability-value products (fewer when `pv_threshold` skips some), `density` is their mean. The
    `*_per_head` tensors are float64 `[H]`, summed over the batch.

    Attributes:
        backend: name of the backend that ran.
        target: instruction set or device the backend ran on, or None if it has only one.
        dense_reason: why the call did not run sparse; None if it did.
        compensate: what stood in for the skipped blocks, e.g. "centroid"; None if nothing did. No density counts it.
    """

    def __init__(
        self,
        counts: Tensor,
        *,
        backend: str,
        target: str | None,
        formats: Formats,
        rows: int,
        dense_reason: str | None,
        compensate: str | None = None,
        kernel_reasons: tuple[str | None, str | None] = (None, None),
    ) -> None:
        self.counts = counts
        self.backend = backend
        self.target = target
        self.dense_reason = dense_reason
        self.compensate = compensate
        # Looked at when read: asking a symbolic length here would bind a compiled graph to one side of the answer.
        self._formats, self._rows, self._kernel_reasons = formats, rows, kernel_reasons

    def with_counts(self, counts: Tensor) -> AttentionStats:
        """The same description of other counts, `[batch, heads, q_blocks, 3]`: those of several calls of one kind."""
        return AttentionStats(
            counts,
            backend=self.backend,
            target=self.target,
            formats=self._formats,
            rows=self._rows,
            dense_reason=self.dense_reason,
            compensate=self.compensate,
            kernel_reasons=self._kernel_reasons,
        )

    @property
    def kernel_reason(self) -> str | None:
        """Why a backend that has a faster kernel for some calls took the one for all calls; else None."""
        return self._kernel_reasons[self._rows >= geometry.TILE_ROWS]

    @property
    def qk_dtype(self) -> str:
        """Number format of the query-key product."""
        return self._formats.of(self._rows)[0]

    @property
    def pv_dtype(self) -> str:
        """Number format of the probability-value product."""
        return self._formats.of(self._rows)[1]

    @property
    def density(self) -> float:
        """Computed block products / visible block products, both products together."""
        visible, qk, pv = self._totals()
        return (qk + pv) / (2 * visible) if visible else 0.0

    @property
    def qk_density(self) -> float:
        """Computed query-key block products / visible ones."""
        visible, qk, _ = self._totals()
        return qk / visible if visible else 0.0

    @property
    def pv_density(self) -> float:
        """Computed probability-value block products / visible ones."""
        visible, _, pv = self._totals()
        return pv / visible if visible else 0.0

    @property
    def density_per_head(self) -> Tensor:
        """`density` of every query head, float64 `[H]`."""
        return (self.qk_density_per_head + self.pv_density_per_head) / 2

    @property
    def qk_density_per_head(self) -> Tensor:
        """`qk_density` of every query head, float64 `[H]`."""
        return self._per_head(1)

    @property
    def pv_density_per_head(self) -> Tensor:
        """`pv_density` of every query head, float64 `[H]`."""
        return self._per_head(2)

    def _totals(self) -> tuple[float, float, float]:
        visible, qk, pv = self.counts.sum(dim=(0, 1, 2)).tolist()
        return visible, qk, pv

    def _per_head(self, column: int) -> Tensor:
        totals = self.counts.sum(dim=(0, 2))
        return totals[:, column] / totals[:, 0].clamp(min=1)

    def __repr__(self) -> str:
        where = self.backend if self.target is None else f"{self.backend}/{self.target}"
        instead = "" if self.compensate is None else f", compensate={self.compensate!r}"
        dense = "" if self.dense_reason is None else f", dense_reason={self.dense_reason!r}"
        kernel = "" if self.kernel_reason is None else f", kernel_reason={self.kernel_reason!r}"
        return (
            f"AttentionStats(density={self.density:.3f}, qk_density={self.qk_density:.3f}, "
            f"pv_density={self.pv_density:.3f}, backend={where}, qk_dtype={self.qk_dtype}, "
            f"pv_dtype={self.pv_dtype}{instead}{dense}{kernel})"
        )


class AttentionOutput(NamedTuple):
    """Result of an attention call.

    Attributes:
        output: `[batch, heads, q_len, value_dim]` (leading dims as the query's), in the query's dtype.
        lse: log-sum-exp of the scores of each row, natural log, fp32 `[batch, heads, q_len]`; -inf for an empty row.
        stats: what was computed; None for results put together from parts.
    """

    output: Tensor
    lse: Tensor
    stats: AttentionStats | None = None
