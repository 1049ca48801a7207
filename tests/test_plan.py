"""The plan against real models in training on this machine, byte by byte; and what a person sees of it."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import plan_ranks
import pytest
import tiny
import torch
from rlsp_kernels import linear
from test_cli import refused, rlsp
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from rlsp_fast import config as configs
from rlsp_fast import plan, shapes
from rlsp_fast.plan import GIB

ROOT = Path(__file__).parent.parent
EXACT = ("weights", "gradients", "adam")
PUBLISHED = {
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Meta-Llama-3.1-70B": 70_553_706_496,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
}


def job(recipe="llama-3.1-8b-math-paper", *overrides, **machine):
    """Nothing offloaded unless the overrides say so."""
    config = configs.load(recipe, ["train.offload=[]", *overrides])
    return plan.make_job(config, shapes.read(config.model.path), **machine)


# --- shapes -----------------------------------------------------------------------------------------


def test_models_known_by_name_have_the_published_numbers_of_parameters():
    assert {shapes.named(path) for path in PUBLISHED} == set(shapes.NAMED)
    assert {path: shapes.read(path).num_parameters for path in PUBLISHED} == PUBLISHED


def test_a_folder_with_a_config_goes_before_the_table(tmp_path):
    path = tmp_path / "Llama-3.1-8B"
    tiny.KINDS["llama"].save_pretrained(path)
    assert shapes.read(str(path)).num_parameters < 1e6


def test_a_model_that_nobody_knows_is_refused_with_what_is_known():
    for path in ("nobody/some-model", "/no/such/folder", "./no-such-folder"):
        with pytest.raises(shapes.ShapesError, match=rf"model\.path = '{path}'.*Qwen2\.5-32B"):
            shapes.read(path)


# --- against real models ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    plan_ranks.save_models(folder)
    return folder


@pytest.fixture(scope="module")
def alone(models, device):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "LOGITS_BUDGET", 0)  # inside the loss op, where LiveBytes does not see
        return plan_ranks.everything(models, device)


def launched(folder, *command):
    """plan_ranks.py in processes of its own."""
    path = os.pathsep.join(str(p) for p in (ROOT, ROOT / "kernels", ROOT / "tests"))
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, *command], env=env | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def of_eight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eight")
    return launched(folder, str(ROOT / "tests" / "plan_ranks.py"), str(folder), "8")


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return launched(folder, *torchrun, str(ROOT / "tests" / "plan_ranks.py"), str(folder))


def ratios(results, what):
    """Planned over measured, by model and kind."""
    found = {
        (name, kind): rows[what][0] / rows[what][1]
        for name, kinds in results.items()
        for kind, rows in kinds.items()
        if what in rows
    }
    print(f"{what}: planned / measured {min(found.values()):.4f} to {max(found.values()):.4f} over {len(found)}")
    return found


@pytest.mark.parametrize("ranks", ["alone", "of_two", "of_eight"])
@pytest.mark.parametrize("what", EXACT)
def test_parameter_gradient_and_optimizer_bytes_are_exact(request, ranks, what):
    found = ratios(request.getfixturevalue(ranks), what)
    assert len(found) == len(plan_ranks.MODELS) * (4 if ranks == "alone" else 2) * (3 if what == "weights" else 2)
    assert set(found.values()) == {1.0}


@pytest.mark.parametrize("ranks", ["alone", "of_two", "of_eight"])
def test_what_a_forward_keeps_for_backward_is_within_three_per_cent(request, ranks):
    found = ratios(request.getfixturevalue(ranks), "kept for backward")
    assert 0.97 < min(found.values()) and max(found.values()) < 1.03, found


@pytest.mark.parametrize("ranks", ["alone", "of_eight"])
def test_the_peak_of_an_update_is_seldom_below_and_little_above_the_measured(request, ranks):
    found = ratios(request.getfixturevalue(ranks), "peak of an update")
    assert 0.97 < min(found.values()) and max(found.values()) < 1.20, found


@pytest.mark.parametrize("ranks", ["alone", "of_eight"])
def test_the_peak_of_annotating_is_within_a_tenth(request, ranks):
    found = ratios(request.getfixturevalue(ranks), "peak of annotating")
    assert 0.9 < min(found.values()) and max(found.values()) < 1.1, found


def test_the_tensors_that_autograd_saves_are_those_the_terms_name(models, device):
    """Per layer and token, by autograd's own account: what each layer saves, its parameters apart."""
    name = "qwen2-tied"
    lm = AutoModelForCausalLM.from_pretrained(models / name, attn_implementation="sdpa", dtype=torch.bfloat16)
    found = shapes.read(str(models / name))
    weights = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    T = 256
    hidden_TD = torch.randn(1, T, found.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    rotation = lm.model.rotary_emb(hidden_TD, torch.arange(T)[None])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = lm.model.layers[0](hidden_TD, position_embeddings=rotation)
    shared = {x.untyped_storage().data_ptr() for x in rotation}
    measured = sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in shared)
    planned = T * sum(plan.saved_per_token(found, 2, "packed").values())
    print(f"saved by one layer: planned / measured = {planned / measured:.4f}")
    assert out is not None and planned == pytest.approx(measured, rel=0.02)


