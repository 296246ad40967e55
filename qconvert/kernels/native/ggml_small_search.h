/* ggml's block types of 32 values under an importance, section 8: the bytes of
 * ../reference/ggml/small_search.py. */
#ifndef QCONVERT_GGML_SMALL_SEARCH_H
#define QCONVERT_GGML_SMALL_SEARCH_H

#include "ggml_search.h"

/* `table`: the lowest and the highest code. */
APART void whole_nearest(const float *values, size_t length, const float inverse[BATCH],
                         const void *table, float *codes) {
    const float *bounds = table;
    const float low = bounds[0], top = bounds[1];
    for (size_t i = 0; i < length * BATCH; i++) {
        codes[i] = code_of(values[i] * inverse[i % BATCH], low, top);
    }
}

static void store_columns(const float *codes, size_t groups, int bits, size_t bytes, size_t head,
                          uint8_t *out) {
    for (size_t j = 0; j < groups; j++) {
        int32_t row[GGML_BLOCK];
        for (size_t i = 0; i < GGML_BLOCK; i++) {
            row[i] = (int32_t)codes[i * BATCH + j];
        }
        store_small_codes(row, bits, out + bytes * j + head);
    }
}

/* Q4_0, Q5_0. */
static void encode_centred_weighted(const Columns *c, int bits, size_t blocks, uint8_t *out) {
    static const float four[] = {-8, 7, -8.6f, -7.3f, 7.8f, 9.2f, 6.2f, -9.6f, 10.6f, -6.2f};
    static const float five[] = {-16, 15,  -16.5f, -15.5f, 15.5f, 16.3f,  14.5f,
                                 -17, -15, -17.8f, 17.2f,  14,    -14.4f, 18.5f};
    const size_t bytes = bits == 4 ? 18 : 22;
    const float half = (float)(1 << (bits - 1)), bounds[] = {-half, half - 1};
    float codes[LONGEST_GROUP * BATCH], inverse[BATCH] = {0};
    Fit fit;
    fit_scales(c, bits == 4 ? four : five, bits == 4 ? 10 : 14, whole_nearest, bounds, &fit);
    for (size_t j = 0; j < blocks; j++) {
        store_half(fit.scale[j] * c->power[j], out + bytes * j);
        inverse[j] = inverse_of(from_half(load16(out + bytes * j)) * c->shrink[j]);
    }
    whole_nearest(c->values, GGML_BLOCK, inverse, bounds, codes);
    for (size_t i = 0; i < GGML_BLOCK * BATCH; i++) {
        codes[i] += half;
    }
    store_columns(codes, blocks, bits, bytes, 2, out);
}

typedef struct {
    float top;
    float above[LONGEST_GROUP * BATCH]; /* values from the least on */
    float total[BATCH], moment[BATCH], gain[BATCH], scale[BATCH], least[BATCH];
} Line;

/* The line through codes and values by least squares, if it is the best so far. */
APART void offer_line(const Columns *c, Line *line, const float inverse[BATCH],
                      const float shift[BATCH]) {
    float u[BATCH] = {0}, uu[BATCH] = {0}, xu[BATCH] = {0};
    for (size_t i = 0; i < GGML_BLOCK * BATCH; i += BATCH) {
        const float *above = line->above + i, *weight = c->weights + i;
        for (int j = 0; j < BATCH; j++) {
            const float code = code_of(above[j] * inverse[j] + shift[j], 0.0f, line->top);
            const float weighted = weight[j] * code;
            u[j] += weighted;
            uu[j] += weighted * code;
            xu[j] += weighted * above[j];
        }
    }
    for (int j = 0; j < BATCH; j++) {
        const float total = line->total[j], moment = line->moment[j];
        const float spread = total * uu[j] - u[j] * u[j];
        const float real = (total * xu[j] - moment * u[j]) / (spread > 0 ? spread : 1.0f);
        const float slope = spread > 0 ? real : 0.0f;
        const float start = (moment - slope * u[j]) / total;
        const float found = start * moment + slope * xu[j];
        const int better = found > line->gain[j];
        line->gain[j] = choose(better, found, line->gain[j]);
        line->scale[j] = choose(better, slope, line->scale[j]);
        line->least[j] = choose(better, start, line->least[j]);
    }
}

