"""Has anything become slower? `make bench`: compares ratios with the machine class's baseline, and fails past a tolerance.

    python bench/gate.py [--write] [--machine NAME]

Absolute seconds say more about who else is on a machine than about the code, so none is compared. What is:
    calls, instructions   of each host path of bench_host.py for 64 sequences: Python calls, instructions by callgrind
    over a list's copy    median thread time of packing over that of torch.tensor on the same tokens: a ratio of this machine
    packed over padded    trainer tokens a second, bench_packing.py
    loss over plain torch ppo_loss with its gradient over the same from log_softmax and autograd, time
    generation over Hugging Face's   the transformers engine over model.generate, `tiny`, responses to the limit, time
bench/baselines/<machine class>.json holds the value of each, which way is worse, and the tolerance. A class is the device, the
Python and the torch: counts change with them. Without a baseline for this class nothing can be compared, and that is an error;
--write makes one. What became better by more than its tolerance is said, so that the baseline can follow. A measure of the
baseline that could not be taken here (instructions take valgrind) is an error too.
"""

import argparse
import json
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bench_host
import bench_packing
import random_model
import torch
from rlsp_kernels import ppo_loss
from rows import origin

from rlsp_fast import config, data, dist, model, rollout

BASELINES = Path(__file__).parent / "baselines"
WAITING = ("rewards",)
"""Host paths that wait for other processes: their counts depend on how long."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="make this run the baseline")
    parser.add_argument("--machine", default=machine_class(), help="default: %(default)s")
    args = parser.parse_args()
    path = BASELINES / f"{args.machine}.json"
    if not args.write and not path.exists():
        known = ", ".join(sorted(p.stem for p in BASELINES.glob("*.json"))) or "none"
        raise SystemExit(
            f"no baseline for {args.machine} (there are: {known}): python bench/gate.py --write makes one of this commit"
        )
    found = measure()
    if args.write:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"origin": origin(), "measures": found}, indent=2) + "\n")
        print(f"written to {path}")
        return
    lines, worse = compare(json.loads(path.read_text())["measures"], found)
    print("\n".join(lines))
    if worse:
        raise SystemExit(f"worse than {path.name} by more than the tolerance, or not measured: {', '.join(worse)}")


def machine_class() -> str:
    """Device, Python and torch, as a file name."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu {platform.machine()}"
    major, minor, *_ = torch.__version__.split("+")[0].split(".")
    python = ".".join(platform.python_version_tuple()[:2])
    return re.sub(r"[^a-z0-9.]+", "-", f"{device} python{python} torch{major}.{minor}".lower())


def measure() -> dict[str, dict[str, Any]]:
    """{name: {value, worse: higher or lower, tolerance}}."""
    torch.set_num_threads(1)  # ratios on two threads are others
    found: dict[str, dict[str, Any]] = {}
    host = bench_host.measure(100, count=True)
    for row in host:
        if row["path"] not in WAITING:
            found[f"{row['path']}: calls"] = {"value": row["calls"], "worse": "higher", "tolerance": 0.02}
            if row["instructions"] != "":
                found[f"{row['path']}: instructions"] = {"value": row["instructions"], "worse": "higher", "tolerance": 0.05}
    packing = next(row["median_ms"] for row in host if row["path"] == "pack")
    found["pack over a list's copy"] = {"value": round(packing / list_copy_ms(), 3), "worse": "higher", "tolerance": 0.4}
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    packed, padded = bench_packing.measure(None, 16, 3, dtype)
    ratio = packed["tokens_per_s"] / padded["tokens_per_s"]
    found["packed over padded"] = {"value": round(ratio, 3), "worse": "lower", "tolerance": 0.2}
    found["loss over plain torch"] = {"value": round(loss_ratio(), 3), "worse": "higher", "tolerance": 0.3}
    found["generation over Hugging Face's"] = {"value": round(generation_ratio(), 3), "worse": "higher", "tolerance": 0.25}
    return found


