/* Values to codes of integer levels with signed steps and back: ../reference/levels.py, section 11. */
#ifndef QCONVERT_LEVELS_H
#define QCONVERT_LEVELS_H

#include "columns.h"
#include "level_code.h"
#include "statistics.h"

enum { LONGEST_LEVEL_BLOCK = 32, MOST_LEVELS = 16 };

/* How levels are found for whole numbers -128..127, their places. */
typedef struct {
    int16_t least;                                       /* the level of the lowest place */
    int16_t middles[MOST_LEVELS - 1][BATCH];             /* places above have the next level, */
    int16_t steps[MOST_LEVELS - 1][BATCH];               /* so much further up; as rows of 16 */
#ifdef USE_AVX2
    int binned;                     /* whether no eight places in a row hold two middles: then */
    int8_t below[32], middle[32];   /* middles below eight places, and the one among them or 127 */
    int8_t levels[MOST_LEVELS];
#endif
} LevelTable;

/* The middle between two levels, rounded down: a place above it is nearer to the upper one. */
INLINE int middle_below(const int8_t *levels, int k, int shift) {
    const int sum = levels[k] + levels[k + 1];
    return (sum - (sum & 1)) / 2 + shift;
}

static void set_level_table(LevelTable *t, LevelCode code, int shift) {
    const int middles = level_count(code) - 1;
    t->least = (int16_t)(code.levels[0] + shift);
    for (int k = 0; k < MOST_LEVELS - 1; k++) {
        const int there = k < middles;
        const int middle = there ? middle_below(code.levels, k, shift) : INT16_MAX;
        for (int j = 0; j < BATCH; j++) {
            t->middles[k][j] = (int16_t)middle;
            t->steps[k][j] = (int16_t)(there ? code.levels[k + 1] - code.levels[k] : 0);
        }
    }
#ifdef USE_AVX2
    t->binned = 1;
    for (int k = 0; k < MOST_LEVELS; k++) {
        t->levels[k] = (int8_t)(k <= middles ? code.levels[k] + shift : 0);
    }
    for (int bin = 0; bin < 32; bin++) {
        const int low = 8 * bin - 128;
        int within = 0;
        t->below[bin] = 0;
        t->middle[bin] = 127;
        for (int k = 0; k < middles; k++) {
            const int middle = t->middles[k][0];
            t->below[bin] = (int8_t)(t->below[bin] + (middle < low));
            if (middle >= low && middle < low + 7) {
                t->middle[bin] = (int8_t)middle;
                within++;
            }
        }
        t->binned &= within < 2;
    }
#endif
}

/* 16 blocks side by side; weights are those of all of them. */
typedef struct {
    size_t length;
    float values[LONGEST_LEVEL_BLOCK * BATCH];
    float weighted[LONGEST_LEVEL_BLOCK * BATCH]; /* values times weights, with weights only */
    const float *weights;                        /* (length), or NULL */
} LevelColumns;

/* Sums of values and of squares by the levels of the places values * inverse, each column's from its
 * first value to its last, with comparisons. */
