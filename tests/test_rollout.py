"""Rollout engines on a tiny model: real vLLM where it is installed, and the transformers one, which must agree.

One vLLM a process: the module shares an engine.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_lm import make_tiny

from rlsp_fast import config as configs
from rlsp_fast import data, dist, model, rollout, sync
from rlsp_fast.memory import Colocated
from rlsp_fast.rollout import EngineError, Sampling, TransformersEngine, VLLMEngine, make_engine
from rlsp_fast.types import Problem

HAS_VLLM = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")
TEXTS = ["1 + 2 =", "3 + 4 + 5 + 6 =", "7 =", "8 + 9 + 1 + 2 + 3 =", "4 + 4 =", "5 + 5 + 5 ="]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def config(tiny):
    return configs.check(
        {
            "model": {"path": str(tiny), "dtype": "float32"},
            "data": {"train": ["x.jsonl"], "max_prompt_length": 200, "template": "{problem}"},
            "rollout": {"temperature": 0.7, "max_response_length": 24, "max_num_seqs": 16},
            "train": {"steps": 1, "batch_size": 4, "mini_batch_size": 4},
        }
    )


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return model.load_tokenizer(str(tiny))


@pytest.fixture(scope="module")
def problems(tokenizer, config):
    raw = [
        Problem(messages=({"role": "user", "content": text},), answer="0", source="test", index=i)
        for i, text in enumerate(TEXTS)
    ]
    return data.render(raw, tokenizer, config.data)[0]


@pytest.fixture(scope="module")
def device():
    return dist.setup()


@pytest.fixture(scope="module")
def policy(config, tiny, device):
    return model.build(model.Policy, config.model, str(tiny), device, dist.mesh(device))


@pytest.fixture(scope="module", params=[pytest.param("vllm", marks=needs_vllm), "transformers"])
def engine(request, config, tiny, tokenizer, device):
    kind = {"vllm": VLLMEngine, "transformers": TransformersEngine}[request.param]
    return Colocated(lambda: kind(config, str(tiny), tokenizer, device))


def sampling(**changes):
    return Sampling(**{"n": 2, "temperature": 0.7, "top_p": 1.0, "max_tokens": 24, "seed": 3} | changes)


def trainer_logprobs(policy, rollouts, temperature):
    """The trainer's own log-probability of every sampled token."""
    from rlsp_kernels import linear_logprob_entropy

    from rlsp_fast.packing import pack

    batch = pack([(r.problem.prompt_ids, r.response_ids) for r in rollouts])
    with torch.no_grad():
        logprob_T, _ = policy(
            batch, lambda h, w, **head: linear_logprob_entropy(h, w, batch.token_T, temperature=temperature, **head)
        )
    return logprob_T[batch.mask_T]


def test_rollouts_come_in_order_with_one_logprob_a_token(engine, problems):
    rollouts = engine.generate(problems, sampling(), slots=range(len(problems)))
    assert [(r.problem.index, r.sample) for r in rollouts] == [(i, k) for i in range(len(problems)) for k in range(2)]
    for r in rollouts:
        assert 1 <= len(r.response_ids) <= 24 and len(r.response_ids) == len(r.rollout_logprob)
        assert all(p <= 0 and math.isfinite(p) for p in r.rollout_logprob)
        ends = r.response_ids[-1] in engine.engine.eos_ids
        assert r.finish == ("stop" if ends else "length") and (ends or len(r.response_ids) == 24)
        assert not any(token in engine.engine.eos_ids for token in r.response_ids[:-1])


def test_rollout_logprobs_are_the_trainers_with_temperature_in_them(engine, policy, problems, config):
    sync.push(policy, engine, torch.float32)
    rollouts = engine.generate(problems, sampling(), slots=range(len(problems)))
    theirs = torch.tensor([p for r in rollouts for p in r.rollout_logprob])
    torch.testing.assert_close(trainer_logprobs(policy, rollouts, 0.7), theirs, atol=1e-4, rtol=0)


def test_a_seed_gives_the_same_rollouts_again_and_another_seed_does_not(engine, problems):
    slots = range(len(problems))
    first = [r.response_ids for r in engine.generate(problems, sampling(), slots=slots)]
    assert first == [r.response_ids for r in engine.generate(problems, sampling(), slots=slots)]
    assert first != [r.response_ids for r in engine.generate(problems, sampling(seed=4), slots=slots)]


def test_a_slot_samples_the_same_whichever_batch_it_runs_in(engine, problems):
    whole = engine.generate(problems, sampling(n=1), slots=range(len(problems)))
    part = engine.generate(problems[2:4], sampling(n=1), slots=[2, 3])
    assert [r.response_ids for r in part] == [r.response_ids for r in whole[2:4]]


