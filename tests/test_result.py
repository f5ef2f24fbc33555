"""``Combined`` is the named tuple it says, however it is read, though an eager call settles its fields late."""

from __future__ import annotations

import copy
import gc
import inspect
import itertools
import pickle
import resource

import pytest
import torch
from cases import DTYPES, LEVELS, make
from compare import assert_same_bits, assert_same_result, compute_dtype
from torch.utils import _pytree as pytree

from pama_ext import _C, Combined, ObjectiveStats, combine, combine_

FIELDS = ("advantages", "weights", "value", "stats")


def fresh(device: torch.device | str = "cpu", **options) -> Combined:
    """A result of which no field was read yet, always of the same problem."""
    problem = make((5, 7, 3), **options).to(torch.device(device))
    return combine(problem.values, **problem.options)


def settled() -> tuple:
    result = fresh()
    return tuple(getattr(result, name) for name in FIELDS)


def same(got, expected) -> bool:
    assert len(got) == len(expected) == 4
    assert isinstance(got[3], ObjectiveStats)
    for a, b in zip((*got[:3], *got[3]), (*expected[:3], *expected[3]), strict=True):
        assert_same_bits(a, b)
    return True


READERS = {
    "unpack": lambda r: (lambda a, w, v, s: (a, w, v, s))(*r),
    "tuple": tuple,
    "list": list,
    "slice": lambda r: r[:],
    "index": lambda r: [r[i] for i in range(4)],
    "from the end": lambda r: [r[i] for i in range(-4, 0)],
    "iterate": lambda r: [field for field in r],  # noqa: C416  that it iterates is the point
    "reversed": lambda r: list(reversed(r))[::-1],
    "attributes": lambda r: [getattr(r, name) for name in FIELDS],
    "_asdict": lambda r: list(r._asdict().values()),
    "_replace": lambda r: r._replace(),
    "_make": lambda r: Combined._make(r),
    "zip": lambda r: [field for field, _ in zip(r, range(4), strict=True)],
    "add": lambda r: r + (),  # noqa: RUF005
    "add to a tuple": lambda r: () + r,  # noqa: RUF005
    "add two": lambda r: (r + fresh())[4:],
    "add to a list": lambda r: [*[], *r],
    "multiply": lambda r: (r * 2)[:4],
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda r: pickle.loads(pickle.dumps(r)),
    "pickle protocol 2": lambda r: pickle.loads(pickle.dumps(r, protocol=2)),
    "tree_map": lambda r: pytree.tree_map(lambda x: x, r),
    "map": lambda r: list(map(id, r)) and list(r),
    "extend": lambda r: (lambda x: x.extend(r) or x)([]),
}


@pytest.mark.parametrize("read", [pytest.param(v, id=k) for k, v in READERS.items()])
def test_every_way_of_reading_gives_the_fields(read):
    assert same(read(fresh()), settled())


def test_match_statement():
    match fresh():
        case Combined(advantages, weights, value, stats):
            assert same((advantages, weights, value, stats), settled())
        case _:
            pytest.fail("does not match its own class")
    match fresh():
        case (_, weights, _, _):
            assert_same_bits(weights, settled()[1])


@pytest.mark.parametrize("order", list(itertools.permutations(("weights", "value", "stats"))), ids="-".join)
@pytest.mark.parametrize("level", LEVELS)
def test_order_of_access_does_not_matter(order, level, device):
    result, expected = fresh(device, level=level), fresh(device, level=level)
    _ = expected.stats
    for name in order:
        got = getattr(result, name)
        assert got is getattr(result, name)  # made once
    assert_same_result(result, expected)


