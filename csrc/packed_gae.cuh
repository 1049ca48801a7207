// The scan on a GPU, free of torch: one cooperative launch, whatever the number of tokens and sequences.
//
// A tile is kTile consecutive tokens: one block, kRows rows of 128 tokens a warp, 4 neighbouring tokens a lane (16-byte loads).
// Every block owns a run of tiles. It composes their maps, publishes the product, waits for all blocks, composes the products
// of the blocks on its right into the state at its right edge, and walks its tiles from right to left writing the outputs.
// The last tile it read is still in registers, so as many tokens as the GPU can hold (about 1 M) are read once. Everything is
// combined in an order that depends on the shapes alone, so the bits are the same every run.
//
// Decoupled look-back would read every token once at any size, but sums in the order in which blocks happen to finish.
#pragma once

#include <cassert>

#include "packed_gae.h"

#ifdef __CUDACC__
#include <cooperative_groups.h>
#define RLSP_SHARED(name, ...) __shared__ __VA_ARGS__ name
#else
#include "cuda_on_threads.h"
#endif

namespace rlsp {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kRows = 4;
constexpr int kQuad = 4;
constexpr int kRowTokens = 32 * kQuad;
constexpr int kWarpTokens = kRows * kRowTokens;

template <int kThreads>
constexpr int kTile = kThreads / 32 * kWarpTokens;

// Scratch in device memory, not initialised.
template <int kLambdas>
struct Scratch {
  Map<float, kLambdas>* maps; // one a block
  Moments* moments;           // one a block
  unsigned* num_done;         // blocks that have written their moments
};

template <int kLambdas, int kThreads>
struct Shared {
  Map<float, kLambdas> maps[kThreads / 32];
  Moments moments[kThreads / 32];
  bool last;
};

// --- moving things between lanes --------------------------------------------------------------

template <int kLambdas>
__device__ __forceinline__ Map<float, kLambdas> from_right(const Map<float, kLambdas>& m, int distance) {
  Map<float, kLambdas> other;
  other.flags = __shfl_down_sync(kAllLanes, m.flags, distance);
#pragma unroll
  for (int i = 0; i < kLambdas; ++i) {
    other.b[i] = __shfl_down_sync(kAllLanes, m.b[i], distance);
    other.c[i] = __shfl_down_sync(kAllLanes, m.c[i], distance);
  }
  return other;
}

template <int kLambdas>
__device__ __forceinline__ Map<float, kLambdas> from_lane_0(const Map<float, kLambdas>& m) {
  Map<float, kLambdas> first;
  first.flags = __shfl_sync(kAllLanes, m.flags, 0);
#pragma unroll
  for (int i = 0; i < kLambdas; ++i) {
    first.b[i] = __shfl_sync(kAllLanes, m.b[i], 0);
    first.c[i] = __shfl_sync(kAllLanes, m.c[i], 0);
  }
  return first;
}

// m becomes the product of this lane's map and those of all lanes on its right.
template <int kLambdas>
__device__ __forceinline__ void scan_lanes(Map<float, kLambdas>& m, int lane) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const Map<float, kLambdas> right = from_right(m, distance);
    if (lane + distance < 32) m = compose(m, right);
  }
}

// Product over the warps on the right of `warp` (-1: over all).
template <int kLambdas>
__device__ __forceinline__ Map<float, kLambdas> product(const Map<float, kLambdas>* maps, int num_warps, int warp) {
  auto m = identity<float, kLambdas>();
  for (int w = num_warps - 1; w > warp; --w) m = compose(maps[w], m);
  return m;
}

__device__ __forceinline__ Moments sum_lanes(Moments m) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    Moments other;
    other.count = __shfl_down_sync(kAllLanes, m.count, distance);
    other.sum = __shfl_down_sync(kAllLanes, m.sum, distance);
    other.squares = __shfl_down_sync(kAllLanes, m.squares, distance);
    other.nonfinite = __shfl_down_sync(kAllLanes, m.nonfinite, distance);
    m.add(other);
  }
  return m; // right in lane 0
}

// --- tokens -----------------------------------------------------------------------------------

