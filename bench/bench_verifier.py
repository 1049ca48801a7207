r"""How many answers a second does the verifier judge, and do hostile ones hold the others up?

    python bench/bench_verifier.py [--answers 20000] [--workers 2]

Typical answers are of the kinds that MATH asks for, in about its shares, half of them right, all different (the result
cache never helps), each at the end of 2,000 characters of working. Hostile ones are towers, factorials, deep nesting
and long garbage, as a policy that looks for holes writes them. An answer that passes the bounds and still hangs sympy
costs one worker the whole time limit; none of these does. Seconds are of wall time, the processes started beforehand;
latency is one answer's own time, without waiting for a worker. Prints a table and appends it to
bench/results/verifier.csv.
"""

import argparse
import csv
import os
import platform
import random
import re
import statistics
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

from rlsp_fast.verifier import Verifier

RESULTS = Path(__file__).parent / "results" / "verifier.csv"
WORKING = "Let me think about it step by step. First, 3 + 4 = 7, so $x = 7$. Wait, let me check that again. " * 20


def typical(rng: random.Random) -> tuple[str, str]:
    """(right answer, gold) of one kind; the answer seldom in the gold's own spelling."""
    a, b, c = rng.randrange(2, 10**6), rng.randrange(2, 1000), rng.randrange(2, 1000)
    kinds = {
        (f"{a:,}", str(a)): 52,
        (rf"\dfrac{{{a}}}{{{b}}}", rf"\frac{{{a}}}{{{b}}}"): 18,
        (rf"\frac{{{b}}}{{{c}}}\sqrt{{{a}}}", rf"\frac{{{b}\sqrt{{{a}}}}}{{{c}}}"): 6,
        (rf"{a}\pi", rf"{a} \pi"): 4,
        (f"({b}, {c})", rf"\left({b},{c}\right)"): 4,
        (f"({b}x+{c})(x+1)", f"{b}x^2+{b + c}x+{c}"): 3,
        (f"{c},{b + 1000}", f"{b + 1000}, {c}"): 3,
        (f"[{b}, {b + c})", rf"{b} \le x < {b + c}"): 3,
        (rf"{a}\text{{ cm}}", str(a)): 3,
        (f"{b}^\\circ", f"{b}"): 2,
        (rf"\begin{{bmatrix}}{b} & 1\\{c} & 0\end{{bmatrix}}", rf"\begin{{pmatrix}}{b}&1\\{c}&0\end{{pmatrix}}"): 2,
    }
    return rng.choices(list(kinds), list(kinds.values()))[0]


def hostile(rng: random.Random) -> str:
    n = rng.randrange(20, 10**4)
    return rng.choice(
        [
            f"{n}^{{{n}^{{{n}}}}}",
            f"{n}**{n}**{n}",
            f"{n}{n}!",
            rf"\binom{{{n}00000}}{{{n}}}",
            r"\sqrt{2+" * n + "2" + "}" * n,
            r"\sin(" * 24 + str(n) + ")" * 24,
            "{" * n + "6" + "}" * n,
            "(" * 20 + str(n) + ")" * 20 + "^x",
            "7" * 10 * n,
            f"(x+{n})^{{1500}}",
            rf"\lfloor 10^{{2000}}\pi+{n} \rfloor",
            "+".join(rf"\sqrt{{{n + i}}}" for i in range(60)),
            f"__import__('os').system('sleep {n}')",
            "\x00\ud800" * n,
        ]
    )


def measure(share: float, answers: int, workers: int) -> dict[str, float]:
    rng = random.Random(0)
    pairs = []
    for _ in range(answers):
        answer, gold = typical(rng)
        if rng.random() < 0.5:
            answer = typical(rng)[0]
        if rng.random() < share:
            answer = hostile(rng)
        pairs.append((rf"{WORKING}The answer is $\boxed{{{answer}}}$.", gold))
    with Verifier(workers=workers) as verifier:
        verifier.verify_many([(rf"\boxed{{\sqrt{{{i * i * 2}}}}}", rf"{i}\sqrt{{2}}") for i in range(2, 2 + 8 * workers)])
        asked = len(verifier._cache)
        start = time.perf_counter()
        verdicts = verifier.verify_many(pairs)
        seconds = time.perf_counter() - start
        asked = len(verifier._cache) - asked
    own = statistics.quantiles((v.seconds for v in verdicts), n=100)
    return {
        "hostile": share,
        "answers_per_s": answers / seconds,
        "p50_ms": own[49] * 1e3,
        "p99_ms": own[98] * 1e3,
        "max_ms": max(v.seconds for v in verdicts) * 1e3,
        "symbolic": asked / answers,
        "correct": sum(v.verdict == "correct" for v in verdicts) / answers,
        "timeout": sum(v.verdict == "timeout" for v in verdicts) / answers,
        "error": sum(v.verdict == "error" for v in verdicts) / answers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    git = ["git", "-C", str(RESULTS.parent.parent), "describe", "--always", "--dirty"]
    cpu = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    run = {
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown",
        "cpu": f"{cpu[0] if cpu else platform.processor()} ({len(os.sched_getaffinity(0))} cores)",
        "python": platform.python_version(),
        "sympy": version("sympy"),
        "math_verify": version("math-verify"),
        "answers": args.answers,
        "workers": args.workers,
    }
    print(f"{args.answers} answers, {args.workers} workers, {run['cpu']}")
    titles = (
        ("answers/s", 11),
        ("p50 ms", 9),
        ("p99 ms", 9),
        ("max ms", 9),
        ("symbolic", 10),
        ("correct", 9),
        ("errors", 8),
    )
    print(" hostile" + "".join(f"{title:>{width}}" for title, width in titles))
    rows = []
    for share in (0.0, 0.05):
        m = measure(share, args.answers, args.workers)
        print(
            f"{share:8.0%}{m['answers_per_s']:11.0f}{m['p50_ms']:9.3f}{m['p99_ms']:9.2f}{m['max_ms']:9.1f}"
            f"{m['symbolic']:10.1%}{m['correct']:9.1%}{m['timeout'] + m['error']:8.2%}"
        )
        rows.append(run | {name: f"{value:.5g}" for name, value in m.items()})
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)
    print(f"appended to {RESULTS}")


if __name__ == "__main__":
    main()
