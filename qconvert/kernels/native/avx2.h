/* What follows, up to end.h, is compiled for AVX2. No FMA: it would round once where the definition
 * rounds twice. */
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif

#define USE_AVX2
#define VARIANT "avx2"
#define OF_VARIANT(name) name##_avx2
