/* Codes of rows that make up for the errors of other rows too: formats/schemes/SPEC.md section 12,
 * "Rows".
 *
 * The rows of a strip, all columns of them at first, then a column at a time and 16 rows side by side:
 * of these the first that moves is taken, and those behind it are looked at once more, which is one row
 * after the other. As in compensation.h every sum runs in the order of the definition. */
#ifndef QCONVERT_ROW_SWEEP_H
#define QCONVERT_ROW_SWEEP_H

#include "compensation.h"

/* A block of columns of all rows of a strip, as columns. */
typedef struct {
    float sums[WIDE][STRIP], values[WIDE][STRIP];
    float scale[WIDE][STRIP], zero[WIDE][STRIP], offset[WIDE][STRIP];
    float moves[WIDE][STRIP]; /* of the target of each row, by the changes of all rows in a column */
    int32_t codes[WIDE][STRIP];
    size_t moved, place[WIDE]; /* columns in which any row changed */
    float shares[STRIP][STRIP]; /* of rows in the change of a row, by that row */
} StripBlock;

/* Columns first..first + width of the strip; rows that are not there never move. */
SEPARATE void load_strip_block(const Strips *s, StripBlock *restrict b, size_t first, size_t width) {
    const Compensation *t = s->task;
    for (size_t r = 0; r < STRIP; r++) {
        const int there = r < t->rows;
        const size_t in = there ? r : 0;
        for (size_t c = 0; c < width; c++) {
            const size_t column = first + c, group = in * t->groups + column / t->length;
            b->sums[c][r] = s->sums[r * s->stride + column];
            b->codes[c][r] = t->codes[in * t->columns + column];
            b->values[c][r] = there ? s->values[r * t->columns + column] : 0.0f;
            b->scale[c][r] = there ? t->scale[group] : 0.0f;
            b->zero[c][r] = there ? t->zero[group] : 0.0f;
            b->offset[c][r] = there ? t->offset[group] : 0.0f;
        }
    }
}

/* The inverse, but for parameters; and the moves of columns that have any, for `add_products`. */
SEPARATE void store_strip_block(const Strips *s, const StripBlock *restrict b, size_t first,
                                size_t width) {
    const Compensation *t = s->task;
    for (size_t r = 0; r < t->rows; r++) {
        for (size_t c = 0; c < width; c++) {
            const size_t column = first + c;
            s->sums[r * s->stride + column] = b->sums[c][r];
            s->values[r * t->columns + column] = b->values[c][r];
            t->codes[r * t->columns + column] = (uint8_t)b->codes[c][r];
        }
        for (size_t c = 0; c < b->moved; c++) {
            s->errors[r * WIDE + c] = b->moves[b->place[c]][r];
        }
    }
}

/* Changes the codes of 16 rows of a column from row `begin` of the strip on, one after the other, up to
 * the first that moves its value; returns the row behind it, or behind the 16. */
INLINE size_t change_some(const Strips *s, StripBlock *restrict b, size_t c, size_t batch,
                          size_t begin, float diagonal, int32_t *changed) {
    float best[BATCH], found[BATCH], *values = b->values[c] + batch, *moves = b->moves[c];
    int32_t codes[BATCH], *before = b->codes[c] + batch;
    memcpy(codes, before, sizeof codes);
    for (int i = 0; i < BATCH; i++) {
        const float slope = b->sums[c][batch + (size_t)i] + moves[batch + (size_t)i] * diagonal;
        best[i] = values[i] - slope / diagonal;
    }
    round_column(s, best, b->scale[c] + batch, b->zero[c] + batch, b->offset[c] + batch, codes, found);
    for (size_t i = begin - batch; i < BATCH; i++) {
        *changed |= codes[i] ^ before[i];
        before[i] = codes[i];
        if (found[i] != values[i]) {
            const float move = found[i] - values[i], *shares = b->shares[batch + i];
            values[i] = found[i];
            for (int k = 0; k < STRIP; k++) {
                moves[k] += move * shares[k];
            }
            return batch + i + 1;
        }
    }
    return batch + BATCH;
}

/* One step of the descent, over a block; whether any code changed. */
SEPARATE int32_t change_block(const Strips *s, StripBlock *restrict b, size_t first, size_t width) {
    const Compensation *t = s->task;
    int32_t changed = 0;
    b->moved = 0;
    for (size_t c = 0; c < width; c++) {
        const float *gram = t->gram + (first + c) * t->columns + first;
        int moved = 0;
        memset(b->moves[c], 0, sizeof b->moves[c]);
        for (size_t batch = 0; batch < t->rows; batch += BATCH) {
            for (size_t row = batch; row < batch + BATCH;) {
                row = change_some(s, b, c, batch, row, gram[c], &changed);
            }
        }
        for (int k = 0; k < STRIP; k++) {
            moved |= b->moves[c][k] != 0.0f;
        }
        b->place[b->moved] = c;
        b->moved += moved != 0;
        for (size_t k = 0; moved && k < width; k++) {
            for (int r = 0; r < STRIP; r++) {
                b->sums[k][r] += b->moves[c][r] * gram[k];
            }
        }
    }
    return changed;
}

