"""Scaling on paper: a step of Llama-3.1-8B on 8 to 512 GPUs and of Llama-3.1-70B on 64 to 1,024, and what limits each.

    python bench/scaling.py [--gpu H100]

One recipe's step on more and more GPUs of 8-GPU nodes: `llama-3.1-8b-math-paper` with BATCH problems of SAMPLES responses, so
that the largest machine has work (strong scaling: the batch stays). At each size the layout (ranks that share weights, tensor
parallelism, offload, recomputing) is the fastest of those that fit by `rlsp plan`'s model, whose constants are all assumptions:
docs/scaling.md prints them. One input is measured: the host's milliseconds a micro-batch, the newest rows of
bench/results/host.csv. The first bottleneck is what saves most when it is twice as fast, or half as long; the share of the step
that this saves stands beside it.
Writes bench/results/scaling.csv anew.
"""

import argparse
import csv
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from rows import AFTER_GENERATION, RESULTS, append, origin

from rlsp_fast import config, plan, shapes

BATCH, MINI_BATCH, SAMPLES = 1024, 256, 8
SIZES = {"Llama-3.1-8B": (8, 16, 32, 64, 128, 256, 512), "Llama-3.1-70B": (64, 128, 256, 512, 1024)}
NODE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="H100", choices=plan.GPUS)
    args = parser.parse_args()
    host_ms, source = host_milliseconds()
    rows = []
    for model, sizes in SIZES.items():
        for num_gpus in sizes:
            rows.append(row(model, fastest(model, num_gpus, args.gpu, host_ms), host_ms))
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
        first, mine = rows[-len(sizes)], rows[-len(sizes) :]
        for r in mine:
            r["efficiency"] = round(first["step_s"] * first["gpus"] / (r["step_s"] * r["gpus"]), 3)
    (RESULTS / "scaling.csv").unlink(missing_ok=True)
    head = {"commit": origin("torch")["commit"], "gpu": args.gpu, "host_ms": host_ms, "host_source": source}
    print("written to", append("scaling", [head | r for r in rows]))


def host_milliseconds() -> tuple[float, str]:
    """What a micro-batch took on the host, and where that was measured."""
    with (RESULTS / "host.csv").open() as file:
        found = {r["path"]: r for r in csv.DictReader(file)}
    paths = [found[name] for name in AFTER_GENERATION]
    return round(sum(float(r["median_ms"]) for r in paths), 3), f"{paths[0]['device']}, commit {paths[0]['commit']}"


def fastest(model: str, num_gpus: int, gpu: str, host_ms: float) -> plan.Job:
    """The layout of the least seconds among those that fit."""
    jobs = [job for job in layouts(model, num_gpus, gpu) if plan.fits(job)]
    if not jobs:
        raise SystemExit(f"{model} fits in no layout on {num_gpus} x {gpu}")
    return min(jobs, key=lambda job: seconds(job, host_ms))


def layouts(model: str, num_gpus: int, gpu: str) -> Iterator[plan.Job]:
    shards = [size for size in (8, 16, 32, 64, 128, 256) if size < num_gpus] + [0]
    for shard, parallel, again in itertools.product(shards, (1, 2, 4, 8), (False, True)):
        settings = config.load(
            "llama-3.1-8b-math-paper",
            [
                f"train.batch_size={BATCH}",
                f"train.mini_batch_size={MINI_BATCH}",
                f"rollout.n={SAMPLES}",
                f"rollout.tensor_parallel_size={parallel}",
                f"train.fsdp_shard_size={shard}",
                f"model.activation_checkpointing={str(again).lower()}",
                "rollout.kv_cache_gib=auto",
                "train.offload=auto",
            ],
        )
        nodes = num_gpus // NODE
        yield plan.make_job(settings, shapes.read(model), gpu=gpu, num_gpus=NODE, num_nodes=nodes)


def host_seconds(job: plan.Job, host_ms: float) -> float:
    """The host's work of a step: each of a rank's micro-batches is packed once."""
    tokens = job.num_samples * (job.prompt_tokens + job.response_tokens) / job.num_gpus
    return 1e-3 * host_ms * math.ceil(tokens / job.micro_batch_tokens)


def seconds(job: plan.Job, host_ms: float) -> float:
    return sum(plan.step_seconds(job).values()) + host_seconds(job, host_ms)


def faster(job: plan.Job) -> Iterator[tuple[str, plan.Job]]:
    """The job with one thing twice as fast."""
    gpu, a = job.gpu, job.assumed
    yield "FLOP/s", replace(job, gpu=replace(gpu, tflops=2 * gpu.tflops))
    yield "memory bandwidth", replace(job, gpu=replace(gpu, memory_gb_s=2 * gpu.memory_gb_s))
    yield "network between nodes", replace(job, assumed=replace(a, network_gb_s=2 * a.network_gb_s))
    yield "link within a node", replace(job, gpu=replace(gpu, link_gb_s=2 * gpu.link_gb_s))
    yield "link to the host", replace(job, gpu=replace(gpu, host_gb_s=2 * gpu.host_gb_s))
    yield "scheduling of a decoded token", replace(job, assumed=replace(a, decode_overhead_ms=a.decode_overhead_ms / 2))
    yield "all-reduce of a decoded token", replace(job, assumed=replace(a, all_reduce_us=a.all_reduce_us / 2))
    limit = job.config.rollout.max_response_length
    yield "the longest response", plan.with_key(job, "rollout.max_response_length", limit // 2)
    yield "swap", replace(job, assumed=replace(a, swap_s=a.swap_s / 2))


def row(model: str, job: plan.Job, host_ms: float) -> dict[str, object]:
    found, whole = plan.step_seconds(job), seconds(job, host_ms)
    saved = {name: 1 - seconds(changed, host_ms) / whole for name, changed in faster(job)}
    saved["the host"] = 0.5 * host_seconds(job, host_ms) / whole
    first = max(saved, key=saved.get)
    training = sum(found[name] for name in ("update_critic", "update_actor") if name in found)
    annotating = sum(found[name] for name in ("old_log_prob", "ref", "values") if name in found)
    return {
        "model": model,
        "gpus": job.num_gpus,
        "share_weights": job.shard_size,
        "tensor_parallel": job.tensor_parallel,
        "recompute": job.config.model.activation_checkpointing,
        "offload": "+".join(job.offload),
        "step_s": round(whole, 2),
        "generate_s": round(found["generate"], 2),
        "annotate_s": round(annotating, 2),
        "update_s": round(training, 2),
        "push_s": round(found["push and swap"] + found["offload"], 2),
        "host_s": round(host_seconds(job, host_ms), 4),
        "tokens_per_s_per_gpu": round(job.num_samples * (job.prompt_tokens + job.response_tokens) / whole / job.num_gpus),
        "bottleneck": first,
        "twice_as_fast_saves": round(saved[first], 3),
        "prompt_tokens": job.prompt_tokens,
        "response_tokens": job.response_tokens,
        "limit": job.config.rollout.max_response_length,
    }


if __name__ == "__main__":
    main()
