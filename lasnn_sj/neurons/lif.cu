// The time loop on CUDA. One thread runs W neighbouring neurons through all T steps and keeps their state in
// registers. Whatever costs memory traffic or much arithmetic is a template parameter, so that the loops have
// no branch; whatever costs one multiplication is a number (0 turns it off).
//
// cuda.py puts the constants of dynamics.py in front: the codes of RESET and SHAPE, TRACE_DECAY and
// TRACE_STEPS. Nothing is included; tests/neurons/cuda_host.h lets g++ compile this file.
//
//   RESET  PAPER, SOFT, HARD                SHAPE  TRIANGLE, ATAN, SIGMOID, or NONE: no slope is kept
//   MAP    1: with the activation map       W      neurons of a thread, W * sizeof(T) bytes of a step
//   POOL   1: the neurons are windows of 2x2 pixels, channels last; their spikes are averaged, and a thread
//          runs the four pixels of W / 4 channels

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

// The neurons of a thread: W in a row, or with POOL four rows of W / 4, the pixels of a window.
template <int W, int POOL> struct Neurons {
    static constexpr int ROWS = POOL ? 4 : 1, WIDTH = W / ROWS;
    long long first, right, below;  // the first neuron; distances to the pixels right of it and below

    __device__ inline long long row(int r) const {
        return POOL ? first + (r & 1 ? right : 0) + (r & 2 ? below : 0) : first;
    }
    template <class T> __device__ inline Pack<T, W> load(const void* base, long long step) const {
        Pack<T, W> all;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const Pack<T, WIDTH> part = ::load<T, WIDTH>(base, step + row(r));
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) all.at[r * WIDTH + k] = part.at[k];
        }
        return all;
    }
    template <class T> __device__ inline void store(void* base, long long step, const Pack<T, W>& all) const {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            Pack<T, WIDTH> part;
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) part.at[k] = all.at[r * WIDTH + k];
            ::store<T, WIDTH>(base, step + row(r), part);
        }
    }
    // One value per neuron, or ``other`` if the tensor is null.
    __device__ inline Pack<float, W> load_or(const void* base, float other) const {
        Pack<float, W> all;
        if (base) return load<float>(base, 0);
#pragma unroll
        for (int k = 0; k < W; ++k) all.at[k] = other;
        return all;
    }
    // A byte per neuron, the first in the lowest bits.
    __device__ inline Bytes<W> load_bytes(const void* base, long long step) const {
        Bytes<W> all = 0;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const void* at = static_cast<const unsigned char*>(base) + step + row(r);
            all |= (Bytes<W>)*static_cast<const Bytes<WIDTH>*>(at) << (8 * WIDTH * r);
        }
        return all;
    }
    __device__ inline void store_bytes(void* base, long long step, Bytes<W> all) const {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            void* at = static_cast<unsigned char*>(base) + step + row(r);
            *static_cast<Bytes<WIDTH>*>(at) = (Bytes<WIDTH>)(all >> (8 * WIDTH * r));
        }
    }
};

// The neurons of thread ``i`` of a layer; ``right`` and ``below`` are distances in a channels_last step.
template <int W, int POOL>
__device__ inline Neurons<W, POOL> neurons_of(long long i, long long right, long long below) {
    if (!POOL) return {i * W, 0, 0};
    // in 32 bits, whose division is fast: a step of 2^34 neurons fits no device
    const unsigned window = i * (W / 4), in_row = below / 2;  // of the averages, and in one of their rows
    const unsigned channels = right, rest = window % in_row;
    const long long row = window / in_row, column = rest / channels, channel = rest % channels;
    return {2 * row * below + 2 * column * right + channel, right, below};
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
    const void *x, *v, *mask;                          // mask may be null
    void *spikes, *v_T, *rate, *amap, *slope, *fired;  // rate may be null
    long long T, n, x_step, right, below;              // x_step: elements between two steps of x
    float leak, gain, offset, v_threshold, v_reset, scale;
};

