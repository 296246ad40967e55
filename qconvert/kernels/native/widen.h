/* Stored bytes of the narrow float dtypes to binary32, exactly; NaN keep their payload. */
#ifndef QCONVERT_WIDEN_H
#define QCONVERT_WIDEN_H

#include "half.h"

static void widen_bf16(const uint8_t *restrict raw, size_t n, float *restrict out) {
    for (size_t i = 0; i < n; i++) {
        out[i] = from_bits(load16(raw + 2 * i) << 16);
    }
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