def test_forward_flops_are_those_that_torch_counts(models):
    for name in ("llama", "qwen3"):
        lm = AutoModelForCausalLM.from_pretrained(models / name, attn_implementation="eager")
        found, T = shapes.read(str(models / name)), 64
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            lm(torch.arange(T)[None])
        causal = plan.forward_flops(found, T, T, head=True)
        half_of_attention = 2 * T * T * found.num_layers * found.num_heads * found.head_size  # eager computes all of it
        assert counter.get_total_flops() == pytest.approx(causal + half_of_attention, rel=1e-6)


def test_the_logits_budget_is_the_kernels():
    assert plan.LOGITS_BUDGET == linear.LOGITS_BUDGET


# --- phases -----------------------------------------------------------------------------------------


def test_what_sleeps_is_where_the_order_of_a_step_puts_it():
    found = {phase.name: phase for phase in plan.phases(job())}
    assert list(found) == list(plan.PHASES)
    assert found["generate"].gone == {} and found["generate"].parts["KV cache"] > 0
    for name in ("annotate", "update critic", "update actor"):
        assert found[name].gone == {"KV cache": "asleep", "engine weights": "asleep"}
        assert found[name].parts["KV cache"] == found[name].parts["engine weights"] == 0
    assert found["push"].gone == {"KV cache": "asleep"} and found["push"].parts["engine weights"] > 0


def test_offloaded_states_leave_generation_and_return_to_training():
    offloaded = job("llama-3.1-8b-math-paper", "train.offload=adam,critic,reference")
    before, after = ({p.name: p for p in plan.phases(j)} for j in (job(), offloaded))
    moved = before["generate"].total - after["generate"].total
    assert moved == plan.host_bytes(offloaded) > 10 * GIB
    assert all(before[name].total == after[name].total for name in before if name != "generate")


def test_cuda_graphs_are_counted_unless_the_engine_is_told_to_be_eager():
    graphs = {
        asked: next(iter(plan.phases(job("llama-3.1-8b-math-paper", f"rollout.enforce_eager={asked}")))).parts["CUDA graphs"]
        for asked in ("auto", "false", "true")
    }
    assert graphs["auto"] == graphs["false"] == GIB and graphs["true"] == 0


def test_sleep_level_1_keeps_the_engines_weights_on_the_host():
    assert plan.host_bytes(job()) == 0
    assert plan.host_bytes(job("llama-3.1-8b-math-paper", "rollout.sleep_level=1")) == plan.engine_weights(job())


def test_without_critic_or_reference_their_bytes_are_gone():
    lean = job("llama-3.1-8b-math-paper", "algorithm.advantage=reinforce_plus_plus", "algorithm.kl_coef=0")
    assert [phase.name for phase in plan.phases(lean)] == ["generate", "annotate", "update actor", "push"]
    assert not any("critic" in part or part == "reference" for phase in plan.phases(lean) for part in phase.parts)


def test_over_sampling_gives_an_engine_more_to_decode():
    more = job("llama-3.1-8b-math-paper", "rollout.oversample=1.5")
    assert more.samples_per_engine == 1.5 * job().samples_per_engine and more.num_samples == job().num_samples


