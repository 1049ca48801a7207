"""How much do honest texts repeat themselves, by the length of a run? The table of docs/rewards.md.

    RLSP_FAST_DATA=FOLDER python bench/bench_repetition.py

FOLDER holds math500_test.jsonl and gsm8k_train.jsonl. Tokens are words, symbols and up to three digits together, as large
models cut text; the demo's responses (tests/demo_responses.jsonl, of the run that earns by being right) have their own. Prints
the mean over texts of the share of tokens that repeat, and appends it to bench/results/repetition.csv.
"""

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rows import append, origin

from rlsp_fast.repetition import repeated_share

NGRAMS = (4, 8, 12, 20, 30)
PIECES = re.compile(r" ?\d{1,3}| ?[A-Za-z]+|\\[a-z]+\{?| ?[^\sA-Za-z\d]|\s")
DEMO = Path(__file__).parent.parent / "tests" / "demo_responses.jsonl"


def main() -> None:
    data = os.environ.get("RLSP_FAST_DATA")
    if not data:
        sys.exit("RLSP_FAST_DATA is not set: want the folder with math500_test.jsonl and gsm8k_train.jsonl")
    worked = [re.sub(r"<<.*?>>", "", row["answer"]).split("\n####")[0] for row in read(Path(data) / "gsm8k_train.jsonl")]
    sets = {
        "MATH-500's solutions": [pieces(row["solution"]) for row in read(Path(data) / "math500_test.jsonl")],
        "GSM8K's solutions": [pieces(text) for text in worked],
        "the demo's responses after RL": [row["ids"] for row in read(DEMO) if row["run"] == "honest"],
    }
    where = origin()
    rows = [where | measured(name, texts) for name, texts in sets.items()]
    for row in rows:
        shares = " | ".join(f"{100 * row[f'share_{n}']:.1f} %" for n in NGRAMS)
        print(f"| {row['texts']} ({row['tokens']:.0f} tokens) | {shares} |")
    print("appended to", append("repetition", rows))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def pieces(text: str) -> list[str]:
    return PIECES.findall(text)


def measured(name: str, texts: Sequence[Sequence[object]]) -> dict[str, object]:
    n = len(texts)
    shares = {f"share_{k}": round(sum(repeated_share(ids, k) for ids in texts) / n, 5) for k in NGRAMS}
    return {"texts": name, "num_texts": n, "tokens": round(sum(map(len, texts)) / n, 1)} | shares


if __name__ == "__main__":
    main()
