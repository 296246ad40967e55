/* ggml's block types, section 8: a row of values in, blocks out, and back. */
#ifndef QCONVERT_GGML_H
#define QCONVERT_GGML_H

#include "ggml_k.h"
#include "ggml_small.h"

INLINE void encode_block(enum ggml_type type, const float *x, const float *importance,
                         uint8_t *out) {
    switch (type) {
    case GGML_Q4_0: encode_centred(x, 4, out); break;
    case GGML_Q4_1: encode_from_minimum(x, 4, out); break;
    case GGML_Q5_0: encode_centred(x, 5, out); break;
    case GGML_Q5_1: encode_from_minimum(x, 5, out); break;
    case GGML_Q8_0: encode_bytes(x, out); break;
    case GGML_Q2_K: encode_q2_k(x, &importance, out); break;
    case GGML_Q3_K: encode_q3_k(x, &importance, out); break;
    case GGML_Q4_K: encode_q45_k(x, &importance, 1, 4, out); break;
    case GGML_Q5_K: encode_q45_k(x, &importance, 1, 5, out); break;
    case GGML_Q6_K: encode_q6_k(x, &importance, out); break;
    case GGML_TYPES: break;
    }
}

INLINE void decode_block(enum ggml_type type, const uint8_t *data, float *out) {
    switch (type) {
    case GGML_Q4_0: decode_small(data, 4, 1, out); break;
    case GGML_Q4_1: decode_small(data, 4, 0, out); break;
    case GGML_Q5_0: decode_small(data, 5, 1, out); break;
    case GGML_Q5_1: decode_small(data, 5, 0, out); break;
    case GGML_Q8_0: decode_bytes(data, out); break;
    case GGML_Q2_K: decode_q2_k(data, out); break;
    case GGML_Q3_K: decode_q3_k(data, out); break;
    case GGML_Q4_K: decode_q45_k(data, 4, out); break;
    case GGML_Q5_K: decode_q45_k(data, 5, out); break;
    case GGML_Q6_K: decode_q6_k(data, out); break;
    case GGML_TYPES: break;
    }
}

static void ggml_encode(enum ggml_type type, const float *x, const float *importance, size_t period,
                        size_t blocks, uint8_t *out) {
    const GgmlType kind = ggml_types[type];
    const float *of[2] = {NULL, NULL};
    for (size_t b = 0; b < blocks; b++, x += kind.values, out += kind.bytes) {
        of[0] = period ? importance + b % period * kind.values : NULL;
        if ((type == GGML_Q4_K || type == GGML_Q5_K) && b + 1 < blocks) { /* two side by side */
            of[1] = period ? importance + (b + 1) % period * kind.values : NULL;
            encode_q45_k(x, of, 2, type == GGML_Q4_K ? 4 : 5, out);
            b++, x += kind.values, out += kind.bytes;
        } else {
            encode_block(type, x, of[0], out);
        }
    }
}

static void ggml_decode(enum ggml_type type, const uint8_t *data, size_t blocks, float *out) {
    const GgmlType kind = ggml_types[type];
    for (size_t b = 0; b < blocks; b++, data += kind.bytes, out += kind.values) {
        decode_block(type, data, out);
    }
}

#endif