/* Sets `low` to the least values, `width` to what lies between them and the greatest. */
static void start_line(const Columns *c, Line *line, float low[BATCH], float width[BATCH]) {
    for (int j = 0; j < BATCH; j++) {
        const float *x = c->values + j, *weight = c->weights + j;
        float least = x[0], most = x[0], total = 0, moment = 0;
        for (size_t i = 0; i < GGML_BLOCK * BATCH; i += BATCH) {
            least = x[i] < least ? x[i] : least;
            most = x[i] > most ? x[i] : most;
        }
        least += 0.0f;
        for (size_t i = 0; i < GGML_BLOCK * BATCH; i += BATCH) {
            line->above[i + (size_t)j] = x[i] - least;
            total += weight[i];
            moment += weight[i] * line->above[i + (size_t)j];
        }
        low[j] = least;
        width[j] = most > least ? most - least : 1.0f;
        line->total[j] = total;
        line->moment[j] = moment;
        line->scale[j] = 0;
        line->least[j] = moment / total;
        line->gain[j] = line->least[j] * moment;
    }
}

/* Q4_1, Q5_1. */
static void encode_from_minimum_weighted(const Columns *c, int bits, size_t blocks, uint8_t *out) {
    static const float stretches[][2] = {
        {0, 0},       {-0.9f, 0},    {-0.7f, 0}, {-0.5f, 0},       {-0.3f, 0},     {-0.1f, 0},
        {0.1f, 0},    {0.3f, 0},     {0.5f, 0},  {0.7f, 0},        {0.9f, 0},      {-1, 0.5f},
        {-0.5f, 0.25f}, {0.5f, -0.25f}, {1, -0.5f}, {1.5f, -0.75f}, {2, -1},        {3, -1.5f},
        {0.5f, -0.5f}, {1, 0},       {1, -1},    {2, 0},           {2, -2},        {3, 0},
        {3, -3},      {4.5f, 0},     {4.5f, -4.5f}, {-0.5f, -0.5f}, {-0.5f, 0.5f}, {-0.5f, 1},
        {0, 0.4f},    {0, -0.4f},
    };
    const size_t bytes = bits == 4 ? 20 : 24;
    float low[BATCH], width[BATCH], inverse[BATCH] = {0}, shift[BATCH] = {0};
    float codes[LONGEST_GROUP * BATCH];
    Line line;
    line.top = (float)((1 << bits) - 1);
    start_line(c, &line, low, width);
    for (size_t s = 0; s < sizeof stretches / sizeof *stretches; s++) {
        for (int j = 0; j < BATCH; j++) {
            inverse[j] = (line.top + stretches[s][0]) / width[j];
            shift[j] = stretches[s][1];
        }
        offer_line(c, &line, inverse, shift);
    }
    for (int fits = 0; fits < 2; fits++) {
        for (int j = 0; j < BATCH; j++) {
            const float s = line.scale[j];
            inverse[j] = s >= 0x1p-40f || s <= -0x1p-40f ? 1.0f / s : 0.0f;
            shift[j] = -line.least[j] * inverse[j];
        }
        offer_line(c, &line, inverse, shift);
    }
    float least[BATCH] = {0};
    memset(inverse, 0, sizeof inverse);
    for (size_t j = 0; j < blocks; j++) {
        uint8_t *at = out + bytes * j;
        store_half(line.scale[j] * c->power[j], at);
        store_half((line.least[j] + low[j]) * c->power[j], at + 2);
        inverse[j] = inverse_of(from_half(load16(at)) * c->shrink[j]);
        least[j] = from_half(load16(at + 2)) * c->shrink[j];
    }
    for (size_t i = 0; i < GGML_BLOCK * BATCH; i++) {
        const float steps = (c->values[i] - least[i % BATCH]) * inverse[i % BATCH];
        codes[i] = code_of(finite_or_zero(steps), 0.0f, line.top);
    }
    store_columns(codes, blocks, bits, bytes, 4, out);
}

INLINE void encode_small_weighted(enum ggml_type type, const float *x, const float *importance,
                                  size_t period, size_t blocks, uint8_t *out) {
    for (size_t b = 0; b < blocks; b += BATCH, out += BATCH * ggml_types[type].bytes) {
        const size_t n = smaller(BATCH, blocks - b);
        Columns c;
        load_batch(x, importance, period, b, n, GGML_BLOCK, 1, &c);
        switch (type) {
        case GGML_Q4_0: encode_centred_weighted(&c, 4, n, out); break;
        case GGML_Q5_0: encode_centred_weighted(&c, 5, n, out); break;
        case GGML_Q4_1: encode_from_minimum_weighted(&c, 4, n, out); break;
        default: encode_from_minimum_weighted(&c, 5, n, out); break;
        }
    }
}

#endif
