/* The mse search: scales and zero points judged by the squared error that they leave, section 5. */
#ifndef QCONVERT_SEARCH_H
#define QCONVERT_SEARCH_H

#include "arithmetic.h"

/* As in quantizers/fitting.py: beyond these, reciprocals or sums of binary32 overflow. */
#define TINY 0x1p-100
#define HUGE_MAGNITUDE 0x1p110

enum { BATCH = 16 }; /* groups side by side: fills the widest vector, and GCC vectorises 16 */

typedef struct {
    float su[BATCH], suu[BATCH], sxu[BATCH];
} ColumnSums;

INLINE void fold_columns(float lanes[LANES][BATCH]) {
    for (int half = LANES / 2; half; half /= 2) {
        for (int i = 0; i < half; i++) {
            for (int j = 0; j < BATCH; j++) {
                lanes[i][j] += lanes[i + half][j];
            }
        }
    }
}

/* Sums over u = clamp(rint(x * inverse + offset), low, top) of 16 columns. Su and Suu are integers
 * below 2^24, exact in any order; Sxu goes by lanes. */
INLINE void sum_codes(const float *restrict x, const float *restrict mask, size_t stride,
                      size_t length, const float inverse[restrict BATCH],
                      const float offset[restrict BATCH], float low, float top,
                      ColumnSums *restrict out) {
    float lanes[LANES][BATCH];
    float su[BATCH] = {0}, suu[BATCH] = {0};
    for (size_t lane = 0; lane < LANES; lane++) {
        float sxu[BATCH] = {0};
        for (size_t row = lane; row < length; row += LANES) {
            const float *at = x + row * stride;
            for (int j = 0; j < BATCH; j++) {
                float u = code_of(at[j] * inverse[j] + offset[j], low, top);
                if (mask) {
                    u *= mask[row * stride + (size_t)j];
                }
                su[j] += u;
                suu[j] += u * u;
                sxu[j] += at[j] * u;
            }
        }
        memcpy(lanes[lane], sxu, sizeof sxu);
    }
    fold_columns(lanes);
    memcpy(out->su, su, sizeof su);
    memcpy(out->suu, suu, sizeof suu);
    memcpy(out->sxu, lanes[0], sizeof lanes[0]);
}

static void plain_sums(const float *x, size_t stride, size_t length, const float inverse[BATCH],
                       const float offset[BATCH], float low, float top, ColumnSums *out) {
    sum_codes(x, NULL, stride, length, inverse, offset, low, top, out);
}

/* Sums of the values themselves. */
static void sum_columns(const float *restrict x, size_t stride, size_t length,
                        float sums[restrict BATCH]) {
    float lanes[LANES][BATCH];
    for (size_t lane = 0; lane < LANES; lane++) {
        float sum[BATCH] = {0};
        for (size_t row = lane; row < length; row += LANES) {
            for (int j = 0; j < BATCH; j++) {
                sum[j] += x[row * stride + (size_t)j];
            }
        }
        memcpy(lanes[lane], sum, sizeof sum);
    }
    fold_columns(lanes);
    memcpy(sums, lanes[0], sizeof lanes[0]);
}

/* Up to 16 columns of (length, groups) from `first` on, filled up with zeros. */
static void copy_columns(const float *x, size_t length, size_t groups, size_t first,
                         float columns[PIECE * BATCH]) {
    size_t count = smaller(BATCH, groups - first);
    memset(columns, 0, length * BATCH * sizeof *columns);
    for (size_t row = 0; row < length; row++) {
        memcpy(columns + row * BATCH, x + row * groups + first, count * sizeof *columns);
    }
}

static void column_sums(const float *columns, size_t length, size_t groups, float *sums) {
    for (size_t g = 0; g < groups; g += BATCH) {
        float copied[PIECE * BATCH], found[BATCH];
        copy_columns(columns, length, groups, g, copied);
        sum_columns(copied, BATCH, length, found);
        memcpy(sums + g, found, smaller(BATCH, groups - g) * sizeof *sums);
    }
}

