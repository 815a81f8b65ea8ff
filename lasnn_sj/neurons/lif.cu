// The time loop on CUDA. One thread runs W neighbouring neurons through all T steps and keeps their state in
// registers. Whatever costs memory traffic or much arithmetic is a template parameter, so that the loops have
// no branch; whatever costs one multiplication is a number (0 turns it off).
//
// cuda.py puts the constants of dynamics.py in front: the codes of RESET and SHAPE, TRACE_DECAY and
// TRACE_STEPS. Nothing is included; tests/neurons/cuda_host.h lets g++ compile this file.
//
//   RESET  PAPER, SOFT, HARD                SHAPE  TRIANGLE, ATAN, SIGMOID, or NONE: no slope is kept
//   MAP    1: with the activation map       W      neurons of a thread, one access of W * sizeof(T) bytes

#ifndef LIF_HOST
__device__ inline float half_to_float(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ inline unsigned short float_to_half(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

struct Float16 { unsigned short bits; };
struct BFloat16 { unsigned short bits; };

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(Float16 x) { return half_to_float(x.bits); }
__device__ inline float to_float(BFloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }

__device__ inline void from_float(float x, float& y) { y = x; }
__device__ inline void from_float(float x, Float16& y) { y.bits = float_to_half(x); }
__device__ inline void from_float(float x, BFloat16& y) {
    const unsigned bits = __float_as_uint(x);  // to nearest even; by hand, as sm_70 has no instruction
    y.bits = x != x ? 0x7fc0 : (unsigned short)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// A spike that dropout removes is written as -0.0, so a neuron fired where any bit is set.
__device__ inline bool fired(float x) { return __float_as_uint(x) != 0; }
__device__ inline bool fired(Float16 x) { return x.bits != 0; }
__device__ inline bool fired(BFloat16 x) { return x.bits != 0; }

template <class T> __device__ inline T spike_word(float mask) {
    T word;
    from_float(mask, word);
    if (to_float(word) == 0.0f) from_float(-0.0f, word);
    return word;
}

template <class T, int W> struct alignas(sizeof(T) * W) Pack { T at[W]; };

template <class T, int W> __device__ inline Pack<T, W> load(const void* base, long long index) {
    return *reinterpret_cast<const Pack<T, W>*>(static_cast<const T*>(base) + index);
}
template <class T, int W> __device__ inline void store(void* base, long long index, const Pack<T, W>& p) {
    *reinterpret_cast<Pack<T, W>*>(static_cast<T*>(base) + index) = p;
}
// W slopes in one register or two; a Pack would take W registers.
template <int W> struct BytesOf { using Word = unsigned; };
template <> struct BytesOf<1> { using Word = unsigned char; };
template <> struct BytesOf<2> { using Word = unsigned short; };
template <> struct BytesOf<8> { using Word = unsigned long long; };
template <int W> using Bytes = typename BytesOf<W>::Word;

template <int W> __device__ inline Bytes<W> load_bytes(const void* base, long long index) {
    return *reinterpret_cast<const Bytes<W>*>(static_cast<const unsigned char*>(base) + index);
}

// One value per neuron, or ``other`` if the tensor is null.
template <int W> __device__ inline Pack<float, W> load_or(const void* base, long long i, float other) {
    Pack<float, W> p;
    if (base) return load<float, W>(base, i);
#pragma unroll
    for (int k = 0; k < W; ++k) p.at[k] = other;
    return p;
}

// Steps read ahead. Narrow threads read more steps ahead to have enough bytes in flight; wide ones would
// need too many registers.
template <class T, int W>
constexpr int UNROLL = sizeof(T) * W >= 16 ? 4 : sizeof(T) * W >= 8 ? 8 : 16;

// The surrogate's slope over its peak, at z = scale * |v - v_threshold|.
template <int SHAPE> __device__ inline float shape_of(float z) {
    if (SHAPE == TRIANGLE) return fmaxf(0.0f, 1.0f - z);
    if (SHAPE == ATAN) return __fdividef(1.0f, 1.0f + z * z);
    const float e = __expf(-z);
    return __fdividef(4.0f * e, (1.0f + e) * (1.0f + e));
}

// Its inverse, from the byte kept.
template <int SHAPE> __device__ inline float z_of(unsigned char byte) {
    const float s = fmaxf(byte, 0.5f) * (1.0f / 255.0f);  // at byte 0 z is only ever multiplied by 0
    if (SHAPE == TRIANGLE) return 1.0f - s;
    if (SHAPE == ATAN) return sqrtf(fmaxf(0.0f, 1.0f / s - 1.0f));
    const float r = sqrtf(fmaxf(0.0f, 1.0f - s));
    return 2.0f * __logf(1.0f + r) - __logf(s);
}

// The compiler spills a few registers of some variants to make room for one more block. cuda.py compiles these
// again with MORE_REGISTERS, which asks for room for two blocks only and so leaves a thread all 255 registers.
#ifdef MORE_REGISTERS
#define BOUNDS __launch_bounds__(128, 2)
#else
#define BOUNDS __launch_bounds__(128)
#endif

struct ForwardArgs {
    const void *x, *v, *mask;                    // mask may be null
    void *spikes, *v_T, *rate, *amap, *slope;    // rate may be null
    long long T, n, x_step;                      // x_step: elements between two steps of x
    float leak, gain, offset, v_threshold, v_reset, scale;
};

template <class T, int W, int RESET, int SHAPE, int MAP>
__global__ void BOUNDS lif_forward(const ForwardArgs a) {
    constexpr int U = UNROLL<T, W>;
    const long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * W;
    if (i >= a.n) return;
    const int steps = (int)a.T;
    const float theta = a.v_threshold;

    Pack<float, W> v = load<float, W>(a.v, i), total, mapped;
    const Pack<float, W> mask = load_or<W>(a.mask, i, 1.0f);
    Pack<T, W> word;  // what a spike is written as
    float trace[W];
#pragma unroll
    for (int k = 0; k < W; ++k) {
        total.at[k] = mapped.at[k] = trace[k] = 0.0f;
        word.at[k] = spike_word<T>(mask.at[k]);
    }

    Pack<T, W> x[U], next[U];
#pragma unroll
    for (int u = 0; u < U; ++u)
        if (u < steps) next[u] = load<T, W>(a.x, u * a.x_step + i);

    for (int t0 = 0; t0 < steps; t0 += U) {
#pragma unroll
        for (int u = 0; u < U; ++u) {
            x[u] = next[u];
            if (t0 + U + u < steps) next[u] = load<T, W>(a.x, (t0 + U + u) * a.x_step + i);
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (t0 + u >= steps) break;
            Pack<T, W> out;
            Pack<unsigned char, W> slope;
#pragma unroll
            for (int k = 0; k < W; ++k) {
                // The intrinsics keep the compiler from fusing: spikes equal the oracle's bit for bit.
                const float c = __fadd_rn(__fmul_rn(a.gain, to_float(x[u].at[k])), a.offset);
                float now = __fadd_rn(__fmul_rn(a.leak, v.at[k]), c);
                if (RESET == PAPER) now = __fsub_rn(now, v.at[k] > theta ? theta : 0.0f);
                const bool o = RESET == PAPER ? now > theta : now >= theta;
                const float spike = o ? 1.0f : 0.0f;
                if (o) out.at[k] = word.at[k];
                else from_float(0.0f, out.at[k]);
                if (SHAPE != NONE) {
                    // 1.5 * 2^23 + s has the integer nearest to s in its lowest bits
                    const float s = 255.0f * shape_of<SHAPE>(a.scale * fabsf(now - theta));
                    slope.at[k] = (unsigned char)__float_as_uint(__fadd_rn(s, 12582912.0f));
                }
                if (RESET == SOFT) now = __fsub_rn(now, o ? theta : 0.0f);
                // products, so that an infinite potential becomes NaN and is not reset away
                if (RESET == HARD) now = __fadd_rn(__fmul_rn(1.0f - spike, now), __fmul_rn(spike, a.v_reset));
                v.at[k] = now;
                total.at[k] = __fadd_rn(total.at[k], spike);
                if (MAP) {
                    mapped.at[k] = __fadd_rn(mapped.at[k], __fmul_rn(trace[k], spike));
                    trace[k] = __fmul_rn(TRACE_DECAY, __fadd_rn(trace[k], spike));
                }
            }
            const long long at = (t0 + u) * a.n + i;
            store<T, W>(a.spikes, at, out);
            if (SHAPE != NONE) store<unsigned char, W>(a.slope, at, slope);
        }
    }
#pragma unroll
    for (int k = 0; k < W; ++k) {
        total.at[k] = __fdiv_rn(total.at[k], (float)steps);
        mapped.at[k] = __fdiv_rn(mapped.at[k], (float)steps);
    }
    store<float, W>(a.v_T, i, v);
    if (a.rate) store<float, W>(a.rate, i, total);
    if (MAP) store<float, W>(a.amap, i, mapped);
}

struct BackwardArgs {
    const void *g_spikes, *g_v, *g_rate, *g_map;  // all but g_spikes may be null
    const void *spikes, *slope, *v0, *mask;       // spikes: with MAP or a hard reset
    void *g_x, *g_v0;
    long long T, n, g_step;                       // g_step: elements between two steps of g_spikes
    float leak, gain, v_threshold, v_reset, scale, peak;
    float attached;       // 1: gradients flow through the reset
    float through_trace;  // 1: and through the trace of the activation map
};

// The adjoint of lif_forward, from the last step to the first. SHAPE is NONE if the reset is detached: only
// an attached reset needs potentials, which follow from the slope and the side of the threshold.
template <class T, int W, int RESET, int SHAPE, int MAP>
__global__ void BOUNDS lif_backward(const BackwardArgs a) {
    constexpr int U = UNROLL<T, W>;
    constexpr bool SPIKES = MAP || RESET == HARD;
    constexpr int BEFORE = MAP ? TRACE_STEPS : 0;  // spikes are read this many steps before they are used
    const long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * W;
    if (i >= a.n) return;
    const int steps = (int)a.T;
    const float s_unit = a.peak / 255.0f;
    const float reset_gain = RESET == HARD ? a.attached : a.attached * a.v_threshold;
    const float z_unit = 1.0f / a.scale;

    Pack<float, W> handed = load_or<W>(a.g_v, i, 0.0f);  // gradient of the state after a step
    const Pack<float, W> mask = load_or<W>(a.mask, i, 1.0f);
    Pack<float, W> constant = load_or<W>(a.g_rate, i, 0.0f);
    Pack<float, W> map = load_or<W>(a.g_map, i, 0.0f);
    float reset[W];      // paper: gradient that reaches a spike through the next step's reset
    float ahead[W];      // gradient that reaches a spike through the trace of later steps
    unsigned window[W];  // bit j: did the neuron fire at step t0 - BEFORE + j
#pragma unroll
    for (int k = 0; k < W; ++k) {
        constant.at[k] /= (float)steps;
        map.at[k] /= (float)steps;
        reset[k] = ahead[k] = 0.0f;
        window[k] = 0;
    }

    int t0 = (steps - 1) / U * U;
    Pack<T, W> g[U], next_g[U], next_spikes[U];
    Bytes<W> slope[U], next_slope[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
        if (t0 + u < steps) {
            next_g[u] = load<T, W>(a.g_spikes, (t0 + u) * a.g_step + i);
            next_slope[u] = load_bytes<W>(a.slope, (t0 + u) * a.n + i);
        }
    }
    if (SPIKES) {
        for (int j = U; j < BEFORE + U; ++j) {
            const int t = t0 - BEFORE + j;
            if (t < 0 || t >= steps) continue;
            const Pack<T, W> o = load<T, W>(a.spikes, t * a.n + i);
#pragma unroll
            for (int k = 0; k < W; ++k) window[k] |= (unsigned)fired(o.at[k]) << (j - U);
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int t = t0 - BEFORE + u;
            if (t >= 0 && t < steps) next_spikes[u] = load<T, W>(a.spikes, t * a.n + i);
        }
    }

    for (; t0 >= 0; t0 -= U) {
#pragma unroll
        for (int u = 0; u < U; ++u) {
            g[u] = next_g[u];
            slope[u] = next_slope[u];
            if (t0 >= U) {  // only the last steps can be fewer than U
                next_g[u] = load<T, W>(a.g_spikes, (t0 - U + u) * a.g_step + i);
                next_slope[u] = load_bytes<W>(a.slope, (t0 - U + u) * a.n + i);
            }
        }
        if (SPIKES) {
#pragma unroll
            for (int k = 0; k < W; ++k) window[k] <<= U;
#pragma unroll
            for (int u = 0; u < U; ++u) {
                const int t = t0 - BEFORE + u;
                if (t >= 0 && t < steps) {
#pragma unroll
                    for (int k = 0; k < W; ++k) window[k] |= (unsigned)fired(next_spikes[u].at[k]) << u;
                }
                if (t >= U) next_spikes[u] = load<T, W>(a.spikes, (t - U) * a.n + i);
            }
        }

        // Neuron by neuron, which needs few registers; the gradients of x take the place of g.
#pragma unroll
        for (int k = 0; k < W; ++k) {
            // Running the trace's recursion backwards would amplify rounding, so it runs forwards from
            // TRACE_STEPS steps before; what came earlier has decayed to rounding.
            float trace[U];
            if (MAP) {
                float n_t = 0.0f;
#pragma unroll
                for (int j = 0; j < BEFORE + U; ++j) {
                    if (j >= BEFORE) trace[j - BEFORE] = n_t;
                    n_t = TRACE_DECAY * (n_t + (window[k] >> j & 1u ? 1.0f : 0.0f));
                }
            }
#pragma unroll
            for (int u = U - 1; u >= 0; --u) {
                if (t0 + u >= steps) continue;
                const bool o = SPIKES && (window[k] >> (BEFORE + u) & 1u);
                float go = to_float(g[u].at[k]) * mask.at[k] + constant.at[k];
                if (MAP) {
                    go += map.at[k] * trace[u] + ahead[k];
                    ahead[k] = TRACE_DECAY * (ahead[k] + (o ? a.through_trace * map.at[k] : 0.0f));
                }
                const unsigned char byte = (unsigned char)(slope[u] >> 8 * k);
                const float s = s_unit * (float)byte;
                float gv;
                if (RESET == PAPER) {
                    gv = handed.at[k] + (go - reset[k]) * s;
                    reset[k] = reset_gain * gv;
                } else if (RESET == SOFT) {
                    gv = handed.at[k] + (go - reset_gain * handed.at[k]) * s;
                } else {
                    if (SHAPE != NONE) {
                        const float distance = z_unit * z_of<SHAPE>(byte);
                        const float v = a.v_threshold + (o ? distance : -distance);
                        go += reset_gain * (a.v_reset - v) * handed.at[k];
                    }
                    gv = (o ? 0.0f : handed.at[k]) + go * s;
                }
                handed.at[k] = a.leak * gv;
                from_float(a.gain * gv, g[u].at[k]);
            }
        }
#pragma unroll
        for (int u = 0; u < U; ++u)
            if (t0 + u < steps) store<T, W>(a.g_x, (t0 + u) * a.n + i, g[u]);
    }
    if (RESET == PAPER && SHAPE != NONE) {
        const Pack<float, W> v0 = load<float, W>(a.v0, i);
#pragma unroll
        for (int k = 0; k < W; ++k) {
            const float z = a.scale * fabsf(v0.at[k] - a.v_threshold);
            handed.at[k] -= reset[k] * (a.peak * shape_of<SHAPE>(z));
        }
    }
    store<float, W>(a.g_v0, i, handed);
}
