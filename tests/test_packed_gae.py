"""packed_gae against a float64 loop, for every backend that is here; and its build, its sanitizers, its CUDA code.

Without a GPU the kernel's own source runs on threads (csrc/checks), under the address and thread sanitizers.
"""

import functools
import importlib.metadata
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rlsp_kernels import packed_gae, whiten
from rlsp_kernels.kl import kl_penalty
from rlsp_kernels.packed_gae import backend_report
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

ROOT = Path(__file__).parent.parent
TORCH = Path(torch.__file__).parent
NO_CPP = "" if backend_report()["cpp"].loaded else backend_report()["cpp"].detail
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
BACKENDS = [
    "torch",
    pytest.param("cpp", marks=pytest.mark.skipif(bool(NO_CPP), reason=f"no C++ library: {NO_CPP}")),
    pytest.param("cuda", marks=gpu),
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
# Of the largest number in the output. C++: one rounding. The others: a tree of some 25 float32 sums, and k3's expm1.
TOLERANCE = {"cpp": 1.2e-7, "torch": 4e-6, "cuda": 4e-6}


def run(backend, value_T, cu_seqlens, mask_T, **options):
    """packed_gae on the backend's device; results on the CPU."""
    device = "cuda" if backend == "cuda" else "cpu"
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    result = packed_gae(value_T.to(device), cu_seqlens.to(device), mask_T.to(device), backend=backend, **moved)
    return type(result)(*(x.cpu() for x in result))


def packed(lengths, keep=1.0, seed=0):
    """value_T, cu_seqlens and mask_T of sequences of these lengths, this share of them True; and the generator."""
    g = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    T = sum(lengths)
    return torch.randn(T, generator=g), cu_seqlens, torch.rand(T, generator=g) < keep, g


def every_option(lengths, g):
    """All optional inputs at once."""
    T, S = sum(lengths), len(lengths)
    names_T, names_S = ("reward_T", "old_logprob_T", "ref_logprob_T"), ("terminal_reward_S", "bootstrap_S")
    return {name: torch.randn(T, generator=g) for name in names_T} | {name: torch.randn(S, generator=g) for name in names_S}


def loop(value_T, cu_seqlens, mask_T, *, gamma=1.0, lam=0.95, critic_lam=None, kl_coef=0.0, kl_kind="k1", **columns):
    """reward, advantage, return, each (T,) f64: one token at a time, in Python's floats."""
    T, cu = len(value_T), cu_seqlens.tolist()
    kl_T = [0.0] * T
    if kl_coef:
        kl_T = kl_penalty(columns["old_logprob_T"].double(), columns["ref_logprob_T"].double(), kl_kind).tolist()
    zeros = torch.zeros(T + len(cu))
    reward_T = columns.get("reward_T", zeros).tolist()
    terminal_S, bootstrap_S = (columns.get(name, zeros).tolist() for name in ("terminal_reward_S", "bootstrap_S"))
    value_T, mask_T = value_T.tolist(), mask_T.tolist()
    out = torch.zeros(3, T, dtype=torch.float64)
    for s in range(len(cu) - 1):
        lam_s = float(lam[s]) if isinstance(lam, torch.Tensor) else lam
        next_value, advantage, for_critic, extra = bootstrap_S[s], 0.0, 0.0, terminal_S[s]
        rows = []
        for t in reversed(range(cu[s], cu[s + 1])):
            if not mask_T[t]:
                rows.append((0.0, 0.0, 0.0))
                continue
            reward, extra = reward_T[t] - kl_coef * kl_T[t] + extra, 0.0
            delta = reward + gamma * next_value - value_T[t]
            advantage = delta + gamma * lam_s * advantage
            for_critic = delta + gamma * (lam_s if critic_lam is None else critic_lam) * for_critic
            next_value = value_T[t]
            rows.append((reward, advantage, next_value + for_critic))
        if rows:
            out[:, cu[s] : cu[s + 1]] = torch.tensor(rows[::-1], dtype=torch.float64).T
    return out


def assert_is_loop(backend, value_T, cu_seqlens, mask_T, **options):
    result = run(backend, value_T, cu_seqlens, mask_T, **options)
    truths = loop(value_T, cu_seqlens, mask_T, **options)
    for name, ours, truth in zip(("reward", "advantage", "return"), result[:3], truths, strict=True):
        bound = TOLERANCE[backend] * max(1.0, truth.abs().max().item() if len(truth) else 0.0)
        error = (ours - truth).abs().max().item() if len(truth) else 0.0
        assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"
    kept = result.advantage_T[mask_T].double()
    assert_close(result.moments, torch.stack((mask_T.sum().double(), kept.sum(), kept.square().sum())), rtol=1e-12, atol=1e-9)
    assert result.num_nonfinite == 0


# --- values -----------------------------------------------------------------------------------

LAYOUTS = {
    "no tokens": [],
    "no tokens in two sequences": [0, 0],
    "one token": [1],
    "empty and single-token sequences between others": [0, 1, 0, 0, 1, 3, 0],
    "a block of 8 and one more or less": [7, 8, 9, 16],
    "ragged, around a piece of 256": [5, 300, 17, 256, 255, 257, 1, 700],
    "one sequence over several GPU tiles of 4096": [9000],
    "over several CPU chunks of 16384": [17000, 3, 0, 16384],
}


@every_backend
@pytest.mark.parametrize("keep", [1.0, 0.6, 0.01, 0.0])
@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
def test_packed_gae_is_the_float64_loop(lengths, keep, backend):
    value_T, cu_seqlens, mask_T, g = packed(lengths, keep)
    assert_is_loop(backend, value_T, cu_seqlens, mask_T, gamma=0.99, kl_coef=0.1, **every_option(lengths, g))


@every_backend
@pytest.mark.parametrize("options", [
    {},
    {"gamma": 0.9, "lam": 0.0},
    {"gamma": 0.0},
    {"critic_lam": 1.0},
    {"kl_coef": 0.05, "kl_kind": "k2"},
    {"kl_coef": 0.05, "kl_kind": "k3", "critic_lam": 0.5},
    {"lam": torch.tensor([0.5, 0.0, 1.0, 0.97])},
    {"lam": torch.tensor([0.5, 0.0, 1.0, 0.97]), "critic_lam": 1.0, "gamma": 0.999},
], ids=str)  # fmt: skip
def test_every_option_is_the_float64_loop(options, backend):
    lengths = [40, 0, 600, 333]
    value_T, cu_seqlens, mask_T, g = packed(lengths, 0.8)
    assert_is_loop(backend, value_T, cu_seqlens, mask_T, **options, **every_option(lengths, g))


@every_backend
def test_gae_of_three_tokens_by_hand(backend):
    value_T, cu_seqlens = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 3], dtype=torch.int32)
    options = {"gamma": 0.5, "lam": 0.5, "terminal_reward_S": torch.tensor([8.0])}
    result = run(backend, value_T, cu_seqlens, torch.tensor([True, True, True]), **options)
    # delta = 0 + 0.5 * 2 - 1, 0 + 0.5 * 4 - 2, 8 - 4 = 0, 0, 4, each a quarter as heavy one token earlier
    assert result.advantage_T.tolist() == [0.25, 1.0, 4.0]
    assert result.return_T.tolist() == [1.25, 3.0, 8.0]
    assert result.reward_T.tolist() == [0.0, 0.0, 8.0]
    # without the last token: it carries through, and the terminal reward moves to the middle: delta = 0, 8 - 2
    result = run(backend, value_T, cu_seqlens, torch.tensor([True, True, False]), **options)
    assert result.advantage_T.tolist() == [1.5, 6.0, 0.0]
    assert result.reward_T.tolist() == [0.0, 8.0, 0.0]
    # without the middle one: delta = 0.5 * 4 - 1, 8 - 4
    result = run(backend, value_T, cu_seqlens, torch.tensor([True, False, True]), **options)
    assert result.advantage_T.tolist() == [2.0, 0.0, 4.0]
    # truncated: the value after the last token is 6
    result = run(backend, value_T, cu_seqlens, torch.tensor([True] * 3), gamma=0.5, lam=0.5, bootstrap_S=torch.tensor([6.0]))
    assert result.advantage_T.tolist() == [-0.0625, -0.25, -1.0]


