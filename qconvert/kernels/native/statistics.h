/* Moments, histogram, extremes and errors of runs of numbers. */
#ifndef QCONVERT_STATISTICS_H
#define QCONVERT_STATISTICS_H

#include "arithmetic.h"

#include <math.h>
#include <stdlib.h>

#define NUMBER float
#define FINITE finite_f32
#define SURVEY survey_f32
#define CENTRAL central_f32
#define COMPRESS compress_f32
#define OBSERVE observe_f32
#include "moments.h"
#undef NUMBER
#undef FINITE
#undef SURVEY
#undef CENTRAL
#undef COMPRESS
#undef OBSERVE

#define NUMBER double
#define FINITE finite_f64
#define SURVEY survey_f64
#define CENTRAL central_f64
#define COMPRESS compress_f64
#define OBSERVE observe_f64
#include "moments.h"
#undef NUMBER
#undef FINITE
#undef SURVEY
#undef CENTRAL
#undef COMPRESS
#undef OBSERVE

static int all_finite(const float *x, size_t n) {
    int32_t largest = 0;
    for (size_t i = 0; i < n; i++) {
        const int32_t magnitude = magnitude_of(x[i]);
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest < 0x7F800000;
}

static void histogram(const float *restrict x, size_t n, int64_t bins[restrict HISTOGRAM_BINS]) {
    for (size_t i = 0; i < n; i++) {
        bins[bits_of(x[i]) >> 16]++;
    }
}

static void extrema(const float *restrict x, size_t groups, size_t length, float *restrict low,
                    float *restrict high, int64_t *restrict zeros) {
    for (size_t g = 0; g < groups; g++, x += length) {
        int32_t small = INT32_MAX, large = INT32_MIN;
        zeros[g] = 0;
        for (size_t start = 0; start < length;) {
            const size_t stop = smaller(length, start + (1u << 30)); /* an int32 counts */
            int32_t found = 0;
            for (; start < stop; start++) {
                const int32_t order = order_of(bits_of(x[start]));
                small = order < small ? order : small;
                large = order > large ? order : large;
                found += x[start] == 0;
            }
            zeros[g] += found;
        }
        low[g] = from_order(small);
        high[g] = from_order(large);
    }
}

/* Sums of squares in the order of section 6 over a run that arrives in pieces. Errors are those of
 * binary32. */
typedef struct {
    double signal[LANES], noise[LANES];
    int32_t worst;
    unsigned phase; /* lane of the next value */
} ErrorLanes;

/* Adds squares to the lanes from `phase` on. */
APART void add_squares(double lanes[LANES], unsigned phase, const float *restrict x, size_t n) {
    size_t i = 0;
    for (; i < n && phase; i++, phase = (phase + 1) % LANES) {
        lanes[phase] += (double)x[i] * (double)x[i];
    }
    double sums[LANES];
    memcpy(sums, lanes, sizeof sums);
    for (; i + LANES <= n; i += LANES) {
        for (int j = 0; j < LANES; j++) {
            const double wide = (double)x[i + (size_t)j];
            sums[j] += wide * wide;
        }
    }
    memcpy(lanes, sums, sizeof sums);
    for (; i < n; i++, phase++) {
        lanes[phase] += (double)x[i] * (double)x[i];
    }
}

/* All but the signal; leaves the errors in the place of the decoded values. */
INLINE void add_noise(ErrorLanes *lanes, const float *restrict x, float *restrict decoded,
                      size_t n) {
    int32_t worst = lanes->worst;
    for (size_t i = 0; i < n; i++) {
        decoded[i] = x[i] - decoded[i];
        const int32_t size = magnitude_of(decoded[i]);
        worst = size > worst ? size : worst;
    }
    lanes->worst = worst;
    add_squares(lanes->noise, lanes->phase, decoded, n);
    lanes->phase = (unsigned)((lanes->phase + n) % LANES);
}

INLINE void add_errors(ErrorLanes *lanes, const float *restrict x, float *restrict decoded,
                       size_t n) {
    add_squares(lanes->signal, lanes->phase, x, n);
    add_noise(lanes, x, decoded, n);
}

INLINE void finish_errors(ErrorLanes *lanes, Errors *found) {
    found->signal = fold_wide(lanes->signal);
    found->noise = fold_wide(lanes->noise);
    found->worst = (double)from_bits((uint32_t)lanes->worst);
}

/* Weighted sums of squares in the same order. */
typedef struct {
    double signal[LANES], noise[LANES];
    unsigned phase;
} WeightedLanes;

INLINE void add_weighted_error(WeightedLanes *lanes, unsigned lane, float w, float x,
                               float error) {
    const double wide = (double)x, lost = (double)error;
    lanes->signal[lane] += (double)w * (wide * wide);
    lanes->noise[lane] += (double)w * (lost * lost);
}

INLINE void add_weighted_errors(WeightedLanes *lanes, const float *restrict w,
                                const float *restrict x, const float *restrict errors, size_t n) {
    size_t i = 0;
    for (; i < n && lanes->phase; i++) {
        add_weighted_error(lanes, lanes->phase, w[i], x[i], errors[i]);
        lanes->phase = (lanes->phase + 1) % LANES;
    }
    for (; i + LANES <= n; i += LANES) {
        for (unsigned j = 0; j < LANES; j++) {
            add_weighted_error(lanes, j, w[i + j], x[i + j], errors[i + j]);
        }
    }
    for (; i < n; i++) {
        add_weighted_error(lanes, lanes->phase++, w[i], x[i], errors[i]);
    }
}

/* Sums of powers of the distances from a pivot, in the order of section 6. */
typedef struct {
    double sums[4][LANES]; /* of the first to the fourth power */
    unsigned phase;        /* lane of the next value */
} PowerLanes;

INLINE void add_power(PowerLanes *lanes, float x, double pivot) {
    const double d = (double)x - pivot, d2 = d * d;
    lanes->sums[0][lanes->phase] += d;
    lanes->sums[1][lanes->phase] += d2;
    lanes->sums[2][lanes->phase] += d2 * d;
    lanes->sums[3][lanes->phase] += d2 * d2;
    lanes->phase = (lanes->phase + 1) % LANES;
}

APART void add_powers(PowerLanes *restrict lanes, const float *restrict x, size_t n,
                      double pivot) {
    size_t i = 0;
    for (; i < n && lanes->phase; i++) {
        add_power(lanes, x[i], pivot);
    }
    double first[LANES], second[LANES], third[LANES], fourth[LANES];
    memcpy(first, lanes->sums[0], sizeof first);
    memcpy(second, lanes->sums[1], sizeof second);
    memcpy(third, lanes->sums[2], sizeof third);
    memcpy(fourth, lanes->sums[3], sizeof fourth);
    for (; i + LANES <= n; i += LANES) {
        for (int j = 0; j < LANES; j++) {
            const double d = (double)x[i + (size_t)j] - pivot, d2 = d * d;
            first[j] += d;
            second[j] += d2;
            third[j] += d2 * d;
            fourth[j] += d2 * d2;
        }
    }
    memcpy(lanes->sums[0], first, sizeof first);
    memcpy(lanes->sums[1], second, sizeof second);
    memcpy(lanes->sums[2], third, sizeof third);
    memcpy(lanes->sums[3], fourth, sizeof fourth);
    for (; i < n; i++) {
        add_power(lanes, x[i], pivot);
    }
}

static void power_sums(const float *x, size_t n, double pivot, double sums[4]) {
    PowerLanes lanes = {0};
    add_powers(&lanes, x, n, pivot);
    for (int k = 0; k < 4; k++) {
        sums[k] = fold_wide(lanes.sums[k]);
    }
}

static void error_sums(const float *x, const float *decoded, size_t n, Errors *found) {
    ErrorLanes lanes = {0};
    for (size_t i = 0; i < n; i += PIECE) {
        float errors[PIECE];
        const size_t count = smaller(PIECE, n - i);
        memcpy(errors, decoded + i, count * sizeof *errors);
        add_errors(&lanes, x + i, errors, count);
    }
    finish_errors(&lanes, found);
}

#define QUOTIENT 0x1p-22 /* error of a code's place, relative to the weight */

/* As an integer in the order of the magnitudes, NaN above Inf. */
INLINE int64_t wide_magnitude(double v) {
    int64_t bits;
    memcpy(&bits, &v, sizeof bits);
    return bits & INT64_MAX;
}

/* Weights of group g, whose scale is not 0. */
INLINE int64_t worst_of_group(const Decoded *task, const float *weights, const float *values,
                              size_t n, size_t g, double unit) {
    const double low = task->low - task->code_step / 2, high = task->high + task->code_step / 2;
    const double step = fabs(unit) * task->code_step, zero = (double)task->zero[g];
    const double offset = task->offset ? (double)task->offset[g] : 0.0, base = fabs(offset);
    const double of_scale = task->scale_rounding ? (double)task->scale_rounding[g] : 0.0;
    const double of_offset = task->offset_rounding ? (double)task->offset_rounding[g] : 0.0;
    const double fixed = base * of_offset;
    int64_t worst = 0;
    for (size_t i = 0; i < n; i++) {
        const double w = (double)weights[i], v = (double)values[i];
        const double place = (w - offset) / unit + zero;
        const double rounding = (fabs(v - offset) + step / 2) * of_scale + fixed;
        const double error = fabs(w - v) - ((fabs(w) + base) * QUOTIENT + rounding + 0x1p-149);
        const double steps = (error < 0 ? 0.0 : error) / step;
        const int inside = (place >= low) & (place <= high);
        const int64_t size = wide_magnitude(inside ? steps : 0.0);
        worst = size > worst ? size : worst;
    }
    return worst;
}

static int worst_step(const Decoded *task, double *found) {
    const size_t groups = (task->columns + task->group - 1) / task->group;
    int64_t worst = 0;
    int unscaled = 0;
    for (size_t g = 0; g < task->rows * groups; g++) {
        const size_t start = g % groups * task->group, at = g / groups * task->columns + start;
        const size_t n = smaller(task->group, task->columns - start);
        const double unit = (double)task->scale[g] / task->code_step;
        if (unit == 0) {
            for (size_t i = 0; i < n; i++) {
                unscaled |= task->weights[at + i] != 0;
            }
            continue;
        }
        const int64_t size =
            worst_of_group(task, task->weights + at, task->values + at, n, g, unit);
        worst = size > worst ? size : worst;
    }
    memcpy(found, &worst, sizeof worst);
    return unscaled;
}

#endif
