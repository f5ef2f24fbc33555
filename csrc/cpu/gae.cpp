// launch_gae_cpu: whole sequences dealt to threads, in parts of about as many tokens.
#include "pama/gae.h"

#include "isa.h"
#include "parts.h"

namespace pama {
namespace {

// First token of the first sequence that starts at or behind `token`.
int64_t next_start(const GaeParams& p, int64_t token) {
  if (!p.offsets) return (token + p.length - 1) / p.length * p.length;
  int64_t low = 0, high = p.sequences;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (p.start(middle) < token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return p.start(low);
}

}  // namespace

void launch_gae_cpu(const GaeParams& p, ParallelFor parallel_for) {
  if (p.tokens() == 0) return;
  const CpuKernels& kernels = active_kernels();
  for_parts(parallel_for, parts_for(p.tokens() * p.n, p.sequences), p.tokens(),
            [&](int64_t, int64_t first, int64_t last) {
              first = next_start(p, first);
              last = next_start(p, last);
              if (first < last) kernels.gae(p, first, last);
            });
}

}  // namespace pama
