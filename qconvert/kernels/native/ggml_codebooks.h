/* ggml's block types whose codes are places in a table, section 8: the bytes of
 * ../reference/ggml/codebooks.py. */
#ifndef QCONVERT_GGML_CODEBOOKS_H
#define QCONVERT_GGML_CODEBOOKS_H

#include "ggml_search.h"

static const int8_t iq4_levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                      1,    13,   25,  38,  53,  69,  89,  113};
static const int8_t e2m1_levels[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

/* The middles between the levels of IQ4, in 64ths, with the steps from level to level. */
#define IQ4_MIDDLES(M)                                                                          \
    M(-7392, 23) M(-5984, 21) M(-4736, 18) M(-3648, 16) M(-2688, 14) M(-1824, 13) M(-1024, 12)  \
    M(-288, 11) M(448, 12) M(1216, 12) M(2016, 13) M(2912, 15) M(3904, 16) M(5056, 20)          \
    M(6464, 24)

/* The same for the magnitudes of E2M1, doubled, in halves. */
#define E2M1_MIDDLES(M)                                                                         \
    M(0, 1, 1) M(1, 3, 1) M(2, 5, 1) M(3, 7, 1) M(4, 10, 2) M(5, 14, 2) M(6, 20, 4)

/* --- IQ4 --------------------------------------------------------------------------------------*/

/* The table of IQ4 as rows of equal numbers: vectors in memory, which GCC does not build anew. */
typedef struct {
    int16_t middles[15][BATCH], steps[15][BATCH];
} Iq4Steps;

static void set_iq4_steps(Iq4Steps *t) {
#define STEP(middle, step) {middle, step},
    static const int16_t table[15][2] = {IQ4_MIDDLES(STEP)};
#undef STEP
    for (int k = 0; k < 15; k++) {
        for (int j = 0; j < BATCH; j++) {
            t->middles[k][j] = table[k][0];
            t->steps[k][j] = table[k][1];
        }
    }
}

/* Values in 64ths of a code, rounded as round_small does: the sum's bits grow with the value, so
 * that they may be clamped afterwards, as integers. */
INLINE void iq4_places(const float *restrict values, size_t length, const float inverse[BATCH],
                       int16_t *restrict places) {
    const float magic = 12582912.0f;
    const int32_t zero = (int32_t)bits_of(magic), low = zero - 16383, top = zero + 16383;
    float fine[BATCH];
    int32_t sums[LONGEST_GROUP * BATCH];
    for (int j = 0; j < BATCH; j++) {
        fine[j] = inverse[j] * 64.0f;
    }
    for (size_t i = 0; i < length * BATCH; i += BATCH) {
        for (int j = 0; j < BATCH; j++) {
            sums[i + (size_t)j] = (int32_t)bits_of(values[i + (size_t)j] * fine[j] + magic);
        }
    }
    for (size_t i = 0; i < length * BATCH; i++) {
        int32_t sum = sums[i] > low ? sums[i] : low;
        sum = sum < top ? sum : top;
        places[i] = (int16_t)(sum - zero);
    }
}

APART void iq4_nearest(const float *restrict values, size_t length, const float inverse[BATCH],
                        const void *restrict table, float *restrict codes) {
    const Iq4Steps *t = table;
    int16_t places[LONGEST_GROUP * BATCH], levels[LONGEST_GROUP * BATCH];
    iq4_places(values, length, inverse, places);
    for (size_t i = 0; i < length * BATCH; i += BATCH) {
        for (int j = 0; j < BATCH; j++) {
            const int16_t place = places[i + (size_t)j];
            int16_t level = -127;
            for (int k = 0; k < 15; k++) {
                level = (int16_t)(level + (-(place >= t->middles[k][j]) & t->steps[k][j]));
            }
            levels[i + (size_t)j] = level;
        }
    }
    for (size_t i = 0; i < length * BATCH; i++) {
        codes[i] = (float)levels[i];
    }
}

APART void iq4_index(const float *restrict values, size_t length, const float inverse[BATCH],
                      const Iq4Steps *restrict t, int16_t *restrict index) {
    int16_t places[LONGEST_GROUP * BATCH];
    iq4_places(values, length, inverse, places);
    for (size_t i = 0; i < length * BATCH; i += BATCH) {
        for (int j = 0; j < BATCH; j++) {
            const int16_t place = places[i + (size_t)j];
            int16_t above = 0;
            for (int k = 0; k < 15; k++) {
                above = (int16_t)(above + (place >= t->middles[k][j]));
            }
            index[i + (size_t)j] = above;
        }
    }
}

/* Scales, not yet rounded to their stored type. */
static void iq4_scales(const Columns *c, const Iq4Steps *table, float scale[BATCH]) {
    static const float ends[] = {-127, 113, -138, -110};
    static const float weighted_ends[] = {-127, 113, -138, -106, 162, 94, 130, -86, -166, -118};
    Fit fit;
    if (c->weighted) {
        fit_scales(c, weighted_ends, 10, iq4_nearest, table, &fit);
    } else {
        fit_scales(c, ends, 4, iq4_nearest, table, &fit);
    }
    for (int j = 0; j < BATCH; j++) {
        scale[j] = fit.scale[j] * c->power[j];
    }
}

static void store_iq4(const Columns *c, const Iq4Steps *table, const float scale[BATCH],
                      size_t groups, uint8_t *const out[BATCH]) {
    int16_t index[LONGEST_GROUP * BATCH];
    float inverse[BATCH];
    for (int j = 0; j < BATCH; j++) {
        inverse[j] = scale[j] == 0 ? 0.0f : 1.0f / (scale[j] * c->shrink[j]);
    }
    iq4_index(c->values, c->length, inverse, table, index);
    store_nibbles(index, c->length, groups, out);
}

static void encode_iq4_nl(const Columns *c, const Iq4Steps *table, size_t blocks,
                          uint8_t *out) {
    uint8_t *codes[BATCH];
    float scale[BATCH];
    iq4_scales(c, table, scale);
    for (size_t j = 0; j < blocks; j++) {
        store_half(scale[j], out + 18 * j);
        scale[j] = from_half(load16(out + 18 * j));
        codes[j] = out + 18 * j + 2;
    }
    store_iq4(c, table, scale, blocks, codes);
}

/* Six-bit steps of the scales of a block's eight groups. */
static void store_iq4_xs_scales(float scale[8], uint8_t *out) {
    float largest = scale[0];
    for (int g = 1; g < 8; g++) {
        const int further = (bits_of(scale[g]) & 0x7FFFFFFF) > (bits_of(largest) & 0x7FFFFFFF);
        largest = further ? scale[g] : largest;
    }
    store_half(0.0f - largest / 32.0f, out);
    const float whole = from_half(load16(out)), inverse = inverse_of(whole);
    uint32_t high = 0, low = 0;
    for (int g = 0; g < 8; g++) {
        const float steps = code_of(scale[g] * inverse, -32.0f, 31.0f);
        const uint32_t six = (uint32_t)((int32_t)steps + 32);
        high |= six >> 4 << 2 * g;
        low |= (six & 15) << 4 * g;
        scale[g] = steps == 0 ? 0.0f : whole * steps;
    }
    const uint16_t upper = (uint16_t)high;
    memcpy(out + 2, &upper, sizeof upper);
    memcpy(out + 4, &low, sizeof low);
}

static void encode_iq4_xs(const Columns *c, const Iq4Steps *table, size_t blocks,
                          uint8_t *out) {
    uint8_t *codes[BATCH];
    float scale[BATCH];
    iq4_scales(c, table, scale);
    for (size_t j = 0; j < 8 * blocks; j++) {
        codes[j] = out + 136 * (j / 8) + 8 + 16 * (j % 8);
    }
    for (size_t b = 0; b < blocks; b++) {
        store_iq4_xs_scales(scale + 8 * b, out + 136 * b);
    }
    store_iq4(c, table, scale, 8 * blocks, codes);
}

/* --- E2M1 -------------------------------------------------------------------------------------*/

/* Sums of the squared errors of magnitudes by scales, with weights or NULL. Middles times scales
 * are exact. */
INLINE void sum_errors(const float *restrict values, const float *restrict weights, size_t length,
                       const float scale[restrict BATCH], float error[restrict BATCH]) {
    float middles[7][BATCH], sums[BATCH] = {0};
    for (int j = 0; j < BATCH; j++) {
#define STEP(k, halves, step) middles[k][j] = halves * 0.5f * scale[j];
        E2M1_MIDDLES(STEP)
#undef STEP
    }
    for (size_t i = 0; i < length * BATCH; i += BATCH) {
        const float *v = values + i;
        for (int j = 0; j < BATCH; j++) {
            const float magnitude = from_bits(bits_of(v[j]) & 0x7FFFFFFF);
            float q = 0;
#define STEP(k, halves, step) q += magnitude > middles[k][j] ? step##.0f : 0.0f;
            E2M1_MIDDLES(STEP)
#undef STEP
            const float e = magnitude - q * scale[j];
            float square = e * e;
            if (weights) {
                square *= weights[i + (size_t)j];
            }
            sums[j] += square;
        }
    }
    memcpy(error, sums, sizeof sums);
}

APART void plain_errors(const Columns *c, const float scale[BATCH], float error[BATCH]) {
    sum_errors(c->values, NULL, c->length, scale, error);
}

APART void weighted_errors(const Columns *c, const float scale[BATCH], float error[BATCH]) {
    sum_errors(c->values, c->weights, c->length, scale, error);
}

/* Codes 0 by a scale of 0, and never -0. */
APART void store_e2m1(const Columns *c, const float scale[BATCH], size_t groups,
                       uint8_t *const out[BATCH]) {
    int16_t index[LONGEST_GROUP * BATCH];
    float middles[7][BATCH];
    for (int j = 0; j < BATCH; j++) {
        const float unit = scale[j] == 0 ? from_bits(0x7F800000) : scale[j];
#define STEP(k, halves, step) middles[k][j] = halves * 0.5f * unit;
        E2M1_MIDDLES(STEP)
#undef STEP
    }
    for (size_t i = 0; i < c->length; i++) {
        for (int j = 0; j < BATCH; j++) {
            const float v = c->values[i * BATCH + (size_t)j];
            const float magnitude = from_bits(bits_of(v) & 0x7FFFFFFF);
            int32_t above = 0;
#define STEP(k, halves, step) above += magnitude > middles[k][j];
            E2M1_MIDDLES(STEP)
#undef STEP
            index[i * BATCH + (size_t)j] = (int16_t)(above | ((v < 0) & (above > 0)) << 3);
        }
    }
    store_nibbles(index, c->length, groups, out);
}

APART void keep_better(int always, const float error[restrict BATCH],
                       const int32_t stored[restrict BATCH], float least[restrict BATCH],
                       int32_t best[restrict BATCH]) {
    for (int j = 0; j < BATCH; j++) {
        const int32_t better = -(always | (error[j] < least[j]));
        best[j] = (stored[j] & better) | (best[j] & ~better);
        least[j] = choose(better & 1, error[j], least[j]);
    }
}

/* Scales from what is stored, as columns of 16. */
typedef void ScalesOf(const Columns *c, const int32_t stored[BATCH], float scale[BATCH]);

/* Of first + each step, within the bounds, the one of the least error, the first of equals. */
INLINE void least_error(const Columns *c, const int32_t first[BATCH], const int8_t *steps,
                        size_t count, int32_t top, ScalesOf *scales_of, int32_t best[BATCH]) {
    float least[BATCH] = {0};
    for (size_t s = 0; s < count; s++) {
        int32_t stored[BATCH];
        float scale[BATCH], error[BATCH];
        for (int j = 0; j < BATCH; j++) {
            const int32_t moved = first[j] + steps[s];
            stored[j] = moved < 0 ? 0 : moved > top ? top : moved;
        }
        scales_of(c, stored, scale);
        if (c->weighted) {
            weighted_errors(c, scale, error);
        } else {
            plain_errors(c, scale, error);
        }
        keep_better(s == 0, error, stored, least, best);
    }
}

APART void mxfp4_scales(const Columns *c, const int32_t stored[BATCH], float scale[BATCH]) {
    for (int j = 0; j < BATCH; j++) {
        scale[j] = from_bits((uint32_t)(stored[j] - kept_exponent(c->exponent[j]) + 126) << 23);
    }
}

static void encode_mxfp4(const Columns *c, size_t blocks, uint8_t *out) {
    static const int8_t steps[] = {0, 1, -1, -2}; /* the first two without weights */
    int32_t first[BATCH], stored[BATCH] = {0};
    uint8_t *codes[BATCH];
    float scale[BATCH];
    for (int j = 0; j < BATCH; j++) {
        first[j] = c->exponent[j] - 2;
    }
    least_error(c, first, steps, c->weighted ? 4 : 2, 252, mxfp4_scales, stored);
    mxfp4_scales(c, stored, scale);
    for (size_t j = 0; j < blocks; j++) {
        out[17 * j] = (uint8_t)stored[j];
        codes[j] = out + 17 * j + 1;
    }
    store_e2m1(c, scale, blocks, codes);
}

/* What a scale byte of NVFP4 means for doubled codes; its sign bit means nothing. */
INLINE float from_ue4m3(int32_t stored) {
    const int32_t low = stored & 0x7F;
    const float value = low < 8 ? (float)low * 0x1p-10f : from_bits((uint32_t)(low + 952) << 20);
    return stored == 127 ? 0.0f : value;
}

/* The nearest, halves up; above 126, the largest, where there is none. */
INLINE int32_t to_ue4m3(float scale) {
    const float small = (scale < 1.0f ? scale : 1.0f) * 512.0f + 0.5f;
    const int32_t normal = (int32_t)((bits_of(scale) + (1u << 19)) >> 20) - (120 << 3);
    return scale < 0x1p-6f ? (int32_t)small : normal;
}

APART void nvfp4_scales(const Columns *c, const int32_t stored[BATCH], float scale[BATCH]) {
    for (int j = 0; j < BATCH; j++) {
        scale[j] = from_ue4m3(stored[j]) * c->shrink[j];
    }
}

static void encode_nvfp4(const Columns *c, size_t blocks, uint8_t *out) {
    static const int8_t steps[] = {0, 1, 2, 3, 4, 5, 6, -1, -2, -3, -4, -5, -6, -7, -8};
    int32_t first[BATCH], stored[BATCH] = {0}, largest[BATCH];
    uint8_t *codes[BATCH];
    float scale[BATCH];
    largest_magnitudes(c->values, c->length, largest);
    for (int j = 0; j < BATCH; j++) {
        first[j] = to_ue4m3(from_bits((uint32_t)largest[j]) * c->power[j] / 6.0f);
    }
    least_error(c, first, steps, c->weighted ? 15 : 9, 126, nvfp4_scales, stored);
    nvfp4_scales(c, stored, scale);
    for (size_t j = 0; j < 4 * blocks; j++) {
        out[36 * (j / 4) + j % 4] = (uint8_t)stored[j];
        codes[j] = out + 36 * (j / 4) + 4 + 8 * (j % 4);
    }
    store_e2m1(c, scale, 4 * blocks, codes);
}

/* --- batches and decoding ---------------------------------------------------------------------*/

INLINE void encode_codebook(enum ggml_type type, const float *x, const float *importance,
                            size_t period, size_t blocks, uint8_t *out) {
    const size_t length = type == GGML_NVFP4 ? 16 : 32;
    const size_t parts = ggml_types[type].values / length, step = BATCH / parts;
    Iq4Steps table;
    set_iq4_steps(&table);
    for (size_t b = 0; b < blocks; b += step, out += step * ggml_types[type].bytes) {
        const size_t n = smaller(step, blocks - b);
        Columns c;
        load_batch(x, importance, period, b, n * parts, length, parts, &c);
        switch (type) {
        case GGML_IQ4_NL: encode_iq4_nl(&c, &table, n, out); break;
        case GGML_IQ4_XS: encode_iq4_xs(&c, &table, n, out); break;
        case GGML_MXFP4: encode_mxfp4(&c, n, out); break;
        default: encode_nvfp4(&c, n, out); break;
        }
    }
}

INLINE void decode_levels(const uint8_t *data, float scale, const int8_t levels[16], size_t length,
                          float *restrict out) {
    for (size_t i = 0; i < length / 2; i++) {
        out[i] = scale * (float)levels[data[i] & 15];
        out[i + length / 2] = scale * (float)levels[data[i] >> 4];
    }
}

static void decode_iq4_nl(const uint8_t *data, float *out) {
    decode_levels(data + 2, from_half(load16(data)), iq4_levels, 32, out);
}

static void decode_iq4_xs(const uint8_t *data, float *out) {
    const float whole = from_half(load16(data));
    const uint32_t high = load16(data + 2);
    uint32_t low;
    memcpy(&low, data + 4, sizeof low);
    for (int g = 0; g < 8; g++) {
        const uint32_t six = (low >> 4 * g & 15) | (high >> 2 * g & 3) << 4;
        const float scale = whole * (float)((int32_t)six - 32);
        decode_levels(data + 8 + 16 * g, scale, iq4_levels, 32, out + 32 * g);
    }
}

static void decode_mxfp4(const uint8_t *data, float *out) {
    const uint32_t stored = data[0];
    const uint32_t bits = stored < 2 ? 0x00200000u << stored : (stored - 1) << 23;
    decode_levels(data + 1, from_bits(bits), e2m1_levels, 32, out);
}

static void decode_nvfp4(const uint8_t *data, float *out) {
    for (int g = 0; g < 4; g++) {
        decode_levels(data + 4 + 8 * g, from_ue4m3(data[g]), e2m1_levels, 16, out + 16 * g);
    }
}

#endif
