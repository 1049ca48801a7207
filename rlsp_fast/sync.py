"""The trained weights into the rollout engine, and the proof that they arrived."""

from collections.abc import Iterator, Sequence

import torch
from rlsp_kernels import linear_logprob_entropy
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlsp_fast import dist
from rlsp_fast.model import Policy
from rlsp_fast.packing import pack
from rlsp_fast.rollout import Engine
from rlsp_fast.types import Rollout


class StaleWeightsError(RuntimeError):
    """The engine samples from other weights than the trainer holds."""


def full_weights(policy: Policy, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, whole tensor on the policy's device) of every weight, one gathered at a time.

    Tied names are all yielded: an engine that keeps its own lm_head would otherwise go on with the old one. Every rank must
    consume the iterator to its end. Each tensor is its own storage, never a reused buffer.
    """
    policy.reshard()  # after a forward without backward the root's parameters are still gathered, in compute dtype
    for name, parameter in policy.lm.state_dict().items():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        whole = whole.detach()
        yield name, whole.to(dtype) if whole.is_floating_point() and whole.dtype != dtype else whole.clone()


def push(policy: Policy, engine: Engine, dtype: torch.dtype) -> None:
    """Wakes the engine with the policy's weights: weights first, KV cache last, so that both never wait for memory.

    Cost: one all-gather per tensor; the largest tensor is held whole, in float32 and in dtype.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # pages in torch's free list are not available to vLLM's allocator
    torch.distributed.barrier()  # a peer on the same device may still hold memory
    engine.wake("weights")
    engine.load_weights(full_weights(policy, dtype))
    engine.wake("kv_cache")


@torch.no_grad()
def probability_difference(
    policy: Policy, rollouts: Sequence[Rollout], temperature: float, max_tokens: int, device: torch.device
) -> tuple[float, float]:
    """(mean, largest) |probability in the engine - in the trainer| of sampled tokens, over all ranks.

    Args:
        rollouts: this rank's, at least one; the first that fit into max_tokens positions are compared.
    Cost: one forward.
    """
    chosen: list[Rollout] = []
    room = max_tokens
    for rollout in rollouts:
        room -= len(rollout.problem.prompt_ids) + len(rollout.response_ids)
        if room < 0 and chosen:
            break
        chosen.append(rollout)
    batch = pack([(r.problem.prompt_ids, r.response_ids) for r in chosen]).to(device)

    def logprob(hidden_TD: Tensor, weight_VD: Tensor, **head: object) -> tuple[Tensor, Tensor]:
        return linear_logprob_entropy(
            hidden_TD,
            weight_VD,
            batch.token_T,
            temperature=temperature,
            need_entropy=False,
            rows_N=batch.rows_N,
            **head,
        )

    ours_T, _ = policy(batch, logprob)
    policy.reshard()
    theirs = torch.tensor([p for r in chosen for p in r.rollout_logprob], dtype=torch.float64)
    diff = (ours_T[batch.rows_N].double().cpu().exp() - theirs.exp()).abs()
    total, count = dist.sum_over_ranks([diff.sum().item(), len(diff)])
    return total / count, dist.max_over_ranks([diff.max().item()])[0]


def verify(mean_diff: float, max_diff: float, limit: float, where: str) -> None:
    """Stops the run when rollouts did not come from the weights just trained.

    Raises:
        StaleWeightsError: when mean |probability in the engine - probability in the trainer| passes limit.
    """
    if not mean_diff <= limit:  # NaN fails too
        raise StaleWeightsError(
            f"{where}: the engine's token probabilities differ from the trainer's by {mean_diff:.4f} in the mean and "
            f"{max_diff:.4f} at most; rollout.max_probs_diff allows {limit:g}. The engine does not hold the trained weights, "
            f"or computes them differently (compare model.dtype; float32 settles rounding)"
        )
