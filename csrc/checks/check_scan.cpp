// Both scans against a float64 loop, with no torch and no GPU: `check_scan cpu` and `check_scan cuda` (the kernel's source, on
// threads). Prints the largest error of each case and exits with 1 when one is too large. Meant to run under sanitizers.
// `check_scan unsound`, compiled with NDEBUG, gives the kernel what its assertions refuse.
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "packed_gae.cuh"
#include "packed_gae_cpu.h"

namespace rlsp {
namespace {

constexpr int kThreads = 64;

struct Case {
  const char* name;
  std::vector<int> lengths;
  double keep;  // probability of True
  bool all;     // every optional input
  double gamma;
  int poison = -1; // this token is True and its value NaN
};

// Exactly as long as they may be read or written, so that the address sanitizer sees a step too far.
struct Arrays {
  std::vector<int32_t> cu_seqlens{0};
  std::unique_ptr<bool[]> mask;
  std::vector<float> value, token_reward, old_logprob, ref_logprob, terminal_reward, bootstrap, lam, reward, advantage, returns;
  double moments[3] = {-1, -1, -1};
  int64_t num_nonfinite = -1;
};

Problem make(const Case& c, Arrays& a, KLKind kind, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform;
  for (int length : c.lengths) a.cu_seqlens.push_back(a.cu_seqlens.back() + length);
  const int T = a.cu_seqlens.back(), S = int(c.lengths.size());
  a.mask.reset(new bool[T]);
  for (int t = 0; t < T; ++t) a.mask[t] = uniform(random) < c.keep;
  const auto fill = [&](std::vector<float>& x, int size) {
    for (int i = 0; i < size; ++i) x.push_back(normal(random));
    return x.data();
  };
  Problem p{};
  p.T = T;
  p.S = S;
  p.cu_seqlens = a.cu_seqlens.data();
  p.mask = a.mask.get();
  p.value = fill(a.value, T);
  p.terminal_reward = fill(a.terminal_reward, S);
  if (c.all) {
    p.token_reward = fill(a.token_reward, T);
    p.old_logprob = fill(a.old_logprob, T);
    p.ref_logprob = fill(a.ref_logprob, T);
    p.bootstrap = fill(a.bootstrap, S);
    for (int s = 0; s < S; ++s) a.lam.push_back(uniform(random));
    p.lam_per_sequence = a.lam.data();
    p.kl_kind = kind;
    p.kl_coef = 0.125;
  }
  for (auto* column : {&a.value, &a.token_reward, &a.old_logprob, &a.ref_logprob})
    for (size_t t = 0; t < column->size(); ++t)
      if (!p.mask[t]) (*column)[t] = NAN; // must not matter
  if (c.poison >= 0) {
    a.mask[c.poison] = true;
    a.value[c.poison] = NAN;
  }
  p.gamma = c.gamma;
  p.lam[0] = 0.95;
  p.lam[1] = 1;
  p.reward = fill(a.reward, T);
  p.advantage = fill(a.advantage, T);
  p.returns = fill(a.returns, T);
  p.moments = a.moments;
  p.num_nonfinite = &a.num_nonfinite;
  return p;
}

// How far x is from the truth; NaN is near NaN alone.
double distance(float x, double truth) {
  if (std::isnan(x) || std::isnan(truth)) return std::isnan(x) && std::isnan(truth) ? 0 : INFINITY;
  return std::abs(x - truth);
}

// Largest error of the outputs, relative to the largest advantage.
template <int kLambdas>
double error(const Problem& p, bool poisoned) {
  double worst = 0, largest = 1, count = 0, sum = 0, squares = 0;
  for (int64_t s = 0; s < p.S; ++s) {
    double next = p.bootstrap ? p.bootstrap[s] : 0, A[2] = {};
    bool last = true;
    for (int64_t t = p.cu_seqlens[s + 1] - 1; t >= p.cu_seqlens[s]; --t) {
      double reward = 0, returns = 0;
      if (p.mask[t]) {
        reward = p.token_reward ? p.token_reward[t] : 0;
        const double r = p.kl_kind ? double(p.ref_logprob[t]) - p.old_logprob[t] : 0;
        const double kl[] = {0, -r, r * r / 2, std::exp(r) - 1 - r};
        reward -= p.kl_coef * kl[p.kl_kind];
        if (last) reward += p.terminal_reward[s];
        for (int j = 0; j < kLambdas; ++j) {
          const double lam = j == 0 && p.lam_per_sequence ? p.lam_per_sequence[s] : p.lam[j];
          returns = reward + p.gamma * next + p.gamma * lam * A[j]; // of the last lambda in the end
          A[j] = returns - p.value[t];
        }
        next = p.value[t];
        last = false;
        count += 1;
        sum += p.advantage[t];
        squares += double(p.advantage[t]) * p.advantage[t];
      }
      largest = std::max(largest, std::max(std::abs(A[0]), std::abs(returns)));
      worst = std::max({worst, distance(p.reward[t], reward), distance(p.advantage[t], p.mask[t] ? A[0] : 0),
                        distance(p.returns[t], returns)});
    }
  }
  const double off = std::abs(p.moments[1] - sum) / (1 + count) + std::abs(p.moments[2] - squares) / (1 + squares);
  if (p.moments[0] != count || *p.num_nonfinite != poisoned || (poisoned ? !std::isnan(off) : !(off < 1e-12))) return INFINITY;
  return worst / largest;
}

template <int kLambdas>
void on_cpu(const Problem& p) {
  solve<kLambdas>(p, [](int64_t n, const auto& f) {
    std::thread other(f, n / 2, n);
    f(0, n / 2);
    other.join();
  });
}

template <int kLambdas>
void on_cuda(const Problem& p, int tiles_per_block) {
  const int num_tiles = int((p.T + kTile<kThreads> - 1) / kTile<kThreads>);
  const int num_blocks = (num_tiles + tiles_per_block - 1) / tiles_per_block;
  std::vector<Map<float, kLambdas>> maps(num_blocks);
  std::vector<Moments> parts(num_blocks);
  unsigned num_done = 12345;
  const Scratch<kLambdas> scratch{maps.data(), parts.data(), &num_done};
  const bool aligned = reinterpret_cast<uintptr_t>(p.mask) % 4 == 0;
  cuda_on_threads::launch(num_blocks, kThreads, packed_gae_kernel<kLambdas, kThreads>, p, scratch, tiles_per_block, aligned);
}

template <int kLambdas>
bool check(const Case& c, const std::string& device, KLKind kind, int tiles_per_block) {
  std::mt19937 random(7);
  Arrays arrays;
  const Problem p = make(c, arrays, kind, random);
  const bool cpu = device == "cpu";
  if (cpu) on_cpu<kLambdas>(p);
  else on_cuda<kLambdas>(p, tiles_per_block);
  const double worst = error<kLambdas>(p, c.poison >= 0);
  const bool good = worst < (cpu ? 1.5e-7 : 4e-6); // CPU: one rounding to float32. CUDA: about 25 in a row, and expm1f
  std::printf("%s %s, %s: %d lambdas, kl %d, %d tiles a block: error %.1e\n", good ? "ok  " : "FAIL", device.c_str(), c.name,
              kLambdas, int(kind), tiles_per_block, worst);
  return good;
}

// Whatever cu_seqlens holds, the kernel must not read or write elsewhere, nor walk for ever: then its assertion is what is seen.
void run_unsound() {
  const int unsound[][4] = {{1, 100, 200, 300}, {0, 100, 200, 299}, {0, 100, 200, 301}, {0, 250, 100, 300}, {-9, 0, 0, 0},
                            {300, 200, 100, 0}, {1 << 30, -(1 << 30), 1 << 30, 300}};
  for (const auto& cu_seqlens : unsound) {
    std::mt19937 random(7);
    Arrays arrays;
    const Problem p = make({"unsound", {100, 100, 100}, 0.8, true, 1}, arrays, kK1, random);
    arrays.cu_seqlens.assign(cu_seqlens, cu_seqlens + 4);
    on_cuda<2>(p, 1);
  }
  std::printf("ok   cuda, cu_seqlens that are not: nothing read or written elsewhere\n");
}

} // namespace
} // namespace rlsp

