"""What the times of `tamis bench gpu` mean: rates, ratios, the bars of the design, and all of it as text.

It is arithmetic on a result's rows, so that a saved result can be read again. What was not measured has no number: it
is None in a row, "-" in a table, and "not measured" in a bar and in markdown.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

Row: TypeAlias = dict[str, Any]
Result: TypeAlias = dict[str, Any]

PEERS = ("sdpa flash", "sdpa cudnn", "flex")
NOT_MEASURED = "not measured"


def operations(shape: Row) -> float:
    """Of dense attention, both products; under causality half of them."""
    pairs = shape["tokens"] ** 2 / (2 if shape["causal"] else 1)
    return float(4 * shape["batch"] * shape["heads"] * pairs * shape["head_dim"])


def spread(values: list[float]) -> dict[str, float] | None:
    """Median, smallest and largest; None of nothing."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)} if values else None


def complete(result: Result) -> None:
    """Put what follows from the times into every row, and the bars into the result."""
    for shape in result["shapes"]:
        rows = rows_of(result, shape["name"])
        for row in rows:
            row["ms"], row["host_ms"] = spread(row["times_ms"]), spread(row["host_times_ms"])
        for row in rows:
            _derive(row, rows, operations(shape))
    result["bars"] = [_bar(rule, result) for rule in RULES]


def rows_of(result: Result, shape: str) -> list[Row]:
    """The rows of a shape."""
    return [row for row in result["rows"] if row["shape"] == shape]


def find(rows: list[Row], candidate: str, precision: str, density: float = 1.0) -> Row | None:
    """The row of a candidate."""
    for row in rows:
        if (row["candidate"], row["precision"], row["asked_density"]) == (candidate, precision, density):
            return row
    return None


def _derive(row: Row, rows: list[Row], dense_operations: float) -> None:
    """Rates, ratios and shares of one row; None where there is nothing to compare with."""
    name, precision, density, median = row["candidate"], row["precision"], row["asked_density"], _median(row)
    attends = name not in ("predict", "quantise value")
    rate = dense_operations / median / 1e9 if attends and median else None
    predict = _median(find(rows, "predict", precision, density))
    own = find(rows, "dense", precision) if name in ("mask", "total") else None
    row["dense_tops"] = rate
    row["executed_tops"] = None if rate is None or row["density"] is None else rate * row["density"]
    row["ratio_sdpa"] = _ratio(_fastest(rows), row) if attends else None
    row["ratio_dense"] = _ratio(own, row)
    row["ratio_flex"] = _ratio(find(rows, "flex", "bf16", density), row) if name == "mask" else None
    row["prediction_share"] = predict / median if name == "total" and predict and median else None
    row["moved_gb_s"] = row["moved_bytes"] / median / 1e6 if row["moved_bytes"] and median else None
    row["overhead_share"] = _overhead(row, rows) if name == "predict" else None


def _overhead(row: Row, rows: list[Row]) -> float | None:
    """Prediction and all rounding / the fastest dense attention: tamis in the same precision, or torch."""
    parts = [_median(row), *([_median(find(rows, "quantise value", "fp8"))] if row["precision"] == "fp8" else [])]
    dense = [time for peer in (find(rows, "dense", row["precision"]), _fastest(rows)) if (time := _median(peer))]
    known = [time for time in parts if time is not None]
    return sum(known) / min(dense) if dense and len(known) == len(parts) else None


def _median(row: Row | None) -> float | None:
    return None if row is None or row["ms"] is None else float(row["ms"]["median"])


def _fastest(rows: list[Row]) -> Row | None:
    """Torch's fastest dense attention."""
    peers = [row for row in rows if row["candidate"] in PEERS[:2] and row["ms"] is not None]
    return min(peers, key=lambda row: float(row["ms"]["median"])) if peers else None


def _ratio(peer: Row | None, row: Row) -> dict[str, float] | None:
    """Peer / this, repetition by repetition."""
    if peer is None or not peer["times_ms"] or not row["times_ms"]:
        return None
    return spread([a / b for a, b in zip(peer["times_ms"], row["times_ms"], strict=True)])


class Rule(NamedTuple):
    """What the design promises: a limit that the worst of these rows must keep; None is any."""

    what: str
    value: str
    candidates: tuple[str, ...]
    precisions: tuple[str, ...]
    density: float | None = None
    least: float | None = None
    most: float | None = None
    head_dim: int | None = None
    tokens: tuple[int, int] = (1, 2**62)


