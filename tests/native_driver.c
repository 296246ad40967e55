/* Runs every loop of every variant on made-up numbers and prints a digest of all results: equal for
 * all variants, compilers and processors. tests/test_native.py builds it, with sanitizers too. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

static uint64_t state, digest;

static uint32_t draw(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 32);
}

static void *make(size_t bytes) {
    void *memory = malloc(bytes ? bytes : 1); /* of the very size, for the sanitizer */
    if (!memory) {
        abort();
    }
    return memory;
}

static uint8_t *bytes(size_t n) {
    uint8_t *out = make(n);
    for (size_t i = 0; i < n; i++) {
        out[i] = (uint8_t)draw();
    }
    return out;
}

static int32_t *integers(size_t n, uint32_t below) {
    int32_t *out = make(n * sizeof *out);
    for (size_t i = 0; i < n; i++) {
        out[i] = (int32_t)(draw() % below);
    }
    return out;
}

/* Zeros, subnormal numbers and a wide range of others, both signs. */
static float *numbers(size_t n) {
    float *out = make(n * sizeof *out);
    for (size_t i = 0; i < n; i++) {
        const uint32_t exponent = draw() % 16 == 0 ? draw() % 3 : 100 + draw() % 28;
        const uint32_t bits = (draw() & 0x807FFFFF) | exponent << 23;
        memcpy(out + i, &bits, sizeof bits);
    }
    return out;
}

static float *scales(size_t n, int negative) {
    float *out = make(n * sizeof *out);
    for (size_t i = 0; i < n; i++) {
        out[i] = (float)(1 + draw() % 1000) / 8192.0f * (negative && draw() % 2 ? -1.0f : 1.0f);
    }
    return out;
}

/* Adds results to the digest (FNV-1a) and frees them. */
static void take(void *results, size_t size) {
    for (size_t i = 0; i < size; i++) {
        digest = (digest ^ ((uint8_t *)results)[i]) * 0x100000001B3u;
    }
    free(results);
}

static void check(int status) {
    if (status != DONE) {
        abort();
    }
}

static void run_statistics(const Kernels *k, size_t n) {
    uint8_t *raw = bytes(2 * n + 1);
    float *x = numbers(n), *y = numbers(n), *table = numbers(256);
    double *wide = make(n * sizeof *wide);
    for (int which = 0; which < 3; which++) {
        float *out = make(n * sizeof *out);
        which == 0   ? k->widen_bf16(raw + 1, n, out)
        : which == 1 ? k->widen_f16(raw + 1, n, out)
                     : k->widen_table(raw, n, table, out);
        take(out, n * sizeof *out);
    }
    for (size_t i = 0; i < n; i++) {
        wide[i] = (double)x[i] * 1.1;
    }
    Statistics *found = calloc(2, sizeof *found);
    check(k->observe_f32(x, n, found));
    check(k->observe_f64(wide, n, found + 1));
    take(found, 2 * sizeof *found);
    if (n > 5) {
        const uint32_t nan = 0x7FC00000, inf = 0xFF800000;
        float *bad = make(n * sizeof *bad);
        memcpy(bad, x, n * sizeof *bad);
        memcpy(bad + 3, &nan, sizeof nan);
        memcpy(bad + n - 1, &inf, sizeof inf);
        found = calloc(1, sizeof *found);
        check(k->observe_f32(bad, n, found));
        take(found, sizeof *found);
        free(bad);
    }
    int64_t *bins = calloc(HISTOGRAM_BINS, sizeof *bins);
    k->histogram(x, n, bins);
    take(bins, HISTOGRAM_BINS * sizeof *bins);
    Errors *errors = calloc(1, sizeof *errors);
    k->error_sums(x, y, n, errors);
    take(errors, sizeof *errors);
    free(raw);
    free(x);
    free(y);
    free(table);
    free(wide);
}

