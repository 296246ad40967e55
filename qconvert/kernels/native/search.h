/* The mse search: scales and zero points judged by the squared error that they leave, section 5. */
#ifndef QCONVERT_SEARCH_H
#define QCONVERT_SEARCH_H

#include "columns.h"

/* As in ../scale_search.py: beyond these, reciprocals or sums of binary32 overflow. */
#define TINY 0x1p-100
#define HUGE_MAGNITUDE 0x1p110

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
static void plain_sums(const float *restrict x, size_t stride, size_t length,
                       const float inverse[restrict BATCH], const float offset[restrict BATCH],
                       float low, float top, ColumnSums *restrict out) {
    float lanes[LANES][BATCH];
    float su[BATCH] = {0}, suu[BATCH] = {0};
    for (size_t lane = 0; lane < LANES; lane++) {
        float sxu[BATCH] = {0};
        for (size_t row = lane; row < length; row += LANES) {
            const float *at = x + row * stride;
            for (int j = 0; j < BATCH; j++) {
                const float u = code_of(at[j] * inverse[j] + offset[j], low, top);
                su[j] += u;
                suu[j] = ADD_SQUARE(suu[j], u);
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

/* The same with weights, where all three sums go by lanes: Swu, Swuu and Swxu; `wx` is w * x. */
static void weighted_sums(const float *restrict x, const float *restrict w,
                          const float *restrict wx, size_t length,
                          const float inverse[restrict BATCH], const float offset[restrict BATCH],
                          float low, float top, ColumnSums *restrict out) {
    float lanes[3][LANES][BATCH];
    for (size_t lane = 0; lane < LANES; lane++) {
        float su[BATCH] = {0}, suu[BATCH] = {0}, sxu[BATCH] = {0};
        for (size_t row = lane; row < length; row += LANES) {
            const size_t at = row * BATCH;
            for (int j = 0; j < BATCH; j++) {
                float u = code_of(x[at + (size_t)j] * inverse[j] + offset[j], low, top);
                float wu = w[at + (size_t)j] * u;
                su[j] += wu;
                suu[j] += wu * u;
                sxu[j] += wx[at + (size_t)j] * u;
            }
        }
        memcpy(lanes[0][lane], su, sizeof su);
        memcpy(lanes[1][lane], suu, sizeof suu);
        memcpy(lanes[2][lane], sxu, sizeof sxu);
    }
    for (int k = 0; k < 3; k++) {
        fold_columns(lanes[k]);
    }
    memcpy(out->su, lanes[0][0], sizeof out->su);
    memcpy(out->suu, lanes[1][0], sizeof out->suu);
    memcpy(out->sxu, lanes[2][0], sizeof out->sxu);
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

/* Sums over one piece of a long row, with the lanes side by side; w may be NULL: no weights. */
INLINE void sum_piece(const float *restrict x, const float *restrict w, size_t n, float inverse,
                      float offset, float low, float top, double sums[3]) {
    float su[LANES] = {0}, suu[LANES] = {0}, sxu[LANES] = {0};
    size_t whole = n / LANES * LANES;
    for (size_t i = 0; i < whole; i += LANES) {
        for (int j = 0; j < LANES; j++) {
            float u = code_of(x[i + j] * inverse + offset, low, top);
            float wu = w ? w[i + j] * u : u;
            su[j] += wu;
            suu[j] += wu * u;
            sxu[j] += (w ? w[i + j] * x[i + j] : x[i + j]) * u;
        }
    }
    for (size_t i = whole; i < n; i++) {
        float u = code_of(x[i] * inverse + offset, low, top);
        float wu = w ? w[i] * u : u;
        su[i - whole] += wu;
        suu[i - whole] += wu * u;
        sxu[i - whole] += (w ? w[i] * x[i] : x[i]) * u;
    }
    sums[0] += (double)fold(su);
    sums[1] += (double)fold(suu);
    sums[2] += (double)fold(sxu);
}

/* Su, Suu and Sxu of rows of any length, (candidates, rows, 3): pieces of 256 added in binary64.
 * Weights (rows, length), or NULL. */
static void long_sums(const float *x, const float *weights, size_t rows, size_t length,
                      size_t candidates, const float *inverse, const float *offset, float low,
                      float top, double *sums) {
    memset(sums, 0, candidates * rows * 3 * sizeof *sums);
    for (size_t r = 0; r < rows; r++, x += length) {
        for (size_t start = 0; start < length; start += PIECE) {
            size_t n = smaller(PIECE, length - start);
            for (size_t c = 0; c < candidates; c++) { /* while the piece is in the cache */
                size_t at = c * rows + r;
                if (weights) {
                    sum_piece(x + start, weights + r * length + start, n, inverse[at], offset[at],
                              low, top, sums + 3 * at);
                } else {
                    sum_piece(x + start, NULL, n, inverse[at], offset[at], low, top,
                              sums + 3 * at);
                }
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
    int weighted;                       /* what follows is of use, and sums are weighted */
    float w[PIECE * BATCH], wx[PIECE * BATCH]; /* weights as columns, and times the values */
    float near_low[BATCH], near_high[BATCH];   /* the range of the values that matter */
} Search;

/* Zero point, in steps, of the least-squares line through (code, x). */
INLINE void fit_zero(const Search *s, const double su[BATCH], const double suu[BATCH],
                     const double sxu[BATCH], double zero[BATCH]) {
    for (int j = 0; j < BATCH; j++) {
        double n = s->count[j], sx = s->total[j];
        double spread = n * suu[j] - su[j] * su[j];
        double lean = n * sxu[j] - su[j] * sx; /* their quotient is the slope */
        int usable = (spread > 0) & (lean > 0);
        double centre = su[j] * lean - sx * spread;
        double real = usable ? centre / (lean * n) : 0.0;
        double fine = round_small_wide(clamp_wide(real * s->steps, 0.0, s->levels * s->steps));
        double whole = round_small_wide(clamp_wide(real, 0.0, s->levels)) * s->steps;
        zero[j] = s->keeps_zero[j] != 0 ? whole : fine;
    }
}

/* Judges the codes of one candidate by the best scale that they allow. */
static void offer(Search *restrict s, const float inverse[restrict BATCH],
                  const float offset[restrict BATCH]) {
    ColumnSums sums;
    if (s->weighted) {
        weighted_sums(s->x, s->w, s->wx, s->length, inverse, offset, s->low, s->top, &sums);
    } else {
        plain_sums(s->x, BATCH, s->length, inverse, offset, s->low, s->top, &sums);
    }
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

static void offer_symmetric(Search *s, const float low[BATCH], const float high[BATCH],
                            Grid grid, int both_signs) {
    const int bits = s->scheme.bits;
    const float centre = (float)(1 << (bits - 1));
    float unit[BATCH], offset[BATCH], inverse[BATCH];
    for (int j = 0; j < BATCH; j++) {
        float down = -low[j], up = high[j];
        unit[j] = (down > up ? down : up) / (bits == 8 ? 127.0f : centre);
        offset[j] = centre;
    }
    for (float sign = 1.0f; sign >= (both_signs ? -1.0f : 1.0f); sign -= 2.0f) {
        for (size_t t = 0; t < grid.factor_count; t++) {
            for (int j = 0; j < BATCH; j++) {
                inverse[j] = sign / (unit[j] * grid.factors[t]);
            }
            offer(s, inverse, offset);
        }
    }
}

static void offer_asymmetric(Search *s, const float low[BATCH], const float high[BATCH],
                             Grid grid) {
    const float n = s->top;
    float unit[BATCH], middle[BATCH], inverse[BATCH], offset[BATCH];
    for (int j = 0; j < BATCH; j++) {
        unit[j] = high[j] / n - low[j] / n;
        middle[j] = high[j] / 2 + low[j] / 2;
    }
    for (size_t t = 0; t < grid.factor_count; t++) {
        for (int j = 0; j < BATCH; j++) {
            inverse[j] = 1.0f / (unit[j] * grid.factors[t]);
            offset[j] = n / 2 - middle[j] * inverse[j];
        }
        offer(s, inverse, offset);
    }
}

/* The winner as a candidate. */
typedef struct {
    double scale[BATCH], zero[BATCH];
} Winner;

INLINE void take_winner(const Search *s, Winner *w) {
    const double centre = (double)(1 << (s->scheme.bits - 1));
    for (int j = 0; j < BATCH; j++) {
        w->scale[j] = s->scale[j] > -TINY && s->scale[j] < TINY ? 1.0 : s->scale[j];
        w->zero[j] = s->scheme.symmetric ? centre : s->zero[j] / s->steps;
    }
}

/* With its scale times 1 + change and its zero point moved by so many codes. Without either its own
 * codes may still differ: the scale was fitted. */
INLINE void offer_beside(Search *s, const Winner *w, double change, double move) {
    const double factor = 1.0 + change;
    float inverse[BATCH], offset[BATCH];
    for (int j = 0; j < BATCH; j++) {
        inverse[j] = (float)(1.0 / (w->scale[j] * factor));
        offset[j] = (float)(w->zero[j] + move);
    }
    offer(s, inverse, offset);
}

INLINE void offer_moves(Search *s, Grid grid) {
    const double zero_move = 0.25;
    Winner w;
    for (size_t i = 0; i < grid.move_count; i++) {
        const double change = (double)grid.moves[i];
        if (!s->scheme.symmetric) {
            take_winner(s, &w);
            offer_beside(s, &w, 0, zero_move);
            offer_beside(s, &w, 0, -zero_move);
        }
        take_winner(s, &w);
        offer_beside(s, &w, change, 0);
        offer_beside(s, &w, -change, 0);
    }
    take_winner(s, &w);
    offer_beside(s, &w, 0, 0);
}

/* Loads `n` groups as columns. Missing groups, and those whose reciprocals or
 * sums would overflow, are all zeros with an extent that is safe to search: nothing is found. */
static void load_groups(Search *s, const float *x, size_t n, const int32_t *counts,
                        const float *low, const float *high, const int32_t *has_zero) {
    static const float zeros[PIECE];
    const float *rows[BATCH];
    for (size_t j = 0; j < BATCH; j++) {
        const int there = j < n;
        const size_t real = there && counts ? (size_t)counts[j] : s->length;
        const float magnitude = !there ? 0 : -low[j] > high[j] ? -low[j] : high[j];
        const int usable = magnitude >= (float)TINY && magnitude <= (float)HUGE_MAGNITUDE;
        s->count[j] = (double)real;
        s->padding[j] = (float)(s->length - real);
        s->extent_low[j] = usable ? low[j] : -1.0f;
        s->extent_high[j] = usable ? high[j] : 0.0f;
        s->keeps_zero[j] = there && has_zero[j];
        s->gain[j] = s->scale[j] = s->zero[j] = 0;
        rows[j] = usable ? x + j * s->length : zeros;
    }
    load_columns(rows, s->length, s->x);
    float total[BATCH];
    sum_columns(s->x, BATCH, s->length, total);
    for (int j = 0; j < BATCH; j++) {
        s->total[j] = (double)total[j];
    }
    s->weighted = 0;
}

/* The range of what is left of the values by their reach; all of it where that is too small. */
INLINE void find_near(Search *s, size_t j, const float *restrict x, const float *restrict reach) {
    float low[LANES] = {0}, high[LANES] = {0};
    for (size_t i = 0; i < s->length; i++) {
        const float v = x[i] * reach[i];
        low[i % LANES] = v < low[i % LANES] ? v : low[i % LANES];
        high[i % LANES] = v > high[i % LANES] ? v : high[i % LANES];
    }
    for (size_t i = 1; i < LANES; i++) {
        low[0] = low[i] < low[0] ? low[i] : low[0];
        high[0] = high[i] > high[0] ? high[i] : high[0];
    }
    const float magnitude = -low[0] > high[0] ? -low[0] : high[0];
    const int usable = magnitude >= (float)TINY && magnitude <= (float)HUGE_MAGNITUDE;
    s->near_low[j] = usable ? low[0] : s->extent_low[j];
    s->near_high[j] = usable ? high[0] : s->extent_high[j];
}

/* Weights of the groups just loaded, `first` and following, the values behind `counts` having
 * none. */
static void load_weights(Search *s, const float *x, size_t first, size_t n, Weights weights) {
    const float *rows[BATCH];
    for (size_t j = 0; j < BATCH; j++) { /* groups that are not there: any weights will do */
        const size_t at = ((first + j) % weights.period) * s->length;
        rows[j] = weights.weight + at;
        s->padding[j] = 0;
        s->near_low[j] = s->extent_low[j];
        s->near_high[j] = s->extent_high[j];
        if (j < n) {
            find_near(s, j, x + j * s->length, weights.reach + at);
        }
    }
    load_columns(rows, s->length, s->w);
    for (size_t i = 0; i < s->length * BATCH; i++) {
        s->wx[i] = s->w[i] * s->x[i];
    }
    float count[BATCH], total[BATCH];
    sum_columns(s->w, BATCH, s->length, count);
    sum_columns(s->wx, BATCH, s->length, total);
    for (int j = 0; j < BATCH; j++) {
        s->count[j] = (double)count[j];
        s->total[j] = (double)total[j];
    }
    s->weighted = 1;
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
    const Grid minmax = {grid.factors, NULL, 1, 0};
    const float *low = s->weighted ? s->near_low : s->extent_low;
    const float *high = s->weighted ? s->near_high : s->extent_high;
    if (s->scheme.symmetric) {
        offer_symmetric(s, low, high, grid, s->scheme.bits < 8);
        if (s->weighted) {
            offer_symmetric(s, s->extent_low, s->extent_high, minmax, 0);
        }
    } else {
        offer_asymmetric(s, low, high, grid);
        if (s->weighted) {
            offer_asymmetric(s, s->extent_low, s->extent_high, minmax);
        }
    }
    offer_moves(s, grid);
}

static int search(const float *x, size_t groups, size_t length, const int32_t *counts,
                  const float *low, const float *high, const uint8_t *has_zero,
                  const Weights *weights, Scheme scheme, Grid grid, double *scale, int32_t *zero,
                  uint8_t *found) {
    Search *s = malloc(sizeof *s);
    if (!s) {
        return NO_MEMORY;
    }
    begin_search(s, scheme, length);
    for (size_t g = 0; g < groups; g += BATCH) {
        const size_t n = smaller(BATCH, groups - g);
        int32_t with_zero[BATCH] = {0};
        for (size_t j = 0; j < n; j++) {
            with_zero[j] = has_zero[g + j];
        }
        load_groups(s, x + g * length, n, counts ? counts + g : NULL, low + g, high + g, with_zero);
        if (weights) {
            load_weights(s, x + g * length, g, n, *weights);
        }
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
