/* Many samples with AVX-512 VNNI: 32 rows at a time are unpacked into a tile, columns interleaved, so
 * that a lane of 32 bits holds four columns of one row; see product.h for the arithmetic. Part of
 * product_x86.h. */
#ifndef QCONVERT_PRODUCT_MANY_AVX512_H
#define QCONVERT_PRODUCT_MANY_AVX512_H

enum {
    TILE_ROWS = 32,
    TILE_SAMPLES = 8,
    PER_LANE = 4,   /* columns */
    ROW_LANES = 16, /* of a vector */
};

/* Work space of a product with many samples. acc = dot + offset - zero A'. */
typedef struct {
    const Product *p;
    size_t spans, lanes;    /* of a row */
    int32_t *inputs;        /* (sample tiles, lanes, TILE_SAMPLES) */
    int32_t *sums;          /* A', (samples rounded up, spans) */
    int32_t *tile;          /* (lanes, TILE_ROWS) */
    int32_t *offset, *zero; /* (spans, TILE_ROWS) */
    float *step;            /* (spans, TILE_ROWS) */
    uint8_t *line;          /* codes of a row, or a line of inputs */
} Tiles;

/* Whether acc still lacks zero A' after the dots. */
INLINE int needs_zero(const Product *p) {
    return !p->scheme.symmetric && p->scheme.bits >= 6;
}

static void fill_inputs(const Tiles *t) {
    const Product *p = t->p;
    for (size_t m = 0; m < p->samples; m++) {
        const int8_t *a = p->inputs + m * p->columns;
        int32_t *out = t->inputs + m / TILE_SAMPLES * t->lanes * TILE_SAMPLES + m % TILE_SAMPLES;
        for (size_t i = 0; i < p->columns; i++) { /* the zeros behind the columns stay */
            t->line[i] = (uint8_t)(a[i] + 128);   /* unsigned beside signed weights */
        }
        for (size_t i = 0; i < t->lanes; i++) {
            memcpy(out + i * TILE_SAMPLES, t->line + PER_LANE * i, sizeof *out);
        }
        centred_sums(p, a, t->sums + m * t->spans);
    }
}

/* What a row's lanes hold, and the offset and zero that go with it, by span.
 *
 * Signed bytes k1 = m u - base beside inputs a + 128. For symmetric codes and up to 5 bits base is Z
 * and k1 is k: |4u - z| <= 127. Otherwise base is 128 and Z - 128 is left as zero. The sum of
 * k1 (a - z_a) is that of k1 (a + 128) less (128 + z_a) times that of k1; both below 2^30, since
 * 256 * 128 * 16,384 = 2^29. */
static void load_row(const Tiles *t, size_t row, size_t r) {
    const Product *p = t->p;
    const int32_t m = multiplier(p);
    unpack_row(p, row, t->line);
    for (size_t i = 0; i < t->spans; i++) {
        const Span span = span_at(p, i);
        const int32_t zero = zero_of(p, row, span.group);
        const int32_t base = needs_zero(p) ? 128 : zero;
        const size_t at = i * TILE_ROWS + r;
        uint8_t *codes = t->line + span.start;
        int32_t sum = 0;
        for (size_t c = 0; c < span.length; c++) {
            const int8_t k = (int8_t)(m * codes[c] - base);
            sum += k;
            codes[c] = (uint8_t)k;
        }
        t->step[at] = step_of(p, row, span.group);
        t->offset[at] = -(128 + p->zero_point) * sum;
        t->zero[at] = zero - base;
    }
    int32_t *out = t->tile + r;
    for (size_t i = 0; i < t->lanes; i++) {
        memcpy(out + i * TILE_ROWS, t->line + PER_LANE * i, sizeof *out);
    }
}

/* Adds the share of a span to y, of 16 rows and one sample, whose A' is `sum`. */
INLINE void add_term(const Tiles *t, size_t at, __m512i dot, int32_t sum, int lacks_zero,
                     float *y) {
    if (lacks_zero) {
        const __m512i zero = _mm512_load_si512(t->zero + at);
        dot = _mm512_sub_epi32(dot, _mm512_mullo_epi32(zero, _mm512_set1_epi32(sum)));
    }
    const __m512 term = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_load_ps(t->step + at));
    _mm512_storeu_ps(y, _mm512_add_ps(_mm512_loadu_ps(y), term));
}

