"""Rewards ``[B, N]`` in groups of 8: normalised by group and combined in one call, beside PyTorch and trainers.

"eager PyTorch" is the group norm and then the combination of :mod:`bench.baselines.eager`, all statistics included.
TRL and verl normalise and sum but balance nothing.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

import pama_ext
from bench import verify
from bench.baselines import eager, peers
from bench.workload import COMPILED, Candidate, Case, Gate, Workload, bytes_of

GROUP = 8
OURS, OURS_IDS, EAGER = "combine, group_size", "combine, group_ids", "eager PyTorch"
TRL, VERL, VERL_LOOP = "TRL", "verl, vectorised", "verl, loop"
LOOP_ROWS = 1024  # beyond, a call of verl's loop takes seconds


def build(device: str, *, shape: tuple[int, int]) -> Case:
    """All candidates of one shape."""
    rows, n = shape
    rewards = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    by_size = pama_ext.Normalize(by="group", group_size=GROUP)
    ids = torch.arange(rows, device=device) // GROUP
    by_ids = pama_ext.Normalize(by="group", group_ids=ids)
    exact = rewards.double()
    balanced = verify.combination(pama_ext.reference.combine(exact, normalize=by_size))
    found = {
        OURS: Candidate(lambda: pama_ext.combine(rewards, normalize=by_size), balanced),
        OURS_IDS: Candidate(lambda: pama_ext.combine(rewards, normalize=by_ids), balanced),
        EAGER: Candidate(functools.partial(eager.by_group_norm, rewards, GROUP), balanced),
        COMPILED: Candidate(
            functools.partial(eager.compiled(eager.by_group_norm), rewards, GROUP), balanced, compiles=True
        ),
    }
    unbalanced = {"noon": False, "solver": "fixed", "reward_weights": [1.0] * n}
    if peers.installed("trl"):
        by_trl = pama_ext.Normalize.trl_gdpo(GROUP)
        summed = pama_ext.reference.combine(exact, normalize=by_trl, **unbalanced)
        check = functools.partial(verify.close, "advantages", expected=summed.advantages)
        found[TRL] = Candidate(functools.partial(peers.trl_group_norm, rewards, GROUP), check, graph=False)
    if peers.installed("verl"):
        by_verl = pama_ext.Normalize.verl(ids)
        check = verify.columns(pama_ext.reference.pama(exact, normalize=by_verl, **unbalanced)[1])
        columns = [column[:, None].clone() for column in rewards.unbind(1)]
        mask = torch.ones(rows, 1, device=device)
        uids = np.array([f"{i // GROUP:032x}" for i in range(rows)], dtype=object)
        for name in (VERL, VERL_LOOP) if rows <= LOOP_ROWS else (VERL,):
            call = functools.partial(peers.verl_group_norm, columns, mask, uids, vectorized=name == VERL)
            found[name] = Candidate(call, check, graph=False)
    return Case(found, bytes_of(rewards=rewards, out=rewards[:, 0]))


GATES = (
    Gate(EAGER, OURS, 40.0, smoke=12.0),
    Gate(VERL, OURS_IDS, 80.0),
    Gate(EAGER, OURS, 40.0, device="cuda"),
    Gate(VERL, OURS_IDS, 80.0, device="cuda"),
)
SUITE = tuple(
    Workload(f"{list(shape)}", functools.partial(build, shape=shape), GATES)
    for shape in ((1024, 3), (1024, 5), (8192, 8), (65536, 4))
)
