// Which instruction set the CPU kernels use. Chosen once per call, at run time.
#pragma once

#include <string>
#include <vector>

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define SYNFACE_X86 1
#else
#define SYNFACE_X86 0
#endif

namespace synface {

// The last two are avx512, and products of bfloat16: our own, or oneDNN's, which take AMX where the
// processor has it.
enum class Isa { base, avx2, avx512, avx512_bf16, onednn_bf16 };

// Says that oneDNN is there (torch brings it), and whether it is faster here than our own.
void offer_onednn(bool faster);

// The fastest that this processor offers, or what SYNFACE_CPU_ISA=base|avx2|avx512|… names; an
// error where the processor lacks it. Read anew at each call, so that a test can go through all of
// them.
Isa isa();

// Whether products of float32 are faster as several of bfloat16, or SYNFACE_CPU_ISA names a set
// that has those, so that they can be tested.
bool prefers_bf16();

// All that this processor offers, slowest first.
std::vector<Isa> isas();

const char* name(Isa isa);

}  // namespace synface
