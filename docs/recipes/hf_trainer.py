"""Hugging Face Trainer without logits: SFT whose loss goes from hidden states to log-probabilities. Needs transformers."""

import torch
from rlsp_kernels import linear_logprob_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments


class FusedTrainer(Trainer):
    """The mean negative log-probability of the labels that are not -100, as the model's own loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        lm = self.accelerator.unwrap_model(model)
        hidden_TD = lm.model(inputs["input_ids"], attention_mask=inputs.get("attention_mask")).last_hidden_state[:, :-1]
        label_T = inputs["labels"][:, 1:].flatten()
        keep_T = label_T != -100
        logprob_T, _ = linear_logprob_entropy(
            hidden_TD.flatten(0, 1)[keep_T], lm.lm_head.weight, label_T[keep_T], need_entropy=False
        )
        loss = -logprob_T.sum() / (keep_T.sum() if num_items_in_batch is None else num_items_in_batch)
        return (loss, {}) if return_outputs else loss


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    data = [{"input_ids": row, "labels": row} for row in torch.arange(8).add(torch.arange(32)[:, None]) % 64]
    for trainer in (Trainer, FusedTrainer):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config)
        args = TrainingArguments(
            "outputs/hf_trainer", max_steps=5, learning_rate=1e-3, logging_steps=1, report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True, seed=0,
        )  # fmt: skip
        run = trainer(model=model, args=args, train_dataset=data)
        run.train()
        print(trainer.__name__, *(f"{row['loss']:.5f}" for row in run.state.log_history if "loss" in row))


if __name__ == "__main__":
    main()
