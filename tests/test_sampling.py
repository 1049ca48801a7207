"""Dynamic sampling: problems whose responses are all right or all wrong count less, are dropped, or are replaced.

Whether a response is right is decided by a checksum of its text, so that a random model is right now and then.
"""

import subprocess
import sys

import pytest
import tiny
import two_ranks
from test_cli import environment, home, rlsp, rows, write  # noqa: F401  (home is a fixture)

from rlsp_fast.config import ConfigError

FUNCTION = """
from zlib import crc32
def compute_score(data_source, solution_str, ground_truth, extra_info):
    right = {rule}
    return {{"score": float(right), "acc": right}}
"""
RULES = {"some": "crc32(solution_str.encode()) % 4 == 0", "rare": "crc32(solution_str.encode()) % 50 == 0"}
STILL = "optim.critic_lr=1e-9"  # what the first mini-batch teaches does not show in the loss of the second
RULES |= {"all": "True", "none": "False"}
SAME = ("critic/score/mean", "reward/accuracy", "response_length/mean", "actor/pg_loss", "actor/grad_norm", "critic/vf_loss")
SAMPLING = tuple(f"sampling/{name}" for name in ("problems", "all_right", "all_wrong", "kept", "downweighted", "rounds"))


@pytest.fixture
def words(home, tmp_path):  # noqa: F811
    """words(rule, mode, name, *overrides): a command line whose run goes to tmp_path/name."""

    def make(rule, mode, name, *overrides):
        path = tmp_path / f"{rule}.py"
        path.write_text(FUNCTION.format(rule=RULES[rule]))
        return (
            "train", str(home / "recipe.toml"), f"model.path={home / 'model'}", f"data.train={home / 'problems.jsonl'}",
            "data.validation=[]", f"reward.function={path}:compute_score", f"rollout.dynamic_sampling={mode}",
            "optim.schedule=constant", "train.critic_warmup_steps=0", f"output.dir={tmp_path / name}", *overrides,
        )  # fmt: skip

    return make


