/* ggml's block types of a variant. */
#pragma GCC diagnostic ignored "-Wunused-function" /* loops of table.h, of which parts serve here */
#include "ggml_errors.h"

const GgmlKernels OF_VARIANT(ggml) = {
    .encode = ggml_encode,
    .quantize = ggml_quantize,
    .decode = ggml_decode,
};
