#include "emulator.h"

#include <immintrin.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

namespace {

constexpr std::size_t kStack = 64 * 1024;
constexpr std::size_t kFence = 4096;  // bytes beyond the shared memory that nobody may write
constexpr unsigned char kFenceByte = 0xa5;

// makecontext starts a fiber; jumps switch, which needs no system call as swapcontext does.
struct Fiber {
  ucontext_t context;
  jmp_buf at;
  Lane lane;
  bool started, done;
};

std::vector<Fiber> fibers;
std::vector<unsigned char> shared;
unsigned char* stacks = nullptr;
std::size_t stack_count = 0;
Fiber* current = nullptr;
jmp_buf scheduler;
const std::function<void()>* body = nullptr;

[[noreturn]] void enter() {
  (*body)();
  current->done = true;
  _longjmp(scheduler, 1);
}

void resume(Fiber& fiber, unsigned thread) {
  current = &fiber;
  threadIdx = dim3(thread, 0, 0);
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

/// fp32 of a sum rounded toward zero, as tensor cores do.
float truncate(double sum) {
  const float rounded = static_cast<float>(sum);
  if (!std::isfinite(rounded)) return rounded;
  return std::fabs(rounded) > std::fabs(sum) ? std::nextafter(rounded, 0.0f) : rounded;
}

float number(std::uint32_t word, int half, bool bf16) {
  const auto bits = static_cast<std::uint16_t>(word >> (16 * half));
  if (!bf16) return _cvtsh_ss(bits);
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

/// mma.m16n8k16, by the fragment layouts of the PTX manual.
void multiply(Fiber* warp, bool bf16) {
  float a[16][16], b[16][8];
  for (int l = 0; l < 32; ++l) {
    const int group = l / 4, t = l % 4;
    const Lane& lane = warp[l].lane;
    for (int i = 0; i < 8; ++i) {  // a_i: row group, or group + 8 for i in 2, 3, 6, 7
      const int row = (i / 2) % 2 == 0 ? group : group + 8;
      const int column = t * 2 + (i & 1) + (i >= 4 ? 8 : 0);
      a[row][column] = number(lane.a[i / 2], i % 2, bf16);
    }
    for (int i = 0; i < 4; ++i) {
      b[t * 2 + (i & 1) + (i >= 2 ? 8 : 0)][group] = number(lane.b[i / 2], i % 2, bf16);
    }
  }
  double sums[16][8] = {};
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) sums[row][n] += static_cast<double>(a[row][k]) * b[k][n];
    }
  }
  for (int l = 0; l < 32; ++l) {
    const int group = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) {
      float& d = warp[l].lane.d[i];
      d = truncate(sums[i < 2 ? group : group + 8][t * 2 + (i & 1)] + d);
    }
  }
}

/// Do the operation that all lanes of `mask` wait at.
void perform(Fiber* warp, Operation operation, unsigned mask) {
  std::uint32_t words[32];
  for (int l = 0; l < 32; ++l) words[l] = warp[l].lane.word;
  unsigned ballot = 0;
  for (int l = 0; l < 32; ++l) ballot |= (mask >> l & 1u) && words[l] != 0 ? 1u << l : 0u;
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1u)) continue;
    Lane& lane = warp[l].lane;
    if (operation == Operation::shuffle) {
      if (!(mask >> lane.source & 1u)) throw std::runtime_error("shuffle from a lane not in it");
      lane.word = words[lane.source];
    } else if (operation == Operation::ballot) {
      lane.word = ballot;
    } else if (operation == Operation::match) {
      lane.word = 0;
      for (int o = 0; o < 32; ++o) {
        if ((mask >> o & 1u) && words[o] == words[l]) lane.word |= 1u << o;
      }
    }
  }
  if (operation == Operation::mma_bf16 || operation == Operation::mma_f16) {
    multiply(warp, operation == Operation::mma_bf16);
  }
}

std::string where(unsigned thread) {
  return " (block " + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", thread " +
         std::to_string(thread) + ")";
}

