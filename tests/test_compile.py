"""torch.compile and torch.export: one graph, and bit for bit what eager gives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from cases import make, normal
from compare import assert_same_bits

from pama_ext import _checks, combine, combine_

PROBLEM = make((6, 9, 3), draw=normal)
CALLS = {
    "combine": lambda x, **o: combine(x, **o),
    "fields": lambda x, **o: (lambda r: (r.advantages + r.value, r.weights * 2, r.stats.mean))(combine(x, **o)),
    "unpacked": lambda x, **o: (lambda a, w, v, s: (a + v, w * 2, s.mean))(*combine(x, **o)),
    "items": lambda x, **o: (lambda r: (r[0] + r[2], r[1:3], len(r)))(combine(x, **o))[:2],
    "dict": lambda x, **o: combine({"a": x[..., 0], "b": x[..., 1]}, **o),
    "list": lambda x, **o: combine(list(x.unbind(-1)), **o),
    "rewards": lambda x, **o: combine(x, reward_weights=[1.0, 2.0, 0.5], **o),
    "out": lambda x, **o: combine(x, out=torch.zeros(x.shape[:2], device=x.device), **o),
    "in place": lambda x, **o: combine_(x * 1, **o),
    "sequence": lambda x, **o: combine(x, level="sequence", **o),
    "dim": lambda x, **o: combine(x.movedim(-1, 1), dim=1, level="token", **o),
}


def assert_same_tree(actual, expected) -> None:
    for a, b in zip(torch.utils._pytree.tree_leaves(actual), torch.utils._pytree.tree_leaves(expected), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(call, dynamic, device):
    """No graph break, and bit for bit what eager gives; with dynamic shapes another size is not compiled again."""
    torch.compiler.reset()
    problem = PROBLEM.to(device)
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert_same_tree(compiled(problem.values, **problem.options), call(problem.values, **problem.options))
    if dynamic:
        other = make((5, 8, 3), seed=2, draw=normal).to(device)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert_same_tree(compiled(other.values, **other.options), call(other.values, **other.options))


def test_compile_with_inductor(device):
    torch.compiler.reset()
    problem = PROBLEM.to(device)

    def step(x, mask, log_ratio):
        result = combine(x * 2, mask=mask, log_ratio=log_ratio)
        return result.advantages * 3, result.weights.sum(), result.value

    tensors = (problem.values, problem.options["mask"], problem.options["log_ratio"])
    got, expected = torch.compile(step, fullgraph=True)(*tensors), step(*tensors)
    assert_same_bits(got[0], expected[0])
    assert_same_bits(got[2], expected[2])


def test_compiled_mutation_is_seen(device):
    torch.compiler.reset()
    x, out = PROBLEM.values.to(device), torch.zeros(6, 9, device=device)

    def write(x, out):
        combine(x, out=out)
        return combine_(x).value

    expected_x, expected_out = x.clone(), out.clone()
    value = write(expected_x, expected_out)
    assert_same_bits(torch.compile(write, fullgraph=True, backend="aot_eager")(x, out), value)
    assert_same_bits(x, expected_x)
    assert_same_bits(out, expected_out)


def test_an_eager_result_enters_a_compiled_function():
    """Its pending fields settle there too."""
    torch.compiler.reset()
    result, expected = combine(PROBLEM.values), combine(PROBLEM.values)
    got = torch.compile(lambda r: r.weights * 2 + r.stats.mean, backend="aot_eager")(result)
    assert_same_bits(got, expected.weights * 2 + expected.stats.mean)


class Module(torch.nn.Module):
    def forward(self, x, mask):
        result = combine(x, mask=mask)
        return result.advantages, result.weights, result.value


def test_checks_of_a_gpu_tensor_are_traced(monkeypatch):
    """Nothing compiled is called on the way, where no GPU is needed to see it."""
    monkeypatch.setattr(_checks, "HAS_CUDA", True)
    there = SimpleNamespace(device=torch.device("cuda"))

    @torch.compile(backend="eager", fullgraph=True)
    def f(x):
        _checks.served("advantages", there)
        return x + 1

    assert f(torch.ones(1)) == 2


def test_what_has_no_kernels_is_refused(monkeypatch):
    monkeypatch.setattr(_checks, "HAS_CUDA", False)
    with pytest.raises(ValueError, match="advantages: on cuda:0, but this build has no CUDA kernels"):
        _checks.served("advantages", SimpleNamespace(device=torch.device("cuda:0")))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, device):
    problem = PROBLEM.to(device)
    tensors = (problem.values, problem.options["mask"])
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(Module(), tensors, dynamic_shapes=({0: rows}, {0: rows}), strict=strict)
    assert "pama_ext.combine" in program.graph_module.code
    other = make((3, 9, 3), seed=3).to(device)
    for x, mask in (tensors, (other.values, other.options["mask"])):
        assert_same_tree(program.module()(x, mask), Module()(x, mask))
