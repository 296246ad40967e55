/* One group of 32 values out of its planes with AVX2, section 4: the runs of a plane lie in the
 * 128-, 64- or 32-bit parts of a vector, each shifted by a constant of its own. */
#ifndef QCONVERT_PACKING_AVX2_H
#define QCONVERT_PACKING_AVX2_H

#include "arithmetic.h"

#include <immintrin.h>

INLINE __m256i plane_shifts(int p) {
    return p == 4   ? _mm256_setr_epi64x(0, 0, 4, 4)
           : p == 2 ? _mm256_setr_epi64x(0, 2, 4, 6)
                    : _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
}

/* The 32 values of a plane of p bits. No bit crosses a byte that the mask keeps. */
INLINE __m256i unpack_plane(const uint8_t *plane, int p) {
    const __m256i mask = _mm256_set1_epi8((char)((1 << p) - 1));
    const __m256i shifts = plane_shifts(p);
    int64_t eight;
    int32_t four;
    __m256i v;
    switch (p) {
    case 8:
        return _mm256_loadu_si256((const __m256i *)plane);
    case 4:
        v = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)plane));
        return _mm256_and_si256(_mm256_srlv_epi64(v, shifts), mask);
    case 2:
        memcpy(&eight, plane, sizeof eight);
        v = _mm256_set1_epi64x(eight);
        return _mm256_and_si256(_mm256_srlv_epi64(v, shifts), mask);
    default:
        memcpy(&four, plane, sizeof four);
        v = _mm256_set1_epi32(four);
        return _mm256_and_si256(_mm256_srlv_epi32(v, shifts), mask);
    }
}

/* 32 values of a width known to the compiler. */
INLINE __m256i unpack_vector(const uint8_t *packed, int width) {
    __m256i values = _mm256_setzero_si256();
    int low = 0;
    for (int p = 8; p; p /= 2) {
        if (width & p) {
            const __m256i part = _mm256_slli_epi16(unpack_plane(packed, p), low);
            values = low ? _mm256_or_si256(values, part) : part;
            packed += 4 * p;
            low += p;
        }
    }
    return values;
}

INLINE void unpack_group(const uint8_t *packed, int width, uint8_t *values) {
    _mm256_storeu_si256((__m256i *)values, unpack_vector(packed, width));
}

#endif
