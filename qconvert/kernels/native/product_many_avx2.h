/* Many samples with AVX2: 16 rows at a time are unpacked into a tile, columns interleaved, so that a
 * lane of 32 bits holds a few columns of one row; see product.h for the arithmetic. Part of
 * product_x86.h.
 *
 * The tile of a long row lies in the second-level cache; all samples pass over a run of its lanes,
 * which stays in the first-level cache meanwhile, before the next run. */
#ifndef QCONVERT_PRODUCT_MANY_AVX2_H
#define QCONVERT_PRODUCT_MANY_AVX2_H

enum {
    TILE_ROWS = 16,
    TILE_SAMPLES = 4,
    ROW_LANES = 8,   /* of a vector */
    RUN_LANES = 256, /* 16 KiB of a tile */
};

/* Work space of a product with many samples. acc = m dot + offset - zero A' below 8 bits; with 8
 * bits acc = dot. */
typedef struct {
    const Product *p;
    int words;              /* whether a lane holds 2 columns in 16 bits each, for 8-bit codes, */
    size_t per_lane;        /* or 4 bytes */
    size_t spans, padded;   /* columns, to whole groups of 32 */
    size_t lanes;           /* of a row, padded */
    size_t span_lanes;      /* of a whole span: a power of two */
    size_t samples;         /* rounded up to whole tiles */
    int32_t *inputs;        /* (sample tiles, lanes, TILE_SAMPLES) */
    int32_t *sums;          /* A', (samples, spans) */
    int32_t *tile;          /* (lanes, TILE_ROWS) */
    int32_t *offset, *zero; /* (spans, TILE_ROWS) */
    float *step;            /* (spans, TILE_ROWS) */
    int32_t *open;          /* dots of a span that goes on in the next run, (samples, TILE_ROWS) */
    float *y;               /* (samples, TILE_ROWS) */
    uint8_t *codes;         /* (8 rows, padded) */
    int16_t *wide;          /* (8 rows, padded), or a line of inputs */
} Tiles;

/* --- loading ---------------------------------------------------------------------------------*/

static void fill_inputs(const Tiles *t) {
    const Product *p = t->p;
    const size_t columns = p->columns, lanes = t->lanes;
    int16_t *const restrict wide = t->wide;
    for (size_t m = 0; m < p->samples; m++) {
        const int8_t *a = p->inputs + m * columns;
        int32_t *restrict out = t->inputs + m / TILE_SAMPLES * lanes * TILE_SAMPLES
                                + m % TILE_SAMPLES;
        if (t->words) {
            const int16_t zero = (int16_t)p->zero_point;
            for (size_t i = 0; i < columns; i++) { /* the zeros behind the columns stay */
                wide[i] = (int16_t)(a[i] - zero);
            }
        } else {
            memcpy(wide, a, columns);
        }
        for (size_t i = 0; i < lanes; i++) {
            memcpy(out + i * TILE_SAMPLES, (const char *)wide + 4 * i, sizeof *out);
        }
        centred_sums(p, a, t->sums + m * t->spans);
    }
    memset(t->wide, 0, t->padded * sizeof *t->wide);
}

INLINE void subtract_zero(const uint8_t *restrict codes, size_t n, int32_t zero,
                          int16_t *restrict out) {
    for (size_t i = 0; i < n; i++) {
        out[i] = (int16_t)(codes[i] - (int16_t)zero);
    }
}

