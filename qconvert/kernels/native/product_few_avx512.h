/* Few samples with AVX-512 VNNI: each row is multiplied as it streams by, 128 columns at a time; see
 * product.h for the arithmetic.
 *
 * Weights come from memory once, so what counts is how little is done to them in between. Codes of
 * four groups of 32 lie in two vectors, a group to a lane of 128 bits: the first 16 codes of each in
 * one, the last 16 in the other, which is what 4-bit codes are after a mask and a shift. The inputs
 * are put in that order once. Part of product_x86.h. */
#ifndef QCONVERT_PRODUCT_FEW_AVX512_H
#define QCONVERT_PRODUCT_FEW_AVX512_H

/* Columns of two vectors of codes, of one, and 32-bit lanes of a vector. */
enum { CHUNK = 4 * PACK_GROUP, HALF = CHUNK / 2, WIDTH = 16 };

typedef struct {
    __m512i first, last;
} Codes;

/* 64 codes in their order; only to be called for other widths than 4. */
INLINE __m512i load_codes(const uint8_t *packed, int bits) {
    if (bits == 8) { /* stored as signed bytes */
        return _mm512_xor_si512(_mm512_loadu_si512(packed), _mm512_set1_epi8(-128));
    }
    return _mm512_inserti64x4(_mm512_castsi256_si512(unpack_vector(packed, bits)),
                              unpack_vector(packed + 4 * bits, bits), 1);
}

INLINE Codes load_chunk(const uint8_t *packed, int bits) {
    if (bits == 4) {
        const __m512i mask = _mm512_set1_epi8(15), v = _mm512_loadu_si512(packed);
        return (Codes){_mm512_and_si512(v, mask), _mm512_and_si512(_mm512_srli_epi16(v, 4), mask)};
    }
    const __m512i low = load_codes(packed, bits), high = load_codes(packed + 8 * bits, bits);
    return (Codes){_mm512_shuffle_i64x2(low, high, 0x88), _mm512_shuffle_i64x2(low, high, 0xdd)};
}

/* Work space. */
typedef struct {
    const Product *p;
    size_t spans, padded_spans; /* to whole vectors of 16 */
    size_t chunks, whole;       /* of a row, and those of them that end within it */
    size_t lines;               /* samples, and one of ones behind them when z_a is not 0 */
    int8_t *inputs;             /* (lines, chunks, CHUNK), 0 behind the columns */
    int32_t *sums;              /* A', (samples, padded_spans) */
    int32_t *dots;              /* (lines, padded_spans) */
    float *terms;               /* (samples, WIDTH rows, padded_spans) */
    uint8_t *tail;              /* the chunk that is not whole, 0 behind it */
} Stream;

/* --- dots of 16 spans -------------------------------------------------------------------------*/

/* Chunks of a span, and vectors that hold the dots of 16 spans: 4 where a lane, 8 where two lanes
 * and 16 where all lanes belong to a span. */
INLINE size_t chunks_of(size_t block) {
    return block == 0 ? SEGMENT / CHUNK : block == 256 ? 2 : 1;
}

INLINE size_t vectors_of(size_t block) {
    return block == 16 || block == 32 ? 4 : block == 64 ? 8 : 16;
}

/* Lane by lane the sums of four vectors. */
INLINE __m512i lane_sums(const __m512i v[4]) {
    const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]),
                                       _mm512_unpackhi_epi32(v[0], v[1]));
    const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]),
                                       _mm512_unpackhi_epi32(v[2], v[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

/* Sums of neighbouring lanes: those of a, then those of b. */
INLINE __m512i add_lanes(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(a, b, 0xdd));
}

/* Dots of 16 spans in order, from the vectors that hold them. */
INLINE __m512i span_dots(const __m512i *v, size_t block) {
    const __m512i transposed = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11,
                                                 15);
    const __m512i a = lane_sums(v);
    switch (block) {
    case 16: /* first and last halves of two chunks took turns */
        return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), a);
    case 32:
        return _mm512_permutexvar_epi32(transposed, a);
    case 64: {
        const __m512i even = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 16, 24, 17, 25, 18, 26,
                                               19, 27);
        const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(4));
        const __m512i b = lane_sums(v + 4);
        return _mm512_add_epi32(_mm512_permutex2var_epi32(a, even, b),
                                _mm512_permutex2var_epi32(a, odd, b));
    }
    default:
        return add_lanes(add_lanes(a, lane_sums(v + 4)),
                         add_lanes(lane_sums(v + 8), lane_sums(v + 12)));
    }
}

