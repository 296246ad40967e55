/* The loops for AVX2. */
#ifdef __x86_64__
#include "avx2.h"

#include "table.h"

#include "end.h"
#endif