// Bit t % 8 of byte [t / 8, i] of ``fired`` says whether neuron i fired at step t, for a backward pass that
// has to know.
template <class T, int W, int RESET, int SHAPE, int MAP, int POOL>
__global__ void BOUNDS lif_forward(const ForwardArgs a) {
    constexpr int U = UNROLL<T, W>;
    constexpr bool FIRED = SHAPE != NONE && (MAP || RESET == HARD);
    constexpr int OUT = POOL ? W / 4 : W;
    const long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (thread * W >= a.n) return;
    const Neurons<W, POOL> mine = neurons_of<W, POOL>(thread, a.right, a.below);
    const int steps = (int)a.T;
    const float theta = a.v_threshold;

    Pack<float, W> v = mine.template load<float>(a.v, 0), total, mapped;
    const Pack<float, W> mask = mine.load_or(a.mask, 1.0f);
    Pack<T, W> word;  // what a spike is written as
    Bytes<W> fired = 0;
    float trace[W];
#pragma unroll
    for (int k = 0; k < W; ++k) {
        total.at[k] = mapped.at[k] = trace[k] = 0.0f;
        from_float(mask.at[k], word.at[k]);
    }

    Pack<T, W> x[U], next[U];
#pragma unroll
    for (int u = 0; u < U; ++u)
        if (u < steps) next[u] = mine.template load<T>(a.x, u * a.x_step);

    for (int t0 = 0; t0 < steps; t0 += U) {
#pragma unroll
        for (int u = 0; u < U; ++u) {
            x[u] = next[u];
            if (t0 + U + u < steps) next[u] = mine.template load<T>(a.x, (t0 + U + u) * a.x_step);
        }
        Bytes<W> bits[U < 8 ? 1 : U / 8] = {};
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (t0 + u >= steps) break;
            Pack<T, W> out;
            Bytes<W> slope = 0;
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
                    slope |= (Bytes<W>)(unsigned char)__float_as_uint(__fadd_rn(s, 12582912.0f)) << (8 * k);
                }
                if (FIRED) bits[u / 8] |= (Bytes<W>)o << (8 * k + u % 8);
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
            const long long step = t0 + u;
            if (POOL) {
                Pack<T, OUT> mean;
#pragma unroll
                for (int k = 0; k < OUT; ++k) {
                    float sum = to_float(out.at[k]);
#pragma unroll
                    for (int r = 1; r < 4; ++r) sum = __fadd_rn(sum, to_float(out.at[r * OUT + k]));
                    from_float(0.25f * sum, mean.at[k]);
                }
                store<T, OUT>(a.spikes, step * (a.n / 4) + thread * OUT, mean);
            } else {
                mine.template store<T>(a.spikes, step * a.n, out);
            }
            if (SHAPE != NONE) mine.store_bytes(a.slope, step * a.n, slope);
        }
        if (FIRED) {
#pragma unroll
            for (int j = 0; j < (U < 8 ? 1 : U / 8); ++j) {
                const int t = t0 + 8 * j;
                if (t >= steps) break;
                fired = U < 8 && t & 4 ? fired | bits[j] << 4 : bits[j];
                if (U >= 8 || t & 4 || t + U >= steps) mine.store_bytes(a.fired, t / 8 * a.n, fired);
            }
        }
    }
#pragma unroll
    for (int k = 0; k < W; ++k) {
        total.at[k] = __fdiv_rn(total.at[k], (float)steps);
        mapped.at[k] = __fdiv_rn(mapped.at[k], (float)steps);
    }
    mine.template store<float>(a.v_T, 0, v);
    if (a.rate) mine.template store<float>(a.rate, 0, total);
    if (MAP) mine.template store<float>(a.amap, 0, mapped);
}

struct BackwardArgs {
    const void *g_spikes, *g_v, *g_rate, *g_map;  // all but g_spikes may be null
    const void *fired, *slope, *v0, *mask;        // fired: with MAP or a hard reset
    void *g_x, *g_v0;
    long long T, n, g_step, right, below;         // g_step: elements between two steps of g_spikes
    float leak, gain, v_threshold, v_reset, scale, peak;
    float attached;       // 1: gradients flow through the reset
    float through_trace;  // 1: and through the trace of the activation map
};

