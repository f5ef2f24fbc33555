// launch_combine_cpu: instruction set, threads, and the order in which partial results meet.
//
// The tokens are cut into parts whose number depends on the problem alone, and the parts' moments merge in order: the
// statistics and weights are the same bits whatever the number of threads.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "groups.h"
#include "isa.h"
#include "pama/solve.h"
#include "parts.h"

namespace pama {
namespace {

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

// What a part has found: moments[n] and, as the level asks for it, shares or a guess.
struct Part {
  Moments moments[kMaxObjectives];
  TokenShares shares;
  Guess guess;
};

// What all parts have found. Two neighbours are merged by the one that is done last, in the order of the tokens: so the
// bits are the same whichever that is, and no thread is left to read all that others have written, which takes the
// longer beside their work, the more of them there are.
class Found {
 public:
  Found(const CombineParams& params, int64_t count) : p(params), parts(count), size(p.has_gram() ? p.n * p.n + 1 : 0) {
    if (size) grams.reset(new double[parts * size]());
    if (parts == 1) return;
    many_moments.reset(new Moments[parts * p.n]);
    if (p.level == Level::kToken) many_shares.reset(new TokenShares[parts]);
    if (p.level == Level::kBatch) many_guesses.reset(new Guess[parts]);
  }

  // find(part, gram) fills both for part k.
  template <class F>
  void add(int64_t k, F find) {
    Part local;  // near, and on cache lines that no other thread writes
    Part& part = parts > 1 ? local : one;
    std::fill(part.moments, part.moments + p.n, Moments::empty());
    if (p.level == Level::kToken) {
      std::fill(part.shares.weights, part.shares.weights + p.n, 0.0);
      part.shares.value = 0.0;
      part.shares.used = 0;
    }
    find(part, gram(k));
    if (parts == 1) return;
    std::copy(part.moments, part.moments + p.n, moments(k));
    if (p.level == Level::kToken) many_shares[k] = part.shares;
    if (p.level == Level::kBatch) many_guesses[k] = part.guess;
    for (int64_t step = 1; step < parts; step *= 2) {
      const int64_t left = k / (2 * step) * (2 * step), right = left + step;
      if (right >= parts) continue;
      if (!met[right].test_and_set(std::memory_order_acq_rel)) return;  // the other one will do it
      merge_into(left, right);
    }
  }

  // Of part k, or of all.
  Moments* moments(int64_t k = 0) { return parts > 1 ? many_moments.get() + k * p.n : one.moments; }
  TokenShares& shares(int64_t k = 0) { return parts > 1 ? many_shares[k] : one.shares; }
  double* gram(int64_t k = 0) { return size ? grams.get() + k * size : nullptr; }
  const Guess& guess(int64_t k) { return parts > 1 ? many_guesses[k] : one.guess; }

 private:
  void merge_into(int64_t left, int64_t right) {
    for (int i = 0; i < p.n; ++i) merge(moments(left)[i], moments(right)[i]);
    if (p.level == Level::kBatch)  // elsewhere Gram matrices are those of the last pool
      for (int64_t e = 0; e < size; ++e) gram(left)[e] += gram(right)[e];
    if (p.level != Level::kToken) return;
    for (int i = 0; i < p.n; ++i) shares(left).weights[i] += shares(right).weights[i];
    shares(left).value += shares(right).value;
    shares(left).used += shares(right).used;
  }

  const CombineParams& p;
  const int64_t parts, size;  // of a Gram matrix and, behind it, the number of tokens with data
  Part one;                   // if it is the only one
  std::unique_ptr<Moments[]> many_moments;
  std::unique_ptr<TokenShares[]> many_shares;
  std::unique_ptr<Guess[]> many_guesses;
  std::unique_ptr<double[]> grams;
  std::atomic_flag met[kMaxParts];  // whether one of the two that meet where part k begins is there
};

// The moments of the parts that are done, whichever they are: good enough for a guess. So nobody waits for them either:
// threads start and end at the same time, and one that sleeps takes longer to wake up than a small part takes.
class Done {
 public:
  explicit Done(int objectives) : n(objectives) { std::fill(moments, moments + n, Moments::empty()); }
  void add(const Moments* part) {
    if (busy.test_and_set(std::memory_order_acquire)) return;
    for (int i = 0; i < n; ++i) merge(moments[i], part[i]);
    busy.clear(std::memory_order_release);
  }
  bool copy(Moments* to) {  // false: not now
    if (busy.test_and_set(std::memory_order_acquire)) return false;
    std::copy(moments, moments + n, to);
    busy.clear(std::memory_order_release);
    return true;
  }

