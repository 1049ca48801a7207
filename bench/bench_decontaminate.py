"""How long does it take to compare 100,000 training problems with 5,000 evaluation problems, and what do real sets share?

    python bench/bench_decontaminate.py [--train 100000] [--evaluation 5000] [--data FOLDER]

The made problems are word problems and LaTeX exercises of 20 to 120 tokens from templates, as competition and school sets
are; 1,000 of the training problems are evaluation problems in disguise (other case and spacing, a sentence before and after,
LaTeX typeset differently), 1,000 are evaluation problems with one number changed, which are problems of their own.
Seconds are of one process, on a machine that may have other work (its own CPU seconds beside): all of reading JSON,
comparing and writing both files, and comparing alone. FOLDER (default: RLSP_FAST_DATA) holds
real sets such as gsm8k_train.jsonl. Prints a table and appends it to bench/results/decontaminate.csv.
"""

import argparse
import json
import os
import random
import re
import resource
import tempfile
import time
from collections import Counter
from pathlib import Path

import rows

from rlsp_fast import data
from rlsp_fast.config import DataConfig
from rlsp_fast.decontaminate import clean, find

NAMES = "Alice Ben Carla Dmitri Elena Farid Grace Hugo Ines Jonas Kira Liam Mona Nils Olga Pavel".split()
THINGS = "apples books coins stamps marbles tickets pencils cards shells bottles ribbons stones".split()
PLACES = "at the market, from an old friend, on the way home, in the school yard, at the library, by the river".split(", ")
SETS = [
    ("math12k_train_no_math500", "math500_test"),
    ("math12k_train_no_math500", "olympiadbench_test"),
    ("math12k_train_no_math500", "minerva_math_test"),
    ("math12k_train_no_math500", "amc23_test"),
    ("math12k_train_no_math500", "aime24_test"),
    ("aime_1983_2023_train", "aime24_test"),
    ("aime_1983_2023_train", "math500_test"),
    ("aime_1983_2023_train", "amc23_test"),
    ("gsm8k_train", "gsm8k_test"),
]


def made(rng: random.Random) -> str:
    n = lambda: rng.randrange(2, 5000)  # noqa: E731
    if rng.random() < 0.5:
        name, other = rng.sample(NAMES, 2)
        thing = rng.choice(THINGS)
        steps = [
            f"{name} buys {n()} {thing} {rng.choice(PLACES)}.",
            f"{other} gives {rng.choice(('her', 'him'))} {n()} more {thing} {rng.choice(PLACES)}.",
            f"Each of the {thing} weighs {n()} grams and costs ${n()}.",
            f"Then {name} sells {n()} of them for {n()} cents each {rng.choice(PLACES)}.",
            f"After {n()} days {other} loses {n()} {thing} {rng.choice(PLACES)}.",
        ]
        rng.shuffle(steps)
        return " ".join(steps[: rng.randint(2, 5)]) + f" How many {thing} does {name} have in the end?"
    a, b, c, d = n(), n(), n(), n()
    return rng.choice(
        [
            f"Let $f(x) = {a}x^{{2}} - {b}x + {c}$ for all real $x$. If $f(k) = {d}$ for a positive integer $k$, find the "
            "sum of all possible values of $k$.",
            f"The value of $\\dfrac{{{a}}}{{{b}}} + \\frac{{{c}}}{{{d}}}$ can be written as $\\frac{{m}}{{n}}$, where $m$ and "
            "$n$ are relatively prime positive integers. Find $m + n$.",
            f"In triangle $ABC$, $AB = {a}$, $BC = {b}$ and $\\angle ABC = {c % 180}^\\circ$. Point $D$ lies on "
            f"$\\overline{{AC}}$ with $AD = {d}$. Compute the length of $\\overline{{BD}}$.",
            f"What is the remainder when ${a}^{{{b}}} + {c}$ is divided by ${d}$?",
        ]
    )


def disguised(text: str, rng: random.Random) -> str:
    text = text.replace("\\dfrac", "\\frac").replace(" + ", "+").replace(". ", ".\n")
    text = text.upper() if "$" not in text and rng.random() < 0.5 else text
    return rng.choice((text, f"Problem {rng.randrange(30)}. {text}", f"{text} Explain how you found it.", f"  {text}  "))


