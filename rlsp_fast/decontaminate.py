r"""Training problems that are evaluation problems: found, named and taken out. No torch.

Two texts are compared as tokens: words without case, numbers (`1,000` is `1000`), symbols. LaTeX that only sets type
(`$`, `\left`, `\,`, the braces of `x^{2}`) and sentence punctuation do not count; every number and operator does. A
training problem overlaps an evaluation problem when it is

  exact      the same tokens, whatever the length;
  reworded   the same tokens but for words of asking ("what is", "compute the value of", "Exercise 3:"), if the evaluation
             problem has fewer than n tokens: too short for n-grams, so nothing may differ that changes the answer;
  contains   a text in which the whole evaluation problem stands;
  ngram      alike: n-grams of both cover at least `threshold` of the evaluation problem, and each of its numbers stands
             in the training problem as often. With other numbers it is another problem from the same template.

An n-gram of few distinct tokens (a row of a grid), or one that stands in more than COMMON evaluation problems, or in more
than 1 % of the training problems (and COMMON of them), is a table, an instruction or a phrase of the trade ("where m and n
are relatively prime positive integers, find m + n") and is evidence of nothing. threshold = 0 is the plain rule: any shared
n-gram that is not one of these, whatever the numbers.

Why our own: MinHash (datasketch) estimates how alike two whole texts are and cannot see a problem inside a longer text,
nor that a number differs; an n-gram index over numpy arrays is exact, says where, and needs no dependency.
"""

import json
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from rlsp_fast import data
from rlsp_fast.config import DataConfig

NGRAM, THRESHOLD = 13, 0.5
COMMON = 10
COMMON_SHARE = 0.01
DISTINCT = 0.37
"""An n-gram with fewer distinct tokens than this share of n (5 of 13) is too dull to tell texts apart."""
CHUNK = 1 << 20
"""Tokens hashed at once: bounds memory, not results."""

