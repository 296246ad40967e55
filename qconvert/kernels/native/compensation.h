/* Codes that make up for each other's errors: formats/schemes/SPEC.md section 12.
 *
 * Every sum runs over columns in their order, one product after the other. What is done here a strip
 * of rows, a block of columns and a vector at a time has therefore the bits of one column after the
 * other, which is the definition. */
#ifndef QCONVERT_COMPENSATION_H
#define QCONVERT_COMPENSATION_H

#include "blocks.h"
#include "columns.h"
#include "ordered_products.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

enum {
    STRIP = SWEPT_ROWS, /* rows that share what is read of a factor */
    WIDEST = 256, /* columns of a block whose groups change their scales */
};

/* A block of columns of 16 rows, as columns. */
typedef struct {
    float sums[WIDEST][BATCH], values[WIDEST][BATCH];
    float scale[WIDEST][BATCH], zero[WIDEST][BATCH], offset[WIDEST][BATCH];
    float scale_unit[WIDEST][BATCH], offset_unit[WIDEST][BATCH];
    /* By codes, by scales behind them and by offsets behind these. */
    float moves[WIDEST][BATCH], rescaled[WIDEST][BATCH], shifted[WIDEST][BATCH];
    float parts[WIDEST][BATCH]; /* of values, that scales scale */
    int32_t codes[WIDEST][BATCH]; /* as wide as the others: see SEPARATE */
} Block;

/* The changes in a block of one row that are not 0, in their order. */
typedef struct {
    size_t count;
    uint16_t place[3 * WIDEST];
    float move[3 * WIDEST];
} Moves;

typedef struct {
    const Compensation *task;
    int evenly;         /* levels are integers that follow each other */
    float middles[255]; /* between levels */
    size_t stride;      /* of a row of `sums`: columns, and zeros to a multiple of WIDE and beyond */
    float *sums;        /* (STRIP, stride): targets in the order of rounding, then slopes */
    float *values;      /* (STRIP, columns) */
    float *errors;      /* (STRIP, stride), in the order of `sums` */
    float *panel;       /* (DEEP, WIDE) of a factor */
    Moves *moves;       /* (STRIP) */
    Block *block;
} Strips;

/* The levels nearest to what is wanted: codes, which stay where the scale is 0, and values. */
INLINE void round_column(const Strips *s, const float wanted[restrict BATCH],
                         const float scale[restrict BATCH], const float zero[restrict BATCH],
                         const float offset[restrict BATCH], int32_t codes[restrict BATCH],
                         float values[restrict BATCH]) {
    const Compensation *t = s->task;
    float place[BATCH], index[BATCH], level[BATCH];
    for (int i = 0; i < BATCH; i++) {
        place[i] = (wanted[i] - offset[i]) / (scale[i] == 0.0f ? 1.0f : scale[i]) + zero[i];
    }
    if (s->evenly) {
        const float first = t->levels[0], top = (float)(t->level_count - 1);
        for (int i = 0; i < BATCH; i++) {
            index[i] = round_small(clamp(place[i] - first, 0.0f, top));
            level[i] = first + index[i];
        }
    } else {
        for (int i = 0; i < BATCH; i++) {
            index[i] = 0.0f;
            level[i] = t->levels[0];
        }
        for (size_t k = 1; k < t->level_count; k++) {
            const float middle = s->middles[k - 1], next = t->levels[k];
            for (int i = 0; i < BATCH; i++) {
                index[i] += place[i] > middle ? 1.0f : 0.0f;
                level[i] = place[i] > middle ? next : level[i];
            }
        }
    }
    for (int i = 0; i < BATCH; i++) {
        values[i] = (level[i] - zero[i]) * scale[i] + offset[i];
    }
    for (int i = 0; i < BATCH; i++) {
        codes[i] = scale[i] == 0.0f ? codes[i] : (int32_t)index[i];
        values[i] = scale[i] == 0.0f ? offset[i] : values[i];
    }
}

