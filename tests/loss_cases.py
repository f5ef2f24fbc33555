"""Calls of the losses for the suite, the ways into their kernels, and the judgement of what comes out of them."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from cases import DTYPES, MASKS, masks, surrounded
from compare import assert_close
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map

from pama_ext import _C, _loss, policy_loss, reference, value_loss
from pama_ext.reference._loss import aggregated

AGGREGATES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"]

# [B, T]. The CPU kernels work on tiles of up to 1024 tokens and vectors of 4, 8 or 16; work of 65536 elements, four for
# each token, is cut into parts. On a GPU a warp takes rows of up to 256 tokens, a block the others.
SHAPES: dict[str, tuple[int, int]] = {
    "no rows": (0, 5),
    "no tokens": (3, 0),
    "one token": (1, 1),
    "one token each": (33, 1),
    "below a vector": (2, 15),
    "a vector": (1, 16),
    "above a vector": (3, 17),
    "a warp's row": (9, 256),
    "a block's row": (2, 257),
    "tile - 1": (1, 1023),
    "a tile": (2, 1024),
    "tile + 1": (1, 1025),
    "three tiles": (3, 2500),
    "two parts": (64, 512),
    "parts, uneven": (7, 4683),
}

# Keywords of policy_loss beside the defaults; "ref" stands for ref_log_probs.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "asymmetric": {"clip_low": 0.1, "clip_high": 0.28},
    "never clipped": {"clip_low": 5.0, "clip_high": 1e12},
    "dual": {"dual_clip": 3.0},
    "truncated": {"max_weight": 2.0},
    "kl": {"kl_coef": 0.3, "ref": True},
    "kl measured": {"ref": True},
    "all": {"dual_clip": 2.5, "clip_high": 0.3, "kl_coef": 0.05, "ref": True},
    "truncated, kl": {"max_weight": 1.5, "kl_coef": 0.1, "ref": True},
}


def grid(shape: tuple[int, ...], g: torch.Generator, reach: float) -> Tensor:
    """Eighths up to ``reach`` on both sides: exact in every dtype, and none next to the logarithm of a clip."""
    steps = round(8 * reach)
    return torch.randint(-steps, steps + 1, shape, generator=g) / 8


def make(
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    *,
    ref: bool = False,
    objectives: int = 0,
    by_row: bool = False,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Arguments of ``policy_loss`` with a mask; what options name replaces them, None takes them out."""
    g = torch.Generator().manual_seed(seed)
    log_probs = grid(shape, g, 1.5) - 2
    of = shape[:1] if by_row else shape
    arguments: dict[str, Any] = {
        "log_probs": log_probs.to(dtype),
        "old_log_probs": (log_probs + grid(shape, g, 1.5)).to(dtype),
        "mask": torch.rand(shape, generator=g) < 0.8,
    }
    if objectives:
        arguments["objective_advantages"] = grid((*of, objectives), g, 2).to(dtype)
    else:
        arguments["advantages"] = grid(of, g, 2).to(dtype)
    if ref:
        arguments["ref_log_probs"] = (log_probs + grid(shape, g, 1.5)).to(dtype)
    return {key: value for key, value in {**arguments, **options}.items() if value is not None}


