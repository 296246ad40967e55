/* Values to codes of integer levels with steps and back: ../reference/levels.py, section 11. */
#ifndef QCONVERT_LEVELS_H
#define QCONVERT_LEVELS_H

#include "columns.h"
#include "level_code.h"
#include "statistics.h"

enum { LONGEST_LEVEL_BLOCK = 32, LOWEST_PLACE = 128, FINEST_PLACES = 4 };

/* How levels are found for whole numbers -128..127, their places, or parts of them. */
typedef struct {
    int fine;                    /* parts of a place that a search tells apart, 1 or 4 */
    float level[2 * LOWEST_PLACE * FINEST_PLACES]; /* by these, from the lowest: nearest levels */
    uint8_t code[4 * LOWEST_PLACE]; /* by halves of places: codes of the nearest levels, */
    int8_t of_code[MOST_LEVELS];    /* and by codes: levels */
#ifdef USE_AVX2
    int binned;                       /* whether look-ups of bytes find levels: then */
    int8_t below[16];                 /* by 16 places, as signed: middles below all of them, */
    int8_t first[16], second[16];     /* and those among them, or 127; */
    int8_t half_below[32], half_middle[32]; /* by 8 places: the same of one middle, in halves; */
    uint8_t magnitude[16];            /* by codes: magnitudes of levels, */
    uint8_t float2[16], float3[16];   /* and the upper half of levels as binary32 */
#endif
} LevelTable;

#ifdef USE_AVX2

/* The middle between two levels, rounded down: a place above it is nearer to the upper one. */
INLINE int middle_below(const int8_t *levels, int k, int shift) {
    const int sum = levels[k] + levels[k + 1];
    return (sum - (sum & 1)) / 2 + shift;
}

/* The tables of bytes of a LevelTable: of 16 levels at most, not too close to each other. */
static void set_level_bins(LevelTable *t, LevelCode code, int shift) {
    const int middles = level_count(code) - 1;
    t->binned = middles < 16 && code.levels[0] + shift >= -127; /* two squares fit 16 bits */
    if (!t->binned) {
        return;
    }
    for (int k = 0; k < 16; k++) {
        const int level = t->of_code[k];
        const uint32_t bits = bits_of((float)level); /* the lower half is 0 */
        t->magnitude[k] = (uint8_t)(level < 0 ? -level : level);
        t->float2[k] = (uint8_t)(bits >> 16);
        t->float3[k] = (uint8_t)(bits >> 24);
    }
    for (int bin = 0; bin < 16; bin++) {
        const int low = bin < 8 ? 16 * bin : 16 * bin - 256;
        int among = 0;
        t->below[bin] = 0;
        t->first[bin] = t->second[bin] = 127;
        for (int k = 0; k < middles; k++) {
            const int middle = middle_below(code.levels, k, shift);
            t->below[bin] = (int8_t)(t->below[bin] + (middle < low));
            if (middle >= low && middle < low + 15) {
                *(among ? &t->second[bin] : &t->first[bin]) = (int8_t)middle;
                among++;
            }
        }
        t->binned &= among <= 2;
    }
    for (int bin = 0; bin < 32; bin++) {
        const int low = bin < 16 ? 16 * bin : 16 * bin - 512; /* in halves */
        int among = 0;
        t->half_below[bin] = 0;
        t->half_middle[bin] = 127;
        for (int k = 0; k < middles; k++) {
            const int twice = code.levels[k] + code.levels[k + 1];
            t->half_below[bin] = (int8_t)(t->half_below[bin] + (twice < low));
            if (twice >= low && twice < low + 15) {
                t->half_middle[bin] = (int8_t)(twice - low);
                among++;
            }
        }
        t->binned &= among <= 1;
    }
}

#endif

/* Whether so many parts of a place, of which `fine` make one, are above the middle of two levels. */
INLINE int is_above_middle(const LevelTable *t, int k, int parts, int fine) {
    return 2 * parts > fine * (t->of_code[k] + t->of_code[k + 1]);
}

