// 64-byte vectors; setup.py adds the AVX-512 flags by this file's name.
#if defined(__x86_64__)
#define PAMA_ISA avx512
#define PAMA_VECTOR_BYTES 64
#include "isa_kernels.h"
#endif