def test_it_is_a_tuple():
    result = fresh()
    assert isinstance(result, tuple) and isinstance(result, Combined) and len(result) == 4
    assert Combined._fields == FIELDS and ObjectiveStats._fields[0] == "count" and len(ObjectiveStats._fields) == 10
    assert result == result and (result != result) is False
    assert hash(result) == hash(tuple(result))
    assert result.weights in [result[1]] and result.index(result[0]) == 0
    text = repr(fresh())
    assert text.startswith("Combined(advantages=tensor(") and "weights=tensor(" in text and "nonfinite=tensor(" in text
    assert str(fresh()) == text == f"{fresh()}"
    replaced = fresh()._replace(value=None)
    assert isinstance(replaced, Combined) and replaced.value is None and replaced.weights is not None
    with pytest.raises(AttributeError):
        result.weights = torch.zeros(3)


def test_a_function_can_return_it_and_a_pytree_can_rebuild_it():
    leaves, spec = pytree.tree_flatten(fresh())
    assert len(leaves) == 13 and all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    assert same(pytree.tree_unflatten(leaves, spec), settled())
    assert isinstance(pytree.tree_unflatten(leaves, spec), Combined)


@pytest.mark.parametrize("kept", ["weights", "value", "stats"])
def test_fields_outlive_the_result(device, kept):
    """They share one buffer, which lives as long as any of them; later calls do not write into it."""
    field, expected = getattr(fresh(device), kept), getattr(fresh(device), kept)
    expected = pytree.tree_map(torch.clone, expected)
    gc.collect()
    for _ in range(20):
        junk = make((5, 7, 3), seed=9).to(device)
        combine(junk.values, **junk.options)
    for a, b in zip(pytree.tree_leaves(field), pytree.tree_leaves(expected), strict=True):
        assert_same_bits(a, b)


@pytest.mark.skipif(not _C.has_door(), reason="this torch has no exchange table")
@pytest.mark.parametrize("tokens", [1 << 16, 1 << 19, 3 << 19, 1 << 22])  # 256 KB to 16 MB
def test_memory_of_a_result_is_used_again_whatever_is_freed_in_between(tokens):
    """An eager trainer frees large temporaries, and malloc gives what is free to the system: pages would come anew."""

    def faults() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    values, found = torch.ones(tokens, 2), []
    for _ in range(6):
        temporaries = [torch.ones(4 << 20) for _ in range(8)]
        del temporaries
        before = faults()
        result = combine(values)
        found.append(faults() - before)
        del result
    assert max(found[2:]) < 16, found  # 64 pages or more


@pytest.mark.skipif(not _C.has_door(), reason="this torch has no exchange table")
@pytest.mark.parametrize("tokens", [1 << 15, 1 << 16, 1 << 19, 1 << 22])  # 128 KB to 16 MB
def test_memory_of_a_result_is_kept_for_the_next(tokens):
    """Else whoever asks for as much in between would have it."""
    values = torch.ones(tokens, 2)
    result = combine(values)
    where = result.advantages.data_ptr()
    del result
    between = [torch.ones(tokens) for _ in range(8)]
    result = combine(values)
    assert result.advantages.data_ptr() == where and between


def test_results_are_collected():
    """Reading fields or not, nothing is kept: counted by the garbage collector's own list of tensors."""

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(x), (torch.Tensor, Combined)) for x in gc.get_objects())

    values = torch.ones(4, 3)
    before = tensors()
    results = [combine(values) for _ in range(10)]
    _ = [result.stats for result in results[::2]]
    assert tensors() > before
    del results, _
    assert tensors() == before


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_shapes_and_devices(device, dtype, level):
    problem = make((5, 7, 3), dtype, level=level).to(device)
    problem.values.requires_grad_()
    result = combine(problem.values, **problem.options)
    rows = (5,) if level == "sequence" else ()
    assert result.advantages.dtype == dtype and result.advantages.shape == (5, 7) and result.advantages.is_contiguous()
    small = (result.weights, result.value, *result.stats)
    assert [t.shape for t in small] == [(*rows, 3), rows, *[(3,)] * 10]
    for tensor in (result.advantages, *small):
        assert not tensor.requires_grad and tensor.grad_fn is None and type(tensor) is torch.Tensor
        assert tensor.device.type == device.type
    assert {t.dtype for t in small} == {compute_dtype(dtype)}
    assert len({t.untyped_storage().data_ptr() for t in small}) == 1  # one buffer, one transfer


