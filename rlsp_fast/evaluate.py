"""Accuracy and response length on held-out problems, sampled as in training unless told otherwise."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlsp_fast import dist
from rlsp_fast.reward import Scorer
from rlsp_fast.rollout import Engine, Sampling
from rlsp_fast.types import Problem, Rollout, Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One pass over the held-out problems, all ranks together."""

    num_problems: int
    accuracy: float
    """Share of responses verified correct (pass@1)."""
    response_length: float
    """Mean tokens."""
    truncated: float
    """Share of responses cut at the length limit."""
    no_answer: float
    """Share of responses without an answer."""

    def metrics(self) -> dict[str, float]:
        return {
            "val/accuracy": self.accuracy,
            "val/response_length": self.response_length,
            "val/truncated": self.truncated,
            "val/no_answer": self.no_answer,
            "val/num_problems": self.num_problems,
        }


def evaluate(
    engine: Engine, scorer: Scorer, problems: Sequence[Problem], sampling: Sampling
) -> tuple[Evaluation, list[Rollout], list[Score]]:
    """One response per problem and sample, each rank its share. Returns the numbers of all ranks, this rank's responses."""
    slots = range(dist.rank(), len(problems), dist.world_size())
    rollouts = engine.generate([problems[i] for i in slots], sampling, slots=slots)
    scores = scorer.score(rollouts)
    n, correct, tokens, cut, none = dist.sum_over_ranks(
        [
            len(rollouts),
            sum(s.correct for s in scores),
            sum(len(r.response_ids) for r in rollouts),
            sum(r.finish == "length" for r in rollouts),
            sum(s.verdict == "no_answer" for s in scores),
        ]
    )
    result = Evaluation(
        num_problems=len(problems),
        accuracy=correct / n,
        response_length=tokens / n,
        truncated=cut / n,
        no_answer=none / n,
    )
    return result, rollouts, scores
