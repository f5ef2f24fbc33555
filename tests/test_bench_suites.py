"""The suites: every candidate passes its own check, a wrong one does not, and gates name candidates that exist."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import released
import torch
from doors import on_threads

import pama_ext
from bench import runner, suites, verify
from bench.baselines import eager, eager_loss, peers
from bench.suites import combine, gae, groups, loss, min_norm, scaling
from bench.workload import BESIDE, COMPILED, COPY, ERROR, Accuracy, Gate, Growth

TINY = {"combine": (6, 5, 3), "gae": (4, 40, 3), "groups": (64, 2), "loss": (6, 40)}
PEERS = released.installed("trl", "verl", "torchrl", "torchjd", "numba", "liger_kernel")


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def build(module, function="build", **options):
    """A small case of a suite."""
    name = module.__name__.rpartition(".")[2]
    return getattr(module, function)("cpu", **({"shape": TINY[name]} if name in TINY else {}) | options)


CASES = {
    "combine": lambda: build(combine),
    "combine, alone": lambda: build(combine, shape=(4, 2), masked=False),
    "combine, by token": lambda: build(combine, level="token"),
    "groups": lambda: build(groups),
    "gae": lambda: build(gae),
    "gae and combine": lambda: build(gae, "build_both"),
    "min_norm": lambda: build(min_norm, n=10, kind="normal"),
    "min_norm, lengths": lambda: build(min_norm, n=3, kind="lengths 1e-4 to 1e4"),
    "min_norm, step": lambda: build(min_norm, "build_step", shape=(8, 32, 4), noon=True, correlation=0.5),
    "policy_loss": lambda: build(loss, "build_policy"),
    "value_loss": lambda: build(loss, "build_value"),
    "scaling": lambda: build(scaling, tokens=128, n=2),
    "growth": lambda: build(scaling, "build_growth", sizes={"N = 2": (64, 2), "N = 4": (64, 4)}),
}
UNCHECKED = {"a + a", "gae", "combine, in cache"}  # the last two are parts of a step


@PEERS
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", CASES)
def test_every_candidate_computes_what_it_is_named_after(name):
    case = CASES[name]()
    for candidate in case.candidates.values():
        result = candidate.call()
        if candidate.check:
            candidate.check(result)
    unchecked = {name for name, candidate in case.candidates.items() if candidate.check is None}
    assert unchecked <= (UNCHECKED if name != "gae" else set())


WRONG = [
    ("combine", combine.EAGER, eager, "by_batch"),
    ("groups", groups.EAGER, eager, "group_norm"),
    ("groups", groups.TRL, peers, "trl_group_norm"),
    ("groups", groups.VERL, peers, "verl_group_norm"),
    ("gae", gae.SCAN, eager, "gae_scan"),
    ("gae", gae.TORCHRL, peers, "torchrl_gae"),
    ("gae", gae.TRL, peers, "trl_gae"),
    ("gae", gae.VERL, peers, "verl_gae"),
    ("min_norm", min_norm.MGDA, peers, "mgda"),
    ("min_norm, step", min_norm.MGDA, peers, "mgda_step"),
    ("policy_loss", loss.EAGER, eager_loss, "policy"),
    ("policy_loss", loss.ALONE, eager_loss, "policy_alone"),
    ("policy_loss", loss.VERL, peers, "verl_loss"),
    ("value_loss", loss.EAGER, eager_loss, "value"),
]


def spoilt(result):
    """A result whose first tensor is off by a percent."""
    if isinstance(result, torch.Tensor):
        return result * 1.01
    return type(result)([spoilt(result[0]), *result[1:]])


@PEERS
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("case", "candidate", "module", "function"), WRONG, ids=[f"{w[0]}: {w[1]}" for w in WRONG])
def test_a_wrong_candidate_is_noticed(case, candidate, module, function, monkeypatch):
    right = getattr(module, function)
    monkeypatch.setattr(module, function, lambda *a, **k: spoilt(right(*a, **k)))
    wrong = CASES[case]().candidates[candidate]
    with pytest.raises(AssertionError):
        wrong.check(wrong.call())


@pytest.mark.usefixtures("uncompiled")
def test_a_wrong_gradient_is_noticed():
    found = build(loss, "build_policy").candidates[loss.OURS]
    value = found.call()
    found.check(value)
    leaf = next(cell.cell_contents for cell in found.call.__closure__ if isinstance(cell.cell_contents, torch.Tensor))
    for wrong in (leaf.grad * 1.01, None):
        leaf.grad = wrong
        with pytest.raises(AssertionError):
            found.check(value)


@pytest.mark.usefixtures("uncompiled")
def test_bytes_are_counted_read_by_read():
    assert build(combine).moved == {"advantages": 4 * 90, "mask": 30, "log_ratio": 4 * 30, "out": 4 * 30}
    assert build(combine, shape=(4, 2), masked=False).moved == {"advantages": 32, "out": 16}
    assert build(groups).moved == {"rewards": 4 * 128, "out": 4 * 64}
    assert build(gae).moved == dict.fromkeys(("rewards", "values", "advantages", "returns"), 4 * 480)
    policy = build(loss, "build_policy").moved  # three inputs, the gradient three times, and the mask
    assert sum(policy.values()) == 240 * (3 * 4 + 3 * 4 + 1)
    assert sum(build(loss, "build_value").moved.values()) == 240 * (3 * 3 * 4 + 3 * 3 * 4 + 1)


@pytest.mark.usefixtures("uncompiled")
def test_one_thread_is_timed_where_several_share_the_work(monkeypatch):
    def candidates(threads):
        return on_threads(threads, lambda: build(combine, shape=(4, 5, 3)).candidates.keys())

    assert combine.ALONE not in candidates(2)
    monkeypatch.setattr(combine, "SHARED", 60)
    assert combine.ALONE in candidates(2)
    assert combine.ALONE not in candidates(1)


def test_threads_are_judged_wherever_they_share_the_work():
    for workload in combine.SUITE:
        shares = math.prod(workload.build.keywords["shape"]) >= combine.SHARED
        assert (combine.THREADS_GATE in workload.gates) == shares, workload.name


def test_one_thread_is_one_thread_and_then_there_are_all_again():
    def fails():
        raise ValueError(torch.get_num_threads())

    def threads_in_and_behind():
        inside = combine.on_one_thread(torch.get_num_threads)()
        with pytest.raises(ValueError, match=r"^1$"):
            combine.on_one_thread(fails)()
        return inside, torch.get_num_threads()

    assert on_threads(2, threads_in_and_behind) == (1, 2)


def small(workload):
    """The names of a workload's candidates, from a build of few elements."""
    options = dict(workload.build.keywords)
    if "shape" in options:
        small = {2: (64, 2), 3: (4, 40, 3)}[len(options["shape"])]
        options["shape"] = small if options.get("masked", True) else options["shape"]
    if "tokens" in options:
        options["tokens"], options["n"] = 64, 2
    if "sizes" in options:
        options["sizes"] = dict.fromkeys(options["sizes"], (64, 2))
    return set(workload.build.func("cpu", **options).candidates)