def test_results_are_ordinary_tensors(tmp_path):
    result = fresh()
    total = (result.advantages * 2).sum() + result.weights @ result.stats.mean + result.value
    assert total.isfinite()
    result.advantages.add_(1)
    result.weights.mul_(2)
    torch.save(tuple(result[:3]), tmp_path / "saved.pt")
    for a, b in zip(torch.load(tmp_path / "saved.pt"), result[:3], strict=True):
        assert_same_bits(a, b)
    shared = result.advantages.clone().share_memory_()
    assert shared.is_shared()
    assert result.advantages.numpy().shape == (5, 7)


@pytest.mark.parametrize("level", LEVELS)
def test_metrics(device, level):
    names = {"short": "short", "kind": "kind", "x": "x"}
    problem = make((5, 7, 3), level=level).to(device)
    advantages = dict(zip(names, problem.values.unbind(-1), strict=True))
    result = combine(advantages, **problem.options)
    assert result.names == tuple(names)
    metrics = result.metrics()
    assert all(type(number) is float for number in metrics.values())
    groups = ("weight", *ObjectiveStats._fields)
    assert list(metrics) == ["pama/value", *(f"pama/{group}/{name}" for group in groups for name in names)]
    weights, value = (x.mean(0) if level == "sequence" else x for x in (result.weights, result.value))
    rounding = 2 * torch.finfo(torch.float32).eps
    assert metrics["pama/value"] == pytest.approx(value.item(), rel=rounding)
    assert metrics["pama/weight/kind"] == pytest.approx(weights[1].item(), rel=rounding)
    assert metrics["pama/active_mean/x"] == result.stats.active_mean[2].item()
    assert metrics["pama/count/short"] == result.stats.count[0].item()
    assert list(result.metrics(prefix="", names=["a", "b", "c"]))[:3] == ["value", "weight/a", "weight/b"]
    assert "pama/weight/2" in fresh(device, level=level).metrics()


def test_metrics_of_no_rows_are_zero_and_wrong_names_are_told():
    assert combine(torch.empty(0, 2), level="sequence").metrics()["pama/value"] == 0
    for names in (["a"], ["a", "b", "c", "d"]):
        with pytest.raises(ValueError, match=rf"names: expected one per objective \(3\), got {len(names)}"):
            fresh().metrics(names=names)


def test_replace_keeps_the_names():
    result = combine({"a": torch.ones(3), "b": torch.ones(3)})
    replaced = result._replace(advantages=None)
    assert replaced.advantages is None and replaced.names == ("a", "b")
    assert_same_bits(replaced.weights, result.weights)


def test_names_stay_with_the_result():
    result = combine({"a": torch.ones(3), "b": torch.ones(3)})
    assert result.names == ("a", "b") and fresh().names is None
    assert combine_({"a": torch.ones(3)}).names == ("a",)
    for other in (copy.copy(result), copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert other.names == ("a", "b")


def test_one_transfer():
    """``metrics`` reads device memory once: seen as one ``tolist``."""
    result, calls = fresh(), []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if getattr(function, "__name__", "") in ("tolist", "item", "cpu", "to", "numpy", "__float__"):
                calls.append(function.__name__)
            return function(*args, **(kwargs or {}))

    with Watch():
        result.metrics()
    assert calls == ["tolist"]


def test_signature_documents_the_defaults():
    ours, theirs = inspect.signature(combine).parameters, inspect.signature(combine_).parameters
    assert [name for name in ours if name != "out"] == list(theirs)
    for name in theirs:
        assert ours[name].default == theirs[name].default and ours[name].kind == theirs[name].kind
    assert next(iter(ours)) == "advantages"
    assert {p.kind for p in list(ours.values())[1:]} == {inspect.Parameter.KEYWORD_ONLY}


def test_a_list_takes_its_fields():
    fields = []
    fields += combine(torch.ones(3, 2))
    assert same(tuple(fields), tuple(combine(torch.ones(3, 2))))
