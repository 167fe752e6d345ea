// One source, compiled for several instruction sets, of which the best is picked at run time.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define TOOLX_X86 1
#define TOOLX_V4 __attribute__((target("arch=x86-64-v4")))
#define TOOLX_V3 __attribute__((target("arch=x86-64-v3")))
#else
#define TOOLX_V4
#define TOOLX_V3
#endif

namespace toolx {

enum class InstructionSet { kBaseline, kV3, kV4 };  // x86-64-v3 has AVX2, x86-64-v4 has AVX-512

// The best that the processor has. ATEN_CPU_CAPABILITY, "default" or "avx2", bounds it as it bounds torch's own kernels.
inline InstructionSet best_instruction_set() {
#ifdef TOOLX_X86
  const char* const given = std::getenv("ATEN_CPU_CAPABILITY");
  const char* const most = given == nullptr ? "" : given;
  if (std::strcmp(most, "default") == 0) {
    return InstructionSet::kBaseline;
  }
  if (__builtin_cpu_supports("x86-64-v4") && std::strcmp(most, "avx2") != 0) {
    return InstructionSet::kV4;
  }
  if (__builtin_cpu_supports("x86-64-v3")) {
    return InstructionSet::kV3;
  }
#endif
  return InstructionSet::kBaseline;
}

// `Versions<f>::best()` is f, an inline function of internal linkage, compiled for the best instruction set.
template <auto F>
struct Versions;

template <typename... Args, void (*F)(Args...)>
struct Versions<F> {
  using Function = void (*)(Args...);

  TOOLX_V4 static void v4(Args... args) { F(args...); }
  TOOLX_V3 static void v3(Args... args) { F(args...); }
  static void baseline(Args... args) { F(args...); }

  static Function best() {
    switch (best_instruction_set()) {
      case InstructionSet::kV4: return v4;
      case InstructionSet::kV3: return v3;
      default: return baseline;
    }
  }
};

}  // namespace toolx
