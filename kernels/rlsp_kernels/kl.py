"""Per-token estimators of KL(policy || reference) from the log-probabilities of sampled tokens.

Axes: T packed tokens. Log-probabilities are in nats.
Order of this file: definition, kernels, ops, public function.
"""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlsp_kernels.backend import LAUNCH, Backend, check_device, runs_triton

KLKind = Literal["k1", "k2", "k3"]
KL_KINDS: tuple[KLKind, ...] = ("k1", "k2", "k3")

LOG_RATIO_BOUND = 20.0  # exp(20) = 4.9e8 already drowns every other token; past 88 it is inf, and 0 * inf a NaN gradient

# --- definition -------------------------------------------------------------------------------


def kl_penalty_torch(logprob_T: Tensor, ref_logprob_T: Tensor, kind: KLKind = "k1") -> Tensor:
    """What kl_penalty means, in plain torch. Computes in the dtype it is given."""
    log_ratio_T = (logprob_T - ref_logprob_T).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    if kind == "k1":
        return log_ratio_T
    if kind == "k2":
        return 0.5 * log_ratio_T.square()
    return (-log_ratio_T).expm1() + log_ratio_T  # expm1: exp(-x) - 1 + x cancels to below 0 for small x


def kl_slope_torch(logprob_T: Tensor, ref_logprob_T: Tensor, kind: KLKind) -> Tensor:
    """The derivative of kl_penalty in logprob_T; that in ref_logprob_T is its negative. Zero outside the clamp."""
    log_ratio_T = logprob_T - ref_logprob_T
    if kind == "k1":
        slope_T = torch.ones_like(log_ratio_T)
    else:
        slope_T = log_ratio_T if kind == "k2" else -(-log_ratio_T).expm1()
    return torch.where(log_ratio_T.abs() > LOG_RATIO_BOUND, 0.0, slope_T)


# --- kernels ----------------------------------------------------------------------------------

_BOUND: tl.constexpr = tl.constexpr(LOG_RATIO_BOUND)


@triton.jit
def clamp_log_ratio(x):
    """x within LOG_RATIO_BOUND of 0; a NaN stays one, which min and max would drop."""
    return tl.where(x > _BOUND, _BOUND, tl.where(x < -_BOUND, -_BOUND, x))


@triton.jit
def kl_and_slope(logprob, ref_logprob, KIND: tl.constexpr):
    """kl_penalty and its derivative in logprob."""
    difference = logprob - ref_logprob
    x = clamp_log_ratio(difference)
    if KIND == 1:
        kl = x
        slope = x * 0.0 + 1.0
    elif KIND == 2:
        kl = 0.5 * x * x
        slope = x
    else:
        r = -x
        series = 1 / 720 + r * (1 / 5040 + r * (1 / 40320 + r * (1 / 362880)))
        series = r * r * (1 / 2 + r * (1 / 6 + r * (1 / 24 + r * (1 / 120 + r * series))))
        kl = tl.where(tl.abs(r) < 0.5, series, tl.exp(r) - 1 - r)  # exp(r) - 1 - r cancels to below 0 near 0
        slope = -(kl + r)  # -expm1(r)
    return kl, tl.where(tl.abs(difference) > _BOUND, 0.0, slope)


@triton.jit
def _kl_block(out_ptr, dkl_ptr, logprob_ptr, ref_logprob_ptr, t, inside, KIND: tl.constexpr):
    logprob = tl.load(logprob_ptr + t, mask=inside, other=0.0).to(tl.float32)
    ref_logprob = tl.load(ref_logprob_ptr + t, mask=inside, other=0.0).to(tl.float32)
    out, slope = kl_and_slope(logprob, ref_logprob, KIND)
    if dkl_ptr is not None:
        out = tl.where(slope == 0, 0.0, slope * tl.load(dkl_ptr + t, mask=inside, other=0.0).to(tl.float32))
    tl.store(out_ptr + t, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["size"])
