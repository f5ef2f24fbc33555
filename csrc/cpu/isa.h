// The CPU kernel's entry points, one set per instruction set; combine.cpp chooses one when first called.
#pragma once

#include "pama/combine.h"
#include "pama/moments.h"

namespace pama {

// Level token: sums over the tokens that have data.
struct TokenShares {
  double weights[kMaxObjectives];
  double value;
  int64_t used;
};

// Each works on tokens [first, last) (`sequences`: rows) and merges into moments[n].
struct CpuKernels {
  const char* name;
  void (*scan)(const CombineParams&, int64_t first, int64_t last, Moments*);
  void (*weigh)(const CombineParams&, int64_t first, int64_t last, const double* weights);
  void (*tokens)(const CombineParams&, int64_t first, int64_t last, Moments*, TokenShares&);
  void (*sequences)(const CombineParams&, int64_t first, int64_t last, Moments*);
};

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
