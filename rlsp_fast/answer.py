"""What a final answer says, as a small tree, and whether two trees say the same.

Exact arithmetic settles integers, fractions, decimals, percentages and units, part by part in tuples, sets, intervals
and matrices; what needs algebra stays open (None) and goes to a worker process. Nothing is computed in floats.
`notation.py` makes the trees; every expression in one is small enough to compute with (`check_size`).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import comb, factorial, gcd, isqrt, lcm, log10, prod
from typing import Protocol

MAX_DIGITS = 5_000
"""Digits of numerator and denominator of any number in an expression, estimated from above."""

Expr = tuple
"""("num", Fraction) | ("sym", name) | ("const", name) | ("foreign", LaTeX) | (operation, Expr, ...)."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit of measurement, or the words after a number."""

    words: frozenset[str]
    dims: tuple[tuple[str, int], ...] | None
    """Powers of base dimensions; None when a word is not in the table."""
    factor: Fraction = Fraction(1)
    """How many base units it is."""


@dataclass(frozen=True, slots=True)
class Value:
    expr: Expr
    unit: Unit | None = None


@dataclass(frozen=True, slots=True)
class Words:
    text: str


@dataclass(frozen=True, slots=True)
class Named:
    """`x = 5`, `f(x) = x^2`, `x \\in [0, 1)`."""

    name: str
    body: "Node"


@dataclass(frozen=True, slots=True)
class Equation:
    """`difference op 0`, for an equation or inequality that does not define one name."""

    op: str
    difference: Expr


@dataclass(frozen=True, slots=True)
class Seq:
    """Several parts. An interval or a point is told apart only by its brackets: (1, 2) can be either."""

    kind: str
    """`,` bare list, `{}` set, `U` union, `M` matrix of `R` rows, `=` chain of equals, `:` ratio, else its brackets."""
    parts: tuple["Node", ...]


Node = Value | Words | Named | Equation | Seq


class Algebra(Protocol):
    """How two expressions are compared: exactly here, symbolically in a worker."""

    def equal(self, gold: Expr, answer: Expr) -> bool | None:
        """Whether both are the same number or function; None when that stays open."""

    def proportional(self, gold: Expr, answer: Expr, positive: bool) -> bool | None:
        """Whether one is the other times a constant other than 0 (above 0 if `positive`); None when that stays open."""


class NotMath(Exception):
    """The text does not read as mathematics within the bounds."""


# --- expressions ------------------------------------------------------------------------------------------------------

INFINITY = ("const", "inf")
MINUS_INFINITY = ("neg", INFINITY)
ONE = ("num", Fraction(1))


def number(value: Fraction) -> Expr:
    return ("num", value)


def minus(left: Expr, right: Expr) -> Expr:
    return ("add", left, ("neg", right))


def symbols(expr: Expr) -> frozenset[str]:
    """Names of the variables in an expression."""
    if expr[0] == "sym":
        return frozenset({expr[1]})
    return frozenset().union(*(symbols(e) for e in expr[1:] if isinstance(e, tuple)))


def check_size(expr: Expr) -> float:
    """Digits of numerator and denominator together, from above; a variable counts as a number of about 3.

    Raises:
        NotMath: above MAX_DIGITS.
    """
    match expr:
        case ("num", value):
            digits = log10(abs(value.numerator) + 1) + log10(value.denominator)
        case ("sym" | "const", _):
            digits = 0.5
        case ("pow", base, exponent):
            check_size(exponent)
            size, power = check_size(base), exact(exponent)
            times = float(min(abs(power), 10**6)) if power is not None else 10 ** min(check_size(exponent), 9)
            digits = size * max(times, 1.0)
        case ("exp", argument):
            digits = 10 ** min(check_size(argument), 9)
        case ("factorial" | "factorial2" | "binomial", argument, *_):
            n = 10 ** min(check_size(argument), 9)
            digits = n * log10(n + 1)
        case (_, *arguments):
            digits = sum(check_size(a) for a in arguments)
    if digits > MAX_DIGITS:
        raise NotMath
    return digits


