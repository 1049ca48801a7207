"""Where did the device's time go, phase by phase? Reads an nsys SQLite export or a torch.profiler trace.

    nsys export --type=sqlite rank0.nsys-rep && python bench/read_profile.py rank0.sqlite
    python bench/read_profile.py rank0.json.gz [--top 5] [--csv FILE]

One line a phase, all its occurrences together (the ranges of rlsp_fast.log.Timer and of the swap):
    wall      milliseconds between the beginning and the end of its ranges
    busy      share of them in which the device ran a kernel, a copy or a memset
    NCCL      milliseconds of NCCL's kernels, and `exposed`, those of them in which nothing else ran
    copies    milliseconds and MB of copies and memsets, by direction
    gaps      milliseconds in which the device had nothing to do, the longest one, and how many were longer than 20 us
then the kernels that took most, with calls. A kernel belongs to the phase in which it began. In a trace without a device's
events (a CPU run) torch's outermost operators stand for kernels, and a gap is Python.
"""

import argparse
import bisect
import csv
import gzip
import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LONG_GAP_NS = 20_000
COPY_KINDS = {1: "HtoD", 2: "DtoH", 8: "DtoD", 10: "PtoP"}  # CUpti_ActivityMemcpyKind


@dataclass(frozen=True, slots=True)
class Span:
    """Something that ran from start to end, ns on the trace's clock."""

    name: str
    start: int
    end: int
    kind: str = "kernel"
    """kernel, nccl, copy or phase."""
    num_bytes: int = 0

    @property
    def length(self) -> int:
        return self.end - self.start