/* What the lanes of a row hold, and what goes with each of its spans: the codes, or with 8 bits k. */
static const void *load_row(const Tiles *t, size_t row, size_t r) {
    const Product *p = t->p;
    const int32_t m = multiplier(p);
    uint8_t *codes = t->codes + r % 8 * t->padded;
    int16_t *wide = t->wide + r % 8 * t->padded;
    unpack_row(p, row, codes);
    for (size_t i = 0; i < t->spans; i++) {
        const Span span = span_at(p, i);
        const int32_t zero = zero_of(p, row, span.group);
        const size_t at = i * TILE_ROWS + r;
        t->step[at] = step_of(p, row, span.group);
        if (t->words) {
            subtract_zero(codes + span.start, span.length, zero, wide + span.start);
            continue;
        }
        int32_t sum = 0;
        for (size_t c = 0; c < span.length; c++) {
            sum += codes[span.start + c];
        }
        t->offset[at] = -p->zero_point * m * sum;
        t->zero[at] = zero;
    }
    return t->words ? (const void *)wide : codes;
}

/* 8 lanes of each of 8 rows as 8 rows of each of 8 lanes. */
INLINE void transpose_lanes(const char *const rows[8], size_t lane, int32_t *out) {
    __m256i a[8], b[8];
    for (int r = 0; r < 8; r++) {
        a[r] = _mm256_loadu_si256((const __m256i *)(rows[r] + 4 * lane));
    }
    for (int r = 0; r < 8; r += 2) {
        b[r] = _mm256_unpacklo_epi32(a[r], a[r + 1]);
        b[r + 1] = _mm256_unpackhi_epi32(a[r], a[r + 1]);
    }
    for (int r = 0; r < 8; r += 4) {
        a[r] = _mm256_unpacklo_epi64(b[r], b[r + 2]);
        a[r + 1] = _mm256_unpackhi_epi64(b[r], b[r + 2]);
        a[r + 2] = _mm256_unpacklo_epi64(b[r + 1], b[r + 3]);
        a[r + 3] = _mm256_unpackhi_epi64(b[r + 1], b[r + 3]);
    }
    for (int r = 0; r < 4; r++) {
        _mm256_store_si256((__m256i *)(out + r * TILE_ROWS),
                           _mm256_permute2x128_si256(a[r], a[r + 4], 0x20));
        _mm256_store_si256((__m256i *)(out + (r + 4) * TILE_ROWS),
                           _mm256_permute2x128_si256(a[r], a[r + 4], 0x31));
    }
}

/* Rows `first` on into the tile. Of rows that are missing any will do: they are not stored. */
static void load_tile(const Tiles *t, size_t first, size_t rows) {
    for (size_t r = 0; r < rows; r += 8) {
        const char *lines[8];
        for (size_t i = 0; i < 8; i++) {
            lines[i] = r + i < rows ? load_row(t, first + r + i, r + i) : lines[0];
        }
        for (size_t lane = 0; lane < t->lanes; lane += 8) { /* 32 columns are 8 lanes or 16 */
            transpose_lanes(lines, lane, t->tile + lane * TILE_ROWS + r);
        }
    }
}

/* --- dots ------------------------------------------------------------------------------------*/

/* Sums of 4 samples, a to d, with 16 rows. Not arrays: of those GCC stores and loads every element
 * on every turn of a loop, which takes twice as long. */
typedef struct {
    __m256i a0, a1, b0, b1, c0, c1, d0, d1;
} Dots;

/* What is multiplied by w0 and w1 below comes after the sums above: left alone, GCC multiplies for all
 * samples before it adds, and runs out of registers. */
#define IN_THIS_ORDER(w0, w1, a0, a1, b0, b1) \
    __asm__("" : "+x"(w0), "+x"(w1), "+x"(a0), "+x"(a1), "+x"(b0), "+x"(b1))

#define LOAD(from) _mm256_load_si256((const __m256i *)(from))
#define STORE(to, v) _mm256_store_si256((__m256i *)(to), v)

