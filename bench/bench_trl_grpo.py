"""Peak memory and time of a training step of TRL's GRPO, patched with rlsp_kernels.patch.trl and not.

    python bench/bench_trl_grpo.py [--sequences 8] [--prompt 128] [--completion 1024] [--repeats 5]

TRL's own trainer and loss (trl 1.15, 1.16) on completions of random tokens: no generation, which the patch does not touch.
A step is loss, backward and AdamW. Unpatched and patched take turns in one process; medians count. On a GPU the model has
random weights in the shape of Qwen2.5-0.5B (V 151936, D 896, 24 layers), float32 under bf16 autocast; on a CPU it is small and
only proves that the bench works. Also prints the largest difference of the losses. Appends to bench/results/trl_grpo.csv.
"""

import argparse
import math
import statistics
import tempfile
import time
from contextlib import nullcontext

import torch
from datasets import Dataset
from rlsp_kernels import patch
from rows import append, origin
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config
from trl import GRPOConfig, GRPOTrainer

SMALL = {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LARGE = SMALL | {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864}
LARGE |= {"num_hidden_layers": 24, "num_attention_heads": 14}


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=128 if gpu else 8, help="tokens")
    parser.add_argument("--completion", type=int, default=1024 if gpu else 32, help="tokens")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--logits-budget", type=int, default=patch.trl.LOGITS_BUDGET, help="bytes, of the patch")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(folder, args.sequences, args.completion, gpu)
    batch = random_batch(trainer, args.sequences, args.prompt, args.completion)
    ways = {"trl": nullcontext, "patched": lambda: patch.trl.patched(logits_budget=args.logits_budget)}
    start = {name: x.detach().clone() for name, x in trainer.model.state_dict().items()}
    seconds, gib, losses = ({name: [] for name in ways} for _ in range(3))
    for turn in range(args.repeats + 1):
        for name, way in ways.items():
            trainer.model.load_state_dict(start)  # both see the same weights, turn after turn
            with way():
                took, peak, loss = step(trainer, batch)
            if turn > 0:  # the first compiles
                seconds[name].append(took)
                gib[name].append(peak)
                losses[name].append(loss)
    rows = [
        origin("trl", "transformers")
        | {"way": name, "sequences": args.sequences, "prompt": args.prompt, "completion": args.completion}
        | {"vocab": trainer.model.config.vocab_size, "logits_budget": args.logits_budget if name == "patched" else ""}
        | {"seconds": round(statistics.median(seconds[name]), 5), "peak_gib": round(max(gib[name]), 3) if gpu else ""}
        for name in ways
    ]
    for row in rows:
        print(f"{row['way']:8} {row['seconds']:9.4f} s a step, peak {row['peak_gib'] or '(no GPU)'} GiB")
    worst = max(abs(a - b) for a, b in zip(losses["trl"], losses["patched"], strict=True))
    print(f"losses of about {losses['trl'][0]:.5f} differ by at most {worst:.1e}")
    print(f"appended to {append('trl_grpo', rows)}")


def build(folder: str, sequences: int, completion: int, gpu: bool) -> GRPOTrainer:
    """TRL's trainer on a model with random weights and a tokenizer that is never asked."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**(LARGE if gpu else SMALL), num_key_value_heads=2))
    words = Tokenizer(models.WordLevel({"pad": 0, "end": 1}, unk_token="pad"))
    config = GRPOConfig(
        output_dir=folder, per_device_train_batch_size=sequences, num_generations=sequences, beta=0.0, report_to=[],
        max_completion_length=completion, use_cpu=not gpu, bf16=gpu, gradient_checkpointing=gpu, learning_rate=1e-5,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model,
        args=config,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_list([{"prompt": "pad"}] * sequences),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="pad", eos_token="end"),
    )
    trainer.model.to(trainer.accelerator.device).train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    return trainer


def random_batch(trainer: GRPOTrainer, B: int, prompt: int, completion: int) -> dict[str, Tensor]:
    """What TRL hands its loss, completions of all lengths from half to whole."""
    generator = torch.Generator().manual_seed(0)
    vocab = trainer.model.config.vocab_size
    length_B1 = torch.linspace(completion // 2, completion, B).long()[:, None]
    mask = (torch.arange(completion) < length_B1).long()
    batch = {
        "prompt_ids": torch.randint(vocab, (B, prompt), generator=generator),
        "prompt_mask": torch.ones(B, prompt, dtype=torch.long),
        "completion_ids": torch.randint(vocab, (B, completion), generator=generator),
        "completion_mask": mask,
        "advantages": torch.randn(B, generator=generator),
        "old_per_token_logps": torch.full((B, completion), -math.log(vocab)),  # else every ratio is 1, whatever was computed
        "num_items_in_batch": mask.sum().float(),
    }
    return {name: x.to(trainer.accelerator.device) for name, x in batch.items()}


def step(trainer: GRPOTrainer, batch: dict[str, Tensor]) -> tuple[float, float, float]:
    """Seconds, peak GiB (0 on a CPU) and loss of one training step."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    if gpu:
        torch.cuda.synchronize()
    took = time.perf_counter() - begin
    return took, torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0, loss.item()


if __name__ == "__main__":
    main()
