"""Trains a recipe with a profiler's capture range around chosen steps. profile_nsys.sh and profile_ncu.sh start it.

    python bench/profile_run.py RECIPE [--first 3] [--last 3] [--trace FOLDER] [key=value ...]

Around steps `first` to `last` (counted from 1; the run ends with them) it calls cudaProfilerStart and cudaProfilerStop, which
is what nsys and ncu wait for. With --trace it runs torch.profiler there instead and writes FOLDER/rank0.json.gz, rank1.json.gz
and so on: for machines without nsys, CPUs among them. Read either with `python bench/read_profile.py FILE`.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from rlsp_fast import config, dist, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--first", type=int, default=3)
    parser.add_argument("--last", type=int, default=3)
    parser.add_argument("--trace", type=Path, metavar="FOLDER")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    fixed = [f"train.steps={args.last}", "output.save_every=0", "output.resume=never", "output.loggers=[]"]
    settings = config.load(args.recipe, [*fixed, *args.overrides])
    if args.trace is None and not torch.cuda.is_available():
        raise SystemExit("without a GPU there is nothing for nsys or ncu to capture: use --trace FOLDER")
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    profiler = torch.cuda.profiler if args.trace is None else profile(activities=activities)
    rl_step = train.rl_step

    def profiled(settings: config.Config, step: int, *rest: Any) -> tuple:
        if step + 1 == args.first:
            profiler.start()
        found = rl_step(settings, step, *rest)
        if step + 1 == args.last:
            profiler.stop()
        return found

    train.rl_step = profiled
    train.run(settings, with_sft=False, with_rl=True)
    if args.trace is not None:
        args.trace.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(args.trace / f"rank{dist.rank()}.json.gz"))


if __name__ == "__main__":
    main()
