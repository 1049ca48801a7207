"""RLSP's reward: exploration against the paper's formulas, the mix, and a user's own function."""

import json
import os
import random
import re
import time
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from rlsp_fast.config import REPETITION_NGRAM, RewardConfig, load
from rlsp_fast.demo import demonstrate
from rlsp_fast.repetition import repeated_share
from rlsp_fast.reward import (
    Scorer,
    length_code_exploration,
    length_exploration,
    load_function,
    reasoning_length,
    repetition_exploration,
)
from rlsp_fast.types import Problem, Rollout

RIGHT, WRONG, NONE = r"so \boxed{5}", r"so \boxed{6}", "so 5"


def rollout(text: str, tokens: int = 1000, answer: str = "5", index: int = 3) -> Rollout:
    problem = Problem(messages=(), answer=answer, source="train.jsonl", index=index, extra={"level": 2})
    ids = tuple(range(tokens))
    return Rollout(problem=problem, sample=0, response_ids=ids, rollout_logprob=(0.0,) * tokens, finish="stop", text=text)


def score(text: str, tokens: int = 1000, **settings):
    with Scorer(RewardConfig(**settings)) as scorer:
        return scorer.score([rollout(text, tokens)])[0]


# Exploration


@pytest.mark.parametrize(("tokens", "expected"), [(1000, -1.0), (4000, -0.25), (100, -10.0), (99, -10.0), (1, -10.0)])
def test_length_is_minus_c_over_tokens_and_bounded_below(tokens, expected):
    assert length_exploration(tokens, c=1000.0, minimum=-10.0) == expected


def test_a_longer_response_never_earns_less_exploration():
    rewards = [length_exploration(n, c=1000.0, minimum=-10.0) for n in range(1, 5000)]
    assert rewards == sorted(rewards) and rewards[-1] < 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x" * 4000, -1.0),
        ("x" * 4000 + r"\boxed{5}" + "y" * 4000, -1.0),
        ("x" * 400 + r"\boxed {4}" + "x" * 4000 + r"\boxed{5}", -10.0),
        ("x" * 8000 + r"\fbox{5}", -0.5),
        (r"\boxed{5}" + "y" * 100_000, -10.0),
        ("", -10.0),
    ],
)
def test_length_code_counts_four_characters_a_token_before_the_first_box(text, expected):
    assert length_code_exploration(text, c=1000.0, minimum=-10.0) == expected


def test_a_box_at_once_does_not_beat_a_worked_answer_as_it_does_in_the_papers_code():
    at_once = score(r"\boxed{5}", exploration="length_code")
    worked = score("x" * 2000 + r"\boxed{5}", exploration="length_code")
    assert at_once.correct and worked.correct and at_once.reward < worked.reward


# Repetition

DEMO_NGRAM = 12
PIECES = re.compile(r" ?\d| ?[A-Za-z]+|\\[a-z]+\{?| ?[^\sA-Za-z\d]|\s")


def tokens(text: str) -> list[int]:
    """Digits one by one, words, symbols: as the demo's tokenizer and, but for digits, those of large models cut text."""
    vocabulary: dict[str, int] = {}
    return [vocabulary.setdefault(piece, len(vocabulary)) for piece in PIECES.findall(text)]


def demo_responses(n: int) -> list[str]:
    """Worked sums as the demo's model learns to write them."""
    rng, found = random.Random(5), []
    while len(found) < n:
        text = demonstrate(" + ".join(str(rng.randint(0, 10)) for _ in range(rng.randint(5, 7))), rng)
        found += [text] if "=" in text else []
    return found


@pytest.mark.parametrize(
    ("ids", "ngram", "repeats"),
    [
        ([1, 2, 3, 4, 5, 6], 3, 0),
        ([1, 2, 3, 1, 2, 3], 3, 3),
        ([1, 2, 3, 9, 1, 2, 3, 8], 3, 3),
        ([1, 2, 3, 4, 9, 1, 2, 3, 4], 3, 4),  # two runs that overlap count their tokens once
        ([1, 2, 9, 1, 2, 8], 3, 0),  # shorter than a run
        ([7] * 10, 3, 9),  # the first token alone is new
        ([1, 2] * 5, 3, 8),
        ([1, 2], 3, 0),
        ([], 3, 0),
        ([1, 1, 2, 2], 1, 2),
        (["la"] * 4, 1, 3),
    ],
)
def test_repeated_share_counts_tokens_in_runs_that_occurred_before(ids, ngram, repeats):
    assert repeated_share(ids, ngram) == pytest.approx(repeats / max(1, len(ids)))


