#include "common/cpu.h"

#include <cstdlib>
#include <cstring>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace autoflip {
namespace {

Isa detect() {
  Isa best = Isa::base;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    best = Isa::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      best = Isa::avx512;
  }
#endif
  if (const char* wish = std::getenv("AUTOFLIP_CPU")) {
    if (!std::strcmp(wish, "base")) return Isa::base;
    if (!std::strcmp(wish, "avx2") && best == Isa::avx512) return Isa::avx2;
  }
  return best;
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = detect();
  return isa;
}

bool fetches_ahead() {
#if defined(__x86_64__)
  static const bool intel = (__builtin_cpu_init(), __builtin_cpu_is("intel") != 0);
  return intel;
#else
  return false;
#endif
}

bool expands_bytes() {
#if defined(__x86_64__)
  static const bool found =
      (__builtin_cpu_init(), __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2"));
  return found;
#else
  return false;
#endif
}

bool multiplies_bf16() {
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)  // older ones do not know the name
  static const bool found = (__builtin_cpu_init(), __builtin_cpu_supports("avx512bf16") != 0);
  return found && cpu_isa() == Isa::avx512;
#else
  return false;
#endif
}

bool multiplies_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  static const bool found = [] {
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // EDX of leaf 7
    constexpr long kAskFor = 0x1023, kTileData = 18;  // arch_prctl's ARCH_REQ_XCOMP_PERM; since Linux 5.16
    unsigned a, b, c, d = 0;
    if (std::getenv("AUTOFLIP_CPU") || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    return (d & kBf16) && (d & kTile) && !syscall(SYS_arch_prctl, kAskFor, kTileData);
  }();
  return found && multiplies_bf16();
#else
  return false;
#endif
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "base";
  }
}

}  // namespace autoflip
