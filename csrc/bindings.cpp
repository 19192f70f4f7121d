// The Python module relprop._C: every binding file's functions, and what the build says about itself.
#include "bindings.h"

#include "isa.h"
#include "parallel.h"

#ifndef RELPROP_VERSION
#define RELPROP_VERSION "unknown"
#endif

// Why there is no relprop._cuda; empty where it was built along.
#ifndef RELPROP_NO_CUDA_REASON
#define RELPROP_NO_CUDA_REASON "unknown"
#endif

namespace relprop {
namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
  info["version"] = RELPROP_VERSION;
  info["compiler"] = compiler();
  info["isa"] = isa_name(active_isa());
  info["isas_built"] = isas_built();
  info["isas_supported"] = isas_supported();
  info["openmp"] = openmp_runtime();
  const std::string no_cuda = RELPROP_NO_CUDA_REASON;
  info["cuda"] = no_cuda.empty();
  info["cuda_reason"] = no_cuda;
  return info;
}

}  // namespace
}  // namespace relprop

PYBIND11_MODULE(_C, module) {
  using namespace relprop;
  module.doc() = "relprop's CPU kernels; call them through relprop.native.";
  for (const Bindings::Bind bind : Bindings::all()) bind(module);
  module.def("build_info", &build_info, "How this module was built and what it found at run time.");
  module.def("set_isa", &set_isa, py::arg("name"),
             "Replaces the instruction set for this process ('' for the default). For tests.");
}