def length_and_repetition(ids, c, minimum, ngram=DEMO_NGRAM):
    repeated = repeated_share(ids, ngram)
    return length_exploration(len(ids), c, minimum) + repetition_exploration(len(ids), repeated, c, minimum)


@pytest.mark.parametrize("c, minimum", [(10, -1.0), (1000, -10.0), (0, -1.0)])
def test_text_that_repeats_itself_earns_no_length(c, minimum):
    rng = random.Random(0)
    for _ in range(200):
        start = [rng.randrange(50) for _ in range(rng.randint(1, 300))]
        cut = rng.randrange(len(start))
        copy = (start[cut:] * DEMO_NGRAM)[: DEMO_NGRAM + rng.randrange(400)]
        before, after = (length_and_repetition(ids, c, minimum) for ids in (start, start + copy))
        assert after <= before + 1e-9, (len(start), len(copy))


def test_repetition_is_between_the_bound_and_zero():
    for length in (0, 1, 7.5, 100, 4096):
        for repeated in (0.0, 0.3, 0.999):
            assert -10 <= repetition_exploration(length, repeated, c=1000, minimum=-10) <= 0
    assert repetition_exploration(4096, 0.0, c=1000, minimum=-10) == 0
    assert repetition_exploration(4000, 0.75, c=1000, minimum=-10) == pytest.approx(-1.0 + 0.25)


def test_worked_sums_repeat_nothing_and_a_step_said_over_and_over_loses_its_length():
    honest = [repetition_of(text) for text in demo_responses(300)]
    assert sum(honest) / len(honest) > -0.001 and sum(p < 0 for p in honest) <= 3
    for text in demo_responses(20):
        chain = text.split(" . ")[0]
        assert repetition_of(chain + chain.rsplit(" ", 1)[1] * 20) < -0.1, "the last step again and again"
    assert repetition_of(" 4 +3=7" + " , wait , that is wrong : +3=7" * 7 + r" . \boxed{7}") < -0.25
    assert repetition_of(" wait ," * 40) < -0.8


def repetition_of(text: str) -> float:
    ids = tokens(text)
    return repetition_exploration(len(ids), repeated_share(ids, DEMO_NGRAM), c=10, minimum=-1.0)


DATA = Path(os.environ.get("RLSP_FAST_DATA", "no such folder"))


@pytest.mark.skipif(not (DATA / "math500_test.jsonl").exists(), reason="RLSP_FAST_DATA names no folder with MATH-500")
def test_solutions_that_people_wrote_hardly_repeat_and_a_copied_one_does():
    texts = [json.loads(line)["solution"] for line in (DATA / "math500_test.jsonl").read_text().splitlines()]
    shares = [repeated_share(tokens(text), REPETITION_NGRAM) for text in texts]
    assert sum(shares) / len(shares) < 0.015 and sum(share > 0.1 for share in shares) / len(shares) < 0.05
    long = [text for text in texts if len(tokens(text)) > REPETITION_NGRAM]
    assert min(repeated_share(tokens(text + text), REPETITION_NGRAM) for text in long) > 0.49


def test_a_response_at_the_length_limit_is_measured_in_a_moment():
    rng = random.Random(0)
    ids = [rng.randrange(100_000) for _ in range(32_768)]
    start = time.perf_counter()
    assert repeated_share(ids, REPETITION_NGRAM) == 0
    assert time.perf_counter() - start < 2.0


# The mix


@pytest.mark.parametrize(
    "text", ["none", "length", "length_code", "repetition", "length+repetition:12", "repetition+length_code"]
)
def test_exploration_takes_none_or_parts(text):
    assert set(RewardConfig(exploration=text).exploration_parts) == set(re.findall(r"[a-z_]+", text)) - {"none"}


