// Memory of results, kept for the next result of its size when a tensor dies: the first touch of a fresh page costs
// more than most kernels need to fill it, and the C library gives large blocks back to the system as soon as they are
// free.
#pragma once

#include <cstdint>

namespace relprop {

// Results smaller than this are left to torch's own allocator, which does not return them to the system.
constexpr int64_t kSmallestBlock = 256 * 1024;

// Memory of at least `bytes` on a 64-byte boundary. Throws std::bad_alloc.
void* take_block(int64_t bytes);

// Takes back what take_block gave for as many bytes. What would go beyond the limit goes to the system.
void give_block(void* block, int64_t bytes);

struct BlockUse {
  int64_t kept;   // bytes in free blocks
  int64_t limit;  // of `kept`
};

BlockUse block_use();

// Gives free blocks back to the system until at most `limit` bytes are kept, now and later.
void limit_blocks(int64_t limit);

}  // namespace relprop
