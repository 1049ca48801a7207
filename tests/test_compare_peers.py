"""The workers of bench/compare.py for verl and OpenRLHF, as far as a machine without a GPU goes: their own packages read our
options, prompts, reward and log. Skipped where a package does not import."""

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import compare  # noqa: E402
import compare_log  # noqa: E402
import compare_openrlhf  # noqa: E402
import compare_verl  # noqa: E402
import random_model  # noqa: E402
from length_reward import compute_score, reward_func  # noqa: E402


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    model = random_model.make("tiny", tmp_path_factory.mktemp("peers") / "model", response=6, dtype=torch.float32)
    return compare.make_work(
        Namespace(rounds=3, problems=4, samples=2, limit=12, dtype="bfloat16", sequences_at_once=4), model, "vllm"
    )


def ids(text):
    """Token ids of a text for the tokenizer of bench/random_model.py, whose word wN has id N."""
    return [int(word[1:]) for word in text.split()]


# Without the packages


def logged(**metrics):
    """Entries 10 s apart, as compare_log.read returns them."""
    return {name: [(100.0 + 10 * i, value) for i, value in enumerate(values)] for name, values in metrics.items()}


def test_a_round_lasts_from_one_entry_of_the_log_to_the_next():
    names = {f"timing_s/{name}": (seconds, seconds) for name, seconds in [("gen", 3.0), ("old_log_prob", 1.0), ("ref", 0.5)]}
    names |= {"timing_s/adv": (0.25, 0.25), "timing_s/update_actor": (2.0, 2.5), "timing_s/step": (8.0, 8.0)}
    first, second = compare_verl.rows(logged(**names, **{"perf/total_num_tokens": (900.0, 1000.0)}))
    assert second == {"step": 10.0, "gen": 3.0, "reward": 0.0, "annotate": 1.75, "update": 2.5, "tokens": 1000}
    assert first["step"] == 8.0  # nothing was logged before it

    phases = {"generation": (3.0, 3.5), "make_experience": (1.0, 1.5), "ppo_train": (2.0, 2.0), "step_total": (7.0, 8.0)}
    names = {f"train/timing/{name}": values for name, values in phases.items()}
    names |= {"train/total_length": (100.5, 99.75), "train/rollout/num_samples": (8.0, 8.0)}
    first, second = compare_openrlhf.rows(logged(**names))
    assert second == {"step": 10.0, "gen": 3.5, "reward": 0.0, "annotate": 1.5, "update": 2.0, "tokens": 798}
    assert (first["step"], first["tokens"]) == (7.0, 804)


def test_a_phase_missing_from_the_log_is_an_error():
    with pytest.raises(KeyError, match="ref"):
        compare_verl.rows(logged(**{"perf/total_num_tokens": (1.0,), "timing_s/gen": (1.0,), "timing_s/step": (1.0,)}
                                 | {"timing_s/old_log_prob": (1.0,)}))  # fmt: skip


def test_openrlhf_trains_in_no_float32(work, tmp_path):
    with pytest.raises(ValueError, match="want bfloat16 and vllm, got float32"):
        compare_openrlhf.arguments(work | {"dtype": "float32"}, tmp_path)


def test_a_reward_is_the_same_however_it_is_asked_for():
    found = reward_func(["w3 w5 w2 w4 w7", "w3 w5 w2 <eos>"], ["w3 w5", "w3 w5"], ["", ""])
    assert found["rewards"].tolist() == found["scores"].tolist() == [pytest.approx(2 / 3), 1.0]


# verl


@pytest.fixture(scope="module")
def verl_config(work, tmp_path_factory):
    """What verl's entry point has read and validated when it is about to start Ray."""
    main_ppo = pytest.importorskip("verl.trainer.main_ppo", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("verl")
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main_ppo, "run_ppo", lambda config, task_runner_class: found.append(config))
        patch.setattr(sys, "argv", ["main_ppo", *compare_verl.overrides(work, folder)])
        patch.setenv("HYDRA_FULL_ERROR", "1")
        main_ppo.main()
    return found[0]


