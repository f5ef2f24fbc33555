"""How parts are dealt to threads (csrc/cpu/parts.h): each once, and what a slow thread has not begun others do."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
from on_host import compiled, needs_compiler

pytestmark = needs_compiler
PARTS, UNITS = 10, 1003

HARNESS = """
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>
#include "cpu/parts.h"

static int threads;
static thread_local int self;

// As torch does it: equal ranges, the first for the thread that calls.
static int parallel_for(int64_t begin, int64_t end, int64_t, void (*run)(int64_t, int64_t, void*), void* context) {
  auto range = [=](int t) {
    self = t;
    run(begin + (end - begin) * t / threads, begin + (end - begin) * (t + 1) / threads, context);
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(range, t);
  range(0);
  for (std::thread& other : others) other.join();
  return 0;
}

// by[parts]: which thread did the part; when[parts]: how many it had done before; covered[units]: how often. The last
// of several threads begins its first part before any other does, and ends it when all else is done. 0: it waited
// in vain.
extern "C" int deal(int of, int64_t parts, int64_t units, int* by, int* when, int* covered) {
  threads = of;
  std::atomic<int64_t> begun{0}, done{0};
  std::vector<int> order(of);
  const auto late = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  auto wait = [&](auto ready) {
    while (!ready() && std::chrono::steady_clock::now() < late) std::this_thread::yield();
    return ready();
  };
  std::atomic<bool> in_time{true};
  pama::for_parts(parallel_for, parts, units, [&](int64_t k, int64_t first, int64_t last) {
    const bool slow = of > 1 && self == of - 1;
    if (slow) {
      ++begun;
      if (!wait([&] { return done == parts - 1; })) in_time = false;
    } else if (of > 1 && !wait([&] { return begun > 0; })) {
      in_time = false;
    }
    by[k] = self;
    when[k] = order[self]++;
    for (int64_t u = first; u < last; ++u) ++covered[u];
    ++done;
  });
  return in_time;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder: Path = tmp_path_factory.mktemp("dealing")
    (folder / "deal.cpp").write_text(HARNESS)
    return compiled(folder / "deal.so", str(folder / "deal.cpp"))


def deal(library: ctypes.CDLL, threads: int, parts: int) -> tuple[list[int], list[int]]:
    """Which thread did each part, and as which of its own."""
    by, when, covered = ((ctypes.c_int * count)() for count in (parts, parts, UNITS))
    in_time = library.deal(threads, ctypes.c_int64(parts), ctypes.c_int64(UNITS), by, when, covered)
    assert in_time, "a thread waits for what nobody else does"
    assert list(covered) == [1] * UNITS
    return list(by), list(when)


@pytest.mark.parametrize("parts", [1, 2, PARTS, 64])
def test_one_thread_does_all_in_the_order_of_memory(library, parts):
    assert deal(library, 1, parts) == ([0] * parts, list(range(parts)))


def test_what_a_slow_thread_has_not_begun_is_done_by_the_other_from_the_end(library):
    by, when = deal(library, 2, PARTS)
    assert by == [0] * 5 + [1] + [0] * 4
    assert [when[k] for k in (0, 1, 2, 3, 4, 9, 8, 7, 6)] == list(range(9))


@pytest.mark.parametrize(("threads", "parts"), [(2, 2), (2, 64), (3, 5), (4, 64), (7, 8)])
def test_each_part_is_done_once_and_the_slow_thread_does_one(library, threads, parts):
    by, _ = deal(library, threads, parts)
    assert by.count(threads - 1) == 1