@pytest.mark.parametrize(
    "text, part",
    [
        ("lenght", "did you mean length?"),
        ("length+none", "want none, or parts"),
        ("length+", "want none, or parts"),
        ("length+length", "each part once"),
        ("length+length_code", "one of length and length_code"),
        ("length:12", "only repetition takes a number"),
        ("length+repetition:0", "only repetition takes a number"),
        ("length+repetition:many", "only repetition takes a number"),
    ],
)
def test_exploration_refuses_what_is_no_part(text, part):
    with pytest.raises(ValidationError, match=f"reward.exploration = '{re.escape(text)}'.*{re.escape(part)}"):
        RewardConfig(exploration=text)


def test_exploration_is_chosen_on_the_command_line():
    assert load("demo", ["reward.exploration=none"]).reward.exploration_parts == ()
    reward = load("demo", ["reward.exploration=length+repetition:12"]).reward
    assert (reward.exploration_parts, reward.repetition_ngram) == (("length", "repetition"), 12)
    assert load("demo", ["reward.exploration=length+repetition"]).reward.repetition_ngram == REPETITION_NGRAM


@pytest.mark.parametrize(
    "recipe, exploration, no_answer, lam",
    [("llama-3.1-8b-math-paper", "length", 0.0, 0.95), ("llama-3.1-8b-math-code", "length_code", -0.5, 1.0)],
)
def test_the_two_presets_differ_where_the_papers_text_and_code_do(recipe, exploration, no_answer, lam):
    config = load(recipe)
    reward = config.reward
    assert (reward.exploration, reward.no_answer, config.algorithm.lam) == (exploration, no_answer, lam)
    assert (reward.alpha, reward.length_c) == (0.8, 1000)


def test_repetition_enters_where_the_length_that_it_takes_back_enters():
    looping = rollout("x" * 8000 + RIGHT, 2000)
    looping = replace(looping, response_ids=tuple(range(500)) * 4)
    with Scorer(RewardConfig(exploration="length+repetition", alpha=0.8)) as scorer:
        result = scorer.score([looping])[0]
    assert result.extra == {"length": -0.5, "repetition": pytest.approx(-2.0 + 0.5)}
    assert result.exploration == pytest.approx(-2.0) and result.reward == pytest.approx(0.8 - 0.2 * 2.0)
    with Scorer(RewardConfig(exploration="length_code+repetition", alpha=0.8)) as scorer:
        result = scorer.score([looping])[0]
    novel = reasoning_length(looping.text) / 4
    assert result.reward == pytest.approx(1.0 - 1000 / novel)
    with Scorer(RewardConfig(exploration="repetition", alpha=0.8)) as scorer:
        result = scorer.score([looping])[0]
    assert result.extra == {"repetition": pytest.approx(-1.5)} and result.reward == pytest.approx(0.8 - 0.2 * 1.5)


@pytest.mark.parametrize(
    ("text", "outcome", "reward"),
    [(RIGHT, 1.0, 0.8 - 0.2 * 0.5), (WRONG, 0.0, -0.2 * 0.5), (NONE, -0.5, -0.4 - 0.2 * 0.5)],
)
def test_length_is_mixed_by_alpha_with_the_parts_kept(text, outcome, reward):
    result = score(text, 2000, alpha=0.8, exploration="length", no_answer=-0.5)
    assert result.reward == pytest.approx(reward)
    assert (result.outcome, result.exploration) == (outcome, -0.5)
    assert (result.verdict, result.correct) == (
        {1.0: "correct", 0.0: "wrong", -0.5: "no_answer"}[outcome],
        outcome == 1,
    )


def test_length_code_enters_outside_the_mix():
    result = score("x" * 8000 + RIGHT, exploration="length_code", alpha=0.5)
    assert result.reward == 1.0 + result.exploration
    assert result.exploration == pytest.approx(-0.5, abs=1e-3)


def test_without_exploration_the_reward_is_the_outcome():
    result = score(RIGHT, exploration="none", alpha=0.3)
    assert (result.reward, result.outcome, result.exploration) == (1.0, 1.0, 0.0)


def test_rewards_stay_within_ten():
    assert score(NONE, 1, exploration="length_code", no_answer=-10.0).reward == -10.0


def test_lenient_verifier_finds_an_answer_without_a_box():
    assert score("The answer is 5.", verifier="lenient").correct
    assert score("The answer is 5.", verifier="strict").verdict == "no_answer"


