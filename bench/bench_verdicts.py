r"""Who is right where graders differ: this verifier, math-verify alone, and the Qwen2.5-Math grader?

    python bench/bench_verdicts.py [--qwen .../Qwen2.5-Math/evaluation --qwen-python PYTHON] [--data FOLDER]

Two questions. The pairs of tests/ have a known truth, those that this verifier gets wrong (KNOWN_GAPS) among them; they
were partly written against it, so they say more about the others' kinds of error than about its own rate. Gold answers
of real problem sets, changed in one place, are all wrong but for the few where the change says the same: those are
taken out by hand (SAME_AFTER_ALL). Each response is one sentence with one box, and every grader extracts from it.

The Qwen grader runs in a process of its own, in an environment of its own (sympy 1.12, mpmath 1.3, antlr4 4.11, regex,
word2number). It evaluates answers as Python: give it no text from a model. Prints tables, and writes one row per
disagreement to bench/results/verdicts.csv.
"""

import argparse
import csv
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from math_verify import parse, verify

from rlsp_fast.verifier import Verifier, gold_answer

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "verdicts.csv"
GRADERS = ("ours", "math_verify", "qwen")

sys.path.insert(0, str(ROOT / "tests"))
from verifier_near_misses import KNOWN_GAPS, NEAR_MISSES  # noqa: E402
from verifier_pairs import PAIRS  # noqa: E402

QWEN = r"""
import json, signal, sys, types
folder = sys.argv[1]
sys.path[:0] = [folder, folder + "/latex2sympy"]
sys.modules["utils"] = types.ModuleType("utils")  # loads data sets, which grading does not need
from grader import math_equal
from parser import extract_answer, strip_string
def late(*_):
    raise TimeoutError
signal.signal(signal.SIGALRM, late)
for line in sys.stdin:
    gold, response = json.loads(line)
    signal.setitimer(signal.ITIMER_REAL, 3, 0.5)  # its evaluation's limit; again and again, since it catches everything
    try:
        verdict = math_equal(extract_answer(response, "math"), strip_string(gold))
    except Exception:
        verdict = None
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(json.dumps(verdict), flush=True)
"""

Pair = tuple[str, str, str, bool]
"""(form, gold, answer, whether it is right)."""


def test_pairs() -> Iterator[Pair]:
    for forms in (PAIRS, NEAR_MISSES):
        for form, pairs in forms.items():
            for gold, right, wrong in pairs:
                yield from ((form, gold, answer, True) for answer in right)
                yield from ((form, gold, answer, False) for answer in wrong)
    yield from (("known gaps", gold, answer, True) for gold, answer in KNOWN_GAPS)


# --- gold answers, changed in one place -------------------------------------------------------------------------------

SAME_AFTER_ALL = re.compile(r"-0(?![.\d])|\\approx|\\text\{\(E\)\},")
"""Changes that change nothing: the sign of 0, what follows \\approx, a comma that ends an answer."""


def perturbed(gold: str) -> Iterator[tuple[str, str]]:
    """(kind of change, changed answer)."""
    numbers = [m for m in re.finditer(r"(?<![\d.])\d+(?:\.\d+)?", gold) if gold[m.end() : m.end() + 2] != "pt"]
    for m in {m.start(): m for m in numbers[:2] + numbers[-1:]}.values():
        for digit in (int(m[0][-1]) + 1, int(m[0][-1]) - 1):
            if 0 <= digit <= 9:
                yield "a digit off by one", f"{gold[: m.end() - 1]}{digit}{gold[m.end() :]}"
    if gold.startswith("-"):
        yield "sign", gold[1:]
    elif re.match(r"\d|\\d?frac|\\sqrt|\\pi", gold) and "pm" not in gold and not re.fullmatch(r"[0.]+", gold):
        yield "sign", f"-{gold}"
    if sign := re.search(r"(?<=[\d}x)])\s*([+-])\s*(?=[\d\\x(])", gold):
        yield "sign", gold[: sign.start(1)] + "+-"[sign[1] == "+"] + gold[sign.end(1) :]
    if fraction := re.fullmatch(r"(-?)\\frac\{([^{}]+)\}\{([^{}]+)\}", gold):
        if fraction[2] != fraction[3]:
            yield "fraction upside down", rf"{fraction[1]}\frac{{{fraction[3]}}}{{{fraction[2]}}}"
    bracketed = re.fullmatch(r"(?:\\left)?([(\[])(.*?)(?:\\right)?([)\]])", gold)
    parts = [p.strip() for p in split(bracketed[2] if bracketed else gold)]
    if bracketed and len(parts) > 1:
        opening, _, closing = bracketed.groups()
        if parts != parts[::-1]:
            yield "order", opening + ", ".join(reversed(parts)) + closing
        yield "part dropped", opening + ", ".join(parts[:-1]) + closing
        yield "part added", opening + ", ".join([*parts, "7"]) + closing
        if "infty" not in gold:
            yield "open for closed", ("[" if opening == "(" else "(") + ", ".join(parts) + closing
    elif len(parts) > 1 and not re.search(r"\d,(?:\\!)?\d{3}|\\!", gold):
        yield "part dropped", ", ".join(parts[:-1])
        yield "part added", f"{gold}, 7919"
    elif not re.search(r"text|[=<>,]", gold):
        yield "part added", f"{gold}, 7919"


