"""RLSP's reward: the verified outcome and the exploration reward, kept apart and then mixed. No torch.

Grading runs beside generation: `Scorer.submit` returns at once; symbolic comparisons run in the verifier's processes, the
judge's requests in threads of their own.
"""

import difflib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from numbers import Real
from pathlib import Path
from typing import Any, Self

from rlsp_fast.config import RewardConfig
from rlsp_fast.judge import Judge, JudgeError, Judgement, grades, load_settings
from rlsp_fast.repetition import repeated_share
from rlsp_fast.types import Problem, Rollout, Score
from rlsp_fast.verifier import Verdict, Verifier

REWARD_BOUND = 10.0
"""Rewards are clipped to plus and minus this, as in the paper's code."""
CHARACTERS_PER_TOKEN = 4
FUNCTION_THREADS = 8
CUSTOM_CORRECT = 1.0
"""A user's function that returns no `acc` counts as correct from this score on."""

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


def length_exploration(num_tokens: float, c: float, minimum: float) -> float:
    """max(minimum, -C / |o|) for a response of |o| tokens: short responses pay, long ones hardly.

    Args:
        num_tokens: |o|, above 0.
        c: C, in tokens; 1000 in the paper.
        minimum: Lower bound, reached below C / |minimum| tokens. The paper states none.

    Source:
        arXiv 2502.06773, the text's exploration reward R_ex = -C / |o|.
    """
    return max(minimum, -c / num_tokens)


def length_code_exploration(text: str, c: float, minimum: float) -> float:
    r"""max(minimum, -C / len) with len = characters / 4 of the text before the first \boxed (of all of it without one).

    Args:
        text: The response.
        c: C, in tokens of four characters; 1000 in the paper's code.
        minimum: Lower bound. The paper's code has none: a response that starts with its box divides by zero there and
            gets 0, more than any correct answer of under 1000 tokens. Here it gets `minimum`.

    Source:
        The paper's code (GuanghaoYe/Emergence-of-Thinking, orm_server_efficient.py).
    """
    length = reasoning_length(text)
    return length_exploration(length, c, minimum) if length else minimum


def reasoning_length(text: str) -> float:
    r"""Tokens of four characters before the first \boxed, or of the whole text without one."""
    box = _BOX.search(text)
    return (box.start() if box else len(text)) / CHARACTERS_PER_TOKEN


def repetition_exploration(length: float, repeated: float, c: float, minimum: float) -> float:
    """What the repeated part of a response earned by its length, taken back: L(length * (1 - repeated)) - L(length).

    L is `length_exploration`, so length and repetition together are L of the tokens that do not repeat: a response that
    copies itself earns no more than without the copy. In [minimum, 0]; 0 when nothing repeats.

    Args:
        length: Of the response, as the length reward counts it.
        repeated: `repeated_share` of the response.
        c: C of the length reward, tokens.
        minimum: Lower bound of the length reward.

    Source:
        The paper (arXiv 2502.06773) reports that its length reward is gamed by repetition and leaves the hole open; the
        formula is ours.
    """
    if length == 0:
        return 0.0
    return length_exploration(length * (1 - repeated), c, minimum) - length_exploration(length, c, minimum)


class RewardError(ValueError):
    """A reward that cannot be computed as configured; the message names the key or the problem."""


