"""Taking turns on a device: the order of a step, its ledger, trainer states on the host, and what a wrong order does."""

import gc
import logging
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from poison import Device, Mistake, OutOfMemory, PoisonEngine
from tiny_lm import make_tiny
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlamaConfig, LlamaForCausalLM

from rlsp_fast import budget, data, dist, memory, model, sync, train
from rlsp_fast import config as configs
from rlsp_fast.log import read_rows
from rlsp_fast.memory import Colocated, DeviceMemoryError, Entry, Ledger, MemoryGrowthError, Offload, OrderError
from rlsp_fast.optim import Optimizer
from rlsp_fast.ppo import PPO
from rlsp_fast.rollout import Sampling
from rlsp_fast.types import Problem

ROOT = Path(__file__).parent.parent
KV, ACTIVATIONS = 400_000, 500_000


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    problems = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    problems.write_text('{"problem": "1 + 2 =", "answer": "3"}\n' * 8)
    return configs.check(
        {
            "model": {"path": str(tiny), "dtype": "float32"},
            "data": {"train": [str(problems)], "max_prompt_length": 32, "template": "{problem}"},
            "rollout": {"temperature": 0.7, "max_response_length": 8, "max_num_seqs": 16, "n": 2},
            "train": {"steps": 3, "batch_size": 4, "mini_batch_size": 2, "critic_warmup_steps": 0},
            "output": {"save_every": 0, "loggers": []},
        }
    )


@pytest.fixture(scope="module")
def policy(config, tiny, device):
    return model.build(model.Policy, config.model, str(tiny), device, dist.mesh(device))


@pytest.fixture
def room():
    return Device(10**9)


@pytest.fixture
def engine(config, tiny, device, room):
    """The device then has room for the engine, or for the trainer's activations, or for the push, and not for two of them."""
    made = PoisonEngine(config, str(tiny), model.load_tokenizer(str(tiny)), device, room=room, kv_bytes=KV)
    room.size = made.weight_bytes + max(KV, ACTIVATIONS) + 50_000
    return made


def act(verb, engine, room, policy, config):
    """One verb of a step, by name."""
    match verb.split():
        case ["generate"]:
            problem = Problem(messages=({"role": "user", "content": "1 + 2 ="},), answer="3", source="t", index=0)
            tokenizer = model.load_tokenizer(config.model.path)
            problems = data.render([problem], tokenizer, config.data)[0]
            engine.generate(problems, Sampling(n=1, temperature=1.0, top_p=1.0, max_tokens=4), slots=[0])
        case ["sleep"]:
            engine.sleep()
        case ["wake", *tags]:
            engine.wake(*tags)
        case ["push"]:
            engine.load_weights(sync.full_weights(policy, torch.float32))
        case ["push", "without", name]:
            engine.load_weights((n, t) for n, t in sync.full_weights(policy, torch.float32) if name not in n)
        case ["reset"]:
            engine.reset_prefix_cache()
        case ["train"]:
            room.take("trainer activations", ACTIVATIONS)
        case ["free"]:
            room.give("trainer activations")


RIGHT = "generate, sleep, train, free, wake weights, push, wake kv_cache, reset, generate, sleep, train, free"
WRONG = {
    "generate, sleep, train, free, generate": (Mistake, "before the weights are awake"),
    "generate, sleep, train, free, wake weights, push, generate": (Mistake, "before the KV cache is awake"),
    "generate, sleep, train, free, wake weights, wake kv_cache, reset, generate": (Mistake, "weights that sleep discarded"),
    "generate, sleep, train, free, push": (Mistake, "load_weights before the weights"),
    "generate, sleep, train, free, wake weights, push, wake kv_cache, generate": (
        Mistake,
        "prefix cache of the weights before",
    ),
    "generate, sleep, train, free, wake weights, push without norm, wake kv_cache, reset, generate": (
        Mistake,
        "sleep discarded",
    ),
    "generate, sleep, train, free, wake weights kv_cache, push": (OutOfMemory, "push wants"),
    "generate, sleep, train, wake weights, push": (OutOfMemory, "push wants"),
    "generate, sleep, train, wake weights kv_cache": (OutOfMemory, "engine KV cache wants"),
    "generate, train": (OutOfMemory, "trainer activations wants"),
    "generate, sleep, sleep": (Mistake, "sleep while asleep"),
    "generate, sleep, train, free, wake weights, push, wake weights": (Mistake, "weights woken twice"),
    "generate, sleep, train, free, wake weights, push, wake kv_cache, reset, train": (OutOfMemory, "trainer activations"),
}


