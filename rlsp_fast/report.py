"""What a run amounts to: tables of evaluations and behaviours, warnings, the paths of what was written, the curves."""

import re
from pathlib import Path
from typing import Any

from rich.table import Table

from rlsp_fast import dist
from rlsp_fast.config import Config
from rlsp_fast.log import console, read_rows

WINDOW = 8
"""Steps at each end of a run that the table of behaviours averages."""
LENGTH, REPETITION = "response_length/mean", "response/repetition"


def write_report(folder: Path, config: Config) -> None:
    """Prints the table and writes report.md and curves.png into the run's folder. Rank 0 only."""
    if dist.rank() != 0:
        return
    evaluations = latest(read_rows(folder / "eval.jsonl"))
    steps = [row for row in read_rows(folder / "metrics.jsonl") if row["stage"] == "rl"]
    alarms, shown = read_rows(folder / "warnings.jsonl"), behaviours(steps)
    paths = {
        "config": folder / "config.toml",
        "SFT checkpoint": folder / "sft" / "huggingface",
        "RL checkpoint": max((folder / "huggingface").glob("step_*"), key=_step_of, default=folder / "huggingface"),
        "resumable state": folder / "checkpoints",
        "metrics": folder / "metrics.jsonl",
        "warnings": folder / "warnings.jsonl",
        "rollouts": folder / "rollouts",
        "TensorBoard": folder / "tensorboard",
    }
    if steps:
        plot(steps, evaluations, alarms, folder / "curves.png")
        paths["curves"] = folder / "curves.png"
    paths = {name: path for name, path in paths.items() if path.exists()}
    if evaluations:
        n, t = evaluations[0]["num_problems"], config.rollout.temperature
        table = Table(title=f"{n} held-out problems, one response each at temperature {t:g}", title_justify="left")
        for column in ("", "accuracy", "tokens a response", "no answer", "cut at the limit"):
            table.add_column(column, justify="left" if not column else "right")
        for row in evaluations:
            table.add_row(row["stage"], *_cells(row))
        console.print(table)
    if shown:
        title, columns, cells = shown
        table = Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column, justify="left" if not column else "right")
        for row in cells:
            table.add_row(*row)
        console.print(table)
        for alarm in alarms:
            console.print(f"warning at step {alarm['step']}, {alarm['detector']}: {alarm['message']}")
        if not alarms:
            console.print("no detector has found anything (docs/monitors.md)")
    for name, path in paths.items():
        console.print(f"{name:16s} {path}")
    (folder / "report.md").write_text(_markdown(evaluations, shown, alarms, paths, config))


def latest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest evaluation of each stage, stages in their first order: a resumed run may have repeated one."""
    return list({row["stage"]: row for row in rows}.values())


def behaviours(steps: list[dict[str, Any]]) -> tuple[str, list[str], list[list[str]]] | None:
    """Title, columns and rows of a table: each behaviour in the first and in the last steps. None before there are two."""
    known = [row for row in steps if "behaviour/any" in row]
    if len(known) < 2:
        return None
    window = min(WINDOW, len(known) // 2)
    first, last = known[:window], known[-window:]

    def share(rows: list[dict[str, Any]], metric: str) -> str:
        values = [row[metric] for row in rows if metric in row]
        return f"{100 * sum(values) / len(values):.1f} %" if values else "-"

    def cells(label: str, metric: str, *parts: str) -> list[str]:
        return [label, share(first, metric), share(last, metric), *(share(last, metric + part) for part in parts)]

    rows = [cells(name.replace("_", " "), f"behaviour/{name}", "/correct", "/wrong") for name in _names(last[-1])]
    rows += [cells("any emergent", "behaviour/any", "/correct", "/wrong"), [*cells("copied tokens", REPETITION), "", ""]]
    columns = ["", _span(first), _span(last), "of the correct", "of the wrong"]
    return "share of the responses that show a behaviour; the two right columns are of the last steps", columns, rows


def _names(row: dict[str, Any]) -> list[str]:
    """The behaviours that a step's metrics have, `any` left out."""
    found = [re.fullmatch(r"behaviour/(\w+)", key) for key in row]
    return [match[1] for match in found if match and match[1] != "any"]


def _span(rows: list[dict[str, Any]]) -> str:
    a, b = rows[0]["step"], rows[-1]["step"]
    return f"steps {a}-{b}" if b > a else f"step {a}"


