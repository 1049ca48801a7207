"""What does it save not to wait for the longest response (rollout.oversample), and to begin the longest first?

    python bench/bench_partial.py [--run outputs/demo/run] [--time-steps 8] [key=value ...]

Replays real response lengths through a model of one engine's decoding, with the trainer's own rules (pending.Pending,
rollout.Harvest) for what is begun, taken, carried and waited for. Lengths: GSM8K's solutions (bench/gsm8k_lengths.csv), one a
problem, the same for all its responses and in every epoch, so that `longest` is told the truth: the most that order can save;
and, of --run, a run's own rollouts/step_*.jsonl, a problem's responses drawn from the ones it had, expected as long as those
drawn before.

The model: up to SLOTS responses are decoded at once, begun in order as slots come free. A decode step takes A + B * active,
reading a prompt or what was carried C a token. The constants are an 8 B model's in bfloat16 on an H100, from data sheets, not
measured: A its weights read once (16 GB at 3.35 TB/s, 70 % reached) and a millisecond of launching, B the keys and values of
300 tokens, C the products of a token at half of the peak.

With --run and --time-steps N, N steps of each kind are also timed for real: the run's newest policy on vLLM, on this machine.
Both append to bench/results/partial.csv; `seconds` is of generation, a step: the mean, or of real ones the median.
"""

import argparse
import csv
import heapq
import itertools
import json
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rows import append, origin

from rlsp_fast import config as configs
from rlsp_fast import data, dist, model
from rlsp_fast.pending import Pending
from rlsp_fast.rollout import Harvest, Sampling, make_engine
from rlsp_fast.types import Group, Problem

