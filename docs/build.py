"""Writes docs/config.md from the config's docstrings; from bench/results docs/scaling.md, docs/throughput.png and the tables of
the README, docs/rewards.md and docs/architecture.md."""

import csv
import re
import sys
from dataclasses import fields
from pathlib import Path
from statistics import mean, median, stdev

from rlsp_fast import config, plan

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))
from rows import AFTER_GENERATION, RESULTS  # noqa: E402


def main() -> None:
    head = "# Settings\n\nMade by docs/build.py from rlsp_fast/config.py. `rlsp config` prints the same.\n\n"
    (ROOT / "docs" / "config.md").write_text(head + config.reference())
    readme = (ROOT / "README.md").read_text()
    readme = fill(readme, "demo table", demo())
    tables = (compare(), step(), full_size(), ncu(), ops(), packing(), host(), rest())
    readme = fill(readme, "bench tables", "\n\n".join(tables))
    (ROOT / "README.md").write_text(readme)
    plot_compare(ROOT / "docs" / "throughput.png")
    (ROOT / "docs" / "scaling.md").write_text(scaling())
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
    """The last row of each value of keys, in the order in which these were measured."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    found: dict[tuple[str, ...], dict[str, str]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            key = tuple(row[k] for k in keys)
            found.pop(key, None)
            found[key] = row
    return list(found.values())


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
    longer = "`--steps 40 --alphas 0.5 1.0 --explorations none length`"
    return "\n".join([*lines, f"{versions} `python bench/bench_exploration.py`, and with", longer])


def arm(name: str, alpha: str, steps: str, runs: list[dict[str, str]], when: str) -> str:
    """A line of the exploration table."""
    shares = [
        across([100 * float(r[f"{k}_{when}"]) for r in runs]) for k in ("accuracy", "worked", "self_correction", "repeated")
    ]
    tokens = across([float(r[f"tokens_{when}"]) for r in runs])
    return f"| {name} | {alpha} | {steps} | {len(runs)} | {' | '.join([shares[0], tokens, *shares[1:]])} |"


def across(values: list[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


# --- beside TRL -------------------------------------------------------------------------------

PARTS = ("gen", "reward", "annotate", "update", "other")
PEERS = {"TRL": "trl", "verl": "verl", "OpenRLHF": "openrlhf"}
CASES = {"spread": "lengths spread", "full": "all to the limit"}


WORK = ("device", "architecture", "dtype", "problems", "samples", "response", "limit", "sequences_at_once", "threads")
"""Columns of compare.csv that rows of one table share."""


def compare() -> str:
    """A table a device and work, a line a case, engine and peer."""
    tables = [compare_table(rows) for rows in compared()]
    return (
        "\n\n".join([*tables, "![where a round's time goes](docs/throughput.png)"]) if tables else "Beside TRL: not measured."
    )


def compare_table(rows: list[dict[str, str]]) -> str:
    lines = [
        "The same GRPO rounds (one generation, two updates) by rlsp_fast and by other trainers, in turns:",
        "",
        "| responses | engine | beside | rlsp_fast, s a round | the other, s a round | tokens a second, rlsp_fast over it |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for case, engine in dict.fromkeys((r["case"], r["engine"]) for r in rows):
        ours = trainers(rows, case, engine, "rlsp_fast")
        for title, peer in PEERS.items():
            if not any((r["case"], r["engine"], r["trainer"]) == (case, engine, peer) for r in rows):
                continue
            theirs = trainers(rows, case, engine, peer)
            ratios = [float(ours[i]["tokens_per_s"]) / float(theirs[i]["tokens_per_s"]) for i in ours.keys() & theirs.keys()]
            said = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "-"
            seconds = [a_round(found) if found else "fails" for found in (ours, theirs)]
            lines.append(f"| {CASES[case]} | {engine} | {title} | {' | '.join(seconds)} | {said} |")
    r = next((r for r in rows if r["step"]), rows[0])
    repeats = 1 + max(int(x["repeat"]) for x in rows)
    seconds = "CPU seconds" if r["basis"] == "cpu" else "Seconds"
    threads = f", {r['threads']} thread{'s' if r['threads'] != '1' else ''}" if r["threads"] else ""
    lines += [
        "",
        f"{seconds} of whole rounds, medians of up to {repeats} repeats; {r['problems']} problems of",
        f"{r['samples']} responses, about {r['response']} tokens long where they spread, at most {r['limit']};",
        f"random weights of `{r['architecture']}`, {r['dtype']}{threads}.",
        f"{where(r)[:-1]}, TRL {r['trl']}. `python bench/compare.py` says what is not the same in all.",
    ]
    lines += [f"{x}." for x in sorted({r["peer"] for r in rows} - {""})]
    older = {(x["engine"], x["commit"]) for x in rows if x["commit"] != r["commit"]}
    lines += [f"The rows of {engine} are of commit {commit}." for engine, commit in sorted(older)]
    titles = {key: title for title, key in PEERS.items()} | {"rlsp_fast": "rlsp_fast"}
    failed = {(titles[x["trainer"]], x["engine"], x["failed"]) for x in rows if x["failed"]}
    return "\n".join(lines + [f"{trainer} with {engine} here: `{why}`" for trainer, engine, why in sorted(failed)])


def compared() -> list[list[dict[str, str]]]:
    """The newest row of each process, by device and work, what was measured last at the end."""
    rows = newest("compare", "case", "engine", "trainer", "repeat", *WORK)
    works = dict.fromkeys(tuple(r[k] for k in WORK) for r in reversed(rows))
    return [[r for r in rows if tuple(r[k] for k in WORK) == work] for work in reversed(works)]


def trainers(rows: list[dict[str, str]], case: str, engine: str, trainer: str) -> dict[str, dict[str, str]]:
    """The rows of one trainer that did not fail, by repeat."""
    return {r["repeat"]: r for r in rows if (r["case"], r["engine"], r["trainer"]) == (case, engine, trainer) and r["step"]}


def share(row: dict[str, str], part: str) -> float:
    return float(row[part]) / float(row["step"])


def a_round(rows: dict[str, dict[str, str]]) -> str:
    return f"{median(float(r['seconds_a_round']) for r in rows.values()):.2f}"


def plot_compare(path: Path) -> None:
    """Bars of seconds a round, medians over the repeats, divided as wall-clock time divides between the phases; of the device
    and the work measured last."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tables = compared()
    rows = tables[-1] if tables else []
    keys = dict.fromkeys((r["case"], r["engine"], r["trainer"]) for r in rows if r["step"])
    if not keys:
        return
    figure, axes = pyplot.subplots(figsize=(8, 0.5 + 0.45 * len(keys)), layout="constrained")
    left = [0.0] * len(keys)
    for part in PARTS:
        found = [trainers(rows, *key).values() for key in keys]
        width = [median(share(r, part) * float(r["seconds_a_round"]) for r in each) for each in found]
        axes.barh(range(len(keys)), width, left=left, label=part)
        left = [a + b for a, b in zip(left, width, strict=True)]
    axes.set_yticks(range(len(keys)), [f"{trainer}, {engine}, {CASES[case]}" for case, engine, trainer in keys])
    axes.invert_yaxis()
    axes.set_xlabel("CPU seconds a round" if any(r["basis"] == "cpu" for r in rows) else "seconds a round")
    figure.legend(loc="outside upper center", ncols=len(PARTS), fontsize="small")
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


