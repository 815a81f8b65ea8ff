// A host meaning for what lif.cu uses of CUDA, so that g++ can compile its kernels and a CPU run them.
// Compile with -ffp-contract=off -fno-strict-aliasing.
#pragma once
#include <cmath>
#include <cstring>
#include <cstdint>

#define LIF_HOST
#define __device__
#define __global__
#define __launch_bounds__(...)

struct Index { unsigned x; };
inline Index blockIdx, blockDim, threadIdx;

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }

template <class To, class From> To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return bits_as<float>(x); }
inline float half_to_float(unsigned short x) { return bits_as<_Float16>(x); }
inline unsigned short float_to_half(float x) { return bits_as<unsigned short>((_Float16)x); }

// A kernel launch: every thread of every block, one after the other. 0, or 2 where the caller's
// structure of arguments has another size than the kernel's.
template <class Args>
int run_kernel(void (*kernel)(Args), unsigned blocks, unsigned threads, const void* args, unsigned size) {
    Args a;
    if (size != sizeof a) return 2;
    std::memcpy(&a, args, sizeof a);
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel(a);
    return 0;
}