/* Dots of 16-bit numbers. */
INLINE Dots dot_words(const int32_t *inputs, const int32_t *tile, size_t lanes, size_t ahead,
                      Dots s) {
    for (; lanes; lanes--, inputs += TILE_SAMPLES, tile += TILE_ROWS) {
        __m256i w0 = LOAD(tile), w1 = LOAD(tile + ROW_LANES);
        _mm_prefetch((const char *)(inputs + ahead), _MM_HINT_T0);
        const __m256i a = _mm256_set1_epi32(inputs[0]), b = _mm256_set1_epi32(inputs[1]);
        const __m256i c = _mm256_set1_epi32(inputs[2]), d = _mm256_set1_epi32(inputs[3]);
        s.a0 = _mm256_add_epi32(s.a0, _mm256_madd_epi16(w0, a));
        s.a1 = _mm256_add_epi32(s.a1, _mm256_madd_epi16(w1, a));
        s.b0 = _mm256_add_epi32(s.b0, _mm256_madd_epi16(w0, b));
        s.b1 = _mm256_add_epi32(s.b1, _mm256_madd_epi16(w1, b));
        IN_THIS_ORDER(w0, w1, s.a0, s.a1, s.b0, s.b1);
        s.c0 = _mm256_add_epi32(s.c0, _mm256_madd_epi16(w0, c));
        s.c1 = _mm256_add_epi32(s.c1, _mm256_madd_epi16(w1, c));
        s.d0 = _mm256_add_epi32(s.d0, _mm256_madd_epi16(w0, d));
        s.d1 = _mm256_add_epi32(s.d1, _mm256_madd_epi16(w1, d));
        IN_THIS_ORDER(w0, w1, s.c0, s.c1, s.d0, s.d1);
    }
    return s;
}

/* Lanes whose 16-bit sums of products of bytes cannot overflow: 32 * 2 * 3 * 128 = 24,576 with 2
 * bits, 16 * 2 * 7 * 128 = 28,672 with 3, 8 * 2 * 15 * 128 = 30,720 with 4, 4 * 2 * 31 * 128 =
 * 31,744 with 5, 2 * 2 * 63 * 128 = 32,256 with 6. */
INLINE size_t safe_lanes(int bits) {
    return (size_t)1 << (7 - bits);
}

/* Sums in 16 bits, two to a lane, of no more lanes than are safe. */
INLINE Dots dot_bytes(const int32_t *inputs, const int32_t *tile, size_t lanes, size_t ahead) {
    const __m256i zero = _mm256_setzero_si256();
    Dots s = {zero, zero, zero, zero, zero, zero, zero, zero};
    for (; lanes; lanes--, inputs += TILE_SAMPLES, tile += TILE_ROWS) {
        __m256i w0 = LOAD(tile), w1 = LOAD(tile + ROW_LANES);
        _mm_prefetch((const char *)(inputs + ahead), _MM_HINT_T0);
        const __m256i a = _mm256_set1_epi32(inputs[0]), b = _mm256_set1_epi32(inputs[1]);
        const __m256i c = _mm256_set1_epi32(inputs[2]), d = _mm256_set1_epi32(inputs[3]);
        s.a0 = _mm256_add_epi16(s.a0, _mm256_maddubs_epi16(w0, a));
        s.a1 = _mm256_add_epi16(s.a1, _mm256_maddubs_epi16(w1, a));
        s.b0 = _mm256_add_epi16(s.b0, _mm256_maddubs_epi16(w0, b));
        s.b1 = _mm256_add_epi16(s.b1, _mm256_maddubs_epi16(w1, b));
        IN_THIS_ORDER(w0, w1, s.a0, s.a1, s.b0, s.b1);
        s.c0 = _mm256_add_epi16(s.c0, _mm256_maddubs_epi16(w0, c));
        s.c1 = _mm256_add_epi16(s.c1, _mm256_maddubs_epi16(w1, c));
        s.d0 = _mm256_add_epi16(s.d0, _mm256_maddubs_epi16(w0, d));
        s.d1 = _mm256_add_epi16(s.d1, _mm256_maddubs_epi16(w1, d));
        IN_THIS_ORDER(w0, w1, s.c0, s.c1, s.d0, s.d1);
    }
    return s;
}

INLINE __m256i add_pairs(__m256i sum, __m256i pairs) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

