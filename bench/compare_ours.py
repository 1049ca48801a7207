"""rlsp_fast on the work of bench/compare.py, which starts it: `python bench/compare_ours.py WORK.json TIMES.json`.

Writes one row a round, as compare_trl.py does. The run is `rlsp train` with a recipe made of the work; rl_step is timed from
outside, from the end of one to the end of the next, so that what happens between steps counts too.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import compare_engine

from rlsp_fast import config, train

PHASES = {"gen": ("gen",), "reward": ("reward",), "annotate": ("old_log_prob", "ref", "adv"), "update": ("update_actor",)}


def main() -> None:
    work, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    if work["engine"] == "vllm":
        compare_engine.keep_loadable()
    rows: list[dict[str, float]] = []
    ends = [(time.perf_counter(), time.process_time())]
    rl_step = train.rl_step

    def timed(*args: Any) -> tuple:
        found = rl_step(*args)
        seconds = {name: sum(found[0].get(f"timing_s/{part}", 0.0) for part in parts) for name, parts in PHASES.items()}
        ends.append((time.perf_counter(), time.process_time()))
        (before, cpu_before), (now, cpu_now) = ends[-2:]
        tokens = found[0]["perf/total_num_tokens"]
        rows.append({"step": now - before, "cpu": cpu_now - cpu_before, **seconds, "tokens": tokens})
        return found

    train.rl_step = timed
    train.run(config.check(recipe(work, out.parent / "rlsp"), "work"), with_sft=False, with_rl=True)
    out.write_text(json.dumps(rows))


def recipe(work: dict[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """The work as a recipe: GRPO with the KL in the loss, as TRL has it."""
    return {
        "model": {"path": work["model"], "dtype": work["dtype"]},
        "data": {
            "train": [work["problems"]],
            "template": "{problem}",
            "max_prompt_length": work["max_prompt_length"],
        },
        "rollout": {
            "engine": work["engine"],
            "enforce_eager": False,  # on a CPU too, as TRL has it
            "n": work["n"],
            "temperature": work["temperature"],
            "max_response_length": work["max_response_length"],
            "max_num_seqs": work["batch_size"] * work["n"],
            "gpu_memory_utilization": work["gpu_memory_utilization"],
        },
        "reward": {"function": work["reward"]},
        "algorithm": {"advantage": "grpo", "kl_coef": 0.0, "kl_loss_coef": work["kl"], "whiten": False},
        "optim": {"actor_lr": work["lr"], "schedule": "constant", "warmup_ratio": 0.0},
        "train": {
            "steps": work["rounds"],
            "batch_size": work["batch_size"],
            "mini_batch_size": work["mini_batch_size"],
            "max_tokens_per_micro_batch": work["tokens_at_once"],
        },
        "output": {"dir": str(folder), "save_every": 0, "rollouts_every": 0, "loggers": [], "resume": "never"},
    }


if __name__ == "__main__":
    main()