@pytest.fixture
def run(words, tmp_path):
    """run(rule, mode, name, *overrides): its metrics, and the written responses of each step."""

    def go(rule, mode, name, *overrides):
        done = rlsp(*words(rule, mode, name, *overrides), cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        metrics = rows(tmp_path / name / "metrics.jsonl")
        responses = [rows(tmp_path / name / "rollouts" / f"step_{row['step']}.jsonl") for row in metrics]
        return metrics, responses, done.stdout

    return go


def groups(responses, n=2):
    """Per problem of a step, in the order generated on one rank: its index and how many of its n responses are right."""
    parts = [responses[i : i + n] for i in range(0, len(responses), n)]
    assert all(len({r["index"] for r in part}) == 1 for part in parts)
    return [(part[0]["index"], sum(r["correct"] for r in part)) for part in parts]


def test_drop_trains_on_the_mixed_problems_alone_and_counts_the_others(run):
    metrics, responses, _ = run("some", "drop", "out")
    off, off_responses, _ = run("some", "off", "off")
    assert any(row["sampling/kept"] < 8 for row in metrics) and all(row["sampling/kept"] > 0 for row in metrics)
    for row, step in zip(metrics, responses, strict=True):
        rights = [right for _, right in groups(step)]
        assert [row[name] for name in SAMPLING] == [8, rights.count(2), rights.count(0), rights.count(1), 0, 1]
        assert row["reward/accuracy"] == pytest.approx(sum(rights) / 16)  # of everything generated
    assert responses[0] == off_responses[0] and off[0]["sampling/kept"] == 8
    assert metrics[0]["sampling/all_wrong"] == off[0]["sampling/all_wrong"]  # counted when nothing is dropped, too
    assert metrics[0]["actor/pg_loss"] != off[0]["actor/pg_loss"]


def test_downweight_keeps_every_problem_and_counts_those_that_weigh_less(run):
    options = ("rollout.sampling_weight=0.5", "train.steps=1")
    (row,), (step,), _ = run("some", "downweight", "half", *options)
    (off,), _, _ = run("some", "off", "off", "train.steps=1")
    rights = [right for _, right in groups(step)]
    less = rights.count(2) + rights.count(0)
    assert [row[name] for name in SAMPLING] == [8, rights.count(2), rights.count(0), 8, less, 1] and 0 < less < 8
    assert off["sampling/downweighted"] == 0 and off["critic/vf_loss"] > row["critic/vf_loss"] > 0
    (whole,), _, _ = run("some", "downweight", "whole", "rollout.sampling_weight=1", "train.steps=1")
    assert [whole[name] for name in SAME] == [off[name] for name in SAME], "at weight 1 it is no dynamic sampling"


def test_a_step_of_problems_that_all_weigh_less_still_trains_but_loses_less(run):
    losses = []
    for weight in (1, 0.25):
        (row,), _, _ = run("all", "downweight", f"w{weight}", f"rollout.sampling_weight={weight}", "train.steps=1", STILL)
        assert row["sampling/kept"] == row["sampling/downweighted"] == row["sampling/all_right"] == 8
        losses.append(row["critic/vf_loss"])
    assert losses[1] == pytest.approx(0.25 * losses[0], rel=1e-5)


def test_refill_generates_until_the_batch_is_full_and_tries_no_problem_twice(run):
    metrics, responses, _ = run("some", "refill", "out")
    _, off_responses, _ = run("some", "off", "off", "train.steps=1")
    assert all(row["sampling/kept"] == 8 and row["sampling/rounds"] > 1 for row in metrics)
    for row, step in zip(metrics, responses, strict=True):
        tried = groups(step)
        assert len(tried) == row["sampling/problems"] == len({index for index, _ in tried})
        assert sum(right == 1 for _, right in tried) >= 8
    assert responses[0][:16] == off_responses[0]  # the first round is the step that any run with this seed has
    assert {i for i, _ in groups(responses[0][16:])} != {i for i, _ in groups(responses[1][16:])}


def test_refill_stops_at_the_limit_of_rounds_and_at_the_end_of_the_problems(run, home, tmp_path):  # noqa: F811
    (row,), _, _ = run("rare", "refill", "two", "rollout.sampling_rounds=2", "train.steps=1")
    assert row["sampling/rounds"] == 2 and row["sampling/problems"] == 16 and row["sampling/kept"] < 8
    write(tmp_path / "ten.jsonl", rows(home / "problems.jsonl")[:10])
    ten = ("rollout.sampling_rounds=9", "train.steps=1", f"data.train={tmp_path}/ten.jsonl")
    (row,), (step,), _ = run("rare", "refill", "ten", *ten)
    assert row["sampling/rounds"] == 2 and sorted(i for i, _ in groups(step)) == list(range(10))


@pytest.mark.parametrize(
    "rule, mode, counted", [("all", "drop", "sampling/all_right"), ("none", "refill", "sampling/all_wrong")]
)
def test_a_step_that_keeps_nothing_updates_nothing_and_says_so(run, home, tmp_path, rule, mode, counted):  # noqa: F811
    metrics, _, said = run(rule, mode, "out", "rollout.sampling_rounds=2", "train.steps=2")
    for row in metrics:
        assert row["sampling/kept"] == 0 and row[counted] == row["sampling/problems"] and "actor/pg_loss" not in row
        assert row["reward/accuracy"] == (rule == "all") and row["perf/throughput"] > 0
    assert "step 2 updates nothing" in said and (tmp_path / "out" / "curves.png").exists()
    from safetensors.torch import load_file

    start, end = (load_file(p / "model.safetensors") for p in (home / "model", tmp_path / "out/huggingface/step_2"))
    assert all(start[name].equal(end[name].to(start[name].dtype)) for name in start)


def test_a_step_that_keeps_nothing_is_followed_by_steps_that_train(run):
    metrics, _, _ = run("rare", "drop", "out", "train.steps=8")
    kept = [row["sampling/kept"] for row in metrics]
    assert 0 in kept and any(kept[kept.index(0) :])
    for row in metrics:
        assert ("actor/pg_loss" in row) == (row["sampling/kept"] > 0)
        assert row.get("training/rollout_probs_diff_mean", 0) < 1e-5


def test_a_resumed_run_draws_and_keeps_the_same_problems(run):
    whole, responses, _ = run("some", "refill", "whole", "train.steps=4")
    run("some", "refill", "part", "train.steps=2")
    part, again, _ = run("some", "refill", "part", "train.steps=4")
    for a, b in zip(whole, part, strict=True):
        assert [a[name] for name in SAMPLING] == [b[name] for name in SAMPLING]
        assert [a[name] for name in SAME] == pytest.approx([b[name] for name in SAME], rel=1e-5, abs=1e-9)
    assert again[3] == responses[3]


@pytest.mark.parametrize("mode", ["refill", "downweight"])
def test_two_ranks_keep_and_learn_what_one_does(words, run, tmp_path, mode):
    options = ("rollout.sampling_rounds=3", "train.steps=2")
    one, responses, _ = run("some", mode, "one", *options)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rlsp_fast"]
    done = subprocess.run(
        [*command, *words("some", mode, "two", *options)],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for a, b in zip(one, rows(tmp_path / "two" / "metrics.jsonl"), strict=True):
        assert [a[name] for name in SAMPLING] == [b[name] for name in SAMPLING]
        assert (a["sampling/rounds"] > 1) == (mode == "refill") and (a["sampling/downweighted"] > 0) == (mode != "refill")
        names = [name for name in SAME if name in a]
        assert [a[name] for name in names] == pytest.approx([b[name] for name in names], rel=1e-4, abs=2e-6)
    key = lambda r: (r["index"], r["sample"], r["output"])  # noqa: E731
    assert sorted(responses[1], key=key) == sorted(rows(tmp_path / "two/rollouts/step_2.jsonl"), key=key)


@pytest.fixture(scope="module")
def ppo(tmp_path_factory, device):
    path = tiny.save_model(tmp_path_factory.mktemp("models"), "qwen2-tied")
    return two_ranks.build(two_ranks.recipe(path, {}), (path, path), device)[0]


@pytest.mark.parametrize("kept, sizes", [(4, [2, 2]), (3, [1, 2]), (1, [1]), (0, []), (5, [1, 2, 2])])
def test_what_is_kept_is_spread_over_mini_batches_of_near_equal_size(ppo, kept, sizes):
    samples = tiny.samples(kept, n=3)
    mini_batches = ppo.pack(samples)  # of at most 2 problems
    assert [len({g for m in part for g in m.group}) for part in mini_batches] == sizes
    lengths = sorted(length for part in mini_batches for m in part for length in m.batch.lengths)
    assert lengths == sorted(s.num_positions for s in samples)
    for part in mini_batches:
        assert sum(m.weight_T.sum().item() for m in part) == pytest.approx(1.0)  # a mean over the mini-batch's own tokens


def test_dynamic_sampling_of_single_responses_is_refused():
    for mode in ("downweight", "drop", "refill"):
        with pytest.raises(ConfigError, match=f"dynamic_sampling = {mode} .* want rollout.n >= 2, got 1"):
            tiny.recipe("m", rollout={"dynamic_sampling": mode, "n": 1})
    assert tiny.recipe("m", rollout={"dynamic_sampling": "drop", "n": 2}).rollout.sampling_rounds == 4


@pytest.mark.parametrize("weight", [0, 1.5, -1])
def test_a_weight_out_of_bounds_is_refused_by_name(weight):
    with pytest.raises(ConfigError, match=f"rollout.sampling_weight = {weight}: want .* 1"):
        tiny.recipe("m", rollout={"dynamic_sampling": "downweight", "n": 2, "sampling_weight": weight})
