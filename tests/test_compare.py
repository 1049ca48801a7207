"""bench/compare.py gives rlsp_fast and TRL the same work and both do it; what it says of the trainers that need Ray."""

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import compare  # noqa: E402
import random_model  # noqa: E402


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
@pytest.mark.parametrize("trainer", ["rlsp_fast", "trl"])
def test_a_trainer_does_the_rounds_it_was_given(tmp_path, trainer, engine):
    for needed in {trainer, engine} & {"trl", "vllm"}:
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    args = argparse.Namespace(rounds=2, problems=4, samples=2, limit=12, dtype="float32", sequences_at_once=4)
    lm = random_model.make("tiny", tmp_path / "model", response=6, dtype=torch.float32)
    work = compare.make_work(args, lm, engine)
    assert len(work["prompts"]) == 8
    found = compare.one(tmp_path / trainer, compare.WORKERS[trainer], work, 300)
    assert "failed" not in found, found
    prompts = [len(text.split()) for text in work["prompts"][4:]]  # of the second round: the first is left out
    assert 2 * (sum(prompts) + 4) <= found["tokens"] <= 2 * (sum(prompts) + 4 * 12)
    assert found["seconds_a_round"] > 0 and all(found[part] >= 0 for part in ("gen", "annotate", "update"))


def test_a_ratio_is_printed_for_each_peer(capsys):
    row = {"case": "spread", "engine": "vllm", "repeat": 0, "seconds_a_round": 4.0} | dict.fromkeys(
        ("step", *compare.PARTS), 1.0
    )
    ours = row | {"trainer": "rlsp_fast", "tokens_per_s": 300.0, "cpu": 2.5}
    verl = row | {"trainer": "verl", "tokens_per_s": 200.0}
    broken = {"case": "spread", "engine": "vllm", "repeat": 0, "trainer": "openrlhf", "failed": "out of memory"}
    compare.show([ours, verl, broken])
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "rlsp_fast / verl: 1.50 (1.50 to 1.50)" and "openrlhf   failed: out of memory" in printed
    assert [line.split()[-2] for line in printed if line.startswith(("rlsp_fast ", "verl "))][:2] == ["2.50", "-"]
    assert compare.ratios(
        [ours | {"case": "full"}, verl | {"case": "full", "seconds_a_round": 6.0}], "full", "vllm", "verl"
    ) == [1.5]


def test_a_peer_is_left_out_with_the_reason():
    args = argparse.Namespace(engines=["transformers"], python={})
    found = {"verl": "0.9.1", "ray": "2.60.0", "vllm": "0.32.0"}
    assert compare.why_not("verl", {}, args) == "not installed"
    assert compare.why_not("verl", {"verl": "0.9.1"}, args) == "verl 0.9.1 is installed, but not ray and vllm, which it runs on"
    if not torch.cuda.is_available():
        assert compare.why_not("verl", found, args) == "verl 0.9.1 runs on CUDA GPUs only, and there is none"
