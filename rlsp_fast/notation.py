r"""Reads a final answer, in LaTeX or plain text, into the trees of `answer.py`.

Whatever does not read as mathematics, or whose numbers would pass `MAX_DIGITS` digits, is kept as words and equals only
the same words: `10^{10^{10}}` never becomes a number. No text is ever evaluated as Python.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import product
from typing import NamedTuple, NoReturn

from rlsp_fast.answer import (
    INFINITY,
    MINUS_INFINITY,
    ONE,
    Algebra,
    Equation,
    Expr,
    Named,
    Node,
    NotMath,
    Seq,
    Unit,
    Value,
    Words,
    any_of,
    check_size,
    exact,
    is_infinite,
    known_unit,
    minus,
    number,
    same,
    symbols,
    unit_of,
)
from rlsp_fast.spelling import respell, variants

MAX_CHARS = 2_000
"""A longer answer is right only if it is the gold answer, character by character."""
MAX_TOKENS = 600
MAX_PARTS = 100
MAX_DEPTH = 25
MAX_UNIT_TOKENS = 24
FUNCTION_DEPTH = 4
"""Nested brackets, functions and exponents together."""


# --- text to tokens ---------------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""(?P<gap>(?:\s|~|\{\}|\\[ ,;:>!]|\\q?quad(?![A-Za-z]))*)
    (?:(?P<num>\d+(?:\.\d+)?|\.\d+)
    |\\(?:text[a-z]*|[mh]box|emph|mathrm|operatorname\*?)\s*\{(?P<roman>[^{}]*)\}
    |\\(?P<edge>begin|end)\s*\{(?P<environment>[^{}]+)\}
    |(?P<degree>\^\s*(?:\\circ|\{\s*\\circ\s*\}|\\degree)(?![A-Za-z])|\\degree(?![A-Za-z]))
    |\\(?P<command>[A-Za-z]+|.)
    |(?P<word>[A-Za-z]+)
    |(?P<op>[<>!]=|\*\*|\S)|\Z)""",
    re.VERBOSE | re.DOTALL,
)
_COMMANDS = {
    "times": "*", "cdot": "*", "ast": "*", "div": "/", "le": "<=", "leq": "<=", "leqslant": "<=", "ge": ">=",
    "geq": ">=", "geqslant": ">=", "lt": "<", "gt": ">", "ne": "!=", "neq": "!=", "approx": "≈", "simeq": "≈",
    "in": "∈", "cup": "∪", "setminus": "∖", "backslash": "∖", "pm": "±", "mp": "∓", "{": r"\{", "}": r"\}",
    "lbrace": r"\{", "rbrace": r"\}", "lvert": "|", "rvert": "|", "vert": "|", "mid": "|", "|": "||", "%": "%",
    "$": "$", "&": "&", "\\": r"\\", "colon": ":", "wedge": "and", "land": "and", "vee": "or", "lor": "or",
    "infty": "infinity", "varphi": "phi", "varepsilon": "epsilon", "tfrac": "frac", "dfrac": "frac", "cfrac": "frac",
    "dbinom": "binom", "tbinom": "binom", "varnothing": "emptyset",
    "textdegree": "°", "dots": "…", "ldots": "…", "cdots": "…",
    "euro": "€", "pounds": "£", "cent": "¢", "lg": "log", "tg": "tan", "ctg": "cot", "arctg": "arctan",
}  # fmt: skip
_OPEN = {
    "(": ")",
    "[": "]",
    "{": "}",
    r"\{": r"\}",
    "langle": "rangle",
    "lfloor": "rfloor",
    "lceil": "rceil",
    "begin": "end",
}
_CLOSE = set(_OPEN.values())


class _Token(NamedTuple):
    text: str
    kind: str
    """num, word (letters, as they stand or in \\text), command (a LaTeX name), op."""
    gap: bool = False
    """White space before it."""
    roman: bool = False
    """From \\text, \\mathrm, \\operatorname: a word, not a product of letters."""


_Tokens = tuple[_Token, ...]


def _tokenize(text: str, roman: bool = False) -> _Tokens:
    tokens: list[_Token] = []
    for m in _TOKEN.finditer(text):
        gap = bool(m["gap"])
        if m["num"]:
            tokens.append(_Token(m["num"], "num", gap))
        elif m["roman"] is not None:
            inner = _tokenize(m["roman"].replace("$", " "), roman=True)
            tokens += [t._replace(gap=gap or t.gap) if i == 0 else t for i, t in enumerate(inner)]
        elif m["edge"]:
            tokens.append(_Token(m["edge"], "command", gap))
            tokens += [_Token(m["environment"], "word")] if m["edge"] == "begin" else []
        elif m["degree"]:
            tokens.append(_Token("°", "op", gap))
        elif m["command"]:
            name = _COMMANDS.get(m["command"], m["command"])
            kind = "word" if name in ("and", "or") else "command" if name[0].isalpha() else "op"
            tokens.append(_Token(name, kind, gap))
        elif m["word"]:
            tokens.append(_Token(m["word"], "word", gap, roman))
        elif m["op"]:
            tokens.append(_Token("^" if m["op"] == "**" else m["op"], "op", gap))
    return tuple(tokens)


# --- tokens to a tree -------------------------------------------------------------------------------------------------

