"""The authors' attention module with settings per head, tuned on its own calls or loaded from their files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tamis.call import refuse_gradients
from tamis.compat.arguments import LN2, check_smooth_k, flag, to_heads_first
from tamis.compat.functions import Result, spas_sage2_attn_meansim_cuda
from tamis.compat.search import Bounds, Found, Search
from tamis.errors import UnsupportedError
from tamis.tuning.calls import LayerCall, exact_output
from tamis.tuning.candidates import DENSE
from tamis.tuning.choose import THRESHOLDS

__all__ = ["SparseAttentionMeansim", "extract_sparse_attention_state_dict", "load_sparse_attention_state_dict"]

# What the authors save of a module, a tensor with one number per head each; simthreshd2 is never read, there and here.
FIELDS = ("is_sparse", "cdfthreshd", "simthreshd1", "simthreshd2", "pvthreshd")
_NEEDED = ("is_sparse", "cdfthreshd", "simthreshd1", "pvthreshd")
_UNTUNED_PV = 20.0  # log2 units: the authors' threshold with tune_pv=False
_OFF = 6e4  # log2 units: no weight is so small, and fp16 can hold it


class SparseAttentionMeansim(nn.Module):
    """An attention module that tunes itself: settings for every head from an error budget.

    In tune mode (`tune_mode=True`, or TUNE_MODE set to anything in the environment) a call is looked at and answered by
    dense attention; afterwards calls run sparse with the settings found. They are kept as the authors keep them, in
    parameters of one number per head: `is_sparse`, `cdfthreshd`, `simthreshd1`, `pvthreshd` (units of log2). A head
    that cannot be sparse within the budget has `is_sparse` False and keeps all blocks, in int8 all the same.
    Attributes and parameters may be changed at any time: every call reads them, which waits for a device that has them.

    Args:
        sim_rule: "l1".
        l1: largest relative L1, sum|O - O'| / sum|O|, of a head by leaving out blocks and rounding.
        pv_l1: the same with the skipped products of `pvthreshd` on top; above l1.
        cos_sim, rmse: bounds of the rules "cosine" and "rmse", which there are not.
        rearrange_kwargs: must be empty; the authors' code keeps it and never reads it.
        tune_pv: find `pvthreshd`; otherwise it is 20, as in the authors' code.

    Raises:
        ValueError: l1 and pv_l1 are not 0 < l1 < pv_l1.
        UnsupportedError: another rule, or rearrange_kwargs.

    Source: SpargeAttn (arXiv 2502.18137), section 3.6; how settings are found is ours (tamis/compat/search.py).

    Example:
        >>> import torch
        >>> from tamis.compat import SparseAttentionMeansim
        >>> attention = SparseAttentionMeansim(l1=0.07, pv_l1=0.08)
        >>> q, k, v = (torch.randn(1, 2, 512, 64) for _ in range(3))
        >>> _ = attention(q, k, v, tune_mode=True)
        >>> attention(q, k, v).shape, attention.cdfthreshd.shape
        (torch.Size([1, 2, 512, 64]), torch.Size([2]))
    """

    is_sparse: Tensor | None
    cdfthreshd: Tensor | None
    simthreshd1: Tensor | None
    simthreshd2: Tensor | None
    pvthreshd: Tensor | None

    def __init__(
        self,
        sim_rule: str = "l1",
        l1: float = 0.07,
        pv_l1: float = 0.08,
        cos_sim: float = 0.98,
        rmse: float = 0.07,
        rearrange_kwargs: Mapping[str, Any] | None = None,
        tune_pv: bool = True,
    ) -> None:
        super().__init__()
        if rearrange_kwargs:
            raise UnsupportedError(f"rearrange_kwargs must be empty, got {dict(rearrange_kwargs)}")
        self.sim_rule, self.l1, self.pv_l1, self.cos_sim, self.rmse = sim_rule, l1, pv_l1, cos_sim, rmse
        self.tune_pv = tune_pv
        self._bounds()
        self.head_num: int | None = None
        self.tuning_sparsity: Tensor | None = None
        self.num_data_passed = 0
        self._search = Search()
        for name in FIELDS:
            setattr(self, name, None)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        tensor_layout: str = "HND",
        tune_mode: bool = False,
        smooth_k: bool = True,
        return_sparsity: bool = False,
    ) -> Result:
        """Attention; arguments as those of `spas_sage2_attn_meansim_topk_cuda`, with the first key block always kept.

        With return_sparsity also the sparsity, 0 in tune mode, whose output is dense.

        Raises:
            RuntimeError: nothing was tuned or loaded.
            UnsupportedError: a mask in tune mode, or what the functions refuse.
        """
        check_smooth_k(smooth_k)
        return_sparsity = flag(return_sparsity, "return_sparsity")
        if flag(tune_mode, "tune_mode") or os.environ.get("TUNE_MODE", "") != "":
            output = self._tune(to_heads_first(tensor_layout, q, k, v), mask, is_causal, scale)
            output = output if tensor_layout == "HND" else output.transpose(-2, -3)
            return (output, 0.0) if return_sparsity else output
        own = self._settings()
        return spas_sage2_attn_meansim_cuda(
            q,
            k,
            v,
            mask,
            is_causal=is_causal,
            scale=scale,
            simthreshd1=own["simthreshd1"],
            cdfthreshd=torch.where(own["is_sparse"].bool(), own["cdfthreshd"].float(), 1.0),
            pvthreshd=own["pvthreshd"],
            attention_sink=True,
            tensor_layout=tensor_layout,
            return_sparsity=return_sparsity,
        )

    def _tune(self, qkv: tuple[Tensor, ...], mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
        """Look at a call, batch by batch, and settle; the dense output."""
        query, key, value = qkv
        if mask is not None:
            raise UnsupportedError("mask must be None in tune mode: errors under a mask cannot be judged")
        if query.dim() != 4:
            raise ValueError(f"q must have 4 dimensions, got shape {tuple(query.shape)}")
        refuse_gradients(q=query, k=key, v=value)
        bounds = self._bounds()
        found: list[Found] = []
        with torch.inference_mode():
            for number in range(query.shape[0]):
                one, two, three = (tensor[number : number + 1] for tensor in qkv)
                place = ("", self.num_data_passed, 0, number)
                found = self._search.add(LayerCall(*place, one, two, three, is_causal, None, scale), bounds)
        self._keep(found, query.device)
        self.num_data_passed += 1
        return exact_output(LayerCall("", 0, 0, 0, query, key, value, is_causal, None, scale)).to(query.dtype)

    def _bounds(self) -> Bounds:
        """What the attributes ask for at this moment.

        Raises:
            ValueError, UnsupportedError: as the constructor.
        """
        if self.sim_rule != "l1":
            raise UnsupportedError(f"sim_rule must be 'l1': tamis judges by the relative L1, got {self.sim_rule!r}")
        if not 0 < self.l1 < self.pv_l1:
            raise ValueError(f"l1 must be above 0 and pv_l1 above l1, got {self.l1} and {self.pv_l1}")
        return Bounds(self.l1, self.pv_l1, THRESHOLDS if flag(self.tune_pv, "tune_pv") else (_UNTUNED_PV * LN2,))

    def _keep(self, found: Sequence[Found], device: torch.device) -> None:
        sparse = [head.candidate != DENSE for head in found]
        settings = zip(sparse, (head.candidate for head in found), strict=True)
        pairs = [(setting.cdf, setting.similarity) if some else (1.0, 1.0) for some, setting in settings]
        values: dict[str, list[Any]] = {
            "is_sparse": sparse,
            "cdfthreshd": [cdf for cdf, _ in pairs],
            "simthreshd1": [similarity for _, similarity in pairs],
            "simthreshd2": [0.0 for _ in found],
            "pvthreshd": [min(head.threshold / LN2, _OFF) for head in found],
        }
        for name, column in values.items():
            setattr(self, name, nn.Parameter(torch.tensor(column, device=device), requires_grad=False))
        self.tuning_sparsity = torch.tensor([1.0 - head.density for head in found])
        self.head_num = len(found)

    def _settings(self) -> dict[str, Tensor]:
        """The parameters on the CPU, read in every call: torch does not count what is written through `.data`."""
        found = {name: getattr(self, name) for name in _NEEDED}
        if any(tensor is None for tensor in found.values()):
            raise RuntimeError(
                "attention has no settings: call it with tune_mode=True first, or load what the authors' tuner saved "
                "with load_sparse_attention_state_dict"
            )
        return {name: tensor.detach().cpu() for name, tensor in found.items()}

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Take what a file has for a module that has nothing yet; torch's own loading only copies into parameters."""
        for name in FIELDS:
            if isinstance(saved := state_dict.get(prefix + name), Tensor):
                setattr(self, name, nn.Parameter(saved.detach().clone(), requires_grad=False))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def extract_sparse_attention_state_dict(model: nn.Module, verbose: bool = False) -> dict[str, Tensor]:
    """The settings of every `SparseAttentionMeansim` of a model, by exact name, as the authors save them.

    Example:
        >>> from torch import nn
        >>> from tamis.compat import SparseAttentionMeansim, extract_sparse_attention_state_dict
        >>> extract_sparse_attention_state_dict(nn.Sequential(SparseAttentionMeansim()))  # nothing is tuned yet
        {}
    """
    saved = {}
    for place, module in model.named_modules():
        if isinstance(module, SparseAttentionMeansim):
            for name in FIELDS:
                setting = getattr(module, name)
                if setting is not None:
                    saved[f"{place}.{name}" if place else name] = setting.detach()
    if verbose:
        print("\n".join(saved))
    return saved


