"""Awkward shapes, layouts and memory: all of ``cases.SHAPES``, views of all kinds, ``out=``, what is allocated."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from cases import DTYPES, LAYOUTS, LEVELS, SHAPES, TILE, Problem, make, normal, surrounded
from compare import assert_same_bits, assert_same_result
from doors import DOORS, assert_matches, stacked

from pama_ext import combine, combine_


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_every_shape(door, device, shape, level):
    problem = make(shape, level=level)
    advantages, keywords = problem.to(device).call()
    assert_matches(door(advantages, **keywords), problem)
    result = door(advantages, in_place=True, **keywords)
    assert_matches(result, problem, in_place=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ["a tile cut by N", "tile + 1", "rows that straddle tiles", "outcome rewards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_of_large_shapes(device, dtype, shape, layout):
    problem = make(SHAPES[shape], dtype, draw=normal)
    contiguous, laid_out = problem.to(device).call(), problem.but(layout=layout).to(device).call()
    result, expected = (combine(a, **k) for a, k in (laid_out, contiguous))
    assert_same_result(result, expected)
    shares, expected = (combine_(a, **k) for a, k in (laid_out, contiguous))
    assert_same_bits(stacked(shares.advantages, laid_out[1]["dim"]), expected.advantages)


def test_writing_in_place_stays_inside_the_view(device):
    problem = make((4, 33, 3)).to(device)
    view = surrounded(problem.values)
    outside = view._base.clone()
    combine_(view, **problem.options)
    inner = tuple(slice(1, 2 * size + 1, 2) for size in view.shape)
    outside[inner] = view
    assert_same_bits(view._base, outside)


@pytest.mark.parametrize("level", LEVELS)
def test_expanded_views(device, level):
    row = normal((1, 50, 3), torch.Generator().manual_seed(0))
    mask = torch.tensor([[True], [False], [True], [True]])
    ratio = torch.randn(1, 50)
    advantages = row.to(device).expand(4, 50, 3)
    views = {"mask": mask.to(device).expand(4, 50), "log_ratio": ratio.to(device).expand(4, 50)}
    result = combine(advantages, **views, level=level)
    dense = {"mask": mask.expand(4, 50).contiguous(), "log_ratio": ratio.expand(4, 50).contiguous(), "level": level}
    assert_matches(result, Problem(row.expand(4, 50, 3).contiguous(), options=dense))
    same = combine(torch.ones(5, 1, device=device).expand(5, 4))  # N times the same objective
    assert same.weights.tolist() == [0.25] * 4 and same.advantages.tolist() == [1] * 5


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nan", ["ignore", "propagate"])
def test_no_valid_token(device, dtype, level, nan):
    shape = (3, 5, 4)
    advantages = torch.full(shape, float("nan"), dtype=dtype, device=device)
    mask = torch.zeros(shape[:2], dtype=torch.int64, device=device)
    result = combine(advantages, mask=mask, level=level, nan=nan)
    assert not result.advantages.any() and not result.value.any()
    assert (result.weights == 0.25).all()
    assert not any(field.any() for field in result.stats)
    assert combine_(advantages, mask=mask, level=level, nan=nan).advantages.eq(0).all()


@pytest.mark.parametrize("shape", [(0, 3), (0, 4, 3), (4, 0, 3), (0, 0, 3)])
@pytest.mark.parametrize("level", LEVELS)
def test_empty(device, shape, level):
    result = combine(torch.empty(shape, device=device), level=level)
    rows = (shape[0],) if level == "sequence" else ()
    assert result.advantages.shape == shape[:-1]
    assert result.weights.shape == (*rows, 3) and result.value.shape == rows
    assert (result.weights == torch.tensor(1 / 3)).all() and not result.value.any()
    assert not any(field.any() for field in result.stats)


def test_one_valid_token(device):
    mask = torch.zeros(4, 9, device=device)
    mask[2, 3] = 1
    result = combine(torch.full((4, 9, 2), 3.0, device=device), mask=mask)
    assert result.stats.count.tolist() == [1, 1] and result.stats.std.tolist() == [0, 0]
    assert result.value == 3 and result.advantages.sum() == 3 == result.advantages[2, 3]


OUTPUTS = {
    "dense": lambda like: torch.empty_like(like),
    "slice": surrounded,
    "transposed": lambda like: torch.empty_like(like.t()).t(),
    "unaligned": lambda like: torch.empty(like.numel() + 1, dtype=like.dtype, device=like.device)[1:].view(like.shape),
    "padded rows": lambda like: like.new_empty((*like.shape[:-1], like.shape[-1] + 5))[..., :-5],
    "column": lambda like: torch.empty((*like.shape, 3), dtype=like.dtype, device=like.device)[..., 1],
}


@pytest.mark.parametrize("out", OUTPUTS.values(), ids=OUTPUTS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
@pytest.mark.parametrize("shape", [(7, 43, 3), (13, 160, 3)], ids=["cut", "whole vectors"])
def test_out_is_written_completely(door, device, dtype, level, out, shape):
    problem = make(shape, dtype, draw=normal, level=level).to(device)
    expected = combine(problem.values, **problem.options)
    target = out(torch.empty_like(expected.advantages))
    target.fill_(float("nan"))  # poisoned: what is not written shows
    version = target._version
    result = door(problem.values, out=target, **problem.options)
    assert result.advantages is target
    assert_same_result(result, expected)
    assert target._version > version


def assert_nothing_beside_out_is_written(device, dtype, level):
    for length in (1, 15, 16, 17, TILE - 8, TILE, TILE + 1, TILE + 32):
        x = make((length, 1, 3), dtype, draw=normal).to(device).values
        for before in (0, 1, 16):
            memory = torch.full((before + length + 64,), torch.nan, dtype=dtype, device=device)
            out = memory[before : before + length].view(length, 1)
            assert_same_bits(combine(x, level=level, out=out).advantages, combine(x, level=level).advantages)
            assert memory[:before].isnan().all() and memory[before + length :].isnan().all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_beside_out_is_written(device, dtype, level):
    assert_nothing_beside_out_is_written(device, dtype, level)


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_beside_out_is_written_by_any_instruction_set(instructions, level):
    """Whole vectors of float32 or float64 are written straight to where they belong, aligned or not."""
    for dtype in (torch.float32, torch.float64):
        assert_nothing_beside_out_is_written(torch.device("cpu"), dtype, level)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0, 2)])
def test_out_of_an_empty_problem(device, shape):
    out = torch.empty(shape[:-1], device=device)
    assert combine(torch.empty(shape, device=device), out=out).advantages is out


LIMITED = """
import resource, sys, torch, pama_ext
tokens, mode = 1 << 22, sys.argv[1]
torch.set_num_threads(2)
options = dict(mask=torch.ones(tokens, dtype=torch.bool), log_ratio=torch.zeros(tokens), level=sys.argv[2])
advantages = [torch.randn(tokens), torch.randn(tokens)]
out = torch.empty(tokens)
call = pama_ext.combine_ if mode == "combine_" else pama_ext.combine
more = {"out": out} if mode == "out" else {}
call([a[:70000].clone() for a in advantages], **{k: v[:70000] if k != "level" else v for k, v in options.items()})
used = 4096 * int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), resource.RLIM_INFINITY))
try:
    torch.empty(tokens)