static void run_groups(const Kernels *k, size_t groups, size_t length, Scheme scheme) {
    static const float factors[] = {1.02f, 0.9f, 0.7f}, moves[] = {0.06f, 0.02f};
    const Grid grid = {factors, moves, 3, 2};
    const size_t n = groups * length;
    const float top = (float)((1 << scheme.bits) - 1);
    float *x = numbers(n), *scale = scales(groups, scheme.symmetric);
    int32_t *zero = integers(groups, scheme.bits == 8 ? 256 : 4u << scheme.bits);
    int32_t *counts = integers(groups, (uint32_t)length);
    uint8_t *has_zero = bytes(groups);
    float *low = make(groups * sizeof *low), *high = make(groups * sizeof *high);
    int64_t *zeros = make(groups * sizeof *zeros);
    for (size_t g = 0; g < groups; g++) {
        counts[g]++;
        has_zero[g] &= 1;
        for (size_t i = (size_t)counts[g]; i < length; i++) {
            x[g * length + i] = 0;
        }
    }
    k->extrema(x, groups, length, low, high, zeros);
    take(zeros, groups * sizeof *zeros);
    for (size_t g = 0; g < groups; g++) {
        low[g] = low[g] < 0 ? low[g] : 0;
        high[g] = high[g] > 0 ? high[g] : 0;
    }
    float *weight = scales(n, 0), *reach = make(n * sizeof *reach);
    for (size_t i = 0; i < n; i++) {
        reach[i] = (float)(draw() % 17) / 16;
    }
    const Weights weights = {groups / 2 + 1, weight, reach};
    for (int weighted = 0; weighted < 2; weighted++) {
        double *fitted = make(groups * sizeof *fitted);
        int32_t *points = make(groups * sizeof *points);
        uint8_t *found = make(groups);
        check(k->search(x, groups, length, counts, low, high, has_zero,
                        weighted ? &weights : NULL, scheme, grid, fitted, points, found));
        take(fitted, groups * sizeof *fitted);
        take(points, groups * sizeof *points);
        take(found, groups);
    }

    float *inverse = scales(groups, 0);
    double *rows = make(3 * groups * sizeof *rows);
    k->long_sums(x, NULL, groups, length, 1, inverse, high, 0, top, rows);
    take(rows, 3 * groups * sizeof *rows);
    rows = make(3 * groups * sizeof *rows);
    k->long_sums(x, weight, groups, length, 1, inverse, high, 0, top, rows);
    take(rows, 3 * groups * sizeof *rows);

    uint8_t *codes = make(n);
    float *decoded = make(n * sizeof *decoded);
    size_t *clipped = make(sizeof *clipped);
    *clipped = k->encode(x, groups, length, scale, zero, scheme, codes);
    k->decode(codes, groups, length, scale, zero, scheme, decoded);
    take(codes, n);
    take(decoded, n * sizeof *decoded);
    take(clipped, sizeof *clipped);
    if (length % 16 == 0) {
        const Scheme blocks = {scheme.bits, scheme.symmetric, length};
        const size_t even = groups / 2 * 2, stored_codes = packed_bytes(even * length, scheme.bits);
        for (int i = 0; i < 2 * SCALE_TYPES; i++) {
            const enum scale_type type = (enum scale_type)(i / 2);
            uint8_t *packed = make(stored_codes), *stored = make(even * 4), *points8 = make(even);
            const Grid none = {0};
            Blocks task = {
                .scheme = blocks,
                .scale_type = type,
                .grid = type ? grid : none,
                .source = {SOURCE_F32, (const uint8_t *)x},
                .groups = even,
                .low = -1.0f,
                .high = 1.0f,
                .pivot = 0.25,
                .codes = packed,
                .scales = stored,
                .zeros = points8,
            };
            if (i % 2) {
                task.weights = weights;
                task.mean_square = weight;
            }
            BlockFigures figures;
            check(k->quantize_blocks(&task, &figures));
            double *sums = make(7 * sizeof *sums);
            sums[0] = figures.errors.weighted_signal;
            sums[1] = figures.errors.weighted_noise;
            sums[2] = figures.errors.noise;
            memcpy(sums + 3, figures.powers, sizeof figures.powers);
            take(sums, 7 * sizeof *sums);
            take(packed, stored_codes);
            take(stored, even * (type == SCALE_F32 ? 4 : 2));
            take(points8, scheme.symmetric ? 0 : even);
            for (int biased = 0; biased <= !scheme.symmetric; biased++) {
                const size_t size = type == SCALE_F32 ? 4 : 2;
                Errors *errors = calloc(1, sizeof *errors);
                task.codes = make(stored_codes);
                task.scales = make(even * size);
                task.zeros = make(even * size);
                memset(task.zeros, 0, even * size);
                const Streams streams = {task, biased};
                check(k->quantize_stream(&streams, errors));
                take(task.codes, stored_codes);
                take(task.scales, even * size);
                take(task.zeros, even * size);
                take(errors, sizeof *errors);
            }
        }
    }
    const size_t row_bytes = packed_bytes(stored_row(scheme, length), scheme.bits);
    for (int given = 0; given < 2; given++) {
        uint8_t *packed = make(groups * row_bytes), *stored = make(groups * 4);
        uint8_t *points8 = make(groups);
        const Channels task = {
            .scheme = scheme,
            .source = {SOURCE_F32, (const uint8_t *)x},
            .rows = groups,
            .columns = length,
            .low = -1.0f,
            .high = 1.0f,
            .pivot = 0.25,
            .either_side = given,
            .scale = given ? scale : NULL,
            .zero = zero,
            .codes = packed,
            .scales = stored,
            .zeros = points8,
            .mean_square = given ? weight : NULL,
            .period = 1,
        };
        BlockFigures *figures = make(sizeof *figures);
        check(k->quantize_channels(&task, figures));
        take(figures, sizeof *figures);
        take(packed, groups * row_bytes);
        take(stored, groups * 4);
        take(points8, scheme.symmetric ? 0 : groups);
    }
    free(x);
    free(scale);
    free(zero);
    free(counts);
    free(weight);
    free(reach);
    free(has_zero);
    free(low);
    free(high);
    free(inverse);
}

