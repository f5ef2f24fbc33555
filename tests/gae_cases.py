"""Calls of ``gae`` for the suite, the ways into its kernels, and the judgement of what comes out of them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from cases import DTYPES, MASKS, masks, surrounded
from compare import assert_close
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map

from pama_ext import _C, reference
from pama_ext._gae import _gae_dispatcher

# [B, T, N]. The CPU kernel works on tiles of min(1024, 2048 / N) tokens and vectors of 4, 8 or 16 elements, with up
# to 8 objectives side by side in them; work of 65536 elements and more is cut into parts.
SHAPES: dict[str, tuple[int, ...]] = {
    "no rows": (0, 5, 2),
    "no tokens": (3, 0, 2),
    "one token": (1, 1, 1),
    "one token each": (33, 1, 3),
    "two tokens each": (17, 2, 4),
    "a vector": (1, 16, 1),
    "below a vector": (1, 15, 1),
    "above a vector": (3, 17, 1),
    "three objectives": (5, 100, 3),
    "seven objectives": (3, 37, 7),
    "eight objectives": (2, 40, 8),
    "more than a vector has": (2, 33, 9),
    "most objectives": (2, 21, 64),
    "a tile": (1, 1024, 2),
    "tile - 1": (2, 1023, 1),
    "tile + 1": (1, 513, 4),
    "rows that straddle tiles": (5, 300, 5),
    "two parts": (40, 512, 4),
    "three parts, uneven": (7, 4683, 3),
}


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, *, outcome=False, packed=None, **options) -> dict:
    """Arguments with mask, kl_penalty, bootstrap, gamma and lam for each objective; what options name replaces them."""
    g = torch.Generator().manual_seed(sum(shape))
    tokens, n = shape[:-1], shape[-1]
    sequences = shape[0] if packed is None else len(packed)
    arguments: dict[str, Any] = {
        "rewards": torch.randn(*((sequences, n) if outcome else shape), generator=g).to(dtype),
        "values": torch.randn(*shape, generator=g).to(dtype),
        "mask": torch.rand(tokens, generator=g) < 0.8,
        "kl_penalty": 0.1 * torch.randn(tokens, generator=g).to(dtype),
        "bootstrap": torch.randn(sequences, n, generator=g).to(dtype),
        "gamma": torch.linspace(0.9, 1, n).tolist(),
        "lam": torch.linspace(0.95, 0.5, n).tolist(),
    }
    if packed is not None:
        arguments["offsets"] = torch.tensor([0, *itertools.accumulate(packed)])
    return {key: value for key, value in {**arguments, **options}.items() if value is not None}


def call(function, arguments: dict[str, Any]) -> Any:
    """``function`` on them, the two positional arguments by their names."""
    rest = {key: value for key, value in arguments.items() if key not in ("rewards", "values")}
    return function(arguments["rewards"], arguments["values"], **rest)


def eager(rewards, values, *, dim=-1, mask=None, gamma=1.0, lam=0.95, kl_penalty=None, bootstrap=None, offsets=None):
    """Door 2; fails if the compiled module declines."""
    result = _C.gae(rewards, values, dim, mask, gamma, lam, kl_penalty, bootstrap, offsets)
    if result is None:
        raise AssertionError("the eager door declined")
    return result


DOORS = {"dispatcher": _gae_dispatcher} | ({"eager": eager} if _C.has_door() else {})


def listed(objectives: Any) -> list[Tensor]:
    if isinstance(objectives, Tensor):
        return [objectives]
    return list(objectives.values() if isinstance(objectives, dict) else objectives)


def wide(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same in float64; the mask stays as it is."""
    kept = {"mask": arguments["mask"]} if "mask" in arguments else {}
    widened = tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, arguments)
    return {**widened, **kept}


def assert_computes(result: tuple[Any, Any], arguments: dict[str, Any]) -> None:
    """Both results against the float64 specification, the sequential recursion in the same dtype beside it."""
    truth, same = call(reference.gae, wide(arguments)), call(reference.gae, arguments)
    for ours, exact, base, what in zip(result, truth, same, ("advantages", "returns"), strict=True):
        assert type(ours) is type(exact)
        for k, (a, b, c) in enumerate(zip(listed(ours), listed(exact), listed(base), strict=True)):
            assert a.dtype == c.dtype, what
            # Each is a sum of terms as large as the largest, of which rounding is a share.
            largest = b.abs().max() if b.numel() else None
            assert_close(a, b, c, magnitude=largest, what=f"{what} {k}")


