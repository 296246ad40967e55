/* Values to codes and back with a scale and zero point, section 2. */
#ifndef QCONVERT_CODES_H
#define QCONVERT_CODES_H

#include "packing.h"
#include "statistics.h"

/* How to make and read the codes of one group. */
typedef struct {
    float divisor, scale;
    float shift;     /* the real zero point, added to the quotient; 0 when symmetric */
    float low, top;  /* of the rounded sum */
    float bias;      /* from there to unsigned codes */
} Rule;

INLINE Rule rule_of(Scheme scheme, float scale, int32_t zero) {
    Rule rule = {.divisor = scale == 0 ? 1.0f : scale, .scale = scale};
    if (scheme.symmetric) {
        rule.bias = (float)(1 << (scheme.bits - 1));
        rule.low = scheme.bits == 8 ? -127.0f : -rule.bias;
        rule.top = rule.bias - 1.0f;
    } else {
        /* Division by 1 or 4 is exact for every zero point in range. */
        rule.shift = (float)zero / (float)zero_steps(scheme.bits);
        rule.top = (float)((1 << scheme.bits) - 1);
    }
    return rule;
}

/* k is exact, so its one rounding is that of the product. */
INLINE float decode_value(float code, const Rule *rule) {
    return (code - (rule->bias + rule->shift)) * rule->scale;
}

/* Adds the clipped values to one of 16 sums: a single sum would have to be folded after every run. */
typedef struct {
    int32_t lanes[LANES];
} Clipped;

/* Code of a value, as an integer, and what it decodes to; returns whether it was clipped. Adding a
 * shift of 0 changes no rounded value, so both symmetries share the arithmetic. Clamping one step
 * outside the codes before rounding keeps round_small() exact and tells which values were clipped. */
INLINE int encode_value(float x, const Rule *rule, int32_t *restrict code,
                        float *restrict decoded) {
    const float rounded =
        code_of(x / rule->divisor + rule->shift, rule->low - 1.0f, rule->top + 1.0f);
    const float kept = clamp(rounded, rule->low, rule->top), biased = kept + rule->bias;
    *code = (int32_t)biased;
    *decoded = decode_value(biased, rule);
    return kept != rounded;
}

INLINE void encode_run(const float *restrict x, size_t n, const Rule *rule,
                       int32_t *restrict codes, float *restrict decoded,
                       Clipped *restrict clipped) {
    const Rule r = *rule;
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int j = 0; j < LANES; j++) {
            clipped->lanes[j] += encode_value(x[i + (size_t)j], &r, codes + i + j, decoded + i + j);
        }
    }
    for (; i < n; i++) {
        clipped->lanes[0] += encode_value(x[i], &r, codes + i, decoded + i);
    }
}

INLINE size_t count_clipped(const Clipped *clipped) {
    size_t count = 0;
    for (int j = 0; j < LANES; j++) {
        count += (size_t)clipped->lanes[j];
    }
    return count;
}

static size_t encode(const float *x, size_t groups, size_t length, const float *scale,
                     const int32_t *zero, Scheme scheme, uint8_t *codes) {
    Clipped clipped = {0};
    for (size_t g = 0; g < groups; g++) {
        Rule rule = rule_of(scheme, scale[g], scheme.symmetric ? 0 : zero[g]);
        for (size_t i = 0; i < length; i += PIECE) {
            const size_t at = g * length + i, n = smaller(PIECE, length - i);
            int32_t wide[PIECE];
            float decoded[PIECE];
            encode_run(x + at, n, &rule, wide, decoded, &clipped);
            for (size_t j = 0; j < n; j++) { /* one width of number to a loop vectorises best */
                codes[at + j] = (uint8_t)wide[j];
            }
        }
    }
    return count_clipped(&clipped);
}

static void decode(const uint8_t *codes, size_t groups, size_t length, const float *scale,
                   const int32_t *zero, Scheme scheme, float *out) {
    for (size_t g = 0; g < groups; g++) {
        Rule rule = rule_of(scheme, scale[g], scheme.symmetric ? 0 : zero[g]);
        for (size_t i = g * length; i < (g + 1) * length; i++) {
            out[i] = decode_value((float)codes[i], &rule);
        }
    }
}

/* Stores `count` codes, full groups below 8 bits. Returns the end. */
INLINE uint8_t *store_codes(const int32_t *restrict codes, size_t count, int bits,
                            uint8_t *restrict packed) {
    if (bits < 8) {
        pack_wide(codes, count / PACK_GROUP, bits, packed);
        return packed + count / 8 * (size_t)bits;
    }
    for (size_t i = 0; i < count; i++) {
        packed[i] = (uint8_t)(codes[i] ^ 0x80); /* offset 128 to two's complement */
    }
    return packed + count;
}

static void encode_rows(const float *x, size_t rows, size_t columns, const float *scale,
                        const int32_t *zero, size_t groups, Scheme scheme,
                        const float *mean_square, size_t period, uint8_t *packed, Errors *found) {
    const size_t stored = stored_row(scheme, columns);
    const size_t step = groups == 1 ? 0 : 1; /* one set of parameters may serve all groups */
    ErrorLanes lanes = {0};
    WeightedLanes weighted = {0};
    size_t group = 0;
    Clipped clipped = {0};
    for (size_t r = 0; r < rows; r++, x += columns) {
        for (size_t start = 0; start < stored; start += PIECE) {
            int32_t codes[PIECE];
            float decoded[PIECE], tail[PIECE];
            const size_t count = smaller(PIECE, stored - start);
            const size_t real = smaller(PIECE, columns - start);
            const float *values = x + start;
            if (real < PIECE) { /* runs of 16 below, so the tail gets zeros to read */
                memcpy(tail, values, real * sizeof *tail);
                memset(tail + real, 0, (PIECE - real) * sizeof *tail);
                values = tail;
            }
            const size_t run = scheme.block ? scheme.block : PIECE;
            for (size_t i = 0; i < real; i += run) {
                const int32_t z = scheme.symmetric ? 0 : zero[group];
                const Rule rule = rule_of(scheme, scale[group], z);
                const size_t n = smaller(run, (real - i + LANES - 1) / LANES * LANES);
                encode_run(values + i, n, &rule, codes + i, decoded + i, &clipped);
                group += scheme.block ? step : 0;
            }
            add_errors(&lanes, values, decoded, real);
            if (mean_square) {
                const float *w = mean_square + (r % period) * columns + start;
                add_weighted_errors(&weighted, w, values, decoded, real);
            }
            for (size_t i = real; i < count; i++) {
                codes[i] = scheme.bits == 8 ? 0x80 : 0; /* padding is 0 as stored */
            }
            packed = store_codes(codes, count, scheme.bits, packed);
        }
        group += scheme.block ? 0 : step;
    }
    finish_errors(&lanes, found);
    found->clipped = count_clipped(&clipped);
    found->weighted_signal = fold_wide(weighted.signal);
    found->weighted_noise = fold_wide(weighted.noise);
}

#endif