/// Release the warp of `first` if its lanes allow; say whether they did.
bool release_warp(unsigned first) {
  Fiber* warp = &fibers[first];
  const Lane* leader = nullptr;
  for (int l = 0; l < 32; ++l) {
    const Lane& lane = warp[l].lane;
    if (warp[l].done || lane.operation == Operation::block_barrier) continue;
    if (leader == nullptr) leader = &lane;
    if (lane.operation != leader->operation || lane.mask != leader->mask) {
      throw std::runtime_error("lanes of a warp are at different operations" + where(first + l));
    }
  }
  if (leader == nullptr) return false;
  const Operation operation = leader->operation;
  const unsigned mask = leader->mask;
  for (int l = 0; l < 32; ++l) {
    if ((mask >> l & 1u) && (warp[l].done || warp[l].lane.operation != operation)) {
      throw std::runtime_error("a lane never comes to its warp's operation" + where(first + l));
    }
  }
  perform(warp, operation, mask);
  for (int l = 0; l < 32; ++l) {
    if (mask >> l & 1u) warp[l].lane.operation = Operation::none;
  }
  return true;
}

void run_block(bool descending) {
  const unsigned count = static_cast<unsigned>(fibers.size());
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::size_t bytes = shared.size() - kFence;
  for (std::size_t i = 0; i + 4 <= bytes; i += 4) std::memcpy(&shared[i], &nan, 4);
  std::memset(shared.data() + bytes, kFenceByte, kFence);
  for (unsigned i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    fiber.started = fiber.done = false;
    fiber.lane.operation = Operation::none;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks + i * kStack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (;;) {
    unsigned done = 0, at_barrier = 0;
    // A warp goes as far as it can before the next one starts.
    for (unsigned w = 0; w < count / 32; ++w) {
      const unsigned first = 32 * (descending ? count / 32 - 1 - w : w);
      do {
        for (unsigned l = 0; l < 32; ++l) {
          const unsigned i = first + (descending ? 31 - l : l);
          if (!fibers[i].done && fibers[i].lane.operation == Operation::none) {
            resume(fibers[i], i);
          }
        }
      } while (release_warp(first));
      for (unsigned l = 0; l < 32; ++l) {
        done += fibers[first + l].done;
        at_barrier += !fibers[first + l].done;
      }
    }
    for (std::size_t i = bytes; i < shared.size(); ++i) {
      if (shared[i] != kFenceByte)
        throw std::runtime_error("write beyond shared memory" + where(0));
    }
    if (done == count) return;
    if (at_barrier != count) {
      throw std::runtime_error("some threads have left and others wait at a barrier" + where(0));
    }
    for (Fiber& fiber : fibers) fiber.lane.operation = Operation::none;
  }
}

}  // namespace

Lane& lane() { return current->lane; }

void wait(Operation operation, unsigned mask) {
  current->lane.operation = operation;
  current->lane.mask = mask;
  if (_setjmp(current->at) == 0) _longjmp(scheduler, 1);
}

unsigned char* shared_memory() { return shared.data(); }

void run(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& kernel) {
  static bool descending = true;
  descending = !descending;
  if (block.x == 0 || block.x % 32 != 0 || block.x > 1024 || block.y != 1 || block.z != 1) {
    throw std::runtime_error("blocks are whole warps, up to 1024 threads in one dimension");
  }
  if (shared_bytes > 48 * 1024) throw std::runtime_error("more than 48 KiB of shared memory");
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535) throw std::runtime_error("bad grid");
  if (stack_count < block.x) {
    stacks = static_cast<unsigned char*>(
        mmap(nullptr, 1024 * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (stacks == MAP_FAILED) throw std::runtime_error("no memory for stacks");
    stack_count = 1024;
  }
  fibers.resize(block.x);
  // Room for the alignment of what comes after the shared memory.
  shared.resize(shared_bytes + kFence);
  body = &kernel;
  gridDim = grid;
  blockDim = block;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y, 0);
      run_block(descending);
    }
  }
}

}  // namespace emulator
