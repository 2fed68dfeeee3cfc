#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace saccade {

#if defined(__x86_64__)
namespace {

bool has_avxvnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

// Tiles need the processor, the system's saving of their state, and leave to use it: Linux grants that on request.
bool has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 22 & 1) == 0 || (d >> 24 & 3) != 3) return false;
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

bool detect(int isa) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
#if defined(SACCADE_EMULATED)  // what is beyond AVX2
  return avx2 || isa == ISA_PORTABLE;
#endif
  switch (isa) {
    case ISA_AVX2: return avx2;
    case ISA_AVX2VNNI: return avx2 && has_avxvnni();
    case ISA_AVX512: return avx512;
    case ISA_AVX512VNNI: return vnni;
    case ISA_AVX512BF16: return bf16;
    case ISA_AMX: return bf16 && has_amx();
    default: return isa == ISA_PORTABLE;
  }
}

}  // namespace

const char* isa_name(int isa) {
  static const char* const names[NUM_ISAS] = {"portable", "avx2",       "avx2vnni", "avx512",
                                              "avx512vnni", "avx512bf16", "amx"};
  return 0 <= isa && isa < NUM_ISAS ? names[isa] : nullptr;
}
#else
namespace {
bool detect(int isa) { return isa == ISA_PORTABLE; }
}  // namespace

const char* isa_name(int isa) { return isa == ISA_PORTABLE ? "portable" : nullptr; }
#endif

bool isa_is_supported(int isa) { return 0 <= isa && isa < NUM_ISAS && detect(isa); }

namespace {
int best_isa() {
  for (int isa = NUM_ISAS - 1; isa > 0; --isa)
    if (detect(isa)) return isa;
  return ISA_PORTABLE;
}
}  // namespace

int active_isa = best_isa();

}  // namespace saccade
