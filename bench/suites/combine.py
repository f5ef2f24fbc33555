"""``combine`` beside what a user would run instead: Noon, closed form, all statistics, float32.

At level "batch" on the sizes from one that shows the host's cost alone to those that show the memory's; at level
"token" on the large ones. Inputs are alone, or come with a bool ``mask`` and a ``log_ratio``. Advantages are normal,
all objectives alike, so that nothing but the last of them tells which has the smallest mean; "unequal" ones have
deviations from 1 to 2. ``torch.compile`` gets the eager version written by hand, which it makes several times as fast
as the reference.
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
from bench.timer import Call
from bench.workload import BESIDE, COMPILED, COPY, ERROR, Accuracy, Candidate, Case, Gate, Workload, bytes_of
from pama_ext._combine import _combine_dispatcher

UNIT, EMPTY = "a + a", "empty kernel"
OURS, OURS_OUT, FIRST, LISTED = "combine", "combine, out=", "combine, objectives first", "combine, list of [B, T]"
ALONE = "combine, one thread"
DISPATCHER, CUSTOM_OP = "dispatcher", "custom_op in Python"
EAGER, REFERENCE, NUMBA, TRITON = "eager PyTorch", "reference", "numba", "Triton"
SHARED, SMALL, LARGE = 1 << 15, 1 << 16, 1 << 20  # elements: from SHARED on threads share the work on a CPU
Shape = tuple[int, ...]
Options = dict[str, Any]


def inputs(shape: Shape, device: str, *, masked: bool = True, unequal: bool = False) -> tuple[Tensor, Options]:
    """The advantages and the keyword arguments, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    advantages = torch.randn(shape, generator=generator).to(device)
    if unequal:
        advantages *= torch.linspace(1, 2, shape[-1], device=device)
    if not masked:
        return advantages, {}
    mask = torch.rand(shape[:-1], generator=generator) < 0.9
    log_ratio = 0.2 * torch.randn(shape[:-1], generator=generator)
    return advantages, {"mask": mask.to(device), "log_ratio": log_ratio.to(device)}


def written(function: Callable[..., Any], advantages: Any, options: Options, out: Tensor | None = None) -> Call:
    """The call as a user writes it; unpacking stored keywords instead would add a tenth to the smallest calls."""
    if not options:
        return (lambda: function(advantages)) if out is None else (lambda: function(advantages, out=out))
    mask, log_ratio = options["mask"], options["log_ratio"]
    if out is None:
        return lambda: function(advantages, mask=mask, log_ratio=log_ratio)
    return lambda: function(advantages, mask=mask, log_ratio=log_ratio, out=out)


def on_one_thread(call: Call) -> Call:
    """The call with one of torch's threads; to ask for one, and for all again, takes less than half a microsecond."""

    def alone() -> object:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return call()
        finally:
            torch.set_num_threads(threads)

    return alone


def build(device: str, *, shape: Shape, masked: bool = True, unequal: bool = False, level: str = "batch") -> Case:
    """All candidates of one shape."""
    advantages, options = inputs(shape, device, masked=masked, unequal=unequal)
    out = torch.empty(shape[:-1], device=device)
    expected = pama_ext.reference.combine(advantages.double(), **options, level=level)
    check = verify.combination(expected)
    cuda, by_batch = device == "cuda", level == "batch"
    ours = pama_ext.combine if by_batch else functools.partial(pama_ext.combine, level=level)
    by_hand = eager.by_batch if by_batch else eager.by_token

    def candidate(f: Callable[..., Any], x: Any = advantages, to: Tensor | None = None, **kind: bool) -> Candidate:
        return Candidate(written(f, x, options, to), check, **kind)

    found = {
        OURS: candidate(ours),
        OURS_OUT: candidate(ours, to=out),
        EAGER: candidate(by_hand),
        COMPILED: candidate(eager.compiled(by_hand), compiles=True),
    }
    if not cuda and advantages.numel() >= SHARED and torch.get_num_threads() > 1:
        found[ALONE] = Candidate(on_one_thread(found[OURS].call), check)
    if by_batch and masked and not cuda and peers.installed("numba"):
        from bench.baselines.numba_loop import numba_loop

        found[NUMBA] = candidate(numba_loop)
    if by_batch and cuda and peers.installed("triton"):
        from bench.baselines.triton_combine import triton_combine

        found[TRITON] = candidate(triton_combine)
    if by_batch and advantages.numel() < SMALL:
        found[DISPATCHER] = candidate(_combine_dispatcher)
        found[REFERENCE] = candidate(eager.specification)
        if cuda:
            found[EMPTY] = Candidate(lambda: torch.cuda._sleep(0))
    if by_batch and advantages.numel() >= LARGE:
        first = advantages.movedim(-1, 0).contiguous()
        found[FIRST] = candidate(functools.partial(ours, dim=0), first)
        found[LISTED] = candidate(ours, list(first))
    if not masked:
        found[UNIT] = Candidate(lambda: advantages + advantages)
        found[CUSTOM_OP] = candidate(eager.custom_op)
    errors = {name: verify.errors(found[name].call(), expected) for name in (OURS, EAGER)}
    figures = {
        ERROR: {name: max(of.values()) for name, of in errors.items()},
        BESIDE: {OURS: verify.beside(errors[OURS], errors[EAGER])},
    }
    return Case(found, bytes_of(advantages=advantages, **options, out=out), figures)


