// Ends the target that isa_avx2.h or isa_avx512.h has begun.
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
