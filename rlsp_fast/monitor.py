"""The eyes of a run: behaviours counted in its responses, and detectors of the failures that RLSP's paper names. No torch.

What is watched stands in a TOML file (`train.monitors`; rlsp_fast/monitors.toml ships). A detector is a pure function of the
metrics so far, so that a resumed run sees what the one that never stopped saw.
"""

import difflib
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice, pairwise
from pathlib import Path
from re import _constants as sre  # Python has no public parser of its regular expressions
from re import _parser
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rlsp_fast.judge import Judge, JudgeError, Judgement, JudgeSettings, counts, load_settings
from rlsp_fast.repetition import repeated_share
from rlsp_fast.types import Rollout

Row = Mapping[str, float]
"""The metrics of one step, its number as `step`."""
Labels = Mapping[str, int]
"""How often a response shows each behaviour."""

SHIPPED_RUBRIC = Path(str(files("rlsp_fast") / "judge_behaviours.md"))
MAX_PATHS = 500
"""Ways in which a phrase may match at one place: bounds the time of one attempt, whatever the text."""
MAX_PHRASE = 200
"""Characters of the longest text that a phrase may match."""

_Positive = Annotated[int, Field(ge=1)]
_Share = Annotated[float, Field(gt=0, le=1)]
_NonNegative = Annotated[float, Field(ge=0)]


class MonitorError(ValueError):
    """A file of monitors that cannot be used; the message names the key or the phrase."""


# --- settings ---------------------------------------------------------------------------------


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Detector(_Table):
    window: Annotated[int, Field(ge=4)]
    """Steps whose mean is compared, at least 4: fewer give no standard error worth the name."""
    z: Annotated[float, Field(ge=1)]
    """Standard errors from which on a change counts."""
    hold: _Positive
    """Steps in a row that must find the same before it is said."""


class _Compared(_Detector):
    span: _Positive
    """Steps looked back over."""

    @model_validator(mode="after")
    def _two_windows(self) -> Self:
        if self.span < 2 * self.window:
            raise ValueError(f"span = {self.span}: want at least two windows of {self.window} steps")
        return self


class LengthWithoutAccuracy(_Compared):
    growth: Annotated[float, Field(gt=1)]
    accuracy_z: _NonNegative


class RepetitionRising(_Compared):
    rise: _Share


class KLCollapse(_Compared):
    drop: _Share
    factor: Annotated[float, Field(gt=1)]
    floor: Annotated[float, Field(gt=0)]


class EntropyCollapse(_Detector):
    share: _Share
    below: _Share


class NoBehaviour(_Detector):
    after: _Positive
    rate: _Share


class BehavioursWithoutAccuracy(_Compared):
    rise: _Share
    accuracy_z: _NonNegative
    below: _Share


class Detectors(_Table):
    length_without_accuracy: LengthWithoutAccuracy
    repetition_rising: RepetitionRising
    kl_collapse: KLCollapse
    entropy_collapse: EntropyCollapse
    no_behaviour: NoBehaviour
    behaviours_without_accuracy: BehavioursWithoutAccuracy