@every_backend
def test_gamma_and_lambda_1_add_up_exactly_over_131072_tokens(backend):
    T = 131072
    g = torch.Generator().manual_seed(0)
    value_T, reward_T = (torch.randint(-64, 65, (T,), generator=g) / 64 for _ in range(2))  # every sum is a float32
    mask_T = torch.rand(T, generator=g) < 0.9
    columns = {"reward_T": reward_T, "terminal_reward_S": torch.tensor([0.5]), "bootstrap_S": torch.tensor([-0.25])}
    cu_seqlens = torch.tensor([0, T], dtype=torch.int32)
    result = run(backend, value_T, cu_seqlens, mask_T, lam=1.0, **columns)
    assert torch.equal(torch.stack(result[:3]).double(), loop(value_T, cu_seqlens, mask_T, lam=1.0, **columns))


@every_backend
@pytest.mark.parametrize("lam", [1.0, 0.95])
def test_error_over_131072_tokens_is_no_more_than_two_roundings(lam, backend):
    value_T, cu_seqlens, mask_T, _ = packed([131072])
    options = {"lam": lam, "terminal_reward_S": torch.tensor([0.7])}
    truth = loop(value_T, cu_seqlens, mask_T, **options)[1]
    ours = run(backend, value_T, cu_seqlens, mask_T, **options).advantage_T
    assert (ours - truth).abs().max() <= 2 * 2**-24 * truth.abs().max()


@every_backend
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_shaped_reward_is_the_kl_penalty_even_past_its_bound(kind, backend):
    old_T = torch.tensor([0.0, -1.0, -1e-4, -50.0, 0.0])
    ref_T = torch.tensor([-50.0, -1.5, 0.0, 0.0, 0.0])
    cu_seqlens, mask_T = torch.tensor([0, 5], dtype=torch.int32), torch.ones(5, dtype=torch.bool)
    result = run(
        backend, torch.zeros(5), cu_seqlens, mask_T, old_logprob_T=old_T, ref_logprob_T=ref_T, kl_coef=0.5, kl_kind=kind
    )
    assert_close(result.reward_T, (-0.5 * kl_penalty(old_T.double(), ref_T.double(), kind)).float(), rtol=1e-6, atol=1e-11)