// Sequence of token t, found by the whole warp: 32 probes at a time, 2 rounds for 1,000 sequences.
__device__ __forceinline__ int find_sequence_by_warp(const int32_t* cu_seqlens, int S, int t, int lane) {
  int low = 0, high = S; // cu_seqlens[low] <= t < cu_seqlens[high]
  while (high - low > 1) {
    const int stride = (high - low + 31) / 32;
    const int probe = low + (lane + 1) * stride;
    const int num_not_past = __popc(__ballot_sync(kAllLanes, probe < high && cu_seqlens[probe] <= t));
    low += num_not_past * stride;
    high = min(high, low + stride);
  }
  return low;
}

// What a lane holds of a tile: kRows quads of neighbouring tokens.
struct Tokens {
  float value[kRows][kQuad];
  float reward[kRows][kQuad]; // without the terminal one
  int sequence[kRows];        // of the quad's last token
  unsigned keep;              // bit kQuad * row + i: True
};

__device__ __forceinline__ void load_quad(const float* from, int t, int T, bool aligned, float (&to)[kQuad]) {
  if (aligned && t + kQuad <= T) {
    const float4 four = *reinterpret_cast<const float4*>(from + t);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  } else {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) to[i] = t + i < T ? from[t + i] : 0;
  }
}

__device__ __forceinline__ void store_quad(float* to, int t, int T, bool aligned, bool streaming, const float (&from)[kQuad]) {
  if (aligned && t + kQuad <= T) {
    const float4 four = make_float4(from[0], from[1], from[2], from[3]);
    if (streaming) __stcs(reinterpret_cast<float4*>(to + t), four);
    else *reinterpret_cast<float4*>(to + t) = four;
  } else {
#pragma unroll
    for (int i = 0; i < kQuad; ++i)
      if (t + i < T) to[t + i] = from[i];
  }
}

__device__ __forceinline__ void load_tokens(const Problem& p, int warp_begin, int lane, bool aligned, Tokens& tokens) {
  const int T = int(p.T), S = int(p.S);
  tokens.keep = 0;
  if (warp_begin >= T) return;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const int t = warp_begin + row * kRowTokens + lane * kQuad;
    if (aligned && t + kQuad <= T) {
      const uchar4 keep = *reinterpret_cast<const uchar4*>(p.mask + t);
      tokens.keep |= unsigned(keep.x | keep.y << 1 | keep.z << 2 | keep.w << 3) << (kQuad * row);
    } else {
#pragma unroll
      for (int i = 0; i < kQuad; ++i)
        if (t + i < T && p.mask[t + i]) tokens.keep |= 1u << (kQuad * row + i);
    }
    load_quad(p.value, t, T, aligned, tokens.value[row]);
    if (p.token_reward) load_quad(p.token_reward, t, T, aligned, tokens.reward[row]);
    else
#pragma unroll
      for (int i = 0; i < kQuad; ++i) tokens.reward[row][i] = 0;
    if (p.kl_kind != kNoKL) {
      float old_logprob[kQuad], ref_logprob[kQuad];
      load_quad(p.old_logprob, t, T, aligned, old_logprob);
      load_quad(p.ref_logprob, t, T, aligned, ref_logprob);
#pragma unroll
      for (int i = 0; i < kQuad; ++i)
        tokens.reward[row][i] = own_reward<float>(p, tokens.reward[row][i], old_logprob[i], ref_logprob[i]);
    }
  }
  const int warp_last = min(warp_begin + kWarpTokens, T) - 1;
  const int first = find_sequence_by_warp(p.cu_seqlens, S, warp_begin, lane);
  const int last = find_sequence_by_warp(p.cu_seqlens, S, warp_last, lane);
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const int t = warp_begin + row * kRowTokens + lane * kQuad + kQuad - 1;
    tokens.sequence[row] = int(find_sequence(p.cu_seqlens, first, last, min(t, warp_last)));
  }
}

// The sequence that a lane walking leftwards is in.
template <int kLambdas>
struct Sequence {
  int index, begin, end;
  Discount<float> discounts[kLambdas];

  __device__ __forceinline__ Sequence(const Problem& p, int s) { enter(p, s); }

  __device__ __forceinline__ void enter(const Problem& p, int s) {
    index = s;
    begin = p.cu_seqlens[s];
    end = p.cu_seqlens[s + 1];
#pragma unroll
    for (int i = 0; i < kLambdas; ++i) discounts[i] = discount<float>(p, s, i);
  }

  __device__ __forceinline__ void move_to(const Problem& p, int t) {
    while (t < begin && index > 0) enter(p, index - 1); // index: an unsound cu_seqlens must fail its assertion, not read elsewhere
  }
};

