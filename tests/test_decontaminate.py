"""Which training problems count as evaluation problems, that none is lost, and that a run refuses to train on them."""

import os
import random
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from test_cli import home, refused, rlsp, rows, write  # noqa: F401  (home is a fixture)

from rlsp_fast import config, decontaminate, demo
from rlsp_fast.data import DataError
from rlsp_fast.decontaminate import OverlapError, clean, find, tokens

DATA = Path(os.environ.get("RLSP_FAST_DATA", "/nowhere"))
CARS = (
    "A train leaves town at noon with 240 passengers. At each of 3 stops 15 people get off and 7 get on. "
    "How many passengers are on the train after the last stop?"
)


def why(train, evaluation, **options):
    """The kind of overlap of two texts, None without one."""
    found = find([train], [evaluation], **options)
    return found[0].why if found else None


# --- what is the same problem -----------------------------------------------------------------


@pytest.mark.parametrize(
    "train, evaluation",
    [
        ("What is 2+3?", "what is  2 + 3"),
        ("Compute $\\dfrac{1}{2}+\\frac{3}{4}$.", "Compute \\(\\tfrac{1}{2} + \\frac{ 3 }{4}\\)"),
        ("Evaluate $x^{2}$ at $x=3$.", "Evaluate $x^2$ at $x = 3$"),
        ("Evaluate 10² + 1", "Evaluate 10^2 + 1"),
        ("Add 2½ and 1", "Add 2 1/2 and 1"),
        ("She has 1,000 pens.", "She has 1000 pens"),
        ("She has 1{,}000 pens.", "She has $1000$ pens"),
        ("It costs .5 euros", "It costs 0.5 euros"),
        ("Janet\u2019s ducks lay eggs", "Janet's ducks lay eggs"),
        ("Find $3 \\times 4 \\div 2$", "Find 3 × 4 ÷ 2"),
        ("Find $\\left( 3, 4 \\right)$", "Find (3,4)"),
        ("Ｗｈａｔ is ３ ＋ ４？", "What is 3 + 4?"),
        ("What is 7\u200b + 1?", "What is 7 + 1?"),
        ("计算三加四等于多少？", "计算三加四等于多少"),
        ("Сколько будет два плюс три", "СКОЛЬКО будет два плюс три?"),
        (CARS.upper(), CARS),
    ],
)  # fmt: skip
def test_spelling_and_typesetting_make_no_other_problem(train, evaluation):
    assert why(train, evaluation) == "exact"


@pytest.mark.parametrize(
    "train, evaluation",
    [
        ("what is 2+3", "what is 2+4"),
        ("what is 2+3", "what is 2-3"),
        ("what is 2+3", "what is 23"),
        ("what is .5+1", "what is 5+1"),
        ("what is 3.5", "what is 35"),
        ("what is 10²", "what is 102"),
        ("what is 2½", "what is 21/2"),
        ("Compute 4*(3+8)", "Compute (4*3)+8"),
        ("Compute $2^{3+1}$", "Compute $2^3+1$"),
        ("Compute 5!", "Compute 5"),
        ("Find f'(2)", "Find f(2)"),
        ("Is 3 < 4?", "Is 3 > 4?"),
        ("What is 2+3+4?", "What is 2+3?"),
        ("log_2 8", "log_{28}"),
        ("三加四", "三加五"),
        ("The board is\n_ 3 1 _", "The board is\n3 _ 1 _"),
        ("The maze is\n#.##", "The maze is\n##.#"),
        (CARS.replace("240", "250"), CARS),
        (CARS.replace("7 get on", "8 get on"), CARS),
        ("What is the remainder when 1 + 2 + 3 + 4 + ... + 9 + 10 is divided by 8?",
         "What is the remainder when 1 + 2 + 3 + 4 + ... + 9 + 10 is divided by 9?"),
        ("???", "!!!"),
        ("\U0001f600 \U0001f680", "\U0001f600\U0001f680"),
    ],
)  # fmt: skip
def test_another_number_or_operator_is_another_problem(train, evaluation):
    assert why(train, evaluation) is None and why(evaluation, train) is None


