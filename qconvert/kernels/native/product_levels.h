/* The integer matrix product of levels with signed steps, section 11: k of `level_products` times
 * a - z_a, at most 255 from 0. A span of 2,048 columns keeps every sum of some of its products below
 * 2^31, so that each variant may take its own way. */
#ifndef QCONVERT_PRODUCT_LEVELS_H
#define QCONVERT_PRODUCT_LEVELS_H

#include "level_products.h"
#include "product.h"

enum {
    LEVEL_ROWS = 16,  /* of k, which stay in the cache while all samples pass */
    ROWS_OF_DOTS = 2, /* and samples whose sums are taken at once */
    SAMPLES_OF_DOTS = 4,
};

#ifdef USE_AVX2

INLINE int32_t sum_of(__m256i v) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xB1)));
}

/* Sums of products of some rows of k and some lines of inputs, `n` columns, a multiple of 16. */
INLINE void some_dots(const int16_t *k, const int16_t *a, size_t stride, size_t n, int rows,
                      int lines, int32_t sums[ROWS_OF_DOTS][SAMPLES_OF_DOTS]) {
    __m256i acc[ROWS_OF_DOTS][SAMPLES_OF_DOTS];
    for (int r = 0; r < rows; r++) {
        for (int m = 0; m < lines; m++) {
            acc[r][m] = _mm256_setzero_si256();
        }
    }
    for (size_t i = 0; i < n; i += 16) {
        __m256i each[ROWS_OF_DOTS];
        for (int r = 0; r < rows; r++) {
            each[r] = _mm256_loadu_si256((const __m256i *)(k + (size_t)r * stride + i));
        }
        for (int m = 0; m < lines; m++) {
            const __m256i v = _mm256_loadu_si256((const __m256i *)(a + (size_t)m * stride + i));
            for (int r = 0; r < rows; r++) {
                acc[r][m] = _mm256_add_epi32(acc[r][m], _mm256_madd_epi16(each[r], v));
            }
        }
    }
    for (int r = 0; r < rows; r++) {
        for (int m = 0; m < lines; m++) {
            sums[r][m] = sum_of(acc[r][m]);
        }
    }
}

#else

INLINE void some_dots(const int16_t *k, const int16_t *a, size_t stride, size_t n, int rows,
                      int lines, int32_t sums[ROWS_OF_DOTS][SAMPLES_OF_DOTS]) {
    for (int r = 0; r < rows; r++) {
        for (int m = 0; m < lines; m++) {
            sums[r][m] = dot(k + (size_t)r * stride, a + (size_t)m * stride, n);
        }
    }
}

#endif

/* Sums of some rows and samples over a span. */
APART void dots_2_4(const int16_t *k, const int16_t *a, size_t stride, size_t n,
                    int32_t sums[ROWS_OF_DOTS][SAMPLES_OF_DOTS]) {
    some_dots(k, a, stride, n, 2, 4, sums);
}

APART void dots_1_1(const int16_t *k, const int16_t *a, size_t stride, size_t n,
                    int32_t sums[ROWS_OF_DOTS][SAMPLES_OF_DOTS]) {
    some_dots(k, a, stride, n, 1, 1, sums);
}

APART void dots_2_1(const int16_t *k, const int16_t *a, size_t stride, size_t n,
                    int32_t sums[ROWS_OF_DOTS][SAMPLES_OF_DOTS]) {
    some_dots(k, a, stride, n, 2, 1, sums);
}

/* Adds a span's share to y of `rows` rows of k, two at most, and `lines` samples, one or four. */
static void add_span(const LevelProduct *p, const int16_t *k, const int16_t *a, size_t padded,
                     size_t n, size_t row, size_t rows, size_t sample, size_t lines) {
    int32_t sums[ROWS_OF_DOTS][SAMPLES_OF_DOTS];
    if (rows == 2) {
        lines == 4 ? dots_2_4(k, a, padded, n, sums) : dots_2_1(k, a, padded, n, sums);
    } else {
        for (size_t m = 0; m < lines; m++) {
            int32_t one[ROWS_OF_DOTS][SAMPLES_OF_DOTS];
            dots_1_1(k, a + m * padded, padded, n, one);
            sums[0][m] = one[0][0];
        }
    }
    for (size_t m = 0; m < lines; m++) {
        float *y = p->y + (sample + m) * p->stored.rows + row;
        for (size_t r = 0; r < rows; r++) {
            y[r] += (float)sums[r][m] * p->stored.unit[row + r];
        }
    }
}

/* y of a tile of rows, span after span: of one span four samples stay in the nearest cache. */
static void level_tile(const LevelProduct *p, const int16_t *k, const int16_t *inputs,
                       size_t padded, size_t row, size_t rows) {
    for (size_t m = 0; m < p->samples; m++) {
        memset(p->y + m * p->stored.rows + row, 0, rows * sizeof *p->y);
    }
    for (size_t at = 0; at < padded; at += LEVEL_SPAN) {
        const size_t n = smaller(LEVEL_SPAN, padded - at);
        for (size_t m = 0, lines; m < p->samples; m += lines) {
            lines = p->samples - m >= SAMPLES_OF_DOTS ? SAMPLES_OF_DOTS : 1;
            for (size_t r = 0; r < rows; r += ROWS_OF_DOTS) {
                add_span(p, k + r * padded + at, inputs + m * padded + at, padded, n, row + r,
                         smaller(ROWS_OF_DOTS, rows - r), m, lines);
            }
        }
    }
}

static int levels_product(const LevelProduct *p) {
#ifdef MANY_LEVELS
    if (p->samples > FEW_SAMPLES) {
        return many_levels(p);
    }
#endif
    const StoredLevels *s = &p->stored;
    const size_t padded = level_row(s->columns);
    int16_t *k = malloc(LEVEL_ROWS * padded * sizeof *k);
    int16_t *inputs = malloc((p->samples ? p->samples : 1) * padded * sizeof *inputs);
    const int failed = !k || !inputs;
    if (!failed) {
        for (size_t m = 0; m < p->samples; m++) {
            int16_t *to = inputs + m * padded;
            for (size_t i = 0; i < s->columns; i++) {
                to[i] = (int16_t)(p->inputs[m * s->columns + i] - p->zero_point);
            }
            memset(to + s->columns, 0, (padded - s->columns) * sizeof *to);
        }
        for (size_t row = 0; row < s->rows; row += LEVEL_ROWS) {
            const size_t rows = smaller(LEVEL_ROWS, s->rows - row);
            for (size_t r = 0; r < rows; r++) {
                level_row_products(s, row + r, k + r * padded);
            }
            level_tile(p, k, inputs, padded, row, rows);
        }
    }
    free(k);
    free(inputs);
    return failed ? NO_MEMORY : DONE;
}

#endif
