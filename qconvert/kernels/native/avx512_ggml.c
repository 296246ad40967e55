/* ggml's block types for AVX-512. */
#ifdef __x86_64__
#include "avx512.h"

#include "table_ggml.h"

#include "end.h"
#endif
