"""The CUDA kernel's own source, compiled for the host and run there: its logic is tested where there is no GPU.

See tests/cuda_on_host/cuda_runtime.h. What it cannot show is what only a device has: memory spaces, launches, streams.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch
from compare import assert_close, assert_same_bits
from hypothesis import strategies as st
from on_host import ROOT, compiled, needs_compiler

from pama_ext import Normalize, reference

LEVELS = ("batch", "sequence", "token")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # in the order of pama::DType
PLACES = {"last": -1, "first": 0, "middle": 1}  # in the order of combine_on_host.cpp
ORDERS = (0, 1, 7)  # of the threads of a block: ascending, descending, shuffled

pytestmark = needs_compiler


def build(folder: Path, cuda: Path) -> Callable[..., int]:
    """The kernels of the folder ``cuda`` as a library of the host."""
    kernels = (f'-DCOMBINE_CU="{cuda}/combine.cu"', f'-DNORMALIZE_CU="{cuda}/normalize.cu"', f"-I{cuda}")
    sources = ("tests/cuda_on_host/combine_on_host.cpp", "csrc/combine_plan.cpp", "csrc/normalize.cpp")
    return opened(compiled(folder / "combine_on_host.so", *kernels, *(str(ROOT / source) for source in sources)))


def opened(loaded: ctypes.CDLL) -> Callable[..., int]:
    loaded.combine_on_host.library = loaded._name
    loaded.combine_on_host.use_device = loaded.use_device
    loaded.combine_on_host.meeting = loaded.last_meeting
    loaded.combine_on_host.access = loaded.last_access
    loaded.combine_on_host.launches = loaded.last_launches
    return loaded.combine_on_host


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., int]:
    return build(tmp_path_factory.mktemp("host"), ROOT / "csrc/cuda")


def run(kernel, advantages, mask, log_ratio, order, *, level, solver="closed_form", noon=True, nan="ignore",
        skip_inactive=False, reward_weights=None, in_place=False, normalize=None, objectives="last", offset=0,
        offsets=(0, 0, 0), transposed=False):  # fmt: skip
    """The advantages (in place: the shares) and the packed results, and the number of blocks that made them.

    ``objectives``: where they stand in memory; ``offset``: so many elements beyond an aligned address; ``offsets``: the
    same of mask, log_ratio and the result, which may stand ``transposed``.
    """
    n, rows = advantages.shape[-1], solves(advantages.shape[0], level, normalize)
    groups = None if normalize is None or normalize._groups is None else normalize._groups.long().contiguous()
    compute = torch.float64 if advantages.dtype == torch.float64 else torch.float32

    around = []

    def beyond(offset, shape, dtype):
        memory = torch.full((math.prod(shape) + offset + 16,), float("nan"), dtype=dtype)
        around.append((memory[:offset], memory[offset + math.prod(shape) :]))
        return memory[offset:][: math.prod(shape)].view(shape)

    memory = beyond(offset, advantages.shape, advantages.dtype)
    dim = PLACES[objectives]
    advantages = memory.view(advantages.movedim(-1, dim).shape).movedim(dim, -1).copy_(advantages)
    mask, log_ratio = (
        t if t is None else beyond(offset, t.shape, t.dtype).copy_(t)
        for t, offset in zip((mask, log_ratio), offsets[:2], strict=True)
    )
    out = None if in_place else beyond(offsets[2], advantages.shape[:-1], advantages.dtype)
    out = out.view(out.shape[::-1]).t() if transposed else out
    packed = beyond(0, (10 * n + rows * (n + 1),), compute)
    rewards = None if reward_weights is None else (ctypes.c_double * n)(*reward_weights)
    problem = ctypes.c_char_p()
    # torch knows no address of an empty tensor, and none is none to the kernel
    pointers = [None if t is None else ctypes.c_void_p(t.data_ptr() or 64) for t in (mask, log_ratio, out, packed)]
    blocks = kernel(
        ctypes.c_void_p(advantages.data_ptr()), DTYPES.index(advantages.dtype), (ctypes.c_int64 * 3)(*advantages.shape),
        *pointers, rewards, level.encode(), solver.encode(), (normalize._spec if normalize else "").encode(),
        None if groups is None else ctypes.c_void_p(groups.data_ptr()),
        ctypes.c_int64(0 if groups is None else len(groups)), noon, nan == "propagate", skip_inactive,
        list(PLACES).index(objectives), transposed, order,
        ctypes.byref(problem),
    )  # fmt: skip
    assert blocks > 0, problem.value
    assert all(x.isnan().all() or x.dtype == torch.bool for pair in around for x in pair), "written beyond a tensor"
    return (advantages if in_place else out), packed, blocks


def solves(rows: int, level: str, normalize: Normalize | None) -> int:
    if level != "group" or normalize is None:
        return rows if level == "sequence" else 1
    if normalize.group_size is not None:
        return rows // normalize.group_size
    return rows if normalize.group_offsets is None else len(normalize.group_offsets) - 1


def problem(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    advantages = torch.randn(shape, generator=generator)
    mask = torch.rand(shape[:-1], generator=generator) < 0.7
    advantages[torch.rand(shape, generator=generator) < 0.02] = float("inf")
    advantages[~mask] = float("nan")
    return advantages.to(dtype), mask, torch.randn(shape[:-1], generator=generator) * 0.3


def packed_reference(advantages, mask, log_ratio, in_place=False, **options):
    shares = advantages.clone()
    result = (reference.combine_ if in_place else reference.combine)(shares, mask=mask, log_ratio=log_ratio, **options)
    return (shares if in_place else result.advantages), torch.cat(
        [*result.stats, result.weights.flatten(), result.value.flatten()]
    )


def assert_results(actual, advantages, mask, log_ratio, **options):
    """Combined advantages and packed results against float64; sums round by the size of what is summed."""
    finite = advantages[mask][advantages[mask].isfinite()].abs()
    largest = finite.amax() if finite.numel() else torch.zeros(())
    exact = packed_reference(advantages.double(), mask, log_ratio, **options)
    eager = packed_reference(advantages, mask, log_ratio, **options)
    for ours, truth, same_dtype, what in zip(actual, exact, eager, ("advantages", "packed"), strict=True):
        assert_close(ours, truth, same_dtype, magnitude=torch.maximum(truth.abs(), largest), what=what)


CASES = [
    {"noon": noon, "skip_inactive": skip, "solver": solver, "reward_weights": rewards}
    for noon, skip, (solver, rewards) in itertools.product(
        (True, False), (True, False), (("closed_form", None), ("closed_form", 1.5), ("fixed", 0.5))
    )
]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(v) for v in case.values()))
def test_one_block_computes_the_reference(kernel, level, case):
    advantages, mask, log_ratio = problem((4, 90, 3))
    rewards = None if case["reward_weights"] is None else [case["reward_weights"], 1.0, -0.25]
    options = {**case, "level": level, "reward_weights": rewards}
    combined, packed, blocks = run(kernel, advantages, mask, log_ratio, 0, **options)
    assert blocks == 1
    assert_results((combined, packed), advantages, mask, log_ratio, **options)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_blocks_compute_the_reference_in_any_order_of_threads(kernel, level, dtype):
    advantages, mask, log_ratio = problem((9, 307, 4), dtype)
    first = None
    for order in ORDERS:
        combined, packed, blocks = run(kernel, advantages, mask, log_ratio, order, level=level)
        assert blocks > 1
        first = first or (combined, packed)
        assert_same_bits(combined, first[0])
        assert_same_bits(packed, first[1])
    assert_results(first, advantages, mask, log_ratio, level=level)


@pytest.mark.parametrize("level", LEVELS)
def test_in_place_and_propagate(kernel, level):
    advantages, mask, log_ratio = problem((9, 307, 4))
    options = {"level": level, "nan": "propagate", "noon": False}
    shares, packed, _ = run(kernel, advantages, mask, log_ratio, 0, in_place=True, **options)
    exact = advantages.double()
    reference.combine_(exact, mask=mask, log_ratio=log_ratio, **options)
    eager = advantages.clone()
    reference.combine_(eager, mask=mask, log_ratio=log_ratio, **options)
    assert_close(shares, exact, eager)
    exact, eager = (packed_reference(a, mask, log_ratio, **options)[1] for a in (advantages.double(), advantages))
    assert_close(packed, exact, eager)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(0, 5, 2), (5, 0, 2), (1, 1, 1), (3, 70, 64)], ids=str)
def test_awkward_shapes(kernel, level, shape):
    advantages, mask, log_ratio = problem(shape)
    combined, packed, _ = run(kernel, advantages, mask, log_ratio, 0, level=level)
    assert_results((combined, packed), advantages, mask, log_ratio, level=level)


@pytest.fixture
def device(kernel):
    """Imitates a device: compute capability, shared memory and number of multiprocessors, second-level cache."""

    def use(capability=9, shared=228 * 1024, multiprocessors=2, cache=50 << 20):
        kernel.use_device(capability, shared, multiprocessors, cache)

    yield use
    use()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("memory", ["last", "first", "last, unaligned", "first, unaligned"])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 9, 16, 17, 64])
def test_every_access_and_number_of_objectives(kernel, device, n, memory, in_place, level):
    """16 bytes at a time or not, tiles that a block loads a second time, rows that are no multiple of 16 bytes."""
    device(9, 100 * 1024)
    for dtype in DTYPES:
        advantages, mask, log_ratio = problem((7, 2501 // n + 40, n), dtype)
        options = {"level": level, "nan": "ignore"}
        where = {"in_place": in_place, "objectives": memory.partition(",")[0], "offset": int("unaligned" in memory)}
        got, packed, _ = run(kernel, advantages, mask, log_ratio, 7, **where, **options)
        assert_results((got, packed), advantages, mask, log_ratio, in_place=in_place, **options)


@pytest.mark.parametrize("level", [*LEVELS, "group"])
def test_a_cluster_and_a_grid_meet_alike(kernel, device, level):
    advantages, mask, log_ratio = problem((12, 900, 3))
    results = []
    for capability in (9, 8):
        device(capability, 228 * 1024)
        results.append(run(kernel, advantages, mask, log_ratio, 1, level=level, normalize=Normalize(group_size=4)))
        assert kernel.meeting() == (1 if capability == 9 else 2)  # pama::Meeting
    assert 1 < results[0][2] == results[1][2] <= 8
    for in_cluster, in_grid in zip(results[0][:2], results[1][:2], strict=True):
        assert_same_bits(in_cluster, in_grid)
    assert_results(results[0][:2], advantages, mask, log_ratio, level=level, normalize=Normalize(group_size=4))


@pytest.mark.parametrize("memory", ["last", "first", "last, unaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_what_is_left_out_where_nobody_asks_for_it_changes_nothing(kernel, level, dtype, memory):
    """Weights of 1 take the general way through the entries; without them a shorter one is taken, to the same bits."""
    where = {"objectives": memory.partition(",")[0], "offset": int("unaligned" in memory)}
    where["in_place"] = level == "batch"  # otherwise another kernel does it
    for shape in ((9, 307, 4), (3, 29, 2)):
        inputs = problem(shape, dtype)
        n = shape[-1]
        plain, general = (
            run(kernel, *inputs, 7, level=level, reward_weights=weights, **where) for weights in (None, [1.0] * n)
        )
        assert_same_bits(plain[0], general[0])
        stats = slice(None, 10 * n if level == "token" else None)  # shares of tokens are added up in another order
        assert_same_bits(plain[1][stats], general[1][stats])
        torch.testing.assert_close(plain[1], general[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("memory", ["last", "first", "last, unaligned"])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 32, 33])
def test_plain_calls(kernel, n, memory):
    """One slice to sixteen of them, one block or two; 33 objectives are too many."""
    where = {"objectives": memory.partition(",")[0], "offset": int("unaligned" in memory)}
    weights = [0.5, -2.0, 0.0, *[1.0 / n] * n][:n]
    sizes = (1, 31, 64, 129, 300, 8192 // n, 9000 // n)
    for tokens, dtype in itertools.zip_longest(sizes, DTYPES, fillvalue=torch.float32):
        inputs = problem((1, tokens, n), dtype)
        inputs[1][0, 0] = True
        inputs[0][0, 0] = 0.5
        for options in ({}, {"skip_inactive": True}, {"solver": "fixed", "reward_weights": weights}):
            got, packed, _ = run(kernel, *inputs, 7, level="batch", **options, **where)
            assert_results((got, packed), *inputs, level="batch", **options)


@pytest.mark.parametrize("capability", [8, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_calls_of_several_blocks(kernel, device, dtype, capability):
    """Blocks that meet in a cluster or a grid, and that may have nothing to do; in any order of threads."""
    device(capability, 228 * 1024)
    for shape in ((3, 911, 4), (7, 1499, 3), (1, 900, 10), (2, 11000, 1), (4500, 1, 7), (1, 600, 16)):
        inputs = problem(shape, dtype)
        first = None
        for order in ORDERS:
            got, packed, blocks = run(kernel, *inputs, order, level="batch")
            assert blocks == 2
            assert kernel.launches() == 1
            assert kernel.meeting() == (1 if capability == 9 else 2)  # pama::Meeting
            first = first or (got, packed)
            assert_same_bits(got, first[0])
            assert_same_bits(packed, first[1])
        assert_results(first, *inputs, level="batch")


@pytest.mark.parametrize("capability", [8, 9])
@pytest.mark.parametrize(
    ("tokens", "n", "expected"), [(6000, 3, 3), (12000, 5, 8), (29000, 3, 22), (66 * 256, 16, 66), (2100, 32, 17)]
)
def test_plain_calls_of_many_blocks(kernel, device, tokens, n, expected, capability):
    """More of them than a warp of each slice looks at in one turn, and clusters of more than two."""
    device(capability, multiprocessors=66)
    inputs = problem((1, tokens, n))
    first = None
    for order in ORDERS:
        got, packed, blocks = run(kernel, *inputs, order, level="batch")
        assert blocks == expected
        assert kernel.meeting() == (1 if capability == 9 and blocks <= 8 else 2)  # pama::Meeting
        first = first or (got, packed)
        assert_same_bits(got, first[0])
        assert_same_bits(packed, first[1])
    assert_results(first, *inputs, level="batch")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 10])
def test_no_layout_changes_a_bit_of_plain_calls(kernel, n, dtype):
    """Objectives that 16 bytes are read of at once, or not; what stands beside them likewise; one block and two."""
    for rows, tokens in ((1, 8), (2, 350), (1, 701), (3, 1400)):
        inputs = problem((rows, tokens, n), dtype)
        expected = None
        alone = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1))
        besides = (True, alone[0]), *((False, offsets) for offsets in alone)
        for objectives, offset, (transposed, offsets) in itertools.product(PLACES, (0, 1), besides):
            where = {"objectives": objectives, "offset": offset, "offsets": offsets, "transposed": transposed}
            got, packed, _ = run(kernel, *inputs, 7, level="batch", **where)
            apart = {"last": 0, "first": rows * tokens, "middle": tokens if rows == 1 else 0}[objectives]
            planes = n == 1 or (apart and apart * dtype.itemsize % 16 == 0)
            side_by_side = n > 1 and objectives == "last"
            assert kernel.access() == (0 if offset else 2 if planes else side_by_side)  # pama::Access
            expected = expected or (got, packed)
            assert_same_bits(got, expected[0])
            assert_same_bits(packed, expected[1])
        assert_results(expected, *inputs, level="batch")


def test_plain_calls_that_the_second_level_cache_does_not_hold(kernel, device):
    """Half of it at most: the general kernel reads device memory less often."""
    inputs = problem((1, 10_000, 3))
    for cache, expected in ((2 * 10_000 * 17, 2), (2 * 10_000 * 17 - 2, 4)):
        device(cache=cache)
        got, packed, blocks = run(kernel, *inputs, 1, level="batch")
        assert blocks == expected
        assert_results((got, packed), *inputs, level="batch")


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.data())
def test_plain_calls_permute_with_their_objectives(kernel, data):
    """Statistics and weights to the last bit, ties among them; weights share 1 among the smallest scalars."""
    n, tokens = data.draw(st.integers(1, 16)), data.draw(st.integers(0, 700))
    dtype = data.draw(st.sampled_from(DTYPES[:2]))
    advantages, mask, log_ratio = problem((1, tokens, n), dtype)
    copies = data.draw(
        st.lists(st.integers(0, n - 1), min_size=n, max_size=n)
    )  # some objectives twice, some not at all
    advantages = advantages[..., copies].contiguous()
    order = data.draw(st.permutations(range(n)))
    _, packed, _ = run(kernel, advantages, mask, log_ratio, 1, level="batch")
    _, permuted, _ = run(kernel, advantages[..., order].contiguous(), mask, log_ratio, 7, level="batch")
    assert_same_bits(permuted[:-1].view(11, n), packed[:-1].view(11, n)[:, list(order)])
    assert_same_bits(permuted[-1], packed[-1])
    weights, scalars, count = packed[10 * n : -1], packed[7 * n : 8 * n], packed[:n]
    smallest = scalars == scalars[count > 0].min() if (count > 0).any() else count == 0
    smallest &= (count > 0) | (count == 0).all()
    torch.testing.assert_close(weights, smallest.to(weights.dtype) / smallest.sum())
    assert packed[-1] == scalars[smallest][0]


@pytest.mark.parametrize("seed", range(3))
def test_plain_calls_meet_alike_wherever_they_do(kernel, device, seed):
    """One block or several, in a cluster or the grid: the same counts and extremes, the same sums to rounding."""
    generator = torch.Generator().manual_seed(seed)
    advantages = torch.randn((1, 2700, 3), generator=generator, dtype=torch.float64) * 2.0**seed
    mask = torch.rand((1, 2700), generator=generator) < 0.5
    log_ratio = torch.randn((1, 2700), generator=generator) * 0.3
    whole = run(kernel, advantages, mask, log_ratio, 1, level="batch")[1].view(-1)
    for capability in (8, 9):
        device(capability, 228 * 1024)
        more = torch.zeros((1, 700, 3), dtype=torch.float64)  # behind the mask, enough for another block
        longer = torch.cat([advantages, more], 1), torch.cat([mask, torch.zeros(1, 700, dtype=torch.bool)], 1)
        _, packed, blocks = run(kernel, *longer, torch.cat([log_ratio, torch.zeros(1, 700)], 1), 1, level="batch")
        assert blocks == 2
        torch.testing.assert_close(packed, whole, rtol=1e-13, atol=1e-13)
        for k in (0, 3, 4, 5, 6, 8, 9):  # count, min, max, shares, nonfinite, dead
            assert_same_bits(packed[3 * k : 3 * k + 3], whole[3 * k : 3 * k + 3])


@pytest.mark.parametrize("objectives", PLACES)
@pytest.mark.parametrize("offset", [0, 1])
def test_plain_calls_of_several_blocks_and_all_they_may_ask_for(kernel, objectives, offset):
    """Without mask or log_ratio, with an objective that is never active, and with weights that are given."""
    advantages, mask, log_ratio = problem((5, 701, 3))
    advantages = advantages.nan_to_num(0.5, 0.5, 0.5)
    advantages[..., 1] = -advantages[..., 1].abs()
    everywhere, nowhere = torch.ones_like(mask), torch.zeros_like(log_ratio)
    for given_mask, given_ratio in ((mask, log_ratio), (None, log_ratio), (mask, None), (None, None)):
        for options in ({}, {"skip_inactive": True}, {"solver": "fixed", "reward_weights": [0.0, 2.0, -1.0]}):
            got, packed, blocks = run(
                kernel,
                advantages,
                given_mask,
                given_ratio,
                7,
                level="batch",
                objectives=objectives,
                offset=offset,
                **options,
            )
            assert blocks == 2
            assert kernel.launches() == 1
            assert packed.isfinite().all()
            assert_results(
                (got, packed),
                advantages,
                everywhere if given_mask is None else mask,
                nowhere if given_ratio is None else log_ratio,
                level="batch",
                **options,
            )


@pytest.mark.parametrize("tokens", [60, 4000])
def test_fixed_weights_beyond_float32(kernel, tokens):
    """s* is their sum in double: an objective whose scalar is 0 adds 0 to it, whatever its weight."""
    advantages, mask, log_ratio = problem((1, tokens, 3))
    advantages = advantages.nan_to_num(0.5, 0.5, 0.5)
    advantages[..., 0] = -1.0
    _, packed, _ = run(kernel, advantages, mask, log_ratio, 1, level="batch", solver="fixed",
                       reward_weights=[1e39, 2.0, 3.0])  # fmt: skip
    scalars = packed[7 * 3 : 8 * 3]
    assert scalars[0] == 0
    torch.testing.assert_close(packed[-1], 2 * scalars[1] + 3 * scalars[2])


@pytest.mark.parametrize(("kilobytes", "offset"), [(228, 0), (100, 0), (100, 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_much_as_the_chip_holds(kernel, device, dtype, kilobytes, offset):
    """192 KB of planes for each of two blocks, or what they may have; a token more goes to the general kernel."""
    device(9, kilobytes * 1024)
    n, found = 3, 64 * (64 if dtype == torch.float64 else 40) + 16  # what warps and blocks find, and a flag
    room = min(192, kilobytes - 1) * 1024 - found
    most = 2 * ((room // n - 16) // dtype.itemsize // 32 * 32)  # 16 bytes behind each plane
    for tokens, expected in ((most, 2), (most + 1, 4)):
        inputs = problem((1, tokens, n), dtype)
        got, packed, blocks = run(kernel, *inputs, 1, level="batch", offset=offset)
        assert blocks == expected
        assert kernel.launches() == 1
        assert packed[:n].tolist() == (inputs[0].isfinite() & inputs[1][..., None]).sum((0, 1)).tolist()
        assert_results((got, packed), *inputs, level="batch")


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("valid", ["none", "one", "one of an objective", "the last block's"])
def test_plain_calls_with_little_to_see(kernel, n, valid):
    """Blocks without a valid entry, and objectives without one, take no part; std of one entry is 0."""
    advantages, mask, log_ratio = problem((1, 11000 // n, n))
    advantages = advantages.nan_to_num(0.5, 0.5, 0.5).abs() + 0.1
    mask[:] = False
    if valid == "one":
        mask[0, 5] = True
    if valid == "one of an objective":
        mask[0, 5] = True
        advantages[0, 5, 0] = torch.nan
    if valid == "the last block's":
        mask[0, -100:] = True
    for options in ({}, {"skip_inactive": True}, {"solver": "fixed"}):
        got, packed, blocks = run(kernel, advantages, mask, log_ratio, 7, level="batch", **options)
        assert blocks == 2
        assert packed.isfinite().all()
        assert torch.equal(packed[:n], (mask[..., None] & advantages.isfinite()).sum((0, 1)).float())
        if valid != "the last block's":
            assert torch.equal(packed[2 * n : 3 * n], torch.zeros(n))
        if mask.any() and (packed[:n] > 0).any():
            assert_results((got, packed), advantages, mask, log_ratio, level="batch", **options)
        else:
            assert torch.equal(packed[10 * n : 11 * n], torch.full((n,), 1 / n))
            assert torch.equal(got, torch.zeros_like(got))


def test_what_is_left_to_the_general_kernel(kernel):
    """More than what fits on the chip, or anything unusual, gives other blocks and the same result."""
    for shape, options in (((4, 600, 3), {"nan": "propagate"}), ((4, 600, 3), {"noon": False}),
                           ((4, 600, 3), {"reward_weights": [1.0] * 3}), ((1, 40_000, 3), {}),
                           ((1, 120, 33), {}), ((1, 600, 33), {})):  # fmt: skip
        inputs = problem(shape)
        inputs = (inputs[0].nan_to_num(0.5, 0.5, 0.5), *inputs[1:])
        got, packed, blocks = run(kernel, *inputs, 1, level="batch", **options)
        assert blocks == (1 if math.prod(shape) <= 4096 else 4)
        assert_results((got, packed), *inputs, level="batch", **options)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(1, 40, 7), (1, 1100, 5), (9, 307, 5)], ids=str)
def test_equal_objectives_get_equal_bits(kernel, shape, level):
    """Slices have the same tokens for every objective, wherever it stands."""
    advantages, mask, log_ratio = problem((*shape[:-1], 1))
    advantages = advantages.expand(shape).contiguous()
    _, packed, _ = run(kernel, advantages, mask, log_ratio, 7, level=level)
    statistics = packed[: 10 * shape[-1]].view(10, -1)
    assert_same_bits(statistics, statistics[:, :1].expand_as(statistics))
    torch.testing.assert_close(packed[10 * shape[-1] :][: shape[-1]], torch.full((shape[-1],), 1 / shape[-1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e18, 1e36])
def test_plain_calls_of_extreme_size(kernel, scale, dtype):
    """Sums and squares of one slice that leave the range of float32: finite or inf, as the general way says."""
    advantages, mask, log_ratio = problem((1, 200, 3))
    advantages = (advantages * scale).to(dtype)
    ours, general = (
        run(kernel, advantages, mask, log_ratio, 1, level="batch", reward_weights=weights)
        for weights in (None, [1.0] * 3)
    )
    torch.testing.assert_close(ours[0], general[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours[1], general[1], rtol=1e-5, atol=0)


@hypothesis.settings(max_examples=100)
@hypothesis.given(st.data())
def test_any_problem(kernel, data):
    """Whatever is asked for, in any order of threads; objectives differ in size, so that rounding decides nothing."""
    draw = data.draw
    shape = (draw(st.integers(0, 5)), draw(st.integers(0, 70)), draw(st.integers(1, 19)))
    dtype, level = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LEVELS))
    advantages, mask, log_ratio = problem(shape, dtype)
    advantages = advantages * torch.linspace(1, 2, shape[-1]).to(dtype)
    options = {
        "level": level,
        "noon": draw(st.booleans()),
        "nan": draw(st.sampled_from(["ignore", "ignore", "propagate"])),
        "solver": draw(st.sampled_from(["closed_form", "fixed"])),
        "skip_inactive": draw(st.booleans()),
        "in_place": draw(st.booleans()),
    }
    if options["nan"] == "propagate":
        advantages = advantages.nan_to_num(0.5, 0.5, 0.5)
    where = {"objectives": draw(st.sampled_from(list(PLACES))), "offset": draw(st.integers(0, 2))}
    got, packed, _ = run(kernel, advantages, mask, log_ratio, draw(st.integers(0, 9)), **options, **where)
    assert_results((got, packed), advantages, mask, log_ratio, **options)


@pytest.mark.parametrize("level", LEVELS)
def test_rows_of_any_length(kernel, level):
    """Quads of tokens that a tile, the mask or the result cut in any place."""
    for tokens in (1, 2, 3, 4, 5, 31, 33, 127, 129, 1023, 1025):
        advantages, mask, log_ratio = problem((1, tokens, 3))
        mask[0, 0] = True
        advantages[0, 0] = 0.5
        got, packed, _ = run(kernel, advantages, mask, log_ratio, 1, level=level)
        assert_results((got, packed), advantages, mask, log_ratio, level=level)


@pytest.mark.parametrize("solver", ["closed_form", "min_norm", "fixed"])
def test_tokens_of_which_none_or_some_are_valid(kernel, solver):
    """The solve of tokens without a valid entry, with one, and with ties at 0 behind the gate."""
    advantages, mask, log_ratio = problem((6, 130, 3))
    advantages = advantages.nan_to_num(0, 0, 0).abs()
    for name in ("none", "first", "last", "gated"):
        mask[:] = name == "gated"
        mask[0, 0], mask[-1, -1] = name == "first" or name == "gated", name == "last" or name == "gated"
        log_ratio[:] = 1.0 if name == "gated" else 0.0  # beyond the clip: I(A) is 0 for all
        got, packed, _ = run(kernel, advantages, mask, log_ratio, 1, level="token", solver=solver)
        assert_results((got, packed), advantages, mask, log_ratio, level="token", solver=solver)


@pytest.mark.parametrize("level", ["batch", "token"])
@pytest.mark.parametrize("valid", [1, 640])
def test_blocks_may_be_far_from_the_first(kernel, level, valid):
    """In the first block stands what differs from all others, in one token or in most."""
    advantages, mask, log_ratio = problem((9, 307, 4), torch.float64)
    advantages, flat = advantages.nan_to_num(0, 0, 0) + 0.1, mask.view(-1)
    flat[:] = True
    flat[valid:704] = False
    advantages.view(-1, 4)[:valid] += 1234567.89
    for options in ({"level": level}, {"level": level, "reward_weights": [1.0] * 4}):
        combined, packed, blocks = run(kernel, advantages, mask, log_ratio, 0, **options)
        assert blocks in (2, 4)  # of 704 tokens, or twice as many
        assert_results((combined, packed), advantages, mask, log_ratio, **options)


@pytest.mark.parametrize("n", [3, 20])
def test_a_tile_that_left_is_read_again(kernel, device, n):
    """A block with more tokens than its shared memory holds computes what one with room for all of them does."""
    advantages, mask, log_ratio = problem((5, 60000 // n, n))
    results = []
    for kilobytes in (96, 600):
        device(9, kilobytes * 1024)
        results.append(run(kernel, advantages, mask, log_ratio, 0, level="batch"))
    assert_same_bits(results[0][0], results[1][0])
    for packed in (results[0][1], results[1][1]):
        assert_results((results[0][0], packed), advantages, mask, log_ratio, level="batch")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 33, 256, 257])
@pytest.mark.parametrize("n", [1, 3, 64])
def test_pools_of_every_size(kernel, n, size):
    """Several to a tile, one to a tile, several tiles to one."""
    advantages, mask, log_ratio = problem((40, size, n))
    for in_place in (False, True):
        got = run(kernel, advantages, mask, log_ratio, 7, level="sequence", in_place=in_place)
        assert_results(got[:2], advantages, mask, log_ratio, level="sequence", in_place=in_place)


@pytest.mark.parametrize(
    ("file", "before", "options"),
    [
        ("scan.cuh", "void merge_slices() {\n    ", {"in_place": True}),
        ("block.cuh", "number_groups(group, count);\n    ", {"normalize": Normalize(by="group", group_size=8)}),
        ("scan.cuh", "% lanes, lanes);\n    }\n    ", {"normalize": Normalize(by="group", group_size=8)}),
        ("scan.cuh", "parts[e] = sum;\n    }\n    ", {"solver": "min_norm"}),
        ("direct.cuh", "keep(look());\n    ", {}),
        ("direct.cuh", "make_planes();\n      ", {"offset": 1}),
        ("direct.cuh", "keep_spread(spread(centre()));\n    ", {}),
    ],
    ids=[
        "slices",
        "groups, before",
        "groups, after",
        "Gram matrices",
        "direct, first",
        "direct, planes",
        "direct, second",
    ],
)
def test_a_missing_barrier_is_noticed(tmp_path, file, before, options):
    """The negative control: without the barrier before what warps have found is merged, the order of threads shows."""
    broken = shutil.copytree(ROOT / "csrc/cuda", tmp_path / "cuda")
    source = (broken / file).read_text()
    assert source.count(f"{before}__syncthreads();") == 1
    (broken / file).write_text(source.replace(f"{before}__syncthreads();", before))
    kernel = build(tmp_path, broken)
    results = [run(kernel, *problem((800, 3, 3)), order, level="batch", **options)[1] for order in ORDERS]
    assert any(not torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(
    ("where", "tokens", "kilobytes"),
    [({"offsets": (0, 0, 1)}, 4000, 228), ({}, 9000, 228), ({"offset": 1}, 90_000, 100)],
    ids=["unaligned", "left half-way", "too much"],
)
def test_what_a_gpu_would_stop_at_stops_the_host(broken_library, where, tokens, kilobytes):
    """The negative control: 16 bytes stored where they must not be, a cluster's barrier that nobody waits at, and more
    shared memory than there is."""
    call = f"""
        import test_cuda_on_host as here
        kernel = here.opened(here.ctypes.CDLL({broken_library!r}))
        kernel.use_device(9, {kilobytes} * 1024, 2, 50 << 20)
        here.run(kernel, *here.problem((1, {tokens}, 1)), 0, level="batch", **{where})
    """
    command = [sys.executable, "-c", textwrap.dedent(call)]
    assert subprocess.run(command, cwd=Path(__file__).parent, check=False, capture_output=True).returncode < 0


@pytest.fixture(scope="module")
def broken_library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    cuda = shutil.copytree(ROOT / "csrc/cuda", folder / "cuda")
    for file, right, wrong in (
        ("direct.cuh", " && reinterpret_cast<uintptr_t>(out) % kBytes == 0", ""),
        ("direct.cuh", "    if (p.meeting == Meeting::kCluster) cluster().barrier_wait();\n", ""),
        ("combine.cu", "std::min(attribute_of<cudaDevAttrMaxSharedMemoryPerBlockOptin>(p.device.index), kDirectBytes)",
         "kDirectBytes"),
    ):  # fmt: skip
        source = (cuda / file).read_text()
        assert source.count(right) == 1
        (cuda / file).write_text(source.replace(right, wrong))
    return build(folder, cuda).library


def grouped(kind: str, rows: int) -> dict:
    ids = torch.arange(rows) // 3
    return {
        "size": {"group_size": 3},
        "ids": {"group_ids": ids[torch.randperm(rows, generator=torch.Generator().manual_seed(2))] * 1000003 - 7},
        "offsets": {"group_offsets": torch.tensor([0, 1, 1, 4, rows])},
    }[kind]


@pytest.mark.parametrize("level", ["batch", "sequence", "group", "token"])
@pytest.mark.parametrize("kind", ["size", "ids", "offsets"])
@pytest.mark.parametrize("over", ["tokens", "row_sums"])
@pytest.mark.parametrize("pools", ["group", "batch", "group, then batch", "group, then group"])
def test_normalisation_computes_the_reference(kernel, pools, over, kind, level):
    advantages, mask, log_ratio = problem((9, 307, 3) if kind == "ids" else (9, 40, 3))  # several blocks, or one
    by, _, combined = pools.partition(", then ")
    normalize = Normalize(by=by, combined=combined or "none", over=over, singleton="raw", **grouped(kind, 9))
    options = {"level": level, "normalize": normalize}
    first = None
    for order in ORDERS[1:]:
        out, packed, _ = run(kernel, advantages, mask, log_ratio, order, **options)
        first = first or (out, packed)
        assert_same_bits(out, first[0])
        assert_same_bits(packed, first[1])
    expected, exact = packed_reference(advantages.double(), mask, log_ratio, **options)
    scale = 100 if over == "row_sums" else 1  # sums of many tokens: their rounding counts
    torch.testing.assert_close(first[0].double(), expected, rtol=1e-4 * scale, atol=1e-4 * scale)
    torch.testing.assert_close(first[1].double(), exact, rtol=1e-4, atol=1e-4 * scale)


def in_groups(size, tokens, n, dtype=torch.float32):
    """Rewards of several blocks; those of each third group are all alike."""
    rows = size * max(2, 12000 // (size * tokens * n))
    advantages, mask, log_ratio = problem((rows, tokens, n))
    advantages.view(-1, size, tokens, n)[::3] = 0.75
    advantages[~mask] = float("nan")
    return advantages.to(dtype), mask, log_ratio


@pytest.mark.parametrize("level", ["batch", "group", "token"])
@pytest.mark.parametrize("n", [1, 5, 20])
@pytest.mark.parametrize(("size", "tokens"), [(1, 5), (2, 1), (8, 1), (3, 7), (5, 13), (33, 3), (4, 64), (2, 150)])
def test_groups_of_one_size_are_measured_on_the_way(kernel, device, size, tokens, n, level):
    """In one launch, if tiles can begin with a group and at a multiple of 32 tokens, and four blocks have one each."""
    device(9, 100 * 1024)
    inputs = in_groups(size, tokens, n)
    unit = size * tokens if level == "group" else math.lcm(32, size * tokens)
    fits = unit < 25_500 / (4 * n + 5) and (level == "group" or 3 * unit <= inputs[1].numel())
    options = {"level": level, "normalize": Normalize(by="group", group_size=size, singleton="raw")}
    first = None
    for order in ORDERS[:2]:
        got, packed, _ = run(kernel, *inputs, order, **options)
        assert kernel.launches() == (1 if fits else 2)
        first = first or (got, packed)
        assert_same_bits(got, first[0])
        assert_same_bits(packed, first[1])
    expected, exact = packed_reference(inputs[0].double(), *inputs[1:], **options)
    torch.testing.assert_close(first[0].double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first[1].double(), exact, rtol=1e-4, atol=1e-4)
    dead = packed[9 * n : 10 * n]
    assert dead.min() >= (inputs[0].shape[0] // size + 2) // 3 if size * tokens > 20 else dead.min() >= 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [
    {"solver": "min_norm"}, {"solver": "fixed", "noon": False}, {"noon": False, "skip_inactive": True},
    {"nan": "propagate"}, {"reward_weights": [1.0, 2.0, 0.5, 1.0]}, {"in_place": True},
], ids=str)  # fmt: skip
def test_groups_measured_on_the_way_and_all_else(kernel, dtype, options):
    inputs = in_groups(8, 3, 4, dtype)
    if options.get("nan") == "propagate":
        inputs = (inputs[0].nan_to_num(0.5, 0.5, 0.5), *inputs[1:])
    options = {"level": "batch", "normalize": Normalize(by="group", group_size=8), **options}
    got, packed, _ = run(kernel, *inputs, 7, **options)
    assert kernel.launches() == 1
    expected, exact = packed_reference(inputs[0].double(), *inputs[1:], **options)
    digits = max(1e-4, 16 * torch.finfo(dtype).eps)
    torch.testing.assert_close(got.double(), expected, rtol=digits, atol=digits)
    torch.testing.assert_close(packed.double(), exact, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("scale", [1e20, 1.0, 1e-25])
def test_groups_measured_on_the_way_are_measured_as_before(kernel, scale):
    """Squares that float32 cannot hold: by size, in a tile, and by ids, in a launch of its own."""
    advantages, mask, log_ratio = problem((16, 4, 2))
    advantages = advantages.nan_to_num(0.5, 0.5, 0.5) * scale
    results = []
    for groups, launches in (({"group_size": 4}, 1), ({"group_ids": torch.arange(16) // 4}, 4)):
        normalize = Normalize(by="group", eps=0.0, **groups)
        options = {"level": "batch", "solver": "fixed", "noon": False, "normalize": normalize}
        results.append(run(kernel, advantages, mask, log_ratio, 1, **options))
        assert kernel.launches() == launches
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    assert results[0][0].isfinite().all()
    assert results[0][0].abs().amax() > 0.5


@hypothesis.settings(max_examples=60)
@hypothesis.given(st.data())
def test_any_normalisation(kernel, data):
    """Groups of every kind and size, in any order of threads; a constant for each objective keeps scalars apart."""
    draw = data.draw
    size, groups, n = draw(st.integers(1, 9)), draw(st.integers(1, 12)), draw(st.integers(1, 7))
    shape, dtype = (size * groups, draw(st.integers(1, 20)), n), draw(st.sampled_from(DTYPES[:2]))
    advantages, mask, log_ratio = problem(shape)
    advantages = (advantages.nan_to_num(0.25, 0.25, 0.25) ** 2).to(dtype)
    kind = draw(st.sampled_from(["size", "size", "ids", "offsets"]))
    ids = torch.arange(shape[0]) // size
    names = {"size": {"group_size": size}, "ids": {"group_ids": ids * 31 % 1009},
             "offsets": {"group_offsets": torch.arange(groups + 1) * size}}[kind]  # fmt: skip
    normalize = Normalize(
        by=draw(st.sampled_from(["group", "batch"])),
        center=draw(st.booleans()),
        scale=draw(st.booleans()),
        eps=draw(st.sampled_from([1e-4, 1.0])),
        eps_in=draw(st.sampled_from(["std", "var"])),
        singleton=draw(st.sampled_from(["zero", "raw"])),
        combined=draw(st.sampled_from(["none", "none", "batch", "group"])),
        **names,
    )
    options = {
        "level": draw(st.sampled_from(["batch", "sequence", "group", "token"])),
        "noon": draw(st.booleans()),
        "solver": "fixed",  # whatever the rounding of scalars that tie
        "reward_weights": [1.0 + i for i in range(n)],
        "normalize": normalize,
    }
    out, packed, _ = run(kernel, advantages, mask, log_ratio, draw(st.integers(0, 9)), **options)
    expected, exact = packed_reference(advantages.double(), mask, log_ratio, **options)
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(packed.double(), exact, rtol=2e-3, atol=2e-3)


def test_groups_larger_than_a_tile_are_measured_before(kernel, device):
    device(9, 100 * 1024)
    advantages, mask, log_ratio = problem((4, 3000, 3))
    options = {"level": "batch", "normalize": Normalize(by="group", group_size=2)}
    got = run(kernel, advantages, mask, log_ratio, 1, **options)
    assert kernel.launches() == 2
    assert_results(got[:2], advantages, mask, log_ratio, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nan", ["ignore", "propagate"])
def test_normalisation_in_every_dtype(kernel, nan, dtype):
    advantages, mask, log_ratio = problem((40, 30, 2), dtype)
    options = {"normalize": Normalize(by="group", group_size=8, combined="none" if nan == "propagate" else "batch"),
               "nan": nan}  # fmt: skip
    out, packed, _ = run(kernel, advantages, mask, log_ratio, 7, **options, level="batch")
    expected, exact = packed_reference(advantages.double(), mask, log_ratio, **options)
    digits = max(1e-4, 16 * torch.finfo(dtype).eps)
    torch.testing.assert_close(out.double(), expected, rtol=digits, atol=digits, equal_nan=True)
    torch.testing.assert_close(packed.double(), exact, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_normalised_in_place(kernel):
    advantages, mask, log_ratio = problem((9, 307, 4))
    options = {"level": "group", "normalize": Normalize(by="group", group_size=3)}
    shares, _, _ = run(kernel, advantages, mask, log_ratio, 0, in_place=True, **options)
    exact = advantages.double()
    reference.combine_(exact, mask=mask, log_ratio=log_ratio, **options)
    torch.testing.assert_close(shares.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("level", [*LEVELS, "group"])
@pytest.mark.parametrize("shape", [(9, 307, 4), (4, 33, 20), (12, 5, 64)], ids=str)
@pytest.mark.parametrize("skip_inactive", [False, True])
def test_min_norm_computes_the_reference(kernel, skip_inactive, shape, level):
    advantages, mask, log_ratio = problem(shape, torch.float64)
    options = {"level": level, "solver": "min_norm", "skip_inactive": skip_inactive,
               "normalize": Normalize(group_size=shape[0] // 2 if shape[0] % 2 == 0 else 3)}  # fmt: skip
    first = None
    for order in ORDERS[1:]:
        out, packed, _ = run(kernel, advantages, mask, log_ratio, order, **options)
        first = first or (out, packed)
        assert_same_bits(packed, first[1])
    expected, exact = packed_reference(advantages, mask, log_ratio, **options)
    if shape[1] > shape[2]:  # otherwise the minimum is not unique
        torch.testing.assert_close(first[0], expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(first[1], exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 11, 15, 16, 17, 33])
def test_gram_matrices_of_several_blocks_meet(kernel, n):
    """Several blocks to a thread, or one, or no thread for an entry of its own; the last block may have few tokens."""
    advantages, mask, log_ratio = problem((5, 12_000 // n + 1, n), torch.float64)
    options = {"level": "batch", "solver": "min_norm"}
    first = None
    for order in ORDERS:
        out, packed, blocks = run(kernel, advantages, mask, log_ratio, order, **options)
        assert blocks > 1
        first = first or (out, packed)
        assert_same_bits(packed, first[1])
        assert_same_bits(out, first[0])
    expected, exact = packed_reference(advantages, mask, log_ratio, **options)
    torch.testing.assert_close(first[0], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(first[1], exact, rtol=1e-6, atol=1e-6)
