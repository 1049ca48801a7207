"""What a run amounts to: a table of the evaluations, the paths of what was written, and a plot of the curves."""

from pathlib import Path
from typing import Any

from rich.table import Table

from rlsp_fast import dist
from rlsp_fast.config import Config
from rlsp_fast.log import console, read_rows


def write_report(folder: Path, config: Config) -> None:
    """Prints the table and writes report.md and curves.png into the run's folder. Rank 0 only."""
    if dist.rank() != 0:
        return
    evaluations = latest(read_rows(folder / "eval.jsonl"))
    steps = [row for row in read_rows(folder / "metrics.jsonl") if row["stage"] == "rl"]
    paths = {
        "config": folder / "config.toml",
        "SFT checkpoint": folder / "sft" / "huggingface",
        "RL checkpoint": max((folder / "huggingface").glob("step_*"), key=_step_of, default=folder / "huggingface"),
        "resumable state": folder / "checkpoints",
        "metrics": folder / "metrics.jsonl",
        "rollouts": folder / "rollouts",
        "TensorBoard": folder / "tensorboard",
    }
    if steps:
        plot(steps, evaluations, folder / "curves.png")
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
    for name, path in paths.items():
        console.print(f"{name:16s} {path}")
    (folder / "report.md").write_text(_markdown(evaluations, paths, config))


def latest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest evaluation of each stage, stages in their first order: a resumed run may have repeated one."""
    return list({row["stage"]: row for row in rows}.values())


def plot(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]], path: Path) -> None:
    """Accuracy, length, reward parts and KL over RL steps; evaluations on held-out problems as points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    x = [row["step"] for row in steps]
    panels = [
        ("accuracy", {"training problems": "reward/accuracy"}, "accuracy"),
        ("tokens a response", {"training problems": "response_length/mean"}, "response_length"),
        ("reward", {"mixed": "critic/score/mean", "outcome": "reward/outcome", "exploration": "reward/exploration"}, None),
        ("KL to the reference (nats a token)", {"KL": "actor/ref_kl"}, None),
        ("value: explained variance", {"critic": "critic/vf_explained_var"}, None),
        ("engine against trainer: mean |dp|", {"mean": "training/rollout_probs_diff_mean"}, None),
    ]
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    points = [row for row in evaluations if row["stage"] != "before SFT"]
    for axis, (title, lines, held_out) in zip(axes.flat, panels, strict=True):
        for label, key in lines.items():
            if any(key in row for row in steps):
                axis.plot(x, [row.get(key, float("nan")) for row in steps], label=label, linewidth=1.6)
        if held_out and points:
            axis.plot([p["step"] for p in points], [p[held_out] for p in points], "o", color="black", label="held out")
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("RL step")
        axis.grid(alpha=0.3)
        if axis.lines and len(axis.lines) > 1:
            axis.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110, bbox_inches="tight", pad_inches=0.15)
    plt.close(figure)


def _cells(row: dict[str, Any]) -> list[str]:
    shares = [row["no_answer"], row["truncated"]]
    return [f"{100 * row['accuracy']:.1f} %", f"{row['response_length']:.1f}", *(f"{100 * s:.1f} %" for s in shares)]


def _markdown(evaluations: list[dict[str, Any]], paths: dict[str, Path], config: Config) -> str:
    lines = [f"# {config.output.dir}", ""]
    if evaluations:
        lines += ["| | accuracy | tokens a response | no answer | cut at the limit |", "| --- | --- | --- | --- | --- |"]
        lines += [f"| {row['stage']} | {' | '.join(_cells(row))} |" for row in evaluations]
        lines += ["", f"{evaluations[0]['num_problems']} held-out problems, temperature {config.rollout.temperature:g}.", ""]
    lines += [f"- {name}: `{path}`" for name, path in paths.items()]
    if "curves" in paths:
        lines += ["", "![curves](curves.png)"]
    return "\n".join(lines) + "\n"


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_").partition(".")[0] or 0)
