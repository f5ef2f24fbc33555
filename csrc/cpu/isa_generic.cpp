// 16-byte vectors: SSE2 on x86-64, NEON on Arm.
#define PAMA_ISA generic
#define PAMA_VECTOR_BYTES 16
#include "isa_kernels.h"
