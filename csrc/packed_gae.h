// Packed GAE as a scan of affine maps. Free of torch: shared by the CPU and the CUDA implementation, and by the checks.
//
// GAE's advantage is the lambda-return G less the value, and G[t] = reward[t] + y[t + 1] where
//     y[t] = gamma * ((1 - lambda) * value[t] + lambda * G[t])
// is all that the True token on the left of t needs to know of t and beyond. So the state of a scan from right to left is one
// number y for each lambda: a True token maps it to (gamma * lambda) * y + const, a masked one leaves it alone, and the end of
// a sequence sets it to gamma * bootstrap + terminal reward. These maps compose associatively, so any piece of the token axis
// has a summary of few numbers, whatever mixture of sequences it holds.
//
// Summing returns and not one-step errors keeps float32 accurate: at gamma = lambda = 1 the errors' sum telescopes, and
// over 131,072 tokens their roundings add up to 3e-5, while returns only add rewards.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define RLSP_HD __host__ __device__ __forceinline__
#else
#define RLSP_HD inline
#endif

namespace rlsp {

enum KLKind : int32_t { kNoKL = 0, kK1 = 1, kK2 = 2, kK3 = 3 };

// One call. Axes: T tokens, S sequences. Optional pointers are null. A plain struct: it is a CUDA kernel's argument.
struct Problem {
  int64_t T, S;
  const float* value;            // (T,)
  const int32_t* cu_seqlens;     // (S + 1,) from 0 to T, never decreasing
  const bool* mask;              // (T,) True: a response token
  const float* lam_per_sequence; // (S,) optional, in place of lam[0]
  const float* terminal_reward;  // (S,) optional
  const float* token_reward;     // (T,) optional
  const float* old_logprob;      // (T,) read when kl_kind is not kNoKL
  const float* ref_logprob;      // (T,) read when kl_kind is not kNoKL
  const float* bootstrap;        // (S,) optional
  double gamma;
  double lam[2];                 // lambda of the advantages, lambda of the returns
  double kl_coef;
  KLKind kl_kind;
  float* reward;                 // (T,) written: shaped rewards
  float* advantage;              // (T,) written
  float* returns;                // (T,) written
  double* moments;               // (3,) written: count, sum and sum of squares of the advantages
  int64_t* num_nonfinite;        // () written
};

// --- tokens -----------------------------------------------------------------------------------

// What a True token earns by itself; the terminal reward is added where the state is fresh.
template <class Real>
RLSP_HD Real own_reward(const Problem& p, Real token_reward, Real old_logprob, Real ref_logprob) {
  if (p.kl_kind == kNoKL) return token_reward;
  Real log_ratio = old_logprob - ref_logprob;
  // Comparisons and not fmin and fmax, which would turn a NaN into a bound. 20: LOG_RATIO_BOUND of rlsp_kernels/kl.py.
  log_ratio = log_ratio < Real(-20) ? Real(-20) : (log_ratio > Real(20) ? Real(20) : log_ratio);
  Real kl = log_ratio;
  if (p.kl_kind == kK2) kl = Real(0.5) * log_ratio * log_ratio;
  if (p.kl_kind == kK3) kl = std::expm1(-log_ratio) + log_ratio;
  return token_reward - Real(p.kl_coef) * kl;
}

template <class Real>
RLSP_HD Real own_reward(const Problem& p, int64_t t) {
  const bool kl = p.kl_kind != kNoKL;
  return own_reward<Real>(p, p.token_reward ? p.token_reward[t] : 0, kl ? p.old_logprob[t] : 0, kl ? p.ref_logprob[t] : 0);
}

template <class Real>
RLSP_HD Real terminal_reward(const Problem& p, int64_t s) {
  return p.terminal_reward ? Real(p.terminal_reward[s]) : Real(0);
}

template <class Real>
RLSP_HD Real bootstrap(const Problem& p, int64_t s) {
  return p.bootstrap ? Real(p.bootstrap[s]) : Real(0);
}

// What is special to one sequence and one lambda: y = decay * (reward + y) + blend * value.
template <class Real>
struct Discount {
  Real decay; // gamma * lambda
  Real blend; // gamma * (1 - lambda)
};

template <class Real>
RLSP_HD Discount<Real> discount(const Problem& p, int64_t s, int i) {
  const Real lam = i == 0 && p.lam_per_sequence ? Real(p.lam_per_sequence[s]) : Real(p.lam[i]);
  return {Real(p.gamma) * lam, Real(p.gamma) * (1 - lam)};
}

// Whether the lambdas of sequences [begin, end), if each has its own, are in [0, 1]: NaN is not.
RLSP_HD bool are_lambdas(const float* lam_per_sequence, int64_t begin, int64_t end) {
  bool good = true;
  if (lam_per_sequence)
    for (int64_t s = begin; s < end; ++s) good = good && lam_per_sequence[s] >= 0 && lam_per_sequence[s] <= 1;
  return good;
}

// y at the right end of sequence s.
template <class Real>
RLSP_HD Real boundary(const Problem& p, int64_t s) {
  return Real(p.gamma) * bootstrap<Real>(p, s) + terminal_reward<Real>(p, s);
}

// Sequence that holds token t, given that it is in [low, high]: the last s with cu_seqlens[s] <= t, so never an empty one.
RLSP_HD int64_t find_sequence(const int32_t* cu_seqlens, int64_t low, int64_t high, int64_t t) {
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (cu_seqlens[middle] <= t) low = middle;
    else high = middle - 1;
  }
  return low;
}

