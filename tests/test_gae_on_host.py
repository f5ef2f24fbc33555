"""csrc/cuda/gae.cu run on the host (see tests/cuda_on_host): the specification, whatever the order of the threads."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path

import pytest
import torch
from compare import assert_close, assert_same_bits
from on_host import ROOT, compiled, needs_compiler

from pama_ext import reference

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # in the order of pama::DType
ORDERS = (0, 1, 7)  # of the threads of a block: ascending, descending, shuffled

pytestmark = needs_compiler

SOURCE = """
#include "pama/gae.h"
static void call_kernel(const void* argument, const void* kernel) {
  reinterpret_cast<void (*)(pama::GaeParams)>(const_cast<void*>(kernel))(
      *static_cast<const pama::GaeParams*>(argument));
}
#include GAE_CU
// sizes: [B, T, N], or [S, total, N] with offsets. All contiguous, objectives last; the outputs have them at dim.
extern "C" const char* gae_on_host(const void* rewards, const void* values, const void* mask, const void* kl,
                                   const void* bootstrap, const int64_t* offsets, const double* gamma,
                                   const double* lam, int dtype, const int64_t* sizes, bool outcome, int dim, int order,
                                   void* advantages, void* returns) {
  using namespace pama;
  const Device device{DeviceType::kCUDA, 0};
  const int n = sizes[2];
  const DType type = static_cast<DType>(dtype);
  const int64_t* shape = offsets ? sizes + 1 : sizes;
  const int ndim = offsets ? 1 : 2;
  const int64_t tokens[2] = {offsets ? n : sizes[1] * n, n}, flat[2] = {sizes[1], 1}, each[1] = {n}, one[1] = {1};
  const int64_t bounds[1] = {sizes[0] + 1};
  TensorView r[64], v[64], b[64];
  for (int i = 0; i < n; ++i) {
    const auto column = [&](const void* data) { return (char*)data + i * size_of(type); };
    v[i] = {column(values), type, device, ndim, shape, tokens};
    r[i] = outcome ? TensorView{column(rewards), type, device, 1, sizes, each}
                   : TensorView{column(rewards), type, device, ndim, shape, tokens};
    b[i] = {column(bootstrap), type, device, 1, sizes, each};
  }
  const TensorView m{(void*)mask, DType::kInt8, device, ndim, shape, offsets ? one : flat},
      k{(void*)kl, type, device, ndim, shape, offsets ? one : flat},
      o{(void*)offsets, DType::kInt64, device, 1, bounds, one};
  GaeParams p;
  if (const char* problem = plan_gae({r, v, bootstrap ? b : nullptr, n, mask ? &m : nullptr, nullptr, nullptr,
                                      kl ? &k : nullptr, offsets ? &o : nullptr, dim}, p))
    return problem;
  std::copy(gamma, gamma + n, p.gamma.values);
  std::copy(lam, lam + n, p.lam.values);
  p.advantages.data = static_cast<char*>(advantages);
  p.returns.data = static_cast<char*>(returns);
  host::order = order;
  launch_gae_cuda(p, nullptr);
  return nullptr;
}
"""


def build(folder: Path, source: Path):
    (folder / "gae_on_host.cpp").write_text(SOURCE)
    sources = (str(folder / "gae_on_host.cpp"), str(ROOT / "csrc/gae_plan.cpp"))
    function = compiled(folder / "gae_on_host.so", f'-DGAE_CU="{source}"', *sources).gae_on_host
    function.restype = ctypes.c_char_p
    return function


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    return build(tmp_path_factory.mktemp("host"), ROOT / "csrc/cuda/gae.cu")


def problem(sizes, dtype=torch.float32, *, packed=None, outcome=False, extras=True, valid=0.7):
    """Arguments of ``reference.gae``; NaN behind the mask."""
    g = torch.Generator().manual_seed(0)
    tokens, n = sizes[:-1], sizes[-1]
    sequences = sizes[0] if packed is None else len(packed)
    arguments = {
        "rewards": torch.randn(sequences, n, generator=g).to(dtype) if outcome else torch.randn(sizes, generator=g),
        "values": torch.randn(sizes, generator=g).to(dtype),
        "gamma": torch.linspace(0.9, 1, n).tolist(),
        "lam": torch.linspace(0.95, 0.5, n).tolist(),
    }
    arguments["rewards"] = arguments["rewards"].to(dtype)
    if packed is not None:
        arguments["offsets"] = torch.tensor([0, *itertools.accumulate(packed)])
    if extras:
        mask = torch.rand(tokens, generator=g) < valid
        arguments |= {"mask": mask, "kl_penalty": torch.randn(tokens, generator=g).to(dtype),
                      "bootstrap": torch.randn(sequences, n, generator=g).to(dtype)}  # fmt: skip
        for name in ("rewards", "values", "kl_penalty"):
            if name != "rewards" or not outcome:
                arguments[name][~mask] = torch.nan
    return arguments


def run(kernel, arguments, order=0, dim=-1):
    values, n = arguments["values"], arguments["values"].shape[-1]
    offsets = arguments.get("offsets")
    sequences = values.shape[0] if offsets is None else len(offsets) - 1
    at = dim % values.dim()
    shape = [*values.shape[:-1]]
    shape.insert(at, n)
    results = [torch.full(shape, torch.nan, dtype=values.dtype) for _ in range(2)]
    named = [arguments.get(k) for k in ("rewards", "values", "mask", "kl_penalty", "bootstrap", "offsets")]
    pointers = [None if t is None else ctypes.c_void_p(t.data_ptr()) for t in [*named, *results]]
    length = values.shape[1] if offsets is None else values.shape[0]
    problem = kernel(
        *pointers[:6], *((ctypes.c_double * n)(*arguments[k]) for k in ("gamma", "lam")), DTYPES.index(values.dtype),
        (ctypes.c_int64 * 3)(sequences, length, n), arguments["rewards"].shape != values.shape, at, order,
        *pointers[6:],
    )  # fmt: skip
    assert problem is None, problem
    return [result.movedim(at, -1) for result in results]


def assert_computes(results, arguments):
    wide = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in arguments.items()}
    for ours, truth, same in zip(results, reference.gae(**wide), reference.gae(**arguments), strict=True):
        assert_close(ours, truth, same, magnitude=truth.abs().max() if truth.numel() else None)


SHAPES = [(1, 1, 1), (3, 5, 2), (9, 31, 3), (2, 32, 1), (5, 33, 4), (1, 128, 3), (2, 129, 3), (1, 700, 5), (2, 2100, 1),
          (2, 300, 17), (1, 200, 64)]  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("outcome", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_computes_the_specification(kernel, shape, outcome, order):
    for extras in (False, True):
        arguments = problem(shape, outcome=outcome, extras=extras)
        assert_computes(run(kernel, arguments, order), arguments)


@pytest.mark.parametrize("packed", [None, [300, 0, 211, 1]], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 16])
def test_the_way_through_float32_side_by_side_gives_the_same_bits(kernel, n, packed):
    """Results that are not laid out so take the general way; the arithmetic is one."""
    shape = (512, n) if packed else (2, 300, n)
    for extras in (False, True):
        arguments = problem(shape, packed=packed, extras=extras)
        flat, general = run(kernel, arguments, 7), run(kernel, arguments, 7, dim=0)
        for ours, theirs in zip(flat, general, strict=True):
            assert_same_bits(ours.contiguous(), theirs.contiguous())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 40, 3), (2, 1500, 3)], ids=str)
def test_every_dtype(kernel, shape, dtype):
    arguments = problem(shape, dtype)
    assert_computes(run(kernel, arguments), arguments)


@pytest.mark.parametrize("packed", [[], [0], [1], [0, 1, 0, 40, 3], [200, 0, 1, 700], [0, 0, 2000]], ids=str)
@pytest.mark.parametrize("outcome", [False, True])
def test_packed(kernel, packed, outcome):
    arguments = problem((sum(packed), 3), packed=packed, outcome=outcome)
    assert_computes(run(kernel, arguments), arguments)


@pytest.mark.parametrize("valid", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("shape", [(6, 70, 3), (2, 900, 2)], ids=str)
def test_sparse_masks(kernel, shape, valid):
    arguments = problem(shape, valid=valid)
    assert_computes(run(kernel, arguments), arguments)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("shape", [(6, 70, 3), (2, 900, 2)], ids=str)
def test_objectives_in_any_dimension(kernel, shape, dim):
    arguments = problem(shape)
    assert_computes(run(kernel, arguments, dim=dim), arguments)


@pytest.mark.parametrize("shape", [(6, 70, 3), (2, 900, 2)], ids=str)
def test_the_order_of_threads_changes_no_bit(kernel, shape):
    arguments = problem(shape)
    first, *others = (run(kernel, arguments, order) for order in ORDERS)
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("barrier", range(5))
def test_a_missing_barrier_is_seen(tmp_path, barrier):
    """The block kernel without one of its barriers gives other results in some order of the threads."""
    source = (ROOT / "csrc/cuda/gae.cu").read_text()
    parts = source.split("__syncthreads();")
    assert len(parts) == 6
    broken = tmp_path / "gae.cu"
    broken.write_text("".join(p + ("" if k in (barrier, 5) else "__syncthreads();") for k, p in enumerate(parts)))
    kernel = build(tmp_path, broken)
    arguments = problem((1, 4000, 3))
    expected = reference.gae(**arguments)
    results = [run(kernel, arguments, order) for order in ORDERS]
    assert any((a - b).abs().max() > 1e-3 or a.isnan().any() for r in results for a, b in zip(r, expected, strict=True))
