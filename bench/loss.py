"""``policy_loss`` and ``value_loss``, forward and backward, beside eager, ``torch.compile``, Liger-Kernel and verl.

``python -m bench.loss``. ``[B, T]`` log-probabilities, advantages, a bool mask, mean over tokens, float32; values of
three heads. Each candidate computes the loss, the metrics that ``policy_loss`` has (but where its name says "alone")
and the gradient, in memory of its own. Liger's is the loss of its GRPO from log-probabilities on, compiled as Liger
compiles it, with an advantage for each row and one metric. ``copy`` moves as many bytes as must be moved, between
memory that is there: log-probabilities of both policies, advantages and mask are read, the gradient is written, and
backward reads and writes it once more.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import pama_ext
from bench import timer
from bench.gae import installed
from bench.groups import judge, released, report
from bench.timer import Call

SHAPES = ((8, 128), (64, 1024), (512, 4096))
HEADS = 3
OURS, ROWS, OBJECTIVES, FORWARD = "policy_loss", "advantage [B]", "3 objectives", "forward, no grad"
EAGER, ALONE, COMPILED, LIGER, VERL, COPY = "eager", "eager, loss alone", "compile", "Liger 0.8.5", "verl 0.9.1", "copy"
VALUE, EAGER_VALUE = "value_loss", "eager"
BYTES = 4 * 4 + 1 + 2 * 4  # for each token, of float32 and a bool mask
GATED = (64, 1024)  # the shape of the CPU's gate
SHARE = 0.85  # of a copy's bandwidth, on CUDA at the largest shape


def surrogate(log_probs: Tensor, old: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each token, its ratio, and the logarithm of that."""
    log_ratio = (log_probs - old).clamp(-20, 20)
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages), ratio, log_ratio


