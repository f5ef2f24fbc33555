"""The losses and autograd: gradcheck, one derivative only, retained graphs, memory, hooks, compile, export."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import assert_same_bits
from loss_cases import AGGREGATES, POLICY, VALUE, make, make_values
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pama_ext import _C, policy_loss, value_loss

LOSSES = {"policy": POLICY, "value": VALUE}
DOORS = [(loss, door) for loss in LOSSES.values() for door in loss.doors().values()]
each_door = pytest.mark.parametrize(("loss", "door"), DOORS, ids=lambda x: getattr(x, "name", None) or x.__name__)


def call(loss, dtype=torch.float32, **options):
    """Arguments without the one that the loss is differentiable in, and that."""
    arguments = make((4, 9), dtype, **options) if loss is POLICY else make_values((4, 9, 3), dtype, **options)
    leaf = arguments.pop(loss.leaf).requires_grad_()
    return leaf, arguments


@each_door
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_gradcheck(aggregate, loss, door):
    variants = [{}, {"dual_clip": 2.0}, {"ref": True, "kl_coef": 0.3}, {"objectives": 3, "weights": [0.5, 2.0, 0.0]}]
    for options in variants if loss is POLICY else [{}, {"clip": None}]:
        leaf, arguments = call(loss, torch.float64, aggregate=aggregate, **options)
        torch.autograd.gradcheck(lambda x, a=arguments: door(**{loss.leaf: x}, **a)[0], leaf)


@each_door
def test_gradcheck_of_a_list(loss, door):
    if loss is POLICY:
        return
    leaf, arguments = call(loss, torch.float64)
    columns = [c.detach().clone().requires_grad_() for c in leaf.unbind(-1)]
    torch.autograd.gradcheck(lambda *x: door(values=list(x), **arguments)[0], columns)


def test_a_truncated_weight_is_a_constant():
    """Numerically the weight would be differentiated as well, so its gradient is that of weight times log_probs."""
    leaf, arguments = call(POLICY, torch.float64, max_weight=2.0)
    loss, _ = policy_loss(leaf, **arguments)
    loss.backward()
    weight = (leaf - arguments["old_log_probs"]).exp().clamp(max=2.0).detach()
    mask = arguments["mask"]
    expected = torch.where(mask, -weight * arguments["advantages"] / mask.sum(), 0.0)
    torch.testing.assert_close(leaf.grad, expected)


@each_door
def test_there_is_no_second_derivative(loss, door):
    """A clear error instead of a gradient penalty that silently is constant; create_graph by itself is fine."""
    leaf, arguments = call(loss)
    value, _ = door(**{loss.leaf: leaf}, **arguments)
    (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
    assert gradient.requires_grad
    with pytest.raises(RuntimeError, match="the losses have no second derivative"):
        gradient.square().sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="the losses have no second derivative"):  # reached on another way too
        torch.autograd.grad(gradient.square().sum() + leaf.square().sum(), leaf)
    leaf, arguments = call(loss, torch.float64)
    with pytest.raises(RuntimeError, match="the losses have no second derivative"):
        torch.autograd.gradgradcheck(lambda x: door(**{loss.leaf: x}, **arguments)[0], leaf)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("listed", [False, True], ids=["whole", "listed"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_operators_have_a_rule_of_their_own(loss, listed, aggregate):
    """That of compiled code, which eager calls do not take."""
    leaf, arguments = call(loss, aggregate=aggregate)
    leaves = [c.detach().clone().requires_grad_() for c in leaf.unbind(-1)] if listed and loss is VALUE else [leaf]
    mask = arguments["mask"]
    if loss is POLICY:
        given = (leaf, arguments["old_log_probs"], [arguments["advantages"]] * 2, True, None, [1.0, 0.5], mask, None,
                 0.2, 0.2, None, None, 0.0, aggregate, None, None, True)  # fmt: skip
        expected = loss.run(policy_loss, {**arguments, "advantages": 1.5 * arguments["advantages"], "log_probs": leaf})
    else:
        columns = [list(arguments[name].unbind(-1)) for name in ("old_values", "returns")]
        given = (leaves, *columns, 0.2, mask, aggregate, None, None, True)
        expected = loss.run(value_loss, {**arguments, "values": leaves if listed else leaf})
    value = getattr(torch.ops.pama_ext, loss.name)(*given)[0]
    gradients = torch.autograd.grad(value, leaves, create_graph=True)
    torch.testing.assert_close(value.detach(), expected[0])
    for a, b in zip(gradients, expected[2], strict=True):
        torch.testing.assert_close(a.detach(), b)
    with pytest.raises(RuntimeError, match="the losses have no second derivative"):
        sum(g.square().sum() for g in gradients).backward()


@each_door
def test_a_retained_graph_is_differentiated_again(loss, door):
    leaf, arguments = call(loss)
    value, _ = door(**{loss.leaf: leaf}, **arguments)
    (first,) = torch.autograd.grad(value, leaf, torch.tensor(3.0), retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(value, leaf, torch.tensor(2.0), retain_graph=True)
    (third,) = torch.autograd.grad(value, leaf, torch.tensor(3.0))
    assert_same_bits(first, kept)
    assert_same_bits(third, kept)
    torch.testing.assert_close(second, kept * 2 / 3)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(value, leaf)


@each_door
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_scaling_in_place_and_not_are_the_same(aggregate, dtype, loss, door):
    leaf, arguments = call(loss, dtype, aggregate=aggregate)
    gradients = []
    for retain in (True, False):
        value, _ = door(**{loss.leaf: leaf}, **arguments)
        gradients += torch.autograd.grad(value, leaf, torch.tensor(0.3), retain_graph=retain)
    assert_same_bits(*gradients)


IN_PLACE = {"/=": lambda x: x.div_(4), "+=": lambda x: x.add_(0.5), "*=": lambda x: x.mul_(3.0)}


@each_door
@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
def test_the_loss_may_be_changed_in_place(change, loss, door):
    """As trainers do that accumulate gradients; eager, compiled, and by the operator's own rule."""
    leaf, arguments = call(loss)
    reference, _ = loss.specification(**{loss.leaf: leaf}, **arguments)
    (expected,) = torch.autograd.grad(change(reference), leaf)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: change(loss.public(**{loss.leaf: x}, **arguments)[0]), backend="aot_eager")
    for value in (change(door(**{loss.leaf: leaf}, **arguments)[0]), compiled(leaf)):
        torch.testing.assert_close(value.detach(), reference.detach())
        torch.testing.assert_close(torch.autograd.grad(value, leaf)[0], expected)