_FUNCTIONS = {
    "sin", "cos", "tan", "sec", "csc", "cot", "arcsin", "arccos", "arctan", "arcsec", "arccsc", "arccot", "sinh",
    "cosh", "tanh", "arcsinh", "arccosh", "arctanh", "log", "ln", "exp", "sqrt", "abs", "gcd", "lcm", "max", "min", "cis",
}  # fmt: skip
_ALIASES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "cosec": "csc", "cotan": "cot"}
_CONSTANTS = {"pi": "pi", "e": "e", "i": "i", "infinity": "inf", "inf": "inf", "oo": "inf"}
_GREEK = set(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega "
    "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell".split()
)
_INFIX = {"choose", "over"}
_FOREIGN = {"sum", "prod", "int", "lim"}
_FOREIGN_TOO = {"frac", "infinity", "pi", "to", "binom"}
_RELATIONS = {"=", "<", ">", "<=", ">=", "!=", "≈", "∈"}
_FLIP = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!="}
_SHORT_WORDS = {"is", "are", "the", "an", "of", "to", "it", "so", "we", "be", "was", "has", "get", "per", "for", "all"}
_DENIALS = {
    "not", "no", "never", "less", "more", "greater", "fewer", "least", "most", "than", "over", "under", "between",
    "except", "neither", "nor", "if", "wrong", "incorrect", "false", "cannot", "isn", "unless", "before", "after",
    "above", "below",
}  # fmt: skip
_ONES = "one two three four five six seven eight nine".split()
_TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_SMALL_NUMBERS = {word: n for n, word in enumerate(["zero", *_ONES, *_TEENS])} | {t: 10 * n for n, t in enumerate(_TENS, 2)}
_PARTS = {"half": 2, "halve": 2, "quarter": 4} | {
    part: n for n, part in enumerate("third fourth fifth sixth seventh eighth ninth tenth".split(), 3)
}
_MULTIPLES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_EMPTY = {
    "emptyset",
    "empty set",
    "null set",
    "no solution",
    "no solutions",
    "no real solution",
    "no real solutions",
    "none",
}
_REALS = {"all real numbers", "all reals", "all real", "real numbers", "reals", "mathbb r"}


def _is_wordy(t: _Token) -> bool:
    """A word of a language rather than a function or a product of letters."""
    if t.kind != "word" or t.text in _FUNCTIONS or t.text in _ALIASES or t.text in _CONSTANTS:
        return False
    lower = t.text.lower()
    vowels = any(c in "aeiouy" for c in lower)
    return (t.roman and len(lower) > 1) or lower in _SHORT_WORDS | _DENIALS or (len(lower) >= 4 and vowels)


def _close(tokens: _Tokens, i: int) -> int:
    """Index of the bracket that closes tokens[i]. Round and square ones close each other, as in [0, 1)."""
    depth = 0
    for j in range(i, len(tokens)):
        depth += _depth_change(tokens[j])
        if depth == 0:
            return j
    raise NotMath


def _depth_change(t: _Token) -> int:
    if t.kind == "word":
        return 0
    return (t.text in _OPEN) - (t.text in _CLOSE)


def _split(tokens: _Tokens, separators: set[str]) -> tuple[list[_Tokens], list[str]]:
    """The parts between separators outside all brackets, and those separators."""
    parts, found, start, depth = [], [], 0, 0
    for i, t in enumerate(tokens):
        depth += _depth_change(t)
        if depth < 0:
            raise NotMath
        if depth == 0 and t.text in separators and (t.kind != "word" or t.text.lower() in ("and", "or")):
            parts.append(tokens[start:i])
            found.append(t.text)
            start = i + 1
    if depth:
        raise NotMath
    return [*parts, tokens[start:]], found


def _words(tokens: _Tokens) -> Words:
    """Without case, articles, and the punctuation of words (a minus sign before a number stays)."""
    kept = []
    for i, t in enumerate(tokens):
        after_word = i > 0 and tokens[i - 1].kind == "word"
        if t.text in ("the", "The", "a", "an", "An", "'", "?", "`", "*") or after_word and t.text in ("-", ".", "!"):
            continue
        kept.append(t.text.lower())
    return Words(re.sub(r"\{ (\S+) \}", r"\1", " ".join(kept)))


def _spoken(words: list[str]) -> int | None:
    """two hundred and five, one million; None for other words."""
    total = group = 0
    room, largest = 1000, 10**15  # what comes next is smaller
    for word in words:
        if word in _SMALL_NUMBERS and _SMALL_NUMBERS[word] < room and (len(words) == 1 or word != "zero"):
            group += _SMALL_NUMBERS[word]
            room = 10 if _SMALL_NUMBERS[word] >= 20 else 0
        elif word == "hundred" and group < 10:
            group, room = (group or 1) * 100, 100
        elif word in _MULTIPLES and word != "hundred" and _MULTIPLES[word] < largest:
            total += (group or 1) * _MULTIPLES[word]
            group, room, largest = 0, 1000, _MULTIPLES[word]
        elif word != "and" or not (group or total):
            return None
    return total + group if words else None


def _phrase(words: Words) -> Node:
    """What a few fixed phrases mean; other words mean themselves."""
    *count, last = words.text.split() or [""]
    if last.removesuffix("s") in _PARTS and (spoken := _spoken(count or ["one"])) is not None:
        return Value(number(Fraction(spoken, _PARTS[last.removesuffix("s")])))
    if (spoken := _spoken(words.text.split())) is not None:
        return Value(number(Fraction(spoken)))
    if words.text in _EMPTY:
        return Seq("{}", ())
    if words.text in _REALS:
        return Seq("()", (Value(MINUS_INFINITY), Value(INFINITY)))
    return Words({"dne": "does not exist", "yes": "true", "no": "false"}.get(words.text, words.text))


def _parse(text: str) -> Node:
    tokens = _tokenize(text)
    depth = deepest = 0
    for t in tokens:
        depth += _depth_change(t)
        deepest = max(deepest, depth)
    if len(tokens) > MAX_TOKENS or deepest > MAX_DEPTH:
        return _words(tokens)
    try:
        return _sequence(tokens, 0)
    except NotMath:
        return _foreign(tokens, text) or _phrase(_words(tokens))