def test_the_right_order_fits_and_generates(engine, room, policy, config):
    for verb in RIGHT.split(", "):
        act(verb, engine, room, policy, config)


@pytest.mark.parametrize("order", WRONG)
def test_a_wrong_order_fails_at_its_last_verb(order, engine, room, policy, config):
    *before, last = order.split(", ")
    for verb in before:
        act(verb, engine, room, policy, config)
    error, message = WRONG[order]
    with pytest.raises(error, match=message):
        act(last, engine, room, policy, config)


def test_a_run_uses_the_right_order_at_every_step(config, tiny, device, room, tmp_path, monkeypatch):
    made = []

    def make_engine(config, path, tokenizer, device):
        made.append(PoisonEngine(config, path, tokenizer, device, room=room, kv_bytes=KV))
        return made[0]

    monkeypatch.setattr(train, "make_engine", make_engine)
    folder = tmp_path / "run"
    train.run(
        config.model_copy(update={"output": config.output.model_copy(update={"dir": str(folder)})}),
        with_sft=False,
        with_rl=True,
    )
    push = ["sleep", "wake weights", "load_weights", "wake kv_cache", "reset_prefix_cache"]
    assert made[0].verbs == push + 3 * ["generate", *push]
    rows = read_rows(folder / "metrics.jsonl")
    edges = ("sleep", "free_cache", "wait_ranks", "wake_weights", "push_weights", "wake_kv_cache", "reset_prefix_cache")
    for row in rows:
        assert all(row[f"timing_s/swap/{edge}"] >= 0 and row[f"memory/{edge}/used_gib"] > 0 for edge in edges)
        assert 0 < row["memory/floor_gib"] <= min(row[f"memory/{edge}/used_gib"] for edge in edges)


def test_an_evaluation_compares_probabilities_while_the_engine_sleeps_and_wakes_it_again(config, room, tmp_path, monkeypatch):
    made = []

    def make_engine(*args):
        made.append(PoisonEngine(*args, room=room, kv_bytes=KV))
        return made[0]

    asleep, compare = [], sync.probability_difference
    monkeypatch.setattr(train, "make_engine", make_engine)
    monkeypatch.setattr(
        sync, "probability_difference", lambda *args: asleep.append(not made[0].weights_awake) or compare(*args)
    )
    tree = config.model_dump(mode="json")
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"problem": "2 + 2 =", "answer": "4"}\n')
    tree["data"] |= {"validation": [str(held_out)], "overlap": "allow"}
    tree["output"] |= {"dir": str(tmp_path / "run"), "eval_every": 1}
    tree["train"] |= {"steps": 2}
    train.run(configs.check(tree), with_sft=False, with_rl=True)
    push = ["sleep", "wake weights", "load_weights", "wake kv_cache", "reset_prefix_cache"]
    step = ["generate", *push]
    assert made[0].verbs == [*step, *step, *step, *step, "generate", "sleep"]  # evaluated, step, evaluated, step, evaluated
    assert asleep == [True] * 3


def test_generate_while_the_engine_sleeps_is_refused(engine):
    colocated = Colocated(lambda: engine)
    colocated.sleep()
    colocated.sleep()  # once
    with pytest.raises(OrderError, match="generate while the engine sleeps"):
        colocated.generate([], None, slots=[])
    assert engine.verbs == ["sleep"]


def test_sleep_level_one_keeps_the_weights(config, tiny, device, policy):
    room = Device(10**9)
    engine = PoisonEngine(config, str(tiny), model.load_tokenizer(str(tiny)), device, room=room, kv_bytes=KV, level=1)
    for verb in ("sleep", "wake weights", "wake kv_cache", "generate"):
        act(verb, engine, room, policy, config)


# The ledger


def ledger_of(floors, limit):
    ledger = Ledger(limit)
    for floor in floors:
        ledger.entries = [Entry("sleep", 1, 2, floor), Entry("push_weights", 3, 4, floor + 100)]
        metrics = ledger.close_step()
    return ledger, metrics


def test_the_floor_of_a_step_is_its_least_use():
    _, metrics = ledger_of([5 * 2**30], None)
    assert metrics["memory/floor_gib"] == 5
    assert metrics["memory/push_weights/used_gib"] == pytest.approx(5, abs=1e-6)
    assert ("memory/sleep/allocated_gib" in metrics) == torch.cuda.is_available()  # the same names on every rank


