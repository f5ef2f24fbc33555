// Work dealt out to torch's threads. How many parts there are depends on the problem alone, never on the threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "pama/combine.h"

namespace pama {

constexpr int64_t kElementsPerPart = 16 * 1024;  // about 5 us of work: below two of these, threads do not pay
constexpr int64_t kMaxParts = 64;

// An even number where units allow, so that two threads share the work equally.
inline int64_t parts_for(int64_t elements, int64_t units) {
  return std::clamp<int64_t>(std::min(elements / kElementsPerPart / 2 * 2, units), 1, kMaxParts);
}

// First of the units of part k: equal cuts.
inline int64_t part_start(int64_t k, int64_t parts, int64_t units) {
  return k * (units / parts) + std::min(k, units % parts);
}

// f(part, first, last) for each of `parts` equal cuts of [0, units), on torch's threads if there is more than one. A
// thread takes its own parts in the order of memory, and then, from the last on, what others have not begun: cores that
// are shared, or not alike, take up to twice as long for the same work.
template <class F>
void for_parts(ParallelFor parallel_for, int64_t parts, int64_t units, const F& f) {
  if (parts == 1) return f(0, int64_t{0}, units);
  struct Context {
    const F& f;
    const int64_t parts, units;
    std::atomic_flag taken[kMaxParts]{};

    void take(int64_t k) {
      if (taken[k].test(std::memory_order_relaxed) || taken[k].test_and_set(std::memory_order_relaxed)) return;
      f(k, part_start(k, parts, units), part_start(k + 1, parts, units));
    }
  } context{f, parts, units};
  auto run = [](int64_t begin, int64_t end, void* opaque) {
    Context& c = *static_cast<Context*>(opaque);
    for (int64_t k = begin; k < end; ++k) c.take(k);
    for (int64_t k = begin + c.parts - 1; k >= end; --k) c.take(k % c.parts);
  };
  if (parallel_for(0, parts, 1, run, &context) != 0) throw std::runtime_error("torch_parallel_for failed");
}

}  // namespace pama
