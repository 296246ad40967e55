/* Moments, histogram, extremes and errors of runs of numbers. */
#ifndef QCONVERT_STATISTICS_H
#define QCONVERT_STATISTICS_H

#include "arithmetic.h"

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
        const int32_t magnitude = (int32_t)(bits_of(x[i]) & 0x7FFFFFFF); /* grows with |x| */
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

/* Sums of squares in the order of section 6 over a run that arrives in pieces. */
typedef struct {
    double signal[LANES], noise[LANES], worst[LANES];
    unsigned phase; /* lane of the next value */
} ErrorLanes;

INLINE void add_error(ErrorLanes *lanes, int lane, float x, float decoded) {
    double wide = (double)x;
    double error = wide - (double)decoded;
    double size = error < 0 ? -error : error;
    lanes->signal[lane] += wide * wide;
    lanes->noise[lane] += error * error;
    lanes->worst[lane] = size > lanes->worst[lane] ? size : lanes->worst[lane];
}

INLINE void add_errors(ErrorLanes *lanes, const float *restrict x, const float *restrict decoded,
                       size_t n) {
    size_t i = 0;
    while (i < n && lanes->phase) {
        add_error(lanes, (int)lanes->phase, x[i], decoded[i]);
        lanes->phase = (lanes->phase + 1) % LANES;
        i++;
    }
    double signal[LANES], noise[LANES], worst[LANES];
    memcpy(signal, lanes->signal, sizeof signal);
    memcpy(noise, lanes->noise, sizeof noise);
    memcpy(worst, lanes->worst, sizeof worst);
    for (; i + LANES <= n; i += LANES) {
        for (int j = 0; j < LANES; j++) {
            double wide = (double)x[i + j];
            double error = wide - (double)decoded[i + j];
            double size = error < 0 ? -error : error;
            signal[j] += wide * wide;
            noise[j] += error * error;
            worst[j] = size > worst[j] ? size : worst[j];
        }
    }
    memcpy(lanes->signal, signal, sizeof signal);
    memcpy(lanes->noise, noise, sizeof noise);
    memcpy(lanes->worst, worst, sizeof worst);
    for (; i < n; i++) {
        add_error(lanes, (int)lanes->phase++, x[i], decoded[i]);
    }
}

INLINE void finish_errors(ErrorLanes *lanes, Errors *found) {
    double worst = 0;
    for (int j = 0; j < LANES; j++) {
        worst = lanes->worst[j] > worst ? lanes->worst[j] : worst;
    }
    found->signal = fold_wide(lanes->signal);
    found->noise = fold_wide(lanes->noise);
    /* The sum of squares is NaN only if an error is: then so is the worst. */
    found->worst = found->noise == found->noise ? worst : found->noise;
}

/* Weighted sums of squares in the same order. */
typedef struct {
    double signal[LANES], noise[LANES];
    unsigned phase;
} WeightedLanes;

INLINE void add_weighted_error(WeightedLanes *lanes, unsigned lane, float w, float x,
                               float decoded) {
    const double wide = (double)x, error = wide - (double)decoded;
    lanes->signal[lane] += (double)w * (wide * wide);
    lanes->noise[lane] += (double)w * (error * error);
}

INLINE void add_weighted_errors(WeightedLanes *lanes, const float *restrict w,
                                const float *restrict x, const float *restrict decoded, size_t n) {
    size_t i = 0;
    for (; i < n && lanes->phase; i++) {
        add_weighted_error(lanes, lanes->phase, w[i], x[i], decoded[i]);
        lanes->phase = (lanes->phase + 1) % LANES;
    }
    for (; i + LANES <= n; i += LANES) {
        for (unsigned j = 0; j < LANES; j++) {
            add_weighted_error(lanes, j, w[i + j], x[i + j], decoded[i + j]);
        }
    }
    for (; i < n; i++) {
        add_weighted_error(lanes, lanes->phase++, w[i], x[i], decoded[i]);
    }
}

static void error_sums(const float *x, const float *decoded, size_t n, Errors *found) {
    ErrorLanes lanes = {0};
    add_errors(&lanes, x, decoded, n);
    finish_errors(&lanes, found);
}

#endif
