// FA_HOST_DEVICE: what the order of arithmetic is made of compiles for processors and for GPUs.
#pragma once

#if defined(__CUDACC__)
#define FA_HOST_DEVICE __host__ __device__
#else
#define FA_HOST_DEVICE
#endif