class Scorer:
    """Scores rollouts as `reward.*` says. Use as a context manager: it owns the verifier's processes.

    Without exploration the reward is the outcome, as alpha would only change its scale. Exploration is mixed in as
    alpha * outcome + (1 - alpha) * exploration (the paper), but `length_code` is added to the outcome before the mix, as
    the paper's code does it, and with it the repetition that takes it back. Rewards are clipped to +-REWARD_BOUND. With
    `reward.function` the reward is what that function returns.
    """

    def __init__(self, config: RewardConfig):
        """
        Raises:
            RewardError: naming `reward.function` when it cannot be loaded.
            JudgeError: naming the setting of the judge that cannot be used.
        """
        self._config = config
        self._function = load_function(config.function) if config.function is not None else None
        self._judge = None
        if uses_judge(config):
            settings = load_settings(config.judge)
            self._judge = Judge(settings, grades(settings))
        self._verifier = Verifier(config.verifier, config.timeout_s)
        self._threads = ThreadPoolExecutor(FUNCTION_THREADS, thread_name_prefix="reward.function")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        if self._judge is not None:
            self._judge.close()
        self._verifier.close()
        self._threads.shutdown(cancel_futures=True)

    def submit(self, rollout: Rollout) -> Future[Score]:
        """Starts scoring; `result()` of the future waits for it and raises what went wrong.

        A user's function runs in one of FUNCTION_THREADS threads, so it must not rely on signals (signal.alarm).
        """
        if self._function is not None:
            return self._threads.submit(self._score_by_function, rollout)
        scored: Future[Score] = Future()
        try:
            verdict = self._verifier.submit(rollout.text, rollout.problem.answer)
        except ValueError as error:
            raise RewardError(f"{_at(rollout.problem)}: {error}") from None
        judged: Future[Judgement[float] | None] = Future()
        if self._judge is None:
            judged.set_result(None)
        else:
            judged = self._judge.submit(rollout.problem.text, rollout.text)
        # Whichever comes last finishes the score, in its own thread.
        verdict.add_done_callback(lambda _: judged.add_done_callback(lambda _: self._finish(verdict, judged, rollout, scored)))
        return scored

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Scores of all rollouts, in order."""
        return [future.result() for future in [self.submit(rollout) for rollout in rollouts]]

    def _finish(
        self, verdict: Future[Verdict], judged: Future[Judgement[float] | None], rollout: Rollout, scored: Future[Score]
    ) -> None:
        if judged.cancelled():  # by close(): nobody waits for this score any more
            scored.cancel()
        elif error := verdict.exception():
            scored.set_exception(error)
        elif error := judged.exception():
            scored.set_exception(RewardError(str(error)) if isinstance(error, JudgeError) else error)
        else:
            scored.set_result(self._mix(verdict.result().verdict, judged.result(), rollout))

    def _mix(self, verdict: str, judged: Judgement[float] | None, rollout: Rollout) -> Score:
        config = self._config
        outcome = {"correct": 1.0, "no_answer": config.no_answer}.get(verdict, 0.0)
        parts = self._parts(rollout)
        calls: dict[str, float] = {}
        if judged is not None:
            parts["judge"] = judged.answer
            calls = {"judge_failed": float(judged.failed), "judge_requests": float(judged.requests)}
        reward, mixed = outcome, dict(parts)
        if "length_code" in parts:
            reward += mixed.pop("length_code") + mixed.pop("repetition", 0.0)
        if mixed:
            reward = config.alpha * reward + (1 - config.alpha) * sum(mixed.values())
        return Score(
            reward=min(max(reward, -REWARD_BOUND), REWARD_BOUND),
            outcome=outcome,
            exploration=sum(parts.values()),
            correct=verdict == "correct",
            verdict=verdict,
            extra=parts | calls,
        )

    def _parts(self, rollout: Rollout) -> dict[str, float]:
        """The parts of the exploration reward that are on and need no judge, before any weight."""
        config = self._config
        wanted, c, minimum = config.exploration_parts, config.length_c, config.exploration_min
        parts: dict[str, float] = {}
        length: float = len(rollout.response_ids)
        if "length" in wanted:
            parts["length"] = length_exploration(length, c, minimum)
        if "length_code" in wanted:
            parts["length_code"] = length_code_exploration(rollout.text, c, minimum)
            length = reasoning_length(rollout.text)
        if "repetition" in wanted:
            repeated = repeated_share(rollout.response_ids, config.repetition_ngram)
            parts["repetition"] = repetition_exploration(length, repeated, c, minimum)
        return parts

    def _score_by_function(self, rollout: Rollout) -> Score:
        problem = rollout.problem
        with _Naming(problem):
            returned = self._function(
                data_source=problem.source,
                solution_str=rollout.text,
                ground_truth=problem.answer,
                extra_info=problem.extra,
            )
        return _score_of(returned, f"reward.function = {self._config.function!r}, {_at(problem)}")


def uses_judge(config: RewardConfig) -> bool:
    """Whether responses go to the judge: a reward function of the user's own replaces it too."""
    return config.function is None and "judge" in config.exploration_parts


def load_function(where: str) -> Callable[..., Any]:
    """The function that `path/to/file.py:compute_score` names.

    Raises:
        RewardError: when there is no such file or function, or it does not take verl's four arguments.
    """
    path_text, colon, name = where.rpartition(":")
    path = Path(path_text)
    if not colon or not name or path.suffix != ".py":
        raise RewardError(f"reward.function = {where!r}: want path/to/file.py:compute_score")
    if not path.is_file():
        raise RewardError(f"reward.function = {where!r}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"reward_function_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses in the file look their module up
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        names = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.3) or names[:1]
        hint = f"; did you mean {near[0]}?" if near else ""
        raise RewardError(f"reward.function = {where!r}: {path} has no function {name}{hint}")
    try:
        inspect.signature(function).bind(data_source="", solution_str="", ground_truth="", extra_info={})
    except TypeError as error:
        wanted = f"{name}(data_source, solution_str, ground_truth, extra_info)"
        raise RewardError(f"reward.function = {where!r}: want {wanted}, but {error}") from None
    return function


def _score_of(returned: object, where: str) -> Score:
    """A number, or a dict with `score` and maybe `acc` or `correct`; its other numbers are kept as extras."""
    parts = returned if isinstance(returned, Mapping) else {"score": returned}
    score = parts.get("score")
    if not isinstance(score, Real) or not math.isfinite(score):
        raise RewardError(f"{where}: want a finite number, or a dict with one as `score`, got {str(returned)[:100]}")
    correct = parts.get("acc", parts.get("correct"))
    return Score(
        reward=float(score),
        outcome=float(score),
        exploration=0.0,
        correct=score >= CUSTOM_CORRECT if correct is None else bool(correct),
        verdict="custom",
        extra={
            str(key): float(value)
            for key, value in parts.items()
            if key not in ("score", "acc", "correct") and isinstance(value, Real) and math.isfinite(value)
        },
    )


def _at(problem: Problem) -> str:
    return f"{problem.source}, index {problem.index}"


class _Naming:
    """Adds the problem to an error that passes through; its traceback stays whole."""

    def __init__(self, problem: Problem):
        self._problem = problem

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            error.add_note(f"while scoring a response to {_at(self._problem)}")