/* Columns first..first + width of 16 rows, in the order of rounding where one is given; of fewer
 * rows the last one again. */
SEPARATE void load_block(const Strips *s, const int32_t *order, size_t row, size_t strip_row,
                      size_t rows, size_t first, size_t width) {
    const Compensation *t = s->task;
    Block *restrict b = s->block;
    for (size_t i = 0; i < BATCH; i++) {
        const size_t in = smaller(i, rows - 1), at = (row + in) * t->groups;
        const float *sums = s->sums + (strip_row + in) * s->stride + first;
        const float *values = s->values + (strip_row + in) * t->columns;
        const uint8_t *codes = t->codes + (row + in) * t->columns;
        for (size_t c = 0; c < width; c++) {
            const size_t column = order ? (size_t)order[first + c] : first + c;
            const size_t group = at + column / t->length;
            b->sums[c][i] = sums[c];
            b->values[c][i] = values[column];
            b->codes[c][i] = codes[column];
            b->scale[c][i] = t->scale[group];
            b->zero[c][i] = t->zero[group];
            b->offset[c][i] = t->offset[group];
            b->scale_unit[c][i] = t->scales.unit ? t->scales.unit[group] : 0.0f;
            b->offset_unit[c][i] = t->offsets.unit ? t->offsets.unit[group] : 0.0f;
        }
    }
}

/* The inverse, but for parameters. */
SEPARATE void store_block(const Strips *s, const int32_t *order, size_t row, size_t strip_row,
                       size_t rows, size_t first, size_t width) {
    const Compensation *t = s->task;
    const Block *restrict b = s->block;
    for (size_t i = 0; i < rows; i++) {
        float *sums = s->sums + (strip_row + i) * s->stride + first;
        float *values = s->values + (strip_row + i) * t->columns;
        uint8_t *codes = t->codes + (row + i) * t->columns;
        for (size_t c = 0; c < width; c++) {
            const size_t column = order ? (size_t)order[first + c] : first + c;
            sums[c] = b->sums[c][i];
            values[column] = b->values[c][i];
            codes[column] = (uint8_t)b->codes[c][i];
        }
    }
}

/* sums += move * factor, of a column and 16 rows. */
INLINE void add_column(float sums[restrict BATCH], const float moves[restrict BATCH], float factor) {
    for (int i = 0; i < BATCH; i++) {
        sums[i] += moves[i] * factor;
    }
}

/* Rounds a block of 16 rows, each column with what makes up for those before it, and leaves the
 * errors in `moves`. On entry `values` are the weights. */
SEPARATE void sweep_block(const Strips *s, size_t first, size_t width) {
    const Compensation *t = s->task;
    Block *restrict b = s->block;
    for (size_t c = 0; c < width; c++) {
        const float *feedback = t->feedback + (first + c) * t->columns + first;
        float weights[BATCH];
        memcpy(weights, b->values[c], sizeof weights);
        round_column(s, b->sums[c], b->scale[c], b->zero[c], b->offset[c], b->codes[c],
                     b->values[c]);
        for (int i = 0; i < BATCH; i++) {
            b->moves[c][i] = weights[i] - b->values[c][i];
        }
        for (size_t k = c + 1; k < width; k++) {
            add_column(b->sums[k], b->moves[c], feedback[k]);
        }
    }
}

/* Changes the code of a column of a block of 16 rows; whether any changed. */
INLINE int32_t descend_column(const Strips *s, size_t first, size_t width, size_t c) {
    const Compensation *t = s->task;
    Block *restrict b = s->block;
    const float *gram = t->gram + (first + c) * t->columns + first;
    float best[BATCH], found[BATCH];
    int32_t codes[BATCH], moved = 0, changed = 0;
    memcpy(codes, b->codes[c], sizeof codes);
    for (int i = 0; i < BATCH; i++) {
        best[i] = b->values[c][i] - b->sums[c][i] / gram[c];
    }
    round_column(s, best, b->scale[c], b->zero[c], b->offset[c], b->codes[c], found);
    for (int i = 0; i < BATCH; i++) {
        b->moves[c][i] = found[i] - b->values[c][i];
        b->values[c][i] = found[i];
    }
    for (int i = 0; i < BATCH; i++) {
        moved |= b->moves[c][i] != 0.0f;
        changed |= codes[i] ^ b->codes[c][i];
    }
    for (size_t k = 0; moved && k < width; k++) {
        add_column(b->sums[k], b->moves[c], gram[k]);
    }
    return changed;
}