# --- invariances ------------------------------------------------------------------------------


@every_backend
def test_what_masked_tokens_hold_does_not_matter(backend):
    lengths = [100, 3, 900]
    value_T, cu_seqlens, mask_T, g = packed(lengths, 0.7)
    options = every_option(lengths, g) | {"kl_coef": 0.1}
    clean = run(backend, value_T, cu_seqlens, mask_T, **options)
    for name in ("reward_T", "old_logprob_T", "ref_logprob_T"):
        options[name] = options[name].where(mask_T, float("nan"))
    dirty = run(backend, value_T.where(mask_T, float("inf")), cu_seqlens, mask_T, **options)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


@every_backend
def test_a_nan_stays_in_its_sequence_and_is_counted(backend):
    value_T, cu_seqlens, mask_T, _ = packed([50, 5000, 50])
    bootstrap_S = torch.zeros(3)
    clean = run(backend, value_T, cu_seqlens, mask_T, lam=1.0)
    value_T[100], value_T[4000], bootstrap_S[1] = float("nan"), float("inf"), float("nan")
    result = run(backend, value_T, cu_seqlens, mask_T, lam=1.0, bootstrap_S=bootstrap_S)
    assert result.num_nonfinite == 3
    assert not result.advantage_T[50:5050].isfinite().any()
    others = torch.arange(5100).sub(2550).abs() > 2500
    assert_close(result.advantage_T[others], clean.advantage_T[others])
    assert result.moments[1:].isnan().all(), "a whitening by these moments must not look sound"


@every_backend
def test_a_sequence_is_what_it_is_alone(backend):
    lengths = [30, 0, 4000, 7, 999]
    value_T, cu_seqlens, mask_T, g = packed(lengths, 0.9)
    options = every_option(lengths, g)
    together = run(backend, value_T, cu_seqlens, mask_T, kl_coef=0.1, **options)
    for s, (low, high) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        own = {k: v[low:high] if k.endswith("_T") else v[s : s + 1] for k, v in options.items()}
        cu_alone = torch.tensor([0, high - low], dtype=torch.int32)
        alone = run(backend, value_T[low:high], cu_alone, mask_T[low:high], kl_coef=0.1, **own)
        assert_close(alone.advantage_T, together.advantage_T[low:high], rtol=0, atol=1e-5)


@every_backend
def test_a_critic_lambda_changes_the_returns_alone(backend):
    value_T, cu_seqlens, mask_T, g = packed([500, 20], 0.9)
    terminal = {"terminal_reward_S": torch.randn(2, generator=g)}
    one, two = (run(backend, value_T, cu_seqlens, mask_T, critic_lam=x, **terminal) for x in (None, 1.0))
    monte_carlo = run(backend, value_T, cu_seqlens, mask_T, lam=1.0, **terminal)
    assert_close(two.advantage_T, one.advantage_T, rtol=0, atol=1e-6)
    assert_close(two.return_T, monte_carlo.return_T, rtol=0, atol=1e-6)
    assert (two.return_T - one.return_T).abs().max() > 0.1


@every_backend
def test_misaligned_and_strided_inputs_are_read_right(backend):
    value_T, cu_seqlens, mask_T, _ = packed([3001], 0.8)
    aligned = run(backend, value_T[1:].clone(), cu_seqlens.clamp(max=3000), mask_T[1:].clone())
    misaligned = run(backend, value_T[1:], cu_seqlens.clamp(max=3000), mask_T[1:])  # starts 4 bytes into its storage
    strided = run(backend, value_T[1:].repeat_interleave(2)[::2], cu_seqlens.clamp(max=3000), mask_T[1:])
    for other in (misaligned, strided):
        assert all(torch.equal(a, b) for a, b in zip(aligned, other, strict=True))


@every_backend
def test_the_same_bits_twice_and_on_any_number_of_threads(backend):
    lengths = [60000, 11, 0, 5000]
    value_T, cu_seqlens, mask_T, g = packed(lengths, 0.95)
    options = every_option(lengths, g) | {"kl_coef": 0.1, "critic_lam": 1.0}
    num_threads = torch.get_num_threads()
    first = run(backend, value_T, cu_seqlens, mask_T, **options)
    torch.set_num_threads(3 - min(num_threads, 2))  # 1 or 2, whichever it was not
    second = run(backend, value_T, cu_seqlens, mask_T, **options)
    torch.set_num_threads(num_threads)
    moments = 4 if backend == "torch" else 5  # torch's own sums depend on the number of threads
    assert all(torch.equal(a, b) for a, b in zip(first[: moments - 1], second[: moments - 1], strict=True))
    if backend != "torch":
        assert torch.equal(first.moments, second.moments)


# --- whitening --------------------------------------------------------------------------------