def lay_out(objectives: Tensor, form: str, dim: int, time: int) -> Any:
    """Objectives, last in ``objectives``, as "tensor", "slice", "list", "tuple" or "dict"; ``dim`` as in ``gae``."""
    if form in ("tensor", "slice"):
        at = min(dim, 1) if time == 2 and objectives.dim() == 2 else dim
        moved = objectives.movedim(-1, at)
        return surrounded(moved) if form == "slice" else moved.clone(memory_format=torch.contiguous_format)
    columns = [column.clone() for column in objectives.unbind(-1)]
    return (
        {f"r{i}": c for i, c in enumerate(columns)} if form == "dict" else {"list": list, "tuple": tuple}[form](columns)
    )


@st.composite
def calls(draw, dtypes=DTYPES, forms=("tensor", "slice", "list", "tuple", "dict")) -> dict[str, Any]:
    """A whole call. What shrinks well is drawn, what fills the tensors comes from a drawn seed."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20), label="seed"))
    n = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 11]), label="N")
    packed = draw(st.none() | st.lists(st.sampled_from([0, 1, 2, 7, 16, 40]), max_size=6), label="packed")
    tokens = (sum(packed),) if packed is not None else (draw(st.integers(0, 5)), draw(st.integers(0, 40)))
    sequences = tokens[0] if packed is None else len(packed)
    kind, value_kind = draw(st.sampled_from(dtypes), label="rewards"), draw(st.sampled_from(dtypes), label="values")
    if {kind, value_kind} == {torch.float16, torch.bfloat16}:
        kind = value_kind  # a float32 results: served by one door only, and tested by itself
    outcome = draw(st.booleans(), label="outcome")
    rewards = torch.randn(*((sequences,) if outcome else tokens), n, generator=g).to(kind)
    values = torch.randn(*tokens, n, generator=g).to(value_kind)
    arguments: dict[str, Any] = {}
    discounts = st.sampled_from([0.0, 0.5, 0.95, 1.0])
    for name in ("gamma", "lam"):
        each = [draw(discounts, label=name) for _ in range(n)]
        arguments[name] = draw(st.sampled_from([each[0], each, tuple(each), torch.tensor(each, dtype=torch.float64)]))
    if draw(st.booleans(), label="kl_penalty"):
        arguments["kl_penalty"] = torch.randn(*tokens, generator=g).to(draw(st.sampled_from(dtypes)))
    if draw(st.booleans(), label="mask"):
        mask = masks(tokens, g, draw(st.sampled_from(MASKS), label="mask dtype"))
        arguments["mask"] = surrounded(mask) if draw(st.booleans()) else mask
        hidden = (mask == 0).unsqueeze(-1)
        values = torch.where(hidden, torch.nan, values).to(value_kind)
        rewards = rewards if outcome else torch.where(hidden, torch.inf, rewards).to(kind)
        if "kl_penalty" in arguments:
            arguments["kl_penalty"][mask == 0] = torch.nan
    if packed is not None:
        kind = draw(st.sampled_from([torch.int32, torch.int64]), label="offsets dtype")
        arguments["offsets"] = torch.tensor([0, *itertools.accumulate(packed)], dtype=kind)
    dim = draw(st.integers(0, len(tokens)), label="dim")
    form = draw(st.sampled_from(forms), label="form")
    other = form if form != "dict" or draw(st.booleans()) else "list"
    arguments["dim"] = dim - (len(tokens) + 1 if draw(st.booleans()) else 0)
    arguments["rewards"] = lay_out(rewards, other, dim, len(tokens))
    arguments["values"] = lay_out(values, form, dim, len(tokens))
    if draw(st.booleans(), label="bootstrap"):
        arguments["bootstrap"] = lay_out(torch.randn(sequences, n, generator=g), other, dim, len(tokens))
    return arguments
