"""The main job: evaluate, SFT, evaluate, PPO with RLSP's reward, evaluate. One step of RL reads top to bottom in `rl_step`."""

import importlib.util
import json
import logging
import math
import os
import resource
import shlex
import signal
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Self, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from rlsp_fast import budget, checkpoint, data, decontaminate, dist, judge, model, monitor, sft, sync
from rlsp_fast import log as logs
from rlsp_fast.config import Config, ConfigError, dump, leaf_keys, load
from rlsp_fast.data import Demonstration, Problem
from rlsp_fast.evaluate import Evaluation, evaluate
from rlsp_fast.log import RunLog, Timer, clock
from rlsp_fast.memory import Colocated
from rlsp_fast.model import Critic, Policy
from rlsp_fast.optim import Optimizer
from rlsp_fast.pending import Pending
from rlsp_fast.ppo import PPO, Sample
from rlsp_fast.report import write_report
from rlsp_fast.reward import Scorer, uses_judge
from rlsp_fast.rollout import Sampling, make_engine
from rlsp_fast.types import Group, Rollout, Score

log = logging.getLogger(__name__)

Item = TypeVar("Item", Problem, Demonstration)


class DivergedError(RuntimeError):
    """A loss or a gradient norm that is no number any more."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the state is saved, the message says where and how to go on."""


class AlarmedError(Exception):
    """A detector that may stop the run has found its signature: the state is saved, the message names the evidence."""