HOST_GATES = (
    Gate(OURS, UNIT, 2.0, smoke=6.0, at_most=True),
    Gate(OURS_OUT, UNIT, 1.2, smoke=4.0, at_most=True),
    Gate(CUSTOM_OP, OURS, 3.0, smoke=1.5),
    Gate(OURS, UNIT, 2.0, at_most=True, device="cuda"),
    Gate(OURS_OUT, UNIT, 1.2, at_most=True, device="cuda"),
)
SMALL_GATES = (
    Gate(EAGER, OURS, 40.0, smoke=10.0),
    Gate(COMPILED, OURS, 10.0),
    Gate(EAGER, OURS, 20.0, device="cuda"),
    Gate(COMPILED, OURS, 10.0, device="cuda"),
    Gate(OURS, EMPTY, 1.5, at_most=True, view="device", device="cuda"),
)
NUMBA_GATE = Gate(NUMBA, OURS, 1.0)
THREADS_GATE = Gate(ALONE, OURS, 1.0)
LARGE_GATES = (
    Gate(EAGER, OURS, 20.0, smoke=8.0),
    Gate(COMPILED, OURS, 8.0),
    Gate(NUMBA, OURS, 4.0),
    THREADS_GATE,
    Gate(COPY, OURS, 0.6, smoke=0.12, view="cold"),
    Gate(EAGER, OURS, 10.0, view="device", device="cuda"),
    Gate(COMPILED, OURS, 2.5, view="device", device="cuda"),
    Gate(COPY, OURS, 0.8, view="cold", device="cuda"),
)
ACCURACY = tuple(Accuracy(OURS, EAGER, 4.0, at_most=True, device=device) for device in ("cpu", "cuda"))
TOKEN_GATES = (
    THREADS_GATE,
    Gate(COPY, OURS, 0.85, smoke=0.1, view="cold"),
    Gate(COPY, OURS, 0.85, view="cold", device="cuda"),
)


def workload(*shape: int, gates: tuple[Gate, ...], quick: bool = True, **options: Any) -> Workload:
    """A workload named after its shape and its options."""
    about = ", unequal" if options.get("unequal") else ""
    about += ", mask, log_ratio" if options.get("masked", True) else ""
    about += f", level {options['level']}" if "level" in options else ""
    return Workload(f"{list(shape)}{about}", functools.partial(build, shape=shape, **options), gates + ACCURACY, quick)


SUITE = (
    workload(4, 2, gates=HOST_GATES + SMALL_GATES, masked=False),
    *(workload(*shape, gates=(*SMALL_GATES, NUMBA_GATE)) for shape in ((64, 3), (8, 128, 2))),
    workload(64, 256, 3, gates=(*SMALL_GATES, NUMBA_GATE, THREADS_GATE)),
    workload(64, 128, 4, gates=(*SMALL_GATES, NUMBA_GATE, THREADS_GATE)),  # where threads start
    workload(64, 512, 3, gates=(NUMBA_GATE, THREADS_GATE)),
    workload(512, 1024, 3, gates=LARGE_GATES),
    workload(512, 1024, 10, gates=LARGE_GATES, quick=False),
    *(workload(512, 1024, n, gates=LARGE_GATES, quick=False, unequal=True) for n in (3, 10)),
    workload(512, 1024, 3, gates=TOKEN_GATES, level="token"),
    workload(512, 1024, 10, gates=TOKEN_GATES, level="token", quick=False),
)
