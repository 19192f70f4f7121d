#include "emulation.h"

#include <algorithm>
#include <exception>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define RELPROP_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define RELPROP_ASAN 1
#endif
#endif
#if defined(RELPROP_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace relprop::emulation {

const Thread* current = nullptr;
Dim3 block_index, block_size, grid_size;

namespace {

#if defined(RELPROP_ASAN)
constexpr size_t kStack = 512 * 1024;
#else
constexpr size_t kStack = 128 * 1024;
#endif

constexpr size_t kMaxShared = 227 * 1024;  // of any GPU
constexpr size_t kMaxStaticShared = 48 * 1024;
constexpr size_t kGuard = 64;
constexpr unsigned char kGuardByte = 0xFA;
constexpr unsigned char kUninitialised = 0xFF;  // NaN in every float type

// ---------------------------------------------------------------------------------------------------------------------
// Stacks and how to change between them

struct Stack {
  std::unique_ptr<std::byte[]> memory;
  const void* bottom = nullptr;
  size_t size = 0;
  void* asan_fake = nullptr;
#if defined(__x86_64__)
  void* pointer = nullptr;
#else
  ucontext_t context{};
#endif
};

extern "C" void relprop_emulation_fibre();

#if defined(__x86_64__)
extern "C" void relprop_emulation_switch(void** save, void* load);
asm(R"(
.text
.globl relprop_emulation_switch
.hidden relprop_emulation_switch
.type relprop_emulation_switch, @function
relprop_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size relprop_emulation_switch, .-relprop_emulation_switch
)");

void prepare(Stack& stack) {
  auto top = reinterpret_cast<std::uintptr_t>(stack.memory.get() + stack.size) & ~std::uintptr_t{15};
  auto* words = reinterpret_cast<void**>(top);
  *--words = nullptr;  // where a return address would lie: the entry sees an aligned stack
  *--words = reinterpret_cast<void*>(&relprop_emulation_fibre);
  for (int i = 0; i < 6; ++i) *--words = nullptr;
  stack.pointer = words;
}

void change(Stack& from, Stack& to) { relprop_emulation_switch(&from.pointer, to.pointer); }
#else
void prepare(Stack& stack) {
  getcontext(&stack.context);
  stack.context.uc_stack.ss_sp = stack.memory.get();
  stack.context.uc_stack.ss_size = stack.size;
  makecontext(&stack.context, &relprop_emulation_fibre, 0);
}

void change(Stack& from, Stack& to) { swapcontext(&from.context, &to.context); }
#endif

void switch_to(Stack& from, Stack& to, bool from_ends) {
#if defined(RELPROP_ASAN)
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.asan_fake, to.bottom, to.size);
#else
  (void)from_ends;
#endif
  change(from, to);
#if defined(RELPROP_ASAN)
  __sanitizer_finish_switch_fiber(from.asan_fake, nullptr, nullptr);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Threads, warps, the block

enum class State { kReady, kAtBlockBarrier, kAtWarpOperation, kDone };

struct Copy {
  void* target;
  const void* source;
  int size, bytes;
};

struct Fibre {
  Thread thread;
  State state;
  Stack stack;
  std::vector<std::vector<Copy>> groups;  // the last is still open
};

struct Warp {
  alignas(16) std::byte slots[2][kWarpSize * kSlot];
  unsigned lanes = 0, arrived = 0;
  unsigned generation = 0;
  const char* operation = "";
  unsigned mask = 0;
};

struct Variable {
  const void* key;
  size_t offset, size;
};

struct Block {
  const char* kernel = "";
  const std::function<void()>* body = nullptr;
  std::vector<std::unique_ptr<Fibre>> fibres;
  std::vector<int> order;
  std::vector<Warp> warps;
  size_t count = 0, live = 0, at_barrier = 0;
  Stack scheduler;
  Fibre* running = nullptr;
  std::exception_ptr failure;
  std::vector<Variable> variables;
  size_t static_shared = 0, dynamic_size = 0;
};

Block block;
Order turns = Order::kForward;
int64_t launch_count = 0;
size_t shared_limit = 163 * 1024;
cudaError_t last_error = cudaSuccess;
alignas(128) unsigned char arena[2 * kMaxShared + 64 * kGuard];

[[noreturn]] void fail(const std::string& problem) {
  std::ostringstream text;
  text << "emulated kernel " << block.kernel << ": " << problem;
  if (block.running != nullptr) {
    const Dim3 &b = block_index, &t = block.running->thread.index;
    text << " (block " << b.x << "," << b.y << "," << b.z << " thread " << t.x << "," << t.y << "," << t.z << ")";
  }
  throw std::runtime_error(text.str());
}

void wait_as(State state) {
  Fibre& fibre = *block.running;
  fibre.state = state;
  switch_to(fibre.stack, block.scheduler, false);
}

void release(State state, size_t first, size_t last) {
  for (size_t i = first; i < last; ++i) {
    if (block.fibres[i]->state == state) block.fibres[i]->state = State::kReady;
  }
}

void release_barrier_if_complete() {
  if (block.at_barrier == 0 || block.at_barrier < block.live) return;
  block.at_barrier = 0;
  release(State::kAtBlockBarrier, 0, block.count);
}

extern "C" void relprop_emulation_fibre() {
#if defined(RELPROP_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler.bottom, &block.scheduler.size);
#endif
  try {
    (*block.body)();
  } catch (...) {
    block.failure = std::current_exception();
  }
  Fibre& fibre = *block.running;
  fibre.state = State::kDone;
  --block.live;
  switch_to(fibre.stack, block.scheduler, true);
}

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory

void forbid([[maybe_unused]] unsigned char* at, [[maybe_unused]] size_t size) {
#if defined(RELPROP_ASAN)
  ASAN_POISON_MEMORY_REGION(at, size);
#endif
}

void allow([[maybe_unused]] unsigned char* at, [[maybe_unused]] size_t size) {
#if defined(RELPROP_ASAN)
  ASAN_UNPOISON_MEMORY_REGION(at, size);
#endif
}

// Room in the arena with guard zones on both sides.
size_t place(const void* key, size_t size, size_t alignment) {
  const Variable* last = block.variables.empty() ? nullptr : &block.variables.back();
  size_t offset = (last == nullptr ? 0 : last->offset + last->size) + kGuard;
  offset = (offset + alignment - 1) / alignment * alignment;
  if (offset + size + kGuard > sizeof(arena)) fail("out of shared memory");
  block.variables.push_back({key, offset, size});
  allow(arena + offset, size);
  std::memset(arena + offset, kUninitialised, size);
  return offset;
}

void clear_shared() {
  block.variables.clear();
  block.static_shared = 0;
  allow(arena, sizeof(arena));
  std::memset(arena, kGuardByte, sizeof(arena));
  forbid(arena, sizeof(arena));
  if (block.dynamic_size > 0) place(nullptr, block.dynamic_size, 128);
}

void check_guards() {
  allow(arena, sizeof(arena));
  size_t at = 0;
  for (size_t i = 0; i <= block.variables.size(); ++i) {
    const bool end = i == block.variables.size();
    const size_t stop = end ? std::min(at + kGuard, sizeof(arena)) : block.variables[i].offset;
    for (; at < stop; ++at) {
      if (arena[at] != kGuardByte) fail("a write next to a shared array");
    }
    if (!end) at = block.variables[i].offset + block.variables[i].size;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Running

void prepare_fibres() {
  while (block.fibres.size() < block.count) {
    auto fibre = std::make_unique<Fibre>();
    fibre->stack.size = kStack;
    fibre->stack.memory = std::make_unique<std::byte[]>(kStack);
    fibre->stack.bottom = fibre->stack.memory.get();
    block.fibres.push_back(std::move(fibre));
  }
  block.warps.assign((block.count + kWarpSize - 1) / kWarpSize, Warp());
  for (size_t i = 0; i < block.count; ++i) {
    Fibre& fibre = *block.fibres[i];
    const auto at = static_cast<unsigned>(i);
    fibre.thread = {Dim3(at % block_size.x, at / block_size.x % block_size.y, at / block_size.x / block_size.y),
                    static_cast<int>(at % kWarpSize), static_cast<int>(at / kWarpSize)};
    fibre.state = State::kReady;
    fibre.groups.assign(1, {});
    block.warps[i / kWarpSize].lanes |= 1u << (i % kWarpSize);
    allow(reinterpret_cast<unsigned char*>(fibre.stack.memory.get()), kStack);  // what ran here before never returned
    prepare(fibre.stack);
  }
}

void set_turns(std::mt19937& random) {
  block.order.resize(block.count);
  for (size_t i = 0; i < block.count; ++i) block.order[i] = static_cast<int>(i);
  if (turns == Order::kReverse) std::reverse(block.order.begin(), block.order.end());
  if (turns == Order::kShuffled) std::shuffle(block.order.begin(), block.order.end(), random);
}

void describe_standstill() {
  size_t waiting = 0;
  for (size_t i = 0; i < block.count; ++i) waiting += block.fibres[i]->state == State::kAtWarpOperation;
  std::ostringstream text;
  text << "standstill: " << block.at_barrier << " of " << block.live << " threads wait at __syncthreads and " << waiting
       << " at a warp operation that not all lanes reached";
  fail(text.str());
}

void run_block() {
  block.live = block.count;
  block.at_barrier = 0;
  while (block.live > 0) {
    bool moved = false;
    for (int i : block.order) {
      Fibre& fibre = *block.fibres[static_cast<size_t>(i)];
      if (fibre.state != State::kReady) continue;
      moved = true;
      block.running = &fibre;
      current = &fibre.thread;
      switch_to(block.scheduler, fibre.stack, false);
      current = nullptr;
      if (block.failure) std::rethrow_exception(block.failure);
      if (fibre.state == State::kDone) release_barrier_if_complete();
    }
    if (!moved) {
      block.running = nullptr;
      describe_standstill();
    }
  }
  block.running = nullptr;
}

void check_shared(size_t bytes) {
  if (bytes <= shared_limit) return;
  fail("expected at most " + std::to_string(shared_limit) + " bytes of shared memory, got " + std::to_string(bytes));
}

void check_launch(Dim3 grid, Dim3 size, size_t dynamic_shared) {
  block.running = nullptr;
  const uint64_t threads = uint64_t{size.x} * size.y * size.z;
  if (threads == 0 || threads > 1024 || size.z > 64) fail("expected 1 to 1024 threads in a block");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535) {
    fail("expected a grid of 1 to 2^31-1, 65535, 65535 blocks, got " + std::to_string(grid.x) + ", " +
         std::to_string(grid.y) + ", " + std::to_string(grid.z));
  }
  check_shared(dynamic_shared);
}

}  // namespace

void set_order(Order order) { turns = order; }

int64_t launches() { return launch_count; }

void set_most_shared(size_t bytes) {
  if (bytes < kMaxStaticShared || bytes > kMaxShared) {
    throw std::invalid_argument("most_shared: expected " + std::to_string(kMaxStaticShared) + " to " +
                                std::to_string(kMaxShared) + " bytes, got " + std::to_string(bytes));
  }
  shared_limit = bytes;
}

void run_grid(const char* kernel, Dim3 grid, Dim3 size, size_t dynamic_shared, const std::function<void()>& body) {
  block.kernel = kernel;
  check_launch(grid, size, dynamic_shared);
  ++launch_count;
  block.body = &body;
  block.count = size_t{size.x} * size.y * size.z;
  block.dynamic_size = dynamic_shared;
  block.failure = nullptr;
  grid_size = grid;
  block_size = size;
  std::mt19937 random(12345);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = Dim3(x, y, z);
        clear_shared();
        prepare_fibres();
        set_turns(random);
        run_block();
        check_guards();
      }
    }
  }
}