# --- the run ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far the run in a folder has come, as its files say; the same on every rank."""

    sft_steps: int
    """Of the newest complete SFT checkpoint; 0 without one."""
    sft_done: bool
    """The SFT stage wrote its Hugging Face folder."""
    rl_steps: int
    """Of the newest complete RL checkpoint; 0 without one."""
    evaluated: frozenset[tuple[str, int]]
    """(stage, step) of each evaluation in eval.jsonl."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        found = cls(
            sft_steps=max(checkpoint.complete(folder / "sft"), default=0),
            sft_done=(folder / "sft" / "huggingface" / "config.json").exists(),
            rl_steps=max(checkpoint.complete(folder), default=0),
            evaluated=frozenset((row["stage"], row["step"]) for row in logs.read_rows(folder / "eval.jsonl")),
        )
        return dist.gather_objects(found)[0]  # rank 0's word, should another node's file system lag

    @property
    def started(self) -> bool:
        return bool(self.sft_steps or self.sft_done or self.rl_steps)


def run(config: Config, *, with_sft: bool, with_rl: bool) -> Path:
    """Runs the stages asked for and returns the output folder. Continues a run that was cut short.

    Without either stage, model.path is evaluated on data.validation, whatever the folder holds.

    Raises:
        ConfigError, DataError, ModelError, EngineError: before any training, for a user's mistake.
        StaleWeightsError: when the engine does not hold the trained weights.
        DivergedError: when a loss or gradient norm is not finite.
        Interrupted: after Ctrl-C, with everything saved.
        AlarmedError: after a detector that stops the run, with everything saved.
    """
    device = dist.setup()
    dist.watch()
    logs.setup()
    if not (with_sft or with_rl):
        return _evaluate_only(config, device)
    with _stop_signals() as stop:
        return _Run(config, device, stop, with_sft=with_sft, with_rl=with_rl).go()


def _evaluate_only(config: Config, device: torch.device) -> Path:
    folder = Path(config.output.dir)
    _make_folder(folder)
    check_context(config)
    config = budget.settle(config, device)
    tokenizer = model.load_tokenizer(config.model.path)
    problems = _problems(config, config.data.validation, "held-out", tokenizer)[: config.data.validation_size or None]
    with Scorer(config.reward) as scorer, closing(make_engine(config, config.model.path, tokenizer, device)) as engine:
        result, rollouts, scores = evaluate(engine, scorer, problems, _sampling(config, n=1, seed=_eval_seed(config)))
    _record(folder, "evaluation", 0, result, rollouts, scores)
    write_report(folder, config)
    return folder


class _Run:
    """The stages of one run. The constructor checks what can be checked before anything is loaded."""

    def __init__(self, config: Config, device: torch.device, stop: list[int], *, with_sft: bool, with_rl: bool):
        self.asked, self.device, self.stop, self.with_rl = config, device, stop, with_rl
        config = self.config = budget.settle(config, device)
        self.folder = Path(config.output.dir)
        self.sft_path = self.folder / "sft" / "huggingface"
        self.mesh = dist.mesh(device, config.train.fsdp_shard_size)
        self.dtype = model.DTYPES[config.model.dtype]
        check_ranks(config)
        check_loggers(config)
        if uses_judge(config.reward):
            judge.load_settings(config.reward.judge)  # refuses what cannot be used
        self.monitors = monitor.load(config.train.monitors)
        if with_rl or config.data.validation:
            check_context(config)
        _make_folder(self.folder)
        config = self.config = budget.learned(config, self.folder)
        self.progress = Progress.read(self.folder)
        self.with_sft = with_sft and config.wants_sft and not self.progress.sft_done
        check_resume(self.asked, self.folder, self.progress)
        self.tokenizer = model.load_tokenizer(config.model.path)

    def go(self) -> Path:
        config, progress = self.config, self.progress
        held_out = _problems(config, config.data.validation, "held-out", self.tokenizer)
        held_out = held_out[: config.data.validation_size or None]
        train = _problems(config, config.data.train, "training", self.tokenizer, held_out) if self.with_rl else []
        demonstrations = self._demonstrations(config.sft.train, held_out) if self.with_sft else []
        demonstrations_val = self._demonstrations(config.sft.validation) if self.with_sft else []
        start_path = str(self.sft_path) if progress.sft_done else config.model.path
        with ExitStack() as stack:
            labeller = stack.enter_context(closing(monitor.labeller(self.monitors)))
            policy = model.build(Policy, config.model, start_path, self.device, self.mesh)
            scorer = stack.enter_context(Scorer(config.reward))
            engine = None
            if self.with_rl or held_out:
                engine = Colocated(
                    lambda: make_engine(config, start_path, self.tokenizer, self.device), config.train.max_memory_growth_gib
                )
                stack.callback(engine.close)
            stack.enter_context(budget.explaining(engine, config, self.device, self.folder))
            if dist.rank() == 0:  # everything loads: from here on this is the run in this folder
                (self.folder / "config.toml").write_text(dump(self.asked))
            if self.with_sft:
                self._evaluate("before SFT", 0, policy, engine, scorer, held_out)
                self._sft(policy, engine, demonstrations, demonstrations_val)
                if engine is not None:
                    sync.push(policy, engine, self.dtype)
            if progress.rl_steps == 0:
                after_sft = self.with_sft or progress.sft_done
                self._evaluate("after SFT" if after_sft else "before RL", 0, policy, engine, scorer, held_out)
            if self.with_rl:
                self._rl(policy, engine, scorer, labeller, train, held_out)
        write_report(self.folder, config)
        return self.folder

    def _demonstrations(self, sources: Sequence[str], held_out: Sequence[Problem] = ()) -> list[sft.Tokens]:
        if not sources:
            return []
        found = data.load_demonstrations(sources, self.config.data)
        found = keep_apart(self.config, "sft.train", found, held_out)
        rendered, dropped = data.render_demonstrations(found, self.tokenizer, self.config.data, self.config.sft.max_length)
        note = f", {dropped} over sft.max_length = {self.config.sft.max_length} dropped" if dropped else ""
        log.info("%s demonstrations%s", f"{len(rendered):,}", note)
        return rendered

    # --- stages -------------------------------------------------------------------------------

    def _evaluate(
        self, name: str, step: int, policy: Policy, engine: Colocated | None, scorer: Scorer, problems: list[Problem]
    ) -> Evaluation | None:
        """Evaluates unless that was done before the run was cut short, and proves that the engine held the policy.

        The engine may sleep afterwards.
        """
        if engine is None or not problems or (name, step) in self.progress.evaluated:
            return None
        sampling = _sampling(self.config, n=1, seed=_eval_seed(self.config))
        result, rollouts, scores = evaluate(engine, scorer, problems, sampling)
        _record(self.folder, name, step, result, rollouts, scores)
        r = self.config.rollout
        if r.top_p == 1 and len(problems) >= dist.world_size():
            engine.sleep()  # a forward has no room beside its KV cache
            most = self.config.train.max_tokens_per_micro_batch
            mean, largest = sync.probability_difference(policy, rollouts, r.temperature, most, self.device)
            sync.verify(mean, largest, probs_limit(self.config), f"evaluation {name}")
        if self._stopped():
            raise Interrupted(f"stopped after the evaluation {name}; it is kept. The same command continues from there")
        return result

    def _sft(self, policy: Policy, engine: Colocated | None, train: list[sft.Tokens], validation: list[sft.Tokens]) -> None:
        config, folder, done = self.config, self.folder / "sft", self.progress.sft_steps
        total = sft.num_steps(config, len(train))
        optimizer = Optimizer(policy, config.optim, config.sft.lr, total)
        trained = {"actor": (policy, optimizer)}
        if done:
            checkpoint.load(folder, done, trained)
        if engine is not None:
            engine.sleep()

        def after_step(step: int, metrics: dict[str, float]) -> None:
            check_finite(metrics, f"SFT step {step}")
            stopped = self._stopped()
            if stopped or (config.output.save_every and step % config.output.save_every == 0 and step < total):
                path = checkpoint.save(folder, step, trained)
                if stopped:
                    raise Interrupted(_goodbye("SFT step", step, total, path))

        with RunLog(folder, config.output.loggers, _leaves(config), done) as run_log:
            sft.train(
                config, policy, optimizer, train, validation, run_log,
                first_step=done, device=self.device, after_step=after_step,
            )  # fmt: skip
        checkpoint.export(policy, self.tokenizer, self.sft_path, config)
        log.info("SFT checkpoint: %s", self.sft_path)

    def _rl(
        self,
        policy: Policy,
        engine: Colocated,
        scorer: Scorer,
        labeller: monitor.Labeller,
        train: list[Problem],
        held_out: list[Problem],
    ) -> None:
        config, first, total = self.config, self.progress.rl_steps, self.config.train.steps
        engine.sleep()  # critic and reference are built where its KV cache was
        ppo, trained = self._build_ppo(policy)
        if first:
            checkpoint.load(self.folder, first, trained)
        engine.offload = budget.offload(config, ppo)
        begun = checkpoint.load_pending(self.folder, first) if first else None
        pending = Pending.restored(begun, train) if begun else Pending()
        sync.push(policy, engine, self.dtype)
        watch = self._watch(first)
        start = time.perf_counter()
        with RunLog(self.folder, config.output.loggers, _leaves(config), first) as run_log:
            for step in range(first, total):
                tokens, had_moments = ppo.token_budget, bool(ppo.actor_optimizer.adamw.state)
                metrics, rollouts, scores = rl_step(config, step, ppo, engine, scorer, labeller, train, pending)
                if not had_moments:  # they come with the policy's first update, and are no growth
                    engine.ledger.floors.clear()
                if ppo.token_budget < tokens:
                    budget.remember(ppo.token_budget, self.folder)
                metrics |= behaviours(rollouts, scores, labeller, self.monitors)
                done, last = step + 1, step + 1 == total
                alarm = self._alarm(watch, done, metrics)
                stopped = self._stopped() or alarm is not None
                if config.output.eval_every and done % config.output.eval_every == 0 and not (last or stopped):
                    result = self._evaluate(f"step {done}", done, policy, engine, scorer, held_out)
                    metrics |= result.metrics() if result else {}
                    if engine.asleep:
                        sync.push(policy, engine, self.dtype)
                if config.output.rollouts_every and done % config.output.rollouts_every == 0:
                    logs.write_rollouts(self.folder, f"step_{done}", rollouts, scores)
                run_log.write(done, "rl", metrics)
                elapsed = time.perf_counter() - start
                run_log.line(_progress(done, total, elapsed / (done - first) * (total - done), metrics))
                if last or stopped or (config.output.save_every and done % config.output.save_every == 0):
                    path = self._save(done, policy, engine, trained, pending)
                    if alarm is not None and not last:
                        raise AlarmedError(f"{alarm.detector}: {_goodbye('RL step', done, total, path)}")
                    if stopped and not last:
                        raise Interrupted(_goodbye("RL step", done, total, path))
        if first >= total:  # a run that was cut short between its last save and its end
            self._export(policy, first)
        self._evaluate("after RL", max(first, total), policy, engine, scorer, held_out)

    def _watch(self, first: int) -> monitor.Monitor:
        """The detectors, told of the steps before `first` as if they had seen them. Rank 0 alone reads them."""
        watch = monitor.Monitor(self.monitors)
        if dist.rank() == 0:
            for row in logs.read_rows(self.folder / "metrics.jsonl"):
                if row["step"] <= first:
                    watch.observe(row)
            self._write_alarms(watch)
        return watch

    def _alarm(self, watch: monitor.Monitor, step: int, metrics: dict[str, float]) -> monitor.Alarm | None:
        """Asks the detectors, warns, and returns the alarm that stops the run, if there is one: the same on every rank."""
        found = watch.observe({"step": step, **metrics}) if dist.rank() == 0 else []
        for alarm in found:
            log.warning("%s at step %d: %s", alarm.detector, alarm.step, alarm.message)
        if found:
            self._write_alarms(watch)
        return dist.gather_objects(next((alarm for alarm in found if alarm.stops), None))[0]

    def _write_alarms(self, watch: monitor.Monitor) -> None:
        """warnings.jsonl follows from metrics.jsonl and the thresholds, so it is written whole."""
        (self.folder / "warnings.jsonl").write_text("".join(json.dumps(asdict(alarm)) + "\n" for alarm in watch.alarms))

    def _build_ppo(self, policy: Policy) -> tuple[PPO, dict[str, tuple[torch.nn.Module, Optimizer]]]:
        """PPO, and what of it a checkpoint holds."""
        config = self.config
        a, t = config.algorithm, config.train
        ref_path = str(self.sft_path) if self.sft_path.exists() else config.model.path
        updates = t.epochs * t.batch_size // t.mini_batch_size
        actor_steps = max(1, t.steps - t.critic_warmup_steps) if a.advantage == "gae" else t.steps
        actor_optimizer = Optimizer(policy, config.optim, config.optim.actor_lr, actor_steps * updates)
        trained = {"actor": (policy, actor_optimizer)}
        critic = critic_optimizer = ref = None
        if a.advantage == "gae":
            critic = model.build(Critic, config.model, ref_path, self.device, self.mesh)
            critic_optimizer = Optimizer(critic, config.optim, config.optim.critic_lr, t.steps * updates)
            trained["critic"] = (critic, critic_optimizer)
        if a.kl_coef or a.kl_loss_coef:
            ref = model.build(Policy, config.model, ref_path, self.device, self.mesh, trained=False)
        return PPO(config, policy, actor_optimizer, critic, critic_optimizer, ref, self.device), trained

    def _save(
        self,
        step: int,
        policy: Policy,
        engine: Colocated,
        trained: dict[str, tuple[torch.nn.Module, Optimizer]],
        pending: Pending,
    ) -> Path:
        """A checkpoint and a Hugging Face folder. Offloaded states must come back to be saved, so the engine sleeps for it."""
        if engine.offload is not None:
            engine.sleep()
        path = checkpoint.save(self.folder, step, trained, pending.state())
        self._export(policy, step)
        if engine.offload is not None:
            sync.push(policy, engine, self.dtype)
        return path

    def _export(self, policy: Policy, step: int) -> None:
        path = self.folder / "huggingface" / f"step_{step}"
        if not (path / "config.json").exists() or self.progress.rl_steps < step:
            checkpoint.export(policy, self.tokenizer, path, self.config)

    def _stopped(self) -> bool:
        """Whether any rank was told to stop; every rank learns it at the same step."""
        return dist.max_over_ranks([len(self.stop)])[0] > 0


# --- one step ---------------------------------------------------------------------------------


def rl_step(
    config: Config,
    step: int,
    ppo: PPO,
    engine: Colocated,
    scorer: Scorer,
    labeller: monitor.Labeller,
    train: Sequence[Problem],
    pending: Pending,
) -> tuple[dict[str, float], list[Rollout], list[Score]]:
    """Generate, score, annotate, update, push. Returns metrics of all ranks and this rank's rollouts and scores.

    pending brings what the step before has left, and takes what this one leaves. The labeller has been told of every response
    and may still be at work. With dynamic sampling, metrics of rewards and lengths are those of everything generated; where
    nothing was kept, the step updates nothing.
    """
    timer = Timer()
    start = time.perf_counter()
    t = config.train
    rollouts, scores, slots, weights, sampled = _sample_problems(config, step, engine, scorer, labeller, train, pending, timer)
    if not weights:
        log.log(
            logging.WARNING if dist.rank() == 0 else logging.INFO,
            "step %d updates nothing: the responses to each of its %d problems are all right or all wrong. Look at "
            "sampling/all_right and sampling/all_wrong; easier or harder problems, or a higher rollout.n, mend it",
            step + 1, sampled["sampling/problems"],
        )  # fmt: skip
        timer.seconds["step"] = time.perf_counter() - start
        metrics = sampled | timer.metrics() | engine.metrics() | describe(rollouts, scores, config)
        metrics["perf/throughput"] = metrics["perf/total_num_tokens"] / timer.seconds["step"] / dist.world_size()
        return metrics, rollouts, scores
    with timer("pack"):
        mini_batches = ppo.pack(_gather_samples(rollouts, scores, slots, config.rollout.n, weights))
    with timer("sleep"):
        engine.sleep()
    metrics = sampled | ppo.annotate(mini_batches, timer)
    if config.rollout.top_p == 1 and "training/rollout_probs_diff_mean" in metrics:  # it may be that all tokens are carried
        sync.verify(
            metrics["training/rollout_probs_diff_mean"],
            metrics["training/rollout_probs_diff_max"],
            probs_limit(config),
            f"step {step + 1}",
        )
    train_actor = ppo.critic is None or step >= t.critic_warmup_steps
    metrics |= ppo.update(mini_batches, timer, train_actor=train_actor)
    check_finite(metrics, f"step {step + 1}")
    with timer("update_weights"):
        sync.push(ppo.policy, engine, model.DTYPES[config.model.dtype])
    timer.seconds["step"] = time.perf_counter() - start
    metrics |= timer.metrics() | engine.metrics() | describe(rollouts, scores, config)
    seconds = timer.seconds["step"]
    metrics["perf/throughput"] = metrics["perf/total_num_tokens"] / seconds / dist.world_size()
    return metrics, rollouts, scores


def _sample_problems(
    config: Config,
    step: int,
    engine: Colocated,
    scorer: Scorer,
    labeller: monitor.Labeller,
    train: Sequence[Problem],
    pending: Pending,
    timer: Timer,
) -> tuple[list[Rollout], list[Score], list[int], dict[int, float], dict[str, float]]:
    """Generates and scores a step's responses, in rounds where rollout.dynamic_sampling = refill.

    The first round's problems are what earlier steps left, then those that every run with this seed has at this step; later
    rounds draw from an order of the step's own, never a problem that the step has tried. A slot counts the problems of a step
    through its rounds.

    Returns:
        This rank's rollouts, scores and slots (one per problem); what each slot to train on counts, the same on every rank;
        counts.
    """
    t, r = config.train, config.rollout
    rollouts: list[Rollout] = []
    scores: list[Score] = []
    num_carries: dict[int, int] = {}  # by slot, of this rank
    num_right: dict[int, int] = {}  # by slot, of all ranks: the correct responses
    chosen = pending.take(train, seed=t.seed, step=step, batch_size=t.batch_size, oversample=r.oversample)
    early = r.oversample > 1 or any(group.num_carries for group in chosen)
    tried: set[int] = set()
    num_slots = 0
    for num_rounds in count(1):
        groups = {num_slots + i: chosen[i] for i in range(dist.rank(), len(chosen), dist.world_size())}
        enough = len(range(dist.rank(), min(t.batch_size, len(chosen)), dist.world_size()))
        taken, left, new_scores = _generate(config, step, engine, scorer, labeller, groups, enough, timer)
        rights = {slot: sum(s.correct for s in new_scores[i * r.n : (i + 1) * r.n]) for i, slot in enumerate(taken)}
        lengths = {g.position: sum(len(x.response_ids) for x in g.responses) / r.n for g in taken.values()}
        parts = dist.gather_objects((rights, lengths, left))
        num_right |= {slot: right for part, _, _ in parts for slot, right in part.items()}
        everyones_left = sorted((slot, group) for _, _, part in parts for slot, group in part.items())
        pending.add([group for _, group in everyones_left], {k: v for _, part, _ in parts for k, v in part.items()}, train)
        rollouts += [rollout for group in taken.values() for rollout in group.responses]
        scores += new_scores
        num_carries |= {slot: group.num_carries for slot, group in taken.items()}
        tried.update(group.position for group in chosen)
        num_slots += len(chosen)
        mixed = sorted(slot for slot, right in num_right.items() if 0 < right < r.n)
        missing = t.batch_size - len(mixed)
        if r.dynamic_sampling != "refill" or missing <= 0 or num_rounds == r.sampling_rounds or len(tried) == len(train):
            break
        # Half as many again as fill the batch if they fare as those before them did: a round costs its longest response.
        wanted = min(t.batch_size, math.ceil(1.5 * missing * len(num_right) / max(len(mixed), 1)))
        order = data.batch(range(len(train)), seed=(t.seed << 24) + step, start=0, size=len(train))
        chosen = pending.begin(train, [i for i in order if i not in tried][:wanted])
    kept = sorted(num_right) if r.dynamic_sampling in ("off", "downweight") else mixed[: t.batch_size]
    less = set(kept).difference(mixed) if r.dynamic_sampling == "downweight" else set()
    weights = {slot: r.sampling_weight if slot in less else 1.0 for slot in kept}
    counts = {
        "sampling/problems": len(num_right),
        "sampling/all_right": sum(right == r.n for right in num_right.values()),
        "sampling/all_wrong": sum(right == 0 for right in num_right.values()),
        "sampling/kept": len(kept),
        "sampling/downweighted": len(less),
        "sampling/rounds": num_rounds,
    }
    metrics = counts if r.n > 1 else {}
    if early:
        metrics = metrics | _carries(num_carries.values(), pending)
    return rollouts, scores, list(num_carries), weights, metrics


def _carries(num_carries: Collection[int], pending: Pending) -> dict[str, float]:
    """How old the groups of all ranks are that the step takes, in steps, and how many it leaves."""
    total, num_groups = dist.sum_over_ranks([sum(num_carries), len(num_carries)])
    (most,) = dist.max_over_ranks([max(num_carries, default=0)])
    return {
        "rollout/carries/mean": total / num_groups,
        "rollout/carries/max": most,
        "rollout/problems_left": len(pending.groups),
    }


def _generate(
    config: Config,
    step: int,
    engine: Colocated,
    scorer: Scorer,
    labeller: monitor.Labeller,
    groups: Mapping[int, Group],
    enough: int,
    timer: Timer,
) -> tuple[dict[int, Group], dict[int, Group], list[Score]]:
    """This rank's groups taken and left, by slot, and what the responses of those taken earned."""
    scoring: dict[int, Future[Score]] = {}

    def finished(rollout: Rollout) -> None:  # overlaps generation
        scoring[id(rollout)] = scorer.submit(rollout)
        labeller.submit(rollout)

    with timer("gen"):
        taken, left = engine.generate_until(
            groups,
            _sampling(config, n=config.rollout.n, seed=(config.train.seed << 24) + step),
            enough=enough,
            on_finish=finished,
        )
    with timer("reward"):
        return taken, left, [scoring[id(r)].result() for group in taken.values() for r in group.responses]


