#include "memory.h"

#include <unistd.h>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <vector>

namespace relprop {
namespace {

// An eighth of the power of two below: blocks are at most an eighth larger than asked for, and few sizes differ.
int64_t rounded(int64_t bytes) {
  int64_t step = kSmallestBlock / 8;
  while (step * 16 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

int64_t default_limit() {
  const int64_t pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGE_SIZE);
  return pages > 0 && page > 0 ? pages * page / 16 : int64_t{256} << 20;
}

struct Blocks {
  std::mutex mutex;
  std::map<int64_t, std::vector<void*>> free;  // by size
  int64_t kept = 0;
  int64_t limit = default_limit();

  // Frees the largest first.
  void shrink() {
    while (kept > limit) {
      auto last = std::prev(free.end());
      std::free(last->second.back());
      last->second.pop_back();
      kept -= last->first;
      if (last->second.empty()) free.erase(last);
    }
  }
};

// Never destroyed: tensors may outlive the module.
Blocks& blocks() {
  static Blocks* const all = new Blocks;
  return *all;
}

}  // namespace

void* take_block(int64_t bytes) {
  const int64_t size = rounded(std::max<int64_t>(bytes, 1));
  Blocks& all = blocks();
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto found = all.free.find(size);
    if (found != all.free.end()) {
      void* block = found->second.back();
      found->second.pop_back();
      if (found->second.empty()) all.free.erase(found);
      all.kept -= size;
      return block;
    }
  }
  void* block = std::aligned_alloc(64, static_cast<size_t>(size));
  if (block == nullptr) {  // once more, with everything that was kept
    const int64_t limit = block_use().limit;
    limit_blocks(0);
    limit_blocks(limit);
    block = std::aligned_alloc(64, static_cast<size_t>(size));
  }
  if (block == nullptr) throw std::bad_alloc();
  return block;
}

void give_block(void* block, int64_t bytes) {
  const int64_t size = rounded(std::max<int64_t>(bytes, 1));
  Blocks& all = blocks();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.free[size].push_back(block);
  all.kept += size;
  all.shrink();
}

BlockUse block_use() {
  Blocks& all = blocks();
  const std::lock_guard<std::mutex> lock(all.mutex);
  return {all.kept, all.limit};
}

void limit_blocks(int64_t limit) {
  Blocks& all = blocks();
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    all.limit = limit;
    all.shrink();
  }
#ifdef __GLIBC__
  malloc_trim(0);  // the C library keeps blocks of up to some MB, and what torch's own results left
#endif
}

}  // namespace relprop