static void set_level_table(LevelTable *t, LevelCode code, int shift) {
    const int last = level_count(code) - 1;
    t->fine = code.bits > 4 ? FINEST_PLACES : 1;
    for (int k = 0; k < MOST_LEVELS; k++) {
        t->of_code[k] = (int8_t)(k <= last ? code.levels[k] + shift : 0);
    }
    for (int i = 0, k = 0; i < 4 * LOWEST_PLACE; i++) {
        while (k < last && is_above_middle(t, k, i - 2 * LOWEST_PLACE, 2)) {
            k++;
        }
        t->code[i] = (uint8_t)k;
    }
    for (int i = 0, k = 0; i < 2 * LOWEST_PLACE * t->fine; i++) {
        while (k < last && is_above_middle(t, k, i - LOWEST_PLACE * t->fine, t->fine)) {
            k++;
        }
        t->level[i] = (float)t->of_code[k];
    }
#ifdef USE_AVX2
    set_level_bins(t, code, shift);
#endif
}

/* 16 blocks side by side. */
typedef struct {
    _Alignas(64) float values[LONGEST_LEVEL_BLOCK * BATCH]; /* no load crosses lines of cache */
    float weights[LONGEST_LEVEL_BLOCK * BATCH];  /* with weights only, */
    float weighted[LONGEST_LEVEL_BLOCK * BATCH]; /* like these: values times weights */
    size_t length;
    int has_weights;
} LevelColumns;

/* Sums of values and of squares by the levels of the places values * inverse, each column's from its
 * first value to its last. */
INLINE void level_sums_by_place(const LevelColumns *c, const float inverse[BATCH],
                                const LevelTable *t, int weighted, float *restrict a,
                                float *restrict b) {
    const float magic = 12582912.0f; /* as in round_small */
    const int32_t zero = (int32_t)bits_of(magic), low = zero - LOWEST_PLACE * t->fine;
    const int32_t top = zero + LOWEST_PLACE * t->fine - 1;
    const float *x = weighted ? c->weighted : c->values;
    memset(a, 0, BATCH * sizeof *a);
    memset(b, 0, BATCH * sizeof *b);
    for (size_t i = 0; i < c->length * BATCH; i += BATCH) {
        int32_t places[BATCH];
        float levels[BATCH];
        EACH_COLUMN {
            const int32_t sum = (int32_t)bits_of(c->values[i + (size_t)j] * inverse[j] + magic);
            const int32_t above = sum > low ? sum : low;
            places[j] = (above < top ? above : top) - low;
        }
        for (int j = 0; j < BATCH; j++) {
            levels[j] = t->level[places[j]];
        }
        EACH_COLUMN {
            const float q = levels[j];
            a[j] += x[i + (size_t)j] * q;
            b[j] += weighted ? q * q * c->weights[i + (size_t)j] : q * q;
        }
    }
}

APART void plain_sums_by_place(const LevelColumns *c, const float inverse[BATCH],
                               const LevelTable *t, float a[BATCH], float b[BATCH]) {
    level_sums_by_place(c, inverse, t, 0, a, b);
}

APART void weighted_sums_by_place(const LevelColumns *c, const float inverse[BATCH],
                                  const LevelTable *t, float a[BATCH], float b[BATCH]) {
    level_sums_by_place(c, inverse, t, 1, a, b);
}

#ifdef USE_AVX2

#define TWICE(at) _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(at)))