static void run_rows(const Kernels *k, size_t rows, size_t columns, Scheme scheme, size_t samples,
                     int32_t zero_point) {
    const size_t groups = row_groups(scheme, columns), stored = stored_row(scheme, columns);
    const size_t size = rows * packed_bytes(stored, scheme.bits);
    float *x = numbers(rows * columns), *scale = scales(rows * groups, scheme.symmetric);
    int32_t *zero = integers(rows * groups, scheme.bits == 8 ? 256 : 4u << scheme.bits);
    uint8_t *packed = make(size);
    Errors *errors = calloc(1, sizeof *errors);
    k->encode_rows(x, rows, columns, scale, zero, rows * groups, scheme, x, 1, packed, errors);
    take(errors, sizeof *errors);
    take(packed, size);

    packed = bytes(size);
    int8_t *inputs = (int8_t *)bytes(samples * columns);
    float *y = make(samples * rows * sizeof *y);
    const Product task = {scheme, packed, rows,    stored,     columns, scale, zero,
                          groups, inputs, samples, zero_point, y};
    check(k->products->product(&task));
    take(y, samples * rows * sizeof *y);
    int16_t *wide = make(rows * columns * sizeof *wide);
    for (size_t i = 0; i < rows * columns; i++) {
        wide[i] = (int16_t)((int)(draw() % 511) - 255);
    }
    int32_t *sums = make(samples * rows * sizeof *sums);
    check(k->products->integer_dots(wide, 1, rows, inputs, samples, columns, sums));
    take(sums, samples * rows * sizeof *sums);
    free(wide);
    free(x);
    free(scale);
    free(zero);
    free(packed);
    free(inputs);
}

