/* Runs of values out of the bytes of a file. */
#ifndef QCONVERT_SOURCE_H
#define QCONVERT_SOURCE_H

#include "widen.h"

/* Values at..at+n. The bytes of binary32 are copied too: they need not be aligned. */
INLINE void load_values(Source source, size_t at, size_t n, float *restrict out) {
    switch (source.type) {
    case SOURCE_F32: memcpy(out, source.raw + at * sizeof *out, n * sizeof *out); break;
    case SOURCE_BF16: widen_bf16(source.raw + 2 * at, n, out); break;
    default: widen_f16(source.raw + 2 * at, n, out); break;
    }
}

#endif
