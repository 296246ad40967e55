/* ggml blocks from the bytes of a file, with the error that they leave, while a run of them is in the
 * nearest cache. */
#ifndef QCONVERT_GGML_ERRORS_H
#define QCONVERT_GGML_ERRORS_H

#include "ggml.h"
#include "source.h"
#include "statistics.h"

enum { GGML_RUN = 4096 }; /* values at once, a multiple of every block */

static int ggml_quantize(enum ggml_type type, Source source, const float *importance,
                         size_t period, size_t blocks, uint8_t *out, Errors *found) {
    const GgmlType kind = ggml_types[type];
    ErrorLanes lanes = {0};
    for (size_t b = 0, n; b < blocks; b += n) {
        float x[GGML_RUN], decoded[GGML_RUN];
        const size_t place = period ? b % period : 0;
        n = smaller(blocks - b, GGML_RUN / kind.values);
        n = period ? smaller(n, period - place) : n; /* then these n weights serve n blocks */
        const size_t count = n * kind.values;
        load_values(source, b * kind.values, count, x);
        if (!all_finite(x, count)) {
            return NOT_FINITE;
        }
        ggml_encode(type, x, period ? importance + place * kind.values : NULL, period ? n : 0, n,
                    out);
        ggml_decode(type, out, n, decoded);
        add_errors(&lanes, x, decoded, count);
        out += n * kind.bytes;
    }
    finish_errors(&lanes, found);
    return DONE;
}

#endif