@each_door
def test_what_else_requires_grad_does_not_matter(loss, door):
    """Where log_probs or values do not, the loss does not either."""
    options = {"ref": True, "kl_coef": 0.1, "objectives": 2, "weights": torch.ones(2)} if loss is POLICY else {}
    leaf, arguments = call(loss, **options)
    arguments["mask"] = arguments["mask"].float()
    others = {k: x.clone().requires_grad_() if isinstance(x, torch.Tensor) else x for k, x in arguments.items()}
    value, metrics = door(**{loss.leaf: leaf.detach()}, **others)
    assert not value.requires_grad
    assert not any(x.requires_grad for x in metrics if x is not None)


@each_door
def test_a_derivative_of_0_stays_0(loss, door):
    """Masked and clipped tokens, whatever the incoming gradient or the normalizer makes of the others."""
    leaf, arguments = call(loss)
    (zeros,) = (x == 0 for x in loss.run(door, {**arguments, loss.leaf: leaf.detach()})[2])
    assert zeros.any() and not zeros.all()
    for incoming, options in ((torch.inf, {}), (torch.nan, {}), (1.0, {"normalizer": 1e-40})):
        _, _, (gradient,) = loss.run(door, {**arguments, **options, loss.leaf: leaf.detach()}, incoming)
        assert (gradient[zeros] == 0).all()
        assert not gradient[~zeros].isfinite().any()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.numpy().copy(), torch.from_numpy):
        value, _ = door(**{loss.leaf: leaf}, **arguments)
    value.backward(torch.tensor(torch.inf))
    assert (leaf.grad[zeros] == 0).all()


def test_a_backward_that_failed_half_way_is_not_repeated_wrongly():
    """What was kept is scaled by then; torch says that it has changed."""
    leaf, arguments = call(POLICY)
    value, _ = policy_loss(leaf, **arguments)

    def fail(inputs, outputs):
        raise RuntimeError("a hook")

    handle = value.grad_fn.register_hook(fail)
    with pytest.raises(RuntimeError, match="a hook"):
        value.backward()
    handle.remove()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@each_door
def test_there_is_no_forward_derivative(loss, door):
    leaf, arguments = call(loss)
    expected, _ = door(**{loss.leaf: leaf.detach()}, **arguments)
    with torch.autograd.forward_ad.dual_level():
        got, _ = loss.public(**{loss.leaf: leaf.detach()}, **arguments)
        assert_same_bits(got, expected)
        dual = torch.autograd.forward_ad.make_dual(leaf.detach(), torch.ones_like(leaf))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            loss.public(**{loss.leaf: dual}, **arguments)