/* Values of a group of 16 rows, columns begin..end of a block, with its scale and offset as they are
 * now; by how much they move. */
INLINE void revalue_group(const Strips *s, size_t first, size_t width, size_t begin, size_t end,
                          float (*restrict moves)[BATCH], int32_t changed) {
    const Compensation *t = s->task;
    Block *restrict b = s->block;
    for (size_t c = begin; c < end; c++) {
        const float *gram = t->gram + (first + c) * t->columns + first;
        for (int i = 0; i < BATCH; i++) {
            const float level = t->levels[b->codes[c][i]];
            const float found = (level - b->zero[c][i]) * b->scale[c][i] + b->offset[c][i];
            moves[c][i] = found - b->values[c][i];
            b->values[c][i] = found;
        }
        for (size_t k = 0; changed && k < width; k++) {
            add_column(b->sums[k], moves[c], gram[k]);
        }
    }
}

/* The multiples nearest to what is wanted; 0 of no unit. */
INLINE void round_multiples(float wanted[restrict BATCH], const float unit[restrict BATCH],
                            const Multiples *of) {
    for (int i = 0; i < BATCH; i++) {
        const float steps = wanted[i] / (unit[i] != 0.0f ? unit[i] : 1.0f);
        wanted[i] = round_small(clamp(steps, of->low, of->high)) * unit[i];
    }
}

/* Gives a group of 16 rows the scale that is best for its codes, where that lowers the cost; whether
 * any changed. */
SEPARATE int32_t rescale_group(const Strips *s, size_t first, size_t width, size_t begin, size_t end) {
    const Compensation *t = s->task;
    Block *restrict b = s->block;
    float along[BATCH] = {0}, across[BATCH] = {0}, scale[BATCH], old[BATCH];
    const float nothing[BATCH] = {0};
    int32_t changed = 0;
    for (size_t j = begin; j < end; j++) {
        for (int i = 0; i < BATCH; i++) {
            b->parts[j][i] = b->values[j][i] - b->offset[j][i];
        }
    }
    for (size_t j = begin; j < end; j++) {
        const float *gram = t->gram + (first + j) * t->columns + first;
        float row[BATCH] = {0};
        for (size_t k = begin; k < end; k++) {
            add_column(row, b->parts[k], gram[k]);
        }
        for (int i = 0; i < BATCH; i++) {
            along[i] += b->parts[j][i] * b->sums[j][i];
            across[i] += b->parts[j][i] * row[i];
        }
    }
    memcpy(old, b->scale[begin], sizeof old);
    for (int i = 0; i < BATCH; i++) {
        scale[i] = old[i] * (1.0f - along[i] / (across[i] > 0.0f ? across[i] : 1.0f));
    }
    if (t->scales.unit) {
        round_multiples(scale, b->scale_unit[begin], &t->scales);
    } else {
        round_scales(scale, t->scale_type, nothing);
    }
    for (int i = 0; i < BATCH; i++) {
        const float change = scale[i] / (old[i] != 0.0f ? old[i] : 1.0f) - 1.0f;
        const int sound = scale[i] != 0.0f && old[i] != 0.0f && (scale[i] > 0.0f) == (old[i] > 0.0f)
                          && fabsf(scale[i]) <= FLT_MAX && across[i] > 0.0f;
        const float growth = change * (along[i] + along[i] + change * across[i]);
        scale[i] = sound && growth < 0.0f ? scale[i] : old[i];
        changed |= scale[i] != old[i];
    }
    for (size_t c = begin; c < end; c++) {
        memcpy(b->scale[c], scale, sizeof scale);
    }
    revalue_group(s, first, width, begin, end, b->rescaled, changed);
    return changed;
}

