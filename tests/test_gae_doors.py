"""``gae`` as PyTorch sees it: doors, compile, export, fake tensors, memory; and every way to call it wrongly."""

from __future__ import annotations

import threading

import pytest
import torch
from compare import assert_same_bits
from gae_cases import DOORS, call, eager, lay_out, listed, make
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pama_ext import _C, gae
from pama_ext._gae import _gae_dispatcher

X = torch.ones(4, 5, 3)
S = torch.ones(4, 3)
OFFSETS = torch.tensor([0, 4, 20])
FLAT = torch.ones(20, 3)
FLAT_COLUMNS = list(FLAT.unbind(-1))
VE, TE = ValueError, TypeError

# arguments, exception, what the message says
ERRORS = [
    ({"values": 3.0}, TE, "values: expected a tensor, or a sequence or dict of tensors, got a float"),
    ({"values": []}, VE, "values: expected at least one objective, got none"),
    ({"values": [X[..., 0], 2.0]}, TE, r"values\[1\]: expected a tensor, got a float"),
    ({"values": {"a": X[..., 0], "b": X[0]}}, VE, r"values\['b'\]: expected one shape for all"),
    ({"values": [X[..., 0], X[..., 0].half()]}, TE, r"values\[1\]: expected one dtype for all"),
    ({"values": {1: X[..., 0]}}, TE, r"values: expected str keys, got \(1,\)"),
    ({"values": X.long()}, TE, "values: expected float32, float64, float16 or bfloat16, got torch.int64"),
    ({"values": X.to_sparse()}, TE, "values: expected a strided tensor"),
    ({"values": torch.ones(4)}, VE, r"values: expected \[B, T, N\] or \[B, N\], got \[4\]"),
    ({"values": S}, VE, r"values: expected \[B, T, N\], or N tensors \[B, T\], got \[4, 3\]"),
    ({"values": [X[:, 0, 0]] * 3}, VE, r"values: expected \[B, T, N\], or .*, got 3 tensors \[4\]"),
    ({"values": torch.ones(4, 5, 65), "rewards": torch.ones(4, 5, 65)}, VE, "values: expected from 1 to 64.*got 65"),
    ({"values": X[..., :0], "rewards": X[..., :0]}, VE, "values: expected from 1 to 64 objectives, got 0"),
    ({"rewards": "x"}, TE, "rewards: expected a tensor, or a sequence or dict of tensors, got a str"),
    ({"rewards": X[..., :2]}, VE, "rewards: expected 3 objectives as in values, got 2"),
    ({"rewards": X[:, :4]}, VE, r"rewards: expected \[4, 5\] or \[4\] for each objective, got \[4, 4\]"),
    ({"rewards": S[:3]}, VE, r"rewards: expected \[4, 5\] or \[4\] for each objective, got \[3\]"),
    ({"rewards": X.bool()}, TE, "rewards: expected float32.*got torch.bool"),
    ({"rewards": X.to("meta")}, VE, "rewards: expected device cpu as values, got meta"),
    ({"rewards": {"a": S[:, 0]}, "values": {"b": X[..., 0]}}, VE, r"rewards: expected the keys of values \['b'\]"),
    ({"dim": 1.5}, TE, "dim: expected an int, got a float"),
    ({"dim": True}, TE, "dim: expected an int, got a bool"),
    ({"dim": 3}, VE, "dim: expected from -3 to 2, got 3"),
    ({"mask": [1]}, TE, "mask: expected a tensor, got a list"),
    ({"mask": torch.ones(4, 4)}, VE, r"mask: expected the shape of one objective \[4, 5\], got \[4, 4\]"),
    ({"mask": torch.ones(4, 5, dtype=torch.complex64)}, TE, "mask: expected a bool, integer or floating"),
    ({"mask": torch.ones(4, 5, device="meta")}, VE, "mask: expected device cpu as values, got meta"),
    ({"kl_penalty": 0.1}, TE, "kl_penalty: expected a tensor, got a float"),
    ({"kl_penalty": X}, VE, r"kl_penalty: expected the shape of one objective \[4, 5\], got \[4, 5, 3\]"),
    ({"kl_penalty": torch.ones(4, 5).int()}, TE, "kl_penalty: expected a floating tensor, got torch.int32"),
    ({"bootstrap": X}, VE, r"bootstrap: expected \[4\] for each objective, got \[4, 5\]"),
    ({"bootstrap": S[:, :2]}, VE, "bootstrap: expected 3 objectives as in values, got 2"),
    ({"bootstrap": S.int()}, TE, "bootstrap: expected float32.*got torch.int32"),
    ({"bootstrap": S.to("meta")}, VE, "bootstrap: expected device cpu as values, got meta"),
    ({"gamma": "1"}, TE, "gamma: expected a float, 3 floats or a tensor, got a str"),
    ({"gamma": [1.0, "a", 1.0]}, TE, "gamma: expected floats, got a str"),
    ({"gamma": True}, TE, "gamma: expected floats, got a bool"),
    ({"gamma": 1.01}, VE, "gamma: expected from 0 to 1, got 1.01"),
    ({"gamma": [0.9, 0.9]}, VE, r"gamma: expected one per objective \(3\), got 2"),
    ({"lam": -0.1}, VE, "lam: expected from 0 to 1, got -0.1"),
    ({"lam": float("nan")}, VE, "lam: expected from 0 to 1, got nan"),
    ({"lam": [0.9, 2.0, 0.9]}, VE, "lam: expected from 0 to 1, got 2.0"),
    ({"lam": 10**400}, (VE, OverflowError), "lam: expected from 0 to 1|int too large"),
    ({"lam": torch.ones(2)}, VE, r"lam: expected shape \[3\], got \[2\]"),
    ({"lam": torch.ones(3).int()}, TE, "lam: expected a floating tensor, got torch.int32"),
    ({"lam": torch.ones(3, device="meta")}, VE, "lam: expected device cpu as values, got meta"),
    ({"offsets": OFFSETS}, VE, r"values: expected two dimensions with offsets, got \[4, 5, 3\]"),
]
PACKED_ERRORS = [
    ({"offsets": [0, 20]}, TE, "offsets: expected a tensor, got a list"),
    ({"offsets": OFFSETS.float()}, TE, "offsets: expected int32 or int64, got torch.float32"),
    ({"offsets": OFFSETS[:0]}, VE, r"offsets: expected \[S \+ 1\], got \[0\]"),
    ({"offsets": OFFSETS[None]}, VE, r"offsets: expected \[S \+ 1\], got \[1, 3\]"),
    ({"offsets": OFFSETS.to("meta")}, VE, "offsets: expected device cpu as values, got meta"),
    ({"offsets": OFFSETS + 1}, VE, r"offsets that start at 0, ascend and end at 20, got \[1, 5, 21\]"),
    ({"offsets": torch.tensor([0, 9, 4, 20])}, VE, "offsets that start at 0, ascend and end at 20"),
    ({"offsets": OFFSETS[:2]}, VE, "offsets that start at 0, ascend and end at 20"),
    ({"rewards": torch.ones(3, 3)}, VE, r"rewards: expected \[20\] or \[2\] for each objective, got \[3\]"),
    ({"bootstrap": torch.ones(3, 3)}, VE, r"bootstrap: expected \[2\] for each objective, got \[3\]"),
    ({"mask": torch.ones(4, 5)}, VE, r"mask: expected the shape of one objective \[20\], got \[4, 5\]"),
    ({"dim": 2}, VE, "dim: expected from -2 to 1, got 2"),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(wrong, kind, message):
    with pytest.raises(kind, match=message):
        call(gae, {"rewards": X, "values": X, **wrong})


@pytest.mark.parametrize(
    ("wrong", "kind", "message"), PACKED_ERRORS, ids=lambda x: str(x) if isinstance(x, str) else ""
)
def test_errors_of_packed_rows(wrong, kind, message):
    with pytest.raises(kind, match=message):
        call(gae, {"rewards": FLAT, "values": FLAT, "offsets": OFFSETS, **wrong})


def plain(rewards=None, values=None, bootstrap=(), **options):
    """Arguments of the operator itself, which has checks of its own."""
    columns = list(X.unbind(-1))
    rest = {"dim": 2, "mask": None, "gamma": None, "gamma_values": [1.0] * 3, "lam": None, "lam_values": [1.0] * 3,
            "kl_penalty": None, "bootstrap": list(bootstrap), "offsets": None}  # fmt: skip
    return (rewards or columns, values or columns, *(rest | options).values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (plain(values=[X[..., 0].int()] * 3), "values: expected float32"),
        (plain(values=[X[:, 0, 0]] * 3), r"values: expected \[B, T\]"),
        (plain(values=[X[..., 0], X[..., 0], X[0]]), "values: expected tensors of one shape"),
        (plain(values=[X[..., 0], X[..., 0], X[..., 0].half()]), "values: expected tensors of one dtype"),
        (plain(rewards=[X[..., 0]] * 2), "rewards: expected one tensor for each"),
        (plain(rewards=[X[..., 0].int()] * 3), "rewards: expected float32"),
        (plain(rewards=[X[..., 0], X[..., 0], X[:, 0, 0]]), "rewards: expected the shape of values"),
        (plain(rewards=[X[..., 0], X[..., 0], X[..., 0].half()]), "rewards: expected one dtype"),
        (plain(bootstrap=[S[:, 0]] * 2), "bootstrap: expected one tensor for each"),
        (plain(bootstrap=[S[:3, 0]] * 3), "bootstrap: expected one value for each sequence"),
        (plain(bootstrap=[S[:, 0].int()] * 3), "bootstrap: expected one floating dtype"),
        (plain(mask=torch.ones(5, 4)), "mask: expected the shape"),
        (plain(kl_penalty=torch.ones(5, 4)), "kl_penalty: expected the shape"),
        (plain(kl_penalty=torch.ones(4, 5).int()), "kl_penalty: expected a floating"),
        (plain(gamma=torch.ones(2)), "gamma: expected floating"),
        (plain(lam=torch.ones(3).int()), "lam: expected floating"),
        (plain(gamma_values=[1.0]), "expected one number per objective"),
        (plain(dim=3), "dim: out of range"),
        (plain(offsets=torch.tensor([0, 4])), r"values: expected \[B, T\]"),
        (plain(FLAT_COLUMNS, FLAT_COLUMNS, dim=1, offsets=OFFSETS + 1), "offsets: must start at 0"),
        (plain(FLAT_COLUMNS, FLAT_COLUMNS, dim=1, offsets=OFFSETS[:2]), "offsets: must end at"),
        (plain(FLAT_COLUMNS, FLAT_COLUMNS, dim=1, offsets=OFFSETS.short()), "offsets: expected int"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_the_operator_checks_too(arguments, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.pama_ext.gae(*arguments)


@pytest.mark.parametrize("form", ["tensor", "list", "dict"])
@pytest.mark.parametrize("packed", [None, [3, 0, 25]], ids=["dense", "packed"])
def test_both_doors_give_the_same_bits(packed, form):
    arguments = make((28, 3) if packed else (4, 60, 3), packed=packed)
    time = 1 if packed else 2
    for name in ("rewards", "values", "bootstrap"):
        arguments[name] = lay_out(arguments[name], form, time, time)
    results = [call(door, arguments) for door in DOORS.values()]
    for ours, theirs in zip(results[0], results[-1], strict=True):
        for a, b in zip(listed(ours), listed(theirs), strict=True):
            assert_same_bits(a, b)


@pytest.mark.skipif(not _C.has_door(), reason="this torch has no exchange table")
@pytest.mark.parametrize("wrong", [w for w, *_ in ERRORS if "bootstrap" not in w], ids=lambda w: next(iter(w)))
def test_the_eager_door_declines_what_is_wrong(wrong):
    with pytest.raises(AssertionError, match="declined"):
        call(eager, {"rewards": X, "values": X, **wrong})


def test_keys_in_another_order():
    columns = {"a": torch.randn(3, 8), "b": torch.randn(3, 8)}
    rewards = {"b": torch.randn(3), "a": torch.randn(3)}
    advantages, returns = gae(rewards, columns, bootstrap={"b": torch.ones(3), "a": torch.zeros(3)})
    expected = gae([rewards["a"], rewards["b"]], list(columns.values()), bootstrap=torch.tensor([[0.0, 1.0]] * 3))
    assert list(advantages) == list(returns) == ["a", "b"]
    for a, b in zip([*advantages.values(), *returns.values()], [*expected[0], *expected[1]], strict=True):
        assert_same_bits(a, b)


def test_inputs_are_constants_and_stay_as_they_are():
    arguments = make((4, 50, 3))
    before = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, arguments)
    for name in ("rewards", "values", "kl_penalty", "bootstrap"):
        arguments[name].requires_grad_()
    for door in DOORS.values():
        assert not any(x.requires_grad for x in call(door, arguments))
    for a, b in zip(tree_leaves(arguments), tree_leaves(before), strict=True):
        if isinstance(a, torch.Tensor):
            assert_same_bits(a.detach(), b)


CALLS = {
    "everything": lambda a: call(gae, a),
    "scores": lambda a: call(gae, {**a, "rewards": a["bootstrap"]}),
    "list": lambda a: gae(list(a["rewards"].unbind(-1)), list(a["values"].unbind(-1))),
    "dict": lambda a: gae({"a": a["rewards"][..., 0]}, {"a": a["values"][..., 0]})[0]["a"] * 2,
    "dim": lambda a: gae(a["rewards"].movedim(-1, 1), a["values"].movedim(-1, 1), dim=1),
}


@pytest.mark.parametrize("function", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(function, dynamic):
    torch.compiler.reset()
    arguments = make((6, 9, 3))
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for a, b in zip(tree_leaves(compiled(arguments)), tree_leaves(function(arguments)), strict=True):
        assert_same_bits(a, b)


class Module(torch.nn.Module):
    def forward(self, rewards, values, offsets):
        return gae(rewards, values, offsets=offsets, gamma=0.9)


def test_export():
    arguments = torch.randn(20, 3), torch.randn(20, 3), OFFSETS
    program = torch.export.export(Module(), arguments)
    assert "pama_ext.gae" in program.graph_module.code
    for a, b in zip(program.module()(*arguments), Module()(*arguments), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("form", ["tensor", "list", "dict"])
def test_fake_tensors_have_the_form_of_real_ones(form):
    arguments = make((6, 9, 3), torch.bfloat16)
    arguments["rewards"] = arguments["rewards"].float()
    for name in ("rewards", "values", "bootstrap"):
        arguments[name] = lay_out(arguments[name], form, 1, 2)
    arguments["dim"] = 1
    real = call(gae, arguments)
    with FakeTensorMode() as mode:
        fake = call(gae, tree_map(lambda x: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x, arguments))
    meta = call(gae, tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, arguments))
    for a, b, c in zip(*(tree_leaves(x) for x in (real, fake, meta)), strict=True):
        assert a.shape == b.shape == c.shape
        assert a.dtype == b.dtype == c.dtype == torch.float32
        assert a.stride() == b.stride() == c.stride()


def test_modes_see_the_operator():
    seen = []

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(str(op))
            return op(*args, **(kwargs or {}))

    with Dispatch():
        result = gae(X, X)
    assert "pama_ext.gae.default" in seen
    assert_same_bits(result[0], gae(X, X)[0])


def test_large_results_do_not_share_memory():
    """The memory of results that are gone is used again, that of those still held never."""
    rewards, values = torch.randn(64, 4096, 5), torch.randn(64, 4096, 5)
    held, wrong = [], []
    expected = _gae_dispatcher(rewards, values)  # torch's memory

    def work() -> None:
        for k in range(8):
            result = gae(rewards, values)
            if k % 3 == 0:
                held.append(result)
            wrong.extend(not torch.equal(a, b) for a, b in zip(result, expected, strict=True))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 48
    assert not any(wrong)
    assert all(torch.equal(a, b) for result in held for a, b in zip(result, expected, strict=True))
    pointers = [x.data_ptr() for result in held for x in result]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.skipif(not _C.has_door(), reason="this torch has no exchange table")
def test_the_memory_of_large_results_is_used_again():
    rewards, values = torch.randn(64, 4096, 5), torch.randn(64, 4096, 5)
    seen = set()
    for _ in range(6):
        advantages, returns = gae(rewards, values)
        seen |= {advantages.data_ptr(), returns.data_ptr()}
        del advantages, returns
    assert len(seen) <= 4


@pytest.mark.skipif(not _C.has_door(), reason="this torch has no exchange table")
def test_released_memory_serves_no_larger_result():
    sizes = (64, 96, 90)  # rows: the second needs more than the first left, the third no more than the second did
    pointers = []
    for rows in sizes:
        x = torch.ones(rows, 4096, 5)
        results = gae(x, x)
        pointers.append({result.data_ptr() for result in results})
        assert all(result.shape == x.shape for result in results)
        del results
    assert not pointers[0] & pointers[1]
    assert pointers[2] <= pointers[1]
