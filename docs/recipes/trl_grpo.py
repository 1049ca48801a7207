"""TRL's GRPO with one line more. Needs trl: pip install trl==1.16.0."""

import sys

import torch
from datasets import Dataset
from rlsp_kernels import patch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer


def main(path: str) -> None:
    print(patch.trl.apply())  # the one line; patch.trl.revert() takes it back

    def reward(completion_ids, **_):
        return [len(set(ids)) / max(1, len(ids)) for ids in completion_ids]

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(path),
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": f"w{i} w{i + 1}"} for i in range(3, 19)]),
        args=GRPOConfig(
            output_dir="outputs/trl_grpo", max_steps=2, per_device_train_batch_size=8, num_generations=4, report_to=[],
            max_completion_length=8, logging_steps=1, save_strategy="no", use_cpu=not torch.cuda.is_available(), bf16=False,
        ),
    )  # fmt: skip
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1])  # a folder with a model and its tokenizer
