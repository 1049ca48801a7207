r"""One spelling for what LaTeX and Unicode spell many ways: text in, text out.

`notation.py` reads what `respell` returns. What a text can mean beside its first reading, as 1.234,5 can be a number
or two, is in `variants`.
"""

import re
from fractions import Fraction

_UNICODE = str.maketrans(
    {
        **dict.fromkeys("−–—‐‑‒﹣－", "-"),
        **dict.fromkeys("×✕✖∗", r"\times "),
        **dict.fromkeys("·⋅∙•", r"\cdot "),
        **dict.fromkeys("\u00a0\u2002\u2003\u2005\u2007\u2009\u200a\u202f\u3000", " "),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),
        **dict.fromkeys("°˚º", r"^\circ "),
        **dict.fromkeys("“”„\"", ""),
        **dict(zip("（）［］｛｝，；：．％＝＋＜＞／＄", "()[]{},;:.%=+<>/$", strict=True)),
        **dict(zip("０１２３４５６７８９", "0123456789", strict=True)),
        **{c: rf"\frac{{{n}}}{{{d}}}" for c, n, d in ("½12", "⅓13", "⅔23", "¼14", "¾34", "⅕15", "⅖25", "⅗35", "⅘45")},
        **{c: rf"\frac{{{n}}}{{{d}}}" for c, n, d in ("⅙16", "⅚56", "⅛18", "⅜38", "⅝58", "⅞78")},
        **{"÷": "/", "∕": "/", "⁄": "/", "√": " sqrt ", "∛": r"\sqrt[3]", "∞": r"\infty ", "π": r"\pi ", "≤": r"\le "},
        **{"≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ", "∈": r"\in "},
        **{"∅": r"\emptyset ", "±": r"\pm ", "∓": r"\mp ", "ℝ": r"\mathbb{R}", "∖": r"\setminus ", "…": r"\ldots "},
        **{"⟨": r"\langle ", "⟩": r"\rangle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "∠": r"\angle ", "″": "''"},
        **{"⌈": r"\lceil ", "⌉": r"\rceil ", "′": "'", "’": "'", "∣": "|", "∧": r"\wedge ", "∨": r"\vee "},
        **{c: rf"\{n} " for c, n in zip("αβγδεθλμρσφωτ", "alpha beta gamma delta epsilon theta lambda mu rho sigma "
                                         "phi omega tau".split(), strict=True)},
    }
)  # fmt: skip
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿˣ", "0123456789+-nx")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉ₙ", "0123456789n")
_SHIFTED = re.compile(r"([⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿˣ]+)|([₀₁₂₃₄₅₆₇₈₉ₙ]+)")

