/* What the searches for the scales of K-quants share, section 8: the arithmetic of
 * ../reference/ggml/k_columns.py.
 *
 * 16 sub-blocks lie side by side as columns: of one super-block, or of two where they are 8. */
#ifndef QCONVERT_GGML_K_COLUMNS_H
#define QCONVERT_GGML_K_COLUMNS_H

#include "ggml_small.h"
#include "search.h"

#include <math.h>

#define K_TINY 0x1p-100f     /* smaller numbers count as 0: their inverses overflow */
#define K_FLOOR 0x1p-30f     /* the least weight, relative to the largest of a super-block */
#define K_SINGULAR 0x1p-20f  /* relative determinant below which a fit means nothing */

enum { SUPER = 256, COLUMNS = BATCH, LONGEST = 32, MOST_SUPERS = 2, MOST_TRIALS = 16 };

/* What is found for the super-blocks side by side. */
typedef struct {
    uint16_t d[MOST_SUPERS], m[MOST_SUPERS];
    float a[COLUMNS], b[COLUMNS];
    int8_t codes[MOST_SUPERS * SUPER];
} KFound;

typedef struct {
    float su[COLUMNS], suu[COLUMNS], sxu[COLUMNS];
} KSums;

/* The best integers of each column so far, how good they are, and the sums of their codes. */
typedef struct {
    float gain[COLUMNS], a[COLUMNS], b[COLUMNS];
    KSums sums;
} KBest;

typedef struct {
    int length;                         /* values of a column */
    float rows[MOST_SUPERS * SUPER];    /* normalised values, as they came */
    float power[MOST_SUPERS];
    float x[LONGEST * COLUMNS];         /* as columns; less their lowest, where affine */
    float w[LONGEST * COLUMNS];
    int weighted;
    float sign[COLUMNS], low[COLUMNS], span[COLUMNS];
    float n[COLUMNS], inverse_n[COLUMNS], sx[COLUMNS];
    float d[COLUMNS], inverse_d[COLUMNS], m[COLUMNS], inverse_m[COLUMNS];
    KBest best;
} KColumns;

INLINE float k_inverse(float v) {
    const float magnitude = from_bits(bits_of(v) & 0x7FFFFFFF);
    const float inverse = 1.0f / (magnitude >= K_TINY ? v : 1.0f);
    return magnitude >= K_TINY ? inverse : 0.0f;
}

INLINE float at_least(float v, float low) {
    return v < low ? low : v;
}

/* one ? a : b, in bits: of a conditional GCC makes a masked store, which is slow. */
INLINE float pick(int one, float a, float b) {
    const uint32_t mask = (uint32_t)-one;
    return from_bits((bits_of(a) & mask) | (bits_of(b) & ~mask));
}

/* --- sums over codes -------------------------------------------------------------------------*/

/* code_of, in the form that is two instructions: no value here is NaN. */
INLINE float k_code(float v, float low, float top) {
    v = v > low ? v : low;
    v = v < top ? v : top;
    return round_small(v);
}

INLINE void sum_k(const KColumns *restrict k, int length, int weighted, int with_su, float low,
                  float top, const float steps[restrict COLUMNS],
                  const float shift[restrict COLUMNS], KSums *restrict out) {
    float su[COLUMNS] = {0}, suu[COLUMNS] = {0}, sxu[COLUMNS] = {0};
    for (int i = 0; i < length; i++) {
        const float *x = k->x + i * COLUMNS, *w = k->w + i * COLUMNS;
        for (int j = 0; j < COLUMNS; j++) {
            const float at = with_su ? x[j] * steps[j] + shift[j] : x[j] * steps[j];
            const float u = k_code(at, low, top), wu = weighted ? w[j] * u : u;
            su[j] += with_su ? wu : 0.0f;
            suu[j] += wu * u;
            sxu[j] += wu * x[j];
        }
    }
    memcpy(out->su, su, sizeof su);
    memcpy(out->suu, suu, sizeof suu);
    memcpy(out->sxu, sxu, sizeof sxu);
}

/* Sums of the weights and of the weighted values of each column. */
INLINE void sum_values(KColumns *restrict k, int length, int weighted) {
    float n[COLUMNS] = {0}, sx[COLUMNS] = {0};
    for (int i = 0; i < length; i++) {
        const float *x = k->x + i * COLUMNS, *w = k->w + i * COLUMNS;
        for (int j = 0; j < COLUMNS; j++) {
            n[j] += weighted ? w[j] : 1.0f;
            sx[j] += weighted ? w[j] * x[j] : x[j];
        }
    }
    memcpy(k->n, n, sizeof n);
    memcpy(k->sx, sx, sizeof sx);
}

/* --- loading ---------------------------------------------------------------------------------*/

INLINE void to_columns(const float *restrict rows, int length, float *restrict columns) {
    for (int i = 0; i < length; i++) {
        for (int j = 0; j < COLUMNS; j++) {
            columns[i * COLUMNS + j] = rows[j * length + i];
        }
    }
}

/* The power of two that takes a super-block's largest magnitude to [1, 2); 0 for next to nothing. */
INLINE float power_for(const float *restrict x) {
    uint32_t largest = 0;
    for (int i = 0; i < SUPER; i++) {
        const uint32_t magnitude = bits_of(x[i]) & 0x7FFFFFFF;
        largest = magnitude > largest ? magnitude : largest;
    }
    const int exponent = 254 - (int)(largest >> 23);
    const float power = from_bits((uint32_t)(exponent > 1 ? exponent : 1) << 23);
    return from_bits(largest) < K_TINY ? 0.0f : power;
}