def test_the_samples_of_a_problem_differ(engine, problems):
    rollouts = engine.generate(problems[:1], sampling(n=8), slots=[0])
    assert len({r.response_ids for r in rollouts}) > 1


def test_on_finish_gets_every_rollout_once(engine, problems):
    seen = []
    rollouts = engine.generate(problems, sampling(), slots=range(len(problems)), on_finish=seen.append)
    assert sorted(map(id, seen)) == sorted(map(id, rollouts))


def test_a_stop_string_ends_a_response(engine, problems, tokenizer):
    free = engine.generate(problems, sampling(n=4), slots=range(len(problems)))
    words = {tokenizer.decode([token]) for r in free for token in r.response_ids[:-1]}
    word = max(w for w in words if w.strip().isalnum() and w.isascii())
    stopped = engine.generate(problems, sampling(n=4, stop=(word,)), slots=range(len(problems)))
    assert any(word in r.text for r in stopped)
    for r, unstopped in zip(stopped, free, strict=True):
        assert r.response_ids == unstopped.response_ids[: len(r.response_ids)]
        if word in r.text:
            assert r.finish == "stop" and r.text.index(word) + len(word) == len(r.text)


@contextmanager
def changed(policy, change):
    """The policy with change(local tensor) applied to every parameter, for a while."""
    policy.reshard()  # a forward without backward leaves the root gathered
    local = [p.to_local() for p in policy.parameters()]
    before = [p.detach().clone() for p in local]
    with torch.no_grad():
        for p in local:
            change(p)
    try:
        yield
    finally:
        policy.reshard()
        with torch.no_grad():
            for p, old in zip(local, before, strict=True):
                p.copy_(old)


def test_pushed_weights_are_the_ones_it_samples_from(engine, policy, problems):
    with changed(policy, lambda p: p.add_(0.05 * torch.randn_like(p))):
        sync.push(policy, engine, torch.float32)
        rollouts = engine.generate(problems, sampling(), slots=range(len(problems)))
        theirs = torch.tensor([p for r in rollouts for p in r.rollout_logprob])
        torch.testing.assert_close(trainer_logprobs(policy, rollouts, 0.7), theirs, atol=1e-4, rtol=0)


def test_a_push_that_never_happened_is_caught(engine, policy, problems):
    sync.push(policy, engine, torch.float32)
    with changed(policy, lambda p: p.mul_(1.5)):  # the engine keeps the old weights
        rollouts = engine.generate(problems, sampling(), slots=range(len(problems)))
        theirs = torch.tensor([p for r in rollouts for p in r.rollout_logprob])
        diff = (trainer_logprobs(policy, rollouts, 0.7).exp() - theirs.exp()).abs()
    with pytest.raises(sync.StaleWeightsError, match="rollout.max_probs_diff"):
        sync.verify(diff.mean().item(), diff.max().item(), 0.005, "step 1")


@contextmanager
def broken(engine, **verbs):
    """The engine with some of its verbs replaced, for a while."""
    inner = engine.engine
    for name, verb in verbs.items():
        setattr(inner, name, verb(getattr(inner, name)))
    try:
        yield
    finally:
        for name in verbs:
            delattr(inner, name)


def test_a_push_that_changed_nothing_is_caught_before_anything_is_sampled(engine, policy):
    sync.push(policy, engine, torch.float32)
    engine.pushes = 0  # the next checks every tensor
    with changed(policy, lambda p: p.mul_(1 + 1e-6)), broken(engine, load_weights=lambda load: lambda it: list(it) and None):
        with pytest.raises(sync.StaleWeightsError, match="does not hold the weights just pushed"):
            sync.push(policy, engine, torch.float32)
    sync.push(policy, engine, torch.float32)


@pytest.mark.parametrize(
    "which", ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"]
)
def test_one_wrong_tensor_is_caught_and_named(engine, policy, which):
    def spoil(load):
        return lambda it: load((n, t + 1e-6 * (n == which)) for n, t in it)

    engine.pushes = 0
    with broken(engine, load_weights=spoil), pytest.raises(sync.StaleWeightsError) as caught:
        sync.push(policy, engine, torch.float32)
    part = which.split(".")[-2]
    assert part in str(caught.value) or {"k_proj": "qkv_proj", "up_proj": "gate_up_proj"}[part] in str(caught.value)
    sync.push(policy, engine, torch.float32)


