/* The integer matrix product, section 7: what all variants share.
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

#include "packing.h"

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
static void unpack_row(const Product *p, size_t row, uint8_t *restrict out) {
    const uint8_t *restrict packed = p->packed + row * packed_bytes(p->row_codes, p->scheme.bits);
    const size_t columns = p->columns;
    const size_t padded = (columns + PACK_GROUP - 1) / PACK_GROUP * PACK_GROUP;
    if (p->scheme.bits < 8) {
        unpack(packed, padded / PACK_GROUP, p->scheme.bits, out);
    } else {
        for (size_t i = 0; i < columns; i++) {
            out[i] = packed[i] ^ 0x80;
        }
    }
    memset(out + columns, 0, padded - columns);
}

INLINE int32_t dot(const int16_t *restrict a, const int16_t *restrict b, size_t n) {
    int32_t sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum += a[i] * b[i];
    }
    return sum;
}

/* Sums of codes * inputs, (spans, samples, rows); exact while they fit 32 bits. */
static int integer_dots(const int16_t *codes, size_t spans, size_t rows, const int8_t *inputs,
                        size_t samples, size_t length, int32_t *sums) {
    int16_t *wide = malloc((length ? length : 1) * sizeof *wide);
    if (!wide) {
        return NO_MEMORY;
    }
    for (size_t m = 0; m < spans * samples; m++) {
        const int16_t *span = codes + m / samples * rows * length;
        for (size_t i = 0; i < length; i++) {
            wide[i] = inputs[m * length + i];
        }
        for (size_t r = 0; r < rows; r++) {
            sums[m * rows + r] = dot(span + r * length, wide, length);
        }
    }
    free(wide);
    return DONE;
}

#endif