static void code_sums(const float *columns, size_t length, size_t groups, const float *inverse,
                      const float *offset, float low, float top, const float *mask, float *su,
                      float *suu, float *sxu) {
    for (size_t g = 0; g < groups; g += BATCH) {
        float copied[PIECE * BATCH], real[PIECE * BATCH];
        float steps[BATCH] = {0}, shifts[BATCH] = {0};
        ColumnSums sums;
        const size_t bytes = smaller(BATCH, groups - g) * sizeof *su;
        memcpy(steps, inverse + g, bytes);
        memcpy(shifts, offset + g, bytes);
        copy_columns(columns, length, groups, g, copied);
        if (mask) {
            copy_columns(mask, length, groups, g, real);
            sum_codes(copied, real, BATCH, length, steps, shifts, low, top, &sums);
        } else {
            plain_sums(copied, BATCH, length, steps, shifts, low, top, &sums);
        }
        memcpy(su + g, sums.su, bytes);
        memcpy(suu + g, sums.suu, bytes);
        memcpy(sxu + g, sums.sxu, bytes);
    }
}

/* Sums over one piece of a long row, with the lanes side by side. */
INLINE void sum_piece(const float *restrict x, size_t n, float inverse, float offset, float low,
                      float top, double sums[3]) {
    float su[LANES] = {0}, suu[LANES] = {0}, sxu[LANES] = {0};
    size_t whole = n / LANES * LANES;
    for (size_t i = 0; i < whole; i += LANES) {
        for (int j = 0; j < LANES; j++) {
            float u = code_of(x[i + j] * inverse + offset, low, top);
            su[j] += u;
            suu[j] += u * u;
            sxu[j] += x[i + j] * u;
        }
    }
    for (size_t i = whole; i < n; i++) {
        float u = code_of(x[i] * inverse + offset, low, top);
        su[i - whole] += u;
        suu[i - whole] += u * u;
        sxu[i - whole] += x[i] * u;
    }
    sums[0] += (double)fold(su);
    sums[1] += (double)fold(suu);
    sums[2] += (double)fold(sxu);
}

/* Su, Suu and Sxu of rows of any length, (candidates, rows, 3): pieces of 256 added in binary64. */
static void long_sums(const float *x, size_t rows, size_t length, size_t candidates,
                      const float *inverse, const float *offset, float low, float top,
                      double *sums) {
    memset(sums, 0, candidates * rows * 3 * sizeof *sums);
    for (size_t r = 0; r < rows; r++, x += length) {
        for (size_t start = 0; start < length; start += PIECE) {
            size_t n = smaller(PIECE, length - start);
            for (size_t c = 0; c < candidates; c++) { /* while the piece is in the cache */
                size_t at = c * rows + r;
                sum_piece(x + start, n, inverse[at], offset[at], low, top, sums + 3 * at);
            }
        }
    }
}

/* --- the search of up to 16 groups -----------------------------------------------------------*/

typedef struct {
    Scheme scheme;
    size_t length;
    float low, top;                     /* of codes */
    double steps, levels;               /* zero steps to a code; the largest code */
    float x[PIECE * BATCH];             /* values as columns, padded with zeros */
    double count[BATCH], total[BATCH];  /* real values and their sum */
    float padding[BATCH];               /* values that are not real */
    float extent_low[BATCH], extent_high[BATCH];
    double keeps_zero[BATCH];           /* 1 where a value is exactly 0 */
    double gain[BATCH], scale[BATCH], zero[BATCH]; /* the best so far */
} Search;

