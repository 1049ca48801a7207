"""Steps that end before their longest response: what is left is carried, continued, trained on once, and told apart.

One vLLM a process: the module shares an engine.
"""

import importlib.util
import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny
import torch
import two_ranks
from test_cli import environment, rlsp, rows, write
from test_rollout import changed, trainer_logprobs
from tiny_lm import make_tiny

from rlsp_fast import config as configs
from rlsp_fast import data, dist, model, sync
from rlsp_fast.config import ConfigError
from rlsp_fast.log import Timer
from rlsp_fast.memory import Colocated
from rlsp_fast.pending import Pending
from rlsp_fast.rollout import MAX_CARRIES, Sampling, TransformersEngine, VLLMEngine
from rlsp_fast.types import Group, Rollout

HAS_VLLM = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")
NUM_PROBLEMS, LONGEST = 24, 32


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model whose responses are of all lengths, problems and a recipe."""
    folder = tmp_path_factory.mktemp("home")
    path = make_tiny(folder)
    vocab_size = json.loads((path / "config.json").read_text())["vocab_size"]
    ends = list(range(0, vocab_size, 16))  # a token in 16 ends a response
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    write(folder / "problems.jsonl", [{"problem": f"Calculate {i} + 1 .", "answer": str(i + 1)} for i in range(NUM_PROBLEMS)])
    (folder / "recipe.toml").write_text(RECIPE.format(home=folder))
    return folder


RECIPE = f"""
[model]
path = "{{home}}/model"
dtype = "float32"
[data]
train = ["{{home}}/problems.jsonl"]
template = "{{{{problem}}}}"
max_prompt_length = 224
[rollout]
engine = "transformers"
n = 2
temperature = 1.3
max_response_length = {LONGEST}
max_num_seqs = 20
oversample = 1.5
[optim]
actor_lr = 1e-2
critic_lr = 1e-2
schedule = "constant"
[train]
steps = 4
batch_size = 6
mini_batch_size = 3
critic_warmup_steps = 0
[output]
save_every = 0
loggers = []
"""


@pytest.fixture(scope="module")
def config(home):
    return configs.load(str(home / "recipe.toml"))


@pytest.fixture(scope="module")
def tokenizer(config):
    return model.load_tokenizer(config.model.path)


@pytest.fixture(scope="module")
def problems(config, tokenizer):
    return data.render(data.load_problems(config.data.train, config.data), tokenizer, config.data)[0]


@pytest.fixture(scope="module")
def device():
    """Not taken back afterwards: vLLM gives its groups back when the process ends."""
    torch.set_num_threads(1)
    return dist.setup()


@pytest.fixture(scope="module")
def policy(config, device):
    return model.build(model.Policy, config.model, config.model.path, device, dist.mesh(device))


@pytest.fixture(scope="module", params=[pytest.param("vllm", marks=needs_vllm), "transformers"])
def engine(request, config, tokenizer, policy, device):
    kind = {"vllm": VLLMEngine, "transformers": TransformersEngine}[request.param]
    engine = Colocated(lambda: kind(config, config.model.path, tokenizer, device))
    sync.push(policy, engine, torch.float32)
    return engine


def sampling(**changes):
    return Sampling(**{"n": 2, "temperature": 1.3, "top_p": 1.0, "max_tokens": LONGEST, "seed": 3} | changes)


def fresh(problems):
    return {i: Group(problem=p, position=i) for i, p in enumerate(problems)}


def responses(groups):
    return [r for group in groups.values() for r in group.responses]


# --- engines ----------------------------------------------------------------------------------------


def test_an_engine_stops_when_enough_groups_are_complete_and_hands_back_the_rest(engine, problems):
    finished = []
    taken, left = engine.generate_until(fresh(problems[:8]), sampling(), enough=4, on_finish=finished.append)
    assert len(taken) == 4 and sorted([*taken, *left]) == list(range(8))
    assert all(r.finish in ("stop", "length") and r.num_carried == 0 for r in responses(taken))
    unfinished = [r for r in responses(left) if r.finish == "unfinished"]
    assert unfinished and any(r.response_ids for r in unfinished)  # it was under way, and is kept
    assert all(len(r.response_ids) == len(r.rollout_logprob) < LONGEST for r in unfinished)
    assert all(group.num_carries == 1 for group in left.values()) and all(g.num_carries == 0 for g in taken.values())
    assert sorted(map(id, finished)) == sorted(id(r) for r in responses(taken | left) if r.finish != "unfinished")


def test_what_was_left_begins_as_the_same_problem_would_have_gone_on(engine, problems):
    """Sampled by slot and seed alone: the tokens so far are those of a call that waits for all."""
    taken, left = engine.generate_until(fresh(problems[:8]), sampling(), enough=4)
    whole = engine.generate(problems[:8], sampling(), slots=range(8))
    for slot, group in (taken | left).items():
        for k, r in enumerate(group.responses):
            truth = whole[2 * slot + k]
            assert r.response_ids == truth.response_ids[: len(r.response_ids)]
            assert r.rollout_logprob == pytest.approx(truth.rollout_logprob[: len(r.response_ids)], abs=1e-5)
            assert r.finish == "unfinished" or r == truth


def test_continued_responses_keep_their_tokens_and_agree_with_the_trainer_under_the_same_weights(engine, policy, problems):
    _, left = engine.generate_until(fresh(problems[:8]), sampling(), enough=4)
    done, none = engine.generate_until(left, sampling(seed=4), enough=4)
    assert not none and done.keys() == left.keys()
    assert any(0 < r.num_carried < len(r.response_ids) for r in responses(done))
    for before, after in zip(responses(left), responses(done), strict=True):
        kept = len(before.response_ids)
        assert after.num_carried == kept and after.response_ids[:kept] == before.response_ids
        assert after.rollout_logprob[:kept] == before.rollout_logprob
        assert after.finish == ("stop" if after.response_ids[-1] in engine.engine.eos_ids else "length")
        assert len(after.response_ids) == LONGEST if after.finish == "length" else len(after.response_ids) <= LONGEST
    theirs = torch.tensor([p for r in responses(done) for p in r.rollout_logprob])
    torch.testing.assert_close(trainer_logprobs(policy, responses(done), 1.3), theirs, atol=1e-4, rtol=0)


def test_carrying_leaves_the_distribution_of_responses_as_it_is(engine, problems):
    """256 responses to one problem each way: what they look like differs by chance alone."""
    many = [replace(problems[0], index=i) for i in range(64)]
    whole = engine.generate(many, sampling(n=4, seed=8), slots=range(64))
    waiting, carried = list(fresh(many).values()), []
    for step in itertools.count(20):
        chosen = dict(enumerate(waiting[:4]))
        taken, left = engine.generate_until(chosen, sampling(n=4, seed=step), enough=(len(chosen) + 1) // 2)
        carried += responses(taken)
        waiting = [*left.values(), *waiting[4:]]
        if not waiting:
            break
    assert len(carried) == len(whole) == 256 and sum(0 < r.num_carried < len(r.response_ids) for r in carried) > 50
    for of in (
        lambda r: len(r.response_ids),
        lambda r: r.finish == "stop",
        lambda r: sum(r.response_ids) / len(r.response_ids),
    ):
        one, two = (torch.tensor([float(of(r)) for r in part]) for part in (whole, carried))
        error = math.sqrt(one.var() / 256 + two.var() / 256)
        assert abs(one.mean() - two.mean()) < 3.5 * error, (one.mean(), two.mean(), error)


def test_a_group_carried_as_often_as_is_allowed_is_waited_for(engine, problems):
    """The others lack one token each: without the rule the step would end after one."""
    almost = {slot: _nearly_done(problems[slot]) for slot in range(4)}
    for num_carries, waited in ((MAX_CARRIES - 1, False), (MAX_CARRIES, True)):
        late = Group(problem=problems[4], num_carries=num_carries)
        taken, left = engine.generate_until(almost | {4: late}, sampling(), enough=2)
        assert len(taken) == 2 and (4 in taken) == waited
    # What was complete too late counts in the next step, without another token.
    complete, none = engine.generate_until(left, sampling(), enough=3)
    assert not none and [r.response_ids for r in responses(complete)] == [r.response_ids for r in responses(left)]
    assert all(r.num_carried == len(r.response_ids) == LONGEST for r in responses(complete))


def _nearly_done(problem):
    nearly = {"response_ids": (7,) * (LONGEST - 1), "rollout_logprob": (-1.0,) * (LONGEST - 1), "finish": "unfinished"}
    return Group(problem=problem, responses=tuple(Rollout(problem=problem, sample=k, text="", **nearly) for k in range(2)))


def test_a_stop_string_across_the_border_of_two_steps_ends_the_response(engine, problems, tokenizer):
    """The stop string is the last carried token and the first new one together."""
    free = engine.generate(problems[:8], sampling(), slots=range(8))
    chosen = next(r for r in free if len(r.response_ids) > 8)
    at = 4
    carried = replace(
        chosen,
        sample=0,
        response_ids=chosen.response_ids[:at],
        rollout_logprob=chosen.rollout_logprob[:at],
        finish="unfinished",
    )
    group = Group(problem=chosen.problem, responses=(carried,), num_carries=1)
    (plain,) = engine.generate_until({0: group}, sampling(n=1, seed=5), enough=1)[0][0].responses
    stop = tokenizer.decode(plain.response_ids[at - 1 : at + 1])
    assert stop not in tokenizer.decode(plain.response_ids[:at]) and len(plain.response_ids) > at + 1
    (stopped,) = engine.generate_until({0: group}, sampling(n=1, seed=5, stop=(stop,)), enough=1)[0][0].responses
    assert stopped.finish == "stop" and stopped.response_ids == plain.response_ids[: at + 1]


def test_after_a_step_cut_short_the_engine_samples_from_the_weights_pushed_next(engine, policy, problems):
    """Requests that were cut short leave nothing in the prefix cache that survives the push."""
    _, left = engine.generate_until(fresh(problems[:8]), sampling(), enough=3)
    with changed(policy, lambda p: p.add_(0.05 * torch.randn_like(p))):
        sync.push(policy, engine, torch.float32)
        done, _ = engine.generate_until(left, sampling(seed=9), enough=len(left))
        theirs = torch.tensor([p for r in responses(done) for p in r.rollout_logprob])
        carried = torch.tensor([i < r.num_carried for r in responses(done) for i in range(len(r.response_ids))])
        ours = trainer_logprobs(policy, responses(done), 1.3)
    sync.push(policy, engine, torch.float32)
    torch.testing.assert_close(ours[~carried], theirs[~carried], atol=1e-4, rtol=0)
    assert (ours - theirs)[carried].abs().max() > 1e-2  # these keep what they were sampled with


def test_prompts_are_sampled_right_that_vllm_does_not_read_in_one_step(engine, policy, problems):
    """Carried responses make long prompts, all at once. On a CPU vLLM reads 4096 tokens a step."""
    long = [replace(p, prompt_ids=(p.prompt_ids * 28)[:220]) for p in problems[:20]]
    done, _ = engine.generate_until(fresh(long), sampling(n=1, max_tokens=4), enough=20)
    theirs = torch.tensor([p for r in responses(done) for p in r.rollout_logprob])
    torch.testing.assert_close(trainer_logprobs(policy, responses(done), 1.3), theirs, atol=1e-4, rtol=0)


def test_the_order_of_submission_changes_no_response(engine, problems):
    one = engine.generate(problems[:20], sampling(), slots=range(20))  # more than are decoded at once
    groups = {i: replace(group, expected=float(-i)) for i, group in fresh(problems[:20]).items()}
    groups |= {i: replace(groups[i], expected=100.0) for i in (3, 17)}
    taken, left = engine.generate_until(groups, sampling(), enough=20)
    assert not left and [r.response_ids for r in responses(taken)] == [r.response_ids for r in one]
    assert list(taken) == list(range(20))


# --- between steps ----------------------------------------------------------------------------------


def test_every_problem_begun_is_trained_on_once_in_the_order_of_the_data(engine, problems):
    pending, trained, begun = Pending(), [], set()
    for step in range(12):
        chosen = pending.take(problems, seed=1, step=step, batch_size=4, oversample=2)
        assert len(chosen) == 8
        taken, left = engine.generate_until(dict(enumerate(chosen)), sampling(seed=step), enough=4)
        pending.add(list(left.values()), {}, problems)
        trained += [group.position for group in taken.values()]
        begun.update((group.position, group.problem.index) for group in chosen)
        assert all(group.num_carries <= MAX_CARRIES for group in [*taken.values(), *pending.groups])
    in_order = data.batch(range(NUM_PROBLEMS), seed=1, start=0, size=12 * 4 + len(pending.groups))
    assert sorted(trained + [group.position for group in pending.groups]) == sorted(in_order)
    assert all(position == index for position, index in begun)


def test_expected_lengths_are_those_of_the_problem_else_of_all(problems):
    pending = Pending()
    assert {group.expected for group in pending.take(problems, seed=0, step=0, batch_size=4, oversample=1)} == {0.0}
    pending.add([], {0: 10.0, 1: 40.0}, problems)
    assert [group.expected for group in pending.begin(problems, [0, 1, 2])] == [10.0, 40.0, 25.0]


def test_what_is_pending_survives_a_file_and_a_changed_data_set_loses_what_it_no_longer_has(engine, problems, caplog):
    _, left = engine.generate_until(fresh(problems[:8]), sampling(), enough=4)
    pending = Pending()
    pending.add(list(left.values()), {3: 7.5}, problems)
    state = json.loads(json.dumps(pending.state()))
    again = Pending.restored(state, problems)
    assert again.groups == [replace(g, responses=tuple(replace(r, num_carried=0) for r in g.responses)) for g in pending.groups]
    assert again.lengths == {3: 7.5}
    gone = pending.groups[0].position
    changed = [replace(p, prompt_ids=(*p.prompt_ids, 5)) if i == gone else p for i, p in enumerate(problems)]
    assert [g.position for g in Pending.restored(state, changed).groups] == [g.position for g in pending.groups[1:]]
    assert "no longer in data.train" in caplog.text


def test_oversampling_turned_off_finishes_what_is_left_and_goes_on_where_the_data_is(problems):
    pending = Pending()
    first = pending.take(problems, seed=0, step=0, batch_size=4, oversample=2)
    pending.add([replace(group, num_carries=1) for group in first[4:]], {}, problems)
    second = pending.take(problems, seed=0, step=1, batch_size=4, oversample=1)
    third = pending.take(problems, seed=0, step=2, batch_size=4, oversample=1)
    positions = [group.position for group in (*first[:4], *second, *third)]
    assert positions == data.batch(range(NUM_PROBLEMS), seed=0, start=0, size=12)


def test_what_cannot_be_combined_is_refused():
    for oversample in (0.5, 2.5):
        with pytest.raises(ConfigError, match="rollout.oversample"):
            tiny.recipe("m", rollout={"oversample": oversample})
    with pytest.raises(ConfigError, match=r"rollout.oversample = 1.5 .* set rollout.oversample=1, or .*=drop"):
        tiny.recipe("m", rollout={"oversample": 1.5, "dynamic_sampling": "refill", "n": 2})
    assert tiny.recipe("m", rollout={"oversample": 1.5, "dynamic_sampling": "drop", "n": 2}).rollout.oversample == 1.5


# --- training ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ppo(tmp_path_factory, device):
    path = tiny.save_model(tmp_path_factory.mktemp("models"), "qwen2-tied")
    return two_ranks.build(two_ranks.recipe(path, {}), (path, path), device)[0]


def test_engine_and_trainer_are_compared_on_the_tokens_of_this_steps_weights_alone(ppo):
    samples = tiny.samples(4, n=3)
    plain = ppo.annotate(ppo.pack(samples), Timer())
    exact = [m for part in ppo.pack(samples) for m in part]
    ppo.annotate([exact], Timer())
    old = _by_response(exact, samples, "old_logprob_T")
    # The engine agrees on every token but the first, which is far off: as if older weights had sampled it.
    wrong = [replace(s, rollout_logprob=(-0.01, *row[1:])) for s, row in zip(samples, old, strict=True)]
    caught = ppo.annotate(ppo.pack(wrong), Timer())
    told = ppo.annotate(ppo.pack([replace(s, num_carried=1) for s in wrong]), Timer())
    assert caught["training/rollout_probs_diff_max"] > 0.1 and "rollout/carried_tokens" not in caught
    assert told["training/rollout_probs_diff_max"] < 1e-6 and abs(told["training/mismatch_kl"]) < 1e-6
    assert told["rollout/carried_tokens"] == len(samples) and told["rollout/carried_kl"] > 0.1
    same = ("critic/advantages/mean", "critic/returns/mean", "actor/ref_kl")
    assert [told[name] for name in same] == [plain[name] for name in same]
    carried = ppo.annotate(ppo.pack([replace(s, num_carried=len(s.response_ids)) for s in samples]), Timer())
    assert "training/rollout_probs_diff_mean" not in carried  # nothing to compare: not 0


def _by_response(micros, samples, name):
    """Rows of a per-token tensor in the order of samples, found by their tokens."""
    found = {}
    for m in micros:
        values, tokens = getattr(m, name)[m.batch.mask_T], m.batch.token_T[m.batch.mask_T]
        lengths = [int(part.sum()) for part in m.batch.mask_T.split(list(m.batch.lengths))]
        for row, ids in zip(values.split(lengths), tokens.split(lengths), strict=True):
            found[tuple(ids.tolist())] = tuple(row.tolist())
    return [found[s.response_ids] for s in samples]


SAME = ("critic/score/mean", "response_length/mean", "actor/pg_loss", "actor/grad_norm", "critic/vf_loss")
CARRIED = ("rollout/carried_tokens", "rollout/carries/mean", "rollout/carries/max", "rollout/problems_left")


@pytest.fixture
def run(home, tmp_path):
    """run(name, *overrides): metrics and written responses of each step."""

    def go(name, *overrides, ranks=1):
        words = ("train", str(home / "recipe.toml"), f"output.dir={tmp_path / name}", *overrides)
        if ranks == 1:
            done = rlsp(*words, cwd=tmp_path)
        else:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            done = subprocess.run(
                [*command, "-m", "rlsp_fast", *words],
                cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300,
            )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        metrics = rows(tmp_path / name / "metrics.jsonl")
        return metrics, [rows(tmp_path / name / "rollouts" / f"step_{row['step']}.jsonl") for row in metrics]

    return go


def assert_sound(metrics, written, steps):
    """Batches are whole, no problem comes twice in an epoch, and the engine is the trainer on fresh tokens."""
    assert len(metrics) == steps
    indices = [r["index"] for step in written for r in step if r["sample"] == 0]
    assert all(len(step) == 12 for step in written) and len(indices) == 6 * steps
    counts = [indices.count(i) for i in range(NUM_PROBLEMS)]
    begun = 6 * steps + metrics[-1]["rollout/problems_left"]
    assert max(counts) <= -(-begun // NUM_PROBLEMS)
    assert all(row["rollout/problems_left"] == 3 and row["rollout/carries/max"] <= MAX_CARRIES for row in metrics)
    assert sum(row.get("rollout/carried_tokens", 0) for row in metrics) > 20
    assert sum(r["carried"] for step in written for r in step) == sum(row.get("rollout/carried_tokens", 0) for row in metrics)
    assert all(row["training/rollout_probs_diff_max"] < 1e-4 for row in metrics)
    assert max(row.get("rollout/carried_kl", 0) for row in metrics) > 1e-4  # the weights did move under the carried tokens


@pytest.mark.parametrize("kind", [pytest.param("vllm", marks=needs_vllm), "transformers"])
def test_a_resumed_run_is_the_run_that_never_stopped(run, kind):
    engine = f"rollout.engine={kind}"
    whole, written = run("whole", engine)
    assert_sound(whole, written, 4)
    run("part", engine, "train.steps=2")
    part, again = run("part", engine)
    assert again == written
    for a, b in zip(whole, part, strict=True):
        assert [a[name] for name in SAME] == pytest.approx([b[name] for name in SAME], rel=1e-5, abs=1e-9)
        assert [a.get(name) for name in CARRIED] == [b.get(name) for name in CARRIED]


@needs_vllm
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_two_ranks_carry_as_soundly_as_one(run, tensor_parallel):
    options = ("rollout.engine=vllm", f"rollout.tensor_parallel_size={tensor_parallel}")
    metrics, written = run("two", *options, ranks=2)
    assert_sound(metrics, written, 4)


def test_what_two_ranks_have_begun_is_dealt_anew_to_one(run):
    two, _ = run("out", "train.steps=2", ranks=2)
    metrics, written = run("out")
    assert metrics[:2] == two
    assert_sound(metrics, written, 4)


def test_off_is_the_default_and_carries_nothing(run):
    metrics, written = run("off", "rollout.oversample=1", "train.steps=2")
    assert not any(name.startswith("rollout/") for row in metrics for name in row)
    assert not any(r["carried"] for step in written for r in step)
    assert tiny.recipe("m").rollout.oversample == 1.0
    in_order = data.batch(range(NUM_PROBLEMS), seed=0, start=0, size=12)
    assert [r["index"] for step in written for r in step if r["sample"] == 0] == in_order
