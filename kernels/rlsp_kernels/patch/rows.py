"""Logits as other trainers hold them, (..., V), before an op that takes rows; padded batches before packed advantages.

Axes: B sequences of L tokens, T rows, V vocabulary.
"""

import torch
from torch import Tensor

from rlsp_kernels.logprob_entropy import logprob_entropy
from rlsp_kernels.packed_gae import packed_gae


def logprob_entropy_rows(
    logits: Tensor, token: Tensor, *, temperature: float = 1.0, need_entropy: bool = True, inplace_backward: bool = False
) -> tuple[Tensor, Tensor]:
    """logprob_entropy of logits (..., V) and tokens (...): log-probability and entropy (...), float32 or float64.

    A batch whose rows do not follow each other evenly, such as logits[:, :-1], goes one sequence at a time: flattening it
    would copy it.
    """
    if logits.ndim == 3 and len(logits) > 1 and logits.stride(0) != logits.stride(1) * logits.shape[1]:
        parts = [
            logprob_entropy_rows(
                one, token_L, temperature=temperature, need_entropy=need_entropy, inplace_backward=inplace_backward
            )
            for one, token_L in zip(logits, token, strict=True)
        ]
        logprob, entropy = (torch.stack(x) for x in zip(*parts, strict=True))
        return logprob, entropy
    logits_TV = logits.reshape(-1, logits.shape[-1])
    if logits_TV.stride(1) != 1:
        logits_TV = logits_TV.contiguous()
    logprob_T, entropy_T = logprob_entropy(
        logits_TV,
        token.reshape(-1).long(),
        temperature=temperature,
        need_entropy=need_entropy,
        inplace_backward=inplace_backward,
    )
    return logprob_T.view(logits.shape[:-1]), entropy_T.view(logits.shape[:-1])


def padded_advantage(value_BL: Tensor, reward_BL: Tensor, mask_BL: Tensor, gamma: float, lam: float) -> Tensor:
    """Advantages (B, L) of a padded batch, 0 where mask_BL is False."""
    B, L = value_BL.shape
    cu_seqlens = torch.arange(0, B * L + 1, L, dtype=torch.int32, device=value_BL.device)
    found = packed_gae(
        value_BL.reshape(-1), cu_seqlens, mask_BL.reshape(-1), reward_T=reward_BL.reshape(-1), gamma=gamma, lam=lam
    )
    return found.advantage_T.view(B, L)
