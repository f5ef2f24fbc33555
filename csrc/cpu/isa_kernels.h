// The kernels of one instruction set, and the table that names them.
#pragma once

#include "combine_kernel.h"
#include "gae_kernel.h"
#include "policy_kernel.h"
#include "value_kernel.h"

#define PAMA_STRING(x) #x
#define PAMA_NAME(x) PAMA_STRING(x)

namespace pama {
namespace PAMA_ISA {

const CpuKernels kernels = {
    PAMA_NAME(PAMA_ISA), scan,       weigh, tokens, pools, moments, measure, sum_rows, rewrite, gae,
    policy_loss,         value_loss, scale};

}  // namespace PAMA_ISA
}  // namespace pama
