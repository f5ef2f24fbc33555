"""``Normalize`` and ``min_norm`` where tensors are not plain and calls are not eager, and what objects live on."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from cases import DTYPES, make, normal
from compare import assert_same_bits, assert_same_result
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pama_ext import Combined, Normalize, combine, combine_, min_norm
from pama_ext._combine import _combine_dispatcher

ROWS = 12
IDS = torch.arange(ROWS) % 3
KINDS = {
    "size": lambda device: Normalize(by="group", group_size=4),
    "ids": lambda device: Normalize(by="group", group_ids=IDS.to(device), combined="batch"),
    "offsets": lambda device: Normalize(by="group", group_offsets=torch.tensor([0, 5, 5, ROWS], device=device)),
    "row sums": lambda device: Normalize(by="batch", over="row_sums", group_size=3),
}
PROBLEM = make((ROWS, 9, 3), draw=normal)


def leaves(result: Combined) -> list[torch.Tensor]:
    return [result.advantages, result.weights, result.value, *result.stats]


def assert_same_tree(actual, expected) -> None:
    for a, b in zip(torch.utils._pytree.tree_leaves(actual), torch.utils._pytree.tree_leaves(expected), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("solver", ["closed_form", "min_norm"])
@pytest.mark.parametrize("level", ["batch", "group"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic, kind, level, solver, device):
    torch.compiler.reset()
    problem, normalize = PROBLEM.to(device), KINDS[kind](device)

    def call(x, mask, log_ratio):
        result = combine(x, mask=mask, log_ratio=log_ratio, normalize=normalize, level=level, solver=solver)
        return result.advantages * 2, result.weights, result.value, result.stats.dead_groups

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    tensors = (problem.values, problem.options["mask"], problem.options["log_ratio"])
    assert_same_tree(compiled(*tensors), call(*tensors))


def test_groups_may_be_an_input_of_what_is_compiled(device):
    torch.compiler.reset()
    problem = PROBLEM.to(device)
    normalize = Normalize(by="group", group_ids=IDS.to(device))

    def call(x, how):
        return combine(x, normalize=how, level="group").weights

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(problem.values, normalize), call(problem.values, normalize))
    other = Normalize(by="group", group_ids=IDS.flip(0).to(device))
    assert_same_bits(compiled(problem.values, other), call(problem.values, other))


class Module(torch.nn.Module):
    def forward(self, x, mask):
        result = combine(x, mask=mask, normalize=Normalize.trl_gdpo(4), solver="fixed", level="group")
        return result.advantages, result.weights, min_norm(x[0].T @ x[0])


def test_export(device):
    problem = PROBLEM.to(device)
    tensors = (problem.values, problem.options["mask"])
    program = torch.export.export(Module(), tensors, strict=False)
    assert "pama_ext.combine" in program.graph_module.code and "pama_ext.min_norm" in program.graph_module.code
    assert_same_tree(program.module()(*tensors), Module()(*tensors))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", ["batch", "sequence", "group", "token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_fake_tensors_have_the_shapes_of_real_ones(dtype, level, kind, device):
    problem, normalize = make((ROWS, 9, 3), dtype, level=level).to(device), KINDS[kind](device)
    real = combine(problem.values, normalize=normalize, **problem.options)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        options = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in problem.options.items()}
        fake = combine(mode.from_tensor(problem.values), normalize=normalize, **options)
    for a, b in zip(leaves(fake), leaves(real), strict=True):
        assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, b.device.type)


@pytest.mark.parametrize(("described", "rows"), [
    ({"group_size": 4}, 3), ({"group_ids": IDS}, ROWS), ({"group_offsets": torch.tensor([0, 1, 7, 7, ROWS])}, 4),
], ids=["size", "ids", "offsets"])  # fmt: skip
def test_level_group_has_a_row_for_each_group_or_for_each_row(described, rows):
    for door in (combine, _combine_dispatcher):
        result = door(PROBLEM.values, level="group", normalize=Normalize(**described))
        assert result.weights.shape == (rows, 3) and result.value.shape == (rows,)
        metrics = result.metrics()
        assert metrics["pama/weight/0"] == pytest.approx(result.weights[:, 0].mean().item(), abs=1e-6)
        assert metrics["pama/dead_groups/2"] == 0


def test_modes_see_the_operators():
    seen = []

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(str(op))
            return op(*args, **(kwargs or {}))

    normalize = Normalize(by="group", group_ids=IDS)
    expected = combine(PROBLEM.values, normalize=normalize)
    gramian = torch.eye(3)
    with Dispatch():
        result, weights = combine(PROBLEM.values, normalize=normalize), min_norm(gramian)
    assert any("pama_ext.combine" in name for name in seen) and any("pama_ext.min_norm" in name for name in seen)
    assert_same_result(result, expected)
    assert_same_bits(weights, min_norm(gramian))


def test_subclasses_of_it_and_of_tensors_are_served():
    class Mine(Normalize):
        pass

    expected = combine(PROBLEM.values, normalize=Normalize(by="group", group_ids=IDS))
    assert_same_result(combine(PROBLEM.values, normalize=Mine(by="group", group_ids=IDS)), expected)
    parameter = torch.nn.Parameter(IDS, requires_grad=False)
    assert_same_result(combine(PROBLEM.values, normalize=Normalize(by="group", group_ids=parameter)), expected)


def test_layouts_of_the_advantages_do_not_matter():
    normalize = Normalize(by="group", group_ids=IDS, over="row_sums", combined="group")
    expected = combine(PROBLEM.values, normalize=normalize)
    for layout in ("first", "middle", "transposed", "slice", "unaligned", "list", "dict", "columns"):
        advantages, options = PROBLEM.but(mask=None, log_ratio=None, layout=layout).call()
        out = torch.empty(9, ROWS).t()
        result = combine(advantages, normalize=normalize, out=out, dim=options["dim"])
        assert_same_bits(out.contiguous(), expected.advantages)
        assert_same_bits(result.weights, expected.weights)
    named = combine({"a": PROBLEM.values[..., 0], "b": PROBLEM.values[..., 1]}, normalize=normalize)
    assert named.names == ("a", "b") and "pama/dead_groups/b" in named.metrics()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16,
                                   torch.uint32, torch.uint64], ids=str)  # fmt: skip
def test_ids_of_every_dtype_and_stride(dtype):
    expected = combine(PROBLEM.values, normalize=Normalize(by="group", group_ids=IDS))
    largest = torch.iinfo(dtype).max
    names = torch.tensor([largest, 0, largest - 1], dtype=dtype)
    ids = torch.stack([names[i] for i in IDS])
    apart = torch.stack([ids, ids], 1)[:, 0]
    assert not apart.is_contiguous()
    for form in (ids, apart):
        assert_same_result(combine(PROBLEM.values, normalize=Normalize(by="group", group_ids=form)), expected)


def test_ids_that_collide_in_any_table_are_told_apart():
    """Ids of one residue by every power of two, and in every order."""
    rewards = torch.randn(4096, 2, generator=torch.Generator().manual_seed(0))
    numbers = torch.arange(1024).repeat_interleave(4)
    expected = combine(rewards, normalize=Normalize(by="group", group_ids=numbers))
    for ids in (numbers << 32, numbers << 52, -(numbers << 20), numbers * 0x1000001):
        assert_same_result(combine(rewards, normalize=Normalize(by="group", group_ids=ids)), expected)


def test_an_order_of_rows_is_an_order_of_results():
    rewards = torch.randn(600, 3, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 90, (600,), generator=torch.Generator().manual_seed(1)).sort().values
    order = torch.randperm(600, generator=torch.Generator().manual_seed(2))
    options = {"level": "group", "solver": "fixed", "noon": False}
    sorted_ = combine(rewards, normalize=Normalize(by="group", group_ids=ids), **options)
    mixed = combine(rewards[order], normalize=Normalize(by="group", group_ids=ids[order]), **options)
    torch.testing.assert_close(mixed.advantages, sorted_.advantages[order])
    torch.testing.assert_close(mixed.value, sorted_.value[order])
    torch.testing.assert_close(mixed.stats.dead_groups, sorted_.stats.dead_groups)


def test_a_normalize_is_kept_alive_by_nobody():
    """Every step of a training loop has new ids; neither door may remember the old ones."""
    before = []
    for _ in range(5):
        ids = IDS.clone()
        before.append(weakref.ref(ids))
        normalize = Normalize(by="group", group_ids=ids)
        combine(PROBLEM.values, normalize=normalize)
        _combine_dispatcher(PROBLEM.values, normalize=normalize)
    del ids, normalize
    gc.collect()
    assert [ref() for ref in before] == [None] * 5


def test_it_is_copied_and_pickled():
    normalize = Normalize(by="group", group_ids=IDS, combined=Normalize.verl_whiten())
    expected = combine(PROBLEM.values, normalize=normalize)
    for again in (copy.copy(normalize), copy.deepcopy(normalize), pickle.loads(pickle.dumps(normalize))):
        assert_same_result(combine(PROBLEM.values, normalize=again), expected)


def test_settings_that_differ_in_one_place_are_told_apart():
    """The door remembers options from call to call."""
    rewards = torch.randn(ROWS, 2, generator=torch.Generator().manual_seed(4))
    variants = [{}, {"eps": 0.5}, {"eps_in": "var"}, {"correction": 0}, {"center": False}, {"scale": False},
                {"combined": "batch"}, {"group_size": 6}, {"by": "batch"}]  # fmt: skip
    results = []
    for _ in range(2):
        for variant in variants:
            normalize = Normalize(**{"by": "group", "group_size": 4, **variant})
            results.append(combine(rewards, normalize=normalize, solver="fixed", noon=False).advantages)
    for i, first in enumerate(results[: len(variants)]):
        assert torch.equal(first, results[i + len(variants)])
        for other in results[i + 1 : len(variants)]:
            assert not torch.allclose(first, other, rtol=1e-6, atol=1e-9)


def test_threads_with_other_normalisations():
    rewards = torch.randn(240, 3, generator=torch.Generator().manual_seed(0))
    ways = [Normalize(by="group", group_size=size, eps=eps) for size in (2, 3, 8) for eps in (1e-4, 0.1)]
    expected, wrong = [combine(rewards, normalize=way) for way in ways], []

    def work(k: int) -> None:
        for i in range(400):
            at = (i * 5 + k) % len(ways)
            if not torch.equal(combine(rewards, normalize=ways[at]).advantages, expected[at].advantages):
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_gradients_stop_here():
    leaf = PROBLEM.values.clone().requires_grad_()
    result = combine(leaf, normalize=Normalize(by="group", group_ids=IDS, combined="batch"))
    assert not any(t.requires_grad for t in leaves(result))
    assert_same_result(
        result, combine(PROBLEM.values, normalize=Normalize(by="group", group_ids=IDS, combined="batch"))
    )


@pytest.mark.parametrize("bad", [
    {"normalize": "group"}, {"normalize": "group ids 0 tokens 1 1 1 0.1 std zero none 1 1 1 0.1 std zero"},
    {"normalize": Normalize(by="group", group_size=5)._spec}, {"level": "group"},
    {"normalize": Normalize(by="group", group_ids=IDS)._spec, "groups": IDS[:3]},
    {"normalize": Normalize(by="group", group_offsets=IDS)._spec, "groups": torch.tensor([0, 3])},
    {"normalize": Normalize(by="group", group_offsets=IDS)._spec, "groups": torch.zeros(0, dtype=torch.int64)},
], ids=str)  # fmt: skip
def test_operators_called_directly_check_again(bad):
    """Past Python's checks, whatever could crash a kernel is refused."""
    values = {"dim": -1, "mask": None, "log_ratio": None, "clip_low": 0.2, "clip_high": 0.2, "noon": True,
              "level": "batch", "solver": "closed_form", "normalize": "", "groups": None, "reward_weights": None,
              "reward_values": None, "nan": "ignore", "skip_inactive": False, **bad}  # fmt: skip
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.pama_ext.combine([PROBLEM.values], *values.values())