# --- scaling ----------------------------------------------------------------------------------


def scaling() -> str:
    """docs/scaling.md."""
    rows = newest("scaling", "model", "gpus")
    head = "# Scaling, on paper\n\nMade by docs/build.py from bench/results/scaling.csv. "
    if not rows:
        return head + "Not computed.\n"
    r = rows[0]
    lines = [
        head + "No GPU has confirmed a number of this page: seconds follow from",
        f"`rlsp plan`'s model for {r['gpu']}s in nodes of 8, as bench/scaling.py says: 1,024 problems of 8 responses a step,",
        f"mini-batches of 256 problems, {r['prompt_tokens']} tokens a prompt, {r['response_tokens']} a response in the mean,",
        f"at most {r['limit']}; PPO with critic and reference. The batch stays as GPUs are added. At each size the layout is",
        "the fastest that fits.",
    ]
    for name in dict.fromkeys(row["model"] for row in rows):
        lines += [
            "", f"## {name}", "",
            "| GPUs | share weights | tensor parallel | s a step | generate | annotate | update | push | tokens/s/GPU |"
            " efficiency | first bottleneck | twice as fast saves |",
            "| --- |" + " --- |" * 11,
        ]  # fmt: skip
        for row in (row for row in rows if row["model"] == name):
            cells = [
                row[k]
                for k in (
                    "gpus",
                    "share_weights",
                    "tensor_parallel",
                    "step_s",
                    "generate_s",
                    "annotate_s",
                    "update_s",
                    "push_s",
                )
            ]
            cells += [f"{int(row['tokens_per_s_per_gpu']):,}", f"{100 * float(row['efficiency']):.0f} %"]
            cells += [row["bottleneck"], f"{100 * float(row['twice_as_fast_saves']):.0f} %"]
            lines.append(f"| {' | '.join(cells)} |")
    gpu = plan.GPUS[r["gpu"]]
    lines += [
        "",
        "`share weights`: ranks that share one copy of the weights (`train.fsdp_shard_size`). Some recompute activations, as",
        "the CSV says. Efficiency: tokens a second and GPU, of the smallest size's.",
        "", "## What went in", "",
        f"- Measured: the host's {r['host_ms']} ms a micro-batch of 64 sequences (bench/results/host.csv, {r['host_source']}).",
        f"- Data sheet, {gpu.name}: {gpu.tflops:,.0f} TFLOP/s; GB/s: {gpu.memory_gb_s:,.0f} memory, {gpu.link_gb_s:,.0f} link,",
        f"  {gpu.host_gb_s:,.0f} to the host, each way.",
        "- Assumed, not measured by anyone here:",
        *(f"  - {getattr(plan.Assumed(), f.name):g} {f.metadata['sentence']}" for f in fields(plan.Assumed)),
        "", f"Commit {r['commit']}. `python bench/scaling.py`", "",
    ]  # fmt: skip
    return "\n".join(lines)