def test_verl_reads_the_work(work, verl_config):
    from verl.utils.config import omega_conf_to_dataclass

    actor = omega_conf_to_dataclass(verl_config.actor_rollout_ref.actor)
    assert (actor.ppo_mini_batch_size, actor.ppo_micro_batch_size_per_gpu, actor.rollout_n) == (2, 4, 2)
    assert (actor.use_kl_loss, actor.kl_loss_coef, actor.kl_loss_type, actor.loss_agg_mode) == (
        True,
        0.01,
        "low_var_kl",
        "token-mean",
    )
    assert (actor.optim.lr, list(actor.optim.betas), actor.optim.weight_decay) == (1e-7, [0.9, 0.95], 0.0)
    assert (actor.optim.clip_grad, actor.optim.lr_scheduler_type, actor.entropy_coeff) == (1.0, "constant", 0)
    assert actor.engine.strategy == "fsdp2" and actor.engine.mixed_precision["param_dtype"] == "bf16"
    rollout = omega_conf_to_dataclass(verl_config.actor_rollout_ref.rollout)
    assert (rollout.name, rollout.n, rollout.temperature, rollout.top_p, rollout.top_k) == ("vllm", 2, 1.0, 1, -1)
    assert (rollout.response_length, rollout.max_model_len) == (12, work["max_prompt_length"] + 12)
    model = omega_conf_to_dataclass(verl_config.actor_rollout_ref.model)
    assert not model.enable_gradient_checkpointing and model.path == work["model"]
    algorithm = omega_conf_to_dataclass(verl_config.algorithm)
    assert (algorithm.adv_estimator, algorithm.use_kl_in_reward, algorithm.norm_adv_by_std_in_grpo) == ("grpo", False, True)
    assert (verl_config.trainer.total_training_steps, verl_config.data.train_batch_size) == (3, 4)
    assert verl_config.trainer.use_v1 and verl_config.trainer.v1.trainer_mode == "sync"


def test_verl_refuses_an_unknown_option(work, tmp_path, verl_config):
    from hydra import compose, initialize_config_module
    from hydra.errors import ConfigCompositionException

    with initialize_config_module("verl.trainer.config", version_base=None):
        words = compare_verl.overrides(work, tmp_path)
        assert compose("ppo_trainer", words).trainer.total_training_steps == 3
        with pytest.raises(ConfigCompositionException, match="trainer.total_steps"):
            compose("ppo_trainer", [*words, "trainer.total_steps=3"])


def test_verl_has_the_prompts_token_for_token_and_in_order(work, verl_config):
    from verl.trainer.ppo.utils import create_rl_dataset, create_rl_sampler
    from verl.utils.config import omega_conf_to_dataclass
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

    model = omega_conf_to_dataclass(verl_config.actor_rollout_ref.model)
    dataset = create_rl_dataset(verl_config.data.train_files, verl_config.data, model.tokenizer, model.processor)
    order = list(create_rl_sampler(verl_config.data, dataset))
    builder = create_continuous_token_builder(model.tokenizer, hf_model_type=model.hf_config.model_type)
    found = [builder.build_initial_tokens(list(dataset[i]["raw_prompt"])) for i in order]
    assert [list(tokens) for tokens in found] == [ids(text) for text in work["prompts"]]


def test_verl_gives_the_reward_of_the_response_alone(verl_config):
    import numpy as np
    from verl import DataProto
    from verl.trainer.ppo.reward import load_reward_manager
    from verl.utils.config import omega_conf_to_dataclass

    tokenizer = omega_conf_to_dataclass(verl_config.actor_rollout_ref.model).tokenizer

    async def score(response):
        manager = load_reward_manager(verl_config, tokenizer)
        row = {"data_source": "length_reward", "reward_model": {"ground_truth": ""}, "extra_info": {"index": 0}}
        tensors = {"prompts": [[2, 4]], "responses": [response + [0, 0]]}
        tensors["attention_mask"] = [[1] * (2 + len(response)) + [0, 0]]
        data = DataProto.from_dict(
            {name: torch.tensor(value) for name, value in tensors.items()},
            {name: np.array([value], dtype=object) for name, value in row.items()},
        )
        return (await manager.run_single(data))["reward_score"]

    response = [3, 4, 7, 8, 9, random_model.EOS]
    assert asyncio.run(score(response)) == compute_score("", "w3 w4 w7 w8 w9", "", {}) == 0.4