void* shared_variable(const void* key, size_t size, size_t alignment) {
  for (const Variable& variable : block.variables) {
    if (variable.key == key) return arena + variable.offset;
  }
  block.static_shared += size;
  if (block.static_shared > kMaxStaticShared) fail("expected at most 48 KiB of static shared memory");
  check_shared(block.static_shared + block.dynamic_size);
  return arena + place(key, size, std::max<size_t>(alignment, 16));
}

void* dynamic_shared() {
  if (block.dynamic_size == 0) fail("no dynamic shared memory was asked for at launch");
  return arena + block.variables.front().offset;
}

void sync_block() {
  ++block.at_barrier;
  block.running->state = State::kAtBlockBarrier;
  release_barrier_if_complete();
  if (block.running->state == State::kAtBlockBarrier) wait_as(State::kAtBlockBarrier);
}

const std::byte* exchange(const char* operation, unsigned mask, const void* given, size_t size) {
  const Thread& thread = block.running->thread;
  Warp& warp = block.warps[static_cast<size_t>(thread.warp)];
  if ((mask & warp.lanes) != warp.lanes) fail(std::string(operation) + ": only masks of a whole warp are emulated");
  if (warp.arrived == 0) warp.operation = operation;
  if (std::strcmp(warp.operation, operation) != 0) {
    fail(std::string("lanes of one warp are at ") + warp.operation + " and at " + operation);
  }
  const unsigned generation = warp.generation;
  std::byte* slots = warp.slots[generation % 2];
  if (size > 0) std::memcpy(slots + static_cast<size_t>(thread.lane) * kSlot, given, size);
  warp.arrived |= 1u << thread.lane;
  if (warp.arrived == warp.lanes) {
    warp.arrived = 0;
    ++warp.generation;
    const size_t first = static_cast<size_t>(thread.warp) * kWarpSize;
    release(State::kAtWarpOperation, first, std::min(first + kWarpSize, block.count));
  } else {
    wait_as(State::kAtWarpOperation);
  }
  return slots;
}

