/* The integer matrix product, section 7: what all variants share, and the plain one.
 *
 *     acc = sum of k (a - z_a) over a span, k = m u - Z
 *
 * with u the unsigned code, m = 4 and Z = z for asymmetric codes below 8 bits, m = 1 elsewhere and
 * Z the centre (symmetric) or the zero point (8 bits). |k| <= 255, |a - z_a| <= 255 and spans of at
 * most 16,384 columns keep |acc| below 2^30.2. Every way to get acc is exact, so the variants may
 * differ; then y += (float)acc * scale, span after span.
 */
#ifndef QCONVERT_PRODUCT_H
#define QCONVERT_PRODUCT_H

#include "codes.h"

#include <stdlib.h>

/* Columns that share an accumulator; they start at a multiple of 16. */
typedef struct {
    size_t start, length, group;
} Span;

INLINE size_t group_columns(const Product *p) {
    return p->scheme.block ? p->scheme.block : p->columns;
}

INLINE size_t span_count(const Product *p) {
    const size_t step = smaller(group_columns(p), SEGMENT);
    return (p->columns + step - 1) / step;
}

INLINE Span span_at(const Product *p, size_t i) {
    const size_t step = smaller(group_columns(p), SEGMENT);
    const size_t start = i * step;
    return (Span){start, smaller(step, p->columns - start), start / group_columns(p)};
}

INLINE int multiplier(const Product *p) {
    return p->scheme.symmetric ? 1 : zero_steps(p->scheme.bits);
}

/* Z of a row and group. */
INLINE int32_t zero_of(const Product *p, size_t row, size_t group) {
    return p->scheme.symmetric ? 1 << (p->scheme.bits - 1) : p->zero[row * p->groups + group];
}

/* S' of a row and group. */
INLINE float step_of(const Product *p, size_t row, size_t group) {
    return p->scale[row * p->groups + group] / (float)multiplier(p);
}

/* Unsigned codes of a row; `out` has room for columns + 31 and is 0 behind the columns. */
static void unpack_row(const Product *p, size_t row, uint8_t *out) {
    const uint8_t *packed = p->packed + row * (p->row_codes / 8 * (size_t)p->scheme.bits
                                               + p->row_codes % 8 * (p->scheme.bits == 8));
    const size_t padded = (p->columns + PACK_GROUP - 1) / PACK_GROUP * PACK_GROUP;
    if (p->scheme.bits < 8) {
        unpack(packed, padded / PACK_GROUP, p->scheme.bits, out);
    } else {
        for (size_t i = 0; i < p->columns; i++) {
            out[i] = packed[i] ^ 0x80;
        }
    }
    memset(out + p->columns, 0, padded - p->columns);
}

/* 16-bit k of a row from its codes. */
static void signed_row(const Product *p, size_t row, const uint8_t *restrict codes,
                       int16_t *restrict k) {
    const int m = multiplier(p);
    const size_t step = group_columns(p);
    for (size_t start = 0, g = 0; start < p->columns; start += step, g++) {
        const int32_t zero = zero_of(p, row, g);
        const size_t stop = smaller(start + step, p->columns);
        for (size_t i = start; i < stop; i++) {
            k[i] = (int16_t)(m * codes[i] - zero);
        }
    }
}

/* a - z_a as 16 bits; |a - z_a| <= 255. */
static void centre_inputs(const Product *p, int16_t *restrict out) {
    const size_t n = p->samples * p->columns;
    for (size_t i = 0; i < n; i++) {
        out[i] = (int16_t)(p->inputs[i] - p->zero_point);
    }
}

INLINE int32_t dot(const int16_t *restrict a, const int16_t *restrict b, size_t n) {
    int32_t sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum += a[i] * b[i];
    }
    return sum;
}

/* The plain product: row by row, on 16-bit numbers. */
static int product_rows(const Product *p) {
    uint8_t *codes = malloc(p->columns + PACK_GROUP);
    int16_t *k = malloc(p->columns * sizeof *k);
    int16_t *inputs = malloc(p->samples * p->columns * sizeof *inputs);
    const int failed = !codes || !k || !inputs;
    if (!failed) {
        const size_t spans = span_count(p);
        centre_inputs(p, inputs);
        for (size_t r = 0; r < p->rows; r++) {
            unpack_row(p, r, codes);
            signed_row(p, r, codes, k);
            for (size_t m = 0; m < p->samples; m++) {
                const int16_t *a = inputs + m * p->columns;
                float y = 0;
                for (size_t i = 0; i < spans; i++) {
                    const Span span = span_at(p, i);
                    const int32_t acc = dot(k + span.start, a + span.start, span.length);
                    y += (float)acc * step_of(p, r, span.group);
                }
                p->y[m * p->rows + r] = y;
            }
        }
    }
    free(codes);
    free(k);
    free(inputs);
    return failed ? NO_MEMORY : DONE;
}

/* Sums of codes * inputs, (samples, rows); exact while they fit 32 bits. */
static int integer_product(const int16_t *codes, size_t rows, const int8_t *inputs, size_t samples,
                           size_t length, int32_t *sums) {
    int16_t *wide = malloc((length ? length : 1) * sizeof *wide);
    if (!wide) {
        return NO_MEMORY;
    }
    for (size_t m = 0; m < samples; m++) {
        for (size_t i = 0; i < length; i++) {
            wide[i] = inputs[m * length + i];
        }
        for (size_t r = 0; r < rows; r++) {
            sums[m * rows + r] = dot(codes + r * length, wide, length);
        }
    }
    free(wide);
    return DONE;
}

#endif
