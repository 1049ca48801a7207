// The scan on a CPU, free of torch. Fixed chunks of tokens: summarise each, carry the state through the summaries, then walk
// each chunk, in pieces that fit the L1 cache. Neither depends on the number of threads, so nor do the bits of the result.
// Float64 between tokens leaves one rounding, to the float32 outputs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <type_traits>
#include <vector>

#include "packed_gae.h"

#ifndef RLSP_CLONES // an attribute of the functions that are worth compiling for several instruction sets
#define RLSP_CLONES
#endif

namespace rlsp {

constexpr int64_t kChunk = 16384;
constexpr int kPiece = 256;
constexpr int kLanes = 8; // tokens that the recurrence takes at once

// Asks for the piece on the left of `low`: pieces go leftwards but are read rightwards, which no hardware prefetcher foresees.
template <class T>
void prefetch(T* column, int64_t low) {
  constexpr int64_t kLine = 64 / sizeof(T);
  if (column)
    for (int64_t t = std::max<int64_t>(0, low - kPiece); t < low; t += kLine)
      __builtin_prefetch(column + t, std::is_const_v<T> ? 0 : 1);
}

// The True tokens of a piece of one sequence, side by side: left in place where all are True, else gathered.
struct Piece {
  int count;
  bool whole;
  const float* value;
  double reward[kPiece]; // without the terminal reward
  int16_t place[kPiece]; // of each True token, from the piece's first
  float gathered[4][kPiece];

  Piece(const Problem& p, int64_t low, int64_t high) {
    prefetch(p.value, low);
    prefetch(p.mask, low);
    prefetch(p.token_reward, low);
    prefetch(p.old_logprob, low);
    prefetch(p.ref_logprob, low);
    const bool* const mask = p.mask + low;
    const int length = int(high - low);
    count = int(std::count(mask, mask + length, true));
    whole = count == length;
    if (!whole)
      for (int i = 0, k = 0; k < count; ++i) {
        place[k] = int16_t(i);
        k += mask[i];
      }
    const auto column = [&](const float* from, float* to) -> const float* {
      if (whole) return from + low;
      for (int k = 0; k < count; ++k) to[k] = from[low + place[k]];
      return to;
    };
    value = column(p.value, gathered[0]);
    std::fill(reward, reward + count, 0.0);
    if (p.token_reward) {
      const float* const token_reward = column(p.token_reward, gathered[1]);
      std::copy(token_reward, token_reward + count, reward);
    }
    if (p.kl_kind != kNoKL) {
      const float* const old_logprob = column(p.old_logprob, gathered[2]);
      const float* const ref_logprob = column(p.ref_logprob, gathered[3]);
      for (int k = 0; k < count; ++k) reward[k] = own_reward<double>(p, reward[k], old_logprob[k], ref_logprob[k]);
    }
  }
};

// window[k] = sum over j < kLanes of power[j] * x[k + j].
inline void sum_windows(const double* __restrict x, int count, const double* __restrict power, double* __restrict window) {
  for (int k = 0; k < count; ++k) {
    double sum = x[k];
    for (int j = 1; j < kLanes; ++j) sum += power[j] * x[k + j];
    window[k] = sum;
  }
}

// y[k] = x[k] + decay * y[k + 1] with x[k] = decay * reward[k] + blend * value[k]. One token at a time it would wait 8 cycles
// for each; instead y[k] = window[k] + decay^8 * y[k + 8], where window[k] sums 8 discounted x: loops that compilers vectorise.
struct Scanned {
  double x[kPiece + kLanes];
  double padded[kLanes + kPiece + 1];
  double* const y = padded + kLanes; // y[-kLanes, 0) takes what the last step of 8 computes too much

