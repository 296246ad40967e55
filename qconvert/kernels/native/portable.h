/* What follows is compiled for any processor: SSE2 on x86-64, NEON on aarch64, which are the baselines
 * there. */
#ifdef __aarch64__
#define VARIANT "neon"
#else
#define VARIANT "portable"
#endif
#define OF_VARIANT(name) name##_portable