def _foreign(tokens: _Tokens, text: str) -> Value | None:
    """A short sum, product, integral or limit of small numbers and no towers, left to math-verify."""
    commands = {t.text for t in tokens if t.kind == "command"}
    if not commands & _FOREIGN or not commands <= _FOREIGN | _FUNCTIONS | _GREEK | _FOREIGN_TOO or len(tokens) > 60:
        return None
    if any(_is_wordy(t) or len(t.text) > 3 and t.kind == "num" for t in tokens):
        return None
    powers = [i + 1 for i, t in enumerate(tokens[:-1]) if t.text == "^"]
    try:
        raised = [tokens[i : _close(tokens, i)] if tokens[i].text in _OPEN else tokens[i + 1 : i + 2] for i in powers]
    except NotMath:
        return None
    return None if any(t.text == "^" for part in raised for t in part) else Value(("foreign", text))


def _sequence(tokens: _Tokens, level: int, expand: bool = True) -> Node:
    """`a`, or `a, b and c`: a bare list. Each +- outside a set stands for two items."""
    pieces, separators = _split(tokens, {",", ";", "and", "or"})
    parts: list[Node] = []
    for piece in pieces:
        if not piece and separators:
            if len(pieces) == 2 or not {"and", "or"} & set(separators):
                raise NotMath  # `1,,2`; but `1, 2, and 3` is fine
            continue
        for variant in _signs(piece) if expand else [piece]:
            try:
                parts.append(_item(variant, level))
            except NotMath:
                if level or not separators:
                    raise
                parts.append(_phrase(_words(variant)))
    if not 0 < len(parts) <= MAX_PARTS:
        raise NotMath
    if separators and all(_is_interval(p.body if isinstance(p, Named) else p) for p in parts) and "," not in separators:
        return _join_intervals(parts, separators)
    if set(separators) == {"and"} and (total := _total(parts)) is not None:
        return total
    return parts[0] if len(parts) == 1 else Seq(",", tuple(parts))


def _is_interval(node: Node) -> bool:
    return isinstance(node, Seq) and len(node.kind) == 2 and node.kind != "{}" and len(node.parts) == 2


def _join_intervals(parts: list[Node], separators: list[str]) -> Node:
    """`x < -1 or x > 1` is a union, `x > 1 and x < 3` the interval between."""
    bodies = [p.body if isinstance(p, Named) else p for p in parts]
    if separators == ["and"]:
        (low, high) = sorted(bodies, key=lambda b: b.parts[0] == Value(MINUS_INFINITY))
        if low.parts[1] == Value(INFINITY) and high.parts[0] == Value(MINUS_INFINITY):
            return Seq(low.kind[0] + high.kind[1], (low.parts[0], high.parts[1]))
        return Seq(",", tuple(parts))
    return Seq("U", tuple(bodies))


def _signs(tokens: _Tokens) -> list[_Tokens]:
    """The variants that +- and -+ stand for: both signs together where -+ occurs, else every combination."""
    at = [i for i, t in enumerate(tokens) if t.text in "±∓" and t.kind == "op"]
    if not at or any(t.text == r"\{" for t in tokens):
        return [tokens]
    if len(at) > 3:
        raise NotMath
    together = any(tokens[i].text == "∓" for i in at)
    variants = []
    for choice in [(c,) * len(at) for c in "+-"] if together else product("+-", repeat=len(at)):
        signed = list(tokens)
        for i, sign in zip(at, choice, strict=True):
            flipped = tokens[i].text == "∓"
            signed[i] = tokens[i]._replace(text="-" if (sign == "-") != flipped else "+")
        variants.append(tuple(signed))
    return variants


def _item(tokens: _Tokens, level: int) -> Node:
    """A relation, a ratio, or what stands on one side of one."""
    sides, relations = _split(tokens, _RELATIONS)
    if relations:
        return _relation(sides, relations, level)
    ratio, colons = _split(tokens, {":"})
    if time := re.match(r"\d\d?:\d\d(?::\d\d)?(?!\d)", "".join(t.text for t in tokens)):
        return _time(time[0], tokens)
    if len(colons) == 1:
        left, right = (_expression(part, level) for part in ratio)
        return Value(("mul", left, ("inv", right)))
    if len(colons) > 1:
        return Seq(":", tuple(_item(part, level) for part in ratio))
    return _set_expression(tokens, level)


def _time(clock: str, tokens: _Tokens) -> Node:
    """4:30, 4:30 pm: the same only as itself."""
    rest = tokens[2 * clock.count(":") + 1 :]
    if any(t.kind != "word" for t in rest):
        raise NotMath
    return Value(("sym", clock), unit_of(t.text for t in rest))


def _name(tokens: _Tokens) -> str | None:
    """The name that `x`, `x_1`, `f(x)`, `(x, y)`, `AB` or `\\text{Area}` is; None for an expression."""
    if len(tokens) > 2 and tokens[0].text == tokens[-1].text == "|" and all(t.text.isupper() for t in tokens[1:-1]):
        tokens = tokens[1:-1]  # |AB|
    if len(tokens) > 4 and tokens[0].text == "mathbb":
        tokens = tokens[2:3] + tokens[4:]
    if len(tokens) > 3 and tokens[0].text in ("P", "Pr", "E", "Var") and _spans(tokens[1:]):  # P(X = 3), E[X]
        return "".join(t.text for t in tokens)
    inverse = "".join(t.text for t in tokens[1:6]) == "^{-1}"  # f^{-1}(x)
    tokens = tokens[:1] + tokens[6:] if inverse else tokens
    if not tokens or len(tokens) > 12:
        return None
    for i, t in enumerate(tokens):
        if t.kind == "num" and (i == 0 or tokens[i - 1].text not in "_{(,"):
            return None
        if t.kind == "op" and t.text not in "_(){},'" or t.kind == "command" and t.text not in _GREEK:
            return None
        if t.kind == "word" and (t.text in _FUNCTIONS or t.text in ("pi", "e", "i")):
            return None
        if t.kind == "word" and not (len(t.text) == 1 or t.text.isupper() or _is_wordy(t)):
            return None
    letters = [t for t in tokens if t.kind in ("word", "command")]
    plain = [t for t in letters if not _is_wordy(t)]
    if not letters or (len(plain) > 1 and tokens[1].text not in ("(", "_") and tokens[0].text != "("):
        return None
    return "".join(t.text for t in tokens if t.text not in "{}") + "^-1" * inverse


