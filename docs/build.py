"""Writes docs/config.md from the config's docstrings, and the tables in the README and two of docs from bench/results."""

import csv
import re
from pathlib import Path
from statistics import mean, stdev

from rlsp_fast import config

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def main() -> None:
    head = "# Settings\n\nMade by docs/build.py from rlsp_fast/config.py. `rlsp config` prints the same.\n\n"
    (ROOT / "docs" / "config.md").write_text(head + config.reference())
    readme = (ROOT / "README.md").read_text()
    readme = fill(readme, "demo table", demo())
    readme = fill(readme, "bench tables", "\n\n".join((step(), ops(), packing())))
    (ROOT / "README.md").write_text(readme)
    rewards = ROOT / "docs" / "rewards.md"
    rewards.write_text(fill(rewards.read_text(), "exploration table", exploration()))
    architecture = ROOT / "docs" / "architecture.md"
    architecture.write_text(fill(architecture.read_text(), "partial table", partial()))


def fill(text: str, name: str, content: str) -> str:
    """Replaces what stands between `<!-- name: ... -->` and the next `<!-- end -->`."""
    pattern = rf"(<!-- {name}:[^>]*-->\n).*?(<!-- end -->)"
    assert re.search(pattern, text, flags=re.S), name
    return re.sub(pattern, lambda m: f"{m[1]}{content}\n{m[2]}", text, flags=re.S)


