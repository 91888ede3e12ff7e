// The CPU kernels for AVX2 with FMA and F16C (x86-64-v3); setup.py compiles this file alone with
// those flags.
#if defined(__x86_64__)
#define FA_ISA avx2
#include "csrc/cpu/kernels.h"
#endif