def _spans(tokens: _Tokens) -> bool:
    """Whether one pair of brackets is around everything."""
    return tokens[0].text in ("(", "[") and _close(tokens, 0) == len(tokens) - 1


def _relation(sides: list[_Tokens], relations: list[str], level: int) -> Node:
    if relations[-1] == "∈":
        name = _name(sides[0])
        if len(sides) != 2 or name is None:
            raise NotMath
        return Named(name, _item(sides[1], level))
    if set(relations) <= {"=", "≈"}:
        return _equation(sides, relations, level)
    return _inequality(sides, relations, level)


def _equation(sides: list[_Tokens], relations: list[str], level: int) -> Node:
    """`x = 5` names a value; `x = 2 + 3 = 5` a chain of which each part must hold; the rest is an equation."""
    name = _name(sides[0])
    if name is None and len(sides) == 2 and (name := _name(sides[1])) is not None:
        sides = sides[::-1]
    if "≈" in relations:  # what stands before it is exact, unless only a name does
        cut = relations.index("≈") + 1
        if cut == 1 and name is not None:
            cut = 2
        sides = sides[:cut]
    bodies = [_item(side, level) for side in (sides[1:] if name is not None else sides)]
    if name is not None and bodies:
        return Named(name, bodies[0] if len(bodies) == 1 else Seq("=", tuple(bodies)))
    if len(bodies) == 1:
        return bodies[0]
    if len(bodies) == 2 and all(isinstance(b, Value) for b in bodies) and any(symbols(b.expr) for b in bodies):
        return Equation("=", minus(bodies[0].expr, bodies[1].expr))
    return Seq("=", tuple(bodies))


def _inequality(sides: list[_Tokens], relations: list[str], level: int) -> Node:
    """An interval of its one name, or an inequality between expressions."""
    if not set(relations) <= set(_FLIP) or len(sides) > 3:
        raise NotMath
    if relations[0] in (">", ">="):
        sides, relations = sides[::-1], [_FLIP[r] for r in reversed(relations)]
    if len(sides) == 3:
        name, (low, high) = _name(sides[1]), (Value(_expression(side, level)) for side in (sides[0], sides[2]))
        if name is None or not set(relations) <= {"<", "<="}:
            raise NotMath
        return Named(name, _interval(low, relations[0], relations[1], high))
    for bounded, bound, op in ((*sides, relations[0]), (*sides[::-1], _FLIP[relations[0]])):
        absolute = len(bounded) > 2 and bounded[0].text == bounded[-1].text == "|"
        name = _name(bounded[1:-1] if absolute else bounded)
        if name is None or symbols(value := _expression(bound, level)):
            continue
        if not absolute:
            return Named(name, _half_line(op, Value(value)))
        low, high = Value(("neg", value)), Value(value)
        if op in ("<", "<="):
            return Named(name, _interval(low, op, op, high))
        return Named(name, Seq("U", (_half_line(_FLIP[op], low), _half_line(op, high))))
    left, right = (_expression(side, level) for side in sides)
    return Equation(relations[0], minus(left, right))


def _half_line(op: str, bound: Value) -> Seq:
    """The numbers x with `x op bound`."""
    low, high = Value(MINUS_INFINITY), Value(INFINITY)
    if op == "!=":
        return Seq("U", (Seq("()", (low, bound)), Seq("()", (bound, high))))
    return _interval(low, "<", op, bound) if op in ("<", "<=") else _interval(bound, _FLIP[op], "<", high)


def _interval(low: Value, after_low: str, before_high: str, high: Value) -> Seq:
    if after_low == "<=" and is_infinite(low.expr) or before_high == "<=" and is_infinite(high.expr):
        raise NotMath
    return Seq(("[" if after_low == "<=" else "(") + ("]" if before_high == "<=" else ")"), (low, high))


def _set_expression(tokens: _Tokens, level: int) -> Node:
    parts, _ = _split(tokens, {"∪"})
    if len(parts) == 1 and len(tokens) > 1:
        parts, _ = _split(tuple(t._replace(kind="op", text="∪") if t.text == "U" else t for t in tokens), {"∪"})
        if not (len(parts) > 1 and all(p and p[0].text in ("(", "[", r"\{") for p in parts)):
            parts = [tokens]
    if len(parts) > 1:
        return Seq("U", tuple(_item(part, level) for part in parts))
    whole, minus = _split(tokens, {"∖"})
    if len(minus) == 1:
        return _without(_item(whole[0], level), _item(whole[1], level))
    return (
        _bracketed(tokens, level + 1)
        or _transposed(tokens, level + 1)
        or _scaled_matrix(tokens, level + 1)
        or _quantity(tokens, level)
    )


def _without(whole: Node, hole: Node) -> Node:
    """The real numbers without a few rational ones or an interval, as a union of intervals."""
    if isinstance(whole, Value) and whole.expr == ("sym", "R"):
        whole = _phrase(Words("reals"))
    if whole != _phrase(Words("reals")) or not isinstance(hole, Seq):
        raise NotMath
    if _is_interval(hole):
        low, high = hole.parts
        below = _interval(Value(MINUS_INFINITY), "<", "<" if hole.kind[0] == "[" else "<=", low)
        above = _interval(high, "<" if hole.kind[1] == "]" else "<=", "<", Value(INFINITY))
        rest = [part for part in (below, above) if part.parts[0] != part.parts[1]]
        return rest[0] if len(rest) == 1 else Seq("U", tuple(rest))
    points = [exact(p.expr) for p in hole.parts if isinstance(p, Value)]
    if not points or None in points or hole.kind != "{}":
        raise NotMath
    ends = [Value(MINUS_INFINITY), *(Value(number(p)) for p in sorted(set(points))), Value(INFINITY)]
    return Seq("U", tuple(Seq("()", pair) for pair in zip(ends, ends[1:], strict=False)))


