"""What does sharing a GPU cost? Sleep, push and wake of vLLM beside a trainer, the memory freed, and whether the floor grows.

    python bench/bench_colocate.py [--model Qwen2.5-1.5B] [--steps 24] [--response 256] [key=value ...]

Trains a model of a named shape (or `tiny`) with random weights for --steps steps, GRPO with a KL to the reference (policy, its
Adam moments and the reference stay on the GPU), and reads the run's own metrics.jsonl: every number but the copy bandwidth is
one that a user's run logs. Medians over the steps after the second (vLLM compiles, Adam's moments come). Appends to
bench/results/colocate.csv.

  freed       what sleep gave back, of what vLLM took when it was made. Aim on an H200: 95 % at level 2.
  push GB/s   bytes of the weights, read once, over the seconds of push_weights, beside what torch's copy_ of 1 GiB reads and
              writes a second on this device. Aim: 40 % of the latter on one GPU.
  growth      of the least memory of a step, over the last 20 steps. Aim: under 64 MiB.

On a CPU vLLM frees nothing when it sleeps, its load repacks every layer, and its KV cache takes memory as blocks are first
used, which shows as growth: the run shows that the bench works, no more.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import random_model
import torch
from rows import append, origin

EDGES = ("sleep", "free_cache", "wait_ranks", "wake_weights", "push_weights", "wake_kv_cache", "reset_prefix_cache")
PHASES = ("gen", "old_log_prob", "ref", "update_actor", "update_weights")
AIMS = {"freed_share": 0.95, "push_share_of_copy": 0.40, "floor_growth_mib": 64.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen2.5-1.5B")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--response", type=int, default=256, help="mean tokens; the limit is twice that")
    parser.add_argument("--batch", type=int, default=16, help="problems a step, 4 responses each")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    if args.steps < 24:
        raise SystemExit(f"--steps {args.steps}: want at least 24, since growth is over 20 steps and the first ones warm up")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_model.make(args.model, folder / "model", response=args.response, dtype=torch.bfloat16)
        num_bytes = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
        recipe = [
            f"model.path={folder}/model", f"data.train={folder}/model/problems.jsonl", "data.template={problem}",
            "data.max_prompt_length=256", f"rollout.max_response_length={2 * args.response}", "rollout.n=4",
            f"train.batch_size={args.batch}", f"train.mini_batch_size={args.batch}", f"train.steps={args.steps}",
            "algorithm.advantage=grpo", "reward.exploration=none", "train.max_memory_growth_gib=none",
            f"output.dir={folder}/run", "output.save_every=0", "output.rollouts_every=0", "output.loggers=[]", *args.overrides,
        ]  # fmt: skip
        (folder / "recipe.toml").write_text("")
        command = [sys.executable, "-m", "rlsp_fast", "train", str(folder / "recipe.toml"), *recipe]
        subprocess.run(command, check=True)
        steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    row = {**origin(), "model": args.model, "response_tokens": args.response, "steps": len(steps)}
    row |= summarise(steps, num_bytes, copy_bandwidth())
    show(row)
    print("appended to", append("colocate", [row]))


def summarise(steps: list[dict[str, float]], num_bytes: int, copy_gb_s: float) -> dict[str, float]:
    settled = steps[2:]

    def median(name: str) -> float:
        return statistics.median(step.get(name, 0.0) for step in settled)

    engine, freed = settled[-1]["memory/engine_gib"], median("memory/engine_freed_gib")
    push_gb_s = num_bytes / 1e9 / median("timing_s/swap/push_weights")
    return {
        "step_s": round(median("timing_s/step"), 4),
        **{f"{phase}_s": round(median(f"timing_s/{phase}"), 4) for phase in PHASES},
        **{f"swap_{edge}_s": round(median(f"timing_s/swap/{edge}"), 4) for edge in EDGES},
        "tokens_per_s_per_rank": round(median("perf/throughput")),
        "engine_gib": round(engine, 3),
        "freed_gib": round(freed, 3),
        "freed_share": round(freed / engine, 4) if engine > 0 else 0.0,
        "weights_gb": round(num_bytes / 1e9, 3),
        "push_gb_s": round(push_gb_s, 3),
        "copy_gb_s": round(copy_gb_s, 1),
        "push_share_of_copy": round(push_gb_s / copy_gb_s, 4),
        "floor_growth_mib": round(settled[-1]["memory/floor_growth_gib"] * 1024, 1),
        "probs_diff_mean": max(step["training/rollout_probs_diff_mean"] for step in settled),
    }


def copy_bandwidth() -> float:
    """GB/s that copy_ of 1 GiB moves: what it reads and what it writes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / 1e9 / statistics.median(seconds)


def show(row: dict[str, object]) -> None:
    for name, value in row.items():
        print(f"{name:24s}{value!s:>24s}")
    for name, aim in AIMS.items():
        met = row[name] <= aim if name == "floor_growth_mib" else row[name] >= aim
        judged = ("met" if met else "MISSED") if "cpu" not in str(row["torch"]) else "an aim on a GPU, not judged on a CPU"
        print(f"aim: {name} {row[name]} against {aim}: {judged}")


if __name__ == "__main__":
    main()
