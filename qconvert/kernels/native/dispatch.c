/* Which variants this processor can run. */
#include "kernels.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "files are read as they lie in memory");

size_t variant_count(void) {
#ifdef __x86_64__
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2")) {
        return 1;
    }
    const int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
                     && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
                     && __builtin_cpu_supports("avx512vnni");
    return wide ? 3 : 2;
#else
    return 1;
#endif
}

const Kernels *variant(size_t index) {
    static const Kernels *const all[] = {
        &kernels_portable,
#ifdef __x86_64__
        &kernels_avx2,
        &kernels_avx512,
#endif
    };
    return all[index];
}

size_t ggml_bytes(enum ggml_type type) {
    static const size_t bytes[GGML_TYPES] = {18, 20, 22, 24, 34};
    return bytes[type];
}
