// advance on the device. The tables are those of midstream/advance.h, with device pointers.
#pragma once

#include <cuda_runtime_api.h>

#include "midstream/advance.h"

namespace midstream::cuda {

/// Whether the kernels can hold a stream's state for tables of these sizes in shared memory.
bool fits(const Sizes& sizes);

/// Fold the rows in order. A row whose slot or policy row is outside its table, or whose position
/// is beyond the limit, changes nothing: looking from the host would need a wait.
cudaError_t advance(const Rows& rows, const Tables& tables, cudaStream_t stream);

/// Load the kernel onto the current device, which a graph capture may not do.
cudaError_t load_advance_kernels();

}  // namespace midstream::cuda
