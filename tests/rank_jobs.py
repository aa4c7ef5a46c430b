"""What the ranks of `ranks.Ranks` are asked to do; every rank makes the whole inputs and takes its part."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

import tamis
import tamis.parallel
from tamis.bench import scale
from tamis.parallel import Layout, Traffic, step
from tamis.profile.layers import LayerSettings, Stage


@dataclass(frozen=True)
class Job:
    """One call: shapes, how the tokens are spread, what runs, and with which arguments.

    `shares` are the tokens of every rank (of every part, if they are sequences); `key_shares` those of the key.
    """

    heads: int
    kv_heads: int
    head_dim: int
    shares: Sequence[Any]
    key_shares: Sequence[int] | None = None
    value_dim: int | None = None
    batch: int = 1
    kind: str = "dense"
    mode: str = "heads"
    predictor: Any = None
    settings: LayerSettings | None = None
    options: dict[str, Any] = field(default_factory=dict)
    padding: int = 0
    dtype: torch.dtype = torch.float32
    given_layout: bool = False
    zigzag: bool = False

    def layouts(self) -> tuple[Layout, Layout]:
        if self.zigzag:
            own = Layout.zigzag(sum(self.shares), len(self.shares))
            return own, own
        shares = [share if isinstance(share, tuple) else (share,) for share in self.shares]
        own = Layout.parts(shares)
        return own, own if self.key_shares is None else Layout.contiguous(self.key_shares)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        q_layout, kv_layout = self.layouts()
        generator = torch.Generator().manual_seed(7)
        # Neighbours are alike, so that block means say something; keys have a mean of their own.
        query = _smooth(self.batch, self.heads, q_layout.length, self.head_dim, generator)
        key = _smooth(self.batch, self.kv_heads, kv_layout.length, self.head_dim, generator) + 1
        value_dim = self.head_dim if self.value_dim is None else self.value_dim
        value = torch.randn(self.batch, self.kv_heads, kv_layout.length, value_dim, generator=generator)
        return query.to(self.dtype), key.to(self.dtype), value.to(self.dtype)

    def segments(self) -> tuple[Tensor, Tensor] | None:
        """The last tokens of both sides are padding."""
        if not self.padding:
            return None
        sides = [torch.zeros(layout.length, dtype=torch.int64) for layout in self.layouts()]
        for side in sides:
            side[-self.padding :] = -1
        return sides[0], sides[1]

    def mask(self, query: Tensor, key: Tensor) -> tamis.BlockMask | None:
        if self.kind != "mask":
            return None
        return tamis.Random(0.4)(query, key, causal=self.options.get("causal", False))


def _smooth(batch: int, heads: int, length: int, dim: int, generator: torch.Generator) -> Tensor:
    coarse = torch.randn(batch, heads, -(-length // 40), dim, generator=generator).repeat_interleave(40, 2)[
        :, :, :length
    ]
    return coarse + 0.5 * torch.randn(batch, heads, length, dim, generator=generator)


def alone(job: Job) -> tamis.AttentionOutput:
    """The call in one process, by the functions that know of no ranks."""
    query, key, value = job.inputs()
    segments = job.segments()
    seen = {name: job.options[name] for name in ("causal", "window", "scale") if name in job.options}
    options = dict(job.options)
    mask = job.mask(query, key)
    predictor = job.predictor
    if job.settings is not None:
        predictor = job.settings.predictor
        names = ("precision", "pv_threshold", "compensate")
        options |= {name: getattr(job.settings, name) for name in names}
    if predictor is not None:
        mask = predictor(query, key, segments=segments, **seen)
    return tamis.attend(query, key, value, mask, segments=segments, **options)


def spread(group: dist.ProcessGroup, job: Job) -> tuple[Any, Any, Any]:
    """The call on this rank's tokens: output, log-sum-exp if there is one, (density, bytes sent by kind)."""
    rank, layouts = dist.get_rank(group), job.layouts()
    query, key, value = job.inputs()
    local = [
        layout.take(whole, rank)
        for layout, whole in zip((layouts[0], layouts[1], layouts[1]), (query, key, value), strict=True)
    ]
    options: dict[str, Any] = dict(job.options, group=group, mode=job.mode)
    segments = job.segments()
    if segments is not None:
        options["segments"] = tuple(layout.take(side, rank, -1) for layout, side in zip(layouts, segments, strict=True))
    if job.given_layout:
        options["layout"] = layouts
    elif isinstance(job.shares[0], tuple):
        options["parts"] = job.shares[rank]
    with Traffic() as traffic:
        if job.settings is not None:
            return tamis.parallel.layer_attention(*local, job.settings, **options).numpy(), None, None
        if job.predictor is not None:
            options = {"precision": "full", "pv_threshold": None} | options
            output, stats = tamis.parallel.sparse_attention(
                *local, predictor=job.predictor, return_stats=True, **options
            )
            return output.numpy(), None, (stats.density, dict(traffic.sent))
        mask = job.mask(query, key)
        result = tamis.parallel.attend(*local, mask, return_stats=True, **options)
    assert result.stats is not None
    return result.output.float().numpy(), result.lse.numpy(), (result.stats.density, dict(traffic.sent))