def _gather_samples(
    rollouts: Sequence[Rollout], scores: Sequence[Score], slots: Sequence[int], n: int, weights: Mapping[int, float]
) -> list[Sample]:
    """The samples of all ranks in slot order, the same on every rank; of the slots that have a weight."""
    mine = [
        Sample(
            group=slot,
            prompt_ids=rollout.problem.prompt_ids,
            response_ids=rollout.response_ids,
            rollout_logprob=rollout.rollout_logprob,
            num_carried=rollout.num_carried,
            reward=score.reward,
            weight=weights[slot],
        )
        for slot, rollout, score in zip([slot for slot in slots for _ in range(n)], rollouts, scores, strict=True)
        if slot in weights
    ]
    return sorted([s for part in dist.gather_objects(mine) for s in part], key=lambda s: s.group)


def describe(rollouts: Sequence[Rollout], scores: Sequence[Score], config: Config) -> dict[str, float]:
    """What was generated and what it earned, over all ranks."""
    verdicts = ("correct", "wrong", "no_answer", "timeout", "error")
    lengths = [len(r.response_ids) for r in rollouts]
    sums = {
        "n": len(rollouts),
        "critic/score/mean": sum(s.reward for s in scores),
        "reward/outcome": sum(s.outcome for s in scores),
        "reward/exploration": sum(s.exploration for s in scores),
        "reward/accuracy": sum(s.correct for s in scores),
        "response_length/mean": sum(lengths),
        "response_length/clip_ratio": sum(r.finish == "length" for r in rollouts),
        "prompt_length/mean": sum(len(r.problem.prompt_ids) for r in rollouts),
    }
    sums |= {f"verifier/{v}": sum(s.verdict == v for s in scores) for v in verdicts}
    extra = sorted({name for part in dist.gather_objects(sorted({k for s in scores for k in s.extra})) for name in part})
    sums |= {f"reward/{name}": sum(s.extra.get(name, 0.0) for s in scores) for name in extra}
    total = dict(zip(sums, dist.sum_over_ranks(sums.values()), strict=True))
    n = total.pop("n")
    metrics = {name: value / n for name, value in total.items()}
    metrics["perf/total_num_tokens"] = total["response_length/mean"] + total["prompt_length/mean"]
    longest, peak = dist.max_over_ranks([max(lengths, default=0), _peak_memory_gib()])
    return metrics | {"response_length/max": longest, "memory/peak_gib": peak}


