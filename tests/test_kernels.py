"""The Triton kernels against float64 and against plain torch: on a GPU if there is one, else in Triton's interpreter.

Axes: T packed tokens, V vocabulary, D hidden size.
"""

import gc
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from rlsp_kernels import (
    PPOMetrics,
    active_rows,
    kl_penalty,
    linear_logprob_entropy,
    linear_ppo_loss,
    logprob_entropy,
    ppo_loss,
    value_loss,
)
from rlsp_kernels.ppo_loss import Clip, ppo_loss_torch
from torch.library import opcheck
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parent.parent
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = [pytest.mark.gpu] if GPU else []
OPS = torch.ops.rlsp_kernels

# One odd, so that rows begin anywhere; one prime; Llama 2's; GPT-2's, odd and large. Then those of Llama 3, Qwen 2.5 (small and
# 7B) and Gemma 3, which take the interpreter minutes.
SMALL = [257, 2053, 32000, 50257]
LARGE = [pytest.param(V, marks=pytest.mark.gpu) for V in (128256, 151936, 152064, 262144)]
# float32 elements of a tile of each kernel.
BLOCK, PPO_BLOCK = 4096, 8192
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SOFTCAP = 20.0
SCALINGS = {"plain": {}, "temperature": {"temperature": 0.7}, "softcap, temperature per token": {"softcap": SOFTCAP}}


def draw(*shape, seed=0, scale=1.0, dtype=torch.float32):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE, dtype)


