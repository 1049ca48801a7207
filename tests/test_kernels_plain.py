"""The kernels' plain definitions: KL, log-probability and entropy, PPO loss on logits and on hidden states, value loss.

Axes: T packed tokens, V vocabulary, D hidden size.
"""

import math

import pytest
import torch
from rlsp_kernels import (
    backend,
    kl_penalty,
    linear_logprob_entropy,
    linear_ppo_loss,
    logprob_entropy,
    ppo_loss,
    value_loss,
)

LN2 = math.log(2)


def draw(*shape, seed=0, scale=1.0, dtype=torch.float32):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def tokens(T, V, seed=0):
    return torch.randint(V, (T,), generator=torch.Generator().manual_seed(seed))


def of(*numbers):
    return torch.tensor(numbers, dtype=torch.float32)


# KL


def test_kl_estimators_by_hand():
    logprob_T, ref_logprob_T = of(-1.0, -2.0, -1.5), of(-1.0 - LN2, -2.0 + LN2, -1.5)  # r = -ln 2, ln 2, 0
    expected = {"k1": (LN2, -LN2, 0), "k2": (LN2**2 / 2, LN2**2 / 2, 0), "k3": (LN2 - 0.5, 1 - LN2, 0)}
    for kind, numbers in expected.items():
        torch.testing.assert_close(kl_penalty(logprob_T, ref_logprob_T, kind), of(*numbers))


@pytest.mark.parametrize("kind, tolerance", [("k1", 0.01), ("k2", 0.1), ("k3", 0.01)])  # k2 is biased
def test_kl_estimators_average_to_the_kl_divergence(kind, tolerance):
    p, q = draw(7, seed=1, scale=0.4).log_softmax(-1), draw(7, seed=2, scale=0.4).log_softmax(-1)
    truth = (p.exp() * (p - q)).sum()
    expected = (p.exp() * kl_penalty(p, q, kind)).sum()  # over tokens sampled from p
    assert abs(expected - truth) <= tolerance * truth + 1e-7


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_gradients_are_those_of_the_formula_and_zero_beyond_the_clamp(kind):
    logprob_T = of(-1.0, -0.3, -30.0, -1.0).requires_grad_()
    ref_logprob_T = of(-1.5, -0.7, -1.0, -30.0)  # the last two differ by 29
    (grad,) = torch.autograd.grad(kl_penalty(logprob_T, ref_logprob_T, kind).sum(), logprob_T)
    r = (ref_logprob_T - logprob_T).detach()[:2]
    formula = {"k1": torch.ones(2), "k2": -r, "k3": 1 - r.exp()}[kind]
    torch.testing.assert_close(grad, torch.cat([formula, torch.zeros(2)]))


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_stays_finite_for_a_token_that_one_policy_excludes(kind):
    logprob_T = of(-1.0, -200.0).requires_grad_()
    kl_T = kl_penalty(logprob_T, of(-math.inf, -1.0), kind)
    (grad,) = torch.autograd.grad(kl_T.sum(), logprob_T)
    assert kl_T.isfinite().all() and grad.isfinite().all()


def test_k3_is_never_negative_however_small_the_difference():
    size = torch.logspace(-12, 1.3, 40_000)
    for difference in (size, -size):
        assert kl_penalty(difference, torch.zeros_like(size), "k3").min() >= 0
        assert kl_penalty(difference - 1.7, torch.full_like(size, -1.7), "k3").min() >= 0


# Log-probability and entropy


def truth_of(logits_TV, token_T, temperature=1.0, softcap=None):
    """Log-probability and entropy row by row, float64, from the definition."""
    logprobs, entropies = [], []
    for t, token in enumerate(token_T.tolist()):
        z = [float(x) for x in logits_TV[t].double()]
        if softcap is not None:
            z = [softcap * math.tanh(x / softcap) for x in z]
        z = [x / (temperature[t].item() if isinstance(temperature, torch.Tensor) else temperature) for x in z]
        top = max(z)
        log_sum = top + math.log(sum(math.exp(x - top) for x in z))
        logprobs.append(z[token] - log_sum)
        entropies.append(-sum(math.exp(x - log_sum) * (x - log_sum) for x in z if x > -math.inf))
    return torch.tensor(logprobs, dtype=torch.float64), torch.tensor(entropies, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"softcap": 3.0}, {"temperature": 1.6, "softcap": 2.0}])
