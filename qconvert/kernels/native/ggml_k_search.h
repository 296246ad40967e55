/* The search for the scales of K-quants, section 8: the arithmetic of quantizers/ggml/k_search.py.
 *
 * 16 sub-blocks lie side by side as columns: of one super-block, or of two where they are 8. */
#ifndef QCONVERT_GGML_K_SEARCH_H
#define QCONVERT_GGML_K_SEARCH_H

#include "ggml_small.h"

#include <math.h>

#define K_TINY 0x1p-100f     /* smaller numbers count as 0: their inverses overflow */
#define K_FLOOR 0x1p-30f     /* the least weight, relative to the largest of a super-block */
#define K_SINGULAR 0x1p-20f  /* relative determinant below which a fit means nothing */

enum { SUPER = 256, COLUMNS = 16, LONGEST = 32, MOST_SUPERS = 2, MOST_TRIALS = 16 };

/* A type whose values are d a u - m b. */
typedef struct {
    int length;           /* values of a sub-block */
    float top, most;      /* codes u are 0 .. top, integers a and b 0 .. most */
    float factors[3];     /* trial grids: extent of the values over their width, */
    float shift;          /* and how many steps off the middle, or none, or as many the other way */
} KAffine;

/* A type whose values are d a u, in sub-blocks of 16. */
typedef struct {
    float half, most;     /* codes u are -half .. half - 1, integers a -most - 1 .. most */
    float headroom;
    int trials, nearby;   /* scales over the first guess; steps to either side of the best */
    float trial[MOST_TRIALS];
} KSymmetric;

/* What is found for the super-blocks side by side. */
typedef struct {
    uint16_t d[MOST_SUPERS], m[MOST_SUPERS];
    float a[COLUMNS], b[COLUMNS];
    int8_t codes[MOST_SUPERS * SUPER];
} KFound;

typedef struct {
    int length, per_super;              /* values of a column; columns of a super-block */
    float rows[MOST_SUPERS * SUPER];    /* normalised values, as they came */
    float power[MOST_SUPERS];
    float x[LONGEST * COLUMNS];         /* as columns; less their lowest, where affine */
    float w[LONGEST * COLUMNS];
    int weighted;
    float sign[COLUMNS], low[COLUMNS], span[COLUMNS], n[COLUMNS], sx[COLUMNS];
    float gain[COLUMNS], a[COLUMNS], b[COLUMNS], su[COLUMNS], suu[COLUMNS], sxu[COLUMNS];
} KColumns;

typedef struct {
    float su[COLUMNS], suu[COLUMNS], sxu[COLUMNS];
} KSums;

INLINE float k_inverse(float v) {
    const float magnitude = from_bits(bits_of(v) & 0x7FFFFFFF);
    const float inverse = 1.0f / (magnitude >= K_TINY ? v : 1.0f);
    return magnitude >= K_TINY ? inverse : 0.0f;
}

INLINE float at_least(float v, float low) {
    return v < low ? low : v;
}

/* --- sums over codes -------------------------------------------------------------------------*/

INLINE void sum_k(const KColumns *restrict k, int length, int weighted, int with_su, float low,
                  float top, const float steps[restrict COLUMNS],
                  const float shift[restrict COLUMNS], KSums *restrict out) {
    float su[COLUMNS] = {0}, suu[COLUMNS] = {0}, sxu[COLUMNS] = {0};
    for (int i = 0; i < length; i++) {
        const float *x = k->x + i * COLUMNS, *w = k->w + i * COLUMNS;
        for (int j = 0; j < COLUMNS; j++) {
            const float at = with_su ? x[j] * steps[j] + shift[j] : x[j] * steps[j];
            const float u = code_of(at, low, top), wu = weighted ? w[j] * u : u;
            su[j] += with_su ? wu : 0.0f;
            suu[j] += wu * u;
            sxu[j] += wu * x[j];
        }
    }
    memcpy(out->su, su, sizeof su);
    memcpy(out->suu, suu, sizeof suu);
    memcpy(out->sxu, sxu, sizeof sxu);
}