def test_ten_pushes_check_every_tensor(engine, policy):
    spoiled = "model.layers.1.mlp.down_proj.weight"
    engine.pushes, caught = 1, 0
    for _ in range(sync.CHECK_EVERY):
        pushes = engine.pushes
        with broken(engine, load_weights=lambda load: lambda it: load((n, t + 1e-6 * (n == spoiled)) for n, t in it)):
            try:
                sync.push(policy, engine, torch.float32)
            except sync.StaleWeightsError:
                caught += 1
                engine.pushes = pushes + 1
    assert caught == 2  # once in its turn, once with all of them
    sync.push(policy, engine, torch.float32)


@needs_vllm
def test_a_stale_prefix_cache_is_caught_by_the_probabilities(engine, policy, problems, config, tokenizer):
    if engine.name != "vllm":
        pytest.skip("its cache lives for one batch")
    sums = " + ".join(str(i % 9 + 1) for i in range(50)) + " ="
    long = [Problem(messages=({"role": "user", "content": sums},), answer="0", source="t", index=i) for i in range(3)]
    prompts = data.render(long, tokenizer, config.data)[0]
    assert len(prompts[0].prompt_ids) > 128  # a block of the cache on a CPU

    def difference(**verbs):
        sync.push(policy, engine, torch.float32)
        engine.generate(prompts, sampling(), slots=range(3))
        with changed(policy, lambda p: p.mul_(1.2)), broken(engine, **verbs):
            sync.push(policy, engine, torch.float32)
            rollouts = engine.generate(prompts, sampling(), slots=range(3))
            theirs = torch.tensor([p for r in rollouts for p in r.rollout_logprob])
            return (trainer_logprobs(policy, rollouts, 0.7).exp() - theirs.exp()).abs().mean().item()

    assert difference() < 1e-5
    assert difference(reset_prefix_cache=lambda reset: lambda: None) > 1e-3


def test_nan_probabilities_stop_the_run_too():
    with pytest.raises(sync.StaleWeightsError):
        sync.verify(float("nan"), 1.0, 0.05, "step 1")


def test_top_p_leaves_the_tail_out(tiny, config, tokenizer, device, problems):
    engine = TransformersEngine(config, str(tiny), tokenizer, device)
    narrow = engine.generate(problems, sampling(n=8, top_p=1e-6), slots=range(len(problems)))
    assert all(abs(p) < 1e-6 for r in narrow for p in r.rollout_logprob)  # one token left: certain
    for i in range(0, len(narrow), 8):
        assert len({r.response_ids for r in narrow[i : i + 8]}) == 1


def test_tokens_are_drawn_as_often_as_their_probabilities_say():
    p_V, rows = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0]), 4000
    generators = [torch.Generator().manual_seed(i) for i in range(rows)]
    token_B, logprob_B = rollout._sample(p_V.log().mul(0.7).expand(rows, -1), sampling(), generators)
    share_V = torch.bincount(token_B, minlength=len(p_V)) / rows
    assert (share_V[p_V == 0] == 0).all()
    torch.testing.assert_close(share_V, p_V, atol=4 * (0.25 / rows) ** 0.5, rtol=0)
    torch.testing.assert_close(logprob_B, p_V.log()[token_B])


def test_nan_logits_give_a_token_of_the_vocabulary_and_a_logprob_that_stops_the_run():
    token_B, logprob_B = rollout._sample(torch.full((2, 5), torch.nan), sampling(), [torch.Generator()] * 2)
    assert (token_B < 5).all() and logprob_B.isnan().all()


def test_transformers_samples_the_same_however_its_cache_grows_and_drops_finished_rows(
    tiny, config, tokenizer, device, problems, monkeypatch
):
    class Counting(rollout.TransformersEngine):
        rows = 0

        def _forward(self, ids, *args):
            self.rows += len(ids)
            return super()._forward(ids, *args)

    found, rows = [], []
    for layer, room in (("_RoomyLayer", 128), ("_RoomyLayer", 1), ("DynamicLayer", 0)):
        if room:
            monkeypatch.setattr(rollout._RoomyLayer, "ROOM", room)
        monkeypatch.setattr(rollout, "_RoomyLayer", getattr(rollout, layer))
        counting = Counting(config, tiny, tokenizer, device)
        counting.eos_ids = frozenset(range(0, len(tokenizer), 12))
        made = counting.generate(problems[:4], sampling(n=4, max_tokens=60), slots=range(4))
        found.append([(r.response_ids, r.finish) for r in made])
        rows.append(counting.rows)
    assert found[0] == found[1] == found[2] and rows[0] == rows[1] == rows[2]
    lengths = [len(r.response_ids) for r in made]
    needed = 4 + sum(lengths) - len(made)  # a prompt once, then every token but the last
    never_dropped = 4 + len(made) * (max(lengths) - 1)
    assert needed <= rows[0] < needed + 0.5 * (never_dropped - needed), (needed, rows[0], never_dropped)


