/* Rounding, clamping and the order of additions, shared by all loops. Included once per variant. */
#ifndef QCONVERT_ARITHMETIC_H
#define QCONVERT_ARITHMETIC_H

#include "kernels.h"

#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* Inlined, GCC would keep the lanes of some loops as single numbers and vectorise nothing. */
#define APART static __attribute__((noinline))

/* A loop over 16 columns side by side. GCC would unroll such a short loop entirely, and then not
 * vectorise it. */
#ifdef __clang__
#define EACH_COLUMN for (int j = 0; j < LANES; j++)
#else
#define EACH_COLUMN _Pragma("GCC unroll 1") for (int j = 0; j < LANES; j++)
#endif

/* Adding and subtracting 1.5 * 2^23 leaves an integer, rounded by the addition: to nearest, ties to
 * even. Exact for |v| <= 2^22, and unlike rintf() a vector instruction on every processor. */
INLINE float round_small(float v) {
    const float magic = 12582912.0f;
    return (v + magic) - magic;
}

/* The same in binary64, for |v| <= 2^51. */
INLINE double round_small_wide(double v) {
    const double magic = 6755399441055744.0;
    return (v + magic) - magic;
}

/* A sum of squares of integers below 2^24: with one rounding or two, none rounds. */
#ifdef USE_AVX512
#define ADD_SQUARE(sum, u) __builtin_fmaf(u, u, sum)
#else
#define ADD_SQUARE(sum, u) ((sum) + (u) * (u))
#endif

/* NaN stays NaN. */
INLINE float clamp(float v, float low, float high) {
    v = v < low ? low : v;
    return v > high ? high : v;
}

INLINE double clamp_wide(double v, double low, double high) {
    v = v < low ? low : v;
    return v > high ? high : v;
}

/* clamp(rint(v), low, top) for integers low and top: clamping first gives the same integer. */
INLINE float code_of(float v, float low, float top) {
    return round_small(clamp(v, low, top));
}

INLINE uint32_t bits_of(float v) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    return bits;
}

INLINE float from_bits(uint32_t bits) {
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

/* Integers in the order of the magnitudes, NaN above Inf: maxima may be taken in any order. */
INLINE int32_t magnitude_of(float v) {
    return (int32_t)(bits_of(v) & 0x7FFFFFFF);
}

/* Integers in the order of the values, -0 below 0: unlike floats, their minimum may be taken in any
 * order, so that reductions vectorise. Its own inverse. */
INLINE int32_t order_of(uint32_t bits) {
    return (int32_t)(bits ^ (bits >> 31 ? 0x7FFFFFFF : 0));
}

INLINE float from_order(int32_t order) {
    return from_bits((uint32_t)order_of((uint32_t)order));
}

/* Adds partial sums in pairs: i with i+8, i+4, i+2, i+1 (section 6). */
INLINE double fold_wide(double lanes[LANES]) {
    for (int half = LANES / 2; half; half /= 2) {
        for (int i = 0; i < half; i++) {
            lanes[i] += lanes[i + half];
        }
    }
    return lanes[0];
}

INLINE float fold(float lanes[LANES]) {
    for (int half = LANES / 2; half; half /= 2) {
        for (int i = 0; i < half; i++) {
            lanes[i] += lanes[i + half];
        }
    }
    return lanes[0];
}

INLINE size_t smaller(size_t a, size_t b) {
    return a < b ? a : b;
}

/* Zero steps to a code, section 3. */
INLINE int zero_steps(int bits) {
    return bits == 8 ? 1 : 4;
}

#endif
