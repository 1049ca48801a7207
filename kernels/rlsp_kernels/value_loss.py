"""The clipped value loss of PPO's critic. Axes: T packed tokens.

Order of this file: definition, kernel, op, public function.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlsp_kernels.backend import LAUNCH, Backend, check_device, runs_triton

# --- definition -------------------------------------------------------------------------------


def value_loss_torch(
    value_T: Tensor, old_value_T: Tensor, return_T: Tensor, weight_T: Tensor, clip: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and number clipped, in plain torch, and the derivative in value_T by hand. Ignored tokens may hold NaN."""
    keep_T = weight_T != 0
    error_T = torch.where(keep_T, value_T - return_T, 0.0)
    loss_T, slope_T = error_T.square(), error_T
    is_clipped_T = torch.zeros_like(keep_T)
    if clip is not None:
        moved_T = value_T - old_value_T
        clipped_error_T = torch.where(keep_T, old_value_T + moved_T.clamp(-clip, clip) - return_T, 0.0)
        # inside the clip, old + (value - old) can still round to another number
        is_clipped_T = (clipped_error_T.square() > loss_T) & (moved_T.abs() > clip)
        loss_T = torch.where(is_clipped_T, clipped_error_T.square(), loss_T)
        slope_T = torch.where(is_clipped_T, 0.0, slope_T)
    return 0.5 * (loss_T * weight_T).sum(), is_clipped_T.sum(), (slope_T * weight_T).detach()


# --- kernel -----------------------------------------------------------------------------------


@triton.jit
def _value_block(dvalue_ptr, value_ptr, old_value_ptr, return_ptr, weight_ptr, t, inside, clip, HAS_CLIP: tl.constexpr):
    """Writes the gradient of a block; returns its loss and number clipped."""
    weight = tl.load(weight_ptr + t, mask=inside, other=0.0)
    value = tl.load(value_ptr + t, mask=inside, other=0.0)
    target = tl.load(return_ptr + t, mask=inside, other=0.0)
    keep = weight != 0  # the others may hold NaN, and 0 * NaN is NaN
    error = tl.where(keep, value - target, 0.0)
    loss = error * error
    num_clipped = 0.0
    if HAS_CLIP:
        old_value = tl.load(old_value_ptr + t, mask=inside, other=0.0)
        moved = value - old_value
        clipped_error = old_value + tl.where(moved > clip, clip, tl.where(moved < -clip, -clip, moved)) - target
        is_clipped = keep & (clipped_error * clipped_error > loss) & (tl.abs(moved) > clip)
        loss = tl.where(is_clipped, clipped_error * clipped_error, loss)
        error = tl.where(is_clipped, 0.0, error)
        num_clipped = tl.sum(tl.where(is_clipped, 1.0, 0.0))
    tl.store(dvalue_ptr + t, error * weight, mask=inside)
    return 0.5 * tl.sum(loss * weight), num_clipped


