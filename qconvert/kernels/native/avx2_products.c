/* Matrix products for AVX2. */
#ifdef __x86_64__
#include "avx2.h"

#include "table_products.h"

#include "end.h"
#endif