def behaviours(
    rollouts: Sequence[Rollout], scores: Sequence[Score], labeller: monitor.Labeller, monitors: monitor.Settings
) -> dict[str, float]:
    """How the responses of all ranks were thought out, as far as their text shows it, and the seconds that this waited for."""
    timer = Timer()
    with timer("behaviours"):
        labels = labeller.collect(rollouts)
    sums = monitor.tally(labels, [r.response_ids for r in rollouts], [s.correct for s in scores], monitors)
    return timer.metrics() | monitor.rates(dict(zip(sums, dist.sum_over_ranks(sums.values()), strict=True)))


def _peak_memory_gib() -> float:
    """Most memory this rank ever held: the GPU's where there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _progress(done: int, total: int, left: float, m: dict[str, float]) -> str:
    kl = f" · kl {m['actor/ref_kl']:.4f}" if "actor/ref_kl" in m else ""
    return (
        f"step {done}/{total} · {clock(left)} left · reward {m['critic/score/mean']:+.3f} · "
        f"accuracy {100 * m['reward/accuracy']:.1f} % · length {m['response_length/mean']:.1f}{kl} · "
        f"{m['perf/throughput'] * dist.world_size():,.0f} tok/s"
    )


def check_finite(metrics: dict[str, float], where: str) -> None:
    """Refuses to go on, and to save, when a number of the update is NaN or infinite."""
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise DivergedError(
            f"{where}: {', '.join(f'{name} = {metrics[name]}' for name in bad)}. Nothing of this step is saved; lower the "
            f"learning rate, or look at rollouts/ for what the policy produced"
        )


def check_resume(config: Config, folder: Path, progress: Progress) -> None:
    """Refuses what cannot be continued; says what is continued, and what has changed."""
    if not progress.started:
        if logs.read_rows(folder / "metrics.jsonl"):
            log.info("%s holds a run that left no checkpoint: it starts anew", folder)
        return
    if config.output.resume == "never":
        raise ConfigError(
            f"output.dir = {str(folder)!r} already holds a run and output.resume = never: name another folder, or set "
            f"output.resume=auto to continue it"
        )
    path = folder / "config.toml"
    before, now = _leaves(load(str(path))) if path.exists() else _leaves(config), _leaves(config)
    changed = [key for key in now if before[key] != now[key]]
    for key in ("model.path", "algorithm.advantage"):
        if key in changed:
            raise ConfigError(
                f"{key} = {now[key]!r}, but the run in output.dir = {str(folder)!r} began with {before[key]!r}: name another "
                f"folder, or change it back"
            )
    at = f"RL step {progress.rl_steps}" if progress.rl_steps else f"SFT step {progress.sft_steps}"
    at = "the SFT checkpoint" if progress.sft_done and not progress.rl_steps else at
    note = "".join(f"; {key}: {before[key]!r} -> {now[key]!r}" for key in changed)
    log.info("continuing %s from %s%s", folder, at, note)


def check_ranks(config: Config) -> None:
    """Refuses a mini-batch with fewer responses than ranks."""
    responses = config.train.mini_batch_size * config.rollout.n
    if config.train.steps and responses < dist.world_size():
        raise ConfigError(
            f"train.mini_batch_size * rollout.n = {responses} responses cannot be spread over {dist.world_size()} ranks: raise "
            f"train.mini_batch_size or start fewer ranks"
        )
    if config.train.steps and config.train.batch_size < dist.world_size():
        raise ConfigError(
            f"train.batch_size = {config.train.batch_size} problems for {dist.world_size()} ranks: each rank generates for at "
            f"least one; raise it or start fewer ranks"
        )


def check_loggers(config: Config) -> None:
    """Refuses a logger whose package is missing."""
    for name in config.output.loggers or ():
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"output.loggers names {name}, which is not installed: pip install {name}")


def check_context(config: Config) -> None:
    """Refuses prompts and responses that the model's context cannot hold."""
    context = getattr(model.load_config(config.model.path), "max_position_embeddings", None)
    wanted = config.data.max_prompt_length + config.rollout.max_response_length
    if context is not None and wanted > context:
        raise ConfigError(
            f"data.max_prompt_length + rollout.max_response_length = {wanted} tokens, but the context of "
            f"{config.model.path} is {context}: lower one of them"
        )


