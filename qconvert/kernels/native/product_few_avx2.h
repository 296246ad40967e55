/* Few samples with AVX2: each row is unpacked in registers and multiplied as it streams by; see
 * product.h for the arithmetic. Part of product_x86.h. */
#ifndef QCONVERT_PRODUCT_FEW_AVX2_H
#define QCONVERT_PRODUCT_FEW_AVX2_H

enum { ROWS_AT_ONCE = 8 };

/* Adds products of 32 unsigned codes and signed inputs to 8 sums, of columns 4i..4i+3 or (8 bits)
 * of others in the same half. */
INLINE __m256i dot32(__m256i acc, __m256i u, __m256i a, int bits) {
    if (bits == 8) { /* pairs of products of 255 and -128 do not fit 16 bits */
        const __m256i zero = _mm256_setzero_si256();
        const __m256i sign = _mm256_cmpgt_epi8(zero, a);
        const __m256i low = _mm256_madd_epi16(_mm256_unpacklo_epi8(u, zero),
                                              _mm256_unpacklo_epi8(a, sign));
        const __m256i high = _mm256_madd_epi16(_mm256_unpackhi_epi8(u, zero),
                                               _mm256_unpackhi_epi8(a, sign));
        return _mm256_add_epi32(acc, _mm256_add_epi32(low, high));
    }
    /* 63 * 128 * 2 = 16,128 fits 16 bits. */
    const __m256i pairs = _mm256_maddubs_epi16(u, a);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

INLINE __m256i dot_pack(__m256i acc, const uint8_t *packed, const int8_t *a, int bits) {
    __m256i u = unpack_vector(packed, bits);
    if (bits == 8) { /* stored as signed bytes */
        u = _mm256_xor_si256(u, _mm256_set1_epi8(-128));
    }
    return dot32(acc, u, _mm256_loadu_si256((const __m256i *)a), bits);
}

/* Sums of code * input of `packs` groups of 32 columns. */
INLINE __m256i dot_packs(const uint8_t *packed, const int8_t *a, size_t packs, int bits) {
    __m256i even = _mm256_setzero_si256(), odd = even;
    size_t i = 0;
    for (; i + 2 <= packs; i += 2) {
        even = dot_pack(even, packed + i * 4 * (size_t)bits, a + i * PACK_GROUP, bits);
        odd = dot_pack(odd, packed + (i + 1) * 4 * (size_t)bits, a + (i + 1) * PACK_GROUP, bits);
    }
    if (i < packs) {
        even = dot_pack(even, packed + i * 4 * (size_t)bits, a + i * PACK_GROUP, bits);
    }
    return _mm256_add_epi32(even, odd);
}

/* Sums of the lower and of the upper half of each of 8 vectors. */
INLINE void half_sums(const __m256i v[8], __m256i *lower, __m256i *upper) {
    const __m256i first = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]),
                                            _mm256_hadd_epi32(v[2], v[3]));
    const __m256i second = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]),
                                             _mm256_hadd_epi32(v[6], v[7]));
    *lower = _mm256_permute2x128_si256(first, second, 0x20);
    *upper = _mm256_permute2x128_si256(first, second, 0x31);
}

/* Work space of a product with few samples. */
typedef struct {
    const Product *p;
    size_t spans, padded;  /* columns, to whole groups of 32 */
    size_t lines;          /* samples, and one of ones behind them when z_a is not 0 */
    int8_t *inputs;        /* (lines, padded), 0 behind the columns */
    int32_t *sums;         /* A', (samples, spans) */
    __m256i *vectors;      /* one for each span, or each pair of spans of 16 */
    int32_t *dots, *zeros; /* (lines, spans), (spans) */
    float *steps;          /* (spans) */
    float *terms;          /* (samples, ROWS_AT_ONCE, spans) */
    uint8_t *tail;         /* a row of bytes that does not end with a group of 32 */
} Stream;