INLINE Dots dot_lanes(const Tiles *t, const int32_t *inputs, const int32_t *tile, size_t lanes,
                      int words, Dots s) {
    const size_t ahead = t->lanes * TILE_SAMPLES; /* the next four samples */
    if (words) {
        return dot_words(inputs, tile, lanes, ahead, s);
    }
    const size_t safe = safe_lanes(t->p->scheme.bits);
    for (size_t i = 0; i < lanes; i += safe) {
        const Dots part = dot_bytes(inputs + i * TILE_SAMPLES, tile + i * TILE_ROWS,
                                    smaller(safe, lanes - i), ahead);
        s.a0 = add_pairs(s.a0, part.a0);
        s.a1 = add_pairs(s.a1, part.a1);
        s.b0 = add_pairs(s.b0, part.b0);
        s.b1 = add_pairs(s.b1, part.b1);
        s.c0 = add_pairs(s.c0, part.c0);
        s.c1 = add_pairs(s.c1, part.c1);
        s.d0 = add_pairs(s.d0, part.d0);
        s.d1 = add_pairs(s.d1, part.d1);
    }
    return s;
}

/* --- sums over spans --------------------------------------------------------------------------*/

/* Adds the share of a span to y, of 8 rows and one sample, whose A' is `sum`. */
INLINE void add_term(const Tiles *t, size_t at, __m256i dot, __m256i sum, __m128i shift, int words,
                     float *y) {
    if (!words) {
        const __m256i less = _mm256_mullo_epi32(LOAD(t->zero + at), sum);
        dot = _mm256_add_epi32(_mm256_sll_epi32(dot, shift), LOAD(t->offset + at));
        dot = _mm256_sub_epi32(dot, less);
    }
    const __m256 term = _mm256_mul_ps(_mm256_cvtepi32_ps(dot), _mm256_load_ps(t->step + at));
    _mm256_store_ps(y, _mm256_add_ps(_mm256_load_ps(y), term));
}

INLINE void add_terms(const Tiles *t, size_t sample, size_t span, Dots s, int words) {
    const __m128i shift = _mm_cvtsi32_si128(multiplier(t->p) == 4 ? 2 : 0);
    const int32_t *sums = t->sums + sample * t->spans + span;
    const size_t at = span * TILE_ROWS, next = at + ROW_LANES;
    float *y = t->y + sample * TILE_ROWS;
    const __m256i a = _mm256_set1_epi32(sums[0]), b = _mm256_set1_epi32(sums[t->spans]);
    const __m256i c = _mm256_set1_epi32(sums[2 * t->spans]);
    const __m256i d = _mm256_set1_epi32(sums[3 * t->spans]);
    add_term(t, at, s.a0, a, shift, words, y);
    add_term(t, next, s.a1, a, shift, words, y + ROW_LANES);
    add_term(t, at, s.b0, b, shift, words, y + TILE_ROWS);
    add_term(t, next, s.b1, b, shift, words, y + TILE_ROWS + ROW_LANES);
    add_term(t, at, s.c0, c, shift, words, y + 2 * TILE_ROWS);
    add_term(t, next, s.c1, c, shift, words, y + 2 * TILE_ROWS + ROW_LANES);
    add_term(t, at, s.d0, d, shift, words, y + 3 * TILE_ROWS);
    add_term(t, next, s.d1, d, shift, words, y + 3 * TILE_ROWS + ROW_LANES);
}

INLINE Dots load_open(const int32_t *open) {
    return (Dots){LOAD(open),      LOAD(open + 8),  LOAD(open + 16), LOAD(open + 24),
                  LOAD(open + 32), LOAD(open + 40), LOAD(open + 48), LOAD(open + 56)};
}

INLINE void store_open(int32_t *open, Dots s) {
    STORE(open, s.a0);
    STORE(open + 8, s.a1);
    STORE(open + 16, s.b0);
    STORE(open + 24, s.b1);
    STORE(open + 32, s.c0);
    STORE(open + 40, s.c1);
    STORE(open + 48, s.d0);
    STORE(open + 56, s.d1);
}