def keep_apart(config: Config, key: str, items: list[Item], held_out: Sequence[Problem]) -> list[Item]:
    """What may be trained on, as data.overlap says: refuses, or leaves out, what overlaps a held-out problem."""
    if config.data.overlap == "allow" or not held_out:
        return items
    start = time.perf_counter()
    end = "\n" + config.data.instruction  # the same on both sides, so it says nothing
    texts = [[p.messages[-1]["content"].removesuffix(end) for p in part] for part in (items, held_out)]
    found = dist.gather_objects(decontaminate.find(*texts) if dist.rank() == 0 else [])[0]
    if not found:
        return items
    if config.data.overlap == "drop":
        log.info(
            "%s: %s of %s left out, since they overlap data.validation (%.1f s)",
            key, f"{len(found):,}", f"{len(items):,}", time.perf_counter() - start,
        )  # fmt: skip
        gone = {o.train for o in found}
        if len(gone) == len(items):
            raise ConfigError(f"{key}: all of its {len(items):,} problems overlap data.validation, so none would be left")
        return [item for i, item in enumerate(items) if i not in gone]
    first = min(found, key=lambda o: (-o.share, o.train))
    mine, theirs = items[first.train], held_out[first.evaluation]
    sources = shlex.join(config.sft.train if key == "sft.train" else config.data.train)
    raise ConfigError(
        f"{key}: {len(found):,} of {len(items):,} problems overlap data.validation, so its accuracy would say nothing about "
        f"new problems. {mine.source} index {mine.index}, {texts[0][first.train][:80]!r}, and {theirs.source} index "
        f"{theirs.index}, {texts[1][first.evaluation][:80]!r}: {first.why}, {100 * first.share:.0f} %. Take them out with "
        f"`rlsp data decontaminate {sources} --against {shlex.join(config.data.validation)} --out clean.jsonl`, or set "
        f"data.overlap=drop (leave them out of this run) or data.overlap=allow (train on them)"
    )


