"""The one runner: ``python -m bench [SUITE ...]`` measures and writes a record of each suite; ``--smoke`` guards CI."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bench import runner, smoke, suites
from bench.environment import RECORDS

FULL_S, QUICK_S = 6.0, 0.2  # for one view of one workload


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for; the exit status is not 0 only where the smoke test fails."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.partition("\n")[0])
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(suites.NAMES)}; all by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, metavar="S", help="timing budget of one view of one workload")
    parser.add_argument("--quick", action="store_true", help="a short run, without torch.compile and the largest sizes")
    parser.add_argument("--smoke", action="store_true", help="judge a few cheap workloads by wide bounds, no record")
    parser.add_argument("--threads", type=int, help="threads of PyTorch, numba and pama_ext; 1 for --smoke")
    parser.add_argument("--out", type=Path, default=RECORDS, help="folder for the records")
    parser.add_argument("--commit", help="commit to record where there is no repository")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if options.threads or options.smoke:
        torch.set_num_threads(options.threads or 1)
    names = options.suites or suites.NAMES
    if unknown := set(names).difference(suites.NAMES):
        parser.error(f"no such suite: {', '.join(sorted(unknown))}; there are {', '.join(suites.NAMES)}")
    if options.smoke:
        return smoke.main({name: suites.load(name) for name in names}, options.device)

    budget_s = options.seconds or (QUICK_S if options.quick else FULL_S)
    for name in names:
        record = runner.run(name, suites.load(name), options.device, budget_s=budget_s, quick=options.quick)
        if options.commit:
            record["header"]["commit"] = options.commit
        write(options.out / f"{name}-{options.device}.json", record)
    return 0


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record, making its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"record: {path}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
