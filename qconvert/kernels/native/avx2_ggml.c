/* ggml's block types for AVX2. */
#ifdef __x86_64__
#include "avx2.h"

#include "table_ggml.h"

#include "end.h"
#endif
