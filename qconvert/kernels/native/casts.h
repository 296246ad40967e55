/* From one floating dtype to another, from the bytes of a file on, with the error that it leaves. */
#ifndef QCONVERT_CASTS_H
#define QCONVERT_CASTS_H

#include "source.h"
#include "statistics.h"

enum { CAST_RUN = 4096 }; /* values at once */

/* Rounds to nearest, ties to even; returns the end of what was stored. Too large becomes Inf. */
INLINE uint8_t *store_values(const float *restrict x, size_t n, enum source_type type,
                             uint8_t *restrict out) {
    uint16_t narrow[CAST_RUN];
    switch (type) { /* a loop for each type */
    case SOURCE_F32: memcpy(out, x, n * sizeof *x); return out + n * sizeof *x;
    case SOURCE_BF16:
        for (size_t i = 0; i < n; i++) {
            narrow[i] = to_bfloat(x[i]);
        }
        break;
    default:
        for (size_t i = 0; i < n; i++) {
            narrow[i] = to_half(x[i]);
        }
    }
    memcpy(out, narrow, n * sizeof *narrow);
    return out + n * sizeof *narrow;
}

static int cast(Source source, size_t n, enum source_type type, uint8_t *out, Errors *found) {
    ErrorLanes lanes = {0};
    for (size_t i = 0; i < n; i += CAST_RUN) {
        float x[CAST_RUN], back[CAST_RUN];
        const size_t count = smaller(CAST_RUN, n - i);
        const Source stored = {type, out};
        load_values(source, i, count, x);
        if (!all_finite(x, count)) {
            return NOT_FINITE;
        }
        out = store_values(x, count, type, out);
        load_values(stored, 0, count, back);
        add_errors(&lanes, x, back, count);
    }
    finish_errors(&lanes, found);
    return DONE;
}

#endif