@each_door
def test_only_one_argument_has_a_gradient(loss, door):
    leaf, arguments = call(loss, **({"ref": True, "kl_coef": 0.1, "objectives": 2} if loss is POLICY else {}))
    others = {
        k: x.requires_grad_() for k, x in arguments.items() if isinstance(x, torch.Tensor) and x.is_floating_point()
    }
    if loss is POLICY:
        arguments["weights"] = others["weights"] = torch.ones(2, requires_grad=True)
        arguments["normalizer"] = others["normalizer"] = torch.tensor(5.0, requires_grad=True)
    value, metrics = door(**{loss.leaf: leaf}, **arguments)
    assert not any(x.requires_grad for x in metrics if x is not None)
    value.backward()
    assert leaf.grad is not None
    assert all(x.grad is None for x in others.values())


@each_door
def test_without_grad_nothing_is_kept(loss, door):
    leaf, arguments = call(loss)
    expected, _ = door(**{loss.leaf: leaf}, **arguments)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            value, _ = door(**{loss.leaf: leaf}, **arguments)
        assert not value.requires_grad
        assert_same_bits(value.detach().clone(), expected.detach())
    value, _ = door(**{loss.leaf: leaf.detach()}, **arguments)
    assert not value.requires_grad


@each_door
def test_inputs_stay_as_they_are(loss, door):
    leaf, arguments = call(loss)
    before = copy.deepcopy({**arguments, loss.leaf: leaf.detach()})
    door(**{loss.leaf: leaf}, **arguments)[0].backward()
    for name, x in before.items():
        if isinstance(x, torch.Tensor):
            assert_same_bits({**arguments, loss.leaf: leaf.detach()}[name], x)