INLINE void level_sums_compared(const LevelColumns *c, const float inverse[BATCH],
                                const LevelTable *t, int weighted, float *restrict a,
                                float *restrict b) {
    const float magic = 12582912.0f; /* as in round_small */
    const int32_t zero = (int32_t)bits_of(magic), low = zero - 128, top = zero + 127;
    int16_t places[LONGEST_LEVEL_BLOCK * BATCH], levels[LONGEST_LEVEL_BLOCK * BATCH];
    for (size_t i = 0; i < c->length * BATCH; i += BATCH) {
        int32_t sums[BATCH];
        for (int j = 0; j < BATCH; j++) {
            sums[j] = (int32_t)bits_of(c->values[i + (size_t)j] * inverse[j] + magic);
        }
        for (int j = 0; j < BATCH; j++) {
            int32_t sum = sums[j] > low ? sums[j] : low;
            sum = sum < top ? sum : top;
            places[i + (size_t)j] = (int16_t)(sum - zero);
        }
    }
    for (size_t i = 0; i < c->length * BATCH; i += BATCH) {
        for (int j = 0; j < BATCH; j++) {
            const int16_t place = places[i + (size_t)j];
            int16_t level = t->least;
            for (int k = 0; k < MOST_LEVELS - 1; k++) {
                level = (int16_t)(level + (-(place > t->middles[k][j]) & t->steps[k][j]));
            }
            levels[i + (size_t)j] = level;
        }
    }
    const float *x = weighted ? c->weighted : c->values;
    memset(a, 0, BATCH * sizeof *a);
    memset(b, 0, BATCH * sizeof *b);
    for (size_t i = 0; i < c->length; i++) {
        const float w = weighted ? c->weights[i] : 1.0f;
        EACH_COLUMN {
            const float q = (float)levels[i * BATCH + (size_t)j];
            a[j] += x[i * BATCH + (size_t)j] * q;
            b[j] += weighted ? q * q * w : q * q;
        }
    }
}

APART void plain_sums_compared(const LevelColumns *c, const float inverse[BATCH],
                               const LevelTable *t, float a[BATCH], float b[BATCH]) {
    level_sums_compared(c, inverse, t, 0, a, b);
}

APART void weighted_sums_compared(const LevelColumns *c, const float inverse[BATCH],
                                  const LevelTable *t, float a[BATCH], float b[BATCH]) {
    level_sums_compared(c, inverse, t, 1, a, b);
}

#ifdef USE_AVX2

