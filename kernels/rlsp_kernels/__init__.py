"""Kernels for RL on language models: log-probabilities, PPO losses, KL and packed advantages. Needs torch and triton only."""

from rlsp_kernels.kl import kl_penalty
from rlsp_kernels.linear import active_rows, linear_logprob_entropy, linear_ppo_loss
from rlsp_kernels.logprob_entropy import logprob_entropy
from rlsp_kernels.packed_gae import packed_gae, whiten
from rlsp_kernels.ppo_loss import PPOMetrics, ppo_loss
from rlsp_kernels.value_loss import value_loss

__all__ = [
    "PPOMetrics",
    "active_rows",
    "kl_penalty",
    "linear_logprob_entropy",
    "linear_ppo_loss",
    "logprob_entropy",
    "packed_gae",
    "ppo_loss",
    "value_loss",
    "whiten",
]