/* The same by look-ups of bytes, 8 columns of four lines at once. */
INLINE void level_sums_looked_up(const LevelColumns *c, const float inverse[BATCH],
                                 const LevelTable *t, int weighted, float a[BATCH],
                                 float b[BATCH]) {
    const __m256i below = TWICE(t->below), first = TWICE(t->first), second = TWICE(t->second);
    const __m256i float2 = TWICE(t->float2), float3 = TWICE(t->float3);
    const __m256i magnitudes = TWICE(t->magnitude), four = _mm256_set1_epi8(15);
    const __m256i zero = _mm256_setzero_si256(), one = _mm256_set1_epi16(1);
    /* From four lines one after the other to fours of a column. */
    const __m256i fours = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    for (size_t half = 0; half < BATCH; half += 8) {
        const __m256 inverses = _mm256_loadu_ps(inverse + half);
        __m256 sum_a = _mm256_setzero_ps(), sum_b = _mm256_setzero_ps();
        __m256i squares = zero; /* exact: as floats they would not be rounded either */
        for (size_t i = half; i < c->length * BATCH; i += 4 * BATCH) {
            __m256i wide[4];
            for (int k = 0; k < 4; k++) {
                const __m256 x = _mm256_loadu_ps(c->values + i + BATCH * k);
                wide[k] = _mm256_cvtps_epi32(_mm256_mul_ps(x, inverses));
            }
            const __m256i places = _mm256_packs_epi16(_mm256_packs_epi32(wide[0], wide[1]),
                                                      _mm256_packs_epi32(wide[2], wide[3]));
            const __m256i bin = _mm256_and_si256(_mm256_srli_epi16(places, 4), four);
            const __m256i code = _mm256_sub_epi8(
                _mm256_sub_epi8(_mm256_shuffle_epi8(below, bin),
                                _mm256_cmpgt_epi8(places, _mm256_shuffle_epi8(first, bin))),
                _mm256_cmpgt_epi8(places, _mm256_shuffle_epi8(second, bin)));
            const __m256i low = _mm256_shuffle_epi8(float2, code);
            const __m256i high = _mm256_shuffle_epi8(float3, code);
            const __m256i halves[2] = {_mm256_unpacklo_epi8(low, high),
                                       _mm256_unpackhi_epi8(low, high)};
            for (int k = 0; k < 4; k++) {
                const __m256 level = _mm256_castsi256_ps(
                    k & 1 ? _mm256_unpackhi_epi16(zero, halves[k / 2])
                          : _mm256_unpacklo_epi16(zero, halves[k / 2]));
                const float *values = weighted ? c->weighted : c->values;
                const __m256 value = _mm256_loadu_ps(values + i + BATCH * k);
                sum_a = _mm256_add_ps(sum_a, _mm256_mul_ps(value, level));
                if (weighted) {
                    const __m256 weight = _mm256_loadu_ps(c->weights + i + BATCH * k);
                    const __m256 square = _mm256_mul_ps(_mm256_mul_ps(level, level), weight);
                    sum_b = _mm256_add_ps(sum_b, square);
                }
            }
            if (!weighted) {
                const __m256i of =
                    _mm256_shuffle_epi8(magnitudes, _mm256_shuffle_epi8(code, fours));
                squares = _mm256_add_epi32(
                    squares, _mm256_madd_epi16(_mm256_maddubs_epi16(of, of), one));
            }
        }
        _mm256_storeu_ps(a + half, sum_a);
        _mm256_storeu_ps(b + half, weighted ? sum_b : _mm256_cvtepi32_ps(squares));
    }
}

APART void plain_sums_looked_up(const LevelColumns *c, const float inverse[BATCH],
                                const LevelTable *t, float a[BATCH], float b[BATCH]) {
    level_sums_looked_up(c, inverse, t, 0, a, b);
}

APART void weighted_sums_looked_up(const LevelColumns *c, const float inverse[BATCH],
                                   const LevelTable *t, float a[BATCH], float b[BATCH]) {
    level_sums_looked_up(c, inverse, t, 1, a, b);
}

#endif

typedef void LevelSums(const LevelColumns *c, const float inverse[BATCH], const LevelTable *t,
                       float a[BATCH], float b[BATCH]);