def _bracketed(tokens: _Tokens, level: int) -> Node | None:
    """What one pair of brackets around everything holds; None when that is an expression, or there is none."""
    if not tokens or level > MAX_DEPTH or tokens[0].kind == "word":
        return None
    opening = tokens[0].text
    if opening in ("emptyset",) and len(tokens) == 1:
        return Seq("{}", ())
    if opening == "mathbb" and "".join(t.text for t in tokens[1:]).strip("{}") == "R":
        return _phrase(Words("reals"))
    if opening not in _OPEN or _close(tokens, 0) != len(tokens) - 1:
        return None
    inner, closing = tokens[1:-1], tokens[-1].text
    if opening == "begin":
        return _matrix(inner, level)
    if opening == r"\{":
        return _set(inner, level)
    if opening in ("lfloor", "lceil") or not inner:
        return None
    if opening == "{" and any(t.text in _RELATIONS for t in inner) and len(_split(inner, {"|", ":"})[1]) == 1:
        return _set(inner, level)
    pieces, separators = _split(inner, {",", ";"})
    if opening == "langle":
        opening, closing = "(", ")"
    if any(t.text in _INFIX for t in inner):
        return None
    if not separators:
        if opening + closing not in ("()", "[]", "{}"):
            raise NotMath
        return _sequence(inner, level, expand=False)
    parts = tuple(_item(piece, level) for piece in pieces if piece or _raise())
    if opening + closing == "[]" and all(isinstance(p, Seq) and p.kind == "[]" for p in parts):
        return Seq("M", tuple(Seq("R", p.parts) for p in parts))
    return Seq(opening + closing, parts)


def _raise() -> NoReturn:
    raise NotMath


def _set(inner: _Tokens, level: int) -> Node:
    if not inner:
        return Seq("{}", ())
    halves, bars = _split(inner, {"|", ":"})
    if len(bars) == 1:  # { x : x > 2 }
        return _sequence(halves[1], level)
    node = _sequence(inner, level)
    parts = node.parts if isinstance(node, Seq) and node.kind == "," else (node,)
    return Seq("{}", tuple(dict.fromkeys(parts)))


def _matrix(inner: _Tokens, level: int) -> Node:
    """The rows between \\begin{pmatrix} and \\end{pmatrix}; cases are a list. vmatrix is a determinant."""
    name, body = inner[0].text, inner[1:]
    if name == "array" and body and body[0].text == "{":
        body = body[_close(body, 0) + 1 :]
    if name not in ("pmatrix", "bmatrix", "matrix", "Bmatrix", "smallmatrix", "array", "cases"):
        raise NotMath
    rows = [_split(row, {"&"})[0] for row in _split(body, {r"\\"})[0] if row]
    if not rows or len(rows) * max(map(len, rows)) > MAX_PARTS or name == "cases" and max(map(len, rows)) > 1:
        raise NotMath
    cells = tuple(tuple(_item(cell, level) for cell in row) for row in rows)
    if name == "cases":
        return Seq(",", tuple(row[0] for row in cells))
    if len(cells) == len(cells[0]) == 1:
        return cells[0][0]
    return Seq("M", tuple(Seq("R", row) for row in cells))


def _transposed(tokens: _Tokens, level: int) -> Node | None:
    """\\begin{pmatrix} 1 & 2 \\end{pmatrix}^T, transposed."""
    power = "".join(t.text for t in tokens[-4:]).replace("{", "").replace("}", "")
    at = next((i for i in range(len(tokens) - 1, 0, -1) if tokens[i].text == "^"), 0)
    if not at or not power.endswith(("^T", "^top")) or len(tokens) - at > 4:
        return None
    matrix = _bracketed(tokens[:at], level)
    if not isinstance(matrix, Seq) or matrix.kind not in ("M", "()", "[]"):
        return None
    if matrix.kind != "M":
        return matrix  # (1, 2)^T, a column as it is
    if len({len(row.parts) for row in matrix.parts}) > 1:
        raise NotMath
    return Seq("M", tuple(Seq("R", column) for column in zip(*(row.parts for row in matrix.parts), strict=True)))


def _scaled_matrix(tokens: _Tokens, level: int) -> Node | None:
    """2 \\begin{pmatrix} ... \\end{pmatrix}, multiplied out."""
    at = next((i for i, t in enumerate(tokens) if t.text == "begin" and t.kind == "command"), 0)
    while at and tokens[at - 1].text in ("(", "["):
        at -= 1
    matrix = _bracketed(tokens[at:], level) if at else None
    if not isinstance(matrix, Seq) or matrix.kind != "M":
        return None
    before = tokens[: at - (tokens[at - 1].text == "*")]
    scale = number(Fraction(-1)) if [t.text for t in before] == ["-"] else _expression(before, level)
    return Seq("M", tuple(Seq("R", tuple(_scaled(scale, cell) for cell in row.parts)) for row in matrix.parts))


def _scaled(scale: Expr, cell: Node) -> Value:
    if not isinstance(cell, Value) or cell.unit is not None or is_infinite(cell.expr):
        raise NotMath
    expr = ("mul", scale, cell.expr)
    check_size(expr)
    return Value(expr)


def _quantity(tokens: _Tokens, level: int) -> Node:
    """An expression, with words before it, a currency sign, or a unit after it."""
    start = 0
    if any(t.kind == "num" for t in tokens):
        while start < len(tokens) and _is_wordy(tokens[start]):
            start += 1
    if any(t.kind == "word" and t.text.lower() in _DENIALS for t in tokens):
        raise NotMath
    before = [t.text for t in tokens[:start]]
    tokens = tokens[start:]
    if (total := _sum_of_units(tokens, level)) is not None:
        return total
    at = 1 if tokens and tokens[0].text == "-" else 0
    currency = tokens[at : at + 1] if len(tokens) > at + 1 and tokens[at].text in ("$", "€", "£", "¥", "₹") else ()
    if currency:
        tokens = tokens[:at] + tokens[at + 1 :]
    parser = _Parser(tokens, level)
    expr = parser.sum()
    rest = parser.tokens[parser.at :]
    if len(rest) > MAX_UNIT_TOKENS or rest and not _is_unit(parser.tokens, parser.at):
        raise NotMath
    check_size(expr)
    unit = unit_of(t.text for t in (*currency, *rest)) if currency or rest else unit_of(before)  # June 5 is not May 5
    if rest and unit is not None and unit.dims is None and not (_numeric(expr) or rest[0].roman and not tokens[0].roman):
        raise NotMath  # `Bob wins` is not Bob
    if parser.base:
        unit = Unit(frozenset({parser.base}), ((parser.base, 1),))
    return Value(expr, unit)


