"""verl's GRPO on the work of bench/compare.py, which starts it: `python bench/compare_verl.py WORK.json TIMES.json`.

Writes one row a round, as compare_trl.py does, from what verl logs to TensorBoard. The run is `python -m verl.trainer.main_ppo`
(its synchronous trainer, FSDP2 and vLLM on the same GPU, one Ray cluster of this machine) with `overrides`. The phases:

    gen       timing_s/gen: all responses and, as each arrives, its reward, until the engine's weights and cache are dropped
    reward    within gen
    annotate  timing_s/old_log_prob, timing_s/ref and timing_s/adv
    update    timing_s/update_actor: all updates of the round
    step      seconds between two rounds' log entries, so that the push of weights (timing_s/update_weights) and verl's own
              bookkeeping count too

What could not be made equal: wall-clock seconds only, its processes are Ray's. Seeds are its own. A round's sequences are
stored in the order in which they were finished, so that which of them share an update differs. The dual clip cannot be
switched off; its bound is set where nothing reaches it. The entropy of every token is computed with the old log-probabilities.
Rewards, tokens and log-probabilities travel between processes through its TransferQueue. The reference model's weights stay in
host memory between its forwards. Padding is removed where flash-attn is compiled; elsewhere attention is torch's, on padded
batches.

verl 0.9.1 imports a class of TRL's wherever TRL is installed, which TRL 1.16 no longer has: it needs an environment of its own.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from compare_log import Log, read

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"  # a prompt is the problem and nothing else


def main() -> None:
    work, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    folder = out.parent / "verl"
    folder.mkdir()
    os.environ |= {"TENSORBOARD_DIR": str(folder / "log"), "HYDRA_FULL_ERROR": "1"}
    os.environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # for engines within a trainer's process; verl's has its own
    sys.argv = ["main_ppo", *overrides(work, folder)]
    from verl.trainer.main_ppo import main as train

    train()
    out.write_text(json.dumps(rows(read(folder / "log"))))


def rows(log: Log) -> list[dict[str, float]]:
    """A row a round, from what verl logged."""
    parts = ("step", "gen", "reward", "old_log_prob", "ref", "adv", "update_actor")
    seconds = {name: log[f"timing_s/{name}"] for name in parts if f"timing_s/{name}" in log}
    tokens = log["perf/total_num_tokens"]
    found: list[dict[str, float]] = []
    for i, (logged, num_tokens) in enumerate(tokens):
        took = {name: entries[i][1] for name, entries in seconds.items()}
        found.append(
            {
                "step": logged - tokens[i - 1][0] if i else took["step"],
                "gen": took["gen"],
                "reward": took.get("reward", 0.0),
                "annotate": took["old_log_prob"] + took["ref"] + took["adv"],
                "update": took["update_actor"],
                "tokens": round(num_tokens),
            }
        )
    return found


def overrides(work: dict[str, Any], folder: Path) -> list[str]:
    """The work in verl's names, as Hydra's command line has it; writes the prompts to `folder`."""
    precision = {"bfloat16": "bf16", "float32": "fp32"}[work["dtype"]]
    flash = importlib.util.find_spec("flash_attn_2_cuda") is not None
    model, actor, rollout = (f"actor_rollout_ref.{part}" for part in ("model", "actor", "rollout"))
    prompts = str(write_prompts(work["prompts"], folder / "prompts.parquet"))
    path, name = work["reward"].rsplit(":", 1)
    values = {
        "data.train_files": prompts,
        "data.val_files": prompts,  # read, but never used
        "data.train_batch_size": work["batch_size"],
        "data.max_prompt_length": work["max_prompt_length"],
        "data.max_response_length": work["max_response_length"],
        "data.shuffle": False,
        f"{model}.path": work["model"],
        f"{model}.custom_chat_template": TEMPLATE,
        f"{model}.enable_gradient_checkpointing": False,
        f"{model}.use_remove_padding": flash,
        f"+{model}.override_config.attn_implementation": "flash_attention_2" if flash else "sdpa",
        f"{actor}.strategy": "fsdp2",
        f"{actor}.ppo_mini_batch_size": work["mini_batch_size"],
        f"{actor}.ppo_micro_batch_size_per_gpu": work["sequences_at_once"],
        f"{actor}.clip_ratio_c": 1000.0,
        f"{actor}.use_kl_loss": True,
        f"{actor}.kl_loss_coef": work["kl"],
        f"{actor}.kl_loss_type": "low_var_kl",  # k3
        f"{actor}.grad_clip": 1.0,
        f"{actor}.optim.lr": work["lr"],
        f"{actor}.optim.betas": [0.9, 0.95],
        f"{actor}.optim.weight_decay": 0.0,
        f"{actor}.optim.clip_grad": 1.0,
        f"{actor}.optim.lr_scheduler_type": "constant",
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": work["sequences_at_once"],
        f"{rollout}.log_prob_micro_batch_size_per_gpu": work["sequences_at_once"],
        f"{rollout}.name": work["engine"],
        f"{rollout}.n": work["n"],
        f"{rollout}.temperature": work["temperature"],
        f"{rollout}.dtype": work["dtype"],
        f"{rollout}.gpu_memory_utilization": work["gpu_memory_utilization"],
        f"{rollout}.tensor_model_parallel_size": 1,
        f"{rollout}.max_model_len": work["max_prompt_length"] + work["max_response_length"],
        f"{rollout}.max_num_seqs": work["batch_size"] * work["n"],
        "algorithm.adv_estimator": "grpo",
        "reward.custom_reward_function.path": path,
        "reward.custom_reward_function.name": name,
        "trainer.total_epochs": 1,
        "trainer.total_training_steps": work["rounds"],
        "trainer.nnodes": 1,
        "trainer.n_gpus_per_node": 1,
        "trainer.logger": ["tensorboard"],
        "trainer.default_local_dir": str(folder / "checkpoints"),
        "trainer.resume_mode": "disable",
        "trainer.val_before_train": False,
        "trainer.test_freq": -1,
        "trainer.save_freq": -1,
        "ray_kwargs.ray_init.num_cpus": 64,  # what Ray counts, not what it uses: each of verl's helpers claims one
        "hydra.run.dir": str(folder / "hydra"),
    }
    for role in ("actor", "ref"):
        for part in ("param_dtype", "reduce_dtype", "buffer_dtype"):
            held = precision if part == "param_dtype" else "fp32"
            values[f"+actor_rollout_ref.{role}.fsdp_config.mixed_precision.{part}"] = held
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def write_prompts(prompts: list[str], path: Path) -> Path:
    """The prompts in order, a row each in verl's layout."""
    import pyarrow
    from pyarrow import parquet

    table = [
        {
            "data_source": "length_reward",
            "prompt": [{"role": "user", "content": text}],
            "reward_model": {"style": "rule", "ground_truth": ""},
            "extra_info": {"index": i},
        }
        for i, text in enumerate(prompts)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(table), path)
    return path


if __name__ == "__main__":
    main()