/* The same for the offset. */
SEPARATE int32_t shift_group(const Strips *s, size_t first, size_t width, size_t begin, size_t end) {
    const Compensation *t = s->task;
    Block *restrict b = s->block;
    float along[BATCH] = {0}, across = 0.0f, offset[BATCH], old[BATCH];
    int32_t changed = 0;
    for (size_t j = begin; j < end; j++) {
        const float *gram = t->gram + (first + j) * t->columns + first;
        float row = 0.0f;
        for (size_t k = begin; k < end; k++) {
            row += gram[k];
        }
        for (int i = 0; i < BATCH; i++) {
            along[i] += b->sums[j][i];
        }
        across += row;
    }
    memcpy(old, b->offset[begin], sizeof old);
    for (int i = 0; i < BATCH; i++) {
        offset[i] = old[i] - along[i] / (across > 0.0f ? across : 1.0f);
    }
    round_multiples(offset, b->offset_unit[begin], &t->offsets);
    for (int i = 0; i < BATCH; i++) {
        const float change = offset[i] - old[i];
        const float growth = change * (along[i] + along[i] + change * across);
        offset[i] = growth < 0.0f && across > 0.0f ? offset[i] : old[i];
        changed |= offset[i] != old[i];
    }
    for (size_t c = begin; c < end; c++) {
        memcpy(b->offset[c], offset, sizeof offset);
    }
    revalue_group(s, first, width, begin, end, b->shifted, changed);
    return changed;
}

/* One step of the descent over a block of 16 rows; whether anything changed. */
SEPARATE int descend_block(const Strips *s, size_t first, size_t width, int refit) {
    const Compensation *t = s->task;
    const size_t length = refit ? t->length : width;
    int32_t changed = 0;
    for (size_t begin = 0; begin < width; begin += length) {
        const size_t end = begin + smaller(length, width - begin);
        for (size_t c = begin; c < end; c++) {
            changed |= descend_column(s, first, width, c);
        }
        if (refit && (t->rescale || t->scales.unit)) {
            changed |= rescale_group(s, first, width, begin, end);
        }
        if (refit && t->offsets.unit) {
            changed |= shift_group(s, first, width, begin, end);
        }
    }
    return changed != 0;
}

/* Adds the moves of a row that are not 0 in columns begin..end of a block. */
INLINE void add_to_moves(Moves *moves, const float (*restrict of)[BATCH], size_t row, size_t begin,
                         size_t end) {
    for (size_t c = begin; c < end; c++) {
        moves->place[moves->count] = (uint16_t)c;
        moves->move[moves->count] = of[c][row];
        moves->count += of[c][row] != 0.0f;
    }
}

/* The moves of a block, its scales and its offsets, for `spread` and for good. */
SEPARATE void store_moves(const Strips *s, size_t row, size_t strip_row, size_t rows, size_t first,
                       size_t width, int refit) {
    const Compensation *t = s->task;
    const Block *restrict b = s->block;
    const size_t length = refit ? t->length : width;
    for (size_t i = 0; i < rows; i++) {
        Moves *moves = s->moves + strip_row + i;
        moves->count = 0;
        for (size_t begin = 0; begin < width; begin += length) {
            const size_t end = begin + smaller(length, width - begin);
            const size_t group = (row + i) * t->groups + (first + begin) / t->length;
            add_to_moves(moves, b->moves, i, begin, end);
            if (refit && (t->rescale || t->scales.unit)) {
                add_to_moves(moves, b->rescaled, i, begin, end);
                t->scale[group] = b->scale[begin][i];
            }
            if (refit && t->offsets.unit) {
                add_to_moves(moves, b->shifted, i, begin, end);
                t->offset[group] = b->offset[begin][i];
            }
        }
    }
}

