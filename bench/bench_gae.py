"""How long do advantages take? packed_gae beside what trainers run, which is a Python loop over time.

    python bench/bench_gae.py [--device cpu|cuda] [--threads 2] [--most-tokens 1048576] [--repeats 20]

All providers take turns in one process, so that a busy machine slows all of them; each starts from a cold cache (a
buffer larger than any cache is read in between; lines written to it would have to go out during the call). Prints a
table and appends it to bench/results/gae.csv. Times are medians in microseconds, outputs allocated and all. GB/s counts
17 bytes a token: value and mask read, reward, advantage and return written; "of copy" is its share of what torch's copy_
of as many bytes reaches in the same run.

Loops take (S, L) tensors and one step of Python for each of L tokens:
  loop          ours: delta and lambda alone (the recurrence of TRL and OpenRLHF, which mask before it)
  masked loop   ours: and masked tokens carried through (that of verl and NeMo-RL)
  verl, TRL, OpenRLHF   their own, where importable. verl's and TRL's whiten too. TRL: 0.11.4, the last release in which
                        it is a function. "loop / this" divides by verl's, else by the masked loop.
On a GPU, dense scans as well where importable: rl-triton (on no registry) and PufferLib (its wheels want torch 2.9).
"""

import argparse
import functools
import importlib
import logging
import operator
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from rlsp_kernels.packed_gae import backend_report, packed_gae, packed_gae_torch
from rows import append, origin
from torch import Tensor

BYTES_A_TOKEN = 17
LONGEST_LOOP = 131072  # a Python loop takes seconds there

# Sequences x tokens of each: few long ones as well as many short ones.
CASES = [
    (8, 2048), (1, 16384), (64, 2048), (1, 131072), (64, 4096), (512, 2048), (8, 131072), (4096, 2048), (64, 131072),
]  # fmt: skip


