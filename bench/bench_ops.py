"""Inside training: how much of a step is matrix products, how much attention, and what is the rest?

    python bench/bench_ops.py [--steps 3] [--sequences 256]

Annotates and updates the demo's policy and critic on sequences of the demo's lengths under torch.profiler, and groups operators
by what they do: self time on the CPU, or on the GPU where there is one. What a phase's range has for itself is Python's on a
CPU; on a GPU it is no kernel and left out. The largest of the rest are named. Appends a row an operator to
bench/results/ops.csv.
"""

import argparse
import random
import tempfile
from pathlib import Path

import torch
from bench_step import PHASES
from rows import append, origin
from torch.profiler import ProfilerActivity, profile

from rlsp_fast import config, demo, dist, model
from rlsp_fast.log import Timer
from rlsp_fast.optim import Optimizer
from rlsp_fast.ppo import PPO, Sample

PYTHON = "Python between operators"
GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "optimizer": ("aten::_fused_adamw", "aten::_foreach"),
    PYTHON: (PYTHON,),
    "FSDP": ("fsdp::", "c10d::", "gloo:", "nccl:", "aten::split_with_sizes_copy", "aten::_chunk_cat"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=256)
    args = parser.parse_args()
    device = dist.setup()
    ppo, samples = build(args.sequences, device)
    step(ppo, samples)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiled:
        for _ in range(args.steps):
            step(ppo, samples)
    kind = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    seconds = {event.key: getattr(event, kind) / 1e6 for event in profiled.key_averages()}
    python = sum(seconds.pop(phase, 0.0) for phase in PHASES)
    if device.type != "cuda":
        seconds[PYTHON] = python
    rows = summarise(seconds)
    for row in rows:
        print(f"{row['share']:>7.1%}  {row['seconds'] / args.steps:8.3f} s  {row['group']:18s} {row['operator']}")
    print("appended to", append("ops", [{**origin(), **row} for row in rows]))
    dist.cleanup()


def build(num_sequences: int, device: torch.device) -> tuple[PPO, list[Sample]]:
    with tempfile.TemporaryDirectory() as folder:
        settings = config.load("demo", [f"model.path={folder}/start"])
        demo.prepare(Path(folder), settings)
        mesh = dist.mesh(device)
        policy = model.build(model.Policy, settings.model, settings.model.path, device, mesh)
        critic = model.build(model.Critic, settings.model, settings.model.path, device, mesh)
        ref = model.build(model.Policy, settings.model, settings.model.path, device, mesh, trained=False)
    actor_optimizer = Optimizer(policy, settings.optim, settings.optim.actor_lr, 100)
    critic_optimizer = Optimizer(critic, settings.optim, settings.optim.critic_lr, 100)
    rng = random.Random(0)
    samples = []
    for i in range(num_sequences):
        prompt, response = (tuple(rng.randrange(3, 290) for _ in range(n)) for n in (rng.randint(13, 18), rng.choice((7, 36))))
        logprobs = tuple(-rng.random() for _ in response)
        samples.append(
            Sample(group=i // 4, prompt_ids=prompt, response_ids=response, rollout_logprob=logprobs, reward=rng.random())
        )
    return PPO(settings, policy, actor_optimizer, critic, critic_optimizer, ref, device), samples


def step(ppo: PPO, samples: list[Sample]) -> None:
    timer = Timer()
    mini_batches = ppo.pack(samples)
    ppo.annotate(mini_batches, timer)
    ppo.update(mini_batches, timer, train_actor=True)


def summarise(seconds: dict[str, float]) -> list[dict[str, object]]:
    """One row a group, then the ten largest operators of the rest."""
    total = sum(seconds.values())
    groups = dict.fromkeys([g for g in GROUPS if g != PYTHON or PYTHON in seconds] + ["the rest"], 0.0)
    rest = {}
    for name, spent in seconds.items():
        group = next((g for g, parts in GROUPS.items() if any(part in name for part in parts)), "the rest")
        groups[group] += spent
        if group == "the rest":
            rest[name] = spent
    rows = [{"group": g, "operator": "", "seconds": round(t, 4), "share": round(t / total, 4)} for g, t in groups.items()]
    for name, spent in sorted(rest.items(), key=lambda item: -item[1])[:10]:
        rows.append({"group": "of the rest", "operator": name, "seconds": round(spent, 4), "share": round(spent / total, 4)})
    return rows


if __name__ == "__main__":
    main()
