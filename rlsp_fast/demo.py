"""The demo's own materials: a small transformer with its tokenizer, and demonstrations of two ways to answer.

Sums of several terms from reasoning-gym. The demonstrations are of mixed quality, as people's are: some work the sum out term
by term (and some of those make a slip, notice it and correct it), some answer at once and are mostly a little off. A model that
imitates both is right about as often as it thinks. Finding out that thinking pays is left to RL.
"""

import json
import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlsp_fast import data
from rlsp_fast.config import Config
from rlsp_fast.types import Problem

HIDDEN_SIZE, NUM_LAYERS, NUM_HEADS = 192, 4, 6
SHARE_THINKING = 0.5  # demonstrations that work the sum out; the rest answer at once
SHARE_LUCKY = 0.25  # of those that answer at once: the answer is right
SHARE_SLIP = 0.2  # of those that work it out: one step goes wrong first
NUM_HELD_OUT, NUM_DEMONSTRATIONS, NUM_PROBLEMS = 512, 40_000, 20_000
TASK = (
    'reasoning-gym:basic_arithmetic?operators=["+"]&allow_parentheses=false&allow_negation=false&min_terms=5&max_terms=7'
    "&min_digits=1&max_digits=1&seed=0&size={size}"
)
# Digits, words and LaTeX commands are units; text of any other kind falls back to bytes.
_PIECES = r" ?\d| ?[A-Za-z]+|\\[a-z]+\{| ?[^\sA-Za-z\d]|\s"


def prepare(folder: Path, config: Config) -> None:
    """Writes the untrained model to config.model.path, demonstrations and problems to folder, unless they are there.

    No problem stands in two of the files: held out, trained on by RL, demonstrated.
    """
    model_path, last = Path(config.model.path), folder / "held_out.jsonl"
    if last.exists() and (model_path / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    num_validation = 500
    wanted = NUM_HELD_OUT + NUM_PROBLEMS + NUM_DEMONSTRATIONS + num_validation
    found = data.load_problems((TASK.format(size=wanted + wanted // 4),), config.data)
    problems = list({p.messages[-1]["content"]: p for p in found}.values())  # short sums repeat
    random.Random(0).shuffle(problems)  # the same split for every seed: they are compared on the same held-out problems
    assert len(problems) >= wanted
    held_out, rest = problems[:NUM_HELD_OUT], problems[NUM_HELD_OUT:wanted]
    rng = random.Random(config.train.seed)
    shown = [
        {"problem": p.messages[-1]["content"], "response": demonstrate(p.extra["expression"], rng)} for p in rest[NUM_PROBLEMS:]
    ]
    tokenizer = train_tokenizer([row["problem"] + "\n" + row["response"] for row in shown[:5000]])
    torch.manual_seed(config.train.seed)
    make_model(tokenizer).save_pretrained(model_path)
    tokenizer.save_pretrained(model_path)
    _write(folder / "demonstrations.jsonl", shown[num_validation:])
    _write(folder / "demonstrations_validation.jsonl", shown[:num_validation])
    _write(folder / "problems.jsonl", [_row(p) for p in rest[:NUM_PROBLEMS]])
    _write(last, [_row(p) for p in held_out])


def _row(problem: Problem) -> dict[str, str]:
    return {"problem": problem.messages[-1]["content"], "answer": problem.answer}


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def demonstrate(expression: str, rng: random.Random) -> str:
    """One way to answer a sum.

    >>> demonstrate("4 + 3 + 8", random.Random(2))
    ' \\boxed{12}'
    >>> demonstrate("4 + 3 + 8", random.Random(1))
    ' 4 +3=7 +8=15 . \\boxed{15}'
    """
    terms = [int(term) for term in expression.split(" + ")]
    if rng.random() >= SHARE_THINKING:
        guess = sum(terms) + (0 if rng.random() < SHARE_LUCKY else rng.choice((-3, -2, -1, 1, 2, 3)))
        return f" \\boxed{{{max(guess, 0)}}}"
    total, thinking = terms[0], f" {terms[0]}"
    slip = rng.randrange(1, len(terms)) if rng.random() < SHARE_SLIP else None
    for i, term in enumerate(terms[1:], start=1):
        if slip == i:
            thinking += f" +{term}={total + term + rng.choice((1, 2, 10))} , wait , that is wrong :"
        total += term
        thinking += f" +{term}={total}"
    return f"{thinking} . \\boxed{{{total}}}"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-pair encoding of the demo's texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_PIECES), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A few million parameters, freshly initialised."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN_SIZE,
            initializer_range=HIDDEN_SIZE**-0.5,
            intermediate_size=HIDDEN_SIZE * 8 // 3,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=NUM_HEADS,
            num_key_value_heads=NUM_HEADS,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