def test_logprob_and_entropy_agree_with_float64(dtype, options):
    logits_TV, token_T = draw(5, 33, scale=4.0, dtype=dtype), tokens(5, 33)
    ours = logprob_entropy(logits_TV, token_T, **options)
    for x, truth in zip(ours, truth_of(logits_TV, token_T, **options), strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.double(), truth, atol=3e-6, rtol=1e-6)


def test_each_token_may_have_its_own_temperature():
    logits_TV, token_T, temperature_T = draw(4, 9, scale=3.0), tokens(4, 9), of(0.5, 1.0, 2.0, 0.7)
    for x, truth in zip(
        logprob_entropy(logits_TV, token_T, temperature=temperature_T),
        truth_of(logits_TV, token_T, temperature_T),
        strict=True,
    ):
        torch.testing.assert_close(x.double(), truth, atol=3e-6, rtol=1e-6)


def test_logits_of_minus_infinity_have_no_share_and_no_gradient():
    logits_TV = draw(3, 6)
    logits_TV[:, 2] = -math.inf
    logits_TV.requires_grad_()
    logprob_T, entropy_T = logprob_entropy(logits_TV, torch.tensor([0, 1, 5]))
    (grad,) = torch.autograd.grad((logprob_T + entropy_T).sum(), logits_TV)
    short_TV = torch.cat([logits_TV[:, :2], logits_TV[:, 3:]], 1).detach().requires_grad_()
    short = logprob_entropy(short_TV, torch.tensor([0, 1, 4]))
    (short_grad,) = torch.autograd.grad(sum(short).sum(), short_TV)
    torch.testing.assert_close((logprob_T, entropy_T), short)
    assert (grad[:, 2] == 0).all()
    torch.testing.assert_close(torch.cat([grad[:, :2], grad[:, 3:]], 1), short_grad)


def test_very_negative_and_very_large_logits_lose_nothing():
    logits_TV, token_T = draw(3, 8), tokens(3, 8)
    for shift in (-3e4, 3e4):
        shifted = logprob_entropy((logits_TV.double() + shift), token_T)
        torch.testing.assert_close(shifted, logprob_entropy(logits_TV.double(), token_T), atol=1e-10, rtol=0)


def test_the_entropy_of_equal_logits_is_log_vocabulary():
    _, entropy_T = logprob_entropy(torch.zeros(2, 50), tokens(2, 50))
    torch.testing.assert_close(entropy_T, torch.full((2,), math.log(50)))


def test_skipping_the_entropy_leaves_the_logprob_as_it_is():
    logits_TV, token_T = draw(3, 7), tokens(3, 7)
    logprob_T, entropy_T = logprob_entropy(logits_TV, token_T, need_entropy=False)
    assert torch.equal(logprob_T, logprob_entropy(logits_TV, token_T)[0])
    assert (entropy_T == 0).all()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_logprob_and_entropy_gradients_agree_with_finite_differences(softcap):
    logits_TV, token_T = draw(3, 5, dtype=torch.float64).requires_grad_(), tokens(3, 5)
    temperature_T = torch.tensor([0.7, 1.0, 1.9], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: logprob_entropy(x, token_T, temperature=temperature_T, softcap=softcap), logits_TV
    )


