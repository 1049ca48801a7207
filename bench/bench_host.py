"""What does Python between the kernels cost a micro-batch of 64 sequences?

    python bench/bench_host.py [--repeats 200] [--instructions]

The sequences have GSM8K's lengths (12,404 positions in all). Each path that a step takes on the host is called many times, its
thread's CPU time taken each time (which a busy machine does not stretch), and the medians, the fastest and the number of Python
calls are printed: packing, the group advantages, gathering samples over ranks, metrics; the range around a phase (NVTX and
torch.profiler, none attached); and, between the engine's own steps as responses end, decoding them (a tokenizer of one word
an id, random_model.py's) and submitting them to the verifier. Appends to bench/results/host.csv. With --instructions, callgrind
counts the instructions of one warm call of each: a number that hardly changes from run to run, which `make bench` watches.
That takes valgrind, its headers and a C compiler, and a few minutes.
"""

import argparse
import cProfile
import csv
import ctypes
import gc
import os
import pstats
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import random_model
import torch
from rows import AFTER_GENERATION, append, origin

from rlsp_fast import config, train
from rlsp_fast.log import Timer
from rlsp_fast.ppo import PPO, Sample
from rlsp_fast.reward import Scorer
from rlsp_fast.types import Problem, Rollout, Score

HERE = Path(__file__).parent
NUM_SEQUENCES, N = 64, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--instructions", action="store_true")
    parser.add_argument("--under-callgrind", metavar="LIBRARY", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.under_callgrind:
        count_here(args.under_callgrind)
        return
    measured = measure(args.repeats, count=args.instructions)
    for row in measured:
        print("  ".join(f"{name} {value}" for name, value in row.items() if value != ""))
    whole = sum(row["median_ms"] for row in measured if row["path"] in AFTER_GENERATION)
    print(f"a micro-batch of {NUM_SEQUENCES} sequences: {whole:.2f} ms; target: at most 2")
    print("appended to", append("host", [origin("transformers") | row for row in measured]))


def measure(repeats: int, *, count: bool) -> list[dict[str, Any]]:
    """A row a path; its instructions are "" unless they are counted."""
    counts = instructions() if count else {}
    with made() as found:
        return [timed(name, call, repeats) | {"instructions": counts.get(name, "")} for name, call in found.items()]


@contextmanager
def made() -> Iterator[dict[str, Callable[[], object]]]:
    """What is measured, by name."""
    torch.set_num_threads(1)
    settings = config.check(
        {
            "model": {"path": "none"},
            "data": {"train": ["none"]},
            "rollout": {"n": N},
            "algorithm": {"advantage": "grpo"},
            "train": {"batch_size": NUM_SEQUENCES // N, "mini_batch_size": NUM_SEQUENCES // N},
        },
        "bench_host",
    )
    with Scorer(settings.reward) as scorer:
        yield paths(settings, scorer)


def paths(settings: config.Config, scorer: Scorer) -> dict[str, Callable[[], object]]:
    rollouts = make_rollouts()
    scores = [
        Score(reward=i % 7 / 7, outcome=0.0, exploration=0.0, correct=False, verdict="wrong") for i in range(NUM_SEQUENCES)
    ]
    slots, weights = range(NUM_SEQUENCES // N), dict.fromkeys(range(NUM_SEQUENCES // N), 1.0)
    ppo = PPO(settings, None, None, None, None, None, torch.device("cpu"))  # the host's part needs no model
    samples: list[Sample] = train._gather_samples(rollouts, scores, slots, N, weights)
    (micros,) = ppo.pack(samples)
    for m in micros:
        m.token_reward_T = m.rollout_logprob_T
        m.old_logprob_T = m.rollout_logprob_T
        m.advantage_T = m.return_T = m.rollout_logprob_T

    def phase() -> None:
        with Timer()("adv"):
            pass

    words = random_model.tokenizer(1024)

    def decode() -> None:
        for rollout in rollouts:
            words.decode(rollout.response_ids, skip_special_tokens=True)

    def submit() -> None:
        for future in [scorer.submit(rollout) for rollout in rollouts]:
            future.result()

    return {
        "pack": lambda: ppo.pack(samples),
        "group advantages": lambda: ppo._group_advantages(micros),
        "gather samples": lambda: train._gather_samples(rollouts, scores, slots, N, weights),
        "decoding": decode,
        "rewards": submit,
        "a timed phase": phase,
        "metrics of the batch": lambda: ppo._describe(micros),
        "metrics of the rollouts": lambda: train.describe(rollouts, scores, settings),
    }


def make_rollouts() -> list[Rollout]:
    rng = random.Random(0)
    with (HERE / "gsm8k_lengths.csv").open() as file:
        lengths = [(int(row["prompt_tokens"]), int(row["response_tokens"])) for row in csv.DictReader(file)][:NUM_SEQUENCES]
    rollouts = []
    for i, (prompt, response) in enumerate(lengths):
        problem = Problem(
            messages=({"role": "user", "content": ""},),
            answer="7",
            source="made",
            index=i // N,
            prompt_ids=tuple(rng.randrange(1000) for _ in range(prompt)),
        )
        rollouts.append(
            Rollout(
                problem=problem,
                sample=i % N,
                response_ids=tuple(rng.randrange(1000) for _ in range(response)),
                rollout_logprob=tuple(-rng.random() for _ in range(response)),
                finish="stop",
                text=f"so it is \\boxed{{{i}}}",
            )
        )
    return rollouts


def timed(name: str, call: Callable[[], object], repeats: int) -> dict[str, Any]:
    times = []
    for _ in range(repeats + 1):
        start = time.thread_time()
        call()
        times.append(1e3 * (time.thread_time() - start))
    profile = cProfile.Profile()
    profile.runcall(call)
    middle, least = statistics.median(times[1:]), min(times[1:])
    return {
        "path": name,
        "median_ms": round(middle, 3),
        "least_ms": round(least, 3),
        "calls": pstats.Stats(profile).total_calls,
    }


def instructions() -> dict[str, int]:
    """Instructions of one warm call of each path, by callgrind; a reason printed and nothing where it cannot run."""
    if shutil.which("valgrind") is None or shutil.which("cc") is None:
        print("instructions: not counted, valgrind or cc is missing")
        return {}
    with tempfile.TemporaryDirectory() as folder:
        library, out = Path(folder) / "switch.so", Path(folder) / "out"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, HERE / "callgrind_switch.c"], check=True)
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}", sys.executable]
        command += [str(Path(__file__)), "--under-callgrind", str(library)]
        environment = os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, capture_output=True)
        texts = [path.read_text() for path in Path(folder).glob("out.*")]
    found = {}
    for text in texts:
        name, total = re.search(r"Client Request: (.*)", text), re.search(r"^(?:summary|totals): (\d+)", text, re.M)
        if name and total:
            found[name[1]] = int(total[1])
    return found


def count_here(library: str) -> None:
    switch = ctypes.CDLL(library)
    with made() as found:
        for name, call in found.items():
            call()
            gc.collect()
            gc.disable()  # a collection walks the whole heap, and when it comes hangs on what was imported
            switch.begin()
            call()
            switch.end(name.encode())
            gc.enable()


if __name__ == "__main__":
    main()
