"""What do alpha and the exploration reward change in RL on the demo's sums?

    python bench/bench_exploration.py [--seeds 0 1 2] [--alphas 0.5 0.8 0.95 1.0]
        [--explorations none length length+repetition] [--steps 12] [--list]

One SFT a seed, shared by all arms: `rlsp demo`'s materials and settings, in outputs/exploration/seedN/sft, done once. Then one
RL run an arm from that checkpoint: --steps steps of BATCH problems x 4 responses with the transformers engine, other settings
of the demo recipe. Without exploration alpha only scales the reward, and at alpha = 1 exploration has no weight, so the arms
(any alpha, none) and (1.0, any) are one run, named alpha 1.0, none. Each finished arm is a row in
bench/results/exploration.csv; arms that stand there with the same seed and settings are skipped, and an arm cut short goes on
from its last checkpoint, so the same command continues. To run arms anew, remove outputs/exploration.

Before and after RL are one response at temperature 0.7 to each of the 512 held-out problems. Of these responses:
accuracy; standard_error, in points, of the accuracy after RL; tokens, the mean a response; worked, the share that writes steps
before the answer; self_correction, the share that says it was wrong; repeated, the mean share of tokens in runs of 12 that
occurred before; cut, the share cut at 80 tokens. `kl` is of the last step, nats a token. No row is left out.
"""

import argparse
import csv
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rows import RESULTS, append, origin

ROOT = Path(__file__).parent.parent
NGRAM = 12  # tokens: a worked sum has about 35 of them, a term about 5
BATCH, MINI_BATCH = 16, 8
SETTINGS = ("seed", "alpha", "exploration", "rl_steps", "batch_size")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.5, 0.8, 0.95, 1.0])
    parser.add_argument("--explorations", nargs="+", default=["none", "length", "length+repetition"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--list", action="store_true", help="print the arms that are still to run, and stop")
    args = parser.parse_args()
    done = finished()
    for seed in args.seeds:
        for alpha, exploration in arms(args.alphas, args.explorations):
            settings = dict(zip(SETTINGS, (seed, alpha, exploration, args.steps, BATCH), strict=True))
            if tuple(map(str, settings.values())) in done:
                continue
            if args.list:
                print(settings)
                continue
            start = supervised(seed)
            row = {**origin("transformers"), **settings, **reinforced(start, settings)}
            append("exploration", [row])
            print(json.dumps(row), flush=True)


def arms(alphas: Sequence[float], explorations: Sequence[str]) -> Iterator[tuple[float, str]]:
    """Each arm once, those that coincide as (1.0, none)."""
    seen = set()
    for exploration in explorations:
        for alpha in alphas:
            arm = (1.0, "none") if alpha == 1.0 or exploration == "none" else (alpha, exploration)
            if arm not in seen:
                seen.add(arm)
                yield arm


def finished() -> set[tuple[str, ...]]:
    """The settings of the rows that are there."""
    path = RESULTS / "exploration.csv"
    if not path.exists():
        return set()
    with path.open() as file:
        return {tuple(row[name] for name in SETTINGS) for row in csv.DictReader(file)}


def supervised(seed: int) -> Path:
    """A folder with the demo's materials and the model after SFT; made unless it is there."""
    from rlsp_fast import config, demo

    folder = ROOT / "outputs" / "exploration" / f"seed{seed}"
    if not (folder / "sft" / "sft" / "huggingface" / "config.json").exists():
        demo.prepare(folder, config.load("demo", [*places(folder), f"train.seed={seed}"]))
        rlsp("sft", *places(folder), f"train.seed={seed}", f"output.dir={folder / 'sft'}", "data.validation=[]")
    return folder


def reinforced(folder: Path, settings: dict[str, object]) -> dict[str, object]:
    """What RL with these settings changes on the held-out problems."""
    out = folder / "_".join(str(settings[name]) for name in SETTINGS[1:]).replace("+", "_and_")
    exploration = str(settings["exploration"]).replace("repetition", f"repetition:{NGRAM}")
    steps = settings["rl_steps"]
    began = time.perf_counter()
    rlsp(
        "train", *places(folder), f"model.path={folder / 'sft' / 'sft' / 'huggingface'}", "sft.steps=0",
        f"train.seed={settings['seed']}", f"train.steps={steps}", f"train.batch_size={BATCH}",
        f"train.mini_batch_size={MINI_BATCH}", f"reward.alpha={settings['alpha']}", f"reward.exploration={exploration}",
        "rollout.engine=transformers", "output.rollouts_every=0", "output.save_every=10", f"output.dir={out}",
    )  # fmt: skip
    seconds = time.perf_counter() - began
    before, after = (measured(folder, out, stage) for stage in ("before RL", "after RL"))
    last = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][-1]
    row: dict[str, object] = {"problems": after.pop("problems")}
    before.pop("problems")
    for name in after:
        row |= {f"{name}_before": round(before[name], 4), f"{name}_after": round(after[name], 4)}
    spread = math.sqrt(after["accuracy"] * (1 - after["accuracy"]) / row["problems"])
    return row | {"standard_error": round(100 * spread, 1), "kl": round(last["actor/ref_kl"], 4), "seconds": round(seconds)}


def measured(folder: Path, out: Path, stage: str) -> dict[str, float]:
    """What the responses of one evaluation look like."""
    from transformers import AutoTokenizer

    from rlsp_fast.repetition import repeated_share

    tokenizer = AutoTokenizer.from_pretrained(folder / "start")
    lines = (out / "rollouts" / f"eval_{stage.replace(' ', '_')}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    ids = [tokenizer(row["output"], add_special_tokens=False).input_ids for row in rows]
    of = {
        "accuracy": [row["correct"] for row in rows],
        "tokens": [row["num_tokens"] for row in rows],
        "worked": ["=" in row["output"] for row in rows],
        "self_correction": ["that is wrong" in row["output"] for row in rows],
        "repeated": [repeated_share(tokens, NGRAM) for tokens in ids],
        "cut": [row["finish"] == "length" for row in rows],
    }
    return {"problems": len(rows)} | {name: sum(values) / len(rows) for name, values in of.items()}


def places(folder: Path) -> list[str]:
    return [
        f"model.path={folder / 'start'}",
        f"data.train={folder / 'problems.jsonl'}",
        f"data.validation={folder / 'held_out.jsonl'}",
        f"sft.train={folder / 'demonstrations.jsonl'}",
        f"sft.validation={folder / 'demonstrations_validation.jsonl'}",
    ]


def rlsp(verb: str, *overrides: str) -> None:
    """A process of its own: memory and threads start afresh."""
    path = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    command = [sys.executable, "-m", "rlsp_fast", verb, "demo", *overrides]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": path})


if __name__ == "__main__":
    main()