/* A vector of sums for each whole run of `step` groups of 32; returns their number. */
INLINE size_t dot_runs(const Stream *s, const uint8_t *packed, const int8_t *a, int bits,
                       size_t step) {
    const size_t runs = s->padded / PACK_GROUP / step;
    for (size_t n = 0; n < runs; n++) {
        s->vectors[n] = dot_packs(packed, a, step, bits);
        packed += step * 4 * (size_t)bits;
        a += step * PACK_GROUP;
    }
    return runs;
}

/* Dots of one line with a row, by span. */
INLINE void dot_row(const Stream *s, const uint8_t *packed, const int8_t *a, int bits,
                    int32_t *dots) {
    const size_t block = s->p->scheme.block, packs = s->padded / PACK_GROUP;
    const size_t step = (block ? round_up(block, PACK_GROUP) : SEGMENT) / PACK_GROUP;
    size_t n;
    switch (step) { /* short loops of a known length unroll */
    case 1: n = dot_runs(s, packed, a, bits, 1); break;
    case 2: n = dot_runs(s, packed, a, bits, 2); break;
    case 4: n = dot_runs(s, packed, a, bits, 4); break;
    case 8: n = dot_runs(s, packed, a, bits, 8); break;
    default: n = dot_runs(s, packed, a, bits, SEGMENT / PACK_GROUP);
    }
    if (n * step < packs) {
        const size_t at = n * step;
        s->vectors[n++] = dot_packs(packed + at * 4 * (size_t)bits, a + at * PACK_GROUP,
                                    packs - at, bits);
    }
    for (size_t i = 0; i < n; i += 8) {
        __m256i lower, upper;
        half_sums(s->vectors + i, &lower, &upper);
        if (block == 16) {
            const __m256i even = _mm256_unpacklo_epi32(lower, upper);
            const __m256i odd = _mm256_unpackhi_epi32(lower, upper);
            _mm256_storeu_si256((__m256i *)(dots + 2 * i),
                                _mm256_permute2x128_si256(even, odd, 0x20));
            _mm256_storeu_si256((__m256i *)(dots + 2 * i + 8),
                                _mm256_permute2x128_si256(even, odd, 0x31));
        } else {
            _mm256_storeu_si256((__m256i *)(dots + i), _mm256_add_epi32(lower, upper));
        }
    }
}

/* The same for each width of codes: functions of their own, which compile in a fraction of the time
 * that they take inlined into one. */
typedef void DotRow(const Stream *s, const uint8_t *packed, const int8_t *a, int32_t *dots);

#define DOT_ROW(bits)                                                                            \
    APART void dot_row_##bits(const Stream *s, const uint8_t *packed, const int8_t *a,           \
                              int32_t *dots) {                                                   \
        dot_row(s, packed, a, bits, dots);                                                       \
    }
DOT_ROW(2)
DOT_ROW(3)
DOT_ROW(4)
DOT_ROW(5)
DOT_ROW(6)
DOT_ROW(8)
#undef DOT_ROW

static DotRow *const dot_rows[9] = {
    [2] = dot_row_2, [3] = dot_row_3, [4] = dot_row_4,
    [5] = dot_row_5, [6] = dot_row_6, [8] = dot_row_8,
};

/* Each span's share of y for one row and sample. */
INLINE void span_terms(const Stream *s, size_t sample, size_t line_spans, float *restrict terms) {
    const int32_t m = multiplier(s->p), za = s->p->zero_point;
    const int32_t *dots = s->dots + sample * line_spans;
    const int32_t *ones = s->dots + (s->lines - 1) * line_spans; /* sums of codes if za is not 0 */
    const int32_t *sums = s->sums + sample * s->spans;
    const int32_t correction = m * za, *restrict zeros = s->zeros;
    const float *restrict steps = s->steps;
    for (size_t i = 0; i < s->spans; i++) {
        const int32_t acc = m * dots[i] - zeros[i] * sums[i] - correction * ones[i];
        terms[i] = (float)acc * steps[i];
    }
}

