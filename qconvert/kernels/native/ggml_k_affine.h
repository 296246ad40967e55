/* The search for d, m, a and b of K-quants whose values are d a u - m b, section 8: the arithmetic of
 * ../reference/ggml/k_affine.py. */
#ifndef QCONVERT_GGML_K_AFFINE_H
#define QCONVERT_GGML_K_AFFINE_H

#include "ggml_k_columns.h"

typedef struct {
    int length;           /* values of a sub-block */
    float top, most;      /* codes u are 0 .. top, integers a and b 0 .. most */
    float factors[3];     /* trial grids: extent of the values over their width, */
    float shift;          /* and how many steps off the middle, or none, or as many the other way */
} KAffine;

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

/* Least squares for given codes: scale, offset from `low`; usable is 1 where they serve. */
INLINE void fit_k(const KColumns *restrict k, const KSums *restrict sums, float s[restrict COLUMNS],
                  float o[restrict COLUMNS], int32_t usable[restrict COLUMNS]) {
    EACH_COLUMN {
        const float n = k->n[j], sx = k->sx[j], low = k->low[j];
        const float su = sums->su[j], suu = sums->suu[j], sxu = sums->sxu[j];
        const float det = n * suu - su * su;
        const int singular = !(det > K_SINGULAR * (n * suu)); /* as when all codes are the same */
        const int beyond = k->sign[j] * (low * det + (suu * sx - su * sxu)) > 0;
        const int through = singular | beyond; /* 0: an offset of 0, which is on either side */
        const float along = through ? sxu + low * su : n * sxu - su * sx;
        s[j] = along / (through ? suu > 0 ? suu : 1.0f : det);
        o[j] = through ? -low : (sx - s[j] * su) * k->inverse_n[j];
        usable[j] = s[j] > 0;
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
    EACH_COLUMN {
        per[j] = k_inverse(k->span[j]) * kind->top;
        scale[j] = offset[j] = best[j] = 0;
    }
    for (int t = 0; t < 9; t++) {
        const float factor = kind->factors[t / 3], middle = kind->top / 2;
        const float start = middle - (middle + (float)(t % 3 - 1) * kind->shift) * factor;
        float steps[COLUMNS], shift[COLUMNS], s[COLUMNS], o[COLUMNS];
        int32_t usable[COLUMNS];
        KSums sums;
        EACH_COLUMN {
            steps[j] = per[j] * factor;
            shift[j] = start;
        }
        affine_sums(k, kind->top, steps, shift, &sums);
        fit_k(k, &sums, s, o, usable);
        EACH_COLUMN {
            const float gain = gain_of(k, &sums, j, s[j], o[j]);
            const int better = usable[j] & (gain > best[j]);
            scale[j] = pick(better, s[j], scale[j]);
            offset[j] = pick(better, o[j], offset[j]);
            best[j] = pick(better, gain, best[j]);
        }
    }
}

INLINE void keep(KColumns *restrict k, const KSums *restrict sums,
                 const int32_t usable[restrict COLUMNS], const float a[restrict COLUMNS],
                 const float b[restrict COLUMNS], const float s[restrict COLUMNS],
                 const float o[restrict COLUMNS]) {
    EACH_COLUMN {
        const float gain = gain_of(k, sums, j, s[j], o[j]);
        const int better = usable[j] & (gain > k->best.gain[j]);
        k->best.gain[j] = pick(better, gain, k->best.gain[j]);
        k->best.a[j] = pick(better, a[j], k->best.a[j]);
        k->best.b[j] = pick(better, b[j], k->best.b[j]);
        k->best.sums.su[j] = pick(better, sums->su[j], k->best.sums.su[j]);
        k->best.sums.suu[j] = pick(better, sums->suu[j], k->best.sums.suu[j]);
        k->best.sums.sxu[j] = pick(better, sums->sxu[j], k->best.sums.sxu[j]);
    }
}

/* Tries the codes that integers a, b give, with these and with the best for the codes. */
static void offer_affine(KColumns *k, const KAffine *kind, const float a[COLUMNS],
                         const float b[COLUMNS]) {
    float s[COLUMNS], o[COLUMNS], steps[COLUMNS], shift[COLUMNS], fit_a[COLUMNS], fit_b[COLUMNS];
    int32_t usable[COLUMNS];
    KSums sums;
    EACH_COLUMN {
        s[j] = a[j] * k->d[j];
        o[j] = -(k->sign[j] * (b[j] * k->m[j])) - k->low[j];
        steps[j] = k_inverse(s[j]);
        shift[j] = -(o[j] * steps[j]);
        usable[j] = 1;
    }
    affine_sums(k, kind->top, steps, shift, &sums);
    keep(k, &sums, usable, a, b, s, o);
    fit_k(k, &sums, s, o, usable);
    EACH_COLUMN {
        fit_a[j] = k_code(s[j] * k->inverse_d[j], 0.0f, kind->most);
        s[j] = fit_a[j] * k->d[j];
        const float offset = (k->sx[j] - s[j] * sums.su[j]) * k->inverse_n[j];
        const float minimum = -(k->sign[j] * (k->low[j] + offset));
        fit_b[j] = k_code(minimum * k->inverse_m[j], 0.0f, kind->most);
        o[j] = -(k->sign[j] * (fit_b[j] * k->m[j])) - k->low[j];
    }
    keep(k, &sums, usable, fit_a, fit_b, s, o);
}

/* Tries the neighbours of the best integers. */
static void offer_nearby(KColumns *k, const KAffine *kind) {
    float a[COLUMNS], b[COLUMNS], tilt[COLUMNS], near_a[COLUMNS], near_b[COLUMNS];
    memcpy(a, k->best.a, sizeof a);
    memcpy(b, k->best.b, sizeof b);
    EACH_COLUMN {
        tilt[j] = k->sign[j] * (k->d[j] * (kind->top / 2) * k->inverse_m[j]);
    }
    for (float step = 1; step >= -1; step -= 2) { /* the middle code's value stays */
        EACH_COLUMN {
            near_a[j] = clamp(a[j] + step, 0.0f, kind->most);
            near_b[j] = k_code(b[j] + step * tilt[j], 0.0f, kind->most);
        }
        offer_affine(k, kind, near_a, near_b);
    }
    for (float step = 1; step >= -1; step -= 2) {
        EACH_COLUMN {
            near_b[j] = clamp(b[j] + step, 0.0f, kind->most);
        }
        offer_affine(k, kind, a, near_b);
    }
}

/* Fits d and m of super-block s to its codes and integers, if that is better once stored. */
INLINE void refit_affine(const KColumns *k, int per_super, int s, float *d, float *m,
                         KFound *found) {
    float terms[5][COLUMNS], sums[5];
    EACH_COLUMN {
        const float a = k->best.a[j], b = -(k->sign[j] * k->best.b[j]);
        const float scale = a * *d, offset = b * *m - k->low[j];
        const float along = k->best.sums.sxu[j] - scale * k->best.sums.suu[j] - offset * k->best.sums.su[j];
        const float rest = k->sx[j] - scale * k->best.sums.su[j] - offset * k->n[j];
        terms[0][j] = a * (a * k->best.sums.suu[j]);
        terms[1][j] = a * (b * k->best.sums.su[j]);
        terms[2][j] = b * (b * k->n[j]);
        terms[3][j] = a * along;
        terms[4][j] = b * rest;
    }
    for (int i = 0; i < 5; i++) {
        sums[i] = sum_of(s * per_super, per_super, terms[i]);
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

INLINE void search_affine(const float *x, const float *const *importance, int supers,
                          const KAffine *kind, int length, KFound *found) {
    KColumns k;
    float scale[COLUMNS], offset[COLUMNS], minimum[COLUMNS], a[COLUMNS], b[COLUMNS];
    float lowest[COLUMNS], highest[COLUMNS], d[MOST_SUPERS], m[MOST_SUPERS];
    const int per_super = SUPER / length, side_by_side = COLUMNS / per_super;
    load_k(&k, x, importance, supers, length);
    extremes(&k, length, lowest, highest);
    for (int s = 0; s < side_by_side; s++) {
        int positive = 1; /* all values: the offsets are, too; else none is */
        for (int j = 0; j < per_super; j++) {
            positive &= lowest[s * per_super + j] > 0;
        }
        for (int j = 0; j < per_super; j++) {
            k.sign[s * per_super + j] = positive ? -1.0f : 1.0f;
        }
    }
    EACH_COLUMN {
        k.low[j] = ((k.sign[j] > 0) & (lowest[j] > 0)) ? 0.0f : lowest[j];
        k.span[j] = highest[j] - k.low[j];
        k.best.gain[j] = -INFINITY;
    }
    for (int i = 0; i < length; i++) {
        EACH_COLUMN {
            k.x[i * COLUMNS + j] -= k.low[j];
        }
    }
    if (k.weighted) {
        sum_values(&k, length, 1);
    } else {
        sum_values(&k, length, 0);
    }
    EACH_COLUMN {
        k.inverse_n[j] = 1.0f / k.n[j];
    }
    guess(&k, kind, scale, offset);
    EACH_COLUMN {
        minimum[j] = at_least(-(k.sign[j] * (k.low[j] + offset[j])), 0.0f) + 0.0f; /* no -0 */
    }
    for (int s = 0; s < side_by_side; s++) {
        const float widest = largest_of(s * per_super, per_super, scale);
        const float deepest = largest_of(s * per_super, per_super, minimum);
        d[s] = half_unit(&k, s, widest / kind->most, 1, found->d + s);
        m[s] = half_unit(&k, s, deepest / kind->most, 1, found->m + s);
    }
    spread(per_super, d, k.d);
    spread(per_super, m, k.m);
    EACH_COLUMN {
        k.inverse_d[j] = k_inverse(k.d[j]);
        k.inverse_m[j] = k_inverse(k.m[j]);
        a[j] = k_code(scale[j] * k.inverse_d[j], 0.0f, kind->most);
        b[j] = k_code(minimum[j] * k.inverse_m[j], 0.0f, kind->most);
    }
    offer_affine(&k, kind, a, b);
    offer_nearby(&k, kind);
    for (int s = 0; s < side_by_side; s++) {
        refit_affine(&k, per_super, s, d + s, m + s, found);
        found->m[s] ^= k.sign[s * per_super] < 0 ? 0x8000 : 0;
    }
    spread(per_super, d, k.d);
    spread(per_super, m, k.m);
    final_codes(&k, k.d, k.m, length, 0.0f, kind->top, found);
}

#endif
