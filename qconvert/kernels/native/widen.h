/* Stored bytes of the narrow float dtypes to binary32, exactly; NaN keep their payload. */
#ifndef QCONVERT_WIDEN_H
#define QCONVERT_WIDEN_H

#include "arithmetic.h"

INLINE uint32_t load16(const uint8_t *raw) {
    uint16_t stored;
    memcpy(&stored, raw, sizeof stored); /* the bytes need not be aligned */
    return stored;
}

static void widen_bf16(const uint8_t *restrict raw, size_t n, float *restrict out) {
    for (size_t i = 0; i < n; i++) {
        out[i] = from_bits(load16(raw + 2 * i) << 16);
    }
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

static void widen_f16(const uint8_t *restrict raw, size_t n, float *restrict out) {
    for (size_t i = 0; i < n; i++) {
        out[i] = from_half(load16(raw + 2 * i));
    }
}

static void widen_table(const uint8_t *restrict raw, size_t n, const float table[restrict 256],
                        float *restrict out) {
    for (size_t i = 0; i < n; i++) {
        out[i] = table[raw[i]];
    }
}

#endif
