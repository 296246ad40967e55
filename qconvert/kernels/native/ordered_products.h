/* Products of matrices of which every sum runs in the order of the definition, one product after the
 * other, and each of both rounded: no FMA, no partial sums. What makes them fast is that sums of a few
 * rows and WIDE columns stay in registers while that order is gone through. */
#ifndef QCONVERT_ORDERED_PRODUCTS_H
#define QCONVERT_ORDERED_PRODUCTS_H

#include "arithmetic.h"

#include <stdlib.h>

enum {
    WIDE = 64,  /* columns of a panel */
    DEEP = 256, /* rows of a panel: half of what the second cache has on small processors */
    QUAD = 4,   /* rows at once */
};

/* A function by itself. GCC 12 joins the addresses of bytes and floats of a block, these four times as
 * far apart, to one, then takes a function that stores by it for one without effect, and drops its
 * calls: nothing is to be concluded about these. */
#ifdef __clang__
#define SEPARATE static __attribute__((noinline))
#else
#define SEPARATE static __attribute__((noipa))
#endif

/* Vectors as wide as the registers; the compiler would not keep an array of sums in registers. */
#if defined USE_AVX512
enum { VECTOR = 16, VECTORS = 4 };
#elif defined USE_AVX2
enum { VECTOR = 8, VECTORS = 2 };
#else
enum { VECTOR = 4, VECTORS = 2 };
#endif
#define UNROLLED _Pragma("GCC unroll 4")
typedef float Vector __attribute__((vector_size(VECTOR * sizeof(float)), aligned(4), may_alias));

enum { LINE = 64 / sizeof(float) }; /* floats of a line of cache: a vector across two takes twice as long */

/* The first whole line of memory that has room for LINE floats more than are wanted. */
static float *aligned(float *memory) {
    const uintptr_t past = (uintptr_t)memory % (LINE * sizeof(float));
    return past ? memory + LINE - past / sizeof(float) : memory;
}

/* A matrix by rows that lie `stride` apart, in an order of theirs where one is given. */
typedef struct {
    const float *values;
    size_t stride;
    const int32_t *order;
} Rows;

/* Rows first..first + depth of a matrix, columns from..from + width, and zeros up to WIDE. */
SEPARATE void load_panel(Rows of, size_t first, size_t depth, size_t from, size_t width,
                         float *restrict panel) {
    for (size_t j = 0; j < depth; j++) {
        const size_t row = of.order ? (size_t)of.order[first + j] : first + j;
        memcpy(panel + j * WIDE, of.values + row * of.stride + from, width * sizeof(float));
        memset(panel + j * WIDE + width, 0, (WIDE - width) * sizeof(float));
    }
}

/* sums += left · panel, of `rows`, at most QUAD, and WIDE columns. */
INLINE void add_few(float *sums, size_t stride, int rows, const float *left, size_t left_stride,
                    size_t depth, const float *panel) {
    for (size_t k = 0; k < WIDE; k += VECTOR * VECTORS) {
        Vector found[QUAD][VECTORS], part[VECTORS];
        UNROLLED for (int r = 0; r < rows; r++) {
            UNROLLED for (int v = 0; v < VECTORS; v++) {
                found[r][v] = *(const Vector *)(sums + (size_t)r * stride + k + v * VECTOR);
            }
        }
        for (size_t j = 0; j < depth; j++) {
            UNROLLED for (int v = 0; v < VECTORS; v++) {
                part[v] = *(const Vector *)(panel + j * WIDE + k + v * VECTOR);
            }
            UNROLLED for (int r = 0; r < rows; r++) {
                UNROLLED for (int v = 0; v < VECTORS; v++) {
                    found[r][v] += part[v] * left[(size_t)r * left_stride + j];
                }
            }
        }
        UNROLLED for (int r = 0; r < rows; r++) {
            UNROLLED for (int v = 0; v < VECTORS; v++) {
                *(Vector *)(sums + (size_t)r * stride + k + v * VECTOR) = found[r][v];
            }
        }
    }
}

SEPARATE void add_panel(float *sums, size_t stride, size_t rows, const float *left,
                        size_t left_stride, size_t depth, const float *panel) {
    size_t row = 0;
    for (; row + QUAD <= rows; row += QUAD) {
        add_few(sums + row * stride, stride, QUAD, left + row * left_stride, left_stride, depth, panel);
    }
    for (; row < rows; row++) {
        add_few(sums + row * stride, stride, 1, left + row * left_stride, left_stride, depth, panel);
    }
}

/* sums += left · right, of (rows, depth) and (depth, columns) matrices, columns from..from + width of
 * them. `sums` has room for WIDE columns, `panel` for DEEP rows of as many. */
static void add_products(float *sums, size_t stride, size_t rows, const float *left,
                         size_t left_stride, size_t depth, Rows right, size_t from, size_t width,
                         float *panel) {
    for (size_t first = 0; first < depth; first += DEEP) {
        const size_t deep = smaller(DEEP, depth - first);
        load_panel(right, first, deep, from, width, panel);
        add_panel(sums, stride, rows, left + first, left_stride, deep, panel);
    }
}

/* The same of columns begin..end of whole matrices. */
static int multiply_ordered(const Products *task) {
    const size_t rows = task->rows, columns = task->columns;
    const Rows right = {task->right, columns, task->order};
    float *memory = malloc(((rows + DEEP) * WIDE + LINE) * sizeof *memory);
    if (!memory) {
        return NO_MEMORY;
    }
    float *sums = aligned(memory);
    for (size_t from = task->begin; from < task->end; from += WIDE) {
        const size_t width = smaller(WIDE, task->end - from);
        float *found = task->sums + from;
        for (size_t r = 0; r < rows; r++) {
            memcpy(sums + r * WIDE, found + r * columns, width * sizeof(float));
            memset(sums + r * WIDE + width, 0, (WIDE - width) * sizeof(float));
        }
        add_products(sums, WIDE, rows, task->left, task->depth, task->depth, right, from, width,
                     sums + rows * WIDE);
        for (size_t r = 0; r < rows; r++) {
            memcpy(found + r * columns, sums + r * WIDE, width * sizeof(float));
        }
    }
    free(memory);
    return DONE;
}

#endif