def exact(expr: Expr) -> Fraction | None:
    """The rational number an expression is; None when it is none, or when showing so takes more than arithmetic."""
    operation, *arguments = expr
    if operation == "num":
        return arguments[0]
    if operation == "const":
        return Fraction(1, 100) if arguments[0] == "percent" else None
    if operation in ("sym", "foreign"):
        return None
    values = [exact(a) for a in arguments]
    if None in values:
        return None
    whole = all(v.denominator == 1 for v in values)
    match operation, values:
        case "neg", [a]:
            return -a
        case "inv", [a]:
            return 1 / a if a else None
        case "add", _:
            return sum(values, Fraction(0))
        case "mul", _:
            result = Fraction(1)
            for v in values:
                result *= v
            return result
        case "pow", [a, n] if n.denominator == 1 and (a or n > 0):
            return a ** int(n)
        case "sqrt", [a] if a >= 0:
            root = Fraction(isqrt(a.numerator), isqrt(a.denominator))
            return root if root * root == a else None
        case "abs", [a]:
            return abs(a)
        case "floor", [a]:
            return Fraction(a.numerator // a.denominator)
        case "ceiling", [a]:
            return Fraction(-(-a.numerator // a.denominator))
        case "factorial", [a] if whole and a >= 0:
            return Fraction(factorial(int(a)))
        case "factorial2", [a] if whole and a >= 0:
            return Fraction(prod(range(int(a), 0, -2)))
        case "binomial", [n, k] if whole and n >= 0 and k >= 0:
            return Fraction(comb(int(n), int(k)))
        case "gcd", _ if whole:
            return Fraction(gcd(*map(int, values)))
        case "lcm", _ if whole:
            return Fraction(lcm(*map(int, values)))
        case "max", _:
            return max(values)
        case "min", _:
            return min(values)
    return None


class Exact:
    """Rational arithmetic and nothing else: what it cannot settle stays open."""

    def equal(self, gold: Expr, answer: Expr) -> bool | None:
        if gold == answer:
            return True
        if is_infinite(gold) or is_infinite(answer):
            return False
        if gold[0] == answer[0] == "mul" and gold[-1] == answer[-1] and gold[-1][0] == "const":
            return self.equal((*gold[:-1], ONE), (*answer[:-1], ONE))  # 2 pi and 3 pi, 30 and 45 degrees
        a, b = exact(gold), exact(answer)
        return None if a is None or b is None else a == b

    def proportional(self, gold: Expr, answer: Expr, positive: bool) -> bool | None:
        return True if gold == answer else None


def is_infinite(expr: Expr) -> bool:
    return expr in (INFINITY, MINUS_INFINITY)


# --- units ------------------------------------------------------------------------------------------------------------

_UNIT_TABLE = """
length 1 m meter metre
length 1/100 cm centimeter centimetre
length 1/1000 mm millimeter millimetre
length 1000 km kilometer kilometre
length 127/5000 in inch inche
length 381/1250 ft foot feet
length 1143/1250 yd yard
length 201168/125 mi mile
length^3 1/1000 L l liter litre
length^3 1/1000000 mL ml milliliter millilitre
mass 1 g gram gm
mass 1000 kg kilogram
mass 1/1000 mg milligram
mass 45359237/100000 lb pound
mass 45359237/1600000 oz ounce
time 1 s sec second
time 60 min minute
time 3600 h hr hour
time 86400 day
time 604800 week
month 1 month
month 12 yr year
money 1 $ dollar usd
money 1/100 ¢ cent
euro 1 € euro eur
sterling 1 £ gbp
yen 1 ¥ yen
rupee 1 ₹ rupee rs
gallon 1 gal gallon
gallon 1/4 qt quart
gallon 1/8 pt pint
celsius 1 C celsius
fahrenheit 1 F fahrenheit
temperature 1 K kelvin
force 1 N newton
energy 1 J joule
energy 1000 kJ kilojoule
power 1 W watt
power 1000 kW kilowatt
frequency 1 Hz hertz
pressure 1 Pa pascal
voltage 1 V volt
current 1 A ampere amp
amount 1 mol mole
"""
_UNITS: dict[str, tuple[str, str, int, Fraction]] = {}
"""Spelling -> (first spelling, dimension, power, factor)."""
for _line in _UNIT_TABLE.split("\n")[1:-1]:
    _dimension, _factor, *_spellings = _line.split()
    _base, _, _power = _dimension.partition("^")
    _UNITS |= {name: (_spellings[0], _base, int(_power or 1), Fraction(_factor)) for name in _spellings}
_COMPOUND = {"mph": ("mi", "/", "h"), "kph": ("km", "/", "h"), "kmh": ("km", "/", "h"), "kmph": ("km", "/", "h")}
_POWER_BEFORE = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_POWER_AFTER = {"squared": 2, "cubed": 3}
_NO_UNIT = set(
    "unit rad radian a an of the total each only exactly is are there answer about around approximately roughly nearly "
    "final result it so we get have has hence thus therefore value sum equal to".split()
)


def known_unit(word: str) -> str | None:
    """The spelling of a unit in the table: its own, in small letters, or without the plural's s."""
    small = word.lower() if len(word) > 1 else word
    singular = small.removesuffix("s") if len(small) > 2 else small
    return next((form for form in (word, small, singular) if form in _UNITS), None)


def unit_of(spelled: Iterable[str]) -> Unit | None:
    """`cm^2`, `miles per hour`, `apples`. None when it says nothing, as `units` does."""
    words: set[str] = set()
    dims: dict[str, int] = {}
    factor = Fraction(1)
    known, sign, power, last = True, 1, 1, (Fraction(1), "", 0)
    texts = [part for word in spelled if word not in "{}" for part in _COMPOUND.get(word.lower(), (word,))]
    for i, text in enumerate(texts):
        lower = text.lower()
        exponent = 1
        if lower in _POWER_BEFORE:
            power = _POWER_BEFORE[lower]
        elif lower in ("/", "per"):
            sign = -1
        elif lower in _POWER_AFTER:
            exponent = _POWER_AFTER[lower]
        elif text.isdigit() and len(text) == 1 and texts[i - 1] == "^":
            exponent = int(text)
        elif text.isdigit() and len(text) == 1 and texts[i - 2 : i] == ["^", "-"]:
            exponent = -int(text)
        elif text == "-" or text in "^{}.*" or lower.removesuffix("s") in _NO_UNIT:
            continue
        elif form := known_unit(text):
            first, base, degree, scale = _UNITS[form]
            last = (scale, base, sign * power * degree)
            words.add(first)
            dims[base] = dims.get(base, 0) + last[2]
            factor *= scale ** (sign * power)
            power = 1
        else:
            known = False
            words.add(lower.removesuffix("s"))
        if exponent != 1 and last[1]:  # the exponent after it: one factor is counted already
            dims[last[1]] += (exponent - 1) * last[2]
            factor *= last[0] ** ((exponent - 1) * (1 if last[2] > 0 else -1))
    if not words:
        return None
    return Unit(frozenset(words), tuple(sorted(dims.items())) if known else None, factor if known else Fraction(1))


def _agree(gold: Unit | None, answer: Unit | None) -> bool:
    """A missing unit agrees with any: few gold answers name theirs."""
    if gold is None or answer is None:
        return True
    if gold.dims is not None and answer.dims is not None:
        return gold.dims == answer.dims
    return bool(gold.words & answer.words)


# --- comparison -------------------------------------------------------------------------------------------------------


def any_of(results: Iterable[bool | None]) -> bool | None:
    """True if one is, else None if one is open."""
    results = list(results)
    return True if True in results else None if None in results else False


def _all_of(results: Iterable[bool | None]) -> bool | None:
    results = list(results)
    return False if False in results else None if None in results else True


def same(gold: Node, answer: Node, algebra: Algebra) -> bool | None:
    """`compare` for two trees."""
    if gold == answer:
        return True
    match gold, answer:
        case (Named(name=name, body=Seq(kind="()", parts=parts) as body), Seq(kind=",", parts=others)):
            names = name.strip("()").split(",")
            if len(names) == len(parts) and {p.name for p in others if isinstance(p, Named)} == set(names):
                return same(Seq(",", tuple(map(Named, names, parts))), answer, algebra)
            return same(body, answer, algebra)
        case (Named(name=name, body=body), Named(name=other, body=other_body)):
            same_name = name == other or "y" in (name, other) and any(n.endswith("(x)") for n in (name, other))
            return same(body, other_body, algebra) if same_name else False
        case (Named(name=name, body=Value(expr=expr)), Equation(op="=", difference=other)) if symbols(expr):
            return algebra.proportional(minus(("sym", name), expr), other, False)
        case (Equation(op="=", difference=expr), Named(name=name, body=Value(expr=other))) if symbols(other):
            return algebra.proportional(expr, minus(("sym", name), other), False)
        case (Named(body=body), Value() | Seq() | Words()):
            return same(body, answer, algebra)
        case (Value() | Seq() | Words(), Named(body=body)):
            return same(gold, body, algebra)
        case (Seq(kind="=", parts=parts), _):
            return _all_of(same(p, answer, algebra) for p in parts)
        case (_, Seq(kind="=", parts=parts)):
            return _all_of(same(gold, p, algebra) for p in parts)
        case (Value(), Value()):
            return _same_value(gold, answer, algebra)
        case (Equation(), Equation()):
            positive = gold.op not in ("=", "!=")
            return gold.op == answer.op and algebra.proportional(gold.difference, answer.difference, positive)
        case (Seq(), Seq()):
            return _same_parts(gold, answer, algebra)
        case (Named(), Equation()) | (Equation(), Named()):
            relations = [_inequality(n) if isinstance(n, Named) else n for n in (gold, answer)]
            return None not in relations and same(*relations, algebra)
        case (Value(), Equation(op="=", difference=("add", ("add", *terms), ("neg", value)))):  # a + b = 12
            total = all(t[0] == "sym" for t in terms) and len(set(terms)) == len(terms)
            return total and same(gold, Value(value), algebra)
        case (Seq(kind="{}", parts=(part,)), Value()):
            return same(part, answer, algebra)
        case (Value(), Seq(kind="{}", parts=(part,))):
            return same(gold, part, algebra)
    return False


def _inequality(named: Named) -> Equation | None:
    """The inequality that a half line is; None for anything else."""
    match named.body:
        case Seq(kind=kind, parts=(Value(expr=low), Value(expr=high))) if kind in ("()", "(]", "[)"):
            if is_infinite(low) != is_infinite(high):
                bound, at = (high, kind[1]) if is_infinite(low) else (low, kind[0])
                difference = minus(("sym", named.name), bound) if is_infinite(low) else minus(bound, ("sym", named.name))
                return Equation("<=" if at in "[]" else "<", difference)
    return None


def _same_value(gold: Value, answer: Value, algebra: Algebra) -> bool | None:
    """Numbers with units. A percent or degree sign that one side lacks may be meant or not: 50% is 50 and 0.5."""
    if not _agree(gold.unit, answer.unit):
        return False
    g, a = gold.expr, answer.expr
    if gold.unit and answer.unit and gold.unit.factor != answer.unit.factor:
        g, a = (("mul", e, number(u.factor)) for e, u in ((g, gold.unit), (a, answer.unit)))
    pairs = [(g, a)]
    if gold.unit is None and answer.unit and answer.unit.dims == (("money", 1),) and answer.unit.factor != 1:
        pairs.append((g, ("mul", a, number(answer.unit.factor))))  # 99 cents for 0.99
    for sign in ("percent", "degree"):
        if _has(g, sign) != _has(a, sign):
            bare = _without_sign(g, sign), _without_sign(a, sign)
            size = exact(bare[0])
            radians = sign == "degree" and _has(bare[0], "pi")
            fraction = sign == "percent" and size is not None and abs(size) <= 1  # 0.5% for 0.5 is wrong
            if not radians and not fraction:
                pairs.append(bare)
    return any_of(algebra.equal(*pair) for pair in pairs)


def _has(expr: Expr, sign: str) -> bool:
    return expr == ("const", sign) or any(_has(e, sign) for e in expr[1:] if isinstance(e, tuple))


def _without_sign(expr: Expr, sign: str) -> Expr:
    if expr == ("const", sign):
        return ONE
    return (expr[0], *(_without_sign(e, sign) if isinstance(e, tuple) else e for e in expr[1:]))


def _same_parts(gold: Seq, answer: Seq, algebra: Algebra) -> bool | None:
    if gold.kind == "M" and answer.kind != "M":
        gold = _as_vector(gold)
    if answer.kind == "M" and gold.kind != "M":
        answer = _as_vector(answer)
    g, a = gold.parts, answer.parts if gold.kind != "()" else _in_order(answer.parts)
    if len(g) != len(a) or not _compatible(gold, answer):
        return False
    names = [p.name for p in (*g, *a) if isinstance(p, Named)]
    assignments = 0 < len(names) < len(g) + len(a) and len(set(names)) == len(names) > 1
    if {gold.kind, answer.kind} <= {",", "{}", "U"} and not assignments:
        return _same_set(g, a, algebra)
    if gold.kind == ":" and all(isinstance(p, Value) and exact(p.expr) for p in (*g, *a)):  # 1:2:3 is 2:4:6
        crossed = ((("mul", x.expr, a[0].expr), ("mul", y.expr, g[0].expr)) for x, y in zip(g, a, strict=True))
        return _all_of(algebra.equal(*pair) for pair in crossed)
    return _all_of(same(x, y, algebra) for x, y in zip(g, a, strict=True))


def _in_order(parts: tuple[Node, ...]) -> tuple[Node, ...]:
    """`y = 2, x = 1` is the point (1, 2): names that follow each other in the alphabet say which part is which."""
    names = sorted(p.name for p in parts if isinstance(p, Named) and len(p.name) == 1)
    if len(names) < len(parts) or any(ord(b) - ord(a) != 1 for a, b in zip(names, names[1:], strict=False)):
        return parts
    return tuple(sorted(parts, key=lambda p: p.name))


def _as_vector(matrix: Seq) -> Seq:
    """A matrix of one row or one column as a tuple."""
    rows = matrix.parts
    if len(rows) == 1:
        return Seq("()", rows[0].parts)
    return Seq("()", tuple(row.parts[0] for row in rows)) if all(len(r.parts) == 1 for r in rows) else matrix


def _compatible(gold: Seq, answer: Seq) -> bool:
    """Brackets tell [0, 1] from [0, 1); a list may lack those of a tuple or a set."""
    kinds = {gold.kind, answer.kind}
    if len(kinds) == 1 or kinds in ({",", "{}"}, {",", "U"}):
        return True
    endless = any(isinstance(p, Value) and is_infinite(p.expr) for p in (*gold.parts, *answer.parts))
    if kinds == {",", "()"}:
        return not endless
    return kinds in ({",", "[]"}, {"()", "[]"}) and len(gold.parts) > 2  # two numbers in [] are an interval


def _same_set(gold: tuple[Node, ...], answer: tuple[Node, ...], algebra: Algebra) -> bool | None:
    """Each part of one has its own equal in the other, in any order."""
    left = list(answer)
    open_ = False
    for g in gold:
        results = [same(g, a, algebra) for a in left]
        if True in results:
            left.pop(results.index(True))
        elif None in results:
            open_ = True
        else:
            return False
    return None if open_ else True
