"""Providers of one result, timed in turns in one process: shared by the benches of the Triton kernels.

Every provider gets its turn before any gets its next, so that a busy or throttled machine slows all of them. In each turn a
provider is called twice, outputs allocated and all: "cold", after a buffer larger than the L2 cache was written, and "hot", at
once after the cold call (and after its own preparation, such as the forward before a backward). Times are CUDA events around
the call on a GPU, the wall clock on a CPU; medians with the 20th and 80th percentile.

Beside its time, each provider shows what it reached of the hardware: the bytes or FLOPs that the task cannot do without, over
the time, as a share of what a plain copy or a bare matrix product reached in the same run; the most memory it had allocated at
once on top of its inputs (GPU only); and its error on a small slice of the same kind of inputs.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from rows import append, installed, origin
from torch import Tensor

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SLICE_TOKENS = 256  # errors are measured on so many, two tiles of the peers' kernels

Results = Mapping[str, Tensor]


@dataclass(frozen=True)
class Provider:
    """One way to compute something."""

    name: str
    call: Callable[[object], Results]
    """What is timed. Takes what `before` returned; returns named results ("value", "entropy", "d_logits", ...)."""
    computes: str = ""
    """Which of the bench's truths the results are held against: "" for the whole task, else the part of it that is done."""
    lacks: str = ""
    """What it does not do and ours does."""
    package: str = ""
    """The distribution that it comes from; "" for ours, torch and the yardsticks."""
    before: Callable[[], object] = lambda: None
    """Not timed: restores inputs that a call overwrites, runs the forward before a backward."""
    work: float | None = None
    """Bytes or FLOPs of this provider where they are not the task's: those of a yardstick."""


@dataclass
class Times:
    """What one provider took."""

    cold_ms: list[float] = field(default_factory=list)
    hot_ms: list[float] = field(default_factory=list)
    extra_bytes: int | None = None
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def median_ms(self) -> float:
        """Cold."""
        return statistics.median(self.cold_ms)


@dataclass(frozen=True)
class Target:
    """A limit that ours should stay within on an H200."""

    text: str
    reached: float
    limit: float
    at_most: bool = True


def arguments(
    doc: str | None,
    tokens: Sequence[int],
    repeats: int,
    vocabs: Sequence[int] = (),
    hidden: int = 0,
    more: argparse.ArgumentParser | None = None,
) -> argparse.Namespace:
    """The options all these benches share. The defaults are a GPU's; on a CPU a small size proves that the bench works."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[more] if more else []
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tokens", type=int, nargs="+", help=f"T; {', '.join(map(str, tokens))} on a GPU, 256 on a CPU")
    if vocabs:
        parser.add_argument("--vocab", type=int, nargs="+", help=f"V; {', '.join(map(str, vocabs))} on a GPU, 4096 on a CPU")
    if hidden:
        parser.add_argument("--hidden", type=int, help=f"D; {hidden} on a GPU, 128 on a CPU")
    parser.add_argument("--dtype", choices=DTYPES, help="bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--repeats", type=int, default=repeats, help="turns")
    parser.add_argument("--providers", nargs="+", help="only peers whose name contains one of these; ours always run")
    args = parser.parse_args()
    gpu = args.device == "cuda"
    args.tokens = args.tokens or (list(tokens) if gpu else [256])
    if vocabs:
        args.vocab = args.vocab or (list(vocabs) if gpu else [4096])
    if hidden:
        args.hidden = args.hidden or (hidden if gpu else 128)
    args.dtype = args.dtype or ("bfloat16" if gpu else "float32")
    args.torch_dtype = DTYPES[args.dtype]
    return args


def copy_yardstick(device: str, num_bytes: float) -> Provider:
    """torch's copy_ of at most 2 GiB, moving num_bytes in all (half of them read, half written)."""
    size = max(1, int(min(num_bytes / 2, 2 << 30)))
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy(_: object) -> Results:
        target.copy_(source)
        return {}

    return Provider("copy", copy, work=2.0 * size)


