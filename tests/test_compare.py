"""bench/compare.py gives both trainers the same work and both do it."""

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
@pytest.mark.parametrize("trainer", compare.WORKERS)
def test_a_trainer_does_the_rounds_it_was_given(tmp_path, trainer, engine):
    for needed in {trainer, engine} & {"trl", "vllm"}:
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    args = argparse.Namespace(rounds=2, problems=4, samples=2, limit=12, dtype="float32")
    lm = random_model.make("tiny", tmp_path / "model", response=6, dtype=torch.float32)
    work = compare.make_work(args, lm, engine)
    assert len(work["prompts"]) == 8
    found = compare.one(tmp_path / trainer, compare.WORKERS[trainer], work, 300)
    assert "failed" not in found, found
    prompts = [len(text.split()) for text in work["prompts"][4:]]  # of the second round: the first is left out
    assert 2 * (sum(prompts) + 4) <= found["tokens"] <= 2 * (sum(prompts) + 4 * 12)
    assert found["seconds_a_round"] > 0 and all(found[part] >= 0 for part in ("gen", "annotate", "update"))
