"""The machine code of the CUDA kernels: no spills, few enough registers, 16-byte loads; and that this is noticed."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import pytest

from bench import cuda_code
from bench.environment import RECORDS

needs_tools = pytest.mark.skipif(not cuda_code.complete(), reason="no nvcc, cuobjdump, nvdisasm or c++filt")
SOURCES = cuda_code.ROOT / "csrc/cuda"


@needs_tools
def test_there_is_nothing_to_complain_of():
    kernels = cuda_code.survey(["90"])
    assert {k.name: k.complaints() for k in kernels if k.complaints()} == {}
    for pattern in cuda_code.LIMITS:
        assert any(re.search(pattern, kernel.name) for kernel in kernels), f"{pattern} limits nothing"


@needs_tools
def test_spills_are_noticed(tmp_path):
    crowded = shutil.copytree(SOURCES, tmp_path / "cuda")
    kernels = (crowded / "value_loss.cu").read_text()
    assert "(kThreads, kBlocksPerSM)" in kernels
    (crowded / "value_loss.cu").write_text(kernels.replace("(kThreads, kBlocksPerSM)", "(kThreads, 8)"))
    complaints = [c for kernel in cuda_code.kernels_of(crowded / "value_loss.cu", "90") for c in kernel.complaints()]
    assert any("spilled" in complaint for complaint in complaints)
    assert any("local memory" in complaint for complaint in complaints)


@needs_tools
def test_narrow_loads_of_one_layout_are_noticed(tmp_path):
    """Of the one that has the fewest: objectives first, and lists; and of the kernel without a tile."""
    narrow = shutil.copytree(SOURCES, tmp_path / "cuda")
    for name, wide, by_element in (
        ("tile.cuh", "const Pack<S, kVec> raw = *reinterpret_cast<const Pack<S, kVec>*>(from + k);",
         "Pack<S, kVec> raw; for (int j = 0; j < kVec; ++j) raw.at[j] = from[k + j];"),
        ("direct.cuh", "raw.of[j] = x[j];", "for (int t = 0; t < kVec; ++t) raw.of[j].at[t] = x[j].at[t];"),
    ):  # fmt: skip
        source = (narrow / name).read_text()
        assert source.count(wide) == 1
        (narrow / name).write_text(source.replace(wide, by_element))
    for kernel in cuda_code.kernels_of(narrow / "combine.cu", "90"):
        assert any("loads of 16 bytes" in complaint for complaint in kernel.complaints()), kernel


def test_limits_are_limits():
    kernel = cuda_code.Kernel("90", "gae_warp_kernel<float>", 64, 0, 0, 0, 0)
    assert kernel.complaints() == []
    for change, word in (({"registers": 65}, "registers"), ({"stack": 8}, "stack"), ({"local_accesses": 1}, "local"),
                         ({"name": "another_kernel"}, "no limits")):  # fmt: skip
        assert any(word in complaint for complaint in dataclasses.replace(kernel, **change).complaints())


def test_the_record_of_all_architectures_holds_nothing_to_complain_of():
    record = json.loads((RECORDS / "cuda_code.json").read_text())
    kernels = [cuda_code.Kernel(**kernel) for kernel in record["kernels"]]
    assert {kernel.name: kernel.complaints() for kernel in kernels if kernel.complaints()} == {}
    names = [{k.name for k in kernels if k.architecture == a} for a in cuda_code.ARCHITECTURES]
    assert len(names[0]) > 50 and all(of == names[0] for of in names)
    assert "dirty" not in record["header"]["commit"]


@needs_tools
def test_what_is_recorded_is_what_was_found(tmp_path, monkeypatch, capsys):
    found = [cuda_code.Kernel("90", "gae_warp_kernel<float>", registers, 0, 0, 0, 0) for registers in (64, 65)]
    monkeypatch.setattr(cuda_code, "survey", lambda architectures: found)
    assert cuda_code.main(["--out", str(tmp_path / "record.json")]) == 1
    assert "65 registers, expected at most 64" in capsys.readouterr().out
    record = json.loads((tmp_path / "record.json").read_text())
    assert [cuda_code.Kernel(**kernel) for kernel in record["kernels"]] == found
    assert "cuda" in record["header"]["compiler"].lower()


@pytest.mark.parametrize("dtype", ["float", "double", "Half", "BFloat16"])
def test_a_load_that_is_missing_is_named(dtype):
    name = f"combine_kernel<{dtype}, (Kind)0>"
    (limit,) = (limit for pattern, limit in cuda_code.LIMITS.items() if re.search(pattern, name))
    kernel = cuda_code.Kernel("90", name, limit.registers, 0, 0, limit.wide_loads, 0)
    assert kernel.complaints() == []
    one_less = dataclasses.replace(kernel, wide_loads=limit.wide_loads - 1)
    assert one_less.complaints() == [f"{limit.wide_loads - 1} loads of 16 bytes, expected at least {limit.wide_loads}"]
