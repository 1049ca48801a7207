"""PPO over packed rollouts: annotate them with log-probabilities, values and advantages, then update critic and policy.

Axes: T packed positions, S sequences. The same loop serves GRPO, RLOO and REINFORCE++: they differ in `_advantages` alone.
"""

import gc
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from rlsp_kernels import (
    PPOMetrics,
    kl_penalty,
    linear_logprob_entropy,
    linear_ppo_loss,
    packed_gae,
    value_loss,
    whiten,
)
from rlsp_kernels.packed_gae import Backend, backend_report
from torch import Tensor

from rlsp_fast import dist
from rlsp_fast.config import AlgorithmConfig, Config
from rlsp_fast.log import Timer
from rlsp_fast.memory import ran_out
from rlsp_fast.model import Critic, Policy, begin_anew
from rlsp_fast.optim import Optimizer
from rlsp_fast.packing import PackedBatch, flat, pack, schedule

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One scored rollout, as PPO needs it."""

    group: int
    """Problems count from 0 within a step; the samples of a problem share its number."""
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    rollout_logprob: tuple[float, ...]
    """Per response token, nats, at the rollout's temperature."""
    num_carried: int = 0
    """How many of the first response tokens older weights sampled."""
    reward: float
    """Of the whole response."""
    weight: float = 1.0
    """Factor on every loss term of its tokens, policy's and critic's; above 0. It is in no denominator."""

    @property
    def num_positions(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids) - 1


@dataclass(slots=True, kw_only=True)
class MicroBatch:
    """A packed batch and everything PPO learns about it. Per-token tensors are (T,) f32, meaningful where mask_T is True."""

    batch: PackedBatch
    group: tuple[int, ...]
    """Per sequence, its problem."""
    reward_S: Tensor
    """(S,) f32."""
    rollout_logprob_T: Tensor
    weight_T: Tensor
    """Share of each token in its mini-batch's policy loss; 0 outside responses."""
    critic_weight_T: Tensor
    """The same for the value loss: 1 / tokens of the mini-batch, times the sample's weight, whatever the policy's mean."""
    carried_T: Tensor | None = None
    """(T,) bool: True where the token was sampled in an earlier step, from older weights. None: no token was."""
    old_logprob_T: Tensor | None = None
    ref_logprob_T: Tensor | None = None
    value_T: Tensor | None = None
    token_reward_T: Tensor | None = None
    advantage_T: Tensor | None = None
    return_T: Tensor | None = None

    def move_to(self, device: torch.device) -> None:
        """What the device computes with, before it has anything to do: a copy later would wait for what is queued."""
        self.batch = self.batch.to(device)
        for name in ("reward_S", "rollout_logprob_T", "weight_T", "critic_weight_T"):
            setattr(self, name, getattr(self, name).to(device, non_blocking=True))

    def split(self, max_tokens: int) -> list["MicroBatch"]:
        """The same sequences in the same order, in parts of at most max_tokens where a sequence is not longer by itself."""
        if self.batch.num_tokens <= max_tokens:
            return [self]
        lengths, borders = self.batch.lengths, [0]
        for i in range(1, len(lengths)):
            if sum(lengths[borders[-1] : i + 1]) > max_tokens:
                borders.append(i)
        return [self._part(first, last) for first, last in pairwise([*borders, len(lengths)])]

    def _part(self, first: int, last: int) -> "MicroBatch":
        start, end = (sum(self.batch.lengths[:i]) for i in (first, last))
        per_token = {f.name: getattr(self, f.name) for f in fields(self) if f.name.endswith("_T")}
        return MicroBatch(
            batch=self.batch.part(first, last),
            group=self.group[first:last],
            reward_S=self.reward_S[first:last],
            **{name: None if x_T is None else x_T[start:end] for name, x_T in per_token.items()},
        )