static void run_packing(const Kernels *k, size_t groups) {
    for (int width = 1; width <= 8; width++) {
        uint8_t *values = bytes(groups * PACK_GROUP), *packed = make(groups * 4 * (size_t)width);
        for (size_t i = 0; i < groups * PACK_GROUP; i++) {
            values[i] &= (uint8_t)((1 << width) - 1);
        }
        k->pack(values, groups, width, packed);
        k->unpack(packed, groups, width, values);
        take(values, groups * PACK_GROUP);
        take(packed, groups * 4 * (size_t)width);
    }
    const size_t columns = 77, parts = (columns + 31) / 32;
    for (int bits = 2; bits <= 8; bits++) {
        const size_t stride = (columns * (size_t)bits + 7) / 8, n = groups * columns;
        uint8_t *codes = bytes(n), *packed = make(groups * stride);
        for (size_t i = 0; i < n; i++) {
            codes[i] &= (uint8_t)((1 << bits) - 1);
        }
        k->pack_stream(codes, groups, columns, bits, stride, packed);
        k->unpack_stream(packed, groups, columns, bits, stride, codes);
        take(codes, n);
        take(packed, groups * stride);
    }
    float *weights = numbers(groups * columns), *near = numbers(groups * columns);
    float *scale = numbers(groups * parts), *offset = numbers(groups * parts);
    int32_t *zero = integers(groups * parts, 64);
    for (int offsets = 0; offsets <= 1; offsets++) {
        const Decoded task = {weights, near, groups, columns, 32, scale, offsets ? offset : NULL,
                              zero, 4, 0, 60, offsets ? scale : NULL, offsets ? offset : NULL};
        double *worst = make(sizeof *worst);
        k->worst_step(&task, worst);
        take(worst, sizeof *worst);
    }
    free(weights), free(near), free(scale), free(offset), free(zero);
    for (enum source_type type = 0; type < SOURCE_TYPES; type++) {
        const size_t values = groups * 100, bytes = values * (type == SOURCE_F32 ? 4 : 2);
        float *x = numbers(values);
        uint8_t *data = make(bytes);
        Errors *errors = make(sizeof *errors);
        memset(errors, 0, sizeof *errors);
        const Source source = {SOURCE_F32, (const uint8_t *)x};
        check(k->cast(source, values, type, data, errors));
        take(errors, sizeof *errors);
        take(data, bytes);
        free(x);
    }
    for (enum ggml_type type = 0; type < GGML_TYPES; type++) {
        const size_t values = groups * ggml_types[type].values;
        const size_t bytes = groups * ggml_types[type].bytes;
        float *x = numbers(values), *importance = make(values * sizeof *importance);
        for (size_t i = 0; i < values; i++) {
            importance[i] = (float)(i % 7);
        }
        for (size_t period = 0; period <= 1; period++) {
            uint8_t *data = make(bytes);
            float *decoded = make(values * sizeof *decoded);
            k->ggml->encode(type, x, importance, period, groups, data);
            Errors *errors = make(sizeof *errors);
            memset(errors, 0, sizeof *errors);
            const Source source = {SOURCE_F32, (const uint8_t *)x};
            check(k->ggml->quantize(type, source, importance, period, groups, data, errors));
            take(errors, sizeof *errors);
            k->ggml->decode(type, data, groups, decoded);
            take(data, bytes);
            take(decoded, values * sizeof *decoded);
        }
        free(x);
        free(importance);
    }
}