/* Zero point, in steps, of the least-squares line through (code, x). */
INLINE void fit_zero(const Search *s, const double su[BATCH], const double suu[BATCH],
                     const double sxu[BATCH], double zero[BATCH]) {
    for (int j = 0; j < BATCH; j++) {
        double n = s->count[j], sx = s->total[j];
        double spread = n * suu[j] - su[j] * su[j];
        double slope = (n * sxu[j] - su[j] * sx) / (spread > 0 ? spread : 1.0);
        int usable = (spread > 0) & (slope > 0);
        double centre = su[j] - sx / (usable ? slope : 1.0);
        double real = (usable ? centre : 0.0) / n;
        double fine = round_small_wide(clamp_wide(real * s->steps, 0.0, s->levels * s->steps));
        double whole = round_small_wide(clamp_wide(real, 0.0, s->levels)) * s->steps;
        zero[j] = s->keeps_zero[j] != 0 ? whole : fine;
    }
}

/* Judges the codes of one candidate by the best scale that they allow. */
static void offer(Search *restrict s, const float inverse[restrict BATCH],
                  const float offset[restrict BATCH]) {
    ColumnSums sums;
    plain_sums(s->x, BATCH, s->length, inverse, offset, s->low, s->top, &sums);
    double su[BATCH], suu[BATCH], sxu[BATCH], zero[BATCH];
    for (int j = 0; j < BATCH; j++) {
        /* Padding is 0, so its code is known and its sums can be taken out again, exactly. */
        float u = code_of(offset[j], s->low, s->top);
        su[j] = (double)(sums.su[j] - s->padding[j] * u);
        suu[j] = (double)(sums.suu[j] - s->padding[j] * (u * u));
        sxu[j] = (double)sums.sxu[j];
    }
    if (s->scheme.symmetric) {
        for (int j = 0; j < BATCH; j++) {
            zero[j] = (double)(1 << (s->scheme.bits - 1));
        }
    } else {
        fit_zero(s, su, suu, sxu, zero);
    }
    const double to_real = s->scheme.symmetric ? 1.0 : 1.0 / s->steps; /* a power of two */
    const int either_sign = s->scheme.symmetric && s->scheme.bits < 8;
    for (int j = 0; j < BATCH; j++) {
        double real = zero[j] * to_real;
        double xk = sxu[j] - real * s->total[j];
        double kk = suu[j] - 2 * real * su[j] + s->count[j] * real * real;
        double scale = xk / (kk > 0 ? kk : 1.0);
        double gain = xk * scale;
        int better = (kk > 0) & (gain > s->gain[j]) & (either_sign | (scale > 0));
        s->gain[j] = better ? gain : s->gain[j];
        s->scale[j] = better ? scale : s->scale[j];
        s->zero[j] = better ? zero[j] : s->zero[j];
    }
}

static void offer_symmetric(Search *s, Grid grid) {
    const int bits = s->scheme.bits;
    const float centre = (float)(1 << (bits - 1));
    float unit[BATCH], offset[BATCH], inverse[BATCH];
    for (int j = 0; j < BATCH; j++) {
        float down = -s->extent_low[j], up = s->extent_high[j];
        unit[j] = (down > up ? down : up) / (bits == 8 ? 127.0f : centre);
        offset[j] = centre;
    }
    for (float sign = 1.0f; sign >= (bits == 8 ? 1.0f : -1.0f); sign -= 2.0f) {
        for (size_t t = 0; t < grid.factor_count; t++) {
            for (int j = 0; j < BATCH; j++) {
                inverse[j] = sign / (unit[j] * grid.factors[t]);
            }
            offer(s, inverse, offset);
        }
    }
}

static void offer_asymmetric(Search *s, Grid grid) {
    const float n = s->top;
    float unit[BATCH], middle[BATCH], inverse[BATCH], offset[BATCH];
    for (int j = 0; j < BATCH; j++) {
        unit[j] = s->extent_high[j] / n - s->extent_low[j] / n;
        middle[j] = s->extent_high[j] / 2 + s->extent_low[j] / 2;
    }
    for (size_t t = 0; t < grid.factor_count; t++) {
        for (size_t d = 0; d < grid.shift_count; d++) {
            for (int j = 0; j < BATCH; j++) {
                inverse[j] = 1.0f / (unit[j] * grid.factors[t]);
                offset[j] = n / 2 - (middle[j] + grid.shifts[d] * unit[j]) * inverse[j];
            }
            offer(s, inverse, offset);
        }
    }
}

