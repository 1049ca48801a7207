"""Which of a profile's kernels took most, how near are they to the memory's bandwidth, and do they use the tensor cores?

    python bench/read_ncu.py rank0.csv [--top 5] [--append]

Reads what profile_ncu.sh writes: `ncu --csv --page raw --print-units base` with the metrics below. Calls of one kernel count
together; shares are weighted with their time.
    ms           of all calls; ncu locks the clocks, so a kernel alone may be faster
    GB/s, DRAM   bytes that DRAM moved over the time, and their share of the peak
    tensor       share of cycles in which the tensor pipe worked
    SM           share of the peak of the busiest unit of the multiprocessors
    warps        share of the warps that could be resident
--append adds the rows to bench/results/ncu.csv, with GPU, versions and commit.
"""

import argparse
import csv
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TIME, BYTES, REGISTERS = "gpu__time_duration.sum", "dram__bytes.sum", "launch__registers_per_thread"
SHARES = {
    "dram": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "tensor": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "sm": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
}
METRICS = (TIME, BYTES, REGISTERS, *SHARES.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--top", type=int, default=5)
    parser.add_argument("--append", action="store_true")
    args = parser.parse_args()
    try:
        rows = table(read(args.file))[: args.top]
    except ValueError as error:
        raise SystemExit(f"{args.file}: {error}") from None
    show(rows)
    if args.append:
        from rows import append, origin

        print("appended to", append("ncu", [origin("triton") | row for row in rows]))


def read(path: Path) -> list[dict[str, str]]:
    """A row a launch. ncu's own messages and the line of units are left out.

    Raises:
        ValueError: when a metric is missing, or there is no launch.
    """
    lines = [line for line in path.read_text().splitlines() if line.startswith('"')]
    launches = [row for row in csv.DictReader(lines) if row.get("ID")]
    if not launches:
        raise ValueError("no kernel in it: did the run reach the steps, and does a kernel's name match?")
    if missing := [name for name in METRICS if name not in launches[0]]:
        raise ValueError(f"no {', '.join(missing)}: want ncu's raw page as profile_ncu.sh writes it")
    return launches


def table(launches: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """A row a kernel, the one that took most first."""
    by_name: dict[str, list[dict[str, float]]] = defaultdict(list)
    for row in launches:
        by_name[base_name(row["Kernel Name"])].append({name: float(row[name].replace(",", "") or 0) for name in METRICS})
    rows = []
    for name, calls in by_name.items():
        ns = sum(call[TIME] for call in calls)
        found = {"kernel": name, "calls": len(calls), "ms": round(ns / 1e6, 4)}
        found["gb_s"] = round(sum(call[BYTES] for call in calls) / ns, 1)
        found |= {key: round(sum(c[metric] * c[TIME] for c in calls) / ns, 1) for key, metric in SHARES.items()}
        rows.append(found | {"registers": round(max(call[REGISTERS] for call in calls))})
    return sorted(rows, key=lambda row: -row["ms"])


def base_name(kernel: str) -> str:
    """`void rlsp::packed_gae_kernel<1, 256>(Problem, int)` is packed_gae_kernel."""
    return re.split(r"[<(]", re.sub(r"^void ", "", kernel))[0].split("::")[-1].strip()


def show(rows: Sequence[dict[str, Any]]) -> None:
    print(f"{'kernel':40}{'calls':>6}{'ms':>10}{'GB/s':>8}{'DRAM':>7}{'tensor':>8}{'SM':>7}{'warps':>7}{'regs':>6}")
    for r in rows:
        print(
            f"{r['kernel'][:39]:40}{r['calls']:6}{r['ms']:10.3f}{r['gb_s']:8.0f}{r['dram']:6.1f}%{r['tensor']:7.1f}%"
            f"{r['sm']:6.1f}%{r['warps']:6.1f}%{r['registers']:6}"
        )


if __name__ == "__main__":
    main()
