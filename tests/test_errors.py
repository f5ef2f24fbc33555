"""Every way of calling ``combine`` wrongly: the exception, its message, and that nothing was touched."""

from __future__ import annotations

from decimal import Decimal

import pytest
import torch

from pama_ext import _checks, combine, combine_

X = torch.ones(4, 5, 3)
NI, VE, TE = NotImplementedError, ValueError, TypeError

# keywords (advantages among them), exception, what the message says
OPTION_ERRORS = [
    ({"dim": 1.5}, TE, "dim: expected an int, got a float"),
    ({"dim": None}, TE, "dim: expected an int, got a NoneType"),
    ({"dim": 3}, VE, r"dim: expected from -3 to 2, got 3"),
    ({"dim": -4}, VE, r"dim: expected from -3 to 2, got -4"),
    ({"clip_low": "0.2"}, TE, "clip_low: expected a float, got a str"),
    ({"clip_high": True}, TE, "clip_high: expected a float, got a bool"),
    ({"clip_high": torch.tensor(0.2)}, TE, "clip_high: expected a float, got a Tensor"),
    ({"clip_low": -0.1}, VE, r"clip_low: expected a clip range >= 0, got -0\.1"),
    ({"clip_high": float("nan")}, VE, "clip_high: expected a clip range >= 0, got nan"),
    ({"noon": "yes"}, TE, "noon: expected a bool, got a str"),
    ({"skip_inactive": None}, TE, "skip_inactive: expected a bool, got a NoneType"),
    ({"level": "row"}, VE, r"level: expected one of 'batch', 'sequence', 'group', 'token', got 'row'"),
    ({"level": 1}, TE, "level: expected a str, got a int"),
    ({"level": ["batch"]}, TE, "level: expected a str, got a list"),
    ({"solver": "exact"}, VE, r"solver: expected one of 'closed_form', 'min_norm', 'fixed', got 'exact'"),
    ({"solver": None}, TE, "solver: expected a str, got a NoneType"),
    ({"nan": "raise"}, VE, r"nan: expected one of 'ignore', 'propagate', got 'raise'"),
    ({"nan": 0.0}, TE, "nan: expected a str, got a float"),
    ({"level": "group"}, VE, 'level: "group" needs a normalize'),
    ({"normalize": "batch"}, TE, "normalize: expected a pama_ext.Normalize, got a str"),
    ({"process_group": object()}, NI, "process_group"),
]
TENSOR_ERRORS = [
    ({"advantages": 3.0}, TE, "advantages: expected a tensor, or a sequence or dict of tensors, got a float"),
    ({"advantages": None}, TE, "advantages: expected a tensor, or a sequence or dict of tensors, got a NoneType"),
    ({"advantages": []}, VE, "advantages: expected at least one objective, got none"),
    ({"advantages": {}}, VE, "advantages: expected at least one objective, got none"),
    ({"advantages": [X[..., 0], 2.0]}, TE, r"advantages\[1\]: expected a tensor, got a float"),
    ({"advantages": {"a": X[..., 0], "b": [1.0]}}, TE, r"advantages\['b'\]: expected a tensor, got a list"),
    ({"advantages": {1: X[..., 0]}}, TE, r"advantages: expected str keys, got \(1,\)"),
    ({"advantages": X.long()}, TE, "advantages: expected float32, float64, float16 or bfloat16, got torch.int64"),
    ({"advantages": X.to(torch.complex64)}, TE, "advantages: expected float32.* got torch.complex64"),
    ({"advantages": [X[..., 0].bool()]}, TE, r"advantages\[0\]: expected float32.* got torch.bool"),
    ({"advantages": X.to_sparse()}, TE, "advantages: expected a strided tensor, got torch.sparse_coo"),
    ({"advantages": torch.ones(3)}, VE, r"advantages: expected \[B, N\] or \[B, T, N\], got \[3\]"),
    ({"advantages": torch.ones(2, 2, 2, 2)}, VE, r"advantages: expected \[B, N\] or \[B, T, N\], got \[2, 2, 2, 2\]"),
    ({"advantages": [torch.tensor(1.0)]}, VE, r"advantages: expected tensors \[B\] or \[B, T\], got \[\]"),
    ({"advantages": [X]}, VE, r"advantages: expected tensors \[B\] or \[B, T\], got \[4, 5, 3\]"),
    ({"advantages": [X[..., 0], X[0]]}, VE, r"one shape for all, got .*\[4, 5\].* at 1, .*\[5, 3\]"),
    (
        {"advantages": [X[..., 0], X[..., 0].double()]},
        TE,
        "one dtype for all, got torch.float32 and, at 1, torch.float64",
    ),
    ({"advantages": [X[..., 0], X[..., 0].to("meta")]}, VE, "one device for all, got cpu and, at 1, meta"),
    ({"advantages": torch.ones(2, 65)}, VE, "advantages: expected from 1 to 64 objectives, got 65"),
    ({"advantages": [torch.ones(2)] * 65}, VE, "advantages: expected from 1 to 64 objectives, got 65"),
    ({"advantages": torch.ones(2, 0)}, VE, "advantages: expected from 1 to 64 objectives, got 0"),
    ({"mask": [1, 0]}, TE, "mask: expected a tensor, got a list"),
    ({"mask": torch.ones(4, 5, 1)}, VE, r"mask: expected the shape of one objective \[4, 5\], got \[4, 5, 1\]"),
    ({"mask": torch.ones(5)}, VE, r"mask: expected the shape of one objective \[4, 5\], got \[5\]"),
    ({"mask": torch.ones(4, 5, device="meta")}, VE, "mask: expected device cpu as advantages, got meta"),
    (
        {"mask": torch.ones(4, 5, dtype=torch.complex64)},
        TE,
        "mask: expected a bool, integer or floating.* torch.complex64",
    ),
    ({"mask": torch.ones(4, 5).to(torch.float8_e5m2)}, TE, "mask: expected a bool, integer or floating.*float8_e5m2"),
    ({"log_ratio": 0.1}, TE, "log_ratio: expected a tensor, got a float"),
    ({"log_ratio": torch.ones(5, 4)}, VE, r"log_ratio: expected the shape of one objective \[4, 5\], got \[5, 4\]"),
    ({"log_ratio": torch.ones(4, 5, device="meta")}, VE, "log_ratio: expected device cpu as advantages, got meta"),
    ({"log_ratio": torch.ones(4, 5, dtype=torch.int32)}, TE, "log_ratio: expected a floating tensor, got torch.int32"),
    ({"reward_weights": "abc"}, TE, "reward_weights: expected a tensor or a sequence of floats, got a str"),
    ({"reward_weights": 1.0}, TE, "reward_weights: expected a tensor or a sequence of floats, got a float"),
    ({"reward_weights": [1.0, "2", 3.0]}, TE, "reward_weights: expected floats, got a str"),
    ({"reward_weights": [1.0, True, 3.0]}, TE, "reward_weights: expected floats, got a bool"),
    ({"reward_weights": [1.0, torch.tensor(2.0), 3.0]}, TE, "reward_weights: expected floats, got a Tensor"),
    ({"reward_weights": [1.0, Decimal(2), 3.0]}, TE, "reward_weights: expected floats, got a Decimal"),
    ({"reward_weights": [1.0, float("inf"), 1.0]}, VE, "reward_weights: expected finite numbers, got inf"),
    ({"reward_weights": (1.0, 2.0)}, VE, r"reward_weights: expected one per objective \(3\), got 2"),
    ({"reward_weights": torch.ones(2)}, VE, r"reward_weights: expected shape \[3\], got \[2\]"),
    ({"reward_weights": torch.ones(3, 1)}, VE, r"reward_weights: expected shape \[3\], got \[3, 1\]"),
    ({"reward_weights": torch.ones(3).long()}, TE, "reward_weights: expected a floating tensor, got torch.int64"),
    (
        {"reward_weights": torch.ones(3, device="meta")},
        VE,
        "reward_weights: expected device cpu as advantages, got meta",
    ),
]
OUT_ERRORS = [
    ({"out": [0.0]}, TE, "out: expected a tensor, got a list"),
    ({"out": torch.ones(4)}, VE, r"out: expected the shape of one objective \[4, 5\], got \[4\]"),
    ({"out": torch.ones(4, 5, device="meta")}, VE, "out: expected device cpu as advantages, got meta"),
    ({"out": torch.ones(4, 5).double()}, TE, "out: expected torch.float32 as advantages, got torch.float64"),
    ({"out": torch.ones(4, 5, requires_grad=True)}, VE, "out: expected a tensor that does not require grad"),
    ({"out": torch.ones(4, 1).expand(4, 5)}, VE, "out: .*share memory"),
]


