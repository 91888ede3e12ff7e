// The CPU kernels for AVX-512 F, VL, BW, DQ (x86-64-v4); setup.py compiles this file alone with
// those flags.
#if defined(__x86_64__)
#define FA_ISA avx512
#include "csrc/cpu/kernels.h"
#endif
