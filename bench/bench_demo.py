"""Does RL lift the demo's accuracy, and by how much, for each seed?

    python bench/bench_demo.py [--seeds 0 1 2] [--reuse COMMIT]

Runs `rlsp demo --seed N` for each seed, or with --reuse takes the finished runs in outputs/, made by that commit, and appends
what each measured on its held-out problems to bench/results/demo.csv. Accuracy before and after RL is of one sampled response a
problem; `points` is the difference in percentage points, `standard_error` that of the difference (independent samples).
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

from rows import append, origin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--reuse", metavar="COMMIT")
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        folder = Path("outputs") / ("demo" if seed == 0 else f"demo-seed{seed}") / "run"
        if args.reuse is None:
            subprocess.run([sys.executable, "-m", "rlsp_fast", "demo", "--seed", str(seed)], check=True)
        rows.append({**origin(), **({"commit": args.reuse} if args.reuse else {}), "seed": seed, **measured(folder)})
        print({key: rows[-1][key] for key in ("seed", "after_sft", "after_rl", "points", "standard_error")})
    print("appended to", append("demo", rows))


def measured(folder: Path) -> dict[str, object]:
    stages = {row["stage"]: row for row in map(json.loads, (folder / "eval.jsonl").read_text().splitlines())}
    before, sft, rl = (stages[name] for name in ("before SFT", "after SFT", "after RL"))
    n = rl["num_problems"]
    variance = sum(row["accuracy"] * (1 - row["accuracy"]) / n for row in (sft, rl))
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "problems": n,
        "before_sft": round(before["accuracy"], 4),
        "after_sft": round(sft["accuracy"], 4),
        "after_rl": round(rl["accuracy"], 4),
        "points": round(100 * (rl["accuracy"] - sft["accuracy"]), 1),
        "standard_error": round(100 * math.sqrt(variance), 1),
        "tokens_after_sft": round(sft["response_length"], 1),
        "tokens_after_rl": round(rl["response_length"], 1),
        "rl_steps": len(steps),
        "rl_seconds": round(sum(step["timing_s/step"] for step in steps)),
        "worst_probs_diff": max(step["training/rollout_probs_diff_mean"] for step in steps),
    }


if __name__ == "__main__":
    main()
