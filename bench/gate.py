"""Has anything become slower? `make bench`: compares ratios with the machine class's baseline, and fails past a tolerance.

    python bench/gate.py [--write] [--machine NAME]

Absolute seconds say more about who else is on a machine than about the code, so none is compared. What is:
    calls, instructions   of each host path of bench_host.py for 64 sequences: Python calls, instructions by callgrind
    over a list's copy    median thread time of packing over that of torch.tensor on the same tokens: a ratio of this machine
    packed over padded    trainer tokens a second, bench_packing.py
bench/baselines/<machine class>.json holds the value of each, which way is worse, and the tolerance. A class is the device, the
Python and the torch: counts change with them. Without a baseline for this class nothing can be compared, and that is an error;
--write makes one. What became better by more than its tolerance is said, so that the baseline can follow.
"""

import argparse
import json
import platform
import re
import statistics
import time
from pathlib import Path
from typing import Any

import bench_host
import bench_packing
import torch
from rows import origin

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
        raise SystemExit(f"worse than {path.name} by more than the tolerance: {', '.join(worse)}")


def machine_class() -> str:
    """Device, Python and torch, as a file name."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu {platform.machine()}"
    major, minor, *_ = torch.__version__.split("+")[0].split(".")
    python = ".".join(platform.python_version_tuple()[:2])
    return re.sub(r"[^a-z0-9.]+", "-", f"{device} python{python} torch{major}.{minor}".lower())


def measure() -> dict[str, dict[str, Any]]:
    """{name: {value, worse: higher or lower, tolerance}}."""
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
    return found


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