def identify(case):
    return next(iter(case[0])) + ": " + case[2].partition(": ")[2][:50]


def check(function, case) -> None:
    keywords, exception, message = case
    arguments = {"advantages": X.clone(), "out": torch.full((4, 5), 7.0), **keywords}
    if function is combine_:
        del arguments["out"]
    tensors = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.device.type == "cpu"}
    before = {k: v.clone() for k, v in tensors.items()}
    with pytest.raises(exception, match=message):
        function(arguments.pop("advantages"), **arguments)
    for name, tensor in tensors.items():
        assert tensor.is_sparse or torch.equal(tensor, before[name]), f"{name} was touched"


@pytest.mark.parametrize("case", OPTION_ERRORS + TENSOR_ERRORS + OUT_ERRORS, ids=identify)
def test_combine(case):
    check(combine, case)


@pytest.mark.parametrize("case", OPTION_ERRORS + TENSOR_ERRORS, ids=identify)
def test_combine_in_place(case):
    check(combine_, case)


@pytest.mark.parametrize(
    ("name", "good", "bad"), [("dim", 1, True), ("dim", 1, 1.0), ("clip_high", 1.0, True), ("noon", True, 1.0)]
)
def test_a_correct_call_excuses_no_later_one(name, good, bad):
    """Options are remembered from call to call; what compares equal is still of another type."""
    combine(X, **{name: good})
    with pytest.raises(TypeError, match=name):
        combine(X, **{name: bad})


