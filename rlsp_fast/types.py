"""The records that pass between stages. Plain Python: no torch.

Off by one, settled here and nowhere else: a causal model's output at position t predicts token t + 1. `predicted` turns a
sequence of L tokens into L - 1 training positions; position t holds the input token t, its target token t + 1, and whether
that target is a response token. Every per-token number in rlsp_fast (logprob, value, reward, advantage, mask) lives on the
position that predicts the token.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem, as read from a file or made by a generator."""

    messages: tuple[dict[str, str], ...]
    """Chat messages, each {"role": ..., "content": ...}; the last is the user's."""
    answer: str
    """Ground truth: what the verifier compares with."""
    source: str
    """Where it comes from: verl's `data_source` column, else `file.jsonl` or `reasoning-gym:chain_sum`."""
    index: int
    """Row in its source, from 0. (source, index) names a problem."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What a user's reward function gets as `extra_info`."""
    prompt_ids: tuple[int, ...] = ()
    """Token ids of the rendered prompt, special tokens included."""

    @property
    def text(self) -> str:
        """Its messages as a judge reads them."""
        return "\n\n".join(message["content"] for message in self.messages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled response."""

    problem: Problem
    sample: int
    """Which of the K samples of this problem, from 0."""
    response_ids: tuple[int, ...]
    """Sampled token ids; ends with the end-of-sequence token if that was sampled. Empty only while unfinished."""
    rollout_logprob: tuple[float, ...]
    """Per response token, nats: log-probability under the distribution it was sampled from (temperature applied)."""
    finish: str
    """`stop` (end of sequence or a stop string), `length` (cut at the limit: truncated), or `unfinished` (to be continued)."""
    text: str
    """The response as text, special tokens left out; empty while unfinished."""
    num_carried: int = 0
    """How many of the first tokens were sampled in earlier steps, from the weights of then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A problem and what there is of its K responses."""

    problem: Problem
    responses: tuple[Rollout, ...] = ()
    """In order of sample, finished or not. Empty: none is begun."""
    num_carries: int = 0
    """Steps that worked on it and did not train on it."""
    position: int = 0
    """Of its problem in the training data."""
    expected: float = 0.0
    """Tokens that a response of it is expected to have. Orders the work of an engine, and changes nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a response earned, parts apart. `reward` is what PPO sees."""

    reward: float
    """alpha * outcome + (1 - alpha) * exploration, clipped; or what the user's function returned."""
    outcome: float
    """The verifier's part: 1 correct, 0 wrong, or the penalty for giving no answer."""
    exploration: float
    """The exploration parts, summed before weighting; 0 when it is off."""
    correct: bool
    """Verified against the ground truth. What accuracy counts."""
    verdict: str
    """`correct`, `wrong`, `no_answer`, `timeout`, `error`, or `custom` from a user's function."""
    extra: dict[str, float] = field(default_factory=dict)
    """Each exploration part before weighting, or further numbers of a user's function; logged as `reward/<name>`."""


def predicted(
    prompt_ids: tuple[int, ...], response_ids: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], list[bool]]:
    """Inputs, targets and response mask of one sequence, each of length len(prompt) + len(response) - 1.

    >>> predicted((5, 6), (7, 8))
    ((5, 6, 7), (6, 7, 8), [False, True, True])
    """
    tokens = prompt_ids + response_ids
    first = max(len(prompt_ids) - 1, 0)  # the first position whose target is a response token
    return tokens[:-1], tokens[1:], [False] * first + [True] * (len(tokens) - 1 - first)