/* What the moves of one row do to WIDE of its sums, straight from the factor. */
INLINE void add_moves(const float *factor, size_t stride, const Moves *moves, float *to) {
    enum { HALF = VECTOR < 8 ? 8 : WIDE / VECTOR };
    for (size_t k = 0; k < WIDE; k += HALF * VECTOR) {
        Vector sums[HALF];
        for (int v = 0; v < HALF; v++) {
            sums[v] = *(const Vector *)(to + k + v * VECTOR);
        }
        for (size_t j = 0; j < moves->count; j++) {
            const float *from = factor + moves->place[j] * stride + k;
            for (int v = 0; v < HALF; v++) {
                sums[v] += *(const Vector *)(from + v * VECTOR) * moves->move[j];
            }
        }
        for (int v = 0; v < HALF; v++) {
            *(Vector *)(to + k + v * VECTOR) = sums[v];
        }
    }
}

/* What the moves of a block, columns first..first + depth, do to the slopes of columns begin..end. */
SEPARATE void spread(const Strips *s, size_t rows, size_t first, size_t depth, size_t begin,
                     size_t end) {
    const size_t columns = s->task->columns;
    const float *gram = s->task->gram + first * columns;
    size_t total = 0;
    for (size_t r = 0; r < rows; r++) {
        total += s->moves[r].count;
    }
    const int many = total > 4 * depth; /* worth having what they are multiplied with side by side */
    for (size_t from = begin; from < end; from += WIDE) {
        const size_t width = smaller(WIDE, end - from);
        const int beside = many && width == WIDE;
        for (size_t j = 0; beside && j < depth; j++) {
            memcpy(s->panel + j * WIDE, gram + j * columns + from, WIDE * sizeof(float));
        }
        for (size_t r = 0; r < rows; r++) {
            const Moves *moves = s->moves + r;
            float *to = s->sums + r * s->stride + from;
            if (width == WIDE) {
                add_moves(beside ? s->panel : gram + from, beside ? WIDE : columns, moves, to);
                continue;
            }
            for (size_t j = 0; j < moves->count; j++) {
                for (size_t k = 0; k < width; k++) {
                    to[k] += gram[moves->place[j] * columns + from + k] * moves->move[j];
                }
            }
        }
    }
}

/* WIDE of the sums of each row, from column `from` on, get what its first errors do to them. */
static void pass_on(const Strips *s, size_t rows, const float *factor, size_t errors, size_t from) {
    const size_t columns = s->task->columns;
    add_products(s->sums + from, s->stride, rows, s->errors, s->stride, errors,
                 (Rows){factor, columns, NULL}, from, smaller(WIDE, columns - from), s->panel);
}

/* Rounds a strip, rows start..start + rows, column after column. */
static void sweep_strip(const Strips *s, size_t start, size_t rows) {
    const Compensation *t = s->task;
    const size_t columns = t->columns;
    memset(s->sums, 0, STRIP * s->stride * sizeof(float));
    memcpy(s->values, t->x + start * columns, rows * columns * sizeof(float));
    for (size_t r = 0; r < rows; r++) {
        for (size_t c = 0; c < columns; c++) {
            s->sums[r * s->stride + c] = s->values[r * columns + (size_t)t->order[c]];
        }
    }
    for (size_t first = 0; first < columns; first += WIDE) {
        const size_t width = smaller(WIDE, columns - first);
        pass_on(s, rows, t->feedback, first, first);
        for (size_t r = 0; r < rows; r += BATCH) {
            const size_t count = smaller(BATCH, rows - r);
            load_block(s, t->order, start + r, r, count, first, width);
            sweep_block(s, first, width);
            store_block(s, t->order, start + r, r, count, first, width);
            for (size_t i = 0; i < count; i++) {
                for (size_t c = 0; c < width; c++) {
                    s->errors[(r + i) * s->stride + first + c] = s->block->moves[c][i];
                }
            }
        }
    }
}

