"""What ``combine`` returns: :class:`Combined` and :class:`ObjectiveStats`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pama_ext import _C

if TYPE_CHECKING:
    from typing_extensions import Self


class ObjectiveStats(NamedTuple):
    """Statistics of each objective over its valid entries: every field ``[N]``, float32 (float64 for float64 input).

    Attributes:
        count: valid finite entries; the statistics below are over these.
        mean: mean of the raw input.
        std: standard deviation of the raw input, correction 1; 0 when ``count <= 1``.
        min: smallest raw input.
        max: largest raw input.
        positive: share of entries > 0 after ``normalize``, before the Noon clamp.
        clipped: share with I(A) = 0 among the entries that are non-zero after the Noon clamp.
        active_mean: a_i = sum of I(A_i) / count, after ``reward_weights``; what the weights are solved from.
        nonfinite: valid entries that are NaN or infinite.
        dead_groups: pools of ``Normalize.by`` with entries that give only 0: constant ones, and those of a single entry
            if ``singleton="zero"``.

    Where there is nothing to count, a statistic is 0, never NaN.
    """

    count: Tensor  # type: ignore[assignment]  # shadows tuple.count
    mean: Tensor
    std: Tensor
    min: Tensor
    max: Tensor
    positive: Tensor
    clipped: Tensor
    active_mean: Tensor
    nonfinite: Tensor
    dead_groups: Tensor


class _Fields(NamedTuple):
    advantages: Any
    weights: Tensor
    value: Tensor
    stats: ObjectiveStats


class Combined(_Fields):
    """The named tuple ``(advantages, weights, value, stats)`` that :func:`pama_ext.combine` returns.

    Attributes:
        advantages: the combined advantage, shape of one objective, dtype of the input
            (:func:`pama_ext.combine_`: the argument itself).
        weights: c, ``[N]``; ``[B, N]`` at level "sequence"; at level "token" the share of valid tokens at which each
            objective was the binding one, ties shared.
        value: s*, ``[]``; ``[B]`` at level "sequence"; at level "token" its mean over the valid tokens.
        stats: :class:`ObjectiveStats`.
        names: names of the objectives if the advantages came as a dict, else None (not a field of the tuple).

    All but ``advantages`` live in one small buffer on the device of the input.
    """

    names: tuple[str, ...] | None = None

    def _replace(self, **fields: Any) -> Self:
        replaced = super()._replace(**fields)
        replaced.names = self.names
        return replaced

    def metrics(self, prefix: str = "pama/", names: Sequence[str] | None = None) -> dict[str, float]:
        """Everything small as floats, moved to the host in one transfer (the only synchronisation of this package).

        Args:
            prefix: put before every key.
            names: one name per objective; default :attr:`names`, else "0", "1", ...

        Returns:
            ``{prefix}value``, ``{prefix}weight/{name}`` and ``{prefix}{statistic}/{name}`` for each field of
            :class:`ObjectiveStats`. At level "sequence", value and weights are means over the rows.

        Raises:
            ValueError: ``names`` does not have one entry per objective.
        """
        weights, value, stats = self.weights, self.value, self.stats
        n = stats.count.shape[0]
        names = names or self.names or [str(i) for i in range(n)]
        if len(names) != n:
            raise ValueError(f"names: expected one per objective ({n}), got {len(names)}")
        if value.dim():
            rows = max(1, value.shape[0])
            weights, value = weights.sum(0) / rows, value.sum(0) / rows
        host = torch.cat([value.reshape(1), weights, *stats]).tolist()
        keys = [f"{group}/{name}" for group in ("weight", *stats._fields) for name in names]
        return {prefix + key: number for key, number in zip(["value", *keys], host, strict=True)}


class PendingCombined(Combined):
    """What an eager call returns: a :class:`Combined` whose small fields become tensors when they are first read.

    Most steps of a training loop read none of them, and making eleven views would cost more than the call itself.
    The getters are not Python functions: a compiler that traces Python must not enter them.
    """

    weights = property(functools.partial(_C.field, 1))
    value = property(functools.partial(_C.field, 2))
    stats = property(functools.partial(_C.field, 3))

    def __iter__(self) -> Iterator[Any]:
        return iter(_settled(self))

    def __getitem__(self, index: Any) -> Any:
        return _settled(self)[index]

    def __repr__(self) -> str:
        return repr(Combined(*self))

    def __radd__(self, other: Any) -> Any:
        return other + _settled(self) if isinstance(other, tuple) else NotImplemented

    def __reduce__(self) -> tuple[Any, ...]:
        return Combined, _settled(self), self.__dict__


def _settled(combined: Combined) -> tuple[Any, ...]:
    return combined.advantages, combined.weights, combined.value, combined.stats


def _of_plain_tuple(name: str) -> Callable[..., Any]:
    def method(self: PendingCombined, *args: Any) -> Any:
        return getattr(_settled(self), name)(*(_settled(a) if isinstance(a, PendingCombined) else a for a in args))

    return method


# What tuple does in C reads its items directly, pending or not; so it is done on a plain tuple of the settled fields.
for _name in ("__contains__", "__add__", "__mul__", "__rmul__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__",
              "__ge__", "__hash__", "index", "count"):  # fmt: skip
    setattr(PendingCombined, _name, _of_plain_tuple(_name))
