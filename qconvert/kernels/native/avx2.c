/* The loops for AVX2. No FMA: it would round once where the definition rounds twice. */
#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif

#define USE_AVX2
#include "product_x86.h"
#include "blocks.h"
#include "casts.h"
#include "codebook.h"
#include "ggml_errors.h"
#include "widen.h"

#define VARIANT "avx2"
#define TABLE kernels_avx2
#define PRODUCT product_x86
#include "table.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