/* sums += left · right, of (rows, depth) with rows `stride` apart and (depth, columns). */
static void add_matrices(const Strips *s, const float *left, size_t stride, size_t depth,
                         const float *right) {
    const Compensation *t = s->task;
    for (size_t first = 0; first < depth; first += WIDE) {
        const size_t width = smaller(WIDE, depth - first);
        for (size_t r = 0; r < t->rows; r++) {
            memcpy(s->errors + r * WIDE, left + r * stride + first, width * sizeof(float));
        }
        for (size_t from = 0; from < t->columns; from += WIDE) {
            load_panel(s, right, first, width, from);
            add_products(s, width, from);
        }
    }
}

/* The slopes of the rows: their shares · errors · H. `pulled` is (STRIP, stride). */
static void slope_rows(const RowSweep *task, const Strips *s, float *pulled) {
    const size_t size = STRIP * s->stride * sizeof(float);
    memset(s->sums, 0, size);
    memset(s->errors, 0, STRIP * WIDE * sizeof(float));
    add_matrices(s, task->shares, task->all, task->all, task->errors);
    memcpy(pulled, s->sums, size);
    memset(s->sums, 0, size);
    add_matrices(s, pulled, s->stride, task->of.columns, task->of.gram);
}

/* The rows of H of the columns of a block that changed, columns from..from + WIDE. */
SEPARATE void load_moved_panel(const Strips *s, const StripBlock *restrict b, size_t first,
                               size_t from) {
    const size_t columns = s->task->columns, width = smaller(WIDE, columns - from);
    for (size_t j = 0; j < b->moved; j++) {
        const float *gram = s->task->gram + (first + b->place[j]) * columns + from;
        memcpy(s->panel + j * WIDE, gram, width * sizeof(float));
        memset(s->panel + j * WIDE + width, 0, (WIDE - width) * sizeof(float));
    }
}

/* One pass over all columns; whether any code changed. Slopes of columns that are done with are not
 * wanted behind the `last` pass. */
static int sweep_pass(const Strips *s, StripBlock *b, int last) {
    const Compensation *t = s->task;
    int32_t changed = 0;
    for (size_t first = 0; first < t->columns; first += WIDE) {
        const size_t width = smaller(WIDE, t->columns - first);
        load_strip_block(s, b, first, width);
        changed |= change_block(s, b, first, width);
        store_strip_block(s, b, first, width);
        for (size_t from = last ? first + WIDE : 0; b->moved && from < t->columns; from += WIDE) {
            if (from != first) {
                load_moved_panel(s, b, first, from);
                add_products(s, b->moved, from);
            }
        }
    }
    return changed != 0;
}

static int sweep_rows(const RowSweep *task) {
    const Compensation *t = &task->of;
    const size_t stride = (t->columns + WIDE - 1) / WIDE * WIDE + 16; /* see `compensate` */
    float *memory = malloc((STRIP * (2 * stride + t->columns + WIDE) + WIDE * WIDE) * sizeof *memory);
    StripBlock *block = calloc(1, sizeof *block);
    Strips s = {.task = t, .stride = stride, .sums = memory};
    if (!memory || !block) {
        free(memory), free(block);
        return NO_MEMORY;
    }
    float *pulled = s.sums + STRIP * stride;
    s.values = pulled + STRIP * stride;
    s.errors = s.values + STRIP * t->columns;
    s.panel = s.errors + STRIP * WIDE;
    find_middles(&s);
    for (size_t r = 0; r < t->rows; r++) {
        for (size_t k = 0; k < t->rows; k++) {
            block->shares[r][k] = task->shares[k * task->all + task->first + r];
        }
        for (size_t c = 0; c < t->columns; c++) {
            const size_t at = r * t->columns + c, group = r * t->groups + c / t->length;
            const float level = t->levels[t->codes[at]];
            s.values[at] = (level - t->zero[group]) * t->scale[group] + t->offset[group];
        }
    }
    slope_rows(task, &s, pulled);
    for (size_t pass = 0; pass < t->passes; pass++) {
        if (!sweep_pass(&s, block, pass + 1 == t->passes)) {
            break;
        }
    }
    for (size_t i = 0; i < t->rows * t->columns; i++) {
        task->errors[task->first * t->columns + i] = s.values[i] - t->x[i];
    }
    free(memory), free(block);
    return DONE;
}

#endif
