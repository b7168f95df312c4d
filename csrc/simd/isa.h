// The instruction set of the CPU kernels, chosen once per call, at run time.
#pragma once

#include <string>
#include <vector>

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define SYNFACE_X86 1
#else
#define SYNFACE_X86 0
#endif

namespace synface {

// The last two are avx512 with bfloat16 GEMMs: our own, or oneDNN's, which uses AMX where the
// processor has it.
enum class Isa { base, avx2, avx512, avx512_bf16, onednn_bf16 };

// Makes oneDNN available (torch ships it); `faster`: whether its GEMM is faster here than our own.
void offer_onednn(bool faster);

// Returns the fastest that this processor offers, or the one that
// SYNFACE_CPU_ISA=base|avx2|avx512|… names; throws where the processor lacks it. The variable is
// read at each call, so that a test can go through all of them.
Isa isa();

// Whether a bfloat16 GEMM, or (splits) several of them, are faster than a float32 GEMM; or
// SYNFACE_CPU_ISA names a set that has them, so that they can be tested. Without AMX an Intel
// processor has half as many bfloat16 products per cycle as float32's, AMD's twice as many.
bool prefers_bf16();
bool prefers_bf16_splits();

// Returns all instruction sets that this processor offers, slowest first.
std::vector<Isa> isas();

const char* name(Isa isa);

}  // namespace synface