/* Chunk `i` of a row, wherever it lies; `inside` where it is known to be whole. */
INLINE Codes chunk_at(const Stream *s, const uint8_t *packed, size_t i, int bits, int inside) {
    return load_chunk(inside || i < s->whole ? packed + i * CHUNK / 8 * (size_t)bits : s->tail,
                      bits);
}

/* Dots of the 16 spans that start at chunk `start`. */
INLINE __m512i dot_spans(const Stream *s, const uint8_t *packed, const int8_t *line, size_t start,
                         int bits, size_t block, int inside) {
    __m512i v[16];
    const size_t vectors = vectors_of(block), step = chunks_of(block);
    const int apart = block == 16 || step > 1; /* or the additions of a long span would queue */
    for (size_t n = 0, i = start; n < vectors;) {
        __m512i first = _mm512_setzero_si512(), last = first;
        const size_t stop = inside ? i + step : smaller(i + step, s->chunks);
        for (; i < stop; i++) {
            const Codes u = chunk_at(s, packed, i, bits, inside);
            const __m512i a = _mm512_load_si512(line + i * CHUNK);
            const __m512i b = _mm512_load_si512(line + i * CHUNK + HALF);
            first = _mm512_dpbusd_epi32(first, u.first, a);
            if (apart) {
                last = _mm512_dpbusd_epi32(last, u.last, b);
            } else {
                first = _mm512_dpbusd_epi32(first, u.last, b);
            }
        }
        if (block == 16) {
            v[n++] = first;
            v[n++] = last;
        } else {
            v[n++] = apart ? _mm512_add_epi32(first, last) : first;
        }
    }
    return span_dots(v, block);
}

/* Dots of a line with a row. */
INLINE void dot_line(const Stream *s, const uint8_t *packed, const int8_t *line, int bits,
                     size_t block, int32_t *dots) {
    const size_t step = vectors_of(block) * chunks_of(block) / (block == 16 ? 2 : 1);
    size_t start = 0, i = 0;
    for (; start + step <= s->whole; start += step, i += WIDTH) {
        _mm512_store_si512(dots + i, dot_spans(s, packed, line, start, bits, block, 1));
    }
    for (; start < s->chunks; start += step, i += WIDTH) {
        _mm512_store_si512(dots + i, dot_spans(s, packed, line, start, bits, block, 0));
    }
}

/* --- sums over spans --------------------------------------------------------------------------*/

/* The share of y of each span of a row. */
INLINE void span_terms(const Stream *s, size_t row, size_t sample, float *terms) {
    const Product *p = s->p;
    const int32_t *dots = s->dots + sample * s->padded_spans;
    const int32_t *ones = s->dots + p->samples * s->padded_spans;
    const int32_t *sums = s->sums + sample * s->padded_spans;
    const size_t group = row * p->groups;
    const __m128i shift = _mm_cvtsi32_si128(multiplier(p) == 4 ? 2 : 0);
    const __m512i za = _mm512_set1_epi32(multiplier(p) * p->zero_point);
    const __m512 inverse = _mm512_set1_ps(1.0f / (float)multiplier(p)); /* a power of two: exact */
    for (size_t i = 0; i < s->spans; i += WIDTH) {
        const __mmask16 real = (__mmask16)((1u << smaller(WIDTH, s->spans - i)) - 1);
        const __m512 scale = p->scheme.block ? _mm512_maskz_loadu_ps(real, p->scale + group + i)
                                             : _mm512_set1_ps(p->scale[group]);
        const __m512i zero = p->scheme.symmetric || !p->scheme.block
                                 ? _mm512_set1_epi32(zero_of(p, row, 0))
                                 : _mm512_maskz_loadu_epi32(real, p->zero + group + i);
        __m512i acc = _mm512_sll_epi32(_mm512_load_si512(dots + i), shift);
        acc = _mm512_sub_epi32(acc, _mm512_mullo_epi32(zero, _mm512_load_si512(sums + i)));
        if (p->zero_point) {
            acc = _mm512_sub_epi32(acc, _mm512_mullo_epi32(za, _mm512_load_si512(ones + i)));
        }
        const __m512 step = _mm512_mul_ps(scale, inverse);
        _mm512_store_ps(terms + i, _mm512_mul_ps(_mm512_cvtepi32_ps(acc), step));
    }
}

