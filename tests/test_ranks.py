"""Two ranks under torchrun (gloo, FSDP2) give what one rank gives on the same global batch, in float32."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import two_ranks
from transformers import AutoModelForCausalLM

from rlsp_fast import checkpoint, dist

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return tiny.save_model(folder, "qwen2-tied", seed=0), tiny.save_model(folder, "qwen2-tied", seed=1)


@pytest.fixture(scope="module")
def one_rank_resumed(paths, device, tmp_path_factory):
    """A folder with one rank's checkpoint of step 1, and the metrics of the two steps after it."""
    folder = tmp_path_factory.mktemp("run")
    ppo, trained = two_ranks.build(two_ranks.recipe(paths[0], {}), paths, device)
    two_ranks.step(ppo, seed=0)
    checkpoint.save(folder, 1, trained)
    return folder, [two_ranks.step(ppo, seed=1), two_ranks.step(ppo, seed=2)]


@pytest.fixture(scope="module")
def two(paths, one_rank_resumed):
    """Everything two_ranks.py computes, on two ranks, in one launch."""
    folder, _ = one_rank_resumed
    path = os.pathsep.join(str(p) for p in (ROOT, ROOT / "kernels", ROOT / "tests"))
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "two_ranks.py"), *paths, str(folder)],
        env=env | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((folder / "results.json").read_text())


def assert_same(two: list[dict], one: list[dict]) -> None:
    assert len(two) == len(one)
    for row, truth in zip(two, one, strict=True):
        assert row.keys() == truth.keys()
        for name in truth.keys() - {"idle", "share", "stage", "throughput"}:
            assert row[name] == pytest.approx(truth[name], rel=1e-4, abs=2e-6), name


@pytest.mark.parametrize("scenario", two_ranks.SCENARIOS)
def test_two_ranks_give_the_losses_and_metrics_of_one(paths, device, two, scenario):
    one = two_ranks.train(scenario, paths, device)
    assert_same(two[scenario], one)
    assert one[0]["actor/pg_clipfrac"] > 0 and one[0]["actor/grad_norm"] > 1e-3  # there was something to agree on
    assert one[0].get("critic/vf_clipfrac", 1) > 0
    assert one[0]["idle"] == 0
    assert two[scenario][0]["share"] == pytest.approx(1.0 if scenario == "hsdp" else 0.5, abs=0.01)  # of 61 rows, 31
    if "idle" in scenario or scenario == "more ranks than responses":
        assert two[scenario][0]["idle"] > 0


def test_two_ranks_give_the_sft_losses_of_one(paths, device, two, tmp_path):
    one = two_ranks.train_sft(paths, tmp_path, device)
    assert_same(two["sft"], one)
    assert abs(one[2]["val_loss"] - one[0]["val_loss"]) > 1e-3  # something was learned


def test_a_checkpoint_of_one_rank_continues_on_two(one_rank_resumed, two):
    assert_same(two["resume"], one_rank_resumed[1])


def test_a_checkpoint_of_two_ranks_continues_on_one(paths, device, one_rank_resumed, two):
    folder, expected = one_rank_resumed
    ppo, trained = two_ranks.build(two_ranks.recipe(paths[0], {}), paths, device)
    checkpoint.load(folder, 2, trained)
    assert_same([two_ranks.step(ppo, seed=2)], expected[1:])


def test_two_ranks_export_and_push_the_same_whole_weights(paths, one_rank_resumed, two):
    folder, _ = one_rank_resumed
    pushed = torch.load(folder / "pushed.pt")
    exported, start = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (folder / "exported", paths[0]))
    assert pushed.keys() == exported.keys() and "lm_head.weight" in pushed  # tied, and pushed all the same
    assert all(torch.equal(pushed[name], exported[name]) for name in exported)
    assert not any(torch.equal(pushed[name], start[name]) for name in start)


def test_a_shard_size_that_does_not_divide_the_ranks_is_refused(device):
    with pytest.raises(ValueError, match=r"train\.fsdp_shard_size = 2 does not divide the number of ranks, 1"):
        dist.mesh(device, 2)
