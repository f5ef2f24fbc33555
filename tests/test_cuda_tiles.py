"""The CUDA kernel of ``combine`` on a device, where its source on the host (test_cuda_on_host.py) cannot follow.

Real shared memory, clusters and alignment: every way in which a tile is loaded, every place where blocks meet, tiles
that a block loads a second time. Sizes follow the table in csrc/cuda/combine.cu; the CPU kernel is the measure, as it
has been compared with the specification.
"""

from __future__ import annotations

import pytest
import torch
from compare import assert_same_result

from pama_ext import Normalize, combine, combine_

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda")
LEVELS = ("batch", "sequence", "token")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Elements of one block, of a cluster of few blocks and of eight, of a grid, of one that holds all, and one that cannot.
ELEMENTS = {"small": 60, "block": 4000, "few": 9000, "cluster": 32000, "grid": 35000, "resident": 1 << 21,
            "streams": 1 << 25}  # fmt: skip


def problem(shape, dtype=torch.float32, seed=0):
    """On the CPU: NaN behind the mask, and some inf before it."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    mask = torch.rand(shape[:-1], generator=g) < 0.8
    x[torch.rand(shape, generator=g) < 0.01] = torch.inf
    x[~mask] = torch.nan
    return x.to(dtype), {"mask": mask, "log_ratio": 0.3 * torch.randn(shape[:-1], generator=g)}


def moved(options, device):
    return {name: o.to(device) if isinstance(o, torch.Tensor) else o for name, o in options.items()}


def assert_like(result, expected, *, advantages=True):
    """The CPU's result to rounding; what is counted exactly."""
    sums = {"rtol": 2e-5, "atol": 2e-5} if expected.weights.dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    for name, got, want in zip(expected.stats._fields, result.stats, expected.stats, strict=True):
        if name in ("count", "nonfinite", "min", "max", "dead_groups"):
            assert torch.equal(got.cpu(), want), f"{name}: {got.tolist()}, expected {want.tolist()}"
        torch.testing.assert_close(got.cpu(), want, **sums, msg=lambda text, n=name: f"{n}: {text}")
    torch.testing.assert_close(result.weights.cpu(), expected.weights, **sums)
    torch.testing.assert_close(result.value.cpu(), expected.value, **sums)
    if advantages:
        torch.testing.assert_close(result.advantages.cpu(), expected.advantages)


def compare(x, options, view=lambda x: x, **keywords):
    """One call out of place and one in place, on the device and on the CPU."""
    expected = combine(view(x), **options, **keywords)
    there = view(x.to(CUDA))
    assert_like(combine(there, **moved(options, CUDA), **keywords), expected)
    shares, shares_there = x.clone(), x.to(CUDA)
    combine_(view(shares), **options, **keywords)
    assert_like(combine_(view(shares_there), **moved(options, CUDA), **keywords), expected, advantages=False)
    torch.testing.assert_close(shares_there.cpu(), shares, equal_nan=True)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("elements", ELEMENTS.values(), ids=ELEMENTS)