def host() -> str:
    rows = {r["path"]: r for r in newest("host", "path")}
    if not rows:
        return "The host between the kernels: not measured."
    each = ", ".join(f"{name} {float(rows[name]['median_ms']):.2f}" for name in AFTER_GENERATION)
    others = ", ".join(f"{name} {float(r['median_ms']):.2f}" for name, r in rows.items() if name not in AFTER_GENERATION)
    whole = sum(float(rows[name]["median_ms"]) for name in AFTER_GENERATION)
    r = next(iter(rows.values()))
    return (
        f"Python between generation and the end of a step, a micro-batch of 64 sequences: {whole:.2f} ms (target: at most 2):\n"
        f"{each}.\n"
        f"Between the engine's own steps, as responses end, and of a phase: {others}.\n"
        f"{r['device']}, torch {r['torch']}, commit {r['commit']}. `python bench/bench_host.py`"
    )


def rest() -> str:
    """What no table shows yet, and where to read on."""
    on_gpu = {r["trainer"] for r in newest("compare", "trainer", "basis") if r["basis"] == "step"}
    missing = [name for name, key in PEERS.items() if key not in on_gpu]
    return "\n".join(
        [
            *([f"Beside {', '.join(missing)} on a GPU: not measured."] if missing else []),
            "[docs/scaling.md](docs/scaling.md) has 8 to 1,024 GPUs on paper,",
            "[docs/performance.md](docs/performance.md) says what measures what;",
            "`bash bench/gpu.sh` measures all that needs a GPU; `make bench` fails when something became slower.",
        ]
    )


def step() -> str:
    rows = newest("step", "device", "engine", "recipe", "architecture", "overrides")
    rows = [r for r in rows if r["recipe"] == "demo" and not r["architecture"] and not r["overrides"]]
    rows = [r for r in rows if r["device"] == rows[-1]["device"]]
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


def full_size() -> str:
    """A line a run of a named architecture on a GPU."""
    rows = [r for r in newest("step", "device", "engine", "architecture", "overrides") if r["train_mfu"] and r["architecture"]]
    if not rows:
        return "On a GPU, a step of Qwen2.5-0.5B and 1.5B with responses of 4k and 16k tokens, its MFU and MBU: not measured."
    same = set.intersection(*(set(r["overrides"].split()) for r in rows))
    columns = ("step_s", "tokens_per_s", "train_mfu", "decode_mbu", "idle_share", "peak_gib", "commit")
    head = ("device", "architecture", "engine", "settings", *columns)
    lines = ["On a GPU, a step at full size:", "", f"| {' | '.join(head)} |", "| --- |" + " --- |" * (len(head) - 1)]
    for r in rows:
        settings = " ".join(word for word in r["overrides"].split() if word not in same)
        lines.append(f"| {' | '.join([r['device'], r['architecture'], r['engine'], settings, *(r[k] for k in columns)])} |")
    return "\n".join([*lines, "", f"All with `{' '.join(sorted(same))}`. `bash bench/gpu.sh`"])


def ncu() -> str:
    """A line a kernel of ours, as bench/read_ncu.py found it."""
    rows = newest("ncu", "device", "kernel")
    if not rows:
        return (
            "A step on a GPU under nsys and ncu, and what our kernels use of its bandwidth and tensor pipes: not measured\n"
            "(`bash bench/profile_nsys.sh RECIPE`, `bash bench/profile_ncu.sh RECIPE`)."
        )
    columns = {"device": "device", "kernel": "kernel", "calls": "calls", "ms": "ms", "gb_s": "GB/s", "dram": "DRAM, %"}
    columns |= {"tensor": "tensor pipe, %", "commit": "commit"}
    lines = ["Our kernels within a step:", "", f"| {' | '.join(columns.values())} |", "| --- |" + " --- |" * (len(columns) - 1)]
    lines += [f"| {' | '.join(r[k] for k in columns)} |" for r in rows]
    return "\n".join([*lines, "", "`bash bench/profile_ncu.sh`"])


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
        ]
    )


def where(row: dict[str, str]) -> str:
    return f"{row['device']}, torch {row['torch']}, vLLM {row['vllm']}, commit {row['commit']}."


if __name__ == "__main__":
    main()