INLINE LevelSums *level_sums_for(const LevelTable *t, int weighted) {
#ifdef USE_AVX2
    if (t->binned) {
        return weighted ? weighted_sums_looked_up : plain_sums_looked_up;
    }
#endif
    (void)t;
    return weighted ? weighted_sums_by_place : plain_sums_by_place;
}

/* --- searching steps --------------------------------------------------------------------------*/

/* What there is of 16 blocks so far. */
typedef struct {
    float step[BATCH], shift[BATCH], gain[BATCH];
} LevelBest;

APART void load_level_columns(const float *const rows[BATCH], const float *const weights[BATCH],
                              size_t length, LevelColumns *c) {
    c->length = length;
    c->has_weights = weights[0] != NULL;
    load_columns(rows, length, c->values);
    if (c->has_weights) {
        load_columns(weights, length, c->weights);
        for (size_t i = 0; i < length * BATCH; i++) {
            c->weighted[i] = c->weights[i] * c->values[i];
        }
    }
}

/* The value that is furthest from 0, the negative one of two equals: magnitudes with the signs as
 * their lowest bits are in that order. `n` is a multiple of 8. */
INLINE float furthest_of(const float *x, size_t n) {
#ifdef USE_AVX2
    __m256i most = _mm256_setzero_si256();
    for (size_t i = 0; i < n; i += 8) {
        const __m256i bits = _mm256_loadu_si256((const __m256i *)(x + i));
        const __m256i sign = _mm256_srli_epi32(bits, 31);
        most = _mm256_max_epu32(most, _mm256_or_si256(_mm256_slli_epi32(bits, 1), sign));
    }
    __m128i few = _mm_max_epu32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    few = _mm_max_epu32(few, _mm_shuffle_epi32(few, 0x4E));
    few = _mm_max_epu32(few, _mm_shuffle_epi32(few, 0xB1));
    const uint32_t found = (uint32_t)_mm_cvtsi128_si32(few);
#else
    uint32_t found = 0;
    for (size_t i = 0; i < n; i++) {
        const uint32_t bits = bits_of(x[i]), turned = bits << 1 | bits >> 31;
        found = turned > found ? turned : found;
    }
#endif
    return from_bits(found >> 1 | found << 31);
}

/* The first and the last step of one sign to be tried, without the sign; returns how many there are
 * at most. */
APART int window_of(const LevelCode *code, int shift, int negative, const float peak[BATCH],
                    const float unit[BATCH], float first[BATCH], float last[BATCH]) {
    static const float nearest[] = {[2] = 0.5625f, [3] = 0.8125f, [4] = 0.875f, [5] = 0.9375f,
                                    [6] = 0.96875f};
    static const float furthest[] = {[2] = 1.125f, [3] = 1.125f, [4] = 1.4375f, [5] = 1.75f,
                                     [6] = 1.75f};
    const float near = nearest[code->bits], far = furthest[code->bits];
    const float lower = (float)-(code->levels[0] + shift);
    const float upper = (float)(code->levels[level_count(*code) - 1] + shift);
    const float top = (float)(negative ? -lowest_step(*code) : highest_step(*code));
    float most = 0;
    EACH_COLUMN {
        const float end = (peak[j] < 0) != negative ? lower : upper;
        const float size = from_bits(bits_of(peak[j]) & 0x7FFFFFFF);
        const float place = unit[j] > 0 && end > 0 ? size / (unit[j] * end) : 0.0f;
        first[j] = code_of(place * near, 1.0f, top);
        last[j] = code_of(place * far, 1.0f, top);
    }
    for (int j = 0; j < BATCH; j++) {
        most = last[j] - first[j] > most ? last[j] - first[j] : most;
    }
    return (int)most + 1;
}

/* Without a branch, which would be taken at random. */
INLINE float either(int condition, float yes, float no) {
    const uint32_t mask = 0u - (uint32_t)condition;
    return from_bits((bits_of(yes) & mask) | (bits_of(no) & ~mask));
}