class Settings(_Table):
    """What the TOML file says; rlsp_fast/monitors.toml explains each key."""

    repetition_ngram: _Positive
    backend: Literal["regex", "judge"]
    judge: str
    rubric: str
    emergent: tuple[str, ...]
    warn: tuple[str, ...]
    stop: tuple[str, ...]
    behaviours: dict[Annotated[str, Field(pattern=r"^\w+$")], tuple[str, ...]]
    detectors: Detectors

    @field_validator("warn", "stop")
    @classmethod
    def _known_detectors(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return _known(names, Detectors.model_fields, "detector")

    @model_validator(mode="after")
    def _known_behaviours(self) -> Self:
        if "any" in self.behaviours:
            raise ValueError("behaviours.any: `any` is the name of behaviour/any, the emergent ones together")
        if self.backend == "judge" and not self.counted:
            raise ValueError('backend = "judge" has nothing to count: every list of behaviours is empty')
        _known(self.emergent, self.behaviours, "behaviour")
        return self

    @property
    def counted(self) -> tuple[str, ...]:
        """Behaviours that are on."""
        return tuple(name for name, phrases in self.behaviours.items() if phrases)

    @property
    def watched(self) -> tuple[str, ...]:
        """Detectors that warn or stop, in the order of the table."""
        return tuple(name for name in Detectors.model_fields if name in self.warn or name in self.stop)


def load(path: str | None = None) -> Settings:
    """The shipped settings with those of the file at `path` laid over them.

    Raises:
        MonitorError: for a file that is missing or is no TOML, and for an unknown key, a value out of bounds, a phrase
            that is no regular expression or one whose time no text bounds, and a judge that cannot be asked.
    """
    tree = tomllib.loads((files("rlsp_fast") / "monitors.toml").read_text())
    where = "rlsp_fast/monitors.toml" if path is None else f"train.monitors = {path!r}"
    if path is not None:
        try:
            tree = _overlay(tree, tomllib.loads(Path(path).read_text()))
        except OSError as error:
            raise MonitorError(f"{where}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise MonitorError(f"{where}: {error}") from None
    try:
        settings = Settings.model_validate(tree)
        Behaviours(settings)
        if settings.backend == "judge":
            _judge_settings(settings)
            _judge_prompt(settings)
    except ValidationError as error:
        raise MonitorError("\n".join(f"{where}: {_explain(e)}" for e in error.errors())) from None
    except (MonitorError, JudgeError) as error:
        raise MonitorError(f"{where}: {error}") from None
    return settings


def _judge_settings(settings: Settings) -> JudgeSettings:
    """Of the judge's endpoint. What is watched never stops a run by failing."""
    return load_settings(settings.judge or None, "judge").model_copy(update={"max_failed": 1.0})


def _judge_prompt(settings: Settings) -> str:
    """The judge's system prompt, which must name every behaviour that is on."""
    path = Path(settings.rubric) if settings.rubric else SHIPPED_RUBRIC
    try:
        prompt = path.read_text()
    except OSError as error:
        raise MonitorError(f"rubric = {settings.rubric!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise MonitorError(f"rubric = {settings.rubric!r}: {error}") from None
    for name in settings.counted:
        if not re.search(rf"\b{name}\b", prompt):
            raise MonitorError(
                f"behaviours.{name}: {path} does not say what that is. Name a file with `rubric` that does, or turn it off "
                f"with {name} = []"
            )
    return prompt


def _overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Tables merge, everything else of `above` replaces what is `below`."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _overlay(below[key], value) if both else value
    return merged


def _known(names: tuple[str, ...], known: Iterable[str], what: str) -> tuple[str, ...]:
    for name in names:
        if name not in known:
            raise ValueError(f"{name!r} is no {what}{_nearest(name, known)}")
    return names


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; want one of {', '.join(known)}"


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        table: Any = Settings
        for part in error["loc"][:-1]:
            table = table.model_fields[part].annotation
        return f"unknown key {key!r}{_nearest(str(error['loc'][-1]), table.model_fields)}"
    if error["type"] == "value_error":
        return f"{key}: {error['ctx']['error']}" if key else str(error["ctx"]["error"])
    return f"{key} = {error['input']!r}: want {error['msg'].removeprefix('Input should be ')}"


# --- behaviours -------------------------------------------------------------------------------


class Labeller(Protocol):
    """Says how often responses show each behaviour. Close it when done."""

    def submit(self, rollout: Rollout) -> None:
        """Starts on a response that is finished, and returns at once."""

    def collect(self, rollouts: Sequence[Rollout]) -> list[Labels | None]:
        """Waits for the labels of responses submitted before, and forgets all others; None for one that could not be judged."""

    def close(self) -> None:
        """Ends what is still under way."""


def labeller(settings: Settings) -> Labeller:
    """The back end that the settings choose.

    Raises:
        JudgeError: when the judge's cache folder cannot be made.
    """
    return Judged(settings) if settings.backend == "judge" else Behaviours(settings)


class Judged:
    """Has behaviours counted by an LLM, beside generation and training. It never stops a run."""

    def __init__(self, settings: Settings):
        self._judge = Judge(_judge_settings(settings), counts(settings.counted, _judge_prompt(settings)))
        self._running: dict[int, Future[Judgement[dict[str, int]]]] = {}  # by the identity of a rollout that the caller holds

    def submit(self, rollout: Rollout) -> None:
        self._running[id(rollout)] = self._judge.submit(rollout.problem.text, rollout.text)

    def collect(self, rollouts: Sequence[Rollout]) -> list[Labels | None]:
        labels = [self._running[id(rollout)].result().answer for rollout in rollouts]
        self._running.clear()  # of what rollout.oversample left: it is submitted again, and the answer is in the cache
        return labels

    def close(self) -> None:
        self._judge.close()


class Behaviours:
    """Counts behaviours by their phrases."""

    def __init__(self, settings: Settings):
        """
        Raises:
            MonitorError: naming the behaviour and the phrase that cannot be used.
        """
        self._patterns = {
            name: re.compile(rf"(?<!\w)(?:{'|'.join(_phrase(name, p) for p in phrases)})(?!\w)")
            for name, phrases in settings.behaviours.items()
            if phrases
        }

    def __call__(self, text: str) -> dict[str, int]:
        """Occurrences of each behaviour in a response. Time is linear in its length, by the bounds on phrases."""
        plain = " ".join(text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").lower().split())
        return {name: sum(1 for _ in pattern.finditer(plain)) for name, pattern in self._patterns.items()}

    def submit(self, rollout: Rollout) -> None:
        """Phrases are counted when collected: counting them here would hold generation up."""

    def collect(self, rollouts: Sequence[Rollout]) -> list[Labels | None]:
        return [self(rollout.text) for rollout in rollouts]

    def close(self) -> None:
        pass


def _phrase(behaviour: str, phrase: str) -> str:
    """The phrase as a part of a pattern, its letters in lower case as the text is.

    Refuses what could take longer than linear time in some text. An attempt at one place follows at most MAX_PATHS paths
    through a text of at most MAX_PHRASE characters.
    """
    named = f"behaviours.{behaviour}, phrase {phrase!r}"
    lowered = re.sub(r"\\.|[A-Z]", lambda m: m[0] if m[0][0] == "\\" else m[0].lower(), phrase, flags=re.S)
    try:
        re.compile(f"(?:{lowered})")  # as a part: flags of its own for the whole are refused
        tree = _parser.parse(lowered)
    except (re.error, OverflowError, RecursionError) as error:
        raise MonitorError(f"{named}: {error}") from None
    shortest, longest = tree.getwidth()
    if not shortest:
        raise MonitorError(f"{named}: it matches the empty text, so everywhere")
    paths = _paths(tree, named)
    if paths == math.inf:
        raise MonitorError(f"{named}: a repeat without an upper bound can take hours in some text: write {{0,40}}, not * or +")
    if longest > MAX_PHRASE or paths > MAX_PATHS:
        raise MonitorError(
            f"{named}: it can match in {paths:,.0f} ways and {longest:,} characters; want at most {MAX_PATHS} ways and "
            f"{MAX_PHRASE} characters: use fewer or shorter repeats, or several phrases"
        )
    return f"(?:{lowered})"


def _paths(tree: Iterable[Any], named: str) -> float:
    """Upper bound of the ways in which backtracking can walk through a parsed pattern."""
    total = 1.0
    for op, arguments in tree:
        match op:
            case sre.LITERAL | sre.NOT_LITERAL | sre.ANY | sre.IN | sre.AT | sre.CATEGORY:
                continue
            case sre.SUBPATTERN:
                total *= _paths(arguments[-1], named)
            case sre.ATOMIC_GROUP:
                total *= _paths(arguments, named)
            case sre.ASSERT | sre.ASSERT_NOT:
                total *= _paths(arguments[1], named)
            case sre.BRANCH:
                total *= _branches(arguments[1], named)
            case sre.MAX_REPEAT | sre.MIN_REPEAT | sre.POSSESSIVE_REPEAT:
                low, high, body = arguments
                total *= math.inf if high is sre.MAXREPEAT else _repeats(_paths(body, named), low, high)
            case _:
                raise MonitorError(f"{named}: {str(op).lower()} is not allowed, its time has no bound")
    return total


def _branches(branches: Iterable[Any], named: str) -> float:
    """Branches that begin with different letters exclude each other, so only those with the same one add up."""
    by_first: dict[int | None, float] = {}
    for branch in branches:
        op, argument = branch[0] if len(branch) else (None, None)
        first = argument if op is sre.LITERAL else None
        by_first[first] = by_first.get(first, 0.0) + _paths(branch, named)
    return by_first.pop(None, 0.0) + max(by_first.values(), default=0.0)


def _repeats(paths: float, low: int, high: int) -> float:
    """Sum of paths**k for k from low to high, given up once it is far too many."""
    total = 0.0
    for k in range(low, high + 1):
        total += paths ** min(k, 64)
        if total > 1e6:
            break
    return total


def tally(
    labels: Sequence[Labels | None], response_ids: Sequence[Sequence[int]], correct: Sequence[bool], settings: Settings
) -> dict[str, float]:
    """Sums over some responses, to be added up over ranks and then made metrics by `rates`.

    Args:
        labels: How often each response shows each behaviour; None leaves a response out of the behaviours.
    """
    names = (*settings.counted, "any")
    sums = {"n": float(len(labels)), "labelled": 0.0, "correct": 0.0, "repetition": 0.0}
    sums |= {f"{name}/{part}": 0.0 for name in names for part in ("count", "shown", "shown_correct")}
    for shown, ids, right in zip(labels, response_ids, correct, strict=True):
        sums["repetition"] += repeated_share(ids, settings.repetition_ngram)
        if shown is None:
            continue
        sums["labelled"] += 1
        sums["correct"] += right
        found = dict(shown) | {"any": sum(shown.get(name, 0) for name in settings.emergent)}
        for name in names:
            count = found.get(name, 0)
            sums[f"{name}/count"] += count
            sums[f"{name}/shown"] += count > 0
            sums[f"{name}/shown_correct"] += count > 0 and right
    return sums


def rates(sums: Mapping[str, float]) -> dict[str, float]:
    """Metrics of what `tally` summed: `behaviour/<name>` and its kin, and `response/repetition`.

    A share among correct responses is left out of a step that has none, and so is one among wrong responses, and every
    behaviour where no response is labelled. `monitor/judge_failed` is the share without labels.
    """
    n, correct = sums["labelled"], sums["correct"]
    wrong = n - correct
    metrics = {"response/repetition": sums["repetition"] / sums["n"], "monitor/judge_failed": 1 - n / sums["n"]}
    if not n:
        return metrics
    for name in (key.removesuffix("/shown") for key in sums if key.endswith("/shown")):
        shown, shown_correct = sums[f"{name}/shown"], sums[f"{name}/shown_correct"]
        metrics[f"behaviour/{name}"] = shown / n
        metrics[f"behaviour/{name}/count"] = sums[f"{name}/count"] / n
        if correct:
            metrics[f"behaviour/{name}/correct"] = shown_correct / correct
        if wrong:
            metrics[f"behaviour/{name}/wrong"] = (shown - shown_correct) / wrong
    return metrics


# --- detectors --------------------------------------------------------------------------------

ACCURACY, LENGTH, REPETITION = "reward/accuracy", "response_length/mean", "response/repetition"
KL, ENTROPY, ANY = "actor/ref_kl", "actor/entropy", "behaviour/any"
_KEPT = ("step", ACCURACY, LENGTH, REPETITION, KL, ENTROPY, ANY)


class Change:
    """A metric in two windows of at least two steps each."""

    def __init__(self, before: Sequence[Row], after: Sequence[Row], metric: str):
        self.metric = metric
        self._values = [[row[metric] for row in rows] for rows in (before, after)]
        self.before, self.after = (math.fsum(values) / len(values) for values in self._values)

    @property
    def rise(self) -> float:
        return self.after - self.before

    @property
    def z(self) -> float:
        """The rise in standard errors, taking the noise of the steps as independent.

        The larger of two estimates counts: from the scatter of each window about its own mean, which a trend inside it
        widens, and from the differences of neighbours in both, which a window that happens to be quiet cannot hide.
        """
        squares = [(y - x) ** 2 for values in self._values for x, y in pairwise(values)]
        noise = math.fsum(squares) / len(squares) / 2 * sum(1 / len(values) for values in self._values)
        error = max(math.hypot(*map(_standard_error, self._values)), math.sqrt(noise))
        if error:
            return self.rise / error
        return math.copysign(math.inf, self.rise) if self.rise else 0.0

    def __str__(self) -> str:
        errors = "" if math.isinf(self.z) else f", {self.z:+.1f} standard errors"
        return f"{self.metric} {self.before:.4g} -> {self.after:.4g} ({self.rise:+.3g}{errors})"


def _standard_error(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def _having(rows: Iterable[Row], num: int, *metrics: str) -> list[Row]:
    """The first `num` rows that have all metrics: the entropy comes after the critic's warm-up, the KL with a reference."""
    return list(islice((row for row in rows if all(math.isfinite(row.get(m, math.nan)) for m in metrics)), num))


def _windows(rows: Sequence[Row], t: _Compared, *metrics: str) -> tuple[list[Row], list[Row]] | None:
    """First and last window of the last `span` steps; None while they would overlap."""
    if len(rows) < 2 * t.window:
        return None
    recent = rows[-t.span :]
    return _apart(_having(recent, t.window, *metrics), _having(reversed(recent), t.window, *metrics)[::-1], t.window)


def _apart(before: list[Row], after: list[Row], window: int) -> tuple[list[Row], list[Row]] | None:
    full = len(before) == len(after) == window
    return (before, after) if full and before[-1]["step"] < after[0]["step"] else None


def _steps(before: Sequence[Row], after: Sequence[Row]) -> str:
    return f"steps {before[0]['step']:.0f}-{before[-1]['step']:.0f} against {after[0]['step']:.0f}-{after[-1]['step']:.0f}"


def length_without_accuracy(rows: Sequence[Row], t: LengthWithoutAccuracy) -> str | None:
    """Reward hacking: responses grow by `growth` and accuracy does not rise."""
    if (found := _windows(rows, t, LENGTH, ACCURACY)) is None:
        return None
    length, accuracy = Change(*found, LENGTH), Change(*found, ACCURACY)
    if length.after < t.growth * length.before or length.z < t.z or accuracy.z > t.accuracy_z:
        return None
    return (
        f"responses grow and accuracy does not, as when the length reward is hacked: {length}, {accuracy}, {_steps(*found)}. "
        f"Raise reward.alpha, lower reward.length_c, or let reward.exploration pay for no copies (repetition)"
    )


def repetition_rising(rows: Sequence[Row], t: RepetitionRising) -> str | None:
    """The share of copied tokens rises by `rise` above what longer responses copy anyway.

    Honest work repeats itself in proportion to its length: of MATH-500's solutions 5.3 % of the tokens stand in a run of 8 that
    occurred before where they have 93 tokens (the shorter half), 21 % where they have 344 (the longer half).
    """
    if (found := _windows(rows, t, REPETITION, LENGTH)) is None:
        return None
    repetition, length = Change(*found, REPETITION), Change(*found, LENGTH)
    expected = repetition.before * max(1.0, length.after / length.before)
    if repetition.after - expected < t.rise or repetition.z < t.z:
        return None
    return (
        f"responses repeat themselves: {repetition}, {length}, {_steps(*found)}. Let reward.exploration pay for no copies "
        f"(repetition), raise reward.alpha or algorithm.kl_coef"
    )


def kl_collapse(rows: Sequence[Row], t: KLCollapse) -> str | None:
    """Accuracy falls by `drop` while the KL to the reference grows, or shrinks, by `factor`."""
    if (found := _windows(rows, t, KL, ACCURACY)) is None:
        return None
    kl, accuracy = Change(*found, KL), Change(*found, ACCURACY)
    if -accuracy.rise < t.drop or -accuracy.z < t.z or abs(kl.z) < t.z:
        return None
    if kl.after >= t.factor * max(kl.before, t.floor):
        return (
            f"accuracy falls while the policy leaves the reference: {accuracy}, {kl}, {_steps(*found)}. Raise "
            f"algorithm.kl_coef, lower optim.actor_lr, and look at what the reward pays for (rollouts/)"
        )
    if kl.before >= t.factor * max(kl.after, t.floor):
        return (
            f"accuracy falls while the policy is pulled back to the reference: {accuracy}, {kl}, {_steps(*found)}. Lower "
            f"algorithm.kl_coef (and algorithm.kl_loss_coef)"
        )
    return None


def entropy_collapse(rows: Sequence[Row], t: EntropyCollapse) -> str | None:
    """Entropy falls to `share` of what it was at the start, with accuracy still `below`."""
    if len(rows) < 2 * t.window:
        return None
    first, last = _having(rows, t.window, ENTROPY, ACCURACY), _having(rows[-t.window :], t.window, ENTROPY, ACCURACY)
    if (found := _apart(first, last, t.window)) is None:
        return None
    entropy, accuracy = Change(*found, ENTROPY), Change(*found, ACCURACY)
    if entropy.after > t.share * entropy.before or -entropy.z < t.z or accuracy.after >= t.below:
        return None
    return (
        f"the policy hardly explores any more: {entropy}, {accuracy}, {_steps(*found)}. Raise algorithm.entropy_coef, "
        f"algorithm.clip_ratio_high or rollout.temperature, lower optim.actor_lr"
    )


def no_behaviour(rows: Sequence[Row], t: NoBehaviour) -> str | None:
    """At most `rate` of the responses show any emergent behaviour, `after` steps into the run."""
    if rows[-1]["step"] < t.after or len(known := _having(rows[-t.window :], t.window, ANY)) < t.window:
        return None
    shown = [row[ANY] for row in known]
    mean = math.fsum(shown) / len(shown)
    if mean + t.z * _standard_error(shown) > t.rate:
        return None
    return (
        f"no emergent behaviour after {t.after} steps: {ANY} {mean:.4g} in steps {known[0]['step']:.0f}-"
        f"{known[-1]['step']:.0f}. Show it in sft.train, pay for it (reward.exploration, a lower reward.alpha), raise "
        f"rollout.max_response_length or rollout.temperature, or start from a larger model.path"
    )


def behaviours_without_accuracy(rows: Sequence[Row], t: BehavioursWithoutAccuracy) -> str | None:
    """Behaviours rise by `rise`, accuracy does not rise and stays `below`."""
    if (found := _windows(rows, t, ANY, ACCURACY)) is None:
        return None
    shown, accuracy = Change(*found, ANY), Change(*found, ACCURACY)
    if shown.rise < t.rise or shown.z < t.z or accuracy.z > t.accuracy_z or accuracy.after >= t.below:
        return None
    return (
        f"it looks like thinking, but answers stay wrong: {shown}, {accuracy}, {_steps(*found)}. Start from a larger "
        f"model.path, give it easier problems (data.train) or better demonstrations (sft.train), raise reward.alpha"
    )


DETECTORS = (
    length_without_accuracy,
    repetition_rising,
    kl_collapse,
    entropy_collapse,
    no_behaviour,
    behaviours_without_accuracy,
)


# --- the watch over a run ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """What a detector found, said once an episode: again only after `window` steps in a row without it."""

    step: int
    detector: str
    stops: bool
    message: str
    """Evidence, and the settings to change."""


@dataclass(slots=True)
class _Episode:
    """Of one detector: steps in a row with and without a finding, and whether the finding was said."""

    held: int = 0
    quiet: int = 0
    told: bool = False


class Monitor:
    """The detectors over one run. `alarms` holds all since its first step."""

    def __init__(self, settings: Settings):
        self.alarms: list[Alarm] = []
        self._settings = settings
        self._rows: list[Row] = []
        self._episodes: dict[str, _Episode] = {}

    def observe(self, row: Row) -> list[Alarm]:
        """Takes the metrics of the next step; returns the alarms that begin with it."""
        self._rows.append({key: row[key] for key in _KEPT if key in row})
        found = [alarm for detector in DETECTORS if (alarm := self._ask(detector)) is not None]
        self.alarms += found
        return found

    def _ask(self, detector: Callable[[Sequence[Row], Any], str | None]) -> Alarm | None:
        name = detector.__name__
        if name not in self._settings.watched:
            return None
        table = getattr(self._settings.detectors, name)
        message = detector(self._rows, table)
        episode = self._episodes.setdefault(name, _Episode())
        if message is None:
            episode.held = 0
            episode.quiet += 1
            episode.told = episode.told and episode.quiet < table.window
            return None
        episode.held += 1
        episode.quiet = 0
        if episode.told or episode.held < table.hold:
            return None
        episode.told = True
        return Alarm(step=int(self._rows[-1]["step"]), detector=name, stops=name in self._settings.stop, message=message)
