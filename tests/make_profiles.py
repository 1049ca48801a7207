"""Made the small profiles that tests/test_read_profile.py reads: `python tests/make_profiles.py [TRACE [EXPORT]]`.

profile_nsys.sqlite is ours from the first byte: the tables and columns that nsys documents for its SQLite export, filled with a
step short enough to check by hand. No GPU has been near it. profile_torch.json.gz is cut from TRACE, which torch.profiler wrote
around a real step on a CPU (bench/profile_run.py --trace): the events of two phases, with what read_profile.py looks at.
profile_nsys_cpu.sqlite is cut from EXPORT, which nsys 2022.4.2 wrote of two steps on a CPU: its own tables of NVTX ranges and
strings, the rows of rlsp_fast alone. There are no kernels in it.
"""

import gzip
import json
import sqlite3
import sys
from pathlib import Path

HERE = Path(__file__).parent
MS = 1_000_000  # ns
TABLES = {
    "StringIds": "id INTEGER, value TEXT",
    "NVTX_EVENTS": "start INTEGER, end INTEGER, eventType INTEGER, text TEXT, textId INTEGER, domainId INTEGER, "
    "globalTid INTEGER",
    "CUPTI_ACTIVITY_KIND_KERNEL": "start INTEGER, end INTEGER, deviceId INTEGER, streamId INTEGER, correlationId INTEGER, "
    "demangledName INTEGER, shortName INTEGER",
    "CUPTI_ACTIVITY_KIND_MEMCPY": "start INTEGER, end INTEGER, deviceId INTEGER, streamId INTEGER, bytes INTEGER, "
    "copyKind INTEGER",
}
NAMES = {1: "rlsp_fast", 2: "old_log_prob", 3: "update_actor", 4: "gemm", 5: "ncclDevKernel_AllGather", 6: "torch", 7: "theirs"}
# eventType 75 names a domain, 59 is a range that was pushed and popped. Names stand in text or, by textId, in StringIds.
NVTX = [
    (0, None, 75, "rlsp_fast", None, 1, 9),
    (0, None, 75, None, 6, 2, 9),
    (0, 10 * MS, 59, "old_log_prob", None, 1, 9),
    (10 * MS, 30 * MS, 59, None, 3, 1, 9),
    (40 * MS, 50 * MS, 59, None, 3, 1, 9),
    (0, 50 * MS, 59, None, 7, 2, 9),
]
KERNELS = [  # start, end, stream, name
    (1 * MS, 5 * MS, 7, 4),
    (4 * MS, 8 * MS, 8, 5),  # 1 ms behind the gemm, 3 ms exposed
    (10 * MS, 20 * MS, 7, 4),
    (12 * MS, 16 * MS, 8, 5),  # hidden
    (41 * MS, 45 * MS, 7, 4),
    (45 * MS, 46 * MS, 7, 4),
    (60 * MS, 70 * MS, 7, 4),  # outside of any phase
]
COPIES = [(21 * MS, 23 * MS, 7, 4_000_000, 1), (24 * MS, 25 * MS, 7, 1_000_000, 2)]
KEPT_PHASES = ("old_log_prob", "adv")


def main() -> None:
    make_nsys(HERE / "profile_nsys.sqlite")
    if len(sys.argv) > 1:
        cut_trace(Path(sys.argv[1]), HERE / "profile_torch.json.gz")
    if len(sys.argv) > 2:
        cut_export(Path(sys.argv[2]), HERE / "profile_nsys_cpu.sqlite")


def make_nsys(path: Path) -> None:
    path.unlink(missing_ok=True)
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA page_size = 512")
        for name, columns in TABLES.items():
            db.execute(f"CREATE TABLE {name} ({columns})")
        db.executemany("INSERT INTO StringIds VALUES (?, ?)", NAMES.items())
        db.executemany("INSERT INTO NVTX_EVENTS VALUES (?, ?, ?, ?, ?, ?, ?)", NVTX)
        kernels = [(start, end, 0, stream, i, name, name) for i, (start, end, stream, name) in enumerate(KERNELS)]
        db.executemany("INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, ?, ?, ?, ?, ?)", kernels)
        copies = [(start, end, 0, *rest) for start, end, *rest in COPIES]
        db.executemany("INSERT INTO CUPTI_ACTIVITY_KIND_MEMCPY VALUES (?, ?, ?, ?, ?, ?)", copies)


def cut_export(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    with sqlite3.connect(target) as db:
        db.execute("PRAGMA page_size = 512")
        db.execute("ATTACH ? AS source", (str(source),))
        for name in ("StringIds", "NVTX_EVENTS"):
            (create,) = db.execute("SELECT sql FROM source.sqlite_master WHERE name = ?", (name,)).fetchone()
            db.execute(create)
        domain = "SELECT domainId FROM source.NVTX_EVENTS WHERE eventType = 75 AND text = 'rlsp_fast'"
        db.execute(f"INSERT INTO NVTX_EVENTS SELECT * FROM source.NVTX_EVENTS WHERE domainId IN ({domain})")
        db.execute("INSERT INTO StringIds SELECT * FROM source.StringIds WHERE id IN (SELECT textId FROM NVTX_EVENTS)")


def cut_trace(source: Path, target: Path) -> None:
    with gzip.open(source, "rt") as file:
        events = [e for e in json.load(file)["traceEvents"] if e.get("cat") in ("user_annotation", "cpu_op") and "dur" in e]
    ranges = [e for e in events if e["cat"] == "user_annotation" and e["name"] in KEPT_PHASES]
    within = [e for e in events if any(r["ts"] <= e["ts"] < r["ts"] + r["dur"] for r in ranges)]
    kept = [{key: e[key] for key in ("ph", "cat", "name", "ts", "dur", "tid")} for e in within]
    text = json.dumps({"traceEvents": kept}, separators=(",", ":"))
    target.write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main()