/* All samples over the lanes from `start` to `stop`: some spans, or a part of one. */
INLINE void multiply_run(const Tiles *t, size_t start, size_t stop, size_t end, int words) {
    const __m256i zero = _mm256_setzero_si256();
    const Dots none = {zero, zero, zero, zero, zero, zero, zero, zero};
    for (size_t sample = 0; sample < t->samples; sample += TILE_SAMPLES) {
        const int32_t *inputs = t->inputs + sample * t->lanes;
        int32_t *open = t->open + sample * TILE_ROWS;
        for (size_t lane = start, next; lane < stop; lane = next) {
            next = smaller(lane + t->span_lanes, stop);
            const Dots dots = dot_lanes(t, inputs + lane * TILE_SAMPLES, t->tile + lane * TILE_ROWS,
                                        next - lane, words,
                                        lane % t->span_lanes ? load_open(open) : none);
            if (next % t->span_lanes && next < end) {
                store_open(open, dots);
            } else {
                add_terms(t, sample, lane / t->span_lanes, dots, words);
            }
        }
    }
}

INLINE void multiply_rows(const Tiles *t, int words) {
    const Product *p = t->p;
    const size_t end = round_up(p->columns, t->per_lane) / t->per_lane;
    for (size_t first = 0; first < p->rows; first += TILE_ROWS) {
        const size_t rows = smaller(TILE_ROWS, p->rows - first);
        load_tile(t, first, rows);
        memset(t->y, 0, t->samples * TILE_ROWS * sizeof *t->y);
        for (size_t lane = 0; lane < end; lane += RUN_LANES) {
            multiply_run(t, lane, smaller(lane + RUN_LANES, end), end, words);
        }
        for (size_t i = 0; i < p->samples; i++) {
            memcpy(p->y + i * p->rows + first, t->y + i * TILE_ROWS, rows * sizeof *t->y);
        }
    }
}

static int product_many(const Product *p) {
    Tiles t = {.p = p, .words = p->scheme.bits == 8, .spans = span_count(p)};
    t.per_lane = t.words ? 2 : 4;
    t.padded = round_up(p->columns, PACK_GROUP);
    t.lanes = t.padded / t.per_lane;
    t.span_lanes = (p->scheme.block ? p->scheme.block : SEGMENT) / t.per_lane;
    t.samples = round_up(p->samples, TILE_SAMPLES);
    t.inputs = workspace(t.samples * t.lanes, sizeof *t.inputs);
    t.sums = workspace(t.samples * t.spans, sizeof *t.sums);
    t.tile = workspace(t.lanes * TILE_ROWS, sizeof *t.tile);
    t.offset = workspace(t.spans * TILE_ROWS, sizeof *t.offset);
    t.zero = workspace(t.spans * TILE_ROWS, sizeof *t.zero);
    t.step = workspace(t.spans * TILE_ROWS, sizeof *t.step);
    t.open = workspace(t.samples * TILE_ROWS, sizeof *t.open);
    t.y = workspace(t.samples * TILE_ROWS, sizeof *t.y);
    t.codes = workspace(8 * t.padded, sizeof *t.codes);
    t.wide = workspace(8 * t.padded, sizeof *t.wide);
    const int failed = !t.inputs || !t.sums || !t.tile || !t.offset || !t.zero || !t.step || !t.open
                       || !t.y || !t.codes || !t.wide;
    if (!failed) {
        fill_inputs(&t);
        if (t.words) {
            multiply_rows(&t, 1);
        } else {
            multiply_rows(&t, 0);
        }
    }
    free(t.inputs);
    free(t.sums);
    free(t.tile);
    free(t.offset);
    free(t.zero);
    free(t.step);
    free(t.open);
    free(t.y);
    free(t.codes);
    free(t.wide);
    return failed ? NO_MEMORY : DONE;
}

#endif
