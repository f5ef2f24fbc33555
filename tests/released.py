"""How released trainers normalise rewards: TRL 1.16.0 and verl 0.9.1 by their own installed code.

OpenRLHF, NeMo-RL and ms-swift cannot be installed beside the pinned torch and transformers; their rules are restated
here from the released source that each docstring names. Trainers are imported when first called: it takes seconds.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import os
import sys
import textwrap
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor


def installed(*packages: str) -> pytest.MarkDecorator:
    """Skips where a trainer is missing because it has no release for this Python, or on a machine that is there for its
    GPU; elsewhere its absence is a failure."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    excused = bool(os.environ.get("PAMA_EXT_REQUIRE_CUDA")) or not (3, 11) <= sys.version_info < (3, 13)
    return pytest.mark.skipif(excused and bool(missing), reason=f"not installed: {', '.join(missing)}")


@functools.cache
def _trl_statements() -> tuple[Any, dict[str, Any]]:
    """The statements of TRL's own ``GRPOTrainer._generate_and_score_completions`` from rewards to advantages."""
    from trl.trainer import grpo_trainer

    source = inspect.getsource(grpo_trainer.GRPOTrainer._generate_and_score_completions)
    body = ast.parse(textwrap.dedent(source)).body[0].body  # type: ignore[attr-defined]
    targets = [ast.unparse(s.targets[0]) if isinstance(s, ast.Assign) else "" for s in body]
    first = targets.index("unscorable_mask")
    last = next(k for k, s in enumerate(body) if ast.unparse(s).startswith("advantages = torch.nan_to_num("))
    module = ast.Module(body[first : last + 1], type_ignores=[])
    return compile(module, grpo_trainer.__file__, "exec"), vars(grpo_trainer)


def trl(rewards: Tensor, weights: Tensor, group_size: int, aggregation: str, scale_rewards: str = "group") -> Tensor:
    """TRL 1.16.0: ``rewards_per_func`` ``[B, N]`` to advantages ``[B]``."""
    code, module = _trl_statements()
    trainer = SimpleNamespace(
        multi_objective_aggregation=aggregation, reward_weights=weights, scale_rewards=scale_rewards,
        reward_funcs=[None] * rewards.shape[1],
    )  # fmt: skip
    scope = {"self": trainer, "rewards_per_func": rewards, "num_generations": group_size, "device": rewards.device}
    exec(code, {**module}, scope)
    return scope["advantages"]


def verl_grpo(rewards: Tensor, mask: Tensor, ids: Tensor, *, vectorized: bool = False, scale: bool = True) -> Tensor:
    """verl 0.9.1: ``token_level_rewards`` ``[B, T]`` to advantages ``[B, T]``."""
    from verl.trainer.ppo import core_algos

    name = "compute_grpo_vectorized_outcome_advantage" if vectorized else "compute_grpo_outcome_advantage"
    index = np.array([f"prompt {i}" for i in ids.tolist()], dtype=object)
    return getattr(core_algos, name)(rewards.clone(), mask, index, norm_adv_by_std_in_grpo=scale)[0]


def verl_gdpo(rewards: list[list[float | None]], mask: Tensor, ids: Tensor, weights: list[float] | None) -> Tensor:
    """verl 0.9.1: for each objective a score per response, to advantages ``[B, T]``."""
    from verl.trainer.ppo import core_algos

    names = [f"reward {i}" for i in range(len(rewards))]
    config = {"gdpo_reward_keys": names, "gdpo_reward_weights": weights}
    prompts = torch.ones(len(mask), 2, dtype=torch.int64)
    batch = {"prompts": prompts, "attention_mask": torch.cat([prompts, mask.long()], 1)}
    scores = {name: np.array(values, dtype=object) for name, values in zip(names, rewards, strict=True)}
    index = np.array([f"prompt {i}" for i in ids.tolist()], dtype=object)
    return core_algos.compute_gdpo_outcome_advantage(
        torch.zeros(mask.shape), mask, index, config=config, non_tensor_batch=scores, batch=batch
    )[0]


def verl_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """verl 0.9.1: advantages and returns ``[B, T]``, without the whitening at the end."""
    from verl.trainer.ppo import core_algos

    with mock.patch.object(core_algos.verl_F, "masked_whiten", lambda x, mask: x):
        return core_algos.compute_gae_advantage_return(rewards, values, mask, gamma, lam)


def verl_whiten(values: Tensor, mask: Tensor) -> Tensor:
    """verl 0.9.1, verl/utils/torch_functional.py."""
    from verl.utils.torch_functional import masked_whiten

    return masked_whiten(values, mask)


def openrlhf(rewards: Tensor, group_size: int) -> Tensor:
    """OpenRLHF 0.11.2, openrlhf/trainer/ppo_utils/experience_maker.py, ``advantage_estimator="group_norm"``."""
    groups = rewards.double().view(-1, group_size)
    spread = (groups.var(1, keepdim=True)).sqrt()
    return ((groups - groups.mean(1, keepdim=True)) / (spread + 1e-9)).flatten()


def nemo(rewards: Tensor, ids: Tensor) -> Tensor:
    """NeMo-RL at commit 165f994, nemo_rl/algorithms/advantage_estimator.py, ``GRPOAdvantageEstimator``.

    With ``normalize_rewards``, without ``use_leave_one_out_baseline``; moments as in nemo_rl/algorithms/utils.py,
    ``calculate_baseline_and_std_per_prompt``.
    """
    result = torch.zeros(len(rewards), dtype=torch.float64)
    for prompt in ids.unique():
        own = (ids == prompt).nonzero().squeeze(1)
        scores, n = rewards[own].double(), len(own)
        if n > 1:
            mean, square = scores.sum() / n, scores.square().sum() / n
            spread = ((square - mean.square()).clamp(min=0) * n / (n - 1)).sqrt()
            spread = 0.0 if (scores == scores[0]).all() else spread  # in exact arithmetic
            result[own] = (scores - mean) / (spread + 1e-6) if spread > 0 else 0.0
    return result


def swift(rewards: Tensor, weights: Tensor, group_size: int, scale_rewards: str) -> Tensor:
    """ms-swift 4.6.0, swift/rl_core/advantage.py, ``compute_advantages`` with ``advantage_estimator="grpo"``."""
    groups = rewards.double().unflatten(0, (-1, group_size))
    if scale_rewards == "group":
        total = (groups * weights).nansum(2)
        centred = total - total.mean(1, keepdim=True)
        spread = total.std(1, keepdim=True) if group_size > 1 else torch.zeros_like(total)
        return (centred / (spread + 1e-4)).flatten()
    usable = ~groups.isnan()
    count = usable.sum(1, keepdim=True)
    mean = groups.nanmean(1, keepdim=True)
    spread = ((groups - mean).square().nansum(1, keepdim=True) / (count - 1)).sqrt()  # NaN for a single sample
    each = (groups - mean) / (spread + 1e-8)
    total = (each.nan_to_num(0.0) * weights).sum(2).flatten()
    return (total - total.mean()) / (total.std() + 1e-8)