def load_sparse_attention_state_dict(
    model: nn.Module, saved_state_dict: Mapping[str, Tensor], multigpu: bool = False, verbose: bool = False
) -> nn.Module:
    """Give the `SparseAttentionMeansim` modules of a model the settings that the authors' tuner saved.

    Names are compared exactly, and numbers stay what they are: the authors' code takes settings for every layer whose
    name contains another's, and rounds them to the model's dtype.

    Args:
        saved_state_dict: one tensor per head by `<module>.is_sparse`, `.cdfthreshd`, `.simthreshd1`, `.pvthreshd`.
        multigpu: settings are numbers to tamis, wherever they lie: one way serves both.
        verbose: print the names that are loaded.

    Returns:
        The model.

    Raises:
        TypeError: a setting is no tensor.
        ValueError: it names a module that the model does not have, or leaves one of a module's settings out.
    """
    places = {place: module for place, module in model.named_modules() if isinstance(module, SparseAttentionMeansim)}
    known = {f"{place}.{name}" if place else name: (place, name) for place in places for name in FIELDS}
    strange = [name for name in saved_state_dict if name not in known]
    if strange:
        raise ValueError(
            f"the model has no SparseAttentionMeansim for {', '.join(strange[:3])}; it has them at "
            f"{', '.join(list(places)[:3]) or 'no place'}"
        )
    given = {known[name] for name in saved_state_dict}
    for place in {place for place, _ in given}:
        missing = [name for name in _NEEDED if (place, name) not in given]
        if missing:
            raise ValueError(f"the settings of {place} are incomplete: {', '.join(missing)} missing")
    for name, saved in saved_state_dict.items():
        if not isinstance(saved, Tensor):
            raise TypeError(f"{name} must be a tensor with one number per head, got {type(saved).__name__}")
    for name, saved in saved_state_dict.items():
        place, field = known[name]
        setattr(places[place], field, nn.Parameter(saved.detach().clone(), requires_grad=False))
        if verbose:
            print(name)
    return model
