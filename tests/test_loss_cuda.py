"""The losses on a GPU: the specification, and what only a GPU has."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, surrounded
from compare import assert_same_bits
from loss_cases import AGGREGATES, POLICY, SHAPES, VALUE, VARIANTS, assert_computes, make, make_values
from torch.utils._pytree import tree_map

from pama_ext import policy_loss
from pama_ext._ops import scaled

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda")
LONG, SHORT = (5, 700), (40, 30)  # a block for a row, a warp for one
LOSSES = {"policy": POLICY, "value": VALUE}
DOORS = [(loss, door) for loss in LOSSES.values() for door in loss.doors().values()]
each_door = pytest.mark.parametrize(("loss", "door"), DOORS, ids=lambda x: getattr(x, "name", None) or x.__name__)


def there(tree):
    return tree_map(lambda x: x.to(CUDA) if isinstance(x, torch.Tensor) else x, tree)


def on_device(loss, door):
    """A door that moves its arguments to the GPU and its results back, autograd included."""

    def call(**arguments):
        value, metrics = door(**there(arguments))
        return value.cpu(), type(metrics)(*(None if x is None else x.cpu() for x in metrics))

    return call


def call(loss, shape, **options):
    return make(shape, **options) if loss is POLICY else make_values((*shape, 3), **options)


@each_door
@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, aggregate, loss, door):
    for variant in VARIANTS.values() if loss is POLICY else [{}, {"clip": None}]:
        assert_computes(loss, on_device(loss, door), call(loss, shape, aggregate=aggregate, **variant))


@each_door
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_layouts(dtype, loss, door):
    for aggregate in AGGREGATES:
        arguments = call(loss, LONG, dtype=dtype, aggregate=aggregate)
        assert_computes(loss, on_device(loss, door), arguments)
        strided = {k: surrounded(x) if isinstance(x, torch.Tensor) and x.dim() > 1 else x for k, x in arguments.items()}
        moved = there(strided)  # .to() makes dense what is not, so the slices are taken there
        moved = {k: surrounded(x) if isinstance(x, torch.Tensor) and x.dim() > 1 else x for k, x in moved.items()}
        got, expected = loss.run(door, moved), loss.run(door, there(arguments))
        assert_same_bits(got[0], expected[0])
        for a, b in zip(got[2], expected[2], strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("door", POLICY.doors().values(), ids=POLICY.doors())
@pytest.mark.parametrize("n", [1, 3, 64])
@pytest.mark.parametrize("by_row", [False, True])
def test_objectives(by_row, n, door):
    for aggregate in AGGREGATES:
        for shape in (LONG, SHORT):
            weights = torch.tensor([0.5 ** (i % 3) for i in range(n)])
            arguments = make(shape, objectives=n, by_row=by_row, aggregate=aggregate, weights=weights)
            assert_computes(POLICY, on_device(POLICY, door), arguments)


@each_door
@pytest.mark.parametrize("shape", [LONG, SHORT], ids=str)
def test_runs_on_the_current_stream_and_waits_for_nothing(shape, loss, door):
    options = {"normalizer": torch.tensor(7.0)} if loss is POLICY else {}
    arguments = there(call(loss, shape, **options))
    expected = loss.run(door, arguments)
    late = torch.zeros_like(arguments[loss.leaf])
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # cycles
            late.copy_(arguments[loss.leaf])
            result = loss.run(door, {**arguments, loss.leaf: late})
            assert not stream.query(), "the call waited for the stream"
    finally:
        torch.cuda.set_sync_debug_mode(before)
    stream.synchronize()
    assert_same_bits(result[0], expected[0])
    for a, b in zip(result[2], expected[2], strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("shape", [LONG, SHORT, (64, 1024)], ids=str)
def test_graph_capture_and_replay(shape, loss):
    arguments = there(call(loss, shape, aggregate="seq-mean-token-mean"))
    leaf = arguments[loss.leaf].clone().requires_grad_()

    def step():
        value, metrics = loss.public(**{**arguments, loss.leaf: leaf})
        (gradient,) = torch.autograd.grad(value, leaf)
        return value.detach(), gradient, *(x for x in metrics if x is not None)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    with torch.no_grad():
        leaf.copy_(arguments[loss.leaf] * 0.875)
    graph.replay()
    for a, b in zip(result, step(), strict=True):
        assert_same_bits(a, b)


def test_a_thousand_replays_with_other_inputs():
    arguments = there(make((64, 1024)))
    inputs = [arguments["log_probs"] * scale for scale in (1.0, 0.875, 1.125)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        policy_loss(**arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        written, _ = policy_loss(**arguments)
    with torch.no_grad():
        expected = [policy_loss(**{**arguments, "log_probs": x})[0] for x in inputs]
    for k in range(1000):
        arguments["log_probs"].copy_(inputs[k % 3])
        graph.replay()
        if k % 100 < 3:
            assert_same_bits(written, expected[k % 3])


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("shape", [LONG, SHORT, (64, 4096)], ids=str)
def test_the_same_input_gives_the_same_bits(shape, loss):
    arguments = there(call(loss, shape))
    first = loss.run(loss.public, arguments)
    for _ in range(5):
        again = loss.run(loss.public, arguments)
        for a, b in zip([first[0], *first[2]], [again[0], *again[2]], strict=True):
            assert_same_bits(a, b)


def test_memory_is_one_tensor_like_log_probs():
    arguments = there(make((512, 1024)))
    leaf = arguments.pop("log_probs").requires_grad_()
    policy_loss(leaf, **arguments)[0].backward()
    leaf.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    policy_loss(leaf, **arguments)[0].backward()
    assert torch.cuda.max_memory_allocated() - before < 1.1 * leaf.numel() * leaf.element_size()


def test_halves_are_scaled_by_a_float32():
    """Without the eager door too, where the factor is a tensor: that of a million tokens is below float16's range."""
    kept = torch.ones(1024, 1024, dtype=torch.float16, device=CUDA)
    factor = torch.tensor([2.0**-20], device=CUDA)
    got = scaled(kept, torch.tensor(2.0**16, device=CUDA), factor, 0, False)
    assert_same_bits(got, torch.full_like(kept, 2.0**-4))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_another_device_than_the_current_one(loss):
    arguments = call(loss, LONG)
    elsewhere = tree_map(lambda x: x.to("cuda:1") if isinstance(x, torch.Tensor) else x, arguments)
    value, _, gradients = loss.run(loss.public, elsewhere)
    assert torch.cuda.current_device() == 0
    assert value.device.index == gradients[0].device.index == 1
    expected = loss.run(loss.public, arguments)
    torch.testing.assert_close(value.cpu(), expected[0])