def probs_limit(config: Config) -> float:
    """rollout.max_probs_diff, or what rounding in model.dtype explains with room to spare."""
    return config.rollout.max_probs_diff or {"float32": 1e-3, "bfloat16": 2e-2}[config.model.dtype]


def _problems(
    config: Config, sources: Sequence[str], what: str, tokenizer: PreTrainedTokenizerBase, held_out: Sequence[Problem] = ()
) -> list[Problem]:
    if not sources:
        return []
    found = keep_apart(config, "data.train", data.load_problems(sources, config.data), held_out)
    problems, dropped = data.render(found, tokenizer, config.data)
    note = f", {dropped} over data.max_prompt_length = {config.data.max_prompt_length} dropped" if dropped else ""
    log.info("%s %s problems%s", f"{len(problems):,}", what, note)
    return problems


def _sampling(config: Config, *, n: int, seed: int) -> Sampling:
    r = config.rollout
    return Sampling(n=n, temperature=r.temperature, top_p=r.top_p, max_tokens=r.max_response_length, stop=r.stop, seed=seed)


def _eval_seed(config: Config) -> int:
    """Apart from the seeds of training steps."""
    return (1 << 20) + config.train.seed


def _record(
    folder: Path, name: str, step: int, result: Evaluation, rollouts: Sequence[Rollout], scores: Sequence[Score]
) -> None:
    """Writes an evaluation to eval.jsonl and its responses to rollouts/, and says it."""
    logs.write_rollouts(folder, f"eval_{name.replace(' ', '_')}", rollouts, scores)
    if dist.rank() == 0:
        path = folder / "eval.jsonl"
        rows = [*logs.read_rows(path), {"stage": name, "step": step, **asdict(result)}]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))  # whole: a kill may have left half a line
    log.info(
        "%s: accuracy %.1f %%, %.1f tokens a response, on %d held-out problems",
        name, 100 * result.accuracy, result.response_length, result.num_problems,
    )  # fmt: skip


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output.dir = {str(folder)!r} cannot be made: {error.strerror}") from None


def _leaves(config: Config) -> dict[str, object]:
    return {key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) for key in leaf_keys()}


def _goodbye(what: str, done: int, total: int, path: Path) -> str:
    return f"stopped after {what} {done} of {total}; saved in {path}. The same command continues from there"


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM: the first ends the run after the current step, the second at once."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            os._exit(128 + number)
        if dist.rank() == 0:
            logs.console.print("stopping after this step; once more to stop at once, losing the steps since the last save")

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
