"""``gae`` on a GPU: the specification, and what only a GPU has."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES
from compare import assert_same_bits
from gae_cases import DOORS, SHAPES, assert_computes, call, lay_out, listed, make, wide
from torch.utils._pytree import tree_map

from pama_ext import gae, reference

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda")
LONG, SHORT = (5, 700, 3), (40, 30, 4)  # a block for a sequence, a warp for one


def there(arguments: dict) -> dict:
    return tree_map(lambda x: x.to(CUDA) if isinstance(x, torch.Tensor) else x, arguments)


def here(result):
    return tree_map(lambda x: x.cpu(), result)


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
@pytest.mark.parametrize("outcome", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, outcome, door):
    for dtype in DTYPES:
        arguments = make(shape, dtype, outcome=outcome)
        assert_computes(here(call(door, there(arguments))), arguments)


@pytest.mark.parametrize("form", ["tensor", "slice", "list", "dict"])
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("shape", [LONG, SHORT], ids=str)
def test_layouts(shape, dim, form):
    arguments = {**make(shape), "dim": dim}
    for name in ("rewards", "values", "bootstrap"):
        arguments[name] = lay_out(arguments[name], form, dim, 2)
    moved = there(arguments)
    results = [call(door, moved) for door in DOORS.values()]
    assert_computes(here(results[0]), arguments)
    for ours, theirs in zip(results[0], results[-1], strict=True):
        for a, b in zip(listed(ours), listed(theirs), strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("n", [1, 3])
def test_rows_with_gaps(n):
    """The entries of a sequence follow each other, the sequences do not."""
    arguments = make((5, 700, n))
    whole = {name: torch.cat([arguments[name], arguments[name]], 1).to(CUDA) for name in ("rewards", "values")}
    moved = there(arguments) | {name: x[:, :700] for name, x in whole.items()}
    assert_computes(here(call(gae, moved)), arguments)


@pytest.mark.parametrize("packed", [[], [0], [1], [0, 1, 0, 5, 600, 0], [3] * 90], ids=str)
@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_packed(kind, packed):
    arguments = make((sum(packed), 3), packed=packed)
    arguments["offsets"] = arguments["offsets"].to(kind)
    assert_computes(here(call(gae, there(arguments))), arguments)


def test_offsets_are_kept_within_the_tokens():
    """They are not looked at; those that do not fit must not touch other memory."""
    arguments = there(make((50, 3), packed=[20, 30], mask=None, kl_penalty=None, bootstrap=None))
    arguments["offsets"] += torch.tensor([-7, 0, 1000], device=CUDA)
    expected = call(reference.gae, wide(make((50, 3), packed=[20, 30], mask=None, kl_penalty=None, bootstrap=None)))
    for a, b in zip(here(call(gae, arguments)), expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [LONG, SHORT], ids=str)
def test_discounts_on_the_device(shape):
    arguments = make(shape)
    tensors = {k: torch.tensor(arguments[k], dtype=torch.float64) for k in ("gamma", "lam")}
    assert_computes(here(call(gae, there(arguments | tensors))), arguments)


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
@pytest.mark.parametrize("shape", [LONG, SHORT], ids=str)
def test_runs_on_the_current_stream_and_waits_for_nothing(shape, door):
    arguments = there(make(shape))
    expected = call(door, arguments)
    late = torch.zeros_like(arguments["values"])
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # cycles
            late.copy_(arguments["values"])
            result = call(door, {**arguments, "values": late})
            assert not stream.query(), "the call waited for the stream"
    finally:
        torch.cuda.set_sync_debug_mode(before)
    stream.synchronize()
    for a, b in zip(result, expected, strict=True):
        assert_same_bits(a, b)


def captured(arguments):
    """A CUDA graph of one call, and where its results will be."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(gae, arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(gae, arguments)
    return graph, result


@pytest.mark.parametrize("shape", [LONG, SHORT], ids=str)
def test_graph_capture_and_replay(shape):
    arguments, other = there(make(shape)), torch.randn(shape, device=CUDA)
    graph, result = captured(arguments)
    arguments["values"].copy_(other)
    graph.replay()
    for a, b in zip(result, call(gae, arguments), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("shape", [LONG, SHORT, (64, 1024, 3)], ids=str)
def test_the_same_input_gives_the_same_bits(shape):
    arguments = there(make(shape))
    first = call(gae, arguments)
    for _ in range(5):
        for a, b in zip(call(gae, arguments), first, strict=True):
            assert_same_bits(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one():
    arguments = make(LONG)
    elsewhere = tree_map(lambda x: x.to("cuda:1") if isinstance(x, torch.Tensor) else x, arguments)
    result = call(gae, elsewhere)
    assert torch.cuda.current_device() == 0
    assert all(x.device.index == 1 for x in result)
    assert_computes(here(result), arguments)


@pytest.mark.parametrize("shape", [LONG, SHORT], ids=str)
def test_a_thousand_replays_with_other_inputs(shape):
    arguments = there(make(shape))
    graph, written = captured(arguments)
    inputs = [arguments["values"] * scale for scale in (1.0, -0.5, 2.0)]
    expected = [call(gae, {**arguments, "values": x}) for x in inputs]
    for k in range(1000):
        arguments["values"].copy_(inputs[k % 3])
        graph.replay()
        if k % 100 < 3:
            for ours, theirs in zip(written, expected[k % 3], strict=True):
                assert_same_bits(ours, theirs)