@PEERS
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", suites.NAMES)
def test_gates_name_candidates_that_exist(name, monkeypatch):
    monkeypatch.setattr(combine, "SHARED", 0)
    workloads = suites.load(name)
    assert len({(w.name, w.device) for w in workloads}) == len(workloads)
    for workload in workloads:
        if workload.gates:
            known = on_threads(2, functools.partial(small, workload)) | {COPY}
            for gate in workload.gates:
                assert gate.names - known <= ({combine.EMPTY} if gate.device == "cuda" else set()), workload.name
                assert gate.view in ("host", "cold", BESIDE) or gate.device == "cuda"


def test_bounds_of_the_smoke_test_are_wide():
    gates = [gate for name in suites.NAMES for workload in suites.load(name) for gate in workload.gates]
    bounds = [(gate, gate.smoke) for gate in gates if gate.smoke is not None]
    assert len(bounds) >= 15
    for gate, smoke in bounds:
        assert smoke >= 2 * gate.bound if gate.at_most else smoke <= gate.bound / 2


@pytest.mark.usefixtures("uncompiled")
def test_what_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda package: False)
    assert {gae.VERL, gae.TORCHRL, gae.NUMBA}.isdisjoint(build(gae).candidates)
    assert {groups.TRL, groups.VERL}.isdisjoint(build(groups).candidates)
    assert {loss.LIGER, loss.VERL}.isdisjoint(build(loss, "build_policy").candidates)
    assert gae.TRL in build(gae).candidates  # restated, not installed


def test_verls_loop_is_left_out_where_it_takes_seconds(monkeypatch):
    monkeypatch.setattr(groups, "LOOP_ROWS", 32)
    assert groups.VERL_LOOP not in build(groups).candidates


def test_layouts_are_timed_where_memory_counts(monkeypatch):
    assert {combine.FIRST, combine.LISTED}.isdisjoint(build(combine).candidates)
    monkeypatch.setattr(combine, "LARGE", 1)
    case = build(combine)
    for name in (combine.FIRST, combine.LISTED):
        case.candidates[name].check(case.candidates[name].call())


def test_what_is_in_cache_is_as_much_work(monkeypatch):
    """The part that is combined again and again, times how often, is the whole."""
    monkeypatch.setattr(gae, "CACHE_ELEMENTS", 10 * 40 * 3)
    results = build(gae, "build_both", shape=(40, 40, 3)).candidates[gae.CACHED].call()
    assert sum(result.advantages.numel() for result in results) == 40 * 40