def _numeric(expr: Expr) -> bool:
    """Whether a number or a constant is in it."""
    return expr[0] in ("num", "const") or any(_numeric(e) for e in expr[1:] if isinstance(e, tuple))


def _sum_of_units(tokens: _Tokens, level: int) -> Value | None:
    """2 feet 6 inches, 1 h 30 min."""
    starts = [i for i, t in enumerate(tokens) if t.kind == "num" and (i == 0 or tokens[i - 1].kind == "word")]
    if len(starts) < 2 or starts[0] or not all(known_unit(tokens[i - 1].text) for i in starts[1:]):
        return None
    total = _total([_quantity(tokens[i:j], level) for i, j in zip(starts, [*starts[1:], None], strict=True)])
    return total or _raise()


def _total(parts: Sequence[Node]) -> Value | None:
    """The sum of hours and minutes, of feet and inches: numbers with units of one kind, the larger first."""
    units = [p.unit for p in parts if isinstance(p, Value) and p.unit is not None]
    if len(units) != len(parts) or len({u.dims for u in units}) > 1 or units[0].dims is None:
        return None
    if any(u.factor <= v.factor for u, v in zip(units, units[1:], strict=False)):
        return None
    terms = [("mul", p.expr, number(u.factor / units[0].factor)) for p, u in zip(parts, units, strict=True)]
    return Value(("add", *terms), units[0])


def _expression(tokens: _Tokens, level: int) -> Expr:
    """An expression without a unit: in `\\frac{3 m}{2}` m is a variable."""
    node = _bracketed(tokens, level + 1)
    if node is None:
        parser = _Parser(tokens, level, units=False)
        node = Value(parser.sum())
        if parser.at < len(parser.tokens) or parser.base:
            raise NotMath
    if not isinstance(node, Value) or node.unit is not None:
        raise NotMath
    check_size(node.expr)
    return node.expr


def _is_unit(tokens: Sequence[_Token], at: int) -> bool:
    """Whether everything from here on is a unit or words: `cm^2`, `m / s`, `\\text{ apples}`; never `x`."""
    first = tokens[at]
    after_number = at > 0 and (tokens[at - 1].kind == "num" or tokens[at - 1].text in ("}", "°", "%"))
    if first.kind == "op" and first.text in ("$", "€", "£", "¢"):
        return at == len(tokens) - 1
    if first.kind != "word" or not (
        first.roman
        or _is_wordy(first)
        or after_number
        and (known_unit(first.text) and (len(first.text) > 1 or first.gap) or len(first.text) > 2 and first.gap)
        or first.text in ("sq", "cu")
    ):
        return False
    if first.text in _FUNCTIONS and not (first.text == "min" and after_number) or first.text in ("pi", "infinity"):
        return False
    if first.roman and len(first.text) == 1 and not known_unit(first.text):
        return False
    for previous, t in zip(tokens[at:], tokens[at + 1 :], strict=False):
        word = t.kind == "word" and (t.roman or _is_wordy(t) or known_unit(t.text) or len(t.text) > 2)
        digit = t.kind == "num" and t.text in "1234" and previous.text in ("^", "{", "-")
        if not (word or digit or t.kind == "op" and t.text in "^{}/.-*" or t.text == "cdot"):
            return False
    return True