def test_no_tokens_give_no_numbers():
    logprob_T, entropy_T = logprob_entropy(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert logprob_T.shape == entropy_T.shape == (0,)


# PPO loss: three tokens with given ratios. Logits of two words make any probability: log(p / (1 - p)) against 0.

OLD = (0.5, 0.4, 0.25)  # probabilities before the update


def logits_with_ratios(*ratios):
    p = of(*OLD) * of(*ratios)
    return torch.stack([(p / (1 - p)).log(), torch.zeros(len(p))], 1).requires_grad_()


def three_tokens(ratios, advantages, weights=(1.0, 1.0, 1.0), **options):
    """loss, metrics and d loss / d logprob of three tokens whose ratios to the old policy are given."""
    logits_TV = logits_with_ratios(*ratios)
    token_T = torch.zeros(3, dtype=torch.int64)
    loss, metrics = ppo_loss(logits_TV, token_T, of(*OLD).log(), of(*advantages), of(*weights), inplace=False, **options)
    (grad,) = torch.autograd.grad(loss, logits_TV)
    p = (of(*OLD) * of(*ratios)).double()
    return loss.item(), metrics, (grad[:, 0].double() / (1 - p)).tolist()  # d logprob / d logit = 1 - p


def close(*numbers):
    return pytest.approx(list(numbers), abs=1e-5)


def test_ratios_inside_the_clip_give_the_plain_policy_gradient():
    loss, metrics, grad = three_tokens((1.1, 0.9, 1.0), (1.0, -2.0, 3.0))
    assert loss == pytest.approx(-1.1 + 1.8 - 3.0, abs=1e-5)
    assert grad == close(-1.1, 1.8, -3.0)
    assert (metrics.clip_low, metrics.clip_high, metrics.dual_clip, metrics.num_tokens) == (0, 0, 0, 3)
    assert metrics.old_kl.item() == pytest.approx(-math.log(1.1) - math.log(0.9), abs=1e-5)
    assert (metrics.ratio_min.item(), metrics.ratio_max.item()) == pytest.approx((0.9, 1.1), abs=1e-5)


def test_a_ratio_above_the_clip_stops_only_where_the_advantage_is_positive():
    loss, metrics, grad = three_tokens((1.6, 1.6, 1.6), (1.0, -1.0, 0.0), clip_ratio_low=0.1, clip_ratio_high=0.3)
    assert loss == pytest.approx(-1.3 + 1.6, abs=1e-5)
    assert grad == close(0.0, 1.6, 0.0)
    assert (metrics.clip_low, metrics.clip_high) == (0, 1)


def test_a_ratio_below_the_clip_stops_only_where_the_advantage_is_negative():
    loss, metrics, grad = three_tokens((0.5, 0.5, 0.5), (1.0, -1.0, 0.0), clip_ratio_low=0.1, clip_ratio_high=0.3)
    assert loss == pytest.approx(-0.5 + 0.9, abs=1e-5)
    assert grad == close(-0.5, 0.0, 0.0)
    assert (metrics.clip_low, metrics.clip_high) == (1, 0)


def test_the_dual_clip_bounds_the_loss_of_negative_advantages_alone():
    loss, metrics, grad = three_tokens((1.9, 1.4, 1.9), (-1.0, -1.0, 1.0), dual_clip=1.5)
    assert loss == pytest.approx(1.5 + 1.4 - 1.2, abs=1e-5)
    assert grad == close(0.0, 1.4, 0.0)
    assert (metrics.dual_clip, metrics.clip_low, metrics.clip_high) == (1, 0, 1)


def test_importance_weights_scale_the_policy_gradient_and_nothing_else():
    weight_T, ref_T = of(0.5, 2.0, 1.0), of(*OLD).log()
    options = {"ref_logprob_T": ref_T, "kl_coef": 0.1, "kl_kind": "k1"}
    loss, metrics, grad = three_tokens((1.1, 0.9, 1.6), (1.0, -1.0, 1.0), importance_weight_T=weight_T, **options)
    kl = math.log(1.1) + math.log(0.9) + math.log(1.6)
    assert loss == pytest.approx(-0.55 + 1.8 - 1.2 + 0.1 * kl, abs=1e-5)
    assert grad == close(-0.55 + 0.1, 1.8 + 0.1, 0.1)
    assert metrics.pg_loss.item() == pytest.approx(-0.55 + 1.8 - 1.2, abs=1e-5)


def test_the_entropy_bonus_lowers_the_loss_by_the_entropy():
    ratios, advantages = (1.0, 1.2, 0.8), (0.0, 0.0, 0.0)
    loss, metrics, _ = three_tokens(ratios, advantages, weights=(0.5, 0.25, 1.0), entropy_coef=0.3)
    p = [o * r for o, r in zip(OLD, ratios, strict=True)]
    entropy = [-q * math.log(q) - (1 - q) * math.log(1 - q) for q in p]
    assert loss == pytest.approx(-0.3 * (0.5 * entropy[0] + 0.25 * entropy[1] + entropy[2]), abs=1e-5)
    assert metrics.entropy.item() == pytest.approx(sum(entropy), abs=1e-5)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_kl_term_adds_its_estimate_and_its_gradient(kind):
    ref = of(*OLD).log() + of(-LN2, 0.0, LN2)
    loss, metrics, grad = three_tokens((1.0, 1.0, 1.0), (0.0,) * 3, ref_logprob_T=ref, kl_coef=0.5, kl_kind=kind)
    kl = {"k1": 0.0, "k2": LN2**2, "k3": (0.5 - 1 + LN2) + (2 - 1 - LN2)}[kind]
    slope = {"k1": (1, 1, 1), "k2": (LN2, 0, -LN2), "k3": (0.5, 0, -1)}[kind]
    assert loss == pytest.approx(0.5 * kl, abs=1e-5)
    assert metrics.ref_kl.item() == pytest.approx(kl, abs=1e-5)
    assert grad == close(*(0.5 * s for s in slope))


def test_weights_make_the_mean_over_tokens():
    loss, metrics, grad = three_tokens((1.1, 0.9, 1.0), (1.0, -2.0, 3.0), weights=(1 / 3, 1 / 3, 1 / 3))
    assert loss == pytest.approx((-1.1 + 1.8 - 3.0) / 3, abs=1e-5)
    assert grad == close(-1.1 / 3, 0.6, -1.0)
    assert metrics.pg_loss.item() == pytest.approx(loss)


def test_a_token_of_weight_zero_may_hold_nan_anywhere():
    nan = math.nan
    logits_TV = logits_with_ratios(1.1, 1.0, 0.9).detach()
    logits_TV[1] = nan
    logits_TV.requires_grad_()
    loss, metrics = ppo_loss(
        logits_TV,
        torch.zeros(3, dtype=torch.int64),
        of(math.log(OLD[0]), nan, math.log(OLD[2])),
        of(1.0, nan, -2.0),
        of(1.0, 0.0, 1.0),
        importance_weight_T=of(1.0, nan, 1.0),
        ref_logprob_T=of(math.log(OLD[0]), nan, math.log(OLD[2])),
        kl_coef=0.1,
        kl_kind="k1",
        entropy_coef=0.1,
        dual_clip=3.0,
        inplace=False,
    )
    (grad,) = torch.autograd.grad(loss, logits_TV)
    assert loss.isfinite() and all(m.isfinite() for m in metrics)
    assert metrics.num_tokens == 2
    assert grad[[0, 2]].isfinite().all() and (grad[1] == 0).all()


def test_the_metrics_of_two_micro_batches_merge_into_those_of_one():
    logits_TV, token_T = draw(8, 5, scale=2.0), tokens(8, 5)
    old_T, advantage_T, ref_T = draw(8, seed=1) - 1.5, draw(8, seed=2), draw(8, seed=3) - 1.5
    weight_T = of(1, 1, 0, 1, 1, 1, 0, 1)

    def metrics(part):
        return ppo_loss(
            logits_TV[part],
            token_T[part],
            old_T[part],
            advantage_T[part],
            weight_T[part],
            ref_logprob_T=ref_T[part],
            dual_clip=2.0,
        )[1]

    whole = metrics(slice(0, 8))
    parts = metrics(slice(0, 3)).merge(metrics(slice(3, 8))).merge(metrics(slice(8, 8)))  # the last has no tokens
    for name in whole._fields:
        torch.testing.assert_close(getattr(parts, name).float(), getattr(whole, name).float(), msg=name)
    assert whole.num_tokens == 6 and 0 < whole.ratio_min < whole.ratio_max


def test_ppo_loss_gradients_agree_with_finite_differences():
    logits_TV, token_T = draw(4, 5, dtype=torch.float64).requires_grad_(), tokens(4, 5)
    rows = [draw(4, seed=s, dtype=torch.float64) for s in range(4)]
    old_T = logprob_entropy(logits_TV, token_T)[0].detach() + 0.3 * rows[0]  # ratios on both sides of the clip
    assert torch.autograd.gradcheck(
        lambda x: ppo_loss(
            x, token_T, old_T, rows[1], rows[2].abs(), temperature=0.8, ref_logprob_T=rows[3] - 2,
            kl_coef=0.2, kl_kind="k3", entropy_coef=0.1, dual_clip=1.2, inplace=False,
        )[0],
        logits_TV,
    )  # fmt: skip


# From hidden states


def linear_case(T=11, D=6, V=13, bias=True):
    hidden_TD, weight_VD = draw(T, D, seed=4, scale=1.5).requires_grad_(), draw(V, D, seed=5).requires_grad_()
    bias_V = draw(V, seed=6).requires_grad_() if bias else None
    return hidden_TD, weight_VD, bias_V, tokens(T, V)


@pytest.fixture(params=["one chunk", "chunks of four tokens", "chunks of one token"])
def budget(request):
    return {"one chunk": 1 << 29, "chunks of four tokens": 4 * 4 * 13, "chunks of one token": 1}[request.param]


SCALINGS = [{}, {"temperature": 0.7, "softcap": 5.0, "logit_scale": 0.3}, {"temperature": torch.linspace(0.5, 2, 11)}]


@pytest.mark.parametrize("scaling", SCALINGS, ids=["plain", "scaled", "temperature per token"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_linear_logprob_entropy_equals_the_one_on_logits_with_its_gradients(budget, scaling, bias):
    hidden_TD, weight_VD, bias_V, token_T = linear_case(bias=bias)
    leaves = [x for x in (hidden_TD, weight_VD, bias_V) if x is not None]
    options = {k: v for k, v in scaling.items() if k != "logit_scale"}
    logits_TV = scaling.get("logit_scale", 1.0) * torch.nn.functional.linear(hidden_TD, weight_VD, bias_V)
    expected = logprob_entropy(logits_TV, token_T, **options)
    ours = linear_logprob_entropy(hidden_TD, weight_VD, token_T, bias_V=bias_V, logits_budget=budget, **scaling)
    torch.testing.assert_close(ours, expected)
    mix_T = draw(11, seed=7)
    for x, truth in zip(
        torch.autograd.grad((ours[0] * mix_T + ours[1]).sum(), leaves),
        torch.autograd.grad((expected[0] * mix_T + expected[1]).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(x, truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 4, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "scaling",
    [{"temperature": 1.0}, {"temperature": 0.9, "softcap": 3.0}, {"temperature": torch.linspace(0.5, 2, 11)}],
    ids=["plain", "scaled", "temperature per token"],
)
def test_a_few_rows_at_a_time_give_the_bits_of_all_at_once(monkeypatch, rows, dtype, scaling):
    logits_TV, token_T = draw(11, 13, seed=4, dtype=dtype).requires_grad_(), tokens(11, 13)
    given_TV = logits_TV.detach().clone()
    old_T, ref_T, weight_T = draw(11, seed=1) - 3, draw(11, seed=3) - 3, of(1, 0, 2, 1, 1, 0, 1, 3, 1, 1, 1)
    options = {"dual_clip": 1.3, "ref_logprob_T": ref_T, "kl_coef": 0.2, "entropy_coef": 0.05, **scaling}

    def found():
        logprob_T, entropy_T = logprob_entropy(logits_TV, token_T, **scaling)
        loss, metrics = ppo_loss(logits_TV, token_T, old_T, draw(11, seed=2), weight_T, inplace=False, **options)
        gradients = [torch.autograd.grad(x, logits_TV)[0] for x in ((logprob_T * old_T - entropy_T).sum(), loss)]
        assert torch.equal(logits_TV, given_TV)
        leaf_TV = given_TV.clone().requires_grad_()
        over, _ = ppo_loss(leaf_TV * 1.0, token_T, old_T, draw(11, seed=2), weight_T, inplace=True, **options)
        gradients.append(torch.autograd.grad(over, leaf_TV)[0])
        return torch.stack([logprob_T, entropy_T]), torch.stack([loss.double(), *metrics]), *gradients

    whole = found()
    monkeypatch.setattr(backend, "CPU_BLOCK", rows * 13 * 4)
    assert backend.row_blocks(logits_TV)[0] == slice(0, rows)
    for x, expected in zip(found(), whole, strict=True):
        assert torch.equal(x, expected)


def test_linear_ppo_loss_equals_the_one_on_logits_with_its_gradients(budget):
    hidden_TD, weight_VD, bias_V, token_T = linear_case()
    weight_T = of(1, 0, 2, 1, 1, 0, 1, 3, 1, 1, 1)
    logits_TV = 0.6 * torch.nn.functional.linear(hidden_TD, weight_VD, bias_V)
    old_T = logprob_entropy(logits_TV, token_T, temperature=0.9)[0].detach() + draw(11, seed=1, scale=0.4)
    args = (token_T, old_T, draw(11, seed=2), weight_T)
    options = {
        "temperature": 0.9, "clip_ratio_low": 0.1, "clip_ratio_high": 0.25, "dual_clip": 1.3,
        "importance_weight_T": draw(11, seed=8).abs(), "ref_logprob_T": old_T - 0.5, "kl_coef": 0.2, "kl_kind": "k2",
        "entropy_coef": 0.05,
    }  # fmt: skip
    expected, expected_metrics = ppo_loss(logits_TV, *args, inplace=False, **options)
    ours, metrics = linear_ppo_loss(
        hidden_TD, weight_VD, *args, bias_V=bias_V, logit_scale=0.6, logits_budget=budget, **options
    )
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(tuple(metrics), tuple(expected_metrics), rtol=1e-5, atol=1e-6)
    assert metrics.clip_low > 0 and metrics.clip_high > 0 and metrics.dual_clip > 0
    leaves = (hidden_TD, weight_VD, bias_V)
    for x, truth in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(x, truth, atol=1e-5, rtol=1e-5)


def test_the_matrix_product_runs_in_the_dtype_asked_for(budget):
    hidden_TD, weight_VD, bias_V, token_T = linear_case()
    logits_TV = torch.nn.functional.linear(hidden_TD.double(), weight_VD.double(), bias_V.double())
    for x, truth in zip(
        linear_logprob_entropy(hidden_TD, weight_VD, token_T, bias_V=bias_V, logits_dtype=torch.float64, logits_budget=budget),
        logprob_entropy(logits_TV, token_T),
        strict=True,
    ):
        torch.testing.assert_close(x.double(), truth, atol=1e-12, rtol=0)


# Value loss


def test_value_loss_by_hand():
    value_T, old_value_T, return_T = of(1.0, 1.0, 0.0).requires_grad_(), of(0.5, 0.9, 0.1), of(2.0, 0.0, 1.0)
    # clipped values 0.7, 1.0, 0.0: only the first is clipped, and its clipped error (1.3) is the larger
    loss, num_clipped = value_loss(value_T, old_value_T, return_T, of(1.0, 2.0, 0.5), clip=0.2)
    assert loss.item() == pytest.approx(0.5 * (1.3**2 + 2 * 1.0 + 0.5 * 1.0))
    assert num_clipped == 1
    (grad,) = torch.autograd.grad(loss, value_T)
    assert grad.tolist() == close(0.0, 2.0, -0.5)


def test_value_loss_keeps_the_larger_error_when_the_clip_would_hide_it():
    # moved from 0 to 1 away from the return 0: the clipped value 0.2 has the smaller error, so the gradient survives
    value_T = of(1.0).requires_grad_()
    loss, num_clipped = value_loss(value_T, of(0.0), of(0.0), of(1.0), clip=0.2)
    assert (loss.item(), num_clipped.item()) == (0.5, 0)
    assert torch.autograd.grad(loss, value_T)[0].item() == 1.0


def test_rounding_inside_the_clip_is_not_counted_as_clipping():
    value_T, old_value_T, return_T = draw(4096, scale=0.001), 0.1 * draw(4096, seed=1).tanh(), draw(4096, seed=2)
    assert (old_value_T + (value_T - old_value_T) != value_T).any()  # the difference rounds, since old is the larger
    assert value_loss(value_T, old_value_T, return_T, torch.ones(4096), clip=0.2)[1] == 0


def test_value_loss_without_a_clip_is_the_squared_error():
    loss, num_clipped = value_loss(of(1.0, 3.0), of(0.0, 0.0), of(2.0, 1.0), of(1.0, 1.0), clip=None)
    assert (loss.item(), num_clipped.item()) == (0.5 * (1 + 4), 0)


def test_value_loss_of_a_token_of_weight_zero_may_be_nan():
    nan = math.nan
    value_T = of(nan, 1.0).requires_grad_()
    loss, num_clipped = value_loss(value_T, of(nan, 1.0), of(nan, 2.0), of(0.0, 1.0))
    assert (loss.item(), num_clipped.item()) == (0.5, 0)
    assert torch.autograd.grad(loss, value_T)[0].tolist() == [0.0, -1.0]


# Refusals

X, I3 = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)
Z3 = torch.zeros(3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: kl_penalty(Z3, Z3, "k4"), "k1, k2 or k3, got 'k4'"),
        (lambda: kl_penalty(Z3, torch.zeros(4)), r"\(3,\) and \(4,\)"),
        (lambda: logprob_entropy(Z3, I3), r"logits \(T, V\)"),
        (lambda: logprob_entropy(X, torch.zeros(4, dtype=torch.int64)), r"\(3, 5\) and \(4,\)"),
        (lambda: logprob_entropy(X, I3.int()), "token_T must be int64, got torch.int32"),
        (lambda: logprob_entropy(X, I3, temperature=0.0), "temperature must be > 0, got 0.0"),
        (lambda: logprob_entropy(X, I3, temperature=math.nan), "temperature must be > 0, got nan"),
        (lambda: logprob_entropy(X, I3, temperature=torch.ones(4)), "temperature"),
        (lambda: logprob_entropy(X, I3, softcap=-1.0), "softcap must be > 0 or None, got -1.0"),
        (lambda: ppo_loss(X, I3, torch.zeros(2), Z3, Z3), r"old_logprob_T \(T,\) = \(3,\), got \(2,\)"),
        (lambda: ppo_loss(X, I3, Z3, torch.zeros(2), Z3), "advantage_T"),
        (lambda: ppo_loss(X, I3, Z3, Z3, torch.zeros(2)), "weight_T"),
        (lambda: ppo_loss(X, I3, Z3, Z3, Z3, importance_weight_T=torch.zeros(2)), "importance_weight_T"),
        (lambda: ppo_loss(X, I3, Z3, Z3, Z3, ref_logprob_T=torch.zeros(2)), "ref_logprob_T"),
        (lambda: ppo_loss(X, I3, Z3, Z3, Z3, dual_clip=1.0), "dual_clip must be > 1 or None, got 1.0"),
        (lambda: ppo_loss(X, I3, Z3, Z3, Z3, kl_kind="k9"), "kl_kind must be k1, k2 or k3, got 'k9'"),
        (lambda: linear_logprob_entropy(X, torch.zeros(9, 4), I3), r"hidden \(T, D\) and weight \(V, D\)"),
        (lambda: linear_logprob_entropy(X, torch.zeros(9, 5), I3.int()), "int64"),
        (lambda: linear_ppo_loss(X, torch.zeros(9, 5), I3, Z3, Z3, Z3, temperature=-1.0), "temperature"),
        (lambda: linear_ppo_loss(X, torch.zeros(9, 5), I3, Z3, Z3, torch.zeros(2)), "weight_T"),
        (lambda: value_loss(Z3, Z3, torch.zeros(2), Z3), r"return_T \(3,\), got \(2,\)"),
        (lambda: value_loss(Z3, Z3, Z3, Z3, clip=0.0), "clip must be > 0 or None, got 0.0"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
