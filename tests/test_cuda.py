"""What only a GPU has: streams, graphs, synchronisation. Everything else runs there through ``device``."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from cases import DTYPES, LEVELS, SHAPES, SOLVERS, make, normal
from compare import assert_same_bits, assert_same_result
from doors import DOORS, assert_matches

from pama_ext import Normalize, combine, combine_, min_norm

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda")


def on_gpu(shape: str = "two parts", **options):
    return make(SHAPES[shape], draw=normal, **options).to(CUDA)


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
@pytest.mark.parametrize("level", LEVELS)
def test_runs_on_the_current_stream(door, level):
    """The input is made late on the side stream; a launch on any other stream would read it too early."""
    problem = on_gpu(level=level)
    expected = combine(problem.values, **problem.options)
    late = torch.zeros_like(problem.values)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles
        late.copy_(problem.values)
        result = door(late, **problem.options)
        assert not stream.query(), "the call waited for the stream"
    stream.synchronize()
    assert_same_result(result, expected)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("options", [{}, {"reward_weights": [1.0, 0.5]}, {"nan": "propagate", "skip_inactive": True}])
def test_no_synchronisation(level, solver, options):
    problem = on_gpu(level=level, solver=solver, **options)
    out = torch.empty(problem.values.shape[:-1], device=CUDA)
    weights = torch.ones(2, device=CUDA)
    combine(problem.values, **problem.options)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = combine(problem.values, **problem.options)
        _ = result.weights, result.value, result.stats
        combine(problem.values, out=out, **{**problem.options, "reward_weights": weights})
        combine_(problem.values.clone(), **problem.options)
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)
        queued = torch.cuda.Event()
        combine(problem.values, **problem.options)
        queued.record()
        assert not queued.query(), "the call waited for the device"
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", ["outcome rewards", "two parts", "rows that straddle tiles"])
def test_graph_capture_and_replay(level, shape):
    problem, other = on_gpu(shape, level=level), on_gpu(shape, level=level, seed=5)
    values, out = problem.values.clone(), torch.empty(problem.values.shape[:-1], device=CUDA)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        combine(values, out=out, **problem.options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written = combine(values, out=out, **problem.options)
        fresh = combine(values, **problem.options)
    for source in (problem.values, other.values, problem.values):
        values.copy_(source)
        out.fill_(float("nan"))
        graph.replay()
        expected = combine(source, **problem.options)
        assert_same_result(written, expected)
        assert_same_result(fresh, expected)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1 << 18, 3), (16, 4099, 5), (3, 100_000, 2), (5000, 64)], ids=str)
def test_large_problems_match_and_repeat(shape, dtype, level):
    """Many blocks: the reference's numbers, and the same bits each time although blocks end in any order."""
    problem = make(shape, dtype, level=level)
    moved = problem.to(CUDA)
    first = combine(moved.values, **moved.options)
    assert_matches(first, problem)
    for _ in range(5):
        assert_same_result(combine(moved.values, **moved.options), first)
    shares = combine_(moved.values.clone(), **moved.options)
    again = combine_(moved.values.clone(), **moved.options)
    assert_same_bits(shares.advantages, again.advantages)