 private:
  const int n;
  std::atomic_flag busy;
  Moments moments[kMaxObjectives];
};

// A view of the problem whose samples are the scores of the rows, or the combined advantage.
CombineParams samples_of(const CombineParams& p, int n, const MomentRules& rules, Pool by) {
  CombineParams q = p;
  q.n = n;
  q.mask = Plane{};
  q.absent_zero = true;
  q.sums = nullptr;
  q.level = Level::kBatch;
  q.normalize.by = by;
  q.normalize.combined = Pool::kNone;
  q.normalize.each = rules;
  return q;
}

template <class C>
class Run {
 public:
  Run(CombineParams& params, ParallelFor parallel) : p(params), kernels(*active()), parallel_for(parallel) {}

  void operator()() {
    const Grouping grouping(p);
    std::fill(dead, dead + p.n, 0);
    normalize();
    combine();
    if (p.normalize.combined != Pool::kNone) normalize_combined();
  }

 private:
  // Units are dealt out so that a part's groups, if they are measured on the way, are its own.
  void normalize() {
    if (p.normalize.row_sums) {
      sums.reset(new C[p.batch * p.n]);
      CombineParams q = p;
      q.order = nullptr;
      q.sums = sums.get();
      for_parts(parallel_for, parts_for(p.tokens() * p.n, p.batch), p.batch,
                [&](int64_t, int64_t first, int64_t last) { kernels.sum_rows(q, first, last); });
    }
    const Pool by = p.normalize.by;
    if (by == Pool::kNone) {
      p.sums = sums.get();
      return;
    }
    map.reset(new C[3 * p.n * (by == Pool::kGroup ? p.groups : 1)]);
    p.affine = map.get();
    p.measures = !sums && by == Pool::kGroup;
    if (p.measures) return;
    CombineParams q = p;
    if (sums) {
      q = samples_of(p, p.n, p.normalize.each, by);
      q.dtype = sizeof(C) == 8 ? DType::kFloat64 : DType::kFloat32;
      q.rows = q.row_tokens = 1;
      q.cols = p.batch;
      for (int i = 0; i < p.n; ++i) q.advantages[i] = {reinterpret_cast<char*>(sums.get() + i), 0, p.n};
    }
    measure(q, dead);
    p.sums = sums.get();
  }

  // The maps of q's pools; how many of them give only 0 is added to dead[n].
  void measure(const CombineParams& q, int64_t* dead_pools) {
    const bool groups = q.normalize.by == Pool::kGroup;
    const int64_t units = groups ? q.groups : q.tokens(), parts = parts_for(q.tokens() * q.n, units);
    const std::unique_ptr<Moments[]> moments(new Moments[parts * q.n]);
    std::fill(moments.get(), moments.get() + parts * q.n, Moments::empty());
    for_parts(parallel_for, parts, units, [&](int64_t k, int64_t first, int64_t last) {
      (groups ? kernels.measure : kernels.moments)(q, first, last, moments.get() + k * q.n);
    });
    for (int i = 0; i < q.n; ++i) {
      for (int64_t k = 1; k < parts; ++k) merge(moments[i], moments[k * q.n + i]);
      dead_pools[i] += moments[i].dead;
      if (groups) continue;
      const PoolMoments pool = moments[i].pool(q.propagate);
      Maps<C>(map.get(), q.n).set(i, affine<C>(q.normalize.each, pool));
      dead_pools[i] += is_dead(q.normalize.each, pool);
    }
  }

  void combine() {
    const bool pooled = p.level == Level::kSequence || p.level == Level::kGroup;
    const int64_t units = p.measures ? p.groups : pooled ? p.pools() : p.tokens();
    const int64_t parts = parts_for(p.tokens() * p.n, units);
    Found found(p, parts);
    Done done(p.n);
    for_parts(parallel_for, parts, units, [&](int64_t k, int64_t first, int64_t last) {
      found.add(k, [&](Part& part, double* gram) { observe(part, gram, first, last, parts > 1 ? &done : nullptr); });
    });
    Moments* const moments = found.moments();
    C* packed = static_cast<C*>(p.packed);
    for (int i = 0; i < p.n; ++i) {
      moments[i].dead += dead[i];
      write_statistics(moments[i], i, p.n, packed);
    }
    if (pooled || p.per_token) return;

    double weights[kMaxObjectives];
    double value = 0.0;
    if (p.level == Level::kToken) {
      value = mean_shares(found.shares(), weights);
    } else {
      value = solve_pool(p, moments, found.gram(), weights);
      weigh(found, parts, units, weights);
    }
    C* out = packed + kStatistics * p.n;
    for (int i = 0; i < p.n; ++i) out[i] = static_cast<C>(weights[i]);
    out[p.n] = static_cast<C>(value);
  }

  void observe(Part& part, double* gram, int64_t first, int64_t last, Done* done) const {
    if (p.level == Level::kToken) return kernels.tokens(p, first, last, part.moments, part.shares);
    if (p.level != Level::kBatch) return kernels.pools(p, first, last, part.moments, gram);
    if (!guesses()) return kernels.scan(p, first, last, part.moments, gram, nullptr, nullptr);
    Moments others[kMaxObjectives];
    const bool knows = done && done->copy(others);
    kernels.scan(p, first, last, part.moments, gram, knows ? others : nullptr, &part.guess);
    if (done) done->add(part.moments);
  }

