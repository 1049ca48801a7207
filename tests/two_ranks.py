"""What test_ranks.py runs under torchrun on two ranks, and itself on one: the same global batches, results as JSON.

Run as: torchrun --nproc-per-node 2 tests/two_ranks.py POLICY REFERENCE FOLDER
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import tiny
import torch

from rlsp_fast import checkpoint, dist, model, sft, sync
from rlsp_fast.config import Config
from rlsp_fast.log import RunLog, Timer
from rlsp_fast.model import Critic, Policy
from rlsp_fast.optim import Optimizer
from rlsp_fast.ppo import PPO

ALGORITHM = {"kl_coef": 0.1, "kl_loss_coef": 0.05, "tis_cap": 2.0, "entropy_coef": 0.01, "value_clip": 0.01}
TRAIN = {"batch_size": 4, "mini_batch_size": 2, "epochs": 2, "max_tokens_per_micro_batch": 48}
SCENARIOS = {
    "ppo": {},
    "grpo": {"algorithm": ALGORITHM | {"advantage": "grpo", "loss_aggregation": "sequence_mean"}},
    "grpo with idle micro-batches": {
        "algorithm": ALGORITHM | {"advantage": "grpo"},
        "train": TRAIN | {"mini_batch_size": 1, "max_tokens_per_micro_batch": 24},
    },
    "idle micro-batches": {"train": TRAIN | {"mini_batch_size": 1, "max_tokens_per_micro_batch": 24}},
    "more ranks than responses": {"rollout": {"n": 1}, "train": TRAIN | {"mini_batch_size": 1}},
    "activation checkpointing": {"model": {"activation_checkpointing": True}},
    "down-weighted problems": {
        "rollout": {"n": 3, "dynamic_sampling": "downweight"},
        "algorithm": ALGORITHM | {"loss_aggregation": "sequence_mean"},
        "train": TRAIN | {"mini_batch_size": 1, "max_tokens_per_micro_batch": 24},
    },
    "hsdp": {"train": TRAIN | {"fsdp_shard_size": 1}},
}


def recipe(path: str, sections: dict) -> Config:
    base = {"rollout": {"n": 3}, "algorithm": ALGORITHM, "train": TRAIN, "optim": {"weight_decay": 0.01}}
    return tiny.recipe(path, **(base | sections))


def build(config: Config, paths: tuple[str, str], device: torch.device) -> tuple[PPO, dict]:
    """PPO and what a checkpoint of it holds. On one rank nothing is sharded, whatever the recipe says."""
    mesh = dist.mesh(device, config.train.fsdp_shard_size)
    policy = model.build(Policy, config.model, paths[0], device, mesh)
    ref = model.build(Policy, config.model, paths[1], device, mesh, trained=False)
    actor_optimizer = Optimizer(policy, config.optim, config.optim.actor_lr, 20)
    trained = {"actor": (policy, actor_optimizer)}
    critic = critic_optimizer = None
    if config.algorithm.advantage == "gae":
        critic = model.build(Critic, config.model, paths[0], device, mesh)
        critic_optimizer = Optimizer(critic, config.optim, config.optim.critic_lr, 20)
        trained["critic"] = (critic, critic_optimizer)
    return PPO(config, policy, actor_optimizer, critic, critic_optimizer, ref, device), trained


def step(ppo: PPO, seed: int) -> dict[str, float]:
    """annotate and update on a fixed global batch. Adds how many micro-batches were idle and this rank's share of a weight."""
    rollout = ppo.config.rollout
    samples = tiny.samples(4, n=rollout.n, seed=seed)
    if rollout.dynamic_sampling == "downweight":
        samples = [replace(s, weight=rollout.sampling_weight if s.group % 2 else 1.0) for s in samples]
    mini_batches = ppo.pack(samples)
    metrics = ppo.annotate(mini_batches, Timer())
    metrics |= ppo.update(mini_batches, Timer(), train_actor=True)
    idle = sum(not m.batch.mask_T.any() for part in mini_batches for m in part)
    embedding = ppo.policy.lm.model.embed_tokens.weight
    share = embedding.to_local().numel() / embedding.numel()
    return metrics | {"idle": sum(dist.gather_objects(int(idle))), "share": share}


def train(scenario: str, paths: tuple[str, str], device: torch.device) -> list[dict[str, float]]:
    """The metrics of two steps, and those of annotating a third batch with what was learned."""
    ppo, _ = build(recipe(paths[0], SCENARIOS[scenario]), paths, device)
    rows = [step(ppo, seed) for seed in (0, 1)]
    third = ppo.pack(tiny.samples(4, n=ppo.config.rollout.n, seed=2))
    return [*rows, ppo.annotate(third, Timer())]


def train_sft(paths: tuple[str, str], folder: Path, device: torch.device) -> list[dict[str, float]]:
    """The metrics of three SFT steps of five demonstrations."""
    config = recipe(paths[0], {"sft": {"train": ["unused.jsonl"], "steps": 3, "batch_size": 5, "max_length": 48}})
    policy = model.build(Policy, config.model, paths[0], device, dist.mesh(device))
    optimizer = Optimizer(policy, config.optim, 1e-3, 3)
    pairs = [(s.prompt_ids, s.response_ids) for s in tiny.samples(12, seed=4)]
    with RunLog(folder, (), {}, 0) as log:
        sft.train(config, policy, optimizer, pairs[:9], pairs[9:], log, first_step=0, device=device,
                  after_step=lambda *_: None)  # fmt: skip
    dist.barrier()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def resume(paths: tuple[str, str], folder: Path, device: torch.device) -> list[dict[str, float]]:
    """A step from the checkpoint of step 1 in folder; checkpoint, export and push of the result; another step."""
    config = recipe(paths[0], {})
    ppo, trained = build(config, paths, device)
    checkpoint.load(folder, 1, trained)
    rows = [step(ppo, seed=1)]
    checkpoint.save(folder, 2, trained)
    checkpoint.export(ppo.policy, tiny.tokenizer(), folder / "exported", config)
    pushed = dict(sync.full_weights(ppo.policy, torch.float32))
    if dist.rank() == 0:
        torch.save(pushed, folder / "pushed.pt")
    return [*rows, step(ppo, seed=2)]


def main() -> None:
    *paths, folder = sys.argv[1:]
    folder = Path(folder)
    device = dist.setup(timeout_s=120)  # a rank that waits for a collective the other never joins fails, not hangs
    torch.set_num_threads(1)
    results = {scenario: train(scenario, tuple(paths), device) for scenario in SCENARIOS}
    results["sft"] = train_sft(tuple(paths), folder / "sft", device)
    results["resume"] = resume(tuple(paths), folder, device)
    if dist.rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.cleanup()


if __name__ == "__main__":
    main()