def test_rows_are_read_from_what_verl_logs(tmp_path, monkeypatch, verl_config):
    from verl import DataProto
    from verl.trainer.ppo.metric_utils import compute_throughout_metrics, compute_timing_metrics
    from verl.utils.tracking import Tracking

    monkeypatch.setenv("TENSORBOARD_DIR", str(tmp_path))
    trainer = verl_config.trainer
    tracking = Tracking(trainer.project_name, trainer.experiment_name, default_backend=list(trainer.logger))
    lengths = {"prompt_length": torch.tensor([3.0, 4.0]), "response_length": torch.tensor([5.0, 6.0])}
    batch = DataProto.from_dict({"responses": torch.zeros(2, 6), "attention_mask": torch.ones(2, 10), **lengths})
    batch.meta_info["global_token_num"] = [8, 10]
    seconds = {
        "gen": 1.5,
        "old_log_prob": 0.5,
        "ref": 0.25,
        "adv": 0.125,
        "update_actor": 2.0,
        "update_weights": 0.5,
        "step": 5.0,
    }
    for step in (1, 2):
        metrics = compute_timing_metrics(batch, seconds) | compute_throughout_metrics(batch, seconds, n_gpus=1)
        tracking.log(data=metrics, step=step)
    tracking.finish()
    first, second = compare_verl.rows(compare_log.read(tmp_path))
    assert first == {"step": 5.0, "gen": 1.5, "reward": 0.0, "annotate": 0.875, "update": 2.0, "tokens": 18}
    assert 0 <= second["step"] < 5.0 and second["tokens"] == 18


# OpenRLHF

# Read up to the point where Ray would be started, then used piece by piece. OpenRLHF imports flash-attn, whose compiled half
# needs a GPU and is not called here: an empty flash_attn_2_cuda.py on PYTHONPATH does.
OPENRLHF = """
import asyncio, json, runpy, sys
from pathlib import Path
from types import SimpleNamespace

import ray
import compare_log, compare_openrlhf

class Parsed(Exception):
    pass

def stop():
    raise Parsed(sys._getframe(1).f_locals["args"])

ray.is_initialized, started = stop, ray.is_initialized
work, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
sys.argv = ["train_ppo_ray", *compare_openrlhf.arguments(work, folder)]
try:
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__", alter_sys=True)
except Parsed as parsed:
    args = parsed.args[0]
ray.is_initialized = started

from openrlhf.trainer.ppo_trainer import prepare_datasets
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator
from openrlhf.utils import get_strategy, get_tokenizer
from openrlhf.utils.agent import SingleTurnAgentExecutor
from openrlhf.utils.logging_utils import TensorboardLogger
from vllm import SamplingParams

strategy = get_strategy(args)
tokenizer = get_tokenizer(args.actor.model_name_or_path, None, "left", strategy)
loader, _, updates = prepare_datasets(strategy, tokenizer)
prompts = [prompts[0] for _, prompts, _, _ in loader]

class Engine:
    async def generate(self, tokens, params, multi_modal_data=None):
        self.asked = {"tokens": tokens, "max_tokens": params.max_tokens}
        answer = SimpleNamespace(token_ids=[3, 4, 7, 8, 9, 1], finish_reason="stop", logprobs=None)
        return SimpleNamespace(outputs=[answer])

engine = Engine()
params = SamplingParams(max_tokens=args.rollout.max_new_tokens)
executor = SingleTurnAgentExecutor(args.reward.remote_url)
response = asyncio.run(executor.execute(work["prompts"][0], "", params, args.data.max_len, tokenizer, engine))
generator = SamplesGenerator(strategy, loader, None, tokenizer, [])
experience = generator._process_response_into_experience(response, max_len=args.data.max_len)

logger = TensorboardLogger(args)
for step in (1, 2):
    status = {"timing/make_experience": 1.5, "timing/ppo_train": 2.0, "timing/broadcast": 0.5, "timing/generation": 3.0}
    status["timing/step_total"] = sum(status.values())
    status |= {"total_length": 20.25, "rollout/num_samples": 8.0, "generated_samples": ["w1", 0.5]}
    logger.log_train(step, status)
logger.close()

plain = lambda space: {k: plain(v) if isinstance(v, SimpleNamespace) else v for k, v in vars(space).items()}
(folder / "found.json").write_text(json.dumps({
    "args": plain(args), "prompts": prompts, "updates": updates, "asked": engine.asked,
    "rewards": experience.rewards.tolist(), "total_length": experience.total_length.tolist(),
    "mean_is_logged": Experience.is_episode_tensor_field("total_length"),
    "deepspeed": strategy.get_ds_train_config(), "rows": compare_openrlhf.rows(compare_log.read(folder / "log")),
}))
"""


