"""How much of a sequence copies what stood before it. No torch."""

from collections.abc import Hashable, Sequence


def repeated_share(ids: Sequence[Hashable], ngram: int) -> float:
    """Share of the tokens that stand in a run of `ngram` tokens which occurred before in the same sequence; in [0, 1).

    A copied passage counts in full, a loop from its second turn on, whatever its period, once that turn is `ngram` tokens
    long or goes on. What differs in one of every `ngram` tokens does not count, and a sequence of at most `ngram` tokens
    repeats nothing.

    Args:
        ids: Tokens.
        ngram: Tokens; long enough that honest work, which restates its formulas, stays near 0.

    >>> repeated_share([1, 2, 3, 1, 2, 3], 3), repeated_share([1, 2, 3, 4], 3)
    (0.5, 0.0)

    Cost:
        O(len(ids) * ngram).

    Source:
        The share of n-grams that are not distinct, seq-rep-n (Welleck et al., arXiv 1908.04319), here of the tokens that
        they cover.
    """
    seen: set[tuple[Hashable, ...]] = set()
    repeated = counted_to = 0
    for start in range(len(ids) - ngram + 1):
        end = start + ngram
        run = tuple(ids[start:end])
        if run in seen:
            repeated += end - max(start, counted_to)  # runs that overlap count their tokens once
            counted_to = end
        seen.add(run)
    return repeated / len(ids) if ids else 0.0