class _Parser:
    """Recursive descent over an expression. It stops, without an error, where a unit starts."""

    def __init__(self, tokens: _Tokens, level: int, units: bool = True):
        self.tokens = list(tokens)
        self.at = 0
        self.level = level
        self.units = units
        self.bars = 0
        self.base = ""
        """`base 8` of 52_8."""

    def peek(self, ahead: int = 0) -> _Token:
        at = self.at + ahead
        return self.tokens[at] if at < len(self.tokens) else _Token("", "end")

    def take(self, *texts: str) -> bool:
        if self.peek().text in texts and self.peek().kind != "word":
            self.at += 1
            return True
        return False

    def expect(self, text: str) -> None:
        if not self.take(text):
            raise NotMath

    def sum(self) -> Expr:
        terms = [self.signed_product()]
        while self.peek().text in ("+", "-") and self.peek().kind == "op":
            terms.append(self.signed_product())
        return terms[0] if len(terms) == 1 else ("add", *terms)

    def signed_product(self) -> Expr:
        negative = False
        while self.peek().kind == "op" and self.peek().text in ("+", "-"):
            negative ^= self.peek().text == "-"
            self.at += 1
        value = self.product()
        return ("neg", value) if negative else value

    def product(self) -> Expr:
        factors = [self.factor()]
        while True:
            if self.peek().text in ("*", "/") and self.peek().kind == "op":
                invert = self.peek().text == "/"
                self.at += 1
                value = self.signed_factor()
                factors.append(("inv", value) if invert else value)
            elif self.starts_factor():
                previous, t = self.tokens[self.at - 1], self.peek()
                if t.kind == "num" and (previous.kind == "num" or previous.kind == "word" and not t.gap):
                    raise NotMath  # `3 4` and `x2` are no products
                factors.append(self.factor())
            else:
                return factors[0] if len(factors) == 1 else ("mul", *factors)

    def mixed_number(self) -> Expr | None:
        """3\\frac12 or 3 1/2, which is 3 + 1/2."""
        whole, t = self.peek(), self.peek(1)
        if whole.kind != "num" or not whole.text.isdigit():
            return None
        if t.text == "frac":
            # Only digits are looked at, so that nothing is parsed twice: nesting would double the work each time.
            ahead = "".join(t.text for t in self.tokens[self.at + 2 : self.at + 9])
            part = re.match(r"(?:\{(\d+)\}|(\d))(?:\{(\d+)\}|(\d)(?!\d))", ahead)
        else:
            ahead = "".join(t.text for t in self.tokens[self.at + 1 : self.at + 4])
            part = t.gap and re.fullmatch(r"(\d+)()/(\d+)()", ahead)
        if not part or not 0 < int(part[1] or part[2]) < int(part[3] or part[4]):
            return None
        self.at += 1
        if t.text == "frac":
            self.atom()
        else:
            self.at += 3
        return number(int(whole.text) + Fraction(int(part[1] or part[2]), int(part[3] or part[4])))

    def signed_factor(self) -> Expr:
        negative = False
        while self.peek().kind == "op" and self.peek().text in ("+", "-"):
            negative ^= self.peek().text == "-"
            self.at += 1
        value = self.factor()
        return ("neg", value) if negative else value

    def starts_factor(self) -> bool:
        t = self.peek()
        if t.kind == "end" or self.units and _is_unit(self.tokens, self.at):
            return False
        if t.kind == "num" or t.kind == "word" and t.text not in ("and", "or"):
            return True
        if t.text == "|":
            return self.bars == 0
        return t.text in ("(", "[", "{", "lfloor", "lceil") or (t.kind == "command" and t.text not in _CLOSE)

    def factor(self) -> Expr:
        base = self.mixed_number() or self.atom()
        if self.take("!"):
            base = ("factorial2" if self.take("!") else "factorial", base)
            if self.peek().text == "!":
                raise NotMath  # a triple factorial
        if self.take("^"):
            base = ("pow", base, self.exponent())
        if self.take("%"):
            base = ("mul", base, ("const", "percent"))
        elif self.take("°"):
            base = ("mul", base, ("const", "degree"))
        elif self.peek().kind == "word" and self.peek().text.lower() in ("percent", "degree", "degrees", "deg"):
            name = "percent" if self.peek().text.lower() == "percent" else "degree"
            self.at += 1
            base = ("mul", base, ("const", name))
        elif self.peek().kind == "word" and self.peek().text.lower() in _MULTIPLES and base[0] == "num":
            base = ("mul", base, number(Fraction(_MULTIPLES[self.peek().text.lower()])))
            self.at += 1
        return base

    def exponent(self) -> Expr:
        negative = self.take("-")
        if not negative:
            self.take("+")
        value = self.atom()
        if self.take("^"):
            value = ("pow", value, self.exponent())
        return ("neg", value) if negative else value

    def atom(self) -> Expr:
        self.level += 1
        if self.level > MAX_DEPTH:
            raise NotMath
        t = self.peek()
        if t.kind == "num":
            value = self.number()
        elif t.kind == "word":
            value = self.word()
        elif t.kind == "command":
            value = self.command()
        elif t.text in ("(", "[", "{"):
            value = self.group()
        elif t.text == "|" and not self.bars:
            self.at += 1
            self.bars += 1
            value = ("abs", self.sum())
            self.expect("|")
            self.bars -= 1
        else:
            raise NotMath
        self.level -= 1
        return value

    def number(self) -> Expr:
        text = self.peek().text
        self.at += 1
        if self.peek().text == "_" and self.peek().kind == "op":  # 52_8
            self.at += 1
            braced = self.take("{")
            if len(self.tokens) - braced != self.at + 1 or self.peek().kind != "num":
                raise NotMath
            self.base = f"base {self.peek().text}"
            self.at += 1 + braced
        return number(Fraction(text))

    def word(self) -> Expr:
        t = self.peek()
        name = _ALIASES.get(t.text, t.text)
        if name in _FUNCTIONS:
            self.at += 1
            return self.function(name)
        if name in _CONSTANTS:
            self.at += 1
            return ("const", _CONSTANTS[name])
        if _is_wordy(t):
            glued = re.fullmatch(r"(arcsin|arccos|arctan|sin|cos|tan|log|ln|sqrt)([a-z])", t.text)
            if not glued or t.roman:
                raise NotMath
            self.tokens[self.at : self.at + 1] = [_Token(g, "word") for g in glued.groups()]
            return self.word()
        if len(t.text) > 2 and t.text.isupper():
            raise NotMath  # BACD: an order, a polygon, and no product
        if len(t.text) > 1:  # xy is x times y
            self.tokens[self.at : self.at + 1] = [_Token(c, "word", t.gap and i == 0) for i, c in enumerate(t.text)]
            return self.word()
        self.at += 1
        return self.symbol(t.text)

    def symbol(self, name: str) -> Expr:
        while self.peek().text == "'":
            self.at += 1
            name += "'"
        if self.take("_"):
            index = self.tokens[self.at : _close(self.tokens, self.at) + 1] if self.peek().text == "{" else [self.peek()]
            self.at += len(index)
            name += "_" + "".join(t.text for t in index if t.text not in "{}")
        return ("sym", name)

    def command(self) -> Expr:
        name = self.peek().text
        self.at += 1
        if name in _FUNCTIONS:
            return self.function(name)
        if name in _CONSTANTS:
            return ("const", _CONSTANTS[name])
        if name in _GREEK:
            return self.symbol(name)
        if name == "frac":
            return ("mul", self.argument(), ("inv", self.argument()))
        if name == "binom":
            return ("binomial", self.argument(), self.argument())
        if name in ("lfloor", "lceil"):
            self.at -= 1
            return ("floor" if name == "lfloor" else "ceiling", self.group())
        raise NotMath

    def function(self, name: str) -> Expr:
        # Functions of functions of functions take sympy time exponential in their depth; no answer has many.
        self.level += FUNCTION_DEPTH
        value = self.call(name)
        self.level -= FUNCTION_DEPTH
        return value

    def call(self, name: str) -> Expr:
        if name == "sqrt":
            if self.peek().text == "[":
                end = _close(self.tokens, self.at)
                degree = _expression(tuple(self.tokens[self.at + 1 : end]), self.level)
                self.at = end + 1
                return ("root", self.argument(), degree)
            plain = self.tokens[self.at - 1].kind == "word"  # sqrt23, where \sqrt23 is \sqrt{2}3
            return ("sqrt", self.atom() if plain else self.argument())
        base = power = None
        for _ in range(2):
            if self.take("_"):
                base = self.argument()
            if self.take("^"):
                power = self.exponent()
        if name == "log" and base is None:
            base = number(Fraction(10))
        if power == ("neg", ONE):
            name, power = f"arc{name}", None
            if name not in _FUNCTIONS:
                raise NotMath
        if name in ("gcd", "lcm", "max", "min"):
            value = (name, *self.arguments())
        else:
            value = (name, self.operand()) if base is None else ("log", self.operand(), base)
        if name == "cis":
            value = ("add", ("cos", value[1]), ("mul", ("const", "i"), ("sin", value[1])))
        return ("pow", value, power) if power else value

    def operand(self) -> Expr:
        """(x + 1), or a product of factors up to the next function: sin 2x cos x is sin(2x) cos(x)."""
        if self.peek().text in ("(", "{", "["):
            return self.group()
        factors = [self.factor()]
        while self.starts_factor() and self.peek().text not in _FUNCTIONS and self.peek().text != "(":
            factors.append(self.factor())
        return factors[0] if len(factors) == 1 else ("mul", *factors)

    def argument(self) -> Expr:
        """A LaTeX argument: {...}, or one digit, or one command."""
        t = self.peek()
        if t.kind == "num" and not t.text.isdigit():
            raise NotMath
        if t.kind == "num" and len(t.text) > 1:
            self.tokens[self.at : self.at + 1] = [_Token(t.text[0], "num"), _Token(t.text[1:], "num")]
        elif t.kind == "word" and len(t.text) > 1 and not t.roman and t.text != "pi":
            self.tokens[self.at : self.at + 1] = [_Token(t.text[0], "word"), _Token(t.text[1:], "word")]
        return self.atom()

    def arguments(self) -> list[Expr]:
        if self.peek().text != "(":
            raise NotMath
        end = _close(self.tokens, self.at)
        parts = _split(tuple(self.tokens[self.at + 1 : end]), {","})[0]
        self.at = end + 1
        return [_expression(part, self.level) for part in parts]

    def group(self) -> Expr:
        end = _close(self.tokens, self.at)
        inner = tuple(self.tokens[self.at + 1 : end])
        if self.tokens[self.at].text in "([" and self.tokens[end].text != _OPEN[self.tokens[self.at].text]:
            raise NotMath
        self.at = end + 1
        if infix := [i for i, t in enumerate(inner) if t.text in _INFIX and t.kind == "command"]:
            parts = inner[: infix[0]], inner[infix[0] + 1 :]
            upper, lower = (_expression(part, self.level) for part in parts)
            return ("binomial", upper, lower) if inner[infix[0]].text == "choose" else ("mul", upper, ("inv", lower))
        return _expression(inner, self.level)