Why = Literal["exact", "reworded", "contains", "ngram"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """A training problem and the evaluation problem that it is most like."""

    train: int
    """Position among the training texts."""
    evaluation: int
    """Position among the evaluation texts: the first of equals."""
    why: Why
    share: float
    """Tokens of the evaluation problem, common ones aside, that stand in shared n-grams; 1 but for `ngram`."""
    matched: str
    """The longest stretch of tokens that both have."""


class OverlapError(ValueError):
    """A decontamination that cannot be done as asked; the message names the argument and the fix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What `clean` did."""

    num_train: int
    num_kept: int
    removed: Counter[tuple[str, Why]]
    """Removed rows by the source of the evaluation problem, and why."""
    touched: dict[str, tuple[int, int]]
    """Of each evaluation source: its problems, and how many of them removed rows are most like."""
    report: Path
    """Every removed row, whole."""


# --- tokens -----------------------------------------------------------------------------------

# One alternative a kind of token, the likeliest first where two could match: LaTeX, numbers, ideographs one by one (they
# have no spaces between words), words, any other sign by itself.
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_TOKEN = re.compile(
    rf"\\(?:[a-z]+\*?|\S)|\d{{1,3}}(?:(?:,|\{{,\}})\d{{3}})+(?!\d)|\d+(?:\.\d+)?|\.\d+|[{_CJK}]|[^\W\d_{_CJK}]+|\S"
)
_SQUARE = re.compile(r"(?<!\S)_(?!\S)|(?<=[|#.] )\.|(?<=[#.])\.(?=[#.])|(?<=#)\.|\.(?= ?[|#])")  # empty, of a board
_ATOM = re.compile(r"\{\s*(\\?[a-z]+\*?|\d+(?:\.\d+)?|[^\s{}\\,])\s*\}")  # a group of one: the braces say nothing
_APOSTROPHE = re.compile(r"(?<=[a-z])['\u2019](?=[a-z]{1,2}\b)")  # Janet's, don't; f'(x) keeps its prime
_SIGN = re.compile(r"[^\w\s\\{}()$^.,&=+*/'\"-]")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060-\u2064\ufeff]")
_RAISED = re.compile("([\u00b2\u00b3\u00b9\u2070\u2074-\u2079]+)")  # 10² is 10^2; NFKC alone would make it 102
_VULGAR = re.compile("([\u00bc-\u00be\u2150-\u215e])")  # 2½ is 2 1/2, not 21/2
_SAME = {
    **dict.fromkeys(("\\dfrac", "\\tfrac", "\\cfrac", "\\frac"), "frac"),
    **dict.fromkeys(("\\dbinom", "\\tbinom", "\\binom"), "binom"),
    **dict.fromkeys(("\\dots", "\\ldots", "\\cdots", "\\dotsc", "\\dotsb"), "dots"),
    **dict.fromkeys(("\\cdot", "\\times", "\u00d7", "\u00b7", "\u22c5", "\u2217"), "*"),
    **dict.fromkeys(("\\div", "\u00f7", "\u2044", "\u2215"), "/"),
    **dict.fromkeys(("\u2212", "\u2013", "\u2014", "\u2010", "\u2011"), "-"),
    **dict.fromkeys(("\\le", "\\leq", "\\leqslant", "\u2264"), "<="),
    **dict.fromkeys(("\\ge", "\\geq", "\\geqslant", "\u2265"), ">="),
    **dict.fromkeys(("\\ne", "\\neq", "\u2260"), "!="),
    **dict.fromkeys(("\\circ", "\u00b0"), "degree"),
    **dict.fromkeys(("\u2032", "\u2019", "\\prime"), "'"),
    **dict.fromkeys(("\\vert", "\\mid", "\\lvert", "\\rvert", "\\|"), "|"),
    **dict.fromkeys(("\\lt",), "<"),
    **dict.fromkeys(("\\gt",), ">"),
    **dict.fromkeys(("\\infty", "\u221e"), "infty"),
    **dict.fromkeys(("\\pi", "\u03c0"), "pi"),
    **dict.fromkeys(("\\sqrt", "\u221a"), "sqrt"),
    "\\%": "%",
}
_DROPPED = {
    *'$.,;:?"`~&_\\\u201c\u201d\u2018\u00ab\u00bb\u3002\u3001',
    *(f"\\{word}" for word in ("left", "right", "big", "bigg", "quad", "qquad", "displaystyle", "textstyle", "limits")),
    *(f"\\{word}" for word in ("text", "textbf", "textit", "mathrm", "mathbf", "mathit", "rm", "bf", "mbox", "operatorname")),
    *(f"\\{sign}" for sign in "$,;:! [](){}_&#\\'\"/"),
} - {"\\{", "\\}"}
_ASKING = (
    "what whats is are was the a an of that this value values result answer calculate compute evaluate find determine "
    "give solve simplify please state work out"
)
_LABEL = "problem exercise question example task q"


class _Vocabulary(dict[str, int]):
    """Ids of tokens by their spelling in a text, in order of first sight; 0 for what does not count."""

    def __init__(self) -> None:
        self.words = [""]
        self.ids: dict[str, int] = {}

    def __missing__(self, token: str) -> int:
        word = "" if token in _DROPPED else _SAME.get(token, token)
        if word[:1].isdigit():
            word = word.replace("{,}", "").replace(",", "")
        elif word.startswith(".") and len(word) > 1:
            word = "0" + word  # .5
        elif word.startswith("\\") and len(word) > 2:
            word = word[1:]
        if word and unicodedata.category(word[0]) in ("Cc", "Cf", "Cs"):
            word = ""
        self[token] = number = self._id(word) if word else 0
        return number

    def _id(self, word: str) -> int:
        if word not in self.ids:
            self.ids[word] = len(self.words)
            self.words.append(word)
        return self.ids[word]

    def encode(self, text: str) -> np.ndarray:
        """(L,) i32 ids of the tokens that count."""
        if not text.isascii():
            text = _INVISIBLE.sub("", _VULGAR.sub(r" \1", _RAISED.sub(r"^\1", text)))
            text = unicodedata.normalize("NFKC", text)
        text = text.lower()
        if "_" in text or "#" in text or "|" in text:
            text = _SQUARE.sub("\u25a1", text)
        text = _APOSTROPHE.sub("", text.replace("...", "\\dots "))
        if "{" in text:
            text = _ATOM.sub(r" \1 ", text)
        ids = np.fromiter(map(self.__getitem__, _TOKEN.findall(text)), np.int32)
        return ids[ids > 0]

    def some(self, words: Iterable[str]) -> np.ndarray:
        """(words,) bool of the vocabulary so far: True for these words."""
        mask = np.zeros(len(self.words), bool)
        mask[[self.ids[word] for word in words if word in self.ids]] = True
        return mask

    def text(self, ids: np.ndarray) -> str:
        return " ".join(self.words[i] for i in ids)


