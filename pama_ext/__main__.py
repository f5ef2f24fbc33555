"""``python -m pama_ext info | verify``: what is installed here, and whether its kernels compute the reference."""

from __future__ import annotations

import argparse
import itertools
import platform
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import pama_ext
from pama_ext import _C, Normalize, reference
from pama_ext._combine import _combine_dispatcher
from pama_ext._gae import _gae_dispatcher
from pama_ext._loss import _policy_loss_dispatcher, _value_loss_dispatcher

FACTOR = 4  # our error may be this many times that of PyTorch in the same dtype, plus rounding of the result
ROUNDINGS = 16
INSTRUCTIONS = ("avx512", "avx2", "generic")  # the CPU kernel is compiled for each


def main() -> int:
    """Run the chosen command; the exit status is 0 if all is well."""
    parser = argparse.ArgumentParser(prog="python -m pama_ext", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="version, torch, doors in use, CUDA architectures, devices, threads")
    commands.add_parser("verify", help="compare every kernel with the reference on every device present")
    return {"info": info, "verify": verify}[parser.parse_args().command]()


def info() -> int:
    """Print what is installed and, if binary and hardware do not fit, what to do."""
    architectures = _C.cuda_architectures()
    doors = ["dispatcher (torch.ops.pama_ext)"]
    if _C.has_door():
        doors.insert(0, "eager (DLPack exchange)")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows = {
        "pama_ext": pama_ext.__version__,
        "torch": f"{torch.__version__} (built with {_C.built_with_torch})",
        "python": platform.python_version(),
        "doors": ", ".join(doors),
        "cpu": f"{_C.cpu_instructions()}, {torch.get_num_threads()} threads",
        "cuda kernels": f"{' '.join(architectures)} (CUDA {_toolkit()})" if architectures else "none",
        "cuda devices": ", ".join(devices) or "none",
    }
    for name, value in rows.items():
        print(f"{name:<13}{value}")
    return _advise(architectures)


def _advise(architectures: list[str]) -> int:
    """Say in one line what does not fit, if anything."""
    if not _C.has_door():
        print("this torch has no DLPack exchange, so eager calls go through the dispatcher, which costs more")
    if torch.cuda.is_available() and not architectures:
        print(
            "a CUDA device is here but this build has no CUDA kernels: rebuild with PAMA_EXT_CUDA=1 and nvcc installed"
        )
        return 1
    theirs = torch.version.cuda
    if theirs and architectures and theirs.split(".")[0] != _toolkit().split(".")[0]:
        print(f"built with CUDA {_toolkit()}, but torch has {theirs}: rebuild with nvcc of CUDA {theirs}")
        return 1
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        if not any(_runs(name, major, minor) for name in architectures):
            print(f"no kernel for cuda:{i} (sm_{major}{minor}): rebuild with TORCH_CUDA_ARCH_LIST={major}.{minor}")
            return 1
    return 0


def _toolkit() -> str:
    return f"{_C.cuda_toolkit // 1000}.{_C.cuda_toolkit % 1000 // 10}"


def _runs(name: str, major: int, minor: int) -> bool:
    """Whether code for ``sm_90`` (same major), ``sm_90a`` (only that) or ``compute_90`` (and later) runs there."""
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
    if match is None:
        return False
    theirs = int(match[2]), int(match[3])
    if match[4] == "a":
        return theirs == (major, minor)
    if match[1] == "compute":
        return theirs <= (major, minor)
    return theirs[0] == major and theirs[1] <= minor


def verify() -> int:
    """Compare both doors with the float64 reference over dtypes, levels, solvers and layouts, on every device."""
    best = _C.cpu_instructions()
    failures = sum(_verify_on("cpu", f"cpu ({name})") for name in INSTRUCTIONS if _C.use_cpu_instructions(name))
    _C.use_cpu_instructions(best)
    if _C.cuda_architectures():
        failures += sum(_verify_on(f"cuda:{i}", f"cuda:{i}") for i in range(torch.cuda.device_count()))
    return int(failures > 0)


