"""``gae`` beside the loops of trainers, numba, TorchRL and a scan in eager PyTorch: ``python -m bench.gae``.

Token rewards and values ``[B, T, N]``, gamma 0.99, lam 0.95, no mask, float32. A trainer's loop runs once for each
objective. Every candidate allocates its results. ``copy`` moves as many bytes, between memory that is there already:
rewards and values, copied; what it takes is the least that any of them could.

The second table is a step of a trainer: the advantages of N value heads, put on one scale over the batch, and PAMA.
``two calls`` are ``gae`` and ``combine``, whose parts stand beside it. One operator that did all at once would have to
keep the advantages just the same, since the weights follow from all of them; what it could save is their way to memory
and back. ``combine, in cache`` is as much work on advantages that never leave the caches, so a fused operator saves at
most the difference.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pama_ext
from bench import baselines, timer
from bench.groups import judge, released, report
from bench.timer import Call

SHAPES = ((64, 1024, 3), (512, 4096, 4))
GAMMA, LAM = 0.99, 0.95
OURS, RAGGED, COPY = "gae", "gae, ragged rows", "copy"
TWO, SECOND, CACHED, PIPELINE = "two calls", "combine alone", "combine, in cache", "eager pipeline"
CACHE_ELEMENTS = 256 * 1024  # a megabyte
VERL, TRL, NUMBA, RL, EAGER = "verl 0.9.1, loop", "TRL 1.5.0, loop", "numba", "TorchRL 0.10, vectorised", "eager scan"
GATES = (VERL, OURS, 100.0), (TRL, OURS, 100.0), (NUMBA, OURS, 2.0)
CUDA_GATES = (VERL, OURS, 500.0), (TRL, OURS, 500.0)
SHARE = 0.6  # of a copy's bandwidth, at the largest shape


def trl(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """TRL 1.5.0, trl/experimental/ppo/ppo_trainer.py: its rule restated, since 1.16.0 has no PPO trainer."""
    running, reversed_advantages, length = 0, [], rewards.shape[1]
    for t in reversed(range(length)):
        following = values[:, t + 1] if t < length - 1 else 0.0
        running = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAM * running
        reversed_advantages.append(running)
    advantages = torch.stack(reversed_advantages[::-1], axis=1)
    return advantages, advantages + values


def torchrl(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """TorchRL's vectorised estimator; objectives last, as it wants them."""
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    following = torch.nn.functional.pad(values[:, 1:], (0, 0, 0, 1))
    done = torch.zeros_like(values, dtype=torch.bool)
    return vec_generalized_advantage_estimate(GAMMA, LAM, values, following, rewards, done)


