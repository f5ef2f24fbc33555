"""csrc/cuda/policy_loss.cu and value_loss.cu run on the host (see tests/cuda_on_host), in any order of the threads."""

from __future__ import annotations

import ctypes
import math
import shutil
from pathlib import Path

import pytest
import torch
from compare import assert_same_bits
from loss_cases import AGGREGATES, POLICY, SHAPES, VALUE, VARIANTS, assert_computes, make, make_values
from on_host import ROOT, compiled, needs_compiler

from pama_ext import PolicyMetrics, ValueMetrics
from pama_ext._ops import scaled

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # in the order of pama::DType
ORDERS = (0, 1, 7)  # of the threads of a block: ascending, descending, shuffled
SMALL = [s for s in SHAPES.values() if math.prod(s) < 3000]

pytestmark = needs_compiler


def build(folder: Path, name: str, cuda: Path) -> ctypes.CDLL:
    """``policy`` or ``value``, of the sources in the folder ``cuda``."""
    sources = (str(ROOT / "tests/cuda_on_host/loss_on_host.cpp"), str(ROOT / "csrc/loss_plan.cpp"))
    kernels = f'-D{name.upper()}_CU="{cuda}/{name}_loss.cu"'
    return compiled(folder / f"{name}_on_host.so", kernels, f"-I{cuda}", *sources)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return build(tmp_path_factory.mktemp("host"), "policy", ROOT / "csrc/cuda").policy_on_host


@pytest.fixture(scope="module")
def value(tmp_path_factory):
    return build(tmp_path_factory.mktemp("host"), "value", ROOT / "csrc/cuda")


def pointer(tensor):
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr() or 64)  # an empty one is there too


def call(function, arguments, *, rows, aggregate, dtype, gradient, metrics):
    """Calls it with poisoned outputs behind ``arguments``; returns loss, gradient, scale and metrics."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    scales = 1 + rows if aggregate == "seq-mean-token-mean" else 1
    results = torch.full((1 + scales + metrics,), torch.nan, dtype=compute)
    function.restype = ctypes.c_char_p
    problem = function(*arguments, pointer(gradient), pointer(results))
    assert problem is None, problem
    loss, scale, rest = results.split([1, scales, metrics])
    return loss[0], gradient, scale, rest


def run_policy(function, order=0, *, log_probs, old_log_probs, advantages=None, objective_advantages=None, mask=None,
               ref_log_probs=None, weights=None, clip_low=0.2, clip_high=0.2, dual_clip=math.inf, max_weight=math.inf,
               kl_coef=0.0, aggregate="token-mean", normalizer=-1.0):  # fmt: skip
    objectives = objective_advantages is not None
    given = objective_advantages if objectives else advantages
    n = given.shape[-1] if objectives else 0
    by_row = given.dim() == (2 if objectives else 1)
    numbers = [clip_low, clip_high, dual_clip, max_weight, kl_coef, normalizer]
    weights = [1.0] * max(n, 1) if weights is None else weights
    tensors = [
        x.contiguous() if x is not None else None for x in (log_probs, old_log_probs, given, ref_log_probs, mask)
    ]
    arguments = [
        *map(pointer, tensors), (ctypes.c_int64 * 3)(*log_probs.shape, n), by_row, (ctypes.c_double * 6)(*numbers),
        (ctypes.c_double * len(weights))(*weights), aggregate.encode(), DTYPES.index(log_probs.dtype), order,
    ]  # fmt: skip
    gradient = torch.full_like(log_probs, torch.nan, memory_format=torch.contiguous_format)
    return call(function, arguments, rows=log_probs.shape[0], aggregate=aggregate, dtype=log_probs.dtype,
                gradient=gradient, metrics=7 + 2 * n)  # fmt: skip


def run_value(
    library, order=0, *, values, old_values, returns, mask=None, clip=-1.0, aggregate="token-mean", last=True
):
    n = values.shape[-1]
    arguments = [
        *map(pointer, (values, old_values, returns, mask)), (ctypes.c_int64 * 3)(*values.shape), last,
        ctypes.c_double(clip), aggregate.encode(), DTYPES.index(values.dtype), order,
    ]  # fmt: skip
    shape = values.shape if last else (n, *values.shape[:2])
    gradient = torch.full(shape, torch.nan, dtype=values.dtype)
    return call(library.value_on_host, arguments, rows=values.shape[0], aggregate=aggregate, dtype=values.dtype,
                gradient=gradient, metrics=3 * n)  # fmt: skip


class Backward(torch.autograd.Function):
    """A loss whose kept gradient is ``kept``: what ``scaled`` takes, and where the objectives belong."""

    @staticmethod
    def forward(ctx, x, loss, kept):
        ctx.kept = kept
        return loss.clone()

    @staticmethod
    def backward(ctx, incoming):
        gradient, scale, row_dim, by_row = ctx.kept
        result = scaled(gradient, incoming, scale, row_dim, by_row)
        return result if row_dim == 0 else result.movedim(0, -1), None, None


def as_policy_loss(function, order=0):
    """The kernel in the form of ``policy_loss``, so that the suite's judge can judge it."""

    def loss(log_probs, **arguments):
        value, gradient, scale, packed = run_policy(function, order, log_probs=log_probs.detach(), **arguments)
        by_row = arguments.get("aggregate") == "seq-mean-token-mean"
        n = (len(packed) - 7) // 2
        objectives = packed[7:].split(n) if "objective_advantages" in arguments else (None, None)
        ref = packed[6] if "ref_log_probs" in arguments else None
        metrics = PolicyMetrics(*packed[:6], ref, *objectives)
        return Backward.apply(log_probs, value, (gradient, scale, 0, by_row)), metrics

    return loss


