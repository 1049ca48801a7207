"""The symbolic half of the verifier, run in a process of its own: `python -m rlsp_fast.verify_worker`.

One JSON object per line in, one per line out. The parent kills a worker that takes too long; here the kernel bounds its
memory, CPU seconds and files, so that a worker that outlives its parent ends too.
"""

import json
import logging
import os
import resource
import sys
from functools import lru_cache

import sympy
from math_verify import LatexExtractionConfig, parse
from sympy.core.evalf import PrecisionExhausted

from rlsp_fast.answer import Expr, is_infinite
from rlsp_fast.notation import compare

MEMORY_BYTES = 2 << 30
FILE_BYTES = 1 << 20
DIGITS = 100
"""Two numbers that agree to this many digits are equal: exact zeros are what sympy cannot always prove."""
MOST_DIGITS = 2_000
"""Worked with where terms of a difference cancel; beyond, nothing counts as equal."""
POINTS = (("13/9", "17/7", "11/5", "19/8"), ("3/10", "7/9", "5/13", "4/7"), ("29/10", "8/3", "7/3", "9/4"))
"""Where functions are compared: between 0 and 3, on both sides of 1."""
WHOLE_POINTS = (("4", "7", "3", "5"), ("7", "4", "6", "8"), ("9", "5", "8", "6"))
"""The same for what is defined for whole numbers only."""
STEP_POINTS = tuple(tuple(f"{7 * i + j}/{2 + i % 3}" for j in (5, 9, 1, 3)) for i in range(24))
"""The same for steps, which agree over long stretches: the floors of n/3 and n/4 up to n = 2."""
WHOLE_STEP_POINTS = tuple(tuple(str(i + j) for j in (1, 8, 3, 5)) for i in range(30))
WHOLE_NAMES = set("ijkmnKMN")
"""Variables that in steps are whole: the ceiling of n/2 is the floor of (n + 1)/2."""

_FUNCTIONS = {
    "neg": lambda a: -a,
    "inv": lambda a: 1 / a,
    "add": sympy.Add,
    "mul": sympy.Mul,
    "pow": sympy.Pow,
    "abs": sympy.Abs,
    "ln": sympy.log,
    "root": lambda a, n: _root(a, n),
    "factorial": sympy.factorial,
    "factorial2": sympy.factorial2,
    "max": sympy.Max,
    "min": sympy.Min,
    **{name: getattr(sympy, name) for name in ("sqrt", "log", "exp", "floor", "ceiling", "binomial", "gcd", "lcm")},
    **{name: getattr(sympy, name) for name in ("sin", "cos", "tan", "sec", "csc", "cot", "sinh", "cosh", "tanh")},
    **{f"arc{name}": getattr(sympy, f"a{name}") for name in ("sin", "cos", "tan", "sec", "csc", "cot")},
    **{f"arc{name}": getattr(sympy, f"a{name}") for name in ("sinh", "cosh", "tanh")},
}
_CONSTANTS = {
    "pi": sympy.pi,
    "e": sympy.E,
    "i": sympy.I,
    "inf": sympy.oo,
    "percent": sympy.Rational(1, 100),
    "degree": sympy.pi / 180,
}
_GIVES_UP = (ArithmeticError, AttributeError, LookupError, NotImplementedError, RecursionError, TypeError, ValueError)
"""What sympy raises on input it has no rule for. MemoryError is not among them: it ends the worker."""


class Symbolic:
    """Equality by sympy: the difference is zero as it stands, or to DIGITS digits wherever it is tried.

    Trying points bounds the time and settles identities that simplification misses; a difference that is not zero is
    found at once. Variables are positive; where both sides are real for a negative one they must agree there too,
    so |x| is not x, and log(x^2) is 2 log x.
    """

    def equal(self, gold: Expr, answer: Expr) -> bool:
        if is_infinite(gold) or is_infinite(answer):
            return gold == answer
        return _identical(_sympy(gold), _sympy(answer))

    def proportional(self, gold: Expr, answer: Expr, positive: bool) -> bool:
        g, a = _sympy(gold), _sympy(answer)
        point = _points(sympy.Tuple(g, a))[0]
        at_gold, at_answer = g.subs(point), a.subs(point)
        if at_gold == 0 or at_answer == 0 or positive and not (at_gold / at_answer).is_positive:
            return False
        return _identical(g * at_answer, a * at_gold)


