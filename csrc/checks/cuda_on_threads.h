// The part of CUDA that packed_gae.cuh uses, with a thread of the operating system for each CUDA thread: enough to run the
// kernel's own source without a GPU, and to let the thread sanitizer look for missing barriers. Slow, and C++20.
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct float4 {
  float x, y, z, w;
};
struct uchar4 {
  unsigned char x, y, z, w;
};
struct Index {
  unsigned x;
};

namespace cuda_on_threads {

struct Warp {
  std::barrier<> barrier{32};
  alignas(16) unsigned char slots[32][8];
};

struct Block {
  explicit Block(int num_threads) : barrier(num_threads), warps(num_threads / 32) {}
  std::barrier<> barrier;
  std::vector<Warp> warps;
  alignas(16) unsigned char shared[8192];
};

inline thread_local Block* block;
inline thread_local std::barrier<>* grid;

} // namespace cuda_on_threads

inline thread_local Index threadIdx, blockIdx, gridDim;

#define RLSP_SHARED(name, ...) __VA_ARGS__& name = *reinterpret_cast<__VA_ARGS__*>(cuda_on_threads::block->shared)

using std::isfinite;
using std::min;

inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline void __stcs(float4* to, float4 value) { *to = value; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline void __syncthreads() { cuda_on_threads::block->barrier.arrive_and_wait(); }
inline void __threadfence() {} // atomicAdd is sequentially consistent here
inline unsigned atomicAdd(unsigned* to, unsigned by) { return std::atomic_ref<unsigned>(*to).fetch_add(by); }

// Every lane's value, exchanged through the warp's slots.
template <class T>
T from_lane(T value, int source) {
  auto& warp = cuda_on_threads::block->warps[threadIdx.x / 32];
  std::memcpy(warp.slots[threadIdx.x % 32], &value, sizeof value);
  warp.barrier.arrive_and_wait();
  std::memcpy(&value, warp.slots[source], sizeof value);
  warp.barrier.arrive_and_wait(); // nobody overwrites a slot that is still to be read
  return value;
}

template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return from_lane(value, source);
}

template <class T>
T __shfl_down_sync(unsigned, T value, int distance) {
  const int lane = threadIdx.x % 32;
  return from_lane(value, lane + distance < 32 ? lane + distance : lane);
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  unsigned bits = 0;
  auto& warp = cuda_on_threads::block->warps[threadIdx.x / 32];
  warp.slots[threadIdx.x % 32][0] = vote;
  warp.barrier.arrive_and_wait();
  for (int lane = 0; lane < 32; ++lane) bits |= unsigned(warp.slots[lane][0]) << lane;
  warp.barrier.arrive_and_wait();
  return bits;
}

namespace cooperative_groups {
struct Grid {
  void sync() { cuda_on_threads::grid->arrive_and_wait(); }
};
inline Grid this_grid() { return {}; }
} // namespace cooperative_groups

namespace cuda_on_threads {

// kernel(arguments...) on every thread of the grid, all of them at once.
template <class... Arguments>
void launch(int num_blocks, int num_threads, void (*kernel)(Arguments...), Arguments... arguments) {
  std::barrier<> whole(num_blocks * num_threads);
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::thread> threads;
  for (int b = 0; b < num_blocks; ++b) blocks.push_back(std::make_unique<Block>(num_threads));
  for (int b = 0; b < num_blocks; ++b)
    for (int t = 0; t < num_threads; ++t)
      threads.emplace_back([&, b, t] {
        threadIdx.x = t, blockIdx.x = b, gridDim.x = num_blocks;
        block = blocks[b].get();
        grid = &whole;
        kernel(arguments...);
      });
  for (std::thread& thread : threads) thread.join();
}

} // namespace cuda_on_threads