def test_memory_that_grows_from_step_to_step_stops_the_run_with_the_table():
    with pytest.raises(MemoryGrowthError) as caught:
        ledger_of([10**9 + step * 10**7 for step in range(30)], 1.5e8)
    message = str(caught.value)
    assert "grew by 0.17 GiB over 20 steps" in message and "max_memory_growth_gib allows 0.139698. Restart" in message
    assert "push_weights" in message and "floor of each step" in message


@pytest.mark.parametrize(
    "floors",
    [
        [10**9] * 40,
        [10**9 + 10**8 * (step % 2) for step in range(40)],  # up and down is no growth
        [10**9 + 10**9 * (step == 20) for step in range(40)],  # one step alone is none
        [10**8, *[10**9] * 15],  # too few steps to tell
    ],
)
def test_memory_that_does_not_grow_stops_nothing(floors):
    ledger_of(floors, 1.5e8)


def test_a_limit_of_none_only_watches():
    _, metrics = ledger_of([10**9 + step * 10**8 for step in range(30)], None)
    assert metrics["memory/floor_growth_gib"] > 1


def test_what_is_measured_follows_what_is_held():
    before = memory.measure("before").used
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert memory.measure("with").used - before > 48 << 20
    del block


# Trainer states on the host


def test_offloaded_states_come_back_as_they_were_and_are_gone_in_between(config, tiny, device):
    policy = model.build(model.Policy, config.model, str(tiny), device, dist.mesh(device))
    adam = torch.optim.AdamW(policy.parameters())
    for parameter in policy.parameters():
        parameter.grad = torch.randn_like(parameter)
    adam.step()

    def states():
        return [s for state in adam.state.values() for s in (state["exp_avg"], state["exp_avg_sq"])]

    before = [s.to_local().clone() for s in states()]
    offload = Offload(states)
    offload.start()
    assert all(torch.equal(s.to_local(), old) for s, old in zip(states(), before, strict=True))  # readable until finish
    freed = offload.finish()
    assert freed == sum(s.nbytes for s in before)
    assert all(s.to_local().untyped_storage().nbytes() == 0 for s in states())
    offload.to_device()
    assert all(torch.equal(s.to_local(), old) for s, old in zip(states(), before, strict=True))
    adam.step()  # the optimizer still points at them


class Generating(PoisonEngine):
    """Notes, whenever it generates, the bytes that Adam's moments, critics and references hold on the device."""

    def generate_until(self, *args, **options):
        found = gc.get_objects()
        moments = [m for o in found if isinstance(o, Optimizer) for m in o.moments()]
        models = [p for o in found if isinstance(o, PPO) for m in (o.critic, o.ref) for p in m.parameters()]
        self.held_meanwhile.append(sum(t.to_local().untyped_storage().nbytes() for t in [*moments, *models]))
        return super().generate_until(*args, **options)


@pytest.mark.parametrize("states", [("adam",), ("adam", "critic", "reference")], ids=str)
def test_a_run_that_offloads_learns_the_same_and_holds_nothing_of_it_while_generating(
    states, config, device, tmp_path, monkeypatch
):
    rows = {}
    for offload in ((), states):
        made = []

        def make_engine(config, path, tokenizer, device, made=made):
            made.append(Generating(config, path, tokenizer, device, room=Device(10**9), kv_bytes=KV))
            made[-1].held_meanwhile = []
            return made[-1]

        monkeypatch.setattr(train, "make_engine", make_engine)
        folder = tmp_path / "-".join(["run", *offload])
        for steps in (2, 3):  # the second call continues from a checkpoint of states that were away
            changed = {"steps": steps, "offload": offload}
            train.run(
                config.model_copy(
                    update={
                        "train": config.train.model_copy(update=changed),
                        "output": config.output.model_copy(update={"dir": str(folder)}),
                    }
                ),
                with_sft=False,
                with_rl=True,
            )
            gc.collect()
        kept = [
            {k: v for k, v in row.items() if not k.startswith(("timing", "perf", "memory"))}
            for row in read_rows(folder / "metrics.jsonl")
        ]
        rows[offload] = kept
        edges = {key for row in read_rows(folder / "metrics.jsonl") for key in row if "states" in key and "timing" in key}
        assert edges == ({"timing_s/swap/fetch_states", "timing_s/swap/offload_states"} if offload else set())
        held = [held for engine in made for held in engine.held_meanwhile]
    assert len(kept) == 3 and rows[()] == rows[states]
    if len(states) == 3:
        assert held == [0] * len(held)
    else:
        assert held[-1] > 0  # the critic's


