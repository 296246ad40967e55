/* ggml's block types, section 8: a row of values in, blocks out, and back. */
#ifndef QCONVERT_GGML_H
#define QCONVERT_GGML_H

#include "ggml_codebooks.h"
#include "ggml_k.h"
#include "ggml_small.h"
#include "ggml_small_search.h"
#include "ggml_ternary.h"

/* Types that search nothing. */
INLINE void encode_plain(enum ggml_type type, const float *x, uint8_t *out) {
    switch (type) {
    case GGML_Q4_0: encode_centred(x, 4, out); break;
    case GGML_Q4_1: encode_from_minimum(x, 4, out); break;
    case GGML_Q5_0: encode_centred(x, 5, out); break;
    case GGML_Q5_1: encode_from_minimum(x, 5, out); break;
    case GGML_Q8_0: encode_bytes(x, out); break;
    case GGML_TQ1_0: encode_tq1(x, out); break;
    case GGML_TQ2_0: encode_tq2(x, out); break;
    case GGML_Q1_0: encode_q1_0(x, out); break;
    case GGML_Q2_0: encode_q2_0(x, out); break;
    default: break;
    }
}

/* One K block, or two side by side: `importance` of each, NULL without. */
INLINE void encode_k(enum ggml_type type, const float *x, const float *const importance[2],
                     size_t blocks, uint8_t *out) {
    switch (type) {
    case GGML_Q2_K: encode_q2_k(x, importance, out); break;
    case GGML_Q3_K: encode_q3_k(x, importance, out); break;
    case GGML_Q4_K: encode_q45_k(x, importance, blocks, 4, out); break;
    case GGML_Q5_K: encode_q45_k(x, importance, blocks, 5, out); break;
    case GGML_Q6_K: encode_q6_k(x, importance, out); break;
    default: break;
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
    case GGML_IQ4_NL: decode_iq4_nl(data, out); break;
    case GGML_IQ4_XS: decode_iq4_xs(data, out); break;
    case GGML_MXFP4: decode_mxfp4(data, out); break;
    case GGML_NVFP4: decode_nvfp4(data, out); break;
    case GGML_TQ1_0: decode_tq1(data, out); break;
    case GGML_TQ2_0: decode_tq2(data, out); break;
    case GGML_Q1_0: decode_q1_0(data, out); break;
    case GGML_Q2_0: decode_q2_0(data, out); break;
    case GGML_TYPES: break;
    }
}

static void encode_k_blocks(enum ggml_type type, const float *x, const float *importance,
                            size_t period, size_t blocks, uint8_t *out) {
    const GgmlType kind = ggml_types[type];
    const size_t together = type == GGML_Q4_K || type == GGML_Q5_K ? 2 : 1;
    for (size_t b = 0, n; b < blocks; b += n) {
        const float *of[2] = {NULL, NULL};
        n = smaller(together, blocks - b);
        for (size_t i = 0; period && i < n; i++) {
            of[i] = importance + (b + i) % period * kind.values;
        }
        encode_k(type, x + b * kind.values, of, n, out + b * kind.bytes);
    }
}

static void ggml_encode(enum ggml_type type, const float *x, const float *importance, size_t period,
                        size_t blocks, uint8_t *out) {
    const GgmlType kind = ggml_types[type];
    switch (type) { /* types whose groups are searched side by side */
    case GGML_Q2_K:
    case GGML_Q3_K:
    case GGML_Q4_K:
    case GGML_Q5_K:
    case GGML_Q6_K: encode_k_blocks(type, x, importance, period, blocks, out); return;
    case GGML_IQ4_NL:
    case GGML_IQ4_XS:
    case GGML_MXFP4:
    case GGML_NVFP4: encode_codebook(type, x, importance, period, blocks, out); return;
    case GGML_Q4_0:
    case GGML_Q4_1:
    case GGML_Q5_0:
    case GGML_Q5_1:
        if (period) {
            encode_small_weighted(type, x, importance, period, blocks, out);
            return;
        }
        break;
    default: break;
    }
    for (size_t b = 0; b < blocks; b++) {
        encode_plain(type, x + b * kind.values, out + b * kind.bytes);
    }
}

static void ggml_decode(enum ggml_type type, const uint8_t *data, size_t blocks, float *out) {
    const GgmlType kind = ggml_types[type];
    for (size_t b = 0; b < blocks; b++, data += kind.bytes, out += kind.values) {
        decode_block(type, data, out);
    }
}

#endif
