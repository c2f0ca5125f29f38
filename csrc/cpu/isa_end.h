// Ends the compilation target set by isa_avx2.h or isa_avx512.h.
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
