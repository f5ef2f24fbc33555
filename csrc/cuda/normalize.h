// What Normalize asks for on the GPU, before and after the kernel of `combine`.
#pragma once

#include "pama/combine.h"

namespace pama {

int64_t normalize_cuda_workspace(const CombineParams& params);  // bytes
// Fills order, starts, ends, sums, affine and dead of `params`, all in `memory`.
void normalize_cuda(CombineParams& params, void* memory, void* stream);
void normalize_combined_cuda(const CombineParams& params, void* stream);  // in params.out

}  // namespace pama