def product_yardstick(hidden_TD: Tensor, weight_VD: Tensor, products: int = 1) -> Provider:
    """The bare matrix product of the logits; of 3, those of the two gradients too. Its result is allocated beforehand."""
    T, D, V = *hidden_TD.shape, len(weight_VD)
    logits_TV = hidden_TD.new_empty(T, V)
    d_hidden_TD, d_weight_VD = torch.empty_like(hidden_TD), torch.empty_like(weight_VD)

    def call(_: object) -> Results:
        with torch.no_grad():
            torch.mm(hidden_TD, weight_VD.T, out=logits_TV)
            if products == 3:
                torch.mm(logits_TV, weight_VD, out=d_hidden_TD)
                torch.mm(logits_TV.T, hidden_TD, out=d_weight_VD)
        return {}

    return Provider("matrix product" if products == 1 else "3 matrix products", call, work=2.0 * products * T * V * D)


def measure(
    providers: Sequence[Provider], device: str, repeats: int, small: Sequence[Provider], truths: Mapping[str, Results]
) -> dict[str, Times]:
    """Times every provider in turns. `small` are the same providers on a slice whose float64 results are `truths`.

    A peer that fails is left out, with its reason printed. What takes more than a second gets two turns.
    """
    on_slice = {provider.name: provider for provider in small}
    times = {}
    for provider in providers:
        try:
            times[provider.name] = _warm_up(provider, on_slice.get(provider.name), truths, device)
        except Exception as error:  # whatever a peer raises must not end the others' run
            if not provider.package:
                raise
            reason = (str(error).strip().splitlines() or [""])[0]
            print(f"{provider.name}: left out, {type(error).__name__}: {reason[:160]}")
    flush = torch.empty((256 if device == "cuda" else 64) << 20, dtype=torch.uint8, device=device)
    slow = {name for name, taken in times.items() if taken.cold_ms.pop() > 1000}
    for turn in range(repeats):
        for provider in providers:
            if provider.name not in times or (provider.name in slow and turn > 1):
                continue
            times[provider.name].cold_ms.append(_milliseconds(provider, device, flush))
            times[provider.name].hot_ms.append(_milliseconds(provider, device, None))
    return times


def report(
    bench: str,
    title: str,
    case: Mapping[str, object],
    providers: Sequence[Provider],
    times: Mapping[str, Times],
    work: float,
    unit: str,
    yardstick: str,
) -> dict[str, float]:
    """Prints the table of one case, appends it to bench/results/<bench>.csv and returns each provider's share when cold.

    Args:
        case: columns that say what was run: phase, dtype, tokens, ...
        work: bytes (unit "GB/s") or FLOPs (unit "TFLOP/s") that the task cannot do without.
        yardstick: name of the provider that the shares are taken of.
    """
    scale = {"GB/s": 1e6, "TFLOP/s": 1e9}[unit]  # per millisecond
    by_name = {provider.name: provider for provider in providers}
    rates = {
        (name, cache): (work if by_name[name].work is None else by_name[name].work) / statistics.median(values) / scale
        for name, taken in times.items()
        for cache, values in (("cold", taken.cold_ms), ("hot", taken.hot_ms))
    }
    print(f"\n{title}")
    head = f"{'':34}{'ms':>10}{'p20':>10}{'p80':>10}{'hot ms':>10}{unit:>10}{'share':>8}{'GiB':>7}"
    print(head + f"{'value':>10}{'entropy':>10}{'gradient':>10}")
    rows = []
    for name, taken in times.items():
        provider = by_name[name]
        share = rates[name, "cold"] / rates[yardstick, "cold"]
        low, high = _p20_p80(taken.cold_ms)
        extra = "" if taken.extra_bytes is None else f"{taken.extra_bytes / 2**30:.2f}"
        errors = [f"{taken.errors[key]:.1e}" if key in taken.errors else "" for key in ("value", "entropy", "gradient")]
        line = f"{name:34}{taken.median_ms:10.3f}{low:10.3f}{high:10.3f}{statistics.median(taken.hot_ms):10.3f}"
        print(line + f"{rates[name, 'cold']:10.4g}{share:8.1%}{extra:>7}" + "".join(f"{error:>10}" for error in errors))
        for cache, values in (("cold", taken.cold_ms), ("hot", taken.hot_ms)):
            low, high = _p20_p80(values)
            rows.append(
                origin("triton")
                | {"provider": name, "version": installed(provider.package) if provider.package else ""}
                | {"computes": provider.computes or "all"}
                | case
                | {"l2": cache}
                | {"median_ms": f"{statistics.median(values):.4f}", "p20_ms": f"{low:.4f}", "p80_ms": f"{high:.4f}"}
                | {"rate": f"{rates[name, cache]:.5g}", "unit": unit, "yardstick": yardstick}
                | {"share": f"{rates[name, cache] / rates[yardstick, cache]:.3f}", "extra_gib": extra}
                | dict(zip(("value_error", "entropy_error", "gradient_error"), errors, strict=True))
            )
    print(f"appended to {append(bench, rows)}")
    return {name: rates[name, "cold"] / rates[yardstick, "cold"] for name in times}