APART void keep_better_step(const float step[BATCH], float shift, const float scale[BATCH],
                            const float a[BATCH], const float b[BATCH], LevelBest *best) {
    EACH_COLUMN {
        const float gain = scale[j] * ((a[j] + a[j]) - scale[j] * b[j]);
        const int better = gain > best->gain[j];
        best->step[j] = either(better, step[j], best->step[j]);
        best->shift[j] = either(better, shift, best->shift[j]);
        best->gain[j] = either(better, gain, best->gain[j]);
    }
}

static void search_steps(const LevelColumns *c, const LevelCode *code, const LevelTable *tables,
                         const float peak[BATCH], const float unit[BATCH], LevelBest *best) {
    memset(best, 0, sizeof *best);
    for (int k = 0; k < level_shifts(*code); k++) {
        const int shift = k * code->shift;
        LevelSums *sums_of = level_sums_for(tables + k, c->has_weights);
        for (int negative = 0; negative < (lowest_step(*code) < 0 ? 2 : 1); negative++) {
            float first[BATCH], last[BATCH];
            const int count = window_of(code, shift, negative, peak, unit, first, last);
            for (int i = 0; i < count; i++) {
                float step[BATCH], scale[BATCH], inverse[BATCH], a[BATCH], b[BATCH];
                EACH_COLUMN {
                    const float next = first[j] + (float)i;
                    const float size = next < last[j] ? next : last[j];
                    step[j] = negative ? -size : size;
                    scale[j] = unit[j] * step[j];
                    inverse[j] = (float)tables->fine / scale[j];
                }
                sums_of(c, inverse, tables + k, a, b);
                keep_better_step(step, (float)shift, scale, a, b, best);
            }
        }
    }
}

/* --- rows -------------------------------------------------------------------------------------*/

/* Blocks that are put in order at once: those of 4096 columns of 16 rows. */
enum { SORTED_BLOCKS = 4096, BUCKETS = 256 };

/* Blocks of rows one after the other, of which some are put in order. */
typedef struct {
    const LevelRows *task;
    size_t per_row, first_row;
    size_t first, n;                       /* at most SORTED_BLOCKS */
    uint16_t row[SORTED_BLOCKS];           /* of each of them, above the first */
    uint16_t order[SORTED_BLOCKS + BATCH]; /* behind them the last one is over again */
    float peak[SORTED_BLOCKS];             /* the value that is furthest from 0 */
} LevelBlocks;

/* A block that follows others in its row, with zeros behind the end of the row. */
INLINE const float *level_block_at(const LevelRows *task, size_t row, size_t at, float *tail) {
    const float *found = task->x + row * task->columns + at;
    if (task->columns - at >= task->code.block) {
        return found;
    }
    memset(tail, 0, LONGEST_LEVEL_BLOCK * sizeof *tail);
    memcpy(tail, found, (task->columns - at) * sizeof *tail);
    return tail;
}

/* Puts blocks in an order in which neighbours have about as many steps to be tried: by the sign of
 * the furthest value, and how far it is. */
static void sort_blocks(LevelBlocks *b) {
    const LevelRows *task = b->task;
    const size_t block = task->code.block;
    /* Steps are at most so many, and the levels at their end are about 127. */
    const float end = 127.0f / (float)(BUCKETS / 2 >> (task->code.step_bits - 1));
    uint8_t bucket[SORTED_BLOCKS];
    uint16_t starts[BUCKETS + 1] = {0};
    size_t row = b->first / b->per_row, at = b->first % b->per_row * block;
    for (size_t k = 0; k < b->n; k++) {
        float tail[LONGEST_LEVEL_BLOCK];
        const float peak = furthest_of(level_block_at(task, row, at, tail), block);
        const uint32_t bits = bits_of(peak), negative = bits >> 31;
        const float place = from_bits(bits & 0x7FFFFFFF) / (task->unit[row] * end);
        const uint32_t within = place < BUCKETS / 2 - 1 ? (uint32_t)place : BUCKETS / 2 - 1;
        bucket[k] = (uint8_t)(within + negative * (BUCKETS / 2));
        starts[bucket[k] + 1]++;
        b->peak[k] = peak;
        b->row[k] = (uint16_t)(row - b->first_row);
        at += block;
        if (at >= task->columns) {
            row++;
            at = 0;
        }
    }
    for (int i = 0; i < BUCKETS; i++) {
        starts[i + 1] = (uint16_t)(starts[i + 1] + starts[i]);
    }
    for (size_t k = 0; k < b->n; k++) {
        b->order[starts[bucket[k]]++] = (uint16_t)k;
    }
    for (size_t k = b->n; k < b->n + BATCH; k++) {
        b->order[k] = b->order[b->n - 1];
    }
}

