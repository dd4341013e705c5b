// Which instruction set serves this process, and how work is cut between OpenMP threads.
//
// Every kernel family keeps one table of function pointers per instruction set (base, avx2, avx512). The
// sources that hold them put all code into an anonymous namespace and use no STL: a shared inline function
// compiled for AVX-512 could otherwise be the copy that the linker picks for everybody.
#pragma once
#include <cstdint>

namespace autoflip {

enum class Isa { base = 0, avx2 = 1, avx512 = 2 };

// The best set that this CPU has, lowered by the environment variable AUTOFLIP_CPU=base|avx2|avx512.
Isa cpu_isa();
const char* isa_name(Isa isa);

// Whether streaming reads gain from prefetch instructions: on Intel. Zen 4 loses by them: packing 40 MB at
// density 0.1 ran at 23 GB/s without and 21 with, x - base at 12.8 and 10.8.
bool fetches_ahead();

// Whether a CPU with AVX-512 has VBMI and VBMI2 too (Ice Lake, Zen 4 and later).
bool expands_bytes();

// Whether it is used as a CPU with AVX-512 and has BF16, too (Cooper Lake, Zen 4 and later).
bool multiplies_bf16();

// Whether it also has AMX's tiles of bfloat16 (Sapphire Rapids and later), the system lets this process use
// them, and AUTOFLIP_CPU names no level.
bool multiplies_tiles();

// Picks the table for this CPU; families without a faster version of a level pass the lower one again.
template <class Table>
const Table& pick(const Table& base, const Table& avx2, const Table& avx512) {
  switch (cpu_isa()) {
    case Isa::avx512:
      return avx512;
    case Isa::avx2:
      return avx2;
    default:
      return base;
  }
}

// The table of this CPU out of <family>_base, _avx2 and _avx512; other CPUs than x86-64 have the first alone.
#if defined(__x86_64__)
#define AUTOFLIP_PICK(family) pick(family##_base, family##_avx2, family##_avx512)
#else
#define AUTOFLIP_PICK(family) family##_base
#endif

// Below this many elements a parallel region costs more than it brings.
constexpr int64_t kSerialElements = 32768;

}  // namespace autoflip