// The adjoint of lif_forward, from the last step to the first. SHAPE is NONE if the reset is detached: only
// an attached reset needs potentials, which follow from the slope and the side of the threshold.
template <class T, int W, int RESET, int SHAPE, int MAP, int POOL>
__global__ void BOUNDS lif_backward(const BackwardArgs a) {
    constexpr int U = UNROLL<T, W>;
    constexpr int BYTES = U < 8 ? 1 : U / 8;  // of ``fired`` that hold U steps
    constexpr bool FIRED = MAP || RESET == HARD;
    constexpr int BEFORE = MAP ? TRACE_STEPS : 0;  // steps that ``fired`` is read before it is used
    constexpr int IN = POOL ? W / 4 : W;
    const long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (thread * W >= a.n) return;
    const Neurons<W, POOL> mine = neurons_of<W, POOL>(thread, a.right, a.below);
    const int steps = (int)a.T;
    const float s_unit = a.peak / 255.0f;
    const float reset_gain = RESET == HARD ? a.attached : a.attached * a.v_threshold;
    const float z_unit = 1.0f / a.scale;

    Pack<float, W> handed = mine.load_or(a.g_v, 0.0f);  // gradient of the state after a step
    Pack<float, W> mask = mine.load_or(a.mask, 1.0f);
    Pack<float, W> constant = mine.load_or(a.g_rate, 0.0f);
    Pack<float, W> map = mine.load_or(a.g_map, 0.0f);
    float reset[W];      // paper: gradient that reaches a spike through the next step's reset
    float ahead[W];      // gradient that reaches a spike through the trace of later steps
    unsigned window[W];  // bit j: did the neuron fire at step t0 - BEFORE + j
#pragma unroll
    for (int k = 0; k < W; ++k) {
        constant.at[k] /= (float)steps;
        map.at[k] /= (float)steps;
        if (POOL) mask.at[k] *= 0.25f;
        reset[k] = ahead[k] = 0.0f;
        window[k] = 0;
    }

    const auto g_at = [&](int t) {  // gradients of a step's spikes, or of their averages in the first places
        Pack<T, W> all;
        if (!POOL) return mine.template load<T>(a.g_spikes, t * a.g_step);
        const Pack<T, IN> part = load<T, IN>(a.g_spikes, t * a.g_step + thread * IN);
#pragma unroll
        for (int k = 0; k < IN; ++k) all.at[k] = part.at[k];
        return all;
    };

    int t0 = (steps - 1) / U * U;
    Pack<T, W> g[U], next_g[U];
    Bytes<W> slope[U], next_slope[U], fired[BYTES];
#pragma unroll
    for (int u = 0; u < U; ++u) {
        if (t0 + u < steps) {
            next_g[u] = g_at(t0 + u);
            next_slope[u] = mine.load_bytes(a.slope, (t0 + u) * a.n);
        }
    }
    if (FIRED) {
        if (MAP) {  // the window's later steps, in the places from which the first turn below moves them up
            const int first = t0 - BEFORE + U;
#pragma unroll
            for (int j = 0; j <= BEFORE / 8; ++j) {
                const int t = (first & ~7) + 8 * j;
                if (t < 0 || t >= steps) continue;
                const Bytes<W> late = mine.load_bytes(a.fired, t / 8 * a.n);
#pragma unroll
                for (int k = 0; k < W; ++k) {
                    const unsigned byte = (unsigned)(late >> 8 * k) & 255u;
                    window[k] |= t < first ? byte >> (first - t) : byte << (t - first);
                }
            }
        }
#pragma unroll
        for (int j = 0; j < BYTES; ++j) {
            const int t = t0 - BEFORE + 8 * j;
            fired[j] = t >= 0 && t < steps ? mine.load_bytes(a.fired, t / 8 * a.n) : 0;
        }
    }

    for (; t0 >= 0; t0 -= U) {
#pragma unroll
        for (int u = 0; u < U; ++u) {
            g[u] = next_g[u];
            slope[u] = next_slope[u];
            if (t0 >= U) {  // only the last steps can be fewer than U
                next_g[u] = g_at(t0 - U + u);
                next_slope[u] = mine.load_bytes(a.slope, (t0 - U + u) * a.n);
            }
        }
        if (FIRED) {
            const int nibble = U < 8 ? t0 & 4 : 0;
#pragma unroll
            for (int k = 0; k < W; ++k) {
                unsigned early = 0;
#pragma unroll
                for (int j = 0; j < BYTES; ++j)
                    early |= ((unsigned)(fired[j] >> 8 * k) & 255u) << 8 * j;
                window[k] = window[k] << U | (U < 8 ? early >> nibble & 15u : early);
            }
            if (U >= 8 || !nibble) {  // two turns of four steps share a byte
#pragma unroll
                for (int j = 0; j < BYTES; ++j) {
                    const int t = t0 - U - BEFORE + 8 * j;
                    fired[j] = t >= 0 ? mine.load_bytes(a.fired, t / 8 * a.n) : 0;
                }
            }
        }

        // Neuron by neuron, which needs few registers; the gradients of x take the place of g. From the last
        // one down, so that with POOL a window's own gradient, in the first places, is replaced last.
#pragma unroll
        for (int k = W - 1; k >= 0; --k) {
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
                const bool o = FIRED && (window[k] >> (BEFORE + u) & 1u);
                float go = to_float(g[u].at[k % IN]) * mask.at[k] + constant.at[k];
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
            if (t0 + u < steps) mine.template store<T>(a.g_x, (t0 + u) * a.n, g[u]);
    }
    if (RESET == PAPER && SHAPE != NONE) {
        const Pack<float, W> v0 = mine.template load<float>(a.v0, 0);
#pragma unroll
        for (int k = 0; k < W; ++k) {
            const float z = a.scale * fabsf(v0.at[k] - a.v_threshold);
            handed.at[k] -= reset[k] * (a.peak * shape_of<SHAPE>(z));
        }
    }
    mine.template store<float>(a.g_v0, 0, handed);
}
