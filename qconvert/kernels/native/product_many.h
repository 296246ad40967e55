/* Many samples, for AVX2 and AVX-512 VNNI: 16 or 32 rows at a time are unpacked into a tile, columns
 * interleaved, so that a lane of 32 bits holds a few columns of one row; see product.h for the
 * arithmetic. Part of product_x86.h. */
#ifndef QCONVERT_PRODUCT_MANY_H
#define QCONVERT_PRODUCT_MANY_H

#ifdef USE_AVX512
enum { TILE_ROWS = 32, TILE_SAMPLES = 8 };
typedef __m512i Vector;
#else
enum { TILE_ROWS = 16, TILE_SAMPLES = 4 };
typedef __m256i Vector;
#endif
enum { ROW_LANES = sizeof(Vector) / sizeof(int32_t), ROW_VECTORS = TILE_ROWS / ROW_LANES };

/* Work space of a product with many samples. acc = m dot + offset - zero A'. */
typedef struct {
    const Product *p;
    size_t spans, padded; /* columns, to whole groups of 32 */
    size_t per_lane;      /* columns of a lane: 4, or 2 in 16 bits each */
    size_t lanes;         /* of a row */
    int32_t *inputs;      /* (sample tiles, lanes, TILE_SAMPLES) */
    int32_t *sums;        /* A', (samples rounded up, spans) */
    int32_t *tile;        /* (lanes, TILE_ROWS) */
    int32_t *offset, *zero; /* (spans, TILE_ROWS) */
    float *step;            /* (spans, TILE_ROWS) */
    uint8_t *codes;         /* a row */
    int16_t *wide;          /* a row, or a line of inputs */
} Tiles;

/* Whether acc still lacks zero A' after the dots. */
INLINE int needs_zero(const Product *p) {
#ifdef USE_AVX512
    return !p->scheme.symmetric && p->scheme.bits >= 6;
#else
    return p->scheme.bits < 8;
#endif
}

/* A line of inputs as bytes or 16-bit numbers, `padded` columns of it. */
static void input_line(const Tiles *t, const int8_t *a, void *line) {
    const Product *p = t->p;
    const size_t n = p->columns;
#ifdef USE_AVX512
    uint8_t *out = line; /* unsigned beside signed weights: a + 128 */
    for (size_t i = 0; i < n; i++) {
        out[i] = (uint8_t)(a[i] + 128);
    }
#else
    if (t->per_lane == 4) {
        memcpy(line, a, n);
        return;
    }
    int16_t *out = line;
    for (size_t i = 0; i < n; i++) {
        out[i] = (int16_t)(a[i] - p->zero_point);
    }
#endif
}

static void fill_inputs(const Tiles *t) {
    const Product *p = t->p;
    for (size_t m = 0; m < p->samples; m++) {
        const int8_t *a = p->inputs + m * p->columns;
        int32_t *out = t->inputs + m / TILE_SAMPLES * t->lanes * TILE_SAMPLES + m % TILE_SAMPLES;
        input_line(t, a, t->wide); /* leaves the zeros behind the columns alone */
        for (size_t i = 0; i < t->lanes; i++) {
            memcpy(out + i * TILE_SAMPLES, (const char *)t->wide + 4 * i, sizeof *out);
        }
        centred_sums(p, a, t->sums + m * t->spans);
    }
}

/* What a row's lanes hold, and the offset and zero that go with it, by span.
 *
 * VNNI: signed bytes k1 = m u - base beside inputs a + 128. For symmetric codes and up to 5 bits
 * base is Z and k1 is k: |4u - z| <= 127. Otherwise base is 128 and Z - 128 is left as zero. The
 * sum of k1 (a - z_a) is that of k1 (a + 128) less (128 + z_a) times that of k1; both below 2^30,
 * since 256 * 128 * 16,384 = 2^29.
 * AVX2 below 8 bits: the codes. With 8 bits: k in 16 bits, beside a - z_a. */
