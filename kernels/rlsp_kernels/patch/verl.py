"""verl's log-probabilities, fused linear cross entropy, advantages and KL, by these kernels."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlsp_kernels.kl import kl_penalty
from rlsp_kernels.linear import linear_logprob_entropy
from rlsp_kernels.patch import swap
from rlsp_kernels.patch.rows import logprob_entropy_rows, padded_advantage
from rlsp_kernels.patch.swap import Patch, Swap

TESTED = ("0.9.0", "0.9.1")
LOGITS_BUDGET = 256 << 20  # bytes
LARGEST_KL = 10.0  # verl caps k3 there

_FUNCTIONS, _ALGORITHMS = "verl.utils.torch_functional", "verl.trainer.ppo.core_algos"


def apply(*, any_version: bool = False, logits_budget: int = LOGITS_BUDGET) -> Patch:
    """Replaces logprobs_from_logits, linear_cross_entropy, compute_gae_advantage_return and kl_penalty_forward.

    Left to verl's own code: a head spread over tensor-parallel ranks, reductions of linear_cross_entropy, KL other than k3 (one
    subtraction), logits on an NPU, advantages that are not float32.

    Args:
        any_version: also patch a version that is not in TESTED, if its functions take the parameters known here.
        logits_budget: bytes of logits that linear_cross_entropy holds at a time; more is faster.
    Returns:
        What was replaced, in which version.
    Raises:
        ImportError, RuntimeError: see rlsp_kernels.patch.swap.apply; nothing has been changed then.
    """
    return swap.apply("verl", TESTED, any_version, lambda _: _swaps(logits_budget))


def revert() -> None:
    """Takes it back. Raises RuntimeError when verl is not patched."""
    swap.revert("verl")


@contextmanager
def patched(*, any_version: bool = False, logits_budget: int = LOGITS_BUDGET) -> Iterator[Patch]:
    """apply() on entry, revert() on exit."""
    patch = apply(any_version=any_version, logits_budget=logits_budget)
    try:
        yield patch
    finally:
        revert()


def _swaps(logits_budget: int) -> Sequence[Swap]:
    return (
        Swap(_FUNCTIONS, "logprobs_from_logits", ("logits", "labels", "inplace_backward"), _logprobs_from_logits),
        Swap(
            "verl.utils.kernel.linear_cross_entropy",
            "linear_cross_entropy",
            ("ctx", "hidden", "weight", "labels", "temperature", "reduction", "dist_process_group"),
            lambda original: linear_cross_entropy_by_ours(original, logits_budget),
            signature="LinearCrossEntropy.forward",
        ),
        Swap(
            _ALGORITHMS,
            "compute_gae_advantage_return",
            ("token_level_rewards", "values", "response_mask", "gamma", "lam"),
            _compute_gae_advantage_return,
            registries=("ADV_ESTIMATOR_REGISTRY",),
        ),
        Swap(_ALGORITHMS, "kl_penalty_forward", ("logprob", "ref_logprob", "kl_penalty"), _kl_penalty_forward),
    )


def _logprobs_from_logits(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    functions = sys.modules[_FUNCTIONS]

    def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
        if logits.device.type == "npu":
            return original(logits, labels, inplace_backward)
        # verl writes the gradient over the logits where it has flash-attn's kernel for that, and returns float32 there.
        flash = functions.FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE and os.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") != "1"
        inplace = flash and inplace_backward and not (logits.is_leaf and logits.requires_grad)
        logprob, _ = logprob_entropy_rows(logits, labels, need_entropy=False, inplace_backward=inplace)
        return logprob if flash else logprob.to(logits.dtype)

    return logprobs_from_logits


def linear_cross_entropy_by_ours(original: Callable[..., Any], logits_budget: int) -> Callable[..., Any]:
    """The replacement of one function alone: the benches use it where the rest of verl does not import."""

    def linear_cross_entropy(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float = 1.0,
        reduction: str = "none",
        dist_process_group: Any = None,
    ) -> tuple[Tensor, Tensor]:
        if reduction.lower() != "none" or dist_process_group is not None:
            return original(hidden, weight, labels, temperature, reduction, dist_process_group)
        return linear_logprob_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            labels.reshape(-1).long(),
            temperature=temperature,
            logits_dtype=torch.promote_types(hidden.dtype, torch.float32),  # verl's kernel never rounds them
            logits_budget=logits_budget,
        )

    return linear_cross_entropy


def _compute_gae_advantage_return(original: Callable[..., Any]) -> Callable[..., Any]:
    functions = sys.modules[_FUNCTIONS]

    @torch.no_grad()
    def compute_gae_advantage_return(
        token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: Any, lam: Any
    ) -> tuple[Tensor, Tensor]:
        if {token_level_rewards.dtype, values.dtype} != {torch.float32}:
            return original(token_level_rewards, values, response_mask, gamma, lam)
        mask_BL = response_mask.bool()
        advantage_BL = padded_advantage(values, token_level_rewards, mask_BL, float(gamma), float(lam))
        advantage_BL = _carried(advantage_BL, mask_BL)
        return functions.masked_whiten(advantage_BL, response_mask), advantage_BL + values

    return compute_gae_advantage_return


def _carried(x_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """Where the mask is False the number of the next True position, 0 after the last: verl leaves that there."""
    B, L = x_BL.shape
    here_L = torch.arange(L, device=x_BL.device)
    next_BL = torch.where(mask_BL, here_L, L).flip(1).cummin(1).values.flip(1)
    return torch.cat([x_BL, x_BL.new_zeros(B, 1)], 1).gather(1, next_BL)


def _kl_penalty_forward(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def kl_penalty_forward(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
        if kl_penalty not in ("low_var_kl", "k3"):
            return original(logprob, ref_logprob, kl_penalty)
        return _k3(logprob, ref_logprob).clamp(-LARGEST_KL, LARGEST_KL)

    return kl_penalty_forward


def _k3(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    return kl_penalty(*torch.broadcast_tensors(logprob, ref_logprob), "k3")
