"""What bench/bench_step.py calls MFU and MBU, by hand."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import bench_step  # noqa: E402

from rlsp_fast import budget, config, plan, shapes  # noqa: E402

FOUND = {
    "prompt_length/mean": 100.0,
    "response_length/mean": 300.0,
    "response_length/max": 500.0,
    "perf/total_num_tokens": 400.0 * 64,
    "timing_s/gen": 10.0,
    "timing_s/update_actor": 2.0,
    "timing_s/update_critic": 2.0,
}


@pytest.fixture(scope="module")
def job():
    tree = {"model": {"path": "Llama-3.1-8B"}, "data": {"train": ["none"]}, "train": {"batch_size": 64, "mini_batch_size": 64}}
    return plan.make_job(config.check(tree, "test"), shapes.read("Llama-3.1-8B"), gpu="H100", num_gpus=1)


def test_mfu_is_six_flops_a_parameter_and_token_and_attention_over_the_peak(job):
    matrices = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    head, attention = 128256 * 4096, 32 * 4096 * 400  # two products over half of 400 tokens: 2 FLOPs x 2 x 200
    # The critic has no output projection, and the policy's is for the 300 response tokens of 400.
    a_token = 3 * (2 * (2 * matrices + 2 * attention) + 2 * head * 300 / 400)
    assert bench_step.mfu(job, FOUND) == pytest.approx(a_token * 400 * 64 / 4.0 / 989e12, rel=1e-6)


def test_mbu_counts_weights_once_a_decoded_token_and_keys_and_values_of_what_came_before(job):
    weights = 2 * job.shapes.num_parameters
    cache = 64 * 300 * (100 + 150) * (2 * 32 * 8 * 128 * 2)
    assert bench_step.mbu(job, FOUND) == pytest.approx((500 * weights + cache) / 10.0 / 3350e9, rel=1e-3)


def test_more_seconds_are_a_lower_share(job):
    slow = FOUND | {"timing_s/gen": 20.0, "timing_s/update_actor": 6.0}
    assert bench_step.mbu(job, slow) == pytest.approx(bench_step.mbu(job, FOUND) / 2)
    assert bench_step.mfu(job, slow) == pytest.approx(bench_step.mfu(job, FOUND) / 2)
    assert bench_step.mfu(replace(job, gpu=plan.GPUS["B200"]), FOUND) == pytest.approx(bench_step.mfu(job, FOUND) * 989 / 2250)


def test_a_run_that_halved_its_micro_batches_gives_no_row(tmp_path, monkeypatch):
    def halved(command, overrides):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / budget.LEARNED).write_text("{}")

    monkeypatch.setattr(bench_step, "run", halved)
    with pytest.raises(SystemExit, match="halved"):
        bench_step.steps(argparse.Namespace(recipe="demo", steps=2), "vllm", [], tmp_path)
