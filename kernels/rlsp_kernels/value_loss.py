"""The clipped value loss of PPO's critic. Axes: T packed tokens."""

import torch
from torch import Tensor


def value_loss_torch(
    value_T: Tensor, old_value_T: Tensor, return_T: Tensor, weight_T: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """What value_loss means, in plain torch. Ignored tokens (weight 0) may hold NaN."""
    keep_T = weight_T != 0
    error_T = torch.where(keep_T, value_T - return_T, 0.0)
    loss_T = error_T.square()
    is_clipped_T = torch.zeros_like(keep_T)
    if clip is not None:
        clipped_T = old_value_T + (value_T - old_value_T).clamp(-clip, clip)
        clipped_loss_T = torch.where(keep_T, clipped_T - return_T, 0.0).square()
        moved_T = (value_T - old_value_T).abs()  # inside the clip, old + (value - old) can still round to another number
        is_clipped_T = (clipped_loss_T > loss_T) & (moved_T > clip)
        loss_T = torch.maximum(loss_T, clipped_loss_T)
    return 0.5 * (loss_T * weight_T).sum(), is_clipped_T.sum()


def value_loss(
    value_T: Tensor, old_value_T: Tensor, return_T: Tensor, weight_T: Tensor, *, clip: float | None = 0.2
) -> tuple[Tensor, Tensor]:
    """sum_t weight_t / 2 * max((v - R)**2, (old_v + clamp(v - old_v, -clip, clip) - R)**2).

    Args:
        value_T: (T,) f32; differentiable.
        old_value_T: (T,) f32, before the update.
        return_T: (T,) f32, the targets.
        weight_T: (T,) f32; 0 leaves a token out (its other inputs may be NaN).
        clip: > 0, or None for the plain squared error.
    Returns:
        loss: 0-d, differentiable in value_T; num_clipped: 0-d, tokens whose clipped error was the larger.
    Raises:
        ValueError: on differing shapes or clip <= 0.
    Cost: reads 4 T.
    Source: arXiv:1707.06347 and its implementations; arXiv:2005.12729 on what the clip does.
    """
    for name, tensor in {"old_value_T": old_value_T, "return_T": return_T, "weight_T": weight_T}.items():
        if tensor.shape != value_T.shape:
            raise ValueError(f"want {name} {tuple(value_T.shape)}, got {tuple(tensor.shape)}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be > 0 or None, got {clip}")
    return value_loss_torch(value_T, old_value_T, return_T, weight_T, clip)
