"""A run's memory on this machine: what `auto` becomes, what goes to the host, and what is said when memory runs out."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from rlsp_fast import dist, plan, shapes
from rlsp_fast.config import Config
from rlsp_fast.memory import Colocated, DeviceMemoryError, Offload, measure, ran_out, table
from rlsp_fast.ppo import PPO, MicroBatchMemoryError

log = logging.getLogger(__name__)

AUTO = ("rollout.kv_cache_gib", "train.max_tokens_per_micro_batch", "train.offload")
"""Settings that the plan chooses where they are `auto`."""
LEARNED = "token_budget.json"


def settle(config: Config, device: torch.device) -> Config:
    """The config with a number for every setting that is `auto`, by the plan for this machine; says what was chosen.

    Where the plan finds that a run does not fit, it says so and goes on: the plan's constants are assumed, not measured.
    """
    on_gpu = device.type == "cuda"
    asked = [name for name in AUTO if _value(config, name) == "auto" and (on_gpu or name != "train.offload")]
    if not on_gpu:
        settled, why = plan.settle_without_gpu(config), "no GPU to plan for"
    else:
        gpu, memory = _gpu(device)
        least = -int(dist.max_over_ranks([-memory])[0])
        job = _job(config, gpu, least)
        settled, why = job.config, f"rlsp plan for {dist.world_size()} x {job.gpu.name} of {least / plan.GIB:.1f} GiB"
        if plan.named(gpu) is None:
            log.info("rlsp plan does not know %s: its seconds are %s's", gpu, job.gpu.name)
        if not plan.fits(job):
            highest = plan.peak(job)
            log.warning(
                "the plan expects %.1f GiB in %s, of %.1f: %s",
                highest.total / plan.GIB, highest.name, job.budget / plan.GIB, _advice(job),
            )  # fmt: skip
    if asked:
        log.info("%s (%s)", ", ".join(f"{name} = {_said(_value(settled, name))}" for name in asked), why)
    return settled


def _value(config: Config, name: str) -> object:
    section, key = name.split(".")
    return getattr(getattr(config, section), key)


def _said(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(value) or "nothing"
    return "vLLM's own" if value is None else f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"


def _gpu(device: torch.device) -> tuple[str, int]:
    """Name and bytes."""
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.total_memory


def _job(config: Config, gpu: str, memory: int) -> plan.Job:
    """This run's, on GPUs of so many bytes."""
    num_nodes = max(1, dist.world_size() // int(os.environ.get("LOCAL_WORLD_SIZE", dist.world_size())))
    return plan.make_job(
        config,
        shapes.read(config.model.path),
        gpu=plan.named(gpu) or "H100",
        num_gpus=dist.world_size() // num_nodes,
        num_nodes=num_nodes,
        memory=memory,
    )


def advice(config: Config, device: torch.device) -> str:
    """What makes room, as far as the plan can tell. Asks no other rank: one alone may have run out."""
    if device.type != "cuda":
        return "lower train.max_tokens_per_micro_batch or rollout.kv_cache_gib"
    return _advice(_job(config, *_gpu(device)))


def _advice(job: plan.Job) -> str:
    if plan.fits(job):
        return (
            "the plan expected it to fit: lower rollout.kv_cache_gib or train.max_tokens_per_micro_batch, and look at what "
            "else runs on this GPU"
        )
    change = plan.cheapest_change(job)
    return f"`rlsp plan` finds {' '.join(change.words)}" if change else "no change that `rlsp plan` knows makes it fit"


def learned(config: Config, folder: Path) -> Config:
    """The config with the budget of tokens to which a run in this folder came down, when it ran out of memory; says so."""
    path = folder / LEARNED
    found = json.loads(path.read_text()) if path.exists() else None
    found = dist.gather_objects(found)[0]  # rank 0's word, should another node's file system lag
    if found is None or found["max_tokens_per_micro_batch"] >= config.train.max_tokens_per_micro_batch:
        return config
    tokens = found["max_tokens_per_micro_batch"]
    log.info(
        "train.max_tokens_per_micro_batch = %s, since more ran out of memory here; remove %s to forget it", f"{tokens:,}", path
    )
    return config.model_copy(update={"train": config.train.model_copy(update={"max_tokens_per_micro_batch": tokens})})


def remember(tokens: int, folder: Path) -> None:
    """Keeps a budget for the runs that go on in this folder."""
    partial = folder / f"{LEARNED}.{dist.rank()}"
    partial.write_text(json.dumps({"max_tokens_per_micro_batch": tokens}) + "\n")
    partial.rename(folder / LEARNED)


@contextmanager
def explaining(engine: Colocated | None, config: Config, device: torch.device, folder: Path) -> Iterator[None]:
    """Memory that runs out in here ends the run with the step's ledger and what the plan would change.

    A micro-batch that ran out leaves half of its tokens as the budget with which the same command continues.

    Raises:
        DeviceMemoryError: instead of the allocator's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not ran_out(error):
            raise
        entries = engine.ledger.entries if engine is not None else []
        where = f"after {entries[-1].edge}" if entries else "outside of a step"
        said = str(error).splitlines()[0][:300].removeprefix("out of memory: ")
        way = f"{advice(config, device)}. The same command continues from the last checkpoint"
        if isinstance(error, MicroBatchMemoryError):
            remember(error.budget, folder)
            way = f"The same command continues from the last checkpoint, with micro-batches of {error.budget:,} tokens"
        raise DeviceMemoryError(f"out of memory {where}: {said}\n{table([*entries, measure('now')])}\n{way}") from error


def offload(config: Config, ppo: PPO) -> Offload | None:
    """What train.offload names, to be moved; None when it names nothing."""
    optimizers = [optimizer for optimizer in (ppo.actor_optimizer, ppo.critic_optimizer) if optimizer is not None]
    models = {"critic": ppo.critic, "reference": ppo.ref}

    def states() -> Iterator[Tensor]:
        for name in config.train.offload:
            if name == "adam":
                for optimizer in optimizers:
                    yield from optimizer.moments()
            elif models[name] is not None:
                models[name].reshard()
                yield from models[name].parameters()

    return Offload(states) if config.train.offload else None
