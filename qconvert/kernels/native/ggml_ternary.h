/* ggml's block types for weights of three values, and of two, section 8: the bytes of
 * ../reference/ggml/ternary.py. */
#ifndef QCONVERT_GGML_TERNARY_H
#define QCONVERT_GGML_TERNARY_H

#include "ggml_small.h"

enum { TERNARY_BLOCK = 256, Q2_0_BLOCK = 64, Q1_0_BLOCK = 128 };

/* Codes + 1, and the scale; halves round away from 0. */
INLINE float ternary_digits(const float *restrict x, int count, uint8_t *restrict digits) {
    uint32_t largest = 0;
    for (int i = 0; i < count; i++) {
        const uint32_t magnitude = bits_of(x[i]) & 0x7FFFFFFF; /* grows with |x| */
        largest = magnitude > largest ? magnitude : largest;
    }
    const float scale = from_bits(largest), inverse = inverse_of(scale);
    for (int i = 0; i < count; i++) {
        const float steps = finite_or_zero(x[i] * inverse);
        digits[i] = (uint8_t)(1 + (steps >= 0.5f) - (steps <= -0.5f));
    }
    return scale;
}

/* `width` bytes, each of `places` values as a fraction of 3^5 in 256ths, rounded up. */
INLINE void store_trits(const uint8_t *restrict digits, int places, int width,
                        uint8_t *restrict out) {
    for (int i = 0; i < width; i++) {
        uint16_t number = 0;
        for (int place = 0; place < 5; place++) {
            number = (uint16_t)(number * 3 + (place < places ? digits[place * width + i] : 0));
        }
        out[i] = (uint8_t)((number * 256u + 242) / 243);
    }
}

/* Multiplying a fraction by 3 gives its first digit and, of 256, what follows it. */
INLINE void load_trits(const uint8_t *restrict data, int places, int width, float scale,
                       float *restrict out) {
    for (int i = 0; i < width; i++) {
        uint8_t fraction = data[i];
        for (int place = 0; place < places; place++) {
            out[place * width + i] = scale * (float)((fraction * 3 >> 8) - 1);
            fraction = (uint8_t)(fraction * 3);
        }
    }
}

INLINE void encode_tq1(const float *x, uint8_t *out) {
    uint8_t digits[TERNARY_BLOCK];
    store_half(ternary_digits(x, TERNARY_BLOCK, digits), out + 52);
    store_trits(digits, 5, 32, out);
    store_trits(digits + 160, 5, 16, out + 32);
    store_trits(digits + 240, 4, 4, out + 48);
}

INLINE void decode_tq1(const uint8_t *data, float *out) {
    const float scale = from_half(load16(data + 52));
    load_trits(data, 5, 32, scale, out);
    load_trits(data + 32, 5, 16, scale, out + 160);
    load_trits(data + 48, 4, 4, scale, out + 240);
}

INLINE void encode_tq2(const float *x, uint8_t *out) {
    uint8_t digits[TERNARY_BLOCK];
    store_half(ternary_digits(x, TERNARY_BLOCK, digits), out + 64);
    for (int i = 0; i < 64; i++) {
        const uint8_t *at = digits + i / 32 * 128 + i % 32;
        out[i] = (uint8_t)(at[0] | at[32] << 2 | at[64] << 4 | at[96] << 6);
    }
}

INLINE void decode_tq2(const uint8_t *data, float *restrict out) {
    const float scale = from_half(load16(data + 64));
    for (int half = 0; half < 2; half++) {
        for (int place = 0; place < 4; place++) {
            for (int i = 0; i < 32; i++) {
                const int digit = data[32 * half + i] >> 2 * place & 3;
                out[128 * half + 32 * place + i] = scale * (float)(digit - 1);
            }
        }
    }
}

INLINE void encode_q2_0(const float *x, uint8_t *out) {
    uint8_t digits[Q2_0_BLOCK];
    store_half(ternary_digits(x, Q2_0_BLOCK, digits), out);
    for (int i = 0; i < Q2_0_BLOCK / 4; i++) {
        const uint8_t *at = digits + 4 * i;
        out[2 + i] = (uint8_t)(at[0] | at[1] << 2 | at[2] << 4 | at[3] << 6);
    }
}

INLINE void decode_q2_0(const uint8_t *data, float *restrict out) {
    const float scale = from_half(load16(data));
    for (int i = 0; i < Q2_0_BLOCK; i++) {
        out[i] = scale * (float)((data[2 + i / 4] >> i % 4 * 2 & 3) - 1);
    }
}

/* The mean magnitude, summed one after the other, and a bit for each weight not below 0. */
INLINE void encode_q1_0(const float *x, uint8_t *out) {
    float total = 0;
    for (int i = 0; i < Q1_0_BLOCK; i++) {
        total += from_bits(bits_of(x[i]) & 0x7FFFFFFF);
    }
    store_half(total / Q1_0_BLOCK, out);
    for (int i = 0; i < Q1_0_BLOCK / 8; i++) {
        unsigned byte = 0;
        for (int bit = 0; bit < 8; bit++) {
            byte |= (unsigned)(x[8 * i + bit] >= 0) << bit;
        }
        out[2 + i] = (uint8_t)byte;
    }
}

INLINE void decode_q1_0(const uint8_t *data, float *restrict out) {
    const float scale = from_half(load16(data));
    for (int i = 0; i < Q1_0_BLOCK; i++) {
        out[i] = scale * (float)((data[2 + i / 8] >> i % 8 & 1) * 2 - 1);
    }
}

#endif
