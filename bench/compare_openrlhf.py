"""OpenRLHF's GRPO on the work of bench/compare.py, which starts it: `python bench/compare_openrlhf.py WORK.json TIMES.json`.

Writes one row a round, as compare_trl.py does, from what OpenRLHF logs to TensorBoard. The run is
`python -m openrlhf.cli.train_ppo_ray` (all models and vLLM on the same GPU, one Ray cluster of this machine) with `arguments`.
The phases:

    gen       timing/generation: wake vLLM, all responses and, as each arrives, its reward, put vLLM to sleep
    reward    within gen
    annotate  timing/make_experience: old and reference log-probabilities, advantages
    update    timing/ppo_train: all updates of the round
    step      seconds between two rounds' log entries, so that the push of weights (timing/broadcast) and what lies between
              the phases count too

What could not be made equal: wall-clock seconds only, its processes are Ray's. Seeds are its own. It always shuffles: all
trainers have the same prompts over the run, but not the same in one round, and a round's sequences are shuffled before they are
split into updates. AdamW is DeepSpeed's (ZeRO 2, float32 masters in one flat buffer). It trains in bfloat16 or float16 only and
needs flash-attn, with which a micro-batch is packed. vLLM gets a request a response; prefix caching, switched on, shares a
prompt. Actor, reference and engine are processes of their own on one GPU.
"""

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from compare_log import Log, read


def main() -> None:
    work, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    folder = out.parent / "openrlhf"
    folder.mkdir()
    os.environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # for engines within a trainer's process; OpenRLHF's has its own
    sys.argv = ["train_ppo_ray", *arguments(work, folder)]
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__", alter_sys=True)
    out.write_text(json.dumps(rows(read(folder / "log"))))


def rows(log: Log) -> list[dict[str, float]]:
    """A row a round, from what OpenRLHF logged."""
    total = log["train/timing/step_total"]  # of the phases, without what lies between them
    found: list[dict[str, float]] = []
    for i, (logged, phases) in enumerate(total):
        took = {name: log[f"train/{name}"][i][1] for name in ("total_length", "rollout/num_samples")}
        found.append(
            {
                "step": logged - total[i - 1][0] if i else phases,
                "gen": log["train/timing/generation"][i][1],
                "reward": 0.0,
                "annotate": log["train/timing/make_experience"][i][1],
                "update": log["train/timing/ppo_train"][i][1],
                "tokens": round(took["total_length"] * took["rollout/num_samples"]),  # the former is a mean
            }
        )
    return found


def arguments(work: dict[str, Any], folder: Path) -> list[str]:
    """The work in OpenRLHF's names, as its command line has it; writes the prompts to `folder`."""
    if work["dtype"] != "bfloat16" or work["engine"] != "vllm":
        raise ValueError(f"OpenRLHF: want bfloat16 and vllm, got {work['dtype']} and {work['engine']}")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in work["prompts"]))
    values = {
        "actor.model_name_or_path": work["model"],
        "actor.num_gpus_per_node": 1,
        "actor.adam.lr": work["lr"],
        "actor.adam.betas": (0.9, 0.95),
        "actor.adam.weight_decay": 0.0,
        "actor.max_norm": 1.0,
        "actor.lr_scheduler": "constant",
        "actor.lr_warmup_ratio": 0.0,
        "actor.eps_clip": 0.2,
        "actor.loss_agg_mode": "token-mean",
        "ref.num_gpus_per_node": 1,
        "reward.remote_url": work["reward"].rsplit(":", 1)[0],
        "data.prompt_dataset": prompts,
        "data.input_key": "prompt",
        "data.max_len": work["max_prompt_length"] + work["max_response_length"],
        "rollout.batch_size": work["batch_size"],
        "rollout.n_samples_per_prompt": work["n"],
        "rollout.max_new_tokens": work["max_response_length"],
        "rollout.micro_batch_size": work["sequences_at_once"],
        "rollout.temperature": work["temperature"],
        "rollout.top_p": 1.0,
        "train.batch_size": work["mini_batch_size"] * work["n"],
        "train.micro_batch_size": work["sequences_at_once"],
        "train.num_episodes": 1,
        "train.max_epochs": 1,
        "train.colocate_all": None,
        "algo.advantage.estimator": "group_norm",
        "algo.kl.init_coef": work["kl"],
        "algo.kl.use_loss": None,
        "algo.kl.estimator": "k3",
        "vllm.num_engines": 1,
        "vllm.tensor_parallel_size": 1,
        "vllm.gpu_memory_utilization": work["gpu_memory_utilization"],
        "vllm.enable_sleep": None,
        "vllm.enable_prefix_caching": None,
        "ds.zero_stage": 2,
        "ds.param_dtype": "bf16",
        "ds.attn_implementation": "flash_attention_2",
        "ds.packing_samples": None,
        "logger.tensorboard_dir": folder / "log",
        "logger.wandb.run_name": "run",
        "ckpt.output_dir": folder / "model",
        "ckpt.path": folder / "checkpoints",
    }
    words: list[str] = []
    for name, value in values.items():
        given = () if value is None else value if isinstance(value, tuple) else (value,)
        words += [f"--{name}", *map(str, given)]
    return words


if __name__ == "__main__":
    main()
