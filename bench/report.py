"""The README's figures from the records alone: ``python -m bench.report`` writes them, ``--check`` compares.

Text between ``<!-- bench:NAME -->`` and ``<!-- /bench -->`` in README.md is the block of that name; the figures aimed
at are listed in ``bench/records/README.md``, plots are in ``docs/plots``. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable

from bench import plots
from bench.environment import RECORDS, ROOT
from bench.tables import DEVICES, Book, Record, factor, markdown, share, time_text

README, PLOTS = ROOT / "README.md", ROOT / "docs" / "plots"
BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
NOTHING = "No record yet: `make bench` makes one."


def conditions(book: Book) -> str:
    """Where, with what and of which commit the records of each device were made."""
    said = []
    for device in DEVICES:
        headers = {suite: record.header for (suite, on), record in book.items() if on == device}
        if not headers:
            said.append(f"* **{device.upper()}**: not measured yet")
            continue
        h = next(iter(headers.values()))
        caches = ", ".join(f"{size / 2**20:g} MiB {name}" for name, size in h["caches"].items() if size >= 1 << 20)
        where = f"{h['cpu']}, {h['cores']} cores, {h['threads']} threads, {h['instructions']}, caches {caches}"
        if device == "cuda":
            where = f"{h['device']}, driver {h['driver']}, CUDA {h['cuda']}; host {where}"
        made = {f"{header['commit']} ({header['date'][:10]})" for header in headers.values()}
        said.append(f"* **{device.upper()}**: {where}; torch {h['torch']}; commit {', '.join(sorted(made))}")
    return "\n".join(said)


def reached(book: Book) -> str:
    """How many figures are reached."""
    verdicts = [gate["verdict"] for record in book.values() for gate in record.gates]
    return f"[{verdicts.count('PASS')} of {len(verdicts)} figures aimed at](bench/records/README.md) are reached."


def host(record: Record) -> str:
    """What the smallest call costs the host."""
    of = record.workload("[4, 2]")
    rows = {name: of.row(name, "host") for name in HOST}
    unit = rows["a + a"]
    if unit is None:
        return ""
    shown = {name: row for name, row in rows.items() if row}
    return markdown(
        [record.titled("host cost of a call, `[4, 2]`"), *(HOST[name] for name in shown)],
        [
            ["µs", *(f"{row['p50_us']:.3g}" for row in shown.values())],
            ["/ `a + a`", *(f"{row['ratio'] / unit['ratio']:.3g}" for row in shown.values())],
        ],
    )


def comparison(
    title: str, ours: str, columns: dict[str, str], belongs: Callable[[str], bool]
) -> Callable[[Record], str]:
    """A table with a row for each workload that ``belongs``: our time, the share of a cold copy, then factors."""

    def table(record: Record) -> str:
        chosen = [of for of in record.workloads if belongs(of.name)]
        if not chosen:
            return ""
        rows = []
        for of in chosen:
            cold = of.row(of.ours, "cold")
            rows.append([
                of.label, time_text(of.row(of.ours)), share(cold), *(factor(of.row(name)) for name in columns)
            ])  # fmt: skip
        headings = [
            record.titled(title),
            ours,
            "of a cold copy",
            *(record.versioned(text) for text in columns.values()),
        ]
        return markdown(headings, rows)

    return table


def gae_and_combine(record: Record) -> str:
    """The step of a trainer, and what one operator for both could save of it."""
    rows = []
    for of in record.workloads:
        two, alone, cached = (of.row(name) for name in ("gae, then combine", "combine alone", "combine, in cache"))
        if two and alone and cached:
            saved = max(alone["p50_us"] - cached["p50_us"], 0) / two["p50_us"]
            label = of.label.partition(", ")[2]
            rows.append([label, time_text(two), factor(of.row("eager PyTorch")), f"{100 * saved:.0f} %"])
    headings = [record.titled("`gae`, then `combine`, normalised"), "time", "eager", "one operator saves at most"]
    return markdown(headings, rows) if rows else ""


def min_norm(record: Record) -> str:
    """Time and quality beside TorchJD, and the whole step."""
    rows = []
    for of in record.workloads:
        mgda = of.row("TorchJD MGDA") or {}
        norm = mgda.get("norm / optimum")
        rows.append([of.label, time_text(of.row(of.ours)), factor(mgda), "" if norm is None else f"{norm:.6g}"])
    headings = [
        record.titled("`min_norm`"),
        "time",
        record.versioned("TorchJD {torchjd} MGDA"),
        "its norm / the optimum",
    ]
    return markdown(headings, rows) if rows else ""


def scaling(record: Record) -> str:
    """The plot of a device."""
    return f"![time of a call against N and against the tokens]({plots.path(PLOTS, record.device).relative_to(ROOT)})"


# Candidates as tables head them; a package in braces stands for its version.
HOST = {
    "a + a": "`a + a`", "combine": "`combine`", "combine, out=": "`combine(out=)`",
    "custom_op in Python": "Python `custom_op`", "torch.compile": "compile", "eager PyTorch": "eager",
}  # fmt: skip
CALLS = {"eager PyTorch": "eager", "torch.compile": "compile", "numba": "numba {numba}", "Triton": "Triton {triton}"}
GROUPS = {
    "eager PyTorch": "eager", "torch.compile": "compile", "TRL": "TRL {trl}",
    "verl, vectorised": "verl {verl}, vectorised", "verl, loop": "verl, loop",
}  # fmt: skip
GAE = {
    "eager scan": "eager scan", "torch.compile": "compile", "numba": "numba {numba}",
    "TorchRL, vectorised": "TorchRL {torchrl}", "TRL 1.5.0, loop": "TRL's loop", "verl, loop": "verl's loop",
}  # fmt: skip
LOSS = {
    "eager PyTorch": "eager", "eager, loss alone": "its loss alone", "torch.compile": "compile",
    "Liger": "Liger {liger-kernel}", "verl": "verl {verl}",
}  # fmt: skip


def by_batch(name: str) -> bool:
    """Whether a workload of ``combine`` is of level "batch", with all arguments."""
    return "log_ratio" in name and "level" not in name


TABLES: dict[str, tuple[str, Callable[[Record], str]]] = {  # block: suite, what is shown of each device
    "host": ("combine", host),
    "combine": ("combine", comparison("with mask and log_ratio", "`combine`", CALLS, by_batch)),
    "token": ("combine", comparison("the same, level token", "`combine`", CALLS, lambda name: "level token" in name)),
    "groups": ("groups", comparison("rewards in groups of 8", "`combine`", GROUPS, lambda name: True)),
    "gae": ("gae", comparison("`gae`, no mask", "`gae`", GAE, lambda name: name.startswith("["))),
    "gae_and_combine": ("gae", gae_and_combine),
    "loss": ("loss", comparison("loss, metrics and gradient", "time", LOSS, lambda name: True)),
    "min_norm": ("min_norm", min_norm),
    "scaling": ("scaling", scaling),
}
OF_ALL = {"conditions": conditions, "figures": reached}


def block(book: Book, name: str) -> str:
    """What stands in a block."""
    if name in OF_ALL:
        return (OF_ALL[name](book) if book else "") or NOTHING
    suite, show = TABLES[name]
    parts = [show(record) for device in DEVICES if (record := book.get((suite, device)))]
    return "\n\n".join(filter(None, parts)) or NOTHING


def rewritten(text: str, book: Book) -> str:
    """The README with its blocks as the records have them."""
    return BLOCK.sub(lambda match: f"{match[1]}{block(book, match[2])}\n{match[3]}", text)


def figures(book: Book) -> str:
    """The page of all figures aimed at, as judged when they were measured."""
    rows = [
        [f"{suite}, {device}", gate["workload"], gate["text"], f"{gate['sign']} {gate['bound']:g}",
         "" if gate["value"] is None else f"{gate['value']:.3g}", gate["verdict"]]
        for (suite, device), record in book.items() for gate in record.gates
    ]  # fmt: skip
    table = markdown(["record", "workload", "figure", "aim", "measured", "verdict"], rows) if rows else NOTHING
    return f"# Figures aimed at\n\nWritten by `python -m bench.report` from the records beside it.\n\n{table}\n"


def main(arguments: list[str] | None = None) -> int:
    """Write, or compare and return 1 if something is not what the records give."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare only")
    options = parser.parse_args(arguments)
    book = Book.read(RECORDS)
    texts = {README: rewritten(README.read_text(), book), RECORDS / "README.md": figures(book)}
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    drawn = {plots.path(PLOTS, device): record for (suite, device), record in book.items() if suite == "scaling"}
    stale += [path for path, record in drawn.items() if not plots.shows(path, record)]
    for path in stale:
        print(f"{path.relative_to(ROOT)} {'differs from the records' if options.check else 'written'}")
        if not options.check:
            if path in texts:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(texts[path])
            else:
                plots.draw(drawn[path], path)
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