def make_values(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, *, seed: int = 0, **options: Any
) -> dict[str, Any]:
    """Arguments of ``value_loss`` with a mask and a clip; ``shape`` is that of values."""
    g = torch.Generator().manual_seed(seed)
    values = grid(shape, g, 2)
    arguments = {
        "values": values.to(dtype),
        "old_values": (values + grid(shape, g, 0.5)).to(dtype),
        "returns": (values + grid(shape, g, 1)).to(dtype),
        "mask": torch.rand(shape[:2], generator=g) < 0.8,
        "clip": 0.2,
    }
    return {key: value for key, value in {**arguments, **options}.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Loss:
    """One of the two functions: its door 2, its door 1, its specification, and the argument it is differentiable in."""

    name: str
    public: Callable[..., Any]
    dispatcher: Callable[..., Any]
    specification: Callable[..., Any]
    leaf: str

    def eager(self, *arguments: Any, **keywords: Any) -> tuple[Tensor, Any]:
        """Door 2; fails if the compiled module declines."""
        bound = inspect.signature(self.public).bind(*arguments, **keywords)
        bound.apply_defaults()
        if getattr(_C, self.name)(*bound.arguments.values()) is None:
            raise AssertionError("the eager door declined")
        return self.public(*arguments, **keywords)

    def doors(self) -> dict[str, Callable[..., Any]]:
        return {"dispatcher": self.dispatcher} | ({"eager": self.eager} if _C.has_door() else {})

    def run(self, function: Callable[..., Any], arguments: dict[str, Any], incoming: float = 1.0):
        """``(loss, metrics, gradients)`` of a fresh leaf; ``incoming`` is the gradient of the loss."""
        leaf = tree_map(lambda x: x.detach().requires_grad_(), arguments[self.leaf])
        loss, metrics = function(**{**arguments, self.leaf: leaf})
        leaves = listed(leaf)
        loss.backward(torch.full_like(loss, incoming))
        return loss.detach(), metrics, [x.grad for x in leaves]


POLICY = Loss("policy_loss", policy_loss, _loss._policy_loss_dispatcher, reference.policy_loss, "log_probs")
VALUE = Loss("value_loss", value_loss, _loss._value_loss_dispatcher, reference.value_loss, "values")


def listed(objectives: Any) -> list[Tensor]:
    if isinstance(objectives, Tensor):
        return [objectives]
    return list(objectives.values() if isinstance(objectives, dict) else objectives)


def wide(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same in float64; the mask and the normalizer stay as they are."""
    kept = {k: arguments[k] for k in ("mask", "normalizer") if k in arguments}
    widened = tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, arguments)
    return {**widened, **kept}


def _largest(x: Any) -> float:
    """Largest magnitude of what is finite, at least 1."""
    return max([1.0, *(t.double().nan_to_num(0, 0, 0).abs().max().item() for t in listed(x) if t.numel())])


def size_of_token(loss: Loss, arguments: dict[str, Any]) -> float:
    """A bound on the loss of a token, of which rounding is a share."""
    if loss is VALUE:
        return (_largest(arguments["values"]) + _largest(arguments["returns"])) ** 2
    apart = (arguments["log_probs"].double() - arguments["old_log_probs"].double()).nan_to_num(0, 20, -20)
    mask = arguments.get("mask")
    apart = apart if mask is None else torch.where(mask != 0, apart, 0.0)
    advantages = arguments.get("advantages", arguments.get("objective_advantages"))
    size = math.exp(min(20.0, apart.abs().max().item() if apart.numel() else 0.0)) * _largest(advantages)
    size *= (
        len(listed(advantages))
        if not isinstance(advantages, Tensor)
        else advantages.shape[-1]
        if "weights" in arguments
        else 1
    )
    if "max_weight" in arguments:
        size *= _largest(arguments["log_probs"])
    if "ref_log_probs" in arguments:
        far = (arguments["ref_log_probs"].double() - arguments["log_probs"].double()).nan_to_num(0, 0, 0)
        size += math.exp(min(20.0, far.abs().max().item() if far.numel() else 0.0))
    return size


def assert_computes(loss: Loss, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Loss, gradient and metrics against the float64 specification, the same-dtype one beside it."""
    incoming = 0.75
    got, metrics, gradients = loss.run(function, arguments, incoming)
    truth, true_metrics, true_gradients = loss.run(loss.specification, wide(arguments), incoming)
    same, same_metrics, same_gradients = loss.run(loss.specification, arguments, incoming)
    assert got.dtype == same.dtype
    assert not got.requires_grad

    shape = listed(arguments[loss.leaf])[0].shape[:2]
    mask = arguments.get("mask")
    valid = torch.ones(shape, dtype=torch.bool) if mask is None else mask != 0
    ones, _ = aggregated(torch.ones(shape, dtype=torch.float64), valid, arguments.get("aggregate", "token-mean"),
                         arguments.get("normalizer"))  # fmt: skip
    size = torch.tensor(size_of_token(loss, arguments))
    assert_close(got, truth, same, magnitude=(size * ones).abs(), what="loss")
    for k, (a, b, c) in enumerate(zip(gradients, true_gradients, same_gradients, strict=True)):
        assert a.dtype == listed(arguments[loss.leaf])[k].dtype
        two_terms = loss is VALUE or "kl_coef" in arguments or "objective_advantages" in arguments
        largest = b.abs().nan_to_num(0, 0, 0).max() if b.numel() else torch.zeros(())
        # What is kept is rounded to the leaf's dtype before it is scaled, so there are two such roundings.
        kept = torch.finfo(a.dtype).eps / 2 * b.abs() if a.dtype in (torch.float16, torch.bfloat16) else 0.0
        assert_gradient(a, b, c, largest if two_terms else b.abs(), kept, f"gradient {k}")
    assert metrics._fields == true_metrics._fields
    for name, a, b, c in zip(metrics._fields, metrics, true_metrics, same_metrics, strict=True):
        if b is None:
            assert a is None, name
            continue
        assert a.dtype == got.dtype
        assert not a.requires_grad
        # Means are rounded as the largest of their terms is.
        largest = {"losses": size * ones, "value_mean": size, "ref_kl": size, "approx_kl": torch.tensor(20.0),
                   "ratio_mean": getattr(true_metrics, "ratio_max", None)}  # fmt: skip
        assert_close(a, b, c, magnitude=largest.get(name), what=name)


def assert_gradient(actual, expected, baseline, magnitude, kept, what) -> None:
    """As :func:`assert_close`, with room for one rounding more where ``kept`` says so."""
    if isinstance(kept, float):
        return assert_close(actual, expected, baseline, magnitude=magnitude, what=what)
    smallest = torch.finfo(actual.dtype).smallest_normal
    excess = (actual.double() - expected).abs() - 2 * kept - 8 * torch.finfo(torch.float32).eps * magnitude
    assert (excess <= torch.finfo(actual.dtype).eps * smallest).all(), f"{what}: off by {excess.max():.3g}"
    return None


@st.composite
def policy_calls(draw, dtypes=DTYPES) -> dict[str, Any]:
    """A whole call. What shrinks well is drawn, what fills the tensors comes from a drawn seed."""
    seed = draw(st.integers(0, 2**20), label="seed")
    shape = (draw(st.integers(0, 6), label="B"), draw(st.integers(0, 40), label="T"))
    g = torch.Generator().manual_seed(seed)
    arguments = make(
        shape,
        draw(st.sampled_from(dtypes), label="dtype"),
        ref=draw(st.booleans(), label="ref"),
        objectives=draw(st.sampled_from([0, 0, 1, 2, 3, 5, 17]), label="N"),
        by_row=draw(st.booleans(), label="by row"),
        seed=seed,
        mask=None,
        aggregate=draw(st.sampled_from(AGGREGATES)),
        clip_low=draw(st.sampled_from([0.2, 0.0, 0.1, 1.0, 3.0])),
        clip_high=draw(st.sampled_from([0.2, 0.0, 0.28, 5.0, 1e12])),
        normalizer=draw(st.sampled_from([None, None, 7.0, 0.0, torch.tensor(12), torch.tensor([0.5])])),
    )
    bound = draw(st.sampled_from(["", "dual_clip", "max_weight"]), label="bound")
    if bound:
        arguments[bound] = draw(st.sampled_from([1.5, 2.0, 3.0]))
    if "ref_log_probs" in arguments:
        arguments["kl_coef"] = draw(st.sampled_from([0.0, 0.1, 1.0]))
    if "objective_advantages" in arguments:
        objectives = arguments["objective_advantages"]
        n = objectives.shape[-1]
        numbers = [draw(st.sampled_from([1.0, 0.5, 0.0, 2.0, -1.0])) for _ in range(n)]
        arguments["weights"] = draw(st.sampled_from([None, numbers, torch.tensor(numbers)]))
        form = draw(st.sampled_from(["tensor", "list", "dict"]), label="form")
        columns = {f"r{i}": column for i, column in enumerate(objectives.unbind(-1))}
        arguments["objective_advantages"] = {"tensor": objectives, "list": list(columns.values()), "dict": columns}[
            form
        ]
        if arguments["weights"] is None:
            del arguments["weights"]
    if draw(st.booleans(), label="other dtypes"):  # each tensor has its own
        for name in ("old_log_probs", "advantages", "ref_log_probs"):
            if name in arguments:
                arguments[name] = arguments[name].to(draw(st.sampled_from(dtypes), label=name))
    if draw(st.booleans(), label="mask"):
        mask = masks(shape, g, draw(st.sampled_from(MASKS), label="mask dtype"))
        arguments["mask"] = surrounded(mask) if draw(st.booleans()) else mask
        for name in ("log_probs", "old_log_probs", "advantages", "ref_log_probs"):
            if name in arguments and arguments[name].shape == shape:
                garbage = draw(st.sampled_from([math.nan, math.inf, -math.inf]), label=f"garbage in {name}")
                kind = arguments[name].dtype
                arguments[name] = torch.where(mask != 0, arguments[name], torch.tensor(garbage)).to(kind)
    for name in ("log_probs", "old_log_probs", "advantages", "ref_log_probs"):
        if name in arguments and draw(st.booleans(), label=f"{name} strided"):
            arguments[name] = surrounded(arguments[name])
    return arguments


@st.composite
def value_calls(draw, dtypes=DTYPES) -> dict[str, Any]:
    seed = draw(st.integers(0, 2**20), label="seed")
    shape = [draw(st.integers(0, 6), label="B"), draw(st.integers(0, 40), label="T")]
    n = draw(st.sampled_from([0, 1, 2, 3, 4, 5, 17]), label="N")
    g = torch.Generator().manual_seed(seed)
    arguments = make_values(
        (*shape, n) if n else tuple(shape),
        draw(st.sampled_from(dtypes), label="dtype"),
        seed=seed,
        mask=None,
        clip=draw(st.sampled_from([None, 0.0, 0.2, 10.0])),
        aggregate=draw(st.sampled_from(AGGREGATES)),
        normalizer=draw(st.sampled_from([None, None, 7.0, 0.0, torch.tensor(12)])),
    )
    names = ("values", "old_values", "returns")
    if draw(st.booleans(), label="mask"):
        mask = masks(tuple(shape), g, draw(st.sampled_from(MASKS), label="mask dtype"))
        arguments["mask"] = mask
        hidden = (mask == 0).unsqueeze(-1) if n else mask == 0
        for name in names:
            arguments[name] = arguments[name].masked_fill(hidden, math.nan)
    for name in names:
        if draw(st.booleans(), label=f"{name} strided"):
            arguments[name] = surrounded(arguments[name])
    form = draw(st.sampled_from(["tensor", "list", "dict"]), label="form") if n else "tensor"
    for name in names:
        columns = {f"r{i}": column for i, column in enumerate(arguments[name].unbind(-1))}
        if form == "list" or (form == "dict" and name == "returns" and draw(st.booleans())):
            arguments[name] = list(columns.values())
        elif form == "dict":
            arguments[name] = columns
    return arguments