// The map of one lane's quad.
template <int kLambdas>
__device__ __forceinline__ Map<float, kLambdas> quad_map(const Problem& p, const Tokens& tokens, int row, int t) {
  auto m = identity<float, kLambdas>();
  if (t >= p.T) return m;
  Sequence<kLambdas> sequence(p, tokens.sequence[row]);
#pragma unroll
  for (int i = kQuad - 1; i >= 0; --i) {
    if (t + i >= p.T) continue;
    sequence.move_to(p, t + i);
    if (t + i + 1 == sequence.end) m = end_map<float, kLambdas>(boundary<float>(p, sequence.index));
    if (tokens.keep >> (kQuad * row + i) & 1)
      push(m, tokens.reward[row][i], tokens.value[row][i], sequence.discounts);
  }
  return m;
}

// Writes the outputs of one lane's quad, given the state on its right.
template <int kLambdas>
__device__ __forceinline__ void walk_quad(const Problem& p, const Tokens& tokens, int row, int t, bool aligned, bool streaming,
                                          State<float, kLambdas> state, Moments& moments) {
  if (t >= p.T) return;
  float reward[kQuad] = {}, advantage[kQuad] = {}, returns[kQuad] = {};
  Sequence<kLambdas> sequence(p, tokens.sequence[row]);
#pragma unroll
  for (int i = kQuad - 1; i >= 0; --i) {
    if (t + i >= p.T) continue;
    sequence.move_to(p, t + i);
    if (t + i + 1 == sequence.end) state = end_state<float, kLambdas>(boundary<float>(p, sequence.index));
    if (tokens.keep >> (kQuad * row + i) & 1) {
      const float value = tokens.value[row][i], own = tokens.reward[row][i];
      const float last = state.fresh ? bootstrap<float>(p, sequence.index) : 0;
      reward[i] = state.fresh ? own + terminal_reward<float>(p, sequence.index) : own;
      advantage[i] = own + state.y[0] - value;
      returns[i] = own + state.y[kLambdas - 1];
#pragma unroll
      for (int j = 0; j < kLambdas; ++j)
        state.y[j] = sequence.discounts[j].decay * (own + state.y[j]) + sequence.discounts[j].blend * value;
      state.fresh = false;
      moments.add(advantage[i], isfinite(value) && isfinite(reward[i]) && isfinite(last));
    }
  }
  store_quad(p.reward, t, int(p.T), aligned, streaming, reward);
  store_quad(p.advantage, t, int(p.T), aligned, streaming, advantage);
  store_quad(p.returns, t, int(p.T), aligned, streaming, returns);
}

// --- tiles ------------------------------------------------------------------------------------

// The map of a warp's part of a tile. rows: in each lane the product of its quad and the rest of its row, on the right.
template <int kLambdas>
__device__ __forceinline__ Map<float, kLambdas> warp_map(const Problem& p, const Tokens& tokens, int warp_begin, int lane,
                                                         Map<float, kLambdas> (&rows)[kRows]) {
  auto m = identity<float, kLambdas>();
#pragma unroll
  for (int row = kRows - 1; row >= 0; --row) {
    rows[row] = quad_map<kLambdas>(p, tokens, row, warp_begin + row * kRowTokens + lane * kQuad);
    scan_lanes(rows[row], lane);
    m = compose(from_lane_0(rows[row]), m);
  }
  return m;
}

// The state at the right edge of this block: the product of the maps of all blocks on the right, applied to anything, since
// the rightmost token is an end.
template <int kLambdas, int kThreads>
__device__ __forceinline__ State<float, kLambdas> state_from_blocks(const Map<float, kLambdas>* maps, int first, int num_blocks,
                                                                    Shared<kLambdas, kThreads>& shared) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int each = (num_blocks - first + kThreads - 1) / kThreads;
  auto m = identity<float, kLambdas>();
  for (int b = min(num_blocks, first + (thread + 1) * each) - 1; b >= first + thread * each; --b) m = compose(maps[b], m);
  scan_lanes(m, lane);
  if (lane == 0) shared.maps[warp] = m;
  __syncthreads();
  m = product(shared.maps, kThreads / 32, -1);
  __syncthreads();
  return apply(m, end_state<float, kLambdas>(0));
}

