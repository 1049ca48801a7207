"""TRL's GRPO trainer on the work of bench/compare.py, which starts it: `python bench/compare_trl.py WORK.json TIMES.json`.

Writes one row a round (one generation and its updates): seconds, CPU seconds, the seconds of generation, of rewards, of old and
reference log-probabilities and of the updates, and tokens. TRL's own methods are timed from outside.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import compare_engine
import torch
from datasets import Dataset
from length_reward import trl_reward
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.generation import vllm_generation


class Clock(TrainerCallback):
    """A row a round: from the end of one round's last optimizer step to the end of the next one's."""

    def __init__(self, updates: int):
        self.updates, self.rows = updates, []
        self.begin()

    def begin(self) -> None:
        self.row = dict.fromkeys(("gen", "reward", "annotate", "prepare", "train"), 0.0) | {"tokens": 0}
        self.start = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.updates:
            return
        synchronize()
        wall, cpu = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
        update = self.row.pop("train") - self.row.pop("prepare")  # TRL generates inside its first training step
        self.rows.append({"step": wall, "cpu": cpu, **self.row, "update": update})
        self.begin()

    def timed(self, phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, its seconds booked to phase; of log-probabilities only those without gradients: others are the loss's."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if phase == "annotate" and torch.is_grad_enabled():
                return method(*args, **kwargs)
            synchronize()
            start = time.perf_counter()
            out = method(*args, **kwargs)
            synchronize()
            self.row[phase] = self.row.get(phase, 0.0) + time.perf_counter() - start
            if phase == "push":  # which TRL does as it begins to generate
                self.row["gen"] -= self.row.pop(phase)
            if phase == "gen":
                self.row["tokens"] += sum(map(len, args[0])) + sum(map(len, out[0]))
            return out

        return call


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    work, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    if work["engine"] == "vllm":
        compare_engine.keep_loadable()
        # TRL names no dtype, and vLLM then takes bfloat16 for a float32 model.
        vllm_generation.LLM = partial(vllm_generation.LLM, dtype=work["dtype"])
    sequences = work["mini_batch_size"] * work["n"]
    updates = work["batch_size"] // work["mini_batch_size"]
    config = GRPOConfig(
        output_dir=str(out.parent / "trl"),
        max_steps=work["rounds"] * updates,
        per_device_train_batch_size=work["sequences_at_once"],
        gradient_accumulation_steps=sequences // work["sequences_at_once"],
        steps_per_generation=updates * sequences // work["sequences_at_once"],
        num_generations=work["n"],
        max_completion_length=work["max_response_length"],
        temperature=work["temperature"],
        learning_rate=work["lr"],
        adam_beta2=0.95,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        beta=work["kl"],
        loss_type="dapo",
        shuffle_dataset=False,
        bf16=work["dtype"] == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        use_vllm=work["engine"] == "vllm",
        vllm_mode="colocate",
        vllm_max_model_length=work["max_prompt_length"] + work["max_response_length"],
        vllm_gpu_memory_utilization=work["gpu_memory_utilization"],
        vllm_enable_sleep_mode=torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    clock = Clock(updates)
    tokenizer = AutoTokenizer.from_pretrained(work["model"])
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32),
        reward_funcs=trl_reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": text} for text in work["prompts"]]),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    for phase, method in {
        "gen": "_generate_single_turn",
        "reward": "_calculate_rewards",
        "annotate": "_get_per_token_logps_and_entropies",
        "prepare": "_prepare_inputs",
        "train": "training_step",
    }.items():
        setattr(trainer, method, clock.timed(phase, getattr(trainer, method)))
    if work["engine"] == "vllm":
        trainer.vllm_generation.sync_weights = clock.timed("push", trainer.vllm_generation.sync_weights)
    trainer.train()
    out.write_text(json.dumps(clock.rows))


if __name__ == "__main__":
    main()