EMPTY = {
    "no rows": (0, 3),
    "no rows of tokens": (0, 4, 2),
    "no tokens": (4, 0, 2),
    "one": (1, 1),
    "one of each": (1, 1, 1),
}


@pytest.mark.parametrize("shape", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("level", ["batch", "sequence", "group", "token"])
@pytest.mark.parametrize("over", ["tokens", "row_sums"])
@pytest.mark.parametrize("solver", ["closed_form", "min_norm", "fixed"])
def test_empty_and_single_problems(solver, over, level, shape, device):
    rows = shape[0]
    for described in ({"group_size": 1}, {"group_ids": torch.zeros(rows, dtype=torch.int64, device=device)},
                      {"group_offsets": torch.tensor([0, 0, rows, rows], device=device)}):  # fmt: skip
        for by, combined in (("group", "group"), ("batch", "batch")):
            normalize = Normalize(by=by, combined=combined, over=over, **described)
            result = combine(torch.ones(shape, device=device), normalize=normalize, level=level, solver=solver)
            assert result.advantages.shape == shape[:-1] and (result.advantages == 0).all()
            assert all(torch.isfinite(leaf).all() for leaf in leaves(result))
            torch.testing.assert_close(result.weights.sum(-1), torch.ones_like(result.value))
            in_place = torch.ones(shape, device=device)
            combine_(in_place, normalize=Normalize(by=by, over=over, **described), level=level, solver=solver)
            assert (in_place == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nan", ["ignore", "propagate"])
def test_nothing_valid_is_zero(nan, dtype, device):
    values = torch.full((6, 4, 3), torch.nan, dtype=dtype, device=device)
    mask = torch.zeros(6, 4, device=device)
    for normalize in (Normalize.trl(2), Normalize.trl_gdpo(3), Normalize.verl_gdpo(torch.arange(6, device=device))):
        result = combine(values, mask=mask, normalize=normalize, nan=nan)
        assert (result.advantages == 0).all() and (result.stats.dead_groups == 0).all()
        assert (result.weights == torch.full_like(result.weights, 1 / 3)).all()