int main(int argc, char** argv) {
  const std::string device = argc == 2 ? argv[1] : "";
  if (device != "cpu" && device != "cuda" && device != "unsound") {
    std::fprintf(stderr, "usage: check_scan cpu|cuda|unsound\n");
    return 2;
  }
  using namespace rlsp;
  if (device == "unsound") {
    run_unsound();
    return 0;
  }
  const Case cases[] = {
      {"one token", {1}, 1, true, 1},
      {"empty and short sequences", {0, 3, 0, 0, 1, 5, 2, 0}, 0.7, true, 0.9},
      {"nothing kept", {40, 0, 7}, 0, false, 1},
      {"one sequence over several tiles", {2500}, 1, false, 1},
      {"ragged, half masked", {700, 0, 1, 1030, 1024, 3, 64}, 0.5, true, 0.99},
      {"masked tail across tiles", {1200, 1700}, 0.002, true, 1},
      {"a NaN in the middle sequence", {1500, 900, 700}, 0.9, true, 1, 1700},
  };
  bool good = true;
  for (const Case& c : cases) {
    good &= check<1>(c, device, kK1, 1);
    good &= check<2>(c, device, kK3, 2);
  }
  if (device == "cpu") { // chunks of 16,384 tokens
    good &= check<1>({"one sequence over several chunks", {40000}, 1, false, 1}, device, kNoKL, 1);
    good &= check<2>({"ragged over several chunks", {17000, 5, 0, 9000, 33000}, 0.6, true, 0.999}, device, kK2, 1);
  }
  return good ? 0 : 1;
}
