"""The plots of the scaling suite: time of a call against N and against the tokens, with the limit of the memory.

The limit is what a copy of as many bytes takes under the same conditions.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from bench.tables import Measured, Record

OURS, LIMIT = "combine", "copy"
CANDIDATES = {
    OURS: "C0", "combine, one thread": "C5", "eager PyTorch": "C1", "torch.compile": "C2", "numba": "C3",
    "Triton": "C4", LIMIT: "k",
}  # fmt: skip


def path(folder: Path, device: str) -> Path:
    """Where the plot of a device lies."""
    return folder / f"scaling-{device}.svg"


def series(record: Record, along: str, candidate: str, view: str = "") -> tuple[list[int], list[float]]:
    """Sizes and medians in µs of a candidate, with warm caches or, in the view "cold", swept ones."""
    of_all = ((of.entry["sizes"][along], of.row(candidate, view)) for of in points(record, along))
    found = [(size, row["p50_us"]) for size, row in of_all if row]
    return [size for size, _ in found], [us for _, us in found]


def points(record: Record, along: str) -> list[Measured]:
    """The workloads along "objectives" or "tokens"."""
    return [of for of in record.workloads if of.name.startswith(f"along {along}")]


def draw(record: Record, to: Path) -> None:
    """Draw both plots of a device side by side, as SVG whose bytes follow from the record."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    mpl.use("svg")
    h = record.header
    on_device = record.device == "cuda"
    where = h["device"] if on_device else f"{h['cpu']}, {h['threads']} threads"
    with mpl.rc_context({"svg.hashsalt": "pama_ext", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained", sharey=True)
        _panel(axes[0], record, "objectives", "N, at {} tokens", "tokens")
        _panel(axes[1], record, "tokens", "tokens B·T, at N = {}", "objectives")
        axes[0].set_ylabel(f"{'device' if on_device else 'host'} time of a call, µs")
        axes[1].legend(fontsize=8)
        figure.suptitle(f"combine, level batch, mask and log_ratio, float32, all statistics\n"
                        f"{where}; torch {h['torch']}; commit {h['commit']}", fontsize=9)  # fmt: skip
        to.parent.mkdir(parents=True, exist_ok=True)
        about: dict[str, Any] = {"Date": None, "Description": digest(record)}
        figure.savefig(to, metadata=about)
        plt.close(figure)


def _panel(axis: Any, record: Record, along: str, label: str, fixed: str) -> None:
    """Times along one size, and those of a copy."""
    of = points(record, along)
    lines = [(name, "", "--" if name == LIMIT else "o-") for name in CANDIDATES]
    lines += [(OURS, "cold", "o:"), (LIMIT, "cold", ":")]
    for name, view, style in lines:
        sizes, times = series(record, along, name, view)
        if sizes:
            text = ("copy of as many bytes" if name == LIMIT else name) + (", caches swept" if view else "")
            axis.plot(sizes, times, style, color=CANDIDATES[name], label=text, markersize=3)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    if along == "objectives":
        ticks = [workload.entry["sizes"][along] for workload in of]
        axis.set_xticks(ticks, map(str, ticks))
    axis.set_xlabel(label.format(of[0].entry["sizes"][fixed] if of else ""))
    axis.grid(visible=True, alpha=0.3)


def digest(record: Record) -> str:
    """By what a plot knows the record that it was drawn from."""
    return f"record sha256 {hashlib.sha256(record.text.encode()).hexdigest()}"


def shows(plot: Path, record: Record) -> bool:
    """Whether a plot was drawn from this record."""
    return plot.exists() and digest(record) in plot.read_text()