static void affine_sums(const KColumns *k, float top, const float steps[COLUMNS],
                        const float shift[COLUMNS], KSums *out) {
    if (k->length == 32) {
        if (k->weighted) {
            sum_k(k, 32, 1, 1, 0.0f, top, steps, shift, out);
        } else {
            sum_k(k, 32, 0, 1, 0.0f, top, steps, shift, out);
        }
    } else if (k->weighted) {
        sum_k(k, 16, 1, 1, 0.0f, top, steps, shift, out);
    } else {
        sum_k(k, 16, 0, 1, 0.0f, top, steps, shift, out);
    }
}

static void symmetric_sums(const KColumns *k, float half, const float steps[COLUMNS], KSums *out) {
    if (k->weighted) {
        sum_k(k, 16, 1, 0, -half, half - 1, steps, NULL, out);
    } else {
        sum_k(k, 16, 0, 0, -half, half - 1, steps, NULL, out);
    }
}

/* Sums of the columns of values, weighted. */
static void sum_values(const KColumns *restrict k, float n[restrict COLUMNS],
                       float sx[restrict COLUMNS]) {
    float count[COLUMNS] = {0}, sum[COLUMNS] = {0};
    for (int i = 0; i < k->length; i++) {
        const float *x = k->x + i * COLUMNS, *w = k->w + i * COLUMNS;
        for (int j = 0; j < COLUMNS; j++) {
            const float weight = k->weighted ? w[j] : 1.0f;
            count[j] += weight;
            sum[j] += weight * x[j];
        }
    }
    memcpy(n, count, sizeof count);
    memcpy(sx, sum, sizeof sum);
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
    float largest = 0;
    for (int i = 0; i < SUPER; i++) {
        largest = importance[i] > largest ? importance[i] : largest;
    }
    const float inverse = k_inverse(largest);
    for (int i = 0; i < SUPER; i++) {
        out[i] = at_least(importance[i] * inverse, K_FLOOR);
    }
}

/* `supers` super-blocks side by side; those that are missing are zeros. */
static void load_k(KColumns *k, const float *x, const float *const importance[MOST_SUPERS],
                   int supers, int length) {
    float weights[MOST_SUPERS * SUPER];
    k->length = length;
    k->per_super = SUPER / length;
    k->weighted = importance[0] != NULL;
    memset(k->rows, 0, sizeof k->rows);
    memset(weights, 0, sizeof weights);
    for (int s = 0; s < MOST_SUPERS; s++) {
        k->power[s] = 0;
        if (s < supers) {
            float *rows = k->rows + s * SUPER;
            const float power = k->power[s] = power_for(x + s * SUPER);
            for (int i = 0; i < SUPER; i++) {
                rows[i] = x[s * SUPER + i] * power + 0.0f; /* no -0 */
            }
            if (k->weighted) {
                scale_weights(importance[s], weights + s * SUPER);
            }
        }
    }
    if (length == 32) {
        to_columns(k->rows, 32, k->x);
    } else {
        to_columns(k->rows, 16, k->x);
    }
    if (k->weighted && length == 32) {
        to_columns(weights, 32, k->w);
    } else if (k->weighted) {
        to_columns(weights, 16, k->w);
    }
    for (int j = 0; j < COLUMNS; j++) {
        k->gain[j] = k->a[j] = k->b[j] = k->su[j] = k->suu[j] = k->sxu[j] = 0;
    }
}

