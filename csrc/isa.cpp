#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace relprop {
namespace {

constexpr int kNotChosen = -1;
std::atomic<int> chosen{kNotChosen};

const char* const kNames[] = {"baseline", "avx2", "avx512"};

bool supported(Isa isa) {
#if RELPROP_X86
  switch (isa) {
    case Isa::kBaseline:
      return true;
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::kAvx512:
      return supported(Isa::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  }
  return false;
#else
  return isa == Isa::kBaseline;
#endif
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

Isa best() {
  for (Isa isa : {Isa::kAvx512, Isa::kAvx2}) {
    if (supported(isa)) return isa;
  }
  return Isa::kBaseline;
}

Isa named(const std::string& name, const std::string& where) {
  for (int i = 0; i < 3; ++i) {
    if (name != kNames[i]) continue;
    const Isa isa = static_cast<Isa>(i);
    if (!supported(isa)) {
      throw std::runtime_error(where + ": expected an instruction set that this CPU has (" + joined(isas_supported()) +
                               "), got '" + name + "'");
    }
    return isa;
  }
  throw std::invalid_argument(where + ": expected one of baseline, avx2, avx512, got '" + name + "'");
}

}  // namespace

std::string isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

std::vector<std::string> isas_built() {
#if RELPROP_X86
  return {kNames[0], kNames[1], kNames[2]};
#else
  return {kNames[0]};
#endif
}

std::vector<std::string> isas_supported() {
  std::vector<std::string> names;
  for (Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (supported(isa)) names.push_back(isa_name(isa));
  }
  return names;
}

Isa active_isa() {
  int isa = chosen.load(std::memory_order_relaxed);
  if (isa == kNotChosen) {
    const char* name = std::getenv("RELPROP_ISA");
    isa = static_cast<int>(name != nullptr && *name != '\0' ? named(name, "RELPROP_ISA") : best());
    chosen.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

void set_isa(const std::string& name) {
  chosen.store(name.empty() ? kNotChosen : static_cast<int>(named(name, "set_isa")), std::memory_order_relaxed);
}

}  // namespace relprop
