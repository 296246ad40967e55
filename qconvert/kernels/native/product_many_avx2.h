/* Many samples with AVX2: 16 rows at a time are unpacked into a tile, columns interleaved, so that a
 * lane of 32 bits holds a few columns of one row; see product.h for the arithmetic. Part of
 * product_x86.h.
 *
 * The tile of a long row lies in the second-level cache; all samples pass over a run of its lanes,
 * which stays in the first-level cache meanwhile, before the next run. */
#ifndef QCONVERT_PRODUCT_MANY_AVX2_H
#define QCONVERT_PRODUCT_MANY_AVX2_H

#include "level_products.h"

enum {
    TILE_ROWS = 16,
    TILE_SAMPLES = 6,
    ROW_LANES = 8,   /* of a vector */
    RUN_LANES = 128, /* 8 KiB of a tile */
};

/* What a lane holds, and what acc is. */
enum kind {
    WORDS,          /* 8 bits, levels: k of 2 columns beside a - z_a; acc = dot */
    SIGNED_BYTES,   /* symmetric: k of 4 columns beside a + 128; acc = dot + offset */
    UNSIGNED_BYTES, /* asymmetric: u of 4 columns beside a; acc = 4 dot + offset - zero A' */
};

/* Work space of a product with many samples. */
typedef struct {
    const Product *p;
    const StoredLevels *levels; /* the rows, or NULL: they are those of p */
    enum kind kind;
    size_t per_lane;        /* columns */
    size_t spans, padded;   /* columns, to whole groups of 32 */
    size_t lanes;           /* of a row, padded */
    size_t span_lanes;      /* of a whole span: a power of two */
    size_t samples;         /* rounded up to whole tiles */
    int32_t *inputs;        /* (sample tiles, lanes, TILE_SAMPLES) */
    int32_t *sums;          /* A', (sample tiles, spans, TILE_SAMPLES) */
    int32_t *line;          /* A' of one sample, (spans) */
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
        int32_t *sums = t->sums + m / TILE_SAMPLES * t->spans * TILE_SAMPLES + m % TILE_SAMPLES;
        centred_sums(p, a, t->line);
        for (size_t i = 0; i < t->spans; i++) {
            sums[i * TILE_SAMPLES] = t->line[i];
        }
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
    if (t->levels) {
        level_row_products(t->levels, row, wide);
        for (size_t i = 0; i < t->spans; i++) {
            t->step[i * TILE_ROWS + r] = t->levels->unit[row];
        }
        return wide;
    }
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

/* The sums of 6 samples with 16 rows fill 12 of the 16 registers; two vectors of rows, the input of a
 * sample and a product take the other four. The loop gives them out itself: in C, GCC 12 stores and
 * loads sums on every turn. */
#define EACH_SAMPLE(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)
#define SUMS(m) __m256i first##m, second##m;

#define CLEAR(m) CLEAR_SUM("first" #m) CLEAR_SUM("second" #m)
#define CLEAR_SUM(sum) "vpxor %[" sum "], %[" sum "], %[" sum "]\n\t"

/* Adds two lanes at a time, 48 bytes of inputs, and fetches those of the next samples meanwhile. */
#define DOT_LANES(MULTIPLY, ADD)                                                             \
    __asm__ volatile(CLEAR(0) CLEAR(1) CLEAR(2) CLEAR(3) CLEAR(4) CLEAR(5)                   \
        "1:\n\tprefetcht0 (%[inputs], %[ahead])\n\t"                                         \
        DOT_LANE(MULTIPLY, ADD, "(%[tile])", "32(%[tile])", 0, 4, 8, 12, 16, 20)             \
        DOT_LANE(MULTIPLY, ADD, "64(%[tile])", "96(%[tile])", 24, 28, 32, 36, 40, 44)        \
        "add $48, %[inputs]\n\tadd $128, %[tile]\n\tsub $2, %[lanes]\n\tjnz 1b"              \
        : OUT(0), OUT(1), OUT(2), OUT(3), OUT(4), OUT(5),                                    \
          [inputs] "+r"(inputs), [tile] "+r"(tile), [lanes] "+r"(lanes)                      \
        : [ahead] "r"(ahead)                                                                 \
        : "xmm12", "xmm13", "xmm14", "xmm15", "memory", "cc")
#define OUT(m) [first##m] "=&x"(first##m), [second##m] "=&x"(second##m)
#define DOT_LANE(MULTIPLY, ADD, rows0, rows1, a0, a1, a2, a3, a4, a5)                        \
    "vmovdqa " rows0 ", %%ymm12\n\tvmovdqa " rows1 ", %%ymm13\n\t"                           \
    DOT(MULTIPLY, ADD, 0, a0) DOT(MULTIPLY, ADD, 1, a1) DOT(MULTIPLY, ADD, 2, a2)            \
    DOT(MULTIPLY, ADD, 3, a3) DOT(MULTIPLY, ADD, 4, a4) DOT(MULTIPLY, ADD, 5, a5)
#define DOT(MULTIPLY, ADD, m, at)                                                            \
    "vpbroadcastd " #at "(%[inputs]), %%ymm14\n\t"                                           \
    MULTIPLY("%%ymm12", "%%ymm15") MULTIPLY("%%ymm13", "%%ymm14")                            \
    ADD " %%ymm15, %[first" #m "], %[first" #m "]\n\t"                                       \
    ADD " %%ymm14, %[second" #m "], %[second" #m "]\n\t"
#define WORD_ROWS(rows, to) "vpmaddwd %%ymm14, " rows ", " to "\n\t"
#define UNSIGNED_ROWS(rows, to) "vpmaddubsw %%ymm14, " rows ", " to "\n\t"
#define SIGNED_ROWS(rows, to) "vpmaddubsw " rows ", %%ymm14, " to "\n\t"

/* Where the sums of a tile of samples go: while their span goes on to `dots`, in the end to y. */
typedef struct {
    const int32_t *sums;          /* A' of the span, (TILE_SAMPLES) */
    const int32_t *offset, *zero; /* of the span, (TILE_ROWS) */
    const float *step;
    int32_t *dots;                /* (TILE_SAMPLES, TILE_ROWS) */
    float *y;                     /* the same */
} Place;

/* Takes the sums of one sample and 8 rows from r on: `begins` and `ends` say whether they are of the
 * first and of the last lanes of the span, `a` is its A'. */
INLINE void take(const Place *p, size_t m, size_t r, __m256i sum, __m256i a, enum kind kind,
                 int begins, int ends) {
    const size_t i = m * TILE_ROWS + r;
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
        sum = _mm256_sub_epi32(sum, _mm256_mullo_epi32(a, LOAD(p->zero + r)));
    }
    if (kind != WORDS) {
        sum = _mm256_add_epi32(sum, LOAD(p->offset + r));
    }
    const __m256 term = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_load_ps(p->step + r));
    _mm256_store_ps(p->y + i, _mm256_add_ps(_mm256_load_ps(p->y + i), term));
}

