/* The loops for AVX-512. */
#ifdef __x86_64__
#include "avx512.h"

#include "table.h"

#include "end.h"
#endif