@pytest.fixture(scope="module")
def openrlhf(work, tmp_path_factory):
    needed = ("openrlhf", "ray", "deepspeed", "flash_attn", "flash_attn_2_cuda", "vllm")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("openrlhf")
    (folder / "work.json").write_text(json.dumps(work))
    path = os.pathsep.join([str(ROOT / "bench"), *filter(None, sys.path)])
    command = [sys.executable, "-c", OPENRLHF, str(folder / "work.json"), str(folder)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "found.json").read_text())


def test_openrlhf_reads_the_work(work, openrlhf):
    args, deepspeed = openrlhf["args"], openrlhf["deepspeed"]
    rollout = {"batch_size": 4, "n_samples_per_prompt": 2, "max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0}
    assert rollout.items() <= args["rollout"].items()
    assert (args["train"]["batch_size"], args["train"]["micro_batch_size"], args["train"]["colocate_all"]) == (4, 4, True)
    assert (args["algo"]["advantage"]["estimator"], args["critic"]["model_name_or_path"]) == ("group_norm", None)
    assert {"init_coef": 0.01, "use_loss": True, "estimator": "k3"}.items() <= args["algo"]["kl"].items()
    actor = args["actor"]
    assert actor["adam"] == {"lr": 1e-7, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0}
    assert {"optim": "adam", "max_norm": 1.0, "lr_scheduler": "constant", "lr_warmup_ratio": 0.0}.items() <= actor.items()
    assert (actor["eps_clip_low_high"], actor["dual_clip"], actor["entropy_coef"]) == ([0.2, 0.2], None, None)
    assert not actor["gradient_checkpointing_enable"] and args["ds"]["packing_samples"]
    assert args["vllm"]["enable_sleep"] and args["vllm"]["num_engines"] == 1
    assert (deepspeed["train_batch_size"], deepspeed["train_micro_batch_size_per_gpu"]) == (4, 4)
    assert deepspeed["bf16"]["enabled"] and openrlhf["updates"] == 3 * 2


def test_openrlhf_has_the_prompts_token_for_token_in_an_order_of_its_own(work, openrlhf):
    assert sorted(openrlhf["prompts"]) == sorted(work["prompts"])
    assert openrlhf["asked"] == {"tokens": ids(work["prompts"][0]), "max_tokens": 12}


def test_openrlhf_gives_the_reward_of_the_response_alone(work, openrlhf):
    assert openrlhf["rewards"] == [pytest.approx(compute_score("", "w3 w4 w7 w8 w9", "", {}))]
    assert openrlhf["total_length"] == [len(ids(work["prompts"][0])) + 6]


def test_rows_are_read_from_what_openrlhf_logs(openrlhf):
    assert openrlhf["mean_is_logged"]
    first, second = openrlhf["rows"]
    assert first == {"step": 7.0, "gen": 3.0, "reward": 0.0, "annotate": 1.5, "update": 2.0, "tokens": 162}
    assert 0 <= second["step"] < 7.0 and second["tokens"] == 162
