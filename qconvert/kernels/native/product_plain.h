/* The integer matrix product row by row, on 16-bit numbers that any compiler vectorises. */
#ifndef QCONVERT_PRODUCT_PLAIN_H
#define QCONVERT_PRODUCT_PLAIN_H

#include "product.h"

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

static int product_plain(const Product *p) {
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

#endif
