"""What a step leaves to the next: groups begun and not trained on, and how long responses are. No torch.

With rollout.oversample > 1 a step begins more problems than it trains on and ends without its longest responses. What it has
of them is carried to the next step, so that every problem begun is trained on once, in the end.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from rlsp_fast import data
from rlsp_fast.types import Group, Problem, Rollout

log = logging.getLogger(__name__)


class Pending:
    """Groups between two steps, and response lengths by problem. The same on every rank, whatever their number."""

    def __init__(self) -> None:
        self.groups: list[Group] = []
        """Oldest first."""
        self.lengths: dict[int, float] = {}
        """By position in the training data: tokens, mean over the problem's responses when it was last trained on."""

    def take(self, train: Sequence[Problem], *, seed: int, step: int, batch_size: int, oversample: float) -> list[Group]:
        """Hands out all groups, oldest first, and new ones until there are oversample * batch_size.

        Earlier steps have trained on step * batch_size problems and left these groups: there the order of data.batch goes on.
        """
        old, self.groups = self.groups, []
        wanted = math.ceil(round(oversample * batch_size, 6))  # 1.1 * 10 is a little over 11
        positions = data.batch(range(len(train)), seed=seed, start=step * batch_size + len(old), size=max(0, wanted - len(old)))
        return [*(self.expecting(group) for group in old), *self.begin(train, positions)]

    def begin(self, train: Sequence[Problem], positions: Sequence[int]) -> list[Group]:
        """New groups of these problems."""
        return [self.expecting(Group(problem=train[i], position=i)) for i in positions]

    def expecting(self, group: Group) -> Group:
        """The group with the length of its problem's responses when they were last seen, else that of all problems."""
        of_all = sum(self.lengths.values()) / max(1, len(self.lengths))
        return replace(group, expected=self.lengths.get(group.position, of_all))

    def add(self, left: Sequence[Group], lengths: Mapping[int, float], train: Sequence[Problem]) -> None:
        """Takes what generation has left, oldest first, and the lengths of what it has completed."""
        self.groups += [_bound(group, train) for group in left]
        self.lengths |= lengths

    def state(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {"groups": [_record(group) for group in self.groups], "lengths": sorted(self.lengths.items())}

    @classmethod
    def restored(cls, state: Mapping[str, Any], train: Sequence[Problem]) -> Self:
        """From what `state` returned. Groups whose prompt the training data no longer has at their place are left out."""
        pending = cls()
        pending.lengths = dict(map(tuple, state["lengths"]))
        for record in state["groups"]:
            at = record["position"]
            if at < len(train) and train[at].prompt_ids == tuple(record["prompt_ids"]):
                pending.groups.append(_group(record, train[at]))
        missing = len(state["groups"]) - len(pending.groups)
        if missing:
            log.warning("%d problems that were begun are no longer in data.train as they were: left out", missing)
        return pending


def _bound(group: Group, train: Sequence[Problem]) -> Group:
    """The group with the problem of the training data: one that came from another rank brings a copy."""
    problem = train[group.position]
    return replace(group, problem=problem, responses=tuple(replace(r, problem=problem) for r in group.responses))


def _record(group: Group) -> dict[str, Any]:
    names = ("response_ids", "rollout_logprob", "finish", "text")
    return {
        "position": group.position,
        "prompt_ids": group.problem.prompt_ids,
        "num_carries": group.num_carries,
        "responses": [{name: getattr(r, name) for name in names} for r in group.responses],
    }


def _group(record: Mapping[str, Any], problem: Problem) -> Group:
    responses = tuple(
        Rollout(
            problem=problem,
            sample=k,
            response_ids=tuple(r["response_ids"]),
            rollout_logprob=tuple(r["rollout_logprob"]),
            finish=r["finish"],
            text=r["text"],
        )
        for k, r in enumerate(record["responses"])
    )
    return Group(problem=problem, responses=responses, num_carries=record["num_carries"], position=record["position"])
