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
POINTS = (("13/9", "17/7", "11/5", "19/8"), ("3/10", "7/9", "5/13", "4/7"), ("29/10", "8/3", "7/3", "9/4"))
"""Where functions are compared: between 0 and 3, on both sides of 1."""

_FUNCTIONS = {
    "neg": lambda a: -a,
    "inv": lambda a: 1 / a,
    "add": sympy.Add,
    "mul": sympy.Mul,
    "pow": sympy.Pow,
    "abs": sympy.Abs,
    "ln": sympy.log,
    "factorial": sympy.factorial,
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
        names = g.free_symbols | a.free_symbols
        point = _points(names)[0]
        at_gold, at_answer = g.subs(point), a.subs(point)
        if at_gold == 0 or at_answer == 0 or positive and not (at_gold / at_answer).is_positive:
            return False
        return _identical(g * at_answer, a * at_gold)


def _points(names: set[sympy.Symbol]) -> list[dict[sympy.Symbol, sympy.Rational]]:
    """Values for the variables, by name so that every worker tries the same."""
    ordered = sorted(names, key=lambda s: s.name)
    return [{s: sympy.Rational(values[i % len(values)]) + i // len(values) for i, s in enumerate(ordered)} for values in POINTS]


def _identical(a: sympy.Expr, b: sympy.Expr) -> bool:
    difference = a - b
    if difference == 0:
        return True
    names = difference.free_symbols
    tried = 0
    for point in _points(names) if names else [{}]:
        value = difference.subs(point)
        if value.is_finite is False or value.has(sympy.nan, sympy.zoo):
            continue
        if not _is_zero(value):
            return False
        tried += 1
    for point in _points(names)[:1]:
        for name in sorted(names, key=str)[:4]:
            beyond = point | {name: -point[name]}
            x, y = a.subs(beyond), b.subs(beyond)
            if _is_real(x) and _is_real(y) and not _is_zero(x - y):
                return False
    return tried > 0


def _is_zero(value: sympy.Expr) -> bool:
    try:
        return value.evalf(2, maxn=DIGITS, strict=True) == 0
    except PrecisionExhausted:
        pass
    # Its terms cancel, or one cannot be evaluated at all (the floor of a huge number), which proves nothing.
    try:
        terms = [term.evalf(DIGITS, maxn=2 * DIGITS, strict=True) for term in sympy.Add.make_args(value)]
    except PrecisionExhausted:
        return False
    return abs(sum(terms)) <= max(map(abs, terms)) * sympy.Float(10) ** (10 - DIGITS)


def _is_real(value: sympy.Expr) -> bool:
    number = value.evalf(15)
    return bool(number.is_finite and number.is_number and abs(sympy.im(number)) < 1e-9)


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