INLINE void scale_weights(const float *restrict importance, float *restrict out) {
    uint32_t largest = 0;
    for (int i = 0; i < SUPER; i++) {
        const uint32_t bits = bits_of(importance[i]) & 0x7FFFFFFF; /* grows with it */
        largest = bits > largest ? bits : largest;
    }
    const float inverse = k_inverse(from_bits(largest));
    for (int i = 0; i < SUPER; i++) {
        out[i] = at_least(importance[i] * inverse, K_FLOOR);
    }
}

/* `supers` super-blocks side by side; those that are missing are zeros. */
INLINE void load_k(KColumns *restrict k, const float *x, const float *const *importance,
                   int supers, int length) {
    float weights[MOST_SUPERS * SUPER];
    k->length = length;
    k->weighted = importance[0] != NULL;
    for (int s = 0; s < COLUMNS * length / SUPER; s++) {
        const int there = s < supers;
        const float *from = there ? x + s * SUPER : x;
        float *rows = k->rows + s * SUPER;
        const float power = k->power[s] = there ? power_for(from) : 0.0f;
        for (int i = 0; i < SUPER; i++) {
            rows[i] = from[i] * power + 0.0f; /* no -0 */
        }
        if (k->weighted) {
            scale_weights(importance[there ? s : 0], weights + s * SUPER);
        }
    }
    to_columns(k->rows, length, k->x);
    if (k->weighted) {
        to_columns(weights, length, k->w);
    }
    memset(&k->best, 0, sizeof k->best);
}

INLINE void extremes(const KColumns *restrict k, int length, float low[restrict COLUMNS],
                     float high[restrict COLUMNS]) {
    float least[COLUMNS], most[COLUMNS];
    EACH_COLUMN {
        least[j] = INFINITY;
        most[j] = -INFINITY;
    }
    for (int i = 0; i < length; i++) {
        const float *x = k->x + i * COLUMNS;
        EACH_COLUMN {
            least[j] = x[j] < least[j] ? x[j] : least[j];
            most[j] = x[j] > most[j] ? x[j] : most[j];
        }
    }
    memcpy(low, least, sizeof least);
    memcpy(high, most, sizeof most);
}

/* --- units -----------------------------------------------------------------------------------*/

/* A unit of super-block s as binary16 of the true size; returns what that is in normalised terms,
 * or the unit itself where binary16 cannot hold it. Upwards: never smaller than the unit. */
INLINE float half_unit(const KColumns *k, int s, float unit, int upwards, uint16_t *half) {
    const float power = k->power[s];
    const float size = power == 0 ? 0.0f : unit / power;
    uint16_t stored = to_half(size);
    if (upwards && from_half(stored) < size) {
        stored++;
    }
    *half = stored;
    const float back = from_half(stored) * power;
    return is_finite(back) ? back : unit;
}

/* Largest of the numbers of a super-block's columns, none of which is negative or -0. */
INLINE float largest_of(int first, int count, const float v[COLUMNS]) {
    uint32_t largest = 0;
    for (int j = 0; j < count; j++) {
        const uint32_t bits = bits_of(v[first + j]); /* grows with v */
        largest = bits > largest ? bits : largest;
    }
    return from_bits(largest);
}

/* Sum over a super-block's columns, in pairs: i with i + half. */
INLINE float sum_of(int first, int count, const float v[COLUMNS]) {
    float sums[COLUMNS];
    memcpy(sums, v + first, (size_t)count * sizeof *sums);
    for (int half = count / 2; half; half /= 2) {
        for (int j = 0; j < half; j++) {
            sums[j] += sums[j + half];
        }
    }
    return sums[0];
}

INLINE void spread(int per_super, const float unit[MOST_SUPERS], float out[COLUMNS]) {
    EACH_COLUMN {
        out[j] = unit[j / per_super];
    }
}

/* --- codes -----------------------------------------------------------------------------------*/

/* Codes of the values as they came, by the units and integers that are stored. */
INLINE void final_codes(const KColumns *restrict k, const float d[COLUMNS], const float m[COLUMNS],
                        int length, float low, float top, KFound *restrict found) {
    float steps[COLUMNS], shift[COLUMNS];
    float each_steps[LONGEST * COLUMNS], each_shift[LONGEST * COLUMNS];
    int32_t wide[LONGEST * COLUMNS];
    EACH_COLUMN {
        steps[j] = k_inverse(k->best.a[j] * d[j]);
        shift[j] = k->sign[j] * (k->best.b[j] * m[j]);
    }
    EACH_COLUMN {
        for (int i = 0; i < length; i++) {
            each_steps[j * length + i] = steps[j];
            each_shift[j * length + i] = shift[j];
        }
    }
    for (int i = 0; i < COLUMNS * length; i++) {
        wide[i] = (int32_t)k_code((k->rows[i] + each_shift[i]) * each_steps[i], low, top);
    }
    for (int i = 0; i < COLUMNS * length; i++) {
        found->codes[i] = (int8_t)wide[i];
    }
    memcpy(found->a, k->best.a, sizeof k->best.a);
    memcpy(found->b, k->best.b, sizeof k->best.b);
}

#endif
