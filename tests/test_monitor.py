"""Behaviours counted in responses, the detectors on series made and real, and the watch over a run."""

import json
import math
import random
import re
import time
from pathlib import Path

import pytest

from rlsp_fast.config import leaf_keys
from rlsp_fast.monitor import Behaviours, Change, Monitor, MonitorError, load, rates, tally

SHIPPED = load()
HERE = Path(__file__).parent
RESPONSES = [json.loads(line) for line in (HERE / "demo_responses.jsonl").read_text().splitlines()]
"""Real responses of the demo's model after 35 steps: of 40 each of bench/bench_hacking.py's `honest` and `hacked` runs."""
RUNS = [json.loads(line) for line in (HERE / "demo_runs.jsonl").read_text().splitlines()]
"""What the detectors read of these runs, step by step, and of `hacked-kl`."""


# --- phrases ----------------------------------------------------------------------------------

PAPER = {  # the phrases of arXiv 2502.06773, appendix A, each with a behaviour it is an example of
    "we must re-examine the steps": "backtracking",
    "Let's solve the system again": "backtracking",
    "we need to revisit the previous steps": "backtracking",
    "Looking back at step": "self_verification",
    "Let me double-check": "self_verification",
    "But wait, let me make sure": "self_verification",
    "We can also confirm that": "self_verification",
    "Upon reviewing our calculations": "self_verification",
    "we recheck our calculations and find a mistake": "self_correction",
    "Wait a minute, maybe I made a mistake": "self_correction",
    "Alternatively, I can use": "alternatives",
}


@pytest.mark.parametrize("phrase", PAPER)
def test_the_phrases_of_the_paper_are_recognised(phrase):
    assert Behaviours(SHIPPED)(f"The sum is 4. {phrase} the rule.")[PAPER[phrase]] >= 1


@pytest.mark.parametrize(
    "text, behaviour",
    [
        ("LET\nME   Double-Check", "self_verification"),
        ("Let\N{RIGHT SINGLE QUOTATION MARK}s verify", "self_verification"),
        (" 4 +5=10 , wait , that is wrong : +5=9", "self_correction"),
        ("This doesn't work. Let me start over.", "backtracking"),
        ("Maybe there is a better way", "alternatives"),
        ("First, we need the radius. Next, we find", "sub_goals"),
    ],
)
def test_case_white_space_and_typographic_apostrophes_do_not_hide_a_phrase(text, behaviour):
    assert Behaviours(SHIPPED)(text)[behaviour] >= 1


@pytest.mark.parametrize("text", ["", " ", "the long awaited result", "holdonly", "stepfather 5", "12 + 7 = 19", "\0\ud800"])
def test_words_that_only_contain_a_phrase_do_not_count(text):
    assert not any(Behaviours(SHIPPED)(text).values())


def settings(tmp_path, text):
    (tmp_path / "mine.toml").write_text(text)
    return load(str(tmp_path / "mine.toml"))


def test_a_file_of_ones_own_is_laid_over_the_shipped_one(tmp_path):
    mine = settings(
        tmp_path,
        'stop = ["repetition_rising"]\nemergent = ["doubt"]\n[behaviours]\ndoubt = ["Hm{1,3}"]\nsub_goals = []\n'
        "[detectors.repetition_rising]\nrise = 0.3\n",
    )
    assert mine.stop == ("repetition_rising",) and mine.warn == SHIPPED.warn
    assert mine.detectors.repetition_rising.rise == 0.3 and mine.detectors.repetition_rising.z == 4.0
    counted = Behaviours(mine)("HMM, hm. Alternatively: hmmmmm")
    assert counted["doubt"] == 2 and counted["alternatives"] == 1 and "sub_goals" not in counted