_LOOKS = re.compile(
    r"\\(?:(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits|nolimits|boxed|fbox"
    r"|math(?:bf|it|cal|sf|tt|normal|ord|op|bin|rel)|ensuremath|boldsymbol|bm|bf|rm|it|vec|overrightarrow|underline"
    r"|tiny|small|normalsize|large|Large|LARGE|huge|Huge|hfill|enspace|hline"
    r"|checkmark|blacksquare|square|qed|Box|bigstar)"
    r"(?![A-Za-z])|(?:[hv]?phantom|[hv]space\*?|(?:text)?color|tag\*?|label)\s*\{[^{}]*\}"
    r"|(?:begin|end)\s*\{(?:aligned|align\*?|equation\*?|gathered|gather\*?|split)\})"
    r"|\\[()]|\\\[(?!\d*pt)|\\\]"
)
"""Commands that change how a formula looks and not what it says."""
_ANGLE = re.compile(r"(?:\bm\s*)?\\(?:measured)?angle(?![A-Za-z])")
_ROW_GAP = re.compile(r"\\\\\s*\[-?[\d.]+\s*[a-z]{2}\]")
_BRACED_SIGN = re.compile(r"(?<![\^_}\\])(?<!\\text)(?<!\\mathrm)(?<!\\mbox)\{\s*([-+=<>:,*/])\s*\}")
_ROMAN = r"\\(?:text[a-z]*|mathrm|mbox|hbox|emph|operatorname)"
_GROUPED = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\{,\}|,\s?\\!|\\[,!;:]|\\?[ ~]|['_])\s*\d{3})+(?![\d'])")
_COMMAS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
_REPEATING = re.compile(r"(?<!\d)(\d*)\.(\d*)(?:\\(?:overline|bar|dot|overbar)\s*\{?(\d+)\}?|\((\d+)\))")
_ELLIPSIS = re.compile(r"(?<!\d)(\d*)\.(\d*?)(?:(\d)\3\3+|(\d{2,6}?)\4+)(?:\.\.\.|\\[lc]?dots)")
_SCIENTIFIC = re.compile(r"^([+-]?(?:\d+\.?\d*|\.\d+))[eE]([+-]?\d{1,4})(?=$|\s*\\(?:mathrm|text)|\s+[A-Za-z])")
_ORDINAL = re.compile(
    rf"(?<=\d)\s*(?:\^\s*\{{\s*{_ROMAN}\s*\{{\s*(?:st|nd|rd|th)\s*\}}\s*\}}|\^?\s*{_ROMAN}\s*\{{\s*(?:st|nd|rd|th)\s*\}}"
    r"|\^\s*\{\s*(?:st|nd|rd|th)\s*\}|\^?(?:st|nd|rd|th)(?![A-Za-z]))"
)
_LABEL = re.compile(
    rf"^\s*(?:{_ROMAN}\s*\{{\s*)?(?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*[:=]\s*\}}?\s*(?=\S)", re.IGNORECASE
)
_MONEY = re.compile(rf"^\s*(?:{_ROMAN}\s*\{{\s*)?(USD|US|EUR|GBP|INR|Rs)\b\.?\s*\}}?\s*\\?\$?\s*(?=[\d.])")
_MONEY_SIGNS = {"USD": r"\$", "US": r"\$", "EUR": "€", "GBP": "£", "INR": "₹", "Rs": "₹"}
_UNIT_POWER = re.compile(rf"({_ROMAN}\s*\{{[^{{}}]*\^)\{{(-?\d)\}}")
_UNIT_FRACTION = re.compile(rf"\\[dt]?frac\s*\{{\s*{_ROMAN}\s*\{{([^{{}}]+)\}}\s*\}}\s*\{{\s*{_ROMAN}\s*\{{([^{{}}]+)\}}\s*\}}")
_MINUTES = re.compile(r"(\d+)\s*\^\s*\{?\s*\\circ\s*\}?\s*([0-5]?\d)\s*'(?:\s*([0-5]?\d(?:\.\d+)?)\s*(?:''|$))?(?!')")
_CHOOSE = re.compile(
    rf"(?:^|(?<=[-+*/=({{,])\s*|\{{\}}\s*)[_^]\s*\{{?(\d+)\}}?\s*(?:{_ROMAN}\s*\{{\s*)?([CP])\s*\}}?\s*_\s*\{{?(\d+)\}}?(?!\d)"
    r"|(?<![\w.}])(\d+)\s?([CP])\s?(\d+)(?!\w)"
)
_BASE_NAMES = "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
_BASE_WORD = re.compile(rf"_\s*\{{?\s*(?:{_ROMAN}\s*\{{\s*)?({'|'.join(_BASE_NAMES)})\s*\}}?\s*\}}?(?![A-Za-z])")
_BASE_AFTER = re.compile(rf"(?<=[\dA-F])\s*(?:{_ROMAN}\s*\{{\s*)?\(?\s*(?:in\s+)?base[\s-]*\}}?\s*(\d+)\s*\)?\s*\}}?\s*$")
_BASE_GROUP = re.compile(r"(?<![A-Za-z\d}])\(([\dA-F]+)\)(?=\s*_)|(?<=_)\s*\{?\s*\((\d+)\)\s*\}?")
_REVERSED = re.compile(r"(^|\\cup\s*|\\in\s*|=\s*|\bU\s*)([\[\]])([^()\[\],;]+)[,;]([^()\[\],;]+)([\[\]])(?=\s*(?:$|\\cup|U))")


