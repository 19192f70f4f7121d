// One source, several instruction sets: a kernel's body is written once, as plain loops in a functor, and compiled into
// one wrapper per instruction set; the wrapper to call is chosen when the program runs.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

// The body has no target of its own, so the compiler may inline it into a wrapper with any target and vectorise it
// there.
#define RELPROP_INLINE inline __attribute__((always_inline))

#define RELPROP_INLINE_LAMBDA __attribute__((always_inline))

// "Iterations are independent": outputs may be the very same array as an input (in place), never a shifted one.
#if defined(__clang__)
#define RELPROP_VECTORISE _Pragma("clang loop vectorize(assume_safety)")
#else
#define RELPROP_VECTORISE _Pragma("GCC ivdep")
#endif

#if defined(__x86_64__)
#define RELPROP_X86 1
#define RELPROP_TARGET_AVX2 __attribute__((target("avx2,fma")))
#define RELPROP_TARGET_AVX512 __attribute__((target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl")))
#else
#define RELPROP_X86 0
#endif

// Between PUSH and POP every function has that target, for bodies that name vector registers themselves.
#define RELPROP_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define RELPROP_PUSH_TARGET(text) \
  RELPROP_PRAGMA(clang attribute push(__attribute__((target(text))), apply_to = function))
#define RELPROP_POP_TARGET RELPROP_PRAGMA(clang attribute pop)
#else
#define RELPROP_PUSH_TARGET(text) RELPROP_PRAGMA(GCC push_options) RELPROP_PRAGMA(GCC target(text))
#define RELPROP_POP_TARGET RELPROP_PRAGMA(GCC pop_options)
#endif
#define RELPROP_PUSH_AVX2 RELPROP_PUSH_TARGET("avx2,fma")
#define RELPROP_PUSH_AVX512 RELPROP_PUSH_TARGET("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl")

namespace relprop {

enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The instruction set in use: the best one that this CPU has, or the one that RELPROP_ISA names.
// Throws std::invalid_argument for an unknown name, std::runtime_error for one that this CPU lacks.
Isa active_isa();

// Replaces the choice for this process; an empty name goes back to RELPROP_ISA or the best one. For tests.
void set_isa(const std::string& name);

std::string isa_name(Isa isa);
std::vector<std::string> isas_built();
std::vector<std::string> isas_supported();

using RangeFunction = void (*)(const void* kernel, int64_t begin, int64_t end);

template <class Kernel>
void run_baseline(const void* kernel, int64_t begin, int64_t end) {
  (*static_cast<const Kernel*>(kernel))(begin, end);
}

#if RELPROP_X86
template <class Kernel>
RELPROP_TARGET_AVX2 void run_avx2(const void* kernel, int64_t begin, int64_t end) {
  (*static_cast<const Kernel*>(kernel))(begin, end);
}

template <class Kernel>
RELPROP_TARGET_AVX512 void run_avx512(const void* kernel, int64_t begin, int64_t end) {
  (*static_cast<const Kernel*>(kernel))(begin, end);
}
#endif

template <class Kernel>
RangeFunction range_function() {
  switch (active_isa()) {
#if RELPROP_X86
    case Isa::kAvx512:
      return run_avx512<Kernel>;
    case Isa::kAvx2:
      return run_avx2<Kernel>;
#endif
    default:
      return run_baseline<Kernel>;
  }
}

}  // namespace relprop