/* The sums of a tile have names: elements of an array GCC may copy on every turn of the loop. */
#define EACH_SAMPLE(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7)
#define START(m) __m512i first##m = first, second##m = second;
#define DOT(m)                                                          \
    {                                                                   \
        const __m512i a = _mm512_set1_epi32(inputs[m]);                 \
        first##m = _mm512_dpbusd_epi32(first##m, a, w0);                \
        second##m = _mm512_dpbusd_epi32(second##m, a, w1);              \
    }
#define FINISH(m)                                                                               \
    add_term(t, at, first##m, sums[(size_t)m * t->spans + i], lacks_zero, y[m]);                \
    add_term(t, at + ROW_LANES, second##m, sums[(size_t)m * t->spans + i], lacks_zero,          \
             y[m] + ROW_LANES);

/* y of a tile of samples and a tile of rows. */
INLINE void multiply_tile(const Tiles *t, size_t sample_tile, float y[TILE_SAMPLES][TILE_ROWS]) {
    const Product *p = t->p;
    const int32_t *sums = t->sums + sample_tile * TILE_SAMPLES * t->spans;
    const int lacks_zero = needs_zero(p);
    memset(y, 0, sizeof(float[TILE_SAMPLES][TILE_ROWS]));
    for (size_t i = 0; i < t->spans; i++) {
        const Span span = span_at(p, i);
        const size_t start = span.start / PER_LANE, at = i * TILE_ROWS;
        const size_t lanes = round_up(span.length, PER_LANE) / PER_LANE;
        const int32_t *inputs = t->inputs + (sample_tile * t->lanes + start) * TILE_SAMPLES;
        const int32_t *tile = t->tile + start * TILE_ROWS;
        const __m512i first = _mm512_load_si512(t->offset + at);
        const __m512i second = _mm512_load_si512(t->offset + at + ROW_LANES);
        EACH_SAMPLE(START)
        for (size_t lane = 0; lane < lanes; lane++) {
            const __m512i w0 = _mm512_load_si512(tile), w1 = _mm512_load_si512(tile + ROW_LANES);
            EACH_SAMPLE(DOT)
            inputs += TILE_SAMPLES;
            tile += TILE_ROWS;
        }
        EACH_SAMPLE(FINISH)
    }
}

static void multiply_rows(const Tiles *t) {
    const Product *p = t->p;
    for (size_t first = 0; first < p->rows; first += TILE_ROWS) {
        const size_t rows = smaller(TILE_ROWS, p->rows - first);
        for (size_t r = 0; r < rows; r++) {
            load_row(t, first + r, r); /* rows that are missing leave what was there: not stored */
        }
        for (size_t m = 0; m < p->samples; m += TILE_SAMPLES) {
            const size_t samples = smaller(TILE_SAMPLES, p->samples - m);
            float y[TILE_SAMPLES][TILE_ROWS];
            multiply_tile(t, m / TILE_SAMPLES, y);
            for (size_t i = 0; i < samples; i++) {
                memcpy(p->y + (m + i) * p->rows + first, y[i], rows * sizeof(float));
            }
        }
    }
}

static int product_many(const Product *p) {
    const size_t padded = round_up(p->columns, PACK_GROUP);
    const size_t samples = round_up(p->samples, TILE_SAMPLES);
    Tiles t = {.p = p, .spans = span_count(p), .lanes = padded / PER_LANE};
    t.inputs = workspace(samples * t.lanes, sizeof *t.inputs);
    t.sums = workspace(samples * t.spans, sizeof *t.sums);
    t.tile = workspace(t.lanes * TILE_ROWS, sizeof *t.tile);
    t.offset = workspace(t.spans * TILE_ROWS, sizeof *t.offset);
    t.zero = workspace(t.spans * TILE_ROWS, sizeof *t.zero);
    t.step = workspace(t.spans * TILE_ROWS, sizeof *t.step);
    t.line = workspace(padded, sizeof *t.line);
    const int failed = !t.inputs || !t.sums || !t.tile || !t.offset || !t.zero || !t.step
                       || !t.line;
    if (!failed) {
        fill_inputs(&t);
        multiply_rows(&t);
    }
    free(t.inputs);
    free(t.sums);
    free(t.tile);
    free(t.offset);
    free(t.zero);
    free(t.step);
    free(t.line);
    return failed ? NO_MEMORY : DONE;
}

#endif
