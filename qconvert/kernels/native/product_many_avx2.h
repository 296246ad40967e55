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
    TILE_SAMPLES = 6,
    ROW_LANES = 8,   /* of a vector */
    RUN_LANES = 128, /* 8 KiB of a tile */
};

/* What a lane holds, and what acc is. */
enum kind {
    WORDS,          /* 8 bits: k of 2 columns beside a - z_a; acc = dot */
    SIGNED_BYTES,   /* symmetric: k of 4 columns beside a + 128; acc = dot + offset */
    UNSIGNED_BYTES, /* asymmetric: u of 4 columns beside a; acc = 4 dot + offset - zero A' */
};

/* Work space of a product with many samples. */
typedef struct {
    const Product *p;
    enum kind kind;
    size_t per_lane;        /* columns */
    size_t spans, padded;   /* columns, to whole groups of 32 */
    size_t lanes;           /* of a row, padded */
    size_t span_lanes;      /* of a whole span: a power of two */
    size_t samples;         /* rounded up to whole tiles */
    int32_t *inputs;        /* (sample tiles, lanes, TILE_SAMPLES) */
    int32_t *sums;          /* A', (samples, spans) */
    int32_t *tile;          /* (lanes, TILE_ROWS) */
    int32_t *offset, *zero; /* (spans, TILE_ROWS) */
    float *step;            /* (spans, TILE_ROWS) */
    int32_t *dots;          /* of a span that may go on in the next run, (samples, TILE_ROWS) */
    float *y;               /* (samples, TILE_ROWS) */
    uint8_t *codes;         /* (8 rows, padded) */
    int16_t *wide;          /* (8 rows, padded), or a line of inputs */
} Tiles;

/* --- loading ---------------------------------------------------------------------------------*/

static void fill_inputs(const Tiles *t) {
    const Product *p = t->p;
    const size_t columns = p->columns, lanes = t->lanes;
    int16_t *const restrict wide = t->wide;
    uint8_t *const restrict bytes = t->codes;
    const uint8_t base = t->kind == SIGNED_BYTES ? 128 : 0;
    const void *line = t->kind == WORDS ? (const void *)wide : bytes;
    for (size_t m = 0; m < p->samples; m++) {
        const int8_t *a = p->inputs + m * columns;
        int32_t *restrict out = t->inputs + m / TILE_SAMPLES * lanes * TILE_SAMPLES
                                + m % TILE_SAMPLES;
        if (t->kind == WORDS) {
            const int16_t zero = (int16_t)p->zero_point;
            for (size_t i = 0; i < columns; i++) { /* the zeros behind the columns stay */
                wide[i] = (int16_t)(a[i] - zero);
            }
        } else {
            for (size_t i = 0; i < columns; i++) {
                bytes[i] = (uint8_t)(a[i] + base);
            }
        }
        for (size_t i = 0; i < lanes; i++) {
            memcpy(out + i * TILE_SAMPLES, (const char *)line + 4 * i, sizeof *out);
        }
        centred_sums(p, a, t->sums + m * t->spans);
    }
    memset(t->wide, 0, t->padded * sizeof *t->wide);
    memset(t->codes, 0, t->padded);
}

INLINE void subtract_zero(const uint8_t *restrict codes, size_t n, int32_t zero,
                          int16_t *restrict out) {
    for (size_t i = 0; i < n; i++) {
        out[i] = (int16_t)(codes[i] - (int16_t)zero);
    }
}

/* Subtracts the centre from codes; the sum of what is left. */
INLINE int32_t subtract_centre(uint8_t *codes, size_t n, uint8_t centre) {
    int32_t sum = 0;
    for (size_t i = 0; i < n; i++) {
        codes[i] = (uint8_t)(codes[i] - centre);
        sum += (int8_t)codes[i];
    }
    return sum;
}

/* What the lanes of a row hold, and what goes with each of its spans. With A' over a - z_a, the sum
 * of k (a - z_a) is that of k (a + 128) less (128 + z_a) times that of k, or 4 times that of u a,
 * less 4 z_a times that of u, less zero A'. All stay below 2^31: 63 * 128 * 16,384 < 2^27. */
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
        if (t->kind == WORDS) {
            subtract_zero(codes + span.start, span.length, zero, wide + span.start);
            continue;
        }
        const int centred = t->kind == SIGNED_BYTES;
        const int32_t sum = subtract_centre(codes + span.start, span.length,
                                            centred ? (uint8_t)zero : 0);
        t->offset[at] = centred ? -(128 + p->zero_point) * sum : -p->zero_point * m * sum;
        t->zero[at] = zero;
    }
    return t->kind == WORDS ? (const void *)wide : codes;
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