/* Levels with signed steps: searched, decoded and multiplied. */
static void run_levels(const Kernels *k, size_t rows, size_t columns, LevelCode code,
                       size_t samples, int32_t zero_point) {
    const size_t blocks = (columns + code.block - 1) / code.block;
    const size_t padded = (columns + PACK_GROUP - 1) / PACK_GROUP * PACK_GROUP;
    const size_t size = rows * packed_bytes(padded, code.bits);
    float *x = numbers(rows * columns), *unit = scales(rows, 0), *square = scales(columns, 0);
    float *weights = scales(blocks * code.block, 0);
    for (size_t i = columns; i < blocks * code.block; i++) {
        weights[i] = 0;
    }
    for (int weighted = columns % code.block != 0; weighted < 2; weighted++) {
        uint8_t *codes = make(size), *steps = make(rows * blocks);
        Errors *errors = calloc(1, sizeof *errors);
        const LevelRows task = {code, x, rows, columns, unit, weighted ? weights : NULL,
                                weighted ? square : NULL, codes, steps};
        check(k->levels_encode(&task, errors));
        take(errors, sizeof *errors);
        take(codes, size);
        take(steps, rows * blocks);
    }
    uint8_t *packed = bytes(size);
    int8_t *steps = (int8_t *)bytes(rows * blocks), *shifts = make(rows * blocks);
    for (size_t i = 0; i < rows * blocks; i++) {
        steps[i] = (int8_t)(steps[i] / (1 << (8 - code.step_bits)));
        shifts[i] = (int8_t)(draw() % 2 ? code.shift : 0);
    }
    const StoredLevels stored = {code, packed, rows, columns, unit, steps, shifts};
    float *values = make(rows * columns * sizeof *values);
    k->levels_decode(&stored, values);
    take(values, rows * columns * sizeof *values);
    int8_t *inputs = (int8_t *)bytes(samples * columns);
    float *y = make(samples * rows * sizeof *y);
    const LevelProduct product = {stored, inputs, samples, zero_point, y};
    check(k->products->levels_product(&product));
    take(y, samples * rows * sizeof *y);
    free(x), free(unit), free(square), free(weights), free(packed), free(steps), free(shifts);
    free(inputs);
}

static void run_compensation(const Kernels *k, size_t rows, size_t columns, size_t length) {
    enum { LEVELS = 16 };
    const size_t groups = (columns + length - 1) / length;
    float *x = scales(rows * columns, 1), *zero = scales(rows * groups, 1);
    float *offset = scales(rows * groups, 1), *levels = make(LEVELS * sizeof *levels);
    float *gram = scales(columns * columns, 1), *feedback = scales(columns * columns, 1);
    int32_t *order = make(columns * sizeof *order);
    for (int i = 0; i < LEVELS; i++) {
        levels[i] = (float)(length % 2 ? i - 8 : i * i - 60);
    }
    for (size_t i = 0; i < columns; i++) {
        gram[i * columns + i] = 1.0f;
        order[i] = (int32_t)(columns - 1 - i);
    }
    float *unit = scales(rows * groups, 1);
    const Multiples none = {NULL, 0.0f, 0.0f}, whole = {unit, -8.0f, 7.0f};
    for (int refit = 0; refit < 3; refit++) {
        float *scale = scales(rows * groups, 1);
        int32_t *before = integers(rows * columns, LEVELS);
        uint8_t *codes = make(rows * columns);
        for (size_t i = 0; i < rows * columns; i++) {
            codes[i] = (uint8_t)before[i];
        }
        scale[0] = 0.0f;
        const Compensation task = {x, rows, columns, order, levels, LEVELS, scale, zero, offset,
                                   groups, length, gram, feedback, 3, refit == 1, SCALE_F16, codes,
                                   refit == 2 ? whole : none, refit == 2 ? whole : none};
        check(k->compensate(&task));
        take(codes, rows * columns);
        take(scale, rows * groups * sizeof *scale);
        free(before);
    }
    const size_t swept = rows < SWEPT_ROWS ? rows : SWEPT_ROWS;
    const size_t width = columns < SWEPT_COLUMNS ? columns : SWEPT_COLUMNS;
    float *shares = scales(swept * swept, 1), *scale = scales(rows * groups, 1);
    float *slope = scales(swept * columns, 1), *values = scales(swept * columns, 1);
    float *moves = make(swept * width * sizeof *moves);
    int32_t *places = make(width * sizeof *places);
    uint8_t *codes = make(swept * columns);
    for (size_t i = 0; i < swept * columns; i++) {
        codes[i] = (uint8_t)(i % LEVELS);
    }
    const ColumnSweep sweep = {{x, swept, columns, NULL, levels, LEVELS, scale, zero, offset, groups,
                                length, gram, NULL, 2, 0, SCALE_F16, codes, none, none},
                               columns - width, width, shares, slope, values, moves, places};
    size_t moved;
    int changed;
    check(k->sweep_columns(&sweep, &moved, &changed));
    const Products products = {values, moves, gram, places, swept, moved, columns, 0, columns};
    check(k->multiply_ordered(&products));
    take(codes, swept * columns);
    take(places, moved * sizeof *places);
    take(values, swept * columns * sizeof *values);
    free(slope), free(moves);
    free(shares), free(scale), free(unit);
    free(x), free(zero), free(offset), free(levels), free(gram), free(feedback), free(order);
}