/* The winner's own codes may differ once its scale is fitted: it stands again. */
static void offer_winner(Search *s) {
    float inverse[BATCH], offset[BATCH];
    for (int j = 0; j < BATCH; j++) {
        double scale = s->scale[j] > -TINY && s->scale[j] < TINY ? 1.0 : s->scale[j];
        double centre = (double)(1 << (s->scheme.bits - 1));
        inverse[j] = (float)(1.0 / scale);
        offset[j] = (float)(s->scheme.symmetric ? centre : s->zero[j] / s->steps);
    }
    offer(s, inverse, offset);
}

/* Loads groups `first` and following as columns. Missing groups, and those whose reciprocals or
 * sums would overflow, are all zeros with an extent that is safe to search: nothing is found. */
static void load_groups(Search *s, const float *x, size_t first, size_t n, const int32_t *counts,
                        const float *low, const float *high, const uint8_t *has_zero) {
    memset(s->x, 0, s->length * BATCH * sizeof *s->x);
    for (size_t j = 0; j < BATCH; j++) {
        const size_t g = first + j;
        const int there = j < n;
        const size_t real = there && counts ? (size_t)counts[g] : s->length;
        const float magnitude = !there ? 0 : -low[g] > high[g] ? -low[g] : high[g];
        const int usable = magnitude >= (float)TINY && magnitude <= (float)HUGE_MAGNITUDE;
        s->count[j] = (double)real;
        s->padding[j] = (float)(s->length - real);
        s->extent_low[j] = usable ? low[g] : -1.0f;
        s->extent_high[j] = usable ? high[g] : 0.0f;
        s->keeps_zero[j] = there && has_zero[g];
        s->gain[j] = s->scale[j] = s->zero[j] = 0;
        if (usable) {
            for (size_t i = 0; i < s->length; i++) {
                s->x[i * BATCH + j] = x[g * s->length + i];
            }
        }
    }
    float total[BATCH];
    sum_columns(s->x, BATCH, s->length, total);
    for (int j = 0; j < BATCH; j++) {
        s->total[j] = (double)total[j];
    }
}

INLINE void begin_search(Search *s, Scheme scheme, size_t length) {
    s->scheme = scheme;
    s->length = length;
    s->low = scheme.symmetric && scheme.bits == 8 ? 1.0f : 0.0f;
    s->top = (float)((1 << scheme.bits) - 1);
    s->steps = (double)zero_steps(scheme.bits);
    s->levels = (double)s->top;
}

INLINE void offer_all(Search *s, Grid grid) {
    if (s->scheme.symmetric) {
        offer_symmetric(s, grid);
    } else {
        offer_asymmetric(s, grid);
    }
    offer_winner(s);
}

static int search(const float *x, size_t groups, size_t length, const int32_t *counts,
                  const float *low, const float *high, const uint8_t *has_zero, Scheme scheme,
                  Grid grid, double *scale, int32_t *zero, uint8_t *found) {
    Search *s = malloc(sizeof *s);
    if (!s) {
        return NO_MEMORY;
    }
    begin_search(s, scheme, length);
    for (size_t g = 0; g < groups; g += BATCH) {
        const size_t n = smaller(BATCH, groups - g);
        load_groups(s, x, g, n, counts, low, high, has_zero);
        offer_all(s, grid);
        for (size_t j = 0; j < n; j++) {
            scale[g + j] = s->scale[j];
            zero[g + j] = scheme.symmetric ? 0 : (int32_t)s->zero[j];
            found[g + j] = s->gain[j] > 0;
        }
    }
    free(s);
    return DONE;
}

#endif
