"""OpenRLHF's log-probabilities, advantages and policy loss, by these kernels."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlsp_kernels.patch import swap
from rlsp_kernels.patch.rows import logprob_entropy_rows, padded_advantage
from rlsp_kernels.patch.swap import Patch, Swap
from rlsp_kernels.ppo_loss import CLIP_HIGH, CLIP_LOW, Clip, policy_terms_torch

TESTED = ("0.11.2",)


def apply(*, any_version: bool = False) -> Patch:
    """Replaces log_probs_from_logits, RemoteExperienceMaker.get_advantages_and_returns and PolicyLoss.forward.

    Left to OpenRLHF's own code: GSPO, importance-sampling correction, a loss without a mask, advantages not in float32.

    Args:
        any_version: also patch a version that is not in TESTED, if its functions take the parameters known here.
    Returns:
        What was replaced, in which version.
    Raises:
        ImportError, RuntimeError: see rlsp_kernels.patch.swap.apply; nothing has been changed then.
    """
    return swap.apply("openrlhf", TESTED, any_version, _swaps)


def revert() -> None:
    """Takes it back. Raises RuntimeError when OpenRLHF is not patched."""
    swap.revert("openrlhf")


@contextmanager
def patched(*, any_version: bool = False) -> Iterator[Patch]:
    """apply() on entry, revert() on exit."""
    patch = apply(any_version=any_version)
    try:
        yield patch
    finally:
        revert()


def _swaps(_: str) -> Sequence[Swap]:
    of_loss = ("self", "log_probs", "old_log_probs", "advantages", "action_mask", "rollout_log_probs", "dp_size")
    return (
        Swap("openrlhf.models.utils", "log_probs_from_logits", ("logits", "labels", "temperature"), _log_probs_from_logits),
        Swap(
            "openrlhf.trainer.ppo_utils.experience_maker",
            "RemoteExperienceMaker.get_advantages_and_returns",
            ("self", "values", "rewards", "action_mask", "gamma", "lambd"),
            _get_advantages_and_returns,
        ),
        Swap(
            "openrlhf.models.loss",
            "PolicyLoss.forward",
            (*of_loss, "batch_num_tokens", "global_batch_size"),
            _policy_loss,
        ),
    )


def _log_probs_from_logits(_: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        if temperature != 1.0:
            logits.div_(temperature)  # as the original does: what is done with the logits afterwards counts on it
        logprob, _ = logprob_entropy_rows(logits, labels, need_entropy=False)
        return logprob.to(logits.dtype)

    return log_probs_from_logits


def _get_advantages_and_returns(original: Callable[..., Any]) -> Callable[..., Any]:
    @torch.no_grad()
    def get_advantages_and_returns(
        self: Any, values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float
    ) -> tuple[Tensor, Tensor]:
        if {values.dtype, rewards.dtype} != {torch.float32}:
            return original(self, values, rewards, action_mask, gamma, lambd)
        if action_mask is not None:
            values, rewards = action_mask * values, action_mask * rewards
        # A masked token counts as a step of value 0 and reward 0 here: no position is left out.
        every_BL = torch.ones_like(values, dtype=torch.bool)
        advantage_BL = padded_advantage(values, rewards, every_BL, float(gamma), float(lambd))
        return advantage_BL, advantage_BL + values

    return get_advantages_and_returns


def _policy_loss(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(
        self: Any,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        if self.policy_loss_type != "ppo" or self.is_correction_level != "off" or action_mask is None:
            return original(
                self, log_probs, old_log_probs, advantages, action_mask, rollout_log_probs, dp_size, batch_num_tokens,
                global_batch_size,
            )  # fmt: skip
        mask = action_mask.to(log_probs.dtype)
        weight = _weight(mask, self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
        clip = Clip(low=self.clip_eps_low, high=self.clip_eps_high, dual=self.dual_clip)
        flat = (x.expand_as(log_probs).flatten() for x in (log_probs, old_log_probs, advantages, weight))
        loss, clipped_T, log_ratio_T = _PolicyLoss.apply(*flat, clip)
        num_tokens = mask.sum()
        return (
            loss,
            (clipped_T * mask.flatten()).sum() / num_tokens,
            -(log_ratio_T * mask.flatten()).sum() / num_tokens,
            None,
            None,
        )

    return forward


def _weight(
    mask_BL: Tensor, token_level: bool, dp_size: int, batch_num_tokens: float | None, global_batch_size: float | None
) -> Tensor:
    """Each token's share of the loss: aggregate_loss as a weighted sum."""
    if token_level:
        return mask_BL / mask_BL.sum() if batch_num_tokens is None else mask_BL / batch_num_tokens * dp_size
    num_tokens_B1 = mask_BL.sum(-1, keepdim=True)
    share_BL = mask_BL / (num_tokens_B1 + 1e-8)
    if global_batch_size is None:
        return share_BL / (num_tokens_B1 > 0).sum()
    return share_BL / global_batch_size * dp_size


class _PolicyLoss(torch.autograd.Function):
    """The clipped loss with its slope made on the way: one number a token is kept for backward."""

    @staticmethod
    def forward(ctx, logprob_T, old_logprob_T, advantage_T, weight_T, clip):
        zero_T = torch.zeros_like(logprob_T)
        columns_CT, slope_T, _ = policy_terms_torch(
            logprob_T, zero_T, old_logprob_T, advantage_T, weight_T, None, None, clip
        )  # fmt: skip
        loss_T, _, log_ratio_T, _, _, _, flags_T = columns_CT
        clipped_T = (flags_T.int() & (CLIP_LOW | CLIP_HIGH)) != 0
        ctx.save_for_backward(slope_T)
        ctx.mark_non_differentiable(clipped_T, log_ratio_T)
        return loss_T.sum(), clipped_T, log_ratio_T

    @staticmethod
    def backward(ctx, dloss, *_):
        (slope_T,) = ctx.saved_tensors
        return dloss * slope_T, None, None, None, None
