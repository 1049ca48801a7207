"""RLSP's optional first step: supervised fine-tuning on demonstrations of the reasoning process.

Axes: T packed positions.
"""

import math
import time
from collections.abc import Callable, Sequence

import torch
from rlsp_kernels import linear_logprob_entropy
from torch import Tensor

from rlsp_fast import data, dist
from rlsp_fast.config import Config
from rlsp_fast.log import RunLog, clock
from rlsp_fast.model import Policy
from rlsp_fast.optim import Optimizer
from rlsp_fast.packing import PackedBatch, pack, schedule

Tokens = tuple[tuple[int, ...], tuple[int, ...]]
"""(prompt ids, response ids) of one demonstration."""


def num_steps(config: Config, num_demonstrations: int) -> int:
    """Optimizer steps: sft.steps, or sft.epochs passes over the demonstrations."""
    sft = config.sft
    return sft.steps or math.ceil(sft.epochs * num_demonstrations / sft.batch_size)


def train(
    config: Config,
    policy: Policy,
    optimizer: Optimizer,
    demonstrations: Sequence[Tokens],
    validation: Sequence[Tokens],
    log: RunLog,
    *,
    first_step: int,
    device: torch.device,
    after_step: Callable[[int, dict[str, float]], None],
) -> None:
    """Minimises the mean negative log-probability of response tokens; prompts carry no loss.

    Args:
        first_step: steps already done.
        after_step: called with the number of steps done and the step's metrics; saves, or raises to stop.
    """
    sft, total = config.sft, num_steps(config, len(demonstrations))
    every = max(1, total // 10)  # progress lines and validation losses
    start = time.perf_counter()
    tokens = 0
    for step in range(first_step, total):
        batch = data.batch(demonstrations, seed=config.train.seed, start=step * sft.batch_size, size=sft.batch_size)
        loss = torch.zeros((), device=device)
        for packed, weight_T in _micro_batches(config, batch, device):
            part = _loss(policy, packed, weight_T)
            part.backward()
            loss += part.detach() / dist.world_size()
        norm = optimizer.step()
        tokens += sum(len(p) + len(r) for p, r in batch)
        done = step + 1
        metrics = {"loss": dist.sum_over_ranks([loss.item()])[0], "grad_norm": norm.item(), "lr": optimizer.lr}
        elapsed = time.perf_counter() - start
        metrics["throughput"] = tokens / elapsed / dist.world_size()
        if validation and (done % every == 0 or done == total):
            metrics["val_loss"] = mean_loss(config, policy, validation, device)
        log.write(done, "sft", metrics)
        if done % every == 0 or done == total:
            left = clock(elapsed / (done - first_step) * (total - done))
            val = f" · val loss {metrics['val_loss']:.3f}" if "val_loss" in metrics else ""
            speed = metrics["throughput"] * dist.world_size()
            log.line(f"sft {done}/{total} · {left} left · loss {metrics['loss']:.3f}{val} · {speed:,.0f} tok/s")
        after_step(done, metrics)


@torch.no_grad()
def mean_loss(config: Config, policy: Policy, demonstrations: Sequence[Tokens], device: torch.device) -> float:
    """Mean negative log-probability per response token, nats, over all ranks."""
    total = 0.0
    for packed, weight_T in _micro_batches(config, demonstrations, device):
        total += _loss(policy, packed, weight_T).item() / dist.world_size()
    policy.reshard()
    return dist.sum_over_ranks([total])[0]


def _micro_batches(config: Config, batch: Sequence[Tokens], device: torch.device) -> list[tuple[PackedBatch, Tensor]]:
    """This rank's packed share of a batch, with each token's weight in the mean over the whole batch."""
    lengths = [len(prompt) + len(response) - 1 for prompt, response in batch]
    num_tokens = sum(len(response) for _, response in batch)
    groups = schedule(lengths, dist.world_size(), config.train.max_tokens_per_micro_batch)[dist.rank()]
    out = []
    for group in groups:
        packed = pack([batch[i] for i in group or [0]])
        packed = packed if group else packed.idle()
        weight_T = packed.mask_T.float() * (dist.world_size() / num_tokens if group else 0.0)
        out.append((packed.to(device), weight_T.to(device)))
    return out


def _loss(policy: Policy, packed: PackedBatch, weight_T: Tensor) -> Tensor:
    def fn(hidden_TD: Tensor, weight_VD: Tensor, **head: object) -> Tensor:
        logprob_T, _ = linear_logprob_entropy(
            hidden_TD, weight_VD, packed.token_T, need_entropy=False, rows_N=packed.rows_N, **head
        )
        return -(logprob_T * weight_T).sum()

    return policy(packed, fn)
