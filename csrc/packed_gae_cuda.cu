#include "packed_gae_cuda.h"

#include "packed_gae.cuh"

namespace rlsp {
namespace {

constexpr int kThreads = 256;
static_assert(kTile<kThreads> <= 65536);

bool is_multiple(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

template <int kLambdas>
cudaError_t plan(const Problem& p, Launch& launch) {
  const int num_tiles = int((p.T + kTile<kThreads> - 1) / kTile<kThreads>);
  int device, num_multiprocessors, blocks_each;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_each, packed_gae_kernel<kLambdas, kThreads>, kThreads, 0);
  if (error != cudaSuccess) return error;
  const int most = num_multiprocessors * blocks_each; // a cooperative launch has all its blocks on the device at once
  if (most == 0) return cudaErrorInvalidDeviceFunction;
  launch.tiles_per_block = (num_tiles + most - 1) / most;
  launch.num_blocks = (num_tiles + launch.tiles_per_block - 1) / launch.tiles_per_block;
  const auto block_bytes = int64_t(sizeof(Moments) + sizeof(Map<float, kLambdas>));
  launch.scratch_bytes = launch.num_blocks * block_bytes + int64_t(sizeof(unsigned));
  return cudaSuccess;
}

template <int kLambdas>
cudaError_t run(Problem p, const Launch& launch, void* memory, cudaStream_t stream) {
  Scratch<kLambdas> scratch;
  scratch.moments = static_cast<Moments*>(memory);
  scratch.maps = reinterpret_cast<Map<float, kLambdas>*>(scratch.moments + launch.num_blocks);
  scratch.num_done = reinterpret_cast<unsigned*>(scratch.maps + launch.num_blocks);
  bool aligned = is_multiple(p.mask, 4);
  for (const float* column : {p.value, p.token_reward, p.old_logprob, p.ref_logprob, static_cast<const float*>(p.reward),
                              static_cast<const float*>(p.advantage), static_cast<const float*>(p.returns)})
    aligned = aligned && is_multiple(column, 16);
  int tiles_per_block = launch.tiles_per_block;
  void* arguments[] = {&p, &scratch, &tiles_per_block, &aligned};
  return cudaLaunchCooperativeKernel(packed_gae_kernel<kLambdas, kThreads>, dim3(launch.num_blocks), dim3(kThreads), arguments,
                                     0, stream);
}

} // namespace

cudaError_t plan(const Problem& problem, int num_lambdas, Launch& launch) {
  return num_lambdas == 1 ? plan<1>(problem, launch) : plan<2>(problem, launch);
}

cudaError_t run(const Problem& problem, int num_lambdas, const Launch& launch, void* scratch, cudaStream_t stream) {
  return num_lambdas == 1 ? run<1>(problem, launch, scratch, stream) : run<2>(problem, launch, scratch, stream);
}

} // namespace rlsp
