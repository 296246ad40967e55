/* The end of what avx2.h or avx512.h began. */
#ifdef __clang__
#pragma clang attribute pop
#endif
