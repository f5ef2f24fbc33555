// launch_combine_cpu: instruction set, threads, and the order in which partial results meet.
//
// The tokens are cut into parts whose number depends on the problem alone, and the parts' moments merge in order: the
// statistics and weights are the same bits whatever the number of threads.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "isa.h"
#include "pama/solve.h"

namespace pama {
namespace {

constexpr int64_t kElementsPerPart = 32 * 1024;  // about 5 us of work: below two of these, threads do not pay
constexpr int64_t kMaxParts = 64;

// Those this machine can run, the best first.
std::vector<const CpuKernels*> usable_kernels() {
  std::vector<const CpuKernels*> usable;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    usable.push_back(&avx512::kernels);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) usable.push_back(&avx2::kernels);
#endif
  usable.push_back(&generic::kernels);
  return usable;
}

std::atomic<const CpuKernels*>& active() {
  static std::atomic<const CpuKernels*> kernels{usable_kernels().front()};
  return kernels;
}

struct Part {
  Moments moments[kMaxObjectives];
  TokenShares shares;
};

// f(part, first, last) for each of `parts` equal cuts of [0, units), on torch's threads if there is more than one.
template <class F>
void for_parts(ParallelFor parallel_for, int64_t parts, int64_t units, const F& f) {
  struct Context {
    const F& f;
    int64_t parts, units;
  } context{f, parts, units};
  auto run = [](int64_t begin, int64_t end, void* opaque) {
    const Context& c = *static_cast<Context*>(opaque);
    const int64_t size = c.units / c.parts, rest = c.units % c.parts;
    for (int64_t i = begin; i < end; ++i) c.f(i, i * size + std::min(i, rest), (i + 1) * size + std::min(i + 1, rest));
  };
  if (parts == 1) return run(0, 1, &context);
  if (parallel_for(0, parts, 1, run, &context) != 0) throw std::runtime_error("torch_parallel_for failed");
}

template <class C>
void run(const CombineParams& p, ParallelFor parallel_for) {
  const CpuKernels& kernels = *active();
  const int64_t units = p.level == Level::kSequence ? p.rows : p.tokens();
  const int64_t parts = std::clamp<int64_t>(std::min(p.tokens() * p.n / kElementsPerPart, units), 1, kMaxParts);

  Part one;
  const std::unique_ptr<Part[]> many(parts > 1 ? new Part[parts] : nullptr);
  Part* const part = parts > 1 ? many.get() : &one;

  for_parts(parallel_for, parts, units, [&](int64_t k, int64_t first, int64_t last) {
    std::fill(part[k].moments, part[k].moments + p.n, Moments::empty());
    if (p.level == Level::kToken) {
      std::fill(part[k].shares.weights, part[k].shares.weights + p.n, 0.0);
      part[k].shares.value = 0.0;
      part[k].shares.used = 0;
      kernels.tokens(p, first, last, part[k].moments, part[k].shares);
    } else if (p.level == Level::kSequence) {
      kernels.sequences(p, first, last, part[k].moments);
    } else {
      kernels.scan(p, first, last, part[k].moments);
    }
  });
  for (int64_t k = 1; k < parts; ++k)
    for (int i = 0; i < p.n; ++i) merge(part[0].moments[i], part[k].moments[i]);

  C* packed = static_cast<C*>(p.packed);
  for (int i = 0; i < p.n; ++i) write_statistics(part[0].moments[i], i, p.n, packed);
  if (p.level == Level::kSequence || p.per_token) return;

  double weights[kMaxObjectives], value;
  if (p.level == Level::kToken) {
    TokenShares& shares = part[0].shares;
    for (int64_t k = 1; k < parts; ++k) {
      for (int i = 0; i < p.n; ++i) shares.weights[i] += part[k].shares.weights[i];
      shares.value += part[k].shares.value;
      shares.used += part[k].shares.used;
    }
    const double used = static_cast<double>(shares.used);
    for (int i = 0; i < p.n; ++i)
      weights[i] = p.solver == Solver::kFixed ? p.fixed_weight(i) : used > 0 ? shares.weights[i] / used : 1.0 / p.n;
    value = shares.value / std::max(used, 1.0);
  } else {
    value = solve(p, part[0].moments, weights);
    for_parts(parallel_for, parts, units,
              [&](int64_t, int64_t first, int64_t last) { kernels.weigh(p, first, last, weights); });
  }
  C* out = packed + kStatistics * p.n;
  for (int i = 0; i < p.n; ++i) out[i] = static_cast<C>(weights[i]);
  out[p.n] = static_cast<C>(value);
}

}  // namespace

const char* cpu_instructions() { return active().load()->name; }

bool use_cpu_instructions(const char* name) {
  for (const CpuKernels* kernels : usable_kernels())
    if (!strcmp(kernels->name, name)) return active() = kernels, true;
  return false;
}

void launch_combine_cpu(const CombineParams& params, ParallelFor parallel_for) {
  if (params.dtype == DType::kFloat64) return run<double>(params, parallel_for);
  return run<float>(params, parallel_for);
}

}  // namespace pama