A, B, C = 7.8e-3, 1.7e-5, 3.2e-5  # seconds: a decode step, an active sequence more, a token read
SLOTS, SAMPLES = 256, 4
BATCHES = {"all at once": SLOTS // SAMPLES, "four waves": 4 * SLOTS // SAMPLES}  # problems a step
OVERSAMPLE, ORDERS = (1.0, 1.25, 1.5, 2.0), ("as given", "longest")
Length = Callable[[int, random.Random], int]  # of a response to the problem at this position, tokens


@dataclass
class Tally:
    """Sums over the steps counted."""

    seconds: list[float] = field(default_factory=list)
    busy: float = 0.0
    slots: float = 0.0
    tokens: int = 0
    carried: int = 0
    carries: list[int] = field(default_factory=list)

    def take(self, taken: dict[int, Group]) -> None:
        for group in taken.values():
            self.tokens += sum(len(r.response_ids) for r in group.responses)
            self.carried += sum(r.num_carried for r in group.responses)
            self.carries.append(group.num_carries)

    def row(self, steps: int, middle: Callable[[list[float]], float] = statistics.mean) -> dict[str, object]:
        return {
            "seconds": round(middle(self.seconds), 4),
            "idle_share": round(1 - self.busy / self.slots, 4) if self.slots else "",
            "tokens": round(self.tokens / steps),
            "carried_tokens": round(self.carried / steps),
            "mean_carries": round(statistics.mean(self.carries), 3),
            "max_carries": max(self.carries),
            "steps": steps,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a run")
    parser.add_argument("--time-steps", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the run's settings, for --time-steps")
    args = parser.parse_args()
    if args.time_steps and args.run is None:
        parser.error("--time-steps needs --run")
    sources = {"gsm8k": gsm8k()} | ({"run": rollouts(args.run)} if args.run else {})
    rows = []
    for (name, (problems, length)), (load, batch_size) in itertools.product(sources.items(), BATCHES.items()):
        for oversample, order in itertools.product(OVERSAMPLE, ORDERS):
            tally, steps = replay(problems, length, batch_size, oversample, order)
            rows.append(describe(name, load, batch_size, SAMPLES, SLOTS, oversample, order) | tally.row(steps))
    if args.time_steps:
        rows += timed(args.run, args.time_steps, args.overrides)
    show(rows)
    print("appended to", append("partial", [origin() | row for row in rows]))


def describe(name: str, load: str, batch_size: int, n: int, slots: int, oversample: float, order: str) -> dict[str, object]:
    settings = {"lengths": name, "load": load, "batch_size": batch_size, "n": n, "slots": slots}
    return settings | {"oversample": oversample, "order": order}


# --- lengths ----------------------------------------------------------------------------------------


def gsm8k() -> tuple[list[Problem], Length]:
    with (Path(__file__).parent / "gsm8k_lengths.csv").open() as file:
        lengths = [(int(row["prompt_tokens"]), int(row["response_tokens"])) for row in csv.DictReader(file)]
    return [problem(i, prompt) for i, (prompt, _) in enumerate(lengths)], lambda position, rng: lengths[position][1]


def rollouts(run: Path) -> tuple[list[Problem], Length]:
    """Of the run's newest step that was written."""
    newest = max((run / "rollouts").glob("step_*.jsonl"), key=lambda path: int(path.stem.split("_")[1]))
    found: dict[tuple[str, int], list[int]] = {}
    for line in newest.read_text().splitlines():
        row = json.loads(line)
        found.setdefault((row["source"], row["index"]), []).append(row["num_tokens"])
    lengths = list(found.values())
    return [problem(i, 30) for i in range(len(lengths))], lambda position, rng: rng.choice(lengths[position])


def problem(index: int, num_tokens: int) -> Problem:
    return Problem(messages=(), answer="", source="replay", index=index, prompt_ids=(0,) * num_tokens)


# --- replay -----------------------------------------------------------------------------------------


def replay(problems: Sequence[Problem], length: Length, batch_size: int, oversample: float, order: str) -> tuple[Tally, int]:
    """Steps through the problems twice to learn their lengths and reach a steady state, then until 32 steps are counted."""
    pending, tally, rng = Pending(), Tally(), random.Random(0)
    drawn: list[list[int]] = []  # by slot and sample, when it is begun: groups left come first, in the order they were left in
    warm_up = -(-2 * len(problems) // batch_size)
    for step in range(warm_up + 32):
        chosen = dict(enumerate(pending.take(problems, seed=0, step=step, batch_size=batch_size, oversample=oversample)))
        if order == "as given":
            chosen = {slot: replace(group, expected=0.0) for slot, group in chosen.items()}
        for slot in range(len(drawn), len(chosen)):
            drawn.append([length(chosen[slot].position, rng) for _ in range(SAMPLES)])
        counted = tally if step >= warm_up else Tally()
        taken, left = decode(chosen, batch_size, drawn, counted)
        counted.take(taken)
        seen = {g.position: statistics.mean(len(r.response_ids) for r in g.responses) for g in taken.values()}
        pending.add(list(left.values()), seen, problems)
        drawn = [drawn[slot] for slot in left]
    return tally, 32


def decode(
    groups: dict[int, Group], enough: int, lengths: Sequence[Sequence[int]], tally: Tally
) -> tuple[dict[int, Group], dict[int, Group]]:
    """One engine's step: the time it takes goes to tally."""
    harvest = Harvest(groups, SAMPLES, enough, None, groups)
    queue, active = deque(enumerate(harvest.work())), []  # active: (decode step it ends at, number), a heap
    work = dict(queue)
    clock, seconds = 0, 0.0
    begun_at: dict[int, int] = {}
    while not harvest.full:
        while queue and len(active) < SLOTS:
            number, (slot, begun) = queue.popleft()
            begun_at[number] = clock
            seconds += C * (len(begun.problem.prompt_ids) + len(begun.response_ids))
            heapq.heappush(active, (clock + lengths[slot][begun.sample] - len(begun.response_ids), number))
        until = active[0][0]
        seconds += (until - clock) * (A + B * len(active))
        tally.busy += (until - clock) * len(active)
        tally.slots += (until - clock) * SLOTS
        clock = until
        while active and active[0][0] == clock:
            _, number = heapq.heappop(active)
            put(harvest, work[number], clock - begun_at[number], "stop")
    for _, number in active:
        put(harvest, work[number], clock - begun_at[number], "unfinished")
    tally.seconds.append(seconds)
    return harvest.result()


def put(harvest: Harvest, work: tuple, num_tokens: int, finish: str) -> None:
    slot, begun = work
    ids = (0,) * (len(begun.response_ids) + num_tokens)
    harvest.put(slot, replace(begun, response_ids=ids, rollout_logprob=(0.0,) * len(ids), finish=finish))


# --- for real ---------------------------------------------------------------------------------------


def timed(run: Path, num_steps: int, overrides: Sequence[str]) -> list[dict[str, object]]:
    """Generation with the run's newest policy, after a first step that is not counted; the ways take turns."""
    newest = max((run / "huggingface").glob("step_*"), key=lambda path: int(path.name.split("_")[1]))
    config = configs.load(str(run / "config.toml"), [f"model.path={newest}", *overrides])
    device = dist.setup()
    tokenizer = model.load_tokenizer(str(newest))
    problems, _ = data.render(data.load_problems(config.data.train, config.data), tokenizer, config.data)
    engine = make_engine(config, str(newest), tokenizer, device)
    r, t = config.rollout, config.train
    ways = {oversample: (Pending(), Tally()) for oversample in OVERSAMPLE}
    for step in range(num_steps + 1):
        sampling = Sampling(
            n=r.n, temperature=r.temperature, top_p=r.top_p, max_tokens=r.max_response_length, stop=r.stop, seed=step
        )
        for oversample, (pending, tally) in ways.items():
            chosen = pending.take(problems, seed=0, step=step, batch_size=t.batch_size, oversample=oversample)
            engine.reset_prefix_cache()
            start = time.perf_counter()
            taken, left = engine.generate_until(dict(enumerate(chosen)), sampling, enough=t.batch_size)
            seconds = time.perf_counter() - start
            pending.add(list(left.values()), {}, problems)
            if step:
                tally.seconds.append(seconds)
                tally.take(taken)
    engine.close()
    dist.cleanup()
    settings = (f"timed, {engine.name}", f"{t.batch_size * r.n / r.max_num_seqs:g} waves", t.batch_size, r.n, r.max_num_seqs)
    return [
        describe(*settings, oversample, "as given") | tally.row(num_steps, statistics.median)
        for oversample, (_, tally) in ways.items()
    ]


def show(rows: Sequence[dict[str, object]]) -> None:
    names = ("lengths", "load", "oversample", "order", "seconds", "idle_share", "tokens", "carried_tokens", "mean_carries")
    names += ("max_carries",)
    print("  ".join(f"{name:>14s}" for name in names))
    for row in rows:
        print("  ".join(f"{row[name]!s:>14s}" for name in names))


if __name__ == "__main__":
    main()
