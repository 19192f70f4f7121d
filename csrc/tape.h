// Kernel calls written down while they are made, to be made again without Python: see relprop/tape.py.
#pragma once

#include <array>
#include <functional>
#include <map>
#include <memory>
#include <tuple>

#include "bindings.h"

namespace relprop {

// What every pointer in an argument is handed to; an argument type that is not listed here does not compile.
using EachPointer = std::function<void(Pointer&)>;

inline void each_pointer(Pointer& pointer, const EachPointer& each) { each(pointer); }
inline void each_pointer(int, const EachPointer&) {}
inline void each_pointer(int64_t, const EachPointer&) {}
inline void each_pointer(double, const EachPointer&) {}
inline void each_pointer(bool, const EachPointer&) {}
inline void each_pointer(TensorArgument& tensor, const EachPointer& each) { each(tensor.first); }

inline void each_pointer(std::vector<TensorArgument>& tensors, const EachPointer& each) {
  for (TensorArgument& tensor : tensors) each(tensor.first);
}

template <size_t kSize>
void each_pointer(const std::array<int64_t, kSize>&, const EachPointer&) {}

inline void each_pointer(const std::map<std::string, int>&, const EachPointer&) {}

// (address, dtype, row stride, column stride)
inline void each_pointer(std::tuple<Pointer, int, int64_t, int64_t>& matrix, const EachPointer& each) {
  each(std::get<0>(matrix));
}

// Tensors by name: (address, strides).
inline void each_pointer(std::map<std::string, std::pair<Pointer, std::vector<int64_t>>>& tensors,
                         const EachPointer& each) {
  for (auto& [name, tensor] : tensors) each(tensor.first);
}

class Tape {
 public:
  // The one that this thread's calls are written to, null for none.
  static Tape*& recording();

  template <class... Arguments>
  void add(void (*function)(Arguments...), std::decay_t<Arguments>... arguments) {
    calls_.push_back(std::make_unique<CallOf<Arguments...>>(function, std::move(arguments)...));
  }

  int64_t size() const { return static_cast<int64_t>(calls_.size()); }
  // Of a call's tensors, without those that are not there.
  std::vector<Pointer> pointers(int64_t call) const;
  // Gives each of these its place in a block of memory; less than 0 is elsewhere, and stays.
  void place(int64_t call, const std::vector<int64_t>& offsets);
  // The block is there from now on.
  void move(Pointer block);
  void run(int64_t first, int64_t last) const;

 private:
  struct Call {
    virtual ~Call() = default;
    virtual void run() const = 0;
    virtual void each(const EachPointer& each) = 0;
  };

  template <class... Arguments>
  struct CallOf final : Call {
    CallOf(void (*function)(Arguments...), std::decay_t<Arguments>... arguments)
        : function(function), arguments(std::move(arguments)...) {}

    void run() const override { std::apply(function, arguments); }

    void each(const EachPointer& each) override {
      std::apply([&](auto&... argument) { (each_pointer(argument, each), ...); }, arguments);
    }

    void (*function)(Arguments...);
    std::tuple<std::decay_t<Arguments>...> arguments;
  };

  void check(int64_t call) const;

  std::vector<std::unique_ptr<Call>> calls_;
  std::vector<std::pair<Pointer*, int64_t>> placed_;  // in arguments of calls_: offset in the block
};

// A kernel's binding that writes its calls to the tape of this thread, if there is one.
template <auto kFunction>
struct Taped;

template <class... Arguments, void (*kFunction)(Arguments...)>
struct Taped<kFunction> {
  static void call(Arguments... arguments) {
    kFunction(arguments...);
    if (Tape* tape = Tape::recording()) tape->add(kFunction, arguments...);
  }
};

template <auto kFunction>
inline constexpr auto taped = &Taped<kFunction>::call;

}  // namespace relprop