/* 16 blocks side by side. */
static void gather_blocks(const LevelBlocks *b, const uint16_t chosen[BATCH], LevelColumns *c,
                          float peak[BATCH], float unit[BATCH]) {
    const LevelRows *task = b->task;
    const float *rows[BATCH], *weights[BATCH];
    float tail[BATCH][LONGEST_LEVEL_BLOCK];
    for (size_t j = 0; j < BATCH; j++) {
        const size_t row = b->first_row + b->row[chosen[j]];
        const size_t at = (b->first + chosen[j] - row * b->per_row) * task->code.block;
        rows[j] = level_block_at(task, row, at, tail[j]);
        weights[j] = task->weights ? task->weights + at : NULL;
        peak[j] = b->peak[chosen[j]];
        unit[j] = task->unit[row];
    }
    load_level_columns(rows, weights, task->code.block, c);
}

/* The steps of blocks as stored. Those with as many steps to be tried are searched side by side: the
 * longest search of 16 is that of all of them. */
static void search_blocks(LevelBlocks *b, const LevelTable *tables) {
    const LevelCode *code = &b->task->code;
    const float lowest = (float)lowest_step(*code), steps = (float)(1 << code->step_bits);
    const float shift = code->shift ? (float)code->shift : 1.0f;
    LevelColumns c;
    sort_blocks(b);
    for (size_t k = 0; k < b->n; k += BATCH) {
        const uint16_t *chosen = b->order + k;
        float peak[BATCH], unit[BATCH];
        LevelBest best;
        gather_blocks(b, chosen, &c, peak, unit);
        search_steps(&c, code, tables, peak, unit, &best);
        for (int j = 0; j < BATCH; j++) {
            const float stored = best.step[j] - lowest + steps * (best.shift[j] / shift);
            b->task->steps[b->first + chosen[j]] = (uint8_t)stored;
        }
    }
}

/* 16 codes and what they decode to; `plain` is the table without a shift. A value is above a middle
 * if twice its place, rounded up, is above twice the middle, which is a whole number. */
INLINE void encode_sixteen(const float *restrict x, const LevelTable *restrict plain, float scale,
                           int shift, uint8_t *restrict codes, float *restrict decoded) {
    const float inverse = scale != 0.0f ? 1.0f / scale : 0.0f;
    int32_t halves[LANES], levels[LANES];
    EACH_COLUMN {
        const float place = x[j] * inverse, twice = place + place;
        const float above = twice > -256.0f ? twice : -256.0f;
        const float within = above < 255.0f ? above : 255.0f;
        const int32_t whole = (int32_t)within;
        const int32_t half = whole + ((float)whole < within) - 2 * shift;
        halves[j] = (half > -256 ? half : -256) + 256;
    }
    for (int j = 0; j < LANES; j++) {
        codes[j] = plain->code[halves[j]];
        levels[j] = plain->of_code[codes[j]];
    }
    EACH_COLUMN {
        decoded[j] = (float)(levels[j] + shift) * scale;
    }
}

#ifdef USE_AVX2

