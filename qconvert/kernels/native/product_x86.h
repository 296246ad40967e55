/* The integer matrix product with AVX2 or AVX-512 VNNI; see product.h for the arithmetic.
 *
 * Few samples: each row is multiplied as it streams by. Many samples: rows are unpacked into a tile,
 * which then stays in the cache while all samples pass. */
#ifndef QCONVERT_PRODUCT_X86_H
#define QCONVERT_PRODUCT_X86_H

#include "product.h"

#include <immintrin.h>

enum { FEW_SAMPLES = 4 };

INLINE size_t round_up(size_t n, size_t unit) {
    return (n + unit - 1) / unit * unit;
}

/* Zeroed, aligned to a cache line; to be freed. */
static void *workspace(size_t count, size_t size) {
    const size_t bytes = round_up(count * size + 1, 64);
    void *memory = aligned_alloc(64, bytes);
    if (memory) {
        memset(memory, 0, bytes);
    }
    return memory;
}

/* A' = sum of a - z_a of each span. */
static void centred_sums(const Product *p, const int8_t *a, int32_t *out) {
    const size_t spans = span_count(p);
    for (size_t i = 0; i < spans; i++) {
        const Span span = span_at(p, i);
        int32_t sum = 0;
        for (size_t c = 0; c < span.length; c++) {
            sum += a[span.start + c];
        }
        out[i] = sum - (int32_t)span.length * p->zero_point;
    }
}

#ifdef USE_AVX512
#include "product_few_avx512.h"
#include "product_many_avx512.h"
#else
#include "product_few_avx2.h"
#include "product_many_avx2.h"
#endif

static int product_x86(const Product *p) {
    return p->samples <= FEW_SAMPLES ? product_few(p) : product_many(p);
}

#endif