/* `begins` and `ends` are constants: as variables GCC asks for them once a sample. */
#define TAKE(m, begins, ends)                                                                  \
    {                                                                                          \
        const __m256i a = _mm256_castps_si256(_mm256_broadcast_ss((const float *)p->sums + m)); \
        take(p, m, 0, first##m, a, kind, begins, ends);                                        \
        take(p, m, ROW_LANES, second##m, a, kind, begins, ends);                               \
    }
#define TAKE_FIRST(m) TAKE(m, 1, 0)
#define TAKE_MORE(m) TAKE(m, 0, 0)
#define TAKE_LAST(m) TAKE(m, 0, 1)
#define TAKE_ALL(m) TAKE(m, 1, 1)

/* Lanes whose 16-bit sums of products of bytes cannot overflow. Unsigned codes beside signed inputs:
 * 32 * 2 * 3 * 128 = 24,576 with 2 bits, 16 * 2 * 7 * 128 = 28,672 with 3, 8 * 2 * 15 * 128 = 30,720
 * with 4, 4 * 2 * 31 * 128 = 31,744 with 5, 2 * 2 * 63 * 128 = 32,256 with 6. Signed codes beside
 * unsigned inputs: 2 * lanes * 2^(bits - 1) * 255 = 32,640 with all. */
INLINE size_t safe_lanes(int bits) {
    return (size_t)1 << (7 - bits);
}

/* Multiplies an even number of lanes, 2 at least, which are safe where they hold bytes. */
INLINE void multiply_lanes(const int32_t *inputs, const int32_t *tile, size_t lanes, size_t ahead,
                           enum kind kind, const Place *p, int begins, int ends) {
    EACH_SAMPLE(SUMS)
    switch (kind) {
    case WORDS: DOT_LANES(WORD_ROWS, "vpaddd"); break;
    case SIGNED_BYTES: DOT_LANES(SIGNED_ROWS, "vpaddw"); break;
    case UNSIGNED_BYTES: DOT_LANES(UNSIGNED_ROWS, "vpaddw"); break;
    }
    if (ends && begins) {
        EACH_SAMPLE(TAKE_ALL)
    } else if (ends) {
        EACH_SAMPLE(TAKE_LAST)
    } else if (begins) {
        EACH_SAMPLE(TAKE_FIRST)
    } else {
        EACH_SAMPLE(TAKE_MORE)
    }
}

/* All samples over the lanes from `start` to `stop`: some spans, or a part of one. */
INLINE void multiply_run(const Tiles *t, size_t start, size_t stop, size_t end, enum kind kind,
                         size_t safe) {
    const size_t ahead = t->lanes * TILE_SAMPLES * sizeof(int32_t); /* the next samples */
    const size_t first_span = start / t->span_lanes;
    for (size_t sample = 0; sample < t->samples; sample += TILE_SAMPLES) {
        const int32_t *inputs = t->inputs + (sample * t->lanes + start * TILE_SAMPLES);
        const int32_t *tile = t->tile + start * TILE_ROWS;
        Place place = {.sums = t->sums + sample * t->spans + first_span * TILE_SAMPLES,
                       .offset = t->offset + first_span * TILE_ROWS,
                       .zero = t->zero + first_span * TILE_ROWS,
                       .step = t->step + first_span * TILE_ROWS,
                       .dots = t->dots + sample * TILE_ROWS,
                       .y = t->y + sample * TILE_ROWS};
        size_t lane = start, first = first_span * t->span_lanes;
        for (; lane < stop; first += t->span_lanes) {
            const size_t last = smaller(first + t->span_lanes, end), until = smaller(last, stop);
            while (lane < until) {
                const size_t lanes = smaller(safe, until - lane);
                multiply_lanes(inputs, tile, lanes, ahead, kind, &place, lane == first,
                               lane + lanes == last);
                inputs += lanes * TILE_SAMPLES;
                tile += lanes * TILE_ROWS;
                lane += lanes;
            }
            place.sums += TILE_SAMPLES;
            place.offset += TILE_ROWS;
            place.zero += TILE_ROWS;
            place.step += TILE_ROWS;
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

static int multiply_many(const Product *p, const StoredLevels *levels) {
    Tiles t = {.p = p, .levels = levels, .spans = span_count(p)};
    t.kind = p->scheme.bits == 8 ? WORDS : p->scheme.symmetric ? SIGNED_BYTES : UNSIGNED_BYTES;
    t.per_lane = t.kind == WORDS ? 2 : 4;
    t.padded = round_up(p->columns, PACK_GROUP);
    t.lanes = t.padded / t.per_lane;
    t.span_lanes = (p->scheme.block ? p->scheme.block : SEGMENT) / t.per_lane;
    t.samples = round_up(p->samples, TILE_SAMPLES);
    t.inputs = workspace(t.samples * t.lanes, sizeof *t.inputs);
    t.sums = workspace(t.samples * t.spans, sizeof *t.sums);
    t.line = workspace(t.spans, sizeof *t.line);
    t.tile = workspace(t.lanes * TILE_ROWS, sizeof *t.tile);
    t.offset = workspace(t.spans * TILE_ROWS, sizeof *t.offset);
    t.zero = workspace(t.spans * TILE_ROWS, sizeof *t.zero);
    t.step = workspace(t.spans * TILE_ROWS, sizeof *t.step);
    t.dots = workspace(t.samples * TILE_ROWS, sizeof *t.dots);
    t.y = workspace(t.samples * TILE_ROWS, sizeof *t.y);
    t.codes = workspace(8 * t.padded, sizeof *t.codes);
    t.wide = workspace(8 * t.padded, sizeof *t.wide);
    const int failed = !t.inputs || !t.sums || !t.line || !t.tile || !t.offset || !t.zero || !t.step || !t.dots
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
    free(t.line);
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

static int product_many(const Product *p) {
    return multiply_many(p, NULL);
}

#define MANY_LEVELS
/* Spans of levels are as blocks of 8 bits are. */
static int many_levels(const LevelProduct *p) {
    const Product like = {
        .scheme = {.bits = 8, .symmetric = 1, .block = LEVEL_SPAN},
        .rows = p->stored.rows, .columns = p->stored.columns,
        .inputs = p->inputs, .samples = p->samples, .zero_point = p->zero_point, .y = p->y,
    };
    return multiply_many(&like, &p->stored);
}

#endif