def loop(reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """GAE over (S, L), one token at a time; the mask is not looked at."""
    next_value = advantage = torch.zeros_like(value[:, 0])
    columns = []
    for t in range(value.shape[1] - 1, -1, -1):
        advantage = reward[:, t] + gamma * next_value - value[:, t] + gamma * lam * advantage
        next_value = value[:, t]
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, advantages + value


def masked_loop(reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """GAE over (S, L), one token at a time; masked tokens carry next value and advantage through."""
    next_value = advantage = torch.zeros_like(value[:, 0])
    columns = []
    for t in range(value.shape[1] - 1, -1, -1):
        keep = mask[:, t]
        step = reward[:, t] + gamma * next_value - value[:, t] + gamma * lam * advantage
        advantage = keep * step + (1 - keep) * advantage
        next_value = keep * value[:, t] + (1 - keep) * next_value
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, advantages + value


@functools.cache
def imported(module: str, name: str) -> Callable[..., object] | None:
    """A function of another project; None, and said once, where it is not to be had."""
    try:
        return operator.attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError, RuntimeError) as error:  # RuntimeError: TRL's word for a missing dependency
        print(f"{module.split('.')[0]}: left out, {str(error).splitlines()[-1]}")
        return None


def peer_loops(reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float) -> dict[str, Callable[[], object]]:
    """The Python loops over (S, L) that trainers publish."""
    calls = {}
    if verl := imported("verl.trainer.ppo.core_algos", "compute_gae_advantage_return"):
        numbers = torch.tensor([gamma, lam], device=value.device)
        calls["verl"] = lambda: verl(reward, value, mask, *numbers)
    if trl := imported("trl.trainer.ppo_trainer", "PPOTrainer.compute_advantages"):
        trainer = SimpleNamespace(config=SimpleNamespace(gamma=gamma, lam=lam, whiten_rewards=False))
        calls["TRL"] = lambda: trl(trainer, value, reward, mask)
    maker = "openrlhf.trainer.ppo_utils.experience_maker"
    if openrlhf := imported(maker, "RemoteExperienceMaker.get_advantages_and_returns"):
        calls["OpenRLHF"] = lambda: openrlhf(None, value, reward, mask, gamma, lam)
    return calls


def peer_scans(reward: Tensor, value: Tensor, gamma: float, lam: float) -> dict[str, Callable[[], object]]:
    """GPU kernels over (S, L) with no mask. They give advantages alone."""
    calls = {}
    end = torch.zeros_like(value)
    end[:, -1] = 1
    if rl_triton := imported("rl_triton", "compute_gae"):
        calls["rl-triton"] = lambda: rl_triton(reward, value, end, gamma=gamma, lambda_=lam)
    if imported("pufferlib._C", "__name__"):  # importing it registers the op
        puffer = torch.ops.pufferlib.compute_puff_advantage
        # Rewards and ends of a token stand one column later than its value, and the last column gets no advantage.
        later = [torch.nn.functional.pad(x, (1, 0)) for x in (reward, end)]
        values, ratio = torch.nn.functional.pad(value, (0, 1)), torch.ones_like(later[0])
        calls["PufferLib"] = lambda: puffer(values, *later, ratio, torch.empty_like(values), gamma, lam, 1.0, 1.0)
    return calls


def providers(S: int, L: int, device: str) -> dict[str, Callable[[], object]]:
    """Name -> the call that is timed, for one batch of S sequences of L tokens."""
    g = torch.Generator().manual_seed(0)
    T = S * L
    value_T = torch.randn(T, generator=g).to(device)
    mask_T = torch.ones(T, dtype=torch.bool, device=device)
    cu_seqlens = torch.arange(0, T + 1, L, dtype=torch.int32, device=device)
    terminal = {"terminal_reward_S": torch.randn(S, generator=g).to(device), "gamma": 1.0, "lam": 0.95}
    reward, value, mask = torch.zeros(S, L, device=device), value_T.view(S, L), mask_T.view(S, L).float()
    reward[:, -1] = terminal["terminal_reward_S"]
    source = torch.empty(BYTES_A_TOKEN * T // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    calls = {"copy": lambda: target.copy_(source)}
    for name in ("cuda",) if device == "cuda" else ("cpp",):
        if backend_report()[name].loaded:
            calls[name] = lambda name=name: packed_gae(value_T, cu_seqlens, mask_T, backend=name, **terminal)
        else:
            print(f"{name}: left out, {backend_report()[name].detail}")
    calls["torch"] = lambda: packed_gae_torch(value_T, cu_seqlens, mask_T, **terminal)
    compiled = torch.compile(packed_gae_torch, dynamic=True)
    calls["torch.compile"] = lambda: compiled(value_T, cu_seqlens, mask_T, **terminal)
    if L <= LONGEST_LOOP and T <= 1 << 20:
        calls["loop"] = lambda: loop(reward, value, mask, 1.0, 0.95)
        calls["masked loop"] = lambda: masked_loop(reward, value, mask, 1.0, 0.95)
        calls |= peer_loops(reward, value, mask, 1.0, 0.95)
    if device == "cuda":
        calls |= peer_scans(reward, value, 1.0, 0.95)
    return calls


def measure(calls: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, list[float]]:
    """Microseconds of every call, in turns. What takes more than a second is called three times and not warmed up."""
    # On a GPU, reading it also takes longer than it takes to call the op: what is timed is the device and not the caller.
    flush = torch.zeros((1024 if device == "cuda" else 64) << 18, device=device)  # MiB
    if device == "cpu":  # glibc hands 3 MB of outputs back to the kernel and faults them in anew until it has freed a
        torch.zeros(31 << 20, dtype=torch.uint8)  # block of nearly 32 MiB, as every trainer has: 1 ms of 64 x 4096

    def once(call: Callable[[], object]) -> float:
        flush.sum()
        if device == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            return 1e3 * begin.elapsed_time(end)
        start = time.perf_counter()
        call()
        return 1e6 * (time.perf_counter() - start)

    times = {name: [once(call)] for name, call in calls.items()}  # compiles, and fills torch's allocator
    slow = {name for name, (first,) in times.items() if first > 1e6 and name != "torch.compile"}
    times = {name: kept if name in slow else [] for name, kept in times.items()}
    for turn in range(repeats):
        for name, call in calls.items():
            if name not in slow or turn < 2:
                times[name].append(once(call))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--most-tokens", type=int, default=8 << 20, help="leave out larger cases")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # the definition breaks its graph where it looks at shapes
    rows = []
    for S, L in CASES:
        if S * L > args.most_tokens:
            continue
        times = measure(providers(S, L, args.device), args.device, args.repeats)
        median = {name: statistics.median(all_times) for name, all_times in times.items()}
        loops = [median[name] for name in ("verl", "masked loop") if name in median]
        print(f"\n{S} x {L} = {S * L} tokens")
        print(f"{'':15}{'median us':>12}{'p20':>12}{'p80':>12}{'GB/s':>9}{'of copy':>9}{'loop / this':>13}")
        for name, all_times in times.items():
            low, high = statistics.quantiles(all_times, n=5)[0], statistics.quantiles(all_times, n=5)[-1]
            gb_per_s, share = BYTES_A_TOKEN * S * L / median[name] / 1e3, median["copy"] / median[name]
            faster = f"{loops[0] / median[name]:.1f}" if loops else ""
            print(f"{name:15}{median[name]:12.1f}{low:12.1f}{high:12.1f}{gb_per_s:9.2f}{share:9.1%}{faster:>13}")
            times_us = {"median_us": median[name], "p20_us": low, "p80_us": high}
            rows.append(
                origin()
                | {"threads": args.threads, "sequences": S, "tokens_each": L, "provider": name}
                | {key: f"{number:.1f}" for key, number in times_us.items()}
                | {"gb_per_s": f"{gb_per_s:.2f}", "of_copy": f"{share:.3f}", "loop_over_this": faster}
            )
    print(f"\nappended to {append('gae', rows)}")


if __name__ == "__main__":
    main()
