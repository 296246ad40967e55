/* Values to the groups of other tools' formats in one go: codes as a stream of bits, zero points that
 * are whole codes, or biases. As blocks.h for our own. */
#ifndef QCONVERT_STREAMS_H
#define QCONVERT_STREAMS_H

#include "bit_stream.h"
#include "blocks.h"

/* What is added to the multiples of the scales, rounded as it is stored. */
INLINE void find_biases(const float scale[BATCH], const int32_t zero[BATCH], Scheme scheme,
                        enum scale_type type, float bias[BATCH]) {
    const float steps = (float)zero_steps(scheme.bits);
    EACH_COLUMN {
        const float found = -((float)zero[j] / steps) * scale[j];
        bias[j] = magnitude_of(scale[j]) < 0x7F800000 ? found : 0.0f;
    }
    switch (type) {
    case SCALE_F16: EACH_COLUMN { bias[j] = from_half(to_half(bias[j])); } break;
    case SCALE_BF16: EACH_COLUMN { bias[j] = from_bits((uint32_t)to_bfloat(bias[j]) << 16); } break;
    default: break;
    }
}

/* `n` zero points, a byte each, where there are any; returns the end. */
INLINE uint8_t *store_whole_zeros(const int32_t zero[BATCH], size_t n, Scheme scheme, uint8_t *out) {
    for (size_t j = 0; j < n && !scheme.symmetric; j++) {
        *out++ = (uint8_t)(zero[j] / zero_steps(scheme.bits));
    }
    return out;
}

static int quantize_stream(const Streams *of, Errors *found) {
    const Blocks *task = &of->blocks;
    const Scheme scheme = task->scheme;
    const size_t length = scheme.block;
    Search *s = NULL;
    if (task->grid.factor_count > 0) {
        s = malloc(sizeof *s);
        if (!s) {
            return NO_MEMORY;
        }
        begin_search(s, scheme, length);
    }
    ErrorLanes errors = {0};
    WeightedLanes weighted = {0};
    Clipped clipped = {0};
    uint8_t *codes = task->codes, *scales = task->scales, *zeros = task->zeros;
    int status = DONE;
    for (size_t g = 0; g < task->groups; g += BATCH) {
        const size_t n = smaller(BATCH, task->groups - g), count = n * length;
        float x[RUN], above[RUN], decoded[RUN], scale[BATCH], bias[BATCH], range[2] = {0};
        int32_t wide[RUN], zero[BATCH];
        Extents e;
        load_values(task->source, g * length, count, x);
        if (!find_extents(x, n, length, &e, range)) {
            status = NOT_FINITE;
            break;
        }
        for (int j = 0; j < BATCH && !of->biased; j++) {
            e.has_zero[j] = 1; /* as where a zero must stay one */
        }
        fit_minmax(&e, scheme, task->scale_type, scale, zero);
        if (s) {
            fit_mse(s, task, x, g, n, &e, scale, zero);
        }
        scales = store_scales(scale, n, task->scale_type, scales);
        if (of->biased) {
            find_biases(scale, zero, scheme, task->scale_type, bias);
            zeros = store_scales(bias, n, task->scale_type, zeros);
        } else {
            zeros = store_whole_zeros(zero, n, scheme, zeros);
        }
        add_squares(errors.signal, errors.phase, x, count);
        for (size_t j = 0; j < n && of->biased; j++) {
            for (size_t i = j * length; i < (j + 1) * length; i++) {
                above[i] = x[i] - bias[j];
            }
        }
        const float *values = of->biased ? above : x;
        for (size_t j = 0; j < n; j++) {
            const Rule rule = rule_of(scheme, scale[j], of->biased ? 0 : zero[j]);
            const size_t at = j * length;
            encode_run(values + at, length, &rule, wide + at, decoded + at, &clipped);
        }
        add_noise(&errors, values, decoded, count);
        for (size_t j = 0; j < n && task->mean_square; j++) {
            const float *w = task->mean_square + (g + j) % task->weights.period * length;
            const size_t at = j * length;
            add_weighted_errors(&weighted, w, x + at, decoded + at, length);
        }
        codes = store_stream(wide, count, scheme.bits, codes);
    }
    free(s);
    finish_errors(&errors, found);
    found->clipped = count_clipped(&clipped);
    found->weighted_signal = fold_wide(weighted.signal);
    found->weighted_noise = fold_wide(weighted.noise);
    return status;
}

#endif
