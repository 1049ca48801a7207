#include "packed_gae_cuda.h"
#include "torch_binding.h"

// In libtorch_cuda alone. Weak, so that this library also loads, and says so, where torch has no CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace rlsp {
namespace {

void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "packed_gae: ", cudaGetErrorString(error));
}

Outputs packed_gae_cuda(const Tensor& value, const Tensor& cu_seqlens, const Tensor& mask, double gamma, double lam,
                        const OptionalTensor& lam_per_sequence, std::optional<double> critic_lam,
                        const OptionalTensor& terminal_reward, const OptionalTensor& token_reward,
                        const OptionalTensor& old_logprob, const OptionalTensor& ref_logprob, double kl_coef, int64_t kl_kind,
                        const OptionalTensor& bootstrap) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "packed_gae: this torch has no CUDA");
  const int device = value.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* current;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &current) == 0, "packed_gae: no current CUDA stream");
  const auto stream = static_cast<cudaStream_t>(current);

  Call call = prepare(value, cu_seqlens, mask, gamma, lam, lam_per_sequence, critic_lam, terminal_reward, token_reward,
                      old_logprob, ref_logprob, kl_coef, kl_kind, bootstrap);
  const Problem& p = call.problem;
  STD_TORCH_CHECK(p.T <= kMostTokens, "packed_gae: at most ", kMostTokens, " tokens, got ", p.T);
  if (p.T == 0) {
    check(cudaMemsetAsync(p.moments, 0, 3 * sizeof(double), stream));
    check(cudaMemsetAsync(p.num_nonfinite, 0, sizeof(int64_t), stream));
    return call.outputs;
  }
  const int num_lambdas = critic_lam ? 2 : 1;
  Launch launch;
  check(plan(p, num_lambdas, launch));
  const Tensor scratch = torch::stable::new_empty(value, {launch.scratch_bytes}, ScalarType::Byte); // freed in stream order
  check(run(p, num_lambdas, launch, scratch.mutable_data_ptr(), stream));
  return call.outputs;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(rlsp_kernels, CUDA, m) {
  m.impl("packed_gae", TORCH_BOX(&packed_gae_cuda));
}

} // namespace rlsp
