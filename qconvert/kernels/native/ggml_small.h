/* ggml's block types of 32 values, section 8: the bytes of ../reference/ggml/small.py. */
#ifndef QCONVERT_GGML_SMALL_H
#define QCONVERT_GGML_SMALL_H

#include "half.h"
#include "packing.h"

enum { GGML_BLOCK = 32 };

/* 1 / scale, and 0 for 0. */
INLINE float inverse_of(float scale) {
    return scale == 0 ? 0.0f : 1.0f / scale;
}

INLINE int is_finite(float v) {
    return (bits_of(v) & 0x7F800000) != 0x7F800000;
}

/* An inverse or a range may overflow: such codes are 0. */
INLINE float finite_or_zero(float v) {
    return is_finite(v) ? v : 0.0f;
}

INLINE uint32_t largest_magnitude(const float *x) {
    uint32_t largest = 0;
    for (int i = 0; i < GGML_BLOCK; i++) {
        const uint32_t magnitude = bits_of(x[i]) & 0x7FFFFFFF; /* grows with |x| */
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

/* A bit for each value of a magnitude. */
#ifdef USE_AVX2 /* which the compiler does not know to have an instruction for */
INLINE uint32_t places_of(uint32_t magnitude, const float *x) {
    const __m256i wanted = _mm256_set1_epi32((int)magnitude), kept = _mm256_set1_epi32(0x7FFFFFFF);
    uint32_t places = 0;
    for (int i = 0; i < GGML_BLOCK; i += 8) {
        const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(x + i));
        const __m256i equal = _mm256_cmpeq_epi32(_mm256_and_si256(bits, kept), wanted);
        places |= (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(equal)) << i;
    }
    return places;
}
#else
INLINE uint32_t places_of(uint32_t magnitude, const float *x) {
    uint32_t places = 0;
    for (int i = 0; i < GGML_BLOCK; i++) {
        places |= (uint32_t)((bits_of(x[i]) & 0x7FFFFFFF) == magnitude) << i;
    }
    return places;
}
#endif

/* The first value of the largest magnitude, with its sign. */
INLINE float furthest(const float *x) {
    return x[__builtin_ctz(places_of(largest_magnitude(x), x))];
}

/* An extreme that is a zero gets the sign of the first zero, as argmin and argmax have it. */
INLINE float first_of_equals(const float *x, float extreme) {
    int i = 0;
    while (extreme == 0 && x[i] != 0) {
        i++;
    }
    return extreme == 0 ? x[i] : extreme;
}

INLINE void range_of(const float *x, float *low, float *high) {
    int32_t small = INT32_MAX, large = INT32_MIN;
    for (int i = 0; i < GGML_BLOCK; i++) {
        const int32_t order = order_of(bits_of(x[i]));
        small = order < small ? order : small;
        large = order > large ? order : large;
    }
    *low = first_of_equals(x, from_order(small));
    *high = first_of_equals(x, from_order(large));
}

/* Fifth bits, where there are any, and the 4-bit plane, which is that of section 4. */
INLINE void store_small_codes(const int32_t codes[GGML_BLOCK], int bits, uint8_t *out) {
    if (bits == 5) {
        uint32_t fifth = 0;
        for (int i = 0; i < GGML_BLOCK; i++) {
            fifth |= (uint32_t)(codes[i] >> 4) << i;
        }
        memcpy(out, &fifth, sizeof fifth);
        out += sizeof fifth;
    }
    pack_wide_group(codes, 4, out);
}

INLINE void load_small_codes(const uint8_t *data, int bits, uint8_t codes[GGML_BLOCK]) {
    if (bits == 4) {
        unpack_group(data, 4, codes);
        return;
    }
    uint32_t fifth;
    memcpy(&fifth, data, sizeof fifth);
    unpack_group(data + sizeof fifth, 4, codes);
    for (int i = 0; i < GGML_BLOCK; i++) {
        codes[i] |= (uint8_t)((fifth >> i & 1) << 4);
    }
}

/* Codes of steps that are never negative, cut off and not rounded: the half is added already. Where
 * scale and inverse are finite, so are the steps of values that the scale was made for. */
INLINE void cut_codes(const float *x, float low, float scale, float half, int bits,
                      int32_t codes[GGML_BLOCK]) {
    const float top = (float)((1 << bits) - 1), inverse = inverse_of(scale);
    if (is_finite(scale) && is_finite(inverse)) {
        for (int i = 0; i < GGML_BLOCK; i++) {
            const float steps = (x[i] - low) * inverse + half;
            codes[i] = (int32_t)(steps < top ? steps : top);
        }
        return;
    }
    for (int i = 0; i < GGML_BLOCK; i++) {
        const float steps = finite_or_zero((x[i] - low) * inverse + half);
        codes[i] = (int32_t)(steps < top ? steps : top);
    }
}

/* Q4_0, Q5_0: the value furthest from 0 gets the lowest code. */
INLINE void encode_centred(const float *x, int bits, uint8_t *out) {
    int32_t codes[GGML_BLOCK];
    const float middle = (float)(1 << (bits - 1));
    const float scale = furthest(x) / -middle;
    cut_codes(x, 0.0f, scale, middle + 0.5f, bits, codes);
    store_half(scale, out);
    store_small_codes(codes, bits, out + 2);
}

/* Q4_1, Q5_1: the codes span the block's range. */
INLINE void encode_from_minimum(const float *x, int bits, uint8_t *out) {
    int32_t codes[GGML_BLOCK];
    float low, high;
    range_of(x, &low, &high);
    const float scale = (high - low) / (float)((1 << bits) - 1);
    cut_codes(x, low, scale, 0.5f, bits, codes);
    store_half(scale, out);
    store_half(low, out + 2);
    store_small_codes(codes, bits, out + 4);
}

/* Q8_0: halves round away from 0. */
INLINE void encode_bytes(const float *x, uint8_t *out) {
    const float scale = from_bits(largest_magnitude(x)) / 127.0f;
    const float inverse = inverse_of(scale);
    store_half(scale, out);
    for (int i = 0; i < GGML_BLOCK; i++) {
        /* With the number just below a half, of the same sign, only halves and above reach the next
         * whole number before the rest is cut off. */
        const float steps = finite_or_zero(x[i] * inverse);
        const float half = from_bits(bits_of(0x1.fffffep-2f) | (bits_of(steps) & 0x80000000));
        out[2 + i] = (uint8_t)(int32_t)(steps + half);
    }
}

INLINE void decode_small(const uint8_t *data, int bits, int centred, float *restrict out) {
    uint8_t codes[GGML_BLOCK];
    const float scale = from_half(load16(data));
    load_small_codes(data + (centred ? 2 : 4), bits, codes);
    const int32_t middle = centred ? 1 << (bits - 1) : 0;
    for (int i = 0; i < GGML_BLOCK; i++) {
        out[i] = scale * (float)((int32_t)codes[i] - middle);
    }
    if (!centred) {
        const float low = from_half(load16(data + 2));
        for (int i = 0; i < GGML_BLOCK; i++) {
            out[i] += low;
        }
    }
}

INLINE void decode_bytes(const uint8_t *data, float *restrict out) {
    const float scale = from_half(load16(data));
    for (int i = 0; i < GGML_BLOCK; i++) {
        out[i] = scale * (float)(int8_t)data[2 + i];
    }
}

#endif
