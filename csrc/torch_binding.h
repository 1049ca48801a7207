// Tensors in, Problem out. The schema is defined in rlsp_kernels/packed_gae.py; a library only implements it for its device.
// Only torch's stable ABI: one binary serves every torch from 2.11 on and every Python.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

#include "packed_gae.h"

namespace rlsp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>; // reward, advantage, returns, moments, num_nonfinite

template <class T>
const T* pointer(const Tensor& tensor, const Tensor& like, ScalarType dtype, int64_t size) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.dim() == 1 && tensor.size(0) == size && tensor.is_contiguous() &&
                  tensor.device() == like.device(), "packed_gae: call it as rlsp_kernels.packed_gae, which checks its inputs");
  return static_cast<const T*>(tensor.const_data_ptr());
}

inline const float* pointer(const OptionalTensor& tensor, const Tensor& like, int64_t size) {
  return tensor ? pointer<float>(*tensor, like, ScalarType::Float, size) : nullptr;
}

struct Call {
  Problem problem;
  Outputs outputs;
};

inline Call prepare(const Tensor& value, const Tensor& cu_seqlens, const Tensor& mask, double gamma, double lam,
                    const OptionalTensor& lam_per_sequence, std::optional<double> critic_lam,
                    const OptionalTensor& terminal_reward, const OptionalTensor& token_reward,
                    const OptionalTensor& old_logprob, const OptionalTensor& ref_logprob, double kl_coef, int64_t kl_kind,
                    const OptionalTensor& bootstrap) {
  using torch::stable::empty_like;
  using torch::stable::new_empty;
  const int64_t T = value.numel(), S = cu_seqlens.numel() - 1;
  STD_TORCH_CHECK(S > 0 || (S == 0 && T == 0), "packed_gae: cu_seqlens must run from 0 to T = ", T, ", got ", S + 1, " numbers");
  Call call{{}, {empty_like(value), empty_like(value), empty_like(value), new_empty(value, {3}, ScalarType::Double),
                 new_empty(value, {}, ScalarType::Long)}};
  Problem& p = call.problem;
  p.T = T;
  p.S = S;
  p.value = pointer<float>(value, value, ScalarType::Float, T);
  p.cu_seqlens = pointer<int32_t>(cu_seqlens, value, ScalarType::Int, S + 1);
  p.mask = pointer<bool>(mask, value, ScalarType::Bool, T);
  p.lam_per_sequence = pointer(lam_per_sequence, value, S);
  p.terminal_reward = pointer(terminal_reward, value, S);
  p.token_reward = pointer(token_reward, value, T);
  p.old_logprob = pointer(old_logprob, value, T);
  p.ref_logprob = pointer(ref_logprob, value, T);
  p.bootstrap = pointer(bootstrap, value, S);
  p.gamma = gamma;
  p.lam[0] = lam;
  p.lam[1] = critic_lam.value_or(lam);
  p.kl_coef = kl_coef;
  p.kl_kind = p.old_logprob && p.ref_logprob ? KLKind(kl_kind) : kNoKL;
  p.reward = static_cast<float*>(std::get<0>(call.outputs).mutable_data_ptr());
  p.advantage = static_cast<float*>(std::get<1>(call.outputs).mutable_data_ptr());
  p.returns = static_cast<float*>(std::get<2>(call.outputs).mutable_data_ptr());
  p.moments = static_cast<double*>(std::get<3>(call.outputs).mutable_data_ptr());
  p.num_nonfinite = static_cast<int64_t*>(std::get<4>(call.outputs).mutable_data_ptr());
  return call;
}

} // namespace rlsp
