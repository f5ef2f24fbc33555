"""``gae`` beside the loops of trainers, numba, TorchRL and a scan in eager PyTorch; and ``gae`` with ``combine``.

Token rewards and values ``[B, T, N]``, gamma 0.99, lam 0.95, no mask, float32. A trainer's loop runs once for each
objective. Every candidate allocates its results.

"gae and combine" is a step of a trainer: the advantages of N value heads, put on one scale over the batch, and PAMA.
One operator that did all at once would have to keep the advantages just the same, since the weights follow from all
of them; what it could save is their way to memory and back. ``CACHED`` is as much work of ``combine`` on advantages
that never leave the caches, so a fused operator saves at most the difference to ``SECOND``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pama_ext
from bench import verify
from bench.baselines import eager, peers
from bench.workload import COMPILED, COPY, Candidate, Case, Gate, Workload, bytes_of

SHAPES = ((64, 1024, 3), (512, 4096, 4))
GAMMA, LAM = 0.99, 0.95
OURS, RAGGED, SCAN, NUMBA = "gae", "gae, ragged rows", "eager scan", "numba"
VERL, TRL, TORCHRL = "verl, loop", "TRL 1.5.0, loop", "TorchRL, vectorised"
TWO, SECOND, CACHED, PIPELINE = "gae, then combine", "combine alone", "combine, in cache", "eager PyTorch"
CACHE_ELEMENTS = 256 * 1024  # a megabyte
ROUNDINGS = 512  # of float32, where up to 4096 tokens add up


def inputs(shape: tuple[int, int, int], device: str) -> tuple[Tensor, Tensor]:
    """Rewards and values, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    return rewards, values


def exactly(rewards: Tensor, values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Advantages and returns of the reference, in float64."""
    return pama_ext.reference.gae(rewards.double(), values.double(), mask=mask, gamma=GAMMA, lam=LAM)


def both(expected: tuple[Tensor, Tensor]) -> Callable[[Any], None]:
    """The check of a candidate that returns advantages and returns, or both of each objective."""

    def check(result: Any) -> None:
        if isinstance(result, list):
            result = [torch.stack(x, -1) for x in zip(*result, strict=True)]
        for what, got, exact in zip(("advantages", "returns"), result, expected, strict=True):
            verify.close(what, got, exact, roundings=ROUNDINGS)

    return check


def build(device: str, *, shape: tuple[int, int, int]) -> Case:
    """All candidates for ``gae`` of one shape."""
    rewards, values = inputs(shape, device)
    columns = [[c.clone() for c in x.unbind(-1)] for x in (rewards, values)]
    mask = torch.ones(shape[:2], device=device)
    lengths = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=torch.Generator().manual_seed(1))
    ragged = (torch.arange(shape[1]) < lengths).to(device)
    check = both(exactly(rewards, values))

    def each(estimator: Callable[..., Any], *rest: Any) -> list[Any]:
        return [estimator(r, v, *rest) for r, v in zip(*columns, strict=True)]

    def call(function: Callable[..., Any]) -> Callable[[], Any]:
        return functools.partial(function, rewards, values, GAMMA, LAM)

    found = {
        OURS: Candidate(lambda: pama_ext.gae(rewards, values, gamma=GAMMA, lam=LAM), check),
        RAGGED: Candidate(
            lambda: pama_ext.gae(rewards, values, mask=ragged, gamma=GAMMA, lam=LAM),
            both(exactly(rewards, values, ragged)),
        ),
        SCAN: Candidate(call(eager.gae_scan), check),
        COMPILED: Candidate(call(eager.compiled(eager.gae_scan)), check, compiles=True),
        TRL: Candidate(lambda: each(peers.trl_gae, GAMMA, LAM), check, graph=False),
    }
    if peers.installed("torchrl"):
        found[TORCHRL] = Candidate(call(peers.torchrl_gae), check, graph=False)
    if peers.installed("verl"):
        found[VERL] = Candidate(lambda: each(peers.verl_gae, mask, GAMMA, LAM), check, graph=False)
    if peers.installed("numba") and device == "cpu":
        from bench.baselines.numba_loop import numba_gae

        found[NUMBA] = Candidate(call(numba_gae), check)
    return Case(found, bytes_of(rewards=rewards, values=values, advantages=rewards, returns=values))


def build_both(device: str, *, shape: tuple[int, int, int]) -> Case:
    """``gae`` and ``combine`` of one shape, together and apart."""
    rewards, values = inputs(shape, device)
    whiten = pama_ext.Normalize(by="batch")
    exact, _ = exactly(rewards, values)
    # the scan's rounding against a spread of several units, then normalised
    check = verify.combination(pama_ext.reference.combine(exact, normalize=whiten), roundings=ROUNDINGS)
    advantages, _ = pama_ext.gae(rewards, values, gamma=GAMMA, lam=LAM)
    parts = max(1, advantages.numel() // CACHE_ELEMENTS)
    part = advantages[: shape[0] // parts]
    return Case(
        {
            TWO: Candidate(
                lambda: pama_ext.combine(pama_ext.gae(rewards, values, gamma=GAMMA, lam=LAM)[0], normalize=whiten),
                check,
            ),
            PIPELINE: Candidate(functools.partial(eager.gae_pipeline, rewards, values, GAMMA, LAM), check),
            OURS: Candidate(lambda: pama_ext.gae(rewards, values, gamma=GAMMA, lam=LAM)),
            SECOND: Candidate(lambda: pama_ext.combine(advantages, normalize=whiten), check),
            CACHED: Candidate(lambda: [pama_ext.combine(part, normalize=whiten) for _ in range(parts)]),
        }
    )


GATES = (
    Gate(VERL, OURS, 100.0),
    Gate(TRL, OURS, 100.0, smoke=50.0),
    Gate(NUMBA, OURS, 2.0),
    Gate(COPY, OURS, 0.6, smoke=0.15, view="cold"),
    Gate(VERL, OURS, 500.0, view="device", device="cuda"),
    Gate(TRL, OURS, 500.0, view="device", device="cuda"),
    Gate(COPY, OURS, 0.6, view="cold", device="cuda"),
)
SUITE = tuple(
    workload
    for shape, quick in zip(SHAPES, (True, False), strict=True)
    for workload in (
        Workload(f"{list(shape)}", functools.partial(build, shape=shape), GATES, quick),
        Workload(f"gae and combine, {list(shape)}", functools.partial(build_both, shape=shape), quick=quick),
    )
)
