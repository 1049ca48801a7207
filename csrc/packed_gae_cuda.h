// What packed_gae_cuda.cu offers, to a caller that knows torch.
#pragma once

#include <cuda_runtime_api.h>

#include "packed_gae.h"

namespace rlsp {

// How to launch the kernel for one problem on the current device, and the device memory that it needs meanwhile.
struct Launch {
  int num_blocks, tiles_per_block;
  int64_t scratch_bytes;
};

constexpr int64_t kMostTokens = INT32_MAX - 65536; // positions within the last tile are still int32

cudaError_t plan(const Problem& problem, int num_lambdas, Launch& launch);
cudaError_t run(const Problem& problem, int num_lambdas, const Launch& launch, void* scratch, cudaStream_t stream);

} // namespace rlsp