/* The same by look-ups of bytes. */
INLINE void level_sums_looked_up(const LevelColumns *c, const float inverse[BATCH],
                                 const LevelTable *t, int weighted, float a[BATCH],
                                 float b[BATCH]) {
#define TWICE(at) _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(at)))
    const __m256i below0 = TWICE(t->below), below1 = TWICE(t->below + 16);
    const __m256i middle0 = TWICE(t->middle), middle1 = TWICE(t->middle + 16);
    const __m256i levels = TWICE(t->levels);
#undef TWICE
    const __m256i sign = _mm256_set1_epi8(-128), five = _mm256_set1_epi8(31);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256 inverses[2] = {_mm256_loadu_ps(inverse), _mm256_loadu_ps(inverse + 8)};
    const float *other = weighted ? c->weighted : c->values;
    __m256 sum_a[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    __m256 sum_b[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (size_t i = 0; i < c->length; i += 2) { /* two lines of 16 at once */
        __m256 x[4];
        __m256i wide[4];
        for (int k = 0; k < 4; k++) {
            x[k] = _mm256_loadu_ps(c->values + i * BATCH + 8 * k);
            wide[k] = _mm256_cvtps_epi32(_mm256_mul_ps(x[k], inverses[k & 1]));
        }
        const __m256i places = _mm256_packs_epi16(_mm256_packs_epi32(wide[0], wide[1]),
                                                  _mm256_packs_epi32(wide[2], wide[3]));
        const __m256i above = _mm256_xor_si256(places, sign); /* 0..255 */
        const __m256i bin = _mm256_and_si256(_mm256_srli_epi16(above, 3), five);
        const __m256i below = _mm256_blendv_epi8(_mm256_shuffle_epi8(below0, bin),
                                                 _mm256_shuffle_epi8(below1, bin), above);
        const __m256i middle = _mm256_blendv_epi8(_mm256_shuffle_epi8(middle0, bin),
                                                  _mm256_shuffle_epi8(middle1, bin), above);
        const __m256i code = _mm256_sub_epi8(below, _mm256_cmpgt_epi8(places, middle));
        const __m256i q = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(levels, code), order);
        const __m128i low = _mm256_castsi256_si128(q), high = _mm256_extracti128_si256(q, 1);
        const __m128i parts[4] = {low, _mm_srli_si128(low, 8), high, _mm_srli_si128(high, 8)};
        for (int k = 0; k < 4; k++) {
            const __m256 level = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(parts[k]));
            const __m256 value = weighted ? _mm256_loadu_ps(other + i * BATCH + 8 * k) : x[k];
            __m256 square = _mm256_mul_ps(level, level);
            if (weighted) {
                square = _mm256_mul_ps(square, _mm256_set1_ps(c->weights[i + (size_t)k / 2]));
            }
            sum_a[k & 1] = _mm256_add_ps(sum_a[k & 1], _mm256_mul_ps(value, level));
            sum_b[k & 1] = _mm256_add_ps(sum_b[k & 1], square);
        }
    }
    for (int k = 0; k < 2; k++) {
        _mm256_storeu_ps(a + 8 * k, sum_a[k]);
        _mm256_storeu_ps(b + 8 * k, sum_b[k]);
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
    return weighted ? weighted_sums_compared : plain_sums_compared;
}

/* --- searching steps --------------------------------------------------------------------------*/

/* What there is of 16 blocks so far. */
typedef struct {
    float step[BATCH], shift[BATCH], gain[BATCH];
} LevelBest;

APART void load_level_columns(const float *const rows[BATCH], size_t length, const float *weights,
                              LevelColumns *c) {
    c->length = length;
    c->weights = weights;
    load_columns(rows, length, c->values);
    for (size_t i = 0; weights && i < length; i++) {
        EACH_COLUMN {
            c->weighted[i * BATCH + (size_t)j] = weights[i] * c->values[i * BATCH + (size_t)j];
        }
    }
}

/* The value of each column that is furthest from 0, the negative one of two equals. */
APART void furthest_of_columns(const LevelColumns *c, float peak[BATCH]) {
    float low[BATCH], high[BATCH];
    memcpy(low, c->values, sizeof low);
    memcpy(high, c->values, sizeof high);
    for (size_t i = 1; i < c->length; i++) {
        EACH_COLUMN {
            const float v = c->values[i * BATCH + (size_t)j];
            low[j] = v < low[j] ? v : low[j];
            high[j] = v > high[j] ? v : high[j];
        }
    }
    EACH_COLUMN {
        peak[j] = high[j] > -low[j] ? high[j] : low[j];
    }
}

/* The first and the last step of one sign to be tried, without the sign; returns how many there are
 * at most. */
APART int window_of(const LevelCode *code, int shift, int negative, const float peak[BATCH],
                    const float unit[BATCH], float first[BATCH], float last[BATCH]) {
    static const float nearest[] = {[2] = 0.5625f, [3] = 0.8125f, [4] = 0.875f};
    static const float furthest[] = {[2] = 1.125f, [3] = 1.125f, [4] = 1.4375f};
    const float near = nearest[code->bits], far = furthest[code->bits];
    const float lower = (float)-(code->levels[0] + shift);
    const float upper = (float)(code->levels[level_count(*code) - 1] + shift);
    const float top = (float)((1 << (code->step_bits - 1)) - !negative);
    float most = 0;
    EACH_COLUMN {
        const float end = (peak[j] < 0) != negative ? lower : upper;
        const float size = from_bits(bits_of(peak[j]) & 0x7FFFFFFF);
        const float place = unit[j] > 0 ? size / (unit[j] * end) : 0.0f;
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

static void search_steps(const LevelColumns *c, const LevelCode *code, const LevelTable tables[2],
                         const float unit[BATCH], LevelBest *best) {
    float peak[BATCH];
    memset(best, 0, sizeof *best);
    furthest_of_columns(c, peak);
    for (int k = 0; k < (code->shift ? 2 : 1); k++) {
        const int shift = k ? code->shift : 0;
        LevelSums *sums_of = level_sums_for(tables + k, c->weights != NULL);
        for (int negative = 0; negative < 2; negative++) {
            float first[BATCH], last[BATCH];
            const int count = window_of(code, shift, negative, peak, unit, first, last);
            for (int i = 0; i < count; i++) {
                float step[BATCH], scale[BATCH], inverse[BATCH], a[BATCH], b[BATCH];
                EACH_COLUMN {
                    const float next = first[j] + (float)i;
                    const float size = next < last[j] ? next : last[j];
                    step[j] = negative ? -size : size;
                    scale[j] = unit[j] * step[j];
                    inverse[j] = 1.0f / scale[j];
                }
                sums_of(c, inverse, tables + k, a, b);
                keep_better_step(step, (float)shift, scale, a, b, best);
            }
        }
    }
}

/* --- rows -------------------------------------------------------------------------------------*/

/* The steps of `n` rows, at most 16, as stored. */
static void search_level_rows(const LevelRows *task, const LevelTable tables[2], size_t row,
                              size_t n) {
    const LevelCode *code = &task->code;
    const size_t blocks = level_blocks(*code, task->columns);
    const float half = (float)(1 << (code->step_bits - 1));
    float unit[BATCH], tail[BATCH][LONGEST_LEVEL_BLOCK];
    for (size_t j = 0; j < BATCH; j++) {
        unit[j] = task->unit[row + (j < n ? j : 0)];
    }
    for (size_t g = 0; g < blocks; g++) {
        const size_t at = g * code->block, real = smaller(code->block, task->columns - at);
        const float *rows[BATCH];
        LevelColumns c;
        LevelBest best;
        for (size_t j = 0; j < BATCH; j++) {
            rows[j] = task->x + (row + (j < n ? j : 0)) * task->columns + at;
            if (real < code->block) {
                memset(tail[j], 0, sizeof tail[j]);
                memcpy(tail[j], rows[j], real * sizeof *tail[j]);
                rows[j] = tail[j];
            }
        }
        load_level_columns(rows, code->block, task->weights ? task->weights + at : NULL, &c);
        search_steps(&c, code, tables, unit, &best);
        for (size_t j = 0; j < n; j++) {
            const float stored = best.step[j] + half + (best.shift[j] > 0 ? 2 * half : 0.0f);
            task->steps[(row + j) * blocks + g] = (uint8_t)stored;
        }
    }
}

/* How the codes of a block are made, and what they mean. */
typedef struct {
    int middles;                     /* middles between levels */
    float inverse;                   /* from values to places */
    float middle[MOST_LEVELS];       /* of the levels as shifted */
    float value[MOST_LEVELS];
} LevelRule;

INLINE LevelRule level_rule(const LevelCode *code, float scale, int shift) {
    LevelRule rule = {.middles = level_count(*code) - 1,
                      .inverse = scale != 0.0f ? 1.0f / scale : 0.0f};
    const int8_t *levels = code->levels;
    for (int k = 0; k < MOST_LEVELS; k++) { /* what lies behind the last level is never used */
        const int next = levels[k + 1 < MOST_LEVELS ? k + 1 : k];
        rule.middle[k] = (float)(levels[k] + next) / 2.0f + (float)shift;
        rule.value[k] = (float)(levels[k] + shift) * scale;
    }
    return rule;
}

#ifdef USE_AVX2

/* 16 codes and what they decode to. */
INLINE void encode_sixteen(const float *x, const LevelRule *rule, int32_t *codes, float *decoded) {
    const __m256 low = _mm256_loadu_ps(rule->value), high = _mm256_loadu_ps(rule->value + 8);
    const __m256 inverse = _mm256_set1_ps(rule->inverse);
    const __m256 v0 = _mm256_mul_ps(_mm256_loadu_ps(x), inverse);
    const __m256 v1 = _mm256_mul_ps(_mm256_loadu_ps(x + 8), inverse);
    __m256i code[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int k = 0; k < rule->middles; k++) {
        const __m256 middle = _mm256_set1_ps(rule->middle[k]);
        const __m256 above0 = _mm256_cmp_ps(v0, middle, _CMP_GT_OQ);
        const __m256 above1 = _mm256_cmp_ps(v1, middle, _CMP_GT_OQ);
        code[0] = _mm256_sub_epi32(code[0], _mm256_castps_si256(above0));
        code[1] = _mm256_sub_epi32(code[1], _mm256_castps_si256(above1));
    }
    for (int i = 0; i < 2; i++) { /* bit 3 of a code, as a sign, chooses the half of the table */
        const __m256 half = _mm256_castsi256_ps(_mm256_slli_epi32(code[i], 28));
        const __m256 value = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code[i]),
                                              _mm256_permutevar8x32_ps(high, code[i]), half);
        _mm256_storeu_ps(decoded + 8 * i, value);
        _mm256_storeu_si256((__m256i *)(codes + 8 * i), code[i]);
    }
}

#else

INLINE void encode_sixteen(const float *restrict x, const LevelRule *restrict rule,
                           int32_t *restrict codes, float *restrict decoded) {
    float places[LANES];
    int32_t above[LANES] = {0};
    EACH_COLUMN {
        places[j] = x[j] * rule->inverse;
    }
    for (int k = 0; k < rule->middles; k++) {
        EACH_COLUMN {
            above[j] += places[j] > rule->middle[k];
        }
    }
    for (int j = 0; j < LANES; j++) {
        codes[j] = above[j];
        decoded[j] = rule->value[above[j]];
    }
}

#endif

/* A row to stored codes, by its stored steps. `codes` and `decoded` have room for its padding. */
static void encode_level_row(const LevelRows *task, size_t row, int32_t *codes, float *decoded) {
    const LevelCode *code = &task->code;
    const size_t columns = task->columns, padded = level_row(columns);
    const size_t blocks = level_blocks(*code, columns);
    const float *x = task->x + row * columns;
    const int half = 1 << (code->step_bits - 1);
    for (size_t g = 0; g < blocks; g++) {
        const int stored = task->steps[row * blocks + g];
        const float scale = task->unit[row] * (float)((stored & (2 * half - 1)) - half);
        const LevelRule rule = level_rule(code, scale, stored >= 2 * half ? code->shift : 0);
        for (size_t at = g * code->block; at < (g + 1) * code->block; at += LANES) {
            float tail[LANES] = {0};
            if (at + LANES > columns && at < columns) {
                memcpy(tail, x + at, (columns - at) * sizeof *tail);
            }
            encode_sixteen(at + LANES > columns ? tail : x + at, &rule, codes + at, decoded + at);
        }
    }
    for (size_t i = columns; i < padded; i++) {
        codes[i] = 0;
    }
    pack_wide(codes, padded / PACK_GROUP, code->bits,
              task->codes + row * packed_bytes(padded, code->bits));
}

static int levels_encode(const LevelRows *task, Errors *found) {
    const size_t columns = task->columns;
    int32_t *codes = malloc(level_row(columns) * sizeof *codes);
    float *decoded = malloc(level_row(columns) * sizeof *decoded);
    const int failed = !codes || !decoded;
    if (!failed) {
        LevelTable tables[2];
        ErrorLanes lanes = {0};
        WeightedLanes weighted = {0};
        set_level_table(tables, task->code, 0);
        set_level_table(tables + 1, task->code, task->code.shift);
        for (size_t r = 0; r < task->rows; r += BATCH) {
            const size_t n = smaller(BATCH, task->rows - r);
            search_level_rows(task, tables, r, n);
            for (size_t j = 0; j < n; j++) {
                const float *x = task->x + (r + j) * columns;
                encode_level_row(task, r + j, codes, decoded);
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
    return failed ? NO_MEMORY : DONE;
}

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
