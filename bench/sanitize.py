"""A short run over the kernels, for compute-sanitizer: ``compute-sanitizer python -m bench.sanitize``.

Inputs are made on the host and copied over, results are compared on the host: almost every kernel that the sanitizer
instruments is one of this package.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from torch import Tensor

import pama_ext
from pama_ext import reference

SHAPES = (
    (1, 1),  # one element
    (7, 3),  # less than a warp
    (33, 64),  # the most objectives there may be
    (5, 129, 2),  # a row that is no multiple of anything
    (3, 257, 5),  # odd number of objectives: vector accesses are unaligned from row to row
)
MIDDLE, LARGE = (64, 128, 3), (64, 512, 3)  # a cluster of blocks, a grid of them
LEVELS = ("batch", "sequence", "token")
SOLVERS = ("closed_form", "fixed")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Advantages with NaN and inf in them, behind the mask and before it; on the host."""
    generator = torch.Generator().manual_seed(len(shape) + shape[0])
    advantages = torch.randn(shape, generator=generator).to(dtype)
    mask = torch.rand(shape[:-1], generator=generator) < 0.8
    advantages[~mask] = torch.nan
    advantages.view(-1)[:: max(7, advantages.numel() // 5)] = torch.inf
    return advantages, {"mask": mask, "log_ratio": 0.3 * torch.randn(shape[:-1], generator=generator)}


def compare(what: str, got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Fail unless a result is finite and that of the reference, to rounding."""
    precision = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    error = (got.double().cpu() - expected.double()).abs()
    bound = 64 * precision * expected.double().abs().amax().clamp(min=1)
    if not bool((error <= bound).all()):  # a NaN is not <= anything
        raise SystemExit(f"{what}: off by {error.max():.3g}, allowed {bound:.3g}")


def run(device: str) -> int:
    """Make every call and return how many there were."""
    calls = 0
    for shape, dtype in [*itertools.product(SHAPES, DTYPES), (MIDDLE, torch.float32), (LARGE, torch.float32)]:
        host, options = inputs(shape, dtype)
        moved = {name: tensor.to(device) for name, tensor in options.items()}
        for level, solver in itertools.product(LEVELS, SOLVERS):
            case = f"{list(shape)} {dtype}, level {level}, solver {solver}"
            combined, shares, weights, _, _ = reference.pama(host, level=level, solver=solver, **options)
            advantages = host.to(device, copy=True)  # combine_ writes to it
            out = torch.zeros(shape[:-1], dtype=dtype).to(device)
            forms = {
                "tensor": {"advantages": advantages},
                "list": {"advantages": [column.to(device) for column in host.unbind(-1)]},
                "objectives first": {"advantages": host.movedim(-1, 0).contiguous().to(device), "dim": 0},
                "out=": {"advantages": advantages, "out": out},
            }
            for form, arguments in forms.items():
                result = pama_ext.combine(**arguments, **moved, level=level, solver=solver)
                compare(f"combine, {form}, {case}", result.advantages, combined, dtype)
                compare(f"weights, {form}, {case}", result.weights, weights, dtype)
            pama_ext.combine_(advantages, **moved, level=level, solver=solver)
            compare(f"combine_, {case}", advantages, shares, dtype)
            calls += len(forms) + 1
    return calls + run_normalised(device)


def run_normalised(device: str) -> int:
    """The same with a ``Normalize`` of every kind, fixed weights, and with the min-norm solver."""
    host, options = inputs((6, 129, 3), torch.float32)
    moved = {name: tensor.to(device) for name, tensor in options.items()}
    calls = 0
    for over, by, combined, level in itertools.product(
        ("tokens", "row_sums"), ("batch", "group"), ("none", "batch", "group"), ("batch", "group", "token")
    ):
        ids = torch.tensor([5, -1, 5, 3, -1, 5])
        how = {"by": by, "combined": combined, "over": over, "singleton": "raw"}
        expected = reference.combine(
            host.double(), level=level, solver="fixed", normalize=pama_ext.Normalize(group_ids=ids, **how), **options
        )
        there = pama_ext.Normalize(group_ids=ids.to(device), **how)
        result = pama_ext.combine(host.to(device), level=level, solver="fixed", normalize=there, **moved)
        compare(f"combine, level {level}, {how}", result.advantages, expected.advantages, torch.float32)
        calls += 1
    for level in ("batch", "sequence"):
        expected = reference.combine(host.double(), level=level, solver="min_norm", **options)
        result = pama_ext.combine(host.double().to(device), level=level, solver="min_norm", **moved)
        compare(f"combine, level {level}, min_norm", result.weights, expected.weights, torch.float32)
        calls += 1
    for n in (3, 8, 10, 45):  # four, eight and 32 lanes to a problem; shared memory and not
        x = torch.randn(9, n, n + 9, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        gramian = x @ x.mT
        compare(f"min_norm of {n}", pama_ext.min_norm(gramian.to(device)), reference.min_norm(gramian), torch.float32)
        calls += 1
    return calls + run_gae(device)


def run_gae(device: str) -> int:
    """``gae`` on short and long sequences, of one length and packed, with all that it takes."""
    calls = 0
    for (rows, length, n), dtype, packed in itertools.product(((9, 33, 3), (2, 700, 17)), DTYPES, (False, True)):
        host, options = inputs((rows, length, n), dtype)
        values = host.masked_fill(~host.isfinite() & options["mask"].unsqueeze(-1), 0)
        rewards, bootstrap = values.flip(-1), torch.ones(rows, n)
        arguments = {"mask": options["mask"], "kl_penalty": options["log_ratio"], "gamma": 0.9}
        if packed:
            rewards, values = rewards.flatten(0, 1), values.flatten(0, 1)
            arguments |= {k: arguments[k].flatten() for k in ("mask", "kl_penalty")}
            arguments["offsets"] = torch.tensor([0, 1, 1, rows * length])
            bootstrap = torch.ones(3, n)
        arguments["bootstrap"] = bootstrap
        moved = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in arguments.items()}
        results = pama_ext.gae(rewards.to(device), values.to(device), **moved)
        for got, expected in zip(results, reference.gae(rewards, values, **arguments), strict=True):
            compare(f"gae, {list(values.shape)} {dtype}", got, expected, dtype)
        calls += 1
    return calls + run_losses(device)


def run_losses(device: str) -> int:
    """Both losses and their gradients, rows for a warp and for a block, with all that they take."""
    calls = 0
    aggregates = ("token-mean", "seq-mean-token-mean")
    for (rows, length), dtype, aggregate in itertools.product(((9, 33), (2, 700)), DTYPES, aggregates):
        generator = torch.Generator().manual_seed(rows)

        def eighths(*shape: int, generator=generator, dtype=dtype) -> Tensor:
            return (torch.randint(-8, 9, shape, generator=generator) / 8).to(dtype)

        tokens = (rows, length)
        mask = torch.rand(tokens, generator=generator) < 0.8
        policy = {"old_log_probs": eighths(*tokens), "ref_log_probs": eighths(*tokens), "kl_coef": 0.1,
                  "objective_advantages": eighths(*tokens, 3)}  # fmt: skip
        value = {"old_values": eighths(*tokens, 3), "returns": eighths(*tokens, 3), "clip": 0.2}
        for name, leaf, arguments in (
            ("policy_loss", eighths(*tokens), policy),
            ("value_loss", eighths(*tokens, 3), value),
        ):
            results = []
            for module, where in ((pama_ext, device), (reference, "cpu")):
                x = leaf.to(where).requires_grad_()
                moved = {k: v.to(where) if isinstance(v, Tensor) else v for k, v in arguments.items()}
                loss, metrics = getattr(module, name)(x, mask=mask.to(where), aggregate=aggregate, **moved)
                loss.backward()
                results.append([loss.detach(), x.grad, *(m for m in metrics if m is not None)])
            for got, expected in zip(*results, strict=True):
                compare(f"{name}, {list(tokens)} {dtype} {aggregate}", got, expected, dtype)
            calls += 1
    return calls


def main(arguments: list[str] | None = None) -> None:
    """Run on the device asked for and say how many calls agreed with the reference."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    print(f"{run(parser.parse_args(arguments).device)} calls agree with the reference")


if __name__ == "__main__":
    main()