def _verify_on(device: str, name: str) -> int:
    """Run all cases on a device, report, and return how many results differ."""
    count = wrong = 0
    for case in _cases(device):
        count += 1
        for problem in _compare(**case):
            wrong += 1
            print(f"  {name}: {problem} in {case['options']}, {tuple(case['advantages'].shape)}", file=sys.stderr)
    for arguments in _gae_cases(device):
        count += 1
        for problem in _compare_gae(**arguments):
            wrong += 1
            print(f"  {name}: {problem}, {tuple(arguments['values'].shape)}", file=sys.stderr)
    for arguments in _loss_cases(device):
        count += 1
        for problem in _compare_loss(**arguments):
            wrong += 1
            print(f"  {name}: {problem}, {tuple(next(iter(arguments.values())).shape)}", file=sys.stderr)
    print(f"{name}: {count} cases, {wrong} results differ from the reference")
    return wrong


def _cases(device: str) -> Iterator[dict[str, Any]]:
    """Random problems over dtypes, levels, solvers and sizes; NaN stands behind every mask."""
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    shapes = ((64, 3), (7, 130, 2), (33, 257, 5), (3, 100, 64))
    choices = itertools.product(
        dtypes, ("batch", "sequence", "token"), ("closed_form", "fixed"), shapes, (True, False), (True, False)
    )
    for dtype, level, solver, shape, noon, skip_inactive in choices:
        options = {"level": level, "solver": solver, "noon": noon, "skip_inactive": skip_inactive}
        yield _case(shape, dtype, device, generator, options)
    for dtype, level, shape, by in itertools.product(dtypes, ("batch", "group"), shapes[:3], ("batch", "group")):
        ids = (torch.arange(shape[0]) * 5 % 3).to(device)  # no group in one piece
        options = {"level": level, "solver": "fixed", "normalize": Normalize(by=by, group_ids=ids)}
        yield _case(shape, dtype, device, generator, options)
    for level in ("batch", "sequence", "group"):
        options = {"level": level, "solver": "min_norm", "normalize": Normalize(group_size=3)}
        yield _case((33, 257, 5), torch.float64, device, generator, options)


def _case(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, generator: torch.Generator, options: dict[str, Any]
) -> dict[str, Any]:
    advantages = torch.randn(shape, generator=generator)
    mask = torch.rand(shape[:-1], generator=generator) < 0.8
    advantages[~mask] = float("nan")
    log_ratio = torch.randn(shape[:-1], generator=generator) * 0.3
    return {
        "advantages": advantages.to(device, dtype),
        "tensors": {"mask": mask.to(device), "log_ratio": log_ratio.to(device)},
        "options": options,
    }


def _compare(advantages: Tensor, tensors: dict[str, Any], options: dict[str, Any]) -> Iterator[str]:
    """Names of the results of either door that are further from float64 than rounding explains."""
    exact = _flat(reference.combine(advantages.double(), **tensors, **options))
    eager = _flat(reference.combine(advantages, **tensors, **options))
    in_place, out = advantages.clone(), torch.full_like(advantages[..., 0], float("nan"))
    pama_ext.combine_(in_place, **tensors, **options)
    results = {
        "combine": _flat(pama_ext.combine(advantages, **tensors, **options)),
        "dispatcher": _flat(_combine_dispatcher(advantages, **tensors, **options)),
        "out=": _flat(pama_ext.combine(advantages, out=out, **tensors, **options)),
        "combine_": {"advantages": in_place.to(exact["advantages"].dtype).sum(-1)},
    }
    for call, fields in results.items():
        for name, ours in fields.items():
            truth = exact[name]
            stored = advantages.dtype if name == "advantages" else eager[name].dtype
            rounding = (
                ROUNDINGS * torch.finfo(stored).eps * truth.abs().amax().clamp(min=1)
            )  # sums of entries of order 1
            allowed = FACTOR * (eager[name].double() - truth).abs().amax() + rounding
            if not bool((ours.double() - truth).abs().amax() <= allowed):
                yield f"{call}: {name}"