def test_two_ranks_that_offload_learn_what_they_learn_without(config, tmp_path):
    """Shards of both are parts of padded storages: a value head of one row, and an embedding of an odd number of them."""
    rows = {}
    for states in ([], ["adam", "critic", "reference"]):
        tree = config.model_dump(mode="json")
        tree["output"] |= {"dir": str(tmp_path / str(len(states)))}
        tree["rollout"]["engine"], tree["train"]["offload"] = "transformers", states
        recipe = tmp_path / f"{len(states)}.toml"
        recipe.write_text(configs.dump(configs.check(tree)))
        done = torchrun("-m", "rlsp_fast", "train", recipe)
        assert done.returncode == 0, done.stderr[-4000:]
        found = read_rows(tmp_path / str(len(states)) / "metrics.jsonl")
        rows[len(states)] = [
            {name: value for name, value in row.items() if not name.startswith(("timing", "perf", "memory"))} for row in found
        ]
    assert len(rows[3]) == 3 and rows[3] == rows[0]


def test_a_critics_warm_up_is_no_growth(config, device, tmp_path, monkeypatch):
    """The policy's moments come with its first update, steps after the critic's."""
    monkeypatch.setattr(train, "make_engine", lambda *args: PoisonEngine(*args, room=Device(10**9), kv_bytes=KV))
    seen = []

    class Watched(Ledger):
        def close_step(self, others):
            metrics = super().close_step(others)
            seen.append(len(self.floors))
            return metrics

    monkeypatch.setattr(memory, "Ledger", Watched)
    tree = config.model_dump(mode="json")
    tree["output"] |= {"dir": str(tmp_path / "run")}
    tree["train"] |= {"steps": 5, "critic_warmup_steps": 2}
    train.run(configs.check(tree), with_sft=False, with_rl=True)
    assert seen == [1, 1, 1, 1, 2]  # two steps of the critic alone, the policy's first, then those that are compared


def test_offloading_shared_storage_moves_it_once():
    layer = nn.Linear(8, 8)
    offload = Offload(lambda: [layer.weight.data, layer.weight.data])
    size = layer.weight.untyped_storage().nbytes()
    offload.start()
    assert offload.finish() == size
    with pytest.raises(AssertionError, match="already on the host"):
        offload.start()
    offload.to_device()
    assert layer(torch.ones(1, 8)).isfinite().all()


# What auto becomes, and memory that runs out


def test_on_a_cpu_auto_is_the_engines_cache_and_nothing_is_offloaded_and_it_is_said(config, device, caplog):
    tree = config.model_dump(mode="json")
    tree["rollout"]["kv_cache_gib"] = tree["train"]["max_tokens_per_micro_batch"] = "auto"
    asked = configs.check(tree)
    with caplog.at_level(logging.INFO):
        settled = budget.settle(asked, device)
    assert (settled.rollout.kv_cache_gib, settled.train.max_tokens_per_micro_batch, settled.train.offload) == (None, 16384, ())
    said = "rollout.kv_cache_gib = vLLM's own, train.max_tokens_per_micro_batch = 16,384"
    assert [r.message for r in caplog.records] == [f"{said} (no GPU to plan for)"]
    assert budget.settle(settled, device) == settled


