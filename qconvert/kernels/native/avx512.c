/* The loops for AVX-512 with VNNI, in 512-bit vectors. No FMA but where nothing is rounded: elsewhere
 * it would round once where the definition rounds twice. */
#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#endif

#define USE_AVX2
#define USE_AVX512
#include "product_x86.h"
#include "blocks.h"
#include "casts.h"
#include "codebook.h"
#include "ggml_errors.h"
#include "widen.h"

#define VARIANT "avx512"
#define TABLE kernels_avx512
#define PRODUCT product_x86
#include "table.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