void copy_later(void* target, const void* source, int size, int bytes) {
  const auto misaligned = [size](const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % size != 0; };
  if (size != 4 && size != 8 && size != 16) fail("cp.async: expected 4, 8 or 16 bytes, got " + std::to_string(size));
  if (misaligned(target) || misaligned(source)) fail("cp.async: misaligned by its size of " + std::to_string(size));
  block.running->groups.back().push_back({target, source, size, bytes});
}

void commit_copies() { block.running->groups.emplace_back(); }

void wait_copies(int groups_left) {
  auto& groups = block.running->groups;
  while (static_cast<int>(groups.size()) - 1 > groups_left) {
    for (const Copy& copy : groups.front()) {
      if (copy.bytes > 0) std::memcpy(copy.target, copy.source, static_cast<size_t>(copy.bytes));
      std::memset(static_cast<std::byte*>(copy.target) + copy.bytes, 0, static_cast<size_t>(copy.size - copy.bytes));
    }
    groups.erase(groups.begin());
  }
}

}  // namespace relprop::emulation

namespace {

cudaError_t ended(bool well) {
  if (well) return cudaSuccess;
  return relprop::emulation::last_error = cudaErrorInvalidValue;
}

}  // namespace

cudaError_t cudaGetLastError() { return std::exchange(relprop::emulation::last_error, cudaSuccess); }

const char* cudaGetErrorName(cudaError_t status) {
  return status == cudaSuccess ? "cudaSuccess" : "cudaErrorInvalidValue";
}

const char* cudaGetErrorString(cudaError_t status) { return status == cudaSuccess ? "no error" : "invalid argument"; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return ended(device == 0); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = static_cast<int>(relprop::emulation::shared_limit);
  return ended(device == 0);
}

// A smaller limit than the device's would take it from a launch of the same kernel by another thread.
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  return ended(static_cast<size_t>(value) == relprop::emulation::shared_limit);
}