#define LOAD(from) _mm256_load_si256((const __m256i *)(from))
#define STORE(to, v) _mm256_store_si256((__m256i *)(to), v)

/* The sums of 6 samples with 16 rows have names and fill 12 registers of 16: elements of an array GCC
 * stores and loads on every turn of a loop, which takes twice as long. */
#define EACH_SAMPLE(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)
#define START(m) __m256i first##m = _mm256_setzero_si256(), second##m = first##m;

/* What is multiplied comes after the sums before it: left alone, GCC multiplies for all samples
 * before it adds, and runs out of registers. */
#define IN_THIS_ORDER(m) \
    __asm__("" : "+x"(w0), "+x"(w1), "+x"(first##m), "+x"(second##m))

#define DOT_WORDS(m)                                                        \
    {                                                                       \
        const __m256i a = _mm256_set1_epi32(inputs[m]);                     \
        first##m = _mm256_add_epi32(first##m, _mm256_madd_epi16(w0, a));    \
        second##m = _mm256_add_epi32(second##m, _mm256_madd_epi16(w1, a));  \
        IN_THIS_ORDER(m);                                                   \
    }
#define DOT_UNSIGNED(m)                                                       \
    {                                                                         \
        const __m256i a = _mm256_set1_epi32(inputs[m]);                       \
        first##m = _mm256_add_epi16(first##m, _mm256_maddubs_epi16(w0, a));   \
        second##m = _mm256_add_epi16(second##m, _mm256_maddubs_epi16(w1, a)); \
        IN_THIS_ORDER(m);                                                     \
    }
#define DOT_SIGNED(m)                                                         \
    {                                                                         \
        const __m256i a = _mm256_set1_epi32(inputs[m]);                       \
        first##m = _mm256_add_epi16(first##m, _mm256_maddubs_epi16(a, w0));   \
        second##m = _mm256_add_epi16(second##m, _mm256_maddubs_epi16(a, w1)); \
        IN_THIS_ORDER(m);                                                     \
    }

/* Adds two lanes at a time, 48 bytes of inputs, and fetches those of the next samples meanwhile. */
#define DOT_LANES(DO)                                                  \
    for (; lanes; lanes -= 2) {                                        \
        _mm_prefetch((const char *)(inputs + ahead), _MM_HINT_T0);     \
        DOT_LANE(DO)                                                   \
        DOT_LANE(DO)                                                   \
    }
#define DOT_LANE(DO)                                               \
    {                                                              \
        __m256i w0 = LOAD(tile), w1 = LOAD(tile + ROW_LANES);      \
        EACH_SAMPLE(DO)                                            \
        inputs += TILE_SAMPLES;                                    \
        tile += TILE_ROWS;                                         \
    }

/* Where the sums of a tile of samples go: while their span goes on to `dots`, in the end to y. */
typedef struct {
    const Tiles *t;
    size_t at;            /* of the span in offset, zero and step */
    const int32_t *sums;  /* A' of the span, a sample every `spans` */
    int32_t *dots;        /* (TILE_SAMPLES, TILE_ROWS) */
    float *y;
    int begins, ends;     /* whether these lanes are the first and the last of the span */
} Place;

/* Takes the sums of one sample and 8 rows from r on. */
INLINE void take(const Place *p, size_t m, size_t r, __m256i sum, enum kind kind, int begins,
                 int ends) {
    const Tiles *t = p->t;
    const size_t at = p->at + r, i = m * TILE_ROWS + r;
    if (kind != WORDS) {
        sum = _mm256_madd_epi16(sum, _mm256_set1_epi16(kind == SIGNED_BYTES ? 1 : 4));
    }
    if (!begins) {
        sum = _mm256_add_epi32(sum, LOAD(p->dots + i));
    }
    if (!ends) {
        STORE(p->dots + i, sum);
        return;
    }
    if (kind == UNSIGNED_BYTES) {
        const __m256i a = _mm256_set1_epi32(p->sums[m * t->spans]);
        sum = _mm256_sub_epi32(sum, _mm256_mullo_epi32(LOAD(t->zero + at), a));
    }
    if (kind != WORDS) {
        sum = _mm256_add_epi32(sum, LOAD(t->offset + at));
    }
    const __m256 term = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_load_ps(t->step + at));
    _mm256_store_ps(p->y + i, _mm256_add_ps(_mm256_load_ps(p->y + i), term));
}

#define TAKE(m)                                                 \
    take(p, m, 0, first##m, kind, begins, ends);                \
    take(p, m, ROW_LANES, second##m, kind, begins, ends);

/* Lanes whose 16-bit sums of products of bytes cannot overflow. Unsigned codes beside signed inputs:
 * 32 * 2 * 3 * 128 = 24,576 with 2 bits, 16 * 2 * 7 * 128 = 28,672 with 3, 8 * 2 * 15 * 128 = 30,720
 * with 4, 4 * 2 * 31 * 128 = 31,744 with 5, 2 * 2 * 63 * 128 = 32,256 with 6. Signed codes beside
 * unsigned inputs: 2 * lanes * 2^(bits - 1) * 255 = 32,640 with all. */
INLINE size_t safe_lanes(int bits) {
    return (size_t)1 << (7 - bits);
}

/* Multiplies an even number of lanes, which are safe where they hold bytes. */
INLINE void multiply_lanes(const int32_t *inputs, const int32_t *tile, size_t lanes, size_t ahead,
                           enum kind kind, const Place *p) {
    EACH_SAMPLE(START)
    switch (kind) {
    case WORDS: DOT_LANES(DOT_WORDS) break;
    case SIGNED_BYTES: DOT_LANES(DOT_SIGNED) break;
    case UNSIGNED_BYTES: DOT_LANES(DOT_UNSIGNED) break;
    }
    const int begins = p->begins, ends = p->ends;
    EACH_SAMPLE(TAKE)
}

/* All samples over the lanes from `start` to `stop`: some spans, or a part of one. */
INLINE void multiply_run(const Tiles *t, size_t start, size_t stop, size_t end, enum kind kind,
                         size_t safe) {
    const size_t ahead = t->lanes * TILE_SAMPLES; /* the next samples */
    for (size_t sample = 0; sample < t->samples; sample += TILE_SAMPLES) {
        const int32_t *inputs = t->inputs + sample * t->lanes;
        Place place = {.t = t, .dots = t->dots + sample * TILE_ROWS, .y = t->y + sample * TILE_ROWS};
        for (size_t lane = start, next; lane < stop; lane = next) {
            const size_t span = lane / t->span_lanes;
            const size_t first = span * t->span_lanes, last = smaller(first + t->span_lanes, end);
            next = smaller(lane + safe, smaller(last, stop));
            place.at = span * TILE_ROWS;
            place.sums = t->sums + sample * t->spans + span;
            place.begins = lane == first;
            place.ends = next == last;
            multiply_lanes(inputs + lane * TILE_SAMPLES, t->tile + lane * TILE_ROWS, next - lane,
                           ahead, kind, &place);
        }
    }
}

INLINE void multiply_rows(const Tiles *t, enum kind kind) {
    const Product *p = t->p;
    const size_t end = round_up(p->columns, 2 * t->per_lane) / t->per_lane; /* blocks end there */
    const size_t safe = kind == WORDS ? RUN_LANES : safe_lanes(p->scheme.bits);
    for (size_t first = 0; first < p->rows; first += TILE_ROWS) {
        const size_t rows = smaller(TILE_ROWS, p->rows - first);
        load_tile(t, first, rows);
        memset(t->y, 0, t->samples * TILE_ROWS * sizeof *t->y);
        for (size_t lane = 0; lane < end; lane += RUN_LANES) {
            multiply_run(t, lane, smaller(lane + RUN_LANES, end), end, kind, safe);
        }
        for (size_t i = 0; i < p->samples; i++) {
            memcpy(p->y + i * p->rows + first, t->y + i * TILE_ROWS, rows * sizeof *t->y);
        }
    }
}

static int product_many(const Product *p) {
    Tiles t = {.p = p, .spans = span_count(p)};
    t.kind = p->scheme.bits == 8 ? WORDS : p->scheme.symmetric ? SIGNED_BYTES : UNSIGNED_BYTES;
    t.per_lane = t.kind == WORDS ? 2 : 4;
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
    t.dots = workspace(t.samples * TILE_ROWS, sizeof *t.dots);
    t.y = workspace(t.samples * TILE_ROWS, sizeof *t.y);
    t.codes = workspace(8 * t.padded, sizeof *t.codes);
    t.wide = workspace(8 * t.padded, sizeof *t.wide);
    const int failed = !t.inputs || !t.sums || !t.tile || !t.offset || !t.zero || !t.step || !t.dots
                       || !t.y || !t.codes || !t.wide;
    if (!failed) {
        fill_inputs(&t);
        switch (t.kind) {
        case WORDS: multiply_rows(&t, WORDS); break;
        case SIGNED_BYTES: multiply_rows(&t, SIGNED_BYTES); break;
        case UNSIGNED_BYTES: multiply_rows(&t, UNSIGNED_BYTES); break;
        }
    }
    free(t.inputs);
    free(t.sums);
    free(t.tile);
    free(t.offset);
    free(t.zero);
    free(t.step);
    free(t.dots);
    free(t.y);
    free(t.codes);
    free(t.wide);
    return failed ? NO_MEMORY : DONE;
}

#endif
