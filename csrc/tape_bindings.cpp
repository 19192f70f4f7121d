#include "tape.h"

namespace relprop {

Tape*& Tape::recording() {
  static thread_local Tape* tape = nullptr;
  return tape;
}

void Tape::check(int64_t call) const {
  if (call < 0 || call > size()) {
    throw std::invalid_argument("call: expected 0 to " + std::to_string(size()) + ", got " + std::to_string(call));
  }
}

std::vector<Pointer> Tape::pointers(int64_t call) const {
  check(call + 1);
  std::vector<Pointer> found;
  calls_[call]->each([&](Pointer& pointer) {
    if (pointer != 0) found.push_back(pointer);
  });
  return found;
}

void Tape::place(int64_t call, const std::vector<int64_t>& offsets) {
  check(call + 1);
  std::vector<Pointer*> found;
  calls_[call]->each([&](Pointer& pointer) {
    if (pointer != 0) found.push_back(&pointer);
  });
  if (found.size() != offsets.size()) {
    throw std::invalid_argument("offsets: expected " + std::to_string(found.size()) + " of them, got " +
                                std::to_string(offsets.size()));
  }
  for (size_t i = 0; i < found.size(); ++i) {
    if (offsets[i] >= 0) placed_.emplace_back(found[i], offsets[i]);
  }
}

void Tape::move(Pointer block) {
  for (const auto& [pointer, offset] : placed_) *pointer = block + offset;
}

void Tape::run(int64_t first, int64_t last) const {
  check(first);
  check(last);
  for (int64_t i = first; i < last; ++i) calls_[i]->run();
}

namespace {

const Bindings bindings([](py::module_& module) {
  py::class_<Tape>(module, "Tape")
      .def(py::init<>())
      .def("start", [](Tape& tape) { Tape::recording() = &tape; })
      .def("stop", [](Tape&) { Tape::recording() = nullptr; })
      .def("__len__", &Tape::size)
      .def("pointers", &Tape::pointers, py::arg("call"))
      .def("place", &Tape::place, py::arg("call"), py::arg("offsets"))
      .def("move", &Tape::move, py::arg("block"))
      .def("run", &Tape::run, release_gil(), py::arg("first"), py::arg("last"));
});

}  // namespace
}  // namespace relprop