// Adds up the blocks' moments, in the last block to get here but always in the same order.
template <int kLambdas, int kThreads>
__device__ __forceinline__ void finish_moments(Moments moments, const Problem& p, const Scratch<kLambdas>& scratch,
                                               Shared<kLambdas, kThreads>& shared) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  for (int round = 0; round < 2; ++round) { // over this block's threads; then over the blocks
    moments = sum_lanes(moments);
    if (lane == 0) shared.moments[warp] = moments;
    __syncthreads();
    if (thread == 0) {
      moments = Moments{};
      for (int w = 0; w < kThreads / 32; ++w) moments.add(shared.moments[w]);
      if (round == 0) {
        scratch.moments[blockIdx.x] = moments;
        __threadfence();
        shared.last = atomicAdd(scratch.num_done, 1u) == gridDim.x - 1;
      } else {
        moments.write(p);
      }
    }
    __syncthreads();
    if (round == 1 || !shared.last) return;
    __threadfence();
    moments = Moments{};
    for (unsigned b = thread; b < gridDim.x; b += kThreads) moments.add(scratch.moments[b]);
  }
}

__device__ __forceinline__ void check_sequences(const Problem& p, int thread, int num_threads) {
  for (int s = thread; s < p.S; s += num_threads) {
    assert(p.cu_seqlens[s] <= p.cu_seqlens[s + 1] && "packed_gae: cu_seqlens must not decrease");
    assert(are_lambdas(p.lam_per_sequence, s, s + 1) && "packed_gae: lam must be in [0, 1]");
  }
  if (thread == 0) assert(p.cu_seqlens[0] == 0 && p.cu_seqlens[p.S] == p.T && "packed_gae: cu_seqlens must run from 0 to T");
}

// aligned: every per-token pointer can be read 16 bytes (the mask: 4 bytes) at a time.
template <int kLambdas, int kThreads>
__global__ void __launch_bounds__(kThreads, 2)
    packed_gae_kernel(const __grid_constant__ Problem p, const __grid_constant__ Scratch<kLambdas> scratch,
                      int tiles_per_block, bool aligned) {
  RLSP_SHARED(shared, Shared<kLambdas, kThreads>);
  constexpr int kWarps = kThreads / 32;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int num_tiles = int((p.T + kTile<kThreads> - 1) / kTile<kThreads>);
  const int first = blockIdx.x * tiles_per_block, end = min(first + tiles_per_block, num_tiles);
  const bool streaming = tiles_per_block > 1; // then outputs must not drive the inputs that are read again out of the L2
  check_sequences(p, blockIdx.x * kThreads + thread, gridDim.x * kThreads);

  Tokens tokens;
  Map<float, kLambdas> rows[kRows];
  auto block_map = identity<float, kLambdas>();
  for (int tile = first; tile < end; ++tile) {
    const int warp_begin = tile * kTile<kThreads> + warp * kWarpTokens;
    load_tokens(p, warp_begin, lane, aligned, tokens);
    const auto m = warp_map(p, tokens, warp_begin, lane, rows);
    if (lane == 0) shared.maps[warp] = m;
    __syncthreads();
    block_map = compose(block_map, product(shared.maps, kWarps, -1));
    __syncthreads();
  }
  if (thread == 0) {
    scratch.maps[blockIdx.x] = block_map;
    if (blockIdx.x == 0) *scratch.num_done = 0;
  }
  cooperative_groups::this_grid().sync();

  auto state = state_from_blocks(scratch.maps, blockIdx.x + 1, gridDim.x, shared);
  Moments moments{};
  for (int tile = end - 1; tile >= first; --tile) {
    const int warp_begin = tile * kTile<kThreads> + warp * kWarpTokens;
    if (tile != end - 1) load_tokens(p, warp_begin, lane, aligned, tokens);
    const auto m = warp_map(p, tokens, warp_begin, lane, rows);
    if (lane == 0) shared.maps[warp] = m;
    __syncthreads();
    auto right = apply(product(shared.maps, kWarps, warp), state);
#pragma unroll
    for (int row = kRows - 1; row >= 0; --row) {
      const int t = warp_begin + row * kRowTokens + lane * kQuad;
      const auto beyond = from_right(rows[row], 1);
      walk_quad(p, tokens, row, t, aligned, streaming, lane < 31 ? apply(beyond, right) : right, moments);
      right = apply(from_lane_0(rows[row]), right);
    }
    state = apply(product(shared.maps, kWarps, -1), state);
    __syncthreads();
  }
  finish_moments(moments, p, scratch, shared);
}

} // namespace rlsp