def written(group: dist.ProcessGroup, job: Job) -> tuple[int, dict[str, int]]:
    """Bytes that the system says this process wrote in a call (sockets are files), and those that were counted."""
    rank, (layout, _) = dist.get_rank(group), job.layouts()
    local = [layout.take(whole, rank) for whole in job.inputs()]
    options: dict[str, Any] = {"group": group, "mode": job.mode, "predictor": job.predictor, "pv_threshold": None}
    tamis.parallel.sparse_attention(*local, **options, **job.options)  # what is opened once is open now
    dist.barrier(group)
    before = _written()
    with Traffic() as traffic:
        tamis.parallel.sparse_attention(*local, **options, **job.options)
    return _written() - before, dict(traffic.sent)


def _written() -> int:
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


def sharded(group: dist.ProcessGroup, length: int, mode: str) -> tuple[Any, tuple[int, ...], list[int]]:
    """The call on DTensors: the whole output, its global shape, and this rank's own shape."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = DeviceMesh.from_group(group, "cpu")
    job = Job(4, 2, 32, [length])
    tensors = [distribute_tensor(whole, mesh, [Shard(2)]) for whole in job.inputs()]
    output = tamis.parallel.attend(*tensors, mode=mode, causal=True).output
    return output.full_tensor().numpy(), tuple(output.shape), list(output.to_local().shape)


def cut_by_hand(group: dist.ProcessGroup, lengths: Sequence[int], mode: str) -> Any:
    """The call on DTensors whose shards are not those that torch would make: this rank's rows."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    mesh, rank = DeviceMesh.from_group(group, "cpu"), dist.get_rank(group)
    job = Job(4, 2, 32, lengths)

    def made(whole: Tensor) -> Tensor:
        own = job.layouts()[0].take(whole, rank)
        return DTensor.from_local(own, mesh, [Shard(2)], shape=whole.shape, stride=whole.stride())

    output = tamis.parallel.attend(*map(made, job.inputs()), mode=mode, causal=True).output
    return output.to_local().numpy()  # type: ignore[attr-defined]


def empty(group: dist.ProcessGroup, mode: str, precision: str) -> list[tuple[int, ...]]:
    """Shapes of what calls on a batch of nothing return, and on no tokens at all."""
    shapes = []
    for batch, tokens in ((0, 100), (1, 0)):
        query, key = torch.zeros(batch, 4, tokens, 32), torch.zeros(batch, 2, tokens, 32)
        options: dict[str, Any] = {"mode": mode, "precision": precision, "group": group, "causal": True}
        shapes.append(tuple(tamis.parallel.attend(query, key, key, **options).output.shape))
        options |= {"predictor": tamis.Sparge(topk=0.5), "pv_threshold": None}
        output = tamis.parallel.sparse_attention(query, key, key, **options)
        assert isinstance(output, Tensor)
        shapes.append(tuple(output.shape))
    return shapes


