"""The dispatcher's door as PyTorch uses it: opcheck, fake and meta tensors, modes and subclasses."""

from __future__ import annotations

import pytest
import torch
from cases import LEVELS, make, normal
from compare import assert_same_bits, assert_same_result
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pama_ext import Normalize, combine, combine_

NAMES = ("dim", "mask", "log_ratio", "clip_low", "clip_high", "noon", "level", "solver", "normalize", "groups",
         "reward_weights", "reward_values", "nan", "skip_inactive")  # fmt: skip
DEFAULTS = (-1, None, None, 0.2, 0.2, True, "batch", "closed_form", "", None, None, None, "ignore", False)


PROBLEM = make((6, 9, 3), draw=normal)


def arguments(advantages, **options):
    return (advantages, *{**dict(zip(NAMES, DEFAULTS, strict=True)), **options}.values())


def samples(op: str, device: torch.device) -> list[tuple]:
    """Arguments for one operator; every operator of the namespace must have some."""
    x = normal((4, 6, 3), torch.Generator().manual_seed(0)).to(device)
    mask, ratio = torch.ones(4, 6, dtype=torch.bool, device=device), torch.zeros(4, 6, device=device)
    columns = [c.clone() for c in x.unbind(-1)]
    calls = [
        arguments([x.clone()]),
        arguments([x.clone()], mask=mask, log_ratio=ratio, reward_weights=torch.ones(3, device=device)),
        arguments([x.movedim(-1, 0).clone()], dim=0, level="sequence", reward_values=[1.0, 2.0, 0.5]),
        arguments(columns, dim=None, level="token", solver="fixed", mask=mask),
        arguments([x.bfloat16()], nan="propagate", skip_inactive=True),
        arguments([x.clone()], normalize=Normalize(group_size=2)._spec, level="group", solver="min_norm"),
    ]
    if op == "min_norm":
        return [(torch.eye(3, device=device).repeat(4, 1, 1),), (torch.ones(0, 2, 2, device=device).double(),)]
    if op == "gae":
        score = torch.ones(4, device=device)
        plain = (columns, columns, 2, None, None, [0.9] * 3, None, [0.95] * 3, None, [], None)
        full = (columns, columns, 1, mask, torch.ones(3, device=device), [], torch.ones(3, device=device), [], ratio,
                [score] * 3, None)  # fmt: skip
        flat = [c.bfloat16().flatten() for c in columns]
        offsets = torch.tensor([0, 4, 4, 24], device=device)
        packed = ([score[:3]] * 3, flat, 0, mask.flatten(), None, [1.0] * 3, None, [1.0] * 3, None, [], offsets)
        return [plain, full, packed]
    if op == "policy_loss":
        score, leaf = torch.ones(4, device=device), ratio.clone().requires_grad_()
        plain = (leaf, ratio, [columns[0]], False, None, [1.0], None, None, 0.2, 0.2, None, None, 0.0, "token-mean",
                 None, None, True)  # fmt: skip
        full = (leaf.detach().bfloat16().requires_grad_(), ratio, columns, True, torch.ones(3, device=device), [], mask,
                ratio - 1, 0.2, 0.2, 3.0, None, 0.1, "seq-mean-token-mean", torch.tensor(4, device=device), None,
                True)  # fmt: skip
        constant = (ratio.double(), ratio, [score] * 2, False, None, [1.0, 2.0], mask, None, 0.2, 0.2, None, 2.0, 0.0,
                    "token-sum", None, 5.0, False)  # fmt: skip
        return [plain, full, constant]
    if op == "value_loss":
        leaf = x.clone().requires_grad_()
        leaves = [c.clone().requires_grad_() for c in columns]
        whole = ([leaf], columns, columns, 0.2, mask, "seq-mean-token-sum", None, None, True)
        listed = (leaves, [], columns, 0.0, None, "seq-mean-token-mean", None, 3.0, True)
        return [whole, listed, ([x.half()], [], columns, 0.0, None, "token-mean", None, None, False)]
    if op == "combine_out":
        return [(*call, torch.empty(4, 6, dtype=call[0][0].dtype, device=device)) for call in calls]
    return {"combine": calls, "combine_": calls}[op]


def operators() -> list[str]:
    return sorted(
        {
            name.split("::")[1].split(".")[0]
            for name in torch._C._dispatch_get_all_op_names()
            if name.startswith("pama_ext::")
        }
    )


@pytest.mark.parametrize("op", operators())
def test_opcheck(op, device):
    for sample in samples(op, device):
        torch.library.opcheck(getattr(torch.ops.pama_ext, op).default, sample)


def test_there_are_operators():
    assert operators() == ["combine", "combine_", "combine_out", "gae", "min_norm", "policy_loss", "value_loss"]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_fake_and_meta_tensors(kind, dtype, level, device):
    problem = make((6, 9, 3), dtype, level=level).to(device)
    real = combine(problem.values, **problem.options)
    if kind == "meta":
        problem = problem.to(torch.device("meta"))
        fake = combine(problem.values, **problem.options)
        in_place = combine_(problem.values, **problem.options)
    else:
        with FakeTensorMode() as mode:
            options = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in problem.options.items()}
            values = mode.from_tensor(problem.values)
            fake, in_place = combine(values, **options), combine_(values, **options)
            out = torch.empty(6, 9, dtype=dtype, device=device)
            assert combine(values, out=out, **options).advantages is out
    for a, b in zip(torch.utils._pytree.tree_leaves(fake), torch.utils._pytree.tree_leaves(real), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert a.device.type == ("meta" if kind == "meta" else b.device.type)
    assert in_place.weights.shape == real.weights.shape


def test_modes_and_subclasses_see_the_operator(device):
    seen = []

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(str(op))
            return op(*args, **(kwargs or {}))

    class Function(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, op, types, args=(), kwargs=None):
            seen.append(str(op))
            return op(*args, **(kwargs or {}))

    class Named(torch.Tensor):
        @classmethod
        def __torch_function__(cls, op, types, args=(), kwargs=None):
            seen.append(str(op))
            return super().__torch_function__(op, types, args, kwargs or {})

    problem = PROBLEM.to(device)
    expected = combine(problem.values, **problem.options)
    for context in (Dispatch, Function):
        seen.clear()
        with context():
            result = combine(problem.values, **problem.options)
        assert any("pama_ext" in name for name in seen), seen
        assert_same_result(result, expected)
    seen.clear()
    result = combine(problem.values.as_subclass(Named), **problem.options)
    assert any("pama_ext" in name for name in seen)
    assert_same_bits(result.advantages.as_subclass(torch.Tensor), expected.advantages)


def test_tensors_without_memory():
    """They are plain torch.Tensors to look at; there is nothing to read behind them."""
    x, zeros = torch.randn(6, 3), torch._efficientzerotensor((6, 3))
    expected = combine(x).advantages
    assert_same_bits(torch.func.functionalize(lambda a: combine(a).advantages)(x), expected)
    assert_same_bits(combine(zeros).advantages, torch.zeros(6))
    assert (combine(x, mask=torch._efficientzerotensor((6,))).stats.count == 0).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trace_records_the_operator():
    x, other = torch.randn(6, 3), torch.randn(6, 3)
    traced = torch.jit.trace(lambda a: combine(a).advantages + a.sum(), x, check_trace=False)
    assert_same_bits(traced(other), combine(other).advantages + other.sum())
