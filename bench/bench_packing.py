"""Trainer tokens a second, packed against padded, on the length distribution of GSM8K's problems and solutions.

    python bench/bench_packing.py [--model PATH] [--sequences 32] [--repeats 5]

One forward and backward of the mean NLL over the same sequences: packed end to end as rlsp_fast trains, and as a padded
batch through the same Hugging Face model, as trainers without packing do. Lengths are the token counts of GSM8K's first 1,024
training rows (bench/gsm8k_lengths.csv); token ids are random. Tokens are counted without padding, so both do the same work.
Both take turns; the median counts. Appends to bench/results/packing.csv.
"""

import argparse
import csv
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rlsp_kernels import linear_logprob_entropy, logprob_entropy
from rows import append, origin
from transformers import AutoModelForCausalLM, LlamaConfig

from rlsp_fast import dist, model
from rlsp_fast.config import ModelConfig
from rlsp_fast.packing import pack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face folder; default: random weights, 8 layers x 512, V = 32000")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    rows = measure(args.model, args.sequences, args.repeats, args.dtype)
    for row in rows:
        print(", ".join(f"{key} {row[key]}" for key in ("layout", "tokens_per_s", "seconds", "padding_share", "loss")))
    ratio = rows[0]["tokens_per_s"] / rows[1]["tokens_per_s"]
    print(f"packed over padded: {ratio:.2f}x; appended to {append('packing', rows)}")


def measure(path: str | None, num_sequences: int, repeats: int, dtype: str) -> list[dict[str, Any]]:
    """A row a layout, packed first."""
    device = dist.setup()
    with tempfile.TemporaryDirectory() as folder:
        path = path or random_model(Path(folder))
        config = ModelConfig(path=path, dtype=dtype)
        policy = model.build(model.Policy, config, path, device, dist.mesh(device))
        padded = AutoModelForCausalLM.from_pretrained(path, dtype=model.DTYPES[dtype], attn_implementation="sdpa").to(device)
    pairs = sequences(num_sequences, policy.lm.config.vocab_size)
    num_tokens = sum(len(p) + len(r) - 1 for p, r in pairs)
    longest = max(len(p) + len(r) - 1 for p, r in pairs)
    runs = {"packed": packed_step(policy, pairs, device), "padded": padded_step(padded, pairs, device)}
    losses = {name: step() for name, step in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, step in runs.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, times in seconds.items():
        slots = num_tokens if name == "packed" else longest * len(pairs)
        row = {
            **origin(), "layout": name, "dtype": dtype, "sequences": len(pairs), "tokens": num_tokens,
            "padding_share": round(1 - num_tokens / slots, 3), "seconds": round(statistics.median(times), 4),
            "tokens_per_s": round(num_tokens / statistics.median(times)), "loss": round(losses[name], 6),
        }  # fmt: skip
        rows.append(row)
    dist.cleanup()
    return rows


def random_model(folder: Path) -> str:
    config = LlamaConfig(
        vocab_size=32000, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=2048,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def sequences(count: int, vocab_size: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    with (Path(__file__).parent / "gsm8k_lengths.csv").open() as file:
        lengths = [(int(row["prompt_tokens"]), int(row["response_tokens"])) for row in csv.DictReader(file)]
    rng = random.Random(0)
    chosen = rng.sample(lengths, count)
    return [tuple(tuple(rng.randrange(vocab_size) for _ in range(n)) for n in pair) for pair in chosen]


def packed_step(policy: model.Policy, pairs: list, device: torch.device) -> Callable[[], float]:
    batch = pack(pairs).to(device)
    weight_T = batch.mask_T.float() / batch.mask_T.sum()

    def fn(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, **head: object) -> torch.Tensor:
        logprob_T, _ = linear_logprob_entropy(hidden_TD, weight_VD, batch.token_T, need_entropy=False, **head)
        return -(logprob_T * weight_T).sum()

    def step() -> float:
        loss = policy(batch, fn)
        loss.backward()
        policy.zero_grad()
        return loss.item()

    return step


def padded_step(lm: torch.nn.Module, pairs: list, device: torch.device) -> Callable[[], float]:
    longest = max(len(p) + len(r) for p, r in pairs)
    ids = torch.tensor([p + r + (0,) * (longest - len(p) - len(r)) for p, r in pairs], device=device)
    real = torch.tensor([[t < len(p) + len(r) for t in range(longest)] for p, r in pairs], device=device)
    response = torch.tensor([[len(p) <= t < len(p) + len(r) for t in range(longest)] for p, r in pairs], device=device)
    weight = response[:, 1:].float() / response[:, 1:].sum()

    def step() -> float:
        logits = lm(input_ids=ids[:, :-1], attention_mask=real[:, :-1].long()).logits
        logprob, _ = logprob_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), need_entropy=False)
        loss = -(logprob * weight.flatten()).sum()
        loss.backward()
        lm.zero_grad()
        return loss.item()

    return step


if __name__ == "__main__":
    main()
