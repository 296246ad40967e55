/* Single numbers of 16 bits to binary32 and back. */
#ifndef QCONVERT_HALF_H
#define QCONVERT_HALF_H

#include "arithmetic.h"

INLINE uint32_t load16(const uint8_t *raw) {
    uint16_t stored;
    memcpy(&stored, raw, sizeof stored); /* the bytes need not be aligned */
    return stored;
}

INLINE float from_half(uint32_t half) {
    const uint32_t rebias = (uint32_t)(127 - 15) << 23;
    uint32_t exponent = half & 0x7C00;
    uint32_t magnitude = (half & 0x7FFF) << 13;
    /* A subnormal gets an implicit bit, whose value is then subtracted. */
    uint32_t one = rebias + (1u << 23);
    float subnormal = from_bits(magnitude + one) - from_bits(one);
    uint32_t normal = magnitude + (exponent == 0x7C00 ? 2 * rebias : rebias);
    uint32_t bits = exponent == 0 ? bits_of(subnormal) : normal;
    return from_bits(bits | (half & 0x8000) << 16);
}

/* Nearest binary16, ties to even; too large becomes Inf. NaN does not occur. */
INLINE uint16_t to_half(float v) {
    const uint32_t bits = bits_of(v), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
    if (magnitude >= 0x47800000) { /* 65536 and above */
        return (uint16_t)(sign | 0x7C00);
    }
    if (magnitude < 0x38800000) { /* below 2^-14: the addition rounds to steps of 2^-24 */
        return (uint16_t)(sign | (bits_of(from_bits(magnitude) + 0.5f) - bits_of(0.5f)));
    }
    const uint32_t odd = magnitude >> 13 & 1;
    return (uint16_t)(sign | ((magnitude - (112u << 23) + 0xFFF + odd) >> 13));
}

INLINE void store_half(float v, uint8_t *out) {
    const uint16_t half = to_half(v);
    memcpy(out, &half, sizeof half);
}

/* Nearest bfloat16, ties to even. NaN does not occur. */
INLINE uint16_t to_bfloat(float v) {
    const uint32_t bits = bits_of(v);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

#endif