def eager_scan(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """log2(T) doublings: after step s every token has the sum over the 2^s tokens from it on."""
    advantages = rewards - values
    advantages[:, :-1] += GAMMA * values[:, 1:]
    reach, decay = 1, GAMMA * LAM
    while reach < rewards.shape[1]:
        advantages[:, :-reach] += decay * advantages[:, reach:]  # the right side is computed first
        reach, decay = 2 * reach, decay * decay
    return advantages, advantages + values


def installed(package: str) -> bool:
    """Whether there is such a package; a machine that is there for its GPU may lack some."""
    return importlib.util.find_spec(package) is not None


def eager_pipeline(rewards: Tensor, values: Tensor) -> Any:
    """Scan, whitening and combination in eager PyTorch."""
    advantages, _ = eager_scan(rewards, values)
    std, mean = torch.std_mean(advantages, (0, 1))
    return baselines.eager((advantages - mean) / (std + 1e-4))


def candidates(shape: tuple[int, int, int], device: str) -> tuple[dict[str, Call], dict[str, Call]]:
    """The calls of both tables; each that computes ``gae`` has been compared with the recursion in float64."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    columns = [[c.clone() for c in x.unbind(-1)] for x in (rewards, values)]
    mask = torch.ones(shape[:2], device=device)
    ragged = torch.arange(shape[1]) < torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
    ragged = ragged.to(device)
    kept = torch.empty_like(rewards), torch.empty_like(values)

    def each(estimator: Any) -> list[Any]:
        return [estimator(r, v) for r, v in zip(*columns, strict=True)]

    calls: dict[str, Call] = {
        OURS: lambda: pama_ext.gae(rewards, values, gamma=GAMMA, lam=LAM),
        EAGER: functools.partial(eager_scan, rewards, values),
        TRL: lambda: each(trl),
        RAGGED: lambda: pama_ext.gae(rewards, values, mask=ragged, gamma=GAMMA, lam=LAM),
        COPY: lambda: [to.copy_(x) for to, x in zip(kept, (rewards, values), strict=True)],
    }
    if installed("torchrl"):
        calls[RL] = functools.partial(torchrl, rewards, values)
    if installed("verl"):
        calls[VERL] = lambda: each(lambda r, v: released.verl_gae(r, v, mask, GAMMA, LAM))
    if installed("numba") and device == "cpu":
        from bench.numba_loop import numba_gae

        calls[NUMBA] = functools.partial(numba_gae, rewards, values, GAMMA, LAM)
    exact = pama_ext.reference.gae(rewards.double(), values.double(), gamma=GAMMA, lam=LAM)
    for name in calls.keys() - {RAGGED, COPY}:
        result = calls[name]()
        if name in (TRL, VERL):
            result = [torch.stack(x, -1) for x in zip(*result, strict=True)]
        for found, truth in zip(result, exact, strict=True):
            torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-3, msg=name)

    whiten = pama_ext.Normalize(by="batch")
    advantages = calls[OURS]()[0]
    parts = max(1, advantages.numel() // CACHE_ELEMENTS)
    part = advantages[: shape[0] // parts]
    pipeline: dict[str, Call] = {
        TWO: lambda: pama_ext.combine(calls[OURS]()[0], normalize=whiten),
        PIPELINE: functools.partial(eager_pipeline, rewards, values),
        OURS: calls[OURS],
        SECOND: lambda: pama_ext.combine(advantages, normalize=whiten),
        CACHED: lambda: [pama_ext.combine(part, normalize=whiten) for _ in range(parts)],
    }
    torch.testing.assert_close(pipeline[TWO]()[0], pipeline[PIPELINE]()[0], rtol=1e-3, atol=1e-3)
    return calls, pipeline


def main(arguments: list[str] | None = None) -> None:
    """Verify, time, print the tables and the gates, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the record there")
    parser.add_argument("--seconds", type=float, default=20.0, help="timing budget of a table")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)
    record: dict[str, Any] = {"header": timer.environment(options.device), "tables": [], "gates": []}
    gates = GATES if options.device == "cpu" else CUDA_GATES
    for shape in SHAPES:
        for name, calls in zip(("gae", "gae and combine"), candidates(shape, options.device), strict=True):
            budget = options.seconds if name == "gae" else options.seconds / 4
            times = timer.interleave(calls, budget_s=budget, rounds=(5, 100))
            base = OURS if name == "gae" else TWO
            rows = report(f"{name}, {list(shape)}", times, base)
            record["tables"].append({"shape": list(shape), "of": name, "rows": rows})
            if name != "gae":
                two, second, cached = (timer.quantiles(times[k])["p50_us"] for k in (TWO, SECOND, CACHED))
                record["gates"].append(
                    f"{list(shape)}  a fused operator at best: {two / (two - max(second - cached, 0)):.2f} x two calls"
                )
                continue
            record["gates"] += [f"{list(shape)}  {judge(times, *gate)}" for gate in gates if gate[0] in times]
            if shape == SHAPES[-1]:
                share = timer.ratio(times, COPY, OURS)
                record["gates"].append(
                    f"{list(shape)}  {'PASS' if share >= SHARE else 'MISS'}  share of a copy >= {SHARE}: {share:.2f}"
                )
    print("", *record["gates"], sep="\n")
    if options.json:
        timer.write_json(options.json, record)


if __name__ == "__main__":
    main()
