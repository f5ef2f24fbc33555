"""Group normalisation and ``combine`` in one call, beside PyTorch and released trainers: ``python -m bench.groups``.

Rewards ``[B, N]`` in groups of 8. "Eager" is the group norm in PyTorch and then the eager baseline of
:mod:`bench.baselines`, all statistics included. TRL and verl run their own installed code, which normalises and sums
but balances nothing: TRL 1.16.0 GDPO's statements of its trainer, verl 0.9.1 its estimators, once for each objective,
on the uid strings its trainer makes.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pama_ext
from bench import baselines, timer
from bench.timer import Call, Times

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import released

GROUP = 8
SHAPES = ((1024, 3), (1024, 5), (8192, 8), (65536, 4))
OURS, OURS_IDS, EAGER = "combine, group_size", "combine, group_ids", "eager PyTorch"
TRL, VERL, VERL_LOOP = "TRL 1.16.0", "verl 0.9.1, vectorised", "verl 0.9.1, loop"
LOOP_ROWS = 1024  # beyond, a call of verl's loop takes seconds
GATES = ((1024, 5), EAGER, OURS, 40.0), ((1024, 5), VERL, OURS_IDS, 80.0)  # shape, slower, faster, at least


def group_norm(rewards: Tensor, eps: float = 1e-4) -> tuple[Tensor, Tensor]:
    """The advantages, and for each objective how many groups are constant."""
    groups = rewards.view(-1, GROUP, rewards.shape[1])
    std, mean = torch.std_mean(groups, 1, keepdim=True)
    return ((groups - mean) / (std + eps)).view_as(rewards), (groups.amax(1) == groups.amin(1)).sum(0)


def eager(rewards: Tensor) -> Any:
    """Group norm, then the combination with all statistics."""
    advantages, dead = group_norm(rewards)
    return *baselines.eager(advantages), dead


def verl(function: Callable[..., Any], rewards: list[Tensor], mask: Tensor, uids: np.ndarray) -> list[Tensor]:
    """One of verl's estimators for each objective."""
    return [function(column, mask, uids)[0] for column in rewards]


def candidates(shape: tuple[int, int], device: str) -> dict[str, Call]:
    """What is timed; the combinations among them have been compared with the specification."""
    from verl.trainer.ppo import core_algos

    rows, n = shape
    rewards = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    by_size = pama_ext.Normalize(by="group", group_size=GROUP)
    by_ids = pama_ext.Normalize(by="group", group_ids=(torch.arange(rows) // GROUP).to(device))
    expected = pama_ext.reference.combine(rewards.double(), normalize=by_size)
    calls: dict[str, Call] = {
        OURS: lambda: pama_ext.combine(rewards, normalize=by_size),
        OURS_IDS: lambda: pama_ext.combine(rewards, normalize=by_ids),
        EAGER: functools.partial(eager, rewards),
    }
    for name, call in calls.items():
        torch.testing.assert_close(call()[0].double(), expected.advantages, rtol=1e-4, atol=1e-5, msg=name)

    calls[TRL] = functools.partial(released.trl, rewards, torch.ones(n, device=device), GROUP, "normalize_then_sum")
    columns, mask = [c[:, None].clone() for c in rewards.unbind(1)], torch.ones(rows, 1, device=device)
    uids = np.array([f"{i // GROUP:032x}" for i in range(rows)], dtype=object)
    calls[VERL] = functools.partial(verl, core_algos.compute_grpo_vectorized_outcome_advantage, columns, mask, uids)
    if rows <= LOOP_ROWS:
        calls[VERL_LOOP] = functools.partial(verl, core_algos.compute_grpo_outcome_advantage, columns, mask, uids)
    return calls


def report(title: str, times: Times, base: str) -> list[dict[str, Any]]:
    """Print the table of one timed run and return its rows."""
    rows = [{"candidate": name, **timer.quantiles(s), f"/ {base}": timer.ratio(times, name, base), "rounds": len(s)}
            for name, s in times.items()]  # fmt: skip
    cells = [[row["candidate"], f"{row['p50_us']:.2f}", f"{row[f'/ {base}']:.2f}"] for row in rows]
    print(f"\n{title}, {rows[0]['rounds']} rounds\n{timer.table(['', 'p50 µs', f'/ {base}'], cells)}")
    return rows


def judge(times: Times, slower: str, faster: str, bound: float) -> str:
    """One line: PASS or MISS."""
    value = timer.ratio(times, slower, faster)
    return f"{'PASS' if value >= bound else 'MISS'}  {slower} / {faster} >= {bound:g}: {value:.1f}"


def main(arguments: list[str] | None = None) -> None:
    """Verify, time, print the tables and the gates, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the record there")
    parser.add_argument("--seconds", type=float, default=4.0, help="timing budget of a shape")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)
    record: dict[str, Any] = {"header": timer.environment(options.device), "tables": [], "gates": []}
    for shape in SHAPES:
        calls = candidates(shape, options.device)
        times = timer.interleave(calls, budget_s=options.seconds, rounds=(5, 100))
        record["tables"].append(
            {"shape": list(shape), "rows": report(f"{list(shape)}, groups of {GROUP}", times, OURS)}
        )
        record["gates"] += [f"{list(shape)}  {judge(times, *gate)}" for of, *gate in GATES if of == shape]
    print("", *record["gates"], sep="\n")
    if options.json:
        timer.write_json(options.json, record)


if __name__ == "__main__":
    main()