INLINE void extremes(const KColumns *restrict k, float low[restrict COLUMNS],
                     float high[restrict COLUMNS]) {
    float least[COLUMNS], most[COLUMNS];
    for (int j = 0; j < COLUMNS; j++) {
        least[j] = most[j] = k->x[j];
    }
    for (int i = 1; i < k->length; i++) {
        const float *x = k->x + i * COLUMNS;
        for (int j = 0; j < COLUMNS; j++) {
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

/* Largest number of a super-block's columns. */
INLINE float largest_of(const KColumns *k, int s, const float v[COLUMNS]) {
    float largest = v[s * k->per_super];
    for (int j = 1; j < k->per_super; j++) {
        const float other = v[s * k->per_super + j];
        largest = other > largest ? other : largest;
    }
    return largest;
}

/* Sum over a super-block's columns, from first to last. */
INLINE float sum_of(const KColumns *k, int s, const float v[COLUMNS]) {
    float sum = v[s * k->per_super];
    for (int j = 1; j < k->per_super; j++) {
        sum += v[s * k->per_super + j];
    }
    return sum;
}

INLINE void spread(const KColumns *k, const float unit[MOST_SUPERS], float out[COLUMNS]) {
    for (int j = 0; j < COLUMNS; j++) {
        out[j] = unit[j / k->per_super];
    }
}

/* --- affine ----------------------------------------------------------------------------------*/

/* Least squares for given codes: scale, offset from `low`; usable is 1 where they serve. */
INLINE void fit_k(const KColumns *restrict k, const KSums *restrict sums, float s[restrict COLUMNS],
                  float o[restrict COLUMNS], int32_t usable[restrict COLUMNS]) {
    for (int j = 0; j < COLUMNS; j++) {
        const float n = k->n[j], su = sums->su[j], suu = sums->suu[j], sxu = sums->sxu[j];
        const float det = n * suu - su * su;
        const int clear = det > K_SINGULAR * (n * suu);
        const float scale = (n * sxu - su * k->sx[j]) / (clear ? det : 1.0f);
        const float offset = (k->sx[j] - scale * su) / n;
        const int beyond = k->sign[j] * (k->low[j] + offset) > 0;
        const float through = (sxu + k->low[j] * su) / (suu > 0 ? suu : 1.0f);
        s[j] = beyond ? through : scale;
        o[j] = beyond ? -k->low[j] : offset;
        usable[j] = clear & (s[j] > 0);
    }
}

/* How much less than Sxx the squared error is. */
INLINE float gain_of(const KColumns *restrict k, const KSums *restrict sums, int j, float s,
                     float o) {
    return s * (2.0f * (sums->sxu[j] - o * sums->su[j]) - s * sums->suu[j])
           + o * (2.0f * k->sx[j] - o * k->n[j]);
}

/* The best scale and offset, of any size, of the codes of all trial grids. */
static void guess(const KColumns *k, const KAffine *kind, float scale[COLUMNS],
                  float offset[COLUMNS]) {
    float per[COLUMNS], best[COLUMNS];
    for (int j = 0; j < COLUMNS; j++) {
        per[j] = k_inverse(k->span[j]) * kind->top;
        scale[j] = offset[j] = best[j] = 0;
    }
    for (int t = 0; t < 9; t++) {
        const float factor = kind->factors[t / 3], middle = kind->top / 2;
        const float start = middle - (middle + (float)(t % 3 - 1) * kind->shift) * factor;
        float steps[COLUMNS], shift[COLUMNS], s[COLUMNS], o[COLUMNS];
        int32_t usable[COLUMNS];
        KSums sums;
        for (int j = 0; j < COLUMNS; j++) {
            steps[j] = per[j] * factor;
            shift[j] = start;
        }
        affine_sums(k, kind->top, steps, shift, &sums);
        fit_k(k, &sums, s, o, usable);
        for (int j = 0; j < COLUMNS; j++) {
            const float gain = gain_of(k, &sums, j, s[j], o[j]);
            const int better = usable[j] & (gain > best[j]);
            scale[j] = better ? s[j] : scale[j];
            offset[j] = better ? o[j] : offset[j];
            best[j] = better ? gain : best[j];
        }
    }
}

INLINE void keep(KColumns *restrict k, const KSums *restrict sums,
                 const int32_t usable[restrict COLUMNS], const float a[restrict COLUMNS],
                 const float b[restrict COLUMNS], const float s[restrict COLUMNS],
                 const float o[restrict COLUMNS]) {
    for (int j = 0; j < COLUMNS; j++) {
        const float gain = gain_of(k, sums, j, s[j], o[j]);
        const int better = usable[j] & (gain > k->gain[j]);
        k->gain[j] = better ? gain : k->gain[j];
        k->a[j] = better ? a[j] : k->a[j];
        k->b[j] = better ? b[j] : k->b[j];
        k->su[j] = better ? sums->su[j] : k->su[j];
        k->suu[j] = better ? sums->suu[j] : k->suu[j];
        k->sxu[j] = better ? sums->sxu[j] : k->sxu[j];
    }
}

/* Tries the codes that integers a, b give, with these and with the best for the codes. */
static void offer_affine(KColumns *k, const KAffine *kind, const float a[COLUMNS],
                         const float b[COLUMNS], const float d[COLUMNS], const float m[COLUMNS]) {
    float s[COLUMNS], o[COLUMNS], steps[COLUMNS], shift[COLUMNS], fit_a[COLUMNS], fit_b[COLUMNS];
    int32_t usable[COLUMNS];
    KSums sums;
    for (int j = 0; j < COLUMNS; j++) {
        s[j] = a[j] * d[j];
        o[j] = -(k->sign[j] * (b[j] * m[j])) - k->low[j];
        steps[j] = k_inverse(s[j]);
        shift[j] = -(o[j] * steps[j]);
        usable[j] = 1;
    }
    affine_sums(k, kind->top, steps, shift, &sums);
    keep(k, &sums, usable, a, b, s, o);
    fit_k(k, &sums, s, o, usable);
    for (int j = 0; j < COLUMNS; j++) {
        fit_a[j] = code_of(s[j] * k_inverse(d[j]), 0.0f, kind->most);
        s[j] = fit_a[j] * d[j];
        const float offset = (k->sx[j] - s[j] * sums.su[j]) / k->n[j];
        const float minimum = -(k->sign[j] * (k->low[j] + offset));
        fit_b[j] = code_of(minimum * k_inverse(m[j]), 0.0f, kind->most);
        o[j] = -(k->sign[j] * (fit_b[j] * m[j])) - k->low[j];
    }
    keep(k, &sums, usable, fit_a, fit_b, s, o);
}

/* Tries the neighbours of the best integers. */
static void offer_nearby(KColumns *k, const KAffine *kind, const float d[COLUMNS],
                         const float m[COLUMNS]) {
    float a[COLUMNS], b[COLUMNS], tilt[COLUMNS], near_a[COLUMNS], near_b[COLUMNS];
    memcpy(a, k->a, sizeof a);
    memcpy(b, k->b, sizeof b);
    for (int j = 0; j < COLUMNS; j++) {
        tilt[j] = k->sign[j] * (d[j] * (kind->top / 2) * k_inverse(m[j]));
    }
    for (float step = 1; step >= -1; step -= 2) { /* the middle code's value stays */
        for (int j = 0; j < COLUMNS; j++) {
            near_a[j] = clamp(a[j] + step, 0.0f, kind->most);
            near_b[j] = code_of(b[j] + step * tilt[j], 0.0f, kind->most);
        }
        offer_affine(k, kind, near_a, near_b, d, m);
    }
    for (float step = 1; step >= -1; step -= 2) {
        for (int j = 0; j < COLUMNS; j++) {
            near_b[j] = clamp(b[j] + step, 0.0f, kind->most);
        }
        offer_affine(k, kind, a, near_b, d, m);
    }
}

/* Fits d and m of super-block s to its codes and integers, if that is better once stored. */
static void refit_affine(const KColumns *k, int s, float *d, float *m, KFound *found) {
    float terms[5][COLUMNS], sums[5];
    for (int j = 0; j < COLUMNS; j++) {
        const float a = k->a[j], b = -(k->sign[j] * k->b[j]);
        const float scale = a * *d, offset = b * *m - k->low[j];
        const float along = k->sxu[j] - scale * k->suu[j] - offset * k->su[j];
        const float rest = k->sx[j] - scale * k->su[j] - offset * k->n[j];
        terms[0][j] = a * (a * k->suu[j]);
        terms[1][j] = a * (b * k->su[j]);
        terms[2][j] = b * (b * k->n[j]);
        terms[3][j] = a * along;
        terms[4][j] = b * rest;
    }
    for (int i = 0; i < 5; i++) {
        sums[i] = sum_of(k, s, terms[i]);
    }
    const float p = sums[0], q = sums[1], r = sums[2], e = sums[3], f = sums[4];
    const float det = p * r - q * q;
    const int both = det > K_SINGULAR * (p * r);
    const float dd = both ? (e * r - q * f) / det : e / (p > 0 ? p : 1.0f);
    const float dm = both ? (p * f - q * e) / det : 0.0f;
    uint16_t half_d, half_m;
    const float new_d = half_unit(k, s, at_least(*d + dd, 0.0f), 0, &half_d);
    const float new_m = half_unit(k, s, at_least(*m + dm, 0.0f), 0, &half_m);
    const float by_d = new_d - *d, by_m = new_m - *m;
    const float loss = by_d * (by_d * p - 2.0f * e) + by_m * (by_m * r - 2.0f * f)
                       + 2.0f * (by_d * by_m * q);
    if (loss < 0) {
        *d = new_d;
        *m = new_m;
        found->d[s] = half_d;
        found->m[s] = half_m;
    }
}

/* Codes of the values as they came, by the units and integers that are stored. */
INLINE void final_codes(const KColumns *restrict k, const float d[COLUMNS], const float m[COLUMNS],
                        int length, float low, float top, KFound *restrict found) {
    float steps[COLUMNS], shift[COLUMNS];
    for (int j = 0; j < COLUMNS; j++) {
        steps[j] = k_inverse(k->a[j] * d[j]);
        shift[j] = k->sign[j] * (k->b[j] * m[j]);
    }
    for (int j = 0; j < COLUMNS; j++) {
        const float *rows = k->rows + j * length;
        int8_t *codes = found->codes + j * length;
        int32_t wide[LONGEST];
        for (int i = 0; i < length; i++) {
            wide[i] = (int32_t)code_of((rows[i] + shift[j]) * steps[j], low, top);
        }
        for (int i = 0; i < length; i++) {
            codes[i] = (int8_t)wide[i];
        }
    }
    memcpy(found->a, k->a, sizeof k->a);
    memcpy(found->b, k->b, sizeof k->b);
}

INLINE void search_affine(const float *x, const float *const importance[MOST_SUPERS], int supers,
                          const KAffine *kind, int length, KFound *found) {
    KColumns k;
    float scale[COLUMNS], offset[COLUMNS], minimum[COLUMNS], a[COLUMNS], b[COLUMNS];
    float d[COLUMNS], m[COLUMNS], unit_d[MOST_SUPERS], unit_m[MOST_SUPERS];
    load_k(&k, x, importance, supers, length);
    const int side_by_side = COLUMNS / k.per_super;
    float lowest[COLUMNS], highest[COLUMNS];
    extremes(&k, lowest, highest);
    for (int s = 0; s < side_by_side; s++) {
        int positive = 1;
        for (int j = s * k.per_super; j < (s + 1) * k.per_super; j++) {
            positive &= lowest[j] > 0;
        }
        for (int j = s * k.per_super; j < (s + 1) * k.per_super; j++) {
            k.sign[j] = positive ? -1.0f : 1.0f;
        }
    }
    for (int j = 0; j < COLUMNS; j++) {
        k.low[j] = (k.sign[j] > 0) & (lowest[j] > 0) ? 0.0f : lowest[j];
        k.span[j] = highest[j] - k.low[j];
        k.gain[j] = -INFINITY;
    }
    for (int i = 0; i < length; i++) {
        for (int j = 0; j < COLUMNS; j++) {
            k.x[i * COLUMNS + j] -= k.low[j];
        }
    }
    sum_values(&k, k.n, k.sx);
    guess(&k, kind, scale, offset);
    for (int j = 0; j < COLUMNS; j++) {
        minimum[j] = -(k.sign[j] * (k.low[j] + offset[j]));
    }
    for (int s = 0; s < side_by_side; s++) {
        unit_d[s] = half_unit(&k, s, largest_of(&k, s, scale) / kind->most, 1, found->d + s);
        const float deepest = at_least(largest_of(&k, s, minimum), 0.0f) + 0.0f; /* no -0 */
        unit_m[s] = half_unit(&k, s, deepest / kind->most, 1, found->m + s);
    }
    spread(&k, unit_d, d);
    spread(&k, unit_m, m);
    for (int j = 0; j < COLUMNS; j++) {
        a[j] = code_of(scale[j] * k_inverse(d[j]), 0.0f, kind->most);
        b[j] = code_of(minimum[j] * k_inverse(m[j]), 0.0f, kind->most);
    }
    offer_affine(&k, kind, a, b, d, m);
    offer_nearby(&k, kind, d, m);
    for (int s = 0; s < side_by_side; s++) {
        refit_affine(&k, s, unit_d + s, unit_m + s, found);
        found->m[s] ^= k.sign[s * k.per_super] < 0 ? 0x8000 : 0;
    }
    spread(&k, unit_d, d);
    spread(&k, unit_m, m);
    final_codes(&k, d, m, length, 0.0f, kind->top, found);
}

/* --- symmetric -------------------------------------------------------------------------------*/

/* Tries the codes that an integer gives, with it and with the best for the codes. */
static void offer_symmetric_k(KColumns *k, const KSymmetric *kind, const float a[COLUMNS],
                              float d) {
    float steps[COLUMNS];
    KSums sums;
    const float inverse = k_inverse(d);
    for (int j = 0; j < COLUMNS; j++) {
        steps[j] = k_inverse(a[j] * d);
    }
    symmetric_sums(k, kind->half, steps, &sums);
    for (int fitted = 0; fitted < 2; fitted++) {
        for (int j = 0; j < COLUMNS; j++) {
            const float suu = sums.suu[j], sxu = sums.sxu[j];
            const float fit = sxu / (suu > 0 ? suu : 1.0f) * inverse;
            const float integer = fitted ? code_of(fit, -kind->most - 1, kind->most) : a[j];
            const float s = integer * d, gain = s * (2.0f * sxu - s * suu);
            const int better = gain > k->gain[j];
            k->gain[j] = better ? gain : k->gain[j];
            k->a[j] = better ? integer : k->a[j];
            k->suu[j] = better ? suu : k->suu[j];
            k->sxu[j] = better ? sxu : k->sxu[j];
        }
    }
}

/* Fits d to codes and integers, if that is better once stored. */
static void refit_symmetric(const KColumns *k, float *d, uint16_t *half) {
    float square[COLUMNS], along[COLUMNS];
    for (int j = 0; j < COLUMNS; j++) {
        const float a = k->a[j], s = a * *d;
        square[j] = a * (a * k->suu[j]);
        along[j] = a * (k->sxu[j] - s * k->suu[j]);
    }
    const float p = sum_of(k, 0, square), e = sum_of(k, 0, along);
    uint16_t stored;
    const float fit = half_unit(k, 0, at_least(*d + e / (p > 0 ? p : 1.0f), 0.0f), 0, &stored);
    const float change = fit - *d;
    if (change * (change * p - 2.0f * e) < 0) {
        *d = fit;
        *half = stored;
    }
}

static void search_symmetric(const float *x, const float *const importance[MOST_SUPERS],
                             const KSymmetric *kind, KFound *found) {
    KColumns k;
    float lowest[COLUMNS], highest[COLUMNS], unit[COLUMNS], size[COLUMNS], a[COLUMNS];
    load_k(&k, x, importance, 1, 16);
    extremes(&k, lowest, highest);
    for (int j = 0; j < COLUMNS; j++) {
        const float furthest = -lowest[j] > highest[j] ? lowest[j] : highest[j];
        unit[j] = furthest * (-1.0f / kind->half); /* it gets the lowest code */
        size[j] = from_bits(bits_of(unit[j]) & 0x7FFFFFFF);
        k.sign[j] = 1;
    }
    const float headroom = kind->headroom / kind->most;
    float d = half_unit(&k, 0, largest_of(&k, 0, size) * headroom, 1, found->d);
    const float inverse = k_inverse(d);
    for (int t = 0; t < kind->trials; t++) {
        for (int j = 0; j < COLUMNS; j++) {
            const float fit = unit[j] * kind->trial[t] * inverse;
            a[j] = code_of(fit, -kind->most - 1, kind->most);
        }
        offer_symmetric_k(&k, kind, a, d);
    }
    refit_symmetric(&k, &d, found->d);
    if (kind->nearby) {
        float beside[COLUMNS];
        memcpy(a, k.a, sizeof a);
        memset(k.gain, 0, sizeof k.gain);
        memset(k.a, 0, sizeof k.a);
        offer_symmetric_k(&k, kind, a, d);
        for (int step = 1; step <= kind->nearby; step++) {
            for (float side = 1; side >= -1; side -= 2) {
                for (int j = 0; j < COLUMNS; j++) {
                    beside[j] = clamp(a[j] + side * (float)step, -kind->most - 1, kind->most);
                }
                offer_symmetric_k(&k, kind, beside, d);
            }
        }
        refit_symmetric(&k, &d, found->d);
    }
    float wide[COLUMNS], none[COLUMNS] = {0};
    for (int j = 0; j < COLUMNS; j++) {
        wide[j] = d;
    }
    final_codes(&k, wide, none, 16, -kind->half, kind->half - 1, found);
}

#endif
