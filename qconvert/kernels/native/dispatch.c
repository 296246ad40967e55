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

const GgmlType ggml_types[GGML_TYPES] = {
    [GGML_Q4_0] = {"Q4_0", 32, 18},
    [GGML_Q4_1] = {"Q4_1", 32, 20},
    [GGML_Q5_0] = {"Q5_0", 32, 22},
    [GGML_Q5_1] = {"Q5_1", 32, 24},
    [GGML_Q8_0] = {"Q8_0", 32, 34},
    [GGML_IQ4_NL] = {"IQ4_NL", 32, 18},
    [GGML_IQ4_XS] = {"IQ4_XS", 256, 136},
    [GGML_MXFP4] = {"MXFP4", 32, 17},
    [GGML_NVFP4] = {"NVFP4", 64, 36},
    [GGML_TQ1_0] = {"TQ1_0", 256, 54},
    [GGML_TQ2_0] = {"TQ2_0", 256, 66},
    [GGML_Q1_0] = {"Q1_0", 128, 18},
    [GGML_Q2_0] = {"Q2_0", 64, 18},
    [GGML_Q2_K] = {"Q2_K", 256, 84},
    [GGML_Q3_K] = {"Q3_K", 256, 110},
    [GGML_Q4_K] = {"Q4_K", 256, 144},
    [GGML_Q5_K] = {"Q5_K", 256, 176},
    [GGML_Q6_K] = {"Q6_K", 256, 210},
};

const DType source_types[SOURCE_TYPES] = {
    [SOURCE_F32] = {"F32", 4},
    [SOURCE_BF16] = {"BF16", 2},
    [SOURCE_F16] = {"F16", 2},
};

const DType scale_types[SCALE_TYPES] = {
    [SCALE_F16] = {"F16", 2},
    [SCALE_BF16] = {"BF16", 2},
    [SCALE_F32] = {"F32", 4},
};
