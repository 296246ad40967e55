/* What follows, up to end.h, is compiled for AVX-512 with VNNI, in 512-bit vectors. No FMA but where
 * nothing is rounded: elsewhere it would round once where the definition rounds twice. */
#ifdef __clang__
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#endif

#define USE_AVX2
#define USE_AVX512
#define VARIANT "avx512"
#define OF_VARIANT(name) name##_avx512