class ProfileError(ValueError):
    """A file that is neither, or has nothing to say; the message says what is missing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--top", type=int, default=5, help="kernels a phase")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    try:
        rows = table(*read(args.file), top=args.top)
    except ProfileError as error:
        raise SystemExit(f"{args.file}: {error}") from None
    show(rows)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


# --- reading ----------------------------------------------------------------------------------


def read(path: Path) -> tuple[list[Span], list[Span]]:
    """(phases, what the device did), by the file's first bytes: SQLite, or JSON, gzipped or not.

    Raises:
        ProfileError: when it is neither, or has no phases.
    """
    if not path.is_file():
        raise ProfileError("no such file")
    head = path.open("rb").read(16)
    if head.startswith(b"SQLite format 3"):
        phases, work = read_nsys(path)
    elif head.startswith((b"\x1f\x8b", b"{")):
        phases, work = read_trace(path)
    else:
        raise ProfileError("want an SQLite file (nsys export --type=sqlite) or a torch.profiler trace (.json or .json.gz)")
    if not phases:
        raise ProfileError(
            "no ranges of rlsp_fast in it: was it taken within rlsp_fast's steps, with NVTX traced? nsys 2022.4 records "
            "nothing from the package nvtx since 0.2.14: take a newer nsys, or nvtx 0.2.11"
        )
    return phases, work


def read_nsys(path: Path) -> tuple[list[Span], list[Span]]:
    """An export of nsys. Tables that a run had no events for are absent."""
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
        db.row_factory = sqlite3.Row
        tables = {row["name"] for row in db.execute("select name from sqlite_master where type = 'table'")}
        names = dict(db.execute("select id, value from StringIds").fetchall()) if "StringIds" in tables else {}

        def rows(table: str) -> Iterable[sqlite3.Row]:
            return db.execute(f"select * from {table}") if table in tables else ()

        events = list(rows("NVTX_EVENTS"))
        text = lambda row: row["text"] if row["text"] is not None else names.get(row["textId"], "")  # noqa: E731
        domains = {row["domainId"] for row in events if row["eventType"] == 75 and text(row) == "rlsp_fast"}  # DomainCreate
        phases = [
            Span(text(row), row["start"], row["end"], "phase")
            for row in events
            if row["eventType"] in (59, 60) and row["end"] is not None and row["domainId"] in domains  # push-pop, start-end
        ]
        work = []
        for row in rows("CUPTI_ACTIVITY_KIND_KERNEL"):
            name = names.get(row["shortName"], str(row["shortName"]))
            work.append(Span(name, row["start"], row["end"], kernel_kind(name)))
        for row in rows("CUPTI_ACTIVITY_KIND_MEMCPY"):
            name = COPY_KINDS.get(row["copyKind"], "copy")
            work.append(Span(name, row["start"], row["end"], "copy", row["bytes"]))
        for row in rows("CUPTI_ACTIVITY_KIND_MEMSET"):
            work.append(Span("memset", row["start"], row["end"], "copy", row["bytes"]))
    return phases, work


def read_trace(path: Path) -> tuple[list[Span], list[Span]]:
    """A Chrome trace of torch.profiler; microseconds there."""
    open_ = gzip.open if path.open("rb").read(2) == b"\x1f\x8b" else open
    with open_(path, "rt") as file:
        trace = json.load(file)
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X" and "cat" in event]
    by_category: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        by_category[event["cat"]].append(event)
    phases = [_span(e, "phase") for e in by_category["user_annotation"] if is_phase(e["name"])]
    kernels = [_span(e, kernel_kind(e["name"])) for e in by_category["kernel"]]
    copies = [_copy(e) for category in ("gpu_memcpy", "gpu_memset") for e in by_category[category]]
    if not kernels and trace.get("deviceProperties"):
        raise ProfileError("it was taken on a GPU and has no kernels: CUPTI gave none (is another profiler attached?)")
    return phases, kernels + copies or outermost(by_category["cpu_op"])


def is_phase(name: str) -> bool:
    """Whether a range is ours: torch has ranges of its own, such as `Optimizer.step#AdamW.step`."""
    return not any(sign in name for sign in ("#", "::", "ProfilerStep", " ", "nccl:", "gloo:"))


def kernel_kind(name: str) -> str:
    return "nccl" if name.lower().startswith("nccl") else "kernel"


def _span(event: dict[str, Any], kind: str, name: str | None = None, num_bytes: int = 0) -> Span:
    start = round(1e3 * float(event["ts"]))
    return Span(name or event["name"], start, start + round(1e3 * float(event["dur"])), kind, num_bytes)


def _copy(event: dict[str, Any]) -> Span:
    """torch calls them `Memcpy HtoD (Pinned -> Device)` and `Memset (Device)`."""
    name = event["name"].split(" (")[0].removeprefix("Memcpy ").lower()
    name = {"htod": "HtoD", "dtoh": "DtoH", "dtod": "DtoD"}.get(name, name)
    return _span(event, "copy", name, int(event.get("args", {}).get("bytes", 0)))


def outermost(events: Sequence[dict[str, Any]]) -> list[Span]:
    """Operators that no other operator called, on each thread."""
    found, until = [], {}
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        span = _span(event, "kernel")
        if span.start >= until.get(event["tid"], -1):
            found.append(span)
            until[event["tid"]] = span.end
    return found


# --- the table --------------------------------------------------------------------------------


def table(phases: Sequence[Span], work: Sequence[Span], *, top: int = 5) -> list[dict[str, Any]]:
    """A row a phase, in the order in which they first began; milliseconds."""
    work = sorted(work, key=lambda span: span.start)
    starts = [span.start for span in work]
    rows = []
    for name in dict.fromkeys(phase.name for phase in sorted(phases, key=lambda span: span.start)):
        mine = [phase for phase in phases if phase.name == name]
        inside, gaps = [], []
        for phase in mine:
            within = work[bisect.bisect_left(starts, phase.start) : bisect.bisect_left(starts, phase.end)]
            inside += within
            gaps += idle(phase, union(within))
        wall = sum(phase.length for phase in mine)
        nccl = union(span for span in inside if span.kind == "nccl")
        others = union(span for span in inside if span.kind != "nccl")
        exposed = total(union(inside)) - total(others)
        kernels, calls = Counter[str](), Counter[str]()
        for span in inside:
            if span.kind != "copy":
                kernels[span.name] += span.length
                calls[span.name] += 1
        rows.append(
            {
                "phase": name,
                "times": len(mine),
                "wall_ms": wall / 1e6,
                "busy": 1 - sum(gaps) / wall if wall else 0.0,
                "nccl_ms": total(nccl) / 1e6,
                "nccl_exposed_ms": exposed / 1e6,
                "gaps_ms": sum(gaps) / 1e6,
                "longest_gap_ms": max(gaps, default=0) / 1e6,
                "long_gaps": sum(gap > LONG_GAP_NS for gap in gaps),
                "copies": _copies(inside),
                "kernels": "; ".join(f"{k} {ns / 1e6:.3f} ms x{calls[k]}" for k, ns in kernels.most_common(top)),
            }
        )
    return rows


def union(spans: Iterable[Span]) -> list[tuple[int, int]]:
    """Disjoint intervals that cover the same time."""
    found: list[tuple[int, int]] = []
    for start, end in sorted((span.start, span.end) for span in spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def total(intervals: Iterable[tuple[int, int]]) -> int:
    return sum(end - start for start, end in intervals)


def idle(phase: Span, busy: Sequence[tuple[int, int]]) -> list[int]:
    """Lengths of the times within a phase that busy does not cover."""
    edges = [phase.start, *(min(max(edge, phase.start), phase.end) for part in busy for edge in part), phase.end]
    return [end - start for start, end in zip(edges[::2], edges[1::2], strict=True) if end > start]


def _copies(spans: Iterable[Span]) -> str:
    sizes, times = Counter[str](), Counter[str]()
    for span in spans:
        if span.kind == "copy":
            sizes[span.name] += span.num_bytes
            times[span.name] += span.length
    return "; ".join(f"{name} {times[name] / 1e6:.3f} ms {sizes[name] / 1e6:.2f} MB" for name in sorted(times))


def show(rows: Sequence[dict[str, Any]]) -> None:
    print(f"{'phase':24}{'times':>6}{'wall ms':>11}{'busy':>7}{'NCCL':>9}{'exposed':>9}{'gaps':>10}{'longest':>9}{'>20us':>7}")
    for row in rows:
        print(
            f"{row['phase']:24}{row['times']:6}{row['wall_ms']:11.3f}{row['busy']:7.1%}{row['nccl_ms']:9.3f}"
            f"{row['nccl_exposed_ms']:9.3f}{row['gaps_ms']:10.3f}{row['longest_gap_ms']:9.3f}{row['long_gaps']:7}"
        )
        for label, text in (("copies", row["copies"]), ("kernels", row["kernels"])):
            if text:
                print(f"    {label}: {text}")


if __name__ == "__main__":
    main()
