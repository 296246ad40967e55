/* Matrix products for AVX-512. */
#ifdef __x86_64__
#include "avx512.h"

#include "table_products.h"

#include "end.h"
#endif
