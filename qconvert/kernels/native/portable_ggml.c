/* ggml's block types for any processor. */
#include "portable.h"

#include "table_ggml.h"