/* Zeros and steps of the spans of a row. */
INLINE void load_parameters(const Stream *s, size_t row) {
    const Product *p = s->p;
    const float divisor = (float)multiplier(p);
    const float *scale = p->scale + row * p->groups;
    if (p->scheme.block == 0) {
        for (size_t i = 0; i < s->spans; i++) {
            s->zeros[i] = zero_of(p, row, 0);
            s->steps[i] = step_of(p, row, 0);
        }
        return;
    }
    for (size_t i = 0; i < s->spans; i++) {
        s->steps[i] = scale[i] / divisor;
    }
    if (p->scheme.symmetric) {
        for (size_t i = 0; i < s->spans; i++) {
            s->zeros[i] = zero_of(p, row, i);
        }
    } else {
        memcpy(s->zeros, p->zero + row * p->groups, s->spans * sizeof *s->zeros);
    }
}

static void stream_rows(const Stream *s) {
    const Product *p = s->p;
    DotRow *const dot = dot_rows[p->scheme.bits];
    const size_t bytes = packed_bytes(p->row_codes, p->scheme.bits);
    const size_t line_spans = round_up(s->spans, 16);
    for (size_t first = 0; first < p->rows; first += ROWS_AT_ONCE) {
        const size_t rows = smaller(ROWS_AT_ONCE, p->rows - first);
        for (size_t r = 0; r < rows; r++) {
            const uint8_t *packed = p->packed + (first + r) * bytes;
            if (p->row_codes % PACK_GROUP) {
                memcpy(s->tail, packed, bytes);
                packed = s->tail;
            }
            load_parameters(s, first + r);
            for (size_t line = 0; line < s->lines; line++) {
                dot(s, packed, s->inputs + line * s->padded, s->dots + line * line_spans);
            }
            for (size_t m = 0; m < p->samples; m++) {
                span_terms(s, m, line_spans, s->terms + (m * ROWS_AT_ONCE + r) * s->spans);
            }
        }
        /* Span after span, as defined; eight rows at once hide the latency of the additions. */
        for (size_t m = 0; m < p->samples; m++) {
            float y[ROWS_AT_ONCE] = {0};
            const float *terms = s->terms + m * ROWS_AT_ONCE * s->spans;
            for (size_t i = 0; i < s->spans; i++) {
                for (size_t r = 0; r < ROWS_AT_ONCE; r++) {
                    y[r] += terms[r * s->spans + i];
                }
            }
            memcpy(p->y + m * p->rows + first, y, rows * sizeof *y);
        }
    }
}

static void fill_stream(Stream *s) {
    const Product *p = s->p;
    for (size_t m = 0; m < p->samples; m++) {
        memcpy(s->inputs + m * s->padded, p->inputs + m * p->columns, p->columns);
        centred_sums(p, p->inputs + m * p->columns, s->sums + m * s->spans);
    }
    if (s->lines > p->samples) {
        memset(s->inputs + p->samples * s->padded, 1, p->columns);
    }
}

static int product_few(const Product *p) {
    Stream s = {.p = p, .spans = span_count(p), .padded = round_up(p->columns, PACK_GROUP)};
    s.lines = p->samples + (p->zero_point != 0);
    const size_t wide = round_up(s.spans, 16);
    s.inputs = workspace(s.lines * s.padded, sizeof *s.inputs);
    s.sums = workspace(p->samples * s.spans, sizeof *s.sums);
    s.vectors = workspace(wide, sizeof *s.vectors);
    s.dots = workspace(s.lines * wide, sizeof *s.dots);
    s.zeros = workspace(s.spans, sizeof *s.zeros);
    s.steps = workspace(s.spans, sizeof *s.steps);
    s.terms = workspace(p->samples * ROWS_AT_ONCE * s.spans, sizeof *s.terms);
    s.tail = workspace(s.padded, sizeof *s.tail);
    const int failed = !s.inputs || !s.sums || !s.vectors || !s.dots || !s.zeros || !s.steps
                       || !s.terms || !s.tail;
    if (!failed) {
        fill_stream(&s);
        stream_rows(&s);
    }
    free(s.inputs);
    free(s.sums);
    free(s.vectors);
    free(s.dots);
    free(s.zeros);
    free(s.steps);
    free(s.terms);
    free(s.tail);
    return failed ? NO_MEMORY : DONE;
}

#endif