RULES = (
    *(
        Rule(f"dense {name}, d=128, x fastest SDPA", "ratio_sdpa", ("dense",), (name,), least=least, head_dim=128)
        for name, least in (("full", 0.6), ("fp8", 0.85))
    ),
    *(
        Rule(f"given mask {name}, density {density}, x own dense", "ratio_dense", ("mask",), (name,), density, least)
        for density, least in ((0.5, 1.85), (0.25, 3.5), (0.1, 7.5))
        for name in ("full", "int8", "fp8")
    ),
    *(
        Rule(
            f"total {name}, density 0.25, 32k and more, x fastest SDPA",
            "ratio_sdpa",
            ("total",),
            (name,),
            0.25,
            least=2.3,
            tokens=(32768, 2**62),
        )
        for name in ("int8", "fp8")
    ),
    *(
        Rule(
            f"prediction + quantisation, {tokens // 1024}k, of fastest dense",
            "overhead_share",
            ("predict",),
            ("int8", "fp8"),
            most=most,
            tokens=(tokens, tokens),
        )
        for tokens, most in ((32768, 0.04), (131072, 0.02))
    ),
    *(
        Rule(f"given mask {name}, x FlexAttention", "ratio_flex", ("mask",), (name,), least=1.3)
        for name in ("full", "int8", "fp8")
    ),
    *(
        Rule(f"relative L1, {name}", "error", ("dense", "mask", "total"), (name,), most=most)
        for name, most in (("int8", 0.016), ("fp8", 0.05))
    ),
)


def _bar(rule: Rule, result: Result) -> Row:
    """The worst value against the limit; without a value a bar neither holds nor fails."""
    rows = _rows_for(rule, result)
    values = [(number, row) for row in rows if (number := _number(row[rule.value])) is not None]
    bar: Row = {"what": rule.what, "of": rule.value, "least": rule.least, "most": rule.most, "value": None}
    bar |= {"where": None, "measured": len(values), "expected": len(rows), "verdict": NOT_MEASURED}
    if not values:
        return bar
    value, row = (max if rule.least is None else min)(values, key=lambda pair: pair[0])
    holds = (rule.least is None or value >= rule.least) and (rule.most is None or value <= rule.most)
    where = f"{row['shape']}, {_name(row)}"
    return bar | {"value": value, "where": where, "verdict": "holds" if holds else "FAILS"}


def _rows_for(rule: Rule, result: Result) -> list[Row]:
    fits = {
        shape["name"]
        for shape in result["shapes"]
        if rule.head_dim in (None, shape["head_dim"]) and rule.tokens[0] <= shape["tokens"] <= rule.tokens[1]
    }
    return [
        row
        for row in result["rows"]
        if row["shape"] in fits
        and row["candidate"] in rule.candidates
        and row["precision"] in rule.precisions
        and rule.density in (None, row["asked_density"])
    ]


def _number(found: float | dict[str, float] | None) -> float | None:
    return found["median"] if isinstance(found, dict) else found


def _name(row: Row) -> str:
    """A row's candidate, precision and density, if it has one."""
    sparse = row["asked_density"] != 1 or row["candidate"] in ("mask", "total")
    return f"{row['candidate']} {row['precision']}" + (f" {row['asked_density']:g}" if sparse else "")


def table(result: Result, name: str) -> str:
    """One shape as text; ratios above 1 are in favour of the row."""
    (shape,) = (shape for shape in result["shapes"] if shape["name"] == name)
    rows = rows_of(result, name)
    repeats = max((len(row["times_ms"]) for row in rows), default=0)
    lines = [
        f"{_about(shape)}; {operations(shape) / 1e12:.3g} TFLOP dense, {repeats} repetitions",
        f"{'':20}{'density':>8}{'ms':>10}{'(spread)':>20}{'host':>8}{'TOPS':>7}{'done':>7}{'x SDPA':>8}{'x dense':>8}"
        f"{'x flex':>8}{'pred.':>7}{'L1':>8}{'GB':>7}{'least':>7}{'GB/s':>7}",
    ]
    for row in rows:
        lines.append(f"{_name(row):20}{_plain(row)}" if row["ms"] else f"{_name(row):20}  {row['failure'] or '-'}")
    lines += [failure for failure in result["failures"] if failure.startswith(f"{name}: ")]
    return "\n".join([*lines, ""])


LEGEND = """\
ms: the GPU's, median, smallest and largest; host: the processor's, until the call returned. TOPS: what a dense call
would have done (causal: half) / time; done: that times the density. x SDPA: the faster of flash and cuDNN / this;
x dense: tamis dense in the same precision / this; x flex: FlexAttention with the same mask / this; above 1 the row is
faster. pred.: share of the prediction, which also rounds query and key, in total; in a prediction's row it and all
rounding, of the fastest dense call, ours or torch's. L1: relative error against fp64 with the same blocks. GB: what
prediction and rounding ask memory for, from a formula; least: what would do; GB/s: the former / time."""


def _giga(amount: int | None) -> float | None:
    return None if amount is None else amount / 1e9


def _about(shape: Row) -> str:
    heads = f"{shape['heads']} heads" + (f" on {shape['kv_heads']}" if shape["heads"] != shape["kv_heads"] else "")
    causal = ", causal" if shape["causal"] else ""
    return (
        f"{shape['name']}: batch {shape['batch']}, {heads}, {shape['tokens']:,} tokens, d={shape['head_dim']}{causal}"
    )