def test_calls_in_flight_share_nothing():
    """Two streams at once: each call has its own workspace."""
    problems = [on_gpu(seed=seed) for seed in range(8)]
    expected = [combine(p.values, **p.options) for p in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    for _ in range(10):
        results = []
        for problem, stream in zip(problems, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(combine(problem.values, **problem.options))
        torch.cuda.synchronize()
        for result, want in zip(results, expected, strict=True):
            assert_same_result(result, want)


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_device_that_is_not_current(door):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    problem = on_gpu()
    there = problem.to(torch.device("cuda:1"))
    result = door(there.values, **there.options)
    assert result.weights.device.index == 1 and torch.cuda.current_device() == 0
    assert_same_bits(result.advantages.cpu(), combine(problem.values, **problem.options).advantages.cpu())


def test_cpu_and_gpu_agree():
    problem = make(SHAPES["six parts, uneven"])  # exact sums: the same weights, to the bit
    moved = problem.to(CUDA)
    ours, theirs = combine(problem.values, **problem.options), combine(moved.values, **moved.options)
    for name in ("weights", "value", "advantages"):
        assert_same_bits(getattr(theirs, name).cpu(), getattr(ours, name), name)
    for name in ("count", "min", "max", "positive", "clipped", "nonfinite", "active_mean"):
        assert_same_bits(getattr(theirs.stats, name).cpu(), getattr(ours.stats, name), name)


def test_pinned_memory_is_cpu_memory():
    values = torch.randn(33, 3).pin_memory()
    assert_same_result(combine(values), combine(values.clone()))


def test_metrics_are_one_transfer():
    result = combine(on_gpu().values)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            result.metrics()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in seen if "synchronizing" in str(w.message)]) == 1