def split(text: str) -> list[str]:
    """The parts between commas outside brackets."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def gold_answers(folder: Path) -> list[str]:
    """Every different gold answer of the problem sets in a folder of JSONL files."""
    golds: dict[str, None] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            answer = row.get("answer", row.get("final_answer", row.get("solution")))
            golds[gold_answer(", ".join(answer) if isinstance(answer, list) else str(answer))] = None
    return list(golds)


# --- graders ----------------------------------------------------------------------------------------------------------


def grade(pairs: list[Pair], qwen: list[str] | None) -> dict[str, list[str]]:
    """Per grader: `right`, `wrong` or, where it failed, `error`, in the order of the pairs."""
    responses = [(gold, rf"So the answer is $\boxed{{{answer}}}$.") for _, gold, answer, _ in pairs]
    with Verifier(workers=1) as verifier:
        verdicts = verifier.verify_many([(response, gold) for gold, response in responses])
    names = {"correct": "right", "wrong": "wrong", "no_answer": "wrong"}
    graded = {"ours": [names.get(v.verdict, "error") for v in verdicts], "math_verify": []}
    for gold, response in responses:
        try:
            same = verify(parse(rf"\boxed{{{gold}}}"), parse(response))
        except Exception:  # whatever it raises is its verdict
            graded["math_verify"].append("error")
        else:
            graded["math_verify"].append("right" if same else "wrong")
    if qwen:
        lines = "".join(json.dumps(pair) + "\n" for pair in responses)
        out = subprocess.run(qwen, input=lines, capture_output=True, text=True, check=True).stdout.splitlines()
        graded["qwen"] = [
            {"true": "right", "false": "wrong", "null": "error"}[line] for line in out if line in ("true", "false", "null")
        ]
        assert len(graded["qwen"]) == len(pairs)
    return graded


def table(pairs: list[Pair], graded: dict[str, list[str]]) -> None:
    titles = ("agrees", "right as right", "wrong as right", "right as wrong", "errors")
    print(f"{'grader':<14}" + "".join(f"{title:>16}" for title in titles))
    for name, verdicts in graded.items():
        cells = Counter((truth, verdict) for (_, _, _, truth), verdict in zip(pairs, verdicts, strict=True))
        agrees = (cells[True, "right"] + cells[False, "wrong"] + cells[False, "error"]) / len(pairs)
        missed = cells[True, "wrong"] + cells[True, "error"]
        errors = cells[True, "error"] + cells[False, "error"]
        print(f"{name:<14}{agrees:16.2%}{cells[True, 'right']:16}{cells[False, 'right']:16}{missed:16}{errors:16}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qwen", help="the folder `evaluation` of a checkout of QwenLM/Qwen2.5-Math")
    parser.add_argument("--qwen-python", default=sys.executable, help="an interpreter with what it needs")
    parser.add_argument("--data", type=Path, help="a folder of JSONL problem sets")
    parser.add_argument(
        "--every", type=int, default=1, help="of the changed gold answers, every how many for the other graders"
    )
    args = parser.parse_args()
    qwen = [args.qwen_python, "-c", QWEN, args.qwen] if args.qwen else None
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"

    pairs = list(dict.fromkeys(test_pairs()))
    print(f"{len(pairs)} pairs of tests/, math-verify {version('math-verify')}, sympy {version('sympy')}, commit {commit}")
    graded = grade(pairs, qwen)
    table(pairs, graded)
    rows = [("pairs", *pair, *(graded[g][i] if g in graded else "" for g in GRADERS)) for i, pair in enumerate(pairs)]

    if args.data:
        golds = gold_answers(args.data)
        changed = [(kind, gold, answer, False) for gold in golds for kind, answer in perturbed(gold)]
        changed = [
            p for p in dict.fromkeys(changed) if not any(map(SAME_AFTER_ALL.search, p[1:3])) and p[1].strip() != p[2].strip()
        ]
        with Verifier(workers=2) as verifier:
            verdicts = verifier.verify_many(
                [(rf"So the answer is $\boxed{{{answer}}}$.", gold) for _, gold, answer, _ in changed]
            )
        counts: dict[str, Counter] = defaultdict(Counter)
        for (kind, gold, answer, _), v in zip(changed, verdicts, strict=True):
            counts[kind][v.verdict] += 1
            if v.verdict == "correct":
                print(f"called right: {answer!r} for {gold!r}")
        print(f"{len(golds)} gold answers, {len(changed)} changed; slowest {max(v.seconds for v in verdicts):.2f} s")
        for kind, verdicts_of_kind in counts.items():
            print(f"  {kind:<22}{sum(verdicts_of_kind.values()):7}  {dict(verdicts_of_kind)}")
        some = changed[:: args.every]
        print(f"{len(some)} of them by every grader")
        graded = grade(some, qwen)
        table(some, graded)
        rows += [
            ("changed gold", *pair, *(graded[g][i] if g in graded else "" for g in GRADERS)) for i, pair in enumerate(some)
        ]

    differ = [row for row in rows if len({*filter(None, row[5:]), "right" if row[4] else "wrong"}) > 1]
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["set", "form", "gold", "answer", "truth", *GRADERS, "commit"])
        writer.writerows([*row[:4], "right" if row[4] else "wrong", *row[5:], commit] for row in differ)
    print(f"{len(differ)} of {len(rows)} differ from the truth or from each other: {RESULTS}")


if __name__ == "__main__":
    main()
