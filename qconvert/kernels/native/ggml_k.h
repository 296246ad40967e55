/* K-quants, super-blocks of 256 values, section 8: the bytes of ../reference/ggml/kquants.py. */
#ifndef QCONVERT_GGML_K_H
#define QCONVERT_GGML_K_H

#include "ggml_k_affine.h"
#include "ggml_k_symmetric.h"

/* --- planes: codes of 1, 2 or 4 bits ---------------------------------------------------------*/

/* The bits of 256 codes from `low` on: byte i of each run of `width` holds values i, i + width, ... */
INLINE void store_plane(const uint8_t *restrict codes, int low, int bits, int width,
                        uint8_t *restrict plane) {
    const int fold = 8 / bits;
    const uint8_t mask = (uint8_t)((1 << bits) - 1);
    for (int run = 0; run < SUPER / (width * fold); run++) {
        for (int i = 0; i < width; i++) {
            unsigned byte = 0;
            for (int part = 0; part < fold; part++) {
                byte |= (unsigned)(codes[(run * fold + part) * width + i] >> low & mask)
                        << (bits * part);
            }
            plane[run * width + i] = (uint8_t)byte;
        }
    }
}

INLINE void load_plane(const uint8_t *restrict plane, int low, int bits, int width,
                       uint8_t *restrict codes) {
    const int fold = 8 / bits;
    const uint8_t mask = (uint8_t)((1 << bits) - 1);
    for (int run = 0; run < SUPER / (width * fold); run++) {
        for (int part = 0; part < fold; part++) {
            for (int i = 0; i < width; i++) {
                codes[(run * fold + part) * width + i] |=
                    (uint8_t)((plane[run * width + i] >> (bits * part) & mask) << low);
            }
        }
    }
}

/* --- integer scales of 6 bits ----------------------------------------------------------------*/

/* 8 scales and 8 minima in 12 bytes. */
INLINE void store_pairs(const uint8_t scales[8], const uint8_t minima[8], uint8_t out[12]) {
    for (int i = 0; i < 4; i++) {
        out[i] = (uint8_t)(scales[i] | scales[i + 4] >> 4 << 6);
        out[i + 4] = (uint8_t)(minima[i] | minima[i + 4] >> 4 << 6);
        out[i + 8] = (uint8_t)((scales[i + 4] & 15) | minima[i + 4] << 4);
    }
}

INLINE void load_pairs(const uint8_t packed[12], uint8_t scales[8], uint8_t minima[8]) {
    for (int i = 0; i < 4; i++) {
        scales[i] = packed[i] & 63;
        minima[i] = packed[i + 4] & 63;
        scales[i + 4] = (uint8_t)((packed[i + 8] & 15) | packed[i] >> 6 << 4);
        minima[i + 4] = (uint8_t)(packed[i + 8] >> 4 | packed[i + 4] >> 6 << 4);
    }
}

/* 16 scales in 12 bytes. */
INLINE void store_sixteen(const uint8_t scales[16], uint8_t out[12]) {
    memset(out + 8, 0, 4);
    for (int i = 0; i < 8; i++) {
        out[i] = (uint8_t)((scales[i] & 15) | scales[i + 8] << 4);
    }
    for (int i = 0; i < 16; i++) {
        out[8 + i % 4] |= (uint8_t)(scales[i] >> 4 << (i / 4 * 2));
    }
}

INLINE void load_sixteen(const uint8_t packed[12], uint8_t scales[16]) {
    for (int i = 0; i < 16; i++) {
        const int low = packed[i % 8] >> (i / 8 * 4) & 15;
        scales[i] = (uint8_t)(low | (packed[8 + i % 4] >> (i / 4 * 2) & 3) << 4);
    }
}

/* --- the types -------------------------------------------------------------------------------*/

static const KAffine k_q2 = {16, 3, 15, {1.0f, 1.1875f, 1.4375f}, 0.3125f};
static const KAffine k_q4 = {32, 15, 63, {1.0f, 1.078125f, 1.15625f}, 0.3125f};
static const KAffine k_q5 = {32, 31, 63, {1.0f, 1.0390625f, 1.078125f}, 0.3125f};
static const KSymmetric k_q3 = {
    4, 31, 1.0625f, 9, 1,
    {1.125f, 1.0f, 0.875f, 0.75f, 0.625f, -1.25f, -1.125f, -1.0f, -0.875f},
};
static const KSymmetric k_q6 = {
    32, 127, 1.1875f, 8, 0,
    {0.96875f, 1.0f, 1.03125f, 1.0625f, 1.09375f, 1.125f, 1.15625f, 1.1875f},
};

/* Integer scales or minima of a super-block, counted from `zero`, and its codes from theirs. */
INLINE void k_integers(const float *values, int count, int zero, uint8_t *out) {
    for (int i = 0; i < count; i++) {
        out[i] = (uint8_t)((int32_t)values[i] + zero);
    }
}

INLINE void k_codes(const KFound *found, int super, int zero, uint8_t codes[SUPER]) {
    for (int i = 0; i < SUPER; i++) {
        codes[i] = (uint8_t)(found->codes[super * SUPER + i] + zero);
    }
}

INLINE void store16(uint16_t v, uint8_t *out) {
    memcpy(out, &v, sizeof v);
}

static void store_q2_k(const KFound *found, uint8_t *out) {
    uint8_t codes[SUPER], scales[16], minima[16];
    k_integers(found->a, 16, 0, scales);
    k_integers(found->b, 16, 0, minima);
    k_codes(found, 0, 0, codes);
    for (int i = 0; i < 16; i++) {
        out[i] = (uint8_t)(scales[i] | minima[i] << 4);
    }
    store_plane(codes, 0, 2, 32, out + 16);
    store16(found->d[0], out + 80);
    store16(found->m[0], out + 82);
}

