"""``Normalize``: how advantages or rewards are normalised before and after they are combined."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from numbers import Integral, Real

import torch
from torch import Tensor

from pama_ext._checks import kind_of, one_of, strided_tensor

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
_GROUPS = ("group_size", "group_ids", "group_offsets")


@dataclass(frozen=True, eq=False, kw_only=True)
class Normalize:
    r"""How each objective's advantages are normalised first, and the combined advantage last.

    Over the usable samples x of a pool, with m their mean and s their standard deviation (divisor ``count -
    correction``), a sample becomes

    .. math:: (x - m) / (s + \mathrm{eps}) \quad\text{or}\quad (x - m) / \sqrt{s^2 + \mathrm{eps}}

    A usable sample is valid under the mask and, for ``nan="ignore"``, finite. The moments are those of each objective
    on its own, accumulated without E[x^2] - E[x]^2. A pool whose samples are all equal gives exactly 0 and is counted
    in ``ObjectiveStats.dead_groups``. docs/numerics.md has every formula with its source.

    Args:
        by: pool of the samples of each objective, before Noon: "none", "batch" or "group".
        group_size: consecutive rows of the first dimension that make a group; must divide their number.
        group_ids: ``[B]``, any integer dtype: rows with equal ids make a group, in any order.
        group_offsets: ``[G + 1]``, int32 or int64: group g is the rows from ``group_offsets[g]`` to
            ``group_offsets[g + 1]``; starts at 0, ascends, ends at B (looked at on the CPU only).
        over: what a sample is in ``[B, T, N]``: "tokens", each valid token; "row_sums", each row, whose score is the
            sum of its valid tokens and then stands at each of them (outcome rewards placed at one token). A row with a
            non-finite valid entry has no score for that objective.
        center: subtract the mean.
        scale: divide by the standard deviation.
        correction: 1 (Bessel) or 0.
        eps: >= 0, units of the standard deviation ("std") or of the variance ("var").
        eps_in: where eps enters, "std" or "var".
        singleton: what the only usable sample of a pool gives: "zero", 0; "raw", itself as if mean 0 and std 1.
        combined: pool over which the combined advantage is normalised at the end: "none", "batch" or "group", with the
            settings above; or a ``Normalize(by="batch", ...)`` with settings of its own. Its samples are the tokens at
            which any objective has data.

    Raises:
        ValueError, TypeError: at construction; the message names the argument.
    """

    by: str = "none"
    group_size: int | None = None
    group_ids: Tensor | None = None
    group_offsets: Tensor | None = None
    over: str = "tokens"
    center: bool = True
    scale: bool = True
    correction: int = 1
    eps: float = 1e-4
    eps_in: str = "std"
    singleton: str = "zero"
    combined: str | Normalize = "none"
    _spec: str = field(init=False, repr=False)  # all but the tensors, in the form the operators take
    _groups: Tensor | None = field(init=False, repr=False)  # the tensor that describes the groups, if one does

    def __post_init__(self) -> None:
        one_of("by", self.by, ("none", "batch", "group"))
        one_of("over", self.over, ("tokens", "row_sums"))
        one_of("eps_in", self.eps_in, ("std", "var"))
        one_of("singleton", self.singleton, ("zero", "raw"))
        for name in ("center", "scale"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {kind_of(getattr(self, name))}")
        if isinstance(self.correction, bool) or not isinstance(self.correction, Integral):
            raise TypeError(f"correction: expected an int, got {kind_of(self.correction)}")
        if self.correction not in (0, 1):
            raise ValueError(f"correction: expected 0 or 1, got {self.correction}")
        if isinstance(self.eps, bool) or not isinstance(self.eps, Real):
            raise TypeError(f"eps: expected a float, got {kind_of(self.eps)}")
        if not (self.eps >= 0 and math.isfinite(self.eps)):
            raise ValueError(f"eps: expected a finite number >= 0, got {self.eps}")
        self._check_groups()
        last = self.combined
        if isinstance(last, Normalize):
            if last.by != "batch" or last.over != "tokens" or last.combined != "none" or last.groups:
                raise ValueError('combined: expected a Normalize(by="batch") without groups, over or combined')
        else:
            one_of("combined", last, ("none", "batch", "group"))
        if "group" in (self.by, last) and self.groups is None:
            raise ValueError(f'group_size: expected one of {", ".join(_GROUPS)}, as a pool is "group"; got none')
        object.__setattr__(self, "_spec", sys.intern(self._spelled()))
        object.__setattr__(self, "_groups", self.group_ids if self.group_ids is not None else self.group_offsets)

    @property
    def groups(self) -> str | None:
        """Which of the three describes the groups: "group_size", "group_ids", "group_offsets" or None."""
        return next((name for name in _GROUPS if getattr(self, name) is not None), None)

    def _spelled(self) -> str:
        """What csrc/normalize.cpp reads."""
        last = self.combined if isinstance(self.combined, Normalize) else self
        pool = last.by if last is not self else self.combined
        kind, size = (self.groups or "none").removeprefix("group_"), self.group_size or 0
        return f"{self.by} {kind} {size} {self.over} {self._moments()} {pool} {last._moments()}"

    def _moments(self) -> str:
        numbers = f"{self.center:d} {self.scale:d} {self.correction:d} {float(self.eps)!r}"
        return f"{numbers} {self.eps_in} {self.singleton}"

    def _check_groups(self) -> None:
        given = [name for name in _GROUPS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[1]}: expected at most one of {', '.join(_GROUPS)}, got {' and '.join(given)}")
        size = self.group_size
        if size is not None:
            if isinstance(size, bool) or not isinstance(size, Integral):
                raise TypeError(f"group_size: expected an int, got {kind_of(size)}")
            if size < 1:
                raise ValueError(f"group_size: expected at least 1, got {size}")
        for name, dtypes in (("group_ids", INTEGERS), ("group_offsets", (torch.int64, torch.int32))):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            strided_tensor(name, tensor)
            if tensor.dtype not in dtypes:
                raise TypeError(f"{name}: expected one of {', '.join(map(str, dtypes))}, got {tensor.dtype}")
            if tensor.dim() != 1:
                raise ValueError(f"{name}: expected one dimension, got {list(tensor.shape)}")
        if self.group_offsets is not None and self.group_offsets.shape[0] < 1:
            raise ValueError("group_offsets: expected [G + 1], starting with 0, got an empty tensor")

    # Presets: the rules of released trainers, each held by a test beside that trainer (tests/test_presets.py).

    @classmethod
    def trl(cls, group_size: int, *, scale: bool = True) -> Normalize:
        """As TRL 1.16.0, ``multi_objective_aggregation="sum_then_normalize"``: weigh, sum, then normalise by group.

        For ``solver="fixed"`` with TRL's ``reward_weights``. Correction 1, eps 1e-4 on the standard deviation; one
        usable sample gives 0. ``scale=False`` is ``scale_rewards="none"``; "batch" is not offered.
        """
        return cls(group_size=group_size, scale=scale, combined="group")

    @classmethod
    def trl_gdpo(cls, group_size: int) -> Normalize:
        """As TRL 1.16.0, ``multi_objective_aggregation="normalize_then_sum"`` (GDPO, arXiv 2601.05242).

        For ``solver="fixed"``. Each objective by group, the weighted sum by batch; both correction 1, eps 1e-4 on the
        standard deviation; one usable sample gives 0.
        """
        return cls(by="group", group_size=group_size, combined="batch")

    @classmethod
    def verl(cls, group_ids: Tensor, *, scale: bool = True) -> Normalize:
        """As verl 0.9.1, ``compute_grpo_outcome_advantage`` and its vectorised form, for each objective.

        Takes ``token_level_rewards`` and ``response_mask`` ``[B, T]`` as they are. Correction 1, eps 1e-6 on the
        standard deviation; one usable sample stays as it is. ``scale=False`` is ``norm_adv_by_std_in_grpo=False``.
        """
        return cls(by="group", group_ids=group_ids, over="row_sums", scale=scale, eps=1e-6, singleton="raw")

    @classmethod
    def verl_whiten(cls) -> Normalize:
        """As verl 0.9.1, ``masked_whiten``: each objective over the valid tokens.

        Correction 1, eps 1e-8 on the variance.
        """
        return cls(by="batch", eps=1e-8, eps_in="var")

    @classmethod
    def verl_gdpo(cls, group_ids: Tensor) -> Normalize:
        """As verl 0.9.1, ``compute_gdpo_outcome_advantage`` (GDPO, arXiv 2601.05242): :meth:`verl`, then whitening.

        For ``solver="fixed"`` with ``reward_weights`` (verl's default: 1 each).
        """
        return cls(by="group", group_ids=group_ids, over="row_sums", eps=1e-6, singleton="raw",
                   combined=cls.verl_whiten())  # fmt: skip

    @classmethod
    def openrlhf(cls, group_size: int) -> Normalize:
        """As OpenRLHF 0.11.2, ``advantage_estimator="group_norm"`` (trainer/ppo_utils/experience_maker.py).

        Correction 1, eps 1e-9 on the standard deviation.
        """
        return cls(by="group", group_size=group_size, over="row_sums", eps=1e-9)

    @classmethod
    def nemo(cls, group_ids: Tensor) -> Normalize:
        """As NeMo-RL, ``GRPOAdvantageEstimator`` (nemo_rl/algorithms/advantage_estimator.py at commit 165f994).

        With ``normalize_rewards`` and without ``use_leave_one_out_baseline``, whose standard deviation differs from
        sample to sample. Correction 1, eps 1e-6 on the standard deviation; one usable sample gives 0.
        """
        return cls(by="group", group_ids=group_ids, over="row_sums", eps=1e-6)

    @classmethod
    def swift(cls, group_size: int, *, gdpo: bool = False) -> Normalize:
        """ms-swift 4.6.0, ``compute_advantages`` (swift/rl_core/advantage.py), ``advantage_estimator="grpo"``.

        For ``solver="fixed"``. ``scale_rewards="group"``: the weighted sum by group, eps 1e-4 on the standard
        deviation. ``gdpo=True`` is ``scale_rewards="gdpo"``: each objective by group, then the sum by batch, both with
        eps 1e-8. Correction 1. Rows without any reward count as 0 there and are left out here.
        """
        if gdpo:
            return cls(by="group", group_size=group_size, eps=1e-8, combined="batch")
        return cls(group_size=group_size, combined="group")
