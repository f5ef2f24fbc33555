// 32-byte vectors; setup.py adds -mavx2 -mfma by this file's name.
#if defined(__x86_64__)
#define PAMA_ISA avx2
#define PAMA_VECTOR_BYTES 32
#include "isa_kernels.h"
#endif
