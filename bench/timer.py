"""Timing of several candidates in one interleaved run, with caches warm or cold.

Machines change speed for minutes at a time, so a time by itself says little. Candidates take turns in short blocks,
and what is reported besides the quantiles of each is the median of the ratios taken round by round.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from bench import environment

Call = Callable[[], object]
Clock = Callable[[Call, int], float]  # (call, how many times) -> seconds for all of them
Times = dict[str, list[float]]  # seconds per call of each candidate, one entry per round

SETTLE_S = 0.01  # OpenMP workers spin for about 8 ms after a parallel region and would slow the next candidate
LONG_S = 0.01  # a call that long is not helped by a warm cache
SLOW_S = 0.1  # calls that long get the fewest rounds, so that they do not use up the time of all others
CUDA_CALLS = 8  # per block: few enough that the launch queue never fills and the host never waits for the device
GRAPH_CALLS = 20  # captured into one CUDA graph
SWEPT_CACHES = {"cpu": 2, "cuda": 4}  # how many times the last cache is read over; on CUDA long enough for a launch


def core_clock(calls: int = 300) -> dict[str, float]:
    """Quantiles of the time of arithmetic alone, on one core: the sines of 4096 numbers.

    A core that is shared takes up to twice as long for them; a copy of tensors takes as long as ever. So a share of a
    copy says little without it.
    """
    of, to = torch.ones(2, 4096)
    return quantiles([host_clock(functools.partial(torch.sin, of, out=to), 1) for _ in range(calls)])


def host_clock(call: Call, calls: int) -> float:
    """Seconds the host spends in ``calls`` calls; work queued on a device is waited for before and after, untimed."""
    _synchronize()
    gc.disable()
    try:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return time.perf_counter() - start
    finally:
        gc.enable()
        _synchronize()


def device_clock(call: Call, calls: int) -> float:
    """Seconds between two events of the CUDA stream, around ``calls`` calls or replays of a graph."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def cold(clock: Clock, sweep: Call) -> Clock:
    """A clock that calls ``sweep`` before each call, outside of what it times."""

    def swept(call: Call, calls: int) -> float:
        total = 0.0
        for _ in range(calls):
            sweep()
            total += clock(call, 1)
        return total

    return swept


def cache_sweep(device: str) -> Call:
    """What empties the caches: it reads more memory than the last one holds.

    Reading leaves clean lines; after writing, the call that is timed would pay for their way to memory. On CUDA the
    sweep is queued in front of the call, and takes longer than the host needs to queue that, so nothing waits for it.
    On the CPU all of torch's threads take part, and none rests before the call: after 10 ms of sleep a core takes
    100 us for what otherwise takes 10, whatever its caches hold.
    """
    size = SWEPT_CACHES[device] * environment.cache_bytes(device)
    return torch.ones(size // 4, device=device).sum


def graph_replay(call: Call, calls: int = GRAPH_CALLS) -> Call:
    """The replay of a CUDA graph that holds ``calls`` calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph.replay


def interleave(
    candidates: Mapping[str, Call],
    *,
    budget_s: float,
    clock: Clock = host_clock,
    block_s: float = 5e-4,
    max_calls: int = 1000,
    rounds: tuple[int, int] = (5, 300),
    settle_s: float = 0.0,
    lead: bool = True,
) -> Times:
    """Time the candidates in turn, round after round, each starting one place later than the round before.

    Args:
        candidates: what to time, already warm.
        budget_s: about how long the whole may take, seconds.
        clock: how a block of calls is timed.
        block_s: about how long one block lasts, seconds; at least one call.
        max_calls: most calls in a block.
        rounds: fewest and most rounds.
        settle_s: pause before each block, seconds.
        lead: whether a short call is made once, untimed, before its block: what the candidate before left in the
            caches is not its fault.

    Returns:
        Seconds per call of each candidate, one entry per round: entry r of all candidates belongs together. Slow ones
        take part in the first rounds only.
    """
    whole, once = {}, {}
    for name, call in candidates.items():
        start = time.perf_counter()
        once[name] = min(clock(call, 1) for _ in range(2))
        whole[name] = (time.perf_counter() - start) / 2  # with what the clock does besides
    calls = {name: max(1, min(max_calls, round(block_s / max(seconds, 1e-9)))) for name, seconds in once.items()}
    led = {name for name in candidates if lead and once[name] < LONG_S}
    slow = [name for name in candidates if once[name] > SLOW_S]
    cost = {name: whole[name] + once[name] * (calls[name] - 1 + (name in led)) + settle_s for name in candidates}
    slow_s, others_s = sum(cost[name] for name in slow), sum(cost[name] for name in candidates if name not in slow)
    left_s = budget_s - rounds[0] * slow_s
    repeats = max(rounds[0], min(rounds[1], round(left_s / others_s))) if others_s else rounds[0]

    names = list(candidates)
    times: Times = {name: [] for name in names}
    for r in range(repeats):
        first = r % len(names)
        for name in names[first:] + names[:first]:
            if name in slow and r >= rounds[0]:
                continue
            time.sleep(settle_s)
            if name in led:
                clock(candidates[name], 1)
            times[name].append(clock(candidates[name], calls[name]) / calls[name])
    return times


def ratio(times: Times, name: str, base: str) -> float:
    """Median, over the rounds of both, of how many times as long ``name`` took as ``base``."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=False))


def quantiles(seconds: list[float]) -> dict[str, float]:
    """``{"p20_us", "p50_us", "p80_us"}`` of a list of seconds, in microseconds."""
    ordered = sorted(seconds)
    return {f"p{p}_us": ordered[round(p / 100 * (len(ordered) - 1))] * 1e6 for p in (20, 50, 80)}


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