static void load_row(const Tiles *t, size_t row, size_t r) {
    const Product *p = t->p;
    const int32_t m = multiplier(p);
    const void *line = t->codes;
    unpack_row(p, row, t->codes);
    for (size_t i = 0; i < t->spans; i++) {
        const Span span = span_at(p, i);
        const int32_t zero = zero_of(p, row, span.group);
        const size_t at = i * TILE_ROWS + r;
        uint8_t *codes = t->codes + span.start;
        int32_t sum = 0;
        t->step[at] = step_of(p, row, span.group);
#ifdef USE_AVX512
        const int32_t base = needs_zero(p) ? 128 : zero;
        for (size_t c = 0; c < span.length; c++) {
            const int8_t k = (int8_t)(m * codes[c] - base);
            sum += k;
            codes[c] = (uint8_t)k;
        }
        t->offset[at] = -(128 + p->zero_point) * sum;
        t->zero[at] = zero - base;
#else
        if (t->per_lane == 2) {
            for (size_t c = 0; c < span.length; c++) {
                t->wide[span.start + c] = (int16_t)(codes[c] - zero);
            }
            line = t->wide;
            continue;
        }
        for (size_t c = 0; c < span.length; c++) {
            sum += codes[c];
        }
        t->offset[at] = -p->zero_point * m * sum;
        t->zero[at] = zero;
#endif
    }
    int32_t *out = t->tile + r;
    for (size_t i = 0; i < t->lanes; i++) {
        memcpy(out + i * TILE_ROWS, (const char *)line + 4 * i, sizeof *out);
    }
}

#ifdef USE_AVX512

/* Adds the dots of `lanes` lanes to acc. */
INLINE void dot_tile(const int32_t *inputs, const int32_t *tile, size_t lanes, int bits,
                     Vector acc[TILE_SAMPLES][ROW_VECTORS]) {
    (void)bits;
    for (size_t i = 0; i < lanes; i++) {
        const __m512i w0 = _mm512_load_si512(tile + i * TILE_ROWS);
        const __m512i w1 = _mm512_load_si512(tile + i * TILE_ROWS + ROW_LANES);
        for (int m = 0; m < TILE_SAMPLES; m++) {
            const __m512i a = _mm512_set1_epi32(inputs[i * TILE_SAMPLES + (size_t)m]);
            acc[m][0] = _mm512_dpbusd_epi32(acc[m][0], a, w0);
            acc[m][1] = _mm512_dpbusd_epi32(acc[m][1], a, w1);
        }
    }
}

#define LOAD(from) _mm512_load_si512(from)
#define REPEAT(value) _mm512_set1_epi32(value)
#define START(offset) LOAD(offset) /* the lanes hold m u already, so the offset can come first */
#define FINISH(acc, m, offset) (acc)
#define LESS_PRODUCT(acc, a, b) _mm512_sub_epi32(acc, _mm512_mullo_epi32(a, b))
#define ADD_TERM(y, acc, step) \
    _mm512_storeu_ps(y, _mm512_add_ps(_mm512_loadu_ps(y), \
                                      _mm512_mul_ps(_mm512_cvtepi32_ps(acc), _mm512_load_ps(step))))

#else

/* Lanes whose 16-bit sums of pairs cannot overflow: 8 * 2 * 15 * 128 = 30,720 up to 4 bits,
 * 4 * 2 * 31 * 128 = 31,744 at 5, 2 * 2 * 63 * 128 = 32,256 at 6. */
INLINE size_t safe_lanes(int bits) {
    return bits <= 4 ? 8 : bits == 5 ? 4 : 2;
}

/* Left alone, GCC multiplies for all samples before it adds, and runs out of registers: half as
 * fast. */
#define IN_THIS_ORDER(part) __asm__ volatile("" : "+x"((part)[0]), "+x"((part)[1]))

