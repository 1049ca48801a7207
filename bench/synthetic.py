"""A model of a named shape with random weights, and sums to feed it: what a bench needs where nothing is downloaded."""

import json
import random
from pathlib import Path

from rlsp_fast import shapes
from rlsp_fast.demo import make_model, train_tokenizer


def write_model(folder: Path, name: str) -> None:
    """A Hugging Face folder of the shape `name` in rlsp_fast.shapes.NAMED (or `demo`), in bfloat16, with the demo's tokenizer.

    Token ids beyond the tokenizer's 1,024 are sampled and trained on like others; as text they are nothing.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = train_tokenizer(["1 + 2 =", "3"])
    tokenizer.save_pretrained(folder)
    if name == "demo":
        make_model(tokenizer).bfloat16().save_pretrained(folder)
        return
    known = shapes.named(name)
    if known is None:
        raise SystemExit(f"--model {name}: want demo or one of {', '.join(shapes.NAMED)}")
    keys = dict(shapes.NAMED[known])
    config = AutoConfig.for_model(keys.pop("model_type"), **keys, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def write_problems(path: Path, num_problems: int, num_tokens: int) -> None:
    """Sums whose text has about num_tokens tokens: the demo's tokenizer makes a token of each character."""
    rng = random.Random(0)
    rows = []
    for _ in range(num_problems):
        terms = [rng.randrange(10) for _ in range(max(2, num_tokens // 4))]
        rows.append({"problem": " + ".join(map(str, terms))[:num_tokens], "answer": str(sum(terms))})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
