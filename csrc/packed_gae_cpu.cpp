#include "torch_binding.h"

// The loader picks AVX-512, AVX2, or the baseline of x86-64: SSE2, at two thirds of the speed.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define RLSP_CLONES __attribute__((flatten, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
#include "packed_gae_cpu.h"

namespace rlsp {
namespace {

Outputs packed_gae_cpu(const Tensor& value, const Tensor& cu_seqlens, const Tensor& mask, double gamma, double lam,
                       const OptionalTensor& lam_per_sequence, std::optional<double> critic_lam,
                       const OptionalTensor& terminal_reward, const OptionalTensor& token_reward,
                       const OptionalTensor& old_logprob, const OptionalTensor& ref_logprob, double kl_coef, int64_t kl_kind,
                       const OptionalTensor& bootstrap) {
  Call call = prepare(value, cu_seqlens, mask, gamma, lam, lam_per_sequence, critic_lam, terminal_reward, token_reward,
                      old_logprob, ref_logprob, kl_coef, kl_kind, bootstrap);
  const Problem& p = call.problem;
  const int32_t* cu = p.cu_seqlens;
  STD_TORCH_CHECK(cu[0] == 0 && cu[p.S] == p.T && std::is_sorted(cu, cu + p.S + 1),
                  "packed_gae: cu_seqlens must run from 0 to T without decreasing");
  STD_TORCH_CHECK(are_lambdas(p.lam_per_sequence, 0, p.S), "packed_gae: lam must be in [0, 1]");
  const auto parallel_for = [](int64_t n, const auto& f) { torch::stable::parallel_for(0, n, 1, f); };
  if (critic_lam) solve<2>(p, parallel_for);
  else solve<1>(p, parallel_for);
  return call.outputs;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(rlsp_kernels, CPU, m) {
  m.impl("packed_gae", TORCH_BOX(&packed_gae_cpu));
}

} // namespace rlsp