def test_on_a_gpu_auto_and_the_advice_follow_the_plan(config, caplog, monkeypatch):
    """The plan's side of it: the GPU is a name and a number of bytes."""
    tree = config.model_dump(mode="json")
    tree["rollout"]["kv_cache_gib"] = tree["train"]["max_tokens_per_micro_batch"] = "auto"
    asked, gpu = configs.check(tree), torch.device("cuda")
    monkeypatch.setattr(budget, "_gpu", lambda device: ("NVIDIA L40S", 80 * 2**30))
    with caplog.at_level(logging.INFO):
        settled = budget.settle(asked, gpu)
    assert settled.rollout.kv_cache_gib > 0 and settled.train.max_tokens_per_micro_batch >= 40 and settled.train.offload == ()
    assert any("rlsp plan does not know NVIDIA L40S: its seconds are H100's" in r.message for r in caplog.records)
    assert "the plan expected it to fit" in budget.advice(settled, gpu)
    monkeypatch.setattr(budget, "_gpu", lambda device: ("NVIDIA H100 80GB HBM3", 4 * 2**30))
    caplog.clear()
    budget.settle(asked, gpu)
    (warned,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert "GiB in" in warned.message
    assert "plan" in budget.advice(settled, gpu)


def test_an_allocation_that_no_machine_has_room_for_is_recognised_and_other_errors_are_not():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58)
    assert memory.ran_out(caught.value)
    assert memory.ran_out(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert not memory.ran_out(RuntimeError("shapes differ")) and not memory.ran_out(ValueError("out of memory"))


def test_memory_that_runs_out_when_the_engine_wakes_ends_the_run_with_the_ledger_and_advice(
    config,
    device,
    tmp_path,
    monkeypatch,
):
    room = Device(10**9)

    class Shrinking(PoisonEngine):
        """After the first step somebody else takes what is free on its device."""

        def sleep(self):
            super().sleep()
            if self.verbs.count("sleep") == 3:
                self.room.size = self.weight_bytes + 10

    monkeypatch.setattr(train, "make_engine", lambda *args: Shrinking(*args, room=room, kv_bytes=KV))
    settings = config.model_copy(update={"output": config.output.model_copy(update={"dir": str(tmp_path / "run")})})
    with pytest.raises(DeviceMemoryError) as caught:
        train.run(settings, with_sft=False, with_rl=True)
    message = str(caught.value)
    assert message.startswith("out of memory after ") and "push wants" in message
    assert "allocated" in message and "wait_ranks" in message and "\nnow " in message  # the ledger
    assert "lower train.max_tokens_per_micro_batch" in message and "continues from the last checkpoint" in message


def test_an_error_of_another_kind_is_not_taken_for_a_lack_of_memory(engine, config, device, tmp_path):
    explaining = budget.explaining(Colocated(lambda: engine), config, device, tmp_path)
    with pytest.raises(RuntimeError, match="shapes differ"), explaining:
        raise RuntimeError("shapes differ")


FULL = """
import sys
from rlsp_fast import __main__, dist, model
from test_ppo import Full

build = model.build

def full(kind, *args, **options):
    module = build(kind, *args, **options)
    if dist.rank() == 1 and kind is model.Policy and options.get("trained", True):
        Full(module, 20, "backward")  # the second rank's updates run out of memory on more than 20 positions
    return module

model.build = full
sys.exit(__main__.main(["train", sys.argv[1]]))
"""


def test_on_two_ranks_a_micro_batch_that_runs_out_ends_the_run_and_the_same_command_goes_on_with_half(config, tmp_path):
    tree = config.model_dump(mode="json")
    tree["output"] |= {"dir": str(tmp_path / "run"), "save_every": 1}
    tree["rollout"]["engine"] = "transformers"
    tree["train"]["critic_warmup_steps"] = 1  # so the first step, in which the policy does not learn, is saved
    recipe, script = tmp_path / "recipe.toml", tmp_path / "full.py"
    recipe.write_text(configs.dump(configs.check(tree)))
    script.write_text(FULL)
    done = torchrun(script, recipe)
    assert done.returncode == 1 and "out of memory after" in done.stderr, done.stderr[-4000:]
    assert re.search(r"continues from the last checkpoint, with micro-batches of (\d\d) tokens \(rank 1\)", done.stderr)
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 1
    again = torchrun(script, recipe)
    assert again.returncode == 0, again.stderr[-4000:]
    assert re.search(r"train\.max_tokens_per_micro_batch = \d\d, since more ran out of memory here; remove", again.stdout)
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 3


# Gathering


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """The most bytes of storages that were alive at once and are not those of `known`. (Compared by address: plain tensors.)"""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if type(tensor) is torch.Tensor and tensor.untyped_storage().data_ptr() not in self.known:
                storage = tensor.untyped_storage()
                self.alive[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def gathered_peak(path, device):
    """Names and shapes of the gathered weights, and the most memory of it in layers of bf16."""
    settings = configs.check({"model": {"path": str(path), "dtype": "float32"}, "train": {"steps": 0}})
    policy = model.build(model.Policy, settings.model, str(path), device, dist.mesh(device))
    expected = {name: tensor.shape for name, tensor in policy.lm.state_dict().items()}
    layer = 2 * sum(shape.numel() for name, shape in expected.items() if ".layers.0." in name)
    policy.reshard()
    found = {}
    with Watch([tensor.to_local() for tensor in policy.lm.state_dict().values()]) as watch:
        for name, tensor in sync.full_weights(policy, torch.bfloat16):
            found[name] = tensor.shape
            assert tensor.dtype == torch.bfloat16
            del tensor
    assert found == expected
    return watch.peak / layer


@pytest.fixture(scope="module")
def eight_layers(tmp_path_factory):
    path = tmp_path_factory.mktemp("eight")
    shape = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=4
    )
    LlamaForCausalLM(shape).save_pretrained(path)
    return path


def test_gathering_on_one_rank_holds_one_tensor(eight_layers, device):
    assert gathered_peak(eight_layers, device) < 0.3


GATHER = """
import sys, types
from test_memory import dist, gathered_peak
from torch.distributed import all_gather_into_tensor

def gather(received, sent, group):  # gloo's threads keep what an asynchronous collective was given for as long as they like
    all_gather_into_tensor(received, sent, group=group)
    return types.SimpleNamespace(wait=lambda: None)

dist.all_gather_flat = gather
print(f"peak {gathered_peak(sys.argv[1], dist.setup())}\\n", end="", flush=True)  # in one piece: two ranks print
"""


def test_gathering_on_two_ranks_holds_two_layers_and_a_tensor(eight_layers, tmp_path):
    script = tmp_path / "gather.py"
    script.write_text(GATHER)
    done = torchrun(script, eight_layers)
    peaks = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak")]
    # The layer being taken apart and the next one; half a layer that each sent, which gloo drops late; a quarter in hand.
    assert len(peaks) == 2 and 2 < max(peaks) <= 3.3, done.stderr[-2000:]


# Ranks

HANG = """
import sys, time
from rlsp_fast import dist
dist.setup()
if dist.rank() == 1:
    time.sleep(30)
try:
    dist.meet("before the engine wakes", timeout_s=2)
except dist.HungRankError as error:
    print(error, flush=True)
    import os
    os._exit(7)
"""


PHASES = """
import sys, time
import torch
from rlsp_fast import dist
from rlsp_fast.log import Timer

def update_actor():
    if dist.rank() == 1 and sys.argv[1] in ("asleep", "asleep inside"):
        time.sleep(60)
    if dist.rank() == 1 and sys.argv[1] == "deaf":  # keeps the interpreter to itself: no thread of it runs
        import ctypes
        ctypes.PyDLL(None).sleep(60)
    if sys.argv[1] == "slow":
        time.sleep(5)

dist.setup()
dist.watch(limit_s=2, interval_s=0.25)
timer = Timer()
for _ in range(3):
    with timer("gen"):
        dist.barrier()
with timer("update_actor"):
    update_actor()
    if sys.argv[1] in ("slow", "asleep inside"):
        dist.barrier()
with timer("update_weights"):
    dist.barrier()
print("came through", flush=True)
dist.cleanup()
"""


@pytest.mark.parametrize(
    "how, says",
    [
        ("asleep", r"rlsp: rank 1 hangs in update_actor at phases\.py:\d+ update_actor, for \d+ s\. "),
        ("asleep inside", r"rlsp: rank 1 hangs in update_actor at phases\.py:\d+ update_actor, for \d+ s\. "),
        ("deaf", r"rlsp: rank 1 hangs in \w+ at .*, for \d+ s, and does not even answer\. "),
    ],
)
def test_a_rank_that_hangs_within_a_phase_is_named_with_the_place_in_the_code(tmp_path, how, says):
    script = tmp_path / "phases.py"
    script.write_text(PHASES)
    start = time.perf_counter()
    done = torchrun(script, how)
    waits = r"The others wait in update_\w+ at \S+ \w+; rank 0 gave up"
    assert done.returncode != 0 and re.search(says + waits, done.stderr), done.stderr[-6000:]
    assert time.perf_counter() - start < 45


def test_ranks_that_are_slow_together_are_left_alone(tmp_path):
    script = tmp_path / "phases.py"
    script.write_text(PHASES)
    done = torchrun(script, "slow")
    assert done.returncode == 0 and done.stdout.count("came through") == 2, done.stderr[-2000:]


def torchrun(*command):
    path = f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'tests'}"
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, command)],
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_rank_that_hangs_is_named_with_the_phase(tmp_path):
    script = tmp_path / "hang.py"
    script.write_text(HANG)
    start = time.perf_counter()
    done = torchrun(script)
    assert "before the engine wakes: rank 1 did not arrive within 2 s; rank 0 gave up" in done.stdout, done.stderr[-2000:]
    assert time.perf_counter() - start < 60
