// Runs CUDA kernels on the host, so that tests see their results on a machine without a GPU.
//
// Every thread of a block is a fiber with a stack of its own; blocks run one after another. A fiber
// runs until it reaches a barrier or an operation of its warp, which is done when all lanes of the
// mask have come. Threads are taken in ascending and, at every other launch, in descending order: a
// missing barrier shows as a wrong or changing result. What is undefined on a GPU is an error here:
// a barrier that some thread never reaches, lanes of a warp at different operations, a write beyond
// the shared memory of the launch. Shared memory is full of NaN when a block starts.
//
// Not emulated: blocks that run at the same time, memory ordering, alignment of loads (checked by
// -fsanitize=alignment where the compiler has it).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

/// Where the running fiber is.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

enum class Operation {
  none,
  block_barrier,
  warp_barrier,
  shuffle,
  ballot,
  match,
  mma_bf16,
  mma_f16
};

/// Operands and results of one lane.
struct Lane {
  Operation operation = Operation::none;
  unsigned mask = 0;
  int source = 0;          // lane to read from
  std::uint32_t word = 0;  // in and out
  std::uint32_t a[4], b[2];
  float d[4];
};

/// Registers of the running fiber; fill them, then wait.
Lane& lane();

/// Wait until the other lanes of the mask, or all threads of the block, are at `operation` too.
void wait(Operation operation, unsigned mask);

unsigned char* shared_memory();

/// Run a grid. Throws std::runtime_error where a kernel does what a GPU leaves undefined.
void run(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& kernel);

}  // namespace emulator
