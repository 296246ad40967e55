/* Values to stored groups in one go, from the bytes of a file on: numbers, extent, scale and zero
 * point, codes, errors, while 16 blocks are in the nearest cache, or 16 rows in the next. The
 * composition of the other loops, sections 2, 4 and 5. What there is of each group stands in rows
 * of 16, so that it vectorises. */
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

enum { RUN = PIECE * BATCH }; /* values at once */

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

/* Steps that the groups need, as observe_groups in ../reference/statistics.py has them. */
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

/* `n` zero points as stored, a byte each, where there are any; returns the end. */
INLINE uint8_t *store_zeros(const int32_t zero[BATCH], size_t n, Scheme scheme, uint8_t *out) {
    for (size_t j = 0; j < n && !scheme.symmetric; j++) {
        *out++ = (uint8_t)(scheme.bits == 8 ? zero[j] ^ 0x80 : zero[j]);
    }
    return out;
}

/* Of `n` groups, of which most have none. */
INLINE size_t count_outside(const float *x, size_t n, size_t length, const Extents *e, float low,
                            float high) {
    size_t count = 0;
    for (size_t j = 0; j < n; j++, x += length) {
        if (e->low[j] < low || e->high[j] > high) {
            int32_t outside = 0;
            for (size_t i = 0; i < length; i++) {
                outside += (x[i] < low) | (x[i] > high);
            }
            count += (size_t)outside;
        }
    }
    return count;
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

/* What goes through both kinds of groups. */
typedef struct {
    Steps steps;
    PowerLanes powers;
    ErrorLanes errors;
    WeightedLanes weighted;
    float range[2];
    size_t outside;
    Clipped clipped;
} Pass;

INLINE Pass begin_pass(void) {
    return (Pass){.steps = {.smallest = 0x7F800000}, /* Inf */
                  .range = {from_bits(0x7F800000), from_bits(0xFF800000)}};
}

INLINE void finish_pass(Pass *p, BlockFigures *figures) {
    *figures = (BlockFigures){.outside = p->outside};
    finish_errors(&p->errors, &figures->errors);
    figures->errors.clipped = count_clipped(&p->clipped);
    figures->errors.weighted_signal = fold_wide(p->weighted.signal);
    figures->errors.weighted_noise = fold_wide(p->weighted.noise);
    figures->symmetric_power = fold_wide(p->steps.symmetric);
    figures->asymmetric_power = fold_wide(p->steps.asymmetric);
    figures->smallest = (double)from_bits((uint32_t)p->steps.smallest);
    figures->largest = (double)from_bits((uint32_t)p->steps.largest);
    figures->minimum = (double)p->range[0];
    figures->maximum = (double)p->range[1];
    for (int k = 0; k < 4; k++) {
        figures->powers[k] = fold_wide(p->powers.sums[k]);
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
    Pass pass = begin_pass();
    uint8_t *codes = task->codes, *scales = task->scales, *zeros = task->zeros;
    int status = DONE;
    for (size_t g = 0; g < task->groups; g += BATCH) {
        const size_t n = smaller(BATCH, task->groups - g), count = n * length;
        float x[RUN], decoded[RUN], scale[BATCH];
        int32_t wide[RUN], zero[BATCH];
        Extents e;
        load_values(task->source, g * length, count, x);
        if (!find_extents(x, n, length, &e, pass.range)) {
            status = NOT_FINITE;
            break;
        }
        add_powers(&pass.powers, x, count, task->pivot);
        add_steps(&pass.steps, &e, scheme.bits, searches && scheme.bits < 8);
        pass.outside += count_outside(x, n, length, &e, task->low, task->high);
        fit_minmax(&e, scheme, task->scale_type, scale, zero);
        if (searches) {
            fit_mse(s, task, x, g, n, &e, scale, zero);
        }
        scales = store_scales(scale, n, task->scale_type, scales);
        zeros = store_zeros(zero, n, scheme, zeros);
        for (size_t j = 0; j < n; j++) {
            const Rule rule = rule_of(scheme, scale[j], zero[j]);
            const size_t at = j * length;
            encode_run(x + at, length, &rule, wide + at, decoded + at, &pass.clipped);
        }
        add_noise(&pass.errors, x, decoded, count);
        for (size_t j = 0; j < n && task->mean_square; j++) {
            const float *w = task->mean_square + (g + j) % task->weights.period * length;
            const size_t at = j * length;
            add_weighted_errors(&pass.weighted, w, x + at, decoded + at, length);
        }
        codes = store_codes(wide, count, scheme.bits, codes);
    }
    free(s);
    finish_pass(&pass, figures);
    return status;
}

/* The extents of `n` rows from `first` on, and what else there is to see before codes are made. */
INLINE int survey_rows(const Channels *task, size_t first, size_t n, Extents *e, Pass *pass) {
    memset(e, 0, sizeof *e);
    for (size_t j = 0; j < n; j++) {
        for (size_t c = 0; c < task->columns; c += RUN) {
            const size_t count = smaller(RUN, task->columns - c);
            float x[RUN];
            Extents part;
            load_values(task->source, (first + j) * task->columns + c, count, x);
            if (!find_extents(x, 1, count, &part, pass->range)) {
                return 0;
            }
            e->low[j] = part.low[0] < e->low[j] ? part.low[0] : e->low[j];
            e->high[j] = part.high[0] > e->high[j] ? part.high[0] : e->high[j];
            e->has_zero[j] |= part.has_zero[0];
            add_powers(&pass->powers, x, count, task->pivot);
            pass->outside += count_outside(x, 1, count, &part, task->low, task->high);
        }
        e->magnitude[j] = -e->low[j] > e->high[j] ? -e->low[j] : e->high[j];
    }
    return 1;
}

/* One row to codes; returns the end of what was stored. */
INLINE uint8_t *encode_row(const Channels *task, size_t row, const Rule *rule, Pass *pass,
                           uint8_t *codes) {
    const Scheme scheme = task->scheme;
    const size_t columns = task->columns, stored = stored_row(scheme, columns);
    for (size_t c = 0; c < stored; c += RUN) {
        float x[RUN], decoded[RUN];
        int32_t wide[RUN];
        const size_t count = smaller(RUN, stored - c), n = smaller(count, columns - c);
        load_values(task->source, row * columns + c, n, x);
        encode_run(x, n, rule, wide, decoded, &pass->clipped);
        add_noise(&pass->errors, x, decoded, n);
        if (task->mean_square) {
            const float *w = task->mean_square + row % task->period * columns + c;
            add_weighted_errors(&pass->weighted, w, x, decoded, n);
        }
        for (size_t i = n; i < count; i++) {
            wide[i] = scheme.bits == 8 ? 0x80 : 0; /* padding is 0 as stored */
        }
        codes = store_codes(wide, count, scheme.bits, codes);
    }
    return codes;
}

static int quantize_channels(const Channels *task, BlockFigures *figures) {
    const Scheme scheme = task->scheme;
    Pass pass = begin_pass();
    uint8_t *codes = task->codes, *scales = task->scales, *zeros = task->zeros;
    for (size_t r = 0; r < task->rows; r += BATCH) {
        const size_t n = smaller(BATCH, task->rows - r);
        Extents e;
        float scale[BATCH];
        int32_t zero[BATCH];
        if (!survey_rows(task, r, n, &e, &pass)) {
            return NOT_FINITE;
        }
        add_steps(&pass.steps, &e, scheme.bits, task->either_side);
        fit_minmax(&e, scheme, SCALE_F32, scale, zero);
        for (size_t j = 0; j < n && task->scale; j++) {
            scale[j] = task->scale[r + j];
            zero[j] = scheme.symmetric ? 0 : task->zero[r + j];
        }
        scales = store_scales(scale, n, SCALE_F32, scales);
        zeros = store_zeros(zero, n, scheme, zeros);
        for (size_t j = 0; j < n; j++) {
            const Rule rule = rule_of(scheme, scale[j], zero[j]);
            codes = encode_row(task, r + j, &rule, &pass, codes);
        }
    }
    finish_pass(&pass, figures);
    return DONE;
}

#endif