def whitened(advantage_T, mask_T):
    """The definition, in float64."""
    kept = advantage_T[mask_T].double()
    return torch.where(mask_T, (advantage_T - kept.mean()) / (kept.var() + 1e-8).sqrt(), 0).float()


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-3.0, 1e-3), (1e4, 1.0)])
def test_whiten_is_its_definition(mean, std):
    g = torch.Generator().manual_seed(0)
    advantage_T, mask_T = mean + std * torch.randn(5000, generator=g), torch.rand(5000, generator=g) < 0.7
    kept = advantage_T[mask_T].double()
    moments = torch.stack((mask_T.sum().double(), kept.sum(), kept.square().sum()))
    result = whiten(advantage_T, mask_T, moments)
    assert_close(result, whitened(advantage_T, mask_T), rtol=1e-6, atol=1e-3 if mean == 1e4 else 2e-4)
    assert result[~mask_T].abs().max() == 0


@pytest.mark.parametrize("num_kept", [0, 1])
def test_whitening_none_or_one_gives_zeros(num_kept):
    mask_T = torch.arange(4) < num_kept
    result = packed_gae(torch.randn(4), torch.tensor([0, 4], dtype=torch.int32), mask_T)
    assert whiten(result.advantage_T, mask_T, result.moments).tolist() == [0.0] * 4


RANK = """
import sys, torch, torch.distributed as dist
from rlsp_kernels import packed_gae, whiten
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
value_T = torch.randn(300, generator=torch.Generator().manual_seed(0))[:100] if rank == 0 else \
    torch.randn(300, generator=torch.Generator().manual_seed(0))[100:]
cu_seqlens, mask_T = torch.tensor([0, len(value_T)], dtype=torch.int32), torch.ones(len(value_T), dtype=torch.bool)
result = packed_gae(value_T, cu_seqlens, mask_T)
before = result.moments.clone()
white_T = whiten(result.advantage_T, mask_T, result.moments, dist.group.WORLD)
assert torch.equal(before, result.moments)
torch.save(white_T, f"{sys.argv[2]}.{rank}")
"""


def test_two_ranks_whiten_as_one(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT / "kernels")}
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(r), str(tmp_path / "white")], env=env) for r in range(2)]
    assert [rank.wait(timeout=60) for rank in ranks] == [0, 0]
    value_T = torch.randn(300, generator=torch.Generator().manual_seed(0))
    mask_T = torch.ones(300, dtype=torch.bool)
    advantage_T = packed_gae(value_T, torch.tensor([0, 100, 300], dtype=torch.int32), mask_T).advantage_T
    both = torch.cat([torch.load(tmp_path / f"white.{r}") for r in range(2)])
    assert_close(both, whitened(advantage_T, mask_T), rtol=0, atol=1e-5)


# --- the op -----------------------------------------------------------------------------------


def test_opcheck_accepts_the_op():
    lengths = [9, 0, 30]
    value_T, cu_seqlens, mask_T, g = packed(lengths, 0.8)
    every = every_option(lengths, g)
    options = {
        "gamma": 1.0,
        "lam": 0.9,
        "critic_lam": 1.0,
        "kl_coef": 0.1,
        "kl_kind": 3,
        "lam_S": torch.rand(3),
        **every,
    }
    torch.library.opcheck(torch.ops.rlsp_kernels.packed_gae.default, (value_T, cu_seqlens, mask_T), options)
    bare = dict.fromkeys(options) | {"gamma": 1.0, "lam": 0.9, "kl_coef": 0.0, "kl_kind": 1}
    torch.library.opcheck(torch.ops.rlsp_kernels.packed_gae.default, (value_T, cu_seqlens, mask_T), bare)


