"""What a suite declares: workloads, their candidates, the bytes that have to move, and the figures to reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bench import timer
from bench.timer import Call, Times

COPY = "copy"  # Tensor.copy_ of as many bytes as the workload has to move; the runner adds it
COMPILED = "torch.compile"
Check = Callable[[Any], None]  # raises AssertionError unless what a call returned is right
ERROR, BESIDE = "error", "error / eager"  # figures: the largest relative one, and what verify.beside says
VIEWS = ("host", "device", "cold")  # host time, device time (CUDA only), and one call with swept caches


@dataclass(frozen=True)
class Candidate:
    """One way to do a workload's job.

    Attributes:
        call: what is timed.
        check: given what ``call`` returned; None where nothing is computed.
        compiles: takes tens of seconds to compile, so it is left out of quick runs.
        graph: a CUDA graph can hold it; what moves results to the host cannot be captured.
    """

    call: Call
    check: Check | None = None
    compiles: bool = False
    graph: bool = True


@dataclass(frozen=True)
class Case:
    """A workload on a device, ready to run.

    Attributes:
        candidates: by name; the first is what all others are compared with.
        moved: bytes that have to move, read by read and write by write; empty where they say nothing.
        figures: what is not a time, by name and candidate.
        cold: time it with cold caches too, though its bytes are not counted.
    """

    candidates: dict[str, Candidate]
    moved: dict[str, int] = field(default_factory=dict)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    cold: bool = False


@dataclass(frozen=True)
class Gate:
    """A figure to reach: how many times as long one candidate takes as another, at least or at most.

    Attributes:
        slow: the candidate expected to take longer.
        fast: the other.
        bound: what is aimed at.
        smoke: a bound with a wide margin, which CI enforces; None: it does not.
        at_most: the ratio is bounded from above.
        view: which of the times is judged, of ``VIEWS``.
        device: where it holds.
    """

    slow: str
    fast: str
    bound: float
    smoke: float | None = None
    at_most: bool = False
    view: str = "host"
    device: str = "cpu"

    @property
    def text(self) -> str:
        """What is judged."""
        return ("share of a copy's bandwidth" if self.slow == COPY else f"{self.slow} / {self.fast}") + self._seen

    @property
    def _seen(self) -> str:
        return {"host": "", "device": ", device time", "cold": ", cold caches"}[self.view]

    @property
    def names(self) -> set[str]:
        """The candidates that it needs."""
        return {self.slow, self.fast}

    def value(self, times: Times) -> float:
        """The measured ratio."""
        return timer.ratio(times, self.slow, self.fast)

    def holds(self, value: float, bound: float) -> bool:
        """Whether a measured value is on the right side of a bound."""
        return value <= bound if self.at_most else value >= bound


@dataclass(frozen=True)
class Growth(Gate):
    """A figure to reach over candidates that are sizes of one job: the largest time per unit over the smallest.

    ``slow`` and ``fast`` are the ends of the series.

    Attributes:
        unit: what ``units`` counts.
        units: how many of them each size has.
    """

    unit: str = ""
    units: Mapping[str, int] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What is judged."""
        return f"time per {self.unit}, largest / smallest{self._seen}"

    @property
    def names(self) -> set[str]:
        """The sizes."""
        return set(self.units)

    def value(self, times: Times) -> float:
        """The measured ratio; times of different sizes are compared round by round too."""
        per_unit = [timer.ratio(times, size, self.slow) / units for size, units in self.units.items()]
        return max(per_unit) / min(per_unit)


@dataclass(frozen=True)
class Accuracy(Gate):
    """A figure to reach of errors instead of times: the figure ``view`` of ``slow``, which is beside ``fast``."""

    view: str = BESIDE

    @property
    def text(self) -> str:
        """What is judged."""
        return f"error, {self.slow} / {self.fast}"

    @property
    def names(self) -> set[str]:
        """The candidate that has the figure."""
        return {self.slow}

    def value(self, times: Times) -> float:
        """The figure."""
        (value,) = times[self.slow]
        return value


@dataclass(frozen=True)
class Workload:
    """One job, which several candidates do.

    Attributes:
        name: what is said of it in tables; the name by which records know it.
        build: makes it ready on a device.
        gates: the figures to reach.
        quick: part of a quick run.
        device: where it is run; "" = everywhere.
        sizes: numbers by which a plot places it.
    """

    name: str
    build: Callable[[str], Case]
    gates: tuple[Gate, ...] = ()
    quick: bool = True
    device: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)


def bytes_of(**tensors: Tensor) -> dict[str, int]:
    """Bytes of each tensor, for one read or one write of all of it."""
    return {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
