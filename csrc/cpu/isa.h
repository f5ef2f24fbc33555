// The CPU kernels' entry points, one set per instruction set; combine.cpp chooses one when first called.
#pragma once

#include "pama/combine.h"
#include "pama/gae.h"
#include "pama/loss.h"
#include "pama/moments.h"

namespace pama {

// Level token: sums over the tokens that have data.
struct TokenShares {
  double weights[kMaxObjectives];
  double value;
  int64_t used;
};

struct PolicySums : PolicyTotals {
  double clipped[kMaxObjectives], gradient[kMaxObjectives];
};
struct ValueSums {
  int64_t tokens, sequences;
  double losses[kMaxObjectives], clipped[kMaxObjectives], values[kMaxObjectives];
};

// Level batch: the weights as a part guesses them from what has been seen so far. It combines its tokens under them
// while they are in the nearest cache, and if they turn out to be the weights, nothing is left to do there.
struct Guess {
  static constexpr int64_t kNone = INT64_MAX;

  double weights[kMaxObjectives];
  int64_t from = kNone;  // the part's tokens from here on have been combined

  // Looks again, before token t is combined, at the moments of other parts, if there are any, and of this one. Returns
  // whether it is not what it was.
  bool look(const CombineParams& p, const Moments* others, const Moments* here, int64_t t);
  bool holds(const double* of, int n) const;
};

// Each works on the tokens from `first` to `last` and merges into moments[n]; `scan` and `tokens` on groups, if they
// measure them. `gram` is [n * n + 1] or null; the guess may be null, and so may `others`. `weigh` only reads its
// moments, which have to have seen the tokens: where they know of no NaN, none is looked for.
struct CpuKernels {
  const char* name;
  void (*scan)(const CombineParams&, int64_t first, int64_t last, Moments*, double* gram, const Moments* others,
               Guess*);
  void (*weigh)(const CombineParams&, int64_t first, int64_t last, const double* weights, const Moments*);
  void (*tokens)(const CombineParams&, int64_t first, int64_t last, Moments*, TokenShares&);
  void (*pools)(const CombineParams&, int64_t first, int64_t last, Moments*, double* gram);  // rows, or groups
  void (*moments)(const CombineParams&, int64_t first, int64_t last, Moments*);              // of the raw samples
  void (*measure)(const CombineParams&, int64_t first, int64_t last, Moments*);              // groups
  void (*sum_rows)(const CombineParams&, int64_t first, int64_t last);                       // rows
  void (*rewrite)(const CombineParams&, int64_t first, int64_t last);
  void (*gae)(const GaeParams&, int64_t first, int64_t last);  // whole sequences
  // These add to the sums; where rows count, on rows.
  void (*policy_loss)(const PolicyParams&, int64_t first, int64_t last, PolicySums&);
  void (*value_loss)(const ValueParams&, int64_t first, int64_t last, ValueSums&);
  void (*scale)(const ScaleParams&, int64_t first, int64_t last);  // elements
};

const CpuKernels& active_kernels();  // of the best instruction set that this machine has

// Whether to prefetch into the first-level cache, if this tile and the next take so many bytes together; else into the
// second.
bool prefetches_near(int64_t bytes);

// Weights of one pool of tokens; returns s*. Compiled once, for every machine.
double solve_pool(const CombineParams& p, const Moments* moments, const double* gram, double* weights);

namespace generic {
extern const CpuKernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const CpuKernels kernels;
}
namespace avx512 {
extern const CpuKernels kernels;
}
#endif

}  // namespace pama