@triton.jit(do_not_specialize=["size"])
def _value_loss_kernel(
    partial_ptr,  # (2, number of programs) f32, written: loss and number clipped of each block
    dvalue_ptr,  # (T,) f32, written
    value_ptr,  # (T,) f32
    old_value_ptr,  # (T,) f32
    return_ptr,  # (T,) f32
    weight_ptr,  # (T,) f32
    size,
    clip,
    HAS_CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    whole = size // 16 * 16  # a mask that ends there lets loads be 16 bytes wide, whatever T is
    loss, num_clipped = _value_block(
        dvalue_ptr, value_ptr, old_value_ptr, return_ptr, weight_ptr, t, t < whole, clip, HAS_CLIP
    )  # fmt: skip
    if tl.program_id(0) == 0:
        rest = whole + tl.arange(0, 16)
        rest_loss, rest_clipped = _value_block(
            dvalue_ptr, value_ptr, old_value_ptr, return_ptr, weight_ptr, rest, rest < size, clip, HAS_CLIP
        )  # fmt: skip
        loss += rest_loss
        num_clipped += rest_clipped
    tl.store(partial_ptr + tl.program_id(0), loss)
    tl.store(partial_ptr + tl.num_programs(0) + tl.program_id(0), num_clipped)


# --- op ---------------------------------------------------------------------------------------


@torch.library.custom_op("rlsp_kernels::value_loss", mutates_args=())
def _value_loss_op(
    value_T: Tensor, old_value_T: Tensor, return_T: Tensor, weight_T: Tensor, clip: float | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, number clipped, and the gradient in value_T."""
    if not runs_triton(backend, value_T):
        return value_loss_torch(value_T, old_value_T, return_T, weight_T, clip)
    size = value_T.numel()
    num_blocks = triton.cdiv(size, 1024)
    partial = torch.empty(2, num_blocks, dtype=torch.float32, device=value_T.device)
    dvalue_T = torch.empty(value_T.shape, dtype=torch.float32, device=value_T.device)
    columns = [x.float().contiguous() for x in (value_T, old_value_T, return_T, weight_T)]
    _value_loss_kernel[(num_blocks,)](
        partial, dvalue_T, *columns, size, clip or 0.0, HAS_CLIP=clip is not None, BLOCK=1024, num_warps=4, **LAUNCH
    )
    loss, num_clipped = partial.sum(1, dtype=torch.float64).unbind()
    return loss.float(), num_clipped.long(), dvalue_T


@_value_loss_op.register_fake
def _(value_T, old_value_T, return_T, weight_T, clip, backend):
    dtype = torch.float64 if value_T.dtype == torch.float64 else torch.float32
    return value_T.new_empty((), dtype=dtype), value_T.new_empty((), dtype=torch.int64), torch.empty_like(value_T, dtype=dtype)


def _setup_context(ctx, inputs, output):
    _, num_clipped, dvalue_T = output
    ctx.save_for_backward(dvalue_T)
    ctx.mark_non_differentiable(num_clipped, dvalue_T)
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 6
    (dvalue_T,) = ctx.saved_tensors
    return dloss * dvalue_T, None, None, None, None, None


_value_loss_op.register_autograd(_backward, setup_context=_setup_context)

# --- public -----------------------------------------------------------------------------------


def value_loss(
    value_T: Tensor,
    old_value_T: Tensor,
    return_T: Tensor,
    weight_T: Tensor,
    *,
    clip: float | None = 0.2,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """sum_t weight_t / 2 * max((v - R)**2, (old_v + clamp(v - old_v, -clip, clip) - R)**2).

    Args:
        value_T: (T,) f32 (or f64); differentiable.
        old_value_T: (T,), same dtype, before the update.
        return_T: (T,), same dtype, the targets.
        weight_T: (T,), same dtype; 0 leaves a token out (its other inputs may be NaN).
        clip: > 0, or None for the plain squared error.
        backend: "auto" is Triton on a GPU and plain torch on a CPU.
    Returns:
        loss: 0-d, differentiable in value_T; num_clipped: 0-d i64, tokens whose clipped error was the larger.
    Raises:
        ValueError: on differing shapes, dtypes or devices, or clip <= 0.
        RuntimeError: when the backend asked for cannot run.
    Cost: reads 4 T once and writes the gradient, T; backward multiplies it.
    Accuracy: float32, blocks of 1,024 tokens added up in float64; the same bits every run.
    Source: arXiv:1707.06347 and its implementations; arXiv:2005.12729 on what the clip does.
    """
    for name, tensor in {"old_value_T": old_value_T, "return_T": return_T, "weight_T": weight_T}.items():
        if tensor.shape != value_T.shape:
            raise ValueError(f"want {name} {tuple(value_T.shape)}, got {tuple(tensor.shape)}")
        check_device(name, tensor, value_T)
        if tensor.dtype != value_T.dtype:
            raise ValueError(f"{name} must be {value_T.dtype} as value_T is, got {tensor.dtype}")
    if value_T.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"value_T must be float32 or float64, got {value_T.dtype}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be > 0 or None, got {clip}")
    loss, num_clipped, _ = _value_loss_op(value_T, old_value_T, return_T, weight_T, clip, backend)
    return loss, num_clipped