def as_value_loss(library, order=0, last=True):
    def loss(values, **arguments):
        value, gradient, scale, packed = run_value(library, order, values=values.detach(), last=last, **arguments)
        by_row = arguments.get("aggregate") == "seq-mean-token-mean"
        kept = gradient, scale, 0 if last else 1, by_row
        return Backward.apply(values, value, kept), ValueMetrics(*packed.split(values.shape[-1]))

    return loss


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("shape", [*SMALL, (40, 256), (3, 2500)], ids=str)
def test_policy_loss_computes_the_specification(policy, shape, aggregate):
    for variant in VARIANTS.values() if math.prod(shape) < 1000 else [VARIANTS["all"], VARIANTS["truncated"]]:
        assert_computes(POLICY, as_policy_loss(policy), make(shape, aggregate=aggregate, **variant))
    assert_computes(POLICY, as_policy_loss(policy), make(shape, aggregate=aggregate, by_row=True, mask=None))


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("n", [1, 3, 64])
@pytest.mark.parametrize("shape", [(9, 30), (2, 300)], ids=str)
def test_objectives(policy, shape, n, by_row):
    for aggregate in AGGREGATES:
        weights = [0.5 ** (i % 3) if i % 5 else 0.0 for i in range(n)]
        arguments = make(shape, objectives=n, by_row=by_row, aggregate=aggregate, weights=weights)
        assert_computes(POLICY, as_policy_loss(policy), arguments)
        assert_computes(POLICY, as_policy_loss(policy), {**arguments, "max_weight": 2.0})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(policy, value, dtype):
    for shape in ((5, 63), (2, 300)):
        for aggregate in AGGREGATES:
            assert_computes(POLICY, as_policy_loss(policy), make(shape, dtype, aggregate=aggregate))
            assert_computes(VALUE, as_value_loss(value), make_values((*shape, 2), dtype, aggregate=aggregate))


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("shape", [*SMALL, (40, 256)], ids=str)
def test_value_loss_computes_the_specification(value, shape, aggregate):
    for n, clip, last in ((1, 0.2, True), (3, None, True), (3, 0.2, False)):
        arguments = make_values((*shape, n), aggregate=aggregate)
        if clip is None:
            del arguments["clip"]
        assert_computes(VALUE, as_value_loss(value, last=last), arguments)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("shape", [(9, 200), (3, 600), (11, 1100)], ids=str)
def test_the_order_of_threads_changes_no_bit(policy, value, shape, aggregate):
    options = {"objectives": 3, "weights": [0.5, 1.0, 2.0], "ref": True, "kl_coef": 0.1}
    arguments = make(shape, aggregate=aggregate, **options)
    heads = make_values((*shape, 2), aggregate=aggregate)
    for runs in ([run_policy(policy, order, **arguments) for order in ORDERS],
                 [run_value(value, order, **heads) for order in ORDERS]):  # fmt: skip
        for other in runs[1:]:
            for a, b in zip(runs[0], other, strict=True):
                assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 7, 30), (3, 5, 33), (1, 40, 256), (2, 3, 4)], ids=str)
