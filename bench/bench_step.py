"""How long is one RL step of a recipe, and where does the time go? With vLLM and with the transformers engine.

    python bench/bench_step.py [--recipe demo] [--steps 6] [--rounds 2] [--engines vllm transformers] [key=value ...]

Each engine trains the recipe's model for a few steps in a process of its own, in turns (a busy machine slows both); the first
step of a process is left out (vLLM compiles in it). The demo's model is used as it was made, untrained, so that both engines
generate the same number of tokens: every response runs to the length limit. Prints seconds per phase and appends rows to
bench/results/step.csv. `other` is what no phase covers.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rows import append, origin

PHASES = (
    "gen", "reward", "pack", "sleep", "old_log_prob", "ref", "values", "adv", "update_critic", "update_actor",
    "update_weights",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--engines", nargs="+", default=["vllm", "transformers"])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    measured: dict[str, list[dict[str, float]]] = {engine: [] for engine in args.engines}
    for _ in range(args.rounds):
        for engine in args.engines:
            measured[engine] += steps(args, engine)[1:]
    rows = [summarise(args.recipe, engine, found) for engine, found in measured.items()]
    show(rows)
    print("appended to", append("step", rows))


def steps(args: argparse.Namespace, engine: str) -> list[dict[str, float]]:
    """Metrics of each step of a short run with this engine."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"rollout.engine={engine}", f"train.steps={args.steps}", "train.critic_warmup_steps=0", "sft.steps=0",
            "data.validation=[]", f"output.dir={folder}/run", "output.save_every=0", "output.rollouts_every=0",
            "output.loggers=[]", *args.overrides,
        ]  # fmt: skip
        if args.recipe == "demo":
            make_demo(Path(folder))
            overrides += [f"model.path={folder}/start", f"data.train={folder}/problems.jsonl"]
        command = [sys.executable, "-m", "rlsp_fast", "train", args.recipe, *overrides]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]


def make_demo(folder: Path) -> None:
    from rlsp_fast import config, demo

    demo.prepare(folder, config.load("demo", [f"model.path={folder}/start"]))


def summarise(recipe: str, engine: str, found: list[dict[str, float]]) -> dict[str, object]:
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
        "recipe": recipe,
        "engine": engine,
        "steps": len(found),
        "step_s": round(whole, 4),
        **{f"{phase}_s": round(seconds, 4) for phase, seconds in phases.items()},
        "other_s": round(other, 4),
        "tokens_per_step": round(median("perf/total_num_tokens")),
        "tokens_per_s": round(median("perf/throughput")),
        "peak_gib": round(max(step["memory/peak_gib"] for step in found), 3),
    }


def show(rows: list[dict[str, object]]) -> None:
    names = [*(f"{phase}_s" for phase in PHASES), "other_s", "step_s", "tokens_per_step", "tokens_per_s", "peak_gib"]
    print(f"{'':18s}" + "".join(f"{row['engine']:>16s}" for row in rows))
    for name in names:
        shares = [f"{row[name]:>16,}" for row in rows]
        print(f"{name:18s}" + "".join(shares))


if __name__ == "__main__":
    main()
