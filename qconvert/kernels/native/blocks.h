/* Values to stored blocks in one go, from the bytes of a file on: numbers, extent, scale and zero
 * point, codes, errors, while 16 groups are in the nearest cache. The composition of the other loops,
 * sections 2, 4 and 5. What there is of each group stands in rows of 16, so that it vectorises. */
#ifndef QCONVERT_BLOCKS_H
#define QCONVERT_BLOCKS_H

#include "codes.h"
#include "half.h"
#include "search.h"
#include "source.h"

/* A scale as stored; that of a group whose magnitude is not 0 never becomes 0. */
INLINE float round_scale(float scale, enum scale_type type, float magnitude) {
    static const float smallest[] = {
        [SCALE_F16] = 0x1p-24f, [SCALE_BF16] = 0x1p-133f, [SCALE_F32] = 0x1p-149f};
    const float stored = type == SCALE_F16    ? from_half(to_half(scale))
                         : type == SCALE_BF16 ? from_bits((uint32_t)to_bfloat(scale) << 16)
                                              : scale;
    const float sign = from_bits(bits_of(smallest[type]) | (bits_of(scale) & 0x80000000));
    return stored == 0 && magnitude > 0 ? sign : stored;
}

INLINE void round_scales(float scale[BATCH], enum scale_type type, const float magnitude[BATCH]) {
    switch (type) { /* a loop for each type */
    case SCALE_F16: EACH_COLUMN { scale[j] = round_scale(scale[j], SCALE_F16, magnitude[j]); } break;
    case SCALE_BF16: EACH_COLUMN { scale[j] = round_scale(scale[j], SCALE_BF16, magnitude[j]); } break;
    default: EACH_COLUMN { scale[j] = round_scale(scale[j], SCALE_F32, magnitude[j]); } break;
    }
}

/* `n` scales as stored; returns the end. */
INLINE uint8_t *store_scales(const float scale[BATCH], size_t n, enum scale_type type,
                             uint8_t *out) {
    if (type == SCALE_F32) {
        memcpy(out, scale, n * sizeof *scale);
        return out + n * sizeof *scale;
    }
    uint16_t narrow[BATCH];
    for (int j = 0; j < BATCH; j++) {
        narrow[j] = type == SCALE_F16 ? to_half(scale[j]) : to_bfloat(scale[j]);
    }
    memcpy(out, narrow, n * sizeof *narrow);
    return out + n * sizeof *narrow;
}

/* The range of 16 groups, 0 included; groups that are not there are all zeros. */
typedef struct {
    float low[BATCH], high[BATCH], magnitude[BATCH];
    int32_t has_zero[BATCH];
} Extents;

/* Returns whether all values are finite; `range` takes in the extremes of the values themselves. */
INLINE int find_extents(const float *x, size_t n, size_t length, Extents *e, float range[2]) {
    float low[BATCH] = {0}, high[BATCH] = {0};
    int64_t zeros[BATCH] = {0};
    int32_t largest = 0;
    extrema(x, n, length, low, high, zeros);
    for (size_t j = 0; j < n; j++) {
        range[0] = low[j] < range[0] ? low[j] : range[0];
        range[1] = high[j] > range[1] ? high[j] : range[1];
    }
    EACH_COLUMN {
        const int32_t down = magnitude_of(low[j]), up = magnitude_of(high[j]);
        const int32_t magnitude = down > up ? down : up;
        largest = magnitude > largest ? magnitude : largest;
        e->low[j] = low[j] < 0 ? low[j] : 0.0f;
        e->high[j] = high[j] > 0 ? high[j] : 0.0f;
        e->magnitude[j] = -e->low[j] > e->high[j] ? -e->low[j] : e->high[j];
        e->has_zero[j] = zeros[j] > 0;
    }
    return largest < 0x7F800000;
}

/* The minmax range of each group. */
INLINE void fit_minmax(const Extents *e, Scheme scheme, enum scale_type type, float scale[BATCH],
                       int32_t zero[BATCH]) {
    if (scheme.symmetric) {
        const float top = (float)((1 << (scheme.bits - 1)) - 1);
        EACH_COLUMN {
            scale[j] = e->magnitude[j] / top;
            zero[j] = 0;
        }
        round_scales(scale, type, e->magnitude);
        return;
    }
    const float n = (float)((1 << scheme.bits) - 1), steps = (float)zero_steps(scheme.bits);
    EACH_COLUMN {
        scale[j] = e->high[j] / n - e->low[j] / n;
    }
    round_scales(scale, type, e->magnitude);
    EACH_COLUMN {
        const float real = -e->low[j] / (scale[j] == 0 ? 1.0f : scale[j]);
        const float fine = code_of(real * steps, 0.0f, n * steps);
        const float whole = code_of(real, 0.0f, n) * steps;
        zero[j] = (int32_t)(e->has_zero[j] ? whole : fine);
    }
}

/* Steps that the groups need, as observe_groups in quantizers/groups.py has them. */
typedef struct {
    double symmetric[LANES], asymmetric[LANES];
    int32_t smallest, largest; /* magnitudes as integers */
} Steps;

