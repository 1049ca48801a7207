"""A model of a named architecture at full size with random weights, a tokenizer, problems with GSM8K's lengths: no download.

    python bench/random_model.py Llama-3.1-8B FOLDER [--response 400]

Every token ends a response with the same chance, 1 / response, whatever was said before: lengths spread geometrically around
`response` tokens, as far as the limit allows. With --response 0 no response ends before the limit. How: one direction of the
residual stream is the same for all tokens, no layer writes to it, and only the output projection's row of the end-of-sequence
token reads it; all other tokens are about equally likely. Every matrix has its real shape, so it costs what it costs.
Architectures: those that rlsp_fast.shapes knows by name, and `tiny` (4 layers x 192, about the demo's). The tokenizer has one
word for each id, so that a prompt of N words is a prompt of N tokens.
"""

import argparse
import csv
import json
import math
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from rlsp_fast import shapes

TINY = {
    "model_type": "llama", "vocab_size": 1024, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
EOS = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--response", type=int, default=400)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    args = parser.parse_args()
    make(args.name, args.folder, response=args.response, dtype=getattr(torch, args.dtype))


def make(name: str, folder: Path, *, response: int, dtype: torch.dtype) -> Path:
    """Writes model, tokenizer and problems.jsonl to `folder`, unless they are there, and returns it.

    Args:
        name: `tiny`, or a name of shapes.NAMED.
        response: mean tokens of a response before the limit cuts; 0: none ends.
    """
    if (folder / "problems.jsonl").exists():
        return folder
    if name != "tiny" and name not in shapes.NAMED:
        raise SystemExit(f"{name}: want tiny or one of {', '.join(shapes.NAMED)}")
    keys = dict(TINY if name == "tiny" else shapes.NAMED[name])
    config = AutoConfig.for_model(keys.pop("model_type"), bos_token_id=None, eos_token_id=EOS, pad_token_id=0, **keys)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    end_evenly(lm, response)
    lm.save_pretrained(folder)
    tokenizer(config.vocab_size).save_pretrained(folder)
    write_problems(folder / "problems.jsonl", config.vocab_size)
    return folder


@torch.no_grad()
def end_evenly(lm: PreTrainedModel, response: int) -> None:
    """Sets the weights so that the end-of-sequence token has probability 1 / response everywhere (never, for 0)."""
    config = lm.config
    embedding, head = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
    constant, noise = 0.01 * math.sqrt(config.hidden_size), 0.002
    embedding.normal_(0, noise)
    if not config.tie_word_embeddings:
        head.normal_(0, noise)
        head[:, 0] = 0
    embedding[:, 0] = constant
    for name, parameter in lm.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.mul_(1e-3)  # what the layers add stays small beside the constant
            parameter[0] = 0
    chance = 1 / response if response else 1e-9
    wanted = math.log(chance * (config.vocab_size - 1) / (1 - chance))
    mean_square = constant**2 / config.hidden_size + noise**2 + config.rms_norm_eps
    head[EOS, 0] += wanted / (constant / math.sqrt(mean_square))


def tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A word for each id: 0 is <pad>, 1 <eos>, n `wn`."""
    words = {"<pad>": 0, "<eos>": EOS} | {f"w{i}": i for i in range(2, vocab_size)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def write_problems(path: Path, vocab_size: int) -> None:
    """As many problems as gsm8k_lengths.csv has rows, each with the tokens that GSM8K's has."""
    rng = random.Random(0)
    with (Path(__file__).parent / "gsm8k_lengths.csv").open() as file:
        lengths = [int(row["prompt_tokens"]) for row in csv.DictReader(file)]
    rows = [{"problem": " ".join(f"w{rng.randrange(2, vocab_size)}" for _ in range(n)), "answer": "1"} for n in lengths]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