def newest(name: str, *keys: str) -> list[dict[str, str]]:
    """The last row of each value of keys."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open() as file:
        return list({tuple(row[k] for k in keys): row for row in csv.DictReader(file)}.values())


def demo() -> str:
    rows = newest("demo", "seed")
    if not rows:
        return "Not measured."
    lines = [
        "| seed | before SFT | after SFT | after RL | gained by RL | tokens a response |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in sorted(rows, key=lambda r: int(r["seed"])):
        before, sft, rl = (f"{100 * float(r[k]):.1f} %" for k in ("before_sft", "after_sft", "after_rl"))
        gained = f"{float(r['points']):+.1f} ± {r['standard_error']}"
        lines.append(f"| {r['seed']} | {before} | {sft} | {rl} | {gained} | {r['tokens_after_sft']} → {r['tokens_after_rl']} |")
    r = rows[0] | {"commit": ", ".join(sorted({row["commit"] for row in rows}))}
    lines += ["", f"Accuracy on {r['problems']} held-out problems, one response each at temperature 0.7. {where(r)}"]
    worst = max(float(r["worst_probs_diff"]) for r in rows)
    lines += [f"Largest mean probability difference between engine and trainer at any step: {worst:.1e}."]
    lines += ["`python bench/bench_demo.py`"]
    return "\n".join(lines)


def exploration() -> str:
    """Each arm over its seeds."""
    rows = newest("exploration", "exploration", "alpha", "seed", "rl_steps", "batch_size")
    if not rows:
        return "Not measured."
    arms: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for r in sorted(rows, key=lambda r: (int(r["rl_steps"]), r["exploration"] != "none", r["exploration"], float(r["alpha"]))):
        arms.setdefault((r["exploration"], r["alpha"] if r["exploration"] != "none" else "", r["rl_steps"]), []).append(r)
    lines = [
        "| exploration | alpha | steps | seeds | accuracy, % | tokens | works it out, % | corrects itself, % | repeated, % |",
        "| --- |" + " --- |" * 8,
        arm("before RL", "", "0", max(arms.values(), key=len), "before"),
        *(arm(*names, runs, "after") for names, runs in arms.items()),
    ]
    r = rows[-1] | {"commit": ", ".join(sorted({row["commit"] for row in rows}))}
    lines += [
        "",
        f"RL steps of {r['batch_size']} problems with 4 responses each; {r['problems']} held-out",
    ]
    lines += ["problems; mean ± standard deviation between seeds. `none` is also every arm with alpha = 1."]
    versions = f"{r['device']}, torch {r['torch']}, transformers {r['transformers']}, commit {r['commit']}."
    return "\n".join([*lines, f"{versions} `python bench/bench_exploration.py`"])


def arm(name: str, alpha: str, steps: str, runs: list[dict[str, str]], when: str) -> str:
    """A line of the exploration table."""
    shares = [
        across([100 * float(r[f"{k}_{when}"]) for r in runs]) for k in ("accuracy", "worked", "self_correction", "repeated")
    ]
    tokens = across([float(r[f"tokens_{when}"]) for r in runs])
    return f"| {name} | {alpha} | {steps} | {len(runs)} | {' | '.join([shares[0], tokens, *shares[1:]])} |"


def across(values: list[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def step() -> str:
    rows = newest("step", "engine")
    if not rows:
        return "Step time: not measured."
    phases = [name for name in rows[0] if name.endswith("_s") and name not in ("step_s", "tokens_per_s")]
    lines = ["One RL step of the demo recipe, seconds by phase (medians, so they need not add up):", ""]
    lines += ["| phase | " + " | ".join(r["engine"] for r in rows) + " |", "| --- |" + " --- |" * len(rows)]
    for phase in [*phases, "step_s"]:
        lines.append(f"| {phase.removesuffix('_s')} | " + " | ".join(f"{float(r[phase]):.3f}" for r in rows) + " |")
    lines.append("| tokens a second | " + " | ".join(f"{int(r['tokens_per_s']):,}" for r in rows) + " |")
    lines.append("| peak memory, GiB | " + " | ".join(r["peak_gib"] for r in rows) + " |")
    return "\n".join([*lines, "", f"{where(rows[0])} `python bench/bench_step.py`"])


def ops() -> str:
    rows = newest("ops", "operator", "group")
    rows = [r for r in rows if r["commit"] == rows[-1]["commit"]]  # the largest of the rest change with the code
    if not rows:
        return "Inside training: not measured."
    share = {r["operator"] or r["group"]: f"{100 * float(r['share']):.0f} %" for r in rows}
    groups = ", ".join(f"{r['group']} {share[r['group']]}" for r in rows if not r["operator"])
    largest = ", ".join(f"`{r['operator']}` {share[r['operator']]}" for r in rows if r["operator"])
    return (
        f"Inside training (forward, backward, optimizer of policy and critic): {groups}.\n"
        f"Largest of the rest: {largest}. {where(rows[0])} `python bench/bench_ops.py`"
    )


def partial() -> str:
    """Seconds of generation, a step, by over-sampling: the last replay, and the last timing for real."""
    rows = newest("partial", "lengths", "load", "oversample", "order")
    if not rows:
        return "What it saves: not measured."
    amounts = sorted({r["oversample"] for r in rows}, key=float)
    lines = ["| lengths | slots | begun first | " + " | ".join(f"oversample {x}" for x in amounts) + " |"]
    lines.append("| --- | --- | --- |" + " --- |" * len(amounts))
    for key in dict.fromkeys((r["lengths"], r["load"], r["order"]) for r in rows):
        found = {r["oversample"]: r for r in rows if (r["lengths"], r["load"], r["order"]) == key}
        cells = [f"{float(r['seconds']):.2f} s, {int(r['carried_tokens']):,} carried" for r in map(found.get, amounts)]
        lines.append("| " + " | ".join([*key, *cells]) + " |")
    return "\n".join([*lines, "", f"Generation alone, a step. {where(rows[-1])} `python bench/bench_partial.py`"])


def packing() -> str:
    rows = {r["layout"]: r for r in newest("packing", "layout")}
    if not rows:
        return "Packing against padding: not measured."
    packed, padded = rows["packed"], rows["padded"]
    ratio = int(packed["tokens_per_s"]) / int(padded["tokens_per_s"])
    share = 100 * float(padded["padding_share"])
    return "\n".join(
        [
            f"Training on GSM8K's lengths: packed {int(packed['tokens_per_s']):,} tokens a second, padded",
            f"{int(padded['tokens_per_s']):,}: {ratio:.2f}x ({share:.0f} % of the padded batch is padding). {where(packed)}",
            "`python bench/bench_packing.py`",
            "",
            "On a GPU: not measured.",
        ]
    )


def where(row: dict[str, str]) -> str:
    return f"{row['device']}, torch {row['torch']}, vLLM {row['vllm']}, commit {row['commit']}."


if __name__ == "__main__":
    main()