def mapped(group: dist.ProcessGroup, length: int) -> Any:
    """The call inside torch's `local_map`."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.experimental import local_map

    mesh = DeviceMesh.from_group(group, "cpu")
    job = Job(4, 2, 32, [length])

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return tamis.parallel.attend(query, key, value, group=group).output

    run = local_map(attention, [Shard(2)], ([Shard(2)],) * 3, redistribute_inputs=True, device_mesh=mesh)
    return run(*(distribute_tensor(whole, mesh, [Shard(2)]) for whole in job.inputs())).full_tensor().numpy()


def disagree(group: dist.ProcessGroup) -> str:
    """Ranks that call with different numbers of heads: what the error says."""
    heads = 2 + dist.get_rank(group)
    tensor = torch.zeros(1, heads, 64, 32)
    try:
        tamis.parallel.attend(tensor, tensor, tensor, group=group)
    except ValueError as error:
        return str(error)
    return "no error"


def misnamed(group: dist.ProcessGroup, name: str) -> str:
    """What is said to a string in the place of a mesh or a group."""
    tensor = torch.zeros(1, 2, 64, 32)
    wrong: dict[str, Any] = {name: "foo"}
    try:
        tamis.parallel.attend(tensor, tensor, tensor, **wrong)
    except TypeError as error:
        return str(error)
    return "no error"


def until_it_fails(group: dist.ProcessGroup, mode: str) -> tuple[float, str]:
    """Calls for ever: seconds from the last one's start to its error, and what it says."""
    job = Job(3, 3, 32, [200, 200, 200], mode=mode)
    start, layout = time.monotonic(), job.layouts()[0]
    local = [layout.take(whole, dist.get_rank(group)) for whole in job.inputs()]
    try:
        while True:
            start = time.monotonic()
            tamis.parallel.attend(*local, group=group, mode=mode)
    except RuntimeError as error:
        return time.monotonic() - start, str(error)


