// Threads, borrowed: two OpenMP runtimes in one process oversubscribe the cores or deadlock after a fork, so none is
// linked here. The one that torch has already loaded is found at run time; where there is none, loops run serially.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "isa.h"

namespace relprop {

// Elements that a kernel handles at a time, with its per-element values in buffers on the stack.
constexpr int64_t kBlock = 512;

// Below this much work (elements read or written per stream) waking other threads costs more than it saves.
constexpr int64_t kGrain = 16384;

// File name of the OpenMP runtime in use, empty while none is loaded.
std::string openmp_runtime();

// Calls run(kernel, begin, end) on pieces of [0, size), each `piece` long but the last, on at most `threads` threads.
void run_pieces(RangeFunction run, const void* kernel, int64_t size, int64_t piece, int threads);

// Runs kernel(begin, end) over [0, size); `work` is the number of elements that one index stands for.
template <class Kernel>
void for_ranges(const Kernel& kernel, int64_t size, int64_t work, int threads) {
  const RangeFunction run = range_function<Kernel>();
  const int64_t smallest = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work));
  if (threads <= 1 || size <= smallest) {
    run(&kernel, 0, size);
    return;
  }
  // A few pieces per thread even out threads that start late, in whole blocks.
  const int64_t pieces = static_cast<int64_t>(threads) * 4;
  int64_t piece = std::max(smallest, (size + pieces - 1) / pieces);
  if (piece > kBlock) piece = (piece + kBlock - 1) / kBlock * kBlock;
  run_pieces(run, &kernel, size, piece, threads);
}

// Calls part(offset, column, count) for each run of elements [at, at + count) of [rows, n] that lies in one row.
template <class Part>
RELPROP_INLINE void for_row_parts(int64_t at, int64_t count, int64_t n, const Part& part) {
  for (int64_t i = 0; i < count;) {
    const int64_t column = (at + i) % n;
    const int64_t run = std::min(count - i, n - column);
    part(i, column, run);
    i += run;
  }
}

}  // namespace relprop