def _kl_penalty_kernel(
    out_ptr,  # (T,), written: the penalty, or its gradient in logprob where dkl is given
    dkl_ptr,  # (T,), or None
    logprob_ptr,  # (T,)
    ref_logprob_ptr,  # (T,)
    size,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    whole = size // 16 * 16  # a mask that ends there lets loads be 16 bytes wide, whatever T is
    _kl_block(out_ptr, dkl_ptr, logprob_ptr, ref_logprob_ptr, t, t < whole, KIND)
    if tl.program_id(0) == 0:
        rest = whole + tl.arange(0, 16)
        _kl_block(out_ptr, dkl_ptr, logprob_ptr, ref_logprob_ptr, rest, rest < size, KIND)


def _launch(out_T: Tensor, dkl_T: Tensor | None, logprob_T: Tensor, ref_logprob_T: Tensor, kind: str) -> Tensor:
    size = out_T.numel()
    _kl_penalty_kernel[(triton.cdiv(size, 1024),)](
        out_T, dkl_T, logprob_T, ref_logprob_T, size, KIND=KL_KINDS.index(kind) + 1, BLOCK=1024, num_warps=4, **LAUNCH
    )  # fmt: skip
    return out_T


# --- ops --------------------------------------------------------------------------------------


@torch.library.custom_op("rlsp_kernels::kl_penalty", mutates_args=())
def _kl_penalty_op(logprob_T: Tensor, ref_logprob_T: Tensor, kind: str, backend: str) -> Tensor:
    if not runs_triton(backend, logprob_T):
        return kl_penalty_torch(logprob_T, ref_logprob_T, kind)
    dtype = torch.promote_types(logprob_T.dtype, ref_logprob_T.dtype)
    out_T = torch.empty(logprob_T.shape, dtype=dtype, device=logprob_T.device)
    return _launch(out_T, None, logprob_T.contiguous(), ref_logprob_T.contiguous(), kind)


@_kl_penalty_op.register_fake
def _(logprob_T, ref_logprob_T, kind, backend):
    return torch.empty_like(logprob_T, dtype=torch.promote_types(logprob_T.dtype, ref_logprob_T.dtype))


@torch.library.custom_op("rlsp_kernels::kl_penalty_grad", mutates_args=())
def _kl_penalty_grad_op(dkl_T: Tensor, logprob_T: Tensor, ref_logprob_T: Tensor, kind: str, backend: str) -> Tensor:
    if not runs_triton(backend, logprob_T):
        slope_T = kl_slope_torch(logprob_T, ref_logprob_T, kind)
        return torch.where(slope_T == 0, 0.0, dkl_T * slope_T)
    out_T = torch.empty(dkl_T.shape, dtype=dkl_T.dtype, device=dkl_T.device)
    return _launch(out_T, dkl_T.contiguous(), logprob_T.contiguous(), ref_logprob_T.contiguous(), kind)


@_kl_penalty_grad_op.register_fake
def _(dkl_T, logprob_T, ref_logprob_T, kind, backend):
    return torch.empty_like(dkl_T)


def _setup_context(ctx, inputs, output):
    logprob_T, ref_logprob_T, ctx.kind, ctx.backend = inputs
    ctx.save_for_backward(logprob_T, ref_logprob_T)


def _backward(ctx, dkl_T):
    grad_T = _kl_penalty_grad_op(dkl_T, *ctx.saved_tensors, ctx.kind, ctx.backend)
    return grad_T, -grad_T if ctx.needs_input_grad[1] else None, None, None


_kl_penalty_op.register_autograd(_backward, setup_context=_setup_context)

# --- public -----------------------------------------------------------------------------------


def kl_penalty(logprob_T: Tensor, ref_logprob_T: Tensor, kind: KLKind = "k1", *, backend: Backend = "auto") -> Tensor:
    """kl_T with E[kl_T] = KL(policy || reference) over tokens sampled from the policy; r = ref_logprob - logprob.

    k1 = -r (unbiased, can be negative), k2 = r**2 / 2 (biased, its gradient is unbiased), k3 = exp(r) - 1 - r (unbiased,
    never negative).

    Args:
        logprob_T: (T,) floating, nats; differentiable.
        ref_logprob_T: (T,) floating, nats; differentiable.
        kind: "k1", "k2" or "k3".
        backend: "auto" is Triton on a GPU and plain torch on a CPU.
    Returns:
        (T,), the dtype of the difference. |r| is clamped to 20; outside, the gradient is zero.
    Raises:
        ValueError: on another kind, differing shapes or devices.
        RuntimeError: when the backend asked for cannot run.
    Cost: one launch each way. Forward reads 2 T and writes T, backward reads 3 T and writes T.
    Accuracy: k3 and its gradient keep their relative accuracy however small r is (a series below 0.5).
    Source: Schulman, http://joschu.net/blog/kl-approx.html.
    """
    if kind not in KL_KINDS:
        raise ValueError(f"kind must be k1, k2 or k3, got {kind!r}")
    if logprob_T.shape != ref_logprob_T.shape:
        raise ValueError(f"want equal shapes, got {tuple(logprob_T.shape)} and {tuple(ref_logprob_T.shape)}")
    check_device("ref_logprob_T", ref_logprob_T, logprob_T)
    return _kl_penalty_op(logprob_T, ref_logprob_T, kind, backend)
