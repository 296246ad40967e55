/* 16 rows side by side as columns, the order in which groups are searched. */
#ifndef QCONVERT_COLUMNS_H
#define QCONVERT_COLUMNS_H

#include "arithmetic.h"

#ifdef __SSE2__
#include <xmmintrin.h>
#endif

enum { BATCH = 16 }; /* groups side by side: fills the widest vector, and GCC vectorises 16 */

/* `length` values of each row, (length, 16). */
APART void load_columns(const float *const rows[BATCH], size_t length, float *restrict columns) {
    size_t i = 0;
#ifdef __SSE2__ /* squares of 4 by 4, which GCC would move number by number */
    for (; i + 4 <= length; i += 4) {
        for (size_t j = 0; j < BATCH; j += 4) {
            __m128 a = _mm_loadu_ps(rows[j] + i), b = _mm_loadu_ps(rows[j + 1] + i);
            __m128 c = _mm_loadu_ps(rows[j + 2] + i), d = _mm_loadu_ps(rows[j + 3] + i);
            float *to = columns + i * BATCH + j;
            _MM_TRANSPOSE4_PS(a, b, c, d);
            _mm_storeu_ps(to, a);
            _mm_storeu_ps(to + BATCH, b);
            _mm_storeu_ps(to + 2 * BATCH, c);
            _mm_storeu_ps(to + 3 * BATCH, d);
        }
    }
#endif
    for (; i < length; i++) {
        for (size_t j = 0; j < BATCH; j++) {
            columns[i * BATCH + j] = rows[j][i];
        }
    }
}

#endif