int main(void) {
    static const size_t lengths[] = {1, 16, 31, 64, 200, 256};
    static const size_t columns[] = {1, 33, 128, 300, 513};
    static const size_t blocks[] = {0, 16, 32, 64, 128, 256};
    for (size_t v = 0; v < variant_count(); v++) {
        const Kernels *k = variant(v);
        state = 88172645463325252u;
        digest = 0xCBF29CE484222325u;
        for (size_t i = 0; i < 6; i++) {
            run_statistics(k, lengths[i] - 1);
            run_packing(k, i);
        }
        static const LevelCode levels[] = {
            {2, 16, 5, 0, {-127, -43, 17, 85}},
            {3, 32, 5, 0, {-127, -77, -45, -19, 6, 33, 64, 109}},
            {3, 16, 6, 4, {-5, -3, -1, 0, 1, 2, 100, 123}}, /* too close to be looked up */
            {4, 16, 6, 4,
             {-127, -102, -79, -61, -46, -32, -20, -9, 2, 13, 24, 36, 49, 65, 83, 109}},
            {5, 32, 6, 0, {-127, -100, -90, -80, -70, -60, -50, -40, -31, -22, -15, -9, -6, -4, -2,
                           -1, 0, 1, 2, 3, 4, 6, 9, 15, 22, 31, 40, 50, 60, 80, 100, 126}},
            {6, 16, 6, 0, {-64, -60, -57, -55, -53, -51, -49, -47, -45, -43, -41, -39, -37, -35,
                           -33, -31, -29, -27, -25, -23, -21, -19, -17, -15, -13, -11, -9, -7, -5,
                           -3, -2, -1, 0, 1, 2, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29,
                           31, 33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 60, 127}},
        };
        for (size_t i = 0; i < sizeof levels / sizeof *levels; i++) {
            for (size_t c = 0; c < 5; c++) {
                run_levels(k, 17 + i, columns[c], levels[i], 1 + 3 * (c % 3), (int32_t)c - 2);
            }
            run_levels(k, 3, 4130, levels[i], 6, -128);
        }
        for (size_t c = 0; c < 5; c++) {
            run_compensation(k, 3 + 33 * c, columns[c] % 200, 8 + 29 * c);
        }
        for (int bits = 2; bits <= 8; bits += bits == 6 ? 2 : 1) {
            for (int symmetric = 0; symmetric < 2; symmetric++) {
                for (size_t i = 0; i < 6; i++) {
                    run_groups(k, 19, lengths[i], (Scheme){bits, symmetric, 0});
                    for (size_t c = 0; c < 5; c++) {
                        const Scheme scheme = {bits, symmetric, blocks[i]};
                        run_rows(k, 5 + i, columns[c], scheme, 1 + 3 * (c % 3), (int32_t)c - 2);
                    }
                }
                run_rows(k, 2, 16417, (Scheme){bits, symmetric, 0}, 6, -128);
            }
        }
        printf("%s %016llx\n", k->name, (unsigned long long)digest);
    }
    return 0;
}
