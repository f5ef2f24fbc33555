"""``policy_loss`` and ``value_loss``, forward and backward, beside eager, ``torch.compile``, Liger-Kernel and verl.

``[B, T]`` log-probabilities, advantages, a bool mask, mean over tokens, float32; values of three heads. Each candidate
computes the loss, the metrics that ``policy_loss`` has (but where its name says "alone") and the gradient, in memory
of its own. Liger's and ``ROWS`` have an advantage for each row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import pama_ext
from bench import verify
from bench.baselines import eager, eager_loss, peers
from bench.workload import COMPILED, COPY, Candidate, Case, Gate, Workload, bytes_of

SHAPES = ((8, 128), (64, 1024), (512, 4096))
HEADS = 3
OURS, ROWS, OBJECTIVES, FORWARD = "policy_loss", "advantage [B]", "3 objectives", "forward, no grad"
EAGER, ALONE, LIGER, VERL = "eager PyTorch", "eager, loss alone", "Liger", "verl"
VALUE = "value_loss"
ROUNDINGS = 1024  # of float32: a sum of millions of terms
STRAYS = 1e-6  # share of tokens next to a clip, whose derivative may be that of the other side


def problem(shape: tuple[int, int], device: str) -> SimpleNamespace:
    """The tensors of a benchmark, the same in every run."""
    g = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g).to(device)

    log_probs, values = normal(*shape) - 2, normal(*shape, HEADS)
    return SimpleNamespace(
        leaf=log_probs.clone().requires_grad_(), old=log_probs + 0.2 * normal(*shape), advantages=normal(*shape),
        rows=normal(shape[0]), objectives=normal(*shape, HEADS),
        mask=(torch.rand(shape, generator=g) < 0.9).to(device), values=values.clone().requires_grad_(),
        old_values=values + 0.2 * normal(*shape, HEADS), returns=values + normal(*shape, HEADS),
    )  # fmt: skip


def candidate(
    loss: Callable[..., Any], leaf: Tensor, *rest: Any, exact: tuple[Tensor, Tensor], **kind: bool
) -> Candidate:
    """Forward and backward of a loss, the first of what ``loss`` returns, to a fresh gradient of ``leaf``."""

    def step() -> Tensor:
        leaf.grad = None
        result = loss(leaf, *rest)
        value: Tensor = result[0] if isinstance(result, tuple) else result
        value.backward()
        return value

    def check(value: Tensor) -> None:
        verify.close("loss", value, exact[0], roundings=ROUNDINGS, at_least=0.1)
        if leaf.grad is None:
            raise AssertionError("no gradient")
        wrong = ((leaf.grad.double() - exact[1]).abs() > 1e-4 * exact[1].abs().max()).sum()
        if wrong > max(1, STRAYS * leaf.numel()):
            raise AssertionError(f"{wrong} of {leaf.numel()} derivatives differ")

    return Candidate(step, check, **kind)


def exactly(loss: Callable[..., Any], leaf: Tensor, *rest: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the specification, in float64."""
    x = leaf.detach().double().requires_grad_()
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}
    value = loss(x, *(t.double() for t in rest), **wide)[0]
    value.backward()
    assert x.grad is not None
    return value.detach(), x.grad


def build_policy(device: str, *, shape: tuple[int, int]) -> Case:
    """All candidates for ``policy_loss`` of one shape."""
    t = problem(shape, device)
    plain, by_row, floats = (t.leaf, t.old, t.advantages), (t.leaf, t.old, t.rows), t.mask.float()
    spec = pama_ext.reference.policy_loss
    exact, exact_rows = exactly(spec, *plain, mask=t.mask), exactly(spec, *by_row, mask=t.mask)
    exact_sum = exactly(spec, t.leaf, t.old, mask=t.mask, objective_advantages=t.objectives)
    mask, objectives = t.mask, t.objectives

    def ours(log_probs: Tensor, old: Tensor, advantages: Tensor) -> Any:
        return pama_ext.policy_loss(log_probs, old, advantages, mask=mask)

    def each(log_probs: Tensor, old: Tensor) -> Any:
        return pama_ext.policy_loss(log_probs, old, objective_advantages=objectives, mask=mask)

    def forward(loss: tuple[Tensor, Any]) -> None:
        verify.close("loss", loss[0], exact[0], roundings=ROUNDINGS, at_least=0.1)

    compiled = eager.compiled(eager_loss.policy)
    found = {
        OURS: candidate(ours, *plain, exact=exact),
        ROWS: candidate(ours, *by_row, exact=exact_rows),
        OBJECTIVES: candidate(each, t.leaf, t.old, exact=exact_sum),
        FORWARD: Candidate(torch.no_grad()(functools.partial(ours, *plain)), forward),
        EAGER: candidate(eager_loss.policy, *plain, mask, exact=exact),
        ALONE: candidate(eager_loss.policy_alone, *plain, mask, exact=exact),
        COMPILED: candidate(compiled, *plain, mask, exact=exact, compiles=True),
    }
    if peers.installed("liger_kernel"):
        found[LIGER] = candidate(peers.liger_loss(), *by_row, floats, exact=exact_rows, compiles=True)
    if peers.installed("verl"):
        found[VERL] = candidate(peers.verl_loss, *plain, floats, exact=exact, graph=False)
    gradient = {"gradient written": t.leaf, "gradient read by backward": t.leaf, "gradient scaled": t.leaf}
    return Case(found, bytes_of(log_probs=t.leaf, old_log_probs=t.old, advantages=t.advantages, mask=mask, **gradient))


def build_value(device: str, *, shape: tuple[int, int]) -> Case:
    """All candidates for ``value_loss`` of one shape."""
    t = problem(shape, device)
    heads, mask = (t.values, t.old_values, t.returns), t.mask
    exact = exactly(pama_ext.reference.value_loss, *heads, mask=mask, clip=0.2)
    compiled = eager.compiled(eager_loss.value)
    found = {
        VALUE: candidate(functools.partial(pama_ext.value_loss, mask=mask, clip=0.2), *heads, exact=exact),
        EAGER: candidate(eager_loss.value, *heads, mask, exact=exact),
        COMPILED: candidate(compiled, *heads, mask, exact=exact, compiles=True),
    }
    gradient = {"gradient written": t.values, "gradient read by backward": t.values, "gradient scaled": t.values}
    return Case(found, bytes_of(values=t.values, old_values=t.old_values, returns=t.returns, mask=mask, **gradient))


PEER = Gate(LIGER, ROWS, 1.0)  # though Liger's has one metric
MIDDLE = (Gate(EAGER, OURS, 10.0, smoke=3.0), PEER)
LARGEST = (
    PEER,
    Gate(EAGER, OURS, 5.0, view="device", device="cuda"),
    Gate(COPY, OURS, 0.85, view="cold", device="cuda"),
)
SUITE = tuple(
    workload
    for shape, gates, quick in zip(SHAPES, ((), MIDDLE, LARGEST), (True, True, False), strict=True)
    for workload in (
        Workload(f"{OURS}, {list(shape)}", functools.partial(build_policy, shape=shape), gates, quick),
        Workload(f"{VALUE}, {list(shape)}, {HEADS} heads", functools.partial(build_value, shape=shape), quick=quick),
    )
)