// --- states and maps --------------------------------------------------------------------------

template <class Real, int kLambdas>
struct State {
  Real y[kLambdas];
  bool fresh; // no True token yet since the end of the sequence
};

template <class Real, int kLambdas>
RLSP_HD State<Real, kLambdas> end_state(Real boundary) {
  State<Real, kLambdas> state;
  for (int i = 0; i < kLambdas; ++i) state.y[i] = boundary;
  state.fresh = true;
  return state;
}

// Of a piece of the token axis: y_out = cut ? c : b * y_in + c.
template <class Real, int kLambdas>
struct Map {
  int flags;
  Real b[kLambdas], c[kLambdas];
};

constexpr int kEvent = 1; // holds a True token or an end
constexpr int kFresh = 2; // its leftmost event is an end
constexpr int kCut = 4;   // holds an end: nothing from the right reaches its left

template <class Real, int kLambdas>
RLSP_HD Map<Real, kLambdas> identity() {
  Map<Real, kLambdas> m{0, {}, {}};
  for (int i = 0; i < kLambdas; ++i) m.b[i] = 1;
  return m;
}

// The end of a sequence, put on the left of whatever came before.
template <class Real, int kLambdas>
RLSP_HD Map<Real, kLambdas> end_map(Real boundary) {
  Map<Real, kLambdas> m{kEvent | kFresh | kCut, {}, {}};
  for (int i = 0; i < kLambdas; ++i) m.c[i] = boundary;
  return m;
}

// A True token put on the left of m.
template <class Real, int kLambdas>
RLSP_HD void push(Map<Real, kLambdas>& m, Real own_reward, Real value, const Discount<Real>* discounts) {
  for (int i = 0; i < kLambdas; ++i) {
    m.b[i] = discounts[i].decay * m.b[i];
    m.c[i] = discounts[i].decay * (own_reward + m.c[i]) + discounts[i].blend * value;
  }
  m.flags = (m.flags & kCut) | kEvent;
}

// left after right. A cut is a select and not a product with 0: the NaN of one sequence must not reach another.
template <class Real, int kLambdas>
RLSP_HD Map<Real, kLambdas> compose(const Map<Real, kLambdas>& left, const Map<Real, kLambdas>& right) {
  if (left.flags & kCut) return left;
  Map<Real, kLambdas> m;
  for (int i = 0; i < kLambdas; ++i) {
    m.b[i] = left.b[i] * right.b[i];
    m.c[i] = left.b[i] * right.c[i] + left.c[i];
  }
  m.flags = ((left.flags & kEvent ? left.flags : right.flags) & (kEvent | kFresh)) | (right.flags & kCut);
  return m;
}

template <class Real, int kLambdas>
RLSP_HD State<Real, kLambdas> apply(const Map<Real, kLambdas>& m, const State<Real, kLambdas>& right) {
  State<Real, kLambdas> left;
  for (int i = 0; i < kLambdas; ++i) left.y[i] = m.flags & kCut ? m.c[i] : m.b[i] * right.y[i] + m.c[i];
  left.fresh = m.flags & kEvent ? bool(m.flags & kFresh) : right.fresh;
  return left;
}

// Sums over True tokens. Without initialisers: it also lives in a GPU's shared memory.
struct Moments {
  double count, sum, squares, nonfinite;

  RLSP_HD void add(float advantage, bool finite) {
    count += 1;
    sum += advantage;
    squares += double(advantage) * advantage;
    nonfinite += finite ? 0 : 1;
  }
  RLSP_HD void add(const Moments& other) {
    count += other.count;
    sum += other.sum;
    squares += other.squares;
    nonfinite += other.nonfinite;
  }
  RLSP_HD void write(const Problem& p) const {
    p.moments[0] = count;
    p.moments[1] = sum;
    p.moments[2] = squares;
    *p.num_nonfinite = int64_t(nonfinite);
  }
};

} // namespace rlsp
