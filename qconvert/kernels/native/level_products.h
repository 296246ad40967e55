/* Levels times their steps, section 11: k = step * (level + shift) as 16 bits, |k| <= 4064. */
#ifndef QCONVERT_LEVEL_PRODUCTS_H
#define QCONVERT_LEVEL_PRODUCTS_H

#include "level_code.h"

enum { LEVEL_SPAN = 2048 };

#ifdef USE_AVX2
#include <immintrin.h>

/* The levels of 32 codes: a look-up reads 16 of them. */
INLINE __m256i levels_of(const __m256i tables[MOST_LEVELS / 16], __m256i codes, int bits) {
    __m256i found = _mm256_shuffle_epi8(tables[0], codes);
    for (int k = 1; k < (1 << bits) / 16; k++) {
        const __m256i reached = _mm256_cmpgt_epi8(codes, _mm256_set1_epi8((int8_t)(16 * k - 1)));
        found = _mm256_blendv_epi8(found, _mm256_shuffle_epi8(tables[k], codes), reached);
    }
    return found;
}

INLINE void level_products(const StoredLevels *s, size_t row, int bits, int16_t *restrict out) {
    const size_t block = s->code.block, blocks = level_blocks(s->code, s->columns);
    const size_t groups = level_row(s->columns) / PACK_GROUP;
    const uint8_t *packed = s->packed + row * groups * 4 * (size_t)bits;
    const int8_t *steps = s->steps + row * blocks, *shifts = s->shifts + row * blocks;
    __m256i tables[MOST_LEVELS / 16];
    for (int k = 0; k < MOST_LEVELS / 16; k++) {
        const __m128i *from = (const __m128i *)(s->code.levels + 16 * k);
        tables[k] = _mm256_broadcastsi128_si256(_mm_loadu_si128(from));
    }
    for (size_t g = 0; g < groups; g++, packed += 4 * bits, out += PACK_GROUP) {
        /* The second half of a group that is all padding has no step of its own. */
        const size_t first = block == 32 ? g : 2 * g;
        const size_t second = block == 32 ? g : smaller(first + 1, blocks - 1);
        const __m256i shift = _mm256_set_m128i(_mm_set1_epi8(shifts[second]),
                                               _mm_set1_epi8(shifts[first]));
        const __m256i codes = unpack_vector(packed, bits);
        const __m256i q = _mm256_add_epi8(levels_of(tables, codes, bits), shift);
        const __m256i low = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(q));
        const __m256i high = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(q, 1));
        _mm256_storeu_si256((__m256i *)out,
                            _mm256_mullo_epi16(low, _mm256_set1_epi16(steps[first])));
        _mm256_storeu_si256((__m256i *)(out + 16),
                            _mm256_mullo_epi16(high, _mm256_set1_epi16(steps[second])));
    }
}

#else

INLINE void level_products(const StoredLevels *s, size_t row, int bits, int16_t *restrict out) {
    const size_t block = s->code.block, blocks = level_blocks(s->code, s->columns);
    const size_t groups = level_row(s->columns) / PACK_GROUP;
    const uint8_t *packed = s->packed + row * groups * 4 * (size_t)bits;
    for (size_t at = 0; at < groups * PACK_GROUP; at += block) {
        uint8_t codes[PACK_GROUP];
        const size_t place = row * blocks + smaller(at / block, blocks - 1);
        const int step = s->steps[place], shift = s->shifts[place];
        unpack_group(packed + at / PACK_GROUP * 4 * (size_t)bits, bits, codes);
        for (size_t i = 0; i < block; i++) {
            out[at + i] = (int16_t)(step * (s->code.levels[codes[at % PACK_GROUP + i]] + shift));
        }
    }
}

#endif

/* k of a row; `out` has room for whole groups of 32. */
static void level_row_products(const StoredLevels *s, size_t row, int16_t *out) {
    switch (s->code.bits) {
    case 2: level_products(s, row, 2, out); break;
    case 3: level_products(s, row, 3, out); break;
    case 4: level_products(s, row, 4, out); break;
    case 5: level_products(s, row, 5, out); break;
    default: level_products(s, row, 6, out); break;
    }
}

#endif
