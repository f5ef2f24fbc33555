"""The suites by name; each is a module that declares its workloads as ``SUITE``, imported when asked for."""

from __future__ import annotations

import importlib

from bench.workload import Workload

NAMES = ("combine", "groups", "gae", "min_norm", "loss", "scaling")


def load(name: str) -> tuple[Workload, ...]:
    """The workloads of a suite."""
    suite: tuple[Workload, ...] = importlib.import_module(f"bench.suites.{name}").SUITE
    return suite