def changed(text: str, rng: random.Random) -> str:
    number = rng.choice(list(re.finditer(r"\d+", text)))
    return text[: number.start()] + str(int(number[0]) + 5001) + text[number.end() :]


def corpus(num_train: int, num_evaluation: int) -> tuple[list[str], list[str], set[int]]:
    """Training and evaluation problems, and which of the training problems are evaluation problems."""
    rng = random.Random(0)
    evaluation = [made(rng) for _ in range(num_evaluation)]
    hidden = min(1000, num_train // 10, num_evaluation)
    train = [disguised(e, rng) for e in evaluation[:hidden]] + [changed(e, rng) for e in evaluation[:hidden]]
    train += [made(rng) for _ in range(num_train - len(train))]
    order = list(range(len(train)))
    rng.shuffle(order)
    return [train[i] for i in order], evaluation, {at for at, i in enumerate(order) if i < hidden}


def measure_made(num_train: int, num_evaluation: int) -> dict[str, object]:
    train, evaluation, hidden = corpus(num_train, num_evaluation)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("train.jsonl", "evaluation.jsonl", "out.jsonl")]
        for path, texts in zip(paths, (train, evaluation), strict=False):
            path.write_text("".join(json.dumps({"problem": text, "answer": "1"}) + "\n" for text in texts))
        start = time.perf_counter()
        clean([str(paths[0])], [str(paths[1])], paths[2])
        seconds = time.perf_counter() - start
    start, cpu = time.perf_counter(), time.process_time()
    found = {o.train for o in find(train, evaluation)}
    compare, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "train": f"made, {len(hidden)} hidden",
        "evaluation": "made",
        "num_train": num_train,
        "num_evaluation": num_evaluation,
        "missed": len(hidden - found),
        "false": len(found - hidden),
        "seconds_all": f"{seconds:.2f}",
        "seconds_compare": f"{compare:.2f}",
        "cpu_seconds_compare": f"{cpu:.2f}",
    }


def measure_real(folder: Path, train: str, evaluation: str) -> dict[str, object] | None:
    paths = [folder / f"{name}.jsonl" for name in (train, evaluation)]
    if not all(path.is_file() for path in paths):
        return None
    texts = [[row.text for row in data.load_rows([str(path)], DataConfig())] for path in paths]
    start, cpu = time.perf_counter(), time.process_time()
    found = find(*texts)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    why = Counter(o.why for o in found)
    return {
        "train": train,
        "evaluation": evaluation,
        "num_train": len(texts[0]),
        "num_evaluation": len(texts[1]),
        **{name: why[name] for name in ("exact", "reworded", "contains", "ngram")},
        "evaluation_touched": len({o.evaluation for o in found}),
        "any_shared_ngram": len(find(*texts, threshold=0)),
        "seconds_compare": f"{seconds:.2f}",
        "cpu_seconds_compare": f"{cpu:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=100_000)
    parser.add_argument("--evaluation", type=int, default=5_000)
    parser.add_argument("--data", type=Path, default=os.environ.get("RLSP_FAST_DATA"))
    args = parser.parse_args()
    results = [measure_made(args.train, args.evaluation)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    results += [measure_real(args.data, *names) for names in SETS] if args.data else []
    origin = rows.origin("numpy")
    columns = (
        "train", "evaluation", "num_train", "num_evaluation", "exact", "reworded", "contains", "ngram", "evaluation_touched",
        "any_shared_ngram", "missed", "false", "seconds_all", "seconds_compare", "cpu_seconds_compare",
    )  # fmt: skip
    table = [{name: row.get(name, "") for name in columns} for row in results if row]
    for row in table:
        print("  ".join(f"{name} {value}" for name, value in row.items() if value != ""))
    print(f"most memory held while comparing the made problems: {peak:.2f} GiB")
    table = [origin | row | {"peak_gib": f"{peak:.2f}" if row["seconds_all"] else ""} for row in table]
    print(f"appended to {rows.append('decontaminate', table)}")


if __name__ == "__main__":
    main()
