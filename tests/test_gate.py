"""bench/gate.py: what counts as worse, and what it does without a baseline."""

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import gate  # noqa: E402

BASELINE = {
    "calls": {"value": 100, "worse": "higher", "tolerance": 0.02},
    "ratio": {"value": 2.0, "worse": "lower", "tolerance": 0.2},
}


def verdicts(calls, ratio):
    lines, worse = gate.compare(BASELINE, {"calls": {"value": calls}, "ratio": {"value": ratio}})
    return [line.split()[0] for line in lines], worse


def test_within_the_tolerance_nothing_is_worse():
    assert verdicts(101, 1.61) == (["as", "as"], [])


def test_more_calls_and_a_lower_ratio_are_worse_by_name():
    assert verdicts(103, 1.59) == (["WORSE", "WORSE"], ["calls", "ratio"])


def test_fewer_calls_and_a_higher_ratio_are_better():
    assert verdicts(90, 2.5) == (["better", "better"], [])


def test_what_was_not_measured_is_said_and_fails():
    lines, worse = gate.compare(BASELINE, {"calls": {"value": 100}, "other": {"value": 1}})
    assert [line.split("  ")[0] for line in lines] == ["as before", "not measured", "new"]
    assert worse == ["ratio"]


def test_a_machine_without_a_baseline_is_an_error_that_says_how_to_make_one():
    done = subprocess.run([sys.executable, str(BENCH / "gate.py"), "--machine", "abacus"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "no baseline for abacus" in done.stderr and "--write makes one" in done.stderr
