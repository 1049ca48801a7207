"""A random two-layer model whose tokenizer reads and writes real text, for tests that generate."""

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlsp_fast.demo import train_tokenizer


def make_tiny(folder: Path, *, tied: bool = True, context: int = 256) -> Path:
    """Writes a Qwen2 of hidden size 64 with grouped attention heads to folder/model and returns that path."""
    texts = [f"Calculate {a} + {b} = {a + b} , wait : \\boxed{{{a}}} ." for a in range(10) for b in range(10)]
    tokenizer = train_tokenizer(texts)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # head size 32: the smallest that vLLM runs on a CPU
        num_key_value_heads=1,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    path = folder / "model"
    Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
