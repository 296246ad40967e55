/* Values to stored blocks in one go: extent, scale and zero point, codes, errors, while 16 groups are
 * in the nearest cache. The composition of the other loops, sections 2, 4 and 5. */
#ifndef QCONVERT_BLOCKS_H
#define QCONVERT_BLOCKS_H

#include "codes.h"
#include "half.h"
#include "search.h"

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

INLINE void store_scale(float scale, enum scale_type type, size_t index, uint8_t *out) {
    const uint16_t narrow = type == SCALE_F16 ? to_half(scale) : to_bfloat(scale);
    if (type == SCALE_F32) {
        memcpy(out + 4 * index, &scale, sizeof scale);
    } else {
        memcpy(out + 2 * index, &narrow, sizeof narrow);
    }
}

/* The range of up to 16 groups, 0 included. */
typedef struct {
    float low[BATCH], high[BATCH], magnitude[BATCH];
    uint8_t has_zero[BATCH];
} Extents;

INLINE void find_extents(const float *x, size_t n, size_t length, Extents *e) {
    float low[BATCH], high[BATCH];
    int64_t zeros[BATCH];
    extrema(x, n, length, low, high, zeros);
    for (size_t j = 0; j < n; j++) {
        e->low[j] = low[j] < 0 ? low[j] : 0.0f;
        e->high[j] = high[j] > 0 ? high[j] : 0.0f;
        e->magnitude[j] = -e->low[j] > e->high[j] ? -e->low[j] : e->high[j];
        e->has_zero[j] = zeros[j] > 0;
    }
}

/* The minmax range of one group. */
INLINE void fit_minmax(const Extents *e, size_t j, Scheme scheme, enum scale_type type,
                       float *scale, int32_t *zero) {
    if (scheme.symmetric) {
        *scale = round_scale(e->magnitude[j] / (float)((1 << (scheme.bits - 1)) - 1), type,
                             e->magnitude[j]);
        *zero = 0;
        return;
    }
    const float n = (float)((1 << scheme.bits) - 1), steps = (float)zero_steps(scheme.bits);
    *scale = round_scale(e->high[j] / n - e->low[j] / n, type, e->magnitude[j]);
    const float real = -e->low[j] / (*scale == 0 ? 1.0f : *scale);
    const float fine = code_of(real * steps, 0.0f, n * steps);
    *zero = (int32_t)(e->has_zero[j] ? code_of(real, 0.0f, n) * steps : fine);
}

/* Steps that the groups need, as observe_groups in quantizers/groups.py has them. */
typedef struct {
    double symmetric[LANES], asymmetric[LANES];
    float smallest, largest;
} Steps;

INLINE void add_steps(Steps *steps, const Extents *e, size_t n, int bits, int either_side) {
    const double top = (double)((1 << (bits - 1)) - 1), levels = (double)((1 << bits) - 1);
    for (size_t j = 0; j < n; j++) {
        const double down = (double)-e->low[j], up = (double)e->high[j];
        const double magnitude = (double)e->magnitude[j];
        const double lower = down / (top + 1) > up / top ? down / (top + 1) : up / top;
        const double upper = up / (top + 1) > down / top ? up / (top + 1) : down / top;
        const double either = lower < upper ? lower : upper;
        const double symmetric = either_side ? either : magnitude / top;
        const double asymmetric = (down + up) / levels;
        steps->symmetric[j] += symmetric * symmetric;
        steps->asymmetric[j] += asymmetric * asymmetric;
        if (e->magnitude[j] > 0) {
            steps->smallest = e->magnitude[j] < steps->smallest ? e->magnitude[j] : steps->smallest;
            steps->largest = e->magnitude[j] > steps->largest ? e->magnitude[j] : steps->largest;
        }
    }
}

INLINE size_t count_outside(const float *x, size_t n, float low, float high) {
    int32_t count = 0;
    for (size_t i = 0; i < n; i++) {
        count += (x[i] < low) | (x[i] > high);
    }
    return (size_t)count;
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
    Steps steps = {.smallest = from_bits(0x7F800000)};
    ErrorLanes lanes = {0};
    WeightedLanes weighted = {0};
    Errors errors = {0};
    uint8_t *codes = task->codes;
    for (size_t g = 0; g < task->groups; g += BATCH) {
        const size_t n = smaller(BATCH, task->groups - g);
        const float *x = task->x + g * length;
        Extents e;
        float scale[BATCH];
        int32_t zero[BATCH];
        find_extents(x, n, length, &e);
        add_steps(&steps, &e, n, scheme.bits, searches && scheme.bits < 8);
        figures->outside += count_outside(x, n * length, task->low, task->high);
        for (size_t j = 0; j < n; j++) {
            fit_minmax(&e, j, scheme, task->scale_type, scale + j, zero + j);
        }
        if (searches) {
            load_groups(s, x, 0, n, NULL, e.low, e.high, e.has_zero);
            if (task->weights.weight) {
                load_weights(s, task->x, g, n, task->weights);
            }
            offer_all(s, task->grid);
            for (size_t j = 0; j < n; j++) {
                if (s->gain[j] > 0) {
                    scale[j] = round_scale((float)s->scale[j], task->scale_type, e.magnitude[j]);
                    zero[j] = scheme.symmetric ? 0 : (int32_t)s->zero[j];
                }
            }
        }
        for (size_t j = 0; j < n; j++) {
            store_scale(scale[j], task->scale_type, g + j, task->scales);
            if (!scheme.symmetric) {
                task->zeros[g + j] = (uint8_t)(scheme.bits == 8 ? zero[j] ^ 0x80 : zero[j]);
            }
        }
        uint8_t narrowed[PIECE * BATCH];
        for (size_t j = 0; j < n; j++) {
            int32_t wide[PIECE];
            float decoded[PIECE];
            const Rule rule = rule_of(scheme, scale[j], zero[j]);
            errors.clipped += (size_t)encode_run(x + j * length, length, &rule, wide);
            for (size_t i = 0; i < length; i++) {
                decoded[i] = decode_value(wide[i], &rule);
            }
            add_errors(&lanes, x + j * length, decoded, length);
            if (task->mean_square) {
                const float *w = task->mean_square + (g + j) % task->weights.period * length;
                add_weighted_errors(&weighted, w, x + j * length, decoded, length);
            }
            narrow(wide, length, narrowed + j * length);
        }
        codes = store_run(narrowed, n * length, scheme.bits, codes);
    }
    free(s);
    finish_errors(&lanes, &errors);
    errors.weighted_signal = fold_wide(weighted.signal);
    errors.weighted_noise = fold_wide(weighted.noise);
    figures->errors = errors;
    figures->symmetric_power = fold_wide(steps.symmetric);
    figures->asymmetric_power = fold_wide(steps.asymmetric);
    figures->smallest = (double)steps.smallest;
    figures->largest = (double)steps.largest;
    return DONE;
}

#endif
