/* Codes of rows that make up for the errors of other rows too: formats/schemes/SPEC.md section 12,
 * "Rows".
 *
 * A block of columns at a time, in it a column at a time and 16 rows of it side by side: of these the first that moves is taken, and those behind it are looked at once more, which is one row
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

/* The columns of the strip; rows that are not there never move. */
static void load_columns_of(const ColumnSweep *task, StripBlock *restrict b) {
    const Compensation *t = &task->of;
    for (size_t r = 0; r < STRIP; r++) {
        const int there = r < t->rows;
        const size_t in = there ? r : 0;
        for (size_t c = 0; c < task->width; c++) {
            const size_t column = task->first + c, group = in * t->groups + column / t->length;
            const size_t at = in * t->columns + column;
            b->sums[c][r] = task->slope[at];
            b->codes[c][r] = t->codes[at];
            b->values[c][r] = there ? task->values[at] : 0.0f;
            b->scale[c][r] = there ? t->scale[group] : 0.0f;
            b->zero[c][r] = there ? t->zero[group] : 0.0f;
            b->offset[c][r] = there ? t->offset[group] : 0.0f;
        }
        for (size_t k = 0; k < STRIP; k++) {
            b->shares[r][k] = there && k < t->rows ? task->shares[k * t->rows + r] : 0.0f;
        }
    }
}

/* The inverse, but for parameters; and the moves of columns that have any, (rows, moved). */
static void store_columns_of(const ColumnSweep *task, const StripBlock *restrict b) {
    const Compensation *t = &task->of;
    for (size_t r = 0; r < t->rows; r++) {
        for (size_t c = 0; c < task->width; c++) {
            const size_t at = r * t->columns + task->first + c;
            task->slope[at] = b->sums[c][r];
            task->values[at] = b->values[c][r];
            t->codes[at] = (uint8_t)b->codes[c][r];
        }
        for (size_t c = 0; c < b->moved; c++) {
            task->moves[r * b->moved + c] = b->moves[b->place[c]][r];
        }
    }
    for (size_t c = 0; c < b->moved; c++) {
        task->places[c] = (int32_t)(task->first + b->place[c]);
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

/* One step of the descent of rows together: see `ColumnSweep`. */
static int sweep_columns(const ColumnSweep *task, size_t *moved, int *changed) {
    StripBlock *block = malloc(sizeof *block);
    Strips s = {.task = &task->of};
    if (!block) {
        return NO_MEMORY;
    }
    find_middles(&s);
    load_columns_of(task, block);
    *changed = change_block(&s, block, task->first, task->width) != 0;
    store_columns_of(task, block);
    *moved = block->moved;
    free(block);
    return DONE;
}

#endif
