/* Values of 1 to 8 bits to planes and back, section 4. */
#ifndef QCONVERT_PACKING_H
#define QCONVERT_PACKING_H

#include "arithmetic.h"

#ifdef USE_AVX2
#include "packing_avx2.h"
#else

INLINE void unpack_plane(const uint8_t *restrict plane, int low, int p, uint8_t *restrict values) {
    uint8_t mask = (uint8_t)((1 << p) - 1);
    for (int k = 0; k < 8 / p; k++) {
        for (int i = 0; i < 4 * p; i++) {
            values[i + 4 * p * k] |= (uint8_t)(((plane[i] >> (p * k)) & mask) << low);
        }
    }
}

/* One group of 32 values of a width known to the compiler. */
INLINE void unpack_group(const uint8_t *restrict packed, int width, uint8_t *restrict values) {
    int low = 0;
    memset(values, 0, PACK_GROUP);
    for (int p = 8; p; p /= 2) {
        if (width & p) {
            unpack_plane(packed, low, p, values);
            packed += 4 * p;
            low += p;
        }
    }
}

#endif

/* 32 codes to planes, folded in halves: value i takes in i + 16, then i + 8, then i + 4. Codes are
 * integers of 32 bits, as they come out of the arithmetic: one width of number to a loop. */
INLINE void pack_wide_group(const int32_t *restrict codes, int width, uint8_t *restrict packed) {
    int low = 0;
    if (width == 8) {
        for (int i = 0; i < PACK_GROUP; i++) {
            packed[i] = (uint8_t)codes[i];
        }
        return;
    }
    for (int p = 4; p; p /= 2) {
        if (width & p) {
            const int32_t mask = (1 << p) - 1;
            int32_t folded[PACK_GROUP / 2];
            EACH_COLUMN {
                folded[j] = (codes[j] >> low & mask) | (codes[j + PACK_GROUP / 2] >> low & mask) << 4;
            }
            for (int j = 0; p < 4 && j < PACK_GROUP / 4; j++) {
                folded[j] |= folded[j + PACK_GROUP / 4] << 2;
            }
            for (int j = 0; p < 2 && j < PACK_GROUP / 8; j++) {
                folded[j] |= folded[j + PACK_GROUP / 8] << 1;
            }
            uint8_t narrow[PACK_GROUP / 2];
            EACH_COLUMN {
                narrow[j] = (uint8_t)folded[j];
            }
            memcpy(packed, narrow, (size_t)(4 * p));
            packed += 4 * p;
            low += p;
        }
    }
}

INLINE void pack_group(const uint8_t *restrict values, int width, uint8_t *restrict packed) {
    int32_t codes[PACK_GROUP];
    for (int i = 0; i < PACK_GROUP; i++) {
        codes[i] = values[i];
    }
    pack_wide_group(codes, width, packed);
}

#define EACH_GROUP(width)                                                   \
    case width:                                                             \
        for (size_t g = 0; g < groups; g++) {                               \
            GROUP(from + g * FROM_BYTES(width), width, to + g * TO_BYTES(width)); \
        }                                                                   \
        break;

#define EACH_WIDTH         \
    switch (width) {       \
        EACH_GROUP(1)      \
        EACH_GROUP(2)      \
        EACH_GROUP(3)      \
        EACH_GROUP(4)      \
        EACH_GROUP(5)      \
        EACH_GROUP(6)      \
        EACH_GROUP(7)      \
        EACH_GROUP(8)      \
    }

#define GROUP pack_group
#define FROM_BYTES(width) PACK_GROUP
#define TO_BYTES(width) (4 * (width))
static void pack(const uint8_t *restrict from, size_t groups, int width, uint8_t *restrict to) {
    EACH_WIDTH
}
#undef GROUP

#define GROUP pack_wide_group
static void pack_wide(const int32_t *restrict from, size_t groups, int width,
                      uint8_t *restrict to) {
    EACH_WIDTH
}
#undef GROUP
#undef FROM_BYTES
#undef TO_BYTES

#define GROUP unpack_group
#define FROM_BYTES(width) (4 * (width))
#define TO_BYTES(width) PACK_GROUP
static void unpack(const uint8_t *restrict from, size_t groups, int width, uint8_t *restrict to) {
    EACH_WIDTH
}
#undef GROUP
#undef FROM_BYTES
#undef TO_BYTES

#endif
