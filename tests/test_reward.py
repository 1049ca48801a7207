"""RLSP's reward: exploration against the paper's formulas, the mix, and a user's own function."""

import traceback

import pytest

from rlsp_fast.config import RewardConfig
from rlsp_fast.reward import Scorer, length_code_exploration, length_exploration, load_function
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


# The mix


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
