/* Scales of ggml blocks by search, section 8: ../reference/ggml/search.py. Groups lie side
 * by side, 16 columns; a batch that is not full has columns of zeros. */
#ifndef QCONVERT_GGML_SEARCH_H
#define QCONVERT_GGML_SEARCH_H

#include "ggml_small.h"
#include "search.h"

enum { LONGEST_GROUP = 32 }; /* values of a group */

typedef struct {
    size_t length;
    int weighted;
    float values[LONGEST_GROUP * BATCH];  /* times `shrink` */
    float weights[LONGEST_GROUP * BATCH]; /* unset unless weighted */
    float products[LONGEST_GROUP * BATCH]; /* values times weights */
    int32_t exponent[BATCH];        /* biased, of the largest magnitude */
    float shrink[BATCH];            /* a power of two that brings magnitudes below 4 */
    float power[BATCH];             /* its inverse */
} Columns;

INLINE int32_t kept_exponent(int32_t biased) {
    biased = biased < 1 ? 1 : biased;
    return biased > 253 ? 253 : biased;
}

APART void largest_magnitudes(const float *columns, size_t length, int32_t largest[BATCH]) {
    memset(largest, 0, BATCH * sizeof *largest);
    for (size_t i = 0; i < length; i++) {
        for (int j = 0; j < BATCH; j++) {
            const uint32_t bits = bits_of(columns[i * BATCH + (size_t)j]);
            const int32_t magnitude = (int32_t)(bits & 0x7FFFFFFF);
            largest[j] = magnitude > largest[j] ? magnitude : largest[j];
        }
    }
}

APART void scale_columns(float *columns, size_t length, const float factor[BATCH]) {
    for (size_t i = 0; i < length; i++) {
        for (int j = 0; j < BATCH; j++) {
            columns[i * BATCH + (size_t)j] *= factor[j];
        }
    }
}

/* Weights with the largest in [1, 4), all 1 where all were 0. */
static void normalise_weights(Columns *c) {
    int32_t largest[BATCH];
    float factor[BATCH];
    largest_magnitudes(c->weights, c->length, largest);
    for (int j = 0; j < BATCH; j++) {
        factor[j] = from_bits((uint32_t)(254 - kept_exponent(largest[j] >> 23)) << 23);
    }
    scale_columns(c->weights, c->length, factor);
    for (size_t i = 0; i < c->length; i++) {
        for (int j = 0; j < BATCH; j++) {
            float *w = c->weights + i * BATCH + (size_t)j;
            *w = largest[j] == 0 ? 1.0f : *w;
            c->products[i * BATCH + (size_t)j] = *w * c->values[i * BATCH + (size_t)j];
        }
    }
}

/* Groups of consecutive blocks from block `first` on; `parts` groups to a block. */
static void load_batch(const float *x, const float *importance, size_t period, size_t first,
                       size_t groups, size_t length, size_t parts, Columns *c) {
    static const float zeros[LONGEST_GROUP];
    const float *rows[BATCH], *weights[BATCH];
    for (size_t j = 0; j < BATCH; j++) {
        rows[j] = j < groups ? x + (first * parts + j) * length : zeros;
        weights[j] = zeros;
        if (period && j < groups) {
            weights[j] = importance + ((first + j / parts) % period * parts + j % parts) * length;
        }
    }
    int32_t largest[BATCH];
    c->length = length;
    c->weighted = period != 0;
    load_columns(rows, length, c->values);
    largest_magnitudes(c->values, length, largest);
    for (int j = 0; j < BATCH; j++) {
        const int32_t kept = kept_exponent(largest[j] >> 23);
        c->exponent[j] = largest[j] >> 23;
        c->shrink[j] = from_bits((uint32_t)(254 - kept) << 23);
        c->power[j] = from_bits((uint32_t)kept << 23);
    }
    scale_columns(c->values, length, c->shrink);
    if (c->weighted) {
        load_columns(weights, length, c->weights);
        normalise_weights(c);
    }
}

/* The value furthest from 0 among those of positive weight, of equals the negative one. */
APART void furthest_values(const Columns *c, float peak[BATCH]) {
    float low[BATCH] = {0}, high[BATCH] = {0};
    for (size_t i = 0; i < c->length; i++) {
        for (int j = 0; j < BATCH; j++) {
            float v = c->values[i * BATCH + (size_t)j];
            if (c->weighted) {
                v = c->weights[i * BATCH + (size_t)j] > 0 ? v : 0.0f;
            }
            low[j] = v < low[j] ? v : low[j];
            high[j] = v > high[j] ? v : high[j];
        }
    }
    for (int j = 0; j < BATCH; j++) {
        const float v = -low[j] >= high[j] ? low[j] : high[j];
        peak[j] = v > -(float)TINY && v < (float)TINY ? 1.0f : v;
    }
}