def tokens(T, V, seed=0):
    return torch.randint(V, (T,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def scaling_of(name, T):
    per_token = {"temperature": torch.linspace(0.6, 1.8, T, device=DEVICE)} if "per token" in name else {}
    return SCALINGS[name] | per_token


def double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def assert_no_worse(ours, torchs, truth, dtype=torch.float32, units=1.0):
    """At most twice torch's error in the same dtype, and `units` roundings of the largest number."""
    ours, torchs, truth = ours.double(), torchs.double(), truth.double()
    if not truth.numel():
        return
    largest = truth[truth.isfinite()].abs().amax().item()
    rounding = units * torch.finfo(torch.float32).eps * max(largest, 1)
    allowed = 2 * (torchs - truth).abs().amax().item() + rounding
    if dtype == torch.bfloat16 and not GPU:
        allowed += 2**-8 * largest  # the interpreter cuts bfloat16 off where a GPU rounds
    worst = (ours - truth).abs().amax().item()
    assert worst <= allowed, f"{worst:.3e} > {allowed:.3e}"


def results(fn, args, leaves, backend, upstream=(), **options):
    """Outputs and the gradients in `leaves` of sum(outputs * upstream)."""
    outputs = fn(*args, backend=backend, **options)
    loss = sum((x * u.to(x.dtype)).sum() for x, u in zip(outputs, upstream, strict=False))
    return [x.detach() for x in outputs if isinstance(x, torch.Tensor)], torch.autograd.grad(loss, leaves)


# logprob_entropy


def logprob_case(T, V, dtype, scaling, seed=0, **options):
    """Outputs and gradient of Triton, torch and float64 torch."""
    logits_TV, token_T = draw(T, V, scale=4.0, dtype=dtype, seed=seed).requires_grad_(), tokens(T, V)
    upstream = (draw(T, seed=1), draw(T, seed=2))  # uneven: with equal ones an error of a factor a row does not show
    options = scaling_of(scaling, T) | options
    wide = logits_TV.detach().double().requires_grad_()
    truth = results(logprob_entropy, (wide, token_T), wide, "torch", upstream, **{k: double(v) for k, v in options.items()})
    torchs = results(logprob_entropy, (logits_TV, token_T), logits_TV, "torch", upstream, **options)
    ours = results(logprob_entropy, (logits_TV, token_T), logits_TV, "triton", upstream, **options)
    return ours, torchs, truth


@pytest.mark.parametrize("V", SMALL + LARGE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_logprob_entropy_error_is_no_worse_than_torch(V, dtype, scaling):
    ours, torchs, truth = logprob_case(3, V, dtype, scaling)
    for x, x_torch, x_truth in zip(ours[0], torchs[0], truth[0], strict=True):
        assert_no_worse(x, x_torch, x_truth)
    # Half a unit of a soft-capped logit near SOFTCAP is so many of its probability.
    assert_no_worse(ours[1][0], torchs[1][0], truth[1][0], dtype, units=SOFTCAP / 2 if "softcap" in scaling else 1)


# Smaller than a vector load; one block; around it; with a fringe before and after the body; two blocks and a remainder.
@pytest.mark.parametrize("V", [1, 2, 15, 17, 31, 64, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 48, 2 * BLOCK + 50])
@pytest.mark.parametrize("T", [1, 5])
def test_logprob_entropy_for_every_way_a_row_can_end(T, V):
    ours, torchs, truth = logprob_case(T, V, torch.float32, "temperature")
    for x, x_torch, x_truth in zip((*ours[0], *ours[1]), (*torchs[0], *torchs[1]), (*truth[0], *truth[1]), strict=True):
        assert_no_worse(x, x_torch, x_truth)


@pytest.mark.parametrize("V, stride", [(33, 40), (257, 300), (64, 80), (50, 64), (BLOCK + 7, BLOCK + 7 + 16)])
@pytest.mark.parametrize("offset", [0, 3])
def test_rows_may_lie_apart_and_begin_anywhere(V, stride, offset):
    T = 4
    base = draw(T * stride + offset, scale=3.0)
    logits_TV = base.as_strided((T, V), (stride, 1), offset)
    kept = base.clone()
    token_T, upstream = tokens(T, V), (draw(T, seed=1), draw(T, seed=2))
    for inplace in (False, True):
        strided = logits_TV.detach().requires_grad_()
        ours = results(
            lambda x, t, inplace=inplace, **kw: logprob_entropy(x * 1 if inplace else x, t, inplace_backward=inplace, **kw),
            (strided, token_T), strided, "triton", upstream,
        )  # fmt: skip
        plain = logits_TV.detach().contiguous().requires_grad_()
        expected = results(logprob_entropy, (plain, token_T), plain, "torch", upstream)
        torch.testing.assert_close(ours, expected, atol=3e-6, rtol=1e-5)
    assert torch.equal(base, kept)


def test_the_gradient_of_rows_that_lie_apart_leaves_what_lies_between():
    T, V, stride = 3, 37, 50
    base = draw(T * stride, scale=3.0)
    base.requires_grad_()
    moved = base * 1
    logits_TV = moved.as_strided((T, V), (stride, 1))
    before = moved.detach().clone()
    loss, _ = ppo_loss(
        logits_TV, tokens(T, V), draw(T) - 3, draw(T, seed=1), torch.ones(T, device=DEVICE), inplace=True, backend="triton"
    )
    after = moved.detach()
    gaps = torch.ones(T * stride, dtype=torch.bool, device=DEVICE)
    gaps.as_strided((T, V), (stride, 1)).fill_(False)
    assert torch.equal(after[gaps], before[gaps]) and not torch.equal(after, before)
    (2 * loss).backward()
    assert torch.equal(moved.detach()[gaps], before[gaps])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_minus_infinity_have_no_share_and_no_gradient(dtype):
    V = BLOCK + 500
    logits_TV, token_T = draw(4, V, scale=3.0, dtype=dtype), torch.tensor([BLOCK + 3, BLOCK + 4, 3, 5], device=DEVICE)
    logits_TV[0, :BLOCK] = -math.inf  # the whole first block
    logits_TV[1, 1::2] = -math.inf
    logits_TV[2, BLOCK:] = -math.inf  # the whole last block
    logits_TV[3, 5] = -math.inf  # the token itself
    upstream = (torch.tensor([1.0, -2.0, 0.5, 0.0], device=DEVICE), draw(4, seed=2))
    leaf = logits_TV.clone().requires_grad_()
    ours = results(logprob_entropy, (leaf, token_T), leaf, "triton", upstream)
    wide = logits_TV.double().requires_grad_()
    truth = results(logprob_entropy, (wide, token_T), wide, "torch", upstream)
    assert ours[0][0][3] == -math.inf
    torch.testing.assert_close(ours[0][0][:3].double(), truth[0][0][:3], atol=5e-6, rtol=1e-6)
    torch.testing.assert_close(ours[0][1].double(), truth[0][1], atol=5e-6, rtol=1e-6)
    tolerance = 2**-7 if dtype == torch.bfloat16 else 2**-10 if dtype == torch.float16 else 1e-6
    torch.testing.assert_close(ours[1][0].double(), truth[1][0], atol=tolerance, rtol=tolerance)
    assert (ours[1][0][logits_TV == -math.inf] == 0).all()


@pytest.mark.parametrize("shift", [-16384.0, 16384.0, -1e30])
def test_very_negative_and_very_large_logits_lose_nothing(shift):
    steps = torch.randint(-64, 1, (3, 2053), generator=torch.Generator().manual_seed(0)).to(DEVICE) / 8
    token_T = tokens(3, 2053)
    if shift == -1e30:
        steps[:, 7:] = 0  # everything else masked with a huge negative number that is not -inf
        shifted = steps.clone()
        shifted[:, 7:] = shift
        steps[:, 7:], token_T = -math.inf, token_T % 7
    else:
        shifted = steps + shift  # exact in float32
    ours = logprob_entropy(shifted, token_T, backend="triton")
    torch.testing.assert_close(ours, logprob_entropy(steps, token_T, backend="triton"), atol=1e-6, rtol=1e-6)


def test_rows_without_upstream_gradient_are_not_read():
    logits_TV, token_T = draw(4, 300), tokens(4, 300)
    stats = stats_of(logits_TV, token_T)
    _, entropy_T = logprob_entropy(logits_TV, token_T, backend="triton")
    logits_TV[1:3] = math.nan  # after forward, which had to read it
    upstream = torch.tensor([1.0, 0.0, 0.0, 2.0], device=DEVICE)
    node_args = (upstream, upstream, logits_TV, token_T, entropy_T, stats)
    grad = OPS.logprob_entropy_grad(*node_args, 1.0, None, None, "triton")
    assert (grad[1:3] == 0).all() and grad[[0, 3]].isfinite().all() and (grad[[0, 3]] != 0).any()


def stats_of(logits_TV, token_T):
    return OPS.logprob_entropy(logits_TV.detach(), token_T, 1.0, None, None, True, False, "triton")[2]


def test_an_unused_output_costs_no_gradient():
    logits_TV, token_T = draw(3, 50).requires_grad_(), tokens(3, 50)
    logprob_T, entropy_T = logprob_entropy(logits_TV, token_T, backend="triton")
    (alone,) = torch.autograd.grad(entropy_T.sum(), logits_TV)
    plain = logprob_entropy(logits_TV, token_T, backend="torch")[1]
    torch.testing.assert_close(alone, torch.autograd.grad(plain.sum(), logits_TV)[0], atol=1e-6, rtol=1e-5)
    logprob_T, entropy_T = logprob_entropy(logits_TV, token_T, need_entropy=False, backend="triton")
    assert (entropy_T == 0).all()
    (grad,) = torch.autograd.grad((logprob_T + entropy_T).sum(), logits_TV)
    assert grad.sum(-1).abs().max() < 1e-5 and grad.abs().max() > 0.5


def test_backward_in_place_gives_the_same_bits_and_refuses_a_second_time():
    leaf, token_T, upstream = draw(4, 300).requires_grad_(), tokens(4, 300), draw(4, seed=1)
    expected = torch.autograd.grad((logprob_entropy(leaf, token_T, backend="triton")[0] * upstream).sum(), leaf)
    logits_TV = leaf * 1
    loss = (logprob_entropy(logits_TV, token_T, inplace_backward=True, backend="triton")[0] * upstream).sum()
    (grad,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert torch.equal(grad, expected[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf)


def test_a_row_does_not_know_its_neighbours():
    logits_TV, token_T = draw(5, 777, dtype=torch.bfloat16), tokens(5, 777)
    together = logprob_entropy(logits_TV, token_T, backend="triton")
    for t in range(5):  # 777 is odd: each row begins elsewhere, so it is folded in another order
        alone = logprob_entropy(logits_TV[t : t + 1], token_T[t : t + 1], backend="triton")
        torch.testing.assert_close([x[0] for x in alone], [x[t] for x in together], atol=1e-6, rtol=1e-6)


def test_logprob_gradients_sum_to_zero_over_the_vocabulary():
    logits_TV = draw(3, 5000).requires_grad_()
    logprob_T, entropy_T = logprob_entropy(logits_TV, tokens(3, 5000), backend="triton")
    (grad,) = torch.autograd.grad((logprob_T + entropy_T).sum(), logits_TV)
    assert grad.double().sum(-1).abs().max() < 2e-6


def test_a_token_outside_the_vocabulary_reads_no_memory():
    logits_TV, token_T = draw(3, 50), torch.tensor([-100, 49, 50], device=DEVICE)
    logprob_T, entropy_T = logprob_entropy(logits_TV, token_T, backend="triton")
    assert logprob_T[[0, 2]].tolist() == [-math.inf] * 2 and logprob_T[1].isfinite() and entropy_T.isfinite().all()


def test_row_offsets_pass_two_to_the_31():
    stride = 2**29 + 17  # five rows span 2.7e9 elements; the pages between them are never touched
    base = torch.empty(4 * stride + 64, dtype=torch.bfloat16, device=DEVICE)
    logits_TV = base.as_strided((5, 50), (stride, 1))
    small = draw(5, 50, scale=3.0, dtype=torch.bfloat16)
    logits_TV.copy_(small)
    token_T, ones = tokens(5, 50), torch.ones(5, device=DEVICE)
    far = logprob_entropy(logits_TV, token_T, backend="triton")
    near = logprob_entropy(small, token_T, backend="triton")
    torch.testing.assert_close(far, near, atol=1e-6, rtol=1e-6)
    stats = stats_of(small, token_T)
    expected = OPS.logprob_entropy_grad(ones, ones, small, token_T, near[1], stats, 1.0, None, None, "triton")
    OPS.logprob_entropy_grad_(ones, ones, logits_TV, token_T, near[1], stats, 1.0, None, None, "triton")
    torch.testing.assert_close(logits_TV.contiguous(), expected, atol=2**-7, rtol=2**-7)
    logits_TV.copy_(small)
    args = (token_T, near[0] + 0.1, ones, ones, None, None, None, 1.0, None, 0.2, 0.2, None, 0.0, "k3", 0.0, True)
    loss, _ = OPS.ppo_loss_(logits_TV, *args, "triton")
    expected_loss, _, expected = OPS.ppo_loss(small, *args, True, "triton")
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(logits_TV.contiguous(), expected, atol=2**-7, rtol=2**-7)


@pytest.mark.gpu
def test_more_than_two_to_the_31_logits_and_more_rows_than_a_grid_axis_holds():
    for T, V in ((70_000, 64), (16_640, 131_072)):
        logits_TV, token_T = torch.randn(T, V, dtype=torch.bfloat16, device="cuda"), tokens(T, V)
        logprob_T, entropy_T = logprob_entropy(logits_TV, token_T)
        last = logprob_entropy(logits_TV[-3:].clone(), token_T[-3:])
        assert torch.equal(logprob_T[-3:], last[0]) and torch.equal(entropy_T[-3:], last[1])
        ones = torch.ones(T, device="cuda")
        args = (ones, ones, 1 / T * ones)
        small, _ = ppo_loss(logits_TV[-3:].clone().requires_grad_(), token_T[-3:], *(x[-3:] for x in args), inplace=False)
        logits_TV.requires_grad_()
        loss, _ = ppo_loss(logits_TV * 1, token_T, *args)
        (grad,) = torch.autograd.grad(loss, logits_TV)
        assert grad[-3:].isfinite().all() and (grad[-3:] != 0).any() and small.isfinite()


# ppo_loss

LOSSES = {
    "plain": {},
    "everything": {
        "clip_ratio_low": 0.1, "clip_ratio_high": 0.3, "dual_clip": 1.5, "kl_coef": 0.2, "kl_kind": "k3", "entropy_coef": 0.05,
    },
    "k1": {"kl_coef": 0.1, "kl_kind": "k1", "need_entropy": False},
    "k2": {"kl_coef": 0.1, "kl_kind": "k2"},
}  # fmt: skip


def ppo_columns(logprob_T, loss, seed=0):
    """Old log-probabilities on both sides of the clip, advantages, weights with a zero, and what the loss asks for."""
    T = len(logprob_T)
    old_T = logprob_T.float() + draw(T, seed=seed + 3, scale=0.4)
    weight_T = draw(T, seed=seed + 4).abs()
    weight_T[min(2, T - 1)] = 0
    options = dict(LOSSES[loss])
    if "kl_coef" in options:
        options["ref_logprob_T"] = logprob_T.float() + draw(T, seed=seed + 5, scale=0.7)
    if loss == "everything":
        options["importance_weight_T"] = draw(T, seed=seed + 6).abs()
    return (old_T, draw(T, seed=seed + 7), weight_T), options


def flat(result):
    loss, metrics = result[0][0], torch.stack([x.double() for x in result[0][1:]])
    return loss, metrics, *result[1]


def spread(fn):
    """The op with its metrics as further outputs."""

    def call(*args, **options):
        loss, metrics = fn(*args, **options)
        return loss, *metrics

    return call


@pytest.mark.parametrize("V", SMALL + LARGE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_ppo_loss_error_is_no_worse_than_torch(V, dtype, loss):
    T = 4
    scaling = scaling_of("softcap, temperature per token" if loss == "k2" else "temperature", T)
    logits_TV, token_T = draw(T, V, scale=4.0, dtype=dtype).requires_grad_(), tokens(T, V)
    columns, options = ppo_columns(logprob_entropy(logits_TV.detach(), token_T, backend="torch", **scaling)[0], loss)
    options |= scaling
    two = [torch.tensor(2.0, device=DEVICE)]
    wide = logits_TV.detach().double().requires_grad_()
    wide_options = {k: double(v) for k, v in options.items()}
    call = spread(ppo_loss)
    truth = flat(results(call, (wide, token_T, *columns), wide, "torch", two, inplace=False, **wide_options))
    torchs = flat(results(call, (logits_TV, token_T, *columns), logits_TV, "torch", two, inplace=False, **options))
    ours = flat(results(call, (logits_TV, token_T, *columns), logits_TV, "triton", two, inplace=False, **options))
    # One number's error may be 0 by luck in torch: sums of a few terms are compared with the terms' own rounding.
    torch.testing.assert_close(ours[0].double(), truth[0], atol=4e-6, rtol=1e-6)
    torch.testing.assert_close(ours[1], truth[1], atol=2e-5 if V > 1e5 else 1e-5, rtol=1e-6)
    assert torch.equal(ours[1][:4], truth[1][:4])  # counts
    # The gradient is as far off as exp(logprob - old): half a unit of a log-probability near -25 is 12 of a ratio near 1.
    assert_no_worse(ours[2], torchs[2], truth[2], dtype, units=12)
    over = results(
        lambda x, *args, **kw: call(x * 1, *args, **kw), (logits_TV, token_T, *columns), logits_TV, "triton", two, **options
    )
    assert all(torch.equal(a, b) for a, b in zip(flat(over), ours, strict=True))  # in place: the same bits


@pytest.mark.parametrize("V", [1, 17, 64, 1000, PPO_BLOCK - 1, PPO_BLOCK, PPO_BLOCK + 1, 2 * PPO_BLOCK + 50])
@pytest.mark.parametrize("T", [1, 3])
def test_ppo_loss_for_every_way_a_row_can_end(T, V):
    logits_TV, token_T = draw(T, V, scale=4.0).requires_grad_(), tokens(T, V)
    columns, options = ppo_columns(logprob_entropy(logits_TV.detach(), token_T, backend="torch")[0], "everything")
    call = spread(ppo_loss)
    one = [torch.ones((), device=DEVICE)]
    expected = flat(results(call, (logits_TV, token_T, *columns), logits_TV, "torch", one, inplace=False, **options))
    ours = flat(results(call, (logits_TV, token_T, *columns), logits_TV, "triton", one, inplace=False, **options))
    torch.testing.assert_close(ours, expected, atol=5e-6, rtol=1e-5)


def test_ppo_loss_reads_no_ignored_row_and_a_clipped_one_has_no_gradient():
    logits_TV, token_T = draw(4, 300).requires_grad_(), tokens(4, 300)
    logprob_T = logprob_entropy(logits_TV.detach(), token_T, backend="torch")[0]
    nan = torch.full((300,), math.nan, device=DEVICE)
    with torch.no_grad():
        logits_TV[1] = nan
    old_T = logprob_T - torch.tensor([0.0, math.nan, 1.0, 0.0], device=DEVICE)  # the third is clipped
    advantage_T = torch.tensor([1.0, math.nan, 1.0, -1.0], device=DEVICE)
    weight_T = torch.tensor([1.0, 0.0, 1.0, 0.5], device=DEVICE)
    loss, metrics = ppo_loss(
        logits_TV, token_T, old_T, advantage_T, weight_T, ref_logprob_T=old_T, importance_weight_T=advantage_T.abs(),
        inplace=False, backend="triton",
    )  # fmt: skip
    (grad,) = torch.autograd.grad(loss, logits_TV)
    assert loss.isfinite() and all(m.isfinite() for m in metrics)
    assert (metrics.num_tokens, metrics.clip_high) == (3, 1)
    assert (grad[1:3] == 0).all() and grad.isfinite().all() and (grad[[0, 3]] != 0).any()


def test_a_nan_that_counts_is_not_hidden():
    logits_TV, token_T, ones = draw(3, 50), tokens(3, 50), torch.ones(3, device=DEVICE)
    bad = torch.tensor([0.0, math.nan, 0.0], device=DEVICE)
    for backend in ("torch", "triton"):
        loss, metrics = ppo_loss(logits_TV, token_T, bad, ones, ones, backend=backend)
        assert loss.isnan() and metrics.old_kl.isnan()
        assert kl_penalty(bad, ones, "k3", backend=backend)[1].isnan()


@pytest.mark.parametrize("loss", LOSSES)
def test_without_a_gradient_ppo_loss_leaves_the_logits(loss):
    logits_TV, token_T = draw(4, 500), tokens(4, 500)
    before = logits_TV.clone()
    columns, options = ppo_columns(logprob_entropy(logits_TV, token_T, backend="torch")[0], loss)
    ours, metrics = ppo_loss(logits_TV, token_T, *columns, backend="triton", **options)
    expected, expected_metrics = ppo_loss(logits_TV, token_T, *columns, backend="torch", **options)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(tuple(metrics), tuple(expected_metrics), atol=3e-6, rtol=1e-5)
    assert torch.equal(logits_TV, before)
    with torch.no_grad():
        leaf = logits_TV.clone().requires_grad_()
        ppo_loss(leaf, token_T, *columns, backend="triton", **options)
    assert torch.equal(leaf, before)


def by_autograd(logits_TV, token_T, columns, options):
    """Loss and gradient in float64 from the definition, by autograd."""
    wide = logits_TV.double().requires_grad_()
    given = {k: double(v) for k, v in options.items()}
    clip = Clip(kl_coef=given.pop("kl_coef", 0.0), entropy_coef=given.pop("entropy_coef", 0.0))
    need_entropy = given.pop("need_entropy", True) or clip.entropy_coef != 0
    loss, _ = ppo_loss_torch(wide, token_T, *(x.double() for x in columns), clip=clip, need_entropy=need_entropy, **given)
    return loss, torch.autograd.grad(loss, wide)[0]


@pytest.mark.parametrize(
    "options",
    [{"entropy_coef": 0.1}, {"entropy_coef": 0.1, "need_entropy": False}, {"kl_coef": 0.2, "ref": True}, {}],
    ids=["entropy", "entropy unasked for", "kl", "nothing else"],
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_tokens_without_a_policy_gradient_keep_the_other_ones(options, backend):
    """Clipped, far beyond the clamp of the log ratio on both sides, and without advantage."""
    logits_TV, token_T = draw(8, 90, scale=2.0), tokens(8, 90)
    logprob_T = logprob_entropy(logits_TV, token_T, backend="torch")[0]
    old_T = logprob_T - torch.tensor([1.0, -1.0, 25.0, 25.0, -25.0, -25.0, 0.1, 0.0], device=DEVICE)
    advantage_T = torch.tensor([1.0, -1.0, 1.0, -1e-9, 1.0, -1.0, 0.0, 2.0], device=DEVICE)
    columns = (old_T, advantage_T, torch.linspace(0.5, 1.5, 8, device=DEVICE))
    options = dict(options)
    if options.pop("ref", False):
        options["ref_logprob_T"] = logprob_T - 0.3
    expected, expected_grad = by_autograd(logits_TV, token_T, columns, options)
    loss, _ = ppo_loss(logits_TV.requires_grad_() * 1, token_T, *columns, backend=backend, **options)
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    (grad,) = torch.autograd.grad(loss, logits_TV)
    torch.testing.assert_close(grad.double(), expected_grad, atol=1e-5, rtol=1e-5)
    identity, weight_VD = torch.eye(90, device=DEVICE), logits_TV.detach()
    linear, _ = linear_ppo_loss(  # the same logits from hidden states: rows leave only where nothing is left of them
        weight_VD.requires_grad_(), identity, token_T, *columns, backend=backend, **options
    )
    if options:
        torch.testing.assert_close(linear.double(), expected, atol=1e-5, rtol=1e-5)
    (linear_grad,) = torch.autograd.grad(linear, weight_VD)
    torch.testing.assert_close(linear_grad.double(), expected_grad, atol=1e-5, rtol=1e-5)


class Zeros(TorchDispatchMode):
    """Elements of each tensor of zeros that is made while it is on."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **kwargs or {})
        if "zeros" in op.name():
            self.made.append(out.numel())
        return out


@pytest.mark.parametrize("op", ["ppo_loss", "ppo_loss in place", "linear_ppo_loss", "value_loss"])
def test_backward_makes_no_zeros_for_outputs_that_have_no_gradient(op):
    """Those saved for backward are outputs too: zeros as large as the head's gradient would stand beside it."""
    T, V = 8, 90
    logits_TV, x_T = draw(T, V).requires_grad_(), draw(T).requires_grad_()
    columns = (tokens(T, V), draw(T), draw(T, seed=1), torch.ones(T, device=DEVICE))
    if op == "linear_ppo_loss":
        loss, _ = linear_ppo_loss(draw(T, 16).requires_grad_(), draw(V, 16).requires_grad_(), *columns)
    elif op == "value_loss":
        loss, _ = value_loss(x_T, draw(T), draw(T), columns[-1])
    else:
        loss, _ = ppo_loss(logits_TV * 1, *columns, inplace="in place" in op)
    with Zeros() as zeros:
        loss.backward()
    assert zeros.made == []


@pytest.mark.parametrize("T", [1, 1024, 1025, 5000])
def test_the_loss_adds_up_more_tokens_than_a_block_holds(T):
    from rlsp_kernels.ppo_loss import COLUMNS, empty_columns, reduce

    columns_CT = empty_columns(T, torch.zeros(1, device=DEVICE))
    columns_CT[:, :T] = draw(len(COLUMNS), T)
    columns_CT[-1, :T] = torch.randint(16, (T,), generator=torch.Generator().manual_seed(0)).to(DEVICE).float()
    torch.testing.assert_close(reduce(columns_CT, True), reduce(columns_CT, False), atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("first", [True, False])
def test_the_chosen_column_may_begin_any_tile(first):
    V = 3 * PPO_BLOCK
    token_T = torch.arange(0, V, BLOCK, device=DEVICE) - (0 if first else 1)
    token_T = token_T.clamp(min=0)
    logits_TV = draw(len(token_T), V, scale=2.0).requires_grad_()
    T = len(token_T)
    columns = (torch.full((T,), -11.0, device=DEVICE), draw(T, seed=1), torch.ones(T, device=DEVICE))
    grads = []
    for backend in ("torch", "triton"):
        loss, _ = ppo_loss(logits_TV, token_T, *columns, inplace=False, backend=backend)
        logprob_T, _ = logprob_entropy(logits_TV, token_T, backend=backend)
        grads.append(torch.autograd.grad(loss + logprob_T.sum(), logits_TV)[0])
    torch.testing.assert_close(grads[1], grads[0], atol=1e-5, rtol=1e-4)


def test_inputs_that_are_not_contiguous_are_read_as_they_are():
    T, V, D = 6, 70, 12
    pairs = torch.stack([tokens(T, V), tokens(T, V, seed=5)], 1)
    token_T = pairs[:, 0]
    apart = [torch.stack([draw(T, seed=i).abs() + 0.5, draw(T, seed=i + 9)], 1)[:, 0] for i in range(6)]
    old_T, advantage_T, weight_T, importance_T, ref_T, warm_T = apart
    logits_TV, hidden_TD, weight_VD = draw(T, V), draw(D, T).t(), draw(V, D, seed=1)
    options = {"importance_weight_T": importance_T, "ref_logprob_T": ref_T, "kl_coef": 0.1, "temperature": warm_T}

    def all_of(token_T, columns, options, logits_TV, hidden_TD, backend):
        leaf, h = logits_TV.clone().requires_grad_(), hidden_TD.clone().requires_grad_()
        found = [*logprob_entropy(leaf, token_T, temperature=options["temperature"], backend=backend)]
        found.append(ppo_loss(leaf, token_T, *columns, inplace=False, backend=backend, **options)[0])
        found.append(linear_ppo_loss(h, weight_VD, token_T, *columns, backend=backend, **options)[0])
        found += linear_logprob_entropy(h, weight_VD, token_T, temperature=options["temperature"], backend=backend)
        found += [kl_penalty(*columns[:2], "k3", backend=backend), value_loss(*columns, columns[2], backend=backend)[0]]
        upstream = torch.stack([draw(T, seed=20), draw(T, seed=21)], 1)[:, 0]
        total = sum((x * (upstream if x.ndim else 1.0)).sum() for x in found)
        return [*(x.detach() for x in found), *torch.autograd.grad(total, [leaf, h])]

    plain = {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    columns = (old_T - 4, advantage_T, weight_T)
    expected = all_of(
        token_T.contiguous(), [x.contiguous() for x in columns], plain, logits_TV, hidden_TD.contiguous(), "triton"
    )
    ours = all_of(token_T, columns, options, logits_TV, hidden_TD, "triton")
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours, all_of(token_T, columns, options, logits_TV, hidden_TD, "torch"), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("factor", [1 / 3, 0.3, 1.7])
def test_a_gradient_is_scaled_once_and_rounded_once(backend, factor):
    logits_TV, token_T = draw(3, 200, dtype=torch.bfloat16).requires_grad_(), tokens(3, 200)
    columns = (torch.full((3,), -5.0, device=DEVICE), draw(3, seed=1), torch.ones(3, device=DEVICE))
    kept = []
    for scale in (1.0, factor):
        loss, _ = ppo_loss(logits_TV, token_T, *columns, inplace=False, backend=backend)
        (grad,) = torch.autograd.grad(loss * scale, logits_TV)
        kept.append(grad)
        loss, _ = ppo_loss(logits_TV * 1, token_T, *columns, backend=backend)
        assert torch.equal(torch.autograd.grad(loss * scale, logits_TV)[0], grad)
    expected = (kept[0].float() * torch.tensor(factor)).to(torch.bfloat16)
    if GPU or backend == "torch":
        assert torch.equal(kept[1], expected)
    else:  # the interpreter cuts off
        torch.testing.assert_close(kept[1], expected, atol=0, rtol=2**-7)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_bias_learns_alone(backend):
    hidden_TD, weight_VD, bias_V = draw(5, 8), draw(30, 8, seed=1), draw(30, seed=2).requires_grad_()
    token_T, ones = tokens(5, 30), torch.ones(5, device=DEVICE)
    logprob_T, _ = linear_logprob_entropy(hidden_TD, weight_VD, token_T, bias_V=bias_V, backend=backend)
    loss, _ = linear_ppo_loss(hidden_TD, weight_VD, token_T, -3 * ones, ones, ones, bias_V=bias_V, backend=backend)
    ours = torch.autograd.grad(logprob_T.sum() + loss, bias_V)
    logits_TV = torch.nn.functional.linear(hidden_TD, weight_VD, bias_V)
    logprob_T, _ = logprob_entropy(logits_TV, token_T, backend="torch")
    loss, _ = ppo_loss(logits_TV, token_T, -3 * ones, ones, ones, inplace=False, backend="torch")
    torch.testing.assert_close(ours, torch.autograd.grad(logprob_T.sum() + loss, bias_V), atol=1e-5, rtol=1e-5)


def test_the_gradient_of_the_projection_is_added_up_in_float32():
    T, D, V = 512, 8, 40
    hidden_TD = draw(T, D, dtype=torch.bfloat16)
    weight_VD = draw(V, D, seed=1, dtype=torch.bfloat16).requires_grad_()
    columns = (torch.full((T,), -3.0, device=DEVICE), torch.ones(T, device=DEVICE), torch.ones(T, device=DEVICE))
    grads = []
    for budget in (1 << 30, 2 * 4 * V):  # one chunk, 128 chunks
        loss, _ = linear_ppo_loss(hidden_TD, weight_VD, tokens(T, V), *columns, logits_budget=budget, backend="triton")
        grads.append(torch.autograd.grad(loss, weight_VD)[0].float())
    worst = ((grads[0] - grads[1]).abs() / grads[0].abs().amax()).amax()
    assert worst <= 2**-8  # one rounding to bf16, not 128 of them


@pytest.mark.parametrize("linear", [False, True])
def test_nothing_holds_the_logits_while_the_gradient_is_rounded(linear, monkeypatch):
    from rlsp_kernels.linear import _Gradients

    finish, seen = _Gradients.finish, []

    def watched(self, group):
        storage = StorageWeakRef(self.head.logits_CV.untyped_storage())
        result = finish(self, group)
        gc.collect()  # the interpreter leaves cycles
        seen.append(storage.expired())
        return result

    monkeypatch.setattr(_Gradients, "finish", watched)
    hidden_TD, weight_VD, token_T = draw(4, 8), draw(30, 8, seed=1).requires_grad_(), tokens(4, 30)
    ones = torch.ones(4, device=DEVICE)
    if linear:
        linear_logprob_entropy(hidden_TD, weight_VD, token_T, backend="triton")[0].sum().backward()
    else:
        linear_ppo_loss(hidden_TD, weight_VD, token_T, -3 * ones, ones, ones, backend="triton")
    assert seen == [True]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_ignored_token_need_be_no_token(backend):
    token_T = torch.tensor([3, -100, 5], device=DEVICE)
    weight_T = torch.tensor([1.0, 0.0, 1.0], device=DEVICE)
    hidden_TD, weight_VD = draw(3, 8), draw(30, 8, seed=1).requires_grad_()
    columns = (torch.full((3,), -3.0, device=DEVICE), torch.ones(3, device=DEVICE), weight_T)
    every = torch.arange(3, device=DEVICE)
    loss, metrics = linear_ppo_loss(hidden_TD, weight_VD, token_T, *columns, rows_N=every, backend=backend)
    assert loss.isfinite() and metrics.num_tokens == 2
    assert torch.autograd.grad(loss, weight_VD)[0].isfinite().all()
    assert ppo_loss(hidden_TD @ weight_VD.t(), token_T, *columns, backend=backend)[0].isfinite()


def test_a_soft_cap_makes_minus_infinity_finite_and_a_masked_token_stays_impossible():
    logits_TV = draw(3, 40)
    logits_TV[:, 7] = -math.inf
    token_T = torch.tensor([7, 1, 7], device=DEVICE)
    capped = [logprob_entropy(logits_TV, token_T, softcap=10.0, backend=k) for k in ("torch", "triton")]
    torch.testing.assert_close(capped[1], capped[0], atol=1e-5, rtol=1e-5)
    lowest = draw(3, 40, dtype=torch.bfloat16)
    lowest[:, 7] = torch.finfo(torch.bfloat16).min
    logprob_T, entropy_T = logprob_entropy(lowest, token_T, backend="triton")
    assert logprob_T[[0, 2]].tolist() == [-math.inf] * 2 and logprob_T[1].isfinite() and entropy_T.isfinite().all()


def test_a_rare_token_keeps_half_a_unit():
    logits_TV = torch.zeros(2, 500, device=DEVICE)
    logits_TV[:, 3], logits_TV[:, 4] = 33.3, -57.7
    token_T = torch.tensor([4, 4], device=DEVICE)
    truth = logprob_entropy(logits_TV.double(), token_T, temperature=0.7, backend="torch")[0]
    ours = logprob_entropy(logits_TV, token_T, temperature=0.7, backend="triton")[0]
    assert (ours - truth).abs().max() < 5e-6  # half a unit of 130 is 7.6e-6


def test_a_kl_beyond_the_clamp_takes_no_gradient_however_large_its_upstream():
    logprob_T = torch.tensor([0.0, -1.0], device=DEVICE).requires_grad_()
    kl_T = kl_penalty(logprob_T, torch.tensor([-50.0, -1.0], device=DEVICE), "k2", backend="triton")
    (grad,) = torch.autograd.grad(kl_T, logprob_T, torch.full((2,), math.inf, device=DEVICE))
    assert grad.tolist() == [0.0, 0.0]


def test_a_nan_ratio_shows_in_its_extremes():
    logits_TV, token_T, ones = draw(3, 20), tokens(3, 20), torch.ones(3, device=DEVICE)
    bad = torch.tensor([-3.0, math.nan, -3.0], device=DEVICE)
    for backend in ("torch", "triton"):
        _, metrics = ppo_loss(logits_TV, token_T, bad, ones, ones, backend=backend)
        assert metrics.ratio_min.isnan() and metrics.ratio_max.isnan()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_tokens_give_a_loss_of_zero(backend):
    empty, none = torch.zeros(0, 40, device=DEVICE), torch.zeros(0, device=DEVICE)
    token_T = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert logprob_entropy(empty, token_T, backend=backend)[0].shape == (0,)
    hidden_TD, weight_VD = torch.zeros(0, 8, device=DEVICE), draw(40, 8).requires_grad_()
    for loss, metrics in (
        ppo_loss(empty, token_T, none, none, none, backend=backend),
        linear_ppo_loss(hidden_TD, weight_VD, token_T, none, none, none, backend=backend),
    ):
        assert loss == 0 and metrics.num_tokens == 0
        assert (metrics.ratio_min, metrics.ratio_max) == (math.inf, -math.inf)
    (grad,) = torch.autograd.grad(loss, weight_VD)
    assert (grad == 0).all()
    assert value_loss(none, none, none, none, backend=backend)[0] == 0
    assert kl_penalty(none, none, backend=backend).shape == (0,)


def test_every_op_gives_the_same_bits_twice():
    T, V, D = 6, 3000, 16
    logits_TV, token_T = draw(T, V, scale=3.0, dtype=torch.bfloat16), tokens(T, V)
    hidden_TD, weight_VD = draw(T, D, seed=8), draw(V, D, seed=9)
    columns, options = ppo_columns(logprob_entropy(logits_TV, token_T, backend="torch")[0], "everything")
    ones = [torch.ones((), device=DEVICE)]
    many = (draw(5000), draw(5000, seed=1), draw(5000, seed=2), torch.ones(5000, device=DEVICE))

    def once():
        leaf, h, w = (x.clone().requires_grad_() for x in (logits_TV, hidden_TD, weight_VD))
        out = [results(logprob_entropy, (leaf, token_T), leaf, "triton", (columns[0], columns[1]))]
        out += [results(spread(ppo_loss), (leaf, token_T, *columns), leaf, "triton", ones, inplace=False, **options)]
        out += [results(spread(linear_ppo_loss), (h, w, token_T, *columns), (h, w), "triton", ones, **options)]
        value_T = many[0].clone().requires_grad_()
        out += [results(value_loss, (value_T, *many[1:]), value_T, "triton", ones)]
        return [x for values, grads in out for x in (*values, *grads)]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


# From hidden states


@pytest.mark.parametrize("budget", [1 << 30, 2 * 3 * 2053], ids=["one chunk", "chunks of three tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [None, [0, 3, 4, 6]], ids=["all rows", "some rows"])
def test_linear_ops_equal_the_ones_on_logits_with_their_gradients(budget, dtype, rows):
    T, D, V = 8, 24, 2053
    hidden_TD = draw(T, D, dtype=dtype).requires_grad_()
    weight_VD = draw(V, D, seed=1, scale=0.7, dtype=dtype).requires_grad_()
    bias_V, token_T = draw(V, seed=2, dtype=dtype).requires_grad_(), tokens(T, V)
    budget = budget if dtype == torch.bfloat16 else 2 * budget
    leaves = (hidden_TD, weight_VD, bias_V)
    rows_N = None if rows is None else torch.tensor(rows, device=DEVICE)
    scaling = scaling_of("softcap, temperature per token", T)
    logprob_T = logprob_entropy(torch.nn.functional.linear(*leaves).detach(), token_T, backend="torch", **scaling)[0]
    columns, options = ppo_columns(logprob_T, "everything")
    kept = torch.ones(T, device=DEVICE)
    if rows is not None:
        kept = torch.zeros(T, device=DEVICE).index_fill_(0, rows_N, 1.0)
    upstream = (draw(T, seed=3) * kept, draw(T, seed=4) * kept)

    def on_logits(fn, wide):
        def call(hidden, weight, bias, token_T, *columns, **options):
            logits_TV = 0.6 * torch.nn.functional.linear(hidden, weight, bias)
            options = {k: double(v) for k, v in options.items()} if wide else options
            return fn(logits_TV, token_T, *columns, **options)

        return call

    wide = tuple(x.detach().double().requires_grad_() for x in leaves)
    linear_options = {"rows_N": rows_N, "logits_budget": budget, "logit_scale": 0.6}
    one = (torch.tensor(1.5, device=DEVICE),)
    weights = (*columns[:2], columns[2] * kept)
    for fn, plain, args, up, opts in (
        (linear_logprob_entropy, logprob_entropy, (), upstream, scaling),
        (spread(linear_ppo_loss), spread(ppo_loss), weights, one, scaling | options),
    ):
        truth = results(on_logits(plain, True), (*wide, token_T, *args), wide, "torch", up, **opts)
        torchs = results(on_logits(plain, False), (*leaves, token_T, *args), leaves, "torch", up, **opts)
        ours = results(
            lambda h, w, b, *args, fn=fn, **kw: fn(h, w, *args, bias_V=b, **kw), (*leaves, token_T, *args), leaves, "triton",
            up, **opts, **linear_options,
        )  # fmt: skip
        for x, x_torch, x_truth in zip(ours[0], torchs[0], truth[0], strict=True):
            if x.ndim:
                assert_no_worse(x[kept.bool()], x_torch[kept.bool()], x_truth[kept.bool()], dtype)
                assert (x[~kept.bool()] == 0).all()
            else:
                tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
                torch.testing.assert_close(x.double(), x_truth.double(), atol=tolerance, rtol=tolerance)
        for x, x_torch, x_truth in zip(ours[1], torchs[1], truth[1], strict=True):
            assert_no_worse(x, x_torch, x_truth, dtype, units=12)


def test_rows_that_cannot_learn_leave_before_the_first_matrix_product():
    T, D, V = 6, 8, 40
    hidden_TD, weight_VD, token_T = draw(T, D), draw(V, D, seed=1).requires_grad_(), tokens(T, V)
    weight_T = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], device=DEVICE)
    advantage_T = torch.tensor([1.0, 1.0, 0.0, -1.0, 0.0, 0.5], device=DEVICE)
    hidden_TD[[1, 2, 4]] = math.nan  # a product with them would be NaN
    old_T = torch.full((T,), -3.0, device=DEVICE)
    rows_N = active_rows(weight_T, advantage_T)
    assert rows_N.tolist() == [0, 3, 5]
    assert active_rows(weight_T, advantage_T, kl_coef=0.1).tolist() == [0, 2, 3, 5]
    given = {"rows_N": rows_N} if GPU else {}  # on a CPU they are found
    loss, metrics = linear_ppo_loss(hidden_TD, weight_VD, token_T, old_T, advantage_T, weight_T, backend="triton", **given)
    (grad,) = torch.autograd.grad(loss, weight_VD)
    assert loss.isfinite() and grad.isfinite().all() and metrics.num_tokens == 3


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_float32_logits_of_bf16_operands_lose_nothing_to_rounding(backend):
    T, D, V = 5, 32, 500
    hidden_TD, weight_VD = draw(T, D, dtype=torch.bfloat16), draw(V, D, seed=1, dtype=torch.bfloat16).requires_grad_()
    token_T, ones = tokens(T, V), torch.ones(T, device=DEVICE)
    truth = logprob_entropy(hidden_TD.double() @ weight_VD.detach().double().t(), token_T, backend="torch")
    wide = linear_logprob_entropy(hidden_TD, weight_VD, token_T, logits_dtype=torch.float32, backend=backend)
    narrow = linear_logprob_entropy(hidden_TD, weight_VD, token_T, backend=backend)
    for x, x_narrow, x_truth in zip(wide, narrow, truth, strict=True):
        assert (x - x_truth).abs().max() < 1e-5 < (x_narrow - x_truth).abs().max()
    loss, _ = linear_ppo_loss(hidden_TD, weight_VD, token_T, wide[0].detach(), ones, ones, logits_dtype=torch.float32,
                              backend=backend)  # fmt: skip
    (grad,) = torch.autograd.grad(loss, weight_VD)
    assert grad.dtype == torch.bfloat16 and grad.isfinite().all()


def test_a_tied_embedding_gets_both_gradients():
    V, D = 60, 12
    table_VD, token_T = draw(V, D).requires_grad_(), tokens(7, V)
    columns = (torch.full((7,), -4.0, device=DEVICE), draw(7, seed=1), torch.ones(7, device=DEVICE))
    grads = []
    for backend in ("torch", "triton"):
        loss, _ = linear_ppo_loss(table_VD[token_T] * 2, table_VD, token_T.roll(-1), *columns, backend=backend)
        grads.append(torch.autograd.grad(loss, table_VD)[0])
    hidden_TD = table_VD[token_T] * 2
    loss, _ = ppo_loss(hidden_TD @ table_VD.t(), token_T.roll(-1), *columns, backend="torch")
    expected = torch.autograd.grad(loss, table_VD)[0]
    for grad in grads:
        torch.testing.assert_close(grad, expected, atol=1e-5, rtol=1e-5)


def test_a_frozen_projection_costs_no_gradient_of_its_own():
    hidden_TD, weight_VD, token_T = draw(4, 8).requires_grad_(), draw(30, 8, seed=1), tokens(4, 30)
    ones = torch.ones(4, device=DEVICE)
    args = (hidden_TD.detach(), weight_VD, None, token_T, -3 * ones, ones, ones, None, None, None, None, 1.0, None, 1.0)
    rest = (0.2, 0.2, None, 0.0, "k3", 0.0, True, None, 1 << 20, 0, 0, None, "triton")
    *_, d_hidden, d_weight, d_bias = OPS.linear_ppo_loss(*args, *rest, True, False, False)
    assert d_hidden.shape == (4, 8) and d_weight.numel() == d_bias.numel() == 0
    loss, _ = linear_ppo_loss(hidden_TD, weight_VD, token_T, -3 * ones, ones, ones, backend="triton")
    torch.testing.assert_close(torch.autograd.grad(loss, hidden_TD)[0], d_hidden)


# kl_penalty and value_loss


@pytest.mark.parametrize("T", [1, 15, 16, 1024, 3001])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_penalty_error_is_no_worse_than_torch(T, kind):
    logprob_T, ref_T = (draw(T, seed=1) - 3).requires_grad_(), (draw(T, seed=1) - 3 + draw(T, seed=2)).requires_grad_()
    with torch.no_grad():
        ref_T[::3] = logprob_T[::3] + 1e-4 * draw(T, seed=3)[::3]  # where exp(r) - 1 - r cancels
        ref_T[0] = 30.0  # beyond the clamp
    upstream = (draw(T, seed=4),)
    single = lambda *args, **kw: (kl_penalty(*args, kind, **kw),)  # noqa: E731
    wide = (logprob_T.detach().double().requires_grad_(), ref_T.detach().double().requires_grad_())
    truth = results(single, wide, wide, "torch", upstream)
    torchs = results(single, (logprob_T, ref_T), (logprob_T, ref_T), "torch", upstream)
    ours = results(single, (logprob_T, ref_T), (logprob_T, ref_T), "triton", upstream)
    for x, x_torch, x_truth in zip((*ours[0], *ours[1]), (*torchs[0], *torchs[1]), (*truth[0], *truth[1]), strict=True):
        assert_no_worse(x, x_torch, x_truth)
    assert ours[1][0][0] == 0 and ours[1][1][0] == 0


def test_k3_keeps_its_relative_accuracy_and_its_sign_for_small_differences():
    size = torch.logspace(-12, 1.3, 4000, dtype=torch.float64)
    for r in (size, -size):
        r32 = r.float().to(DEVICE)
        ours = kl_penalty(torch.zeros_like(r32), r32, "k3", backend="triton").double().cpu()
        exact = torch.expm1(r32.double()) - r32.double()
        exact = torch.where(
            r32.abs() < 1e-3, r32.double() ** 2 * (0.5 + r32.double() / 6 + r32.double() ** 2 / 24), exact
        ).cpu()
        assert (ours >= 0).all()
        assert ((ours - exact).abs() <= 2e-6 * exact + 1e-37).all()


@pytest.mark.parametrize("T", [1, 15, 16, 1024, 5001])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss_error_is_no_worse_than_torch(T, clip):
    value_T, weight_T = draw(T).requires_grad_(), draw(T, seed=3).abs()
    columns = [value_T.detach() + draw(T, seed=1, scale=0.3), draw(T, seed=2), weight_T]
    if T > 2:
        weight_T[1] = 0
        columns[0][1] = columns[1][1] = math.nan
    one = (torch.tensor(0.7, device=DEVICE),)
    wide = value_T.detach().double().requires_grad_()
    truth = results(value_loss, (wide, *map(double, columns)), wide, "torch", one, clip=clip)
    torchs = results(value_loss, (value_T, *columns), value_T, "torch", one, clip=clip)
    ours = results(value_loss, (value_T, *columns), value_T, "triton", one, clip=clip)
    assert_no_worse(ours[0][0], torchs[0][0], truth[0][0])
    assert torch.equal(ours[0][1], truth[0][1])
    assert_no_worse(ours[1][0], torchs[1][0], truth[1][0])


# As torch ops


def op_samples():
    """Every op with arguments that use all of it."""
    T, V, D = 5, 33, 8
    x, token_T = draw(T, V).requires_grad_(), tokens(T, V)
    h, w, b = draw(T, D, seed=1).requires_grad_(), draw(V, D, seed=2).requires_grad_(), draw(V, seed=3).requires_grad_()
    c = [draw(T, seed=10 + i) for i in range(6)]
    for backend in ("torch", "triton"):
        warm = torch.linspace(0.5, 2, T, device=DEVICE)
        _, entropy_T, stats = OPS.logprob_entropy(x.detach(), token_T, 1.0, warm, 3.0, True, False, backend)
        yield OPS.logprob_entropy, (x, token_T, 1.0, warm, 3.0, True, False, backend)
        grad_args = (c[0], c[1], x.detach().clone(), token_T, entropy_T, stats, 1.0, warm, 3.0, backend)
        yield OPS.logprob_entropy_grad, grad_args
        yield OPS.logprob_entropy_grad_, grad_args
        loss = (token_T, c[0] - 3, c[1], c[2].abs(), c[3].abs(), c[4] - 3, warm)
        numbers = (0.2, 0.3, 1.5, 0.1, "k3", 0.1, True)
        yield OPS.ppo_loss, (x, *loss, 1.0, None, *numbers, True, backend)
        yield OPS.ppo_loss, (x.detach(), *loss, 1.0, None, *numbers, False, backend)
        yield OPS.ppo_loss_, (x.detach().clone(), *loss, 1.0, None, *numbers, backend)
        yield OPS.scale_, (draw(3, 4), torch.tensor(2.0, device=DEVICE), backend)
        yield OPS.scaled, (draw(3, 4), torch.tensor(2.0, device=DEVICE), backend)
        yield OPS.kl_penalty, (c[0].clone().requires_grad_(), c[1].clone().requires_grad_(), "k3", backend)
        yield OPS.kl_penalty_grad, (c[0], c[1], c[2], "k3", backend)
        yield OPS.value_loss, (c[0].clone().requires_grad_(), c[1], c[2], c[3].abs(), 0.2, backend)
        rows = torch.tensor([0, 2, 3], device=DEVICE)
        tail = (None, 1 << 20, 0, 0, None, backend)
        yield OPS.linear_logprob_entropy, (h, w, b, token_T, warm, rows, 1.0, None, 0.5, True, *tail)
        yield (
            OPS.linear_logprob_entropy_grad,
            (c[0], c[1], entropy_T, stats, h.detach(), w.detach(), b.detach(), token_T, warm, None, 1.0, None, 0.5, *tail)
            + (True, True, True),
        )
        yield OPS.linear_ppo_loss, (h, w, b, *loss, rows, 1.0, None, 0.5, *numbers, *tail, True, True, True)
        yield OPS.linear_ppo_loss, (h.detach(), w, None, *loss, None, 1.0, None, 1.0, *numbers, *tail, False, True, False)
        wide = [x.detach().double() for x in (h, w, b)]
        yield OPS.linear_ppo_loss, (*wide, *loss, None, 1.0, None, 1.0, *numbers, *tail[:-1], "torch", False, False, False)
        narrow = (torch.float32, *tail[1:-1], "torch")
        yield OPS.linear_logprob_entropy, (*wide, token_T, warm, None, 1.0, None, 0.5, True, *narrow)


def test_opcheck_passes_for_every_op():
    seen = set()
    for op, args in op_samples():
        opcheck(op, args)
        seen.add(op._qualified_op_name)
    assert len(seen) == 13


COMPILED = {
    "linear_ppo_loss": lambda h, w, t, a, b, c, k: linear_ppo_loss(h, w, t, a, b, c, backend=k)[0],
    "linear_logprob_entropy": lambda h, w, t, a, b, c, k: sum(
        (x * y).sum() for x, y in zip(linear_logprob_entropy(h, w, t, backend=k), (b, c), strict=True)
    ),
    "ppo_loss in place": lambda h, w, t, a, b, c, k: ppo_loss(h @ w.t(), t, a, b, c, backend=k)[0],
    "ppo_loss": lambda h, w, t, a, b, c, k: ppo_loss(h @ w.t(), t, a, b, c, inplace=False, backend=k)[0],
    "logprob_entropy": lambda h, w, t, a, b, c, k: (logprob_entropy(h @ w.t(), t, backend=k)[0] * b).sum(),
    "logprob_entropy in place": lambda h, w, t, a, b, c, k: (
        logprob_entropy(h @ w.t(), t, inplace_backward=True, backend=k)[1] * b
    ).sum(),
    "kl_penalty and value_loss": lambda h, w, t, a, b, c, k: (
        kl_penalty(h[:, 0], a, "k3", backend=k).sum() + value_loss((h @ w.t())[:, 1], a, b, c, backend=k)[0]
    ),
}


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", COMPILED)
def test_ops_compile_into_one_graph_and_not_again_when_the_number_of_tokens_changes(name, compiler):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)
    compiled = torch.compile(COMPILED[name], fullgraph=True, backend=counter)
    weight_VD = draw(33, 8).requires_grad_()
    for T in (5, 7, 16, 21, 32):
        hidden_TD = draw(T, 8, seed=T).requires_grad_()
        args = (tokens(T, 33), draw(T, seed=1) - 3, draw(T, seed=2), draw(T, seed=3).abs(), "triton")
        leaves = (hidden_TD, weight_VD)
        ours, expected = (fn(hidden_TD, weight_VD, *args) for fn in (compiled, COMPILED[name]))
        torch.testing.assert_close(ours, expected)
        grads = [torch.autograd.grad(x, leaves, allow_unused=True) for x in (ours, expected)]
        torch.testing.assert_close(*([x for x in grad if x is not None] for grad in grads))
    assert counter.frame_count <= 2  # for one number of tokens, then for any


# On two ranks


@pytest.fixture(scope="module")
def on_two_ranks():
    """What vocab_ranks.py says, in one launch."""
    path = os.pathsep.join(str(p) for p in (ROOT / "kernels", ROOT / "tests"))
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "vocab_ranks.py")],
        env=env | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "claim", ["a spread vocabulary", "a sharded DTensor", "a DTensor of FSDP2", "uneven shares", "a share of nothing but -inf"]
)
def test_two_ranks_give_what_one_gives(on_two_ranks, backend, claim):
    assert f"{claim}, {backend}: equal" in on_two_ranks


# Compiled for GPUs that are not there


def test_every_kernel_compiles_without_spills_and_with_wide_loads():
    pytest.importorskip("triton.backends.nvidia")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "cubins.py"), "--check"],
        env=env | {"PYTHONPATH": str(ROOT / "kernels")},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.count(" sm_90 ") >= 20


# Refusals

X, I3, Z3 = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64), torch.zeros(3)
META = torch.zeros(3, device="meta")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: logprob_entropy(X, I3, backend="cuda"), "auto, torch or triton, got 'cuda'"),
        (lambda: logprob_entropy(torch.zeros(5, 3).t(), I3), r"stride 1 along V, got strides \(1, 3\)"),
        (lambda: logprob_entropy(X.int(), I3), "floating point, got torch.int32"),
        (lambda: logprob_entropy(X, I3.to("meta")), "token_T is on meta, the others on cpu"),
        (lambda: logprob_entropy(X, I3, temperature=META), "temperature is on meta"),
        (lambda: logprob_entropy(X.clone().requires_grad_(), I3, inplace_backward=True), "leaf that requires grad"),
        (lambda: logprob_entropy(X[:1].expand(3, 5), I3, inplace_backward=True), "do not overlap"),
        (lambda: ppo_loss(X.clone().requires_grad_(), I3, Z3, Z3, Z3), "inplace=True would overwrite a leaf"),
        (lambda: ppo_loss(X, I3, Z3, META, Z3), "advantage_T is on meta"),
        (lambda: ppo_loss(X, I3, Z3, Z3, Z3, kl_coef=0.5), "kl_coef = 0.5 needs ref_logprob_T"),
        (lambda: ppo_loss(X, I3, Z3, Z3, Z3, clip_ratio_low=-0.5), r"clip_ratio_low must be in \[0, 1\], got -0.5"),
        (lambda: ppo_loss(X, I3, Z3, Z3, Z3, clip_ratio_high=math.nan), "clip_ratio_high must be >= 0, got nan"),
        (lambda: logprob_entropy(X, I3, temperature=1e-9), "temperature must be at least 1e-6"),
        (lambda: logprob_entropy(X[:, :0], I3), "no column"),
        (lambda: linear_logprob_entropy(X, X, I3, logits_dtype=torch.int32), "logits_dtype must be floating point"),
        (lambda: linear_logprob_entropy(X.int(), X.int(), I3), "want floating-point hidden_TD"),
        (lambda: linear_ppo_loss(X, X.double(), I3, Z3, Z3, Z3), "hidden_TD is torch.float32 and weight_VD torch.float64"),
        (lambda: linear_ppo_loss(X, X, I3, Z3, Z3, Z3, bias_V=torch.zeros(2)), r"want bias_V \(V,\) = \(3,\), got \(2,\)"),
        (lambda: linear_ppo_loss(X, X, I3, Z3, Z3, Z3, rows_N=I3.int()), r"want rows_N \(N,\) int64"),
        (lambda: linear_ppo_loss(X, X, I3, Z3, Z3, Z3, logits_budget=0), "logits_budget must be a positive number"),
        (lambda: linear_logprob_entropy(X, X, I3, logit_scale=0.0), "logit_scale must be > 0, got 0.0"),
        (lambda: value_loss(Z3, Z3, Z3.double(), Z3), "return_T must be torch.float32 as value_T is, got torch.float64"),
        (lambda: value_loss(Z3.half(), Z3.half(), Z3.half(), Z3.half()), "float32 or float64, got torch.float16"),
        (lambda: kl_penalty(Z3, META), "ref_logprob_T is on meta, the others on cpu"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_float64_and_triton_exclude_each_other():
    with pytest.raises(RuntimeError, match="float64 runs in plain torch"):
        logprob_entropy(X.double(), I3, backend="triton")


def test_triton_without_a_gpu_or_the_interpreter_says_how_to_get_it():
    code = "import torch, rlsp_kernels as k; k.logprob_entropy(torch.zeros(2, 3), torch.zeros(2).long(), backend='triton')"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env | {"PYTHONPATH": str(ROOT / "kernels")}, capture_output=True, text=True
    )
    assert "set TRITON_INTERPRET=1 before triton is imported" in done.stderr


def test_the_metrics_have_the_order_that_the_kernel_writes():
    assert PPOMetrics._fields == (
        "num_tokens", "clip_low", "clip_high", "dual_clip", "old_kl", "ref_kl", "entropy", "pg_loss", "ratio_min", "ratio_max",
    )  # fmt: skip