@pytest.mark.parametrize(
    "content, parts",
    [
        ("x =", ("Invalid value",)),
        ("wran = []", ("unknown key 'wran'", "did you mean warn?")),
        ('stop = ["repetition"]', ("stop", "'repetition' is no detector", "did you mean repetition_rising?")),
        ('emergent = ["backtrack"]', ("'backtrack' is no behaviour", "did you mean backtracking?")),
        ("[detectors.kl_collapse]\ndorp = 0.1", ("unknown key 'detectors.kl_collapse.dorp'", "did you mean drop?")),
        ("[detectors.kl_collapse]\ndrop = 7", ("detectors.kl_collapse.drop = 7", "less than or equal to 1")),
        ("[detectors.kl_collapse]\nspan = 9", ("detectors.kl_collapse", "want at least two windows of 8 steps")),
        ("[behaviours]\nany = ['x']", ("behaviours.any",)),
        ("backend = 'llm'", ("backend = 'llm'", "'regex' or 'judge'")),
        ("backend = 'judge'\njudge = 'nowhere.toml'", ("judge = 'nowhere.toml': No such file",)),
        ("backend = 'judge'\nrubric = 'nowhere.md'", ("rubric = 'nowhere.md': No such file",)),
        ("backend = 'judge'\n[behaviours]\ndoubt = ['hm']", ("behaviours.doubt", "does not say what that is", "doubt = []")),
        ("[behaviours]\nbacktracking = 'x'", ("behaviours.backtracking",)),
        ("[behaviours]\nmine = ['a(b']", ("behaviours.mine, phrase 'a(b'", "missing ), unterminated subpattern")),
        ("[behaviours]\nmine = ['a)|(b']", ("behaviours.mine", "unbalanced parenthesis")),
        ("[behaviours]\nmine = ['(?i)wait']", ("behaviours.mine", "global flags")),
        ("[behaviours]\nmine = ['a{0,2}']", ("behaviours.mine", "empty text")),
        ("[behaviours]\nmine = ['']", ("behaviours.mine", "empty text")),
        ("[behaviours]\nmine = ['(a+)+b']", ("behaviours.mine", "without an upper bound", "{0,40}")),
        ("[behaviours]\nmine = ['x.*y']", ("behaviours.mine", "without an upper bound")),
        ("[behaviours]\nmine = ['(?:a|a){30}b']", ("behaviours.mine", "ways")),
        ("[behaviours]\nmine = ['(?:a?){30}a{30}']", ("behaviours.mine", "ways")),
        ("[behaviours]\nmine = ['(a{1,9}){1,99999}b']", ("behaviours.mine", "ways")),
        ("[behaviours]\nmine = ['(a|b)\\1']", ("behaviours.mine", "groupref is not allowed")),
        ("[behaviours]\nmine = ['a[b-a]']", ("behaviours.mine", "bad character range")),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_name(tmp_path, content, parts):
    with pytest.raises(MonitorError) as caught:
        settings(tmp_path, content)
    assert str(caught.value).startswith(f"train.monitors = '{tmp_path}/mine.toml': ")
    for part in parts:
        assert part in str(caught.value)


def test_a_missing_file_is_named():
    with pytest.raises(MonitorError, match="train.monitors = 'nowhere.toml': No such file"):
        load("nowhere.toml")


HOSTILE = {
    "spaces": " ",
    "one letter": "a",
    "a phrase that begins and never ends": "let me let's we can ",
    "words that begin phrases": "we i or the let's it step first ",
    "phrases": "wait, that is wrong. alternatively, ",
    "other alphabets": "\u1e9e\u0130 \u4e2d\u6587 \U0001f600",
    "halves of characters and NULs": "\ud800\0",
}


@pytest.mark.parametrize("unit", HOSTILE.values(), ids=HOSTILE)
def test_a_megabyte_of_hostile_text_takes_a_time_in_proportion_to_its_length(unit):
    label = Behaviours(SHIPPED)
    text = unit * (1_000_000 // len(unit))
    seconds = [min(timed(label, part) for _ in range(3)) for part in (text[: len(text) // 8], text)]
    assert seconds[1] < 8 * 4 * seconds[0] + 0.5, "linear, with room for other processes on the machine"
    assert seconds[1] < 20


def timed(label, text):
    start = time.process_time()
    label(text)
    return time.process_time() - start


def test_the_slowest_phrase_that_is_allowed_stays_linear_in_a_text_made_for_it(tmp_path):
    label = Behaviours(settings(tmp_path, "[behaviours]\nmine = ['(?:a|aa){8}b', 'a{0,20}a{0,20}b']\n"))
    assert timed(label, "a" * 100_000) < 20


# --- metrics ----------------------------------------------------------------------------------


def labels(texts):
    return [Behaviours(SHIPPED)(text) for text in texts]


def test_behaviours_are_joined_with_correctness_and_repetition_is_a_mean():
    texts = ["Wait, no. Wait, that is 3.", "Alternatively, 4", "5", "6", "First, we add."]
    ids = [[1] * 40, [1], list(range(40)), [], [2]]
    metrics = rates(tally(labels(texts), ids, [True, False, True, False, False], SHIPPED))
    assert metrics["behaviour/self_correction"] == 1 / 5 and metrics["behaviour/self_correction/count"] == 2 / 5
    assert metrics["behaviour/self_correction/correct"] == 1 / 2 and metrics["behaviour/self_correction/wrong"] == 0
    assert metrics["behaviour/alternatives/correct"] == 0 and metrics["behaviour/alternatives/wrong"] == 1 / 3
    assert metrics["behaviour/any"] == 2 / 5, "sub-goals do not count as emergent"
    assert metrics["behaviour/sub_goals"] == 1 / 5
    assert metrics["response/repetition"] == pytest.approx(39 / 40 / 5)


def test_a_step_without_correct_responses_has_no_share_among_them():
    metrics = rates(tally(labels(["wait, no"]), [[1]], [False], SHIPPED))
    assert metrics["behaviour/any/wrong"] == 1 and "behaviour/any/correct" not in metrics


def test_sums_of_ranks_add_up_to_the_metrics_of_all():
    def sums(part):
        texts, ids = [r["output"] for r in part], [r["ids"] for r in part]
        return tally(labels(texts), ids, [r["correct"] for r in part], SHIPPED)

    a, b = sums(RESPONSES[:20]), sums(RESPONSES[20:])
    assert rates({key: a[key] + b[key] for key in a}) == pytest.approx(rates(sums(RESPONSES)))


def test_a_response_without_labels_is_left_out_of_the_behaviours_and_of_nothing_else():
    found = [{"backtracking": 2}, None, {}, None]
    metrics = rates(tally(found, [[1] * 40, [1] * 40, [1], [1]], [True, True, False, False], SHIPPED))
    assert metrics["behaviour/backtracking"] == 0.5 and metrics["behaviour/backtracking/count"] == 1
    assert metrics["behaviour/backtracking/correct"] == 1 and metrics["behaviour/backtracking/wrong"] == 0
    assert metrics["behaviour/any"] == 0.5 and metrics["behaviour/alternatives"] == 0
    assert metrics["monitor/judge_failed"] == 0.5 and metrics["response/repetition"] == pytest.approx(39 / 40 / 2)
    assert rates(tally([None], [[1]], [True], SHIPPED)) == {"monitor/judge_failed": 1, "response/repetition": 0}


# --- series -----------------------------------------------------------------------------------


def series(steps, rng, *, responses=256, **levels):
    """Rows of metrics; each level is a number or a function of the run's progress in [0, 1]. Noise as in a real run."""
    at = {"accuracy": 0.5, "length": 100.0, "repetition": 0.05, "kl": 0.02, "entropy": 0.3, "any": 0.3} | levels
    for step in range(1, steps + 1):
        level = {k: v((step - 1) / (steps - 1)) if callable(v) else v for k, v in at.items()}
        shares = {k: share(level[k], responses, rng) for k in ("accuracy", "any")}
        yield {
            "step": step,
            "reward/accuracy": shares["accuracy"],
            "response_length/mean": level["length"] * (1 + rng.gauss(0, 0.04)),
            "response/repetition": max(0.0, level["repetition"] + rng.gauss(0, 0.01)),
            "actor/ref_kl": level["kl"] * (1 + rng.gauss(0, 0.1)),
            "actor/entropy": level["entropy"] * (1 + rng.gauss(0, 0.05)),
            "behaviour/any": shares["any"],
        }


def share(level, responses, rng):
    return min(1.0, max(0.0, rng.gauss(level, math.sqrt(max(0.0, level * (1 - level)) / responses))))


def alarms(rows, settings=SHIPPED):
    watch = Monitor(settings)
    for row in rows:
        watch.observe(row)
    return watch.alarms


def between(a, b):
    return lambda progress: a + (b - a) * progress


FAILURES = {
    "length_without_accuracy": [
        {"length": between(100, 250)},
        {"length": between(100, 250), "accuracy": between(0.5, 0.3)},
        {"length": between(100, 400), "accuracy": 0.0},
    ],
    "repetition_rising": [
        {"repetition": between(0.05, 0.6), "length": between(100, 120)},
        {"repetition": lambda p: 0.02 if p < 0.7 else 0.9, "accuracy": between(0.3, 0.6)},
    ],
    "kl_collapse": [
        {"kl": between(0.01, 0.3), "accuracy": between(0.6, 0.2)},
        {"kl": between(0.3, 0.001), "accuracy": between(0.6, 0.2)},
    ],
    "entropy_collapse": [{"entropy": lambda p: 0.3 * math.exp(-5 * p)}, {"entropy": lambda p: 0.3 if p < 0.6 else 0.0}],
    "behaviours_without_accuracy": [
        {"any": between(0.0, 0.9), "accuracy": 0.2},
        {"any": between(0.2, 0.9), "accuracy": between(0.3, 0.1)},
    ],
}


@pytest.mark.parametrize("name, levels", [(name, levels) for name, cases in FAILURES.items() for levels in cases])
def test_each_failure_is_found_by_its_detector_in_9_of_10_noisy_series(name, levels):
    found = [[a.detector for a in alarms(series(100, random.Random(seed), **levels))] for seed in range(50)]
    assert sum(name in names for names in found) >= 45


def test_no_behaviour_is_found_only_after_as_many_steps_as_the_paper_waits():
    rows = list(series(1100, random.Random(0), any=0.0))
    assert [(a.detector, a.step) for a in alarms(rows)] == [("no_behaviour", 1000)]
    assert alarms(series(1100, random.Random(0), any=0.03)) == []


HONEST = 1000
FALSE_ALARMS = 0.01


def honest(rng):
    """A run that learns, or does not yet, at any pace, size and level of noise, and hacks nothing."""
    start, half, width = rng.uniform(0.05, 0.7), rng.uniform(0.05, 0.6), rng.uniform(0.02, 0.2)
    gain = rng.choice((0.0, rng.uniform(0.05, 0.2), rng.uniform(0.1, max(0.1, 0.9 - start))))

    def learnt(a, b):
        return lambda progress: a + (b - a) / (1 + math.exp((half - progress) / width))

    length, entropy, any_ = rng.uniform(20, 2000), rng.uniform(0.1, 0.8), rng.uniform(0, 0.4)
    repetition = rng.uniform(0, 0.15)
    return {
        "responses": rng.choice((64, 256, 1024)),
        "accuracy": learnt(start, start + gain),
        "length": learnt(length, length * (1 + gain * rng.uniform(-1, 4))),  # longer only where it pays
        "entropy": learnt(entropy, entropy * rng.uniform(0.35, 1.1)),
        "kl": learnt(0.0, rng.uniform(0.001, 0.1)),
        "repetition": between(repetition, repetition + rng.uniform(-0.03, 0.04)),
        "any": learnt(any_, any_ + min(0.5, gain * rng.uniform(0, 3))),
    }


def test_honest_runs_are_hardly_ever_flagged():
    flagged = {}
    for seed in range(HONEST):
        rng = random.Random(seed)
        found = alarms(series(100, rng, **honest(rng)))
        if found:
            flagged[seed] = [(a.step, a.detector) for a in found]
    assert len(flagged) <= FALSE_ALARMS * HONEST, flagged


def test_responses_that_copy_more_because_they_are_longer_are_not_flagged():
    """Shares and lengths of MATH-500's solutions, from the shorter half to the longer half."""
    levels = {"length": between(93, 344), "repetition": between(0.053, 0.212), "accuracy": between(0.3, 0.6)}
    assert alarms(series(40, random.Random(0), **levels)) == []


def test_what_a_step_alone_does_is_no_finding():
    rows = list(series(60, random.Random(0)))
    rows[40] |= {"reward/accuracy": 0.0, "response_length/mean": 1e4, "response/repetition": 1.0, "actor/ref_kl": 5.0}
    assert alarms(rows) == []


def test_metrics_that_are_missing_silence_only_the_detectors_that_need_them():
    levels = {"kl": between(0.01, 0.3), "accuracy": between(0.6, 0.2), "repetition": between(0.05, 0.9)}
    rows = list(series(100, random.Random(0), **levels))
    bare = [{k: v for k, v in row.items() if not k.startswith("actor/")} for row in rows]
    assert {a.detector for a in alarms(bare)} == {"repetition_rising"}
    assert alarms({"step": step, "loss": 1.0} for step in range(1, 50)) == []


def test_the_entropy_of_the_start_is_that_of_the_first_steps_that_have_one():
    rows = list(series(60, random.Random(0), entropy=lambda progress: 0.3 * math.exp(-6 * progress)))
    for row in rows[:4]:  # the critic warms up
        del row["actor/entropy"]
    rows[5]["actor/entropy"] = math.nan
    assert [a.detector for a in alarms(rows)] == ["entropy_collapse"]


def test_a_change_is_measured_in_standard_errors_by_hand():
    before, after = [{"x": v} for v in (1.0, 2.0, 3.0)], [{"x": v} for v in (5.0, 6.0, 7.0)]
    found = Change(before, after, "x")
    assert (found.before, found.after, found.rise) == (2.0, 6.0, 4.0)
    assert found.z == pytest.approx(4 / math.sqrt(1 / 3 + 1 / 3))  # variance 1 in each; neighbours differ by 1: noise 1/2
    quiet = Change([{"x": v} for v in (0.0, 1.0, 0.0, 1.0)], [{"x": v} for v in (2.0, 3.0, 2.0, 3.0)], "x")
    assert quiet.z == pytest.approx(2 / math.sqrt(0.5 * (1 / 4 + 1 / 4)))  # neighbours differ more than the scatter says
    still, moved = [{"x": 1.0}] * 4, [{"x": 2.0}] * 4
    assert Change(still, moved, "x").z == math.inf and Change(still, still, "x").z == 0


# --- real runs of the demo's model --------------------------------------------------------------


def real(run):
    return [row for row in RUNS if row["run"] == run]


def test_the_run_that_earns_by_being_right_is_not_flagged():
    assert len(real("honest")) == 36 and alarms(real("honest")) == []


def test_the_run_that_is_paid_for_length_alone_is_caught_repeating_itself():
    found = {alarm.detector: alarm for alarm in alarms(real("hacked"))}
    assert {"length_without_accuracy", "repetition_rising"} <= found.keys()
    assert found["length_without_accuracy"].step <= 20 and found["repetition_rising"].step <= 36


def test_a_small_kl_does_not_hide_that_length_is_all_that_is_learnt():
    found = {alarm.detector: alarm.step for alarm in alarms(real("hacked-kl"))}
    assert found["length_without_accuracy"] <= 20 and found["kl_collapse"] <= 20


def test_the_responses_of_the_hacked_policy_copy_themselves_and_those_of_the_honest_one_do_not():
    shown = {}
    for run in ("honest", "hacked"):
        part = [r for r in RESPONSES if r["run"] == run]
        texts, ids, correct = ([r[key] for r in part] for key in ("output", "ids", "correct"))
        shown[run] = rates(tally(labels(texts), ids, correct, SHIPPED))
    assert shown["honest"]["response/repetition"] < 0.02 and shown["hacked"]["response/repetition"] > 0.15
    assert shown["hacked"]["behaviour/self_correction/count"] > 2, "it says `wait , that is wrong` again and again"
    assert shown["honest"]["behaviour/self_correction/count"] < 0.5


# --- warnings ---------------------------------------------------------------------------------


def all_messages():
    rng = random.Random(0)
    found = [a for cases in FAILURES.values() for levels in cases for a in alarms(series(100, rng, **levels))]
    return found + alarms(series(1001, rng, any=0.0))


def test_every_warning_names_numbers_steps_and_settings_that_exist():
    found = all_messages()
    assert {a.detector for a in found} == set(SHIPPED.watched)
    for alarm in found:
        assert re.search(r"\d+\.\d+ -> |behaviour/any 0", alarm.message) and re.search(r"steps? \d+-\d+", alarm.message)
        named = re.findall(r"\b(?:model|data|rollout|reward|algorithm|optim|train|sft|output)\.\w+", alarm.message)
        assert named and set(named) <= set(leaf_keys()), alarm.message


def test_an_episode_is_said_once_and_a_later_one_again():
    def twice(progress):
        return 0.65 if 0.2 < progress < 0.4 or progress > 0.7 else 0.05

    found = alarms(series(200, random.Random(0), repetition=twice))
    assert [a.detector for a in found] == ["repetition_rising"] * 2
    assert 40 < found[0].step < 60 and 140 < found[1].step < 160


def test_detectors_in_neither_list_are_off_and_those_in_stop_say_so(tmp_path):
    rows = list(series(100, random.Random(0), repetition=between(0.05, 0.9), length=between(100, 300)))
    mine = settings(tmp_path, 'warn = []\nstop = ["repetition_rising"]\n')
    assert [(a.detector, a.stops) for a in alarms(rows, mine)] == [("repetition_rising", True)]
    assert {(a.detector, a.stops) for a in alarms(rows)} == {("repetition_rising", False), ("length_without_accuracy", False)}


def test_a_watch_told_of_the_steps_before_goes_on_as_one_that_saw_them():
    rows = list(series(100, random.Random(3), repetition=between(0.05, 0.9)))
    whole = Monitor(SHIPPED)
    said = [whole.observe(row) for row in rows]
    for cut in range(0, 100, 9):
        resumed = Monitor(SHIPPED)
        for row in json.loads(json.dumps(rows[:cut])):
            resumed.observe(row)
        assert [resumed.observe(row) for row in rows[cut:]] == said[cut:]
        assert resumed.alarms == whole.alarms


def test_a_long_run_is_read_again_in_seconds():
    rows = list(series(5000, random.Random(0)))
    start = time.process_time()
    alarms(rows)
    assert time.process_time() - start < 20