typedef struct {
    float gain[BATCH], scale[BATCH];
} Fit;

/* Some columns of a row as one vector: left to itself, GCC transposes the sums below. */
#if defined USE_AVX512
enum { WIDE = 16 };
#elif defined USE_AVX2
enum { WIDE = 8 };
#else
enum { WIDE = 4 };
#endif
typedef float Wide __attribute__((vector_size(WIDE * sizeof(float))));

INLINE Wide wide_at(const float *at) {
    Wide v;
    memcpy(&v, at, sizeof v);
    return v;
}

/* Sums over codes, each column's from its first value to its last; weights or NULL. */
INLINE void sum_codes_of(const float *x, const float *codes, const float *weights, size_t length,
                         float xq[BATCH], float qq[BATCH]) {
    for (size_t j = 0; j < BATCH; j += WIDE) {
        Wide sum_xq = {0}, sum_qq = {0};
        for (size_t i = j; i < length * BATCH; i += BATCH) {
            const Wide q = wide_at(codes + i);
            sum_xq += wide_at(x + i) * q;
            sum_qq += weights ? q * q * wide_at(weights + i) : q * q;
        }
        memcpy(xq + j, &sum_xq, sizeof sum_xq);
        memcpy(qq + j, &sum_qq, sizeof sum_qq);
    }
}

/* Without a branch, which would be taken at random. */
INLINE float choose(int condition, float yes, float no) {
    const uint32_t mask = 0u - (uint32_t)condition;
    return from_bits((bits_of(yes) & mask) | (bits_of(no) & ~mask));
}

/* The best scale that codes allow, and what it gains. */
APART void judge(const float xq[restrict BATCH], const float qq[restrict BATCH],
                 float gain[restrict BATCH], float scale[restrict BATCH]) {
    for (int j = 0; j < BATCH; j++) {
        const float fitted = xq[j] / choose(qq[j] > 0, qq[j], 1.0f), found = xq[j] * fitted;
        const int better = found > gain[j];
        scale[j] = choose(better, fitted, scale[j]);
        gain[j] = choose(better, found, gain[j]);
    }
}

INLINE void offer_codes(const Columns *c, const float *codes, Fit *fit) {
    float xq[BATCH], qq[BATCH];
    if (c->weighted) {
        sum_codes_of(c->products, codes, c->weights, c->length, xq, qq);
    } else {
        sum_codes_of(c->values, codes, NULL, c->length, xq, qq);
    }
    judge(xq, qq, fit->gain, fit->scale);
}

/* Values by the inverses of scales to codes, of whatever `table` describes. */
typedef void NearestCodes(const float *values, size_t length, const float inverse[BATCH],
                          const void *table, float *codes);

INLINE void fit_scales(const Columns *c, const float *ends, size_t count,
                       NearestCodes *nearest, const void *table, Fit *fit) {
    float codes[LONGEST_GROUP * BATCH];
    float peak[BATCH], inverse[BATCH];
    memset(fit, 0, sizeof *fit);
    furthest_values(c, peak);
    for (size_t e = 0; e < count; e++) {
        for (int j = 0; j < BATCH; j++) {
            inverse[j] = ends[e] / peak[j];
        }
        nearest(c->values, c->length, inverse, table, codes);
        offer_codes(c, codes, fit);
    }
    for (int j = 0; j < BATCH; j++) {
        inverse[j] = inverse_of(fit->scale[j]);
    }
    nearest(c->values, c->length, inverse, table, codes);
    offer_codes(c, codes, fit);
}

/* Indices below 16, two to a byte: value i of a group with value i + length / 2. */
APART void store_nibbles(const int16_t *index, size_t length, size_t groups,
                          uint8_t *const out[BATCH]) {
    const size_t half = length / 2;
    uint8_t bytes[LONGEST_GROUP / 2 * BATCH];
    for (size_t i = 0; i < half; i++) {
        for (int j = 0; j < BATCH; j++) {
            const size_t at = i * BATCH + (size_t)j;
            bytes[at] = (uint8_t)(index[at] | index[at + half * BATCH] << 4);
        }
    }
    for (size_t j = 0; j < groups; j++) {
        for (size_t i = 0; i < half; i++) {
            out[j][i] = bytes[i * BATCH + j];
        }
    }
}

#endif