  // Not where a combination would overwrite what is read, where units are groups, or where a solve takes long.
  bool guesses() const { return !p.in_place && !p.measures && !p.has_gram(); }

  // The combination of the tokens that no part has guessed right.
  void weigh(Found& found, int64_t parts, int64_t units, const double* weights) const {
    int64_t firsts[kMaxParts], sizes[kMaxParts], runs = 0, left = 0;
    auto add = [&](int64_t first, int64_t last) {
      if (last <= first) return;
      firsts[runs] = first, sizes[runs++] = last - first;
      left += last - first;
    };
    if (guesses()) {
      for (int64_t k = 0; k < parts; ++k) {
        const int64_t first = part_start(k, parts, units), last = part_start(k + 1, parts, units);
        add(first, found.guess(k).holds(weights, p.n) ? std::min(found.guess(k).from, last) : last);
      }
    } else {
      add(0, p.tokens());
    }
    for_parts(parallel_for, parts_for(left * p.n, left), left, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t k = 0, at = 0; k < runs && at < end; at += sizes[k++]) {  // run k has the tokens [at, at + sizes[k])
        const int64_t first = std::max(begin - at, int64_t{0}), last = std::min(end - at, sizes[k]);
        if (first < last) kernels.weigh(p, firsts[k] + first, firsts[k] + last, weights, found.moments());
      }
    });
  }

  double mean_shares(const TokenShares& shares, double* weights) const {
    const double used = static_cast<double>(shares.used);
    for (int i = 0; i < p.n; ++i)
      weights[i] = p.solver == Solver::kFixed ? p.fixed_weight(i) : used > 0 ? shares.weights[i] / used : 1.0 / p.n;
    return shares.value / std::max(used, 1.0);
  }

  void normalize_combined() {
    const Pool by = p.normalize.combined;
    CombineParams q = samples_of(p, 1, p.normalize.last, by);
    q.advantages[0] = p.out;
    map.reset(new C[3 * (by == Pool::kGroup ? p.groups : 1)]);
    q.affine = map.get();
    int64_t unused[1] = {};
    measure(q, unused);
    for_parts(parallel_for, parts_for(q.tokens() * q.n, q.tokens()), q.tokens(),
              [&](int64_t, int64_t first, int64_t last) { kernels.rewrite(q, first, last); });
  }

  CombineParams& p;
  const CpuKernels& kernels;
  const ParallelFor parallel_for;
  std::unique_ptr<C[]> sums;  // [batch, n]: the scores of the rows
  std::unique_ptr<C[]> map;   // Maps<C> of [n, pools]
  int64_t dead[kMaxObjectives];
};

}  // namespace

bool prefetches_near(int64_t bytes) {
#if defined(__x86_64__)
  if (__builtin_cpu_is("intel")) return false;  // a Xeon gains from the second, whatever the first holds
#endif
#ifdef _SC_LEVEL1_DCACHE_SIZE
  static const int64_t first_level = sysconf(_SC_LEVEL1_DCACHE_SIZE);  // asked once: a virtual machine takes its time
  return first_level >= bytes;
#else
  return false;
#endif
}

const CpuKernels& active_kernels() { return *active(); }

const char* cpu_instructions() { return active().load()->name; }

bool use_cpu_instructions(const char* name) {
  for (const CpuKernels* kernels : usable_kernels())
    if (!strcmp(kernels->name, name)) return active() = kernels, true;
  return false;
}

// Only one objective with a weight, or weights that are given: others hardly turn out to be the weights to the bit.
bool Guess::look(const CombineParams& p, const Moments* others, const Moments* here, int64_t t) {
  Moments seen[kMaxObjectives];
  double now[kMaxObjectives];
  int weighted = 0;
  if (others) {
    for (int i = 0; i < p.n; ++i) {
      seen[i] = others[i];
      merge(seen[i], here[i]);
    }
  }
  solve(p, others ? seen : here, now);
  for (int i = 0; i < p.n; ++i) weighted += now[i] != 0.0;
  const bool clear = weighted == 1 || p.solver == Solver::kFixed;
  if (clear && holds(now, p.n)) return false;
  std::copy(now, now + p.n, weights);
  from = clear ? t : kNone;
  return true;
}

bool Guess::holds(const double* of, int n) const { return from != kNone && std::equal(of, of + n, weights); }

double solve_pool(const CombineParams& p, const Moments* moments, const double* gram, double* weights) {
  if (p.solver != Solver::kMinNorm) return solve(p, moments, weights);
  const std::unique_ptr<double[]> scratch(new double[min_norm_scratch(p.n)]);
  return solve_vectors(p, moments, gram, scratch.get(), weights);
}

void launch_combine_cpu(CombineParams& params, ParallelFor parallel_for) {
  if (params.dtype == DType::kFloat64) return Run<double>(params, parallel_for)();
  Run<float>(params, parallel_for)();
}

}  // namespace pama