def test_rollouts_are_scored_in_order_while_others_still_compute():
    texts = [
        r"\boxed{\sqrt{25}}",
        RIGHT,
        WRONG,
        NONE,
        r"\boxed{\int_0^1 \frac{\ln(1+x^5)}{\sqrt{1+x^7}} dx}",
        r"\boxed{\frac{10}{\sqrt{4}}}",
    ]
    with Scorer(RewardConfig(timeout_s=1.0)) as scorer:
        futures = [scorer.submit(rollout(text)) for text in texts]
        assert futures[1].done() and futures[2].done(), "exact answers wait for nobody"
        verdicts = [future.result().verdict for future in futures]
    assert verdicts == ["correct", "correct", "wrong", "no_answer", "timeout", "correct"]


def test_an_empty_gold_answer_names_its_problem():
    with (
        Scorer(RewardConfig()) as scorer,
        pytest.raises(ValueError, match="train.jsonl, index 7: the gold answer is empty"),
    ):
        scorer.score([rollout(RIGHT, answer=" ", index=7)])


# A reward function of the user's own


@pytest.fixture
def write(tmp_path):
    def write(body: str, name: str = "compute_score") -> str:
        path = tmp_path / "reward.py"
        path.write_text(f"def {name}(data_source, solution_str, ground_truth, extra_info):\n    {body}\n")
        return f"{path}:compute_score"

    return write


def test_a_users_function_gets_the_problem_and_its_number_is_the_reward(write):
    where = write("return len(solution_str) + 100 * extra_info['level'] + (data_source, ground_truth).index('5')")
    result = score("abc", function=where)
    assert (result.reward, result.outcome, result.exploration) == (204.0, 204.0, 0.0)
    assert (result.verdict, result.correct, result.extra) == ("custom", True, {})


def test_a_users_dict_gives_score_accuracy_and_extras(write):
    result = score("x", function=write("return {'score': -0.5, 'acc': True, 'format': 1, 'pred': 'x', 'style': 0.25}"))
    assert (result.reward, result.correct) == (-0.5, True)
    assert result.extra == {"format": 1.0, "style": 0.25}


@pytest.mark.parametrize(
    ("body", "correct"), [("return 1", True), ("return 0.9", False), ("return {'score': 1, 'correct': False}", False)]
)
def test_a_score_of_one_is_correct_unless_the_function_says(write, body, correct):
    assert score("x", function=write(body)).correct is correct


@pytest.mark.parametrize("body", ["return None", "return 'good'", "return {'acc': 1}", "return float('nan')", "return [1]"])
def test_a_bad_return_value_names_function_and_problem(write, body):
    where = write(body)
    with pytest.raises(ValueError, match="want a finite number") as raised:
        score("x", function=where)
    assert where in str(raised.value) and "train.jsonl, index 3" in str(raised.value)


def test_an_error_in_a_users_function_keeps_its_traceback_and_names_the_problem(write):
    with pytest.raises(KeyError) as raised:
        score("x", function=write("return extra_info['missing']"))
    shown = "".join(traceback.format_exception(raised.value))
    assert "reward.py" in shown and "extra_info['missing']" in shown
    assert "train.jsonl, index 3" in shown


def test_functions_run_beside_each_other(write):
    where = write(
        "import threading; barrier = globals().setdefault('b', threading.Barrier(4, timeout=20)); return barrier.wait()"
    )
    with Scorer(RewardConfig(function=where)) as scorer:
        assert sorted(s.reward for s in scorer.score([rollout("x")] * 4)) == [0, 1, 2, 3]


def test_what_cannot_be_loaded_is_named(write, tmp_path):
    write("return 1", name="compute_scores")
    (tmp_path / "three.py").write_text("def compute_score(a, b, c): return 1\n")
    for where, message in {
        "reward.py": "want path/to/file.py:compute_score",
        f"{tmp_path}/nowhere.py:compute_score": "there is no file",
        f"{tmp_path}/reward.py:compute_score": "did you mean compute_scores",
        f"{tmp_path}/three.py:compute_score": r"want compute_score\(data_source, solution_str",
    }.items():
        with pytest.raises(ValueError, match=message) as raised:
            Scorer(RewardConfig(function=where))
        assert where in str(raised.value)


def test_a_file_may_hold_dataclasses(tmp_path):
    path = tmp_path / "typed.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Part:\n    weight: float = 2.0\n"
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n    return Part().weight\n"
    )
    assert load_function(f"{path}:compute_score")("", "", "") == 2.0