/* Transposes 16 rows of 16 numbers. */
INLINE void transpose(__m512 v[WIDTH]) {
    __m512 t[WIDTH];
    for (int i = 0; i < WIDTH; i += 2) {
        t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < WIDTH; i += 4) { /* v[i + k]: column k of each lane, rows i..i+3 */
        v[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
        v[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
        v[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        v[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int k = 0; k < 4; k++) {
        const __m512 a = _mm512_shuffle_f32x4(v[k], v[k + 4], 0x88);
        const __m512 b = _mm512_shuffle_f32x4(v[k], v[k + 4], 0xdd);
        const __m512 c = _mm512_shuffle_f32x4(v[k + 8], v[k + 12], 0x88);
        const __m512 d = _mm512_shuffle_f32x4(v[k + 8], v[k + 12], 0xdd);
        t[k] = _mm512_shuffle_f32x4(a, c, 0x88);
        t[k + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
        t[k + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
        t[k + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
    memcpy(v, t, sizeof t);
}

/* y of 16 rows: a lane to a row, because the definition adds span after span. */
INLINE __m512 add_terms(const Stream *s, const float *terms) {
    __m512 y = _mm512_setzero_ps();
    for (size_t i = 0; i < s->spans; i += WIDTH) {
        __m512 v[WIDTH];
        for (size_t r = 0; r < WIDTH; r++) {
            v[r] = _mm512_load_ps(terms + r * s->padded_spans + i);
        }
        transpose(v);
        const size_t real = smaller(WIDTH, s->spans - i);
        for (size_t k = 0; k < real; k++) {
            y = _mm512_add_ps(y, v[k]);
        }
    }
    return y;
}

/* --- rows -------------------------------------------------------------------------------------*/

INLINE void dot_row(const Stream *s, size_t row, int bits, size_t block) {
    const size_t bytes = packed_bytes(s->p->row_codes, bits), whole = s->whole * CHUNK / 8;
    const uint8_t *packed = s->p->packed + row * bytes;
    if (s->whole < s->chunks) {
        memcpy(s->tail, packed + whole * (size_t)bits, bytes - whole * (size_t)bits);
    }
    for (size_t l = 0; l < s->lines; l++) {
        dot_line(s, packed, s->inputs + l * s->chunks * CHUNK, bits, block,
                 s->dots + l * s->padded_spans);
    }
}

/* Dots of all lines with a row, for each width of codes and block: functions of their own, which
 * compile in a fraction of the time that they take inlined into one. */
typedef void DotRow(const Stream *s, size_t row);

#define DOT_ROW(bits, block)                                         \
    APART void dot_row_##bits##_##block(const Stream *s, size_t row) { \
        dot_row(s, row, bits, block);                                \
    }
#define DOT_ROWS(bits)                                                                    \
    DOT_ROW(bits, 16)                                                                     \
    DOT_ROW(bits, 32)                                                                     \
    DOT_ROW(bits, 64)                                                                     \
    DOT_ROW(bits, 128)                                                                    \
    DOT_ROW(bits, 256)                                                                    \
    DOT_ROW(bits, 0)                                                                      \
    INLINE DotRow *dot_row_of_##bits(size_t block) {                                      \
        switch (block) { /* short loops of a known length unroll */                       \
        case 16: return dot_row_##bits##_16;                                              \
        case 32: return dot_row_##bits##_32;                                              \
        case 64: return dot_row_##bits##_64;                                              \
        case 128: return dot_row_##bits##_128;                                            \
        case 256: return dot_row_##bits##_256;                                            \
        default: return dot_row_##bits##_0;                                               \
        }                                                                                 \
    }
DOT_ROWS(2)
DOT_ROWS(3)
DOT_ROWS(4)
DOT_ROWS(5)
DOT_ROWS(6)
DOT_ROWS(8)
#undef DOT_ROWS
#undef DOT_ROW

INLINE DotRow *dot_row_of(Scheme scheme) {
    switch (scheme.bits) {
    case 2: return dot_row_of_2(scheme.block);
    case 3: return dot_row_of_3(scheme.block);
    case 4: return dot_row_of_4(scheme.block);
    case 5: return dot_row_of_5(scheme.block);
    case 6: return dot_row_of_6(scheme.block);
    default: return dot_row_of_8(scheme.block);
    }
}

static void stream_rows(const Stream *s) {
    DotRow *const dot = dot_row_of(s->p->scheme);
    const Product *p = s->p;
    const size_t size = WIDTH * s->padded_spans;
    for (size_t first = 0; first < p->rows; first += WIDTH) {
        const size_t rows = smaller(WIDTH, p->rows - first);
        for (size_t r = 0; r < rows; r++) { /* terms of missing rows are not stored */
            dot(s, first + r);
            for (size_t m = 0; m < p->samples; m++) {
                span_terms(s, first + r, m, s->terms + m * size + r * s->padded_spans);
            }
        }
        for (size_t m = 0; m < p->samples; m++) {
            const __mmask16 real = (__mmask16)((1u << rows) - 1);
            _mm512_mask_storeu_ps(p->y + m * p->rows + first, real,
                                  add_terms(s, s->terms + m * size));
        }
    }
}

/* A line of inputs in the order of the codes. */
INLINE void arrange(const int8_t *a, size_t columns, int8_t *out) {
    for (size_t i = 0; i < columns; i++) {
        const size_t group = i % CHUNK / PACK_GROUP, at = i % PACK_GROUP;
        out[i / CHUNK * CHUNK + at / WIDTH * HALF + group * WIDTH + at % WIDTH] = a[i];
    }
}

static int fill_stream(Stream *s) {
    const Product *p = s->p;
    int8_t *ones = workspace(p->columns, 1);
    if (!ones) {
        return NO_MEMORY;
    }
    memset(ones, 1, p->columns);
    for (size_t l = 0; l < s->lines; l++) {
        const int8_t *line = l < p->samples ? p->inputs + l * p->columns : ones;
        arrange(line, p->columns, s->inputs + l * s->chunks * CHUNK);
        if (l < p->samples) {
            centred_sums(p, line, s->sums + l * s->padded_spans);
        }
    }
    free(ones);
    return DONE;
}

static int product_few(const Product *p) {
    Stream s = {.p = p, .spans = span_count(p)};
    s.padded_spans = round_up(s.spans, WIDTH);
    s.chunks = round_up(p->columns, CHUNK) / CHUNK;
    s.whole = smaller(p->row_codes / CHUNK, s.chunks);
    s.lines = p->samples + (p->zero_point != 0);
    s.inputs = workspace(s.lines * s.chunks, CHUNK);
    s.sums = workspace(p->samples * s.padded_spans, sizeof *s.sums);
    s.dots = workspace(s.lines * s.padded_spans, sizeof *s.dots);
    s.terms = workspace(p->samples * WIDTH * s.padded_spans, sizeof *s.terms);
    s.tail = workspace(CHUNK, 1);
    const int failed = !s.inputs || !s.sums || !s.dots || !s.terms || !s.tail || fill_stream(&s);
    if (!failed) {
        stream_rows(&s);
    }
    free(s.inputs);
    free(s.sums);
    free(s.dots);
    free(s.terms);
    free(s.tail);
    return failed ? NO_MEMORY : DONE;
}

#endif