def medians(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each call, taken in turns; of the thread where there is no GPU."""
    clock = time.perf_counter if torch.cuda.is_available() else time.thread_time
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats + 1):
        for call, found in zip(calls, times, strict=True):
            start = clock()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            found.append(clock() - start)
    return [statistics.median(found[1:]) for found in times]


def loss_ratio(T: int = 1024, V: int = 2048) -> float:
    torch.zeros(31 << 20, dtype=torch.uint8)  # a large block freed, as every trainer has: glibc keeps small ones from then on
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    logits_TV, token_T = torch.randn(T, V, device=device).requires_grad_(), torch.randint(V, (T,), device=device)
    old_T, advantage_T = 0.1 * torch.randn(T, device=device) - 8, torch.randn(T, device=device)
    weight_T = torch.full((T,), 1 / T, device=device)

    def ours() -> None:
        loss, _ = ppo_loss(logits_TV, token_T, old_T, advantage_T, weight_T, inplace=False)
        torch.autograd.grad(loss, logits_TV)

    def plain() -> None:
        log_p_TV = logits_TV.log_softmax(-1)
        ratio_T = (log_p_TV.gather(-1, token_T[:, None])[:, 0] - old_T).exp()
        loss = -torch.minimum(ratio_T * advantage_T, ratio_T.clamp(0.8, 1.2) * advantage_T).mean()
        torch.autograd.grad(loss, logits_TV)
        with torch.no_grad():
            (log_p_TV.exp() * log_p_TV).sum(-1)  # the entropy that is logged

    mine, theirs = medians([ours, plain], 30)
    return mine / theirs


def generation_ratio(problems: int = 8, n: int = 4, tokens: int = 64) -> float:
    device = dist.setup()
    with tempfile.TemporaryDirectory() as folder:
        path = str(random_model.make("tiny", Path(folder), response=0, dtype=torch.float32))
        tree = {
            "model": {"path": path, "dtype": "float32"},
            "data": {"train": [f"{path}/problems.jsonl"], "template": "{problem}"},
            "rollout": {"engine": "transformers", "n": n, "max_response_length": tokens},
        }
        settings = config.check(tree, "gate")
        words = model.load_tokenizer(path)
        engine = rollout.make_engine(settings, path, words, device)
        loaded = data.load_problems(settings.data.train, settings.data)[:problems]
        asked, _ = data.render(loaded, words, settings.data)
        prompts = [p.prompt_ids for p in asked for _ in range(n)]
    longest = max(map(len, prompts))
    pads = [longest - len(p) for p in prompts]
    ids = torch.tensor([[0] * pad + list(p) for pad, p in zip(pads, prompts, strict=True)], device=device)
    attend = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads], device=device)
    sampling = rollout.Sampling(n=n, temperature=1.0, top_p=1.0, max_tokens=tokens)

    def ours() -> None:
        assert all(len(r.response_ids) == tokens for r in engine.generate(asked, sampling, slots=range(problems)))

    def theirs() -> None:
        with torch.inference_mode():
            engine.model.generate(
                ids,
                attention_mask=attend,
                do_sample=True,
                top_k=0,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                pad_token_id=0,
            )

    mine, other = medians([ours, theirs], 3)
    return mine / other


def list_copy_ms() -> float:
    """Median thread milliseconds of torch.tensor on as many tokens as bench_host packs."""
    tokens = [i % 1000 for i in range(sum(len(r.problem.prompt_ids) + len(r.response_ids) for r in bench_host.make_rollouts()))]
    times = []
    for _ in range(100):
        start = time.thread_time()
        torch.tensor(tokens)
        times.append(1e3 * (time.thread_time() - start))
    return statistics.median(times)


def compare(baseline: dict[str, dict[str, Any]], found: dict[str, dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Lines that say each measure, and the names of those that are worse by more than the baseline's tolerance."""
    lines, worse = [], []
    for name, before in baseline.items():
        if name not in found:
            lines.append(f"{'not measured':14}{name}: {before['value']} in the baseline")
            worse.append(name)
            continue
        change = found[name]["value"] / before["value"] - 1
        bad = change if before["worse"] == "higher" else -change
        verdict = "WORSE" if bad > before["tolerance"] else "better" if bad < -before["tolerance"] else "as before"
        lines.append(
            f"{verdict:14}{name}: {before['value']} -> {found[name]['value']} ({change:+.1%}, of {before['tolerance']:.0%})"
        )
        if verdict == "WORSE":
            worse.append(name)
    lines += [f"{'new':14}{name}: {found[name]['value']}" for name in found if name not in baseline]
    return lines, worse


if __name__ == "__main__":
    main()
