"""How long is one RL step of a recipe, and where does the time go? With vLLM and with the transformers engine.

    python bench/bench_step.py [--recipe demo] [--engines vllm transformers] [--steps 6] [--rounds 2] [key=value ...]
    python bench/bench_step.py --architecture Llama-3.1-8B --response 1024 rollout.max_response_length=4096 --idle [--json FILE]

Each engine trains the recipe's model for a few steps in a process of its own, in turns (a busy machine slows both); the first
step of a process is left out (vLLM compiles in it). The demo's model is used as it was made, untrained, so that both engines
generate the same number of tokens: every response runs to the length limit. Prints seconds per phase and appends rows to
bench/results/step.csv. `other` is what no phase covers. --architecture takes random weights at full size instead, prompts with
GSM8K's lengths and responses that end with the same chance at every token, about --response long (bench/random_model.py).

On a GPU that rlsp_fast.plan has a data sheet of, two shares of its peaks:
    train_mfu    FLOPs of forward and backward of policy and critic, three forwards each (recomputing does not count, nor does
                 the output projection of prompts; attention's as if all lengths were the mean, too few where they spread),
                 over the seconds of update_critic and update_actor and the peak of bf16 matrix products
    decode_mbu   bytes that decoding cannot do without (the weights once a token of the longest response, and every sequence's
                 keys and values once for each of its tokens), over the seconds of gen and the peak memory bandwidth
--idle profiles one more step with torch.profiler: idle_share is the part of its phases in which the device had nothing to do.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import random_model
import read_profile
import torch
from rows import append, origin

from rlsp_fast import budget, config, demo, plan, shapes

PHASES = (
    "gen", "reward", "pack", "sleep", "old_log_prob", "ref", "values", "adv", "update_critic", "update_actor",
    "update_weights",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--engines", nargs="+", default=["vllm", "transformers"], choices=("vllm", "transformers"))
    parser.add_argument("--architecture", help="random weights of this name (tiny, Llama-3.1-8B, ...)")
    parser.add_argument(
        "--response", type=int, default=256, help="with --architecture: mean tokens of a response; 0: all to the limit"
    )
    parser.add_argument("--idle", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the rows here, with every step's metrics and the environment")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    measured: dict[str, list[dict[str, float]]] = {engine: [] for engine in args.engines}
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*materials(args, Path(folder)), *args.overrides]
        asked = config.load(args.recipe, overrides)
        job = plan.make_job(asked, shapes.read(asked.model.path), gpu=gpu() or "H100", num_gpus=1)
        for _ in range(args.rounds):
            for engine in args.engines:
                measured[engine] += steps(args, engine, overrides, Path(folder))[1:]
        idle = {engine: idle_share(args, engine, overrides, Path(folder)) if args.idle else "" for engine in args.engines}
    rows = [summarise(args, engine, found, job, idle[engine]) for engine, found in measured.items()]
    show(rows)
    if args.json:
        environment = {"python": platform.python_version(), "platform": platform.platform(), "command": sys.argv}
        args.json.write_text(json.dumps({"environment": environment, "rows": rows, "steps": measured}, indent=2))
    print("appended to", append("step", rows))


def materials(args: argparse.Namespace, folder: Path) -> list[str]:
    """Overrides that name the model and the problems, made in folder; none where the recipe has its own."""
    if args.architecture:
        dtype = config.load(args.recipe, args.overrides).model.dtype
        random_model.make(args.architecture, folder / "model", response=args.response, dtype=getattr(torch, dtype))
        longest = max(len(json.loads(line)["problem"].split()) for line in (folder / "model" / "problems.jsonl").open())
        return [
            f"model.path={folder}/model", f"data.train={folder}/model/problems.jsonl", "data.template={problem}",
            f"data.max_prompt_length={longest}",
        ]  # fmt: skip
    if args.recipe == "demo":
        demo.prepare(folder, config.load("demo", [f"model.path={folder}/start"]))
        return [f"model.path={folder}/start", f"data.train={folder}/problems.jsonl"]
    return []


def steps(args: argparse.Namespace, engine: str, overrides: Sequence[str], folder: Path) -> list[dict[str, float]]:
    """Metrics of each step of a short run with this engine."""
    command = [sys.executable, "-m", "rlsp_fast", "train", args.recipe]
    run(command, [*fixed(engine, folder), f"train.steps={args.steps}", *overrides])
    if (folder / "run" / budget.LEARNED).exists():  # its rows would say other settings than it ran with
        raise SystemExit(f"a micro-batch ran out of memory and was halved: lower train.max_tokens_per_micro_batch ({engine})")
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def idle_share(args: argparse.Namespace, engine: str, overrides: Sequence[str], folder: Path) -> float:
    """Of the phases of the third step of a run under torch.profiler."""
    command = [sys.executable, str(Path(__file__).parent / "profile_run.py"), args.recipe, "--trace", str(folder / "trace")]
    run(command, [*fixed(engine, folder), *overrides])
    rows = read_profile.table(*read_profile.read(folder / "trace" / "rank0.json.gz"))
    phases = [row for row in rows if row["phase"] in PHASES]
    return round(sum(row["gaps_ms"] for row in phases) / sum(row["wall_ms"] for row in phases), 4)


def fixed(engine: str, folder: Path) -> list[str]:
    return [
        f"rollout.engine={engine}", "train.critic_warmup_steps=0", "sft.steps=0", "sft.epochs=0", "data.validation=[]",
        f"output.dir={folder}/run", "output.save_every=0", "output.rollouts_every=0", "output.loggers=[]",
    ]  # fmt: skip


def run(command: list[str], overrides: list[str]) -> None:
    """A run in a folder of its own: each starts from the beginning."""
    folder = next(o.removeprefix("output.dir=") for o in overrides if o.startswith("output.dir="))
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([*command, *overrides], check=True, stdout=subprocess.DEVNULL)


def gpu() -> str | None:
    """The data sheet of this machine's GPU; None where there is none."""
    return plan.named(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def mfu(job: plan.Job, found: dict[str, float]) -> float:
    """Of one step."""
    sequence = found["prompt_length/mean"] + found["response_length/mean"]
    tokens = found["perf/total_num_tokens"]
    body = plan.forward_flops(job.shapes, tokens, sequence, head=False)
    head = plan.forward_flops(job.shapes, tokens, sequence, head=True) - body
    flops = 3 * (body + head * found["response_length/mean"] / sequence)
    if job.has_critic:
        flops += 3 * body
    seconds = found["timing_s/update_actor"] + found.get("timing_s/update_critic", 0.0)
    return job.config.train.epochs * flops / seconds / (job.gpu.tflops * 1e12)


def mbu(job: plan.Job, found: dict[str, float]) -> float:
    """Of one step's generation on one rank."""
    prompt, response = found["prompt_length/mean"], found["response_length/mean"]
    weights = found["response_length/max"] * plan.engine_weights(job)
    cache = job.num_samples * response * (prompt + response / 2) * plan.kv_bytes_per_token(job)
    return (weights + cache) / found["timing_s/gen"] / (job.gpu.memory_gb_s * 1e9)


def summarise(
    args: argparse.Namespace, engine: str, found: list[dict[str, float]], job: plan.Job, idle: float | str
) -> dict[str, object]:
    """Medians over the steps."""

    def median(name: str) -> float:
        return statistics.median(step.get(name, 0.0) for step in found)

    phases = {phase: median(f"timing_s/{phase}") for phase in PHASES}
    other = statistics.median(
        step["timing_s/step"] - sum(step.get(f"timing_s/{phase}", 0.0) for phase in PHASES) for step in found
    )
    whole = median("timing_s/step")
    return {
        **origin(),
        "recipe": args.recipe,
        "engine": engine,
        "steps": len(found),
        "step_s": round(whole, 4),
        **{f"{phase}_s": round(seconds, 4) for phase, seconds in phases.items()},
        "other_s": round(other, 4),
        "tokens_per_step": round(median("perf/total_num_tokens")),
        "tokens_per_s": round(median("perf/throughput")),
        "peak_gib": round(max(step["memory/peak_gib"] for step in found), 3),
        "architecture": args.architecture or "",
        "train_mfu": round(statistics.median(mfu(job, step) for step in found), 4) if gpu() else "",
        "decode_mbu": round(statistics.median(mbu(job, step) for step in found), 4) if gpu() else "",
        "idle_share": idle,
        "overrides": " ".join(args.overrides),
    }


def show(rows: list[dict[str, object]]) -> None:
    names = [*(f"{phase}_s" for phase in PHASES), "other_s", "step_s", "tokens_per_step", "tokens_per_s", "peak_gib"]
    names += ["train_mfu", "decode_mbu", "idle_share"]
    print(f"{'':18s}" + "".join(f"{row['engine']:>16s}" for row in rows))
    for name in names:
        shares = [f"{row[name]:>16,}" if row[name] != "" else f"{'-':>16}" for row in rows]
        print(f"{name:18s}" + "".join(shares))


if __name__ == "__main__":
    main()