def judge(targets: Sequence[Target]) -> None:
    """Prints each target with what was reached; met or missed only on the GPU that it is meant for."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    for target in targets:
        met = target.reached <= target.limit if target.at_most else target.reached >= target.limit
        verdict = ("met" if met else "missed") if "H200" in name else f"an H200's target, not judged on {name}"
        sign = "at most" if target.at_most else "at least"
        print(f"  target: {target.text}: {target.reached:.3f}, {sign} {target.limit:g}: {verdict}")


def describe(providers: Sequence[Provider]) -> None:
    """Prints what each peer does not do and ours does, and its version."""
    print("\nwhat the others do not do:")
    for provider in providers:
        if provider.package and provider.lacks:
            print(f"  {provider.name} ({installed(provider.package) or 'version unknown'}): {provider.lacks}")


def wanted(name: str, only: Sequence[str] | None) -> bool:
    """Whether --providers asks for this peer."""
    return only is None or any(part in name for part in only)


def _warm_up(provider: Provider, on_slice: Provider | None, truths: Mapping[str, Results], device: str) -> Times:
    """Compiles, fills torch's allocator, measures memory and errors; the one time in cold_ms says how slow it is."""
    times = Times()
    if on_slice is not None and provider.work is None:
        times.errors = _errors(on_slice.call(on_slice.before()), truths[provider.computes])
    provider.call(provider.before())
    if device == "cuda":
        state = provider.before()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        provider.call(state)
        times.extra_bytes = torch.cuda.max_memory_allocated() - held
        del state
    times.cold_ms.append(_milliseconds(provider, device, None))
    return times


def _milliseconds(provider: Provider, device: str, flush: Tensor | None) -> float:
    state = provider.before()
    if flush is not None:
        flush.fill_(0)
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        provider.call(state)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)
    start = time.perf_counter()
    provider.call(state)
    return 1e3 * (time.perf_counter() - start)


def _errors(results: Results, truth: Results) -> dict[str, float]:
    """Largest deviation over the largest true value; gradients (d_...) together, the worst of them."""
    deviations: dict[str, list[Tensor]] = {}
    for name, result in results.items():
        deviation = (result.double() - truth[name].view_as(result)).abs().max() / truth[name].abs().max().clamp(min=1e-300)
        deviations.setdefault("gradient" if name.startswith("d_") else name, []).append(deviation)
    return {name: torch.stack(values).max().item() for name, values in deviations.items()}  # NaN stays NaN


def _p20_p80(values: Sequence[float]) -> tuple[float, float]:
    fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else list(values)
    return fifths[0], fifths[-1]