def kinds_of_groups(rows: int) -> dict[str, Normalize]:
    ids = torch.arange(rows, device=CUDA) // 4
    shuffled = ids[torch.randperm(rows, generator=torch.Generator().manual_seed(0)).to(CUDA)]
    offsets = torch.tensor([0, 1, 1, rows // 2, rows], device=CUDA)
    return {
        "size": Normalize(by="group", group_size=4),
        "ids": Normalize(by="group", group_ids=shuffled),
        "offsets": Normalize(by="group", group_offsets=offsets),
        "batch": Normalize(by="batch", combined="batch"),
        "row sums": Normalize(by="group", group_ids=shuffled.int(), over="row_sums", combined="group"),
    }


@pytest.mark.parametrize("kind", ["size", "ids", "offsets", "batch", "row sums"])
@pytest.mark.parametrize("level", [*LEVELS, "group"])
def test_normalised_calls_neither_synchronise_nor_leave_their_stream(level, kind):
    normalize = kinds_of_groups(64)[kind]
    if level == "group" and kind == "batch":
        normalize = Normalize(by="batch", group_size=4)
    problem = on_gpu(level=level, normalize=normalize)
    expected = combine(problem.values, **problem.options)
    late, stream = torch.zeros_like(problem.values), torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            late.copy_(problem.values)
            result = combine(late, **problem.options)
            assert not stream.query(), "the call waited for the stream"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert_same_result(result, expected)


@pytest.mark.parametrize("kind", ["size", "ids", "offsets", "batch", "row sums"])
def test_normalised_calls_are_captured(kind):
    problem, other = on_gpu(seed=1), on_gpu(seed=2)
    options = {**problem.options, "normalize": kinds_of_groups(64)[kind], "level": "batch"}
    values = problem.values.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        combine(values, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written = combine(values, **options)
    for source in (problem.values, other.values):
        values.copy_(source)
        graph.replay()
        assert_same_result(written, combine(source, **options))


@pytest.mark.parametrize("kind", ["size", "ids", "offsets", "batch", "row sums"])
@pytest.mark.parametrize("shape", [(4096, 3), (64, 4099, 2), (8, 20_000, 3), (20_000, 8)], ids=str)
def test_large_normalised_problems_match_and_repeat(shape, kind):
    problem = make(shape, draw=normal).to(CUDA)
    problem = problem.but(normalize=kinds_of_groups(shape[0])[kind])
    first = combine(problem.values, **problem.options)
    host = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in problem.options.items()}
    described = problem.options["normalize"]
    moved = {k: v.cpu() for k in ("group_ids", "group_offsets") if (v := getattr(described, k)) is not None}
    host["normalize"] = dataclasses.replace(described, **moved)
    expected = combine(problem.values.cpu(), **host)
    for name, ours, theirs in zip(first.stats._fields, first.stats, expected.stats, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-4, msg=name)
    for _ in range(3):
        assert_same_result(combine(problem.values, **problem.options), first)


def test_offsets_that_lie_never_leave_the_batch():
    """They are not looked at on a GPU; what comes out is undefined, but no memory beyond the tensors is touched."""
    for values in ([0, 1000, -5, 64], [7, 3], [0, 1 << 40, 64]):
        normalize = Normalize(by="group", group_offsets=torch.tensor(values, device=CUDA))
        for level in ("batch", "group"):
            combine(on_gpu().values, normalize=normalize, level=level)
    torch.cuda.synchronize()


@pytest.mark.parametrize("n", [1, 3, 4, 5, 8, 10, 44, 45, 64])
def test_min_norm_is_that_of_the_cpu(n):
    """Of more problems than there are teams of lanes for; beyond 44 there is no room for one in shared memory."""
    shape = (50_000 if n < 9 else 3_000, n, n + 9)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    x[::3, -1] = x[::3, 0]
    gramian = x @ x.mT
    torch.testing.assert_close(min_norm(gramian.to(CUDA)).cpu(), min_norm(gramian), rtol=1e-9, atol=1e-12)
    problem = make((40, 30, min(n, 17)), torch.float64, draw=normal, solver="min_norm")
    moved = problem.to(CUDA)
    ours = combine(moved.values, **moved.options).weights.cpu()
    torch.testing.assert_close(ours, combine(problem.values, **problem.options).weights, rtol=1e-7, atol=1e-9)


TIERS = {"block": (8, 100, 3), "cluster": (8, 1000, 3), "grid": (8, 20_000, 3)}  # see csrc/cuda/combine.cu


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("tier", TIERS)
def test_a_thousand_replays_with_other_inputs(tier, level):
    problem = make(TIERS[tier], draw=normal, level=level).to(CUDA)
    values = problem.values.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        combine(values, **problem.options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written = combine(values, **problem.options)
    inputs = [problem.values * scale for scale in (1.0, -0.5, 2.0, 0.25)]
    expected = [combine(x, **problem.options) for x in inputs]
    for k in range(1000):
        values.copy_(inputs[k % 4])
        graph.replay()
        if k % 100 < 4:
            assert_same_result(written, expected[k % 4])


@pytest.mark.parametrize("tier", TIERS)
def test_ten_thousand_calls_hold_no_memory(tier):
    problem = make(TIERS[tier], draw=normal).to(CUDA)
    for _ in range(10):
        combine(problem.values, **problem.options)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(10_000):
        combine(problem.values, **problem.options)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


def test_autocast_changes_nothing():
    problem = on_gpu()
    expected = combine(problem.values, **problem.options)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert_same_result(combine(problem.values, **problem.options), expected)


@pytest.mark.parametrize("level", LEVELS)
def test_repeats_under_load_from_another_stream(level):
    problem = make((64, 4096, 3), draw=normal, level=level).to(CUDA)
    first = combine(problem.values, **problem.options)
    busy = torch.randn(2048, 2048, device=CUDA)
    stream = torch.cuda.Stream()
    for k in range(200):
        with torch.cuda.stream(stream):
            busy = busy @ busy / 64
        again = combine(problem.values, **problem.options)
        if k % 10 == 0:
            assert_same_result(again, first)
    torch.cuda.synchronize()


def test_reduce_overhead():
    """torch.compile's own CUDA graphs, with other inputs each time."""
    problem, other = on_gpu(), on_gpu(seed=5)
    compiled = torch.compile(lambda x, **options: combine(x, **options).advantages * 2, mode="reduce-overhead")
    for source in (problem.values, other.values, problem.values, other.values):
        torch.compiler.cudagraph_mark_step_begin()
        got = compiled(source, **problem.options).clone()
        assert_same_bits(got, combine(source, **problem.options).advantages * 2)


@pytest.mark.parametrize("tier", TIERS)
def test_streams_at_once(tier):
    problem = make(TIERS[tier], draw=normal).to(CUDA)
    expected = combine(problem.values, **problem.options)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for k in range(40):
        with torch.cuda.stream(streams[k % 4]):
            results.append(combine(problem.values, **problem.options))
    torch.cuda.synchronize()
    for result in results:
        assert_same_result(result, expected)
