"""The main job: evaluate, SFT, evaluate, PPO with RLSP's reward, evaluate. One step of RL reads top to bottom in `rl_step`."""

import importlib.util
import json
import logging
import os
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType

import torch

from rlsp_fast import checkpoint, data, dist, model, sft, sync
from rlsp_fast import log as logs
from rlsp_fast.config import Config, ConfigError, dump, leaf_keys, load
from rlsp_fast.data import Problem
from rlsp_fast.evaluate import Evaluation, evaluate
from rlsp_fast.log import RunLog, Timer, clock
from rlsp_fast.model import Critic, Policy
from rlsp_fast.optim import Optimizer
from rlsp_fast.ppo import PPO, Sample
from rlsp_fast.report import write_report
from rlsp_fast.reward import Scorer
from rlsp_fast.rollout import Engine, Sampling, make_engine
from rlsp_fast.types import Rollout, Score

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the state is saved, the message says where and how to go on."""


# --- the run ----------------------------------------------------------------------------------


def run(config: Config, *, with_sft: bool, with_rl: bool) -> Path:
    """Runs the stages asked for and returns the output folder. Continues a run that was cut short.

    Raises:
        ConfigError, DataError, ModelError, EngineError: before any training, for a user's mistake.
        StaleWeightsError: when the engine does not hold the trained weights.
        Interrupted: after Ctrl-C, with everything saved.
    """
    device = dist.setup()
    logs.setup()
    with _stop_signals() as stop:
        return _Run(config, device, stop, with_sft=with_sft, with_rl=with_rl).go()


class _Run:
    def __init__(self, config: Config, device: torch.device, stop: list[int], *, with_sft: bool, with_rl: bool):
        self.config, self.device, self.stop = config, device, stop
        self.with_rl = with_rl and config.train.steps > 0
        self.with_sft = with_sft and config.wants_sft
        self.folder = Path(config.output.dir)
        self.mesh = dist.mesh(device, config.train.fsdp_shard_size)
        check_ranks(config)
        check_loggers(config)
        self.tokenizer = model.load_tokenizer(config.model.path)
        check_context(config)
        self.sft_path = self.folder / "sft" / "huggingface"
        self.rl_step_done = max(checkpoint.complete(self.folder), default=0)
        self.sft_done = self.with_sft and (self.sft_path / "config.json").exists()
        self._check_folder()

    def go(self) -> Path:
        config = self.config
        train = self._problems(config.data.train, "training") if self.with_rl else []
        held_out = self._problems(config.data.validation, "held-out")
        held_out = held_out[: config.data.validation_size or None]
        demonstrations = self._demonstrations(config.sft.train) if self.with_sft and not self.sft_done else []
        demonstrations_val = self._demonstrations(config.sft.validation) if demonstrations else []
        start_path = str(self.sft_path) if self.sft_done else config.model.path
        needs_engine = self.with_rl or held_out
        policy = model.build(Policy, config.model, start_path, self.device, self.mesh)
        with ExitStack() as stack:
            scorer = stack.enter_context(Scorer(config.reward))
            engine = None
            if needs_engine:
                engine = make_engine(config, start_path, self.tokenizer, self.device)
                stack.callback(engine.close)
            if self.with_sft and not self.sft_done:
                self._evaluate("before SFT", engine, scorer, held_out)
                self._sft(policy, engine, demonstrations, demonstrations_val)
                if engine is not None:
                    sync.push(policy, engine, model.DTYPES[config.model.dtype])
            first = "after SFT" if self.with_sft else "before RL" if self.with_rl else "evaluation"
            if self.rl_step_done == 0:
                self._evaluate(first, engine, scorer, held_out)
            if self.with_rl:
                self._rl(policy, engine, scorer, train, held_out)
        write_report(self.folder, config)
        return self.folder

    # --- preparation --------------------------------------------------------------------------

    def _problems(self, sources: Sequence[str], what: str) -> list[Problem]:
        if not sources:
            return []
        problems, dropped = data.render(data.load_problems(sources, self.config.data), self.tokenizer, self.config.data)
        note = f", {dropped} over data.max_prompt_length = {self.config.data.max_prompt_length} dropped" if dropped else ""
        log.info("%s %s problems%s", f"{len(problems):,}", what, note)
        return problems

    def _demonstrations(self, sources: Sequence[str]) -> list[sft.Tokens]:
        if not sources:
            return []
        found = data.load_demonstrations(sources, self.config.data)
        rendered, dropped = data.render_demonstrations(found, self.tokenizer, self.config.data, self.config.sft.max_length)
        note = f", {dropped} over sft.max_length = {self.config.sft.max_length} dropped" if dropped else ""
        log.info("%s demonstrations%s", f"{len(rendered):,}", note)
        return rendered

    def _check_folder(self) -> None:
        """Refuses or announces a folder with an earlier run in it; writes the resolved config."""
        path = self.folder / "config.toml"
        started = self.rl_step_done or self.sft_done
        if started and self.config.output.resume == "never":
            raise ConfigError(
                f"output.dir = {str(self.folder)!r} already holds a run and output.resume = never: name another folder, "
                f"or set output.resume=auto to continue it"
            )
        if not started and (self.folder / "metrics.jsonl").exists() and not self._sft_steps():
            raise ConfigError(
                f"output.dir = {str(self.folder)!r} holds metrics of a run that left no checkpoint: name another folder or "
                f"remove it"
            )
        if started and path.exists():
            before, now = _leaves(load(str(path))), _leaves(self.config)
            changed = [f"{key}: {before[key]!r} -> {now[key]!r}" for key in now if before[key] != now[key]]
            at = f"step {self.rl_step_done}" if self.rl_step_done else "the SFT checkpoint"
            log.info("continuing %s from %s%s", self.folder, at, "; changed: " + ", ".join(changed) if changed else "")
        dist.barrier()
        if dist.rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(dump(self.config))

    def _sft_steps(self) -> int:
        return max(checkpoint.complete(self.folder / "sft"), default=0)

    # --- stages -------------------------------------------------------------------------------

    def _evaluate(
        self, name: str, engine: Engine | None, scorer: Scorer, problems: list[Problem], step: int = 0
    ) -> Evaluation | None:
        if engine is None or not problems:
            return None
        start = time.perf_counter()
        sampling = self._sampling(n=1, seed=_EVAL_SEED + self.config.train.seed)
        result, rollouts, scores = evaluate(engine, scorer, problems, sampling)
        with RunLog(self.folder, (), {}, 0) as run_log:
            run_log.rollouts(f"eval_{name.replace(' ', '_')}", rollouts, scores)
        if dist.rank() == 0:
            with (self.folder / "eval.jsonl").open("a") as file:
                file.write(json.dumps({"stage": name, "step": step, **asdict(result)}) + "\n")
        log.info(
            "%s: accuracy %.1f %%, %.1f tokens a response, on %d held-out problems (%.0f s)",
            name, 100 * result.accuracy, result.response_length, result.num_problems, time.perf_counter() - start,
        )  # fmt: skip
        return result

    def _sft(self, policy: Policy, engine: Engine | None, train: list[sft.Tokens], validation: list[sft.Tokens]) -> None:
        config, folder = self.config, self.folder / "sft"
        total = sft.num_steps(config, len(train))
        optimizer = Optimizer(policy, config.optim, config.sft.lr, total)
        trained = {"actor": (policy, optimizer)}
        done = self._sft_steps()
        if done:
            checkpoint.load(folder, done, trained)
        if engine is not None:
            engine.sleep()

        def after_step(step: int) -> None:
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

    def _rl(self, policy: Policy, engine: Engine, scorer: Scorer, train: list[Problem], held_out: list[Problem]) -> None:
        config = self.config
        a, t, total = config.algorithm, config.train, config.train.steps
        engine.sleep()  # critic and reference are built where its KV cache was
        ref_path = str(self.sft_path) if self.with_sft else config.model.path
        updates = t.epochs * t.batch_size // t.mini_batch_size
        actor_steps = max(1, total - t.critic_warmup_steps) if a.advantage == "gae" else total
        actor_optimizer = Optimizer(policy, config.optim, config.optim.actor_lr, actor_steps * updates)
        trained = {"actor": (policy, actor_optimizer)}
        critic = critic_optimizer = ref = None
        if a.advantage == "gae":
            critic = model.build(Critic, config.model, ref_path, self.device, self.mesh)
            critic_optimizer = Optimizer(critic, config.optim, config.optim.critic_lr, total * updates)
            trained["critic"] = (critic, critic_optimizer)
        if a.kl_coef or a.kl_loss_coef:
            ref = model.build(Policy, config.model, ref_path, self.device, self.mesh).requires_grad_(False)
        if self.rl_step_done:
            checkpoint.load(self.folder, self.rl_step_done, trained)
        sync.push(policy, engine, model.DTYPES[config.model.dtype])
        ppo = PPO(config, policy, actor_optimizer, critic, critic_optimizer, ref, self.device)
        start = time.perf_counter()
        with RunLog(self.folder, config.output.loggers, _leaves(config), self.rl_step_done) as run_log:
            for step in range(self.rl_step_done, total):
                metrics, rollouts, scores = rl_step(config, step, ppo, engine, scorer, train, self._sampling)
                done, last, stopped = step + 1, step + 1 == total, self._stopped()
                if config.output.eval_every and done % config.output.eval_every == 0 and not last:
                    result = self._evaluate(f"step {done}", engine, scorer, held_out, done)
                    metrics |= result.metrics() if result else {}
                if config.output.rollouts_every and done % config.output.rollouts_every == 0:
                    run_log.rollouts(f"step_{done}", rollouts, scores)
                run_log.write(done, "rl", metrics)
                elapsed = time.perf_counter() - start
                run_log.line(_progress(done, total, elapsed / (done - self.rl_step_done) * (total - done), metrics))
                if last or stopped or (config.output.save_every and done % config.output.save_every == 0):
                    path = checkpoint.save(self.folder, done, trained)
                    checkpoint.export(policy, self.tokenizer, self.folder / "huggingface" / f"step_{done}", config)
                    if stopped and not last:
                        raise Interrupted(_goodbye("RL step", done, total, path))
        if self.rl_step_done < total:
            self._evaluate("after RL", engine, scorer, held_out, total)

    # --- small things -------------------------------------------------------------------------

    def _sampling(self, *, n: int | None = None, seed: int) -> Sampling:
        r = self.config.rollout
        return Sampling(
            n=n or r.n,
            temperature=r.temperature,
            top_p=r.top_p,
            max_tokens=r.max_response_length,
            stop=r.stop,
            seed=seed,
        )

    def _stopped(self) -> bool:
        """Whether any rank was told to stop; every rank learns it at the same step."""
        return dist.max_over_ranks([len(self.stop)])[0] > 0


_EVAL_SEED = 1 << 20  # apart from the seeds of training steps


def rl_step(
    config: Config, step: int, ppo: PPO, engine: Engine, scorer: Scorer, train: Sequence[Problem], sampling: object
) -> tuple[dict[str, float], list[Rollout], list[Score]]:
    """Generate, score, annotate, update, push. Returns metrics of all ranks and this rank's rollouts and scores."""
    timer = Timer()
    start = time.perf_counter()
    t = config.train
    problems = data.batch(train, seed=t.seed, step=step, batch_size=t.batch_size)
    slots = range(dist.rank(), len(problems), dist.world_size())
    scoring: dict[int, Future[Score]] = {}

    with timer("gen"):
        rollouts = engine.generate(
            [problems[i] for i in slots],
            sampling(seed=(t.seed << 24) + step),
            slots=slots,
            on_finish=lambda rollout: scoring.__setitem__(id(rollout), scorer.submit(rollout)),  # overlaps generation
        )
    with timer("reward"):
        scores = [scoring[id(rollout)].result() for rollout in rollouts]
    with timer("pack"):
        mini_batches = ppo.pack(_gather_samples(rollouts, scores, slots, config.rollout.n))
    with timer("sleep"):
        engine.sleep()
    metrics = ppo.annotate(mini_batches, timer)
    if config.rollout.top_p == 1:
        sync.verify(
            metrics["training/rollout_probs_diff_mean"],
            metrics["training/rollout_probs_diff_max"],
            config.rollout.max_probs_diff,
            step + 1,
        )
    train_actor = ppo.critic is None or step >= t.critic_warmup_steps
    metrics |= ppo.update(mini_batches, timer, train_actor=train_actor)
    with timer("update_weights"):
        sync.push(ppo.policy, engine, model.DTYPES[config.model.dtype])
    timer.seconds["step"] = time.perf_counter() - start
    metrics |= timer.metrics() | describe(rollouts, scores, config)
    seconds = timer.seconds["step"]
    metrics["perf/throughput"] = metrics["perf/total_num_tokens"] / seconds / dist.world_size()
    return metrics, rollouts, scores


def _gather_samples(rollouts: Sequence[Rollout], scores: Sequence[Score], slots: Sequence[int], n: int) -> list[Sample]:
    """The samples of all ranks in slot order, the same on every rank."""
    mine = [
        Sample(
            group=slots[i // n],
            prompt_ids=rollout.problem.prompt_ids,
            response_ids=rollout.response_ids,
            rollout_logprob=rollout.rollout_logprob,
            reward=score.reward,
        )
        for i, (rollout, score) in enumerate(zip(rollouts, scores, strict=True))
    ]
    return sorted((s for part in dist.gather_objects(mine) for s in part), key=lambda s: s.group)


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
    longest, peak = dist.max_over_ranks([max(lengths), _peak_memory_gib()])
    return metrics | {"response_length/max": longest, "memory/peak_gib": peak}


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