PEAK = """
import torch, pama_ext
tensors = [torch.randn(1024, 8192) for _ in range(3)]
leaf, mask = tensors[0].requires_grad_(), torch.ones(1024, 8192, dtype=torch.bool)

def step(*given, **options):
    loss, _ = pama_ext.policy_loss(*given, **options)
    loss.backward()

def memory(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

step(torch.ones(2, 2, requires_grad=True), *[torch.ones(2, 2)] * 2)
for aggregate in ("token-mean", "seq-mean-token-mean"):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before = memory("VmRSS")
    step(*tensors, mask=mask, aggregate=aggregate)
    print((memory("VmHWM") - before) / (leaf.numel() * leaf.element_size()))
    leaf.grad = None
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of memory")
@pytest.mark.skipif(not _C.has_door(), reason="this torch has no exchange table")
def test_peak_memory_is_one_tensor_like_log_probs():
    """Forward and backward together: the gradient itself, and next to nothing else."""
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    first, second = map(float, run.stdout.split())
    assert 0.9 < first < 1.1
    assert second < 1.1  # the memory that was released may serve once more


@pytest.mark.skipif(not _C.has_door(), reason="this torch has no exchange table")
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_what_is_kept_is_handed_over(aggregate):
    leaf, arguments = call(POLICY, aggregate=aggregate)
    loss, _ = policy_loss(leaf, **arguments)
    kept, scale = loss.grad_fn.saved_tensors
    assert kept.shape == leaf.shape
    assert scale.shape == ((5,) if aggregate == "seq-mean-token-mean" else (1,))
    pointer = kept.data_ptr()
    del kept, scale
    loss.backward()
    assert leaf.grad.data_ptr() == pointer


def test_hooks_on_saved_tensors_are_served():
    leaf, arguments = call(POLICY, aggregate="seq-mean-token-mean")
    expected, _, (gradient,) = POLICY.run(policy_loss, {**arguments, "log_probs": leaf.detach()})
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.numpy().copy(), torch.from_numpy):
        value, _ = policy_loss(leaf, **arguments)
    value.backward()
    assert_same_bits(value.detach(), expected)
    assert_same_bits(leaf.grad, gradient)


def test_checkpointing_computes_it_again():
    leaf, arguments = call(POLICY)
    expected = POLICY.run(policy_loss, {**arguments, "log_probs": leaf.detach()})[2][0]
    value = torch.utils.checkpoint.checkpoint(lambda x: policy_loss(x, **arguments)[0], leaf, use_reentrant=False)
    value.backward()
    assert_same_bits(leaf.grad, expected)


@each_door
def test_functorch_has_no_rule_and_says_so(loss, door):
    leaf, arguments = call(loss)
    for transform, x in ((torch.func.grad, leaf.detach()), (torch.func.vmap, torch.stack([leaf.detach()] * 2))):
        with pytest.raises(RuntimeError, match=r"functorch|Batching rule not implemented"):
            transform(lambda x: loss.public(**{loss.leaf: x}, **arguments)[0])(x)


def test_autocast_and_gradient_accumulation():
    leaf, arguments = call(POLICY)
    expected = POLICY.run(policy_loss, {**arguments, "log_probs": leaf.detach()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, _ = policy_loss(leaf, **arguments)
    assert_same_bits(value.detach(), expected[0])
    (value / 4).backward()
    for _ in range(3):
        (policy_loss(leaf, **arguments)[0] / 4).backward()
    torch.testing.assert_close(leaf.grad, expected[2][0])


STEPS = {
    "policy": (POLICY, {}),
    "policy, rows": (POLICY, {"aggregate": "seq-mean-token-mean", "by_row": True, "dual_clip": 3.0}),
    "policy, objectives": (POLICY, {"objectives": 3, "weights": [0.5, 1.0, 2.0], "ref": True, "kl_coef": 0.1}),
    "policy, normalizer": (POLICY, {"normalizer": torch.tensor(17), "max_weight": 2.0}),
    "value": (VALUE, {}),
    "value, rows": (VALUE, {"aggregate": "seq-mean-token-mean", "clip": None}),
}


@pytest.mark.parametrize(("loss", "options"), STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, dynamic, loss, options):
    """One graph, forward and backward, and the numbers of eager."""
    torch.compiler.reset()
    leaf, arguments = call(loss, **options)

    def step(x, arguments):
        value, metrics = loss.public(**{loss.leaf: x * 2}, **arguments)
        return value * 3, metrics

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=backend)
    results = []
    for function in (compiled, step):
        x = leaf.detach().clone().requires_grad_()
        value, metrics = function(x, arguments)
        value.backward()
        results.append([value.detach(), x.grad, *(m for m in metrics if m is not None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        assert not a.requires_grad
    if dynamic:
        with torch.compiler.set_stance("fail_on_recompile"):
            more = tree_map(lambda x: x[:3] if isinstance(x, torch.Tensor) and x.dim() > 0 else x, arguments)
            compiled(leaf.detach()[:3].clone().requires_grad_(), more)[0].backward()


def test_compile_of_lists():
    torch.compiler.reset()
    _, arguments = call(VALUE)
    columns = [torch.randn(4, 9, requires_grad=True) for _ in range(3)]
    compiled = torch.compile(lambda x: value_loss(x, **arguments)[0], fullgraph=True, backend="aot_eager")
    compiled(columns).backward()
    got = [c.grad.clone() for c in columns]
    expected = VALUE.run(value_loss, {**arguments, "values": columns})[2]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


class Step(torch.nn.Module):
    def forward(self, log_probs, old_log_probs, advantages):
        loss, metrics = policy_loss(log_probs, old_log_probs, advantages, dual_clip=3.0)
        return loss, metrics.clip_fraction


def test_export():
    tensors = tuple(torch.randn(3, 7) for _ in range(3))
    program = torch.export.export(Step(), tensors)
    assert "pama_ext.policy_loss" in program.graph_module.code
    for a, b in zip(program.module()(*tensors), Step()(*tensors), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize(("loss", "options"), STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_fake_and_meta_tensors_have_the_form_of_real_ones(dtype, loss, options):
    leaf, arguments = call(loss, dtype, **options)

    def leaves(result):
        return [x for x in tree_leaves(result) if x is not None]

    real = leaves(loss.public(**{loss.leaf: leaf}, **arguments))
    with FakeTensorMode() as mode:
        moved = tree_map(lambda x: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x, arguments)
        fake = leaves(loss.public(**{loss.leaf: mode.from_tensor(leaf)}, **moved))
    moved = tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, arguments)
    meta = leaves(loss.public(**{loss.leaf: leaf.detach().to("meta").requires_grad_()}, **moved))
    for a, b, c in zip(real, fake, meta, strict=True):
        assert a.shape == b.shape == c.shape
        assert a.dtype == b.dtype == c.dtype
        assert a.requires_grad == b.requires_grad == c.requires_grad


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_modes_see_the_operator(loss):
    seen = []

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(str(op))
            return op(*args, **(kwargs or {}))

    leaf, arguments = call(loss)
    expected = loss.run(loss.public, {**arguments, loss.leaf: leaf.detach()})
    with Dispatch():
        value, _ = loss.public(**{loss.leaf: leaf}, **arguments)
        value.backward()
    assert f"pama_ext.{loss.name}.default" in seen
    assert_same_bits(value.detach(), expected[0])
    torch.testing.assert_close(leaf.grad, expected[2][0])


def test_negative_bit_views_are_read_with_their_sign():
    leaf, arguments = call(POLICY)
    lazy = torch.complex(leaf.detach(), -arguments["old_log_probs"]).conj().imag
    assert lazy.is_neg()
    got, _ = policy_loss(leaf, **{**arguments, "old_log_probs": lazy})
    assert_same_bits(got.detach(), policy_loss(leaf, **arguments)[0].detach())