def diffusion(group: dist.ProcessGroup, name: str, degrees: dict[str, int]) -> tuple[float, float, int]:
    """A tiny diffusers model under its own context parallelism, with tamis as its attention.

    Largest difference of the output from the same model in one process with tamis, and from that with torch; and how
    often tamis was called in parallel.
    """
    from diffusers import ContextParallelConfig
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    model, inputs, text = {"wan": _wan, "flux": _flux}[name]()
    settings = LayerSettings(tamis.Sparge(topk=0.5, similarity=-1), None, "full")
    calls = []

    def attention(  # type: ignore[no-untyped-def]
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, _parallel_config=None
    ):
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        if q.shape[2] != k.shape[2]:  # cross-attention: every rank has the whole text
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
        assert attn_mask is None and not is_causal
        if _parallel_config is None:
            output = tamis.attend(q, k, v, settings.predictor(q, k), scale=scale).output  # type: ignore[misc]
        else:
            size = dist.get_world_size(group)
            parts = (text // size, q.shape[2] - text // size)
            where = tamis.parallel.from_diffusers(_parallel_config, parts)
            calls.append(where["mode"])
            output = tamis.parallel.layer_attention(q, k, v, settings, scale=scale, **where)
        return output.transpose(1, 2)

    with ExitStack() as stack, torch.no_grad():
        exact = model(**inputs, return_dict=False)[0]
        # In the place of torch's, which stays as it is for the jobs to come.
        native = AttentionBackendName.NATIVE
        own = {"_backends": {native: attention}, "_supported_arg_names": {native: set(signature(attention).parameters)}}
        for table, entry in own.items():
            stack.enter_context(patch.dict(getattr(_AttentionBackendRegistry, table), entry))
        alone = model(**inputs, return_dict=False)[0]
        # On a machine without an accelerator diffusers divides by their number.
        with patch("torch.accelerator.device_count", return_value=1):
            model.enable_parallelism(config=ContextParallelConfig(**degrees))
        spread = model(**inputs, return_dict=False)[0]
    return float((spread - alone).abs().max()), float((spread - exact).abs().max()), len(calls)


def cut(group: dist.ProcessGroup, name: str, mode: str, own: bool) -> tuple[float, float, dict[str, int], float]:
    """A tiny diffusers model whose tokens are cut among ranks, by `apply` or (`own`) by diffusers.

    Largest difference of its output from one process's with tamis, and of this from that with torch; the calls; and
    how far it is from the model's own when all is undone.
    """
    from diffusers import ContextParallelConfig
    from diffusion import TINY

    if name in ("wan", "flux"):
        model, inputs, _ = {"wan": _wan, "flux": _flux}[name]()
    else:
        torch.manual_seed(3)
        model, inputs = TINY[name].make(), TINY[name].given()
    if name == "wan":  # as many tokens of text as a rank has of the video: lengths do not tell what is cut
        inputs["encoder_hidden_states"] = torch.randn(1, 384 // dist.get_world_size(group), 16)
    settings: dict[str, Any] = {"precision": "full", "pv_threshold": None, "min_queries": 1}
    predictor = tamis.Sparge(topk=0.5, similarity=-1)
    degree = {"ulysses_degree" if mode == "heads" else "ring_degree": dist.get_world_size(group)}

    def run() -> Tensor:
        output: Tensor = model(**inputs, return_dict=False)[0]
        return output

    with torch.no_grad():
        exact = run()
        with tamis.apply(model, predictor, **settings):
            alone = run()
        if own:
            with patch("torch.accelerator.device_count", return_value=1):  # as above
                model.enable_parallelism(config=ContextParallelConfig(**degree))
            settings.pop("min_queries")
        with tamis.apply(model, predictor, **settings, **({} if own else {"mesh": group, "mode": mode})) as handle:
            found = run()
        left = torch.zeros(()) if own and mode == "ring" else run() - exact  # gloo has no ring of diffusers' own
    apart, sparse = (found - alone).abs().max(), (alone - exact).abs().max()
    return float(apart), float(sparse), handle.calls, float(left.abs().max())


def refused(group: dist.ProcessGroup) -> list[str]:
    """What every rank says to arguments that are wrong or differ, and that the group goes on after each."""
    rank = dist.get_rank(group)
    tensor = torch.randn(1, 4, 64, 16, generator=torch.Generator().manual_seed(0))
    whole = tamis.BlockMask.from_dense(torch.ones(1, 1, dtype=torch.bool), (64, 64), (64, 64))
    calls: list[dict[str, Any]] = [
        {"mode": "ring", "softcap": -1.0},
        {"mode": "ring", "scale": float("nan")},
        {"causal": rank == 0},
        {"mode": "ring", "causal": rank == 0},
        {"precision": "int8" if rank else "full"},
        {"segments": (torch.zeros(64, dtype=torch.long),) * 2 if rank else None},
        {"return_stats": rank == 0},
        {"block_mask": whole, "mode": "ring"},
        {"sink_logits": torch.zeros(8)},
        {"segments": (torch.zeros(64),) * 2},
    ]
    said = []
    for arguments in calls:
        try:
            tamis.parallel.attend(tensor, tensor, tensor, group=group, **arguments)
            said.append("nothing")
        except (ValueError, TypeError) as error:
            said.append(str(error))
        assert tamis.parallel.attend(tensor, tensor, tensor, group=group).output.isfinite().all()
    return said


def applied(group: dist.ProcessGroup, mode: str, profiled: bool) -> tuple[float, float, dict[str, int]]:
    """A tiny Llama whose tokens are spread: how far its logits are from one process's, and these from dense ones."""
    import tiny_models

    torch.manual_seed(0)
    model = tiny_models.language("Llama", num_key_value_heads=2)
    ids = tiny_models.tokens(1, 460)
    source: Any = tamis.Sparge(topk=0.3, similarity=-1.0)
    if profiled:
        stages = (Stage(LayerSettings(tamis.Sparge(topk=(0.2, 0.3, 0.4, 0.9), similarity=-1.0), precision="full")),)
        source = tamis.Profile({"model.layers.0.self_attn": stages}, model="LlamaForCausalLM")
    options: dict[str, Any] = {} if profiled else {"precision": "full", "pv_threshold": None}
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    ends = [0, *(460 * (number + 1) // size + number for number in range(size - 1)), 460]
    part = slice(ends[rank], ends[rank + 1])
    positions = torch.arange(460)[None, part]
    with torch.no_grad():
        dense = model(ids, use_cache=False).logits
        with tamis.apply(model, source, min_queries=1, **options):
            expected = model(ids, use_cache=False).logits
        with tamis.apply(model, source, mesh=group, mode=mode, **options) as handle:
            found = model(ids[:, part], position_ids=positions, use_cache=False).logits
    return float((found - expected[:, part]).abs().max()), float((expected - dense).abs().max()), handle.calls


def ring_thresholds(group: dist.ProcessGroup) -> list[str]:
    """What `apply` in mode "ring" does with thresholds: nothing given, None, one given; a profile that has one."""
    import tiny_models

    model, ids = tiny_models.language("Llama"), tiny_models.tokens(1, 128)
    stages = (Stage(LayerSettings(tamis.Sparge(topk=0.5), pv_threshold=(3.0, 4.0, 5.0, float("inf")))),)
    profile = tamis.Profile({"model.layers.0.self_attn": stages}, model="LlamaForCausalLM")
    off = tamis.Profile({"model.layers.0.self_attn": (Stage(LayerSettings(None, (float("inf"),) * 4)),)})
    calls: list[tuple[Any, dict[str, Any]]] = [
        (None, {}),
        (None, {"pv_threshold": None}),
        (None, {"pv_threshold": 5.0}),
        (profile, {}),
        (profile, {"pv_threshold": None}),
        (profile, {"pv_threshold": 5.0}),
        (off, {}),
    ]
    said = []
    for source, options in calls:
        try:
            handle = tamis.apply(model, source, mesh=group, mode="ring", **options)
        except ValueError as error:
            said.append(str(error))
            continue
        with handle, torch.no_grad():
            model(ids, position_ids=torch.arange(128)[None], use_cache=False)
        said.append("runs")
    return said


def packed(
    group: dist.ProcessGroup, ends: Sequence[int], cuts: Sequence[int], **settings: Any
) -> tuple[float, float, float]:
    """Packed documents that end at `ends`, on ranks whose tokens end at `cuts`.

    How far a tiny model's logits are from those of one rank, these from those of one document, and dense ones of all
    ranks from the library's own.
    """
    import tiny_models

    torch.manual_seed(0)
    model = tiny_models.language(settings.pop("kind", "Llama"), num_key_value_heads=2, **settings)
    ids = tiny_models.tokens(1, ends[-1])
    positions = torch.cat([torch.arange(b - a) for a, b in zip((0, *ends), ends, strict=False)])[None]
    rank = dist.get_rank(group)
    part, itself = slice((0, *cuts)[rank], cuts[rank]), dist.new_group([rank], use_local_synchronization=True)

    def logits(part: slice, positions: Tensor, topk: float, ranks: Any) -> Tensor:
        predictor = tamis.Sparge(topk=topk, similarity=-1.0)
        with tamis.apply(model, predictor, precision="full", pv_threshold=None, mesh=ranks):
            return model(ids[:, part], position_ids=positions[:, part], use_cache=False).logits

    with torch.no_grad():
        exact = model(ids, position_ids=positions, use_cache=False).logits[:, part]
        dense = logits(part, positions, 1.0, group)
        found = logits(part, positions, 0.5, group)
        expected = logits(slice(None), positions, 0.5, itself)
        mixed = logits(slice(None), torch.arange(ends[-1])[None], 0.5, itself)
    return tuple(
        float((one - two).abs().max()) for one, two in ((found, expected[:, part]), (expected, mixed), (dense, exact))
    )


def strange(group: dist.ProcessGroup) -> tuple[float, list[str]]:
    """A Mistral with padding on the first rank only, between its tokens, so that causality does not hide it from those
    of the others, and a window that no shard is long enough for.

    How far its logits of tokens are from those of one process, and what the ranks say to calls that cannot be right.
    """
    import tiny_models

    torch.manual_seed(0)
    model = tiny_models.language("Mistral", num_key_value_heads=2, sliding_window=200)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    ids, positions = tiny_models.tokens(1, 150 * size), torch.arange(150 * size)[None]
    part, tokens = slice(150 * rank, 150 * rank + 150), (positions < 60) | (positions >= 100)
    complete = torch.ones(1, 1, 150, 150, dtype=torch.bool).tril()
    calls: list[dict[str, Any]] = [
        {},
        {"position_ids": positions[:, part] if rank else None},
        {"position_ids": positions[:, part], "attention_mask": tokens[:, part] if rank else None},
        {"position_ids": positions[:, part], "use_cache": rank == 0},
        {"position_ids": positions[:, part], "attention_mask": tokens[:, part] if rank else complete},
        {"position_ids": positions[:, :150], "use_cache": True},
        {"position_ids": positions[:, :150], "attention_mask": tokens[:, :150]},
    ]
    said = []
    with torch.no_grad():
        exact = model(ids, position_ids=positions, attention_mask=tokens, use_cache=False).logits
        with tamis.apply(model, tamis.Sparge(topk=1.0), precision="full", pv_threshold=None, mesh=group):
            for arguments in calls:
                try:
                    model(ids[:, part], **{"use_cache": False, **arguments})
                    said.append("nothing")
                except ValueError as error:
                    said.append(str(error))
            try:
                model(ids[:, :150], position_ids=positions[:, :150], use_cache=False)
            except ValueError as error:
                said.append(str(error))
            try:
                with torch.set_grad_enabled(rank == 1):
                    model(ids[:, part], position_ids=positions[:, part], use_cache=False)
            except ValueError as error:
                said.append(str(error))
            found = model(
                ids[:, part], position_ids=positions[:, part], attention_mask=tokens[:, part], use_cache=False
            ).logits
    apart = (found - exact[:, part]).abs().amax(2)
    return float(apart[tokens[:, part]].max()), said


def declined(group: dist.ProcessGroup) -> list[str]:
    """What the ranks say if one of them cannot do a call; and that the group goes on."""
    rank, said = dist.get_rank(group), []
    tensor = torch.randn(1, 4, 64, 16)
    wrong: list[dict[str, Any]] = [
        {"query": tensor.requires_grad_()},
        {"query": tensor.detach()[:, :, :0, :8]},
        {"mode": "tree"},
        {"parts": (3, 4)},
        {"segments": (torch.zeros(63, dtype=torch.long),) * 2},
    ]
    for arguments in wrong:
        given = {"query": tensor.detach(), "key": tensor.detach(), "value": tensor.detach()}
        given |= arguments if rank == 1 else {}
        try:
            tamis.parallel.attend(**given, group=group)
            said.append("nothing")
        except (ValueError, TypeError) as error:
            said.append(str(error))
    assert tamis.parallel.attend(*[tensor.detach()] * 3, group=group).output.isfinite().all()
    return said


def one_goes_on(group: dist.ProcessGroup, way: str) -> list[str]:
    """What three requests end with if rank 1 alone fails in the first one, behind an attention call of it."""
    import tiny_models

    rank, said = dist.get_rank(group), []
    # Of a form that no other job has: calls of known ones make their stats by what fails below, before the exchange.
    tensor, ids, at = torch.randn(1, 4, 61, 24), tiny_models.tokens(1, 200), torch.arange(200)[None] + 200 * rank
    model = tiny_models.language("Llama", num_key_value_heads=2)

    def fail(*_: object) -> None:
        raise OSError("broken")

    with torch.no_grad(), tamis.apply(model, mesh=group):
        for number in range(3):
            broken = model.model.layers[0].mlp.register_forward_pre_hook(fail)
            if rank == 0 or number > 0 or way == "call":
                broken.remove()
            try:
                if way == "model":
                    model(ids, position_ids=at, use_cache=False)
                else:
                    stats = fail if rank == 1 and number == 0 else tamis.AttentionStats.with_counts
                    with patch.object(tamis.AttentionStats, "with_counts", stats):
                        tamis.parallel.attend(tensor, tensor, tensor, group=group, return_stats=True)
                said.append("done")
            except (OSError, RuntimeError) as error:
                said.append(str(error))
            broken.remove()
    step.forget(group)  # what both raised in was one exchange: for the jobs to come they are in step
    return said


def _wan() -> tuple[Any, dict[str, Any], int]:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(3)
    model = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 6, 16, 16),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 12, 16),
    }
    return model, inputs, 0


def _flux() -> tuple[Any, dict[str, Any], int]:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(3)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    rows, text = 20, 40
    image_ids = torch.cartesian_prod(torch.zeros(1), torch.arange(float(rows)), torch.arange(float(rows)))
    inputs = {
        "hidden_states": torch.randn(1, rows * rows, 4),
        "encoder_hidden_states": torch.randn(1, text, 16),
        "pooled_projections": torch.randn(1, 16),
        "timestep": torch.tensor([0.5]),
        "img_ids": image_ids,
        "txt_ids": torch.zeros(text, 3),
        "guidance": None,
    }
    return model, inputs, text


def bench(group: dist.ProcessGroup, options: scale.ScaleOptions) -> dict[str, Any]:
    """What a rank of `tamis bench scale` does."""
    return scale.measure(options)


def bench_alone(group: dist.ProcessGroup, options: scale.ScaleOptions) -> dict[str, Any]:
    """What the only rank of `tamis bench scale` does, though there are others here."""
    everyone, dist.group.WORLD = dist.group.WORLD, group
    try:
        return scale.measure(options)
    finally:
        dist.group.WORLD = everyone


def read_along(group: dist.ProcessGroup, code: str) -> tuple[int, ...]:
    """Run a piece of the documentation, where every rank is; the shape of its last output."""
    names: dict[str, Any] = {"torch": torch, "dist": dist}
    exec(compile(code, "scale-out.md", "exec"), names)
    return tuple(names["output"].shape) if "output" in names else ()


def sleep(group: dist.ProcessGroup, seconds: float) -> None:
    """Be busy with something else."""
    time.sleep(seconds)
