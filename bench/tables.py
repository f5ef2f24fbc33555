"""Records as the report reads them, and their numbers as text."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
DEVICES = ("cpu", "cuda")
TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class Measured:
    """A workload of a record."""

    name: str
    device: str
    entry: dict[str, Any]

    @property
    def ours(self) -> str:
        """The candidate that all others are compared with."""
        ours: str = self.entry["rows"][0]["candidate"]
        return ours

    @property
    def label(self) -> str:
        """The name as a table has it: shapes as code, without the usual options."""
        name = re.sub(r", mask, log_ratio|, level token", "", self.name)
        return re.sub(r"\[[^]]*\]|\b\w+_\w+\b", r"`\g<0>`", name)

    def row(self, candidate: str, view: str = "") -> Row | None:
        """A candidate's times on the "host", the "device" (the default where there is one), or with "cold" caches."""
        side = "host" if view == "host" or self.device == "cpu" else "device"
        cache = "cold" if view == "cold" else "warm"
        wanted = (candidate, side, cache)
        return next((r for r in self.entry["rows"] if (r["candidate"], r["side"], r["cache"]) == wanted), None)


class Record:
    """One suite on one device."""

    def __init__(self, path: Path) -> None:
        self.text = path.read_text()
        content = json.loads(self.text)
        self.device: str = path.stem.rpartition("-")[2]
        self.header: dict[str, Any] = content["header"]
        self.gates: list[dict[str, Any]] = content["gates"]
        self.workloads = [Measured(entry["name"], self.device, entry) for entry in content["workloads"]]

    def workload(self, name: str) -> Measured:
        """The workload of a name; one without rows if there is none."""
        return next((of for of in self.workloads if of.name == name), Measured(name, self.device, {"rows": []}))

    def titled(self, title: str) -> str:
        """A title that says on which device, if not the CPU."""
        return title if self.device == "cpu" else f"{title}; {self.header['device']}"

    def versioned(self, text: str) -> str:
        """Text in which ``{package}`` stands for its version."""
        return re.sub(r" ?{([\w-]+)}", lambda m: f" {v}" if (v := self.header["peers"].get(m[1])) else "", text)


class Book(dict[tuple[str, str], Record]):
    """All records by suite and device."""

    @classmethod
    def read(cls, folder: Path) -> Book:
        """The records of a folder, those of ``gpu_check`` left out."""
        paths = [path for device in DEVICES for path in sorted(folder.glob(f"*-{device}.json"))]
        return cls({(path.stem.rpartition("-")[0], path.stem.rpartition("-")[2]): Record(path) for path in paths})


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    """A table; columns without an entry are left out."""
    kept = [i for i in range(len(headings)) if i == 0 or any(row[i] for row in rows)]
    lines = [f"| {' | '.join(line[i] for i in kept)} |" for line in (headings, *rows)]
    return "\n".join([lines[0], f"|{'---|' * len(kept)}", *lines[1:]])


def plain(headings: list[str], rows: list[list[str]]) -> str:
    """A table for a terminal: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in (headings, *rows)]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def time_text(row: Row | None) -> str:
    """The median with three digits, in µs or ms."""
    if not row:
        return ""
    us = row["p50_us"]
    return f"{us / 1e3:.3g} ms" if us >= 1e3 else f"{us:.3g} µs"


def factor(row: Row | None) -> str:
    """How many times as long as ours."""
    if not row or "ratio" not in row:
        return ""
    ratio = row["ratio"]
    return f"{ratio:.0f} {TIMES}" if ratio >= 99.5 else f"{ratio:.2g} {TIMES}"


def share(row: Row | None) -> str:
    """The share of a copy's bandwidth, in percent."""
    return f"{100 * row['share_of_copy']:.0f} %" if row and "share_of_copy" in row else ""