def test_scaling(value, sizes, dtype):
    wide = dtype == torch.float64
    compute = torch.float64 if wide else torch.float32
    g = torch.Generator().manual_seed(0)
    gradient = torch.randn(sizes, generator=g).to(dtype)
    incoming = torch.tensor(0.375, dtype=compute)
    for scales in (1, 1 + sizes[1]):
        scale = torch.randn(scales, generator=g, dtype=torch.float64).to(compute)
        out = torch.full_like(gradient, torch.nan)
        library, in_place = value.scale_on_host, gradient.clone()
        library.restype = ctypes.c_char_p
        for to in (out, in_place):
            source = gradient if to is out else in_place
            problem = library(pointer(source), pointer(incoming), pointer(scale), ctypes.c_int64(scales),
                              (ctypes.c_int64 * 3)(*sizes), DTYPES.index(dtype), wide, pointer(to))  # fmt: skip
            assert problem is None, problem
        expected = scaled(gradient, incoming, scale, 1, scales > 1)
        torch.testing.assert_close(out, expected)
        assert_same_bits(out, in_place)


def test_what_halves_do_not_hold(policy, value):
    """A kept derivative is held at the largest number; a 0 stays 0, whatever it is multiplied by."""
    high, zero = torch.full((1, 8), 12.0).half(), torch.zeros(1, 8).half()
    _, gradient, *_ = run_policy(policy, log_probs=high, old_log_probs=zero, advantages=-torch.ones(1, 8).half())
    assert (gradient == 65504).all()
    heads = {"values": zero.unsqueeze(-1), "old_values": zero.unsqueeze(-1), "returns": torch.ones(1, 8, 1).half()}
    kept = run_value(value, **heads)[1].view(1, 1, 8).clone()
    kept[0, 0, ::2] = 0
    one, infinite, out = torch.ones(1), torch.full((), torch.inf), torch.full_like(kept, torch.nan)
    library = value.scale_on_host
    library.restype = ctypes.c_char_p
    assert library(pointer(kept), pointer(infinite), pointer(one), ctypes.c_int64(1), (ctypes.c_int64 * 3)(1, 1, 8),
                   DTYPES.index(torch.float16), False, pointer(out)) is None  # fmt: skip
    assert out.flatten().tolist() == [0.0, -math.inf] * 4


def test_small_divergences_keep_their_digits(policy):
    for dtype in (torch.float32, torch.float64):
        for d in (1e-5, 1e-3, 0.3, -0.34, 0.36, -2.0):
            ref = torch.full((1, 1), d, dtype=dtype)
            zero = torch.zeros(1, 1, dtype=dtype)
            *_, packed = run_policy(policy, log_probs=zero, old_log_probs=zero, advantages=zero, ref_log_probs=ref)
            exact = torch.special.expm1(ref.double()) - ref.double()
            if abs(d) < 0.1:  # where the float64 difference itself has lost digits
                x = ref.double()
                exact = x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x / 120)))
            assert packed[6].item() == pytest.approx(exact.item(), rel=8 * torch.finfo(dtype).eps)


BARRIERS = 5  # of loss.cuh: two in Team::sum, two in leave, one after the last of meet


@pytest.mark.parametrize("barrier", range(BARRIERS))
def test_a_missing_barrier_is_seen(tmp_path, barrier):
    """Without one of its barriers a block gives other results in some order of the threads."""
    shutil.copytree(ROOT / "csrc/cuda", tmp_path / "cuda")
    header = tmp_path / "cuda/loss.cuh"
    pieces = header.read_text().split("__syncthreads();")
    assert len(pieces) == BARRIERS + 2  # and the one of a single block, in meet, which there the last `leave` hides
    joints = ["__syncthreads();"] * (len(pieces) - 1)
    joints[barrier if barrier < 4 else 5] = ""
    header.write_text("".join(p + j for p, j in zip(pieces, [*joints, ""], strict=True)))
    broken = build(tmp_path, "policy", tmp_path / "cuda").policy_on_host
    arguments = make((6, 600), aggregate="seq-mean-token-mean", objectives=2)
    expected = [x.detach() for x in POLICY.run(POLICY.public, arguments)[1] if x is not None]
    for order in ORDERS:
        _, metrics, _ = POLICY.run(as_policy_loss(broken, order), arguments)
        got = [x for x in metrics if x is not None]
        loss = run_policy(broken, order, **arguments)
        again = run_policy(broken, ORDERS[0], **arguments)
        if any((a - b).abs().max() > 1e-4 or a.isnan().any() for a, b in zip(got, expected, strict=True)):
            return
        if any(not torch.equal(a, b) for a, b in zip(loss, again, strict=True)):
            return
    pytest.fail("no order of the threads shows it")