/* The same of 32 by look-ups of bytes: those of two halves, each with a scale and a shift. */
INLINE void encode_looked_up(const float *x, const LevelTable *t, const float scales[2],
                             const int shifts[2], uint8_t *codes, float *decoded) {
    const __m256i sign = _mm256_set1_epi8(-128);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i bins[2], rests[2];
    for (int h = 0; h < 2; h++) {
        const __m256 inverse = _mm256_set1_ps(scales[h] != 0.0f ? 1.0f / scales[h] : 0.0f);
        __m256i wide[2];
        for (int k = 0; k < 2; k++) {
            const __m256 place = _mm256_mul_ps(_mm256_loadu_ps(x + 16 * h + 8 * k), inverse);
            const __m256 twice = _mm256_ceil_ps(_mm256_add_ps(place, place));
            wide[k] = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_set1_ps(255.0f), twice));
        }
        __m256i halves = _mm256_packs_epi32(wide[0], wide[1]);
        halves = _mm256_subs_epi16(halves, _mm256_set1_epi16((int16_t)(2 * shifts[h])));
        halves = _mm256_max_epi16(halves, _mm256_set1_epi16(-256));
        bins[h] = _mm256_srai_epi16(halves, 4);
        rests[h] = _mm256_and_si256(halves, _mm256_set1_epi16(15));
    }
    const __m256i bin = _mm256_packs_epi16(bins[0], bins[1]); /* -16..15: of a byte that is */
    const __m256i other = _mm256_xor_si256(bin, sign);        /* negative look-ups make 0 */
    const __m256i rest = _mm256_packs_epi16(rests[0], rests[1]);
    const __m256i below = _mm256_or_si256(_mm256_shuffle_epi8(TWICE(t->half_below), bin),
                                          _mm256_shuffle_epi8(TWICE(t->half_below + 16), other));
    const __m256i middle = _mm256_or_si256(_mm256_shuffle_epi8(TWICE(t->half_middle), bin),
                                           _mm256_shuffle_epi8(TWICE(t->half_middle + 16), other));
    const __m256i code = _mm256_permutevar8x32_epi32(
        _mm256_sub_epi8(below, _mm256_cmpgt_epi8(rest, middle)), order);
    const __m256i shift = _mm256_set_m128i(_mm_set1_epi8((int8_t)shifts[1]),
                                           _mm_set1_epi8((int8_t)shifts[0]));
    int8_t levels[PACK_GROUP];
    _mm256_storeu_si256((__m256i *)codes, code);
    _mm256_storeu_si256((__m256i *)levels,
                        _mm256_add_epi8(_mm256_shuffle_epi8(TWICE(t->of_code), code), shift));
    for (int k = 0; k < 4; k++) {
        const __m256i level = _mm256_cvtepi8_epi32(_mm_loadl_epi64((__m128i *)(levels + 8 * k)));
        _mm256_storeu_ps(decoded + 8 * k, _mm256_mul_ps(_mm256_cvtepi32_ps(level),
                                                        _mm256_set1_ps(scales[k / 2])));
    }
}

#endif

/* A row to stored codes, by its stored steps; `plain` is the table without a shift. `codes` and
 * `decoded` have room for its padding. */
static void encode_level_row(const LevelRows *task, const LevelTable *plain, size_t row,
                             uint8_t *codes, float *decoded) {
    const LevelCode *code = &task->code;
    const size_t columns = task->columns, padded = level_row(columns);
    const size_t blocks = level_blocks(*code, columns);
    const float *x = task->x + row * columns;
    const int steps = 1 << code->step_bits;
    for (size_t at = 0; at < padded; at += PACK_GROUP) {
        float tail[PACK_GROUP], scales[2];
        const float *from = x + at;
        int shifts[2];
        for (size_t h = 0; h < 2; h++) { /* behind the last block it is over again */
            const size_t block = smaller((at + 16 * h) / code->block, blocks - 1);
            const int stored = task->steps[row * blocks + block];
            scales[h] = task->unit[row] * (float)((stored & (steps - 1)) + lowest_step(*code));
            shifts[h] = (stored >> code->step_bits) * code->shift;
        }
        if (at + PACK_GROUP > columns) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, from, (columns - at) * sizeof *tail);
            from = tail;
        }