/* Adds the dots of `lanes` lanes, no more than are safe, to acc. */
INLINE void dot_run(const int32_t *inputs, const int32_t *tile, size_t lanes, int bits,
                    Vector acc[TILE_SAMPLES][ROW_VECTORS]) {
    __m256i part[TILE_SAMPLES][ROW_VECTORS];
    for (int m = 0; m < TILE_SAMPLES; m++) {
        part[m][0] = part[m][1] = _mm256_setzero_si256();
    }
    size_t i = 0;
    do { /* lanes > 0: a test before the first costs GCC a register too many */
        const __m256i w0 = _mm256_load_si256((const __m256i *)(tile + i * TILE_ROWS));
        const __m256i w1 = _mm256_load_si256((const __m256i *)(tile + i * TILE_ROWS + ROW_LANES));
        for (int m = 0; m < TILE_SAMPLES; m++) {
            const __m256i a = _mm256_set1_epi32(inputs[i * TILE_SAMPLES + (size_t)m]);
            if (bits == 8) {
                part[m][0] = _mm256_add_epi32(part[m][0], _mm256_madd_epi16(w0, a));
                part[m][1] = _mm256_add_epi32(part[m][1], _mm256_madd_epi16(w1, a));
            } else {
                part[m][0] = _mm256_add_epi16(part[m][0], _mm256_maddubs_epi16(w0, a));
                part[m][1] = _mm256_add_epi16(part[m][1], _mm256_maddubs_epi16(w1, a));
            }
            IN_THIS_ORDER(part[m]);
        }
    } while (++i < lanes);
    const __m256i ones = _mm256_set1_epi16(1);
    for (int m = 0; m < TILE_SAMPLES; m++) {
        for (int v = 0; v < ROW_VECTORS; v++) {
            const __m256i sums = bits == 8 ? part[m][v] : _mm256_madd_epi16(part[m][v], ones);
            acc[m][v] = _mm256_add_epi32(acc[m][v], sums);
        }
    }
}

/* Adds the dots of any number of lanes to acc. */
INLINE void dot_tile(const int32_t *inputs, const int32_t *tile, size_t lanes, int bits,
                     Vector acc[TILE_SAMPLES][ROW_VECTORS]) {
    if (bits == 8) {
        dot_run(inputs, tile, lanes, bits, acc);
        return;
    }
    const size_t safe = safe_lanes(bits);
    for (; lanes >= safe; lanes -= safe) { /* a known length unrolls */
        dot_run(inputs, tile, safe, bits, acc);
        inputs += safe * TILE_SAMPLES;
        tile += safe * TILE_ROWS;
    }
    if (lanes) {
        dot_run(inputs, tile, lanes, bits, acc);
    }
}

#define LOAD(from) _mm256_load_si256((const __m256i *)(from))
#define REPEAT(value) _mm256_set1_epi32(value)
#define START(offset) _mm256_setzero_si256()
#define FINISH(acc, m, offset) \
    _mm256_add_epi32((m) == 4 ? _mm256_slli_epi32(acc, 2) : (acc), LOAD(offset))
#define LESS_PRODUCT(acc, a, b) _mm256_sub_epi32(acc, _mm256_mullo_epi32(a, b))
#define ADD_TERM(y, acc, step) \
    _mm256_storeu_ps(y, _mm256_add_ps(_mm256_loadu_ps(y), \
                                      _mm256_mul_ps(_mm256_cvtepi32_ps(acc), _mm256_load_ps(step))))

#endif

