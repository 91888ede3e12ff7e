// The CPU kernels for any machine: plain loops, fused multiply-add by function call where there is
// no instruction.
#define FA_ISA generic
#include "csrc/cpu/kernels.h"
