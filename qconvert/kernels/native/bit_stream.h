/* Codes as a stream of bits, the first in the lowest, and back. Eight codes are the bytes of a word,
 * whose halves come together, or apart, until they fill `bits` bytes. */
#ifndef QCONVERT_BIT_STREAM_H
#define QCONVERT_BIT_STREAM_H

#include "arithmetic.h"

enum { EIGHT = 8, STREAMED = 32 }; /* codes of a word, and words at once */

#define LOW(bits) ((1ull << (bits)) - 1)

INLINE uint64_t together(uint64_t w, int bits) {
    const uint64_t one = LOW(bits) * 0x0001000100010001, two = LOW(2 * bits) * 0x0000000100000001;
    const uint64_t four = LOW(4 * bits);
    w = (w & one) | (w & one << 8) >> (8 - bits);
    w = (w & two) | (w & two << 16) >> (16 - 2 * bits);
    return (w & four) | (w & four << 32) >> (32 - 4 * bits);
}

INLINE uint64_t apart(uint64_t w, int bits) {
    const uint64_t one = LOW(bits) * 0x0001000100010001, two = LOW(2 * bits) * 0x0000000100000001;
    const uint64_t four = LOW(4 * bits);
    w = (w & four) | (w & four << 4 * bits) << (32 - 4 * bits);
    w = (w & two) | (w & two << 2 * bits) << (16 - 2 * bits);
    return (w & one) | (w & one << bits) << (8 - bits);
}

/* At most 256 codes of a width known to the compiler; behind the last there are `bits` bytes for
 * every eight that were begun. */
INLINE void pack_run(const uint8_t *restrict codes, size_t count, int bits,
                     uint8_t *restrict packed) {
    uint64_t words[STREAMED] = {0};
    uint8_t out[EIGHT * STREAMED + EIGHT];
    const size_t n = (count + EIGHT - 1) / EIGHT;
    memcpy(words, codes, count);
    for (int k = 0; k < STREAMED; k++) {
        words[k] = together(words[k], bits);
    }
    for (size_t k = 0; k < n; k++) { /* each over what the one before has left too much */
        memcpy(out + k * (size_t)bits, words + k, sizeof *words);
    }
    memcpy(packed, out, n * (size_t)bits);
}

/* The inverse, of `bytes` bytes that hold the codes. */
INLINE void unpack_run(const uint8_t *restrict packed, size_t bytes, size_t count, int bits,
                       uint8_t *restrict codes) {
    uint64_t words[STREAMED] = {0};
    uint8_t in[EIGHT * STREAMED + EIGHT] = {0};
    memcpy(in, packed, bytes);
    for (size_t k = 0; k < STREAMED; k++) {
        memcpy(words + k, in + k * (size_t)bits, sizeof *words);
    }
    for (int k = 0; k < STREAMED; k++) {
        words[k] = apart(words[k], bits);
    }
    memcpy(codes, words, count);
}

#define EACH_WIDTH_OF_STREAM \
    switch (bits) {          \
        WIDTH(2)             \
        WIDTH(3)             \
        WIDTH(4)             \
        WIDTH(5)             \
        WIDTH(6)             \
        WIDTH(7)             \
    }

#define WIDTH(width)                                                        \
    case width: pack_run(codes, count, width, packed); break;
APART void pack_some(const uint8_t *codes, size_t count, int bits, uint8_t *packed) {
    EACH_WIDTH_OF_STREAM
}
#undef WIDTH

#define WIDTH(width)                                                        \
    case width: unpack_run(packed, bytes, count, width, codes); break;
APART void unpack_some(const uint8_t *packed, size_t bytes, size_t count, int bits,
                       uint8_t *codes) {
    EACH_WIDTH_OF_STREAM
}
#undef WIDTH

/* A multiple of 32 codes, as they come out of the arithmetic; returns the end. */
INLINE uint8_t *store_stream(const int32_t *restrict codes, size_t count, int bits,
                             uint8_t *restrict packed) {
    for (size_t start = 0; start < count; start += PIECE) {
        uint8_t narrow[PIECE];
        const size_t n = smaller(PIECE, count - start);
        for (size_t i = 0; i < n; i++) {
            narrow[i] = (uint8_t)codes[start + i];
        }
        if (bits == 8) {
            memcpy(packed, narrow, n);
        } else {
            pack_some(narrow, n, bits, packed);
        }
        packed += n / EIGHT * (size_t)bits;
    }
    return packed;
}

/* The bytes that `count` codes begin. */
INLINE size_t stream_bytes(size_t count, int bits) {
    return (count * (size_t)bits + 7) / 8;
}

static void pack_stream(const uint8_t *codes, size_t rows, size_t columns, int bits, size_t stride,
                        uint8_t *packed) {
    for (size_t r = 0; r < rows; r++, codes += columns, packed += stride) {
        memset(packed, 0, stride);
        if (bits == 8) {
            memcpy(packed, codes, columns);
            continue;
        }
        for (size_t c = 0; c < columns; c += PIECE) {
            const size_t n = smaller(PIECE, columns - c);
            uint8_t some[PIECE];
            pack_some(codes + c, n, bits, some);
            memcpy(packed + c / 8 * (size_t)bits, some, stream_bytes(n, bits));
        }
    }
}

static void unpack_stream(const uint8_t *packed, size_t rows, size_t columns, int bits,
                          size_t stride, uint8_t *codes) {
    for (size_t r = 0; r < rows; r++, packed += stride, codes += columns) {
        if (bits == 8) {
            memcpy(codes, packed, columns);
            continue;
        }
        for (size_t c = 0; c < columns; c += PIECE) {
            const size_t n = smaller(PIECE, columns - c);
            unpack_some(packed + c / 8 * (size_t)bits, stream_bytes(n, bits), n, bits, codes + c);
        }
    }
}

#endif