def test_in_place_needs_tensors_that_can_be_written():
    with pytest.raises(ValueError, match="advantages: expected tensors that do not require grad"):
        combine_(torch.ones(4, 3, requires_grad=True))
    for shared in (torch.ones(4, 1).expand(4, 3), torch.ones(1, 3).expand(4, 3), [torch.ones(4)] * 2):
        with pytest.raises(ValueError, match=r"advantages: .*share memory"):
            combine_(shared)
    expanded = torch.ones(1, 3).expand(1, 3)
    assert combine_(expanded).advantages is expanded


def test_out_shares_memory_with_nothing():
    x, y = torch.ones(6, dtype=torch.float32), torch.ones(6, 2)
    for keywords in ({}, {"mask": x}, {"log_ratio": x}):
        advantages = [x, y[:, 0]] if not keywords else y
        with pytest.raises(ValueError, match="out: shares memory"):
            combine(advantages, out=x, **keywords)
    for columns, dim in ((y, -1), (y.T, 0), (list(y.unbind(-1)), -1), (list(y.view(2, 3, 2).unbind(-1)), -1)):
        shape = (2, 3) if columns[0].ndim == 2 else (6,)
        with pytest.raises(ValueError, match="out: shares memory"):
            combine(columns, dim=dim, out=y.view(-1)[3:9].view(shape))
    assert torch.equal(x, torch.ones(6)) and torch.equal(y, torch.ones(6, 2))
    for first in (torch.ones(2, 6), torch.ones(2, 3, 4)):  # dense, though no dimension stands where it usually does
        for k in range(2):
            with pytest.raises(ValueError, match="out: shares memory with advantages"):
                combine(first.movedim(0, -1), out=first[k])
    mask = torch.ones(4, 3)
    with pytest.raises(ValueError, match="out: shares memory with mask"):
        combine(torch.ones(3, 4, 2), mask=mask.T, out=mask.view(3, 4))


def test_unknown_arguments():
    with pytest.raises(TypeError, match="unexpected keyword"):
        combine(X, weights=[1.0])
    with pytest.raises(TypeError, match="positional"):
        combine(X, -1)
    with pytest.raises(TypeError, match="unexpected keyword"):
        combine_(X, out=X[..., 0])