def eager_alone(log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """The loss, as a user would write it."""
    losses, _, _ = surrogate(log_probs, old, advantages)
    return (losses * mask).sum() / mask.sum()


def eager(log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss and metrics, what they share computed once."""
    losses, ratio, log_ratio = surrogate(log_probs, old, advantages)
    count = mask.sum()
    with torch.no_grad():
        ratio, log_ratio = ratio * mask, log_ratio * mask
        high, low = (advantages > 0) & (ratio > 1.2), (advantages < 0) & (ratio < 0.8) & mask
        low_fraction = low.sum() / count
        metrics = (high.sum() / count + low_fraction, low_fraction, -log_ratio.sum() / count, ratio.sum() / count,
                   ratio.max())  # fmt: skip
    return (losses * mask).sum() / count, metrics


def eager_value(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The value loss that verl has, of all heads, and its metrics for each."""
    error = (values - returns).square()
    other = (torch.clamp(values, old - 0.2, old + 0.2) - returns).square()
    valid, count = mask.unsqueeze(-1), mask.sum()
    losses = 0.5 * (torch.maximum(error, other) * valid).sum((0, 1)) / count
    with torch.no_grad():
        metrics = losses.detach(), ((other > error) & valid).sum((0, 1)) / count, (values * valid).sum((0, 1)) / count
    return losses.sum(), metrics


def liger(compiled: bool) -> Callable[..., Any]:
    """Liger-Kernel's GRPO loss from log-probabilities on."""
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

    def loss(log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Any:
        return LigerFusedLinearGRPOFunction.ppo_loss_fn(
            log_probs, mask, advantages, mask, old_per_token_logps=old, beta=0.0, loss_type="bnpo"
        )

    return torch.compile(loss) if compiled else loss


def verl() -> Callable[..., Any]:
    """The loss of verl itself; what it logs it moves to the host."""
    from verl.trainer.ppo import core_algos

    config = released.verl_actor_config(clip_ratio_c=10.0)
    return lambda log_probs, old, advantages, mask: core_algos.compute_policy_loss_vanilla(
        old, log_probs, advantages, mask, config=config
    )


def differentiated(loss: Callable[..., Any], leaf: Tensor, *arguments: Any, **keywords: Any) -> Call:
    """Forward and backward of a loss, the first of what ``loss`` returns, to a fresh gradient of ``leaf``."""

    def step() -> Tensor:
        leaf.grad = None
        result = loss(leaf, *arguments, **keywords)
        value: Tensor = result[0] if isinstance(result, tuple) else result
        value.backward()
        return value

    return step


def problem(shape: tuple[int, int], device: str) -> SimpleNamespace:
    """The tensors of a benchmark."""
    g = torch.Generator().manual_seed(0)
    normal = lambda *size: torch.randn(*size, generator=g).to(device)  # noqa: E731
    log_probs = normal(*shape) - 2
    values = normal(*shape, HEADS)
    return SimpleNamespace(
        leaf=log_probs.clone().requires_grad_(), old=log_probs + 0.2 * normal(*shape), advantages=normal(*shape),
        rows=normal(shape[0]), objectives=normal(*shape, HEADS),
        mask=(torch.rand(shape, generator=g) < 0.9).to(device), values=values.clone().requires_grad_(),
        old_values=values + 0.2 * normal(*shape, HEADS), returns=values + normal(*shape, HEADS),
    )  # fmt: skip


def candidates(shape: tuple[int, int], device: str) -> tuple[dict[str, Call], dict[str, Call]]:
    """The calls of both tables; their losses and gradients have been compared with the specification in float64."""
    t = problem(shape, device)
    plain, by_row = (t.leaf, t.old, t.advantages, t.mask), (t.leaf, t.old, t.rows, t.mask)
    floats = t.mask.float()
    torch.compiler.reset()

    def ours(log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Any:
        return pama_ext.policy_loss(log_probs, old, advantages, mask=mask)

    policy = {
        OURS: differentiated(ours, *plain),
        ROWS: differentiated(ours, *by_row),
        EAGER: differentiated(eager, *plain),
        ALONE: differentiated(eager_alone, *plain),
        COMPILED: differentiated(torch.compile(eager, fullgraph=True, dynamic=False), *plain),
    }
    if installed("liger_kernel"):
        policy[LIGER] = differentiated(liger(compiled=True), *by_row[:3], floats)
    if installed("verl"):
        policy[VERL] = differentiated(verl(), *plain[:3], floats)
    for name, call in policy.items():
        check(name, call, t.leaf, t.old, t.rows if name in (ROWS, LIGER) else t.advantages, t.mask)

    policy[OBJECTIVES] = differentiated(
        lambda x: pama_ext.policy_loss(x, t.old, objective_advantages=t.objectives, mask=t.mask), t.leaf
    )
    policy[FORWARD] = torch.no_grad()(functools.partial(ours, *plain))
    source = torch.empty(t.leaf.numel() * BYTES // 8, device=device)
    target = torch.empty_like(source)
    policy[COPY] = lambda: target.copy_(source)

    heads = (t.values, t.old_values, t.returns)
    value = {
        VALUE: differentiated(pama_ext.value_loss, *heads, mask=t.mask, clip=0.2),
        EAGER_VALUE: differentiated(eager_value, *heads, t.mask),
        COMPILED: differentiated(torch.compile(eager_value, fullgraph=True, dynamic=False), *heads, t.mask),
    }
    wide = [x.detach().double() for x in heads]
    exact = pama_ext.reference.value_loss(wide[0].requires_grad_(), *wide[1:], mask=t.mask, clip=0.2)[0]
    exact.backward()
    for name, call in value.items():
        agree(name, call(), t.values.grad, exact, wide[0].grad)
    return policy, value


def check(name: str, call: Call, leaf: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> None:
    """Compare a candidate's loss and gradient with the specification."""
    x = leaf.detach().double().requires_grad_()
    exact, _ = pama_ext.reference.policy_loss(x, old.double(), advantages.double(), mask=mask)
    exact.backward()
    agree(name, call(), leaf.grad, exact, x.grad)


def agree(name: str, loss: Any, gradient: Tensor | None, exact: Tensor, exact_gradient: Tensor | None) -> None:
    """Fail unless loss and gradient are the exact ones, but for a token in a million next to a clip."""
    torch.testing.assert_close(loss.detach().double(), exact.detach(), rtol=1e-4, atol=1e-5, msg=name)
    if gradient is None or exact_gradient is None:
        raise AssertionError(f"{name}: no gradient")
    largest = exact_gradient.abs().max()
    wrong = ((gradient.double() - exact_gradient).abs() > 1e-4 * largest).sum()
    if wrong > max(1, 1e-6 * gradient.numel()):
        raise AssertionError(f"{name}: {wrong} of {gradient.numel()} derivatives differ")


def main(arguments: list[str] | None = None) -> None:
    """Verify, time, print the tables and the gates, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the record there")
    parser.add_argument("--seconds", type=float, default=12.0, help="timing budget of a table")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)
    cuda = options.device == "cuda"
    record: dict[str, Any] = {"header": timer.environment(options.device), "tables": [], "gates": []}
    for shape in SHAPES:
        for name, calls in zip((OURS, VALUE), candidates(shape, options.device), strict=True):
            times = timer.interleave(
                calls, budget_s=options.seconds, rounds=(5, 200), clock=timer.device_clock if cuda else timer.host_clock
            )
            rows = report(f"{name}, {list(shape)}", times, name)
            record["tables"].append({"shape": list(shape), "of": name, "rows": rows})
            if name == OURS and shape == (SHAPES[-1] if cuda else GATED):
                record["gates"].append(f"{list(shape)}  {judge(times, EAGER, OURS, 5.0 if cuda else 3.0)}")
            if name == OURS and shape == SHAPES[-1]:
                share = timer.ratio(times, COPY, OURS)
                verdict = ("PASS" if share >= SHARE else "MISS") if cuda else "----"
                record["gates"].append(f"{list(shape)}  {verdict}  share of a copy >= {SHARE} on CUDA: {share:.2f}")
    print("", *record["gates"], sep="\n")
    if options.json:
        timer.write_json(options.json, record)


if __name__ == "__main__":
    main()
