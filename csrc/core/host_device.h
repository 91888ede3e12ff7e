// FA_HOST_DEVICE: what the order of arithmetic is made of compiles for processors and for GPUs.
// FA_MEMBER: so does a member function, but on a processor it is always inlined: the copies that
// isa_*.cpp would make of it are one to the linker, whatever instructions they are made of.
#pragma once

#if defined(__CUDACC__)
#define FA_HOST_DEVICE __host__ __device__
#define FA_MEMBER __host__ __device__
#else
#define FA_HOST_DEVICE
#define FA_MEMBER inline __attribute__((always_inline))
#endif
