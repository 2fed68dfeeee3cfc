// Instruction sets: which exist in this build, which this machine has, which one is in use.
//
// A kernel `void f(const Args&)` is declared with SACCADE_KERNEL(f, const Args&), defined in a file of KERNELS (see
// CMakeLists.txt) inside `namespace saccade::SACCADE_ISA`, and called with SACCADE_CALL(f)(args).
// Files of KERNELS use no templates or inline functions of the standard library: the linker keeps one copy of those, which
// might be the one compiled for a larger instruction set than the machine has.
#pragma once

namespace saccade {

#if defined(__x86_64__)
enum Isa { ISA_PORTABLE, ISA_AVX2, ISA_AVX2VNNI, ISA_AVX512, ISA_AVX512VNNI, ISA_AVX512BF16, ISA_AMX, NUM_ISAS };

#define SACCADE_KERNEL(name, ...)                  \
  namespace portable { void name(__VA_ARGS__); }   \
  namespace avx2 { void name(__VA_ARGS__); }       \
  namespace avx2vnni { void name(__VA_ARGS__); }   \
  namespace avx512 { void name(__VA_ARGS__); }     \
  namespace avx512vnni { void name(__VA_ARGS__); } \
  namespace avx512bf16 { void name(__VA_ARGS__); } \
  namespace amx { void name(__VA_ARGS__); }

#define SACCADE_CALL(name)                                                                               \
  (::saccade::pick(::saccade::portable::name, ::saccade::avx2::name, ::saccade::avx2vnni::name,          \
                   ::saccade::avx512::name, ::saccade::avx512vnni::name, ::saccade::avx512bf16::name,    \
                   ::saccade::amx::name))
#else
enum Isa { ISA_PORTABLE, NUM_ISAS };

#define SACCADE_KERNEL(name, ...) \
  namespace portable { void name(__VA_ARGS__); }

#define SACCADE_CALL(name) (::saccade::pick(::saccade::portable::name))
#endif

const char* isa_name(int isa);
bool isa_is_supported(int isa);  // by processor and system
extern int active_isa;           // the best supported one, unless set otherwise

template <class Function, class... Others>
Function* pick(Function* portable, Others*... others) {
  Function* const all[NUM_ISAS] = {portable, others...};
  return all[active_isa];
}

}  // namespace saccade
