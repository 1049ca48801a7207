"""The command line as a person meets it: the verbs, a whole run, and every mistake a new user makes.

Runs use the transformers engine where vLLM is not the point: it starts in no time.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_lm import make_tiny

from rlsp_fast.__main__ import main
from rlsp_fast.train import DivergedError, check_finite

ROOT = Path(__file__).parent.parent


def environment(**extra):
    path = f"{ROOT / 'kernels'}{os.pathsep}{ROOT}"
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | extra


def rlsp(*words, cwd):
    """The command line in this process (imports take most of a short run), its output captured."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # argparse: --help
            code = stop.code or 0
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, problems, demonstrations and a recipe that runs in seconds."""
    folder = tmp_path_factory.mktemp("home")
    make_tiny(folder)
    sums = [(a, b) for a in range(6) for b in range(6)]
    rows = [{"problem": f"Calculate {a} + {b} .", "answer": str(a + b)} for a, b in sums]
    write(folder / "problems.jsonl", rows)
    write(folder / "held_out.jsonl", rows[:8])
    shown = [{"problem": r["problem"], "response": f" \\boxed{{{r['answer']}}}"} for r in rows]
    write(folder / "demonstrations.jsonl", shown)
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


RECIPE = """
[model]
path = "model"
dtype = "float32"
[data]
train = ["problems.jsonl"]
validation = ["held_out.jsonl"]
overlap = "allow"
template = "{problem}"
max_prompt_length = 32
[rollout]
engine = "transformers"
n = 2
max_response_length = 8
[reward]
length_c = 2
exploration_min = -1.0
[optim]
actor_lr = 1e-3
critic_lr = 1e-3
[train]
steps = 3
batch_size = 8
mini_batch_size = 4
critic_warmup_steps = 1
max_tokens_per_micro_batch = 64
[sft]
train = ["demonstrations.jsonl"]
validation = ["demonstrations.jsonl"]
steps = 4
batch_size = 8
lr = 1e-3
max_length = 48
[output]
save_every = 1
rollouts_every = 1
"""


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(done, *parts, code=2):
    """One message, no traceback of ours, the right exit code."""
    output = done.stdout + done.stderr
    assert done.returncode == code, output[-3000:]
    assert "Traceback" not in output, output[-3000:]
    message = [line for line in done.stderr.splitlines() if line.startswith("rlsp: ")]
    assert len(message) == 1, done.stderr[-2000:]
    for part in parts:
        assert part in done.stderr, done.stderr[-2000:]


# --- the verbs --------------------------------------------------------------------------------


def test_help_lists_the_verbs(tmp_path):
    out = rlsp("--help", cwd=tmp_path).stdout
    for verb in ("run", "sft", "train", "eval", "demo", "report", "verify", "config"):
        assert f"\n    {verb} " in out


def test_dry_run_prints_a_config_that_loads_again_and_touches_nothing(home, tmp_path):
    done = rlsp("run", home / "recipe.toml", "train.steps=7", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0 and "steps = 7" in done.stdout
    (tmp_path / "again.toml").write_text(done.stdout)
    assert rlsp("run", "again.toml", "--dry-run", cwd=tmp_path).stdout == done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["again.toml"]


def test_a_whole_run_writes_what_it_says_and_its_checkpoint_loads(home, tmp_path):
    done = rlsp("run", "recipe.toml", f"output.dir={tmp_path}/out", cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "out"
    for stage in ("before SFT", "after SFT", "after RL"):
        assert f"{stage}: accuracy" in done.stdout and stage in (out / "report.md").read_text()
    assert "step 3/3" in done.stdout and "left" in done.stdout
    steps = rows(out / "metrics.jsonl")
    assert [r["step"] for r in steps] == [1, 2, 3]
    for name in (
        "critic/score/mean", "critic/vf_explained_var", "actor/ref_kl", "response_length/mean",
        "timing_s/gen", "timing_s/update_weights", "perf/throughput", "training/rollout_probs_diff_max",
    ):  # fmt: skip
        assert all(name in r for r in steps), name
    assert "actor/pg_clipfrac" not in steps[0] and "actor/pg_clipfrac" in steps[1]  # the first step warms the critic up
    assert all(r["training/rollout_probs_diff_mean"] < 1e-5 for r in steps)
    assert (out / "curves.png").stat().st_size > 10_000
    records = rows(out / "rollouts" / "step_3.jsonl")
    assert len(records) == 16
    for r in records:
        assert r["reward"] == pytest.approx(0.8 * r["outcome"] + 0.2 * r["exploration"])
        assert r["exploration"] == pytest.approx(max(-1.0, -2 / r["num_tokens"]))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(out / "huggingface" / "step_3")
    AutoModelForCausalLM.from_pretrained(out / "huggingface" / "step_3")
    again = rlsp("eval", "recipe.toml", f"model.path={out}/sft/huggingface", f"output.dir={tmp_path}/eval", cwd=home)
    assert again.returncode == 0 and "evaluation: accuracy" in again.stdout, again.stderr[-2000:]


@pytest.mark.parametrize("advantage", ["grpo", "rloo", "reinforce_plus_plus"])
def test_algorithms_without_a_critic_run_on_the_same_loop(home, tmp_path, advantage):
    done = rlsp(
        "train", "recipe.toml", f"algorithm.advantage={advantage}", "algorithm.kl_loss_coef=0.01", "algorithm.tis_cap=2",
        "algorithm.dual_clip=3", "algorithm.loss_aggregation=sequence_mean", "train.epochs=2", "data.validation=[]",
        f"output.dir={tmp_path}/out", cwd=home,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    steps = rows(tmp_path / "out" / "metrics.jsonl")
    assert len(steps) == 3 and "critic/vf_loss" not in steps[0] and "actor/kl_loss" in steps[0]


def test_a_users_own_reward_function_is_what_ppo_sees(home, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n"
        "    return {'score': 0.25, 'acc': True, 'length': len(solution_str)}\n"
    )
    done = rlsp(
        "train", "recipe.toml", f"reward.function={tmp_path}/mine.py:compute_score", "data.validation=[]",
        "train.steps=1", f"output.dir={tmp_path}/out", cwd=home,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (step,) = rows(tmp_path / "out" / "metrics.jsonl")
    assert step["critic/score/mean"] == 0.25 and step["reward/accuracy"] == 1.0 and step["reward/length"] > 0


# --- stopping and going on --------------------------------------------------------------------


def test_a_resumed_run_takes_the_same_steps_as_one_that_never_stopped(home, tmp_path):
    common = ("train", "recipe.toml", "data.validation=[]", "optim.schedule=constant")
    whole = rlsp(*common, "train.steps=4", f"output.dir={tmp_path}/whole", cwd=home)
    assert whole.returncode == 0, whole.stderr[-3000:]
    for steps in (2, 4):
        part = rlsp(*common, f"train.steps={steps}", f"output.dir={tmp_path}/part", cwd=home)
        assert part.returncode == 0, part.stderr[-3000:]
    assert "continuing" in part.stdout and "train.steps: 2 -> 4" in part.stdout
    for a, b in zip(rows(tmp_path / "whole/metrics.jsonl"), rows(tmp_path / "part/metrics.jsonl"), strict=True):
        for name in ("critic/score/mean", "actor/pg_loss", "actor/grad_norm", "critic/vf_loss", "actor/ref_kl"):
            assert a.get(name, 0.0) == pytest.approx(b.get(name, 0.0), rel=1e-5, abs=1e-9), (a["step"], name)


def test_a_run_cut_short_after_its_last_save_still_ends_with_its_results(home, tmp_path):
    words = ("run", "recipe.toml", "train.steps=2", f"output.dir={tmp_path}/out")
    assert rlsp(*words, cwd=home).returncode == 0
    out = tmp_path / "out"
    evaluations = (out / "eval.jsonl").read_text()
    (out / "eval.jsonl").write_text(
        "".join(evaluations.splitlines(keepends=True)[:2]) + '{"stage": "aft'
    )  # killed before the last one
    shutil.rmtree(out / "huggingface")
    assert rlsp(*words, cwd=home).returncode == 0
    assert [r["stage"] for r in rows(out / "eval.jsonl")] == ["before SFT", "after SFT", "after RL"]
    assert rows(out / "eval.jsonl")[2] == json.loads(evaluations.splitlines()[2])  # and the result is the same
    assert (out / "huggingface/step_2/config.json").exists()
    assert [r["step"] for r in rows(out / "metrics.jsonl")] == [1, 2]


def test_train_after_sft_in_one_folder_starts_from_the_sft_checkpoint(home, tmp_path):
    where = f"output.dir={tmp_path}/out"
    assert rlsp("sft", "recipe.toml", where, "sft.lr=1e-2", cwd=home).returncode == 0
    done = rlsp("train", "recipe.toml", where, "sft.lr=1e-2", "train.steps=1", cwd=home)
    assert done.returncode == 0 and "continuing" in done.stdout and "the SFT checkpoint" in done.stdout
    (step,) = rows(tmp_path / "out" / "metrics.jsonl")
    assert abs(step["actor/ref_kl"]) < 1e-6, "the reference is the policy that RL starts from"


def test_eval_judges_the_model_it_is_given_and_leaves_the_run_in_the_folder_alone(home, tmp_path):
    where = f"output.dir={tmp_path}/out"
    assert rlsp("train", "recipe.toml", where, "train.steps=1", cwd=home).returncode == 0
    before = (tmp_path / "out" / "config.toml").read_text()
    for _ in range(2):
        done = rlsp("eval", "recipe.toml", where, "rollout.temperature=0.5", cwd=home)
        assert done.returncode == 0 and "evaluation: accuracy" in done.stdout
    assert (tmp_path / "out" / "config.toml").read_text() == before


def test_what_a_run_began_with_cannot_change_under_it(home, tmp_path):
    words = ("train", "recipe.toml", "train.steps=1", "data.validation=[]", f"output.dir={tmp_path}/out")
    assert rlsp(*words, cwd=home).returncode == 0
    refused(rlsp(*words, "algorithm.advantage=grpo", cwd=home), "algorithm.advantage", "'gae'")


def test_numbers_that_are_none_stop_the_run_before_they_are_saved():
    with pytest.raises(DivergedError, match="step 3: actor/grad_norm = nan.*Nothing of this step is saved"):
        check_finite({"actor/pg_loss": 0.1, "actor/grad_norm": float("nan")}, "step 3")


def test_ctrl_c_saves_and_the_same_command_continues(home, tmp_path):
    words = ["train", "recipe.toml", "data.validation=[]", "train.steps=40", "output.save_every=0"]
    command = [sys.executable, "-m", "rlsp_fast", *words, f"output.dir={tmp_path}/out"]
    running = subprocess.Popen(
        command, cwd=home, env=environment(PYTHONUNBUFFERED="1"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in running.stdout:
        if line.startswith("step 2/"):
            break
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=120)
    assert running.returncode == 130 and "Traceback" not in err, err[-3000:]
    assert "saved in" in err and "The same command continues" in err
    done = rows(tmp_path / "out" / "metrics.jsonl")[-1]["step"]
    assert 2 <= done < 40 and (tmp_path / f"out/checkpoints/step_{done}/complete.json").exists()
    again = rlsp(*words, f"train.steps={done + 1}", f"output.dir={tmp_path}/out", cwd=home)
    assert again.returncode == 0 and f"step {done + 1}/{done + 1}" in again.stdout, again.stderr[-3000:]
    assert [r["step"] for r in rows(tmp_path / "out" / "metrics.jsonl")] == list(range(1, done + 2))


def test_a_detector_stops_the_run_saved_and_the_same_command_continues_past_it(home, tmp_path):
    (tmp_path / "mine.toml").write_text(
        'warn = ["kl_collapse"]\nstop = ["no_behaviour"]\n[detectors.no_behaviour]\nwindow = 4\nafter = 1\nrate = 1.0\n'
    )
    words = ("train", "recipe.toml", "data.validation=[]", "train.steps=6", "output.save_every=0")
    words = (*words, f"train.monitors={tmp_path}/mine.toml", f"output.dir={tmp_path}/out")
    stopped = rlsp(*words, cwd=home)
    refused(stopped, "no_behaviour: stopped after RL step 4 of 6; saved in", "The same command continues", code=4)
    assert (tmp_path / "out/checkpoints/step_4/complete.json").exists()
    assert "no_behaviour at step 4: no emergent behaviour after 1 steps: behaviour/any 0 in steps 1-4. " in stopped.stdout
    again = rlsp(*words, cwd=home)
    assert again.returncode == 0 and "step 6/6" in again.stdout, again.stderr[-3000:]
    assert "no emergent behaviour" not in again.stdout.partition("step 6/6")[0], "the episode was said before"
    (alarm,) = rows(tmp_path / "out" / "warnings.jsonl")
    assert (alarm["step"], alarm["detector"], alarm["stops"]) == (4, "no_behaviour", True)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "- **no_behaviour** at step 4: " in report and "| any emergent | 0.0 % | 0.0 % |" in report
    assert all(r["behaviour/any"] == 0 and 0 <= r["response/repetition"] < 1 for r in rows(tmp_path / "out" / "metrics.jsonl"))


# --- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override, parts",
    [
        ("train.bach_size=8", ("train.bach_size", "train.batch_size")),
        ("train.mini_batch_size=3", ("train.mini_batch_size = 3", "train.batch_size = 8")),
        ("train.steps=many", ("train.steps", "many")),
        ("algorithm.lam=1.5", ("algorithm.lam", "1.5")),
        ("data.train=nowhere.jsonl", ("nowhere.jsonl",)),
        ("data.answer_key=solutoin", ("solutoin", "answer")),
        ("data.prompt_key=question", ("question", "problem")),
        ("model.path=./no/such/model", ("model.path", "./no/such/model")),
        ("model.path=nobody/no-such-model", ("model.path", "nobody/no-such-model")),
        ("data.max_prompt_length=2", ("data.max_prompt_length",)),
        ("rollout.max_response_length=1000", ("rollout.max_response_length", "1032")),
        ("model.attention=flash_attn", ("model.attention",)),
        ("reward.function=mine.py:compute_score", ("reward.function", "mine.py")),
        ("output.loggers=wandb", ("output.loggers", "pip install wandb")),
        ("train.monitors=nowhere.toml", ("train.monitors", "nowhere.toml")),
        ("train.steps=0", ("train.steps",)),
        ("output.dir=problems.jsonl/out", ("output.dir", "problems.jsonl/out")),
        ("rollout.tensor_parallel_size=2", ("rollout.tensor_parallel_size",)),
    ],
)
def test_a_mistake_gets_one_message_that_names_it(home, tmp_path, override, parts):
    extra = ["train.max_tokens_per_micro_batch=2000"] if "1000" in override else []
    done = rlsp("train", "recipe.toml", f"output.dir={tmp_path}/out", override, *extra, cwd=home)
    refused(done, *parts)


@pytest.mark.parametrize("option", ["--workers", "--timeout"])
def test_a_limit_of_the_verifier_that_is_none_is_refused(tmp_path, option):
    done = rlsp("verify", "in.jsonl", option, "0", cwd=tmp_path)
    assert done.returncode == 2 and f"argument {option}: want more than 0, got 0" in done.stderr


def test_an_unknown_recipe_is_named_with_the_nearest(tmp_path):
    refused(rlsp("run", "demmo", cwd=tmp_path), "demmo", "demo")


@pytest.mark.parametrize(
    "content, parts",
    [
        ("", ("empty",)),
        ('{"problem": "1 + 1", "answer": ""}\n', ("answer", "1")),
        ('{"problem": "1 + 1", "answer": "2"}\n{"problem": "1 + 2"}\n', ("answer", "2")),
        ('{"problem": "1 + 1", "answer": "2"}\nnot json\n', ("2",)),
    ],
    ids=["empty file", "empty answer", "no answer", "not JSON"],
)
def test_a_bad_problem_file_is_named_with_the_line(home, tmp_path, content, parts):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    refused(rlsp("train", "recipe.toml", f"data.train={path}", f"output.dir={tmp_path}/out", cwd=home), "bad.jsonl", *parts)


def test_more_ranks_than_responses_is_refused_before_anything_loads(home, tmp_path):
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rlsp_fast",
            "train", "recipe.toml", "train.batch_size=1", "train.mini_batch_size=1", f"output.dir={tmp_path}/out",
        ],
        cwd=home, env=environment(), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("rlsp: ") == 1 and "train.batch_size = 1 problems for 2 ranks" in done.stderr


def test_a_folder_with_a_run_is_refused_when_resuming_is_off(home, tmp_path):
    words = ("train", "recipe.toml", "train.steps=1", "data.validation=[]", f"output.dir={tmp_path}/out")
    assert rlsp(*words, cwd=home).returncode == 0
    refused(rlsp(*words, "output.resume=never", cwd=home), "output.resume", "output.dir")


def test_weights_that_are_not_the_trainers_stop_the_run_with_what_was_seen(home, tmp_path):
    done = rlsp(
        "train", "recipe.toml", "rollout.max_probs_diff=1e-12", "data.validation=[]", f"output.dir={tmp_path}/out", cwd=home
    )
    refused(done, "rollout.max_probs_diff", "step 1", code=3)


def test_importing_the_kernels_needs_nothing_of_the_trainer():
    heavy = ("rlsp_fast", "vllm", "transformers")
    code = f"import sys, rlsp_kernels; print([m for m in sys.modules if m.split('.')[0] in {heavy}])"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