def _gae_cases(device: str) -> Iterator[dict[str, Any]]:
    """Random calls of ``gae`` over dtypes and sizes, dense and packed; NaN stands behind every mask."""
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    shapes = ((5, 300, 3), (40, 30, 4), (2, 900, 17), (3, 700, 1))
    for dtype, shape, packed, masked in itertools.product(dtypes, shapes, (False, True), (False, True)):
        rows, length, n = shape
        tokens = (rows * length,) if packed else (rows, length)
        arguments = {name: torch.randn(*tokens, n, generator=generator) for name in ("rewards", "values")}
        arguments["bootstrap"] = torch.randn(rows, n, generator=generator)
        if masked:
            arguments["mask"] = mask = torch.rand(tokens, generator=generator) < 0.8
            arguments["kl_penalty"] = torch.randn(tokens, generator=generator)
            for name in ("rewards", "values", "kl_penalty"):
                arguments[name][~mask] = float("nan")
        moved = {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in arguments.items()}
        if packed:
            moved["offsets"] = torch.arange(0, rows * length + 1, length, device=device)
        yield moved


def _compare_gae(rewards: Tensor, values: Tensor, **tensors: Any) -> Iterator[str]:
    wide = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    exact = reference.gae(rewards.double(), values.double(), gamma=0.99, **wide)
    eager = reference.gae(rewards, values, gamma=0.99, **tensors)
    for door, call in (("gae", pama_ext.gae), ("dispatcher", _gae_dispatcher)):
        results = call(rewards, values, gamma=0.99, **tensors)
        for name, ours, same, truth in zip(("advantages", "returns"), results, eager, exact, strict=True):
            rounding = ROUNDINGS * torch.finfo(values.dtype).eps * truth.abs().amax()
            allowed = FACTOR * (same.double() - truth).abs().amax() + rounding
            if not bool((ours.double() - truth).abs().amax() <= allowed):
                yield f"{door} of gae: {name}"


def _loss_cases(device: str) -> Iterator[dict[str, Any]]:
    """Random calls of the losses over dtypes, aggregates and sizes; eighths, so that no ratio is next to a clip."""
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    shapes, aggregates = ((40, 30), (5, 700)), ("token-mean", "seq-mean-token-mean")

    def eighths(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, generator=generator).to(device, dtype) / 8

    for dtype, shape, aggregate in itertools.product(dtypes, shapes, aggregates):
        mask = torch.rand(shape, generator=generator).to(device) < 0.8
        common = {"aggregate": aggregate, "mask": mask}
        policy = {"log_probs": eighths(dtype, *shape), "old_log_probs": eighths(dtype, *shape)}
        yield {
            **policy,
            **common,
            "advantages": eighths(dtype, *shape),
            "ref_log_probs": eighths(dtype, *shape),
            "kl_coef": 0.1,
        }
        yield {**policy, **common, "objective_advantages": eighths(dtype, shape[0], 3), "max_weight": 1.5}
        yield {**common, "clip": 0.2, **{k: eighths(dtype, *shape, 3) for k in ("values", "old_values", "returns")}}


def _compare_loss(**arguments: Any) -> Iterator[str]:
    """Names of the results of either door that are further from float64 than rounding explains."""
    leaf = "values" if "values" in arguments else "log_probs"
    calls: tuple[Any, ...] = (pama_ext.policy_loss, _policy_loss_dispatcher, reference.policy_loss)
    if leaf == "values":
        calls = (pama_ext.value_loss, _value_loss_dispatcher, reference.value_loss)

    def results(call: Any, given: dict[str, Any]) -> dict[str, Tensor]:
        x = given[leaf].clone().requires_grad_()
        loss, metrics = call(**{**given, leaf: x})
        loss.backward()
        found = {name: value for name, value in metrics._asdict().items() if value is not None}
        return {"loss": loss.detach(), "gradient": x.grad, **found}

    wide = {k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in arguments.items()}
    exact, eager = results(calls[2], wide), results(calls[2], arguments)
    for door, call in zip(("eager", "dispatcher"), calls, strict=False):
        for name, ours in results(call, arguments).items():
            truth = exact[name]
            rounding = ROUNDINGS * torch.finfo(ours.dtype).eps * truth.abs().amax().clamp(min=name != "gradient")
            allowed = FACTOR * (eager[name].double() - truth).abs().amax() + rounding
            if not bool((ours.double() - truth).abs().amax() <= allowed):
                yield f"{door} door of the loss: {name}"


def _flat(result: pama_ext.Combined) -> dict[str, Tensor]:
    fields = {"advantages": result.advantages, "weights": result.weights, "value": result.value}
    return {**fields, **result.stats._asdict()}


if __name__ == "__main__":
    sys.exit(main())
