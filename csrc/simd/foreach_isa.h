// Includes the file that SYNFACE_ISA_SOURCE names once per instruction set, each time inside a
// namespace of its own (SYNFACE_ISA_NAMESPACE), with SYNFACE_FMA set where one instruction does a
// fused multiply-add, and the width of its vectors in SYNFACE_VECTOR_BYTES. No include guard: each
// op's cpu.cpp includes it once.
//
// Every standard header must come before this one: inside a target region it would be compiled for
// that target, and the linker may keep that copy for everyone.

#include "simd/isa.h"

#define SYNFACE_ISA_NAMESPACE isa_base
#define SYNFACE_FMA 0
#define SYNFACE_VECTOR_BYTES 16
#include SYNFACE_ISA_SOURCE
#undef SYNFACE_ISA_NAMESPACE
#undef SYNFACE_FMA
#undef SYNFACE_VECTOR_BYTES

#if SYNFACE_X86

#define SYNFACE_FMA 1

#define SYNFACE_ISA_NAMESPACE isa_avx2
#define SYNFACE_VECTOR_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include SYNFACE_ISA_SOURCE
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef SYNFACE_ISA_NAMESPACE
#undef SYNFACE_VECTOR_BYTES

#define SYNFACE_ISA_NAMESPACE isa_avx512
#define SYNFACE_VECTOR_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#include SYNFACE_ISA_SOURCE
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef SYNFACE_ISA_NAMESPACE
#undef SYNFACE_VECTOR_BYTES

#undef SYNFACE_FMA
#endif

#undef SYNFACE_ISA_SOURCE

// Selects the instruction set's version of a function at run time:
// SYNFACE_DISPATCH(kernels<float>).
#if SYNFACE_X86
#define SYNFACE_DISPATCH(what)                                   \
  (::synface::isa() >= ::synface::Isa::avx512 ? isa_avx512::what \
   : ::synface::isa() == ::synface::Isa::avx2 ? isa_avx2::what   \
                                              : isa_base::what)
#else
#define SYNFACE_DISPATCH(what) (isa_base::what)
#endif