@needs_vllm
def test_two_jobs_on_a_machine_take_two_names_for_their_shared_memory(monkeypatch):
    from vllm.distributed.device_communicators import cpu_communicator

    monkeypatch.setenv("VLLM_DIST_IDENT", "//")  # as external_launcher leaves it
    communicator, names = SimpleNamespace(unique_name="tp:0", ranks=[0, 1]), set()
    for job in ("one", "another"):
        with monkeypatch.context() as undone:
            shared = cpu_communicator._CPUSHMDistributed
            name = getattr(shared.make_group_name, "args", (None, shared.make_group_name))[1]  # an engine may have been made
            undone.setattr(shared, "make_group_name", staticmethod(name))
            rollout._name_shared_memory(job)
            names.add(shared.make_group_name(communicator))
    assert len(names) == 2


def test_vllm_asked_for_and_missing_is_an_error_with_the_fix(config, tiny, tokenizer, device, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else real(name, *a))
    asked = config.model_copy(update={"rollout": config.rollout.model_copy(update={"engine": "vllm"})})
    with pytest.raises(EngineError, match="vLLM is not installed.*rollout.engine=transformers"):
        make_engine(asked, str(tiny), tokenizer, device)
    assert make_engine(config, str(tiny), tokenizer, device).name == "transformers"


RECIPE = """
[model]
path = "{tiny}"
dtype = "float32"
[data]
train = ["{problems}"]
template = "{{problem}}"
max_prompt_length = 32
[rollout]
engine = "vllm"
n = 2
temperature = 0.7
max_response_length = 16
max_probs_diff = 1e-4
[optim]
actor_lr = 1e-2
critic_lr = 1e-2
[train]
steps = 3
batch_size = 8
mini_batch_size = 4
critic_warmup_steps = 0
[output]
save_every = 0
loggers = []
"""


@pytest.fixture(scope="module")
def recipe(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    problems = folder / "problems.jsonl"
    problems.write_text("".join(f'{{"problem": "{t}", "answer": "7"}}\n' for t in TEXTS * 4))
    (folder / "recipe.toml").write_text(RECIPE.format(tiny=tiny, problems=problems))
    return folder / "recipe.toml"


def train(recipe, ranks, *overrides):
    """Metrics of each step of a run on this many ranks."""
    out = recipe.parent / f"{ranks}{'-'.join(overrides)}"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    done = subprocess.run(
        [*start, "rlsp_fast", "train", str(recipe), f"output.dir={out}", *overrides],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=400, env=_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_rank(recipe):
    return train(recipe, 1)


@needs_vllm
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_two_ranks_with_fsdp_and_vllm_take_the_steps_of_one(recipe, one_rank, tensor_parallel):
    """The whole loop, three steps: the same rollouts, losses and gradients, each step's rollouts from the trained weights."""
    two_ranks = train(recipe, 2, f"rollout.tensor_parallel_size={tensor_parallel}")
    names = (
        "critic/score/mean", "response_length/mean", "actor/pg_loss", "actor/ref_kl", "actor/grad_norm", "critic/vf_loss",
        "critic/grad_norm", "critic/returns/mean", "actor/entropy",
    )  # fmt: skip
    assert len(one_rank) == len(two_ranks) == 3
    for one, two in zip(one_rank, two_ranks, strict=True):
        assert {n: two[n] for n in names} == pytest.approx({n: one[n] for n in names}, rel=1e-4, abs=1e-6)
        assert max(one["training/rollout_probs_diff_max"], two["training/rollout_probs_diff_max"]) < 1e-4


@needs_vllm
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_fifty_steps_on_two_ranks_stay_in_parity(recipe, tensor_parallel):
    rows = train(
        recipe, 2, f"rollout.tensor_parallel_size={tensor_parallel}", "train.steps=50", "rollout.max_response_length=8"
    )
    assert len(rows) == 50
    assert max(row["training/rollout_probs_diff_max"] for row in rows) < 1e-4
    assert all("memory/floor_gib" in row and "timing_s/swap/push_weights" in row for row in rows)


def _environment():
    root = Path(__file__).parent.parent
    path = f"{root / 'kernels'}{os.pathsep}{root}"
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