/* y of a tile of samples and a tile of rows. */
INLINE void multiply_tile(const Tiles *t, size_t sample_tile, int bits,
                          float y[TILE_SAMPLES][TILE_ROWS]) {
    const Product *p = t->p;
    const int32_t *inputs = t->inputs + sample_tile * t->lanes * TILE_SAMPLES;
    const int32_t *sums = t->sums + sample_tile * TILE_SAMPLES * t->spans;
    const int zero = needs_zero(p);
    memset(y, 0, sizeof(float[TILE_SAMPLES][TILE_ROWS]));
    for (size_t i = 0; i < t->spans; i++) {
        const Span span = span_at(p, i);
        const size_t start = span.start / t->per_lane;
        const size_t lanes = round_up(span.length, t->per_lane) / t->per_lane;
        const size_t at = i * TILE_ROWS;
        Vector acc[TILE_SAMPLES][ROW_VECTORS];
        for (int m = 0; m < TILE_SAMPLES; m++) {
            for (int v = 0; v < ROW_VECTORS; v++) {
                acc[m][v] = START(t->offset + at + v * ROW_LANES);
            }
        }
        dot_tile(inputs + start * TILE_SAMPLES, t->tile + start * TILE_ROWS, lanes, bits, acc);
        for (int m = 0; m < TILE_SAMPLES; m++) {
            const Vector sum = REPEAT(sums[(size_t)m * t->spans + i]);
            for (int v = 0; v < ROW_VECTORS; v++) {
                const size_t lane = at + (size_t)(v * ROW_LANES);
                Vector total = FINISH(acc[m][v], multiplier(p), t->offset + lane);
                if (zero) {
                    total = LESS_PRODUCT(total, LOAD(t->zero + lane), sum);
                }
                ADD_TERM(y[m] + v * ROW_LANES, total, t->step + lane);
            }
        }
    }
}

INLINE void multiply_rows(const Tiles *t, int bits) {
    const Product *p = t->p;
    for (size_t first = 0; first < p->rows; first += TILE_ROWS) {
        const size_t rows = smaller(TILE_ROWS, p->rows - first);
        for (size_t r = 0; r < rows; r++) {
            load_row(t, first + r, r); /* rows that are missing leave what was there: not stored */
        }
        for (size_t m = 0; m < p->samples; m += TILE_SAMPLES) {
            const size_t samples = smaller(TILE_SAMPLES, p->samples - m);
            float y[TILE_SAMPLES][TILE_ROWS];
            multiply_tile(t, m / TILE_SAMPLES, bits, y);
            for (size_t i = 0; i < samples; i++) {
                memcpy(p->y + (m + i) * p->rows + first, y[i], rows * sizeof(float));
            }
        }
    }
}

static int product_many(const Product *p) {
    Tiles t = {.p = p, .spans = span_count(p), .padded = round_up(p->columns, PACK_GROUP)};
#ifdef USE_AVX512
    t.per_lane = 4;
#else
    t.per_lane = p->scheme.bits == 8 ? 2 : 4;
#endif
    t.lanes = t.padded / t.per_lane;
    const size_t samples = round_up(p->samples, TILE_SAMPLES);
    t.inputs = workspace(samples * t.lanes, sizeof *t.inputs);
    t.sums = workspace(samples * t.spans, sizeof *t.sums);
    t.tile = workspace(t.lanes * TILE_ROWS, sizeof *t.tile);
    t.offset = workspace(t.spans * TILE_ROWS, sizeof *t.offset);
    t.zero = workspace(t.spans * TILE_ROWS, sizeof *t.zero);
    t.step = workspace(t.spans * TILE_ROWS, sizeof *t.step);
    t.codes = workspace(t.padded, sizeof *t.codes);
    t.wide = workspace(t.padded, sizeof *t.wide);
    const int failed = !t.inputs || !t.sums || !t.tile || !t.offset || !t.zero || !t.step
                       || !t.codes || !t.wide;
    if (!failed) {
        fill_inputs(&t);
        switch (p->scheme.bits) {
        case 5: multiply_rows(&t, 5); break;
        case 6: multiply_rows(&t, 6); break;
        case 8: multiply_rows(&t, 8); break;
        default: multiply_rows(&t, 4); /* 2 and 3 bits overflow no earlier */
        }
    }
    free(t.inputs);
    free(t.sums);
    free(t.tile);
    free(t.offset);
    free(t.zero);
    free(t.step);
    free(t.codes);
    free(t.wide);
    return failed ? NO_MEMORY : DONE;
}

#endif