  // right: y[piece.count].
  void scan(const Piece& piece, Discount<double> discount, double right) {
    const int count = piece.count;
    for (int k = 0; k < count; ++k) x[k] = discount.decay * piece.reward[k] + discount.blend * piece.value[k];
    for (int lane = 0; lane < kLanes; ++lane) x[count + lane] = lane == 0 ? right : 0;
    double power[kLanes + 1] = {1};
    for (int j = 1; j <= kLanes; ++j) power[j] = discount.decay * power[j - 1];
    std::fill(padded, y, 0.0);
    sum_windows(x, count + 1, power, y);
    double next[kLanes] = {right};
    for (int first = count - kLanes; first > -kLanes; first -= kLanes)
#pragma omp simd
      for (int lane = 0; lane < kLanes; ++lane) y[first + lane] = next[lane] = y[first + lane] + power[kLanes] * next[lane];
  }
};

// Summary of tokens [low, high).
template <int kLambdas>
RLSP_CLONES Map<double, kLambdas> summarize(const Problem& p, int64_t low, int64_t high) {
  const int64_t s = find_sequence(p.cu_seqlens, 0, p.S - 1, low);
  auto map = identity<double, kLambdas>();
  if (p.cu_seqlens[s + 1] <= high) { // what lies right of an end is of no use to the left: short sequences cost little here
    high = p.cu_seqlens[s + 1];
    map = end_map<double, kLambdas>(boundary<double>(p, s));
  }
  Scanned scanned;
  for (; high > low; high -= kPiece) {
    const Piece piece(p, std::max(low, high - kPiece), high);
    if (piece.count == 0) continue;
    for (int j = 0; j < kLambdas; ++j) {
      const auto one = discount<double>(p, s, j);
      scanned.scan(piece, one, map.c[j]);
      map.b[j] *= std::pow(one.decay, piece.count);
      map.c[j] = scanned.y[0];
    }
    map.flags = (map.flags & kCut) | kEvent;
  }
  return map;
}

// Writes the outputs of tokens [low, high), all of sequence s, and moves `state` from their right to their left.
template <int kLambdas>
void walk_piece(const Problem& p, int64_t s, int64_t low, int64_t high, State<double, kLambdas>& state, Moments& moments) {
  Piece piece(p, low, high);
  float* const outputs[3] = {p.reward + low, p.advantage + low, p.returns + low};
  prefetch(p.reward, low);
  prefetch(p.advantage, low);
  prefetch(p.returns, low);
  if (!piece.whole)
    for (float* output : outputs) std::fill(output, output + (high - low), 0.0f);
  if (piece.count == 0) return;
  Scanned scanned[kLambdas];
  for (int j = 0; j < kLambdas; ++j) {
    scanned[j].scan(piece, discount<double>(p, s, j), state.y[j]);
    state.y[j] = scanned[j].y[0];
  }

  float local[3][kPiece]; // the compiler cannot know that the outputs do not overlap the inputs
  int nonfinite = 0;
  for (int k = 0; k < piece.count; ++k) {
    local[0][k] = float(piece.reward[k]);
    local[1][k] = float(piece.reward[k] + scanned[0].y[k + 1] - piece.value[k]);
    local[2][k] = float(piece.reward[k] + scanned[kLambdas - 1].y[k + 1]);
    nonfinite += !(std::isfinite(piece.value[k]) & std::isfinite(local[0][k]));
  }
  if (state.fresh) { // the terminal reward is in y already
    const int last = piece.count - 1;
    const double terminal = terminal_reward<double>(p, s);
    local[0][last] = float(piece.reward[last] + terminal);
    nonfinite += std::isfinite(piece.value[last] + piece.reward[last]) && !std::isfinite(terminal + bootstrap<double>(p, s));
    state.fresh = false;
  }

  double sums[kLanes] = {}, squares[kLanes] = {};
  std::fill(local[1] + piece.count, local[1] + kPiece, 0.0f);
  for (int k = 0; k < kPiece; k += kLanes)
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
      const double advantage = local[1][k + lane];
      sums[lane] += advantage;
      squares[lane] += advantage * advantage;
    }
  for (int lane = 0; lane < kLanes; ++lane) {
    moments.sum += sums[lane];
    moments.squares += squares[lane];
  }
  moments.count += piece.count;
  moments.nonfinite += nonfinite;
  for (int i = 0; i < 3; ++i) {
    if (piece.whole) std::copy(local[i], local[i] + piece.count, outputs[i]);
    else
      for (int k = 0; k < piece.count; ++k) outputs[i][piece.place[k]] = local[i][k];
  }
}

// Writes the outputs of tokens [low, high), given the state on their right.
template <int kLambdas>
RLSP_CLONES Moments walk(const Problem& p, int64_t low, int64_t high, State<double, kLambdas> state) {
  Moments moments{};
  for (int64_t s = find_sequence(p.cu_seqlens, 0, p.S - 1, high - 1); high > low; --s) {
    if (high == p.cu_seqlens[s + 1]) state = end_state<double, kLambdas>(boundary<double>(p, s));
    for (const int64_t first = std::max<int64_t>(low, p.cu_seqlens[s]); high > first;) {
      const int64_t begin = std::max(first, high - kPiece);
      walk_piece(p, s, begin, high, state, moments);
      high = begin;
    }
  }
  return moments;
}

// Solves p. parallel_for(n, f) calls f(begin, end) on ranges that cover [0, n), in any order, and waits.
template <int kLambdas, class ParallelFor>
void solve(const Problem& p, const ParallelFor& parallel_for) {
  const int64_t num_chunks = (p.T + kChunk - 1) / kChunk;
  const auto high = [&](int64_t chunk) { return std::min(p.T, (chunk + 1) * kChunk); };
  std::vector<Map<double, kLambdas>> maps(num_chunks);
  parallel_for(num_chunks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) maps[i] = summarize<kLambdas>(p, i * kChunk, high(i));
  });
  std::vector<State<double, kLambdas>> states(num_chunks); // on the right of each chunk; of the last, an end replaces it
  for (int64_t i = num_chunks - 1; i > 0; --i) states[i - 1] = apply(maps[i], states[i]);
  std::vector<Moments> parts(num_chunks);
  parallel_for(num_chunks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) parts[i] = walk(p, i * kChunk, high(i), states[i]);
  });
  Moments total{};
  for (const Moments& part : parts) total.add(part);
  total.write(p);
}

} // namespace rlsp