except RuntimeError:
    call(advantages, **options, **more).value
    print("enough")
else:
    print("no limit here")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space the way Linux does")
@pytest.mark.parametrize("level", ["batch", "token"])
@pytest.mark.parametrize("mode", ["out", "combine_", "new"])
def test_nothing_of_the_size_of_the_input_is_allocated(mode, level):
    """With 8 MB left, 2 x 16 MB are combined into ``out`` or in place; a new output of 16 MB must fail: the control."""
    run = subprocess.run([sys.executable, "-c", LIMITED, mode, level], capture_output=True, text=True, check=False)
    if "no limit here" in run.stdout:
        pytest.skip("this system does not enforce RLIMIT_AS")
    assert ("enough" in run.stdout) == (mode != "new"), run.stdout + run.stderr
    if mode == "new":
        assert "MemoryError" in run.stderr or "bad_alloc" in run.stderr or "not enough memory" in run.stderr


@pytest.mark.cuda
@pytest.mark.parametrize("level", ["batch", "token"])
def test_nothing_of_the_size_of_the_input_is_allocated_on_a_gpu(level):
    values = torch.randn(1 << 20, 4, device="cuda")
    out = torch.empty(1 << 20, device="cuda")
    for call in (lambda: combine(values, out=out, level=level), lambda: combine_(values, level=level)):
        call()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        assert torch.cuda.max_memory_allocated() - before < values.numel() * values.element_size() / 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", range(2, 18))
def test_columns_of_any_step(step, dtype, instructions):
    """Loaded by shuffles up to 16 side by side, but for the last tokens: around every number of lanes there is."""
    for tokens in (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 34, 500):
        wide = torch.randn(tokens, step, dtype=torch.float64).to(dtype)
        columns = [wide[:, 0], wide[:, step // 2], wide[:, -1]]
        expected = combine([column.clone() for column in columns], level="token")
        assert_same_result(combine(columns, level="token"), expected)
