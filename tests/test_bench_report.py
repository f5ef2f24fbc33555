"""The README's figures are those of the records alone, and a changed digit is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_bench_suites import CASES, PEERS, uncompiled  # noqa: F401

from bench import plots, report, suites, tables
from bench.suites import combine, scaling

ROOT = Path(__file__).resolve().parents[1]
PAGE = "# A page\n\n<!-- bench:{} -->\nold\n<!-- /bench -->\n\nmore\n"
HEADER = {
    "device": "NVIDIA H200", "driver": "1", "cuda": "13.0", "cpu": "a CPU", "cores": 2, "threads": 2,
    "instructions": "avx2", "caches": {"L1": 1 << 15, "L2": 1 << 20}, "torch": "2.13.0", "python": "3.11",
    "peers": {"numba": "0.68.1"}, "commit": "abc", "date": "2026-01-02T03:04:05+00:00", "load": 0.0,
}  # fmt: skip


def row(candidate, us, ratio, side="host", cache="warm", **more):
    return {"candidate": candidate, "side": side, "cache": cache, "p20_us": us, "p50_us": us, "p80_us": us,
            "rounds": 5, "ratio": ratio, **more}  # fmt: skip


def record(*workloads, gates=()):
    entries = [{"name": name, "sizes": sizes, "bytes": moved, "rows": rows}
               for name, rows, sizes, moved in workloads]  # fmt: skip
    return {"suite": "", "header": HEADER, "workloads": entries, "gates": list(gates)}


def combine_record():
    small = [row("combine", 1.5, 1.0), row("a + a", 1.0, 0.667), row("eager PyTorch", 90.04, 60.4)]
    large = [
        row("combine", 1234.5, 1.0), row("eager PyTorch", 19000.0, 15.4), row("numba", 9000.0, 7.6),
        row("copy", 200.0, 0.2), row("combine", 2000.0, 1.0, cache="cold", share_of_copy=0.456),
    ]  # fmt: skip
    gate = {
        "workload": "[4, 2]",
        "text": "combine / a + a",
        "sign": "<=",
        "bound": 2.0,
        "value": 1.5,
        "verdict": "PASS",
    }
    missed = gate | {"text": "eager PyTorch / combine", "sign": ">=", "bound": 100.0, "value": 60.4, "verdict": "MISS"}
    return record(("[4, 2]", small, {}, {}), ("[512, 1024, 3], mask, log_ratio", large, {}, {}), gates=[gate, missed])


def scaling_record():
    entries = []
    for along, sizes in {"objectives": [(4, 64), (8, 64)], "tokens": [(4, 64), (4, 256), (4, 1024)]}.items():
        for n, tokens in sizes:
            rows = [row("combine", tokens * n / 1e3, 1.0), row("eager PyTorch", tokens * n / 50, 20.0),
                    row("copy", 1.0, 0.1, cache="cold", gb_per_s=10.0 + n, share_of_copy=1.0)]  # fmt: skip
            moved = {"advantages": 4 * tokens * n}
            entries.append((f"along {along}, x: {n} {tokens}", rows, {"objectives": n, "tokens": tokens}, moved))
    return record(*entries)


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """A README of one block and a folder for records; writes them and returns how to read the README."""
    records = tmp_path / "bench" / "records"
    records.mkdir(parents=True)
    for name, value in {
        "ROOT": tmp_path, "RECORDS": records, "README": tmp_path / "README.md", "PLOTS": tmp_path / "docs" / "plots"
    }.items():  # fmt: skip
        monkeypatch.setattr(report, name, value)

    def write(block, **contents):
        (tmp_path / "README.md").write_text(PAGE.format(block))
        for name, content in contents.items():
            (records / f"{name.replace('_', '-')}.json").write_text(json.dumps(content))
        return report.README

    return write


def test_the_block_is_what_the_record_gives(pages):
    readme = pages("combine", combine_cpu=combine_record())
    assert report.main(["--check"]) == 1
    assert readme.read_text() == PAGE.format("combine")
    assert report.main([]) == 0
    assert readme.read_text() == PAGE.format("combine").replace("old", "\n".join([
        "| with mask and log_ratio | `combine` | of a cold copy | eager | numba 0.68.1 |",
        "|---|---|---|---|---|",
        f"| `[512, 1024, 3]` | 1.23 ms | 46 % | 15 {tables.TIMES} | 7.6 {tables.TIMES} |",
    ]))  # fmt: skip
    assert report.main(["--check"]) == 0


@pytest.mark.parametrize("changed", ["README", "record", "page of figures"])
def test_a_changed_digit_is_noticed(pages, changed, capsys):
    readme = pages("combine", combine_cpu=combine_record())
    report.main([])
    assert report.main(["--check"]) == 0
    path, old, new = {
        "README": (readme, "1.23 ms", "1.22 ms"),
        "record": (report.RECORDS / "combine-cpu.json", "15.4", "14.4"),
        "page of figures": (report.RECORDS / "README.md", "60.4", "60.5"),
    }[changed]
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert report.main(["--check"]) == 1
    assert "differs from the records" in capsys.readouterr().out


def test_all_blocks_of_a_record_without_a_row_are_empty_but_whole(pages):
    """A candidate that was not installed leaves its column out, a suite without a record says so."""
    book = tables.Book.read(report.RECORDS)
    assert {report.block(book, name) for name in (*report.TABLES, *report.OF_ALL)} == {report.NOTHING}
    pages("host", combine_cpu=combine_record())
    book = tables.Book.read(report.RECORDS)
    assert report.block(book, "host").splitlines() == [
        "| host cost of a call, `[4, 2]` | `a + a` | `combine` | eager |",
        "|---|---|---|---|",
        "| µs | 1 | 1.5 | 90 |",
        "| / `a + a` | 1 | 1.5 | 90.6 |",
    ]
    assert report.block(book, "groups") == report.NOTHING
    assert "a CPU, 2 cores, 2 threads, avx2, caches 1 MiB L2; torch 2.13.0; commit abc" in report.block(
        book, "conditions"
    )
    assert "**CUDA**: not measured yet" in report.block(book, "conditions")
    assert report.block(book, "figures").startswith("[1 of 2 figures aimed at]")


def test_figures_of_a_device_are_told_apart(pages):
    content = combine_record()
    for entry in content["workloads"]:
        entry["rows"] += [r | {"side": "device", "p50_us": r["p50_us"] / 100} for r in entry["rows"]]
    pages("combine", combine_cpu=combine_record(), combine_cuda=content)
    cpu, cuda = report.block(tables.Book.read(report.RECORDS), "combine").split("\n\n")
    assert "1.23 ms" in cpu and "12.3 µs" in cuda and "H200" in cuda and "H200" not in cpu


@pytest.mark.parametrize(
    ("us", "text"),
    [(0.9996, "1 µs"), (12.345, "12.3 µs"), (999.4, "999 µs"), (1234.5, "1.23 ms"), (45678.0, "45.7 ms")],
)
def test_times_have_three_digits(us, text):
    assert tables.time_text(row("a", us, 1.0)) == text


def test_the_plot_belongs_to_its_record(pages):
    pytest.importorskip("matplotlib")
    readme = pages("scaling", scaling_cpu=scaling_record())
    assert report.main([]) == 0
    assert "](docs/plots/scaling-cpu.svg)" in readme.read_text()
    drawn = (report.PLOTS / "scaling-cpu.svg").read_text()
    for text in (
        "combine",
        "eager PyTorch",
        "copy of as many bytes, caches swept",
        "N, at 64 tokens",
        "a CPU, 2 threads",
        "commit abc",
    ):
        assert text in drawn, text
    (report.PLOTS / "scaling-cpu.svg").unlink()
    report.main([])
    assert (report.PLOTS / "scaling-cpu.svg").read_text() == drawn, "the same record draws the same bytes"
    pages("scaling", scaling_cpu=scaling_record() | {"gates": [], "suite": "changed"})
    report.README.write_text(report.rewritten(report.README.read_text(), tables.Book.read(report.RECORDS)))
    assert report.main(["--check"]) == 1
    assert report.main([]) == 0 == report.main(["--check"])


def test_warm_caches_and_swept_ones_are_series_of_their_own(pages):
    pages("scaling", scaling_cpu=scaling_record())
    book = tables.Book.read(report.RECORDS)["scaling", "cpu"]
    assert plots.series(book, "tokens", plots.OURS) == ([64, 256, 1024], [0.256, 1.024, 4.096])
    assert plots.series(book, "tokens", plots.LIMIT) == ([], [])
    assert plots.series(book, "tokens", plots.LIMIT, "cold")[0] == [64, 256, 1024]


@PEERS
@pytest.mark.usefixtures("uncompiled")
def test_tables_show_candidates_that_exist():
    """A name that no suite has would silently leave its column out."""
    known = {name: set(build().candidates) for name, build in CASES.items()}
    assert set(report.HOST) <= known["combine, alone"]
    assert set(report.CALLS) - {"Triton"} <= known["combine"]
    assert set(plots.CANDIDATES) - {"Triton", plots.LIMIT} <= known["scaling"] | {combine.ALONE}
    assert set(report.GROUPS) <= known["groups"] and set(report.GAE) <= known["gae"]
    assert set(report.LOSS) <= known["policy_loss"]
    names = {name: [w.name for w in suites.load(name)] for name in suites.NAMES}
    assert "[4, 2]" in names["combine"] and sum(map(report.by_batch, names["combine"])) == 9
    assert [len([w for w in suites.load("scaling") if w.device == "cpu" and w.name.startswith(f"along {along}")])
            for along in ("objectives", "tokens")] == [6, len(scaling.SERIES["cpu"].tokens)]  # fmt: skip


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="the tests run without the source tree")
def test_the_readme_is_what_its_records_give():
    blocks = [match[2] for match in report.BLOCK.finditer((ROOT / "README.md").read_text())]
    assert sorted(blocks) == sorted([*report.TABLES, *report.OF_ALL])
    assert report.main(["--check"]) == 0