def respell(text: str) -> str:
    """A text without looks: no white space, full stop or dollars around it, numbers without separators."""
    text = _SHIFTED.sub(lambda m: f"^{{{m[1].translate(_RAISED)}}}" if m[1] else f"_{{{m[2].translate(_LOWERED)}}}", text)
    text = re.sub(r"[^\D0-9]", "?", text.translate(_UNICODE)).strip()  # digits of other scripts are left unread
    if text.startswith("**") and text.endswith("**"):
        text = text[2:-2]
    dollars = len(re.findall(r"(?<!\\)\$", text))
    if dollars % 2 == 0:
        text = re.sub(r"(?<!\\)\$", " ", text)
    text = _ROW_GAP.sub(r"\\\\ ", text)
    text = re.sub(r"\{\s*\\rm\s+([^{}]*)\}", r"\\text{\1}", text)
    text = _ANGLE.sub(" ", _LOOKS.sub(" ", text))
    text = re.sub(r"\\overline\s*\{([A-Z]{2})\}", r"\1", text)
    text = re.sub(r"(?<=\d)(?: to |\s*\\text\{ to \}\s*)(?=\d)", ":", text)
    text = _LABEL.sub("", re.sub(rf"{_ROMAN}\s*\{{\s*[.,;:]?\s*\}}\s*$", "", text))
    text = re.sub(r"(?<!\\)\\\s*$", "", text.strip())
    text = re.sub(r"(?<![.\s\\])[\s.,;:]+$|\\\\\s*$", "", text.strip()) if not text.endswith("...") else text
    text = re.sub(r"^(?:\\(?:approx|sim|therefore|implies|Rightarrow)(?![A-Za-z])|~|=)\s*", "", text)
    text = re.sub(rf"(?<=\d)\s*(?:{_ROMAN}\s*\{{\s*)?\bout of\b\s*\}}?\s*(?=\d)", "/", text)
    text = re.sub(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\times ", text)
    text = re.sub(r"\b([AaPp])\.\s?([Mm])\b\.?", r"\1\2", text)
    text = re.sub(r"(?<![\d:.])0(?=\d:\d\d)", "", text)
    text = re.sub(r"\^\s*(?:\\prime|\{\s*((?:\\prime\s*)+)\})", lambda m: "'" * max((m[1] or "").count("prime"), 1), text)
    text = _MINUTES.sub(_degrees, text)
    text = _REVERSED.sub(_interval, text)
    for _ in range(3):  # \mathrm{m\,s^{-2}}: no braces inside
        text = _UNIT_POWER.sub(r"\1\2", text)
    text = _MONEY.sub(lambda m: _MONEY_SIGNS[m[1]], text)
    text = _UNIT_FRACTION.sub(r"\\text{\1 / \2}", text)
    text = _BASE_WORD.sub(lambda m: f"_{{{_BASE_NAMES.index(m[1]) + 2}}}", _BASE_GROUP.sub(_ungrouped, text))
    text = _BASE_AFTER.sub(r"_{\1}", text)
    text = _CHOOSE.sub(lambda m: _chosen(m[1] or m[4], m[2] or m[5], m[3] or m[6]), text)
    text = _ORDINAL.sub("", text)
    text = _GROUPED.sub(lambda m: re.sub(r"\D", "", m[0]), text)
    text = _BRACED_SIGN.sub(r"\1", text)
    text = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text)
    text = _REPEATING.sub(lambda m: _repeating(m[1], m[2], m[3] or m[4]), text)
    return _ELLIPSIS.sub(lambda m: _repeating(m[1], m[2], m[3] or m[4]), text)