def tokens(text: str) -> list[str]:
    r"""What counts of a text.

    >>> tokens(r"What is $\dfrac{1}{2} + 1{,}000\cdot x^{2}$?")
    ['what', 'is', 'frac', '1', '2', '+', '1000', '*', 'x', '^', '2']
    """
    vocabulary = _Vocabulary()
    return [vocabulary.words[i] for i in vocabulary.encode(text)]


# --- n-grams ----------------------------------------------------------------------------------


class _Texts:
    """Token ids of many texts end to end. Braces stand in `whole` (exact matches see them), not in `ids` (n-grams do not)."""

    def __init__(self, texts: Sequence[str], vocabulary: _Vocabulary):
        self.whole = [vocabulary.encode(text) for text in texts]
        braces = vocabulary.some("{}")
        rows = [w[~braces[w]] for w in self.whole]
        self.ids = np.concatenate([*rows, np.zeros(0, np.int32)])
        self.starts = np.cumsum([0, *map(len, rows)])
        self.raw = texts

    def __getitem__(self, i: int) -> np.ndarray:
        return self.ids[self.starts[i] : self.starts[i + 1]]

    def __len__(self) -> int:
        return len(self.whole)

    def exact_key(self, i: int) -> bytes | str:
        """Equal for equal problems. A text of signs that do not count stands for itself."""
        return self.whole[i].tobytes() or self.raw[i].strip()

    def windows(self, n: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(hash, row, position in row) of every n-gram of rows first to last.

        64-bit hashes of up to a billion pairs of n-grams collide with probability below 1e-10.
        """
        base = self.starts[first]
        ids = self.ids[base : self.starts[last]]
        lengths = np.diff(self.starts[first : last + 1])
        row = np.repeat(np.arange(first, last), np.maximum(lengths - n + 1, 0))
        position = np.arange(len(row)) - np.repeat(
            np.cumsum(np.maximum(lengths - n + 1, 0)) - np.maximum(lengths - n + 1, 0), np.maximum(lengths - n + 1, 0)
        )
        at = self.starts[row] - base + position
        token = _mix(ids.astype(np.uint64))
        value = np.zeros(len(at), np.uint64)
        for offset in range(n):
            value = value * np.uint64(0x9E3779B97F4A7C15) + token[at + offset]
        return _mix(value), row, position

    def chunks(self) -> Iterable[tuple[int, int]]:
        """(first, last) of runs of rows of about CHUNK tokens."""
        first = 0
        while first < len(self):
            last = int(np.searchsorted(self.starts, self.starts[first] + CHUNK, "right")) - 1
            last = min(max(last, first + 1), len(self))
            yield first, last
            first = last


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64: every bit of the result depends on every bit of x."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def find(train: Sequence[str], evaluation: Sequence[str], *, ngram: int = NGRAM, threshold: float = THRESHOLD) -> list[Overlap]:
    """Every training text that overlaps an evaluation text, with the one it is most like; in the order of `train`.

    Args:
        ngram: n, tokens.
        threshold: share of an evaluation problem's tokens, in (0, 1]; 0 for any shared n-gram, whatever the numbers.

    Raises:
        OverlapError: for an n below 2 or a threshold outside [0, 1].

    Cost: every text is tokenised and hashed once; then sorted look-ups. Seconds for 100,000 against 5,000 problems
        (bench/results/decontaminate.csv).
    """
    if ngram < 2:
        raise OverlapError(f"want n-grams of at least 2 tokens, got {ngram}")
    if not 0 <= threshold <= 1:
        raise OverlapError(f"want a threshold from 0 to 1, got {threshold}")
    return _Search(train, evaluation, ngram, threshold).find() if train and evaluation else []


class _Search:
    """One comparison. G distinct n-grams of the evaluation texts; a hit is one of them in a training text."""

    def __init__(self, train: Sequence[str], evaluation: Sequence[str], n: int, threshold: float):
        self.n, self.threshold = n, threshold
        self.vocabulary = _Vocabulary()
        self.evaluation = _Texts(evaluation, self.vocabulary)
        self.train = _Texts(train, self.vocabulary)
        self.is_number = np.array([word[:1].isdigit() for word in self.vocabulary.words])
        self.found: dict[int, Overlap] = {}

    def find(self) -> list[Overlap]:
        self._same_tokens()
        self._index()
        if len(self.gram_G):
            row, position, gram = self._hits()
            self._contains(row, position, gram)
            self._alike(row, gram)
        return [self.found[i] for i in sorted(self.found)]

    def _add(self, train: int, evaluation: int, why: Why, share: float, matched: np.ndarray) -> None:
        evaluation = self.same[evaluation]
        self.found[train] = Overlap(
            train=train, evaluation=evaluation, why=why, share=share, matched=self.vocabulary.text(matched)
        )

    def _same_tokens(self) -> None:
        first: dict[bytes | str, int] = {}
        self.same = [first.setdefault(self.evaluation.exact_key(e), e) for e in range(len(self.evaluation))]
        asking, label = self.vocabulary.some(_ASKING.split()), self.vocabulary.some(_LABEL.split())
        core: dict[bytes, int] = {}
        for e in sorted(first.values()):
            ids = self._core(self.evaluation.whole[e], asking, label)
            if len(self.evaluation[e]) < self.n and len(ids) > 1:
                core.setdefault(ids.tobytes(), e)
        for t, ids in enumerate(self.train.whole):
            e = first.get(self.train.exact_key(t))
            if e is not None and _same_drawing(self.train.raw[t], self.evaluation.raw[e]):
                self._add(t, e, "exact", 1.0, ids)
                continue
            ids = self._core(ids, asking, label)
            e = core.get(ids.tobytes())
            if e is not None and _same_drawing(self.train.raw[t], self.evaluation.raw[e]):
                self._add(t, e, "reworded", 1.0, ids)

    def _core(self, ids: np.ndarray, asking: np.ndarray, label: np.ndarray) -> np.ndarray:
        """A problem without words of asking and without its number ("Exercise 3.2:")."""
        if len(ids) and label[ids[0]]:
            ids = ids[2:] if self.is_number[ids[1:2]].any() else ids[1:]
        return ids[~asking[ids]]

    def _index(self) -> None:
        """Where each n-gram stands in distinct evaluation texts, and in how many of them."""
        value, row, position = self.evaluation.windows(self.n, 0, len(self.evaluation))
        distinct = np.array(self.same)[row] == row
        value, row, position = value[distinct], row[distinct], position[distinct]
        self.gram_G, first, gram = np.unique(value, return_index=True, return_inverse=True)
        starts = self.evaluation.starts[row[first]] + position[first]
        self.dull_G = _num_distinct(self.evaluation.ids, starts, self.n) < max(2, math.ceil(self.n * DISTINCT))
        # (n-gram, text) once each, however often the text repeats itself
        pairs, times = np.unique(gram * len(self.evaluation) + row, return_counts=True)
        self.pair_gram, self.pair_row, self.pair_times = pairs // len(self.evaluation), pairs % len(self.evaluation), times
        self.num_texts_G = np.bincount(self.pair_gram, minlength=len(self.gram_G))
        self.first_pair_G = np.cumsum(self.num_texts_G) - self.num_texts_G
        by_row = np.argsort(row, kind="stable")
        borders = np.searchsorted(row[by_row], np.arange(len(self.evaluation) + 1))
        self.grams_of = [gram[by_row[a:b]] for a, b in zip(borders[:-1], borders[1:], strict=True)]

    def _hits(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(row, position, n-gram) of every n-gram of a training text that an evaluation text has; exact ones aside."""
        bits = 1 << max(16, (len(self.gram_G) * 8 - 1).bit_length())  # a look-up that nearly all others fail at once
        seen = np.zeros(bits, bool)
        seen[self.gram_G & np.uint64(bits - 1)] = True
        parts = []
        done = np.zeros(len(self.train), bool)
        done[list(self.found)] = True
        for first, last in self.train.chunks():
            value, row, position = self.train.windows(self.n, first, last)
            maybe = seen[value & np.uint64(bits - 1)] & ~done[row]
            value, row, position = value[maybe], row[maybe], position[maybe]
            gram = np.minimum(np.searchsorted(self.gram_G, value), len(self.gram_G) - 1)
            hit = self.gram_G[gram] == value
            parts.append((row[hit], position[hit], gram[hit]))
        return tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))

    def _contains(self, row: np.ndarray, position: np.ndarray, gram: np.ndarray) -> None:
        """Whole evaluation texts inside training texts, looked for at their rarest n-gram, common or not."""
        anchored = defaultdict(list)
        for e, grams in enumerate(self.grams_of):
            telling = ~self.dull_G[grams]
            if 2 * telling.sum() > len(grams):  # else a grid or a drawing, of which another may hold a part
                offset = int(np.where(telling, self.num_texts_G[grams], len(self.evaluation) + 1).argmin())
                anchored[int(grams[offset])].append((e, offset))
        order = np.argsort(gram, kind="stable")
        borders = np.searchsorted(gram[order], np.array([[g, g + 1] for g in anchored]))
        for (g, places), (a, b) in zip(anchored.items(), borders.tolist(), strict=True):
            del g
            for e, offset in places if a < b else ():
                text = self.evaluation[e]
                start = self.train.starts[row[order[a:b]]] + position[order[a:b]] - offset
                rows = row[order[a:b]]
                fits = (start >= self.train.starts[rows]) & (start + len(text) <= self.train.starts[rows + 1])
                rows, start = rows[fits], start[fits]
                likely = (self.train.ids[start] == text[0]) & (self.train.ids[start + len(text) - 1] == text[-1])
                for t, at in zip(rows[likely].tolist(), start[likely].tolist(), strict=True):
                    longer = t not in self.found or (
                        self.found[t].why == "contains" and len(text) > len(self.evaluation[self.found[t].evaluation])
                    )
                    end = at + len(text)
                    if longer and np.array_equal(self.train.ids[at:end], text) and not self._goes_on(t, end):
                        self._add(t, e, "contains", 1.0, text)

    def _goes_on(self, t: int, end: int) -> bool:
        """Whether what ends here in a training text is half a sum or half a table: a number or a sign on either side."""
        pair = self.train.ids[end - 1 : min(end + 1, int(self.train.starts[t + 1]))]
        return len(pair) == 2 and not any(self.vocabulary.words[i][0].isalpha() for i in pair)

    def _alike(self, row: np.ndarray, gram: np.ndarray) -> None:
        num_grams = len(self.gram_G)
        hits = np.unique(row * num_grams + gram)  # once a text, however often it repeats itself
        row, gram = hits // num_grams, hits % num_grams
        in_training = np.bincount(gram, minlength=num_grams)
        common = self.dull_G | (self.num_texts_G > COMMON) | (in_training > max(COMMON, COMMON_SHARE * len(self.train)))
        done = np.zeros(len(self.train), bool)
        done[list(self.found)] = True
        keep = ~common[gram] & ~done[row]
        row, gram = row[keep], gram[keep]
        # every (training text, evaluation text, n-gram) that is left: at most COMMON evaluation texts an n-gram
        times = self.num_texts_G[gram]
        pair = np.repeat(self.first_pair_G[gram], times) + np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
        t, e, g, windows = np.repeat(row, times), self.pair_row[pair], np.repeat(gram, times), self.pair_times[pair]
        key = t * len(self.evaluation) + e
        order = np.argsort(key, kind="stable")
        keys, borders = np.unique(key[order], return_index=True)
        borders = np.append(borders, len(order))
        shared_G = np.zeros(num_grams, bool)
        best: dict[int, tuple[float, int, np.ndarray]] = {}
        numbers: dict[tuple[bool, int], Counter[int]] = {}
        own = {int(e): self._own(int(e), common) for e in np.unique(e)}
        for k, a, b in zip(keys.tolist(), borders[:-1].tolist(), borders[1:].tolist(), strict=True):
            t, e = divmod(k, len(self.evaluation))
            mine = own[e]
            size = int(mine.sum())
            if self.threshold and (size < self.n or self.n * int(windows[order[a:b]].sum()) < self.threshold * size):
                continue
            shared_G[g[order[a:b]]] = True
            covered = self._covered(e, shared_G[self.grams_of[e]])
            shared_G[g[order[a:b]]] = False
            share = float((covered & mine).sum() / max(size, 1))
            if share < self.threshold or (t in best and best[t][0] >= share):
                continue
            if self.threshold and self._numbers(numbers, False, e) - self._numbers(numbers, True, t):
                continue
            best[t] = (share, e, covered)
        for t, (share, e, covered) in best.items():
            self._add(t, e, "ngram", share, _longest(self.evaluation[e], covered))

    def _own(self, e: int, common: np.ndarray) -> np.ndarray:
        """(L,) bool: tokens of an evaluation text that stand in no common or dull n-gram."""
        return ~self._covered(e, common[self.grams_of[e]])

    def _covered(self, e: int, windows: np.ndarray) -> np.ndarray:
        """(L,) bool: tokens of an evaluation text that stand in one of these n-grams, given as a mask of its n-grams."""
        steps = np.zeros(len(self.evaluation[e]) + 1, np.int32)
        steps[: len(windows)] += windows
        steps[self.n : self.n + len(windows)] -= windows
        return np.cumsum(steps[:-1]) > 0

    def _numbers(self, known: dict[tuple[bool, int], Counter[int]], training: bool, i: int) -> Counter[int]:
        if (training, i) not in known:
            ids = (self.train if training else self.evaluation)[i]
            known[training, i] = Counter(ids[self.is_number[ids]].tolist())
        return known[training, i]


