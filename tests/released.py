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


def verl_actor_config(**options: Any) -> Any:
    """verl 0.9.1: the configuration that its losses read."""
    from verl.workers.config import ActorConfig

    return ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio=0.2, **options)


def verl_policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *, dtype: torch.dtype,
    aggregate: str = "token-mean", normalizer: float | None = None, clip_low: float = 0.2, clip_high: float = 0.2,
    dual_clip: float | None = None, max_weight: float | None = None, kl_coef: float = 0.0,
    ref_log_probs: Tensor | None = None,
) -> tuple[Tensor, Tensor, dict[str, float]]:  # fmt: skip
    """verl 0.9.1: loss, its gradient and verl's metrics; ``max_weight`` takes its CISPO instead of the clipped loss.

    The KL loss is added as verl's actor adds it; without ``dual_clip`` its ``clip_ratio_c`` is 10.
    """
    from verl.trainer.ppo import core_algos

    x = log_probs.detach().to(dtype).requires_grad_()
    old, advantages, valid = old_log_probs.to(dtype), advantages.to(dtype), mask.to(dtype)
    counted = "batch_num_tokens" if aggregate == "token-mean" else "global_batch_size"
    info = {} if normalizer is None else {counted: normalizer}
    high = clip_high if max_weight is None else max_weight - 1
    low = clip_low if max_weight is None else 1.0
    config = verl_actor_config(
        clip_ratio_low=low, clip_ratio_high=high, clip_ratio_c=10.0 if dual_clip is None else dual_clip
    )
    config.global_batch_info.update(info)  # as its actor does
    name = "compute_policy_loss_vanilla" if max_weight is None else "compute_policy_loss_cispo"
    loss, metrics = getattr(core_algos, name)(old, x, advantages, valid, loss_agg_mode=aggregate, config=config)
    if kl_coef:
        kl = core_algos.kl_penalty(x, ref_log_probs.to(dtype), "low_var_kl")
        loss = loss + kl_coef * core_algos.agg_loss(kl, valid, aggregate, **info)
    loss.backward()
    return loss.detach(), x.grad, metrics


def verl_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float, aggregate: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """verl 0.9.1: loss, its gradient and the share of clipped values."""
    from verl.trainer.ppo import core_algos

    x = values.detach().to(dtype).requires_grad_()
    loss, fraction = core_algos.compute_value_loss(
        x, returns.to(dtype), old_values.to(dtype), mask.to(dtype), clip, loss_agg_mode=aggregate
    )
    loss.backward()
    return loss.detach(), x.grad, fraction


def trl_grpo_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *, loss_type: str, longest: int,
    count: int, dtype: torch.dtype, aggregate: str = "", normalizer: Any = None, dual_clip: float | None = None,
    max_weight: float | None = None, kl_coef: float = 0.0, ref_log_probs: Tensor | None = None,
) -> tuple[Tensor, Tensor, dict[str, float]]:  # fmt: skip
    """TRL 1.16.0: ``GRPOTrainer._compute_loss`` of a model that has these log-probabilities; its metrics.

    ``aggregate`` and ``normalizer`` are ours for the same: TRL's follow from ``loss_type``, ``longest`` (the longest
    completion) and ``count`` (the tokens of the generation batch).
    """
    from collections import defaultdict

    from trl.trainer.grpo_trainer import GRPOTrainer

    x = log_probs.detach().to(dtype).requires_grad_()
    logged: dict[str, list[float]] = defaultdict(list)
    single = SimpleNamespace(
        num_processes=1, sync_gradients=False, gather=lambda t: t, reduce=lambda t, reduction: t,
        gather_for_metrics=lambda t: t,
    )  # fmt: skip
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (x, torch.zeros_like(x), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level="token", beta=kl_coef, loss_type=loss_type, epsilon_low=0.2,
        epsilon_high=0.2 if max_weight is None else max_weight, use_vllm=False, _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1, max_completion_length=longest, accelerator=single,
        model=SimpleNamespace(training=True), _metrics={"train": logged},
        args=SimpleNamespace(delta=dual_clip, use_bias_correction_kl=False, steps_per_generation=1),
    )  # fmt: skip
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": mask.to(dtype),
        "advantages": advantages.to(dtype), "old_per_token_logps": old_log_probs.to(dtype),
        "num_items_in_batch": torch.tensor(count),
    }  # fmt: skip
    if ref_log_probs is not None:
        inputs["ref_per_token_logps"] = ref_log_probs.to(dtype)
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    return loss.detach(), x.grad, {name: values[-1] for name, values in logged.items()}
