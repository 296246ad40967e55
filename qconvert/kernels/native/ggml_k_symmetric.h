/* The search for d and a of K-quants whose values are d a u, section 8: the arithmetic of
 * ../reference/ggml/k_symmetric.py. Sub-blocks are of 16 values. */
#ifndef QCONVERT_GGML_K_SYMMETRIC_H
#define QCONVERT_GGML_K_SYMMETRIC_H

#include "ggml_k_columns.h"

typedef struct {
    float half, most;     /* codes u are -half .. half - 1, integers a -most - 1 .. most */
    float headroom;
    int trials, nearby;   /* scales over the first guess; steps to either side of the best */
    float trial[MOST_TRIALS];
} KSymmetric;

static void symmetric_sums(const KColumns *k, float half, const float steps[COLUMNS], KSums *out) {
    if (k->weighted) {
        sum_k(k, 16, 1, 0, -half, half - 1, steps, NULL, out);
    } else {
        sum_k(k, 16, 0, 0, -half, half - 1, steps, NULL, out);
    }
}

/* Tries the codes that an integer gives, with it and with the best for the codes. */
static void offer_symmetric_k(KColumns *k, const KSymmetric *kind, const float a[COLUMNS],
                              float d) {
    float steps[COLUMNS];
    KSums sums;
    const float inverse = k_inverse(d);
    EACH_COLUMN {
        steps[j] = k_inverse(a[j] * d);
    }
    symmetric_sums(k, kind->half, steps, &sums);
    for (int fitted = 0; fitted < 2; fitted++) {
        EACH_COLUMN {
            const float suu = sums.suu[j], sxu = sums.sxu[j];
            const float fit = sxu / (suu > 0 ? suu : 1.0f) * inverse;
            const float integer = fitted ? k_code(fit, -kind->most - 1, kind->most) : a[j];
            const float s = integer * d, gain = s * (2.0f * sxu - s * suu);
            const int better = gain > k->best.gain[j];
            k->best.gain[j] = pick(better, gain, k->best.gain[j]);
            k->best.a[j] = pick(better, integer, k->best.a[j]);
            k->best.sums.suu[j] = pick(better, suu, k->best.sums.suu[j]);
            k->best.sums.sxu[j] = pick(better, sxu, k->best.sums.sxu[j]);
        }
    }
}

/* Fits d to codes and integers, if that is better once stored. */
static void refit_symmetric(const KColumns *k, float *d, uint16_t *half) {
    float square[COLUMNS], along[COLUMNS];
    EACH_COLUMN {
        const float a = k->best.a[j], s = a * *d;
        square[j] = a * (a * k->best.sums.suu[j]);
        along[j] = a * (k->best.sums.sxu[j] - s * k->best.sums.suu[j]);
    }
    const float p = sum_of(0, 16, square), e = sum_of(0, 16, along);
    uint16_t stored;
    const float fit = half_unit(k, 0, at_least(*d + e / (p > 0 ? p : 1.0f), 0.0f), 0, &stored);
    const float change = fit - *d;
    if (change * (change * p - 2.0f * e) < 0) {
        *d = fit;
        *half = stored;
    }
}

static void search_symmetric(const float *x, const float *const *importance,
                             const KSymmetric *kind, KFound *found) {
    KColumns k;
    float lowest[COLUMNS], highest[COLUMNS], unit[COLUMNS], size[COLUMNS], a[COLUMNS];
    load_k(&k, x, importance, 1, 16);
    extremes(&k, 16, lowest, highest);
    EACH_COLUMN {
        const float furthest = -lowest[j] > highest[j] ? lowest[j] : highest[j];
        unit[j] = furthest * (-1.0f / kind->half); /* it gets the lowest code */
        size[j] = from_bits(bits_of(unit[j]) & 0x7FFFFFFF);
        k.sign[j] = 1;
    }
    const float headroom = kind->headroom / kind->most;
    float d = half_unit(&k, 0, largest_of(0, 16, size) * headroom, 1, found->d);
    const float inverse = k_inverse(d);
    for (int t = 0; t < kind->trials; t++) {
        EACH_COLUMN {
            const float fit = unit[j] * kind->trial[t] * inverse;
            a[j] = k_code(fit, -kind->most - 1, kind->most);
        }
        offer_symmetric_k(&k, kind, a, d);
    }
    refit_symmetric(&k, &d, found->d);
    if (kind->nearby) {
        float beside[COLUMNS];
        memcpy(a, k.best.a, sizeof a);
        memset(k.best.gain, 0, sizeof k.best.gain);
        memset(k.best.a, 0, sizeof k.best.a);
        offer_symmetric_k(&k, kind, a, d);
        for (int step = 1; step <= kind->nearby; step++) {
            for (float side = 1; side >= -1; side -= 2) {
                EACH_COLUMN {
                    beside[j] = clamp(a[j] + side * (float)step, -kind->most - 1, kind->most);
                }
                offer_symmetric_k(&k, kind, beside, d);
            }
        }
        refit_symmetric(&k, &d, found->d);
    }
    float wide[COLUMNS], none[COLUMNS] = {0};
    EACH_COLUMN {
        wide[j] = d;
    }
    final_codes(&k, wide, none, 16, -kind->half, kind->half - 1, found);
}

#endif