def test_wherever_blocks_meet(elements, level):
    compare(*problem((8, elements // 24, 3)), level=level)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [*range(1, 18), 31, 32, 33, 63, 64])
def test_every_number_of_objectives(n, dtype):
    for level in ("batch", "token"):
        compare(*problem((5, 601, n), dtype, seed=n), level=level)


VIEWS = {
    "first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "a part of the tokens": lambda x: x[:, 3:-2],
    "a part of the objectives": lambda x: x[..., :-1],
    "every second row": lambda x: x[::2],
    "a list": lambda x: list(x.unbind(-1)),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VIEWS)
def test_however_memory_is_laid_out(name, dtype, level):
    x, options = problem((6, 1003, 5), dtype)
    view = VIEWS[name]
    if name == "a part of the tokens":
        options = {key: value[:, 3:-2] for key, value in options.items()}
    if name == "every second row":
        options = {key: value[::2] for key, value in options.items()}
    expected = combine(view(x), **options, level=level)
    result = combine(view(x.to(CUDA)), **moved(options, CUDA), level=level)
    assert_like(result, expected)


@pytest.mark.parametrize("n", [2, 5, 20])
@pytest.mark.parametrize("size", [1, 2, 3, 8, 100, 256, 257, 5000])
def test_pools_of_every_size(size, n):
    """Several rows or groups to a tile, one to a tile, several tiles to one."""
    rows = max(4, 40000 // size)
    x, options = problem((rows, size, n))
    compare(x, options, level="sequence")
    # Of two samples that are normalised the scalars tie, or nearly so: rounding would decide.
    compare(x, options, level="group", normalize=Normalize(by="group", group_size=4 if rows % 4 == 0 else 1))
    ids = (torch.arange(rows) // 3) * 7919 % 1009
    expected = combine(x, **options, level="group", normalize=Normalize(by="group", group_ids=ids))
    by_ids = Normalize(by="group", group_ids=ids.to(CUDA))
    assert_like(combine(x.to(CUDA), **moved(options, CUDA), level="group", normalize=by_ids), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 8, 32, 33])
def test_plain_calls(n, dtype):
    """Slices of every number and length, steps from token to token, and the first size of several blocks."""
    fixed = {"solver": "fixed", "reward_weights": [0.5, -2.0, 0.0, *[0.1] * n][:n]}
    for tokens in (1, 64, 129, 300, 8192 // n, 8192 // n + 1):
        x, options = problem((1, tokens, n), dtype, seed=tokens)
        x[0, 0], options["mask"][0, 0] = 0.5, True
        for more in ({}, {"skip_inactive": True}, fixed):
            compare(x, {**options, **more})
        apart = torch.empty(1, tokens, 2, dtype=dtype, device=CUDA)[..., 1]
        result = combine(x.to(CUDA).expand(3, -1, -1)[1:2], **moved(options, CUDA), out=apart)
        assert_like(result, combine(x, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 10, 17, 32, 33])
def test_plain_calls_of_several_blocks(n, dtype):
    """Clusters of two to eight, grids of few and of all multiprocessors, what just fits on the chip and does not."""
    chip = torch.cuda.get_device_properties(CUDA)
    found = 64 * (64 if dtype == torch.float64 else 40) + 16  # what warps and blocks find, and a flag
    room = min(192 * 1024, chip.shared_memory_per_block_optin) - found
    fits = chip.multi_processor_count * ((room // n - 16) // dtype.itemsize // 32 * 32)  # 16 bytes behind each plane
    fits = min(fits, chip.L2_cache_size // 2 // (n * dtype.itemsize + 5))
    for tokens in (8193 // n + 1, 40_000 // n, 65536 // n, 65536 // n + 1, 300_000 // n, fits, fits + 1):
        x, options = problem((1, tokens, n), dtype, seed=tokens)
        result = combine(x.to(CUDA), **moved(options, CUDA))
        assert_like(result, combine(x, **options))


@pytest.mark.parametrize("elements", ["few", "cluster", "grid", "resident"])
def test_the_last_block_sees_all_others(elements):
    """Their spread: the same bits in 500 calls, one behind the other and beside other work."""
    x, options = problem((8, ELEMENTS[elements] // 24, 3), seed=3)
    expected = combine(x, **options)
    x, options = x.to(CUDA), moved(options, CUDA)
    first = combine(x, **options)
    assert_like(first, expected)
    side, other = torch.cuda.Stream(), torch.randn(2048, 2048, device=CUDA)
    side.wait_stream(torch.cuda.current_stream())
    different = torch.zeros((), dtype=torch.int64, device=CUDA)
    for k in range(500):
        if k % 10 == 0:
            with torch.cuda.stream(side):
                other = other @ other.T / 2048
        result = combine(x, **options)
        different += (result.stats.std != first.stats.std).any()
        different += (result.advantages != first.advantages).any()
    assert different.item() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [2, 3, 4, 10])
@pytest.mark.parametrize(
    "layout", ["objectives first", "a list", "rows apart", "out apart", "unaligned", "expanded", "reversed"]
)
def test_plain_calls_in_every_layout(layout, n, dtype):
    """Read 16 bytes at a time where it stands, or brought to planes first: to the bit what it is side by side."""
    for shape in ((3, 40, n), (5, 3001, n)):
        x, options = problem(shape, dtype)
        there = x.to(CUDA)
        options_there = moved(options, CUDA)
        side_by_side = combine(there, **options_there)
        if layout == "objectives first":
            there = there.movedim(-1, 0).contiguous().movedim(0, -1)
        if layout == "a list":
            there = [one.contiguous() for one in there.unbind(-1)]
        if layout == "rows apart":
            there = torch.cat([there, there], 1)[:, : shape[1]]
        if layout == "out apart":
            options_there["out"] = torch.empty((*shape[:-1], 3), dtype=dtype, device=CUDA)[..., 1]
        if layout == "unaligned":
            there = torch.cat([there.new_zeros(1), there.flatten()])[1:].view(shape)
        if layout == "expanded":
            x = x[:1].expand(shape)
            there = there[:1].expand(shape)
        if layout == "reversed":
            there = there.flip(-1).unbind(-1)[::-1]
        result = combine(there, **options_there)
        assert_like(result, combine(x, **options))
        if layout not in ("expanded", "reversed"):  # those are other problems
            assert_same_result(result, side_by_side)


@pytest.mark.parametrize("level", [*LEVELS, "group"])
@pytest.mark.parametrize("n", [1, 5, 20])
@pytest.mark.parametrize(
    ("size", "tokens"), [(1, 5), (2, 1), (8, 1), (3, 7), (5, 13), (33, 3), (4, 64), (2, 150), (2, 9000)]
)
def test_groups_of_one_size(size, tokens, n, level):
    """Measured on the way, where tiles can hold whole ones; some groups have one value only, and one block or many."""
    for elements in (1000, 100_000):
        rows = size * max(3, elements // (size * tokens * n))
        x, options = problem((rows, tokens, n), seed=size)
        x.view(-1, size, tokens, n)[::3] = 0.75
        x[~options["mask"]] = torch.nan
        normalize = Normalize(by="group", group_size=size, center=False)
        compare(x, options, level=level, normalize=normalize)


@pytest.mark.parametrize("rows", [1, 5, 4000, 70_000])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8], ids=str)
def test_groups_by_ids_in_any_order(dtype, rows):
    """Sorted on the device, negative ones too; groups have one row and many."""
    g = torch.Generator().manual_seed(rows)
    ids = torch.randint(-100, 100, (rows,), generator=g).to(dtype)
    if dtype == torch.int64:
        ids = ids * 2**55 + torch.randint(0, max(1, rows // 700), (rows,), generator=g)
    x = torch.randn(rows, 3, generator=g)
    options = {"noon": False, "solver": "fixed"}
    expected = combine(x, normalize=Normalize(by="group", group_ids=ids), **options)
    by_ids = Normalize(by="group", group_ids=ids.to(CUDA))
    assert_like(combine(x.to(CUDA), normalize=by_ids, **options), expected)
    again = combine(x.to(CUDA), normalize=by_ids, **options)
    assert_same_result(again, combine(x.to(CUDA), normalize=by_ids, **options))


@pytest.mark.parametrize("level", ["batch", "sequence"])
@pytest.mark.parametrize("elements", list(ELEMENTS.values())[:-1], ids=list(ELEMENTS)[:-1])
def test_gram_matrices(elements, level):
    for n in (2, 10):
        compare(*problem((8, max(1, elements // n // 8), n), torch.float64), level=level, solver="min_norm")


@pytest.mark.parametrize("elements", ELEMENTS.values(), ids=ELEMENTS)
def test_bits_are_the_same_every_time(elements):
    x, options = problem((8, elements // 24, 3))
    x, options = x.to(CUDA), moved(options, CUDA)
    for level in ("batch", "token"):
        first = combine(x, **options, level=level)
        for _ in range(5):
            assert_same_result(combine(x, **options, level=level), first)


@pytest.mark.parametrize("elements", ["block", "cluster", "grid", "streams"])
def test_equal_objectives_get_equal_bits(elements):
    """Pieces have the same tokens for every objective, wherever it stands."""
    one = torch.randn(8, ELEMENTS[elements] // 40, 1, device=CUDA)
    result = combine(one.expand(-1, -1, 5).contiguous())
    assert torch.equal(result.weights, torch.full((5,), 0.2, device=CUDA))
    for field in result.stats:
        assert len(set(field.tolist())) == 1


@pytest.mark.parametrize("level", ["batch", "token"])
def test_blocks_may_be_far_from_the_first(level):
    """Moments of blocks are summed around that of the first, where it is near."""
    x, options = problem((64, 4096, 3), torch.float64)
    x[0] += 1e6
    options["mask"][0, 1:] = False
    expected = combine(x, **options, level=level)
    assert_like(combine(x.to(CUDA), **moved(options, CUDA), level=level), expected)