def _num_distinct(ids: np.ndarray, starts: np.ndarray, n: int) -> np.ndarray:
    """How many distinct tokens the n-grams at these places have."""
    out = [np.zeros(0, np.int64)]
    for first in range(0, len(starts), CHUNK // n):
        window = np.sort(ids[starts[first : first + CHUNK // n, None] + np.arange(n)], axis=1)
        out.append(1 + (window[:, 1:] != window[:, :-1]).sum(1))
    return np.concatenate(out)


def _same_drawing(a: str, b: str) -> bool:
    """True unless the texts are mostly signs, as drawn letters or a maze are, and differ: there the spaces matter."""
    signs = len(_SIGN.findall(b))
    return 2 * signs < len(b.split()) + sum(map(str.isalnum, b)) or a.split("\n") == b.split("\n")


def _longest(ids: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """The longest covered stretch."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], covered, [False]]).astype(np.int8)))
    lengths = edges[1::2] - edges[::2]
    longest = int(lengths.argmax())
    return ids[edges[2 * longest] : edges[2 * longest + 1]]


# --- files ------------------------------------------------------------------------------------


def clean(
    train: Sequence[str],
    against: Sequence[str],
    out: Path,
    report: Path | None = None,
    *,
    ngram: int = NGRAM,
    threshold: float = THRESHOLD,
    prompt_key: str | None = None,
) -> Summary:
    """Writes the rows of `train` that overlap no problem of `against` to `out`, the others to `report`.

    Rows stay whole and in order: what is in `train` is in one of the two files. Only problems are compared, not answers
    or responses. Nothing is written before everything has been compared.

    Args:
        train, against: sources as in data.train; an answer is not asked for.
        out: .jsonl, with the columns that the rows had.
        report: .jsonl, `OUT.removed.jsonl` unless named. A row a removed row: `source` and `index` (from 0) of it, `why`,
            `share`, `matched`, `evaluation` (source, index, problem), and `row`, the row itself.
        prompt_key: column with the problem, if it has a name of its own.

    Raises:
        DataError: naming source and row, for what cannot be read.
        OverlapError: for an argument that cannot be used, such as an output that is one of the inputs.
    """
    report = out.with_suffix(".removed.jsonl") if report is None else report
    for path in (out, report):
        if path.suffix != ".jsonl":
            raise OverlapError(f"{path}: want a name that ends in .jsonl")
        if any(Path(source).exists() and path.exists() and path.samefile(source) for source in (*train, *against)):
            raise OverlapError(f"{path} is one of the inputs: name another file")
    if out.absolute() == report.absolute():
        raise OverlapError(f"{out} cannot be both --out and --report")
    rows = data.load_rows(train, DataConfig(prompt_key=prompt_key))
    problems = data.load_rows(against, DataConfig(prompt_key=prompt_key))
    overlaps = find([r.text for r in rows], [p.text for p in problems], ngram=ngram, threshold=threshold)
    removed = {o.train: o for o in overlaps}
    _write(out, (r.row for i, r in enumerate(rows) if i not in removed))
    _write(report, (_entry(rows[o.train], problems[o.evaluation], o) for o in overlaps))
    touched = {problems[o.evaluation].source: set() for o in overlaps}
    for o in overlaps:
        touched[problems[o.evaluation].source].add(o.evaluation)
    sizes = Counter(p.source for p in problems)
    return Summary(
        num_train=len(rows),
        num_kept=len(rows) - len(overlaps),
        removed=Counter((problems[o.evaluation].source, o.why) for o in overlaps),
        touched={source: (size, len(touched.get(source, ()))) for source, size in sizes.items()},
        report=report,
    )


def _entry(row: data.SourceRow, problem: data.SourceRow, overlap: Overlap) -> dict[str, object]:
    return {
        "source": row.source,
        "index": row.index,
        "why": overlap.why,
        "share": round(overlap.share, 4),
        "matched": overlap.matched,
        "evaluation": {"source": problem.source, "index": problem.index, "problem": problem.text},
        "row": row.row,
    }


def _write(path: Path, rows: Iterable[dict[str, object]]) -> None:
    part = path.with_name(path.name + ".part")  # a kill leaves no half file under the name asked for
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w") as file:
            file.writelines(json.dumps(row, default=str) + "\n" for row in rows)
        part.replace(path)
    except OSError as error:
        raise OverlapError(f"{path} cannot be written: {error.strerror}") from None


def print_summary(summary: Summary, out: Path) -> None:
    """A table of what was removed, and where everything went."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, 72 + max(map(len, summary.touched)))  # a name cut short names nothing
    table = Table(title="training problems removed, by the evaluation problem they are most like", title_justify="left")
    columns = ("evaluation set", "problems", "touched", *get_args(Why), "removed")
    for column in columns:
        longest = max(map(len, (column, *summary.touched))) if column == columns[0] else len(column)
        table.add_column(column, justify="left" if column == columns[0] else "right", min_width=longest)
    for source, (size, touched) in summary.touched.items():
        counts = [summary.removed[source, why] for why in get_args(Why)]
        name = source.encode(errors="backslashreplace").decode()
        table.add_row(Text(name), *(f"{n:,}" for n in (size, touched, *counts, sum(counts))))
    console.print(table)
    console.print(f"kept    {summary.num_kept:,} of {summary.num_train:,} rows: {out}", markup=False)
    console.print(
        f"removed {summary.num_train - summary.num_kept:,} rows, with the reason of each: {summary.report}", markup=False
    )