/* The slopes of a strip that was swept. */
static void slope_strip(const Strips *s, size_t start, size_t rows) {
    const Compensation *t = s->task;
    const size_t columns = t->columns;
    for (size_t r = 0; r < rows; r++) {
        const float *x = t->x + (start + r) * columns, *values = s->values + r * columns;
        for (size_t c = 0; c < columns; c++) {
            s->errors[r * s->stride + c] = values[c] - x[c];
        }
    }
    memset(s->sums, 0, STRIP * s->stride * sizeof(float));
    for (size_t from = 0; from < columns; from += WIDE) {
        pass_on(s, rows, t->gram, columns, from);
    }
}

/* One pass over a strip, for those of its groups of 16 rows that are `active`: those that changed. */
static int descend_strip(const Strips *s, size_t start, size_t rows, int refit,
                         int active[STRIP / BATCH]) {
    const Compensation *t = s->task;
    const size_t columns = t->columns;
    /* Whole groups where scales change. */
    const size_t step = !refit ? WIDE : t->length > WIDE ? t->length : WIDE / t->length * t->length;
    int changed[STRIP / BATCH] = {0}, any = 0;
    for (size_t first = 0; first < columns; first += step) {
        const size_t width = smaller(step, columns - first);
        for (size_t r = 0; r < STRIP; r++) {
            s->moves[r].count = 0;
        }
        for (size_t r = 0; r < rows; r += BATCH) {
            const size_t count = smaller(BATCH, rows - r);
            if (active[r / BATCH]) {
                load_block(s, NULL, start + r, r, count, first, width);
                changed[r / BATCH] |= descend_block(s, first, width, refit);
                store_block(s, NULL, start + r, r, count, first, width);
                store_moves(s, start + r, r, count, first, width, refit);
            }
        }
        spread(s, rows, first, width, 0, first);
        spread(s, rows, first, width, first + width, columns);
    }
    for (int i = 0; i < STRIP / BATCH; i++) {
        active[i] = changed[i];
        any |= changed[i];
    }
    return any;
}

/* What there is between the levels. */
static void find_middles(Strips *s) {
    const Compensation *t = s->task;
    s->evenly = round_small(t->levels[0]) == t->levels[0];
    for (size_t k = 0; k + 1 < t->level_count; k++) {
        s->middles[k] = (t->levels[k] + t->levels[k + 1]) / 2.0f;
        s->evenly &= t->levels[k + 1] - t->levels[k] == 1.0f;
    }
}

static int compensate(const Compensation *task) {
    /* And a line of cache more, or rows of a power of two would all want the same places in it. */
    const size_t stride = (task->columns + WIDE - 1) / WIDE * WIDE + LINE;
    const size_t floats = STRIP * (2 * stride + task->columns) + DEEP * WIDE;
    float *memory = malloc((floats + LINE) * sizeof *memory);
    Moves *moves = calloc(STRIP, sizeof *moves);
    Block *block = calloc(1, sizeof *block);
    Strips s = {.task = task, .stride = stride, .moves = moves, .block = block};
    if (!memory || !moves || !block) {
        free(memory), free(moves), free(block);
        return NO_MEMORY;
    }
    s.sums = aligned(memory);
    s.errors = s.sums + STRIP * stride;
    s.panel = s.errors + STRIP * stride;
    s.values = s.panel + DEEP * WIDE;
    find_middles(&s);
    const int refits = task->rescale || task->scales.unit || task->offsets.unit;
    for (size_t start = 0; start < task->rows; start += STRIP) {
        const size_t rows = smaller(STRIP, task->rows - start);
        int active[STRIP / BATCH];
        for (int i = 0; i < STRIP / BATCH; i++) {
            active[i] = 1;
        }
        sweep_strip(&s, start, rows);
        slope_strip(&s, start, rows);
        for (size_t pass = 0; pass < task->passes; pass++) {
            if (!descend_strip(&s, start, rows, refits && pass == 0, active)) {
                break;
            }
        }
    }
    free(memory), free(moves), free(block);
    return DONE;
}

#endif