def _points(expr: sympy.Expr) -> list[dict[sympy.Symbol, sympy.Rational]]:
    """Values for the variables, by name so that every worker tries the same."""
    ordered = sorted(expr.free_symbols, key=lambda s: s.name)
    points = WHOLE_POINTS if expr.has(sympy.factorial2) else POINTS
    if expr.has(sympy.floor, sympy.ceiling):
        points = WHOLE_STEP_POINTS if {s.name for s in ordered} <= WHOLE_NAMES else POINTS + STEP_POINTS
    return [{s: sympy.Rational(values[i % len(values)]) + i // len(values) for i, s in enumerate(ordered)} for values in points]


def _identical(a: sympy.Expr, b: sympy.Expr) -> bool:
    if a - b == 0:
        return True
    names = (a - b).free_symbols
    points = _points(a - b) if names else [{}]
    tried = 0
    for point in points:
        x, y = a.subs(point), b.subs(point)
        if (x - y).is_finite is False or (x - y).has(sympy.nan, sympy.zoo):
            continue
        if not _close(x, y):
            return False
        tried += 1
    for name in sorted(names, key=str)[:4] if not (a - b).has(sympy.factorial2) else ():
        beyond = points[0] | {name: -points[0][name]}
        x, y = a.subs(beyond), b.subs(beyond)
        if _is_real(x) and _is_real(y) and not _close(x, y):
            return False
    return tried > 0


def _close(gold: sympy.Expr, answer: sympy.Expr) -> bool:
    """Whether two numbers agree to DIGITS digits of the first, or to DIGITS decimals if that is 0."""
    difference = gold - answer
    try:
        return difference.evalf(2, maxn=DIGITS, strict=True) == 0
    except PrecisionExhausted:
        pass
    # Its terms cancel, or one cannot be evaluated at all (the floor of a huge number), which proves nothing. Cancelling
    # is no proof either: of 10^200 (sqrt 2 + sqrt 3 - sqrt(5 + 2 sqrt 6)) + 1 the 1 is left, 200 digits down.
    try:
        size = abs(gold.evalf(2, maxn=DIGITS, strict=True)) or sympy.Integer(1)
        terms = sympy.Add.make_args(difference)
        largest = max(abs(term.evalf(2, maxn=DIGITS, strict=True)) for term in terms)
        digits = DIGITS + max(0, int(sympy.log(largest / size, 10)) + 1)
        if digits > MOST_DIGITS:
            return False
        total = sum(term.evalf(digits, maxn=2 * digits, strict=True) for term in terms)
    except PrecisionExhausted:
        return False
    return bool(abs(total) <= size * sympy.Float(10) ** (10 - DIGITS))


def _is_real(value: sympy.Expr) -> bool:
    number = value.evalf(15)
    return bool(number.is_finite and number.is_number and abs(sympy.im(number)) < 1e-9)


def _root(a: sympy.Expr, n: sympy.Expr) -> sympy.Expr:
    """The n-th root, the real one of a negative number if n is odd."""
    if n.is_integer and n.is_odd and a.is_negative:
        return -sympy.root(-a, n)
    return sympy.root(a, n)


@lru_cache(maxsize=1024)
def _sympy(expr: Expr) -> sympy.Expr:
    operation, *arguments = expr
    match operation:
        case "num":
            return sympy.Rational(arguments[0].numerator, arguments[0].denominator)
        case "sym":
            return sympy.Symbol(arguments[0])
        case "const":
            return _CONSTANTS[arguments[0]]
        case "foreign":
            return _foreign(arguments[0])
    return _FUNCTIONS[operation](*map(_sympy, arguments))


def _foreign(latex: str) -> sympy.Expr:
    """Sums, integrals and limits, as math-verify reads them."""
    parsed = parse(f"${latex}$", extraction_config=[LatexExtractionConfig()], parsing_timeout=None)
    if not parsed or not isinstance(parsed[0], sympy.Expr):
        raise ValueError("not an expression")
    value = parsed[0].subs({s: sympy.Symbol(s.name) for s in parsed[0].free_symbols}).doit()
    if value.has(sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit):
        raise ValueError("no closed form")
    return value


def _limit_this_process() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _allow_cpu(seconds: float) -> None:
    """This job's share: the limit counts from the start of the process, so it moves on with every job."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime + seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


def main() -> None:
    """Answers one question after the other until standard input ends."""
    _limit_this_process()
    logging.disable()
    replies = os.fdopen(os.dup(1), "w", encoding="ascii", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no reply
    # The first use of sympy and of the LaTeX parser takes half a second: not on a job's time.
    compare(r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", Symbolic())
    compare(r"\sum_{k=1}^{3} k", "6", Symbolic())
    replies.write("ready\n")
    for line in sys.stdin:
        job = json.loads(line)
        _allow_cpu(job["timeout_s"])
        try:
            verdict = "correct" if compare(job["gold"], job["answer"], Symbolic()) else "wrong"
        except _GIVES_UP:
            verdict = "error"
        replies.write(verdict + "\n")


if __name__ == "__main__":
    main()
