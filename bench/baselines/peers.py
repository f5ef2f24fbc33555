"""The code of trainers and libraries for the same jobs: TRL, verl, TorchRL, TorchJD and Liger-Kernel, as installed.

Each is imported when first called, which takes seconds. How TRL and verl are called is said in ``tests/released.py``,
whose tests compare this package with them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[2] / "tests"))


def installed(package: str) -> bool:
    """Whether there is such a package; a machine that is there for its GPU may lack some."""
    return importlib.util.find_spec(package) is not None


@functools.cache
def _released() -> Any:
    return importlib.import_module("released")


@functools.cache
def _verl() -> Any:
    return importlib.import_module("verl.trainer.ppo.core_algos")


def trl_group_norm(rewards: Tensor, group_size: int) -> Tensor:
    """TRL, the statements of its trainer for GDPO: ``[B, N]`` normalised by group, and summed."""
    return _released().trl(rewards, rewards.new_ones(rewards.shape[1]), group_size, "normalize_then_sum")


def verl_group_norm(columns: list[Tensor], mask: Tensor, uids: np.ndarray, *, vectorized: bool) -> list[Tensor]:
    """The GRPO estimator of verl, once for each objective's ``[B, 1]``, on the uid strings that its trainer makes."""
    name = "compute_grpo_vectorized_outcome_advantage" if vectorized else "compute_grpo_outcome_advantage"
    return [getattr(_verl(), name)(column, mask, uids)[0] for column in columns]


def trl_gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """TRL 1.5.0, trl/experimental/ppo/ppo_trainer.py: its rule restated, since 1.16.0 has no PPO trainer."""
    running, reversed_advantages, length = 0, [], rewards.shape[1]
    for t in reversed(range(length)):
        following = values[:, t + 1] if t < length - 1 else 0.0
        running = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * running
        reversed_advantages.append(running)
    advantages = torch.stack(reversed_advantages[::-1], axis=1)
    return advantages, advantages + values


def verl_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """verl, without the whitening at the end."""
    return _released().verl_gae(rewards, values, mask, gamma, lam)


def torchrl_gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """TorchRL's vectorised estimator; objectives last, as it wants them."""
    functional = importlib.import_module("torchrl.objectives.value.functional")
    following = torch.nn.functional.pad(values[:, 1:], (0, 0, 0, 1))
    done = torch.zeros_like(values, dtype=torch.bool)
    return functional.vec_generalized_advantage_estimate(gamma, lam, values, following, rewards, done)


@functools.cache
def _mgda() -> Callable[[Tensor], Tensor]:
    return importlib.import_module("torchjd.aggregation").MGDAWeighting()


def mgda(gramian: Tensor) -> Tensor:
    """Weights ``[N]`` by TorchJD's ``MGDAWeighting``: Frank-Wolfe with its own stopping rule."""
    return _mgda()(gramian)


def mgda_step(advantages: Tensor, noon: bool) -> tuple[Tensor, Tensor]:
    """What a user of TorchJD writes: Noon, Gram matrix, MGDA, weighted sum."""
    kept = advantages.clamp(min=0) if noon else advantages
    flat = kept.flatten(0, -2)
    weights = mgda(flat.T @ flat / len(flat))
    return kept @ weights, weights


def liger_loss() -> Callable[..., Any]:
    """Liger-Kernel's GRPO loss from log-probabilities on, compiled as it compiles it; with one metric."""
    loss = importlib.import_module("liger_kernel.chunked_loss.grpo_loss").LigerFusedLinearGRPOFunction.ppo_loss_fn
    return torch.compile(
        lambda log_probs, old, advantages, mask: loss(
            log_probs, mask, advantages, mask, old_per_token_logps=old, beta=0.0, loss_type="bnpo"
        )
    )


def verl_loss(log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
    """The policy loss of verl; what it logs it moves to the host."""
    return _verl().compute_policy_loss_vanilla(old, log_probs, advantages, mask, config=_verl_config())


@functools.cache
def _verl_config() -> Any:
    return _released().verl_actor_config(clip_ratio_c=10.0)