static void store_q3_k(const KFound *found, uint8_t *out) {
    uint8_t codes[SUPER], scales[16];
    k_integers(found->a, 16, 32, scales);
    k_codes(found, 0, 4, codes);
    store_plane(codes, 2, 1, 32, out);
    store_plane(codes, 0, 2, 32, out + 32);
    store_sixteen(scales, out + 96);
    store16(found->d[0], out + 108);
}

/* Q4_K and Q5_K. */
INLINE void store_q45_k(const KFound *found, int super, int bits, uint8_t *out) {
    uint8_t codes[SUPER], scales[8], minima[8];
    k_integers(found->a + 8 * super, 8, 0, scales);
    k_integers(found->b + 8 * super, 8, 0, minima);
    k_codes(found, super, 0, codes);
    store16(found->d[super], out);
    store16(found->m[super], out + 2);
    store_pairs(scales, minima, out + 4);
    if (bits == 5) {
        store_plane(codes, 4, 1, 32, out + 16);
    }
    store_plane(codes, 0, 4, 32, out + (bits == 5 ? 48 : 16));
}

static void store_q6_k(const KFound *found, uint8_t *out) {
    uint8_t codes[SUPER];
    k_codes(found, 0, 32, codes);
    store_plane(codes, 0, 4, 64, out);
    store_plane(codes, 4, 2, 32, out + 128);
    k_integers(found->a, 16, 0, out + 192);
    store16(found->d[0], out + 208);
}

/* --- values to blocks ------------------------------------------------------------------------*/

static void encode_q2_k(const float *x, const float *const *importance, uint8_t *out) {
    KFound found;
    search_affine(x, importance, 1, &k_q2, 16, &found);
    store_q2_k(&found, out);
}

static void encode_q45_k(const float *x, const float *const *importance, int supers, int bits,
                         uint8_t *out) {
    KFound found;
    search_affine(x, importance, supers, bits == 4 ? &k_q4 : &k_q5, 32, &found);
    for (int s = 0; s < supers; s++) {
        if (bits == 4) {
            store_q45_k(&found, s, 4, out + s * 144);
        } else {
            store_q45_k(&found, s, 5, out + s * 176);
        }
    }
}

static void encode_q3_k(const float *x, const float *const *importance, uint8_t *out) {
    KFound found;
    search_symmetric(x, importance, &k_q3, &found);
    store_q3_k(&found, out);
}

static void encode_q6_k(const float *x, const float *const *importance, uint8_t *out) {
    KFound found;
    search_symmetric(x, importance, &k_q6, &found);
    store_q6_k(&found, out);
}

/* --- blocks to values ------------------------------------------------------------------------*/

/* Values of codes counted from `zero`, with a scale for each `length` and perhaps a minimum. */
INLINE void decode_k(const uint8_t codes[SUPER], int zero, int length, const float *scales,
                     const float *minima, float *restrict out) {
    for (int s = 0; s < SUPER / length; s++) {
        for (int i = 0; i < length; i++) {
            const float value = scales[s] * (float)((int32_t)codes[s * length + i] - zero);
            out[s * length + i] = minima ? value - minima[s] : value;
        }
    }
}

static void decode_q2_k(const uint8_t *data, float *restrict out) {
    uint8_t codes[SUPER] = {0};
    float scales[16], minima[16];
    const float d = from_half(load16(data + 80)), m = from_half(load16(data + 82));
    load_plane(data + 16, 0, 2, 32, codes);
    for (int i = 0; i < 16; i++) {
        scales[i] = d * (float)(data[i] & 15);
        minima[i] = m * (float)(data[i] >> 4);
    }
    decode_k(codes, 0, 16, scales, minima, out);
}

static void decode_q3_k(const uint8_t *data, float *restrict out) {
    uint8_t codes[SUPER] = {0}, integers[16];
    float scales[16];
    const float d = from_half(load16(data + 108));
    load_plane(data, 2, 1, 32, codes);
    load_plane(data + 32, 0, 2, 32, codes);
    load_sixteen(data + 96, integers);
    for (int i = 0; i < 16; i++) {
        scales[i] = d * (float)((int32_t)integers[i] - 32);
    }
    decode_k(codes, 4, 16, scales, NULL, out);
}

INLINE void decode_q45_k(const uint8_t *data, int bits, float *restrict out) {
    uint8_t codes[SUPER] = {0}, a[8], b[8];
    float scales[8], minima[8];
    const float d = from_half(load16(data)), m = from_half(load16(data + 2));
    load_pairs(data + 4, a, b);
    if (bits == 5) {
        load_plane(data + 16, 4, 1, 32, codes);
    }
    load_plane(data + (bits == 5 ? 48 : 16), 0, 4, 32, codes);
    for (int i = 0; i < 8; i++) {
        scales[i] = d * (float)a[i];
        minima[i] = m * (float)b[i];
    }
    decode_k(codes, 0, 32, scales, minima, out);
}

static void decode_q6_k(const uint8_t *data, float *restrict out) {
    uint8_t codes[SUPER] = {0};
    float scales[16];
    const float d = from_half(load16(data + 208));
    load_plane(data, 0, 4, 64, codes);
    load_plane(data + 128, 4, 2, 32, codes);
    for (int i = 0; i < 16; i++) {
        scales[i] = d * (float)(int8_t)data[192 + i];
    }
    decode_k(codes, 32, 16, scales, NULL, out);
}

#endif