def _repeating(whole: str, head: str, period: str) -> str:
    """0.1\\overline{6} = (16 - 1) / 90."""
    fixed = int((whole or "0") + head)
    ends = 10 ** len(head)
    value = Fraction(fixed, ends) + Fraction(int(period), ends * (10 ** len(period) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _degrees(m: re.Match[str]) -> str:
    """22 degrees 30 minutes as 22.5 degrees."""
    value = int(m[1]) + Fraction(m[2]) / 60 + Fraction(m[3] or 0) / 3600
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}^\circ "


def _ungrouped(m: re.Match[str]) -> str:
    """(52)_8 and 52_{(8)} as 52_8."""
    return m[1] or f"{{{m[2]}}}"


def _interval(m: re.Match[str]) -> str:
    """]0, 1] is (0, 1]."""
    return f"{m[1]}{'(' if m[2] == ']' else '['}{m[3]},{m[4]}{')' if m[5] == '[' else ']'}"


def _chosen(n: str, kind: str, k: str) -> str:
    return rf"\binom{{{n}}}{{{k}}}" if kind == "C" else rf"\frac{{{n}!}}{{({n}-{k})!}}"


# --- what else it can mean --------------------------------------------------------------------------------------------

_EUROPEAN = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\.\d{3})+,\d+|(?:\.\d{3}){2,})(?![\d.,])")
_DECIMAL_COMMA = re.compile(r"(?<![\d.,])(?:\d+,(?:\d{1,2}|\d{4,})|0,\d+)(?![\d.,])")
_CALL = re.compile(r"(?<![A-Za-z\\])([CP])\((\d+),\s*(\d+)\)")
_CHINESE = re.compile(rf"(?:{_ROMAN}\s*\{{\s*)?\b([CP])\s*\}}?(?:_\{{?(\d+)\}}?\^\{{?(\d+)\}}?|\^\{{?(\d+)\}}?_\{{?(\d+)\}}?)")
_CLOCK = re.compile(rf"(\d{{1,2}})(:\d\d)?\s*(?:{_ROMAN}\s*\{{\s*)?([ap])m\s*\}}?", re.IGNORECASE)


def variants(text: str, gold: bool) -> list[str]:
    """The texts that a respelled text may stand for.

    A gold answer is written by a careful hand: 31,250 is one number and 12,9 are two. In a model's answer 12,9 can be
    12.9, and C(5,2) a number of choices.
    """
    joined = _COMMAS.sub(lambda m: m[0].replace(",", ""), text)
    if gold and _COMMAS.fullmatch(text.lstrip(r"\$-+ ")):
        text = joined
    texts = [text, joined]
    if not re.search(r"[(\[{|]", re.sub(rf"{_ROMAN}\s*\{{[^{{}}]*\}}", "", text)):
        texts.append(_EUROPEAN.sub(lambda m: m[0].replace(".", "").replace(",", "."), text))
        if not gold and text.count(",") == 1:
            texts.append(_DECIMAL_COMMA.sub(lambda m: m[0].replace(",", "."), text))
    if not gold:
        texts.append(_CALL.sub(lambda m: _chosen(m[2], m[1], m[3]), text))
        texts.append(_CHINESE.sub(lambda m: _chosen(m[2] or m[5], m[1], m[3] or m[4]), text))
    if clock := _CLOCK.fullmatch(text):
        hour, minutes = int(clock[1]), clock[2] or ":00"
        texts.append(f"{hour}{minutes} {clock[3]}m")
        hour = hour % 12 + 12 * (clock[3] in "pP") if hour <= 12 else hour
        if not 1 <= hour <= 12:  # as no one would write it who means the other half of the day
            texts.append(f"{hour}{minutes}")
    return list(dict.fromkeys(texts))