def plot(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]], alarms: list[dict[str, Any]], path: Path) -> None:
    """Curves over RL steps; evaluations on held-out problems as points, warnings as dashed lines where they belong."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    x = [row["step"] for row in steps]
    shown = {
        name.replace("_", " "): f"behaviour/{name}"
        for name in _names(next((row for row in reversed(steps) if "behaviour/any" in row), {}))
    }
    shown = {label: key for label, key in shown.items() if any(row.get(key) for row in steps)}
    panels = [
        ("accuracy", {"training problems": "reward/accuracy"}, "accuracy", ("behaviours_without_accuracy",)),
        ("tokens a response", {"training problems": LENGTH}, "response_length", ("length_without_accuracy",)),
        ("reward", {"mixed": "critic/score/mean", "outcome": "reward/outcome", "exploration": "reward/exploration"}, None, ()),
        ("behaviours (share of responses)", shown, None, ("no_behaviour", "behaviours_without_accuracy")),
        ("copied tokens (share)", {"copied": REPETITION}, None, ("repetition_rising",)),
        ("entropy (nats a token)", {"entropy": "actor/entropy"}, None, ("entropy_collapse",)),
        ("KL to the reference (nats a token)", {"KL": "actor/ref_kl"}, None, ("kl_collapse",)),
        ("value: explained variance", {"critic": "critic/vf_explained_var"}, None, ()),
        ("engine against trainer: mean |dp|", {"mean": "training/rollout_probs_diff_mean"}, None, ()),
    ]
    figure, axes = plt.subplots(3, 3, figsize=(13, 9.5), layout="constrained")
    points = [row for row in evaluations if row["stage"] != "before SFT"]
    for axis, (title, lines, held_out, detectors) in zip(axes.flat, panels, strict=True):
        for label, key in lines.items():
            if any(key in row for row in steps):
                axis.plot(x, [row.get(key, float("nan")) for row in steps], label=label, linewidth=1.6)
        if held_out and points:
            axis.plot([p["step"] for p in points], [p[held_out] for p in points], "o", color="black", label="held out")
        for alarm in (alarm for alarm in alarms if alarm["detector"] in detectors):
            label = f"warning: {alarm['detector'].replace('_', ' ')}"
            known = label in axis.get_legend_handles_labels()[1]
            axis.axvline(alarm["step"], color="tab:red", linestyle="--", linewidth=1.2, label=None if known else label)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("RL step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.set_xlim(min(0, x[0]), x[-1] + max(1, len(x) // 30))
        if axis.lines and (len(axis.lines) > 1 or lines is shown):
            axis.legend(frameon=False, fontsize=9)
        if title == "accuracy" or title.endswith("(share)") or title.endswith("(share of responses)"):
            axis.set_ylim(bottom=0)
        if not axis.lines:
            axis.text(0.5, 0.5, "nothing to show", transform=axis.transAxes, ha="center", va="center", color="gray")
            axis.set_xticks([])
            axis.set_yticks([])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _cells(row: dict[str, Any]) -> list[str]:
    shares = [row["no_answer"], row["truncated"]]
    return [f"{100 * row['accuracy']:.1f} %", f"{row['response_length']:.1f}", *(f"{100 * s:.1f} %" for s in shares)]


def _markdown(
    evaluations: list[dict[str, Any]],
    shown: tuple[str, list[str], list[list[str]]] | None,
    alarms: list[dict[str, Any]],
    paths: dict[str, Path],
    config: Config,
) -> str:
    lines = [f"# {config.output.dir}", ""]
    if evaluations:
        lines += ["| | accuracy | tokens a response | no answer | cut at the limit |", "| --- | --- | --- | --- | --- |"]
        lines += [f"| {row['stage']} | {' | '.join(_cells(row))} |" for row in evaluations]
        lines += ["", f"{evaluations[0]['num_problems']} held-out problems, temperature {config.rollout.temperature:g}.", ""]
    if shown:
        title, columns, rows = shown
        lines += [f"{title[0].upper()}{title[1:]}.", "", f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
        lines += [*(f"| {' | '.join(row)} |" for row in rows), ""]
        warnings = [f"- **{a['detector']}** at step {a['step']}: {a['message']}" for a in alarms]
        lines += [*(warnings or ["No detector found anything."]), ""]
    lines += [f"- {name}: `{path}`" for name, path in paths.items()]
    if "curves" in paths:
        lines += ["", "![curves](curves.png)"]
    return "\n".join(lines) + "\n"


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_").partition(".")[0] or 0)