@pytest.mark.parametrize("kind", min_norm.KINDS)
def test_vectors_are_what_the_table_says(kind):
    lengths = min_norm.vectors(32, kind).norm(dim=1)
    assert (lengths.max() / lengths.min() > 1e6) == (kind != "normal")


@released.installed("torchjd")
def test_the_norm_beside_the_optimum_is_recorded():
    case = build(min_norm, n=10, kind="lengths 1e-4 to 1e4")
    norms = case.figures[min_norm.NORM]
    assert norms[min_norm.OURS] == pytest.approx(1, abs=1e-6) and norms[min_norm.MGDA] > 2
    table = runner.rows(case, {"host": {name: [1.0] for name in case.candidates}}, "cpu")
    assert [row[min_norm.NORM] for row in table] == pytest.approx(list(norms.values()), rel=1e-4)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_growth_compares_sizes_past_the_cost_of_a_launch(device):
    gates = [g for w in suites.load("scaling") for g in w.gates if g.device == device and isinstance(g, Growth)]
    assert [gate.unit for gate in gates] == ["element", "element", "byte moved", "element", "element"]
    for gate in gates:
        assert gate.bound == scaling.BOUND
        if gate.unit == "element":
            assert min(gate.units.values()) >= scaling.SERIES[device].past_launch
    assert max(gates[0].units.values()) == 32 * min(gates[0].units.values())  # N from 2 to 64
    assert gates[2].units["N = 2"] * (4 * 64 + 9) == gates[2].units["N = 64"] * (4 * 2 + 9)
    steady = {name: [3e-9 * units] for name, units in gates[0].units.items()}
    assert gates[0].value(steady) == pytest.approx(1)
    steady[gates[0].slow][0] *= 1.5
    assert math.isclose(gates[0].value(steady), 1.5) and not gates[0].holds(1.5, gates[0].bound)


@pytest.mark.parametrize("elements", [256, 1 << 16, 1 << 17, 1 << 20, 1 << 21])
def test_the_same_is_aimed_at_between_the_shapes_of_the_suite_as_at_them(elements):
    bounds = {(g.slow, g.view): g.bound for g in scaling.gates_of(elements) if g.device == "cpu"}
    assert bounds.pop((combine.OURS, BESIDE)) == 4
    if elements <= 1 << 16:
        expected = {(combine.EAGER, "host"): 40, (COMPILED, "host"): 10, (combine.NUMBA, "host"): 1}
    elif elements < 1_500_000:
        expected = {}
    else:
        expected = {(combine.EAGER, "host"): 20, (COMPILED, "host"): 8, (combine.NUMBA, "host"): 4}
        expected |= {(combine.ALONE, "host"): 1, (COPY, "cold"): 0.6}
    assert bounds == expected


@pytest.mark.usefixtures("uncompiled")
def test_errors_are_recorded_and_judged(monkeypatch):
    right = pama_ext.combine

    def off(*arguments, **options):
        combined, weights, value, stats = right(*arguments, **options)
        return combined, weights, value, stats._replace(std=stats.std * (1 + 1e-5))

    (gate, _) = combine.ACCURACY
    exact = build(combine).figures
    assert exact[ERROR].keys() == {combine.OURS, combine.EAGER} and max(exact[ERROR].values()) < 1e-6
    assert gate.holds(exact[BESIDE][combine.OURS], gate.bound)
    monkeypatch.setattr(pama_ext, "combine", off)
    wrong = build(combine).figures
    assert wrong[ERROR][combine.OURS] == pytest.approx(1e-5, rel=0.1)
    assert not gate.holds(wrong[BESIDE][combine.OURS], gate.bound)
    assert build(scaling, tokens=128, n=2).figures.keys() == exact.keys()
    for workload in combine.SUITE:
        assert {gate.device for gate in workload.gates if isinstance(gate, Accuracy)} == {"cpu", "cuda"}


@pytest.mark.parametrize(("ours", "theirs", "holds"), [
    (0.99e-6, 0.0, True), (1.01e-6, 0.0, False), (4.99e-6, 1e-6, True), (5.01e-6, 1e-6, False), (0.0, 1.0, True),
])  # fmt: skip
def test_an_error_may_be_four_times_that_of_eager_pytorch_and_the_floor(ours, theirs, holds):
    """Of each quantity for itself: that another is far off excuses nothing."""
    (gate, _) = combine.ACCURACY
    beside = verify.beside({"mean": 0.0, "std": ours}, {"mean": 1e-3, "std": theirs})
    judged = runner.judge(gate, {BESIDE: {combine.OURS: [beside]}}, gate.bound)
    assert judged["verdict"] == ("PASS" if holds else "MISS")
    assert runner.said(judged).startswith("error, combine / eager PyTorch <= 4")
    assert runner.judge(gate, {}, gate.bound)["verdict"] == "not measured"


def test_a_gate_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Gate("a", "b", 1.0).bound = 2.0
