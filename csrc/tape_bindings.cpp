#include <algorithm>

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

// moves: by start, apart from each other.
void Tape::move(const std::vector<Move>& moves) {
  const EachPointer relocate = [&](Pointer& pointer) {
    const auto after = std::upper_bound(moves.begin(), moves.end(), pointer,
                                        [](Pointer at, const Move& move) { return at < move.start; });
    if (after == moves.begin()) return;
    const Move& move = *(after - 1);
    if (pointer < move.end) pointer = move.target + (pointer - move.start);
  };
  for (const auto& call : calls_) call->each(relocate);
}

void Tape::run(int64_t first, int64_t last) const {
  check(first);
  check(last);
  for (int64_t i = first; i < last; ++i) calls_[i]->run();
}

namespace {

void bind_move(Tape& tape, const std::vector<std::tuple<Pointer, Pointer, Pointer>>& given) {
  std::vector<Move> moves;
  for (const auto& [start, end, target] : given) moves.push_back({start, end, target});
  tape.move(moves);
}

const Bindings bindings([](py::module_& module) {
  py::class_<Tape>(module, "Tape")
      .def(py::init<>())
      .def("start", [](Tape& tape) { Tape::recording() = &tape; })
      .def("stop", [](Tape&) { Tape::recording() = nullptr; })
      .def("__len__", &Tape::size)
      .def("pointers", &Tape::pointers, py::arg("call"))
      .def("move", &bind_move, py::arg("moves"))
      .def("run", &Tape::run, release_gil(), py::arg("first"), py::arg("last"));
});

}  // namespace
}  // namespace relprop
