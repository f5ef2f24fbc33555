// Marks functions that host and device share.
#pragma once

#ifdef __CUDACC__
#define PAMA_HD __host__ __device__ __forceinline__
#else
#define PAMA_HD inline __attribute__((always_inline))
#define __host__
#define __device__
#endif