@pytest.mark.cuda
def test_tensors_on_two_devices():
    x = X.cuda()
    for name, value in (
        ("mask", X[..., 0]),
        ("log_ratio", X[..., 0]),
        ("out", X[..., 0].clone()),
        ("reward_weights", X[0, 0]),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected device cuda:0 as advantages, got cpu"):
            combine(x, **{name: value})
    with pytest.raises(ValueError, match="one device for all"):
        combine([x[..., 0], X[..., 0]])


def test_operators_called_directly_raise():
    """Past Python's checks, the operators check again what could crash them."""
    ops, x = torch.ops.pama_ext, X.clone()

    def arguments(advantages=None, **other):
        values = {"dim": -1, "mask": None, "log_ratio": None, "clip_low": 0.2, "clip_high": 0.2, "noon": True,
                  "level": "batch", "solver": "closed_form", "normalize": "", "groups": None,
                  "reward_weights": None, "reward_values": None, "nan": "ignore",
                  "skip_inactive": False, **other}  # fmt: skip
        return ([x] if advantages is None else advantages, *values.values())

    bad = [
        {"advantages": []}, {"advantages": [x] * 65, "dim": None}, {"dim": 7}, {"level": "row"}, {"solver": "none"},
        {"mask": torch.ones(4)}, {"mask": torch.ones(4, 5, dtype=torch.complex64)}, {"log_ratio": x},
        {"log_ratio": x[..., 0].int()},
        {"reward_weights": torch.ones(2)}, {"reward_values": [1.0]}, {"advantages": [x.int()]},
        {"advantages": [torch.ones(2, 65)]}, {"advantages": [x[..., 0], x[..., 0].double()], "dim": None},
    ]  # fmt: skip
    for wrong in bad:
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            ops.combine(*arguments(**wrong))
    for out in (torch.ones(4), torch.ones(4, 5).double(), torch.ones(4, 1).expand(4, 5)):
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            ops.combine_out(*arguments(), out)
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        ops.combine_(*arguments([torch.ones(1, 3).expand(4, 3)]))
    assert torch.equal(x, X) and ops.combine(*arguments())[0].shape == (4, 5)


def test_operator_refuses_several_tensors_with_a_dim():
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.pama_ext.combine(
            [X, X], -1, None, None, 0.2, 0.2, True, "batch", "fixed", "", None, None, None, "ignore", False
        )


OVERLAPPING = {
    "windows": lambda: torch.rand(10).unfold(0, 3, 1),
    "shifted list": lambda: (lambda s: [s[:10], s[1:]])(torch.rand(11)),
    "the same twice": lambda: [torch.ones(4)] * 2,
    "expanded": lambda: torch.rand(1, 3).expand(6, 3),
}


@pytest.mark.parametrize("make", OVERLAPPING.values(), ids=OVERLAPPING)
def test_overlapping_advantages_are_not_written(make):
    """Nor does autograd see a write that did not happen."""
    advantages = make()
    tensors = advantages if isinstance(advantages, list) else [advantages]
    before = [(t.clone(), t._version) for t in tensors]
    with pytest.raises(ValueError, match="advantages: elements share memory"):
        combine_(advantages)
    for tensor, (values, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, values) and tensor._version == version


@pytest.mark.parametrize("name", ["mask", "log_ratio"])
def test_what_is_written_is_not_read(name):
    shared = torch.ones(6)
    for call in (
        lambda: combine(torch.rand(6, 2), out=shared, **{name: shared}),
        lambda: combine_([shared, torch.rand(6)], **{name: shared}),
    ):
        with pytest.raises(ValueError, match=f"shares memory with {name}"):
            call()
    assert torch.equal(shared, torch.ones(6))


def test_interlaced_columns_may_be_written():
    """Strided tensors that only lie in the same range share nothing."""
    whole = torch.rand(6, 3)
    expected = combine(whole[:, :2].clone()).advantages
    combine(whole[:, :2], out=whole[:, 2])
    assert torch.equal(whole[:, 2], expected)


def test_an_interrupt_is_not_swallowed(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_checks, "options", interrupted)
    with pytest.raises(KeyboardInterrupt):
        combine(torch.ones(4, 2), clip_high=0.123456)


def test_a_nested_tensor_is_named():
    with pytest.raises(TypeError, match="advantages: expected a strided tensor, got a nested one"):
        combine(torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)]))