# --- comparison -------------------------------------------------------------------------------------------------------


def compare(gold: str, answer: str, algebra: Algebra) -> bool | None:
    """Whether an answer says what the gold answer says; None when `algebra` leaves it open.

    Args:
        gold: The right answer, as LaTeX or text, without its box.
        answer: The answer to judge. At most MAX_CHARS characters, unless it is the gold answer itself.
        algebra: `Exact()` here; a worker's `Symbolic()` leaves nothing open.
    """
    if gold.strip() == answer.strip():
        return True
    if max(len(gold), len(answer)) > MAX_CHARS:
        return False
    return any_of(same(g, a, algebra) for g in readings(gold, True) for a in readings(answer, False))


@lru_cache(maxsize=1024)
def readings(text: str, gold: bool) -> tuple[Node, ...]:
    """What a text can mean: `1,234` is a number or two, `(B) 12` the choice or its content."""
    text = respell(text)
    texts = variants(text, gold)
    plain = re.sub(r"\\text[a-z]*\s*\{([^{}]*)\}|\\ ", r"\1 ", text).strip()
    choice = re.fullmatch(r"(?i:option|choice|answer)?:?\s*(?:\(([A-Z])\)|([A-Z])\s*[).:])\s*(?=[\w\\$-])(.+)", plain)
    nodes = [_parse(t) for t in texts]
    if choice and not re.search(r"\([A-Z]\)", choice[3]):
        nodes.append(Value(("sym", choice[1] or choice[2])))
        nodes += [] if re.fullmatch("[A-Za-z]", choice[3]) else [_parse(choice[3])]
    elif lone := re.fullmatch(r"(?i:(?:the )?(?:correct )?(?:option|choice|answer)(?: is)?:?\s*)?\(?([A-Za-z])[.)]?", plain):
        nodes = [Value(("sym", lone[1].upper()))] if lone[1].lower() not in "ei" or len(plain) > 1 else nodes
    if numeral := re.fullmatch(r"(\d*[A-F][\dA-F]*)(?:\s*_\s*\{?(\d+)\}?)?", plain):
        base = f"base {numeral[2]}"
        nodes.append(Value(("sym", numeral[1]), Unit(frozenset({base}), ((base, 1),)) if numeral[2] else None))
    if re.fullmatch("[A-H]{2,8}", plain) and list(plain) == sorted(set(plain)):  # ACD: three choices
        nodes.append(Seq(",", tuple(Value(("sym", c)) for c in plain)))
    if re.fullmatch(r"[A-Za-z][A-Za-z' -]+", text):  # `odd` is a word as well as a product
        nodes.append(_phrase(_words(_tokenize(text))))
    return tuple(nodes)