class MicroBatchMemoryError(RuntimeError):
    """A micro-batch ran out of memory where it cannot be repeated."""

    def __init__(self, said: str, budget: int):
        """
        Args:
            budget: Positions of a micro-batch with which to start again: half of what it had.
        """
        super().__init__(f"out of memory: {said}")
        self.budget = budget


class PPO:
    """Policy, critic and reference with their optimizers."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        actor_optimizer: Optimizer,
        critic: Critic | None,
        critic_optimizer: Optimizer | None,
        ref: Policy | None,
        device: torch.device,
    ):
        self.config = config
        self.algorithm: AlgorithmConfig = config.algorithm
        self.temperature = config.rollout.temperature
        self.policy, self.actor_optimizer = policy, actor_optimizer
        self.critic, self.critic_optimizer = critic, critic_optimizer
        self.ref = ref
        self.device = device
        self.token_budget = config.train.max_tokens_per_micro_batch
        """Positions of a micro-batch; halved when one runs out of memory."""
        self.gae_backend = _gae_backend(device)

    # --- batches ------------------------------------------------------------------------------

    def pack(self, samples: Sequence[Sample]) -> list[list[MicroBatch]]:
        """This rank's micro-batches of every mini-batch. Samples are those of all ranks, in the same order everywhere.

        Mini-batches hold train.mini_batch_size problems. Where dynamic sampling left fewer, they hold equally many to within
        one: a remainder of a problem or two would get an optimizer step of its own. Each is spread over the ranks as
        packing.schedule says.
        """
        train, n = self.config.train, self.config.rollout.n
        num_problems = len(samples) // n
        count = math.ceil(num_problems / train.mini_batch_size)
        borders = [num_problems * i // count * n for i in range(count + 1)] if count else []
        mini_batches = []
        for start, end in pairwise(borders):
            chosen = samples[start:end]
            lengths = [s.num_positions for s in chosen]
            groups = schedule(lengths, dist.world_size(), max(self.token_budget, *lengths))[dist.rank()]
            num_tokens = sum(len(s.response_ids) for s in chosen)
            mini_batches.append(
                [self._micro([chosen[i] for i in g or [0]], num_tokens, len(chosen), idle=not g) for g in groups]
            )
        return mini_batches

    def _micro(self, samples: Sequence[Sample], num_tokens: int, num_sequences: int, *, idle: bool) -> MicroBatch:
        batch = pack([(s.prompt_ids, s.response_ids) for s in samples])
        rollout_logprob: list[float] = []
        num_carried = 0
        for s in samples:
            rollout_logprob += s.rollout_logprob
            num_carried += s.num_carried
        rollout_logprob_T, carried_T = torch.zeros(batch.num_tokens), None
        rollout_logprob_T[batch.rows_N] = flat(rollout_logprob, torch.float32)
        if num_carried:
            carried_T = torch.zeros(batch.num_tokens, dtype=torch.bool)
            carried = [i < s.num_carried for s in samples for i in range(len(s.response_ids))]
            carried_T[batch.rows_N] = flat(carried, torch.bool)
        # Denominators count a sample in full: what has weight 1 counts as it would if all had, and a mini-batch in which
        # all weigh less moves the policy less. As the weights of prioritized replay (arXiv 1511.05952), at most 1.
        weight_S = [s.weight * self._per_token(len(s.response_ids), num_tokens, num_sequences) for s in samples]
        critic_weight_S = [s.weight / num_tokens for s in samples]
        if idle:
            batch = batch.idle()
        # FSDP averages gradients over ranks, where the loss is a sum over the tokens of all ranks.
        world = dist.world_size()
        return MicroBatch(
            batch=batch,
            group=tuple(s.group for s in samples),
            reward_S=torch.tensor([s.reward for s in samples], dtype=torch.float32),
            rollout_logprob_T=rollout_logprob_T,
            carried_T=carried_T,
            weight_T=_along(weight_S, batch) * batch.mask_T * world,
            critic_weight_T=_along(critic_weight_S, batch) * batch.mask_T * world,
        )

    def _per_token(self, num_response_tokens: int, num_tokens: int, num_sequences: int) -> float:
        """Share of one token of a response in its mini-batch's policy loss."""
        return {
            "token_mean": 1 / num_tokens,
            "sequence_mean": 1 / (num_sequences * num_response_tokens),
            "dr_grpo": 1 / (num_sequences * self.config.rollout.max_response_length),
        }[self.algorithm.loss_aggregation]

    # --- annotate -----------------------------------------------------------------------------

    @torch.no_grad()
    def annotate(self, mini_batches: list[list[MicroBatch]], timer: Timer) -> dict[str, float]:
        """Fills old and reference log-probabilities, values, advantages and returns. Returns metrics of all ranks."""
        micros = [m for mini_batch in mini_batches for m in mini_batch]
        for m in micros:
            m.move_to(self.device)
        with timer("old_log_prob"):
            for m in micros:
                m.old_logprob_T, _ = self.policy(m.batch, self._logprob(m))
            self.policy.reshard()
        if self.ref is not None:
            with timer("ref"):
                for m in micros:
                    m.ref_logprob_T, _ = self.ref(m.batch, self._logprob(m))
                self.ref.reshard()
        if self.critic is not None:
            with timer("values"):
                for m in micros:
                    m.value_T = self.critic(m.batch)
                self.critic.reshard()
        with timer("adv"):
            self._advantages(micros)
            return self._describe(micros)

    def _logprob(self, m: MicroBatch) -> Callable[..., tuple[Tensor, Tensor]]:
        def fn(hidden_TD: Tensor, weight_VD: Tensor, **head: object) -> tuple[Tensor, Tensor]:
            return linear_logprob_entropy(
                hidden_TD,
                weight_VD,
                m.batch.token_T,
                temperature=self.temperature,
                need_entropy=False,
                rows_N=m.batch.rows_N,
                **head,
            )

        return fn

    def _advantages(self, micros: list[MicroBatch]) -> None:
        a = self.algorithm
        gae = a.advantage == "gae"
        moments = torch.zeros(3, dtype=torch.float64, device=self.device)
        for m in micros:
            out = packed_gae(
                m.value_T if gae else torch.zeros_like(m.old_logprob_T),
                m.batch.cu_seqlens,
                m.batch.mask_T,
                gamma=a.gamma,
                lam=a.lam if gae else 1.0,
                terminal_reward_S=m.reward_S,
                old_logprob_T=m.old_logprob_T,
                ref_logprob_T=m.ref_logprob_T,
                kl_coef=a.kl_coef if self.ref is not None else 0.0,
                kl_kind=a.kl_kind,
                backend=self.gae_backend,
            )
            m.token_reward_T, m.advantage_T, m.return_T = out.reward_T, out.advantage_T, out.return_T
            moments += out.moments
        if a.advantage in ("grpo", "rloo"):
            self._group_advantages(micros)
        elif a.whiten:
            self._whiten(micros, moments)

    def _whiten(self, micros: list[MicroBatch], moments: Tensor) -> None:
        group = torch.distributed.group.WORLD if dist.world_size() > 1 else None
        flat = torch.cat([m.advantage_T for m in micros])
        mask = torch.cat([m.batch.mask_T for m in micros])
        parts = whiten(flat, mask, moments, group=group).split([len(m.advantage_T) for m in micros])
        for m, advantage_T in zip(micros, parts, strict=True):
            m.advantage_T = advantage_T

    def _group_advantages(self, micros: list[MicroBatch]) -> None:
        """Each response against the others of its problem. Its score is its reward minus its summed KL penalty."""
        total_S = torch.cat([_per_sequence(m, m.token_reward_T) for m in micros]).cpu()  # one wait for the device
        totals = [part_S.tolist() for part_S in total_S.split([len(m.group) for m in micros])]
        real = [
            (group, total)
            for m, total_S in zip(micros, totals, strict=True)
            if len(m.batch.rows_N)  # else the weight-0 repeat that keeps a rank in step
            for group, total in zip(m.group, total_S, strict=True)
        ]
        scores: dict[int, list[float]] = {}
        for part in dist.gather_objects(real):
            for group, total in part:
                scores.setdefault(group, []).append(total)
        for m, total_S in zip(micros, totals, strict=True):
            advantage_S = [self._against_others(total, scores[group]) for group, total in zip(m.group, total_S, strict=True)]
            m.advantage_T = _along(advantage_S, m.batch).to(self.device) * m.batch.mask_T

    def _against_others(self, total: float, scores: list[float]) -> float:
        """What a response's score is against those of its problem, its own among them."""
        n = len(scores)
        if n < 2:
            return 0.0
        mean = math.fsum(scores) / n
        if self.algorithm.advantage == "rloo":
            return (total - mean) * n / (n - 1)  # its score minus the mean of the others
        return (total - mean) / (math.sqrt(math.fsum((x - mean) ** 2 for x in scores) / (n - 1)) + 1e-6)

    def _describe(self, micros: list[MicroBatch]) -> dict[str, float]:
        """Metrics over the response tokens of all ranks; one reduction.

        The engine is compared with the trainer where both have the same weights: carried tokens are apart.
        """
        rows_N = torch.cat([m.batch.mask_T for m in micros]).cpu().nonzero().squeeze(-1)

        def of_responses(name: str) -> Tensor:
            return torch.cat([getattr(m, name) for m in micros]).cpu().index_select(0, rows_N).double()

        old, rollout = of_responses("old_logprob_T"), of_responses("rollout_logprob_T")
        advantage, target = of_responses("advantage_T"), of_responses("return_T")
        diff, mismatch_kl = (old.exp() - rollout.exp()).abs(), kl_penalty(rollout, old, "k3")
        num_carried = carried_kl = 0.0
        if [m for m in micros if m.carried_T is not None]:  # its tensors stay on the host, where they were made
            fresh_T = torch.zeros(max(m.batch.num_tokens for m in micros), dtype=torch.bool)
            carried = torch.cat([fresh_T[: m.batch.num_tokens] if m.carried_T is None else m.carried_T for m in micros])[rows_N]
            num_carried, carried_kl = float(carried.sum()), mismatch_kl[carried].sum().item()
            diff, mismatch_kl = diff[~carried], mismatch_kl[~carried]
        sums = {
            "n": float(len(old)),
            "carried": num_carried,
            "diff": diff.sum().item(),
            "mismatch_kl": mismatch_kl.sum().item(),
            "carried_kl": carried_kl,
            "advantage": advantage.sum().item(),
            "return": target.sum().item(),
            "return_sq": target.square().sum().item(),
        }
        if self.ref is not None:
            sums["ref_kl"] = (old - of_responses("ref_logprob_T")).sum().item()
        if self.critic is not None:
            value = of_responses("value_T")
            residual = target - value
            sums |= {"value": value.sum().item(), "residual": residual.sum().item()}
            sums["residual_sq"] = residual.square().sum().item()
        total = dict(zip(sums, dist.sum_over_ranks(sums.values()), strict=True))
        n = total["n"]
        (max_diff,) = dist.max_over_ranks([diff.max().item() if len(diff) else 0.0])
        metrics = {"critic/advantages/mean": total["advantage"] / n, "critic/returns/mean": total["return"] / n}
        fresh = n - total["carried"]
        if fresh:
            metrics["training/rollout_probs_diff_mean"] = total["diff"] / fresh
            metrics["training/rollout_probs_diff_max"] = max_diff
            metrics["training/mismatch_kl"] = total["mismatch_kl"] / fresh
        if fresh < n:
            metrics["rollout/carried_tokens"] = n - fresh
            metrics["rollout/carried_kl"] = total["carried_kl"] / (n - fresh)
        if self.ref is not None:
            metrics["actor/ref_kl"] = total["ref_kl"] / n
        if self.critic is not None:
            variance = total["return_sq"] / n - (total["return"] / n) ** 2
            unexplained = total["residual_sq"] / n - (total["residual"] / n) ** 2
            metrics["critic/values/mean"] = total["value"] / n
            metrics["critic/vf_explained_var"] = 1 - unexplained / variance if variance > 1e-12 else 0.0
        return metrics

    # --- update -------------------------------------------------------------------------------

    def update(self, mini_batches: list[list[MicroBatch]], timer: Timer, *, train_actor: bool) -> dict[str, float]:
        """config.train.epochs passes: for each mini-batch one step of the critic, then one of the policy."""
        critic_stats: list[Tensor] = []
        actor_stats: PPOMetrics | None = None
        norms: dict[str, list[Tensor]] = {"critic": [], "actor": []}
        num_updates = 0
        for _ in range(self.config.train.epochs):
            for mini_batch in mini_batches:
                num_updates += 1
                if self.critic is not None:
                    with timer("update_critic"):
                        stats = self._within_memory(mini_batch, self._critic_backward, self.critic)
                        critic_stats.append(torch.stack(stats).sum(0))
                        norms["critic"].append(self.critic_optimizer.step())
                if train_actor:
                    with timer("update_actor"):
                        for stats in self._within_memory(mini_batch, self._actor_backward, self.policy):
                            actor_stats = stats if actor_stats is None else actor_stats.merge(stats)
                        norms["actor"].append(self.actor_optimizer.step())
        return self._update_metrics(critic_stats, actor_stats, norms, num_updates)

    def _within_memory(
        self, mini_batch: list[MicroBatch], backward: Callable[[MicroBatch], Any], model: Policy | Critic
    ) -> list:
        """What `backward` returns of every micro-batch. One that runs out of memory halves the budget of tokens, for good.

        The mini-batch is then split and begun again without the gradients that it had: its loss is a sum over tokens, so it
        comes out the same. On one rank only: others would wait in collectives that this one has left. (FSDP2 can begin anew
        after an error from torch 2.13 on.)

        Raises:
            MicroBatchMemoryError: on several ranks, with the budget to start again with.
        """
        while True:
            mini_batch[:] = [part for m in mini_batch for part in m.split(self.token_budget)]
            try:
                return [backward(m) for m in mini_batch]
            except RuntimeError as error:
                largest = max(m.batch.num_tokens for m in mini_batch)
                longest = max(m.batch.max_seqlen for m in mini_batch)
                if not ran_out(error) or largest <= longest:  # nothing is left to split
                    raise
                said = str(error).splitlines()[0][:200]
                halved = max(min(self.token_budget, largest) // 2, longest)
                if dist.world_size() > 1 or not hasattr(model, "reset_iter_state"):
                    raise MicroBatchMemoryError(said, halved) from error
            self.token_budget = halved
            log.warning(
                "out of memory in a micro-batch of up to %s tokens: repeated with %s, and so from now on; set "
                "train.max_tokens_per_micro_batch=%d to start with that (%s)",
                f"{largest:,}", f"{halved:,}", halved, said,
            )  # fmt: skip
            begin_anew(model)  # behind the except block, whose traceback holds the activations
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _critic_backward(self, m: MicroBatch) -> Tensor:
        value_T = self.critic(m.batch)
        loss, num_clipped = value_loss(value_T, m.value_T, m.return_T, m.critic_weight_T, clip=self.algorithm.value_clip)
        loss.backward()
        return torch.stack([loss.detach() / dist.world_size(), num_clipped.float(), m.batch.mask_T.sum().float()])

    def _actor_backward(self, m: MicroBatch) -> PPOMetrics:
        a = self.algorithm
        importance_weight_T = None
        if a.tis_cap is not None:
            log_weight_T = m.old_logprob_T - m.rollout_logprob_T
            importance_weight_T = log_weight_T.exp().clamp(max=a.tis_cap)

        def fn(hidden_TD: Tensor, weight_VD: Tensor, **head: object) -> tuple[Tensor, PPOMetrics]:
            return linear_ppo_loss(
                hidden_TD,
                weight_VD,
                m.batch.token_T,
                m.old_logprob_T,
                m.advantage_T,
                m.weight_T,
                temperature=self.temperature,
                clip_ratio_low=a.clip_ratio_low,
                clip_ratio_high=a.clip_ratio_high,
                dual_clip=a.dual_clip,
                importance_weight_T=importance_weight_T,
                ref_logprob_T=m.ref_logprob_T if a.kl_loss_coef else None,
                kl_coef=a.kl_loss_coef,
                kl_kind=a.kl_loss_kind,
                entropy_coef=a.entropy_coef,
                rows_N=m.batch.rows_N,
                **head,
            )

        loss, stats = self.policy(m.batch, fn)
        loss.backward()
        return stats

    def _update_metrics(
        self,
        critic_stats: list[Tensor],
        actor_stats: PPOMetrics | None,
        norms: dict[str, list[Tensor]],
        num_updates: int,
    ) -> dict[str, float]:
        """What is logged of the updates, read from the device when all of them are queued."""
        metrics: dict[str, float] = {}
        if critic_stats:
            loss, clipped, n = dist.sum_over_ranks(torch.stack(critic_stats).sum(0).tolist())
            metrics |= {
                "critic/vf_loss": loss / num_updates,
                "critic/vf_clipfrac": clipped / n,
                "critic/grad_norm": torch.stack(norms["critic"]).mean().item(),
                "critic/lr": self.critic_optimizer.lr,
            }
        if actor_stats is not None:
            host = torch.stack([x.double() for x in actor_stats]).tolist()
            stats = PPOMetrics(*dist.sum_over_ranks(host[:-2]), *host[-2:])
            ratio_max, negative_ratio_min = dist.max_over_ranks([stats.ratio_max, -stats.ratio_min])
            n = stats.num_tokens
            metrics |= {
                "actor/pg_loss": stats.pg_loss / (num_updates * dist.world_size()),
                "actor/entropy": stats.entropy / n,
                "actor/ppo_kl": stats.old_kl / n,
                "actor/pg_clipfrac": (stats.clip_low + stats.clip_high) / n,
                "actor/pg_clipfrac_lower": stats.dual_clip / n,
                "actor/ratio_max": ratio_max,
                "actor/ratio_min": -negative_ratio_min,
                "actor/grad_norm": torch.stack(norms["actor"]).mean().item(),
                "actor/lr": self.actor_optimizer.lr,
            }
            if self.algorithm.kl_loss_coef:
                metrics["actor/kl_loss"] = stats.ref_kl / n
        return metrics


def _gae_backend(device: torch.device) -> Backend:
    """The compiled library, or on a GPU without one the plain definition, by name: packed_gae itself refuses to fall back."""
    cuda = backend_report()["cuda"]
    if device.type == "cuda" and not cuda.loaded:
        log.info("advantages: plain torch, since the CUDA library is missing (%s)", cuda.detail)
        return "torch"
    return "auto"


def _per_sequence(m: MicroBatch, x_T: Tensor) -> Tensor:
    """(S,) f64 sums of x_T over each sequence."""
    S = len(m.batch.lengths)
    sequence_T = torch.arange(S, device=x_T.device).repeat_interleave(m.batch.cu_seqlens.diff(), output_size=len(x_T))
    return torch.zeros(S, dtype=torch.float64, device=x_T.device).index_add(0, sequence_T, x_T.double())


def _along(number_S: Sequence[float], batch: PackedBatch) -> Tensor:
    """(T,) f32 on the host: each sequence's number at all of its positions."""
    return torch.tensor(number_S, dtype=torch.float32).repeat_interleave(torch.tensor(batch.lengths))
