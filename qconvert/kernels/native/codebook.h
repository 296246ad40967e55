/* Codes of a table of numbers, two a byte: formats/schemes/SPEC.md section 10. */
#ifndef QCONVERT_CODEBOOK_H
#define QCONVERT_CODEBOOK_H

#include "arithmetic.h"

static void codebook_encode(const float *x, size_t n, const float *scale, size_t block,
                            Codebook book, uint8_t *out) {
    for (size_t start = 0; start < n; start += block) {
        const size_t count = smaller(block, n - start);
        const float s = scale[start / block];
        float ratio[LONGEST_CODEBOOK_BLOCK];
        uint32_t below[LONGEST_CODEBOOK_BLOCK + 1] = {0}; /* midpoints below the ratio */
        for (size_t i = 0; i < count; i++) {
            ratio[i] = s != 0.0f ? x[start + i] / s : 0.0f;
        }
        for (size_t k = 0; k < book.midpoint_count; k++) {
            for (size_t i = 0; i < count; i++) {
                below[i] += ratio[i] > book.midpoints[k];
            }
        }
        for (size_t i = 0; i < count; i += 2) {
            const uint8_t second = i + 1 < count ? book.entries[below[i + 1]] : 0;
            *out++ = (uint8_t)(book.entries[below[i]] << 4 | second);
        }
    }
}

static void codebook_decode(const uint8_t *data, size_t n, const float *scale, size_t block,
                            const float table[16], float *x) {
    for (size_t start = 0; start < n; start += block) {
        const size_t count = smaller(block, n - start);
        const float s = scale[start / block];
        for (size_t i = 0; i < count; i++) {
            const uint8_t pair = data[(start + i) / 2];
            x[start + i] = table[i % 2 ? pair & 15 : pair >> 4] * s;
        }
    }
}

#endif