def _plain(row: Row) -> str:
    ms = row["ms"]
    extent = f"{ms['min']:.3f}-{ms['max']:.3f}"
    share = row["prediction_share"] if row["overhead_share"] is None else row["overhead_share"]

    def cell(value: float | None, form: str, width: int) -> str:
        return f"{'-' if value is None else format(value, form):>{width}}"

    return (
        f"{cell(row['density'], '.3f', 8)}{ms['median']:10.3f}{extent:>20}{row['host_ms']['median']:8.3f}"
        f"{cell(row['dense_tops'], '.0f', 7)}{cell(row['executed_tops'], '.0f', 7)}"
        f"{cell(_number(row['ratio_sdpa']), '.2f', 8)}{cell(_number(row['ratio_dense']), '.2f', 8)}"
        f"{cell(_number(row['ratio_flex']), '.2f', 8)}{cell(share, '.1%', 7)}"
        f"{cell(row['error'], '.4f', 8)}{cell(_giga(row['moved_bytes']), '.3f', 7)}"
        f"{cell(_giga(row['least_bytes']), '.3f', 7)}{cell(row['moved_gb_s'], '.0f', 7)}"
    )


def bar_table(result: Result) -> str:
    """The bars as text."""
    wide = max(len(bar["what"]) for bar in result["bars"]) + 2
    lines = [f"{bar['what']:{wide}}{_limit(bar):>7}  {bar['verdict']:14}{_worst(bar)}" for bar in result["bars"]]
    verdicts = [bar["verdict"] for bar in result["bars"]]
    count = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("holds", "FAILS", NOT_MEASURED))
    return "\n".join([*(line.rstrip() for line in lines), f"of {len(verdicts)} bars: {count}"])


def _limit(bar: Row) -> str:
    sign, limit = (">=", bar["least"]) if bar["least"] is not None else ("<=", bar["most"])
    return f"{sign} {limit:{'.0%' if bar['of'].endswith('_share') else 'g'}}"


def _worst(bar: Row) -> str:
    """The worst value of a bar, where it is, and whether anything is missing."""
    if bar["value"] is None:
        return ""
    part = "" if bar["measured"] == bar["expected"] else f"; {bar['measured']} of {bar['expected']} measured"
    return f"{bar['value']:{'.1%' if bar['of'].endswith('_share') else '.3g'}} at worst ({bar['where']}{part})"


def markdown(path: Path) -> str:
    """A saved result as the table of the documentation.

    Raises:
        ValueError: the file is not there, or is something else.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not there: `tamis bench gpu --json {path}` makes it, on a machine with a GPU")
    wrong = f"{path} is no result of `tamis bench gpu`"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{wrong}: it is no JSON") from None
    try:
        complete(result)
        return "\n".join([_origin(result), "", *_markdown_rows(result), "", *_markdown_bars(result)])
    except KeyError as error:
        raise ValueError(f"{wrong}: it has no {error}") from None
    except (TypeError, ValueError, AttributeError):
        raise ValueError(wrong) from None


def _origin(result: Result) -> str:
    machine = result["machine"]
    known = [
        machine["gpu"] or "no GPU",
        *(f"{label} {machine[name]}" for name, label in _VERSIONS if machine.get(name) is not None),
        f"commit {(result['commit'] or 'unknown')[:12]}",
        machine["date"][:10],
    ]
    return (
        f"{', '.join(known)}. bf16 normals; medians in ms, in brackets dense-equivalent TOPS, x the faster of torch's "
        "two SDPA backends, and the relative L1 error against fp64 with the same blocks."
    )


_VERSIONS = (("driver", "driver"), ("torch", "torch"), ("triton", "Triton"), ("cudnn", "cuDNN"))


def _markdown_rows(result: Result) -> Iterable[str]:
    shapes = [shape["name"] for shape in result["shapes"]]
    yield "| | " + " | ".join(_about(shape) for shape in result["shapes"]) + " |"
    yield "|---" * (len(shapes) + 1) + "|"
    keys = dict.fromkeys((row["candidate"], row["precision"], row["asked_density"]) for row in result["rows"])
    for key in keys:
        found = [find(rows_of(result, name), *key) for name in shapes]
        (first, *_) = (row for row in found if row is not None)
        yield f"| {_name(first)} | " + " | ".join(_markdown_cell(row) for row in found) + " |"


def _markdown_cell(row: Row | None) -> str:
    if row is None:
        return NOT_MEASURED
    if row["ms"] is None:
        return NOT_MEASURED if row["failure"] is None else "cannot run" if row["error"] is None else "wrong"
    known = (
        *((f"{row['dense_tops']:.0f}",) if row["dense_tops"] is not None else ()),
        *((f"{row['ratio_sdpa']['median']:.2f}x",) if row["ratio_sdpa"] is not None else ()),
        *((f"L1 {row['error']:.4f}",) if row["error"] is not None else ()),
        *((f"{row['moved_gb_s']:.0f} GB/s",) if row["moved_gb_s"] is not None else ()),
    )
    return f"{row['ms']['median']:.2f}" + (f" ({'; '.join(known)})" if known else "")


def _markdown_bars(result: Result) -> Iterable[str]:
    yield from ("| bar | | | |", "|---|---|---|---|")
    for bar in result["bars"]:
        yield f"| {bar['what']} | {_limit(bar)} | {bar['verdict']} | {_worst(bar)} |"