@pytest.mark.parametrize(
    "train, evaluation, kind",
    [
        ("Calculate the value of 17 * 4.", "What is 17*4?", "reworded"),
        ("Please find $\\sin 60^\\circ$", "Compute $\\sin 60^{\\circ}$.", "reworded"),
        ("Exercise 3.2: what is 17*4?", "What is 17*4?", "reworded"),
        ("Find the value.", "What is the value of that?", None),
        ("Find 17 * 4 and 3", "What is 17*4?", None),
        (f"Problem 7. {CARS}", CARS, "contains"),
        (f"{CARS} Explain every step.", CARS, "contains"),
        (CARS.replace("leaves town", "departs"), CARS, "ngram"),
        (CARS.replace("How many passengers are on", "Say who is on"), CARS, "ngram"),
        (CARS[: len(CARS) // 3], CARS, None),
    ],
)
def test_a_problem_in_other_words_is_found(train, evaluation, kind):
    assert why(train, evaluation) == kind


def test_a_long_sum_that_goes_on_is_not_the_sum():
    terms = [str(n) for n in range(11, 31)]
    found = find(["Calculate " + " + ".join([*terms, "31"])], ["Calculate " + " + ".join(terms)])
    assert [o.why for o in found] != ["contains"]


def test_the_nearest_evaluation_problem_is_named_with_what_both_have():
    near = CARS.replace("after the last stop", "now")
    (found,) = find(["unrelated", near], ["something else", CARS.replace("240", "100"), CARS])
    assert (found.train, found.evaluation, found.why) == (1, 2, "ngram")
    assert found.matched == " ".join(tokens(CARS)[: -len(tokens("after the last stop"))])
    assert found.share == pytest.approx(1 - 4 / len(tokens(CARS)))


def test_n_and_threshold_decide():
    evaluation = " ".join(f"e{i}" for i in "abcdefghijklmnopqrstuvwxyz")
    words = evaluation.split()
    for shared in (7, 8, 13, 20):
        train = " ".join(["x", *words[:shared], "y"])
        for n in (5, 8, 13):
            for threshold in (0.0, 0.3, 0.5, 0.75):
                expected = shared >= n and shared / 26 >= threshold
                assert bool(find([train], [evaluation], ngram=n, threshold=threshold)) == expected, (shared, n, threshold)
    # The plain rule does not ask whether the numbers agree.
    assert why(CARS.replace("240", "250"), CARS, threshold=0) == "ngram"


def test_phrases_of_the_trade_are_evidence_of_nothing():
    phrase = "can be written as m over n where m and n are relatively prime positive integers find m plus n"
    evaluation = [f"The {a} of the {b} {phrase}" for a in "width height length area".split() for b in "box cone cube".split()]
    assert find([f"The chance of {w} {phrase}" for w in ("rain", "snow")], evaluation) == []
    (found,) = find([f"Hard one: {evaluation[3]}. Good luck!"], evaluation)  # a copy is a copy
    assert (found.evaluation, found.why) == (3, "contains")


def test_an_instruction_on_every_training_problem_is_evidence_of_nothing():
    end = " Think step by step and write the answer in a box at the very end of your response please"
    rng = random.Random(0)
    words = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("ala", "elo", "iru", "ona", "utu")]
    train = [f"Show that {' '.join(rng.sample(words, 12))}.{end}" for _ in range(200)]
    evaluation = ["Show that mirrors are kind to the old and the brave of heart always." + end]
    assert find(train, evaluation) == []
    assert [o.train for o in find([*train, evaluation[0].replace("Show", "Prove")], evaluation)] == [200]


def test_grids_and_drawings_are_told_apart():
    rng = random.Random(0)
    grids = [
        "Distance to the nearest 0 in\n" + "\n".join(" ".join(rng.choices("01", k=9)) for _ in range(9)) for _ in range(60)
    ]
    assert find(grids[:40], grids[40:]) == []
    letter = "Read this:\n #####\n #\n #####\n     #\n #####"
    assert why(letter.replace("     #", " #"), letter) is None and why(letter, letter) == "exact"


# --- hostile ----------------------------------------------------------------------------------


def test_nothing_overlaps_nothing():
    assert find([], [CARS]) == find([CARS], []) == find([], []) == []
    assert find(["", " ", "\u200b", "."], ["x"]) == []
    assert [o.evaluation for o in find(["", "."], ["", "."])] == [0, 1]  # told apart by what they are


def test_huge_and_strange_problems_take_bounded_time():
    strange = [
        "ha " * 300_000,
        "7" * 300_000,
        "{" * 100_000 + "}" * 100_000,
        "1," * 100_000,
        "\\" * 100_001,
        "a" * 1_000_000,
        "\x00\ud800\U0001f600" * 50_000,
        "(" * 100_000 + "x",
        " ".join(str(i) for i in range(200_000)),
        "_ . # | " * 50_000,
        "$" * 100_000 + "1",
        "{" + " " * 200_000 + "x",
    ]
    start = time.perf_counter()
    found = find([*strange, *(s + " and one more thing" for s in strange)], strange)
    assert {o.train for o in found} >= set(range(len(strange)))
    assert all(o.evaluation == o.train for o in found if o.train < len(strange))
    assert time.perf_counter() - start < 60


def test_results_do_not_depend_on_the_size_of_the_chunks(monkeypatch):
    rng = random.Random(1)
    words = [f"w{chr(97 + i)}{chr(97 + j)}" for i in range(8) for j in range(8)]
    evaluation = [" ".join(rng.choices(words, k=30)) for _ in range(50)]
    train = [" ".join(e.split()[: rng.randint(5, 30)] + rng.choices(words, k=rng.randint(0, 20))) for e in evaluation]
    whole = find(train, evaluation)
    assert 10 < len(whole) < 50
    monkeypatch.setattr(decontaminate, "CHUNK", 40)
    assert find(train, evaluation) == whole


def test_ngrams_agree_with_a_plain_search():
    """Against n-grams held in Python sets, on texts long enough that nothing is common or dull."""
    rng = random.Random(2)
    words = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrs"]
    evaluation = [rng.choices(words, k=40) for _ in range(30)]
    train = []
    for e in evaluation:
        a = rng.randrange(40)
        train.append([*rng.choices(words, k=9), *e[a : a + rng.randrange(40)], *rng.choices(words, k=9)])
    n, expected = 6, {}
    for t, text in enumerate(train):
        grams = {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}
        for e in evaluation:
            covered = {i + j for i in range(40 - n + 1) if tuple(e[i : i + n]) in grams for j in range(n)}
            if len(covered) >= 12:
                expected[t] = len(covered) / 40
    found = find([" ".join(t) for t in train], [" ".join(e) for e in evaluation], ngram=n, threshold=0.3)
    assert {o.train: o.share for o in found} == pytest.approx(expected) and len(expected) > 10


@pytest.mark.parametrize("options", [{"ngram": 1}, {"ngram": 0}, {"threshold": -0.1}, {"threshold": 1.1}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(OverlapError, match="want"):
        find([CARS], [CARS], **options)


# --- the verb ---------------------------------------------------------------------------------


@pytest.fixture
def sets(tmp_path):
    """Training rows of several shapes, of which three overlap the evaluation set."""
    write(tmp_path / "a.jsonl", [
        {"problem": "What is 2 + 3?", "answer": "5", "level": 1},
        {"problem": f"Problem 7. {CARS}", "answer": "216", "tags": ["x", {"y": None}]},
        {"problem": "What is 2 + 4?", "answer": "6", "odd": "\ud800 [bold] \u4e09"},
    ])  # fmt: skip
    verl = [{"prompt": [{"role": "user", "content": c}], "reward_model": {"ground_truth": "1"}} for c in ("1+1", CARS)]
    parquet.write_table(pa.Table.from_pylist(verl), tmp_path / "b.parquet")
    write(tmp_path / "c.jsonl", [{"messages": [{"role": "user", "content": "9 * 9"}, {"role": "assistant", "content": CARS}]}])
    write(tmp_path / "eval.jsonl", [{"question": CARS}, {"question": "Compute 2+3"}])  # without answers
    return tmp_path


def test_every_row_is_in_one_of_the_two_files_whole(sets):
    done = rlsp(
        "data", "decontaminate", "a.jsonl", "b.parquet", "c.jsonl", "--against", "eval.jsonl", "--out", "out.jsonl", cwd=sets
    )
    assert done.returncode == 0, done.stderr
    kept, removed = rows(sets / "out.jsonl"), rows(sets / "out.removed.jsonl")
    a, c = rows(sets / "a.jsonl"), rows(sets / "c.jsonl")
    b = parquet.read_table(sets / "b.parquet").to_pylist()
    assert kept == [a[2], b[0], *c]  # a response that quotes the problem is no overlap of problems
    assert [r["row"] for r in removed] == [a[0], a[1], b[1]]
    assert [(r["source"], r["index"], r["why"], r["evaluation"]["index"]) for r in removed] == [
        ("a.jsonl", 0, "reworded", 1), ("a.jsonl", 1, "contains", 0), ("b.parquet", 1, "exact", 0),
    ]  # fmt: skip
    assert removed[2]["evaluation"] == {"source": "eval.jsonl", "index": 0, "problem": CARS}
    assert removed[1]["share"] == 1 and removed[1]["matched"] == " ".join(tokens(CARS))
    assert "3 of 6 rows" in done.stdout and "out.removed.jsonl" in done.stdout
    again = rlsp("data", "decontaminate", "out.jsonl", "--against", "eval.jsonl", "--out", "out2.jsonl", cwd=sets)
    assert again.returncode == 0 and rows(sets / "out2.jsonl") == kept and rows(sets / "out2.removed.jsonl") == []


def test_a_file_against_itself_leaves_nothing(sets):
    summary = clean([str(sets / "a.jsonl")], [str(sets / "a.jsonl")], sets / "out.jsonl")
    assert (summary.num_train, summary.num_kept) == (3, 0) and rows(sets / "out.jsonl") == []
    assert [r["row"] for r in rows(sets / "out.removed.jsonl")] == rows(sets / "a.jsonl")


def test_procedural_sources_are_compared_as_files_are(tmp_path):
    gym = "reasoning-gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1&size={}&seed={}"
    summary = clean([gym.format(400, 0)], [gym.format(50, 1)], tmp_path / "out.jsonl")
    questions = {r["question"] for r in rows(tmp_path / "out.jsonl")}
    assert 0 < summary.num_kept < 400 and summary.num_kept + len(rows(summary.report)) == 400
    from rlsp_fast.data import load_rows

    assert not questions & {r.text for r in load_rows([gym.format(50, 1)], config.DataConfig())}


@pytest.mark.parametrize(
    "words, parts",
    [
        (("a.jsonl", "--against", "eval.jsonl", "--out", "a.jsonl"), ("a.jsonl", "is one of the inputs")),
        (("a.jsonl", "--against", "eval.jsonl", "--out", "o.jsonl", "--report", "eval.jsonl"), ("eval.jsonl is one of the",)),
        (("a.jsonl", "--against", "eval.jsonl", "--out", "o.csv"), ("o.csv", ".jsonl")),
        (("a.jsonl", "--against", "eval.jsonl", "--out", "o.jsonl", "--report", "o.jsonl"), ("--out and --report",)),
        (("a.jsonl", "--against", "evil.jsonl", "--out", "o.jsonl"), ("evil.jsonl: no such file", "did you mean eval.jsonl?")),
        (("a.jsonl", "--against", "empty.jsonl", "--out", "o.jsonl"), ("empty.jsonl is empty",)),
        (("blank.jsonl", "--against", "eval.jsonl", "--out", "o.jsonl"), ("blank.jsonl line 1: problem is empty",)),
        (("a.jsonl", "--against", "eval.jsonl", "--out", "o.jsonl", "--ngram", "1"), ("at least 2 tokens, got 1",)),
        (("a.jsonl", "--against", "eval.jsonl", "--out", "a.jsonl/o.jsonl"), ("o.jsonl cannot be written",)),
        (("other.jsonl", "--against", "eval.jsonl", "--out", "o.jsonl"), ("no prompt in", "its columns: text")),
    ],
)  # fmt: skip
def test_a_mistake_is_refused_and_no_file_is_touched(sets, words, parts):
    (sets / "empty.jsonl").touch()
    write(sets / "blank.jsonl", [{"problem": " "}])
    write(sets / "other.jsonl", [{"text": "1 + 1"}])
    before = {p: p.read_bytes() for p in sets.iterdir()}
    refused(rlsp("data", "decontaminate", *words, cwd=sets), *parts)
    assert {p: p.read_bytes() for p in sets.iterdir()} == before


def test_a_column_of_another_name_can_be_named(sets):
    write(sets / "other.jsonl", [{"text": "1 + 1"}, {"text": CARS}])
    done = rlsp(
        "data", "decontaminate", "other.jsonl", "--against", "other.jsonl", "--out", "o.jsonl", "--prompt-key", "text", cwd=sets
    )
    assert done.returncode == 0 and rows(sets / "o.jsonl") == []


# --- a run ------------------------------------------------------------------------------------


def test_a_run_refuses_to_train_on_its_held_out_problems(home, tmp_path):  # noqa: F811
    out = f"output.dir={tmp_path}/out"
    done = rlsp("train", "recipe.toml", "data.overlap=refuse", out, cwd=home)
    parts = ("data.overlap=drop", "data.overlap=allow", "rlsp data decontaminate problems.jsonl --against held_out.jsonl")
    where = ("'Calculate 0 + 0 .'", "held_out.jsonl index 0")
    refused(done, "data.train: 8 of 36 problems overlap data.validation", *where, *parts)
    assert "rollout engine" not in done.stdout and not (tmp_path / "out" / "config.toml").exists()
    done = rlsp("sft", "recipe.toml", "data.overlap=refuse", out, cwd=home)
    refused(done, "sft.train: 8 of 36 problems overlap data.validation")


def test_a_run_can_leave_the_overlap_out(home, tmp_path):  # noqa: F811
    words = ("run", "recipe.toml", "data.overlap=drop", "train.steps=2", "sft.steps=1", f"output.dir={tmp_path}/out")
    done = rlsp(*words, cwd=home)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "data.train: 8 of 36 left out" in done.stdout and "28 training problems" in done.stdout
    assert "sft.train: 8 of 36 left out" in done.stdout and "28 demonstrations" in done.stdout
    held_out = {r["problem"] for r in rows(home / "held_out.jsonl")}
    for step in (1, 2):
        assert not held_out & {r["input"] for r in rows(tmp_path / f"out/rollouts/step_{step}.jsonl")}
    words = ("train", "recipe.toml", "data.overlap=drop", "data.train=held_out.jsonl", f"output.dir={tmp_path}/none")
    refused(rlsp(*words, cwd=home), "all of its 8 problems overlap data.validation")


def test_only_the_held_out_problems_that_are_used_count(home, tmp_path):  # noqa: F811
    write(tmp_path / "ordered.jsonl", [{"problem": "Calculate 7 + 8 .", "answer": "15"}, *rows(home / "held_out.jsonl")])
    held_out = (f"data.validation={tmp_path}/ordered.jsonl", "data.overlap=refuse", f"output.dir={tmp_path}/out")
    words = ("train", "recipe.toml", *held_out, "train.steps=1")
    assert rlsp(*words, "data.validation_size=1", cwd=home).returncode == 0
    refused(rlsp(*words, "data.validation_size=2", cwd=home), "1 of 36 problems overlap")


def test_an_instruction_added_to_every_problem_is_no_overlap(home, tmp_path):  # noqa: F811
    long = "data.instruction=" + "Think about it carefully , step by step , and then put the final answer in a box ."
    write(tmp_path / "apart.jsonl", [{"problem": f"Calculate {a} + 9 .", "answer": str(a + 9)} for a in range(4)])
    done = rlsp(
        "train", "recipe.toml", long, "data.overlap=refuse", f"data.validation={tmp_path}/apart.jsonl", "train.steps=1",
        "data.max_prompt_length=128", "train.max_tokens_per_micro_batch=256", f"output.dir={tmp_path}/out", cwd=home,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_demo_trains_on_no_held_out_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "NUM_PROBLEMS", 4000)  # of its 20,000 and 40,000: the longer search is in the bench
    monkeypatch.setattr(demo, "NUM_DEMONSTRATIONS", 4000)
    demo.prepare(tmp_path, config.load("demo", [f"model.path={tmp_path}/start"]))
    held_out = [r["problem"] for r in rows(tmp_path / "held_out.jsonl")]
    for name in ("problems.jsonl", "demonstrations.jsonl"):
        problems = [r["problem"] for r in rows(tmp_path / name)]
        assert find(problems, held_out) == []


# --- real sets --------------------------------------------------------------------------------


def real(name):
    path = DATA / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"no {name} in RLSP_FAST_DATA")
    return [row.get("problem") or row["question"] for row in rows(path)]


def test_aime_problems_that_stand_in_math500_are_found():
    train, evaluation = real("aime_1983_2023_train"), real("math500_test")
    found = {o.why: [] for o in find(train, evaluation)}
    for o in find(train, evaluation):
        found[o.why].append(o)
    assert len(found["exact"]) == 6 and len(found["ngram"]) <= 4
    assert any(tokens(train[o.train]) != tokens(evaluation[o.evaluation]) for o in found["ngram"])


@pytest.mark.parametrize(
    "train, evaluation, most",
    [
        ("gsm8k_train", "gsm8k_test", 0),
        ("aime_1983_2023_train", "aime24_test", 0),
        ("math12k_train_no_math500", "math500_test", 25),
    ],
)
def test_real_sets_that_are_apart_are_not_flooded(train, evaluation, most):
    found = find(real(train), real(evaluation))
    assert len(found) <= most and not [o for o in found if o.why in ("exact", "reworded")]


def test_every_evaluation_problem_is_found_in_disguise():
    evaluation = real("math500_test")
    rng = np.random.default_rng(0)
    disguised = [f"Exercise {rng.integers(9)}: {e} Explain your steps." for e in evaluation]
    found = find([*real("gsm8k_train")[:2000], *disguised], evaluation)
    long = {2000 + i for i, e in enumerate(evaluation) if len(set(tokens(e)) - {*"{}"}) >= 13}
    assert long <= {o.train for o in found} and all(o.train >= 2000 for o in found)


def test_a_missing_evaluation_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        clean([str(tmp_path / "a.jsonl")], [str(tmp_path / "b.jsonl")], tmp_path / "o.jsonl")
