/* The loops for any processor: SSE2 on x86-64, NEON on aarch64, which are the baselines there. */
#include "product_plain.h"
#include "blocks.h"
#include "casts.h"
#include "codebook.h"
#include "ggml_errors.h"
#include "widen.h"

#ifdef __aarch64__
#define VARIANT "neon"
#else
#define VARIANT "portable"
#endif
#define TABLE kernels_portable
#define PRODUCT product_plain
#include "table.h"
