/* The loops of a variant and its table. */
#include "blocks.h"
#include "casts.h"
#include "codebook.h"
#include "compensation.h"
#include "levels.h"
#include "row_sweep.h"
#include "statistics.h"
#include "streams.h"
#include "widen.h"

const Kernels OF_VARIANT(kernels) = {
    .name = VARIANT,
    .widen_bf16 = widen_bf16,
    .widen_f16 = widen_f16,
    .widen_table = widen_table,
    .observe_f32 = observe_f32,
    .observe_f64 = observe_f64,
    .histogram = histogram,
    .extrema = extrema,
    .error_sums = error_sums,
    .worst_step = worst_step,
    .power_sums = power_sums,
    .long_sums = long_sums,
    .search = search,
    .encode = encode,
    .decode = decode,
    .encode_rows = encode_rows,
    .quantize_blocks = quantize_blocks,
    .quantize_channels = quantize_channels,
    .quantize_stream = quantize_stream,
    .cast = cast,
    .all_finite = all_finite,
    .pack = pack,
    .unpack = unpack,
    .pack_stream = pack_stream,
    .unpack_stream = unpack_stream,
    .codebook_encode = codebook_encode,
    .codebook_decode = codebook_decode,
    .levels_encode = levels_encode,
    .levels_decode = levels_decode,
    .compensate = compensate,
    .multiply_ordered = multiply_ordered,
    .sweep_columns = sweep_columns,
    .products = &OF_VARIANT(products),
    .ggml = &OF_VARIANT(ggml),
};
