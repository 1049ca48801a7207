"""Random models of two layers and hidden size 32 as Hugging Face folders; a config and samples to go with them."""

import random
import zlib
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from rlsp_fast.config import Config, check
from rlsp_fast.ppo import Sample

VOCAB = 61
SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,  # large enough that attention and positions matter
}
WINDOW = 4
KINDS = {
    "llama": LlamaConfig(**SHARED, num_key_value_heads=4, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SHARED, num_key_value_heads=2, tie_word_embeddings=False),
    "qwen2-tied": Qwen2Config(**SHARED, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHARED, num_key_value_heads=2, head_dim=8),
    "mistral-window": MistralConfig(**SHARED, num_key_value_heads=2, sliding_window=WINDOW),
    "qwen2-window": Qwen2Config(  # the first layer sees everything, the second WINDOW tokens
        **SHARED, num_key_value_heads=2, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
}


def save_model(folder: Path, kind: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> str:
    """Writes model and tokenizer, and returns the path. Every weight is random, biases and norms included."""
    path = folder / f"{kind}-{seed}"
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(KINDS[kind])
    jitter(lm, seed, 0.1)
    lm.to(dtype).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: w0 ... w60."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2")


@torch.no_grad()
def jitter(module: nn.Module, seed: int, scale: float) -> None:
    """Adds noise to every parameter; it depends on seed and name alone, so that twins in other dtypes get the same."""
    for name, parameter in module.named_parameters():
        generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        noise = scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        assert local.shape == noise.shape, "one rank only: a shard would need its own part of the noise"
        local += noise.to(local.dtype)


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    """Whole gradients by parameter name; sets them to None. A parameter without one is left out."""
    grads = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            grads[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).double().clone()
            parameter.grad = None
    return grads


def recipe(path: str, **sections: dict) -> Config:
    """A checked config: float32, lengths up to 12 + 12, everything in one micro-batch unless told otherwise."""
    tree = {
        "model": {"path": path, "dtype": "float32"},
        "data": {"train": ["unused.jsonl"], "max_prompt_length": 12},
        "rollout": {"max_response_length": 12, "temperature": 0.8, "n": 1},
        "train": {"batch_size": 8, "mini_batch_size": 8, "max_tokens_per_micro_batch": 4096},
        "optim": {"actor_lr": 1e-3, "critic_lr": 2e-3, "warmup_ratio": 0.0},
    }
    for section, keys in sections.items():
        tree[section] = tree.get(section, {}) | keys
    return check(tree)


def samples(num_problems: int, n: int = 1, seed: int = 0) -> list[Sample]:
    """Random prompts and responses of 1 to 12 tokens with random log-probabilities; all rewards differ."""
    rng = random.Random(seed)
    found = []
    for group in range(num_problems):
        prompt_ids = tuple(rng.randrange(3, VOCAB) for _ in range(rng.randint(2, 12)))
        for _ in range(n):
            length = 1 if not found else rng.randint(1, 12)  # the first response is a single token
            found.append(
                Sample(
                    group=group,
                    prompt_ids=prompt_ids,
                    response_ids=tuple(rng.randrange(3, VOCAB) for _ in range(length)),
                    rollout_logprob=tuple(-4.0 + rng.gauss(0, 0.5) for _ in range(length)),
                    reward=rng.gauss(0, 1),
                )
            )
    return found