INLINE void add_steps(Steps *steps, const Extents *e, int bits, int either_side) {
    const double top = (double)((1 << (bits - 1)) - 1), levels = (double)((1 << bits) - 1);
    EACH_COLUMN {
        const double down = (double)-e->low[j], up = (double)e->high[j];
        const double a = down / (top + 1), b = up / top, c = up / (top + 1), d = down / top;
        const double lower = a > b ? a : b, upper = c > d ? c : d;
        const double either = lower < upper ? lower : upper;
        const double symmetric = either_side ? either : (double)e->magnitude[j] / top;
        const double asymmetric = (down + up) / levels;
        steps->symmetric[j] += symmetric * symmetric;
        steps->asymmetric[j] += asymmetric * asymmetric;
    }
    EACH_COLUMN {
        const int32_t magnitude = magnitude_of(e->magnitude[j]);
        const int32_t some = magnitude > 0 ? magnitude : INT32_MAX;
        steps->smallest = some < steps->smallest ? some : steps->smallest;
        steps->largest = magnitude > steps->largest ? magnitude : steps->largest;
    }
}

INLINE size_t count_outside(const float *x, size_t n, float low, float high) {
    int32_t count = 0;
    for (size_t i = 0; i < n; i++) {
        count += (x[i] < low) | (x[i] > high);
    }
    return (size_t)count;
}

/* The best range of each group by squared error, where the search finds one. */
INLINE void fit_mse(Search *s, const Blocks *task, const float *x, size_t first, size_t n,
                    const Extents *e, float scale[BATCH], int32_t zero[BATCH]) {
    float searched[BATCH];
    load_groups(s, x, n, NULL, e->low, e->high, e->has_zero);
    if (task->weights.weight) {
        load_weights(s, x, first, n, task->weights);
    }
    offer_all(s, task->grid);
    EACH_COLUMN {
        searched[j] = (float)s->scale[j];
    }
    round_scales(searched, task->scale_type, e->magnitude);
    for (int j = 0; j < BATCH; j++) {
        if (s->gain[j] > 0) {
            scale[j] = searched[j];
            zero[j] = task->scheme.symmetric ? 0 : (int32_t)s->zero[j];
        }
    }
}

static int quantize_blocks(const Blocks *task, BlockFigures *figures) {
    const Scheme scheme = task->scheme;
    const size_t length = scheme.block;
    const int searches = task->grid.factor_count > 0;
    Search *s = NULL;
    if (searches) {
        s = malloc(sizeof *s);
        if (!s) {
            return NO_MEMORY;
        }
        begin_search(s, scheme, length);
    }
    memset(figures, 0, sizeof *figures);
    Steps steps = {.smallest = 0x7F800000}; /* Inf */
    float range[2] = {from_bits(0x7F800000), from_bits(0xFF800000)};
    PowerLanes powers = {0};
    ErrorLanes lanes = {0};
    WeightedLanes weighted = {0};
    Errors errors = {0};
    uint8_t *codes = task->codes, *scales = task->scales, *zeros = task->zeros;
    int status = DONE;
    for (size_t g = 0; g < task->groups; g += BATCH) {
        const size_t n = smaller(BATCH, task->groups - g), count = n * length;
        float x[PIECE * BATCH], decoded[PIECE * BATCH], scale[BATCH];
        int32_t wide[PIECE * BATCH], zero[BATCH];
        Extents e;
        load_values(task->source, g * length, count, x);
        if (!find_extents(x, n, length, &e, range)) {
            status = NOT_FINITE;
            break;
        }
        add_powers(&powers, x, count, task->pivot);
        add_steps(&steps, &e, scheme.bits, searches && scheme.bits < 8);
        figures->outside += count_outside(x, count, task->low, task->high);
        fit_minmax(&e, scheme, task->scale_type, scale, zero);
        if (searches) {
            fit_mse(s, task, x, g, n, &e, scale, zero);
        }
        scales = store_scales(scale, n, task->scale_type, scales);
        for (size_t j = 0; j < n && !scheme.symmetric; j++) {
            *zeros++ = (uint8_t)(scheme.bits == 8 ? zero[j] ^ 0x80 : zero[j]);
        }
        for (size_t j = 0; j < n; j++) {
            const Rule rule = rule_of(scheme, scale[j], zero[j]);
            const size_t at = j * length;
            errors.clipped += (size_t)encode_run(x + at, length, &rule, wide + at, decoded + at);
        }
        add_noise(&lanes, x, decoded, count);
        for (size_t j = 0; j < n && task->mean_square; j++) {
            const float *w = task->mean_square + (g + j) % task->weights.period * length;
            add_weighted_errors(&weighted, w, x + j * length, decoded + j * length, length);
        }
        codes = store_codes(wide, count, scheme.bits, codes);
    }
    free(s);
    finish_errors(&lanes, &errors);
    errors.weighted_signal = fold_wide(weighted.signal);
    errors.weighted_noise = fold_wide(weighted.noise);
    figures->errors = errors;
    figures->symmetric_power = fold_wide(steps.symmetric);
    figures->asymmetric_power = fold_wide(steps.asymmetric);
    figures->smallest = (double)from_bits((uint32_t)steps.smallest);
    figures->largest = (double)from_bits((uint32_t)steps.largest);
    figures->minimum = (double)range[0];
    figures->maximum = (double)range[1];
    figures->powers[0] = fold_wide(powers.first);
    figures->powers[1] = fold_wide(powers.second);
    figures->powers[2] = fold_wide(powers.third);
    figures->powers[3] = fold_wide(powers.fourth);
    return status;
}

#endif