def test_packed_gae_compiles_into_a_full_graph_without_recompiling_for_another_batch():
    def advantages(value_T, cu_seqlens, mask_T):
        result = packed_gae(2 * value_T, cu_seqlens, mask_T)
        return whiten(result.advantage_T, mask_T, result.moments)

    torch.compiler.reset()
    compiled = torch.compile(advantages, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.compiler.set_stance("default"):
        first = packed([20, 30])[:3]
        assert_close(compiled(*first), advantages(*first))
    with torch.compiler.set_stance("fail_on_recompile"):
        other = packed([5, 90, 33])[:3]
        assert_close(compiled(*other), advantages(*other))


@every_backend
def test_the_outputs_are_constants_to_autograd(backend):
    value_T, cu_seqlens, mask_T, g = packed([20])
    columns = {name: x.requires_grad_() for name, x in every_option([20], g).items()}
    lam = torch.tensor([0.9], requires_grad=True)
    result = run(backend, value_T.requires_grad_(), cu_seqlens, mask_T, lam=lam, kl_coef=0.1, **columns)
    assert not any(x.requires_grad for x in result)


def i32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


@every_backend
@pytest.mark.parametrize("change, message", [
    ({"cu_seqlens": i32(1, 6)}, "from 0 to T = 6, got 1 to 6"),
    ({"cu_seqlens": i32(0, 5)}, "from 0 to T = 6, got 0 to 5"),
    ({"cu_seqlens": i32(0, 7)}, "from 0 to T = 6, got 0 to 7"),
    ({"cu_seqlens": i32(0, 4, 3, 6)}, "decreases at 2: 4 then 3"),
    ({"cu_seqlens": i32()}, r"cu_seqlens must have shape \(1,\)"),
    ({"cu_seqlens": i32(0, 6).long()}, "cu_seqlens must be torch.int32"),
    ({"value_T": torch.zeros(6, dtype=torch.bfloat16)}, "value_T must be torch.float32"),
    ({"value_T": torch.zeros(2, 3)}, r"value_T must have shape \(6,\), got \(2, 3\)"),
    ({"mask_T": torch.ones(6)}, "mask_T must be torch.bool"),
    ({"mask_T": torch.ones(5, dtype=torch.bool)}, r"mask_T must have shape \(6,\), got \(5,\)"),
    ({"reward_T": torch.zeros(6, dtype=torch.float64)}, "reward_T must be torch.float32"),
    ({"terminal_reward_S": torch.zeros(6)}, r"terminal_reward_S must have shape \(1,\)"),
    ({"bootstrap_S": torch.zeros(2)}, r"bootstrap_S must have shape \(1,\)"),
    ({"lam": torch.zeros(2)}, r"lam must have shape \(1,\)"),
    ({"lam": torch.tensor([1.5])}, r"lam must be in \[0, 1\], got 1.5 to 1.5"),
    ({"lam": torch.tensor([float("nan")])}, r"lam must be in \[0, 1\], got nan"),
    ({"lam": torch.zeros(1).double()}, "lam must be torch.float32, got torch.float64"),
    ({"old_logprob_T": torch.zeros(6).half(), "ref_logprob_T": torch.zeros(6), "kl_coef": 1.0}, "old_logprob_T must be"),
    ({"gamma": 1.1}, r"gamma must be in \[0, 1\], got 1.1"),
    ({"critic_lam": -0.1}, r"critic_lam must be in \[0, 1\]"),
    ({"lam": float("nan")}, r"lam must be in \[0, 1\]"),
    ({"kl_coef": 0.1, "old_logprob_T": torch.zeros(6)}, "needs both old_logprob_T and ref_logprob_T"),
    ({"kl_kind": "k4"}, "kl_kind must be k1, k2 or k3, got 'k4'"),
])  # fmt: skip
def test_packed_gae_refuses(change, message, backend):
    if backend == "cuda" and message.startswith(("from 0", "decreases", r"lam must be in \[0, 1\], got")):
        pytest.skip("looking would wait for the GPU; the kernel asserts")
    sound = {"value_T": torch.zeros(6), "cu_seqlens": i32(0, 6), "mask_T": torch.ones(6, dtype=torch.bool)}
    with pytest.raises(ValueError, match=message):
        arguments = sound | change
        run(backend, *(arguments.pop(name) for name in sound), **arguments)


def test_tensors_on_two_devices_are_refused():
    mask_T = torch.ones(1, dtype=torch.bool, device="meta")
    with pytest.raises(ValueError, match="mask_T is on meta, value_T on cpu; move them to one device"):
        packed_gae(torch.zeros(1), i32(0, 1), mask_T)


@pytest.mark.skipif(bool(NO_CPP), reason=f"no C++ library: {NO_CPP}")
@pytest.mark.parametrize("cu_seqlens, lam, message", [
    (i32(0, 600), 0.5, "cu_seqlens must run from 0 to T"),
    (i32(0), 0.5, "cu_seqlens must run from 0 to T = 6, got 1 numbers"),
    (i32(), 0.5, "cu_seqlens must run from 0 to T = 6, got 0 numbers"),
    (i32(0, 6), 2.0, r"lam must be in \[0, 1\]"),
])  # fmt: skip
def test_the_library_itself_refuses_what_would_read_elsewhere_or_give_nonsense(cu_seqlens, lam, message):
    arguments = {"gamma": 1.0, "lam": 0.9, "kl_coef": 0.0, "kl_kind": 1} | dict.fromkeys(
        ("critic_lam", "terminal_reward_S", "reward_T", "old_logprob_T", "ref_logprob_T", "bootstrap_S")
    )
    arguments["lam_S"] = torch.full((max(len(cu_seqlens) - 1, 0),), lam)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.rlsp_kernels.packed_gae(torch.zeros(6), cu_seqlens, torch.ones(6, dtype=torch.bool), **arguments)


def test_a_backend_of_another_device_is_refused():
    with pytest.raises(ValueError, match="backend='cuda' has nothing for tensors on cpu"):
        packed_gae(torch.zeros(1), i32(0, 1), torch.ones(1, dtype=torch.bool), backend="cuda")
    with pytest.raises(ValueError, match="backend must be auto, torch, cpp or cuda, got 'triton'"):
        packed_gae(torch.zeros(1), i32(0, 1), torch.ones(1, dtype=torch.bool), backend="triton")


@pytest.mark.skipif(backend_report()["cuda"].loaded, reason="the CUDA library is here")
def test_a_cuda_tensor_without_the_cuda_library_is_an_error_that_names_the_fix():
    with FakeTensorMode():  # whose tensors can be on a GPU that is not there
        value_T, mask_T = torch.empty(6, device="cuda"), torch.empty(6, dtype=torch.bool, device="cuda")
        cu_seqlens = torch.empty(2, dtype=torch.int32, device="cuda")
        with pytest.raises(RuntimeError, match="With nvcc on the PATH and RLSP_BUILD=cuda, reinstall by `pip install"):
            packed_gae(value_T, cu_seqlens, mask_T)
        with pytest.raises(ValueError, match="cu_seqlens is on cpu, value_T on cuda:0; move them to one device"):
            packed_gae(value_T, cu_seqlens.cpu(), mask_T)


BARE = """
import warnings, torch
from rlsp_kernels.packed_gae import backend_report, packed_gae
arguments = torch.ones(3), torch.tensor([0, 3], dtype=torch.int32), torch.ones(3, dtype=torch.bool)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(2):
        assert packed_gae(*arguments, lam=1.0).advantage_T.tolist() == [-1.0, -1.0, -1.0]
assert len(said) == 1 and "plain torch" in str(said[0].message), said
assert not backend_report()["cpp"].loaded and "not been installed" in backend_report()["cpp"].detail
try:
    packed_gae(*arguments, backend="cpp")
except RuntimeError as error:
    print(error)
"""


def test_without_the_library_plain_torch_runs_and_says_so_once(tmp_path):
    for source in (ROOT / "kernels" / "rlsp_kernels").glob("*.py"):
        (tmp_path / "rlsp_kernels").mkdir(exist_ok=True)
        shutil.copy(source, tmp_path / "rlsp_kernels")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", BARE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "With a C++17 compiler and cmake, reinstall by `pip install" in done.stdout


# --- peers ------------------------------------------------------------------------------------

# Each runs where the peer's package is importable: docs/testing.md says which releases have the function, and what they need.
S, L, GAMMA, LAM = 6, 50, 0.99, 0.9


def padded(keep):
    """(S, L) value, token reward, old and reference logprob; and the mask: `keep` of each row True, or one run of its own."""
    g = torch.Generator().manual_seed(0)
    value, reward, old, change = torch.randn(4, S, L, generator=g)
    ref = old + 0.3 * change  # NeMo-RL cuts a token's KL at 10; ours bounds the log-ratio alone
    if keep is not None:
        return value, reward, old, ref, torch.rand(S, L, generator=g) < keep
    first, last = torch.tensor([[0, 0, 7, 49, 10, 3], [50, 31, 50, 50, 11, 40]])
    position = torch.arange(L)
    return value, reward, old, ref, (position >= first[:, None]) & (position < last[:, None])


def ours(backend, value, mask, **options):
    """packed_gae of a padded batch: advantages, the same whitened, and returns, at the True positions."""
    options = {name: x.flatten() if getattr(x, "ndim", 0) == 2 else x for name, x in options.items()}
    cu_seqlens = torch.arange(0, S * L + 1, L, dtype=torch.int32)
    result = run(backend, value.flatten(), cu_seqlens, mask.flatten(), gamma=GAMMA, **options)
    keep = mask.flatten()
    return result.advantage_T[keep], whiten(result.advantage_T, keep, result.moments)[keep], result.return_T[keep]


near = functools.partial(assert_close, rtol=1e-5, atol=1e-5)
near_whitened = functools.partial(assert_close, rtol=1e-4, atol=1e-4)


@every_backend
def test_gae_is_verls(backend):
    verl = pytest.importorskip("verl.trainer.ppo.core_algos", exc_type=ImportError)
    value, reward, _, _, mask = padded(keep=0.7)
    theirs, returns = verl.compute_gae_advantage_return(reward, value, mask.float(), torch.tensor(GAMMA), torch.tensor(LAM))
    _, white, own_returns = ours(backend, value, mask, lam=LAM, reward_T=reward)
    near(own_returns, returns[mask])
    near_whitened(white, theirs[mask])


@every_backend
def test_gae_is_openrlhfs(backend):
    openrlhf = pytest.importorskip("openrlhf.trainer.ppo_utils.experience_maker", exc_type=ImportError)
    gae = openrlhf.RemoteExperienceMaker.get_advantages_and_returns
    value, reward, _, _, mask = padded(keep=None)  # it counts a masked token inside a response as one step of value 0
    advantages, returns = gae(None, value, reward, mask.float(), GAMMA, LAM)
    own_advantages, _, own_returns = ours(backend, value, mask, lam=LAM, reward_T=reward)
    near(own_advantages, advantages[mask])
    near(own_returns, returns[mask])


@every_backend
def test_gae_is_trls(backend):
    trl = pytest.importorskip("trl.trainer.ppo_trainer", exc_type=ImportError)
    gae = getattr(trl.PPOTrainer, "compute_advantages", None)
    if gae is None:
        pytest.skip(f"trl {importlib.metadata.version('trl')} has GAE only within its training loop; 0.11.4 as a function")
    value, reward, _, _, mask = padded(keep=None)  # as for OpenRLHF
    config = SimpleNamespace(gamma=GAMMA, lam=LAM, whiten_rewards=False)
    _, theirs, returns = gae(SimpleNamespace(config=config), value, reward, mask.float())
    _, white, own_returns = ours(backend, value, mask, lam=LAM, reward_T=reward)
    near(own_returns, returns[mask])
    near_whitened(white, theirs[mask])


@every_backend
@pytest.mark.parametrize("kl_kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("vapo", [False, True])
def test_gae_is_nemo_rls(vapo, kl_kind, backend):
    nemo = pytest.importorskip("nemo_rl.algorithms.advantage_estimator", exc_type=ImportError)
    value, _, old, ref, mask = padded(keep=0.7)
    mask[2] = False
    terminal_S, alpha = value[:, 0] + 1, 0.05
    config = {
        "gae_gamma": GAMMA,
        "gae_lambda": LAM,
        "gae_lambda_value": 1.0 if vapo else None,
        "gae_lambda_policy": None,
        "length_adaptive_alpha": alpha if vapo else 0.0,
        "normalize_advantages": False,
    }
    loss = SimpleNamespace(use_kl_in_reward=True, reference_policy_kl_penalty=0.1, reference_policy_kl_type=kl_kind)
    estimator = nemo.GeneralizedAdvantageEstimator(config, loss)
    advantages, returns = estimator.compute_advantage(None, terminal_S, mask.float(), value, ref, old)
    adaptive_S = 1 - 1 / (alpha * mask.sum(1)).clamp(min=1)
    own_advantages, _, own_returns = ours(
        backend, value, mask, lam=adaptive_S if vapo else LAM, critic_lam=1.0 if vapo else None,
        terminal_reward_S=terminal_S, old_logprob_T=old, ref_logprob_T=ref, kl_coef=0.1, kl_kind=kl_kind,
    )  # fmt: skip
    near(own_advantages, advantages[mask])
    near(own_returns, returns[mask])


# --- building ---------------------------------------------------------------------------------

CMAKE, COMPILER = shutil.which("cmake") or shutil.which("cmake", path=Path(sys.executable).parent), shutil.which("c++")
needs_compiler = pytest.mark.skipif(not (CMAKE and COMPILER), reason="needs cmake and a C++ compiler")


def built(folder, target, *options):
    """What CMake says when it builds a library with warnings as errors into the folder."""
    configure = [CMAKE, "-S", ROOT, "-B", folder, f"-DRLSP_TORCH={TORCH}", "-DRLSP_WERROR=ON", *options]
    text = ""
    for command in (configure, [CMAKE, "--build", folder, "--target", target]):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        text += done.stdout + done.stderr
    return text


@needs_compiler
def test_the_library_is_in_use_where_it_can_be_built():
    assert not NO_CPP, f"{NO_CPP}: pip install --no-build-isolation -e ."


@needs_compiler
def test_the_cpu_library_builds_without_a_warning_and_only_once(tmp_path):
    assert "Building CXX object" in built(tmp_path, "rlsp_cpu")
    assert "Building CXX object" not in built(tmp_path, "rlsp_cpu")


@needs_compiler
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_cuda_kernels_compile_for_every_architecture_without_a_spill(tmp_path, record_property):
    log = built(tmp_path, "rlsp_cuda", "-DRLSP_CUDA=ON")
    kernels = re.findall(
        r"packed_gae_kernelILi(\d).*?' for '(sm_\d+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers", log, flags=re.DOTALL,
    )  # fmt: skip
    assert sorted((arch, lambdas) for lambdas, arch, *_ in kernels) == sorted(
        itertools.product(("sm_80", "sm_90", "sm_100"), "12")
    )
    for lambdas, arch, stores, loads, registers in kernels:
        record_property(f"packed_gae, {arch}, {lambdas} lambda(s)", f"{registers} registers, {stores} + {loads} bytes spilled")
        assert (stores, loads) == ("0", "0")
        assert int(registers) <= 128, "two blocks of 256 threads no longer fit a multiprocessor"


def build_libraries(folder, path, **environment):
    """setup.py's build of the libraries into the folder, with that PATH; what it wrote to native_build.json, if anything."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", folder, "--build-temp", folder / "temp"]
    without = os.environ.keys() & {"CXX", "CUDA_HOME", "RLSP_BUILD"}
    env = {name: value for name, value in os.environ.items() if name not in without} | {"PATH": str(path)} | environment
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True)
    note = folder / "rlsp_kernels" / "native_build.json"
    return done, json.loads(note.read_text()) if note.exists() else None


@pytest.fixture
def only_cmake(tmp_path):
    """A PATH with no compiler."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "cmake").symlink_to(CMAKE)
    return tmp_path / "bin"


@needs_compiler
def test_a_machine_without_a_compiler_builds_nothing_and_says_so(only_cmake, tmp_path):
    done, left_out = build_libraries(tmp_path / "out", only_cmake)
    assert done.returncode == 0, done.stderr
    assert left_out == dict.fromkeys(("cpu", "cuda"), "no C++ compiler was found")
    assert "rlsp_kernels: the cpu library is not built: no C++ compiler was found" in done.stderr
    done, left_out = build_libraries(tmp_path / "forced", only_cmake, RLSP_BUILD="cpu")
    assert done.returncode != 0 and "RLSP_BUILD=cpu, but no C++ compiler was found" in done.stderr and left_out is None


@needs_compiler
def test_a_machine_without_nvcc_says_so_when_the_cuda_library_is_wanted(only_cmake, tmp_path):
    (only_cmake / "c++").symlink_to(COMPILER)
    done, _ = build_libraries(tmp_path, only_cmake, RLSP_BUILD="cuda", CUDA_HOME=str(tmp_path))
    assert done.returncode != 0 and "RLSP_BUILD=cuda, but nvcc was not found" in done.stderr


@needs_compiler
def test_a_wheel_carries_the_library_and_works_alone(tmp_path):
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT]
    done = subprocess.run(list(map(str, wheel)), capture_output=True, text=True, env=os.environ | {"RLSP_BUILD": "cpu"})
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in path.name, "the library is tied to no Python version"
    with zipfile.ZipFile(path) as archive:
        assert json.loads(archive.read("rlsp_kernels/native_build.json")) == {"cuda": "RLSP_BUILD=cpu was set"}
        archive.extractall(tmp_path / "site")
    code = "from rlsp_kernels.packed_gae import backend_report; print(*backend_report()['cpp'])"
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["True", str(tmp_path / "site" / "rlsp_kernels" / "librlsp_cpu.so")], done.stderr


@needs_compiler
@pytest.mark.parametrize("sanitizers, scans", [
    (["-fsanitize=address,undefined", "-DNDEBUG"], ["cpu", "cuda", "unsound"]),  # unsound: what the assertions would stop
    (["-fsanitize=thread"], ["cpu", "cuda"]),
], ids=["address", "thread"])  # fmt: skip
def test_the_scans_pass_the_sanitizers(sanitizers, scans, tmp_path):
    program, checks = tmp_path / "check_scan", ROOT / "csrc" / "checks"
    command = [
        COMPILER, "-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-pthread",
        *sanitizers, "-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}", f"-I{checks}",
        checks / "check_scan.cpp", "-o", program,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for scan in scans:
        done = subprocess.run([program, scan], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "ok" in done.stdout and "FAIL" not in done.stdout


# --- on a GPU ---------------------------------------------------------------------------------

ON_GPU = """
import sys, torch
from rlsp_kernels import packed_gae
def ones(size):
    return torch.ones(size, device="cuda")
cu_seqlens, lam = (torch.tensor(eval(x), device="cuda") for x in sys.argv[1:3])
T, S = int(sys.argv[3]), len(lam)
keep_T = torch.arange(T, device="cuda") % 5 != 0
packed_gae(ones(T), cu_seqlens.int(), keep_T, terminal_reward_S=ones(S))
columns = {name: ones(T) for name in ("reward_T", "old_logprob_T", "ref_logprob_T")} | {"bootstrap_S": ones(S)}
packed_gae(ones(T), cu_seqlens.int(), keep_T, lam=lam, critic_lam=1.0, kl_coef=0.1, kl_kind="k3", **columns)
torch.cuda.synchronize()
"""


def on_gpu(cu_seqlens, lam, T, tool=()):
    """ON_GPU in a process of its own (an assertion on the device ends it), under compute-sanitizer if asked."""
    env = os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [*tool, sys.executable, "-c", ON_GPU, str(cu_seqlens), str(lam), str(T)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("cu_seqlens, lam, says", [
    ([1, 50000], [0.9], "cu_seqlens must run from 0 to T"),
    ([0, 49999], [0.9], "cu_seqlens must run from 0 to T"),
    ([0, 30000, 20000, 50000], [0.9] * 3, "cu_seqlens must not decrease"),
    ([0, 20000, 50000], [0.9, 1.1], "lam must be in [0, 1]"),
])  # fmt: skip
def test_the_kernel_asserts_what_a_cpu_refuses(cu_seqlens, lam, says):
    done = on_gpu(cu_seqlens, lam, 50000)
    assert done.returncode != 0 and f"packed_gae: {says}" in done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
@pytest.mark.parametrize("T", [50001, 2_500_003], ids=["a tile a block", "several tiles a block"])
def test_the_kernel_passes_compute_sanitizer(T, tool):
    done = on_gpu([0, 3, 3, 40000, T], [0.9, 1.0, 0.0, 0.5], T, ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"])
    assert done.returncode == 0, done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_more_tokens_than_the_gpu_holds_are_the_cpus_and_the_same_bits_twice():
    lengths = [131072] * 32 + [2048] * 512 + [3_000_001]
    value_T, cu_seqlens, mask_T, g = packed(lengths, 0.99)
    options = {"terminal_reward_S": torch.randn(len(lengths), generator=g), "lam": 1.0}
    first, second = (run("cuda", value_T, cu_seqlens, mask_T, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    truth = packed_gae(value_T, cu_seqlens, mask_T, **options)
    assert_close(first.advantage_T, truth.advantage_T, rtol=0, atol=1e-4)
    assert_close(first.moments, truth.moments, rtol=1e-4, atol=1.0)