#ifdef USE_AVX2
        if (plain->binned) {
            encode_looked_up(from, plain, scales, shifts, codes + at, decoded + at);
            continue;
        }
#endif
        for (size_t h = 0; h < 2; h++) {
            encode_sixteen(from + 16 * h, plain, scales[h], shifts[h], codes + at + 16 * h,
                           decoded + at + 16 * h);
        }
    }
    memset(codes + columns, 0, padded - columns);
    pack(codes, padded / PACK_GROUP, code->bits,
         task->codes + row * packed_bytes(padded, code->bits));
}

static int levels_encode(const LevelRows *task, Errors *found) {
    const size_t columns = task->columns, blocks = level_blocks(task->code, columns);
    const size_t strip = blocks < SORTED_BLOCKS ? SORTED_BLOCKS / blocks : 1; /* rows */
    const int shifts = level_shifts(task->code);
    LevelTable *tables = malloc((size_t)shifts * sizeof *tables);
    LevelBlocks *some = malloc(sizeof *some);
    uint8_t *codes = malloc(level_row(columns));
    float *decoded = malloc(level_row(columns) * sizeof *decoded);
    const int failed = !codes || !decoded || !some || !tables;
    if (!failed) {
        ErrorLanes lanes = {0};
        WeightedLanes weighted = {0};
        for (int k = 0; k < shifts; k++) {
            set_level_table(tables + k, task->code, k * task->code.shift);
        }
        for (size_t r = 0; r < task->rows; r += strip) {
            const size_t end = smaller(r + strip, task->rows);
            for (size_t k = r * blocks; k < end * blocks; k += SORTED_BLOCKS) {
                some->task = task;
                some->per_row = blocks;
                some->first_row = r;
                some->first = k;
                some->n = smaller(SORTED_BLOCKS, end * blocks - k);
                search_blocks(some, tables);
            }
            for (size_t row = r; row < end; row++) {
                const float *x = task->x + row * columns;
                encode_level_row(task, tables, row, codes, decoded);
                add_errors(&lanes, x, decoded, columns);
                if (task->mean_square) {
                    add_weighted_errors(&weighted, task->mean_square, x, decoded, columns);
                }
            }
        }
        finish_errors(&lanes, found);
        found->weighted_signal = fold_wide(weighted.signal);
        found->weighted_noise = fold_wide(weighted.noise);
    }
    free(codes);
    free(decoded);
    free(some);
    free(tables);
    return failed ? NO_MEMORY : DONE;
}

#ifdef USE_AVX2
#undef TWICE
#endif

static void levels_decode(const StoredLevels *s, float *restrict out) {
    const LevelCode *code = &s->code;
    const size_t padded = level_row(s->columns), blocks = level_blocks(*code, s->columns);
    const uint8_t *packed = s->packed;
    for (size_t r = 0; r < s->rows; r++) {
        for (size_t at = 0; at < padded; at += PACK_GROUP, packed += 4 * code->bits) {
            uint8_t codes[PACK_GROUP];
            unpack(packed, 1, code->bits, codes);
            for (size_t i = 0; i < PACK_GROUP && at + i < s->columns; i += code->block) {
                const size_t block = r * blocks + (at + i) / code->block;
                const size_t n = smaller(code->block, s->columns - at - i);
                const float scale = s->unit[r] * (float)s->steps[block];
                float values[MOST_LEVELS];
                for (int k = 0; k < level_count(*code); k++) {
                    values[k] = (float)(code->levels[k] + s->shifts[block]) * scale;
                }
                for (size_t e = 0; e < n; e++) {
                    out[r * s->columns + at + i + e] = values[codes[i + e]];
                }
            }
        }
    }
}

#endif