@pytest.mark.parametrize(
    "device, known",
    [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-80GB", "A100-80"), ("NVIDIA L40S", None)],
)
def test_a_gpu_is_known_by_its_own_name(device, known):
    assert plan.named(device) == known


def test_engine_weights_and_kv_cache_by_hand():
    one, four = job(), job("llama-3.1-8b-math-paper", "rollout.tensor_parallel_size=4")
    assert plan.engine_weights(one) == 2 * 8_030_261_248
    norms = 2 * 65 * 4096
    assert plan.engine_weights(four) == (2 * 8_030_261_248 - norms) // 4 + norms
    assert plan.kv_bytes_per_token(one) == 2 * 32 * 8 * 128 * 2 == 4 * plan.kv_bytes_per_token(four)
    sixteen = job("qwen2.5-32b-aime", "rollout.tensor_parallel_size=16", num_nodes=2)
    assert plan.kv_bytes_per_token(sixteen) == 2 * 64 * 1 * 128 * 2  # 8 heads on 16 ranks: one each


# --- budgets ----------------------------------------------------------------------------------------


def test_the_kv_cache_chosen_fits_and_one_block_more_does_not():
    asked = job(memory=56 * GIB)
    chosen = plan.kv_cache_bytes(asked)
    block = plan.BLOCK * plan.kv_bytes_per_token(asked)

    def total(size):
        return next(iter(plan.phases(plan.with_key(asked, "rollout.kv_cache_gib", size / GIB)))).total

    assert chosen % block == 0 and total(chosen) <= asked.budget < total(chosen + block)


def test_the_kv_cache_is_no_larger_than_what_generation_can_use():
    few = job("llama-3.1-8b-math-paper", "rollout.max_num_seqs=4")
    assert plan.kv_cache_bytes(few) == plan.wanted_kv_bytes(few) == 4 * plan.kv_sequence_bytes(few)


def test_no_room_for_a_kv_cache_is_said_with_the_numbers():
    with pytest.raises(plan.PlanError, match=r"no room for a KV cache.*= 6144 tokens needs 0\.75"):
        plan.kv_cache_bytes(job(memory=40 * GIB))


def test_the_token_budget_chosen_fits_and_a_larger_one_does_not():
    asked = job("llama-3.1-8b-math-paper", "model.activation_checkpointing=false", memory=100 * GIB)
    chosen = plan.token_budget(asked)

    def fits(tokens):
        tried = plan.with_key(asked, "train.max_tokens_per_micro_batch", tokens)
        return all(p.total <= tried.budget for p in plan.phases(tried) if p.name not in ("generate", "push"))

    assert asked.longest <= chosen < 65536 and fits(chosen) and not fits(chosen + 256)


def test_a_longest_sequence_that_cannot_be_trained_is_refused():
    with pytest.raises(plan.PlanError, match="one sequence of 8192 tokens does not fit"):
        plan.token_budget(job("llama-3.1-8b-math-paper", "model.activation_checkpointing=false", memory=40 * GIB))


def test_what_is_auto_becomes_the_numbers_that_fit():
    auto = ("train.max_tokens_per_micro_batch=auto", "rollout.kv_cache_gib=auto")
    settled = job("llama-3.1-8b-math-paper", *auto)
    assert plan.fits(settled) and plan.token_budget(settled) == settled.config.train.max_tokens_per_micro_batch
    assert settled.config.rollout.kv_cache_gib * GIB == plan.kv_cache_bytes(settled)
    none = job("llama-3.1-8b-math-paper", *auto, memory=24 * GIB)  # nothing fits: the least, for the plan to show
    assert not plan.fits(none)
    assert none.config.train.max_tokens_per_micro_batch == none.config.sft.max_length
    assert none.config.rollout.kv_cache_gib * GIB == plan.kv_sequence_bytes(none)


def test_states_are_offloaded_only_where_generation_has_no_room_for_them():
    auto = ("train.offload=auto", "rollout.kv_cache_gib=auto", "train.max_tokens_per_micro_batch=auto")
    roomy, tight = (job("llama-3.1-8b-math-paper", *auto, memory=gib * GIB) for gib in (80, 48))
    assert roomy.offload == () and plan.fits(roomy)
    assert tight.offload == ("adam",) and plan.fits(tight)
    assert not plan.fits(plan.with_key(tight, "train.offload", ()))


def test_without_a_gpu_auto_is_what_the_engine_and_the_lengths_say():
    overrides = ["train.max_tokens_per_micro_batch=auto", "rollout.kv_cache_gib=auto", "rollout.max_response_length=20000"]
    config = plan.settle_without_gpu(configs.load("llama-3.1-8b-math-paper", overrides))
    assert config.rollout.kv_cache_gib is None and config.train.offload == ()
    assert config.train.max_tokens_per_micro_batch == 20000 + config.data.max_prompt_length
    short = plan.settle_without_gpu(configs.load("llama-3.1-8b-math-paper", overrides[:2]))
    assert short.train.max_tokens_per_micro_batch == 16384
    assert configs.check(config.model_dump(mode="json")) == config  # numbers that the checks of a recipe accept


# --- changes ----------------------------------------------------------------------------------------


def test_what_fits_needs_no_change_and_the_cheapest_change_fits():
    assert plan.fits(job())
    tight = job("qwen2.5-32b-aime", num_nodes=3)
    assert not plan.fits(tight)
    change = plan.cheapest_change(tight)
    assert change.fits and plan.fits(change.job)
    alone = [c for c in plan.single_changes(tight) if c.fits and not any("node" in word for word in c.words)]
    assert alone and change.seconds * (1 + 0.1 * len(change.words)) <= min(c.seconds * 1.1 for c in alone)


@pytest.mark.parametrize("recipe", ["llama-3.1-8b-math-paper", "qwen2.5-32b-aime"])
@pytest.mark.parametrize("gib", [40, 60])
def test_the_words_of_a_change_typed_in_give_the_job_it_promises(recipe, gib):
    tight = job(recipe, memory=gib * GIB)
    change = plan.cheapest_change(tight)
    overrides = [word for word in change.words if "=" in word]
    options = dict(word.removeprefix("--").split() for word in change.words if "=" not in word)
    typed = job(
        recipe,
        *overrides,
        memory=gib * GIB,
        num_nodes=int(options.get("nodes", 1)),
    )
    assert typed == change.job and plan.fits(typed)


def test_when_nothing_helps_it_says_so():
    assert plan.cheapest_change(job("qwen2.5-32b-aime", "train.batch_size=8", "train.mini_batch_size=8")) is None


# --- seconds ----------------------------------------------------------------------------------------


def test_twice_the_bandwidth_halves_the_bytes_time_and_recomputing_adds_a_third():
    slow = job()
    fast = replace(slow, gpu=replace(slow.gpu, memory_gb_s=2 * slow.gpu.memory_gb_s))
    free = replace(slow.assumed, decode_overhead_ms=0.0)
    times = [plan._generate_seconds(replace(j, assumed=free))["decode"] for j in (slow, fast)]
    assert times[0] == pytest.approx(2 * times[1])
    kept = plan.step_seconds(job("llama-3.1-8b-math-paper", "model.activation_checkpointing=false"))["update_actor"]
    assert 1.2 < plan.step_seconds(slow)["update_actor"] / kept < 4 / 3


def test_training_time_by_hand():
    """8 B parameters, 512 responses of 2304 tokens, 8 GPUs: 4 passes of 2 FLOPs a parameter and token, 40 % of 989 TFLOP/s."""
    tokens = 512 * 2304 / 8
    by_hand = 4 * tokens * 2 * (8.03e9 - 0.525e9) / (0.4 * 989e12)
    assert plan.step_seconds(job())["update_actor"] == pytest.approx(by_hand, rel=0.25)  # attention and communication besides


# --- the command line -------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", sorted(p.stem for p in (ROOT / "rlsp_fast" / "recipes").glob("*.toml")))
def test_every_shipped_recipe_has_a_plan_that_reads_at_100_columns(tmp_path, monkeypatch, recipe):
    monkeypatch.setenv("COLUMNS", "100")
    overrides = [f"model.path={tiny.save_model(tmp_path)}"] if recipe.startswith("demo") else []
    done = rlsp("plan", recipe, *overrides, cwd=tmp_path)
    assert done.returncode == (1 if "32b" in recipe else 0), done.stderr[-2000:]
    assert max(map(len, done.stdout.splitlines())) <= 100
    for word in ("update actor", "KV cache:", "Peak:", "Seconds of a step", "Assumed, not measured", "TFLOP/s"):
        assert word in done.stdout
    assert ("Does not fit" in done.stdout) == ("Cheapest that fits" in done.stdout) == ("32b" in recipe)


def test_overrides_may_stand_behind_options(tmp_path):
    words = ("--gpus", "4", "--gpu-memory", "141GB", "rollout.kv_cache_gib=8", "--json", "train.batch_size=256")
    found = json.loads(rlsp("plan", "llama-3.1-8b-math-paper", *words, cwd=tmp_path).stdout)
    assert found["machine"]["gpus"] == 4 and found["machine"]["memory"] == 141 * 10**9
    assert found["kv_cache"]["bytes"] == 8 * GIB and found["kv_cache"]["samples_per_engine"] == 64
    for phase in found["phases"].values():
        assert phase["total"] == sum(phase["parts"].values())
    assert found["seconds"]["step"] == pytest.approx(sum(v for k, v in found["seconds"].items() if k != "step"))


@pytest.mark.parametrize(
    "words, parts",
    [
        (("--gpu", "H1000"), ("--gpu H1000", "A100-80")),
        (("--gpu-memory", "many"), ("--gpu-memory many", "80GiB")),
        (("train.offload=adm",), ("train.offload", "adm", "adam")),
        (("--gpus", "6", "rollout.tensor_parallel_size=4"), ("rollout.tensor_parallel_size = 4", "6")),
        (("--gpus", "0"), ("--gpus 0",)),
        (("model.path=nobody/some-model",), ("nobody/some-model", "built-in table")),
        (("train.bach_size=8",), ("train.bach_size", "train.batch_size")),
    ],
)
def test_a_mistake_in_a_plan_gets_one_message(tmp_path, words, parts):
    refused(rlsp("plan", "llama-3.1-8b-math-paper", *words, cwd=tmp_path), *parts)


def test_words_that_are_no_settings_are_still_refused(tmp_path):
    done = rlsp("plan", "demo", "--gpus", "8", "nonsense", cwd=tmp_path)
    assert done.returncode == 2 and re.search("unrecognized arguments: nonsense", done.stderr)
