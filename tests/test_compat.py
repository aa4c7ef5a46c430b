"""The authors' names: their signatures, the calls that engines make of them, and what every argument means."""

from __future__ import annotations

import importlib.util
import inspect
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

import tamis
from tamis import compat
from tamis.compat import arguments, plugin, search
from tamis.compat.__main__ import main
from tamis.compat.alias import CHILDREN
from tamis.compat.search import CANDIDATES, Bounds, Search
from tamis.compat.utils import get_vanilla_qk_quant
from tamis.errors import UnsupportedError
from tamis.tuning.calls import LayerCall
from tamis.tuning.candidates import DENSE
from tamis.tuning.evaluate import Outcome, Trial, evaluate

LN2 = math.log(2)
COMMON_HEAD = {"q": ..., "k": ..., "v": ..., "attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None}
COMMON_TAIL = {
    "pvthreshd": 50,
    "attention_sink": False,
    "tensor_layout": "HND",
    "output_dtype": None,  # torch.float16 there, and ignored: the output has the dtype of q
    "return_sparsity": False,
    "return_lse": False,
}
# thu-ml/SpargeAttn, spas_sage_attn/core.py and autotune.py: names, order and defaults of their arguments.
THEIRS: dict[str, dict[str, Any]] = {
    "spas_sage2_attn_meansim_cuda": {
        **COMMON_HEAD,
        "smooth_k": True,
        "simthreshd1": 0.6,
        "cdfthreshd": 0.98,
        **COMMON_TAIL,
    },
    "spas_sage2_attn_meansim_topk_cuda": {
        **COMMON_HEAD,
        "smooth_k": True,
        "simthreshd1": -0.1,
        "cdfthreshd": None,
        "topk": 0.35,
        **COMMON_TAIL,
    },
    "block_sparse_sage2_attn_cuda": {
        "q": ...,
        "k": ...,
        "v": ...,
        "mask_id": None,
        "dropout_p": 0.0,
        "scale": None,
        "smooth_k": True,
        **COMMON_TAIL,
    },
    "SparseAttentionMeansim": {
        "sim_rule": "l1",
        "l1": 0.07,
        "pv_l1": 0.08,
        "cos_sim": 0.98,
        "rmse": 0.07,
        "rearrange_kwargs": None,  # {} there
        "tune_pv": True,
    },
    "SparseAttentionMeansim.forward": {
        "self": ...,
        "q": ...,
        "k": ...,
        "v": ...,
        "mask": None,
        "is_causal": False,
        "scale": None,
        "tensor_layout": "HND",
        "tune_mode": False,
        "smooth_k": True,
        "return_sparsity": False,
    },
    "extract_sparse_attention_state_dict": {"model": ..., "verbose": False},
    "load_sparse_attention_state_dict": {
        "model": ...,
        "saved_state_dict": ...,
        "multigpu": False,
        "verbose": False,
    },
}


@pytest.mark.parametrize("name", THEIRS)
def test_signatures_are_theirs(name: str) -> None:
    thing: Any = compat
    for part in name.split("."):
        thing = getattr(thing, part)
    found = {
        parameter.name: ... if parameter.default is inspect.Parameter.empty else parameter.default
        for parameter in inspect.signature(thing).parameters.values()
    }
    assert list(found.items()) == list(THEIRS[name].items())


@pytest.fixture
def installed() -> Iterator[None]:
    compat.install()
    yield
    compat.uninstall()


def qkv(batch: int, heads: int, length: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Queries of a head look the same way and keys drift: some blocks matter more than others, and are alike inside."""
    q = torch.randn(batch, heads, length, dim) + 2 * torch.randn(batch, heads, 1, dim)
    k = torch.randn(batch, heads, length, dim).cumsum(2) * 0.1
    return q.to(dtype), k.to(dtype), torch.randn(batch, heads, length, dim).to(dtype)


def ours(q: Tensor, k: Tensor, v: Tensor, predictor: tamis.Sparge, pv: float = 50, **more: Any) -> Tensor:
    output = tamis.sparse_attention(q, k, v, predictor=predictor, pv_threshold=pv * LN2, enable_gqa=True, **more)
    assert isinstance(output, Tensor)
    return output


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("causal", [False, True])
def test_sglang_diffusion(causal: bool) -> None:
    """sgl-project/sglang, multimodal_gen attention backend sparge_attn: 16-bit NHD, these keywords."""
    from spas_sage_attn import spas_sage2_attn_meansim_topk_cuda as op  # type: ignore[import-not-found]

    query, key, value = (t.transpose(1, 2) for t in qkv(2, 3, 700, 64, dtype=torch.bfloat16))
    output = op(query, key, value, is_causal=causal, scale=0.1, tensor_layout="NHD", topk=0.5)
    assert (output.shape, output.dtype) == ((2, 700, 3, 64), torch.bfloat16)
    expected = ours(
        *(t.transpose(1, 2) for t in (query, key, value)),
        tamis.Sparge(topk=0.5, similarity=-0.1, sink=False),
        scale=0.1,
        is_causal=causal,
    )
    assert torch.equal(output.transpose(1, 2), expected)


@pytest.mark.usefixtures("installed")
def test_lightx2v() -> None:
    """ModelTC/LightX2V, common/ops/attn: `[seq, heads, dim]`, through `core`, a layout in the place of the mask."""
    import spas_sage_attn

    tokens = [t[0].transpose(0, 1) for t in qkv(1, 2, 400, 64, dtype=torch.bfloat16)]
    q, k, v = (t.unsqueeze(0).transpose(1, 2) for t in tokens)
    kept = 1 - 0.8
    by_topk = spas_sage_attn.core.spas_sage2_attn_meansim_topk_cuda(q, k, v, topk=kept)
    by_mass = spas_sage_attn.core.spas_sage2_attn_meansim_cuda(q, k, v, "HND")
    assert torch.equal(by_topk, ours(q, k, v, tamis.Sparge(topk=kept, similarity=-0.1, sink=False)))
    assert torch.equal(by_mass, ours(q, k, v, tamis.Sparge(cdf=0.98, similarity=0.6, sink=False)))
    assert by_mass.permute(2, 1, 3, 0).contiguous().view(400, 128).shape == (400, 128)


@pytest.mark.usefixtures("installed")
def test_tuned_modules_in_lightx2v() -> None:
    """Its weight class "Sparge": made with three arguments, given parameters by name, called with a layout."""
    from spas_sage_attn.autotune import SparseAttentionMeansim  # type: ignore[import-not-found]
    from spas_sage_attn.utils import get_vanilla_qk_quant  # type: ignore[import-not-found]  # noqa: F401

    attention = SparseAttentionMeansim(l1=0.07, pv_l1=0.08, tune_pv=True)
    q, k, v = qkv(1, 2, 384, 64)
    with pytest.raises(RuntimeError, match="has no settings"):
        attention(q, k, v)
    for name, value in theirs(0.7).items():
        setattr(attention, name, nn.Parameter(value.bfloat16(), requires_grad=False))
    x = attention(*(t.transpose(1, 2) for t in (q, k, v)), tensor_layout="NHD").flatten(2).squeeze(0)
    cdf = torch.tensor(0.7).bfloat16().item()
    chosen = tamis.Sparge(cdf=(cdf, 1e-9), topk=(1e-9, 1.0), similarity=(0.25, -1), sink=True)
    expected = tamis.sparse_attention(q, k, v, predictor=chosen, pv_threshold=(12 * LN2, 20 * LN2))
    assert isinstance(expected, Tensor)
    assert torch.equal(x, expected[0].transpose(0, 1).flatten(1))


def spread(call: Callable[..., Any], *tensors: Tensor, **more: Any) -> Tensor:
    output, sparsity = call(*tensors, return_sparsity=True, **more)
    assert isinstance(sparsity, float)
    assert 0 <= sparsity < 1
    return output


def test_settings_per_head_and_units() -> None:
    q, k, v = qkv(1, 4, 640, 64)
    cdf, theta = torch.tensor([0.5, 0.9, 1.0, 0.7]), torch.tensor([-1.5, 0.2, 0.3, 1.0]).bfloat16()
    output = spread(compat.spas_sage2_attn_meansim_cuda, q, k, v, simthreshd1=theta, cdfthreshd=cdf, pvthreshd=4)
    all_of_it, little = 1.0, 1e-9
    expected = tamis.Sparge(
        cdf=(*cdf[:2].tolist(), little, little),
        topk=(little, little, all_of_it, all_of_it),
        similarity=(-1, theta[1].item(), -1, -1),
        sink=False,
    )
    assert torch.equal(output, ours(q, k, v, expected, pv=4))
    assert not torch.equal(output, ours(q, k, v, expected, pv=4 / LN2)), "the threshold has to matter here"
    per_head = compat.spas_sage2_attn_meansim_topk_cuda(
        q, k, v, topk=torch.tensor([0.2, 0.4, 0.6, 1.0]), pvthreshd=torch.tensor([4.0, 5, 6, 7]), attention_sink=True
    )
    chosen = tamis.Sparge(topk=(0.2, 0.4, 0.6, 1.0), similarity=-0.1)
    thresholds = [value * LN2 for value in (4, 5, 6, 7)]
    assert torch.equal(per_head, tamis.sparse_attention(q, k, v, predictor=chosen, pv_threshold=thresholds))
    with_mass = compat.spas_sage2_attn_meansim_topk_cuda(q, k, v, cdfthreshd=1, topk=None)
    assert torch.equal(with_mass, ours(q, k, v, tamis.Sparge(topk=1.0, similarity=-1, sink=False)))


def test_causal_is_aligned_at_the_end_and_masks_are_honoured() -> None:
    """Fewer queries than keys, as in a chunk of a prompt; more, where the first rows see nothing; and a mask."""
    predictor = tamis.Sparge(topk=0.35, similarity=-0.1, sink=False)
    q, k, v = qkv(1, 2, 500, 32)
    short = q[:, :, -200:]
    found = compat.spas_sage2_attn_meansim_topk_cuda(short, k, v, is_causal=True)
    assert torch.equal(found, ours(short, k, v, predictor, attn_mask=causal_lower_right(200, 500)))
    late = compat.spas_sage2_attn_meansim_topk_cuda(q, k[:, :, :100], v[:, :, :100], is_causal=True)
    assert bool((late[:, :, :400] == 0).all()) and bool((late[:, :, 400:] != 0).any(-1).all())
    mask = torch.rand(500, 500) < 0.5
    masked = compat.spas_sage2_attn_meansim_topk_cuda(q, k, v, mask)
    assert torch.equal(masked, ours(q, k, v, predictor, attn_mask=mask))
    both = compat.spas_sage2_attn_meansim_topk_cuda(q, k, v, mask, is_causal=True, topk=1.0)
    every = tamis.attend(
        q, k, v, tamis.Sparge(topk=1.0)(q, k, causal=True), attn_mask=mask, causal=True, precision="int8"
    )
    assert torch.equal(both, every.output)


def test_dtypes_and_log_sum_exp() -> None:
    q, k, v = qkv(1, 4, 300, 48)
    grouped = k[:, :2], v[:, :2]
    output, lse = compat.spas_sage2_attn_meansim_topk_cuda(q, *grouped, topk=1.0, return_lse=True)
    assert (output.dtype, lse.dtype, lse.shape) == (torch.float32, torch.float32, (1, 4, 300))
    repeated = k[:, [0, 0, 1, 1]].double()
    exact = torch.logsumexp(q.double() @ repeated.transpose(2, 3) * 48**-0.5, -1)
    # int8 scores: both sides rounded to 1/127 of their block's largest entry.
    assert (lse - exact).abs().mean() < 0.05
    narrow = compat.spas_sage2_attn_meansim_topk_cuda(q, *grouped, topk=1.0, output_dtype=torch.float16)
    assert torch.equal(narrow, output.half())


@pytest.mark.parametrize("block_size", [(128, 64), (64, 128)])
def test_block_masks_of_both_shapes(block_size: tuple[int, int]) -> None:
    q, k, v = qkv(2, 3, 450, 64)
    k, v = k[:, :, :330], v[:, :, :330]
    grid = tuple(-(-length // size) for length, size in zip((450, 330), block_size, strict=True))
    mask_id = (torch.rand(2, 3, *grid) < 0.5).to(torch.int8)
    mask = tamis.BlockMask.from_dense(mask_id.bool(), block_size, (450, 330))
    output, sparsity = compat.block_sparse_sage2_attn_cuda(q, k, v, mask_id, return_sparsity=True)
    expected = tamis.attend(q, k, v, mask, precision="int8", pv_threshold=50 * LN2)
    assert torch.equal(output, expected.output)
    assert sparsity == pytest.approx(1 - mask_id.float().mean().item(), abs=1e-6)
    sunk = compat.block_sparse_sage2_attn_cuda(q, k, v, mask_id, attention_sink=True)
    assert bool((mask_id[..., 0] == 0).any()), "or the sink changes nothing"
    mask_id[..., 0] = 1
    assert torch.equal(sunk, compat.block_sparse_sage2_attn_cuda(q, k, v, mask_id))
    every = compat.block_sparse_sage2_attn_cuda(q, k, v, torch.ones(2, 3, *grid))
    assert torch.equal(compat.block_sparse_sage2_attn_cuda(q, k, v), every)


def test_sparsity_counts_both_products_of_what_is_visible() -> None:
    """Causal, all blocks: nothing is skipped. With a threshold that skips some, those count by a half."""
    q, _, v = qkv(1, 2, 512, 64)
    k = q.mean(2, keepdim=True) * torch.linspace(0.3, -0.3, 512)[:, None]  # the first keys are the strongest
    call = compat.spas_sage2_attn_meansim_topk_cuda
    assert call(q, k, v, is_causal=True, topk=1.0, return_sparsity=True)[1] == 0
    _, sparsity = call(q, k, v, topk=1.0, pvthreshd=3, return_sparsity=True)
    stats = tamis.attend(q, k, v, tamis.Sparge(topk=1.0)(q, k), precision="int8", pv_threshold=3 * LN2).stats
    assert stats is not None and stats.qk_density == 1 > stats.pv_density
    assert sparsity == pytest.approx((1 - stats.pv_density) / 2)


TOPK, MASS, BLOCKS = (
    compat.spas_sage2_attn_meansim_topk_cuda,
    compat.spas_sage2_attn_meansim_cuda,
    compat.block_sparse_sage2_attn_cuda,
)
REFUSED: list[tuple[Callable[..., Any], dict[str, Any], type[Exception], str]] = [
    (TOPK, {"dropout_p": 0.1}, tamis.UnsupportedError, "dropout_p must be 0"),
    (TOPK, {"smooth_k": False}, tamis.UnsupportedError, "smooth_k must be True"),
    (BLOCKS, {"smooth_k": False}, tamis.UnsupportedError, "smooth_k must be True"),
    (TOPK, {"tensor_layout": "NDH"}, ValueError, "tensor_layout must be 'HND' or 'NHD'"),
    (TOPK, {"cdfthreshd": 0.9}, ValueError, "give one of cdfthreshd and topk"),
    (TOPK, {"topk": None}, ValueError, "give one of cdfthreshd and topk"),
    (TOPK, {"topk": 1.2}, ValueError, "topk must be above 0 and at most 1"),
    (MASS, {"cdfthreshd": 0.0}, ValueError, "cdfthreshd must be above 0"),
    (MASS, {"simthreshd1": float("nan")}, ValueError, "simthreshd1 must be finite"),
    (MASS, {"simthreshd1": torch.ones(3)}, ValueError, r"simthreshd1 must be one number or one per head \(2\), got 3"),
    (TOPK, {"pvthreshd": 0}, ValueError, "pvthreshd must be above 0"),
    (TOPK, {"pvthreshd": None}, TypeError, "pvthreshd must be a number"),
    (TOPK, {"output_dtype": torch.int32}, TypeError, "output_dtype must be a floating torch.dtype"),
    (TOPK, {"attn_mask": "NHD"}, TypeError, "attn_mask must be a tensor or None"),
    (TOPK, {"attn_mask": "HND", "tensor_layout": "NHD"}, TypeError, "attn_mask must be a tensor or None"),
    (TOPK, {"return_sparsity": True, "return_lse": True}, ValueError, "exclude each other"),
    (BLOCKS, {"mask_id": torch.ones(1, 2, 2, 2)}, ValueError, r"blocks \[2, 4\].*or \[4, 2\].*got \[1, 2, 2, 2\]"),
    (BLOCKS, {"mask_id": torch.ones(2, 4)}, ValueError, r"mask_id must be \[batch, heads, q_blocks, kv_blocks\]"),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_is_not_honoured_is_refused(number: int) -> None:
    function, given, error, message = REFUSED[number]
    with pytest.raises(error, match=message):
        function(*qkv(1, 2, 256, 64), **given)


def test_a_named_backend_runs_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the environment names it: a slow call in plain torch is no surprise then."""
    mask = torch.ones(1, 1, 2, 4)
    for name, error in (("triton", UnsupportedError), ("tritn", ValueError)):
        monkeypatch.setenv("TAMIS_COMPAT_BACKEND", name)
        for function, given in ((TOPK, {}), (MASS, {}), (BLOCKS, {"mask_id": mask})):
            with pytest.raises(error, match="TAMIS_COMPAT_BACKEND must be" if error is ValueError else "triton"):
                function(*qkv(1, 2, 256, 64), **given)
    monkeypatch.setenv("TAMIS_COMPAT_BACKEND", "reference")
    assert TOPK(*qkv(1, 2, 256, 64)).isfinite().all()


def test_nothing_is_importable_until_asked() -> None:
    assert importlib.util.find_spec("spas_sage_attn") is None
    compat.install()
    compat.install()
    try:
        for name in ("spas_sage_attn", *(f"spas_sage_attn.{part}" for part in ("core", "autotune", "utils"))):
            assert importlib.util.find_spec(name) is not None
        assert importlib.util.find_spec("spas_sage_attn._qattn") is None
        import spas_sage_attn

        assert spas_sage_attn.spas_sage_attn_meansim_topk_cuda is compat.spas_sage2_attn_meansim_topk_cuda
    finally:
        compat.uninstall()
    assert importlib.util.find_spec("spas_sage_attn") is None
    compat.uninstall()


def test_a_real_installation_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found on the path, and once it is imported."""
    (tmp_path / "spas_sage_attn").mkdir()
    (tmp_path / "spas_sage_attn" / "__init__.py").write_text("real = True\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="spas_sage_attn is already installed, and tamis does not shadow it"):
        compat.install()
    import spas_sage_attn

    try:
        with pytest.raises(RuntimeError, match=r"spas_sage_attn is already imported from .*__init__\.py"):
            compat.install()
        compat.uninstall()
        assert sys.modules["spas_sage_attn"].real
    finally:
        del sys.modules["spas_sage_attn"], spas_sage_attn


def test_engines_ask_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The entry points of pyproject.toml, found and called as vLLM and SGLang do: without an order they do nothing."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (tmp_path / "engines_0.dist-info").mkdir()
    (tmp_path / "engines_0.dist-info" / "METADATA").write_text("Name: engines\nVersion: 0\n", encoding="utf-8")
    lines = [
        f"[{group}]\n{name} = {value}\n"
        for group, found in project["entry-points"].items()
        for name, value in found.items()
    ]
    (tmp_path / "engines_0.dist-info" / "entry_points.txt").write_text("".join(lines), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for group in ("vllm.general_plugins", "sglang.srt.plugins", "sglang.multimodal_gen.plugins"):
        found = [point for point in entry_points(group=group) if point.name == "tamis"]
        assert found
        for value, expected in (("", False), ("0", False), ("1", True)):
            monkeypatch.setenv("TAMIS_COMPAT", value)
            found[0].load()()
            assert ("spas_sage_attn" in sys.modules) == expected
        compat.uninstall()
    monkeypatch.setenv("TAMIS_COMPAT", "yes")
    with pytest.raises(ValueError, match="TAMIS_COMPAT must be 1, 0 or empty, got 'yes'"):
        plugin.register()


def test_a_whole_program_runs_on_tamis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python -m tamis.compat` for a script, for a module, and for nothing."""
    (tmp_path / "program.py").write_text(
        "import sys\nimport spas_sage_attn\nprint(__name__, *sys.argv[1:], spas_sage_attn.__spec__.origin)\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.syspath_prepend(tmp_path)
    for how in ([str(tmp_path / "program.py")], ["-m", "program"]):
        assert main([*how, "a", "-b"]) == 0
        assert capsys.readouterr().out == "__main__ a -b tamis.compat\n"
        compat.uninstall()
        sys.path.remove(str(CHILDREN))
    assert os.environ["PYTHONPATH"] == str(CHILDREN)
    assert main([]) == main(["-x"]) == main(["-m"]) == 2
    assert "spas_sage_attn" not in sys.modules


def test_what_a_program_starts_runs_on_tamis_too(tmp_path: Path) -> None:
    """Processes that multiprocessing spawns get its path, other programs the environment."""
    (tmp_path / "program.py").write_text(
        "import multiprocessing, subprocess, sys\n"
        "def place(_):\n"
        "    from spas_sage_attn.autotune import SparseAttentionMeansim\n"
        "    return SparseAttentionMeansim.__module__\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map_async(place, [0]).get(120))\n"
        "    code = 'import spas_sage_attn; print(spas_sage_attn.__spec__.origin)'\n"
        "    sys.exit(subprocess.run([sys.executable, '-c', code]).returncode)\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "tamis.compat", str(tmp_path / "program.py")]
    source = str(Path(compat.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": source}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True) as run:
        try:
            assert run.communicate(timeout=240)[0] == "['tamis.compat.autotune']\ntamis.compat\n"
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)  # a pool starts its workers again for ever
    assert run.returncode == 0


def planted(seed: int, heads: str) -> tuple[Tensor, Tensor, Tensor]:
    """One head per letter: s looks at one block of keys per block of queries, d at all keys alike."""
    generator = torch.Generator().manual_seed(seed)
    blocks, dim = 4, 32
    q, k = (torch.randn(1, len(heads), blocks * 128, dim, generator=generator) * 0.01 for _ in range(2))
    directions = torch.eye(dim)[torch.randperm(dim, generator=generator)[:blocks]] * 12
    for head, kind in enumerate(heads):
        if kind == "s":
            q[0, head] = directions.repeat_interleave(128, 0)
            k[0, head].view(blocks, 2, 64, dim)[:, 0] = directions[:, None]
    return q, k, torch.randn(q.shape, generator=generator)


def relative_l1(found: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[float]:
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    return ((found - exact).abs().sum((0, 2, 3)) / exact.abs().sum((0, 2, 3))).tolist()


def test_a_module_tunes_itself_and_holds_its_budget() -> None:
    attention = compat.SparseAttentionMeansim(l1=0.05, pv_l1=0.06)
    q, k, v = planted(0, "sd")
    dense, nothing = attention(q, k, v, tune_mode=True, return_sparsity=True)
    assert max(relative_l1(dense, q, k, v)) < 1e-5
    assert nothing == 0
    assert attention.is_sparse.tolist() == [True, False]
    assert (attention.cdfthreshd[1], attention.simthreshd1[1], attention.head_num) == (1, 1, 2)
    output, sparsity = attention(q, k, v, return_sparsity=True)
    assert max(relative_l1(output, q, k, v)) <= 0.06
    # Head 0 keeps one block of 8 in every row and the sink: 7 of 32, and the second stage may skip more.
    assert sparsity >= (1 - 7 / 32) / 2
    assert attention.tuning_sparsity[0] >= 1 - 7 / 32
    attention(*planted(1, "dd"), tune_mode=True)
    assert attention.is_sparse.tolist() == [False, False], "what held on the first call fails on the second"
    assert attention.num_data_passed == 2
    with pytest.raises(ValueError, match="this call has 3 heads, those before had 2"):
        attention(*planted(1, "ddd"), tune_mode=True)


def test_what_failed_once_is_not_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its mask on an earlier call; or, of the same call twice, in the kernel the first time only."""
    attention = compat.SparseAttentionMeansim(l1=0.05, pv_l1=0.06)
    attention(*planted(1, "d"), tune_mode=True)
    attention(*planted(0, "s"), tune_mode=True)
    assert attention.is_sparse.tolist() == [True]
    for seed, kind in ((1, "d"), (0, "s")):
        assert max(relative_l1(attention(*planted(seed, kind)), *planted(seed, kind))) <= 0.06

    def unlucky(call: LayerCall, trials: list[Trial], precision: str, backend: str | None) -> Outcome:
        outcome = evaluate(call, trials, precision, backend)
        return outcome._replace(l1=torch.ones_like(outcome.l1))

    q, k, v = planted(0, "s")
    found, bounds = Search(), Bounds(0.05, 0.06)
    monkeypatch.setattr(search, "evaluate", unlucky)
    (first,) = found.add(LayerCall("", 0, 0, 0, q, k, v, False, None, None), bounds)
    monkeypatch.undo()
    (second,) = found.add(LayerCall("", 1, 0, 0, q, k, v, False, None, None), bounds)
    (fresh,) = Search().add(LayerCall("", 1, 0, 0, q, k, v, False, None, None), bounds)
    assert first.candidate == second.candidate == DENSE != fresh.candidate


def test_tuning_by_the_environment_and_without_stage_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNE_MODE", "1")
    attention = compat.SparseAttentionMeansim(tune_pv=False)
    q, k, v = planted(0, "s")
    nhd = attention(*(t.transpose(1, 2) for t in (q, k, v)), tensor_layout="NHD")
    assert nhd.shape == (1, 512, 1, 32)
    assert attention.pvthreshd.tolist() == pytest.approx([20])
    with pytest.raises(tamis.UnsupportedError, match="mask must be None in tune mode"):
        attention(q, k, v, torch.ones(512, 512, dtype=torch.bool))


class Blocks(nn.Module):
    """Names of which one is the beginning of another."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([compat.SparseAttentionMeansim() for _ in range(11)])
        self.single_blocks = nn.ModuleList([compat.SparseAttentionMeansim()])


def theirs(cdf: float) -> dict[str, Tensor]:
    return {
        "is_sparse": torch.tensor([True, False]),
        "cdfthreshd": torch.tensor([cdf, 0.5]),
        "simthreshd1": torch.tensor([0.25, 0.25]),
        "simthreshd2": torch.zeros(2),
        "pvthreshd": torch.tensor([12.0, 20.0]),
    }


def test_the_files_of_the_authors_tuner() -> None:
    saved = {
        f"{place}.{name}": value
        for place, cdf in (("blocks.1", 0.7), ("blocks.10", 0.9))
        for name, value in theirs(cdf).items()
    }
    model = compat.load_sparse_attention_state_dict(Blocks(), saved)
    assert isinstance(model, Blocks)
    assert model.blocks[0].cdfthreshd is None and model.single_blocks[0].cdfthreshd is None
    q, k, v = qkv(1, 2, 512, 64)
    cdf = torch.tensor(0.7).item()  # to fp32, as in the file
    chosen = tamis.Sparge(cdf=(cdf, 1e-9), topk=(1e-9, 1.0), similarity=(0.25, -1), sink=True)
    expected = tamis.sparse_attention(q, k, v, predictor=chosen, pv_threshold=(12 * LN2, 20 * LN2))
    assert torch.equal(model.blocks[1](q, k, v), expected)
    again = compat.extract_sparse_attention_state_dict(model)
    assert again.keys() == saved.keys() and all(torch.equal(again[name], saved[name]) for name in saved)
    by_torch = Blocks()
    by_torch.load_state_dict(saved)
    assert torch.equal(by_torch.blocks[1](q, k, v), expected)
    by_torch.blocks[1].cdfthreshd.fill_(1.0)
    assert not torch.equal(by_torch.blocks[1](q, k, v), expected), "what was read before is read again"
    by_torch.blocks[1].cdfthreshd = nn.Parameter(saved["blocks.1.cdfthreshd"])
    assert torch.equal(by_torch.blocks[1](q, k, v), expected), "and so is another tensor"
    by_torch.blocks[1].cdfthreshd = nn.Parameter(torch.ones(2))
    assert not torch.equal(by_torch.blocks[1](q, k, v), expected), "that was never written to, like the one before"
    with pytest.raises(
        ValueError, match=r"no SparseAttentionMeansim for locks\.1\.pvthreshd; it has them at blocks\.0"
    ):
        compat.load_sparse_attention_state_dict(Blocks(), {"locks.1.pvthreshd": torch.ones(2)})
    with pytest.raises(
        ValueError, match=r"the settings of blocks\.1 are incomplete: is_sparse, cdfthreshd, simthreshd1"
    ):
        compat.load_sparse_attention_state_dict(Blocks(), {"blocks.1.pvthreshd": torch.ones(2)})


@pytest.mark.parametrize("by", ["data", "new data", "numpy", "inference"])
def test_what_is_written_to_a_live_module_is_read(by: str) -> None:
    """However it is written: torch counts none of these."""
    q, k, v = qkv(1, 2, 512, 64)
    with torch.inference_mode(by == "inference"):
        module = compat.load_sparse_attention_state_dict(Blocks(), {f"blocks.0.{n}": t for n, t in theirs(0.3).items()})
        assert isinstance(module, Blocks)
        attention = module.blocks[0]
        before = attention(q, k, v)
        if by == "data":
            attention.is_sparse.data[0] = False
        elif by == "new data":
            attention.is_sparse.data = torch.tensor([False, False])
        elif by == "numpy":
            attention.is_sparse.data.numpy()[0] = False
        else:
            attention.is_sparse[0] = False
        after = attention(q, k, v)
    dense = tamis.sparse_attention(
        q, k, v, predictor=tamis.Sparge(topk=1.0, similarity=-1), pv_threshold=(1e4, 20 * LN2)
    )
    assert not torch.equal(before[:, 0], after[:, 0])
    assert torch.equal(before[:, 1], after[:, 1])
    assert (after[:, 0] - dense[:, 0]).abs().max() < 1e-3  # 2^-12 of a weight is skipped


def test_attributes_of_a_live_module_are_read() -> None:
    """A budget that becomes smaller, or is wrong, between two calls; what was tried before stays known."""
    q, k, v = planted(0, "sd")
    attention = compat.SparseAttentionMeansim(l1=0.05, pv_l1=0.06)
    attention(q, k, v, tune_mode=True)
    assert attention.is_sparse.tolist() == [True, False]
    attention.l1, attention.pv_l1 = 1e-6, 2e-6
    attention(q, k, v, tune_mode=True)
    assert attention.is_sparse.tolist() == [False, False], "rounding alone is more than that"
    attention.l1, attention.pv_l1, attention.tune_pv = 0.05, 0.06, False
    attention(q, k, v, tune_mode=True)
    assert attention.is_sparse.tolist() == [True, False]
    assert attention.pvthreshd.tolist()[0] == pytest.approx(20)
    for name, wrong, says in (("l1", 0.5, "pv_l1 above l1"), ("sim_rule", "rmse", "sim_rule must be 'l1'")):
        setattr(attention, name, wrong)
        with pytest.raises(ValueError, match=says):
            attention(q, k, v, tune_mode=True)


def test_rounding_by_blocks() -> None:
    """Every entry within half a step of its block, the last one partial; zeros stay zeros."""
    q, k = torch.randn(1, 2, 300, 32), torch.randn(1, 2, 130, 32)
    k[:, 1, 64:128] = 0
    mean = torch.tensor([[[[0.5] * 32], [[0.0] * 32]]])
    q_int8, q_scale, k_int8, k_scale = get_vanilla_qk_quant(q, k, mean)
    assert (q_scale.shape, k_scale.shape) == ((1, 2, 3), (1, 2, 3))
    for x, rounded, scale, block in ((q, q_int8, q_scale, 128), (k - mean, k_int8, k_scale, 64)):
        steps = scale.repeat_interleave(block, -1)[..., : x.shape[2], None]
        assert bool(((rounded * steps - x).abs() <= steps * 0.5001).all())
        assert rounded.abs().amax() == 127
    assert k_scale[0, 1, 1] == 0


def test_modules_refuse_what_they_have_not() -> None:
    for given in ({"sim_rule": "cosine"}, {"rearrange_kwargs": {"a": 1}}):
        with pytest.raises(tamis.UnsupportedError, match=next(iter(given))):
            compat.SparseAttentionMeansim(**given)
    with pytest.raises(ValueError, match="pv_l1 above l1"):
        compat.SparseAttentionMeansim(l1=0.07, pv_l1=0.07)


def test_flags_are_flags() -> None:
    """A string in the place of one, perhaps of the argument after it, would else be taken for True."""
    q, k, v = qkv(1, 2, 130, 32)
    for name in ("is_causal", "smooth_k", "attention_sink", "return_sparsity", "return_lse"):
        for wrong in ("HND", None, 2):
            with pytest.raises(TypeError, match=f"{name} must be True or False"):
                compat.spas_sage2_attn_meansim_cuda(q, k, v, **{name: wrong})
    for name in ("smooth_k", "attention_sink", "return_sparsity", "return_lse"):
        with pytest.raises(TypeError, match=f"{name} must be True or False"):
            compat.block_sparse_sage2_attn_cuda(q, k, v, **{name: "HND"})
    with pytest.raises(TypeError, match="tune_mode must be True or False"):
        compat.SparseAttentionMeansim()(q, k, v, tune_mode="HND")
    with pytest.raises(TypeError, match="tune_pv must be True or False"):
        compat.SparseAttentionMeansim(tune_pv="no")
    for wrong in ({"BLKQ": 0}, {"BLKK": -64}, {"BLKK": 64.0}, {"km": torch.zeros(1, 2, 32)}, {"km": torch.zeros(32)}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            get_vanilla_qk_quant(q, k, **wrong)
    with pytest.raises(TypeError, match=r"blocks\.0\.cdfthreshd must be a tensor"):
        compat.load_sparse_attention_state_dict(
            Blocks(), {f"blocks.0.{name}": value for name, value in theirs(0.3).items()} | {"blocks.0.cdfthreshd": 0.3}
        )


def test_candidates_have_a_form_in_the_authors_state() -> None:
    assert CANDIDATES[-1] == DENSE
    assert all(candidate.topk < 1e-6 and 0 < candidate.cdf < 1 for candidate in CANDIDATES[:-1])
    for candidate in CANDIDATES[::5]:
        made = arguments.predictor_of(
            torch.tensor([candidate.similarity]), torch.tensor([candidate.cdf]), None, True, 1
        )
        assert made.cdf is not None
        assert made.cdf[0] == pytest.approx(candidate.cdf, rel=1e-6)


def test_the_guide_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Every Python block of docs/engines.md; what it says is printed, is."""
    text = (Path(__file__).parents[1] / "docs" / "engines.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    try:
        for block in blocks:
            exec(block, names)
            assert capsys.readouterr().out.split("\n")[:-1] == re.findall(r"^print\(.*\)  # (.*)$", block, re.MULTILINE)
    finally:
        compat.uninstall()
